"""Gradient of the weight by its definition: what a strip of pixels sees of x is loaded once for all taps."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from fastconv.gpu import product
from fastconv.gpu.depthwise import LANES, PATCH_LOAD, SECTOR
from fastconv.gpu.grad_weight import outer
from fastconv.gpu.product import Tile

if TYPE_CHECKING:
    from fastconv.gpu.hardware import Device
    from fastconv.gpu.source import Kernel
    from fastconv.problem import ConvProblem, Operands

TILES = (Tile(64, 128), *(Tile(m, n, is_for_double=False) for m, n in ((64, 64), (32, 128), (32, 64))))

# kPixels, by 64 channels, and kPatch of kernels/direct.cu, in bytes.
PIXEL_BYTES = 16384
PATCH_BYTES = 16384

EFFICIENCY = 0.7  # of the peak, what the multiply-adds of the main loop reach
PIXEL_LOAD = 6  # instructions to load a gradient and store it
BARRIER = 200  # instructions that a thread could do while it waits for the others, before and after its loads
NARROWEST = 8  # columns of a strip, if there are so many: a sector of float32


class Strip(NamedTuple):
    """What shared memory holds at a time: height x width pixels, taps_r x taps_s taps of each plane of x.

    patches  elements of all planes
    """

    height: int
    width: int
    taps_r: int
    taps_s: int
    patches: int


class Division(NamedTuple):
    """How a gradient is divided among blocks.

    strips  of pixels, that are in all
    parts   that a sum consists of
    blocks  of the stage WEIGHT
    """

    strips: int
    parts: int
    blocks: int


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds."""
    strip, d = _strip(problem, tile), _divide(problem, tile, device)
    per_sm = -(-d.blocks // device.processors)
    rate = product.sm_rate(problem, device, min(per_sm, tile.resident) * tile.threads) * EFFICIENCY
    pixels = strip.height * strip.width
    arithmetic = problem.gemm_n / d.parts * tile.block_m * tile.block_n * 2 / rate
    arithmetic += d.strips / d.parts * _loads(tile, strip) / (LANES * device.clock)
    spread = 1.0 if problem.order == "NCHW" else SECTOR / problem.itemsize / 4
    loaded = d.blocks * d.strips / d.parts * (strip.patches + pixels * tile.block_m) * problem.itemsize
    moved = (problem.bytes + spread * loaded / product.L2_SPEEDUP) / device.bandwidth
    return max(per_sm * arithmetic, moved) + outer.add_seconds(problem, d.parts, device) + product.LAUNCH


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes of the parts' sums."""
    return outer.workspace(problem, _divide(problem, tile, device).parts)


def run(problem: ConvProblem, tile: Tile, device: Device, operands: Operands) -> None:
    """Compute the gradient; operands.weight is that of the output."""
    strip, d = _strip(problem, tile), _divide(problem, tile, device)
    call = outer.Call("direct", problem, operands, order="NCHW")
    # Rows and columns of a strip behind the last ones, or taps of a plane, are loaded with the others.
    behind = max(strip.height * problem.stride[1], strip.width * problem.stride[2])
    counted = max(d.strips, problem.parameters, problem.gemm_m + tile.block_m, problem.gemm_k + tile.block_n)
    call.run(
        d.blocks, tile.threads, _defines(tile), d.parts, max(call.reach + behind, counted), strips=d.strips,
        height=strip.height, width=strip.width, taps_r=strip.taps_r, taps_s=strip.taps_s,
    )  # fmt: skip


def kernels(dtype: str, order: str, tile: Tile) -> list[Kernel]:
    """Return the kernels of a tile: those of NCHW serve NHWC too."""
    threads, kinds = tile.threads, ("int", "long long")
    defines = {**_defines(tile), "ORDER": "NCHW"}
    found = [product.stage_kernel("direct", "WEIGHT", dtype, defines, threads, index) for index in kinds]
    return [*found, outer.add_kernel("direct", dtype, "NCHW")]


def _defines(tile: Tile) -> dict[str, Any]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}


@lru_cache(maxsize=4096)
def _divide(problem: ConvProblem, tile: Tile, device: Device) -> Division:
    strip = _strip(problem, tile)
    strips = problem.N * problem.O * _count_strips(problem, strip)
    parts = min(strips, outer.count_parts(problem, device))
    return Division(strips, parts, parts * outer.count_tiles(problem, tile.block_m, tile.block_n))


@lru_cache(maxsize=4096)
def _strip(problem: ConvProblem, tile: Tile) -> Strip:
    """Return the strip that loads least per pixel, with all taps of a plane if that is possible."""
    item = product.accumulator(problem).itemsize
    pixels, room = PIXEL_BYTES // 64 // item, PATCH_BYTES // item
    narrowest = min(NARROWEST, problem.Q)
    widths = {_even_share(problem.Q, most) for most in range(narrowest, min(pixels, problem.Q) + 1)}
    sizes = [
        (height, width)
        for width in widths
        for height in range(1, min(pixels // width, problem.P) + 1)
        if width >= narrowest
    ]
    for taps in ((problem.R, problem.S), (1, problem.S), (1, 1)):
        strips = (_make_strip(problem, tile, *size, taps) for size in sizes)
        fitting = [strip for strip in strips if strip.patches <= room]
        if fitting:
            break
    return min(fitting, key=lambda strip: _count_strips(problem, strip) * _loads(tile, strip))


def _even_share(size: int, most: int) -> int:
    """Return the size of equal shares of at most so much."""
    return -(-size // -(-size // most))


def _count_strips(problem: ConvProblem, strip: Strip) -> int:
    """Return the strips of a plane of y."""
    return -(-problem.P // strip.height) * -(-problem.Q // strip.width)


def _loads(tile: Tile, strip: Strip) -> int:
    """Return the instructions to load a strip."""
    pixels = strip.height * strip.width * tile.block_m * PIXEL_LOAD
    return strip.patches * PATCH_LOAD + pixels + BARRIER * tile.threads


def _make_strip(problem: ConvProblem, tile: Tile, height: int, width: int, taps: tuple[int, int]) -> Strip:
    together, all_taps = math.prod(taps), math.prod(problem.weight_shape5[2:])
    planes = min((tile.block_n - 2) // together + 2, problem.C // problem.groups * all_taps // together)
    rows = _extent(height, taps[0], problem.stride[1], problem.dilation[1])
    columns = _extent(width, taps[1], problem.stride[2], problem.dilation[2])
    return Strip(height, width, *taps, min(planes, tile.block_n) * rows * columns)


def _extent(pixels: int, taps: int, stride: int, dilation: int) -> int:
    """Return the elements along an axis of a patch: struct Axis of kernels/patch.cuh."""
    return pixels if taps == 1 else (pixels - 1) * stride + (taps - 1) * dilation + 1
