"""What the kernels are told of a convolution, and the tiled matrix product of kernels/gemm.cuh.

im2col and pointwise differ only in how they load columns; direct shares the packed weight and the arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv.gpu import launch
from fastconv.gpu.source import Kernel, make_kernel

if TYPE_CHECKING:
    from fastconv.gpu.hardware import Device
    from fastconv.problem import ConvProblem, Operands

SLICE = 8  # kBlockK of gemm.cuh
SQUARE = 32  # kSide of the stage PACK
THREADS = 256  # per block, of kernels that handle one element per thread
LAUNCH = 3e-6  # seconds from the end of one kernel to the work of the next
SCHEDULERS = 4  # of an SM: each issues the multiply-adds of one warp at a time
REGISTERS = 128  # per thread, about: 64 sums and what is multiplied
INSIDE_REGISTERS = 224  # if a block adds the parts of its sums itself
L2_SPEEDUP = 2.5  # of the level-2 cache over the memory, in bytes/s
MOST_PARTS = 32

_FIRST_LONG = 2**31  # the least number that no int holds


@dataclass(frozen=True)
class Tile:
    """What one thread block computes: block_m output channels of block_n pixels, 64 sums per thread.

    is_for_double  whether 64 sums in float64, and what is loaded meanwhile, fit a thread's 255 registers
    """

    block_m: int
    block_n: int
    is_for_double: bool = True

    def takes(self, dtype: str) -> bool:
        """Say whether there are kernels of this tile for a dtype."""
        return dtype != "float64" or self.is_for_double

    @property
    def packing(self) -> Any:
        """What of the tile decides how a weight is packed: nothing, so that it is done once for all."""
        return None

    @property
    def threads(self) -> int:
        return self.block_m * self.block_n // 64

    @property
    def share(self) -> float:
        """Multiply-adds among the instructions of the main loop, as they were counted for sm_90.

        Of a slice 512 are multiply-adds and 81 are the same in every tile; 27 load four elements of b.
        """
        return 512 / (512 + 81 + 27 * SLICE * self.block_n / (4 * self.threads))

    @property
    def resident(self) -> int:
        """Blocks that one SM holds at a time if threads have about as many registers as most."""
        return self.resident_with(REGISTERS)

    def resident_with(self, registers: int) -> int:
        """Return the blocks that the 65,536 registers of an SM permit: they go by four warps."""
        warps = -(-self.threads // 128) * 4
        return max(65536 // (registers * 32 * warps), 1)

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}"


class Call:
    """One run of an algorithm: what its kernels have in common.

    reads_weight  a kernel reads the weight where it lies, instead of a packed one
    """

    def __init__(
        self, algorithm: str, problem: ConvProblem, operands: Operands, reads_weight: bool = False
    ) -> None:
        o = operands
        self.algorithm, self.problem, self.operands = algorithm, problem, operands
        weight = o.weight if reads_weight else None
        arrays = (("x", o.x), ("w", weight), ("y", o.out), ("r", o.residual), ("bias", o.bias))
        strides = tuple([(name, None if array is None else array.strides) for name, array in arrays])
        self.conv, self.reach = describe(problem, strides, o.epilogue.slope)

    @property
    def ends(self) -> dict[str, Any]:
        """The arguments that say where sums go."""
        o = self.operands
        return {"bias": o.bias, "residual": o.residual, "y": o.out, "conv": self.conv}

    @property
    def output(self) -> dict[str, Any]:
        """The defines that say where sums go."""
        return {"ORDER": self.problem.order, "ACTIVATION": self.operands.epilogue.activation or "none"}

    def launch(
        self, stage: str, blocks: int, threads: int, defines: dict[str, Any], largest: int, **arguments: Any
    ) -> None:
        """Launch a stage; `largest` is the largest count or offset beside those of the operands."""
        largest = max(self.reach, largest)
        launch_stage(self.algorithm, self.problem, stage, blocks, threads, defines, largest, **arguments)


def launch_stage(
    algorithm: str, problem: ConvProblem, stage: str, blocks: int, threads: int, defines: dict[str, Any],
    largest: int, **arguments: Any,
) -> None:  # fmt: skip
    """Launch the kernel of a stage; `largest` is the largest count or offset in it."""
    kernel = stage_kernel(algorithm, stage, problem.dtype, defines, threads, index_type(largest))
    launch.launch(kernel, blocks, **arguments)


def pack(algorithm: str, problem: ConvProblem, weight: np.ndarray, together: int, rows: int) -> np.ndarray:
    """Return the weight as the kernels want it, (groups, rows, pitch); itself if it was packed before.

    rows  of a group: the terms of its sums in chunks of `together` channels, then zeros
    """
    if weight.ndim == 3:
        return weight
    packed = launch.driver().empty((problem.groups, rows, pitch(problem)), accumulator(problem))
    conv, reach = describe(problem, (("w", weight.strides),), 0.0)
    kernel = stage_kernel(algorithm, "PACK", problem.dtype, {}, THREADS, index_type(max(packed.size, reach)))
    blocks = problem.groups * -(-rows // SQUARE) * -(-packed.shape[2] // SQUARE)
    launch.launch(
        kernel, blocks, weight=weight, packed=packed, conv=conv,
        together=together, rows=rows, pitch=packed.shape[2],
    )  # fmt: skip
    return packed


def index_type(largest: int) -> str:
    """Return the C++ type of offsets and counts up to `largest`."""
    return "int" if largest < _FIRST_LONG else "long long"


def stage_kernel(
    algorithm: str, stage: str, dtype: str, defines: dict[str, Any], threads: int, index: str
) -> Kernel:
    """Return the kernel of a stage."""
    return make_kernel(algorithm, stage, dtype, (*defines.items(), ("INDEX", index), ("THREADS", threads)))


def accumulator(problem: ConvProblem) -> np.dtype:
    """Return the dtype of sums, packed weights and workspace."""
    return np.dtype(problem.compute_dtype)


def element_steps(array: np.ndarray) -> list[int]:
    """Return an array's strides in elements."""
    return [stride // array.itemsize for stride in array.strides]


_ARRAY_AXES = {"x": "ncdhw", "w": "kctrs", "y": "nkopq", "r": "nkopq", "bias": "k"}
_Strides = tuple[int, ...] | None  # in bytes; of an array that is not given None


@lru_cache(maxsize=4096)
def describe(
    problem: ConvProblem, strides: tuple[tuple[str, _Strides], ...], slope: float
) -> tuple[launch.Fields, int]:
    """Return the fields of struct Conv in kernels/common.cuh, and a bound of all sizes and offsets in it."""
    p = problem
    fields: dict[str, int | float] = {
        "N": p.N, "C": p.C // p.groups, "D": p.D, "H": p.H, "W": p.W, "K": p.gemm_m,
        "T": p.T, "R": p.R, "S": p.S, "O": p.O, "P": p.P, "Q": p.Q, "groups": p.groups, "slope": slope,
    }  # fmt: skip
    for name, values in (("stride", p.stride), ("dilation", p.dilation), ("padding", p.padding_before)):
        fields |= {f"{name}_{axis}": value for axis, value in zip("dhw", values)}
    given = dict(strides)
    for name, axes in _ARRAY_AXES.items():
        steps = given.get(name) or (0,) * len(axes)
        fields |= {f"{name}_{axis}": step // p.itemsize for axis, step in zip(axes, steps)}
    return launch.Fields(fields), max(_reach(p, given), *(abs(int(value)) for value in fields.values()))


def _reach(problem: ConvProblem, strides: dict[str, _Strides]) -> int:
    """Return a bound of all offsets and sizes, those of windows that lie in the padding included."""
    p = problem
    padded = [before + size + after for size, (before, after) in zip(p.input_shape5[2:], p.padding)]
    sizes = {
        "x": (p.N, p.C + SLICE, *padded), "w": p.weight_shape5, "y": p.output_shape5, "r": p.output_shape5,
        "bias": (p.K,),
    }  # fmt: skip
    spans = [
        sum(size * abs(step) for size, step in zip(sizes[name], steps)) // p.itemsize
        for name, steps in strides.items()
        if steps is not None
    ]
    return max(*spans, *padded)


def pitch(problem: ConvProblem) -> int:
    """Return the elements of a row of the packed weight: the output channels of a group, in fours."""
    return -(-problem.gemm_m // 4) * 4


def packed_rows(problem: ConvProblem, together: int) -> int:
    """Return the rows of a group's packed weight, whose channels go in chunks of `together`."""
    chunks = -(-problem.C // problem.groups // together)
    return chunks * together * math.prod(problem.weight_shape5[2:])


def packed_bytes(problem: ConvProblem, rows: int) -> int:
    """Return the bytes of a packed weight."""
    return problem.groups * rows * pitch(problem) * accumulator(problem).itemsize


def find_loads(problem: ConvProblem, x: np.ndarray) -> str:
    """Return how channels can be loaded: LOADS of kernels/gemm.cuh."""
    if problem.C // problem.groups % SLICE:
        return "CHECKED"
    return "VECTOR" if x.strides[1] == x.itemsize and steps_in_fours(x, (0, 2, 3, 4)) else "WHOLE"


def steps_in_fours(x: np.ndarray, axes: tuple[int, ...]) -> bool:
    """Say whether steps along these axes keep the alignment of vectors of four elements."""
    alignment = min(4 * x.itemsize, 16)
    steps = [x.strides[axis] for axis in axes if x.shape[axis] > 1]
    return not any(step % alignment for step in (x.__array_interface__["data"][0], *steps))


@dataclass(frozen=True)
class Division:
    """How a product is divided among blocks.

    slices    of SLICE terms, of every sum
    parts     that a sum consists of
    is_split  every part has a block of its own, and the stage REDUCE adds them
    """

    slices: int
    parts: int
    blocks: int
    is_split: bool

    @property
    def is_inside(self) -> bool:
        """Whether each block adds the parts of its sums itself."""
        return self.parts > 1 and not self.is_split


def divide(
    problem: ConvProblem, tile: Tile, device: Device, slices: int, parts: int, columns: int
) -> Division:
    """Divide a product of `columns` pixels: parts go to blocks of their own while SMs would stand idle.

    Not if their sums would leave the level-2 cache: to write and read them takes longer than some idle SMs.
    """
    blocks = problem.groups * -(-problem.gemm_m // tile.block_m) * -(-columns // tile.block_n)
    split = Division(slices, parts, blocks * parts, is_split=True)
    is_idle = blocks < device.processors * tile.resident and partial_bytes(problem, split) <= device.l2
    # One block can add its parts by itself only in float32: twice 64 sums in float64 are too many registers.
    if parts > 1 and (is_idle or problem.compute_dtype == "float64"):
        return split
    return Division(slices, parts, blocks, is_split=False)


def count_parts(problem: ConvProblem, slices: int, device: Device) -> int:
    """Return into how many parts each sum is cut, so that one sample keeps the device busy.

    It depends on one sample only: the bits of a sample's result are the same in every batch.
    """
    pixels = problem.O * problem.P * problem.Q
    tiles = problem.groups * -(-problem.gemm_m // 64) * -(-pixels // 64)
    return max(1, min(4 * device.processors // tiles, slices // SLICE, MOST_PARTS))


def partial_bytes(problem: ConvProblem, division: Division) -> int:
    """Return the bytes of the parts' sums."""
    count = division.parts * math.prod(problem.output_shape5) if division.is_split else 0
    return count * accumulator(problem).itemsize


def seconds(problem: ConvProblem, tile: Tile, device: Device, division: Division, efficiency: float) -> float:
    """Return the estimated seconds of a product, that of the stage REDUCE included.

    efficiency  part of the peak that the main loop reaches on a full device
    """
    per_sm = -(-division.blocks // device.processors)
    resident = tile.resident_with(INSIDE_REGISTERS if division.is_inside else REGISTERS)
    rate = sm_rate(problem, device, min(per_sm, resident) * tile.threads) * efficiency
    terms = SLICE * division.slices / (division.parts if division.is_split else 1)
    arithmetic = per_sm * terms * 2 * tile.block_m * tile.block_n / rate
    loaded = division.blocks * terms * (tile.block_m + tile.block_n) * accumulator(problem).itemsize
    partial = partial_bytes(problem, division)
    speedup = L2_SPEEDUP if partial <= device.l2 else 1.0
    moved = problem.bytes + loaded / L2_SPEEDUP + 2 * partial / speedup
    return max(arithmetic, moved / device.bandwidth) + LAUNCH * (1 + division.is_split)


def sm_rate(problem: ConvProblem, device: Device, threads: int) -> float:
    """Return the FLOP/s of an SM on which so many threads work: few warps do not hide their latencies."""
    warps = threads / 32
    busy = min(warps / SCHEDULERS, 1.0) * (1 - 0.3 * SCHEDULERS / max(warps, SCHEDULERS))
    return device.peak(problem.dtype) / device.processors * busy


def multiply(
    call: Call, tile: Tile, packed: np.ndarray, division: Division, defines: dict[str, Any], columns: int,
    **loaded: Any,
) -> None:  # fmt: skip
    """Launch the product and, if it is split, the sum of its parts.

    defines, loaded  what the algorithm's loader is compiled with, and what it takes
    """
    partial = None
    largest = max(packed.size, columns + tile.block_n)
    if division.is_split:
        shape = (division.parts, *call.problem.output_shape5)
        partial = launch.driver().empty(shape, accumulator(call.problem))
        largest = max(largest, partial.size)
    defines = {**defines_of(tile, division.is_inside), **defines, **call.output}
    call.launch(
        "MULTIPLY", division.blocks, tile.threads, defines, largest, packed=packed, partial=partial,
        columns=columns, slices=division.slices, parts=division.parts, **call.ends, **loaded,
    )  # fmt: skip
    if partial is not None:
        blocks = -(-math.prod(call.problem.output_shape5) // THREADS)
        call.launch(
            "REDUCE",
            blocks,
            THREADS,
            call.output,
            largest,
            partial=partial,
            parts=division.parts,
            **call.ends,
        )


def kernels(
    algorithm: str, dtype: str, order: str, tile: Tile, loaders: list[dict[str, Any]]
) -> list[Kernel]:
    """Return the kernels of a tile, as `variants` does: all loaders, the last one also with parts inside."""
    found = [defines_of(tile, False) | loader for loader in loaders]
    if dtype != "float64":
        found.append(defines_of(tile, True) | loaders[-1])
    return [
        stage_kernel(algorithm, "PACK", dtype, {}, THREADS, "int"),
        *variants(algorithm, "MULTIPLY", dtype, order, tile, found),
        stage_kernel(algorithm, "REDUCE", dtype, {"ORDER": order, "ACTIVATION": "relu"}, THREADS, "int"),
    ]


def variants(
    algorithm: str, stage: str, dtype: str, order: str, tile: Tile, found: list[dict[str, Any]]
) -> list[Kernel]:
    """Return kernels of all the given defines with plain output, of the last one also with the largest output
    function, and of the first one also with long indices."""
    plain = [(defines, "none", "int") for defines in found]
    return [
        stage_kernel(
            algorithm, stage, dtype, {**defines, "ORDER": order, "ACTIVATION": word}, tile.threads, index
        )
        for defines, word, index in (*plain, (found[-1], "gelu", "int"), (found[0], "none", "long long"))
    ]


def defines_of(tile: Tile, is_inside: bool) -> dict[str, Any]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "PARTS_INSIDE": int(is_inside)}
