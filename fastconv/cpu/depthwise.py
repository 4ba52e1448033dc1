"""Depthwise convolution: every input channel has its own filters, so nothing is shared and little is computed.

Three ways: "plane" tiles read the input where it lies, with masked vectors at the borders (small kernels, where
packing would cost more than the convolution); "1x8" and its like pack a band of one channel into L1 (large
kernels, any stride); channels last, vectors run over channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu import band, band_last, threads
from fastconv.cpu.band import finish
from fastconv.cpu.device import TILE_CYCLES, itemsize
from fastconv.cpu.simd import (
    Block,
    Kernel,
    Tile,
    advance,
    block_columns,
    block_extents,
    block_lanes,
    convolve_plane,
    pointer,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Epilogue


MOST_TAPS = 49  # 7 x 7
PIXEL_CYCLES = 8  # to pack and to store a vector of channels
PLANE_TAP_CYCLES = 1.3  # a load that crosses cache lines, and its FMA


class PlaneTile(NamedTuple):
    """A strip of a plane, `vectors` vectors wide, read in place; the kernel's extents are compiled in."""

    rows: int
    vectors: int

    def __str__(self) -> str:
        return f"plane{self.vectors}"


TILES = (PlaneTile(1, 2), Tile(1, 8), Tile(1, 4), Tile(2, 4))


class Geometry(NamedTuple):
    """The sizes of a depthwise convolution of planes."""

    C: int
    multiplier: int
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


def cost(problem: ConvProblem, tile: PlaneTile | Tile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    lanes = device.lanes(problem.compute_dtype)
    if isinstance(tile, PlaneTile) and not _reads_planes(problem):
        return float("inf")
    if _by_channels(problem):
        vectors = problem.N * problem.O * problem.P * problem.Q * -(-problem.C // lanes)
        return device.seconds(problem, vectors * (problem.gemm_k + PIXEL_CYCLES + TILE_CYCLES / tile.vectors))
    if not isinstance(tile, PlaneTile):
        return band.cost(problem, tile, device, device.l1 // 2)
    vectors = -(-problem.Q // lanes)
    taps = problem.gemm_k * problem.stride[2] * vectors * PLANE_TAP_CYCLES
    return device.seconds(problem, problem.N * problem.K * (TILE_CYCLES + problem.P * taps))


def workspace(problem: ConvProblem, tile: PlaneTile | Tile, device: Device) -> int:
    """Return the bytes of packed input that all threads hold together."""
    tile = _packed_tile(problem, tile)
    workers = threads.thread_count()
    if isinstance(tile, PlaneTile):
        return 0
    if _by_channels(problem):
        g = band_last.plan_bands(problem, _channel_block(problem, tile, device), device.l1 // 2, workers)
        return itemsize(problem) * (workers * band_last.band_elements(g) + problem.parameters)
    bands = band.plan_bands(problem, tile, device.l1 // 2, workers)
    return workers * itemsize(problem) * band.band_elements(*bands)


def prepare(problem: ConvProblem, tile: PlaneTile | Tile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the weight as the kernel reads it: as it is, or packed for vectors of channels."""
    if _by_channels(problem):
        return band_last.prepare(problem, _channel_block(problem, _packed_tile(problem, tile), device), weight)
    return np.ascontiguousarray(weight)


def run(
    problem: ConvProblem,
    tile: PlaneTile | Tile,
    device: Device,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    epilogue: Epilogue,
    out: np.ndarray,
) -> None:
    """Convolve x with a weight, prepared or as given, into out; all of rank 5."""
    tile = _packed_tile(problem, tile)
    arrays = (x, weight, bias, residual, epilogue, out)
    if _by_channels(problem):
        band_last.run(problem, _channel_block(problem, tile, device), device, *arrays)
        return
    if isinstance(tile, PlaneTile) and x.strides[4] == x.itemsize == out.strides[4]:
        _run_in_place(problem, tile, device, *arrays)
        return
    tile = _packed_tile(problem, tile, always=True)
    dtype = problem.compute_dtype
    block = Block(dtype, tile.rows, tile.vectors, device.lanes(dtype))
    geometry, tables = band.plan_bands(problem, tile, device.l1 // 2, band.task_threads(problem))
    band.run(problem, block, geometry, tables, x, np.ascontiguousarray(weight), bias, residual, epilogue, out)


def _reads_planes(problem: ConvProblem) -> bool:
    """Say whether planes can be read in place: a step the kernel knows, few enough taps to unroll."""
    flat = problem.T == problem.D == 1 and problem.padding[0] == (0, 0)
    small = problem.gemm_k <= MOST_TAPS and problem.W < 1 << 30  # columns are counted in 32 bits
    step = problem.stride[2] == 1 or (problem.stride[2], problem.dilation[2]) == (2, 1)
    return problem.order == "NCHW" and flat and small and step


def _packed_tile(problem: ConvProblem, tile: PlaneTile | Tile, always: bool = False) -> PlaneTile | Tile:
    """Return the tile for a packed band in place of one for rows that cannot be read in place."""
    return Tile(1, tile.vectors) if always or not _reads_planes(problem) else tile


def _by_channels(problem: ConvProblem) -> bool:
    """Say whether vectors run over channels: channels last, one filter per channel."""
    return problem.order == "NHWC" and problem.K == problem.C


def _channel_block(problem: ConvProblem, tile: Tile, device: Device) -> Block:
    """Return the tile turned: `vectors` pixels, each `rows` vectors of channels wide."""
    dtype = problem.compute_dtype
    return Block(dtype, tile.vectors, tile.rows, device.lanes(dtype), "elementwise")


def _run_in_place(
    problem: ConvProblem,
    tile: PlaneTile,
    device: Device,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    epilogue: Epilogue,
    out: np.ndarray,
) -> None:
    dtype = problem.compute_dtype
    block = Block(
        dtype, 1, tile.vectors, device.lanes(dtype), "plane", step=problem.stride[2],
        extents=(problem.R, problem.S), rolling=problem.stride[1] == problem.dilation[1] == 1 < problem.R <= 5,
    )  # fmt: skip
    g = Geometry(
        problem.C, problem.K // problem.C, problem.H, problem.W, problem.P, problem.Q, *problem.stride[1:],
        problem.padding[1][0], problem.padding[2][0], *problem.dilation[1:],
    )  # fmt: skip
    weight, bias_rows = np.ascontiguousarray(weight), band.padded_bias(problem, bias, 0)
    views = band.view(x), band.view(weight)[0], band.view(bias_rows)[0], band.view(out)
    arguments = band.finish_arguments(residual, epilogue)

    def work(first: int, last: int) -> None:
        _run_planes(block, first, last, g, *views, *arguments)

    threads.run_tasks(work, problem.N * problem.K, band.task_threads(problem))


@Kernel
def _run_planes(block, first, last, g, x, w, bias, y, residual, activation, slope):
    R, S = block_extents(block)
    lanes, width = block_lanes(block), block_columns(block)
    for task in range(first, last):
        n, k = divmod(task, g.C * g.multiplier)
        plane = advance(pointer(block, x[0]), n * x[1] + k // g.multiplier * x[2])
        target = advance(pointer(block, y[0]), n * y[1] + k * y[2])
        for q in range(0, g.Q, width):
            count = min(width, g.Q - q)
            convolve_plane(
                block, (count + lanes - 1) // lanes, plane, x[4], g.H, g.W, q * g.stride_w - g.pad_w,
                g.dilation_w, advance(pointer(block, w), k * R * S), -g.pad_h, g.stride_h, g.dilation_h,
                advance(pointer(block, bias), k), advance(target, q), y[4], g.P, count,
            )  # fmt: skip
        if residual[0] != 0 or activation != 0:
            r = residual
            more = advance(pointer(block, r[0]), n * r[1] + k * r[2])
            steps, more_steps = (y[2], y[4], y[5]), (r[2], r[4], r[5])
            finish(target, steps, more, more_steps, r[0] != 0, (1, g.P, g.Q), activation, slope)
