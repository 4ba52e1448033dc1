"""A ConvProblem enters; its arrays, its keyword arguments and a call that computes it leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import fastconv
from fastconv.problem import ConvProblem

SEED = 20150410


def make_arrays(problem: ConvProblem) -> tuple[np.ndarray, np.ndarray]:
    """Input, in the problem's order, and weight; both signs, scaled so that outputs are of order one."""
    random = np.random.default_rng(SEED)
    x = random.standard_normal(problem.input_shape, dtype=np.float32)
    w = random.standard_normal(problem.weight_shape, dtype=np.float32) / np.float32(problem.gemm_k**0.5)
    dtype = numpy_dtype(problem.dtype)
    return in_order(x.astype(dtype), problem.order), w.astype(dtype)


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a problem's dtype; bfloat16 is ml_dtypes'."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def in_order(array: np.ndarray, order: str) -> np.ndarray:
    """The same array with its channels last in memory if `order` says so; its shape stays channels-first."""
    if order == "NCHW":
        return array
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)


def keywords(problem: ConvProblem) -> dict[str, Any]:
    """Stride, padding, dilation and groups as fastconv's operations take them."""
    absent = 3 - problem.ndim
    return {
        "stride": problem.stride[absent:],
        "padding": problem.padding[absent:],
        "dilation": problem.dilation[absent:],
        "groups": problem.groups,
    }


def as_torch(problem: ConvProblem) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """The same for torch, whose convolutions pad alike on both sides, and what to do to its output.

    Where there is less padding behind than before, as Mamba has it, as much is put there as before, and the
    outputs that see it are dropped: a view, so it takes no time.
    """
    options = keywords(problem)
    if any(before < after for before, after in options["padding"]):
        raise ValueError(f"torch pads no more behind than before, got {problem}")
    is_alike = all(before == after for before, after in options["padding"])
    options["padding"] = [before for before, _ in options["padding"]]
    kept = (..., *(slice(size) for size in problem.output_shape[2:]))
    return options, (lambda y: y) if is_alike else (lambda y: y[kept])


def make_call(
    problem: ConvProblem, x: np.ndarray, w: np.ndarray, algo: str, prepared: bool, **more: Any
) -> Callable[..., np.ndarray]:
    """The public call of a user: the function, or the class that has prepared the weight once.

    more  what is fused, by name, as both take it
    """
    options = {**keywords(problem), "algo": algo, "precision": problem.precision, **more}
    if prepared:
        convolution = getattr(fastconv, problem.op.capitalize())(w, **options)
        return lambda **given: convolution(x, **given)
    function = getattr(fastconv, problem.op)
    return lambda **given: function(x, w, **options, **given)
