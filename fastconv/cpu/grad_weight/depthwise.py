"""Gradient of the weight of a depthwise convolution.

Two ways: the "plane" tile reads input and grad_y where they lie and has a vector of sums for each tap (small
filters, channels first); elsewhere vectors run over channels: input and grad_y are packed channels last, a
few channels at a time, and the rows of A are the taps (t, r, s). The order of sums is another one, so that
the strides of the arrays may decide the last bits.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu import band
from fastconv.cpu.band import columns_inside, columns_touch, locate, task_threads, view
from fastconv.cpu.compiling import part
from fastconv.cpu.depthwise import PLANE_TAP_CYCLES, Geometry, PlaneTile, make_geometry, reads_planes
from fastconv.cpu.device import TILE_CYCLES, itemsize
from fastconv.cpu.grad_weight import outer
from fastconv.cpu.grad_weight.outer import (
    TASKS,
    Division,
    add_products,
    allocate_sums,
    begin_sums,
    end_sums,
    find_task,
    pack_row,
)
from fastconv.cpu.planes import differentiate_plane, sum_lanes
from fastconv.cpu.simd import (
    Block,
    Kernel,
    Tile,
    advance,
    allocate,
    block_columns,
    block_extents,
    block_lanes,
    fill,
    release,
    view_of,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

AnyTile = PlaneTile | Tile
PACKED = Tile(9, 1)  # in place of a plane tile that does not suit the problem or the arrays
TILES = (PlaneTile(1, 1), PACKED, Tile(5, 2), Tile(3, 4))

PACK_CYCLES = 8  # to turn and store a vector
SUM_CYCLES = 8  # to add up the elements of a vector
MOST_ROWS = 64  # of outputs of a block, where there are so few channels that blocks are shared among threads
SPARE_REGISTERS = 4  # beside the sums of all taps


class Blocks(NamedTuple):
    """How the rows of outputs of all samples are cut into blocks, those into parts with their own sums."""

    rows: int
    bands: int
    blocks: int
    parts: int


@lru_cache(maxsize=256)
def _plan(problem: ConvProblem, tile: Tile, device: Device) -> tuple[Division, band.Geometry]:
    """Divide the pixels into bands, of which a task packs one tile of channels."""
    width, taps = tile.vectors * device.lanes(problem.compute_dtype), problem.gemm_k
    pixels = max(64, device.l2 // 4 // (itemsize(problem) * width))
    cols = band.even_share(problem.Q, pixels)
    rows = band.even_share(problem.P, pixels // cols)
    reach = [(taps - 1) * step + 1 for taps, step in zip(problem.weight_shape5[2:], problem.dilation)]
    Hb, Wb = (rows - 1) * problem.stride[1] + reach[1], (cols - 1) * problem.stride[2] + reach[2]
    g = band.make_geometry(problem, 1, width, width, rows, cols, Hb, Wb, 1, workers=1)
    multiplier, k_parts = problem.K // problem.C, math.ceil(problem.C / width)
    blocks = problem.N * problem.O * g.row_bands * g.col_bands
    return Division(
        groups=multiplier, C=1, K=problem.C, taps=taps, c_step=1, c_parts=1, k_step=width, k_parts=k_parts,
        rows=math.ceil(taps / tile.rows) * tile.rows, columns=width, blocks=blocks,
        parts=min(blocks, math.ceil(TASKS / (multiplier * k_parts))),
    ), g  # fmt: skip


def cost(problem: ConvProblem, tile: AnyTile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    if isinstance(tile, PlaneTile):
        return _plane_cost(problem, device) if _fits_planes(problem, device) else math.inf
    d, g = _plan(problem, tile, device)
    tasks = d.groups * d.k_parts * tile.vectors * d.blocks
    taps = device.tap_cycles(tile.rows, tile.vectors) * d.rows / (tile.rows * tile.vectors)
    return device.seconds(
        problem, tasks * (g.rows * g.cols * (taps + PACK_CYCLES) + g.T * g.Hb * g.Wb * PACK_CYCLES)
    )


def _plane_cost(problem: ConvProblem, device: Device) -> float:
    """Return the estimated seconds where planes are read in place."""
    rows = problem.P * math.ceil(problem.Q / device.lanes(problem.compute_dtype))
    cycles = problem.gemm_k * (rows * problem.stride[2] * PLANE_TAP_CYCLES + SUM_CYCLES)
    return device.seconds(problem, problem.N * problem.K * (TILE_CYCLES + cycles))


@lru_cache(maxsize=256)
def _fits_planes(problem: ConvProblem, device: Device) -> bool:
    """Say whether planes can be read in place, with the sums of all taps in registers."""
    return reads_planes(problem) and problem.gemm_k + SPARE_REGISTERS <= device.registers


def _divide(problem: ConvProblem) -> Blocks:
    """Cut rows into blocks where channels alone do not make tasks enough."""
    parts = math.ceil(TASKS / problem.K)
    rows = problem.P if parts == 1 else min(problem.P, MOST_ROWS)
    bands = math.ceil(problem.P / rows)
    return Blocks(rows, bands, problem.N * bands, min(parts, problem.N * bands))


def workspace(problem: ConvProblem, tile: AnyTile, device: Device) -> int:
    """Return the bytes of sums and of the packed blocks that all threads hold, in place or not."""
    if isinstance(tile, PlaneTile):
        parts, held = _divide(problem).parts, task_threads(problem) * device.lanes(problem.compute_dtype)
        sums = parts * problem.K if parts > 1 else 0
        in_place = itemsize(problem) * problem.gemm_k * (sums + held)
        return max(in_place, workspace(problem, PACKED, device))
    d, g = _plan(problem, tile, device)
    return outer.workspace(problem, d, g.T * g.Hb * g.Wb * d.k_step)


def run(problem: ConvProblem, tile: AnyTile, device: Device, operands: Operands) -> None:
    """Compute the gradient; operands.weight is that of the output."""
    if isinstance(tile, PlaneTile):
        if _fits_planes(problem, device) and columns_touch(operands.x, operands.weight):
            _run_in_place(problem, device, operands)
            return
        tile = PACKED
    d, g = _plan(problem, tile, device)
    lanes = device.lanes(problem.compute_dtype)
    block = Block(problem.compute_dtype, tile.rows, tile.vectors, lanes, "elementwise", adds=True)
    x, y = view(operands.x), view(operands.weight)

    out = operands.out.reshape(d.K, d.groups, *problem.weight_shape5[1:]).swapaxes(0, 1)
    outer.run(problem, block, d, out, _run, g, _tap_offsets(problem, tile, device), x, y)


def _run_in_place(problem: ConvProblem, device: Device, operands: Operands) -> None:
    """Add up plane by plane, and what several parts have added up."""
    block, tasks, g, d = _plan_in_place(problem, device)
    out = operands.out
    sums = out[None] if d.parts == 1 else np.empty((d.parts, *out.shape), out.dtype)
    _run_planes(block, tasks, task_threads(problem), g, d, operands.x, operands.weight, sums[:, :, 0])
    if d.parts > 1:
        np.sum(sums, axis=0, out=out)


@lru_cache(maxsize=256)
def _plan_in_place(problem: ConvProblem, device: Device) -> tuple[Block, int, Geometry, Blocks]:
    """Return what of the arguments of `_run_planes` does not change from call to call."""
    d, dtype = _divide(problem), problem.compute_dtype
    block = Block(
        dtype, 1, 1, device.lanes(dtype), "plane", step=problem.stride[2], extents=(problem.R, problem.S),
        rolling=problem.stride[1] == problem.dilation[1] == 1 < problem.R,
    )  # fmt: skip
    return block, d.parts * problem.K, make_geometry(problem), d


@Kernel
def _run_planes(block, first, last, g, d, x, y, sums):
    x, y, sums = view_of(x), view_of(y), view_of(sums)
    (R, S), lanes = block_extents(block), block_lanes(block)
    totals, K = allocate(block, R * S * lanes), g.C * g.multiplier
    for task in range(first, last):
        index, k = divmod(task, K)
        fill(block, totals, R * S * lanes)
        for number in range(index * d.blocks // d.parts, (index + 1) * d.blocks // d.parts):
            n, p = number // d.bands, number % d.bands * d.rows
            plane = locate(block, x, (n, k // g.multiplier, 0, 0, 0))
            grad_y = locate(block, y, (n, k, 0, p, 0))
            for q in range(0, g.Q, lanes):
                differentiate_plane(
                    block, plane, x[4], g.H, g.W, q * g.stride_w - g.pad_w, g.dilation_w,
                    p * g.stride_h - g.pad_h, g.stride_h, g.dilation_h, advance(grad_y, q), y[4],
                    min(d.rows, g.P - p), min(lanes, g.Q - q), totals,
                )  # fmt: skip
        for tap in range(R * S):
            target = locate(block, sums, (index, k, 0, tap // S, tap % S))
            target[0] = sum_lanes(block, advance(totals, tap * lanes))
    release(totals)


@lru_cache(maxsize=256)
def _tap_offsets(problem: ConvProblem, tile: Tile, device: Device) -> np.ndarray:
    """Return where the taps lie in their packed blocks."""
    d, g = _plan(problem, tile, device)
    t, r, s = (np.arange(extent) for extent in problem.weight_shape5[2:])
    r, s = r * problem.dilation[1], s * problem.dilation[2]
    taps = ((t[:, None, None] * g.Hb + r[:, None]) * g.Wb + s).reshape(-1) * d.k_step
    return outer.row_offsets(d, taps)


@Kernel
def _run(block, first, last, d, g, a_rows, x, y, sums, target):
    width = block_columns(block)
    packed, panels = allocate(block, g.T * g.Hb * g.Wb * width), allocate(block, g.rows * g.cols * width)
    a_pixels = np.empty(g.rows * g.cols, np.int64)
    own = allocate_sums(block, d)
    for task in range(first, last):
        j, _, c, count, first_block, last_block = find_task(d, task)
        total = begin_sums(block, d, task, sums, own)
        for number in range(first_block, last_block):
            n, _, o, p, q, rows, cols = band.find_task(g, number)[2:]
            _pack_band(block, packed, locate(block, x, (n, c, 0, 0, 0)), x, g, count, o, p, q, rows)
            for i in range(rows):
                line = locate(block, y, (n, c * d.groups + j, o, p + i, q))
                pack_row(block, panels, i * cols, rows * cols, line, d.groups * y[2], y[5], count, cols)
                for e in range(cols):
                    a_pixels[i * cols + e] = (i * g.stride_h * g.Wb + e * g.stride_w) * width
            add_products(block, packed, d.rows, a_rows, a_pixels, panels, rows * cols, count, total, width)
        end_sums(block, d, task, total, target)
    release(packed)
    release(panels)
    release(own)


@part
def _pack_band(block, packed, image, x, g, channels, o, p, q, rows):
    """Pack what output rows p ... p+rows-1, columns q ... read as [t][h][w][width], zeros for padding."""
    width = block_columns(block)
    w = q * g.stride_w - g.pad_w
    low, high = columns_inside(w, 1, g.Wb, g.W)
    for t in range(g.T):
        d = o * g.stride_d + t * g.dilation_d - g.pad_d
        for i in range(g.Hb - (g.rows - rows) * g.stride_h):
            h = p * g.stride_h + i - g.pad_h
            at = (t * g.Hb + i) * g.Wb
            if d < 0 or d >= g.D or h < 0 or h >= g.H:
                fill(block, advance(packed, at * width), g.Wb * width)
                continue
            fill(block, advance(packed, at * width), low * width)
            source = advance(image, d * x[3] + h * x[4] + (w + low) * x[5])
            pack_row(block, packed, at + low, 0, source, x[2], x[5], channels, high - low)
            fill(block, advance(packed, (at + high) * width), (g.Wb - high) * width)
