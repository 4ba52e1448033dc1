"""Convolution of one band of output rows, channels last: vectors run over output channels.

    x[n, :, :, group]      padded band [t, h, w, C]      or x itself where there is no padding
    pixel rows of A:       one offset per pixel           broadcast  ("columns", dense)
                                                          vectors    ("elementwise", depthwise)
    B: the weight, packed  [group, panel, (t, r, s, c), vectors * lanes], or [group, (t, r, s), ...] depthwise
    y[n, p, q, k ...]      one row of the tile per pixel

A depthwise convolution is one with a group per vector block of channels.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu import threads
from fastconv.cpu.band import (
    activate,
    even_share,
    finish_arguments,
    padded_bias,
    task_threads,
    view,
)
from fastconv.cpu.device import itemsize
from fastconv.cpu.simd import (
    Block,
    Kernel,
    advance,
    allocate,
    block_columns,
    block_lanes,
    block_rows,
    copy,
    fill,
    multiply_tile,
    part,
    pointer,
    release,
    spread,
    table,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Epilogue


class Geometry(NamedTuple):
    """The sizes of a banded convolution, channels last; C and K are those of one group."""

    groups: int
    C: int
    K: int
    C_all: int
    K_all: int
    D: int
    H: int
    W: int
    O: int
    P: int
    Q: int
    T: int
    stride_d: int
    stride_h: int
    stride_w: int
    pad_d: int
    pad_h: int
    pad_w: int
    dilation_d: int
    rows: int  # output rows and columns of a band, and how many bands make the image
    cols: int
    row_bands: int
    col_bands: int
    Hb: int  # rows and columns of the packed band
    Wb: int
    k_step: int  # output channels of one task, and how many tasks make a group
    k_parts: int
    from_x: int  # 1 where A is read from the input itself: nothing is packed


@lru_cache(maxsize=256)
def plan_bands(problem: ConvProblem, block: Block, cache: int, workers: int) -> Geometry:
    """Divide a problem into bands whose packed input takes at most about `cache` bytes."""
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
    bands = math.ceil(problem.P / rows) * math.ceil(problem.Q / cols)
    tasks = problem.N * groups * problem.O * bands
    k_step = even_share(K, math.ceil(K / math.ceil(2 * workers / tasks)), width) if workers > 1 else K
    unpadded = not any(before or after for before, after in problem.padding)
    return Geometry(
        groups, C, K, problem.C, problem.K, problem.D, problem.H, problem.W, problem.O, problem.P, problem.Q, problem.T,
        *problem.stride, *(before for before, _ in problem.padding), problem.dilation[0],
        rows, cols, math.ceil(problem.P / rows), math.ceil(problem.Q / cols), rows * sh + halo_h, Wb,
        k_step, math.ceil(K / k_step), int(unpadded and not depthwise),
    )  # fmt: skip


def band_elements(g: Geometry) -> int:
    """Return the elements of packed band that each thread holds."""
    return 0 if g.from_x else g.T * g.Hb * g.Wb * g.C


def prepare(problem: ConvProblem, block: Block, weight: np.ndarray) -> np.ndarray:
    """Return the weight packed for the vectors: rank 4, (groups, panels, taps, vectors * lanes), padded with zeros."""
    width = block.vectors * block.lanes
    if block.form == "elementwise":
        groups, rows = 1, weight.reshape(1, problem.K, -1)
    else:
        groups = problem.groups
        rows = weight.transpose(0, 2, 3, 4, 1).reshape(groups, problem.K // groups, -1)
    panels = math.ceil(rows.shape[1] / width)
    packed = np.zeros((groups, panels, rows.shape[2], width), problem.compute_dtype)
    for panel in range(panels):
        part = rows[:, panel * width : (panel + 1) * width]
        packed[:, panel, :, : part.shape[1]] = part.transpose(0, 2, 1)
    return packed


def run(
    problem: ConvProblem,
    block: Block,
    device: Device,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    epilogue: Epilogue,
    out: np.ndarray,
) -> None:
    """Convolve x with a weight, prepared (rank 4) or as given (rank 5), into out."""
    workers = task_threads(problem)
    g = plan_bands(problem, block, device.l2 // 2, workers)
    if x.strides[1] != x.itemsize:
        g = g._replace(from_x=0)
    packed = weight if weight.ndim == 4 else prepare(problem, block, weight)
    steps = _steps(g, x)
    a_taps = _tap_offsets(problem, g, steps, depthwise=block.form == "elementwise")
    b_taps = np.arange(a_taps.size) * block.vectors * block.lanes
    bias_columns = padded_bias(problem, bias, block.vectors * block.lanes)
    views = view(x), view(packed)[0], view(bias_columns)[0], view(out)
    arguments = finish_arguments(residual, epilogue)

    def work(first: int, last: int) -> None:
        _run_bands(block, first, last, g, steps, a_taps, b_taps, *views, *arguments)

    tasks = problem.N * g.groups * g.O * g.row_bands * g.col_bands * g.k_parts
    threads.run_tasks(work, tasks, workers)


def _steps(g: Geometry, x: np.ndarray) -> tuple[int, int, int]:
    """Return the distance of planes, rows and columns in what A is read from, in elements."""
    if g.from_x:
        d, h, w = (s // x.itemsize for s in x.strides[2:])
        return d * g.dilation_d, h, w
    return g.Hb * g.Wb * g.C, g.Wb * g.C, g.C


def _tap_offsets(
    problem: ConvProblem, g: Geometry, steps: tuple[int, int, int], depthwise: bool
) -> np.ndarray:
    t = np.arange(problem.T) * steps[0]
    r = np.arange(problem.R) * problem.dilation[1] * steps[1]
    s = np.arange(problem.S) * problem.dilation[2] * steps[2]
    c = np.arange(1 if depthwise else g.C)
    return (t[:, None, None, None] + r[:, None, None] + s[:, None] + c).reshape(-1)


@Kernel
def _run_bands(block, first, last, g, steps, a_taps, b_taps, x, w, bias, y, residual, activation, slope):
    width = block_columns(block)
    band = allocate(block, 0 if g.from_x else g.T * g.Hb * g.Wb * g.C)
    tile = allocate(block, block_rows(block) * width)
    held = -1  # the band in hand; its parts of K follow one another
    for task in range(first, last):
        here, part = divmod(task, g.k_parts)
        rest, col_band = divmod(here, g.col_bands)
        rest, row_band = divmod(rest, g.row_bands)
        rest, o = divmod(rest, g.O)
        n, group = divmod(rest, g.groups)
        p, q = row_band * g.rows, col_band * g.cols
        rows, cols = min(g.rows, g.P - p), min(g.cols, g.Q - q)
        image = advance(pointer(block, x[0]), n * x[1] + group * g.C * x[2])
        if g.from_x:
            image = advance(image, o * g.stride_d * x[3] + p * g.stride_h * x[4] + q * g.stride_w * x[5])
        elif here != held:
            _pack_band(block, band, image, x, g, group, o, p, q, rows)
        held = here
        a = image if g.from_x else band
        channel = group * g.K + part * g.k_step
        k_count = min(g.k_step, g.K - part * g.k_step, g.K_all - channel)
        panel = group * ((g.K + width - 1) // width) + part * g.k_step // width
        _multiply(
            block, a, steps, g, rows, cols, table(a_taps),
            advance(pointer(block, w), panel * a_taps.size * width), table(b_taps), a_taps.size,
            advance(pointer(block, bias), channel), k_count,
            advance(pointer(block, y[0]), n * y[1] + channel * y[2] + o * y[3] + p * y[4] + q * y[5]), y,
            tile,
        )  # fmt: skip
        if residual[0] != 0 or activation != 0:
            r = residual
            _finish(
                advance(pointer(block, y[0]), n * y[1] + channel * y[2] + o * y[3] + p * y[4] + q * y[5]), y,
                advance(pointer(block, r[0]), n * r[1] + channel * r[2] + o * r[3] + p * r[4] + q * r[5]), r,
                rows, cols, k_count, activation, slope,
            )  # fmt: skip
    release(band)
    release(tile)


@part
def _pack_band(block, band, image, x, g, group, o, p, q, rows):
    """Copy what output rows p ... p+rows-1, columns q ... read, zeros for padding and for missing channels."""
    channels = min(g.C, g.C_all - group * g.C)
    for t in range(g.T):
        d = o * g.stride_d + t * g.dilation_d - g.pad_d
        for i in range(g.Hb - (g.rows - rows) * g.stride_h):
            h = p * g.stride_h + i - g.pad_h
            line = advance(band, (t * g.Hb + i) * g.Wb * g.C)
            if d < 0 or d >= g.D or h < 0 or h >= g.H:
                fill(block, line, g.Wb * g.C)
                continue
            w = q * g.stride_w - g.pad_w
            low = min(max(-w, 0), g.Wb)
            high = max(min(g.W - w, g.Wb), low)
            fill(block, line, low * g.C)
            source = advance(image, d * x[3] + h * x[4] + (w + low) * x[5])
            if x[2] == 1 and x[5] == g.C and channels == g.C:
                copy(block, advance(line, low * g.C), source, 1, (high - low) * g.C)
            else:
                for j in range(high - low):
                    pixel = advance(line, (low + j) * g.C)
                    copy(block, pixel, advance(source, j * x[5]), x[2], channels)
                    fill(block, advance(pixel, channels), g.C - channels)
            fill(block, advance(line, high * g.C), (g.Wb - high) * g.C)


@part
def _multiply(block, a, steps, g, rows, cols, a_taps, w, b_taps, taps, bias, k_count, y, y_steps, tile):
    """Multiply the pixels of a band by the packed panels of weights, tile by tile."""
    lanes, width, height = block_lanes(block), block_columns(block), block_rows(block)
    offsets = np.empty(height, np.int64)
    even = y_steps[4] == cols * y_steps[5]  # pixels lie at one distance, across rows too
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
            whole = count == vectors * lanes and live == height and y_steps[2] == 1
            whole = whole and (even or q + height <= cols)
            target = advance(y, k * y_steps[2] + p * y_steps[4] + q * y_steps[5])
            c, c_row = (target, y_steps[5]) if whole else (tile, width)
            multiply_tile(
                block, vectors, a, table(offsets), a_taps, panel, b_taps, taps, advance(bias, k), c, c_row
            )
            if not whole:
                for i in range(live):
                    p, q = divmod(pixel + i, cols)
                    at = k * y_steps[2] + p * y_steps[4] + q * y_steps[5]
                    spread(block, advance(y, at), y_steps[2], advance(tile, i * width), count)


@part
def _finish(y, y_steps, residual, r, rows, cols, k_count, activation, slope):
    """Add the residual to a band of y, then apply the activation."""
    for p in range(rows):
        for q in range(cols):
            at = p * y_steps[4] + q * y_steps[5]
            if r[0] != 0:
                start = p * r[4] + q * r[5]
                for e in range(k_count):
                    y[at + e * y_steps[2]] += residual[start + e * r[2]]
            activate(y, at, y_steps[2], k_count, activation, slope)
