"""Depthwise convolution under a large filter: a tile of several rows of outputs, which share rows of input.

    packed band of one channel           a row of it, loaded once, is multiplied by as many rows of the filter
    +-----------------------+            as there are rows of outputs in the tile that read it:
    | row j                 |  ------->  output row i takes row j - i of the filter
    +-----------------------+

With one row of outputs to a tile every product would need a load of its own, most across two cache lines.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu import band
from fastconv.cpu.band import Geometry, Tables, find_task, find_vectors, finish, locate, pack_band, store_rows
from fastconv.cpu.compiling import part
from fastconv.cpu.device import SUM_CYCLES, TILE_CYCLES, itemsize
from fastconv.cpu.simd import (
    Block,
    Kernel,
    advance,
    allocate,
    block_columns,
    block_lanes,
    block_rows,
    multiply_filter,
    release,
    table,
    view_of,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands


MOST_STEP = 2  # each row of a tile's edges is a loop that is compiled by itself
LOOP_CYCLES = 25  # to begin a row of the filter and to leave it, the end of a loop foreseen too late


class RowsTile(NamedTuple):
    """`rows` rows of outputs, `vectors` vectors wide."""

    rows: int
    vectors: int

    def __str__(self) -> str:
        return f"rows{self.rows}x{self.vectors}"


class Filter(NamedTuple):
    """The filter as the rows of a band see it.

    apart   distance of the rows of outputs in a tile, so that they read rows of one phase and dilation
    b_rows, b_columns  offsets in the packed band of the rows a tile reads, and of the filter's columns
    """

    R: int
    S: int
    pad_h: int
    stride_h: int
    dilation_h: int
    apart: int
    b_rows: np.ndarray
    b_columns: np.ndarray


def is_for(problem: ConvProblem, tile: RowsTile) -> bool:
    """Say whether a problem has filters of one plane, with more rows than the few of a tile's edges."""
    few = _step(problem) <= MOST_STEP
    return problem.order == "NCHW" and problem.T == 1 and few and _edge(problem, tile) < problem.R


def _step(problem: ConvProblem) -> int:
    """Return how many rows of a filter further down the next row of outputs in a tile begins."""
    return problem.stride[1] // math.gcd(problem.stride[1], problem.dilation[1])


def _edge(problem: ConvProblem, tile: RowsTile) -> int:
    return (tile.rows - 1) * _step(problem)


@lru_cache(maxsize=256)
def _plan(
    problem: ConvProblem, tile: RowsTile, device: Device, workers: int
) -> tuple[Block, Geometry, Tables, Filter]:
    dtype, (before, after) = problem.compute_dtype, problem.padding[1]
    block = Block(dtype, tile.rows, tile.vectors, device.lanes(dtype), "ragged", step=_step(problem))
    more = _edge(problem, tile)  # rows of the band that a tile reads beyond those of its first output
    padding = (problem.padding[0], (before, after + more * problem.dilation[1]), problem.padding[2])
    taller = replace(problem, R=problem.R + more, padding=padding)
    geometry, tables = band.plan_bands(taller, block, device.l2 // 2, workers)
    taps = tables.b_taps.reshape(taller.R, problem.S)
    apart = problem.dilation[1] // math.gcd(problem.stride[1], problem.dilation[1])
    return block, geometry, tables, Filter(
        problem.R, problem.S, problem.padding_before[1], problem.stride[1], problem.dilation[1], apart,
        taps[:, 0].copy(), taps[0] - taps[0, 0],
    )  # fmt: skip


def cost(problem: ConvProblem, tile: RowsTile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    if not is_for(problem, tile):
        return float("inf")
    block, g, tables, f = _plan(problem, tile, device, 1)
    vectors = math.ceil(g.cols / block.lanes)
    tiles = math.ceil(vectors / tile.vectors)
    active = [min(j // block.step, (f.R + _edge(problem, tile) - 1 - j) // block.step, tile.rows - 1) + 1
              for j in range(f.b_rows.size)]  # fmt: skip
    wide = vectors / tiles
    column = sum(max(rows * wide / 2, wide + rows / 2, SUM_CYCLES) for rows in active)
    inside = min(1, problem.H / (f.b_rows.size * f.dilation_h))  # the other rows are padding
    blocks = math.ceil(g.rows / tile.rows) * tiles * (problem.K // problem.C)
    pack = device.copy_cycles(problem, band.band_elements(g, tables) / g.Wb, g.Wb, problem.stride[2])
    cycles = blocks * (inside * (f.S * column + len(active) * LOOP_CYCLES) + TILE_CYCLES) + pack
    return device.seconds(problem, band.task_count(problem, g) * cycles)


def workspace(problem: ConvProblem, tile: RowsTile, device: Device) -> int:
    """Return the bytes of packed bands that all threads hold together."""
    workers = band.task_threads(problem)
    _, geometry, tables, _ = _plan(problem, tile, device, workers)
    return workers * itemsize(problem) * band.band_elements(geometry, tables)


def run(problem: ConvProblem, tile: RowsTile, device: Device, operands: Operands) -> None:
    """Convolve band by band."""
    workers = band.task_threads(problem)
    block, g, tables, f = _plan(problem, tile, device, workers)
    elements = band.band_elements(g, tables) + block.vectors * block.lanes  # read past the end
    _run_bands(
        block, band.task_count(problem, g), workers, g, tables, elements, f,
        *band.arguments_of(problem, operands, 0),
    )  # fmt: skip


@Kernel
def _run_bands(block, first, last, g, tables, elements, f, x, w, bias, y, ending):
    x, w, bias, y = view_of(x), table(w), table(bias), view_of(y)
    packed, tile = allocate(block, elements), allocate(block, block_rows(block) * block_columns(block))
    held = -1  # the band in hand; its output channels follow one another
    for task in range(first, last):
        here, k_part, n, group, o, p, q, rows, cols = find_task(g, task)
        if here != held:
            pack_band(block, packed, locate(block, x, (n, group, 0, 0, 0)), x, g, tables, o, p, q, rows)
            held = here
        k_first = k_part * g.k_step
        k_count = min(g.k_step, g.K - k_first)
        for k in range(group * g.K + k_first, group * g.K + k_first + k_count):
            target = locate(block, y, (n, k, o, p, q))
            _convolve_band(
                block, advance(w, k * f.R * f.S), f, packed, g, p, rows, cols, advance(bias, k), target, y,
                tile,
            )  # fmt: skip
        finish(block, y, (n, group * g.K + k_first, o, p, q), (k_count, rows, cols), ending)
    release(packed)
    release(tile)


@part
def _convolve_band(block, w, f, packed, g, p, rows, cols, bias, target, y, tile):
    """Convolve a band, whose first row of outputs is p, with one filter, tile by tile."""
    height, width = block_rows(block), block_columns(block)
    y_row = f.apart * y[4]
    for offset in range(min(f.apart, rows)):
        count = (rows - offset + f.apart - 1) // f.apart  # rows of outputs that lie `apart`
        live = min(height, count)
        for i in range(0, count, height):
            row = offset + f.apart * min(i, count - live)  # the last tile overlaps the one before
            top = (p + row) * f.stride_h - f.pad_h  # the first row of the input that the tile reads
            low, high = -(top // f.dilation_h), (g.H - 1 - top) // f.dilation_h + 1
            done = 0
            while done < cols:
                vectors, q, columns = find_vectors(block, done, cols, False)
                done = q + columns
                whole = live == height and columns == vectors * block_lanes(block) and y[5] == 1
                line = advance(target, row * y[4] + q * y[5])
                multiply_filter(
                    block, vectors, w, f.R, f.S, advance(packed, row * g.Wb + q), table(f.b_rows),
                    table(f.b_columns), low, high, bias, line if whole else tile, y_row if whole else width,
                )  # fmt: skip
                if not whole:
                    store_rows(block, tile, line, (y_row, 0, y[5]), live, 0, columns, columns, columns)
