"""Winograd F(m x m, 3 x 3), m = 2 or 4: transforms and a batch of matrix products, or all in one kernel.

Filters of 2 to 5 taps in a row are transformed along that axis: F(m, 2) to F(m, 5). Those of 5 x 5 take
F(2 x 2, 5 x 5). Depth is not transformed: the planes that a window meets count as so many times the channels,
and so do the phases of a stride, as in `cpu/winograd.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv.gpu import launch, product
from fastconv.gpu.product import SLICE, THREADS, Call, Tile
from fastconv.winograd_math import Matrix, matrices

if TYPE_CHECKING:
    from fastconv.gpu.hardware import Device
    from fastconv.gpu.source import Kernel
    from fastconv.problem import ConvProblem, Operands


@dataclass(frozen=True)
class WinogradTile(Tile):
    """Tiles of m outputs along an axis; a block computes block_m output channels of block_n of them.

    is_fused  whether transforms and products are one kernel, without workspace: of 3 x 3 filters, one plane
    """

    m: int = 4
    is_fused: bool = False

    @property
    def bits(self) -> int:
        """What decides the bits of a result; F(2x2) has the same fused or not: its transforms only add."""
        return self.m

    @property
    def packing(self) -> int:
        """What of the tile decides how a weight is transformed."""
        return self.m

    def __str__(self) -> str:
        return f"f{self.m}_fused" if self.is_fused else f"f{self.m}_{super().__str__()}"


TILES = (
    WinogradTile(128, 128),
    WinogradTile(64, 64),
    WinogradTile(64, 64, m=2),
    WinogradTile(64, 32, is_for_double=False, m=2, is_fused=True),
)

_UNFUSED = WinogradTile(64, 64, m=2)  # in place of a tile that has no kernel for the filter

FUSED_THREADS = 256  # each warp sums two of sixteen places
FUSED_EFFICIENCY = 0.65  # of the peak: 0.73 of the main loop are multiply-adds, and one block fits an SM
EFFICIENCY = 0.82  # of the peak; 0.89 to 0.91 of the main loops are multiply-adds
MOST_TRANSFORMED = 32 << 20  # bytes of V and products in one turn, where half the level-2 cache is less


def cost(problem: ConvProblem, tile: WinogradTile, device: Device) -> float:
    """Return the estimated seconds."""
    if tile != _possible(problem, tile):
        return float("inf")
    tiles = _turn_tiles(problem, tile, device)
    turns = math.ceil(_tiles(problem, tile) / tiles)
    per_sm = -(-_blocks(problem, tile, tiles) // device.processors)
    work = turns * per_sm * _rows(problem) * 2 * tile.block_m * tile.block_n  # FLOP of an SM
    if tile.is_fused:
        rate = product.sm_rate(problem, device, FUSED_THREADS) * FUSED_EFFICIENCY
        return max(_places(problem, tile) * work / rate, problem.bytes / device.bandwidth) + product.LAUNCH
    rate = product.sm_rate(problem, device, min(per_sm, tile.resident) * tile.threads) * EFFICIENCY
    filters = turns * _filter_bytes(problem, tile) / device.bandwidth
    speedup = product.L2_SPEEDUP if device.l2 >= MOST_TRANSFORMED else 1.0
    transformed = 2 * turns * tiles * _tile_bytes(problem, tile) / speedup
    transforms = (problem.bytes + transformed) / device.bandwidth
    return max(work / rate, filters) + transforms + 3 * turns * product.LAUNCH


def workspace(problem: ConvProblem, tile: WinogradTile, device: Device) -> int:
    """Return the bytes of the transformed weight, and of one turn's transformed inputs and products."""
    tile = _possible(problem, tile)
    tiles = 0 if tile.is_fused else _turn_tiles(problem, tile, device)
    return _filter_bytes(problem, tile) + tiles * _tile_bytes(problem, tile)


def prepare(problem: ConvProblem, tile: WinogradTile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the transformed weight U, (places, groups * rows, pitch); itself if that was done before."""
    if weight.ndim == 3:
        return weight
    tile = _possible(problem, tile)
    rows, pitch = _rows(problem), product.pitch(problem)
    shape = (_places(problem, tile), problem.groups * rows, pitch)
    U = launch.driver().empty(shape, product.accumulator(problem))
    conv, reach = product.describe(problem, (("w", weight.strides),), 0.0)
    index = product.index_type(max(U.size, reach))
    constants = _filter_constants(problem, tile)
    kernel = product.stage_kernel("winograd", "FILTER", problem.dtype, constants, THREADS, index)
    blocks = -(-problem.groups * rows * pitch // THREADS)
    launch.launch(kernel, blocks, weight=weight, U=U, conv=conv, rows=rows, pitch=pitch)
    return U


def run(problem: ConvProblem, tile: WinogradTile, device: Device, operands: Operands) -> None:
    """Convolve; the weight is prepared or as given."""
    U = prepare(problem, tile, device, operands.weight)
    call = Call("winograd", problem, operands)
    tile = _possible(problem, tile)
    if tile.is_fused:
        _run_fused(call, tile, U)
        return
    tiles, most = _tiles(problem, tile), _turn_tiles(problem, tile, device)
    empty, dtype = launch.driver().empty, product.accumulator(problem)
    places = _places(problem, tile)
    V = empty((places, problem.groups * _rows(problem), most), dtype)
    products = empty((places, problem.K, most), dtype)
    for first in range(0, tiles, most):
        _run_turn(call, tile, U, V, products, first, min(most, tiles - first))


def _run_fused(call: Call, tile: WinogradTile, U: np.ndarray) -> None:
    tiles = _tiles(call.problem, tile)
    blocks = _blocks(call.problem, tile, tiles)
    defines = {**_constants(tile.m, 3, 3), **_fused_defines(tile), **call.output}
    call.launch(
        "FUSED", blocks, FUSED_THREADS, defines, max(U.size, tiles + tile.block_n),
        x=call.operands.x, U=U, rows=_rows(call.problem), **call.ends,
    )  # fmt: skip


def _run_turn(
    call: Call, tile: WinogradTile, U: np.ndarray, V: np.ndarray, products: np.ndarray, first: int, tiles: int
) -> None:
    """Transform inputs, multiply, and transform back, for `tiles` tiles from the first one on."""
    problem = call.problem
    constants = _filter_constants(problem, tile)
    pitch, slices = -(-tiles // 4) * 4, _rows(problem) // SLICE
    largest = max(U.size, V.size, products.size)
    each = -(-tiles // 32) * 32  # threads of a channel
    channels, order = problem.T * problem.C * _phases(problem), {"ORDER": problem.order}
    call.launch(
        "INPUT", -(-each * channels // THREADS), THREADS, {**constants, **order}, largest,
        x=call.operands.x, V=V, conv=call.conv, first=first, tiles=tiles, slices=slices,
    )  # fmt: skip
    call.launch(
        "MULTIPLY", _blocks(problem, tile, pitch), tile.threads, _product_defines(tile), largest,
        U=U, V=V, products=products, conv=call.conv, places=len(V), pitch=pitch, slices=slices,
    )  # fmt: skip
    call.launch(
        "OUTPUT", -(-each * problem.K // THREADS), THREADS, {**constants, **call.output}, largest,
        products=products, first=first, tiles=tiles, **call.ends,
    )  # fmt: skip


def kernels(dtype: str, order: str, tile: WinogradTile) -> list[Kernel]:
    """Return the kernels of a tile, as product.kernels does: for 3 x 3, and some for other filters."""
    square = _constants(tile.m, 3, 3)

    def of(stage: str, defines: dict[str, Any], threads: int = THREADS, index: str = "int") -> Kernel:
        return product.stage_kernel("winograd", stage, dtype, defines, threads, index)

    end = {"ORDER": order, "ACTIVATION": "none"}
    ends = (end, "int"), (end | {"ACTIVATION": "gelu"}, "int"), (end, "long long")
    if tile.is_fused:
        fused = square | _fused_defines(tile)
        return [of("FUSED", fused | more, FUSED_THREADS, index) for more, index in ends]
    found = [of("MULTIPLY", _product_defines(tile), tile.threads, index) for index in ("int", "long long")]
    found.append(of("INPUT", square | {"ORDER": order}, index="long long"))
    found += [of("OUTPUT", square | more, index=index) for more, index in ends[1:]]
    filters = [(3, 3, 1), (1, 5, 1), (3, 1, 1), (1, 1, 1) if tile.m == 4 else (5, 5, 1), (3, 3, 2), (7, 7, 2)]
    for R, S, stride in filters:
        constants = _constants(tile.m, R, S, (stride, stride))
        found += [
            of("FILTER", constants),
            of("INPUT", constants | {"ORDER": order}),
            of("OUTPUT", constants | end),
        ]
    return found


def _filter_constants(problem: ConvProblem, tile: WinogradTile) -> dict[str, Any]:
    _, stride_h, stride_w = problem.stride
    return _constants(tile.m, problem.R, problem.S, (stride_h, stride_w))


@lru_cache(maxsize=16)
def _constants(m: int, R: int, S: int, strides: tuple[int, int] = (1, 1)) -> dict[str, Any]:
    """Return the defines that tell the kernels m, the filter, its strides and their matrices.

    m is 1 for a filter of 1 x 1, by which a gradient of the input makes the planes that a stride leaves out.
    """
    stride_h, stride_w = strides
    taps = max(-(-R // stride_h), -(-S // stride_w))
    m = m if taps > 1 else 1
    found = matrices(m, taps)._asdict()
    texts = {f"WINOGRAD_{name}": _initializer(matrix) for name, matrix in found.items()}
    sizes = {"WINOGRAD_M": m, "FILTER_R": R, "FILTER_S": S, "STRIDE_H": stride_h, "STRIDE_W": stride_w}
    return {**sizes, **texts}


def _initializer(matrix: Matrix) -> str:
    """Return a matrix as C++ initializes it: halves as 1 / 2., so that the compiler rounds them."""
    rows = (", ".join(f"{x.numerator} / {x.denominator}." for x in row) for row in matrix)
    return f"{{{', '.join(f'{{{row}}}' for row in rows)}}}"


def _product_defines(tile: WinogradTile) -> dict[str, Any]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}


def _fused_defines(tile: WinogradTile) -> dict[str, Any]:
    return {"BLOCK_TILES": tile.block_n, "BLOCK_CHANNELS": tile.block_m}


def _possible(problem: ConvProblem, tile: WinogradTile) -> WinogradTile:
    """Return the tile, or the one that takes its place where there is no such kernel.

    Rounding errors of F(4 x 4, 5 x 5) reach 380 eps.
    """
    fused = problem.weight_shape5[2:] == (1, 3, 3) and _phases(problem) == 1
    is_possible = fused if tile.is_fused else problem.phase_taps != (5, 5) or tile.m == 2
    return tile if is_possible else _UNFUSED


def _phases(problem: ConvProblem) -> int:
    """Return the phases of rows and columns, each of which counts as a channel."""
    return problem.stride[1] * problem.stride[2]


def _outputs(problem: ConvProblem, tile: WinogradTile) -> tuple[int, int]:
    """Return the rows and columns of a tile's outputs: an axis of one tap is not transformed."""
    rows, columns = problem.phase_taps
    return (tile.m if rows > 1 else 1), (tile.m if columns > 1 else 1)


def _places(problem: ConvProblem, tile: WinogradTile) -> int:
    """Return the inputs of a tile, each with a matrix product of its own."""
    (rows, columns), (taps_h, taps_w) = _outputs(problem, tile), problem.phase_taps
    return (rows + taps_h - 1) * (columns + taps_w - 1)


def _tiles(problem: ConvProblem, tile: WinogradTile) -> int:
    rows, columns = _outputs(problem, tile)
    return problem.N * problem.O * -(-problem.P // rows) * -(-problem.Q // columns)


def _rows(problem: ConvProblem) -> int:
    """Return the rows of a group's U and V: planes of a window, its channels and their phases, in slices."""
    return -(-problem.T * problem.C * _phases(problem) // problem.groups // SLICE) * SLICE


def _blocks(problem: ConvProblem, tile: WinogradTile, tiles: int) -> int:
    """Return the blocks that multiply so many tiles."""
    blocks = problem.groups * -(-problem.gemm_m // tile.block_m) * -(-tiles // tile.block_n)
    return blocks if tile.is_fused else _places(problem, tile) * blocks


def _filter_bytes(problem: ConvProblem, tile: WinogradTile) -> int:
    return _places(problem, tile) * product.packed_bytes(problem, _rows(problem))


def _turn_tiles(problem: ConvProblem, tile: WinogradTile, device: Device) -> int:
    """Return how many tiles go through all stages in one turn: they stay in a large level-2 cache."""
    strips = -(-_tiles(problem, tile) // tile.block_n)
    if not tile.is_fused:
        room = max(device.l2 // 2, MOST_TRANSFORMED)
        strips = min(strips, max(room // _tile_bytes(problem, tile) // tile.block_n, 1))
    return strips * tile.block_n


def _tile_bytes(problem: ConvProblem, tile: WinogradTile) -> int:
    """Return the bytes of a tile's transformed inputs and products."""
    channels = problem.groups * _rows(problem) + problem.K
    return _places(problem, tile) * channels * product.accumulator(problem).itemsize
