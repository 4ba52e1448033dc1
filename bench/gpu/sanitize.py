"""Runs bench.gpu.once under each tool of NVIDIA's compute-sanitizer, where that is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

from bench.gpu.clock import Deadline
from bench.gpu.device import SANITIZER, SANITIZER_PATH
from bench.rows import Row
from bench.versions import CHECKOUT

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 9  # the exit status by which the tool says that it found something
SCRIPT = [sys.executable, "-m", "bench.gpu.once"]
SHOWN = 20  # lines of a tool's findings that are kept

_PLAN = re.compile(r"^plan (\d+) of (\d+): ", re.MULTILINE)
_SUMMARY = re.compile(r"^=+ (.*SUMMARY.*)$", re.MULTILINE)


def run(deadline: Deadline) -> Iterator[Row]:
    """A `sanitized` row per tool, or a `left_out` row where it is missing or its time was too short."""
    sanitizer = shutil.which(SANITIZER, path=SANITIZER_PATH)
    if sanitizer is None:
        reason = f"{SANITIZER} is neither on PATH nor in /usr/local/cuda/bin"
        yield {"kind": "left_out", "reason": reason}
        return
    for number, tool in enumerate(TOOLS):
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *SCRIPT]
        yield run_tool(tool, command, deadline.part(1 / (len(TOOLS) - number)))


def run_tool(tool: str, command: list[str], deadline: Deadline) -> Row:
    """Run one tool; what it saw before its time was up counts if it is a finding."""
    try:
        done = subprocess.run(
            command, cwd=CHECKOUT, timeout=deadline.left(), check=False, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as stopped:
        text = stopped.output.decode(errors="replace") if stopped.output else ""
        reason = f"{tool} was stopped after {deadline.seconds:.0f} s, {progress(text)}"
        return {"kind": "left_out", "tool": tool, "reason": reason}
    return judge_output(tool, done.returncode, done.stdout)


def judge_output(tool: str, status: int, text: str) -> Row:
    """The verdict on a tool that has ended: passed only if it ended well and every plan ran."""
    summaries = _SUMMARY.findall(text)
    ran, total = _count(text)
    passed = status == 0 and 0 < ran == total and bool(summaries)
    reason = "" if passed else f"exit status {status}, {progress(text)}\n{_findings(text)}"
    return {
        "kind": "sanitized", "tool": tool, "plans": ran, "status": status,
        "summary": summaries[-1] if summaries else "", "passed": passed, "reason": reason,
    }  # fmt: skip


def progress(text: str) -> str:
    """How far the script came, in words."""
    ran, total = _count(text)
    return f"{ran} of {total} plans had run" if total else "no plan had run"


def _count(text: str) -> tuple[int, int]:
    found = _PLAN.findall(text)
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def _findings(text: str) -> str:
    """The tool's own lines, or the last ones of the script if the tool said nothing."""
    lines = text.splitlines()
    own = [line for line in lines if line.startswith("=====")]
    return "\n".join(own[:SHOWN] if own else lines[-SHOWN:])
