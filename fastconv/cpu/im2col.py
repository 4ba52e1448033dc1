"""im2col and GEMM: the windows of a block of pixels are gathered into panels, then multiplied.

    x[n, group]  --gather-->  panels[i, (c, t, r, s), pixels]        w[k, (c, t, r, s)]  --multiply-->  y

A panel is as wide as a tile and begins with a cache line, so that no vector of it lies in two lines, as most
do that are read where they lie: two loads each, for which some processors have no time.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu.band import (
    as_rows,
    columns_inside,
    even_share,
    finish,
    flatten,
    locate,
    make_block,
    make_ending,
    multiply,
    padded_bias,
    reads_same_pixels,
    task_threads,
)
from fastconv.cpu.device import BOX_ROW_CYCLES, itemsize
from fastconv.cpu.simd import (
    Kernel,
    Tile,
    advance,
    allocate,
    block_columns,
    block_lanes,
    block_rows,
    copy_rows,
    copy_whole,
    part,
    prefetch,
    release,
    table,
    view_of,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

FETCHED_CHANNELS = 4
FAR = 1.3  # a panel that leaves no room in L2 for the weight takes so much longer

TILES = (Tile(8, 3), Tile(6, 4), Tile(4, 3), Tile(2, 4))


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
    vectors: int  # that the pixels of an output plane fill, and the blocks that share them evenly
    blocks: int
    panels: int  # of a block, and the vectors of each
    panel: int
    k_step: int  # output channels of one task, and how many tasks make a group
    k_parts: int


@lru_cache(maxsize=256)
def _geometry(problem: ConvProblem, tile: Tile, device: Device, workers: int) -> Geometry:
    """Cut output planes into blocks whose panels take a quarter of L2, or one panel, for all workers."""
    C, K = problem.C // problem.groups, problem.gemm_m
    lanes = device.lanes(problem.compute_dtype)
    vectors = math.ceil(problem.P * problem.Q / lanes)
    room = device.l2 // 4 // itemsize(problem) // problem.gemm_k // lanes
    blocks = math.ceil(vectors / max(room, tile.vectors))
    most = math.ceil(vectors / blocks)
    panel = even_share(most, tile.vectors)
    tasks = problem.N * problem.groups * problem.O * blocks
    k_step = even_share(K, math.ceil(K / math.ceil(2 * workers / tasks)), tile.rows) if workers > 1 else K
    return Geometry(
        problem.groups, C, K, problem.D, problem.H, problem.W, problem.O, problem.P, problem.Q,
        problem.T, problem.R, problem.S, *problem.stride, *problem.padding_before, *problem.dilation,
        vectors, blocks, math.ceil(most / panel), panel, k_step, math.ceil(K / k_step),
    )  # fmt: skip


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    problem = _as_it_may_lie(problem)
    g = _geometry(problem, tile, device, 1)
    lanes, dtype = device.lanes(problem.compute_dtype), problem.compute_dtype
    narrow, wider = divmod(g.vectors, g.blocks)
    multiply = sum(
        blocks * device.multiply_cycles(tile, g.K, vectors * lanes, problem.gemm_k, dtype)
        for blocks, vectors in ((g.blocks - wider, narrow), (wider, narrow + 1))
    )
    if g.panel * lanes * problem.gemm_k * itemsize(problem) > device.l2 // 2:
        multiply *= FAR
    weight = g.K * problem.gemm_k * itemsize(problem)
    fetch = device.fetch_cycles(weight * (g.blocks - 1)) if weight > device.l2 else 0
    runs = g.P + g.vectors / g.panel  # of pixels in a row of the image and in a panel
    rows = runs * problem.gemm_k
    gather = device.copy_cycles(problem, rows, g.P * g.Q / runs, problem.stride[2], BOX_ROW_CYCLES)
    scatter = g.K * problem.P * problem.Q if problem.order == "NHWC" else 0  # stored element by element
    return device.seconds(problem, problem.N * g.groups * g.O * (multiply + fetch + gather + scatter))


def _as_it_may_lie(problem: ConvProblem) -> ConvProblem:
    """Return the problem that is run where the arrays are contiguous."""
    return flatten(problem) if reads_same_pixels(problem) else problem


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes of panels that all threads hold together."""
    workers = task_threads(problem)
    lanes = device.lanes(problem.compute_dtype)
    panels = max(_geometry(each, tile, device, workers).panels for each in (problem, _as_it_may_lie(problem)))
    return workers * itemsize(problem) * panels * problem.gemm_k * tile.vectors * lanes


def prepare(problem: ConvProblem, tile: Tile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the weight as the kernel reads it."""
    return np.ascontiguousarray(weight)


def run(problem: ConvProblem, tile: Tile, device: Device, operands: Operands) -> None:
    """Convolve; the weight is prepared or as given."""
    rows = as_rows(problem, operands)
    if rows is not None:
        problem, operands = flatten(problem), rows
    block = make_block(problem, tile, device)
    workers = task_threads(problem)
    g = _geometry(problem, tile, device, workers)
    weight = np.ascontiguousarray(operands.weight)
    bias = padded_bias(problem, operands.bias, block.rows)
    _run_blocks(
        block, problem.N * g.groups * g.O * g.blocks * g.k_parts, workers, g, problem.gemm_k,
        operands.x, weight, bias, operands.out, make_ending(operands),
    )  # fmt: skip


@Kernel
def _run_blocks(block, first, last, g, taps, x, w, bias, y, ending):
    x, w, bias, y = view_of(x), table(w), table(bias), view_of(y)
    lanes, width = block_lanes(block), block_columns(block)
    panels = allocate(block, g.panels * taps * width)
    tile = allocate(block, block_rows(block) * width)
    pitch = g.P * g.Q if y[4] == g.Q * y[5] else g.Q  # rows that follow one another make one
    held = -1  # the block in hand; its parts of K follow one another
    for task in range(first, last):
        here, k_part = divmod(task, g.k_parts)
        rest, index = divmod(here, g.blocks)
        rest, o = divmod(rest, g.O)
        n, group = divmod(rest, g.groups)
        pixel = g.vectors * index // g.blocks * lanes
        count = min(g.vectors * (index + 1) // g.blocks * lanes, g.P * g.Q) - pixel
        if here != held:
            _gather(block, panels, locate(block, x, (n, group * g.C, 0, 0, 0)), x, g, o, pixel, count)
            held = here
        k = k_part * g.k_step
        k_count, channel = min(g.k_step, g.K - k), group * g.K + k
        multiply(
            block, advance(w, channel * taps), k_count, panels, width, taps, advance(bias, channel),
            (count, g.panel * lanes, g.panel * lanes, taps * width), 0, pixel, pitch, pitch,
            y, (n, channel, o, 0, 0), tile, 0, ending,
        )  # fmt: skip
        while count > 0:  # one row of pixels at a time
            p, q = divmod(pixel, g.Q)
            run = min(count, g.Q - q)
            finish(block, y, (n, channel, o, p, q), (k_count, 1, run), ending)
            pixel, count = pixel + run, count - run
    release(panels)
    release(tile)


@part
def _gather(block, panels, image, x, g, o, pixel, count):
    """Copy the taps (c, t, r, s) of pixels pixel ... pixel+count-1 to panels.

    Run by run of pixels in one row, tap by tap, of all channels at once. The lanes beyond the last pixel are
    zeros: what memory holds by chance may be subnormal, and a product with that takes 100 cycles.
    """
    lanes, width = block_lanes(block), block_columns(block)
    size, step = g.panel * lanes, g.T * g.R * g.S * width
    for begin in range(0, count, size):
        panel, exist = advance(panels, begin // size * g.C * step), min(size, count - begin)
        j = 0
        while j < exist:
            p, q = divmod(pixel + begin + j, g.Q)
            run = min(exist - j, g.Q - q)
            written = run if j + run < exist else (exist + lanes - 1) // lanes * lanes - j
            target = advance(panel, j)
            for t in range(g.T):
                d = o * g.stride_d + t * g.dilation_d - g.pad_d
                for r in range(g.R):
                    h = p * g.stride_h + r * g.dilation_h - g.pad_h
                    W = g.W if 0 <= d < g.D and 0 <= h < g.H else 0
                    for s in range(g.S):
                        w = q * g.stride_w + s * g.dilation_w - g.pad_w
                        low, high = columns_inside(w, g.stride_w, run, W)
                        source = advance(image, d * x[3] + h * x[4] + w * x[5])
                        _copy_channels(
                            block, g.C, target, step, source, x[2], g.stride_w * x[5], written, low, high
                        )
                        target = advance(target, width)
            j += run


@part
def _copy_channels(block, channels, target, step, source, channel_step, column_step, count, low, high):
    """Copy the same pixels of all channels, as `copy_rows` does; whole vectors of them are fetched ahead.

    Channels lie too far apart for the processor to do that by itself.
    """
    lanes = block_lanes(block)
    if column_step != 1 or low > 0 or high < count or count % lanes:
        copy_rows(block, channels, target, step, source, channel_step, column_step, count, low, high)
        return
    for i in range(0, count, lanes):
        to, of = advance(target, i), advance(source, i)
        for c in range(channels):
            prefetch(block, advance(of, (c + FETCHED_CHANNELS) * channel_step))
            copy_whole(block, advance(to, c * step), advance(of, c * channel_step))
