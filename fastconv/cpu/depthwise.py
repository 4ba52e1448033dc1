"""Depthwise convolution: every input channel has its own filters; a band of one channel lies in L1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastconv.cpu import band, band_last, threads
from fastconv.cpu.device import itemsize
from fastconv.cpu.simd import Block, Tile

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Epilogue

TILES = (Tile(1, 8), Tile(1, 4), Tile(2, 4), Tile(4, 3))


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    return band.cost(problem, tile, device, device.l1 // 2)


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes of packed input that all threads hold together."""
    workers = threads.thread_count()
    if _by_channels(problem):
        g = band_last.plan_bands(problem, _channel_block(problem, tile, device), device.l1 // 2, workers)
        return itemsize(problem) * (workers * band_last.band_elements(g) + problem.parameters)
    return (
        workers
        * itemsize(problem)
        * band.band_elements(*band.plan_bands(problem, tile, device.l1 // 2, workers))
    )


def prepare(problem: ConvProblem, tile: Tile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the weight as the kernel reads it: as it is, or packed for vectors of channels."""
    if _by_channels(problem):
        return band_last.prepare(problem, _channel_block(problem, tile, device), weight)
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
    if _by_channels(problem):
        block = _channel_block(problem, tile, device)
        band_last.run(problem, block, device, x, weight, bias, residual, epilogue, out)
        return
    dtype = problem.compute_dtype
    block = Block(dtype, tile.rows, tile.vectors, device.lanes(dtype))
    geometry, tables = band.plan_bands(problem, tile, device.l1 // 2, band.task_threads(problem))
    band.run(problem, block, geometry, tables, x, np.ascontiguousarray(weight), bias, residual, epilogue, out)


def _by_channels(problem: ConvProblem) -> bool:
    """Say whether vectors run over channels: channels last, one filter per channel."""
    return problem.order == "NHWC" and problem.K == problem.C


def _channel_block(problem: ConvProblem, tile: Tile, device: Device) -> Block:
    """Return the tile turned: `vectors` pixels, each `rows` vectors of channels wide."""
    dtype = problem.compute_dtype
    return Block(dtype, tile.vectors, tile.rows, device.lanes(dtype), "elementwise")
