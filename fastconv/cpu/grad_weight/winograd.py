"""Gradient of the weight by Winograd: the transposes of what `cpu/winograd.py` does, in the opposite order.

    x, a block of tiles       --inputs-->    V (places, tiles, C panel)        V = B^T d B, of T planes
    grad_y, the same tiles    --outputs-->   M (places, tiles, K panel)        M = A grad_y A^T
    M, V                      --multiply-->  U (places, K panel, C panel)      U = M^T V, as many products
    U                         --filters-->   grad_w                            G^T U G

Sums run over the tiles, in order, block after block: same bits for any number of threads. All channels of a
block of tiles are transformed before all else, since every panel of K meets every panel of C. If one block
holds all tiles, the U of two panels is turned into filters while it lies in L2, else that of all is kept.
Lanes are channels, those of the input in U.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu import memory, winograd
from fastconv.cpu.band import count_parts, task_threads
from fastconv.cpu.compiling import part
from fastconv.cpu.device import itemsize
from fastconv.cpu.simd import (
    Kernel,
    advance,
    allocate,
    block_extents,
    block_lanes,
    block_rows,
    block_sides,
    fill,
    lane_bits,
    multiply_tile,
    pointer,
    release,
    table,
    transform_filter_gradient,
    transform_output_gradient,
    transpose,
    view_of,
)
from fastconv.cpu.winograd import (
    BLOCK_TILES,
    GATHERED,
    WinogradTile,
    allocate_pixels,
    find_run,
    gather_pixels,
    transform_tiles,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.cpu.simd import Block
    from fastconv.problem import ConvProblem, Operands

TILES = winograd.TILES

PLACE_CYCLES = 20  # to gather a place of a vector of tiles, to transform it and to store it
U_CYCLES = 6  # to load a place of a vector of U and to transform it
TAP_CYCLES = 5  # to turn and store a vector of grad_w


class Division(NamedTuple):
    """How the work is divided; C and K are those of one group."""

    groups: int
    C: int
    K: int
    D: int
    H: int
    W: int
    O: int
    P: int
    Q: int
    T: int  # planes that a window meets
    stride_d: int
    dilation_d: int
    pad_d: int
    pad_h: int
    pad_w: int
    tiles_h: int  # tiles of one plane along each side, and those of the whole batch
    tiles_w: int
    tiles: int
    blocks: int  # that share the tiles evenly, and the tiles of the largest
    height: int
    C_vectors: int  # that the channels of a group fill, and those of all groups and planes
    K_vectors: int
    vectors: int
    c_step: int  # channels of a panel, and how many panels make a group, those of x in one plane
    c_parts: int
    k_step: int
    k_parts: int
    tasks: int  # pairs of panels
    places: int
    V_step: int  # distance of the places in a panel of V, of M and of U, in elements: a vector more than
    M_step: int  # they need, as a power of two would put all of them into one set of the cache
    U_step: int


@lru_cache(maxsize=256)
def _divide(problem: ConvProblem, tile: WinogradTile, device: Device, workers: int) -> Division:
    """Cut the tiles into blocks, and the channels into panels of which one U takes a third of L2."""
    lanes = device.lanes(problem.compute_dtype)
    m_h, m_w, a_h, a_w = winograd.make_block(problem, tile, device).sides
    groups, C, K = problem.groups, problem.C // problem.groups, problem.gemm_m
    tiles_h, tiles_w = math.ceil(problem.P / m_h), math.ceil(problem.Q / m_w)
    T, tiles, places = problem.T, problem.N * problem.O * tiles_h * tiles_w, a_h * a_w
    blocks = math.ceil(tiles / BLOCK_TILES)
    height = math.ceil(tiles / max(1, blocks))
    C_vectors, K_vectors = math.ceil(C / lanes), math.ceil(K / lanes)
    c_step = math.ceil(C_vectors / math.ceil(C_vectors / tile.vectors)) * lanes
    c_parts = math.ceil(C_vectors * lanes / c_step)
    most = max(1, device.l2 // 3 // (itemsize(problem) * places * c_step * lanes))
    k_parts = count_parts(math.ceil(K_vectors / most), K_vectors, groups * T * c_parts, workers)
    k_step = math.ceil(K_vectors / k_parts) * lanes
    k_parts = math.ceil(K_vectors * lanes / k_step)
    rows, ends = math.ceil(k_step / tile.rows) * tile.rows, math.ceil(tile.rows / lanes) * lanes
    return Division(
        groups, C, K, *problem.input_shape5[2:], *problem.output_shape5[2:],
        T, problem.stride[0], problem.dilation[0], *problem.padding_before,
        tiles_h, tiles_w, tiles, blocks, height, C_vectors, K_vectors, groups * (T * C_vectors + K_vectors),
        c_step, c_parts, k_step, k_parts, groups * T * c_parts * k_parts, places,
        height * c_step + lanes, height * k_step + ends, rows * c_step + lanes,
    )  # fmt: skip


def cost(problem: ConvProblem, tile: WinogradTile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    if tile != winograd.possible(problem, tile):
        return float("inf")
    d, dtype = _divide(problem, tile, device, 1), problem.compute_dtype
    product = device.multiply_cycles(tile, d.K, d.C, d.height, dtype, aligned=True)
    tiles = d.tiles * (d.T * d.C_vectors + d.K_vectors) * d.places * PLACE_CYCLES
    filters = d.T * d.K * d.C_vectors * (d.places * U_CYCLES + device.lanes(dtype) * TAP_CYCLES)
    kept = 2 * (d.blocks - 1) * itemsize(problem) * d.places * d.tasks * d.U_step  # of U, read and written
    cycles = d.groups * (d.blocks * d.places * d.T * product + tiles + filters) + device.fetch_cycles(kept)
    return device.seconds(problem, cycles)


def workspace(problem: ConvProblem, tile: WinogradTile, device: Device) -> int:
    """Return the bytes of V and M of a block, and of U of every thread, or all.

    A gradient whose taps of a plane do not lie in line is computed elsewhere first, which is not counted.
    """
    workers = task_threads(problem)
    d = _divide(problem, tile, device, workers)
    own = min(workers, d.tasks) * d.places * d.U_step if d.blocks == 1 else 0
    return itemsize(problem) * (sum(_shared_elements(d)) + own)


def _shared_elements(d: Division) -> tuple[int, int, int]:
    """Return the elements of V and M of a block, and of U if there are several blocks."""
    V, M = d.groups * d.T * d.c_parts * d.V_step, d.groups * d.k_parts * d.M_step
    return d.places * V, d.places * M, 0 if d.blocks == 1 else d.places * d.tasks * d.U_step


def run(problem: ConvProblem, tile: WinogradTile, device: Device, operands: Operands) -> None:
    """Compute the gradient; operands.weight is that of the output."""
    workers, out = task_threads(problem), operands.out
    block, d, V_end, M_end, elements = _plan(problem, tile, device, workers)
    w = out if winograd.find_tap_step(out) == 1 else memory.allocate(out.shape, problem.compute_dtype)
    shared = memory.allocate((elements,), problem.compute_dtype)
    V, M, U = shared[:V_end], shared[V_end:M_end], shared[M_end:]
    for tile_block in range(d.blocks):
        _transform(block, d.vectors, workers, d, tile_block, operands.x, operands.weight, V, M)
        _multiply(block, d.tasks, workers, d, tile_block, V, M, U, w)
    if w is not out:
        np.copyto(out, w)


@lru_cache(maxsize=256)
def _plan(
    problem: ConvProblem, tile: WinogradTile, device: Device, workers: int
) -> tuple[Block, Division, int, int, int]:
    """Return what does not change from call to call, and where V, M and U end in one array."""
    d = _divide(problem, tile, device, workers)
    return winograd.make_block(problem, tile, device), d, *np.cumsum(_shared_elements(d)).tolist()


@Kernel
def _transform(block, first, last, d, tile_block, x, y, V, M):
    """Transform the tiles of a block, a vector of channels of x or of grad_y in each task."""
    x, y, lanes = view_of(x), view_of(y), block_lanes(block)
    first_tile, end = _find_tiles(d, tile_block)
    pixels = allocate_pixels(block)
    for task in range(first, last):
        group, vector = divmod(task, d.T * d.C_vectors + d.K_vectors)
        if vector < d.T * d.C_vectors:
            t, c = vector // d.C_vectors, vector % d.C_vectors * lanes
            panel, j = divmod(c, d.c_step)
            place = ((group * d.T + t) * d.c_parts + panel) * d.places * d.V_step + j
            source = t, group * d.C, d.C, c
            target = advance(table(V), place)
            transform_tiles(block, x, d, source, first_tile, end, pixels, target, d.c_step, d.V_step)
        else:
            k = (vector - d.T * d.C_vectors) * lanes
            panel, j = divmod(k, d.k_step)
            target = advance(table(M), (group * d.k_parts + panel) * d.places * d.M_step + j)
            channel, count, row = group * d.K + k, min(lanes, d.K - k), _row_of_k(d, panel, lanes)
            _transform_outputs(block, y, d, channel, count, first_tile, end, pixels, target, row)
            if j == 0:
                _end_places(block, d, advance(target, (end - first_tile) * row))
    release(pixels)


@part
def _find_tiles(d, tile_block):
    """Return the first tile of a block and of the next one."""
    return d.tiles * tile_block // d.blocks, d.tiles * (tile_block + 1) // d.blocks


@part
def _row_of_k(d, panel, lanes):
    """Return how far apart the tiles lie in a panel of M: the last one may be narrower."""
    return min(d.k_step, d.K_vectors * lanes - panel * d.k_step)


@part
def _transform_outputs(block, y, d, channel, channels, first, end, pixels, M, M_row):
    """Do with grad_y what `transform_tiles` does with x: M[e, tile, k] = (A grad_y A^T)[e]."""
    lanes, (m_h, m, _, _) = block_lanes(block), block_sides(block)
    line = GATHERED * lanes * lanes
    tile = first
    while tile < end:
        n, o, row, column, count = find_run(d, tile, end)
        count = min(count, GATHERED * lanes // m)
        at, sizes = (n, channel, o, row * m_h, column * m), (channels, m_h, count * m)
        gather_pixels(block, y, (d.O, d.P, d.Q), at, 0, sizes, pixels, line)
        for j in range(count):
            target = advance(M, (tile - first + j) * M_row)
            transform_output_gradient(block, advance(pixels, j * m * lanes), line, target, d.M_step)
        tile += count


@part
def _end_places(block, d, M):
    """Let zeros follow the tiles of every place, since a register tile reads beyond the last.

    Results do not need them, but what memory holds by chance may be subnormal, which takes 100 cycles.
    """
    for e in range(d.places):
        fill(block, advance(M, e * d.M_step), block_rows(block))


@Kernel
def _multiply(block, first, last, d, tile_block, V, M, all_U, w):
    """Multiply a panel of K by one of C in each task, add that to U, and make filters of it at last."""
    w, lanes, height = view_of(w), block_lanes(block), block_rows(block)
    first_tile, end = _find_tiles(d, tile_block)
    own = allocate(block, d.places * d.U_step if d.blocks == 1 else 0)
    zeros = allocate(block, height * d.c_step)
    fill(block, zeros, height * d.c_step)
    for task in range(first, last):
        rest, k_part = divmod(task, d.k_parts)
        plane, c_part = divmod(rest, d.c_parts)
        group, t = divmod(plane, d.T)
        c, k = c_part * d.c_step, k_part * d.k_step
        c_count, k_count, k_row = min(d.c_step, d.C - c), min(d.k_step, d.K - k), _row_of_k(d, k_part, lanes)
        of_c = advance(table(V), rest * d.places * d.V_step)
        of_k = advance(table(M), (group * d.k_parts + k_part) * d.places * d.M_step)
        U = own if d.blocks == 1 else advance(table(all_U), task * d.places * d.U_step)
        for e in range(d.places):
            for row in range(0, k_count, height):
                target = advance(U, e * d.U_step + row * d.c_step)
                multiply_tile(
                    block, (c_count + lanes - 1) // lanes, advance(of_k, e * d.M_step + row), 1, k_row,
                    advance(of_c, e * d.V_step), d.c_step, end - first_tile,
                    target if tile_block else zeros, target, d.c_step,
                )  # fmt: skip
        if tile_block == d.blocks - 1:
            filters = advance(pointer(block, w[0]), (group * d.K + k) * w[1] + c * w[2] + t * w[3])
            _transform_filters(block, d, k_count, c_count, U, w, filters)
    release(own)
    release(zeros)


@part
def _transform_filters(block, d, k_count, c_count, U, w, target):
    """Store the gradients of k_count x c_count filters, G^T U G; target: the first."""
    lanes, (R, S) = block_lanes(block), block_extents(block)
    taps = R * S
    filters = allocate(block, taps * lanes)
    every = lane_bits(block, 0, lanes)
    for k in range(k_count):
        for c in range(0, c_count, lanes):
            transform_filter_gradient(block, advance(U, k * d.c_step + c), d.U_step, filters)
            here = advance(target, k * w[1] + c * w[2])
            for tap in range(0, taps, lanes):
                transpose(
                    block, advance(filters, tap * lanes), lanes, taps - tap, every,
                    advance(here, tap), w[2], c_count - c, lane_bits(block, 0, taps - tap),
                )  # fmt: skip
    release(filters)
