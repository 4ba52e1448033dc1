"""Gradient of the weight of a 1x1 convolution: both operands are read where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastconv.cpu.band import locate, view
from fastconv.cpu.grad_weight import outer
from fastconv.cpu.grad_weight.outer import Division, Pixels, add_products, find_task, pack_pixels
from fastconv.cpu.im2col import make_windows
from fastconv.cpu.simd import Kernel, Tile, advance, allocate, pointer, release

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

TILES = outer.TILES


def _plan(problem: ConvProblem, tile: Tile, device: Device) -> tuple[Division, Pixels]:
    """Divide the pixels into blocks."""
    pixels = outer.pixels_of_block(problem, tile, device, gathered=1)
    cut = outer.cut_pixels(problem, pixels)
    return outer.divide(problem, tile, device, problem.N * problem.O * cut.blocks), cut


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    d, _ = _plan(problem, tile, device)
    return outer.cost(problem, tile, device, d, 0.0)


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes of sums and of the packed blocks that all threads hold."""
    d, _ = _plan(problem, tile, device)
    return outer.workspace(problem, d, 0)


def run(problem: ConvProblem, tile: Tile, device: Device, operands: Operands) -> None:
    """Compute the gradient; operands.weight is that of the output."""
    d, cut = _plan(problem, tile, device)
    block = outer.make_sums_block(problem, tile, device)
    x, y = view(operands.x), view(operands.weight)
    a_rows = outer.row_offsets(d, np.arange(d.c_step) * x[2])

    out = outer.by_group(problem, operands.out)
    outer.run(problem, block, d, out, _run, make_windows(problem), cut, a_rows, x, y)


@Kernel
def _run(block, first, last, d, g, cut, a_rows, x, y, sums):
    panels = allocate(block, cut.columns * d.columns)
    a_pixels = np.empty(cut.columns, np.int64)
    for task in range(first, last):
        group, c, k, k_count, first_block, last_block = find_task(d, task)
        total = advance(pointer(block, sums), task * d.rows * d.k_step)
        for number in range(first_block, last_block):
            rest, index = divmod(number, cut.blocks)
            n, o = divmod(rest, g.O)
            pixel = index * cut.columns
            count = min(cut.columns, g.P * g.Q - pixel)
            for j in range(count):
                p, q = divmod(pixel + j, g.Q)
                a_pixels[j] = p * g.stride_h * x[4] + q * g.stride_w * x[5]
            image = locate(block, x, (n, group * d.C + c, o * g.stride_d, 0, 0))
            plane = locate(block, y, (n, group * d.K + k, o, 0, 0))
            pack_pixels(block, panels, plane, y, g.Q, pixel, count, k_count)
            add_products(block, image, d.rows, a_rows, a_pixels, panels, count, k_count, total, d.k_step)
    release(panels)
