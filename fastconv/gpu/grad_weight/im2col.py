"""Gradient of the weight as a matrix product; its columns are the terms (c, t, r, s), gathered on loading."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastconv.gpu.grad_weight import outer

if TYPE_CHECKING:
    from fastconv.gpu.hardware import Device
    from fastconv.gpu.product import Tile
    from fastconv.gpu.source import Kernel
    from fastconv.problem import ConvProblem, Operands

TILES = outer.TILES


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds."""
    return outer.seconds(problem, tile, device, has_windows=True)


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes of the parts' sums."""
    return outer.workspace(problem, outer.divide(problem, tile, device).parts)


def run(problem: ConvProblem, tile: Tile, device: Device, operands: Operands) -> None:
    """Compute the gradient; operands.weight is that of the output."""
    x_loads = outer.find_loads(operands.x, problem.C // problem.groups, has_pixels=False)
    outer.run("im2col", problem, tile, device, operands, x_loads)


def kernels(dtype: str, order: str, tile: Tile) -> list[Kernel]:
    """Return kernels that stand for all of a tile."""
    fours = ("SINGLE", "PIXELS") if order == "NCHW" else ("CHANNELS", "CHANNELS")
    return outer.kernels("im2col", dtype, order, tile, [("SINGLE", "SINGLE"), fours])
