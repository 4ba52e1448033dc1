"""1x1 convolution: a matrix product of the weight and the pixels, read where they lie."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fastconv.cpu import band, direct
from fastconv.cpu.simd import Block, Tile

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Epilogue

TILES = direct.TILES


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    if problem.order == "NHWC" or not _reads_in_place(problem):
        return direct.cost(problem, tile, device)
    cycles = device.multiply_cycles(
        tile,
        problem.K // problem.groups,
        problem.P * problem.Q,
        problem.C // problem.groups,
        problem.compute_dtype,
    )
    return device.seconds(problem, problem.N * problem.groups * problem.O * cycles)


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes of input that is packed: none where the pixels are read in place."""
    if problem.order == "NCHW" and _reads_in_place(problem):
        return 0
    return direct.workspace(problem, tile, device)


prepare = direct.prepare


def run(
    problem: ConvProblem,
    tile: Tile,
    device: Device,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    epilogue: Epilogue,
    out: np.ndarray,
) -> None:
    """Convolve x with a weight, prepared or as given, into out; all of rank 5."""
    arrays = [x, out] if residual is None else [x, out, residual]
    in_place = problem.order == "NCHW" and _reads_in_place(problem) and all(map(_is_one_row, arrays))
    dtype = problem.compute_dtype
    block = Block(dtype, tile.rows, tile.vectors, device.lanes(dtype))
    rows = replace(problem, H=1, W=problem.H * problem.W)
    geometry, tables = band.plan_bands(rows, tile, device.l2 // 2, band.task_threads(problem))
    last_band = rows.W - (geometry.col_bands - 1) * geometry.cols
    if not in_place or last_band < block.lanes:  # less than a vector: it would be read past its end
        direct.run(problem, tile, device, x, weight, bias, residual, epilogue, out)
        return
    x, out, *more = (_flatten(array) for array in arrays)
    channels = np.arange(geometry.C) * (x.strides[1] // x.itemsize)
    geometry, tables = geometry._replace(direct_b=1), tables._replace(b_taps=channels)
    weight, residual = np.ascontiguousarray(weight), more[0] if more else None
    band.run(rows, block, geometry, tables, x, weight, bias, residual, epilogue, out)


def _reads_in_place(problem: ConvProblem) -> bool:
    return problem.stride[1:] == (1, 1)


def _is_one_row(array: np.ndarray) -> bool:
    """Say whether the pixels of a plane lie one after the other."""
    row = array.shape[4] * array.itemsize
    return array.strides[4] == array.itemsize and (array.shape[3] == 1 or array.strides[3] == row)


def _flatten(array: np.ndarray) -> np.ndarray:
    """Return a view with every plane as one row."""
    return array.reshape(*array.shape[:3], 1, -1)
