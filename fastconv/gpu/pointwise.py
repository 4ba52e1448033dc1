"""1x1 convolution: a matrix product of the weight and the pixels, loaded where they lie."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fastconv.gpu import product
from fastconv.gpu.product import SLICE, Call, Division, Tile

if TYPE_CHECKING:
    from fastconv.gpu.hardware import Device
    from fastconv.gpu.source import Kernel
    from fastconv.problem import ConvProblem, Operands

TILES = (
    *(Tile(m, n) for m, n in ((128, 128), (64, 128), (128, 64), (64, 64))),
    *(Tile(m, n, is_for_double=False) for m, n in ((32, 128), (32, 64))),
)

EFFICIENCY = 0.94  # of what the main loop's share of multiply-adds permits, were it that of im2col


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds."""
    return product.seconds(problem, tile, device, _divide(problem, tile, device), EFFICIENCY * tile.share)


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes of the packed weight and of partial sums."""
    division = _divide(problem, tile, device)
    return product.packed_bytes(problem, division.slices * SLICE) + product.partial_bytes(problem, division)


def prepare(problem: ConvProblem, tile: Tile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the packed weight."""
    return product.pack("pointwise", problem, weight, SLICE, product.packed_rows(problem, SLICE))


def run(problem: ConvProblem, tile: Tile, device: Device, operands: Operands) -> None:
    """Convolve; the weight is prepared or as given."""
    packed = prepare(problem, tile, device, operands.weight)
    call = Call("pointwise", problem, operands)
    x = operands.x
    if _has_fours(problem, x):
        defines = {"VECTOR_PIXELS": 1, "LOADS": "CHECKED"}
    else:
        defines = {"VECTOR_PIXELS": 0, "LOADS": product.find_loads(problem, x)}
    product.multiply(call, tile, packed, _divide(problem, tile, device), defines, problem.gemm_n, x=x)


def kernels(dtype: str, order: str, tile: Tile) -> list[Kernel]:
    """Return the kernels of a tile, as product.kernels does."""
    loads = ("CHECKED", "VECTOR" if order == "NHWC" else "WHOLE")
    loaders = [{"VECTOR_PIXELS": 0, "LOADS": name} for name in loads]
    loaders += [{"VECTOR_PIXELS": 1, "LOADS": "CHECKED"}] * (order == "NCHW")
    return product.kernels("pointwise", dtype, order, tile, loaders)


@lru_cache(maxsize=4096)
def _divide(problem: ConvProblem, tile: Tile, device: Device) -> Division:
    slices = product.packed_rows(problem, SLICE) // SLICE
    parts = product.count_parts(problem, slices, device)
    return product.divide(problem, tile, device, slices, parts, problem.gemm_n)


def _has_fours(problem: ConvProblem, x: np.ndarray) -> bool:
    """Say whether four neighbouring pixels of a channel are neighbours in memory, at an aligned address."""
    plane = problem.O * problem.P * problem.Q
    if problem.stride != (1, 1, 1) or plane % 4:
        return False
    dense = [problem.P * problem.Q, problem.Q, 1]
    steps = product.element_steps(x)[2:]
    is_dense = all(size == 1 or step == wanted for size, step, wanted in zip(x.shape[2:], steps, dense))
    return is_dense and product.steps_in_fours(x, (0, 1))
