"""Problems enter, plans for the GPU and their runs on CuPy arrays leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import combinations
from typing import Any

from fastconv import arrays
from fastconv.algorithms import TABLE
from fastconv.gpu.source import Kernel
from fastconv.plan import Plan, possible_plans
from fastconv.problem import ORDERS, ConvProblem, Epilogue, make_problem

# Sizes that no tile divides, several tiles of each; one problem at least for each algorithm.
SAMPLES: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]], ...] = (
    ((2, 35, 29, 31), (70, 35, 3, 3), {"padding": 1}),
    ((2, 3, 61, 59), (33, 3, 7, 7), {"stride": 2, "padding": 3}),
    ((3, 36, 29, 31), (70, 36, 1, 1), {}),
    ((2, 35, 29, 31), (70, 1, 3, 3), {"groups": 35, "padding": 1}),
    ((2, 20, 23, 25), (30, 10, 3, 2), {"groups": 2, "dilation": 2, "stride": 2}),
)


AROUND = ("pool",)
"""Files of kernels that belong to no algorithm."""


def algorithms() -> list[str]:
    """The rows of the table that have kernels for the GPU."""
    return [name for name in TABLE if find_spec(f"fastconv.gpu.{name}")]


def sources() -> list[str]:
    """All files of kernels, by name."""
    return [*algorithms(), *AROUND]


def kernels_of(source: str, dtype: str) -> list[Kernel]:
    """The distinct kernels that stand for all that is launched from a source for a dtype, in every pass."""
    if source in AROUND:
        module = import_module(f"fastconv.gpu.{source}")
        return [kernel for order in ORDERS for kernel in module.kernels(dtype, order)]
    found: dict[Kernel, None] = {}
    for folder in ("", "grad_weight."):  # the gradient of the input is made by the kernels of the convolution
        if find_spec(f"fastconv.gpu.{folder}{source}") is None:
            continue
        module = import_module(f"fastconv.gpu.{folder}{source}")
        tiles = [tile for tile in module.TILES if tile.takes(dtype)]
        found.update(
            dict.fromkeys(k for order in ORDERS for tile in tiles for k in module.kernels(dtype, order, tile))
        )
    return list(found)


def cover(kernels: Sequence[Kernel], together: int = 2) -> list[Kernel]:
    """Return some of the kernels: any `together` settings of one are together in one of those returned."""
    groups = {kernel: set(combinations(settings(kernel), together)) for kernel in kernels}
    missing = set().union(*groups.values())
    chosen = []
    while missing:
        best = max(kernels, key=lambda kernel: len(groups[kernel] & missing))
        chosen.append(best)
        missing -= groups[best]
    return chosen


def settings(kernel: Kernel) -> list[object]:
    """Return what makes a kernel special: dtype, algorithm and stage, the whole tile, and each define."""
    tile = [value for name, value in kernel.defines if name.startswith("BLOCK_")]
    return [kernel.name.split("__")[0], ("tile", *tile), *kernel.defines]


def sample_plans(dtypes: tuple[str, ...]) -> Iterator[Plan]:
    """Every algorithm with every tile, in both memory orders, on each of SAMPLES that it accepts."""
    for dtype in dtypes:
        for input_shape, weight_shape, options in SAMPLES:
            problem = make_problem("conv2d", input_shape, weight_shape, dtype=dtype, **options)
            for ordered in in_both_orders(problem):
                for name in TABLE:
                    yield from possible_plans(ordered, name, "gpu")


def in_both_orders(problem: ConvProblem) -> list[ConvProblem]:
    """The problem with its arrays' channels first and last in memory."""
    return [replace(problem, order=order) for order in ORDERS]


def run_plan(plan: Plan, x: Any, weight: Any, out: Any) -> None:
    """Enqueue the plan on arrays of the problem's rank, without bias, residual and activation."""
    given = {"input": x, "weight": weight, "out": out}
    kind = arrays.adapt(plan.problem.op, given)
    axes = (slice(None), slice(None), *(None,) * (3 - plan.problem.ndim))
    x5, weight5, out5 = (array[axes] for array in given.values())
    with kind.serve(given.values()):
        plan.run(x5, weight5, None, None, Epilogue(), out5)
