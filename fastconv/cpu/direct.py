"""Direct convolution: every tap is a shift of the packed input band, nothing is gathered per tap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastconv.cpu import band, band_last, threads
from fastconv.cpu.device import itemsize
from fastconv.cpu.simd import Block, Tile

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Epilogue

TILES = (Tile(8, 3), Tile(6, 4), Tile(4, 3), Tile(2, 4))


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    return band.cost(problem, tile, device, device.l2 // 2)


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes of packed input that all threads hold together, and of a repacked weight."""
    workers = threads.thread_count()
    if problem.order == "NHWC":
        g = band_last.plan_bands(problem, _block(problem, tile, device), device.l2 // 2, workers)
        return itemsize(problem) * (workers * band_last.band_elements(g) + problem.parameters)
    return (
        workers
        * itemsize(problem)
        * band.band_elements(*band.plan_bands(problem, tile, device.l2 // 2, workers))
    )


def prepare(problem: ConvProblem, tile: Tile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the weight as the kernel reads it: as it is, or packed for vectors of channels."""
    if problem.order == "NHWC":
        return band_last.prepare(problem, _block(problem, tile, device), weight)
    return np.ascontiguousarray(weight)


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
    block = _block(problem, tile, device)
    if problem.order == "NHWC":
        band_last.run(problem, block, device, x, weight, bias, residual, epilogue, out)
        return
    geometry, tables = band.plan_bands(problem, tile, device.l2 // 2, band.task_threads(problem))
    band.run(problem, block, geometry, tables, x, np.ascontiguousarray(weight), bias, residual, epilogue, out)


def _block(problem: ConvProblem, tile: Tile, device: Device) -> Block:
    dtype = problem.compute_dtype
    form = "columns" if problem.order == "NHWC" else "rows"
    return Block(dtype, tile.rows, tile.vectors, device.lanes(dtype), form)
