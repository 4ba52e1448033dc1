"""Winograd F(m x m, 3 x 3), m = 2 or 4: a block of tiles goes through all four stages while it lies in cache.

    w (K, C, 3, 3)      --filter-->  U (a*a, K, C)             a = m + 2
    x, a block of tiles  --input-->  V (a*a, C, block)         lanes are neighbouring tiles
    U, V               --multiply->  M (a*a, k_group, block)   a*a independent products
    M                   --output-->  y + bias                  m x m pixels per tile; then the epilogue

Tiles are numbered through batch, rows and columns, so small maps of a batch share their vectors. The filters
are transformed once before the tiles, or, where there are so few tiles that U would be read only once or
twice (and is larger than the caches: 36 x 512 x 512 floats are 38 MB), one group of channels at a time.
Where there are fewer blocks of tiles than threads, these share the output channels, and V is made before.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu import threads
from fastconv.cpu.band import (
    columns_inside,
    count_offsets,
    finish,
    locate,
    make_ending,
    padded_bias,
    task_threads,
)
from fastconv.cpu.device import BOX_ROW_CYCLES, itemsize
from fastconv.cpu.simd import (
    Block,
    Kernel,
    advance,
    allocate,
    block_columns,
    block_lanes,
    block_m,
    block_rows,
    copy_rows,
    fill,
    multiply_tile,
    part,
    prefetch,
    release,
    spread_rows,
    table,
    transform_filter,
    transform_input,
    transform_output,
    view_of,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands


class WinogradTile(NamedTuple):
    """F(m x m, 3 x 3) with a register tile of `rows` channels times `vectors` vectors of tiles."""

    m: int
    rows: int
    vectors: int

    @property
    def bits(self) -> int:
        """What decides the bits of a result."""
        return self.m

    def __str__(self) -> str:
        return f"f{self.m}_{self.rows}x{self.vectors}"


TILES = tuple(WinogradTile(m, *tile) for m in (4, 2) for tile in ((6, 4), (4, 3), (8, 1)))


class Geometry(NamedTuple):
    """The sizes of a Winograd convolution; C and K are those of one group."""

    groups: int
    C: int
    K: int
    H: int
    W: int
    P: int
    Q: int
    pad_h: int
    pad_w: int
    tiles_h: int  # tiles of one image along each side, those of the whole batch, the vectors that they fill
    tiles_w: int
    tiles: int
    vectors: int
    blocks: int  # that share the vectors evenly
    c_parts: int  # in how many parts V is made before all else; 0 where a task makes its own
    C_padded: int  # to whole vectors
    k_step: int  # output channels of one task, and how many tasks make a group
    k_parts: int
    k_group: int  # output channels multiplied before their output transform, so that M lies in L2
    U_step: int  # distance of the a*a matrices of U and of V, in elements: one vector more than they
    V_step: int  # need, because a power of two would put all a*a lines into one set of the cache
    fetches_ahead: int  # 1 where an image is too large for L2, so that its lines would be waited for


@lru_cache(maxsize=256)
def _geometry(
    problem: ConvProblem, tile: WinogradTile, device: Device, workers: int, prepared: bool
) -> Geometry:
    """Divide a problem into blocks of tiles and groups of output channels."""
    lanes = device.lanes(problem.compute_dtype)
    C, K = problem.C // problem.groups, problem.K // problem.groups
    tiles_h, tiles_w = math.ceil(problem.P / tile.m), math.ceil(problem.Q / tile.m)
    tiles = problem.N * tiles_h * tiles_w
    width, vectors = tile.vectors * lanes, math.ceil(tiles / lanes)
    per_group = math.ceil(workers / problem.groups)
    blocks = min(vectors, math.ceil(vectors / tile.vectors / per_group) * per_group)
    shares_V = 0 < blocks * problem.groups < workers
    k_parts = math.ceil(2 * workers / (blocks * problem.groups)) if shares_V else 1
    k_step = min(K, math.ceil(K / k_parts / tile.rows) * tile.rows)
    C_padded = math.ceil(C / lanes) * lanes
    U_ready = prepared or _transforms_filters_first(blocks)
    channel = (tile.m + 2) ** 2 * itemsize(problem) * (width if U_ready else width + C_padded)
    k_group = max(1, min(math.ceil(k_step / tile.rows), device.l2 // 2 // channel // tile.rows)) * tile.rows
    U_rows = problem.K + tile.rows if U_ready else k_group  # a last, partial tile reads rows beyond K
    return Geometry(
        problem.groups, C, K, problem.H, problem.W, problem.P, problem.Q,
        *problem.padding_before[1:], tiles_h, tiles_w, tiles, vectors, blocks,
        min(C, 2 * workers) if shares_V else 0, C_padded, k_step, math.ceil(K / k_step), k_group,
        U_rows * C_padded + lanes, C * width + lanes,
        int(problem.order == "NCHW" and problem.C * problem.H * problem.W * itemsize(problem) > device.l2),
    )  # fmt: skip


def cost(problem: ConvProblem, tile: WinogradTile, device: Device) -> float:
    """Return the estimated seconds on one core, the transform of the filters included."""
    dtype = problem.compute_dtype
    lanes, a = device.lanes(dtype), tile.m + 2
    g = _geometry(problem, tile, device, 1, prepared=False)
    columns = math.ceil(g.tiles / g.blocks)
    products = g.blocks * a * a * device.multiply_cycles(tile, g.K, columns, g.C, dtype)
    filters = g.K * math.ceil(g.C / lanes) * (9 * lanes + 4 * a * a)
    lines, rows = (
        device.copy_cycles(problem, count, lanes * tile.m, 1, BOX_ROW_CYCLES) for count in (2 * a, tile.m)
    )
    inputs = g.vectors * g.C * (lines + 6 * a * a)
    outputs = g.vectors * g.K * (4 * a * a + rows)
    return device.seconds(problem, problem.groups * (products + filters + inputs + outputs))


def workspace(problem: ConvProblem, tile: WinogradTile, device: Device) -> int:
    """Return the bytes of transformed tensors: U and V once where they are shared, M in every thread."""
    workers = threads.thread_count()
    g = _geometry(problem, tile, device, workers, prepared=False)
    width = tile.vectors * device.lanes(problem.compute_dtype)
    U = g.U_step * (1 if _transforms_filters_first(g.blocks) else workers)
    V = g.V_step * (g.groups * g.blocks if g.c_parts else workers)
    M = g.k_group * width * workers
    return itemsize(problem) * (tile.m + 2) ** 2 * (U + V + M)


def _transforms_filters_first(blocks: int) -> bool:
    """Say whether U is made before the tiles: where more than two blocks of tiles read it."""
    return blocks > 2


def prepare(problem: ConvProblem, tile: WinogradTile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the transformed filters U: a row for each of a*a matrices (K, C padded), and a vector more."""
    block = _block(problem, tile, device)
    g = _geometry(problem, tile, device, 1, prepared=True)
    filters = np.ascontiguousarray(weight).reshape(problem.K, -1)
    U = np.empty(((tile.m + 2) ** 2, g.U_step), problem.compute_dtype)
    _prepare_filters(block, problem.K, task_threads(problem), g, filters, U)
    return U


@lru_cache(maxsize=256)
def _block(problem: ConvProblem, tile: WinogradTile, device: Device) -> Block:
    """Return a tile as the microkernel and the transforms take it."""
    dtype = problem.compute_dtype
    return Block(dtype, tile.rows, tile.vectors, device.lanes(dtype), m=tile.m)


def run(problem: ConvProblem, tile: WinogradTile, device: Device, operands: Operands) -> None:
    """Convolve; the weight is prepared (rank 2) or as given (rank 5)."""
    block, weight = _block(problem, tile, device), operands.weight
    workers = task_threads(problem)
    g = _geometry(problem, tile, device, workers, prepared=weight.ndim == 2)
    if weight.ndim == 5 and _transforms_filters_first(g.blocks):
        weight = prepare(problem, tile, device, weight)
    U_given = weight.ndim == 2
    filters = weight if U_given else np.ascontiguousarray(weight).reshape(problem.K, -1)
    a_taps, b_taps = count_offsets(g.C, 1), count_offsets(g.C, block.vectors * block.lanes)
    bias = padded_bias(problem, operands.bias, 0)
    blocks = g.groups * g.blocks
    V = np.empty((blocks if g.c_parts else 0, (tile.m + 2) ** 2 * g.V_step), problem.compute_dtype)
    if g.c_parts:
        _prepare_inputs(block, blocks * g.c_parts, workers, g, operands.x, V)
    _run_blocks(
        block, blocks * g.k_parts, workers, g, U_given, a_taps, b_taps, V,
        operands.x, filters, bias, operands.out, make_ending(operands),
    )  # fmt: skip


@part
def _zeros(block, elements):
    """Allocate zeros."""
    memory = allocate(block, elements)
    fill(block, memory, elements)
    return memory


@part
def _transform_filters(block, g, w, first, count, U, at):
    """Transform the filters of output channels first ... first+count-1 to rows at ... of U's matrices."""
    lanes = block_lanes(block)
    vectors = _zeros(block, 9 * lanes)
    for k in range(count):
        source = advance(w, (first + k) * g.C * 9)
        for c in range(0, g.C, lanes):
            for e in range(min(lanes, g.C - c)):
                for tap in range(9):
                    vectors[tap * lanes + e] = source[(c + e) * 9 + tap]
            transform_filter(
                block, vectors, 3 * lanes, lanes, advance(U, (at + k) * g.C_padded + c), g.U_step
            )  # fmt: skip
    release(vectors)


@Kernel
def _prepare_filters(block, first, last, g, w, U):
    """Transform the filters of output channels first ... last-1 to the same rows of U's matrices."""
    _transform_filters(block, g, table(w), first, last - first, table(U), first)


@Kernel
def _prepare_inputs(block, first, last, g, x, all_V):
    """Transform the tiles of all blocks, some channels a task."""
    x = view_of(x)
    segments = np.empty((block_columns(block), 5), np.int64)
    matrices = (block_m(block) + 2) ** 2
    for task in range(first, last):
        here, c_part = divmod(task, g.c_parts)
        group, tile_block = divmod(here, g.blocks)
        count, vectors = _find_segments(block, g, tile_block, segments)
        c, c_end = g.C * c_part // g.c_parts, g.C * (c_part + 1) // g.c_parts
        V = advance(table(all_V), here * matrices * g.V_step)
        _transform_inputs(block, x, g, group, segments, count, vectors, c, c_end, V)


@Kernel
def _run_blocks(block, first, last, g, U_given, a_taps, b_taps, all_V, x, w, bias, y, ending):
    x, w, bias, y = view_of(x), table(w), table(bias), view_of(y)
    width, matrices = block_columns(block), (block_m(block) + 2) ** 2
    own_V = allocate(block, 0 if g.c_parts else matrices * g.V_step)
    M = allocate(block, matrices * g.k_group * width)
    own_U = allocate(block, 0 if U_given else matrices * g.U_step)
    segments = np.empty((width, 5), np.int64)
    held = -1  # the group and block of tiles whose V is in hand
    for task in range(first, last):
        here, k_part = divmod(task, g.k_parts)
        group, tile_block = divmod(here, g.blocks)
        V = advance(table(all_V), here * matrices * g.V_step) if g.c_parts else own_V
        if here != held:
            count, vectors = _find_segments(block, g, tile_block, segments)
            if not g.c_parts:
                _transform_inputs(block, x, g, group, segments, count, vectors, 0, g.C, V)
            held = here
        k_end = min(g.K, (k_part + 1) * g.k_step)
        for k in range(k_part * g.k_step, k_end, g.k_group):
            k_count, channel = min(g.k_group, k_end - k), group * g.K + k
            if not U_given:
                _transform_filters(block, g, w, channel, k_count, own_U, 0)
            U = advance(w, channel * g.C_padded) if U_given else own_U
            coming = 0 if U_given else min(k_count, k_end - k - k_count) * g.C * 9
            ahead = advance(w, (channel + k_count) * g.C * 9)
            _multiply(block, U, g, k_count, table(a_taps), V, table(b_taps), vectors, M, ahead, coming)
            added = advance(bias, channel)
            _transform_outputs(block, M, g, segments, count, vectors, channel, k_count, added, y)
            _finish_tiles(block, y, g, segments, count, channel, k_count, ending)
    release(own_V)
    release(M)
    release(own_U)


@part
def _find_segments(block, g, tile_block, segments):
    """List the runs of a block's tiles that lie in one vector and one row: (lane, run, n, row, column).

    Return how many runs and how many vectors there are; the blocks share the vectors evenly.
    """
    lanes = block_lanes(block)
    begin, end = g.vectors * tile_block // g.blocks, g.vectors * (tile_block + 1) // g.blocks
    first = begin * lanes
    count, j = 0, 0
    tiles = min(end * lanes, g.tiles) - first
    while j < tiles:
        rest, column = divmod(first + j, g.tiles_w)
        n, row = divmod(rest, g.tiles_h)
        run = min(g.tiles_w - column, tiles - j, lanes - j % lanes)
        segments[count, 0], segments[count, 1] = j, run
        segments[count, 2], segments[count, 3], segments[count, 4] = n, row, column
        count += 1
        j += run
    return count, end - begin


@part
def _transform_inputs(block, x, g, group, segments, count, vectors, c_first, c_end, V):
    """Gather the tiles of a block and transform them: V[e, c, tile] = (B^T d B)[e], c_first <= c < c_end."""
    lanes, width, m = block_lanes(block), block_columns(block), block_m(block)
    elements = (m + 2) * 2 * m * lanes  # per line of the tiles: columns 0 ... m-1, then m ... 2m-1
    lines = _zeros(block, elements)
    for c in range(c_first, c_end):
        s = 0
        for vector in range(vectors):
            while s < count and segments[s, 0] < (vector + 1) * lanes:
                line = advance(lines, segments[s, 0] % lanes * m)
                _copy_tiles(block, x, g, segments[s], group * g.C + c, line)
                s += 1
            transform_input(block, lines, advance(V, c * width + vector * lanes), g.V_step)
    release(lines)


@part
def _copy_tiles(block, x, g, segment, channel, lines):
    """Copy the m + 2 lines under a run of tiles, columns 0 ... m-1 and then m ... 2m-1, zeros for padding.

    Neighbouring tiles are m columns apart, so both are copies of one piece of the line.
    """
    m, lanes = block_m(block), block_lanes(block)
    step, columns = m * lanes, segment[1] * m
    h = segment[3] * m - g.pad_h
    top, bottom = columns_inside(h, 1, m + 2, g.H)
    for half in range(2):
        w = (segment[4] + half) * m - g.pad_w
        low, high = columns_inside(w, 1, columns, g.W)
        source = locate(block, x, (segment[2], channel, 0, h, w))
        for i in range(m + 2):
            if i < top or i >= bottom:
                fill(block, advance(lines, (2 * i + half) * step), columns)
        copy_rows(
            block, bottom - top, advance(lines, (2 * top + half) * step), 2 * step,
            advance(source, top * x[4]), x[4], x[5], columns, low, high,
        )  # fmt: skip
        if half == 0 and g.fetches_ahead:  # the same piece of the next channel
            for i in range(top, bottom):
                for j in range(0, columns + m, lanes):
                    prefetch(advance(source, x[2] + i * x[4] + j * x[5]))


@part
def _multiply(block, U, g, k_count, a_taps, V, b_taps, vectors, M, ahead, coming):
    """Multiply the a*a matrices: M[e] = U[e] V[e]; meanwhile fetch the `coming` values of the next filters.

    Their transform would wait for memory: 512 -> 512 channels at 14 x 14 take 3.9 ms with it, 4.9 without.
    """
    height, width, a = block_rows(block), block_columns(block), block_m(block) + 2
    zeros = _zeros(block, height)
    share = (coming + a * a - 1) // (a * a)
    for e in range(a * a):
        for i in range(e * share, min(coming, (e + 1) * share), block_lanes(block)):
            prefetch(advance(ahead, i))
        for row in range(0, k_count, height):
            k = max(0, min(row, k_count - height))  # the last tile overlaps the one before
            multiply_tile(
                block, vectors, advance(U, e * g.U_step + k * g.C_padded), g.C_padded, a_taps,
                advance(V, e * g.V_step), b_taps, g.C, zeros, advance(M, (e * g.k_group + k) * width), width,
            )  # fmt: skip
    release(zeros)


@part
def _transform_outputs(block, M, g, segments, count, vectors, channel, k_count, bias, y):
    """Transform the products and store the pixels that exist: y = A^T M A + bias."""
    lanes, width, m = block_lanes(block), block_columns(block), block_m(block)
    lines = allocate(block, m * m * lanes)
    for k in range(k_count):
        s = 0
        for vector in range(vectors):
            source = advance(M, k * width + vector * lanes)
            transform_output(block, source, g.k_group * width, advance(bias, k), lines)
            while s < count and segments[s, 0] < (vector + 1) * lanes:
                p, q = segments[s, 3] * m, segments[s, 4] * m
                target = locate(block, y, (segments[s, 2], channel + k, 0, p, q))
                line, rows = advance(lines, segments[s, 0] % lanes * m), min(m, g.P - p)
                columns = min(segments[s, 1] * m, g.Q - q)
                spread_rows(block, rows, target, y[4], y[5], line, m * lanes, columns)
                if g.fetches_ahead:
                    for i in range(rows):
                        for j in range(0, columns, lanes):
                            prefetch(advance(target, y[2] + i * y[4] + j * y[5]))
                s += 1
    release(lines)


@part
def _finish_tiles(block, y, g, segments, count, channel, k_count, ending):
    """Add the residual to the tiles of a block, then apply the activation."""
    m = block_m(block)
    for s in range(count):
        n, p, q = segments[s, 2], segments[s, 3] * m, segments[s, 4] * m
        sizes = (k_count, min(m, g.P - p), min(segments[s, 1] * m, g.Q - q))
        finish(block, y, (n, channel, 0, p, q), sizes, ending)
