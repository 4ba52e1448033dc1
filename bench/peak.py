"""The arithmetic peak of a core: the package's own microkernel on operands that stay in the nearest cache."""

from __future__ import annotations

from time import perf_counter

import numpy as np

from fastconv.cpu import device
from fastconv.cpu.band import address
from fastconv.cpu.simd import Block, Kernel, block_lanes, multiply_tile, pointer

TAPS = 128
REPEATS = 2000


def measure_peak(dtype: str = "float32", seconds: float = 0.3) -> float:
    """Return the FLOP/s that the calling thread reaches, the best of what fits into `seconds`."""
    cpu = device.current()
    rows, vectors = (8, 3) if cpu.registers >= 32 else (4, 3)
    block = Block(dtype, rows, vectors, cpu.lanes(dtype))
    width = vectors * block.lanes
    a, b, c = np.ones(rows * TAPS, dtype), np.ones(TAPS * width, dtype), np.ones(rows * width, dtype)
    arguments = (address(a), address(b), address(c), width)
    _repeat(block, 1, 1, *arguments)  # compiles
    best, end = float("inf"), perf_counter() + seconds
    while perf_counter() < end:
        start = perf_counter()
        _repeat(block, REPEATS, 1, *arguments)
        best = min(best, perf_counter() - start)
    return REPEATS * 2 * a.size * width / best


@Kernel
def _repeat(block, first, last, a, b, c, width):
    target = pointer(block, c)
    for _ in range(first, last):
        multiply_tile(
            block, width // block_lanes(block), pointer(block, a), TAPS, 1,
            pointer(block, b), width, TAPS, target, target, width,
        )  # fmt: skip
