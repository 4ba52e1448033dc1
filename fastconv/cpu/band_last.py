"""Convolution of one band of output rows, channels last: vectors run over output channels.

    x[n, :, :, group]      padded band [t, h, w, C]      or x itself where there is no padding
    pixel rows of A:       one offset per pixel           broadcast  ("columns", dense)
                                                          vectors    ("elementwise", depthwise)
    B: the weight, packed  [group, panel, (t, r, s, c), vectors * lanes], or [group, (t, r, s), ...] depthwise
    y[n, p, q, k ...]      one row of the tile per pixel

A depthwise convolution is one with a group for each `vectors * lanes` channels.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fastconv.cpu import memory
from fastconv.cpu.band import (
    Geometry,
    columns_inside,
    even_share,
    find_task,
    finish,
    locate,
    make_ending,
    make_geometry,
    padded_bias,
    task_count,
    task_threads,
)
from fastconv.cpu.compiling import part
from fastconv.cpu.device import itemsize
from fastconv.cpu.simd import (
    Block,
    Kernel,
    advance,
    allocate,
    block_columns,
    block_lanes,
    block_rows,
    copy_padded,
    fill,
    multiply_tile,
    release,
    spread_rows,
    table,
    view_of,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands


@lru_cache(maxsize=256)
def plan_bands(problem: ConvProblem, block: Block, cache: int, workers: int) -> Geometry:
    """Divide a problem into bands whose packed input takes about `cache` bytes, and those among threads."""
    width = block.vectors * block.lanes
    depthwise = block.form == "elementwise"
    C = width if depthwise else problem.C // problem.groups
    K = width if depthwise else problem.K // problem.groups
    groups = math.ceil(problem.C / width) if depthwise else problem.groups
    (_, sh, sw), (_, dh, dw) = problem.stride, problem.dilation
    halo_h, halo_w = (problem.R - 1) * dh + 1 - sh, (problem.S - 1) * dw + 1 - sw
    budget = cache // (itemsize(problem) * C * problem.T)
    cols = even_share(problem.Q, max(16, budget // max(1, halo_h + sh) // sw - max(0, halo_w)))
    Wb = cols * sw + halo_w
    rows = even_share(problem.P, max(1, (budget // max(1, Wb) - halo_h) // sh))
    unpadded = not any(before or after for before, after in problem.padding)
    geometry = make_geometry(problem, groups, C, K, rows, cols, rows * sh + halo_h, Wb, width, workers)
    return geometry._replace(in_place=int(unpadded and not depthwise))


def _band_elements(g: Geometry) -> int:
    """Return the elements of packed band that each thread holds."""
    return 0 if g.in_place else g.T * g.Hb * g.Wb * g.C


def workspace(problem: ConvProblem, block: Block, device: Device) -> int:
    """Return the bytes of packed bands that all threads hold together, and of a packed weight."""
    workers = task_threads(problem)
    g = plan_bands(problem, block, device.l2 // 2, workers)
    width = block.vectors * block.lanes
    panels = g.groups * math.ceil(g.K / width)
    band = _band_elements(g._replace(in_place=0))  # of an array whose channels do not lie together
    return itemsize(problem) * (workers * band + panels * width * problem.gemm_k)


def prepare(problem: ConvProblem, block: Block, weight: np.ndarray) -> np.ndarray:
    """Return the weight packed for the vectors: (groups, panels, taps, vectors * lanes), zero padded."""
    width = block.vectors * block.lanes
    if block.form == "elementwise":
        groups, rows = 1, weight.reshape(1, problem.K, -1)
    else:
        groups = problem.groups
        rows = weight.transpose(0, 2, 3, 4, 1).reshape(groups, problem.K // groups, -1)
    panels = math.ceil(rows.shape[1] / width)
    packed = memory.allocate((groups, panels, rows.shape[2], width), problem.compute_dtype)
    for panel in range(panels):
        some = rows[:, panel * width : (panel + 1) * width]
        packed[:, panel, :, : some.shape[1]] = some.transpose(0, 2, 1)
        packed[:, panel, :, some.shape[1] :] = 0
    return packed


def run(problem: ConvProblem, block: Block, device: Device, operands: Operands) -> None:
    """Convolve band by band; the weight is prepared (rank 4) or as given (rank 5)."""
    x, weight = operands.x, operands.weight
    workers = task_threads(problem)
    g = plan_bands(problem, block, device.l2 // 2, workers)
    if x.strides[1] != x.itemsize:
        g = g._replace(in_place=0)
    packed = weight if weight.ndim == 4 else prepare(problem, block, weight)
    steps = _steps(g, x)
    a_taps = _tap_offsets(problem, g, steps, depthwise=block.form == "elementwise")
    bias = padded_bias(problem, operands.bias, block.vectors * block.lanes)
    _run_bands(
        block, task_count(problem, g), workers, g, steps, a_taps,
        x, packed, bias, operands.out, make_ending(operands),
    )  # fmt: skip


def _steps(g: Geometry, x: np.ndarray) -> tuple[int, int, int]:
    """Return the distances of taps along t, of rows and of columns in what A is read from, in elements."""
    if g.in_place:
        d, h, w = (s // x.itemsize for s in x.strides[2:])
        return d * g.dilation_d, h, w
    return g.Hb * g.Wb * g.C, g.Wb * g.C, g.C


@lru_cache(maxsize=256)
def _tap_offsets(
    problem: ConvProblem, g: Geometry, steps: tuple[int, int, int], depthwise: bool
) -> np.ndarray:
    """Return where every tap (t, r, s, c) lies, in elements from the first."""
    t = np.arange(problem.T) * steps[0]
    r = np.arange(problem.R) * problem.dilation[1] * steps[1]
    s = np.arange(problem.S) * problem.dilation[2] * steps[2]
    c = np.arange(1 if depthwise else g.C)
    return (t[:, None, None, None] + r[:, None, None] + s[:, None] + c).reshape(-1)


@Kernel
def _run_bands(block, first, last, g, steps, a_taps, x, w, bias, y, ending):
    x, w, bias, y = view_of(x), table(w), table(bias), view_of(y)
    width = block_columns(block)
    band = allocate(block, 0 if g.in_place else g.T * g.Hb * g.Wb * g.C)
    tile = allocate(block, block_rows(block) * width)
    held = -1  # the band in hand; its parts of K follow one another
    for task in range(first, last):
        here, k_part, n, group, o, p, q, rows, cols = find_task(g, task)
        channel = group * g.K + k_part * g.k_step
        k_count = min(g.k_step, g.K - k_part * g.k_step, g.K_all - channel)
        if g.in_place:
            a = locate(block, x, (n, group * g.C, o * g.stride_d, p * g.stride_h, q * g.stride_w))
        else:
            a = band
            if here != held:
                image = locate(block, x, (n, group * g.C, 0, 0, 0))
                _pack_band(block, band, image, x, g, group, o, p, q, rows)
                held = here
        panel = group * ((g.K + width - 1) // width) + k_part * g.k_step // width
        origin = (n, channel, o, p, q)
        _multiply(
            block, a, steps, g, rows, cols, table(a_taps),
            advance(w, panel * a_taps.size * width), a_taps.size,
            advance(bias, channel), k_count, locate(block, y, origin), y, tile,
        )  # fmt: skip
        finish(block, y, origin, (k_count, rows, cols), ending)
    release(band)
    release(tile)


@part
def _pack_band(block, band, image, x, g, group, o, p, q, rows):
    """Copy what output rows p ... p+rows-1, columns q ... read, zeros for padding and missing channels."""
    channels = min(g.C, g.C_all - group * g.C)
    w = q * g.stride_w - g.pad_w
    low, high = columns_inside(w, 1, g.Wb, g.W)
    whole = x[2] == 1 and x[5] == g.C and channels == g.C  # pixels lie one after the other
    for t in range(g.T):
        d = o * g.stride_d + t * g.dilation_d - g.pad_d
        for i in range(g.Hb - (g.rows - rows) * g.stride_h):
            h = p * g.stride_h + i - g.pad_h
            line = advance(band, (t * g.Hb + i) * g.Wb * g.C)
            if d < 0 or d >= g.D or h < 0 or h >= g.H:
                fill(block, line, g.Wb * g.C)
                continue
            source = advance(image, d * x[3] + h * x[4] + w * x[5])
            if whole:
                copy_padded(block, line, source, 1, g.Wb * g.C, low * g.C, high * g.C)
                continue
            fill(block, line, low * g.C)
            for j in range(low, high):
                copy_padded(block, advance(line, j * g.C), advance(source, j * x[5]), x[2], g.C, 0, channels)
            fill(block, advance(line, high * g.C), (g.Wb - high) * g.C)


@part
def _multiply(block, a, steps, g, rows, cols, a_taps, w, taps, bias, k_count, y, y_view, tile):
    """Multiply the pixels of a band by the packed panels of weights, tile by tile; y points at the first.

    steps   of A, as `_steps` returns them; y_view: the view of the output, for its strides
    """
    y_k, y_p, y_q = y_view[2], y_view[4], y_view[5]
    lanes, width, height = block_lanes(block), block_columns(block), block_rows(block)
    offsets = np.empty(height, np.int64)
    even = y_p == cols * y_q  # pixels lie at one distance, across rows too
    for k in range(0, k_count, width):
        count = min(width, k_count - k)
        vectors = (count + lanes - 1) // lanes
        panel = advance(w, k * taps)
        for pixel in range(0, rows * cols, height):
            live = min(height, rows * cols - pixel)
            for i in range(height):
                p, q = divmod(pixel + min(i, live - 1), cols)  # pixels that do not exist repeat the last
                offsets[i] = p * g.stride_h * steps[1] + q * g.stride_w * steps[2]
            p, q = divmod(pixel, cols)
            whole = count == vectors * lanes and live == height and y_k == 1
            whole = whole and (even or q + height <= cols)
            c, c_row = (advance(y, k + p * y_p + q * y_q), y_q) if whole else (tile, width)
            multiply_tile(
                block, vectors, a, table(offsets), a_taps, panel, width, taps, advance(bias, k), c, c_row
            )
            if not whole:
                for i in range(live):
                    p, q = divmod(pixel + i, cols)
                    target = advance(y, k * y_k + p * y_p + q * y_q)
                    spread_rows(block, 1, target, 0, y_k, advance(tile, i * width), 0, count)
