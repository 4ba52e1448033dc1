"""Winograd F(m x m, 3 x 3), m = 2 or 4: a block of tiles goes through all four stages while it lies in cache.

    w (K, C, R, S)      --filter-->  U (places, K, C)             places: the inputs of a tile, (m + 2)^2
    x, a block of tiles  --input-->  V (places, C, block)         lanes are neighbouring tiles
    U, V               --multiply->  M (places, k_group, block)   as many independent products
    M                   --output-->  y + bias                     m x m pixels per tile; then the epilogue

Filters of 5 x 5 take F(2 x 2, 5 x 5), of 36 places. Those of 3 or 5 taps in a row take F(m, 3) or F(m, 5)
along that axis: tiles of 1 x m or m x 1 pixels, and m + 2 or m + 4 places.

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

from fastconv.cpu import memory
from fastconv.cpu.band import (
    columns_inside,
    finish,
    locate,
    make_ending,
    padded_bias,
    task_threads,
)
from fastconv.cpu.device import BOX_ROW_CYCLES, ROW_CYCLES, itemsize
from fastconv.cpu.simd import (
    Block,
    Kernel,
    advance,
    allocate,
    block_columns,
    block_extents,
    block_lanes,
    block_rows,
    block_sides,
    copy_padded,
    copy_rows,
    fill,
    multiply_tile,
    part,
    prefetch,
    release,
    spread_rows,
    table,
    transform_filters,
    transform_input,
    transform_output,
    view_of,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands


class WinogradTile(NamedTuple):
    """F(m x m, R x S) with a register tile of `rows` channels times `vectors` vectors of tiles."""

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
    places: int  # in a tile of inputs: each has a matrix of U and one of V
    U_step: int  # distance of those of U and of V, in elements: one vector more than they need,
    V_step: int  # because a power of two would put all places' lines into one set of the cache
    fetches_ahead: int  # 1 where an image is too large for L2, so that its lines would be waited for


@lru_cache(maxsize=256)
def _geometry(
    problem: ConvProblem, tile: WinogradTile, device: Device, workers: int, prepared: bool
) -> Geometry:
    """Divide a problem into blocks of tiles and groups of output channels."""
    lanes = device.lanes(problem.compute_dtype)
    m_h, m_w, a_h, a_w = _block(problem, tile, device).sides
    C, K = problem.C // problem.groups, problem.K // problem.groups
    tiles_h, tiles_w = math.ceil(problem.P / m_h), math.ceil(problem.Q / m_w)
    tiles = problem.N * tiles_h * tiles_w
    width, vectors = tile.vectors * lanes, math.ceil(tiles / lanes)
    per_group = math.ceil(workers / problem.groups)
    blocks = min(vectors, math.ceil(vectors / tile.vectors / per_group) * per_group)
    shares_V = 0 < blocks * problem.groups < workers
    k_parts = math.ceil(2 * workers / (blocks * problem.groups)) if shares_V else 1
    k_step = min(K, math.ceil(K / k_parts / tile.rows) * tile.rows)
    C_padded = math.ceil(C / lanes) * lanes
    U_ready = prepared or _transforms_filters_first(blocks)
    channel = a_h * a_w * itemsize(problem) * (width if U_ready else width + C_padded)
    k_group = max(1, min(math.ceil(k_step / tile.rows), device.l2 // 2 // channel // tile.rows)) * tile.rows
    U_rows = problem.K + tile.rows if U_ready else k_group  # a last, partial tile reads rows beyond K
    return Geometry(
        problem.groups, C, K, problem.H, problem.W, problem.P, problem.Q,
        *problem.padding_before[1:], tiles_h, tiles_w, tiles, vectors, blocks,
        min(C, 2 * workers) if shares_V else 0, C_padded, k_step, math.ceil(K / k_step), k_group,
        a_h * a_w, U_rows * C_padded + lanes, C * width + lanes,
        int(problem.order == "NCHW" and problem.C * problem.H * problem.W * itemsize(problem) > device.l2),
    )  # fmt: skip


def cost(problem: ConvProblem, tile: WinogradTile, device: Device) -> float:
    """Return the estimated seconds on one core, the transform of the filters included."""
    if tile != _possible(problem, tile):
        return float("inf")
    dtype, lanes = problem.compute_dtype, device.lanes(problem.compute_dtype)
    m_h, m_w, a_h, a_w = _block(problem, tile, device).sides
    g = _geometry(problem, tile, device, 1, prepared=False)
    products = g.places * device.multiply_cycles(tile, g.K, g.vectors * lanes, g.C, dtype, True)
    filters = g.K * math.ceil(g.C / lanes) * (4 * lanes + 4 * g.places)
    runs = 1 + (lanes - math.gcd(lanes, g.tiles_w)) / g.tiles_w  # of tiles in a vector, each a copy
    piece, lines = (
        runs * ROW_CYCLES + device.copy_cycles(problem, rows, lanes * m_w, 1, BOX_ROW_CYCLES)
        for rows in (a_h, m_h)
    )
    inputs = g.vectors * g.C * (math.ceil(a_w / m_w) * piece + 6 * g.places)
    outputs = g.vectors * g.K * (4 * g.places + lines)
    return device.seconds(problem, problem.groups * (products + filters + inputs + outputs))


def workspace(problem: ConvProblem, tile: WinogradTile, device: Device) -> int:
    """Return the bytes of transformed tensors: U and V once where they are shared, M in every thread."""
    return max(_workspace(problem, tile, device, prepared) for prepared in (False, True))


def _workspace(problem: ConvProblem, tile: WinogradTile, device: Device, prepared: bool) -> int:
    workers = task_threads(problem)
    g = _geometry(problem, tile, device, workers, prepared)
    width = tile.vectors * device.lanes(problem.compute_dtype)
    U = g.U_step * (1 if prepared or _transforms_filters_first(g.blocks) else workers)
    V = g.V_step * (g.groups * g.blocks if g.c_parts else workers)
    M = g.k_group * width * workers
    return itemsize(problem) * g.places * (U + V + M)


def _possible(problem: ConvProblem, tile: WinogradTile) -> WinogradTile:
    """Return the tile, or F(2 x 2) in place of F(4 x 4, 5 x 5), whose rounding errors reach 380 eps."""
    return tile._replace(m=2) if problem.R == problem.S == 5 else tile


def _transforms_filters_first(blocks: int) -> bool:
    """Say whether U is made before the tiles: where more than two blocks of tiles read it."""
    return blocks > 2


def prepare(problem: ConvProblem, tile: WinogradTile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the transformed filters U: a row for each of its matrices (K, C padded), and a vector more."""
    block = _block(problem, tile, device)
    g = _geometry(problem, tile, device, 1, prepared=True)
    filters = np.ascontiguousarray(weight).reshape(problem.K, -1)
    U = np.empty((g.places, g.U_step), problem.compute_dtype)
    _prepare_filters(block, problem.K, task_threads(problem), g, filters, U)
    return U


@lru_cache(maxsize=256)
def _block(problem: ConvProblem, tile: WinogradTile, device: Device) -> Block:
    """Return a tile as the microkernel and the transforms take it."""
    dtype, m = problem.compute_dtype, _possible(problem, tile).m
    extents = (problem.R, problem.S)
    return Block(dtype, tile.rows, tile.vectors, device.lanes(dtype), m=m, extents=extents)


def run(problem: ConvProblem, tile: WinogradTile, device: Device, operands: Operands) -> None:
    """Convolve; the weight is prepared (rank 2) or as given (rank 5)."""
    block, weight = _block(problem, tile, device), operands.weight
    workers = task_threads(problem)
    g = _geometry(problem, tile, device, workers, prepared=weight.ndim == 2)
    if weight.ndim == 5 and _transforms_filters_first(g.blocks):
        weight = prepare(problem, tile, device, weight)
    U_given = weight.ndim == 2
    filters = weight if U_given else np.ascontiguousarray(weight).reshape(problem.K, -1)
    bias = padded_bias(problem, operands.bias, 0)
    blocks = g.groups * g.blocks
    V = memory.allocate((blocks if g.c_parts else 0, g.places * g.V_step), problem.compute_dtype)
    if g.c_parts:
        _prepare_inputs(block, blocks * g.c_parts, workers, g, operands.x, V)
    _run_blocks(
        block, blocks * g.k_parts, workers, g, U_given, V,
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
    lanes, (R, S) = block_lanes(block), block_extents(block)
    last = _zeros(block, lanes * R * S)  # the last filters of an output channel, followed by zeros
    for k in range(count):
        filters = advance(w, (first + k) * g.C * R * S)
        for c in range(0, g.C, lanes):
            source = advance(filters, c * R * S)
            if g.C - c < lanes:
                copy_padded(block, last, source, 1, (g.C - c) * R * S, 0, (g.C - c) * R * S)
                source = last
            transform_filters(block, source, advance(U, (at + k) * g.C_padded + c), g.U_step)
    release(last)


@Kernel
def _prepare_filters(block, first, last, g, w, U):
    """Transform the filters of output channels first ... last-1 to the same rows of U's matrices."""
    _transform_filters(block, g, table(w), first, last - first, table(U), first)


@Kernel
def _prepare_inputs(block, first, last, g, x, all_V):
    """Transform the tiles of all blocks, some channels a task."""
    x = view_of(x)
    segments = np.empty((block_columns(block), 5), np.int64)
    for task in range(first, last):
        here, c_part = divmod(task, g.c_parts)
        group, tile_block = divmod(here, g.blocks)
        count, vectors = _find_segments(block, g, tile_block, segments)
        c, c_end = g.C * c_part // g.c_parts, g.C * (c_part + 1) // g.c_parts
        V = advance(table(all_V), here * g.places * g.V_step)
        _transform_inputs(block, x, g, group, segments, count, vectors, c, c_end, V)


@Kernel
def _run_blocks(block, first, last, g, U_given, all_V, x, w, bias, y, ending):
    x, w, bias, y = view_of(x), table(w), table(bias), view_of(y)
    width, (R, S) = block_columns(block), block_extents(block)
    own_V = allocate(block, 0 if g.c_parts else g.places * g.V_step)
    M = allocate(block, g.places * g.k_group * width)
    own_U = allocate(block, 0 if U_given else g.places * g.U_step)
    segments = np.empty((width, 5), np.int64)
    held = -1  # the group and block of tiles whose V is in hand
    for task in range(first, last):
        here, k_part = divmod(task, g.k_parts)
        group, tile_block = divmod(here, g.blocks)
        V = advance(table(all_V), here * g.places * g.V_step) if g.c_parts else own_V
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
            coming = 0 if U_given else min(k_count, k_end - k - k_count) * g.C * R * S
            ahead = advance(w, (channel + k_count) * g.C * R * S)
            _multiply(block, U, g, k_count, V, vectors, M, ahead, coming)
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
    lanes, width, (_, m, a_h, a_w) = block_lanes(block), block_columns(block), block_sides(block)
    pieces = (a_w + m - 1) // m  # of each line: columns 0 ... m-1 of all tiles, then m ... 2m-1
    lines = _zeros(block, a_h * pieces * m * lanes)
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
    """Copy the lines under a run of tiles, columns 0 ... m-1, then m ... 2m-1 ..., zeros for padding.

    Neighbouring tiles are m columns apart, so all are copies of one piece of the line.
    """
    lanes, (m_h, m, a_h, a_w) = block_lanes(block), block_sides(block)
    pieces, step, columns = (a_w + m - 1) // m, m * lanes, segment[1] * m
    h = segment[3] * m_h - g.pad_h
    top, bottom = columns_inside(h, 1, a_h, g.H)
    for piece in range(pieces):
        w = (segment[4] + piece) * m - g.pad_w
        low, high = columns_inside(w, 1, columns, g.W)
        source = locate(block, x, (segment[2], channel, 0, h, w))
        for i in range(a_h):
            if i < top or i >= bottom:
                fill(block, advance(lines, (pieces * i + piece) * step), columns)
        copy_rows(
            block, bottom - top, advance(lines, (pieces * top + piece) * step), pieces * step,
            advance(source, top * x[4]), x[4], x[5], columns, low, high,
        )  # fmt: skip
        if piece == 0 and g.fetches_ahead:  # the same piece of the next channel
            for i in range(top, bottom):
                for j in range(0, columns + m, lanes):
                    prefetch(block, advance(source, x[2] + i * x[4] + j * x[5]))


@part
def _multiply(block, U, g, k_count, V, vectors, M, ahead, coming):
    """Multiply the matrices of all places: M[e] = U[e] V[e].

    Meanwhile fetch the `coming` values of the next filters, whose transform would wait for memory:
    512 -> 512 channels at 14 x 14 take 3.9 ms with it, 4.9 without.
    """
    height, width = block_rows(block), block_columns(block)
    zeros = _zeros(block, height)
    share = (coming + g.places - 1) // g.places
    for e in range(g.places):
        for i in range(e * share, min(coming, (e + 1) * share), block_lanes(block)):
            prefetch(block, advance(ahead, i))
        for row in range(0, k_count, height):
            k = max(0, min(row, k_count - height))  # the last tile overlaps the one before
            multiply_tile(
                block, vectors, advance(U, e * g.U_step + k * g.C_padded), g.C_padded, 1,
                advance(V, e * g.V_step), width, g.C, zeros, advance(M, (e * g.k_group + k) * width), width,
            )  # fmt: skip
    release(zeros)


@part
def _transform_outputs(block, M, g, segments, count, vectors, channel, k_count, bias, y):
    """Transform the products and store the pixels that exist: y = A^T M A + bias."""
    lanes, width, (m_h, m, _, _) = block_lanes(block), block_columns(block), block_sides(block)
    lines = allocate(block, m_h * m * lanes)
    for k in range(k_count):
        s = 0
        for vector in range(vectors):
            source = advance(M, k * width + vector * lanes)
            transform_output(block, source, g.k_group * width, advance(bias, k), lines)
            while s < count and segments[s, 0] < (vector + 1) * lanes:
                p, q = segments[s, 3] * m_h, segments[s, 4] * m
                target = locate(block, y, (segments[s, 2], channel + k, 0, p, q))
                line, rows = advance(lines, segments[s, 0] % lanes * m), min(m_h, g.P - p)
                columns = min(segments[s, 1] * m, g.Q - q)
                spread_rows(block, rows, target, y[4], y[5], line, m * lanes, columns)
                if g.fetches_ahead:
                    for i in range(rows):
                        for j in range(0, columns, lanes):
                            prefetch(block, advance(target, y[2] + i * y[4] + j * y[5]))
                s += 1
    release(lines)


@part
def _finish_tiles(block, y, g, segments, count, channel, k_count, ending):
    """Add the residual to the tiles of a block, then apply the activation."""
    m_h, m, _, _ = block_sides(block)
    for s in range(count):
        n, p, q = segments[s, 2], segments[s, 3] * m_h, segments[s, 4] * m
        sizes = (k_count, min(m_h, g.P - p), min(segments[s, 1] * m, g.Q - q))
        finish(block, y, (n, channel, 0, p, q), sizes, ending)
