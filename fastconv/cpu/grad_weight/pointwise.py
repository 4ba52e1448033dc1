"""Gradient of the weight of a 1x1 convolution: a product of two matrices that lie as the gradient wants them.

    grad_w[k, c] = sum over pixels of grad_y[k, pixel] * x[c, pixel]

    A  rows are output channels, read where they lie: one offset per row and per pixel
    B  x, a block of pixels of a panel of channels packed as [pixel][vectors * lanes]: vectors run over c
    C  grad_w itself, or sums (part, K, C) where there are several parts of the pixels

A task has a panel of channels, all output channels or some of them, and one part of the pixels. How many
parts there are, and where tiles begin, depends on the problem alone, so that every number of threads gives
the same bits.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu import memory
from fastconv.cpu.band import flatten, is_one_row, locate, share_channels, task_threads, view
from fastconv.cpu.compiling import part
from fastconv.cpu.device import itemsize
from fastconv.cpu.grad_weight import outer
from fastconv.cpu.grad_weight.outer import add_line, pack_pixels
from fastconv.cpu.im2col import Windows, make_windows
from fastconv.cpu.simd import (
    Block,
    Kernel,
    Tile,
    advance,
    allocate,
    block_columns,
    block_lanes,
    block_rows,
    fill,
    multiply_tile,
    release,
    table,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

TILES = outer.TILES

PACK_CYCLES = 10  # to turn and store a vector of channels
SHARED_ROWS = 128  # output channels of a task, at least: enough to make up for packing x
PART_PIXELS = 1024  # of a part, at least: enough to make up for adding its sums to the others


class Division(NamedTuple):
    """How the work is divided; C and K are those of one group."""

    groups: int
    C: int
    K: int
    panels: int  # of channels
    k_step: int  # output channels of a task, and how many tasks have the same panel
    k_parts: int
    tasks: int
    pixels: int  # of one block, and how many blocks make a plane, and all planes
    plane_blocks: int
    blocks: int
    parts: int  # that the blocks are divided into


@lru_cache(maxsize=256)
def _divide(problem: ConvProblem, tile: Tile, device: Device, workers: int) -> Division:
    """Cut the pixels into blocks of which a panel takes half of L2."""
    C, K, groups = problem.C // problem.groups, problem.gemm_m, problem.groups
    width = tile.vectors * device.lanes(problem.compute_dtype)
    panels = math.ceil(C / width)
    cut = outer.cut_pixels(problem, max(64, device.l2 // 2 // (itemsize(problem) * width)))
    blocks = problem.N * problem.O * cut.blocks
    wanted = math.ceil(outer.TASKS / (groups * panels * math.ceil(K / SHARED_ROWS)))
    parts = max(1, min(blocks, wanted, problem.gemm_n // PART_PIXELS))
    least = math.ceil(SHARED_ROWS / tile.rows) * tile.rows  # every task begins with a tile
    k_step = min(K, max(least, share_channels(K, groups * panels * parts, workers, tile.rows)))
    k_parts = math.ceil(K / k_step)
    tasks = parts * groups * panels * k_parts
    return Division(
        groups, C, K, panels, k_step, k_parts, tasks, cut.columns, cut.blocks, blocks, parts
    )  # fmt: skip


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    d, dtype = _divide(problem, tile, device, 1), problem.compute_dtype
    product = device.multiply_cycles(tile, d.K, d.C, d.pixels, dtype, aligned=True)
    packed = d.pixels * d.panels * tile.vectors * PACK_CYCLES
    return device.seconds(problem, d.groups * d.blocks * (product + packed))


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes of sums and of the packed blocks that all threads hold, for a contiguous gradient."""
    workers = task_threads(problem)
    d = _divide(problem, tile, device, workers)
    panel = tile.vectors * device.lanes(problem.compute_dtype) * itemsize(problem)
    packed = min(workers, d.tasks) * d.pixels * (panel + 8)  # 8 bytes say where a pixel lies
    sums = d.parts * problem.K * d.C if d.parts > 1 else 0
    return itemsize(problem) * sums + packed


def run(problem: ConvProblem, tile: Tile, device: Device, operands: Operands) -> None:
    """Compute the gradient; operands.weight is that of the output."""
    workers, out = task_threads(problem), operands.out
    rows = flatten(problem) if is_one_row(operands.x) and is_one_row(operands.weight) else None
    block, d, g = _plan(rows or problem, tile, device, workers)
    x, y, sums = view(operands.x), view(operands.weight), out
    if d.parts > 1 or not out.flags.c_contiguous:
        sums = memory.allocate((d.parts, *out.shape), problem.compute_dtype)
    offsets = _row_offsets(d.K, tile.rows, y[2])
    _run(block, d.tasks, workers, d, g, offsets, x, y, sums.reshape(d.parts, -1, d.C))
    if sums is not out:
        np.add.reduce(sums, axis=0, out=out)


@lru_cache(maxsize=256)
def _plan(problem: ConvProblem, tile: Tile, device: Device, workers: int) -> tuple[Block, Division, Windows]:
    """Return what of the arguments of `_run` does not change from call to call."""
    block = outer.make_sums_block(problem, tile, device)
    return block, _divide(problem, tile, device, workers), make_windows(problem)


@lru_cache(maxsize=256)
def _row_offsets(K: int, height: int, step: int) -> np.ndarray:
    """Return where the output channels lie in grad_y; the last one again for those that fill a tile."""
    return np.minimum(np.arange(K + height), K - 1) * step


@Kernel
def _run(block, first, last, d, g, rows, x, y, sums):
    width = block_columns(block)
    panel = allocate(block, d.pixels * width)
    tile = allocate(block, block_rows(block) * width)
    places = np.empty(d.pixels, np.int64)  # of pixels in a plane of grad_y
    windows = (x[0], x[1], x[2], x[3], x[4] * g.stride_h, x[5] * g.stride_w)
    for task in range(first, last):
        rest, k_part = divmod(task, d.k_parts)
        rest, c_part = divmod(rest, d.panels)
        index, group = divmod(rest, d.groups)
        c, k = c_part * width, k_part * d.k_step
        c_count, k_count = min(width, d.C - c), min(d.k_step, d.K - k)
        total = advance(table(sums), ((index * d.groups + group) * d.K + k) * d.C + c)
        begin = index * d.blocks // d.parts
        for number in range(begin, (index + 1) * d.blocks // d.parts):
            rest, cut = divmod(number, d.plane_blocks)
            n, o = divmod(rest, g.O)
            pixel = cut * d.pixels
            count = min(d.pixels, g.P * g.Q - pixel)
            for j in range(count):
                p, q = divmod(pixel + j, g.Q)
                places[j] = p * y[4] + q * y[5]
            image = locate(block, x, (n, group * d.C + c, o * g.stride_d, 0, 0))
            plane = locate(block, y, (n, group * d.K, o, 0, 0))
            pack_pixels(block, panel, image, windows, g.Q, pixel, count, c_count)
            _add_products(
                block, d, plane, advance(table(rows), k), places, panel, count, k_count, c_count, total, tile,
                number > begin,
            )  # fmt: skip
    release(panel)
    release(tile)


@part
def _add_products(block, d, plane, rows, places, panel, pixels, k_count, c_count, sums, tile, adds):
    """Add the products of a block of pixels to the sums of some channels, or begin with them."""
    lanes, width, height = block_lanes(block), block_columns(block), block_rows(block)
    vectors = (c_count + lanes - 1) // lanes
    for k in range(0, k_count, height):
        live = min(height, k_count - k)
        is_whole = live == height and c_count == vectors * lanes
        target = advance(sums, k * d.C)
        c_row = d.C if is_whole else width
        made = target if is_whole else tile
        if not (is_whole and adds):
            for i in range(height):
                fill(block, advance(made, i * c_row), vectors * lanes)
        multiply_tile(
            block, vectors, plane, advance(rows, k), table(places), panel, width, pixels,
            made, made, c_row,
        )  # fmt: skip
        if not is_whole:
            for i in range(live):
                if not adds:
                    fill(block, advance(target, i * d.C), c_count)
                add_line(advance(target, i * d.C), advance(tile, i * width), c_count)
