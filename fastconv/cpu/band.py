"""Convolution of one band of output rows: pack the input it reads, multiply, finish. Channels first.

    x[n, group]                 packed band: [c, t, row phase, column phase, Hb, Wb], zero padded
    +--------------+            stride 2 splits rows and columns by parity, so that neighbouring
    |  p0 ... p1   |  --pack--> output pixels always read neighbouring elements
    +--------------+                 |
                                     |  a tap (c, t, r, s) is a constant shift of a long vector of
    w[k, (c, t, r, s)]  --multiply-> |  pixels, row after row at pitch Wb; Wb - cols of each row are
                                     v  computed for nothing (2 of 58 at 56 x 56 under 3 x 3)
    y[n, k, o, p0 ... p1, :]  <--finish-- activation and residual, while the band is in cache

Arrays enter as views: (address, stride, stride, ...), strides in elements, any sign.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu import threads
from fastconv.cpu.device import itemsize
from fastconv.cpu.simd import (
    Block,
    Kernel,
    Tile,
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

View = tuple[int, ...]

SERIAL_FLOPS = 2_000_000  # below this a second thread costs more than it saves (about 30 us to wake)


class Geometry(NamedTuple):
    """The sizes of a banded convolution; C and K are those of one group."""

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
    Hb: int  # rows and columns of one phase of the packed band
    Wb: int
    k_step: int  # output channels of one task, and how many tasks make a group
    k_parts: int
    direct_b: int  # 1 where B is read from the input itself: nothing is packed


class Tables(NamedTuple):
    """Offsets of the taps in a weight row and in the packed band, and the phases that the taps use."""

    a_taps: np.ndarray
    b_taps: np.ndarray
    row_phases: np.ndarray
    column_phases: np.ndarray


def view(array: np.ndarray) -> View:
    """Return an array as (address, strides in elements...); the caller keeps the array alive."""
    return (array.__array_interface__["data"][0], *(s // array.itemsize for s in array.strides))


def band_elements(g: Geometry, tables: Tables) -> int:
    phases = len(tables.row_phases) * len(tables.column_phases)
    return g.C * g.T * phases * g.Hb * g.Wb


@lru_cache(maxsize=256)
def plan_bands(problem: ConvProblem, tile: Tile, cache: int, threads: int) -> tuple[Geometry, Tables]:
    """Divide a problem into bands whose packed input takes at most about `cache` bytes."""
    (_, sh, sw), (_, dh, dw) = problem.stride, problem.dilation
    row_phases = sorted({r * dh % sh for r in range(problem.R)})
    column_phases = sorted({s * dw % sw for s in range(problem.S)})
    halo_h, halo_w = (problem.R - 1) * dh // sh, (problem.S - 1) * dw // sw
    C, K = problem.C // problem.groups, problem.K // problem.groups
    budget = cache // (
        itemsize(problem) * C * problem.T * len(row_phases) * len(column_phases)
    )  # elements of a plane
    cols = even_share(problem.Q, max(64, budget // (1 + halo_h) - halo_w))
    rows = even_share(problem.P, max(1, budget // (cols + halo_w) - halo_h))
    row_bands, col_bands = math.ceil(problem.P / rows), math.ceil(problem.Q / cols)
    bands = problem.N * problem.groups * problem.O * row_bands * col_bands
    k_step = even_share(K, math.ceil(K / math.ceil(2 * threads / bands)), tile.rows) if threads > 1 else K
    geometry = Geometry(
        problem.groups, C, K, problem.D, problem.H, problem.W, problem.O, problem.P, problem.Q, problem.T,
        *problem.stride, *(before for before, _ in problem.padding), problem.dilation[0],
        rows, cols, row_bands, col_bands, rows + halo_h, cols + halo_w, k_step, math.ceil(K / k_step), 0,
    )  # fmt: skip
    return geometry, _tap_tables(problem, geometry, row_phases, column_phases)


def even_share(total: int, most: int, multiple: int = 1) -> int:
    """Return a share of at most about `most` that cuts `total` into near-equal parts."""
    parts = math.ceil(total / min(total, max(1, most)))
    return min(total, math.ceil(total / parts / multiple) * multiple)


def _tap_tables(problem: ConvProblem, g: Geometry, row_phases: list[int], column_phases: list[int]) -> Tables:
    """Return the shift of every tap: its channel and plane, its phase, its row and column in that phase."""
    (_, sh, sw), (_, dh, dw) = problem.stride, problem.dilation
    plane = g.Hb * g.Wb
    r, s = np.arange(problem.R) * dh, np.arange(problem.S) * dw
    row = np.searchsorted(row_phases, r % sh) * len(column_phases) * plane + r // sh * g.Wb
    column = np.searchsorted(column_phases, s % sw) * plane + s // sw
    outer = np.arange(g.C * g.T) * len(row_phases) * len(column_phases) * plane
    b_taps = (outer[:, None, None] + row[:, None] + column).reshape(-1)
    return Tables(np.arange(b_taps.size), b_taps, np.array(row_phases), np.array(column_phases))


def cost(problem: ConvProblem, tile: Tile, device: Device, cache: int) -> float:
    """Return the estimated seconds of a banded convolution on one core."""
    g, tables = plan_bands(problem, tile, cache, 1)
    bands = problem.N * g.groups * g.O * g.row_bands * g.col_bands
    sides = (g.K, (g.rows - 1) * g.Wb + g.cols) if problem.order == "NCHW" else (g.rows * g.cols, g.K)
    multiply = device.multiply_cycles(tile, *sides, problem.gemm_k, problem.compute_dtype)
    pack = device.copy_cycles(problem, band_elements(g, tables) / g.Wb, g.Wb, problem.stride[2])
    return device.seconds(problem, bands * (multiply + pack))


def run(
    problem: ConvProblem,
    block: Block,
    geometry: Geometry,
    tables: Tables,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    epilogue: Epilogue,
    out: np.ndarray,
) -> None:
    """Convolve band by band into `out`; `weight` is contiguous, shape (K, taps)."""
    g = geometry
    elements = 0 if g.direct_b else band_elements(g, tables) + block.vectors * block.lanes
    finish = finish_arguments(residual, epilogue)
    bias_rows = padded_bias(problem, bias, block.rows)
    views = (view(x), view(weight), view(bias_rows), view(out))

    def work(first: int, last: int) -> None:
        _run_bands(block, first, last, g, tables, elements, *views, *finish)

    tasks = problem.N * g.groups * g.O * g.row_bands * g.col_bands * g.k_parts
    threads.run_tasks(work, tasks, task_threads(problem))


def task_threads(problem: ConvProblem) -> int:
    """Return the threads worth waking for a problem."""
    return threads.thread_count() if problem.flops > SERIAL_FLOPS else 1


def padded_bias(problem: ConvProblem, bias: np.ndarray | None, slack: int) -> np.ndarray:
    """Return the bias, or zeros, followed by `slack` zeros that a last, partial tile may read."""
    padded = np.zeros(problem.K + slack, problem.compute_dtype)
    if bias is not None:
        padded[: problem.K] = bias
    return padded


ACTIVATION_CODES = {
    None: 0, "relu": 1, "relu6": 2, "silu": 3, "gelu": 4, "sigmoid": 5, "tanh": 6, "leaky_relu": 7,
}  # fmt: skip


def finish_arguments(residual: np.ndarray | None, epilogue: Epilogue) -> tuple[View, int, float]:
    """Return what `finish` takes: the residual's view (address 0: none), the activation's code, its slope."""
    view_or_none = (0, 0, 0, 0, 0, 0) if residual is None else view(residual)
    return view_or_none, ACTIVATION_CODES[epilogue.activation], epilogue.slope


@Kernel
def _run_bands(block, first, last, g, tables, elements, x, w, bias, y, residual, activation, slope):
    band, tile = allocate(block, elements), allocate(block, block_rows(block) * block_columns(block))
    source, target = pointer(block, x[0]), pointer(block, y[0])
    taps = tables.b_taps.size
    held = -1  # the band in hand; its parts of K follow one another
    for task in range(first, last):
        here, part = divmod(task, g.k_parts)
        rest, col_band = divmod(here, g.col_bands)
        rest, row_band = divmod(rest, g.row_bands)
        rest, o = divmod(rest, g.O)
        n, group = divmod(rest, g.groups)
        p, q = row_band * g.rows, col_band * g.cols
        rows, cols = min(g.rows, g.P - p), min(g.cols, g.Q - q)
        image = advance(source, n * x[1] + group * g.C * x[2])
        if not g.direct_b and here != held:
            pack_band(block, band, image, x, g, tables, o, p, q, rows)
        held = here
        b = advance(image, o * g.stride_d * x[3] + p * x[4] + q * x[5]) if g.direct_b else band
        k = part * g.k_step
        k_count = min(g.k_step, g.K - k)
        channel = group * g.K + k
        origin = n * y[1] + channel * y[2] + o * y[3] + p * y[4] + q * y[5]
        multiply(
            block, advance(pointer(block, w[0]), channel * taps), taps, k_count,
            table(tables.a_taps), b, table(tables.b_taps), taps, advance(pointer(block, bias[0]), channel),
            (rows - 1) * g.Wb + cols, 0, g.Wb, cols, advance(target, origin), (y[2], y[4], y[5]),
            tile,
        )  # fmt: skip
        if residual[0] != 0 or activation != 0:
            r = residual
            at = n * r[1] + channel * r[2] + o * r[3] + p * r[4] + q * r[5]
            finish(
                advance(target, origin), (y[2], y[4], y[5]), advance(pointer(block, r[0]), at),
                (r[2], r[4], r[5]), r[0] != 0, (k_count, rows, cols), activation, slope,
            )  # fmt: skip
    release(band)
    release(tile)


@part
def pack_band(block, b, image, x, g, tables, o, p, q, rows):
    """Copy what output rows p ... p+rows-1, columns q ... read into the packed band, zeros for padding."""
    at = 0
    deep = g.Hb - g.rows + rows
    for c in range(g.C):
        for t in range(g.T):
            d = o * g.stride_d + t * g.dilation_d - g.pad_d
            for row_phase in tables.row_phases:
                for column_phase in tables.column_phases:
                    w = q * g.stride_w + column_phase - g.pad_w
                    low = min(max(-(w // g.stride_w), 0), g.Wb)  # columns left of the image
                    high = min(max(-((w - g.W) // g.stride_w), low), g.Wb)
                    for i in range(deep):
                        h = (p + i) * g.stride_h + row_phase - g.pad_h
                        line = advance(b, at + i * g.Wb)
                        if d < 0 or d >= g.D or h < 0 or h >= g.H:
                            fill(block, line, g.Wb)
                            continue
                        fill(block, line, low)
                        start = c * x[2] + d * x[3] + h * x[4] + (w + low * g.stride_w) * x[5]
                        copy(block, advance(line, low), advance(image, start), g.stride_w * x[5], high - low)
                        fill(block, advance(line, high), g.Wb - high)
                    at += g.Hb * g.Wb


@part
def multiply(
    block, w, w_row, k_count, a_taps, b, b_taps, taps, bias, pixels, first, pitch, cols, y, y_steps, tile,
):  # fmt: skip
    """Multiply weight rows by a long vector of pixels, tile by tile, and store the pixels that exist.

    B holds whole vectors, or at least one. Pixel j of the vector is column (first + j) % pitch of row (first + j) // pitch; it exists if the
    column is < cols. y points at row 0, column 0 of the first channel; y_steps: per channel, row, column.
    """
    step_k, step_p, step_q = y_steps
    lanes, width, height = block_lanes(block), block_columns(block), block_rows(block)
    live = min(height, k_count)
    spare = allocate(block, height * w_row if live < height else 0)
    if live < height:  # rows of zeros make a whole tile
        copy(block, spare, w, 1, live * w_row)
        fill(block, advance(spare, live * w_row), (height - live) * w_row)
        w = spare
    for row in range(0, k_count, height):
        k = min(row, k_count - live)  # the last tile overlaps the one before, here and below
        done = 0
        while done < pixels:
            vectors = (min(width, pixels - done) + lanes - 1) // lanes
            if vectors * lanes > pixels >= lanes:  # never past the end of B, which may be the caller's
                vectors = pixels // lanes
            j = max(0, min(done, pixels - vectors * lanes))
            count = min(vectors * lanes, pixels - j)
            done = j + count
            p, q = divmod(first + j, pitch)
            whole = live == height and count == vectors * lanes and q + count <= cols and step_q == 1
            c = advance(y, k * step_k + p * step_p + q) if whole else tile
            c_row = step_k if whole else width
            multiply_tile(
                block, vectors, advance(w, k * w_row), w_row, a_taps, advance(b, j), b_taps, taps,
                advance(bias, k), c, c_row,
            )  # fmt: skip
            if not whole:
                _store_rows(block, tile, advance(y, k * step_k), y_steps, live, first + j, count, pitch, cols)
    release(spare)


@part
def _store_rows(block, tile, y, y_steps, live, first, count, pitch, cols):
    """Store the existing pixels first ... first+count-1 of a tile, one image row at a time."""
    step_k, step_p, step_q = y_steps
    j = 0
    while j < count:
        p, q = divmod(first + j, pitch)
        run = min(pitch - q, count - j)
        exist = min(cols - q, run)
        for i in range(live):
            source = advance(tile, i * block_columns(block) + j)
            spread(block, advance(y, i * step_k + p * step_p + q * step_q), step_q, source, exist)
        j += run


@part
def finish(y, y_steps, residual, residual_steps, has_residual, sizes, activation, slope):
    """Add the residual to a box of y, then apply the activation."""
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            at = i * y_steps[0] + j * y_steps[1]
            if has_residual:
                start = i * residual_steps[0] + j * residual_steps[1]
                for e in range(sizes[2]):
                    y[at + e * y_steps[2]] += residual[start + e * residual_steps[2]]
            activate(y, at, y_steps[2], sizes[2], activation, slope)


@part
def activate(y, at, step, count, activation, slope):
    """Apply an activation, named by its code, to `count` elements of y."""
    if activation == 1:
        for e in range(count):
            v = y[at + e * step]
            y[at + e * step] = v if not v < 0 else 0  # NaN passes through
    elif activation != 0:
        for e in range(count):
            y[at + e * step] = _activate_one(np.float64(y[at + e * step]), activation, slope)


@part
def _activate_one(v, activation, slope):
    if activation == 2:
        return 0.0 if v < 0 else 6.0 if v > 6 else v
    if activation == 3:
        return v / (1 + math.exp(-v))
    if activation == 4:
        return v * (1 + math.erf(v * math.sqrt(0.5))) / 2
    if activation == 5:
        return 1 / (1 + math.exp(-v))
    if activation == 6:
        return math.tanh(v)
    return v if not v < 0 else v * slope
