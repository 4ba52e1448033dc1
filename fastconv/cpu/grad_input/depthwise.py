"""Gradient of the input of a depthwise convolution with stride 2, all phases together.

Rows of it are made in pairs, and a vector of grad_y is loaded for all that it adds to; convolutions, phase by
phase, would each read it again and store every other column.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fastconv.cpu.band import arguments_of, columns_touch, finish, locate, task_threads
from fastconv.cpu.depthwise import PLANE_TAP_CYCLES, AnyTile, Geometry, PlaneTile, make_geometry, reads_planes
from fastconv.cpu.device import TILE_CYCLES
from fastconv.cpu.planes import spread_plane
from fastconv.cpu.simd import Block, Kernel, advance, block_extents, table, view_of

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

STORE_CYCLES = 8  # to interleave and store what a vector of grad_y makes


@lru_cache(maxsize=256, typed=True)  # tiles of two classes may hold the same numbers
def suits(problem: ConvProblem, tile: AnyTile) -> bool:
    """Say whether a tile makes neighbouring rows and columns together."""
    by_two = problem.stride[1:] == (2, 2) and problem.dilation[1:] == (1, 1)
    return isinstance(tile, PlaneTile) and by_two and reads_planes(problem)


def cost(problem: ConvProblem, tile: AnyTile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    vectors = math.ceil(problem.H / 2) * math.ceil(problem.W / 2 / device.lanes(problem.compute_dtype))
    cycles = vectors * (problem.gemm_k * PLANE_TAP_CYCLES + STORE_CYCLES)
    return device.seconds(problem, problem.N * problem.C * (TILE_CYCLES + cycles))


def workspace(problem: ConvProblem, tile: AnyTile, device: Device, of_parts: int) -> int:
    """Return the bytes that parts take: arrays that are not read in place are left to them."""
    return of_parts


def prepare(problem: ConvProblem, tile: AnyTile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the weight as the kernel reads it."""
    return np.ascontiguousarray(weight)


def reads(operands: Operands) -> bool:
    """Say whether these arrays are read and written in place."""
    return columns_touch(operands.x, operands.out)


def run(problem: ConvProblem, tile: AnyTile, device: Device, operands: Operands) -> None:
    """Compute the gradient, with no memory beside it; the weight is prepared or as given."""
    block, g = _plan(problem, device)
    tasks, workers = problem.N * problem.C, task_threads(problem)
    _run_planes(block, tasks, workers, g, *arguments_of(problem, operands, 0))


@lru_cache(maxsize=256)
def _plan(problem: ConvProblem, device: Device) -> tuple[Block, Geometry]:
    """Return what of the arguments of `_run_planes` does not change from call to call."""
    dtype = problem.compute_dtype
    block = Block(dtype, 1, 1, device.lanes(dtype), "plane", extents=(problem.R, problem.S))
    return block, make_geometry(problem)


@Kernel
def _run_planes(block, first, last, g, y, w, bias, out, ending):
    y, w, bias, out = view_of(y), table(w), table(bias), view_of(out)
    R, S = block_extents(block)
    for task in range(first, last):
        n, c = divmod(task, g.C)
        spread_plane(
            block, locate(block, y, (n, c, 0, 0, 0)), y[4], g.P, g.Q, advance(w, c * R * S), advance(bias, c),
            g.pad_h, g.pad_w, locate(block, out, (n, c, 0, 0, 0)), out[4], g.H, g.W,
        )  # fmt: skip
        finish(block, out, (n, c, 0, 0, 0), (1, g.H, g.W), ending)
