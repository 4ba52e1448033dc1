"""Verdicts on kernels enter, a page in Markdown leaves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.kernels import nvrtc, occupancy
from bench.kernels.instances import Verdict

FAULTLESS = "No spill, no stack frame, nothing over a limit."
INTRODUCTION = """\
# What the CUDA kernels take of a GPU

The kernels as NVRTC compiles them; nothing here was run. Written by `{command}` at commit {commit}.

Of {known} kernels that the algorithms list: {shown}. Unless these are all, every setting of each algorithm
and dtype occurs in one of them, and for sm_90 every pair of settings. {compilers}.

{faults}

## Registers and occupancy

Registers of a thread, blocks that an SM holds at once, and the share of its warps that are then resident;
shared memory is that of a block, in bytes.
"""

LOOPS = """
## Main loops

The innermost loop with most multiply-adds: how many instructions it has, the share of multiply-adds among
them, and its loads and stores as number x bits per thread (128 bits are four floats; global loads include the
copies that go past the registers). Conflicts: how often shared memory serves the loop's slowest access, by
the addresses that the code computes for the threads of a block; 1 is without conflicts.
"""


def render(verdicts: Sequence[Verdict], known: int, command: str, commit: str) -> str:
    """Return the page; `known` kernels were to be chosen from."""
    head = INTRODUCTION.format(
        command=command,
        commit=commit,
        shown=", ".join(
            f"{sum(verdict.sm == sm for verdict in verdicts)} for sm_{sm}" for sm in _architectures(verdicts)
        ),
        known=known,
        compilers=", ".join(f"sm_{sm} by NVRTC {_version(sm)}" for sm in _architectures(verdicts)),
        faults="\n".join(f"- {fault}" for fault in list_faults(verdicts)) or FAULTLESS,
    )
    page = head + _render_table(_resource_rows(verdicts))
    if any(verdict.loop for verdict in verdicts):
        page += LOOPS + _render_table(_loop_rows(verdicts))
    return page


def list_faults(verdicts: Iterable[Verdict]) -> list[str]:
    """Return every fault of every kernel, a line each."""
    return [
        f"sm_{verdict.sm} {verdict.kernel.name}: {fault}"
        for verdict in verdicts
        for fault in verdict.faults()
    ]


def _architectures(verdicts: Iterable[Verdict]) -> list[int]:
    return sorted({verdict.sm for verdict in verdicts})


def _version(sm: int) -> str:
    return "{}.{}".format(*nvrtc.compiler_for(sm).version)


def _resource_rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    architectures = _architectures(verdicts)
    rows = [["kernel", "threads", "shared", *(f"sm_{sm}" for sm in architectures)]]
    found = {(verdict.kernel.name, verdict.sm): verdict for verdict in verdicts}
    for kernel in sorted({verdict.kernel for verdict in verdicts}, key=lambda kernel: kernel.name):
        here = [found.get((kernel.name, sm)) for sm in architectures]
        shared = max(
            (verdict.resources.shared for verdict in here if verdict and verdict.resources), default=0
        )
        rows.append([kernel.name, str(kernel.threads), str(shared), *map(_resource_cell, here)])
    return rows


def _resource_cell(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    if verdict.resources is None:
        return "not compiled"
    arguments = (verdict.resources, verdict.kernel.threads, verdict.sm)
    spilled = f", {verdict.resources.spilled} B spilled" if verdict.resources.spilled else ""
    blocks, share = occupancy.blocks_per_sm(*arguments), occupancy.occupancy(*arguments)
    return f"{verdict.resources.registers}, {blocks}, {share:.0%}{spilled}"


def _loop_rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    header = ["kernel", "sm", "instructions", "multiply-adds", "global loads", "shared loads"]
    rows = [[*header, "shared stores", "barriers", "conflicts"]]
    for verdict in sorted(verdicts, key=lambda verdict: (verdict.kernel.name, verdict.sm)):
        if loop := verdict.loop:
            moved = map(_widths, (loop.global_loads, loop.shared_loads, loop.shared_stores))
            counts = [str(loop.instructions), f"{loop.share:.1%}", *moved, str(loop.barriers)]
            rows.append([verdict.kernel.name, str(verdict.sm), *counts, str(verdict.conflicts)])
    return rows


def _widths(counts: dict[int, int]) -> str:
    return ", ".join(f"{number} x {bits}" for bits, number in counts.items())


def _render_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
