"""Depthwise convolution: every input channel has its own filters, so nothing is shared, little is computed.

Four ways: "plane" tiles read the input where it lies, with masked vectors at the borders (small filters,
where packing would cost more than the convolution); "rows" tiles share packed rows among rows of outputs
(large filters); "1x8" and its like pack a band of one channel into L1 (any filter); channels last, vectors
run over channels. The first two skip rows of padding, of which an infinite weight would make NaN.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu import band, band_last, depthwise_rows
from fastconv.cpu.band import finish, locate
from fastconv.cpu.depthwise_rows import RowsTile
from fastconv.cpu.device import TILE_CYCLES
from fastconv.cpu.planes import convolve_plane, fits_pairs
from fastconv.cpu.simd import (
    Block,
    Kernel,
    Tile,
    advance,
    block_columns,
    block_extents,
    block_lanes,
    block_rows,
    table,
    view_of,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands


MOST_TAPS = 49  # 7 x 7
MOST_ROLLING_ROWS = {16: 5, 32: 7}  # by the number of registers: of outputs whose sums they hold
PIXEL_CYCLES = 8  # to pack and to store a vector of channels
PLANE_TAP_CYCLES = 0.8  # a load that crosses cache lines, and its FMA; with stride 2 twice as long


class PlaneTile(NamedTuple):
    """A strip of a plane, `vectors` vectors wide, read in place, or two planes of few columns in one vector.

    The filter's extents are compiled in.
    """

    rows: int
    vectors: int

    def __str__(self) -> str:
        return f"plane{self.vectors}"


AnyTile = PlaneTile | RowsTile | Tile
TILES = (PlaneTile(1, 2), RowsTile(6, 2), RowsTile(7, 2), Tile(1, 8), Tile(1, 4), Tile(2, 4))


class Geometry(NamedTuple):
    """The sizes of a depthwise convolution of planes; C is that of the whole input."""

    C: int
    multiplier: int  # output channels of each input channel
    H: int
    W: int
    P: int
    Q: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int


def cost(problem: ConvProblem, tile: AnyTile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    lanes = device.lanes(problem.compute_dtype)
    planes = _plan_planes(problem, tile, device)
    if isinstance(tile, PlaneTile) and planes is None:
        return float("inf")
    if _by_channels(problem):
        vectors = problem.N * problem.O * problem.P * problem.Q * -(-problem.C // lanes)
        return device.seconds(problem, vectors * (problem.gemm_k + PIXEL_CYCLES + TILE_CYCLES / tile.vectors))
    if isinstance(tile, RowsTile):
        return depthwise_rows.cost(problem, tile, device)
    if planes is None:
        return band.cost(problem, _packed_tile(tile), device, device.l1 // 2, aligned=True)  # as others count
    vectors, together = -(-problem.Q // lanes), planes[0].rows
    taps = problem.gemm_k * problem.stride[2] * vectors * PLANE_TAP_CYCLES
    return device.seconds(problem, problem.N * problem.K / together * (TILE_CYCLES + problem.P * taps))


def workspace(problem: ConvProblem, tile: AnyTile, device: Device) -> int:
    """Return the bytes of packed input that all threads hold; a plane tile packs only strided rows."""
    if isinstance(tile, RowsTile) and depthwise_rows.is_for(problem, tile):
        return depthwise_rows.workspace(problem, tile, device)
    if _by_channels(problem):
        return band_last.workspace(problem, _channel_block(problem, tile, device), device)
    block = band.make_block(problem, _packed_tile(tile), device)
    return band.workspace(problem, block, device.l1 // 2)


def prepare(problem: ConvProblem, tile: AnyTile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the weight as the kernel reads it: as it is, or packed for vectors of channels."""
    if _by_channels(problem):
        return band_last.prepare(problem, _channel_block(problem, tile, device), weight)
    return np.ascontiguousarray(weight)


def run(problem: ConvProblem, tile: AnyTile, device: Device, operands: Operands) -> None:
    """Convolve; the weight is prepared or as given."""
    x, out = operands.x, operands.out
    if _by_channels(problem):
        band_last.run(problem, _channel_block(problem, tile, device), device, operands)
        return
    if isinstance(tile, RowsTile) and depthwise_rows.is_for(problem, tile):
        depthwise_rows.run(problem, tile, device, operands)
        return
    planes = _plan_planes(problem, tile, device) if band.columns_touch(x, out) else None
    if planes is not None:
        _run_in_place(problem, *planes, operands)
        return
    block = band.make_block(problem, _packed_tile(tile), device)
    geometry, tables = band.plan_bands(problem, block, device.l1 // 2, band.task_threads(problem))
    band.run(problem, block, geometry, tables, operands)


def reads_planes(problem: ConvProblem) -> bool:
    """Say whether planes can be read in place: a step that `convolve_plane` knows, few taps to unroll."""
    flat = problem.T == problem.D == 1 and problem.padding[0] == (0, 0)
    columns = sum(problem.padding[2]) + problem.W + problem.S * problem.dilation[2]
    small = problem.gemm_k <= MOST_TAPS and columns < 1 << 30  # they are counted in 32 bits
    step = problem.stride[2] == 1 or (problem.stride[2], problem.dilation[2]) == (2, 1)
    return problem.order == "NCHW" and flat and small and step


def _packed_tile(tile: AnyTile) -> Tile:
    """Return the tile for a packed band or for channels, in place of one that does not suit the problem."""
    return tile if isinstance(tile, Tile) else Tile(1, tile.vectors)


def _by_channels(problem: ConvProblem) -> bool:
    """Say whether vectors run over channels: channels last, one filter per channel."""
    return problem.order == "NHWC" and problem.K == problem.C


@lru_cache(maxsize=256)
def _channel_block(problem: ConvProblem, tile: AnyTile, device: Device) -> Block:
    """Return the tile turned: `vectors` pixels, each `rows` vectors of channels wide."""
    dtype, packed = problem.compute_dtype, _packed_tile(tile)
    return Block(dtype, packed.vectors, packed.rows, device.lanes(dtype), "elementwise")


@lru_cache(maxsize=256, typed=True)  # tiles of two classes may hold the same numbers
def _plan_planes(problem: ConvProblem, tile: AnyTile, device: Device) -> tuple[Block, Geometry] | None:
    """Return how planes are read in place, or None where they cannot be or this tile is none for them."""
    if not isinstance(tile, PlaneTile) or not reads_planes(problem):
        return None
    dtype = problem.compute_dtype
    block = Block(
        dtype, tile.rows, tile.vectors, device.lanes(dtype), "plane", step=problem.stride[2],
        extents=(problem.R, problem.S),
        rolling=_is_rolling(problem, MOST_ROLLING_ROWS[device.registers]),
    )  # fmt: skip
    if fits_pairs(block, problem.Q) and problem.K == problem.C and problem.C % 2 == 0:
        block = replace(block, rows=2, vectors=1)
    return block, make_geometry(problem)


def _is_rolling(problem: ConvProblem, most: int) -> bool:
    """Say whether rows of the input serve several rows of outputs, of which `most` are made at a time."""
    stride, dilation = problem.stride[1:], problem.dilation[1]
    return stride[0] == stride[1] and dilation == 1 < problem.R and (problem.R - 1) // stride[0] < most


def make_geometry(problem: ConvProblem) -> Geometry:
    """Return the sizes of a convolution that `reads_planes`."""
    return Geometry(
        problem.C, problem.K // problem.C, problem.H, problem.W, problem.P, problem.Q, *problem.stride[1:],
        *problem.padding_before[1:], *problem.dilation[1:],
    )  # fmt: skip


def _run_in_place(problem: ConvProblem, block: Block, g: Geometry, operands: Operands) -> None:
    """Convolve plane by plane."""
    _run_planes(
        block, problem.N * problem.K // block.rows, band.task_threads(problem), g,
        *band.arguments_of(problem, operands, 0),
    )  # fmt: skip


@Kernel
def _run_planes(block, first, last, g, x, w, bias, y, ending):
    x, w, bias, y = view_of(x), table(w), table(bias), view_of(y)
    R, S = block_extents(block)
    lanes, width = block_lanes(block), block_columns(block)
    planes = block_rows(block)
    for task in range(first, last):
        n, k = divmod(task * planes, g.C * g.multiplier)
        plane = locate(block, x, (n, k // g.multiplier, 0, 0, 0))
        target = locate(block, y, (n, k, 0, 0, 0))
        for q in range(0, g.Q, width):
            count = min(width, g.Q - q)
            convolve_plane(
                block, (count + lanes - 1) // lanes, plane, x[4], g.H, g.W, q * g.stride_w - g.pad_w,
                g.dilation_w, advance(w, k * R * S), -g.pad_h, g.stride_h, g.dilation_h,
                advance(bias, k), advance(target, q), y[4], g.P, count, x[2], y[2],
            )  # fmt: skip
        finish(block, y, (n, k, 0, 0, 0), (planes, g.P, g.Q), ending)
