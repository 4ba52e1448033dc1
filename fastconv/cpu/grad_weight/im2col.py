"""Gradient of the weight by im2col and GEMM: the rows of A are the gathered taps of a block of pixels."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fastconv.cpu.band import locate, view
from fastconv.cpu.grad_weight import outer
from fastconv.cpu.grad_weight.outer import (
    Division,
    Pixels,
    add_products,
    allocate_sums,
    begin_sums,
    end_sums,
    find_task,
    pack_pixels,
)
from fastconv.cpu.im2col import Windows, gather, make_windows
from fastconv.cpu.simd import Kernel, Tile, allocate, release

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

TILES = outer.TILES


@lru_cache(maxsize=256)
def _plan(
    problem: ConvProblem, tile: Tile, device: Device
) -> tuple[Division, Windows, Pixels, np.ndarray, np.ndarray]:
    """Divide the pixels into blocks, of which a task gathers some channels; offsets of A come last."""
    pixels = outer.pixels_of_block(
        problem, tile, device, gathered=problem.gemm_k * problem.groups // problem.C
    )
    cut = outer.cut_pixels(problem, pixels)
    d = outer.divide(problem, tile, device, problem.N * problem.O * cut.blocks)
    rows = outer.row_offsets(d, np.arange(d.c_step * d.taps) * cut.columns)
    return d, make_windows(problem)._replace(C=d.c_step), cut, rows, np.arange(cut.columns)


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    d = _plan(problem, tile, device)[0]
    lines = problem.groups * problem.gemm_k * problem.N * problem.O * problem.P
    return outer.cost(
        problem, tile, device, d, device.copy_cycles(problem, lines, problem.Q, problem.stride[2])
    )


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes of sums, and of the gathered and packed blocks that all threads hold."""
    d, _, cut, _, _ = _plan(problem, tile, device)
    return outer.workspace(problem, d, d.c_step * d.taps * cut.columns)


def run(problem: ConvProblem, tile: Tile, device: Device, operands: Operands) -> None:
    """Compute the gradient; operands.weight is that of the output."""
    d, g, cut, a_rows, a_pixels = _plan(problem, tile, device)
    block = outer.make_sums_block(problem, tile, device)
    x, y = view(operands.x), view(operands.weight)

    out = outer.by_group(problem, operands.out)
    outer.run(problem, block, d, out, _run, g, cut, a_rows, a_pixels, x, y)


@Kernel
def _run(block, first, last, d, g, cut, a_rows, a_pixels, x, y, sums, target):
    columns = allocate(block, d.c_step * d.taps * cut.columns)
    panels = allocate(block, cut.columns * d.columns)
    own = allocate_sums(block, d)
    for task in range(first, last):
        group, c, k, k_count, first_block, last_block = find_task(d, task)
        total = begin_sums(block, d, task, sums, own)
        for number in range(first_block, last_block):
            rest, index = divmod(number, cut.blocks)
            n, o = divmod(rest, g.O)
            pixel = index * cut.columns
            count = min(cut.columns, g.P * g.Q - pixel)
            image = locate(block, x, (n, group * d.C + c, 0, 0, 0))
            gather(block, columns, cut.columns, cut.columns, image, x, g, o, pixel, count)
            plane = locate(block, y, (n, group * d.K + k, o, 0, 0))
            pack_pixels(block, panels, plane, y, g.Q, pixel, count, k_count)
            add_products(block, columns, d.rows, a_rows, a_pixels, panels, count, k_count, total, d.k_step)
        end_sums(block, d, task, total, target)
    release(columns)
    release(panels)
    release(own)
