"""1x1 convolution: a matrix product of the weight and the pixels, read where they lie.

Where planes end within a vector, those of a batch share vectors: 16 planes of 7 x 7 pixels are three vectors
each and one of all their last pixels, 49 in all and not 64. That one is packed, as `direct` packs its bands.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fastconv.cpu import band, direct
from fastconv.cpu.simd import Block, Tile

if TYPE_CHECKING:
    from fastconv.cpu.band import Geometry, Tables
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

TILES = direct.TILES


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    if problem.order == "NHWC" or not band.reads_same_pixels(problem):
        return direct.cost(problem, tile, device)
    return _cost_of_parts(*_divide(problem, tile, device), tile, device)


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes that are packed of planes that do not lie in one piece, or of their last pixels."""
    _, shared = _divide(problem, tile, device)
    whole = direct.workspace(problem, tile, device)
    return whole if shared is None else max(whole, direct.workspace(shared, tile, device))


prepare = direct.prepare


def run(problem: ConvProblem, tile: Tile, device: Device, operands: Operands) -> None:
    """Convolve; the weight is prepared or as given."""
    flat = band.as_rows(problem, operands) if problem.order == "NCHW" else None
    if flat is None:
        direct.run(problem, tile, device, operands)
        return
    workers, step = band.task_threads(problem), operands.x.strides[1] // operands.x.itemsize
    rows, plan, shared = _plan_in_place(problem, tile, device, step, workers)
    first = flat if shared is None else band.with_views(flat, lambda array: array[..., : rows.W])
    if plan is None:
        direct.run(rows, tile, device, first)
    else:
        band.run(rows, *plan, first)
    if shared is not None:
        last = band.with_views(flat, lambda array: array[..., rows.W :].transpose(3, 1, 2, 0, 4))
        direct.run(shared, tile, device, last)


@lru_cache(maxsize=256)
def _divide(problem: ConvProblem, tile: Tile, device: Device) -> tuple[ConvProblem, ConvProblem | None]:
    """Return the problem of what is read in place, as planes of one row, and that of what shares vectors.

    The latter, if any, is one image with a row for the last pixels of each plane.
    """
    rows = band.flatten(problem)
    pixels = rows.W
    rest = pixels % device.lanes(problem.compute_dtype)
    reads_rows = problem.order == "NCHW" and band.reads_same_pixels(problem)
    if not reads_rows or problem.N == 1 or problem.D > 1 or rest in (0, pixels):
        return rows, None
    parts = replace(rows, W=pixels - rest), replace(problem, N=1, H=problem.N, W=rest)
    is_faster = _cost_of_parts(*parts, tile, device) < _cost_of_parts(rows, None, tile, device)
    return parts if is_faster else (rows, None)


def _cost_of_parts(rows: ConvProblem, shared: ConvProblem | None, tile: Tile, device: Device) -> float:
    """Return the estimated seconds of a division."""
    dtype, pixels, tiles = rows.compute_dtype, rows.W, 1
    lanes = device.lanes(dtype)
    if pixels % lanes and lanes < pixels < tile.vectors * lanes:  # two tiles that overlap, within the input
        tiles, pixels = 2, math.ceil(pixels / lanes / 2) * lanes
    cycles = tiles * device.multiply_cycles(tile, rows.gemm_m, pixels, rows.gemm_k, dtype, aligned=False)
    seconds = device.seconds(rows, rows.N * rows.groups * rows.O * cycles)
    return seconds if shared is None else seconds + direct.cost(shared, tile, device)


@lru_cache(maxsize=256)
def _plan_in_place(
    problem: ConvProblem, tile: Tile, device: Device, channel_step: int, workers: int
) -> tuple[ConvProblem, tuple[Block, Geometry, Tables] | None, ConvProblem | None]:
    """Return the parts of a problem and, between them, how planes are read in place, if they can be."""
    rows, shared = _divide(problem, tile, device)
    block = band.make_block(rows, tile, device)
    geometry, tables = band.plan_bands(rows, block, device.l2 // 2, workers)
    last_band = rows.W - (geometry.col_bands - 1) * geometry.cols
    if last_band < block.lanes:  # less than a vector: it would be read past its end
        return rows, None, shared
    channels = np.arange(geometry.C) * channel_step
    return rows, (block, geometry._replace(in_place=1), tables._replace(b_taps=channels)), shared
