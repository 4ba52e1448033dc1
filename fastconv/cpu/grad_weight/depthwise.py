"""Gradient of the weight of a depthwise convolution: vectors run over channels, in both memory orders.

Input and grad_y are packed channels last, a few channels at a time; the rows of A are the taps (t, r, s).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fastconv.cpu import band
from fastconv.cpu.band import Geometry, columns_inside, locate, view
from fastconv.cpu.device import itemsize
from fastconv.cpu.grad_weight import outer
from fastconv.cpu.grad_weight.outer import (
    TASKS,
    Division,
    add_products,
    allocate_sums,
    begin_sums,
    end_sums,
    find_task,
    pack_row,
)
from fastconv.cpu.simd import (
    Block,
    Kernel,
    Tile,
    advance,
    allocate,
    block_columns,
    fill,
    part,
    release,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

TILES = (Tile(9, 1), Tile(5, 2), Tile(3, 4))

PACK_CYCLES = 8  # to turn and store a vector


@lru_cache(maxsize=256)
def _plan(problem: ConvProblem, tile: Tile, device: Device) -> tuple[Division, Geometry]:
    """Divide the pixels into bands, of which a task packs one tile of channels."""
    width, taps = tile.vectors * device.lanes(problem.compute_dtype), problem.gemm_k
    pixels = max(64, device.l2 // 4 // (itemsize(problem) * width))
    cols = band.even_share(problem.Q, pixels)
    rows = band.even_share(problem.P, pixels // cols)
    reach = [(taps - 1) * step + 1 for taps, step in zip(problem.weight_shape5[2:], problem.dilation)]
    Hb, Wb = (rows - 1) * problem.stride[1] + reach[1], (cols - 1) * problem.stride[2] + reach[2]
    g = band.make_geometry(problem, 1, width, width, rows, cols, Hb, Wb, 1, workers=1)
    multiplier, k_parts = problem.K // problem.C, math.ceil(problem.C / width)
    blocks = problem.N * problem.O * g.row_bands * g.col_bands
    return Division(
        groups=multiplier, C=1, K=problem.C, taps=taps, c_step=1, c_parts=1, k_step=width, k_parts=k_parts,
        rows=math.ceil(taps / tile.rows) * tile.rows, columns=width, blocks=blocks,
        parts=min(blocks, math.ceil(TASKS / (multiplier * k_parts))),
    ), g  # fmt: skip


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    d, g = _plan(problem, tile, device)
    tasks = d.groups * d.k_parts * tile.vectors * d.blocks
    taps = device.tap_cycles(tile.rows, tile.vectors) * d.rows / (tile.rows * tile.vectors)
    return device.seconds(
        problem, tasks * (g.rows * g.cols * (taps + PACK_CYCLES) + g.T * g.Hb * g.Wb * PACK_CYCLES)
    )


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes of sums and of the packed blocks that all threads hold."""
    d, g = _plan(problem, tile, device)
    return outer.workspace(problem, d, g.T * g.Hb * g.Wb * d.k_step)


def run(problem: ConvProblem, tile: Tile, device: Device, operands: Operands) -> None:
    """Compute the gradient; operands.weight is that of the output."""
    d, g = _plan(problem, tile, device)
    lanes = device.lanes(problem.compute_dtype)
    block = Block(problem.compute_dtype, tile.rows, tile.vectors, lanes, "elementwise", adds=True)
    x, y = view(operands.x), view(operands.weight)

    out = operands.out.reshape(d.K, d.groups, *problem.weight_shape5[1:]).swapaxes(0, 1)
    outer.run(problem, block, d, out, _run, g, _tap_offsets(problem, tile, device), x, y)


@lru_cache(maxsize=256)
def _tap_offsets(problem: ConvProblem, tile: Tile, device: Device) -> np.ndarray:
    """Return where the taps lie in their packed blocks."""
    d, g = _plan(problem, tile, device)
    t, r, s = (np.arange(extent) for extent in problem.weight_shape5[2:])
    r, s = r * problem.dilation[1], s * problem.dilation[2]
    taps = ((t[:, None, None] * g.Hb + r[:, None]) * g.Wb + s).reshape(-1) * d.k_step
    return outer.row_offsets(d, taps)


@Kernel
def _run(block, first, last, d, g, a_rows, x, y, sums, target):
    width = block_columns(block)
    packed, panels = allocate(block, g.T * g.Hb * g.Wb * width), allocate(block, g.rows * g.cols * width)
    a_pixels = np.empty(g.rows * g.cols, np.int64)
    own = allocate_sums(block, d)
    for task in range(first, last):
        j, _, c, count, first_block, last_block = find_task(d, task)
        total = begin_sums(block, d, task, sums, own)
        for number in range(first_block, last_block):
            n, _, o, p, q, rows, cols = band.find_task(g, number)[2:]
            _pack_band(block, packed, locate(block, x, (n, c, 0, 0, 0)), x, g, count, o, p, q, rows)
            for i in range(rows):
                line = locate(block, y, (n, c * d.groups + j, o, p + i, q))
                pack_row(block, panels, i * cols, rows * cols, line, d.groups * y[2], y[5], count, cols)
                for e in range(cols):
                    a_pixels[i * cols + e] = (i * g.stride_h * g.Wb + e * g.stride_w) * width
            add_products(block, packed, d.rows, a_rows, a_pixels, panels, rows * cols, count, total, width)
        end_sums(block, d, task, total, target)
    release(packed)
    release(panels)
    release(own)


@part
def _pack_band(block, packed, image, x, g, channels, o, p, q, rows):
    """Pack what output rows p ... p+rows-1, columns q ... read as [t][h][w][width], zeros for padding."""
    width = block_columns(block)
    w = q * g.stride_w - g.pad_w
    low, high = columns_inside(w, 1, g.Wb, g.W)
    for t in range(g.T):
        d = o * g.stride_d + t * g.dilation_d - g.pad_d
        for i in range(g.Hb - (g.rows - rows) * g.stride_h):
            h = p * g.stride_h + i - g.pad_h
            at = (t * g.Hb + i) * g.Wb
            if d < 0 or d >= g.D or h < 0 or h >= g.H:
                fill(block, advance(packed, at * width), g.Wb * width)
                continue
            fill(block, advance(packed, at * width), low * width)
            source = advance(image, d * x[3] + h * x[4] + (w + low) * x[5])
            pack_row(block, packed, at + low, 0, source, x[2], x[5], channels, high - low)
            fill(block, advance(packed, (at + high) * width), (g.Wb - high) * width)
