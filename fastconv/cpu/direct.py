"""Direct convolution: every tap is a shift of the packed input band, nothing is gathered per tap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastconv.cpu import band, band_last
from fastconv.cpu.simd import Block, Tile

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

TILES = (Tile(8, 3), Tile(6, 4), Tile(4, 3), Tile(2, 4))


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    return band.cost(problem, tile, device, device.l2 // 2, aligned=problem.order == "NHWC")


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes of packed input that all threads hold together, and of a repacked weight."""
    if problem.order == "NHWC":
        return band_last.workspace(problem, _block(problem, tile, device), device)
    return band.workspace(problem, _block(problem, tile, device), device.l2 // 2)


def prepare(problem: ConvProblem, tile: Tile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the weight as the kernel reads it: as it is, or packed for vectors of channels."""
    if problem.order == "NHWC":
        return band_last.prepare(problem, _block(problem, tile, device), weight)
    return np.ascontiguousarray(weight)


def run(problem: ConvProblem, tile: Tile, device: Device, operands: Operands) -> None:
    """Convolve; the weight is prepared or as given."""
    block = _block(problem, tile, device)
    if problem.order == "NHWC":
        band_last.run(problem, block, device, operands)
        return
    geometry, tables = band.plan_bands(problem, block, device.l2 // 2, band.task_threads(problem))
    band.run(problem, block, geometry, tables, operands)


def _block(problem: ConvProblem, tile: Tile, device: Device) -> Block:
    """Return the tile for a memory order: its rows are output channels, or, channels last, pixels."""
    return band.make_block(problem, tile, device, "columns" if problem.order == "NHWC" else "rows")
