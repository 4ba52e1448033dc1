"""1x1 convolution: a matrix product of the weight and the pixels, read where they lie."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from fastconv.cpu import band, direct
from fastconv.cpu.simd import Block, Tile

if TYPE_CHECKING:
    import numpy as np

    from fastconv.cpu.band import Geometry, Tables
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

TILES = direct.TILES


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    if problem.order == "NHWC" or not _reads_in_place(problem):
        return direct.cost(problem, tile, device)
    tiles, pixels, lanes = 1, problem.P * problem.Q, device.lanes(problem.compute_dtype)
    if pixels % lanes and lanes < pixels < tile.vectors * lanes:  # two tiles that overlap, within the input
        tiles, pixels = 2, math.ceil(pixels / lanes / 2) * lanes
    cycles = device.multiply_cycles(tile, problem.gemm_m, pixels, problem.gemm_k, problem.compute_dtype)
    return device.seconds(problem, problem.N * problem.groups * problem.O * tiles * cycles)


workspace = direct.workspace  # what is packed of an array whose pixels do not lie together; else nothing is
prepare = direct.prepare


def run(problem: ConvProblem, tile: Tile, device: Device, operands: Operands) -> None:
    """Convolve; the weight is prepared or as given."""
    x, out, residual = operands.x, operands.out, operands.residual
    arrays = [x, out] if residual is None else [x, out, residual]
    plan = None
    if all(map(_is_one_row, arrays)):
        plan = _plan_in_place(problem, tile, device, x.strides[1] // x.itemsize, band.task_threads(problem))
    if plan is None:
        direct.run(problem, tile, device, operands)
        return
    rows, block, geometry, tables = plan
    residual = None if residual is None else _flatten(residual)
    flat = operands._replace(x=_flatten(x), out=_flatten(out), residual=residual)
    band.run(rows, block, geometry, tables, flat)


@lru_cache(maxsize=256)
def _plan_in_place(
    problem: ConvProblem, tile: Tile, device: Device, channel_step: int, workers: int
) -> tuple[ConvProblem, Block, Geometry, Tables] | None:
    """Return how planes are read in place, each as one row, or None where they cannot be."""
    if problem.order == "NHWC" or not _reads_in_place(problem):
        return None
    rows, block = replace(problem, H=1, W=problem.H * problem.W), band.make_block(problem, tile, device)
    geometry, tables = band.plan_bands(rows, block, device.l2 // 2, workers)
    last_band = rows.W - (geometry.col_bands - 1) * geometry.cols
    if last_band < block.lanes:  # less than a vector: it would be read past its end
        return None
    channels = band.count_offsets(geometry.C, channel_step)
    return rows, block, geometry._replace(in_place=1), tables._replace(b_taps=channels)


def _reads_in_place(problem: ConvProblem) -> bool:
    """Say whether neighbouring outputs read neighbouring inputs."""
    return problem.stride[1:] == (1, 1)


def _is_one_row(array: np.ndarray) -> bool:
    """Say whether the pixels of a plane lie one after the other."""
    row = array.shape[4] * array.itemsize
    return array.strides[4] == array.itemsize and (array.shape[3] == 1 or array.strides[3] == row)


def _flatten(array: np.ndarray) -> np.ndarray:
    """Return a view with every plane as one row."""
    return array.reshape(*array.shape[:3], 1, -1)
