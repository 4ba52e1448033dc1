"""Assembly of a kernel enters; for every access to shared memory, the address of each thread leaves.

An address is followed back to the thread's number through the instructions that computed it. What all
threads share shifts every address alike and decides nothing about banks: parameters and the block's number
count as 1, arrays begin at 0, and a register that a loop changes has the value that the loop begins with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bench.kernels.loops import main_span

_STATEMENT = re.compile(r"^\s*(?:(\$\w+):|(?:@!?%\w+\s+)?([a-z][\w.]*)\s+([^;]*);)", re.MULTILINE)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]")
_ACCESS = re.compile(r"(ld|st)\.(?:volatile\.)?shared(?:\.v(\d))?\.[a-z]+(\d+)")
_REGISTER = re.compile(r"%\w+")
_COPY = "cp.async."  # from global to shared memory: [shared], [global], bytes
_SPECIAL = {"%ctaid.x": 1, "%nctaid.x": 1, "WARP_SZ": 32}


class Statement(NamedTuple):
    """One instruction; a label counts as one that does nothing."""

    name: str
    operands: list[str]


class Access(NamedTuple):
    """One instruction that reads or writes shared memory."""

    is_load: bool
    size: int  # bytes per thread
    addresses: np.ndarray  # bytes, one of each thread


def shared_accesses(text: str, threads: int) -> list[Access]:
    """Return all accesses to shared memory of the one kernel in a program, in the order of its text."""
    statements, _ = _parse(text)
    return _find_accesses(statements, _Follower(statements, threads))


def main_loop_accesses(text: str, threads: int) -> list[Access]:
    """Return those of the innermost loop with most multiply-adds; none without such a loop."""
    statements, labels = _parse(text)
    branches = [
        (at, labels[line.operands[-1]]) for at, line in enumerate(statements) if line.name.startswith("bra")
    ]
    span = main_span(branches, lambda span: _multiply_adds(statements[span[0] : span[1] + 1]))
    if span is None:
        return []
    return _find_accesses(statements[span[0] : span[1] + 1], _Follower(statements, threads))


def _parse(text: str) -> tuple[list[Statement], dict[str, int]]:
    """Return the statements, and where among them each label stands."""
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    for label, name, operands in _STATEMENT.findall(text):
        if label:
            labels[label] = len(statements)
        statements.append(Statement(name, _OPERAND.findall(operands)))
    return statements, labels


def _multiply_adds(statements: list[Statement]) -> int:
    return sum(line.name.startswith("fma.") for line in statements)


def _find_accesses(statements: list[Statement], follow: _Follower) -> list[Access]:
    found = []
    for name, operands in statements:
        if access := _ACCESS.match(name):
            kind, vector, bits = access.groups()
            address = operands[1 if kind == "ld" else 0]
            size = int(vector or 1) * int(bits) // 8
            found.append(Access(kind == "ld", size, follow.address(address)))
        elif name.startswith(_COPY) and ".shared" in name:
            found.append(Access(False, int(operands[2]), follow.address(operands[0])))
    return found


class _Follower:
    """Computes registers for all threads of a block."""

    def __init__(self, statements: list[Statement], threads: int):
        self._known = {"%tid.x": np.arange(threads)}
        self._definitions: dict[str, list[tuple[str, list[str]]]] = {}
        for name, operands in statements:
            target, *sources = operands or ("",)
            for register in () if target.startswith("[") else _REGISTER.findall(target):
                self._definitions.setdefault(register, []).append((name, sources))

    def address(self, operand: str) -> np.ndarray:
        """Return what `[%r1+16]` points to."""
        if (found := _ADDRESS.fullmatch(operand)) is None:
            raise ValueError(f"{operand} is no address that is known here")
        return self._value(found[1]) + int(found[2] or 0)

    def _value(self, operand: str) -> np.ndarray:
        if operand in self._known:
            return self._known[operand]
        if operand not in self._definitions:
            return np.full(len(self._known["%tid.x"]), self._constant(operand))
        first, *others = self._definitions[operand]
        value = self._known[operand] = self._compute(*first)
        for other in others:
            if np.ptp(self._compute(*other) - value):
                raise ValueError(f"{operand} differs between threads by the path they took: {first}, {other}")
        return value

    def _constant(self, operand: str) -> int:
        if operand in _SPECIAL:
            return _SPECIAL[operand]
        if operand.startswith("%"):
            raise ValueError(f"what {operand} holds is not known")
        try:
            return int(operand, 0)
        except ValueError:
            return 0  # the name of an array

    def _compute(self, name: str, operands: list[str]) -> np.ndarray:
        if name.startswith("ld.param"):
            return np.ones_like(self._known["%tid.x"])
        operation, *modifiers, kind = name.split(".")
        if operation == "setp":
            operation = modifiers[0]
        elif operation in ("mul", "mad"):
            operation = f"{operation}.{modifiers[0]}"
        if operation not in _OPERATIONS:
            raise ValueError(f"an address depends on {name}, which nothing here computes")
        values = [_wrap(self._value(operand), kind) for operand in operands]
        return _wrap(_OPERATIONS[operation](*values), kind[0] + "64" if "wide" in modifiers else kind)


def _wrap(value: np.ndarray, kind: str) -> np.ndarray:
    """Keep the bits that a type has: of u32 and b32 as they count, of s32 with their sign."""
    if kind == "pred" or value.dtype == bool:
        return value
    letter, bits = kind[0], int(kind[1:])
    if bits == 64:
        return value
    value = value & ((1 << bits) - 1)
    return value - ((value >> (bits - 1)) << bits) if letter == "s" else value


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a - np.fmod(a, b)) // b  # towards 0, as C++ does


def _choose(a: np.ndarray, b: np.ndarray, condition: np.ndarray) -> np.ndarray:
    return np.where(condition, a, b)


_OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "cvta": lambda a: a,
    "add": np.add,
    "sub": np.subtract,
    "mul.lo": np.multiply,
    "mul.wide": np.multiply,
    "mul.hi": lambda a, b: a * b >> 32,
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: a * b + c,
    "div": _divide,
    "rem": np.fmod,
    "min": np.minimum,
    "max": np.maximum,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "selp": _choose,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
