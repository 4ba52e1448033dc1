"""The gradient with respect to the weight: a sum over pixels of outer products, by kernels/outer.cuh.

    grad_w[k, (c, t, r, s)] = sum over pixels of grad_y[pixel, k] * x[pixel + (c, t, r, s)]

It is a product of matrices with few rows and columns and a long sum, which is cut into parts, so that all SMs
have work. im2col and pointwise differ only in how they load x.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv.gpu import launch, product
from fastconv.gpu.product import SLICE, THREADS, Tile

if TYPE_CHECKING:
    from fastconv.gpu.hardware import Device
    from fastconv.gpu.source import Kernel
    from fastconv.problem import ConvProblem, Operands

TILES = (
    Tile(128, 128),
    *(Tile(m, n, is_for_double=False) for m, n in ((64, 128), (128, 64), (64, 64), (32, 128))),
)

SQUARE = 64  # of the tiles for which sums are cut into parts
BLOCKS = 8  # of such a tile that each SM shall have at least
LEAST_SLICES = 8  # of a part

# Instructions of the main loop per slice, as they were counted for sm_90.
MULTIPLY_ADDS = 512
INSTRUCTIONS = 624  # with them, without loads
LOAD = {"SINGLE": 10, "PIXELS": 16, "CHANNELS": 16}  # of one element or of four
WINDOW = 15  # to see whether these lie in the padding
EFFICIENCY = 0.9  # of what the main loop's share of multiply-adds permits

ELEMENTS = 32  # kElements of kernels/gradient.cuh


@dataclass(frozen=True)
class Division:
    """How a gradient is divided among blocks.

    slices  of SLICE pixels, of all sums
    parts   that a sum consists of, each of blocks of its own; the stage ADD adds them
    blocks  of the product
    """

    slices: int
    parts: int
    blocks: int


class Call:
    """One run: what its kernels have in common.

    order  in which terms count, and threads go: that of the problem, if nothing else is said
    """

    def __init__(self, algorithm: str, problem: ConvProblem, operands: Operands, order: str = "") -> None:
        self.order = order or problem.order
        self.algorithm, self.problem, self.operands = algorithm, problem, operands
        arrays = (("x", operands.x), ("w", operands.out), ("y", operands.weight))
        strides = tuple((name, array.strides) for name, array in arrays)
        self.conv, self.reach = product.describe(problem, strides, 0.0)

    def launch(
        self, stage: str, blocks: int, threads: int, defines: dict[str, Any], largest: int, **arguments: Any
    ) -> None:
        """Launch a stage; `largest` is the largest count or offset beside those of the operands."""
        largest, defines = max(self.reach, largest), {**defines, "ORDER": self.order}
        product.launch_stage(
            self.algorithm, self.problem, stage, blocks, threads, defines, largest,
            grad_w=self.operands.out, conv=self.conv, **arguments,
        )  # fmt: skip

    def run(
        self, stage_blocks: int, threads: int, defines: dict[str, Any], parts: int, largest: int, **more: Any
    ) -> None:
        """Launch the stage WEIGHT and, if sums have several parts, the stage ADD."""
        p, o, partial = self.problem, self.operands, None
        if parts > 1:
            partial = launch.driver().empty((parts, *p.weight_shape5), product.accumulator(p))
            largest = max(largest, partial.size)
        given = {"x": o.x, "grad_y": o.weight, "partial": partial, "parts": parts, **more}
        self.launch("WEIGHT", stage_blocks, threads, defines, largest, **given)
        if partial is not None:
            blocks = -(-p.parameters // ELEMENTS)
            self.launch("ADD", blocks, THREADS, {}, largest, partial=partial, parts=parts)


@lru_cache(maxsize=4096)
def divide(problem: ConvProblem, tile: Tile, device: Device) -> Division:
    """Divide a gradient. The parts decide its bits: they depend on problem and GPU, not on the tile."""
    slices = -(-problem.gemm_n // SLICE)
    parts = max(1, min(count_parts(problem, device), slices // LEAST_SLICES))
    return Division(slices, parts, parts * count_tiles(problem, tile.block_m, tile.block_n))


def count_parts(problem: ConvProblem, device: Device) -> int:
    """Return into how many parts sums must be cut to keep a GPU busy."""
    return -(-BLOCKS * device.processors // count_tiles(problem, SQUARE, SQUARE))


def count_tiles(problem: ConvProblem, rows: int, columns: int) -> int:
    """Return the tiles of a gradient."""
    return problem.groups * -(-problem.gemm_m // rows) * -(-problem.gemm_k // columns)


def workspace(problem: ConvProblem, parts: int) -> int:
    """Return the bytes of the parts' sums."""
    return parts * problem.parameters * product.accumulator(problem).itemsize if parts > 1 else 0


def add_seconds(problem: ConvProblem, parts: int, device: Device) -> float:
    """Return the estimated seconds to write the parts' sums, and to add them in a kernel of its own."""
    partial = workspace(problem, parts)
    speedup = product.L2_SPEEDUP if partial <= device.l2 else 1.0
    return 2 * partial / speedup / device.bandwidth + product.LAUNCH * (parts > 1)


def seconds(problem: ConvProblem, tile: Tile, device: Device, has_windows: bool) -> float:
    """Return the estimated seconds; has_windows: elements of x may lie in the padding."""
    division = divide(problem, tile, device)
    per_sm = -(-division.blocks // device.processors)
    rate = product.sm_rate(problem, device, min(per_sm, tile.resident) * tile.threads)
    terms = SLICE * division.slices / division.parts
    arithmetic = per_sm * terms * 2 * tile.block_m * tile.block_n / rate
    arithmetic /= EFFICIENCY * _share(problem, tile, has_windows)
    loaded = division.blocks * terms * (tile.block_m + tile.block_n) * problem.itemsize
    moved = (problem.bytes + loaded / product.L2_SPEEDUP) / device.bandwidth
    return max(arithmetic, moved) + add_seconds(problem, division.parts, device) + product.LAUNCH


def _share(problem: ConvProblem, tile: Tile, has_windows: bool) -> float:
    """Return the multiply-adds among the instructions of the main loop, if arrays are dense."""
    plane, is_dense = problem.O * problem.P * problem.Q, not has_windows and problem.stride == (1, 1, 1)
    count = INSTRUCTIONS
    for size, channels, has_pixels in (
        (tile.block_m, problem.gemm_m, True),
        (tile.block_n, problem.C // problem.groups, is_dense),
    ):
        together = "CHANNELS" if problem.order == "NHWC" else "PIXELS"
        has_fours = channels % 4 == 0 if problem.order == "NHWC" else has_pixels and plane % 4 == 0
        units = size * SLICE // tile.threads // (4 if has_fours else 1)
        count += units * LOAD[together if has_fours else "SINGLE"]
    return MULTIPLY_ADDS / (count + WINDOW * units * has_windows)


def find_loads(array: np.ndarray, channels: int, has_pixels: bool) -> str:
    """Return what a thread can load at once of an array: X_LOADS or Y_LOADS of kernels/outer.cuh.

    channels    of a group
    has_pixels  pixel i of a sample is its element i, also if four are asked for at once
    """
    if (
        channels % 4 == 0
        and array.strides[1] == array.itemsize
        and product.steps_in_fours(array, (0, 2, 3, 4))
    ):
        return "CHANNELS"
    steps = product.element_steps(array)[2:]
    sizes = array.shape[2:]
    dense = [sizes[1] * sizes[2], sizes[2], 1]
    is_dense = all(size == 1 or step == wanted for size, step, wanted in zip(sizes, steps, dense))
    if has_pixels and is_dense and dense[0] * sizes[0] % 4 == 0 and product.steps_in_fours(array, (0, 1)):
        return "PIXELS"
    return "SINGLE"


def run(
    algorithm: str, problem: ConvProblem, tile: Tile, device: Device, operands: Operands, x_loads: str
) -> None:
    """Compute the gradient; operands.weight is that of the output."""
    division = divide(problem, tile, device)
    defines = _defines(tile, x_loads, find_loads(operands.weight, problem.gemm_m, has_pixels=True))
    behind = max(problem.gemm_n + 2 * SLICE, problem.gemm_m + tile.block_m, problem.gemm_k + tile.block_n)
    Call(algorithm, problem, operands).run(
        division.blocks, tile.threads, defines, division.parts, max(behind, problem.parameters),
        slices=division.slices,
    )  # fmt: skip


def kernels(algorithm: str, dtype: str, order: str, tile: Tile, loads: list[tuple[str, str]]) -> list[Kernel]:
    """Return kernels that stand for all of a tile; loads: pairs of X_LOADS and Y_LOADS."""
    pairs = [(pair, "int") for pair in loads] + [(loads[0], "long long")]
    return [
        *(
            product.stage_kernel(
                algorithm, "WEIGHT", dtype, {**_defines(tile, *pair), "ORDER": order}, tile.threads, index
            )
            for pair, index in pairs
        ),
        add_kernel(algorithm, dtype, order),
    ]


def add_kernel(algorithm: str, dtype: str, order: str) -> Kernel:
    """Return the kernel that adds parts."""
    return product.stage_kernel(algorithm, "ADD", dtype, {"ORDER": order}, THREADS, "int")


def _defines(tile: Tile, x_loads: str, y_loads: str) -> dict[str, Any]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "X_LOADS": x_loads, "Y_LOADS": y_loads}
