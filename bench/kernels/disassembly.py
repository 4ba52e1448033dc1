"""Machine code enters, the instructions of its main loop leave, counted: what a GPU is kept busy with.

The disassembler is NVIDIA's nvdisasm: the triton wheel carries it, and so does the CUDA toolkit.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from bench.kernels.loops import Span, main_span
from bench.session import CommandError

MISSING = "nvdisasm is missing: pip install triton, or put the CUDA toolkit on the PATH"
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(@!?\w+)?\s*([A-Z][\w.]*)([^;]*);")
_NEVER = "@!PT"  # the condition of instructions that only take up room, which ptxas puts before LDGSTS
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}  # 32 is not written
_MULTIPLY_ADD = ("FFMA", "FFMA2", "DFMA")


class Instruction(NamedTuple):
    """One instruction: FFMA.FTZ has the name FFMA; a branch has the label it jumps to."""

    name: str
    modifiers: tuple[str, ...]
    target: str

    @property
    def bits(self) -> int:
        """How much a load or store moves per thread."""
        return next((_BITS[word] for word in self.modifiers if word in _BITS), 32)


class Loop(NamedTuple):
    """The instructions of one loop, counted."""

    instructions: int
    multiply_adds: int
    global_loads: dict[int, int]  # bits per thread -> how many; copies to shared memory among them
    shared_loads: dict[int, int]
    shared_stores: dict[int, int]
    barriers: int

    @property
    def share(self) -> float:
        """The share of multiply-adds: what they could reach of the peak if nothing were waited for."""
        return self.multiply_adds / self.instructions


def find_nvdisasm() -> str | None:
    """Return the disassembler of the triton wheel, or the one on the PATH."""
    try:
        files = metadata.files("triton") or []
    except metadata.PackageNotFoundError:
        files = []
    found = [str(file.locate()) for file in files if file.name.startswith("nvdisasm")]
    return found[0] if found else shutil.which("nvdisasm")


@lru_cache(maxsize=1)
def _nvdisasm() -> str:
    found = find_nvdisasm()
    if found is None:
        raise CommandError(MISSING)
    return found


def disassemble(cubin: bytes) -> str:
    """Return the instructions of machine code as text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [_nvdisasm(), "--print-code", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main_loop(text: str) -> Loop | None:
    """Return the innermost loop with most multiply-adds; None if no loop has any."""
    code, labels = _parse(text)
    branches = [
        (at, labels[instruction.target])
        for at, instruction in enumerate(code)
        if instruction.name == "BRA" and instruction.target in labels
    ]
    span = main_span(branches, lambda span: _count(_part(code, span)).multiply_adds)
    return None if span is None else _count(_part(code, span))


def _part(code: Sequence[Instruction], span: Span) -> Sequence[Instruction]:
    return code[span[0] : span[1] + 1]


def _parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions, and for every label the index of the one that follows it."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            condition, words, operands = found.groups()
            name, *modifiers = ["NOP"] if condition == _NEVER else words.split(".")
            target = _TARGET.search(operands)
            code.append(Instruction(name, tuple(modifiers), target[1] if target else ""))
    return code, labels


def _count(code: Sequence[Instruction]) -> Loop:
    return Loop(
        instructions=len(code),
        multiply_adds=sum(instruction.name in _MULTIPLY_ADD for instruction in code),
        global_loads=_widths(code, "LDG", "LDGSTS"),
        shared_loads=_widths(code, "LDS"),
        shared_stores=_widths(code, "STS"),
        barriers=sum(instruction.name == "BAR" for instruction in code),
    )


def _widths(code: Sequence[Instruction], *names: str) -> dict[int, int]:
    """Count the instructions of these names by the bits they move."""
    found = [instruction.bits for instruction in code if instruction.name in names]
    return {bits: found.count(bits) for bits in sorted(set(found), reverse=True)}
