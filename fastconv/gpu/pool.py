"""Pooling and its gradients: one thread per element of the result."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv.gpu import launch, product
from fastconv.gpu.product import THREADS
from fastconv.gpu.source import Kernel

if TYPE_CHECKING:
    from fastconv.pool_problem import PoolProblem, Windows


def pool(problem: PoolProblem, x: np.ndarray, out: np.ndarray, indices: np.ndarray | None) -> None:
    """Pool x (N, C, D, H, W) into out and the places of its maxima into indices, both (N, C, O, P, Q)."""
    arguments = {"x": x, "y": out, "places": indices}
    _launch(problem, "POOL", out, (x, out, indices), "outputs", arguments)


def pool_input(
    problem: PoolProblem, grad_output: np.ndarray, indices: np.ndarray | None, out: np.ndarray
) -> None:
    """Write what grad_output (N, C, O, P, Q) gives to the elements of out (N, C, D, H, W).

    indices  of a max pooling; None: an average
    """
    arguments = {"grad": grad_output, "places": indices, "y": out}
    _launch(problem, "INPUT", out, (out, grad_output, indices), "elements", arguments)


def kernels(dtype: str, order: str) -> list[Kernel]:
    """Return all kernels for arrays of a dtype in a memory order."""
    forms = (
        ("POOL", "max", False),
        ("POOL", "max", True),
        ("POOL", "average", False),
        ("INPUT", "max", True),
        ("INPUT", "average", False),
    )
    return [
        _kernel(stage, dtype, order, pool, with_places, index)
        for stage, pool, with_places in forms
        for index in ("int", "long long")
    ]


def _kernel(stage: str, dtype: str, order: str, pool: str, with_places: bool, index: str) -> Kernel:
    defines = {"ORDER": order, "POOL_MAX": int(pool == "max"), "PLACES": int(with_places)}
    return product.stage_kernel("pool", stage, dtype, defines, THREADS, index)


def _launch(
    problem: PoolProblem,
    stage: str,
    out: np.ndarray,
    given: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    count: str,
    arguments: dict[str, Any],
) -> None:
    """Launch a stage; `given` are the arrays of the input's, the output's and the indices' strides."""
    fields, reach = _describe(problem, given)
    blocks = -(-out.size // THREADS)
    index = product.index_type(max(reach, blocks * THREADS))
    with_places = arguments["places"] is not None
    kernel = _kernel(stage, problem.dtype, problem.order, problem.pool, with_places, index)
    launch.launch(kernel, blocks, pool=fields, **arguments, **{count: out.size})


def _describe(
    problem: PoolProblem, given: tuple[np.ndarray, np.ndarray, np.ndarray | None]
) -> tuple[launch.Fields, int]:
    """Return the fields of struct Pool in kernels/pool.cu, and a bound of all sizes and offsets in it."""
    axes = problem.windows
    fields = dict(zip("NCDHWOPQ", problem.input_shape5 + problem.output_shape5[2:]))
    for name in ("kernel", "stride", "padding", "dilation", "after"):
        fields |= {f"{name}_{letter}": getattr(axis, name) for letter, axis in zip("dhw", axes)}
    reach = max(_reach(axis) for axis in axes)
    for name, letters, array in zip("xyi", ("ncdhw", "ncopq", "ncopq"), given):
        steps = [0] * 5 if array is None else product.element_steps(array)
        fields |= {f"{name}_{letter}": step for letter, step in zip(letters, steps)}
        if array is not None:
            reach = max(reach, sum(size * abs(step) for size, step in zip(array.shape, steps)))
    fields |= {"count_padding": int(problem.count_padding), "divisor": problem.divisor or 0}
    numbers = (*map(abs, fields.values()), math.prod(axis.size for axis in axes))
    return launch.Fields(fields), max(reach, *numbers)


def _reach(axis: Windows) -> int:
    """Return a bound of what is computed with the windows of an axis."""
    if not axis.kernel:
        return (axis.size + 1) * (axis.outputs + 1)
    return (
        axis.outputs * axis.stride + 2 * axis.kernel * axis.dilation + axis.size + axis.padding + axis.after
    )
