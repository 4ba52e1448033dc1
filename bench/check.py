"""Judges results: the float64 reference of a problem is computed once, then each output gets a verdict.

The bound is element by element (fastconv.algorithms.ErrorBound), so that one wrong element fails.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.workload import keywords, numpy_dtype
from fastconv import reference
from fastconv.algorithms import ErrorBound
from fastconv.problem import ConvProblem

WRONG = 1e300  # the error of what cannot be compared: JSON has no infinity
HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # of the results that are rounded to be stored


@dataclass(frozen=True)
class Verdict:
    """`error` is the largest deviation in units of its bound: at most 1 passes."""

    error: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= 1


class Oracle:
    """The reference result of one problem and the scale of its rounding errors."""

    def __init__(
        self, problem: ConvProblem, x: np.ndarray, w: np.ndarray, expected: np.ndarray | None = None
    ):
        x, w = x.astype(np.float64), w.astype(np.float64)
        self.problem = problem
        self.expected = (
            getattr(reference, problem.op)(x, w, **keywords(problem)) if expected is None else expected
        )
        self.operands = x, w
        self.scales: dict[int, np.ndarray] = {}  # by reach

    def judge(self, y: np.ndarray, bound: ErrorBound) -> Verdict:
        """Compare an output with the reference; `bound` is the plan's."""
        wanted = (self.expected.shape, numpy_dtype(self.problem.dtype))
        if (y.shape, y.dtype) != wanted:
            return Verdict(WRONG, f"shape and dtype must be {wanted}, got {(y.shape, y.dtype)}")
        deviation = np.abs(y.astype(np.float64) - self.expected)
        with np.errstate(divide="ignore", invalid="ignore"):
            units = deviation / self._bound(bound)
        units[np.isnan(units)] = WRONG  # an output that is NaN, which max() and <= would let through
        units[deviation == 0] = 0  # also where the bound is zero
        worst = np.unravel_index(np.argmax(units), units.shape)
        error = min(float(units[worst]), WRONG)
        if error <= 1:
            return Verdict(error)
        position = tuple(int(i) for i in worst)
        found, expected = float(y[worst]), float(self.expected[worst])
        return Verdict(error, f"{error:.3g} times its bound: {found:.9g} for {expected:.9g} at {position}")

    def scale(self, reach: int) -> np.ndarray:
        """The sum of the terms' magnitudes, for errors that travel so many pixels."""
        return np.asarray(reference.error_scale(*self.operands, **keywords(self.problem), reach=reach))

    def _bound(self, bound: ErrorBound) -> np.ndarray:
        if bound.reach not in self.scales:
            self.scales[bound.reach] = self.scale(bound.reach)
        rounding = bound.factor * np.finfo(self.problem.compute_dtype).eps * self.scales[bound.reach]
        return rounding + HALF_ULP.get(self.problem.dtype, 0.0) * np.abs(self.expected)
