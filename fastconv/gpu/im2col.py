"""Convolution as one matrix product: windows loaded as they are needed (implicit), or gathered first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fastconv.gpu import launch, product
from fastconv.gpu.product import SLICE, THREADS, Call, Division, Tile

if TYPE_CHECKING:
    from fastconv.gpu.hardware import Device
    from fastconv.gpu.source import Kernel
    from fastconv.problem import ConvProblem, Operands


@dataclass(frozen=True)
class WindowTile(Tile):
    """A tile whose columns are windows; they are gathered in workspace first, or loaded from the input."""

    is_gathered: bool = False

    @property
    def bits(self) -> bool:
        """What decides the order in which a sum's terms are added."""
        return self.is_gathered

    @property
    def packing(self) -> bool:
        """What of the tile decides how a weight is packed."""
        return self.is_gathered

    def __str__(self) -> str:
        return super().__str__() + "-gathered" * self.is_gathered


TILES = (
    WindowTile(128, 128),
    *(
        WindowTile(m, n, is_for_double=False)
        for m, n in ((64, 128), (128, 64), (64, 64), (32, 128), (32, 64))
    ),
    *(WindowTile(m, n, is_gathered=True) for m, n in ((128, 128), (64, 64))),
)

EFFICIENCY = 0.9  # of what the main loop's share of multiply-adds permits
GATHERED_SHARE = 0.9  # of multiply-adds in the main loop of gathered windows

MOST_GATHERED = 256 << 20  # bytes; what is more is gathered and multiplied in several turns


def cost(problem: ConvProblem, tile: WindowTile, device: Device) -> float:
    """Return the estimated seconds."""
    division = _divide(problem, tile, device)
    if not tile.is_gathered:
        return product.seconds(problem, tile, device, division, EFFICIENCY * tile.share)
    turns = -(-problem.gemm_n // _columns(problem, tile))
    moved = problem.bytes + 2 * turns * _gathered_bytes(problem, tile)
    gather = turns * product.LAUNCH + moved / device.bandwidth
    return gather + product.seconds(problem, tile, device, division, EFFICIENCY * GATHERED_SHARE)


def workspace(problem: ConvProblem, tile: WindowTile, device: Device) -> int:
    """Return the bytes of the packed weight, and of gathered windows or partial sums."""
    packed = product.packed_bytes(problem, _slices(problem, tile) * SLICE)
    if tile.is_gathered:
        return packed + _gathered_bytes(problem, tile)
    return packed + product.partial_bytes(problem, _divide(problem, tile, device))


def prepare(problem: ConvProblem, tile: WindowTile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the packed weight."""
    together = 1 if tile.is_gathered else SLICE
    return product.pack("im2col", problem, weight, together, _slices(problem, tile) * SLICE)


def run(problem: ConvProblem, tile: WindowTile, device: Device, operands: Operands) -> None:
    """Convolve; the weight is prepared or as given."""
    packed = prepare(problem, tile, device, operands.weight)
    call = Call("im2col", problem, operands)
    if tile.is_gathered:
        _multiply_gathered(call, tile, packed, device)
        return
    defines = {"GATHERED": 0, "LOADS": product.find_loads(problem, operands.x)}
    division = _divide(problem, tile, device)
    product.multiply(
        call, tile, packed, division, defines, problem.gemm_n, x=operands.x, gathered=None, first=0
    )


def kernels(dtype: str, order: str, tile: WindowTile) -> list[Kernel]:
    """Return the kernels of a tile, as product.kernels does."""
    if tile.is_gathered:
        gather = product.stage_kernel("im2col", "GATHER", dtype, {}, THREADS, "int")
        plain = product.defines_of(tile, False) | {"GATHERED": 1, "LOADS": "CHECKED"}
        return [gather, *product.variants("im2col", "MULTIPLY", dtype, order, tile, [plain])]
    loads = ("CHECKED", "VECTOR" if order == "NHWC" else "WHOLE")
    return product.kernels("im2col", dtype, order, tile, [{"GATHERED": 0, "LOADS": name} for name in loads])


def _multiply_gathered(call: Call, tile: WindowTile, packed: np.ndarray, device: Device) -> None:
    """Gather and multiply in turns, each in the same workspace."""
    problem, x = call.problem, call.operands.x
    slices, most = _slices(problem, tile), _columns(problem, tile)
    gathered = launch.driver().empty((problem.groups, slices * SLICE, most), product.accumulator(problem))
    for first in range(0, problem.gemm_n, most):
        columns = min(most, problem.gemm_n - first)
        threads = problem.C * -(-columns // 4) * 4
        call.launch(
            "GATHER", -(-threads // THREADS), THREADS, {}, gathered.size, x=x, gathered=gathered,
            conv=call.conv, first=first, columns=columns, slices=slices,
        )  # fmt: skip
        division = product.divide(problem, tile, device, slices, 1, columns)
        defines = {"GATHERED": 1, "LOADS": "CHECKED"}
        product.multiply(call, tile, packed, division, defines, columns, x=x, gathered=gathered, first=first)


def _slices(problem: ConvProblem, tile: WindowTile) -> int:
    """Return the slices of a sum: of a chunk of channels at one tap, or of all terms as they come."""
    rows = product.packed_rows(problem, 1 if tile.is_gathered else SLICE)
    return -(-rows // SLICE)


@lru_cache(maxsize=4096)
def _divide(problem: ConvProblem, tile: WindowTile, device: Device) -> Division:
    slices = _slices(problem, tile)
    parts = 1 if tile.is_gathered else product.count_parts(problem, slices, device)
    return product.divide(problem, tile, device, slices, parts, problem.gemm_n)


def _columns(problem: ConvProblem, tile: WindowTile) -> int:
    """Return how many pixels are gathered in one turn, a multiple of the tile's."""
    column = problem.groups * _slices(problem, tile) * SLICE * product.accumulator(problem).itemsize
    most = max(MOST_GATHERED // column // tile.block_n, 1)
    return min(most, -(-problem.gemm_n // tile.block_n)) * tile.block_n


def _gathered_bytes(problem: ConvProblem, tile: WindowTile) -> int:
    rows = problem.groups * _slices(problem, tile) * SLICE
    return rows * _columns(problem, tile) * product.accumulator(problem).itemsize
