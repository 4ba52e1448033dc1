"""Gradient of the weight without gathering: the rows of A are shifts of the packed band of input."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fastconv.cpu import band
from fastconv.cpu.band import Geometry, Tables, locate, pack_band, view
from fastconv.cpu.grad_weight import outer
from fastconv.cpu.grad_weight.outer import (
    Division,
    add_products,
    allocate_sums,
    begin_sums,
    end_sums,
    find_task,
    pack_row,
)
from fastconv.cpu.simd import Kernel, Tile, allocate, release

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

TILES = outer.TILES


@lru_cache(maxsize=256)
def _plan(problem: ConvProblem, tile: Tile, device: Device) -> tuple[Division, Geometry, Tables, np.ndarray]:
    """Divide the pixels into bands, of which a task packs some channels; offsets of A's rows come last."""
    pixels = outer.pixels_of_block(problem, tile, device, gathered=problem.T)
    cols = band.even_share(problem.Q, pixels)
    rows = band.even_share(problem.P, pixels // cols)
    bands = -(-problem.P // rows) * -(-problem.Q // cols)
    d = outer.divide(problem, tile, device, problem.N * problem.O * bands)
    geometry, tables = band.cut_bands(problem, d.c_step, rows, cols)
    return d, geometry, tables, outer.row_offsets(d, tables.b_taps)


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    d, g, tables, _ = _plan(problem, tile, device)
    packed = device.copy_cycles(problem, band.band_elements(g, tables) / g.Wb, g.Wb, problem.stride[2])
    return outer.cost(problem, tile, device, d, problem.groups * d.c_parts * d.blocks * packed)


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes of sums and of the packed blocks that all threads hold."""
    d, g, tables, _ = _plan(problem, tile, device)
    return outer.workspace(problem, d, band.band_elements(g, tables))


def run(problem: ConvProblem, tile: Tile, device: Device, operands: Operands) -> None:
    """Compute the gradient; operands.weight is that of the output."""
    d, g, tables, rows = _plan(problem, tile, device)
    block = outer.make_sums_block(problem, tile, device)
    elements = band.band_elements(g, tables)
    x, y = view(operands.x), view(operands.weight)

    out = outer.by_group(problem, operands.out)
    outer.run(problem, block, d, out, _run, g, tables, elements, rows, x, y)


@Kernel
def _run(block, first, last, d, g, tables, elements, a_rows, x, y, sums, target):
    packed, panels = allocate(block, elements), allocate(block, g.rows * g.cols * d.columns)
    a_pixels = np.empty(g.rows * g.cols, np.int64)
    own = allocate_sums(block, d)
    for task in range(first, last):
        group, c, k, k_count, first_block, last_block = find_task(d, task)
        total = begin_sums(block, d, task, sums, own)
        for number in range(first_block, last_block):
            n, _, o, p, q, rows, cols = band.find_task(g, number)[2:]
            image = locate(block, x, (n, group * d.C + c, 0, 0, 0))
            pack_band(block, packed, image, x, g, tables, o, p, q, rows)
            for i in range(rows):
                line = locate(block, y, (n, group * d.K + k, o, p + i, q))
                pack_row(block, panels, i * cols, rows * cols, line, y[2], y[5], k_count, cols)
                for j in range(cols):
                    a_pixels[i * cols + j] = i * g.Wb + j
            add_products(
                block, packed, d.rows, a_rows, a_pixels, panels, rows * cols, k_count, total, d.k_step
            )
        end_sums(block, d, task, total, target)
    release(packed)
    release(panels)
    release(own)
