"""1x1 convolution of planes of few pixels: vectors run over output channels, and are turned at last.

    A     x where it lies: rows are pixels, one after the other     broadcast
    B     a panel of the weight, packed as [c][vectors * lanes]     whatever its strides
    sums  [pixel][vectors * lanes] of a band of pixels              turned into rows of y while they lie in L1

A plane of 7 x 7 pixels is 7 tiles of 7 pixels. In tiles whose vectors are pixels it takes as long as 64.

A panel is packed when its turn comes, and all images go through it. Images that no cache holds would come
from memory for every panel: some at a time go through all panels, packed before, while they lie in L2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu import memory
from fastconv.cpu.band import (
    count_parts,
    even_share,
    finish,
    flatten,
    locate,
    make_block,
    make_ending,
    padded_bias,
    task_threads,
)
from fastconv.cpu.compiling import part, small_part
from fastconv.cpu.device import itemsize
from fastconv.cpu.simd import (
    Block,
    Kernel,
    advance,
    allocate,
    block_columns,
    block_lanes,
    block_rows,
    copy_rows,
    lane_bits,
    multiply_tile,
    pointer,
    release,
    table,
    transpose,
    view_of,
)
from fastconv.problem import HashedOnce

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

IN_CACHE = 16  # times L2: images that take no more come from a cache beyond it
BAND_PIXELS = 112  # of which the sums of a panel of 48 channels take 21 KB
PACK_CYCLES = 3  # to turn a vector of the weight
TURN_CYCLES = 5  # to turn a vector of sums, and to store it where rows end anywhere
FAR = 2048  # bytes from channel to channel beyond which the processor does not foresee what is read
FAR_FACTOR = 1.3  # a product takes so much longer then


@dataclass(frozen=True)
class ChannelTile(HashedOnce):
    """A register tile of `rows` pixels times `vectors` vectors of output channels.

    No NamedTuple: that would equal a Tile of these numbers, and be taken for it by what is remembered.
    """

    rows: int
    vectors: int

    __hash__ = HashedOnce.__hash__

    @property
    def packing(self) -> tuple[str, int]:
        """What decides the form of a prepared weight."""
        return "channels", self.vectors

    @property
    def reads_any_weight(self) -> bool:
        """Whether a weight of rank 5 is best left as it lies, whatever its strides."""
        return True

    def __str__(self) -> str:
        return f"c{self.rows}x{self.vectors}"


TILES = (ChannelTile(7, 3), ChannelTile(4, 3))


def suits(problem: ConvProblem, tile: ChannelTile) -> bool:
    """Say whether planes can be read in place, of a tile of pixels at least."""
    rows = flatten(problem)
    return rows is not None and tile.rows <= rows.W


class Division(NamedTuple):
    """How the work is divided; C and K are those of one group."""

    groups: int
    C: int
    K: int
    N: int
    O: int
    stride_d: int
    pixels: int  # of a plane, of a band, and how many bands make a plane
    band: int  # in whole tiles
    bands: int
    c_step: int  # input channels whose part of a panel takes half of L1
    vectors: int  # of output channels, and the panels that share them evenly
    panels: int
    rounds: int  # of images that go through all panels
    parts: int  # of the bands of all images, for each panel
    tasks: int


@lru_cache(maxsize=256)
def _divide(problem: ConvProblem, tile: ChannelTile, device: Device, workers: int) -> Division:
    """Return a task for each panel and part of the bands: as many parts as rounds, or more for threads."""
    K, groups, pixels = problem.gemm_m, problem.groups, problem.P * problem.Q
    share = even_share(pixels, BAND_PIXELS, tile.rows)
    band, bands = math.ceil(share / tile.rows) * tile.rows, math.ceil(pixels / share)
    width = tile.vectors * device.lanes(problem.compute_dtype)
    c_step = even_share(problem.gemm_k, device.l1 // 2 // (itemsize(problem) * width))
    vectors = math.ceil(K / device.lanes(problem.compute_dtype))
    panels = math.ceil(vectors / tile.vectors)
    image, rounds = itemsize(problem) * problem.C * problem.O * pixels, 1
    if problem.N * image > IN_CACHE * device.l2:
        rounds = math.ceil(problem.N / max(1, device.l2 // 2 // image))
    parts = count_parts(rounds, problem.N * problem.O * bands, groups * panels, workers)
    return Division(
        groups, problem.gemm_k, K, problem.N, problem.O, problem.stride[0], pixels, band, bands, c_step,
        vectors, panels, rounds, parts, groups * panels * parts,
    )  # fmt: skip


def cost(problem: ConvProblem, tile: ChannelTile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    d = _divide(problem, tile, device, 1)
    dtype, lanes = problem.compute_dtype, device.lanes(problem.compute_dtype)
    product = device.multiply_cycles(tile, d.pixels, d.K, d.C, dtype, aligned=True)
    if d.pixels * itemsize(problem) > FAR:
        product *= FAR_FACTOR
    turned = d.vectors * math.ceil(d.pixels / lanes) * lanes * TURN_CYCLES
    packed = d.vectors * d.C * PACK_CYCLES
    return device.seconds(problem, d.groups * (d.N * d.O * (product + turned) + packed))


def workspace(problem: ConvProblem, tile: ChannelTile, device: Device) -> int:
    """Return the bytes of the packed panels, one for each thread or all, and of a band's sums in each."""
    workers = task_threads(problem)
    d = _divide(problem, tile, device, workers)
    width, busy = tile.vectors * device.lanes(problem.compute_dtype), min(workers, d.tasks)
    packed = busy if d.rounds == 1 else d.groups * d.panels
    return itemsize(problem) * width * (packed * d.C + busy * d.band)


def prepare(problem: ConvProblem, tile: ChannelTile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return all panels of a weight of rank 5: (groups * panels, C * vectors * lanes)."""
    workers = task_threads(problem)
    block, d = _plan(problem, tile, device, workers)
    panels = memory.allocate((d.groups * d.panels, d.C * block.vectors * block.lanes), problem.compute_dtype)
    _pack_panels(block, d.groups * d.panels, workers, d, weight, panels)
    return panels


def unpack(problem: ConvProblem, tile: ChannelTile, device: Device, panels: np.ndarray) -> np.ndarray:
    """Return the weight of rank 5 that `prepare` has packed."""
    d, lanes = _divide(problem, tile, device, 1), device.lanes(problem.compute_dtype)
    weight = np.empty((d.groups, d.K, d.C), problem.compute_dtype)
    for i, panel in enumerate(panels.reshape(d.groups, d.panels, d.C, -1).swapaxes(0, 1)):
        some = weight[:, d.vectors * i // d.panels * lanes : d.vectors * (i + 1) // d.panels * lanes]
        some[...] = panel[..., : some.shape[1]].swapaxes(1, 2)
    return weight.reshape(problem.weight_shape5)


def run(problem: ConvProblem, tile: ChannelTile, device: Device, operands: Operands) -> None:
    """Convolve planes whose pixels lie one after the other; the weight is prepared (rank 2) or as given."""
    workers, weight = task_threads(problem), operands.weight
    block, d = _plan(problem, tile, device, workers)
    if d.rounds > 1 and weight.ndim > 2:
        weight = prepare(problem, tile, device, weight)
    is_packed = weight.ndim == 2
    w = weight[:, :, None, None, None] if is_packed else weight
    bias, ending = padded_bias(problem, operands.bias, block.vectors * block.lanes), make_ending(operands)
    _run(block, d.tasks, workers, d, is_packed, operands.x, w, bias, operands.out, ending)


@lru_cache(maxsize=256)
def _plan(problem: ConvProblem, tile: ChannelTile, device: Device, workers: int) -> tuple[Block, Division]:
    """Return what of the arguments of `_run` does not change from call to call."""
    block = replace(make_block(problem, tile, device, "columns"), adds=True)
    return block, _divide(problem, tile, device, workers)


@Kernel
def _pack_panels(block, first, last, d, w, panels):
    w = view_of(w)
    for task in range(first, last):
        channel, count = _find_channels(block, d, task)
        panel = advance(table(panels), task * d.C * block_columns(block))
        _pack_panel(block, advance(pointer(block, w[0]), channel * w[1]), w, count, d.C, panel)


@Kernel
def _run(block, first, last, d, is_packed, x, w, bias, y, ending):
    x, w, bias, y = view_of(x), view_of(w), table(bias), view_of(y)
    width, height = block_columns(block), block_rows(block)
    own, sums = allocate(block, 0 if is_packed else d.C * width), allocate(block, d.band * width)
    for task in range(first, last):
        index, number = divmod(task, d.groups * d.panels)
        group = number // d.panels
        channel, count = _find_channels(block, d, number)
        panel = own
        if is_packed:
            panel = advance(pointer(block, w[0]), number * d.C * width)
        else:
            _pack_panel(block, advance(pointer(block, w[0]), channel * w[1]), w, count, d.C, panel)
        bands = d.N * d.O * d.bands
        for place in range(bands * index // d.parts, bands * (index + 1) // d.parts):
            rest, band = divmod(place, d.bands)
            n, o = divmod(rest, d.O)
            q = band * d.band
            pixels = min(d.band, d.pixels - q)
            plane = locate(block, x, (n, group * d.C, o * d.stride_d, 0, 0))
            copy_rows(block, d.band, sums, width, advance(bias, channel), 0, 1, width, 0, width)
            for c in range(0, d.C, d.c_step):
                taps, source = min(d.c_step, d.C - c), advance(plane, c * x[2] + q)
                _multiply(block, source, x[2], taps, advance(panel, c * width), pixels, count, sums)
            origin = (n, channel, o, 0, q)
            target, over = locate(block, y, origin), pixels % height
            _store(block, sums, pixels - over, count, target, y[2])
            if over > 0:  # the last rows of the tile that begins before them
                ending_rows = advance(sums, (pixels + height - 2 * over) * width)
                _store(block, ending_rows, over, count, advance(target, pixels - over), y[2])
            finish(block, y, origin, (count, 1, pixels), ending)
    release(own)
    release(sums)


@small_part
def _find_channels(block, d, number):
    """Return the first output channel of a panel, among those of all groups, and how many it has."""
    lanes = block_lanes(block)
    group, k_part = divmod(number, d.panels)
    k, end = d.vectors * k_part // d.panels * lanes, d.vectors * (k_part + 1) // d.panels * lanes
    return group * d.K + k, min(end, d.K) - k


@part
def _pack_panel(block, w, w_view, count, C, panel):
    """Pack `count` output channels of the weight: panel[c, k] = w[k, c]."""
    lanes, width = block_lanes(block), block_columns(block)
    if w_view[2] != 1:
        copy_rows(block, C, panel, width, w, w_view[2], w_view[1], width, 0, count)
        return
    for k in range(0, count, lanes):
        for c in range(0, C, lanes):
            transpose(
                block, advance(w, k * w_view[1] + c), w_view[1], count - k, lane_bits(block, 0, C - c),
                advance(panel, c * width + k), width, C - c, lane_bits(block, 0, lanes),
            )  # fmt: skip


@part
def _multiply(block, x, x_step, taps, panel, pixels, count, sums):
    """Add the products of some input channels, for the pixels of a band, tile by tile.

    A tile that is not whole begins with pixels before its own: all that it reads exists.
    """
    lanes, width, height = block_lanes(block), block_columns(block), block_rows(block)
    vectors = (count + lanes - 1) // lanes
    for row in range(0, pixels, height):
        source, target = advance(x, min(row, pixels - height)), advance(sums, row * width)
        multiply_tile(block, vectors, source, 1, x_step, panel, width, taps, target, target, width)


@part
def _store(block, sums, pixels, count, y, y_step):
    """Store sums as rows of pixels."""
    lanes, width = block_lanes(block), block_columns(block)
    every = lane_bits(block, 0, lanes)
    for k in range(0, count, lanes):
        for pixel in range(0, pixels, lanes):
            transpose(
                block, advance(sums, pixel * width + k), width, pixels - pixel, every,
                advance(y, k * y_step + pixel), y_step, count - k, lane_bits(block, 0, pixels - pixel),
            )  # fmt: skip
