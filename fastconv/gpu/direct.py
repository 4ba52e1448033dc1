"""Convolution by its definition: a patch of the input in shared memory serves all taps of the filter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.gpu import product
from fastconv.gpu.product import Call

if TYPE_CHECKING:
    from fastconv.gpu.hardware import Device
    from fastconv.gpu.source import Kernel
    from fastconv.problem import ConvProblem, Operands


@dataclass(frozen=True)
class PatchTile(product.Tile):
    """A tile whose pixels are block_p rows of block_q."""

    block_p: int = 0
    block_q: int = 0

    @property
    def is_for_few(self) -> bool:
        """Whether the tile is for groups of few output channels."""
        return self.block_m == 8

    @property
    def bits(self) -> bool:
        """What decides the order in which a sum's terms are added."""
        return self.is_for_few

    @property
    def packing(self) -> bool:
        """What of the tile decides how a weight is packed."""
        return self.is_for_few

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_p}x{self.block_q}"


TILES = (
    PatchTile(8, 512, block_p=16, block_q=32),
    *(PatchTile(m, p * q, block_p=p, block_q=q) for m in (64, 32) for p, q in ((1, 128), (4, 32), (8, 8))),
)

# kRows and kPatch of kernels/direct.cu, in bytes; a row is of 64 output channels.
ROW_BYTES = 16384
PATCH_BYTES = 24576

# Filter widths and strides for which inputs of a row of taps stay in registers: FILTER_S and STRIDE_W.
WINDOWS = ((3, 1), (3, 2), (5, 1), (7, 2))

# Of the peak; the main loops' shares of multiply-adds are 0.87 to 0.93 with windows, 0.67 to 0.74 without.
WINDOW_EFFICIENCY = 0.75
EFFICIENCY = 0.5
LOAD_CYCLES = 40  # to find an element of a patch, load and store it


class Stage(NamedTuple):
    """What shared memory holds at a time: `channels` channels at taps_r x taps_s taps."""

    channels: int
    taps_r: int
    taps_s: int

    @property
    def terms(self) -> int:
        return self.channels * self.taps_r * self.taps_s


def cost(problem: ConvProblem, tile: PatchTile, device: Device) -> float:
    """Return the estimated seconds."""
    stage = _stage(problem, tile.is_for_few)
    efficiency = WINDOW_EFFICIENCY if any(_window(problem, stage)) else EFFICIENCY
    blocks = _blocks(problem, tile)
    per_sm = -(-blocks // device.processors)
    rate = product.sm_rate(problem, device, min(per_sm, tile.resident) * tile.threads) * efficiency
    arithmetic = per_sm * problem.gemm_k * 2 * tile.block_m * tile.block_n / rate
    stages = -(-problem.gemm_k // stage.terms)
    loads = stages * stage.channels * _area(problem, stage, tile) * LOAD_CYCLES / (128 * device.clock)
    return max(arithmetic + per_sm * loads, problem.bytes / device.bandwidth) + product.LAUNCH


def workspace(problem: ConvProblem, tile: PatchTile, device: Device) -> int:
    """Return the bytes of the packed weight."""
    return product.packed_bytes(
        problem, product.packed_rows(problem, _stage(problem, tile.is_for_few).channels)
    )


def prepare(problem: ConvProblem, tile: PatchTile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the packed weight."""
    channels = _stage(problem, tile.is_for_few).channels
    return product.pack("direct", problem, weight, channels, product.packed_rows(problem, channels))


def run(problem: ConvProblem, tile: PatchTile, device: Device, operands: Operands) -> None:
    """Convolve; the weight is prepared or as given."""
    packed = prepare(problem, tile, device, operands.weight)
    call = Call("direct", problem, operands)
    stage, blocks = _stage(problem, tile.is_for_few), _blocks(problem, tile)
    defines = {**_defines(tile, _window(problem, stage)), **call.output}
    behind = max(tile.block_p * problem.stride[1], tile.block_q * problem.stride[2])  # the last pixels
    largest = max(packed.size, blocks, call.reach + behind)
    call.launch(
        "CONVOLVE", blocks, tile.threads, defines, largest, x=operands.x, packed=packed,
        channels=stage.channels, taps_r=stage.taps_r, taps_s=stage.taps_s, **call.ends,
    )  # fmt: skip


def kernels(dtype: str, order: str, tile: PatchTile) -> list[Kernel]:
    """Return the kernels of a tile: each kind of loads with plain output, and some with other outputs."""
    variants = [_defines(tile, window) for window in (*WINDOWS, (0, 0))]
    return [
        product.stage_kernel("direct", "PACK", dtype, {}, product.THREADS, "int"),
        *product.variants("direct", "CONVOLVE", dtype, order, tile, variants),
    ]


def _defines(tile: PatchTile, window: tuple[int, int]) -> dict[str, int]:
    tiles = {"BLOCK_M": tile.block_m, "BLOCK_P": tile.block_p, "BLOCK_Q": tile.block_q}
    return {**tiles, "FILTER_S": window[0], "STRIDE_W": window[1]}


def _blocks(problem: ConvProblem, tile: PatchTile) -> int:
    patches = -(-problem.P // tile.block_p) * -(-problem.Q // tile.block_q)
    return problem.N * problem.O * problem.groups * patches * -(-problem.gemm_m // tile.block_m)


@lru_cache(maxsize=4096)
def _stage(problem: ConvProblem, is_for_few: bool) -> Stage:
    """Return the largest stage that fits with every such tile, so that all add the terms in one order."""
    tiles = [tile for tile in TILES if tile.is_for_few == is_for_few]
    item = product.accumulator(problem).itemsize
    taps = (problem.R, problem.S)
    for shared in (taps, (1, problem.S), (1, 1)):
        area = max(_area(problem, Stage(1, *shared), tile) for tile in tiles)
        channels = min(ROW_BYTES // (64 * item) // math.prod(shared), PATCH_BYTES // item // area)
        if channels:
            break
    return Stage(min(channels, problem.C // problem.groups), *shared)


def _area(problem: ConvProblem, stage: Stage, tile: PatchTile) -> int:
    """Return the elements of a patch of one channel: rows times their pitch, as in kernels/direct.cu."""
    rows = _extent(tile.block_p, stage.taps_r, problem.stride[1], problem.dilation[1])
    columns = _extent(tile.block_q, stage.taps_s, problem.stride[2], problem.dilation[2])
    return rows * -(-columns // 4) * 4


def _extent(pixels: int, taps: int, stride: int, dilation: int) -> int:
    return pixels if taps == 1 else (pixels - 1) * stride + (taps - 1) * dilation + 1


def _window(problem: ConvProblem, stage: Stage) -> tuple[int, int]:
    """Return filter width and stride if there is a kernel for just these, else zeros."""
    found = (problem.S, problem.stride[2])
    fits = found in WINDOWS and stage.taps_s == problem.S and problem.dilation[2] == 1
    return found if fits else (0, 0)
