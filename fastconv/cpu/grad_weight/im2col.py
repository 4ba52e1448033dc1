"""Gradient of the weight by im2col and GEMM: the rows of A are the gathered taps of a block of pixels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu.band import columns_inside, locate, view
from fastconv.cpu.grad_weight import outer
from fastconv.cpu.grad_weight.outer import Division, add_products, find_task, pack_pixels
from fastconv.cpu.simd import Kernel, Tile, advance, allocate, copy_padded, fill, part, pointer, release

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

TILES = outer.TILES


class Geometry(NamedTuple):
    """The sizes of an im2col convolution; C and K are those of one group."""

    groups: int
    C: int
    K: int
    D: int
    H: int
    W: int
    O: int
    P: int
    Q: int
    T: int
    R: int
    S: int
    stride_d: int
    stride_h: int
    stride_w: int
    pad_d: int
    pad_h: int
    pad_w: int
    dilation_d: int
    dilation_h: int
    dilation_w: int
    columns: int  # pixels of one block, and how many blocks make a plane of the output
    blocks: int


def make_geometry(problem: ConvProblem, columns: int) -> Geometry:
    """Return the geometry of blocks of so many pixels."""
    C, K = problem.C // problem.groups, problem.K // problem.groups
    return Geometry(
        problem.groups, C, K, problem.D, problem.H, problem.W, problem.O, problem.P, problem.Q,
        problem.T, problem.R, problem.S, *problem.stride, *problem.padding_before, *problem.dilation,
        columns, math.ceil(problem.P * problem.Q / columns),
    )  # fmt: skip


def _plan(problem: ConvProblem, tile: Tile, device: Device) -> tuple[Division, Geometry]:
    """Divide the pixels into blocks, of which a task gathers the taps of some channels."""
    pixels = outer.pixels_of_block(
        problem, tile, device, gathered=problem.gemm_k * problem.groups // problem.C
    )
    blocks = -(-problem.P * problem.Q // pixels)
    g = make_geometry(problem, -(-problem.P * problem.Q // blocks))
    d = outer.divide(problem, tile, device, problem.N * problem.O * g.blocks)
    return d, g._replace(C=d.c_step)


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    d, _ = _plan(problem, tile, device)
    lines = problem.groups * problem.gemm_k * problem.N * problem.O * problem.P
    return outer.cost(
        problem, tile, device, d, device.copy_cycles(problem, lines, problem.Q, problem.stride[2])
    )


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes of sums, and of the gathered and packed blocks that all threads hold."""
    d, g = _plan(problem, tile, device)
    return outer.workspace(problem, d, d.c_step * d.taps * g.columns)


def run(problem: ConvProblem, tile: Tile, device: Device, operands: Operands) -> None:
    """Compute the gradient; operands.weight is that of the output."""
    d, g = _plan(problem, tile, device)
    block = outer.make_sums_block(problem, tile, device)
    a_rows = outer.row_offsets(d, np.arange(d.c_step * d.taps) * g.columns)
    a_pixels = np.arange(g.columns)
    x, y = view(operands.x), view(operands.weight)

    out = outer.by_group(problem, operands.out)
    outer.run(problem, block, d, out, _run, g, a_rows, a_pixels, x, y)


@Kernel
def _run(block, first, last, d, g, a_rows, a_pixels, x, y, sums):
    columns = allocate(block, d.c_step * d.taps * g.columns)
    panels = allocate(block, g.columns * d.columns)
    for task in range(first, last):
        group, c, k, k_count, first_block, last_block = find_task(d, task)
        total = advance(pointer(block, sums), task * d.rows * d.k_step)
        for number in range(first_block, last_block):
            rest, index = divmod(number, g.blocks)
            n, o = divmod(rest, g.O)
            pixel = index * g.columns
            count = min(g.columns, g.P * g.Q - pixel)
            gather(block, columns, locate(block, x, (n, group * d.C + c, 0, 0, 0)), x, g, o, pixel, count)
            plane = locate(block, y, (n, group * d.K + k, o, 0, 0))
            pack_pixels(block, panels, plane, y, g.Q, pixel, count, k_count)
            add_products(block, columns, d.rows, a_rows, a_pixels, panels, count, k_count, total, d.k_step)
    release(columns)
    release(panels)


@part
def gather(block, columns, image, x, g, o, pixel, count):
    """Copy the taps (c, t, r, s) of pixels pixel ... pixel+count-1 to columns[tap, 0 ... count-1]."""
    at = 0
    for c in range(g.C):
        for t in range(g.T):
            d = o * g.stride_d + t * g.dilation_d - g.pad_d
            for r in range(g.R):
                for s in range(g.S):
                    j = 0
                    while j < count:  # one output row, or what of it is in the block, at a time
                        p, q = divmod(pixel + j, g.Q)
                        run = min(count - j, g.Q - q)
                        h = p * g.stride_h + r * g.dilation_h - g.pad_h
                        w = q * g.stride_w + s * g.dilation_w - g.pad_w
                        line = advance(columns, at + j)
                        if d < 0 or d >= g.D or h < 0 or h >= g.H:
                            fill(block, line, run)
                        else:
                            low, high = columns_inside(w, g.stride_w, run, g.W)
                            source = advance(image, c * x[2] + d * x[3] + h * x[4] + w * x[5])
                            copy_padded(block, line, source, g.stride_w * x[5], run, low, high)
                        j += run
                    at += g.columns
