"""The gradient with respect to the weight: a sum over pixels of outer products.

    grad_w[k, (c, t, r, s)] = sum over pixels of grad_y[pixel, k] * x[pixel + (c, t, r, s)]

    A  rows are taps (c, t, r, s), read wherever an algorithm has put them: one offset per row and per pixel
    B  grad_y, a block of pixels packed as [panel][pixel][vectors * lanes]: vectors run over k
    C  sums [part][group][channels][panels][tap][k], to which block after block of pixels is added

A task has its own sums: some channels of a group, some k, and a *part* of the pixels. How many parts there
are depends on the problem alone, so that every number of threads gives the same bits. Sums of which there is
one part are turned and stored while they lie in the cache.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastconv.cpu import threads
from fastconv.cpu.band import address, even_share, make_block, task_threads, view
from fastconv.cpu.compiling import part, small_part
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
    copy_padded,
    fill,
    lane_bits,
    multiply_tile,
    pointer,
    table,
    transpose,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem

TILES = (Tile(6, 4), Tile(6, 3), Tile(8, 1))  # taller wide ones would be slow, as band.MOST_OFFSETS says

MOST_ROWS = 256  # taps of a task, unless one channel has more: enough to make up for packing grad_y
MOST_COLUMNS = 128  # output channels of a task
TASKS = 16  # at least, if there are as many blocks of pixels

CALL_CYCLES = 45_000  # before and after the kernel: arrays are viewed, sums are cleared
SUM_CYCLES = 1.5  # to clear an element of the sums, to turn it and to store it


class Division(NamedTuple):
    """How the work is divided; C and K are those of one group."""

    groups: int
    C: int
    K: int
    taps: int  # of a channel
    c_step: int  # channels of a task, and how many tasks make a group
    c_parts: int
    k_step: int  # output channels of a task, in whole vectors, and how many tasks make a group
    k_parts: int
    rows: int  # of a task's sums, in whole tiles
    columns: int  # of its panels, in whole tiles
    blocks: int  # of pixels
    parts: int


class Pixels(NamedTuple):
    """How output planes are cut into blocks of pixels."""

    columns: int  # pixels of one block, and how many blocks make a plane
    blocks: int


def pixels_of_block(problem: ConvProblem, tile: Tile, device: Device, gathered: int) -> int:
    """Return how many pixels of A and B fit half of L2; `gathered`: the rows of A that each channel takes."""
    channels, columns = _steps(problem, tile, device)
    row = itemsize(problem) * (channels * gathered + columns)
    return max(64, device.l2 // 2 // row)


def cut_pixels(problem: ConvProblem, most: int) -> Pixels:
    """Cut the planes of a problem evenly into blocks of so many pixels at most."""
    pixels = problem.P * problem.Q
    columns = math.ceil(pixels / math.ceil(pixels / most))
    return Pixels(columns, math.ceil(pixels / columns))


@lru_cache(maxsize=256)
def divide(problem: ConvProblem, tile: Tile, device: Device, blocks: int) -> Division:
    """Divide a problem whose pixels come in so many blocks."""
    C, K = problem.C // problem.groups, problem.gemm_m
    taps = math.prod(problem.weight_shape5[2:])
    c_step, k_step = _steps(problem, tile, device)
    c_parts, k_parts = C // c_step, math.ceil(K / k_step)
    rows = math.ceil(c_step * taps / tile.rows) * tile.rows
    width = tile.vectors * device.lanes(problem.compute_dtype)
    columns = math.ceil(k_step / width) * width
    parts = min(blocks, math.ceil(TASKS / (problem.groups * c_parts * k_parts)))
    return Division(
        problem.groups, C, K, taps, c_step, c_parts, k_step, k_parts, rows, columns, blocks, parts
    )  # fmt: skip


def _steps(problem: ConvProblem, tile: Tile, device: Device) -> tuple[int, int]:
    """Return the input and the output channels of a task: the former divide a group evenly."""
    C = problem.C // problem.groups
    most = max(1, MOST_ROWS // math.prod(problem.weight_shape5[2:]))
    lanes = device.lanes(problem.compute_dtype)
    columns = even_share(math.ceil(problem.gemm_m / lanes) * lanes, MOST_COLUMNS, tile.vectors * lanes)
    return max(step for step in range(1, min(C, most) + 1) if C % step == 0), columns


def cost(problem: ConvProblem, tile: Tile, device: Device, d: Division, gathered: float) -> float:
    """Return the estimated seconds on one core; `gathered`: the cycles to place A once."""
    multiply = device.multiply_cycles(
        tile, d.c_step * d.taps, d.k_step, problem.gemm_n, problem.compute_dtype, aligned=True
    )
    starts = d.blocks * d.c_parts * d.k_parts * (d.rows // tile.rows) * (d.columns // tile.vectors)
    packed = d.c_parts * device.copy_cycles(problem, problem.gemm_m, problem.gemm_n, 1)
    cycles = problem.groups * (d.c_parts * d.k_parts * multiply + packed + starts) + d.k_parts * gathered
    return device.seconds(problem, cycles + CALL_CYCLES + SUM_CYCLES * problem.parameters)


def workspace(problem: ConvProblem, d: Division, placed: int) -> int:
    """Return the bytes of all sums, and of the blocks of A (`placed` elements) and B of every thread."""
    pixels, tasks = math.ceil(problem.gemm_n / d.blocks), d.groups * d.c_parts * d.k_parts
    sums = (threads.thread_count() if d.parts == 1 else d.parts * tasks) * d.rows * d.k_step
    return itemsize(problem) * (sums + threads.thread_count() * (placed + pixels * d.columns))


@lru_cache(maxsize=256)
def make_sums_block(problem: ConvProblem, tile: Tile, device: Device) -> Block:
    """Return the tile as the microkernel takes it: it adds to what is there."""
    return replace(make_block(problem, tile, device, "columns"), adds=True)


def run(
    problem: ConvProblem, block: Block, d: Division, out: np.ndarray, kernel: Kernel, *arguments: Any
) -> None:
    """Let `kernel(block, first, last, d, *arguments, sums, target)` fill out (groups, K, C, T, R, S)."""
    tasks, workers = d.groups * d.c_parts * d.k_parts, task_threads(problem)
    sums = np.zeros((d.parts if d.parts > 1 else 0, tasks, d.rows, d.k_step), problem.compute_dtype)
    seen = view(out)
    target = (seen, *_tap_offsets((d.c_step, *out.shape[3:]), seen[3:]))
    kernel(block, d.parts * tasks, workers, d, *arguments, address(sums), target)
    if d.parts > 1:
        _collect(block, tasks, workers, d, tasks, address(sums), target)


@lru_cache(maxsize=256)
def _tap_offsets(sizes: tuple[int, ...], steps: tuple[int, ...]) -> tuple[np.ndarray, bool]:
    """Return where the taps of a task's channels lie in the gradient, and whether that is side by side."""
    rows = reduce(np.add.outer, [np.arange(size) * step for size, step in zip(sizes, steps)]).reshape(-1)
    return rows, bool((np.diff(rows) == 1).all())


def by_group(problem: ConvProblem, out: np.ndarray) -> np.ndarray:
    """View the gradient (K, C // groups, T, R, S) as (groups, K, C, T, R, S), K and C of a group."""
    return out.reshape(problem.groups, problem.gemm_m, *problem.weight_shape5[1:])


def row_offsets(d: Division, offsets: np.ndarray) -> np.ndarray:
    """Return the offsets of a task's rows of A; the last one again for those that fill a tile."""
    return np.concatenate([offsets, np.repeat(offsets[-1:], d.rows - offsets.size)])


@small_part
def find_task(d, task):
    """Return a task's group, first channel and first k of the group, k_count, first and last block."""
    rest, k_part = divmod(task, d.k_parts)
    rest, c_part = divmod(rest, d.c_parts)
    index, group = divmod(rest, d.groups)
    k = k_part * d.k_step
    first, last = index * d.blocks // d.parts, (index + 1) * d.blocks // d.parts
    return group, c_part * d.c_step, k, min(d.k_step, d.K - k), first, last


@part
def pack_pixels(block, panels, plane, y, Q, pixel, count, k_count):
    """Pack `count` pixels of a plane, row after row from number `pixel` on; y is its array's view."""
    j = 0
    while j < count:
        p, q = divmod(pixel + j, Q)
        run = min(count - j, Q - q)
        pack_row(block, panels, j, count, advance(plane, p * y[4] + q * y[5]), y[2], y[5], k_count, run)
        j += run


@part
def pack_row(block, panels, at, pixels, y, y_k, y_q, k_count, count):
    """Pack `count` neighbouring pixels as those from `at` on, of a block of so many pixels."""
    lanes, width = block_lanes(block), block_columns(block)
    for k in range(0, k_count, lanes):
        there = min(lanes, k_count - k)
        panel = advance(panels, k // width * width * pixels + at * width + k % width)
        source = advance(y, k * y_k)
        if y_q == 1:
            for j in range(0, count, lanes):
                transpose(
                    block, advance(source, j), y_k, there, lane_bits(block, 0, count - j),
                    advance(panel, j * width), width, count - j, lane_bits(block, 0, lanes),
                )  # fmt: skip
        else:
            for j in range(count):
                copy_padded(block, advance(panel, j * width), advance(source, j * y_q), y_k, lanes, 0, there)


@part
def add_products(block, a, rows, a_rows, a_pixels, panels, pixels, k_count, sums, k_step):
    """Add the products of a block of pixels to the sums of a task: its rows, k_count columns."""
    lanes, width, height = block_lanes(block), block_columns(block), block_rows(block)
    for k in range(0, k_count, width):
        vectors = (min(width, k_count - k) + lanes - 1) // lanes
        panel = advance(panels, k * pixels)
        for row in range(0, rows, height):
            target = advance(sums, row * k_step + k)
            multiply_tile(
                block, vectors, a, advance(table(a_rows), row), table(a_pixels),
                panel, width, pixels, target, target, k_step,
            )  # fmt: skip


@small_part
def allocate_sums(block, d):
    """Return memory for the sums of one task, if there are no others of its channels; to be released."""
    return allocate(block, d.rows * d.k_step if d.parts == 1 else 0)


@small_part
def begin_sums(block, d, task, sums, own):
    """Return where a task adds up: among all sums, or in memory of its own, which is set to 0."""
    size = d.rows * d.k_step
    if d.parts > 1:
        return advance(pointer(block, sums), task * size)
    fill(block, own, size)
    return own


@small_part
def end_sums(block, d, task, total, target):
    """Store a task's sums, if there are no others of its channels."""
    if d.parts == 1:
        _store_sums(block, d, task, total, target)


@Kernel
def _collect(block, first, last, d, tasks, sums, target):
    """Add up the parts of tasks and store them."""
    size = d.rows * d.k_step
    for task in range(first, last):
        total = advance(pointer(block, sums), task * size)
        for index in range(1, d.parts):
            add_line(total, advance(total, index * tasks * size), size)
        _store_sums(block, d, task, total, target)


@part
def _store_sums(block, d, task, total, target):
    """Turn the sums of a task: out[k, row] = sums[row, k].

    target  view of out; offsets of a task's rows in it, from its first channel on; whether they lie side by
            side
    """
    lanes, (out, rows, is_line) = block_lanes(block), target
    group, c, k, k_count, _, _ = find_task(d, task)
    first = advance(pointer(block, out[0]), group * out[1] + k * out[2] + c * out[3])
    for j in range(0, k_count, lanes):
        source, turned, count = advance(total, j), advance(first, j * out[2]), min(lanes, k_count - j)
        if is_line:
            for row in range(0, rows.size, lanes):
                left = rows.size - row
                transpose(
                    block, advance(source, row * d.k_step), d.k_step, left, lane_bits(block, 0, count),
                    advance(turned, row), out[2], count, lane_bits(block, 0, left),
                )  # fmt: skip
        else:
            for row in range(rows.size):
                for i in range(count):
                    turned[i * out[2] + rows[row]] = source[row * d.k_step + i]


@part
def add_line(target, source, count):
    """Add a line of elements to another."""
    for i in range(count):
        target[i] += source[i]
