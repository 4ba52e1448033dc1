"""1x1 convolution: a matrix product of the weight and the pixels, read where they lie.

Where all rows begin alike, as those of 28 x 28 pixels do, tiles begin with a cache line, but for the ends.

Where planes end within a vector, those of a batch share vectors: 16 planes of 7 x 7 pixels are three vectors
each and one of all their last pixels, 49 in all and not 64. That one is packed, as `direct` packs its bands.

Tiles whose vectors are output channels need no vectors of pixels: `pointwise_channels.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu import direct, pointwise_channels
from fastconv.cpu.band import (
    arguments_of,
    count_parts,
    flatten,
    lie_in_rows,
    locate,
    make_block,
    multiply,
    share_channels,
    task_threads,
    weight_lies_well,
)
from fastconv.cpu.compiling import small_part
from fastconv.cpu.device import itemsize
from fastconv.cpu.pointwise_channels import ChannelTile
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
    release,
    table,
    view_of,
)
from fastconv.lines import CACHE_LINE

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

AnyTile = Tile | ChannelTile

TILES: tuple[AnyTile, ...] = (*direct.TILES, *pointwise_channels.TILES)
PACKED = Tile(4, 3)  # fits all vectors; in place of a ChannelTile, where planes cannot be read in place


class Cut(NamedTuple):
    """How planes of one row are cut into bands, and the output channels into parts; C and K of one group."""

    groups: int
    C: int
    K: int
    O: int
    stride_d: int
    pixels: int
    bands: int
    k_step: int
    k_parts: int
    line: int  # elements of a cache line, if that is a vector, else 1


class Plan(NamedTuple):
    """What is run of planes that are read in place; `shared`: of pixels that are not."""

    block: Block
    cut: Cut
    tasks: int
    workers: int
    shared: ConvProblem | None


def cost(problem: ConvProblem, tile: AnyTile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    if isinstance(tile, ChannelTile):
        is_possible = pointwise_channels.suits(problem, tile)
        return pointwise_channels.cost(problem, tile, device) if is_possible else math.inf
    if flatten(problem) is None:
        return direct.cost(problem, tile, device)
    return _cost_of_parts(*_divide(problem, tile, device), tile, device)


def workspace(problem: ConvProblem, tile: AnyTile, device: Device) -> int:
    """Return the bytes that are packed of planes that do not lie in one piece, or of their last pixels."""
    if isinstance(tile, ChannelTile):
        packed = direct.workspace(problem, PACKED, device)
        if problem.order == "NCHW":  # where planes do not lie in one piece the weight is copied
            packed += problem.parameters * itemsize(problem)
        is_possible = pointwise_channels.suits(problem, tile)
        return max(packed, pointwise_channels.workspace(problem, tile, device)) if is_possible else packed
    _, shared = _divide(problem, tile, device)
    whole = direct.workspace(problem, tile, device)
    return whole if shared is None else max(whole, direct.workspace(shared, tile, device))


def prepare(problem: ConvProblem, tile: AnyTile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the weight as `direct` does, or packed for vectors of output channels."""
    if not isinstance(tile, ChannelTile):
        return direct.prepare(problem, tile, device, weight)
    if flatten(problem) is None:
        return direct.prepare(problem, PACKED, device, weight)
    return pointwise_channels.prepare(problem, tile, device, weight)


@lru_cache(maxsize=256)
def takes_view(problem: ConvProblem, device: Device) -> bool:
    """Say whether a weight of rank 5 is best left as it lies, whatever its strides."""
    return weight_lies_well(problem, device) and _plan_in_place(problem, PACKED, device, 1) is not None


def run(problem: ConvProblem, tile: AnyTile, device: Device, operands: Operands) -> None:
    """Convolve; the weight is prepared or as given."""
    if isinstance(tile, ChannelTile):
        _run_channels(problem, tile, device, operands)
        return
    plan = _plan_in_place(problem, tile, device, task_threads(problem))
    if plan is None or not lie_in_rows(operands):
        direct.run(problem, tile, device, operands)
        return
    arguments = arguments_of(problem, operands, tile.rows, any_weight=takes_view(problem, device))
    _run_bands(plan.block, plan.tasks, plan.workers, plan.cut, *arguments)
    if plan.shared is not None:
        direct.run(plan.shared, tile, device, _last_pixels(operands, plan.cut.pixels))


def _run_channels(problem: ConvProblem, tile: ChannelTile, device: Device, operands: Operands) -> None:
    """Convolve with vectors of output channels, where planes can be read in place."""
    weight = operands.weight
    if pointwise_channels.suits(problem, tile) and lie_in_rows(operands):
        pointwise_channels.run(problem, tile, device, operands)
        return
    if weight.ndim == 2:
        weight = pointwise_channels.unpack(problem, tile, device, weight)
    direct.run(problem, PACKED, device, operands._replace(weight=weight))


def _last_pixels(operands: Operands, first: int) -> Operands:
    """Return operands of one image: a row per plane, of its pixels from `first` on."""

    def cut(array: np.ndarray) -> np.ndarray:
        return array.reshape(*array.shape[:3], 1, -1)[..., first:].transpose(3, 1, 2, 0, 4)

    residual = None if operands.residual is None else cut(operands.residual)
    return operands._replace(x=cut(operands.x), out=cut(operands.out), residual=residual)


@lru_cache(maxsize=256)
def _divide(problem: ConvProblem, tile: Tile, device: Device) -> tuple[ConvProblem, ConvProblem | None]:
    """Return the problem of what is read in place, as planes of one row, and that of what shares vectors.

    The latter, if any, is one image with a row for the last pixels of each plane.
    """
    rows = flatten(problem)
    if rows is None:
        return problem, None
    rest = rows.W % device.lanes(problem.compute_dtype)
    if problem.N == 1 or problem.D > 1 or rest in (0, rows.W):
        return rows, None
    parts = replace(rows, W=rows.W - rest), replace(problem, N=1, H=problem.N, W=rest)
    is_faster = _cost_of_parts(*parts, tile, device) < _cost_of_parts(rows, None, tile, device)
    return parts if is_faster else (rows, None)


def _cost_of_parts(rows: ConvProblem, shared: ConvProblem | None, tile: Tile, device: Device) -> float:
    """Return the estimated seconds of a division."""
    dtype, pixels, tiles = rows.compute_dtype, rows.W, 1
    lanes = device.lanes(dtype)
    most = tile.vectors * lanes
    aligned = shared is None and pixels % lanes == 0 and pixels > 2 * most  # all tiles but the ends
    if pixels % lanes and lanes < pixels < most:  # two tiles that overlap, within the input
        tiles, pixels = 2, math.ceil(pixels / lanes / 2) * lanes
    cycles = tiles * device.multiply_cycles(tile, rows.gemm_m, pixels, rows.gemm_k, dtype, aligned)
    seconds = device.seconds(rows, rows.N * rows.groups * rows.O * cycles)
    return seconds if shared is None else seconds + direct.cost(shared, tile, device)


@lru_cache(maxsize=256)
def _plan_in_place(problem: ConvProblem, tile: Tile, device: Device, workers: int) -> Plan | None:
    """Cut planes into bands of about half of L2; None where no vector of them can be read in place."""
    rows, shared = _divide(problem, tile, device)
    lanes, K = device.lanes(rows.compute_dtype), rows.gemm_m
    if flatten(problem) is None or lanes > rows.W:
        return None
    pixels = max(device.l2 // 2 // itemsize(rows) // rows.gemm_k, tile.vectors * lanes)
    planes, most_bands = rows.N * rows.groups * rows.O, max(1, rows.W // (2 * lanes))
    bands = min(math.ceil(rows.W / pixels), most_bands)
    if bands > 1:
        bands = count_parts(bands, most_bands, planes, workers)
    k_step = share_channels(K, planes * bands, workers, tile.rows)
    k_parts = math.ceil(K / k_step)
    line = lanes if device.vector_bits == 8 * CACHE_LINE else 1
    cut = Cut(rows.groups, rows.gemm_k, K, rows.O, rows.stride[0], rows.W, bands, k_step, k_parts, line)
    return Plan(make_block(rows, tile, device), cut, planes * bands * k_parts, workers, shared)


@Kernel
def _run_bands(block, first, last, g, x, w, bias, y, ending):
    x, w_view, w, bias, y = view_of(x), view_of(w), table(w), table(bias), view_of(y)
    lanes, w_steps = block_lanes(block), (w_view[1], w_view[2])
    tile = allocate(block, block_rows(block) * block_columns(block))
    line = g.line if x[2] % g.line == 0 else 1  # else rows do not all begin a line at once
    for task in range(first, last):
        rest, k_part = divmod(task, g.k_parts)
        rest, index = divmod(rest, g.bands)
        rest, o = divmod(rest, g.O)
        n, group = divmod(rest, g.groups)
        channel = group * g.K + k_part * g.k_step
        plane = locate(block, x, (n, group * g.C, o * g.stride_d, 0, 0))
        q, end = _find_edge(g, index, plane, lanes, line), _find_edge(g, index + 1, plane, lanes, line)
        count = end - q
        multiply(
            block, advance(w, channel * w_steps[0]), w_steps, min(g.k_step, g.K - k_part * g.k_step),
            advance(plane, q), x[2], g.C, advance(bias, channel),
            (count, count, count, count), line, 0, count, count,
            y, (n, channel, o, 0, q), tile, 1, ending,
        )  # fmt: skip
    release(tile)


@small_part
def _find_edge(g, index, plane, lanes, line):
    """Return the first pixel of a band; but for the first band, a line of the cache begins with it.

    There are two vectors or more per band, so that one is left to each of them.
    """
    if index == 0:
        return 0
    if index == g.bands:
        return g.pixels
    q = g.pixels // lanes * index // g.bands * lanes
    return q - address_of(advance(plane, q)) % line
