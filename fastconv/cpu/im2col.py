"""im2col and GEMM: the taps of a block of pixels are gathered into columns, then multiplied."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu.band import (
    columns_inside,
    count_offsets,
    finish,
    locate,
    make_block,
    make_ending,
    multiply,
    padded_bias,
    task_threads,
)
from fastconv.cpu.device import itemsize
from fastconv.cpu.simd import (
    Kernel,
    Tile,
    advance,
    allocate,
    block_columns,
    block_rows,
    copy_padded,
    fill,
    part,
    release,
    table,
    view_of,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

TILES = (Tile(8, 3), Tile(6, 4), Tile(4, 3), Tile(8, 1))


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


@lru_cache(maxsize=256)
def _geometry(problem: ConvProblem, tile: Tile, device: Device, workers: int) -> Geometry:
    """Divide output planes evenly into blocks of columns, about half of L2 or less, for all workers."""
    lanes, planes = device.lanes(problem.compute_dtype), problem.N * problem.groups * problem.O
    most = max(tile.vectors * lanes, device.l2 // 2 // itemsize(problem) // problem.gemm_k)
    parts = max(math.ceil(problem.P * problem.Q / most), math.ceil(workers / planes))
    return make_geometry(problem, math.ceil(problem.P * problem.Q / parts / lanes) * lanes)


def make_geometry(problem: ConvProblem, columns: int) -> Geometry:
    """Return the geometry of blocks of so many pixels."""
    C, K = problem.C // problem.groups, problem.K // problem.groups
    return Geometry(
        problem.groups, C, K, problem.D, problem.H, problem.W, problem.O, problem.P, problem.Q,
        problem.T, problem.R, problem.S, *problem.stride, *problem.padding_before, *problem.dilation,
        columns, math.ceil(problem.P * problem.Q / columns),
    )  # fmt: skip


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    g = _geometry(problem, tile, device, 1)
    pixels = problem.P * problem.Q
    multiply = device.multiply_cycles(tile, g.K, pixels, problem.gemm_k, problem.compute_dtype)
    gather = device.copy_cycles(problem, problem.gemm_k * problem.P, problem.Q, problem.stride[2])
    scatter = g.K * pixels if problem.order == "NHWC" else 0  # stored element by element
    return device.seconds(problem, problem.N * g.groups * g.O * (multiply + gather + scatter))


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes of columns that all threads hold together."""
    workers = task_threads(problem)
    g = _geometry(problem, tile, device, workers)
    return workers * itemsize(problem) * problem.gemm_k * g.columns


def prepare(problem: ConvProblem, tile: Tile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the weight as the kernel reads it."""
    return np.ascontiguousarray(weight)


def run(problem: ConvProblem, tile: Tile, device: Device, operands: Operands) -> None:
    """Convolve; the weight is prepared or as given."""
    block = make_block(problem, tile, device)
    workers = task_threads(problem)
    g = _geometry(problem, tile, device, workers)
    weight = np.ascontiguousarray(operands.weight)
    a_taps, b_taps = count_offsets(problem.gemm_k, 1), count_offsets(problem.gemm_k, g.columns)
    bias = padded_bias(problem, operands.bias, block.rows)
    _run_blocks(
        block, problem.N * g.groups * g.O * g.blocks, workers, g, a_taps, b_taps,
        operands.x, weight, bias, operands.out, make_ending(operands),
    )  # fmt: skip


@Kernel
def _run_blocks(block, first, last, g, a_taps, b_taps, x, w, bias, y, ending):
    x, w, bias, y = view_of(x), table(w), table(bias), view_of(y)
    taps = a_taps.size
    columns = allocate(block, taps * g.columns)
    tile = allocate(block, block_rows(block) * block_columns(block))
    for task in range(first, last):
        rest, index = divmod(task, g.blocks)
        rest, o = divmod(rest, g.O)
        n, group = divmod(rest, g.groups)
        pixel = index * g.columns
        count = min(g.columns, g.P * g.Q - pixel)
        gather(block, columns, locate(block, x, (n, group * g.C, 0, 0, 0)), x, g, o, pixel, count)
        channel = group * g.K
        pitch = g.P * g.Q if y[4] == g.Q * y[5] else g.Q  # rows that follow one another make one
        multiply(
            block, advance(w, channel * taps), g.K, table(a_taps),
            columns, table(b_taps), taps, advance(bias, channel),
            (1, count, 0), pixel, pitch, pitch, y, (n, channel, o, 0, 0), tile, 0, ending,
        )  # fmt: skip
        while count > 0:  # one row of pixels at a time
            p, q = divmod(pixel, g.Q)
            run = min(count, g.Q - q)
            finish(block, y, (n, channel, o, p, q), (g.K, 1, run), ending)
            pixel, count = pixel + run, count - run
    release(columns)
    release(tile)


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
