"""Convolution of one band of output rows: pack the input it reads, multiply, finish. Channels first.

    x[n, group]                 packed band: [c, t, row phase, column phase, Hb, Wb], zero padded
    +--------------+            stride 2 splits rows and columns by parity, so that neighbouring
    |  p0 ... p1   |  --pack--> output pixels always read neighbouring elements
    +--------------+                 |
                                     |  a tap (c, t, r, s) is a constant shift of a long vector of
    w[k, (c, t, r, s)]  --multiply-> |  pixels, row after row at pitch Wb; Wb - cols of each row are
                                     v  computed for nothing (2 of 58 at 56 x 56 under 3 x 3)
    y[n, k, o, p0 ... p1, :]  <--finish-- activation and residual, while the band is in cache

Arrays are seen as views: (address, stride, stride, ...), strides in elements, any sign.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu import threads
from fastconv.cpu.compiling import part, small_part
from fastconv.cpu.device import BOX_ROW_CYCLES, itemsize
from fastconv.cpu.simd import (
    Block,
    Kernel,
    Tile,
    address_of,
    advance,
    allocate,
    block_columns,
    block_lanes,
    block_rows,
    copy_padded,
    copy_rows,
    fill,
    finish_lanes,
    finish_whole,
    lane_bits,
    multiply_tile,
    pointer,
    release,
    spread_rows,
    table,
    view_of,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

View = tuple[int, ...]
Ending = tuple[View, int, float]

MOST_OFFSETS = 6  # of pixels, channels last: those of a taller tile do not fit the integer registers ...
SPILLED = 1.25  # ... and take so much longer
CROSSING_TAPS = 50  # a tile that runs over the end of a row takes longer to store by so many taps of a vector
SERIAL_FLOPS = 500_000  # below this, 5 to 10 us, a second thread costs more than it saves
ACTIVATION_CODES = {
    None: 0, "relu": 1, "relu6": 2, "silu": 3, "gelu": 4, "sigmoid": 5, "tanh": 6, "leaky_relu": 7,
}  # fmt: skip
COLLIDING = 1024  # bytes: lines so far apart share 4 of the 64 sets of L1, and fewer at multiples
LAST_CLIP = ACTIVATION_CODES["relu6"]  # codes up to this one only clip


class Geometry(NamedTuple):
    """The sizes of a banded convolution, of either memory order; C and K are those of one group."""

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
    Hb: int  # rows and columns of the packed band, channels first of one phase of it
    Wb: int
    k_step: int  # output channels of one task, and how many tasks make a group
    k_parts: int
    by_rows: int  # channels first: 1 where each row of outputs is a vector of its own
    in_place: int  # channels last: 1 where the input itself is read and nothing is packed


class Tables(NamedTuple):
    """Offsets of the taps (c, t, r, s), in elements, and the phases of rows and columns that they read."""

    b_taps: np.ndarray  # in the packed band; in a row of the weight they are neighbours
    row_phases: np.ndarray
    column_phases: np.ndarray


def view(array: np.ndarray) -> View:
    """Return an array as (address, strides in elements...); the caller keeps the array alive."""
    item = array.itemsize
    return (address(array), *[s // item for s in array.strides])


def address(array: np.ndarray) -> int:
    """Return where the first element of an array lies; the caller keeps the array alive."""
    return array.__array_interface__["data"][0]


@lru_cache(maxsize=256)
def flatten(problem: ConvProblem) -> ConvProblem | None:
    """Return the problem with every plane as one row, if channels come first and a window is one pixel."""
    taps = problem.T * problem.R * problem.S
    is_padded = any(map(any, problem.padding))
    if problem.order == "NHWC" or taps > 1 or problem.stride[1:] != (1, 1) or is_padded:
        return None
    return replace(problem, H=1, W=problem.H * problem.W)


def columns_touch(*arrays: np.ndarray) -> bool:
    """Say whether the columns of arrays of rank 5 lie side by side."""
    return all(array.strides[4] == array.itemsize for array in arrays)


def lie_in_rows(operands: Operands) -> bool:
    """Say whether the pixels of every plane lie one after the other."""
    x, residual, out = operands.x, operands.residual, operands.out
    return is_one_row(x) and is_one_row(out) and (residual is None or is_one_row(residual))


def is_one_row(array: np.ndarray) -> bool:
    item, shape, strides = array.itemsize, array.shape, array.strides
    return strides[4] == item and (strides[3] == item * shape[4] or shape[3] == 1)


@lru_cache(maxsize=256)
def make_block(problem: ConvProblem, tile: Tile, device: Device, form: str = "rows") -> Block:
    """Return a tile as the microkernel takes it, for a problem's dtype and a device's vectors."""
    dtype = problem.compute_dtype
    return Block(dtype, tile.rows, tile.vectors, device.lanes(dtype), form)


@lru_cache(maxsize=256)
def plan_bands(problem: ConvProblem, block: Block, cache: int, workers: int) -> tuple[Geometry, Tables]:
    """Divide a problem into bands whose packed input takes about `cache` bytes, and those among threads."""
    C, K = problem.C // problem.groups, problem.K // problem.groups
    (row_phases, halo_h), (column_phases, halo_w) = _phases(problem, 1), _phases(problem, 2)
    phases = C * problem.T * len(row_phases) * len(column_phases)
    budget = cache // (itemsize(problem) * phases)  # elements of each
    planes = problem.N * problem.groups * problem.O
    cols = _cut(problem.Q, max(64, budget // (1 + halo_h) - halo_w), planes, workers, block.lanes)
    planes *= math.ceil(problem.Q / cols)
    rows = _cut(problem.P, max(1, budget // (cols + halo_w) - halo_h), planes, workers)
    geometry = make_geometry(
        problem, problem.groups, C, K, rows, cols, rows + halo_h, cols + halo_w, block.rows, workers
    )
    geometry = geometry._replace(by_rows=int(_prefers_rows(geometry, block, problem.gemm_k)))
    return geometry, _tap_tables(problem, geometry, row_phases, column_phases)


def _cut(extent: int, most: int, others: int, workers: int, multiple: int = 1) -> int:
    """Return an even share of an axis, of about `most` or less, so that workers get as many shares each.

    others  how often the axis is cut
    """
    parts = math.ceil(extent / most)
    if parts > 1:
        parts = count_parts(parts, extent, others, workers)
    return even_share(extent, math.ceil(extent / parts), multiple)


def count_parts(least: int, most: int, others: int, workers: int) -> int:
    """Return into how many parts to cut `others` things each, so that workers get as many parts, or many."""
    parts = least
    while parts < most and parts * others % workers and parts * others < 8 * workers:
        parts += 1
    return parts


def share_channels(K: int, bands: int, workers: int, multiple: int) -> int:
    """Return the output channels of one task: all, unless there are fewer than two bands per worker."""
    return K if workers == 1 else even_share(K, math.ceil(K / math.ceil(2 * workers / bands)), multiple)


def _prefers_rows(g: Geometry, block: Block, taps: int) -> bool:
    """Say whether vectors should end with the rows: few taps pay for a few vectors more."""
    lanes = block.lanes
    more = g.rows * math.ceil(g.cols / lanes) - math.ceil(((g.rows - 1) * g.Wb + g.cols) / lanes)
    is_whole = g.cols % lanes == 0 or g.cols > block.vectors * lanes  # else all tiles run over the end
    return is_whole and more * taps <= (g.rows - 1) * CROSSING_TAPS


def cut_bands(problem: ConvProblem, C: int, rows: int, cols: int) -> tuple[Geometry, Tables]:
    """Cut the output pixels of a problem into bands of rows x cols, each with its input of C channels."""
    (row_phases, halo_h), (column_phases, halo_w) = _phases(problem, 1), _phases(problem, 2)
    g = make_geometry(problem, 1, C, problem.gemm_m, rows, cols, rows + halo_h, cols + halo_w, 1, workers=1)
    return g, _tap_tables(problem, g, row_phases, column_phases)


def _phases(problem: ConvProblem, axis: int) -> tuple[list[int], int]:
    """Return the rests modulo the stride that an axis' taps have, and how far those with one rest reach."""
    stride, dilation, taps = problem.stride[axis], problem.dilation[axis], problem.weight_shape5[2 + axis]
    return sorted({tap * dilation % stride for tap in range(taps)}), (taps - 1) * dilation // stride


def make_geometry(
    problem: ConvProblem,
    groups: int,
    C: int,
    K: int,
    rows: int,
    cols: int,
    Hb: int,
    Wb: int,
    k_multiple: int,
    workers: int,
) -> Geometry:
    """Return the geometry of packed bands of rows x cols outputs, K cut where there are few of them."""
    row_bands, col_bands = math.ceil(problem.P / rows), math.ceil(problem.Q / cols)
    bands = problem.N * groups * problem.O * row_bands * col_bands
    k_step = share_channels(K, bands, workers, k_multiple)
    return Geometry(
        groups, C, K, problem.C, problem.K, problem.D, problem.H, problem.W, problem.O, problem.P, problem.Q,
        problem.T, *problem.stride, *problem.padding_before, problem.dilation[0],
        rows, cols, row_bands, col_bands, Hb, Wb, k_step, math.ceil(K / k_step), by_rows=0, in_place=0,
    )  # fmt: skip


def even_share(total: int, most: int, multiple: int = 1) -> int:
    """Return a share of at most about `most` that cuts `total` into near-equal parts, but for rounding up."""
    parts = math.ceil(total / min(total, max(1, most)))
    return min(total, math.ceil(total / parts / multiple) * multiple)


def _tap_tables(problem: ConvProblem, g: Geometry, row_phases: list[int], column_phases: list[int]) -> Tables:
    """Return where every tap lies: its channel and plane, its phase, its row and column in that phase."""
    (_, sh, sw), (_, dh, dw) = problem.stride, problem.dilation
    plane = g.Hb * g.Wb
    r, s = np.arange(problem.R) * dh, np.arange(problem.S) * dw
    row = np.searchsorted(row_phases, r % sh) * len(column_phases) * plane + r // sh * g.Wb
    column = np.searchsorted(column_phases, s % sw) * plane + s // sw
    outer = np.arange(g.C * g.T) * len(row_phases) * len(column_phases) * plane
    b_taps = (outer[:, None, None] + row[:, None] + column).reshape(-1)
    return Tables(b_taps, np.array(row_phases), np.array(column_phases))


def band_elements(g: Geometry, tables: Tables) -> int:
    """Return the elements of packed band that each thread holds."""
    return g.C * g.T * len(tables.row_phases) * len(tables.column_phases) * g.Hb * g.Wb


def workspace(problem: ConvProblem, block: Block, cache: int) -> int:
    """Return the bytes of packed bands that all threads hold together."""
    workers = task_threads(problem)
    return workers * itemsize(problem) * band_elements(*plan_bands(problem, block, cache, workers))


def cost(problem: ConvProblem, tile: Tile, device: Device, cache: int, aligned: bool) -> float:
    """Return the estimated seconds of a banded convolution on one core."""
    g, tables = plan_bands(problem, make_block(problem, tile, device), cache, 1)
    strips, sides, scatter = 1, (g.rows * g.cols, g.K), 0
    if problem.order == "NCHW":
        pixels, most, step, _ = cut_strips(g, g.rows, g.cols)
        strips, sides = math.ceil(pixels / step), (g.K, most)
        if g.cols < most:  # tiles run over the ends of rows, and are stored run by run: one more than rows
            scatter = g.K * (g.rows + 1) * BOX_ROW_CYCLES
    multiply = strips * device.multiply_cycles(tile, *sides, problem.gemm_k, problem.compute_dtype, aligned)
    if problem.order == "NHWC" and tile.rows > MOST_OFFSETS:
        multiply *= SPILLED
    pack = device.copy_cycles(problem, band_elements(g, tables) / g.Wb, g.Wb, problem.stride[2])
    return device.seconds(problem, task_count(problem, g) * (multiply + scatter + pack))


def task_count(problem: ConvProblem, g: Geometry) -> int:
    """Return the number of tasks, each a band and a part of K, that `find_task` tells apart."""
    return problem.N * g.groups * g.O * g.row_bands * g.col_bands * g.k_parts


def run(problem: ConvProblem, block: Block, geometry: Geometry, tables: Tables, operands: Operands) -> None:
    """Convolve band by band; the weight is of rank 5."""
    slack = block.vectors * block.lanes  # the last vectors of pixels read past the end
    _run_bands(
        block, task_count(problem, geometry), task_threads(problem), geometry, tables,
        band_elements(geometry, tables) + slack, *arguments_of(problem, operands, block.rows),
    )  # fmt: skip


def arguments_of(
    problem: ConvProblem, operands: Operands, slack: int, *, any_weight: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Ending]:
    """Return x, weight, bias, y and ending, as kernels take them; `slack` as in `padded_bias`.

    any_weight  whether the weight may have any strides
    """
    weight = operands.weight if any_weight else np.ascontiguousarray(operands.weight)
    bias = padded_bias(problem, operands.bias, slack)
    return operands.x, weight, bias, operands.out, make_ending(operands)


def task_threads(problem: ConvProblem) -> int:
    """Return the threads worth waking for a problem."""
    most = 1 + problem.flops // SERIAL_FLOPS
    return min(most, threads.thread_count()) if most > 1 else 1


def padded_bias(problem: ConvProblem, bias: np.ndarray | None, slack: int) -> np.ndarray:
    """Return the bias, or zeros, followed by `slack` zeros that a last, partial tile may read."""
    if bias is not None and not slack:
        return np.ascontiguousarray(bias)
    zeros = _zeros(problem.K + slack, problem.compute_dtype)
    if bias is None:
        return zeros
    padded = zeros.copy()
    padded[: problem.K] = bias
    return padded


@lru_cache(maxsize=64)
def _zeros(count: int, dtype: str) -> np.ndarray:
    """Return zeros that are only read."""
    return np.zeros(count, dtype)


def weight_lies_well(problem: ConvProblem, device: Device) -> bool:
    """Say whether a turned 1x1 weight need not be copied: of one image, in L2 or of lines apart in the cache.

    Each image packs the rows again. Taps lie K elements apart, and a power of two of bytes puts all of them
    into few sets of the cache.
    """
    apart = problem.K * itemsize(problem)
    return problem.N == 1 and (problem.gemm_k * apart <= device.l2 // 2 or apart % COLLIDING != 0)


def make_ending(operands: Operands) -> Ending:
    """Return what `finish` takes: the residual's view (address 0: none), the activation's code, its slope."""
    residual, epilogue = operands.residual, operands.epilogue
    view_or_none = (0, 0, 0, 0, 0, 0) if residual is None else view(residual)
    return view_or_none, ACTIVATION_CODES[epilogue.activation], float(epilogue.slope)


@Kernel
def _run_bands(block, first, last, g, tables, elements, x, w, bias, y, ending):
    x, w, bias, y = view_of(x), table(w), table(bias), view_of(y)
    band, tile = allocate(block, elements), allocate(block, block_rows(block) * block_columns(block))
    taps = tables.b_taps.size
    held = -1  # the band in hand; its parts of K follow one another
    for task in range(first, last):
        here, k_part, n, group, o, p, q, rows, cols = find_task(g, task)
        channel = group * g.K + k_part * g.k_step
        k_count = min(g.k_step, g.K - k_part * g.k_step)
        if here != held:
            pack_band(block, band, locate(block, x, (n, group * g.C, 0, 0, 0)), x, g, tables, o, p, q, rows)
            held = here
        multiply(
            block, advance(w, channel * taps), (taps, 1), k_count,
            band, table(tables.b_taps), taps, advance(bias, channel),
            _find_strips(g, rows, cols), 0, 0, g.Wb, cols,
            y, (n, channel, o, p, q), tile, rows, ending,
        )  # fmt: skip
    release(band)
    release(tile)


@small_part
def find_task(g, task):
    """Return the number of a task's band, its part of K, and the band's n, group, o, p, q, rows, cols."""
    here, k_part = divmod(task, g.k_parts)
    rest, col_band = divmod(here, g.col_bands)
    rest, row_band = divmod(rest, g.row_bands)
    rest, o = divmod(rest, g.O)
    n, group = divmod(rest, g.groups)
    p, q = row_band * g.rows, col_band * g.cols
    return here, k_part, n, group, o, p, q, min(g.rows, g.P - p), min(g.cols, g.Q - q)


@small_part
def locate(block, view, at):
    """Return a pointer to the element `at` (n, channel, plane, row, column) of a view."""
    offset = at[0] * view[1] + at[1] * view[2] + at[2] * view[3] + at[3] * view[4] + at[4] * view[5]
    return advance(pointer(block, view[0]), offset)


@part
def pack_band(block, band, image, x, g, tables, o, p, q, rows):
    """Copy what output rows p ... p+rows-1, columns q ... read into the packed band, zeros for padding."""
    at = 0
    deep = g.Hb - g.rows + rows
    for c in range(g.C):
        for t in range(g.T):
            d = o * g.stride_d + t * g.dilation_d - g.pad_d
            for row_phase in tables.row_phases:
                h = p * g.stride_h + row_phase - g.pad_h
                top, bottom = columns_inside(h, g.stride_h, deep, g.H if 0 <= d < g.D else 0)
                for column_phase in tables.column_phases:
                    w = q * g.stride_w + column_phase - g.pad_w
                    low, high = columns_inside(w, g.stride_w, g.Wb, g.W)
                    plane = advance(band, at)
                    fill(block, plane, top * g.Wb)
                    copy_rows(
                        block, bottom - top, advance(plane, top * g.Wb), g.Wb,
                        advance(image, c * x[2] + d * x[3] + (h + top * g.stride_h) * x[4] + w * x[5]),
                        g.stride_h * x[4], g.stride_w * x[5], g.Wb, low, high,
                    )  # fmt: skip
                    fill(block, advance(plane, bottom * g.Wb), (deep - bottom) * g.Wb)
                    at += g.Hb * g.Wb


@small_part
def columns_inside(w, stride, count, W):
    """Return which of `count` columns w, w + stride ... lie in a row of W columns: from low up to high."""
    low = 0 if w >= 0 else min(-(w // stride), count)  # most rows need no division, which takes 20 cycles
    if w + (count - 1) * stride < W:
        return low, count
    return low, min(max(-((w - W) // stride), low), count)


def cut_strips(g, rows, cols):
    """Return the strips in which a band of rows x cols outputs is multiplied, as `multiply` takes them."""
    pixels = (rows - 1) * g.Wb + cols
    return (pixels, cols, g.Wb, g.Wb) if g.by_rows else (pixels, pixels, pixels, pixels)


_find_strips = small_part(cut_strips)


@part
def multiply(
    block, w, w_steps, k_count, b, b_taps, taps, bias, strips, line, first, pitch, cols,
    y, origin, tile, rows, ending,
):  # fmt: skip
    """Multiply weight rows by strips of pixels, tile by tile; store the pixels that exist and finish them.

    w_steps  how far apart the weight's rows lie, and the taps of one
    strips   the pixels of all, those of each, how many pixels apart they begin, and how far apart in B
    line     0, or elements, if B, maybe the caller's, ends with the pixels, of which it then holds at least a
             vector: tiles between the first and the last begin at addresses that are a multiple of it
    first    number of the first pixel: pixel j is column j % pitch of row j // pitch, where column < cols
    origin   n, channel, o, p, q in y of the first channel's row 0, column 0
    tile     memory for one tile
    rows     of pixels to finish, with the ending, as soon as they are all there; 0 where the caller does
    """
    n, channel, o, p, q = origin
    pixels, most, step, b_step = strips
    height = block_rows(block)
    live = min(height, k_count)
    packs = live < height or (w_steps[1] != 1 and pixels > block_columns(block))
    spare = allocate(block, height * taps if packs else 0)
    for row in range(0, k_count, height):
        k = min(row, k_count - live)  # the last tile overlaps the one before
        a, a_steps = advance(w, k * w_steps[0]), w_steps
        if packs and w_steps[0] == taps and w_steps[1] == 1:  # rows of zeros make a whole tile
            copy_padded(block, spare, a, 1, height * taps, 0, live * taps)
            a = spare
        elif packs:  # here too
            copy_rows(block, taps, spare, height, a, w_steps[1], w_steps[0], height, 0, live)
            a, a_steps = spare, (1, height)
        for begin in range(0, pixels, step):
            _multiply_strip(
                block, a, a_steps, live, advance(b, begin // step * b_step), b_taps, taps,
                advance(bias, k), min(most, pixels - begin), line, first + begin, pitch, cols,
                locate(block, y, (n, channel + k, o, p, q)), (y[2], y[4], y[5]), tile,
            )  # fmt: skip
        finish(block, y, (n, channel + k, o, p, q), (live, rows, cols), ending)
    release(spare)


@part
def _multiply_strip(
    block, w, w_steps, live, b, b_taps, taps, bias, pixels, line, first, pitch, cols, y, y_steps, tile
):
    """Multiply `live` weight rows by one strip of pixels; the arguments are those of `multiply`."""
    step_k, step_p, step_q = y_steps
    lanes, width = block_lanes(block), block_columns(block)
    done = 0
    p_first, q_first = divmod(first, pitch)
    while done < pixels:
        vectors, j, count = find_vectors(block, done, pixels, line > 0)
        done = j + count
        if line > 1 and pixels - done > block_columns(block):  # else the last tile follows, which ends with B
            done -= address_of(advance(b, done)) % line
        p, q = p_first, q_first + j
        if q >= pitch:  # a division takes as long as a few taps
            p, q = divmod(first + j, pitch)
        whole = live == block_rows(block) and count == vectors * lanes and q + count <= cols and step_q == 1
        c = advance(y, p * step_p + q) if whole else tile
        multiply_tile(
            block, vectors, w, w_steps[0], w_steps[1], advance(b, j), b_taps, taps, bias, c,
            step_k if whole else width,
        )  # fmt: skip
        if not whole:
            store_rows(block, tile, y, y_steps, live, first + j, count, pitch, cols)


@small_part
def find_vectors(block, done, pixels, is_exact):
    """Return the vectors of the next tile of a strip, its first pixel, and how many of its pixels exist.

    is_exact  whether vectors must not run over the end of the strip, which then has at least one of them
    """
    lanes = block_lanes(block)
    most, left = block_columns(block) // lanes, (pixels - done + lanes - 1) // lanes
    vectors = min(most, left)
    if most < left < 2 * most:  # the last two share what is left: 7 vectors are 3, 2 and 2, not 3, 3 and 1
        vectors = (left + 1) // 2
    if is_exact and vectors * lanes > pixels:  # 49 pixels in one tile would be 4 vectors: two tiles of 2
        vectors = min((vectors + 1) // 2, pixels // lanes)
    j = max(0, min(done, pixels - vectors * lanes))  # the last tile overlaps the one before
    return vectors, j, min(vectors * lanes, pixels - j)


@part
def store_rows(block, tile, y, y_steps, live, first, count, pitch, cols):
    """Store those of the pixels first ... first+count-1 that exist, `live` rows of a tile, by image rows."""
    step_k, step_p, step_q = y_steps
    j = 0
    while j < count:
        p, q = divmod(first + j, pitch)
        run = min(pitch - q, count - j)
        exist = min(cols - q, run)
        spread_rows(
            block, live, advance(y, p * step_p + q * step_q), step_k, step_q,
            advance(tile, j), block_columns(block), exist,
        )  # fmt: skip
        j += run


@small_part
def finish(block, y, origin, sizes, ending):
    """Add the residual to a box of y, then apply the activation.

    origin  n, channel, o, p, q of the box; sizes: its channels, rows and columns
    """
    if ending[0][0] != 0 or ending[1] != 0:
        _finish_box(block, y, origin, sizes, ending)


@part
def _finish_box(block, y, origin, sizes, ending):
    """Do what `finish` does where there is something to do."""
    residual, activation, slope = ending
    adds, is_last = residual[0] != 0, y[2] == 1  # channels last: they make the inner loop
    target, steps = locate(block, y, origin), (y[2], y[4], y[5])
    more, more_steps = locate(block, residual, origin), (residual[2], residual[4], residual[5])
    if is_last:
        sizes = (sizes[1], sizes[2], sizes[0])
        steps = (steps[1], steps[2], steps[0])
        more_steps = (more_steps[1], more_steps[2], more_steps[0])
    in_vectors = steps[2] == 1 and (not adds or more_steps[2] == 1)
    if in_vectors and steps[1] == sizes[2] and (not adds or more_steps[1] == sizes[2]):
        sizes = (sizes[0], 1, sizes[1] * sizes[2])  # rows that follow one another are one
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            row = advance(target, i * steps[0] + j * steps[1])
            added = advance(more, i * more_steps[0] + j * more_steps[1])
            if in_vectors:
                _finish_row(block, row, added, sizes[2], adds, activation)
            elif adds:
                for e in range(sizes[2]):
                    row[e * steps[2]] += added[e * more_steps[2]]
            if not in_vectors or activation > LAST_CLIP:
                _activate(row, steps[2], sizes[2], activation, slope)


@small_part
def _finish_row(block, row, added, count, adds, activation):
    """Add the residual to elements that follow one another, and clip them if the activation only clips."""
    lanes, clips = block_lanes(block), 0 < activation <= LAST_CLIP
    most = 6.0 if activation == LAST_CLIP else np.inf
    whole, every = count - count % lanes, lane_bits(block, 0, lanes)
    for e in range(0, whole, lanes):
        finish_whole(block, advance(row, e), advance(added, e), every, adds, clips, most)
    if whole < count:
        rest = lane_bits(block, 0, count - whole)
        finish_lanes(block, advance(row, whole), advance(added, whole), rest, adds, clips, most)


@small_part
def add_row(block, row, added, count):
    """Add elements that follow one another to others."""
    _finish_row(block, row, added, count, True, 0)


@part
def _activate(y, step, count, activation, slope):
    """Apply an activation, given as its code, to `count` elements of y."""
    if activation == 1:
        for e in range(count):
            v = y[e * step]
            y[e * step] = v if not v < 0 else 0  # NaN passes through
    elif activation != 0:
        for e in range(count):
            y[e * step] = _activate_one(np.float64(y[e * step]), activation, slope)


@part
def _activate_one(v, activation, slope):
    """Return the activation of one element, in float64; the codes are those of ACTIVATION_CODES."""
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
