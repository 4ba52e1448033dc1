"""What a kernel takes enters; how many of its blocks a multiprocessor (SM) holds at once leaves."""

from __future__ import annotations

from typing import NamedTuple

from bench.kernels.nvrtc import Resources

WARP = 32
REGISTERS_PER_SM = 1 << 16
MAX_REGISTERS = 255  # of a thread
MAX_STATIC_SHARED = 48 << 10  # bytes of a block that a kernel may declare

# Allocation goes by these steps (NVIDIA's occupancy calculator, cuda_occupancy.h): the registers of a warp by
# 256, its warps evenly over the SM's four partitions.
_REGISTER_STEP = 256
_PARTITIONS = 4


class Limits(NamedTuple):
    """What one SM holds at once."""

    warps: int
    blocks: int
    shared: int  # bytes
    shared_step: int  # bytes by which shared memory is handed out
    shared_reserved: int  # bytes of every block that are the system's


# CUDA Programming Guide, "Technical Specifications per Compute Capability".
LIMITS = {
    70: Limits(64, 32, 96 << 10, 256, 0),
    75: Limits(32, 16, 64 << 10, 256, 0),
    80: Limits(64, 32, 164 << 10, 128, 1 << 10),
    86: Limits(48, 16, 100 << 10, 128, 1 << 10),
    89: Limits(48, 24, 100 << 10, 128, 1 << 10),
    90: Limits(64, 32, 228 << 10, 128, 1 << 10),
    100: Limits(64, 32, 228 << 10, 128, 1 << 10),
    120: Limits(48, 24, 100 << 10, 128, 1 << 10),
}


def blocks_per_sm(resources: Resources, threads: int, sm: int) -> int:
    """Return how many blocks of a kernel an SM runs at once."""
    limits = LIMITS[sm]
    warps = _divide_up(threads, WARP)
    registers = _round_up(resources.registers * WARP, _REGISTER_STEP)
    held = REGISTERS_PER_SM // _PARTITIONS // registers * _PARTITIONS  # warps whose registers fit
    possible = [limits.blocks, limits.warps // warps, held // _round_up(warps, _PARTITIONS)]
    shared = _round_up(resources.shared + limits.shared_reserved, limits.shared_step)
    if shared:
        possible.append(limits.shared // shared)
    return min(possible)


def occupancy(resources: Resources, threads: int, sm: int) -> float:
    """Return the share of an SM's warps that can be resident."""
    return blocks_per_sm(resources, threads, sm) * _divide_up(threads, WARP) / LIMITS[sm].warps


def faults(resources: Resources, threads: int, sm: int) -> list[str]:
    """Return what must not be, in words: spills, or more than a block may have."""
    checks = {
        f"{resources.spilled} bytes are spilled": resources.spilled > 0,
        f"a stack frame of {resources.stack} bytes": resources.stack > 0,
        f"{resources.registers} registers": resources.registers > MAX_REGISTERS,
        f"{resources.shared} bytes of shared memory": resources.shared > MAX_STATIC_SHARED,
        f"not one block of {threads} threads fits": blocks_per_sm(resources, threads, sm) < 1,
    }
    return [words for words, wrong in checks.items() if wrong]


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _divide_up(a, b) * b
