"""Gradient of the weight of a depthwise convolution: blocks read the planes that they have in common once.

A thread sums the taps of a filter in registers, or of a block of it, over the pixels that are its own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from fastconv.gpu import depthwise, product
from fastconv.gpu.depthwise import KNOWN, PLANE_TILES, SHARED, Filter, PlaneTile
from fastconv.gpu.grad_weight import outer

if TYPE_CHECKING:
    from fastconv.gpu.hardware import Device
    from fastconv.gpu.source import Kernel
    from fastconv.problem import ConvProblem, Operands

# In float64 the patches of 32 channels do not fit shared memory.
TILES = tuple(replace(tile, is_for_double=tile.block_m < 32) for tile in PLANE_TILES)

MOST_TAPS = {4: 49, 8: 25}  # whose sums lie in registers, by the bytes of a sum
BLOCKS = 6  # that each SM shall have at least
EFFICIENCY = 0.5  # of the peak, what the multiply-adds of the main loop reach


class Division(NamedTuple):
    """How a gradient is divided among blocks.

    filter   the taps whose sums a thread has, with stride and dilation
    sums     blocks of channels and taps
    tiles    of outputs, that all of these add up
    parts    that a sum consists of
    """

    filter: Filter
    sums: int
    tiles: int
    parts: int


def cost(problem: ConvProblem, tile: PlaneTile, device: Device) -> float:
    """Return the estimated seconds."""
    d = _divide(problem, tile, device)
    blocks = d.sums * d.parts
    loads = tile.block_m * (depthwise.patch_size(tile, d.filter) + tile.block_n)
    outputs = tile.block_m * tile.block_n
    per_sm = -(-blocks // device.processors)
    tiles = d.tiles / d.parts
    rate = product.sm_rate(problem, device, min(per_sm, BLOCKS) * tile.threads) * EFFICIENCY
    arithmetic = outputs * d.filter.taps * 2 / rate
    arithmetic += loads * depthwise.PATCH_LOAD / (depthwise.LANES * device.clock)
    passed = d.sums * d.tiles * loads * problem.itemsize / product.L2_SPEEDUP
    pair = per_sm * tiles * arithmetic, max(problem.bytes, passed) / device.bandwidth
    added = outer.add_seconds(problem, d.parts, device)
    return max(pair) + min(pair) * depthwise.NOT_HIDDEN + added + product.LAUNCH


def workspace(problem: ConvProblem, tile: PlaneTile, device: Device) -> int:
    """Return the bytes of the parts' sums."""
    return outer.workspace(problem, _divide(problem, tile, device).parts)


def run(problem: ConvProblem, tile: PlaneTile, device: Device, operands: Operands) -> None:
    """Compute the gradient; operands.weight is that of the output."""
    d = _divide(problem, tile, device)
    behind = max(tile.block_p * problem.stride[1], tile.block_q * problem.stride[2], tile.block_m)
    behind += max(d.filter.FILTER_R * problem.dilation[1], d.filter.FILTER_S * problem.dilation[2])
    call = outer.Call("depthwise", problem, operands)
    largest = max(call.reach + behind, d.sums * d.tiles, problem.parameters)
    call.run(d.sums * d.parts, tile.threads, _defines(tile, d.filter), d.parts, largest, tiles=d.tiles)


def kernels(dtype: str, order: str, tile: PlaneTile) -> list[Kernel]:
    """Return kernels that stand for all of a tile."""
    itemsize = 8 if dtype == "float64" else 4
    found = [_defines(tile, filter) for filter in KNOWN if _fits(tile, filter, itemsize)]
    pairs = [(defines, "int") for defines in found] + [(found[0], "long long")]
    return [
        *(
            product.stage_kernel(
                "depthwise", "WEIGHT", dtype, {**defines, "ORDER": order}, tile.threads, index
            )
            for defines, index in pairs
        ),
        outer.add_kernel("depthwise", dtype, order),
    ]


def _defines(tile: PlaneTile, filter: Filter) -> dict[str, int]:
    sizes = {"BLOCK_C": tile.block_m, "BLOCK_P": tile.block_p, "BLOCK_Q": tile.block_q, "ROWS": tile.rows}
    return {**sizes, **filter._asdict()}


@lru_cache(maxsize=4096)
def _divide(problem: ConvProblem, tile: PlaneTile, device: Device) -> Division:
    filter = _taps_at_a_time(problem, tile)
    blocks = problem.T * -(-problem.R // filter.FILTER_R) * -(-problem.S // filter.FILTER_S)
    sums = blocks * -(-problem.K // tile.block_m)
    tiles = problem.N * problem.O * -(-problem.P // tile.block_p) * -(-problem.Q // tile.block_q)
    return Division(filter, sums, tiles, min(tiles, -(-BLOCKS * device.processors // sums)))


def _taps_at_a_time(problem: ConvProblem, tile: PlaneTile) -> Filter:
    """Return the block of taps that takes the fewest blocks; of several the smallest one."""
    itemsize = product.accumulator(problem).itemsize
    whole = Filter(problem.R, problem.S, *problem.stride[1:], *problem.dilation[1:])
    most = MOST_TAPS[itemsize]
    sizes = [(r, s) for r in range(1, min(problem.R, most) + 1) for s in range(1, min(problem.S, most) + 1)]
    filters = (whole._replace(FILTER_R=r, FILTER_S=s) for r, s in sizes)
    fitting = [filter for filter in filters if _fits(tile, filter, itemsize)]
    return min(fitting, key=lambda f: (-(-problem.R // f.FILTER_R) * -(-problem.S // f.FILTER_S), f.taps))


def _fits(tile: PlaneTile, filter: Filter, itemsize: int) -> bool:
    """Say whether sums and what a row of outputs sees fit registers, and patches shared memory."""
    height, width = filter.window(tile.rows, 4)
    window = max(height if filter.FILTER_R > 1 else 1, width if filter.FILTER_S > 1 else 1)
    size = tile.block_m * (depthwise.patch_size(tile, filter) + depthwise.patch_size(tile, Filter(1, 1)))
    return (
        filter.taps <= MOST_TAPS[itemsize]
        and window <= depthwise.MOST_WINDOW
        and size * itemsize <= SHARED[-1]
    )
