"""Depthwise convolution: every input channel has its own filters, so that little is computed per element.

Two kinds of tiles: planes, whose input goes through shared memory, for any memory order and any filter; and
channels, whose threads read pixels where they lie, for small filters of channels that lie together in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastconv.gpu import product
from fastconv.gpu.product import Call

if TYPE_CHECKING:
    from fastconv.gpu.hardware import Device
    from fastconv.gpu.source import Kernel
    from fastconv.problem import ConvProblem, Operands


@dataclass(frozen=True)
class PlaneTile(product.Tile):
    """What a block computes: block_p rows of block_q pixels in each of block_m output channels.

    rows  that a thread computes, of four neighbouring pixels each
    """

    block_p: int = 0
    block_q: int = 0
    rows: int = 0

    @property
    def threads(self) -> int:
        return self.block_m * self.block_n // (4 * self.rows)

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_p}x{self.block_q}"


@dataclass(frozen=True)
class ChannelTile(product.Tile):
    """What a thread computes: block_p rows of block_q pixels, of up to block_m channels."""

    block_p: int = 0
    block_q: int = 0

    @property
    def threads(self) -> int:
        return 128

    def __str__(self) -> str:
        return f"channels{self.block_p}x{self.block_q}"


class Filter(NamedTuple):
    """The filter that a kernel is compiled for; the names are those of the defines."""

    FILTER_R: int
    FILTER_S: int
    STRIDE_H: int = 1
    STRIDE_W: int = 1
    DILATION_H: int = 1
    DILATION_W: int = 1

    @property
    def taps(self) -> int:
        return self.FILTER_R * self.FILTER_S

    def window(self, rows: int, columns: int) -> tuple[int, int]:
        """Return how many rows and columns of the input neighbouring outputs see."""
        height = (rows - 1) * self.STRIDE_H + (self.FILTER_R - 1) * self.DILATION_H + 1
        return height, (columns - 1) * self.STRIDE_W + (self.FILTER_S - 1) * self.DILATION_W + 1


class Stage(NamedTuple):
    """What shared memory holds at a time in the kernel LARGE.

    taps_r, taps_s  of the filter: all, some rows, or one tap
    size            elements of the patches and filters of a block
    """

    taps_r: int
    taps_s: int
    size: int


PLANE_TILES = tuple(
    PlaneTile(c, p * q, block_p=p, block_q=q, rows=4)
    for c, p, q in ((1, 16, 128), (1, 32, 64), (2, 32, 32), (8, 16, 16), (32, 8, 8))
) + tuple(PlaneTile(c, p * q, block_p=p, block_q=q, rows=1) for c, p, q in ((8, 8, 8), (1, 1, 512)))
CHANNEL_TILES = tuple(ChannelTile(4, p * q, block_p=p, block_q=q) for p, q in ((4, 4), (4, 2), (1, 4)))
TILES = (*PLANE_TILES, *CHANNEL_TILES)

MOST_TAPS = 49  # of a filter in registers: 7 x 7
MOST_WINDOW = 32  # inputs that 4 x 4 outputs may see along either axis if the filter lies in registers
MOST_PIXELS = 80  # that four neighbouring outputs may see: 70 if the filter is of 7 x 7, with stride 1
MOST_TAPS_OF_FOUR = 9  # of the filters of four channels in registers
SHARED = (16384, 32768, 49152)  # bytes that LARGE is compiled with
RESERVED = 1024  # bytes of shared memory that each block costs beside its own

# Filters whose kernels stand for those of others.
KNOWN = (Filter(1, 4), Filter(3, 3), Filter(3, 3, 2, 2), Filter(5, 5, 2, 2), Filter(7, 7))

# Of the peak, what the multiply-adds of a main loop reach, and what is spent beside them, in instructions.
SLIDING_EFFICIENCY = 0.75
EFFICIENCY = 0.6
PLAIN_EFFICIENCY = 0.3  # two loads from shared memory for three multiply-adds
PATCH_LOAD = 25  # to find an element of a patch or filter, load and store it
PIXEL_LOAD = 10  # to load a pixel of four channels or one
STORE = 8  # to finish and store a sum
SECTOR = 32  # bytes that global memory brings at least
NOT_HIDDEN = 0.25  # of the shorter of computing and moving: a block does one after the other
LANES = 128  # threads that an SM issues an instruction for, per cycle
MOST_RESIDENT = 6  # blocks of an SM: as their registers permit


def cost(problem: ConvProblem, tile: PlaneTile | ChannelTile, device: Device) -> float:
    """Return the estimated seconds; infinite where other tiles do the work."""
    if not isinstance(tile, ChannelTile):
        return _plane_seconds(problem, tile, device)
    return _channel_seconds(problem, tile, device) if _reads_pixels(problem) else float("inf")


def workspace(problem: ConvProblem, tile: PlaneTile | ChannelTile, device: Device) -> int:
    """Return the bytes that are allocated: none."""
    return 0


def prepare(
    problem: ConvProblem, tile: PlaneTile | ChannelTile, device: Device, weight: np.ndarray
) -> np.ndarray:
    """Return the weight as it is: kernels read it where it lies."""
    return weight


def run(problem: ConvProblem, tile: PlaneTile | ChannelTile, device: Device, operands: Operands) -> None:
    """Convolve."""
    call = Call("depthwise", problem, operands, reads_weight=True)
    if isinstance(tile, PlaneTile):
        _run_planes(call, tile)
    elif _reads_pixels(problem):
        _run_channels(call, tile)
    else:
        _run_planes(call, _cheapest_planes(problem, device))


def kernels(dtype: str, order: str, tile: PlaneTile | ChannelTile) -> list[Kernel]:
    """Return kernels that stand for all of a tile: those for some filters, and those for any."""
    itemsize = 8 if dtype == "float64" else 4
    if isinstance(tile, PlaneTile):
        small = [_plane_defines(tile, filter) for filter in KNOWN if _fits(tile, filter, itemsize)]
        if order == "NHWC":
            small = small[-1:]  # tiles of channels are for most small filters
        large = [_large_defines(tile, *kind) for kind in ((SHARED[0], False), (SHARED[-1], True))]
        return [
            *product.variants("depthwise", "PLANES", dtype, order, tile, small),
            *product.variants("depthwise", "LARGE", dtype, order, tile, large),
        ]
    if order == "NCHW":
        return []
    found = [_channel_defines(tile, filter, 1) for filter in KNOWN if _fits_channels(filter, itemsize)]
    if dtype != "float64":
        found += [_channel_defines(tile, f, 4) for f in KNOWN if f.taps <= MOST_TAPS_OF_FOUR]
    return product.variants("depthwise", "CHANNELS", dtype, order, tile, found)


def _run_planes(call: Call, tile: PlaneTile) -> None:
    filter, itemsize = _filter(call.problem), product.accumulator(call.problem).itemsize
    if _fits(tile, filter, itemsize):
        _launch(call, "PLANES", tile, _plane_defines(tile, filter), _plane_blocks(call.problem, tile))
        return
    stage = _stage(call.problem, tile)
    defines = _large_defines(tile, _declared(stage.size * itemsize), _slides(call.problem))
    blocks = _plane_blocks(call.problem, tile)
    _launch(call, "LARGE", tile, defines, blocks, taps_r=stage.taps_r, taps_s=stage.taps_s)


def _run_channels(call: Call, tile: ChannelTile) -> None:
    x = call.operands.x
    lanes = _most_lanes(call.problem)
    if lanes == 4 and (x.strides[1] != x.itemsize or not product.steps_in_fours(x, (0, 2, 3, 4))):
        lanes = 1
    defines = _channel_defines(tile, _filter(call.problem), lanes)
    _launch(call, "CHANNELS", tile, defines, _channel_blocks(call.problem, tile, lanes))


def _launch(
    call: Call, stage: str, tile: PlaneTile | ChannelTile, defines: dict[str, Any], blocks: int, **taps: int
) -> None:
    """Launch a kernel; it counts its threads, and outputs and channels behind the last ones."""
    p, o = call.problem, call.operands
    behind = max(tile.block_p * p.stride[1], tile.block_q * p.stride[2], tile.block_m)
    largest = max(blocks * tile.threads, call.reach + behind)
    call.launch(
        stage, blocks, tile.threads, {**defines, **call.output}, largest,
        x=o.x, weight=o.weight, **taps, **call.ends,
    )  # fmt: skip


def _plane_defines(tile: PlaneTile, filter: Filter) -> dict[str, int]:
    return {**_plane_sizes(tile), **filter._asdict()}


def _large_defines(tile: PlaneTile, shared: int, slides: bool) -> dict[str, int]:
    return {**_plane_sizes(tile), "SHARED": shared, "SLIDING": int(slides)}


def _plane_sizes(tile: PlaneTile) -> dict[str, int]:
    sizes = {"BLOCK_C": tile.block_m, "BLOCK_P": tile.block_p, "BLOCK_Q": tile.block_q}
    return {**sizes, "ROWS": tile.rows}


def _channel_defines(tile: ChannelTile, filter: Filter, lanes: int) -> dict[str, int]:
    return {"ROWS": tile.block_p, "COLUMNS": tile.block_q, "LANES": lanes, **filter._asdict()}


def _plane_blocks(problem: ConvProblem, tile: PlaneTile) -> int:
    return problem.N * problem.O * -(-problem.K // tile.block_m) * _strips(problem, tile)


def _channel_blocks(problem: ConvProblem, tile: ChannelTile, lanes: int) -> int:
    threads = problem.N * problem.O * problem.K // lanes * _strips(problem, tile)
    return -(-threads // tile.threads)


def _strips(problem: ConvProblem, tile: PlaneTile | ChannelTile) -> int:
    return -(-problem.P // tile.block_p) * -(-problem.Q // tile.block_q)


def _filter(problem: ConvProblem) -> Filter:
    return Filter(problem.R, problem.S, *problem.stride[1:], *problem.dilation[1:])


def _is_small(filter: Filter) -> bool:
    """Say whether the filter and what a row of outputs sees fit a thread's registers, with loops unrolled."""
    return filter.taps <= MOST_TAPS and max(filter.window(4, 4)) <= MOST_WINDOW


def _fits(tile: PlaneTile, filter: Filter, itemsize: int) -> bool:
    """Say whether a tile has a kernel compiled for a filter."""
    return _is_small(filter) and patch_size(tile, filter) * tile.block_m * itemsize <= SHARED[-1]


def _reads_pixels(problem: ConvProblem) -> bool:
    """Say whether threads read pixels where they lie."""
    itemsize = product.accumulator(problem).itemsize
    return problem.order == "NHWC" and _fits_channels(_filter(problem), itemsize)


def _fits_channels(filter: Filter, itemsize: int) -> bool:
    """Say whether pixels for a row of outputs fit registers, and the filters of a block shared memory."""
    pixels = filter.FILTER_R * filter.window(1, 4)[1]
    shared = filter.taps * (CHANNEL_TILES[0].threads + 4) * itemsize  # kSpan of kernels/depthwise.cu
    return _is_small(filter) and pixels <= MOST_PIXELS and shared <= SHARED[-1]


def _most_lanes(problem: ConvProblem) -> int:
    """Return how many channels a thread can take, if their addresses permit."""
    is_even = problem.K == problem.C and problem.K % 4 == 0 and problem.compute_dtype != "float64"
    return 4 if is_even and problem.R * problem.S <= MOST_TAPS_OF_FOUR else 1


def _slides(problem: ConvProblem) -> bool:
    """Say whether neighbouring columns and neighbouring taps are neighbours in the input."""
    return problem.stride[2] == problem.dilation[2] == 1


@lru_cache(maxsize=4096)
def _stage(problem: ConvProblem, tile: PlaneTile) -> Stage:
    """Return the largest stage that fits; if that is some rows, they are shared out evenly."""
    R, S, most = problem.R, problem.S, SHARED[-1] // product.accumulator(problem).itemsize
    stages = (_make_stage(problem, tile, rows, S) for rows in range(min(R, most), 0, -1))
    largest = next((stage for stage in stages if stage.size <= most), None)
    if largest is None:
        return _make_stage(problem, tile, 1, 1)
    turns = -(-R // largest.taps_r)
    return _make_stage(problem, tile, -(-R // turns), S)


def _declared(size: int) -> int:
    """Return the bytes that LARGE is compiled with for a stage of some bytes."""
    return next(shared for shared in SHARED if size <= shared)


def _make_stage(problem: ConvProblem, tile: PlaneTile, taps_r: int, taps_s: int) -> Stage:
    patch = patch_size(tile, _filter(problem)._replace(FILTER_R=taps_r, FILTER_S=taps_s))
    filters = 4 * (taps_r * -(-taps_s // 4) | 1)  # struct Filters of kernels/depthwise.cu
    return Stage(taps_r, taps_s, tile.block_m * (patch + filters))


def patch_size(tile: PlaneTile, filter: Filter) -> int:
    """Return the elements of a plane's patch: struct Patch of kernels/depthwise.cu."""
    height, width = filter.window(tile.block_p, tile.block_q)
    height = height if filter.FILTER_R > 1 else tile.block_p
    fours = -(-(width if filter.FILTER_S > 1 else tile.block_q) // 4)
    pitch = _with_rest(fours, 2) if tile.rows == 1 else fours | 1
    return 4 * _with_rest(height * pitch, 2)


def _with_rest(fours: int, rest: int) -> int:
    return fours + (rest - fours) % 4


@lru_cache(maxsize=4096)
def _cheapest_planes(problem: ConvProblem, device: Device) -> PlaneTile:
    """Return the tile that takes the place of one whose threads cannot read pixels where they lie."""
    return min(PLANE_TILES, key=lambda tile: cost(problem, tile, device))


class _Work(NamedTuple):
    """What a block does.

    outputs       that it computes, those behind the last ones included
    instructions  beside multiply-adds
    loaded        elements of the input
    efficiency    part of the peak that multiply-adds reach
    resident      blocks of an SM at most
    """

    outputs: int
    instructions: float
    loaded: float
    efficiency: float
    resident: int


def _seconds(problem: ConvProblem, tile: product.Tile, device: Device, blocks: int, work: _Work) -> float:
    per_sm = -(-blocks // device.processors)
    threads = min(per_sm, work.resident) * tile.threads
    rate = product.sm_rate(problem, device, threads) * work.efficiency
    arithmetic = work.outputs * problem.gemm_k * 2 / rate + work.instructions / (LANES * device.clock)
    passed = blocks * (work.loaded + work.outputs) * problem.itemsize / product.L2_SPEEDUP
    parts = per_sm * arithmetic, max(problem.bytes, passed) / device.bandwidth
    return max(parts) + min(parts) * NOT_HIDDEN + product.LAUNCH


def _plane_seconds(problem: ConvProblem, tile: PlaneTile, device: Device) -> float:
    filter, itemsize = _filter(problem), product.accumulator(problem).itemsize
    if _fits(tile, filter, itemsize):
        size, stages, efficiency = tile.block_m * patch_size(tile, filter), 1, EFFICIENCY
        declared = size * itemsize
    else:
        stage = _stage(problem, tile)
        size, stages = stage.size, -(-problem.R // stage.taps_r) * -(-problem.S // stage.taps_s)
        declared = _declared(size * itemsize)
        efficiency = SLIDING_EFFICIENCY if _slides(problem) else PLAIN_EFFICIENCY
    loads = problem.T * stages * size
    # Of channels that lie together, as many come as a sector holds, whether the block needs them or not.
    spread = 1.0 if problem.order == "NCHW" else max(SECTOR / (tile.block_m * problem.itemsize), 1.0)
    outputs = tile.block_m * tile.block_n
    resident = min(device.shared_per_sm // (declared + RESERVED), MOST_RESIDENT)
    work = _Work(outputs, loads * PATCH_LOAD + outputs * STORE, loads * spread, efficiency, resident)
    return _seconds(problem, tile, device, _plane_blocks(problem, tile), work)


def _channel_seconds(problem: ConvProblem, tile: ChannelTile, device: Device) -> float:
    lanes, filter = _most_lanes(problem), _filter(problem)
    seen = problem.T * tile.threads * math.prod(filter.window(tile.block_p, tile.block_q))
    read = problem.T * tile.threads * tile.block_p * filter.FILTER_R * filter.window(1, tile.block_q)[1]
    weights = problem.T * tile.threads * lanes * filter.taps
    outputs = tile.threads * lanes * tile.block_n
    # One row of outputs after the other: what two of them see is read twice.
    instructions = read * PIXEL_LOAD + weights * PATCH_LOAD + outputs * STORE
    work = _Work(outputs, instructions, seen * lanes, EFFICIENCY, MOST_RESIDENT)
    return _seconds(problem, tile, device, _channel_blocks(problem, tile, lanes), work)
