"""THE TABLE: one row per algorithm says what it is, which problems it refuses and how exact it is.

Dispatch, `explain`, the tests and the benchmarks iterate over it. What an algorithm costs, in seconds and in
bytes of workspace, depends on a backend's tiles and stands in that backend's file of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastconv.problem import ConvProblem

DIRECT_ERROR = 4.0
"""Error factor of a direct sum of short length; 1.5 is the worst that was measured on normal data."""


class ErrorBound(NamedTuple):
    """|y - reference| <= factor * eps * conv(|x|, |w|), element by element, eps that of the compute_dtype.

    reach  pixels; above 0, |x| stands for the largest |x| so many rows and columns away, in the same plane: a
           transform of tiles spreads the rounding errors of a large element over outputs whose own window
           does not hold it
    """

    factor: float
    reach: int


@dataclass(frozen=True)
class Algorithm:
    """One row. Applicable means correct: a problem that is not refused is computed within the error bound.

    name      as in algo=, and of the files that hold it: cpu/<name>.py, gpu/<name>.py, kernels/<name>.cu
    summary   one sentence
    source    the paper it comes from
    refuses   problem -> why it cannot be run, in words, or None
    exact     (problem, tile) -> whether sums of small integers come out exact
    error_factor, reach  (problem, tile) -> the two numbers of the ErrorBound, the factor for short sums
    """

    name: str
    summary: str
    source: str
    refuses: Callable[[ConvProblem], str | None] = field(repr=False)
    exact: Callable[[ConvProblem, Any], bool] = field(default=lambda problem, tile: True, repr=False)
    error_factor: Callable[[ConvProblem, Any], float] = field(
        default=lambda problem, tile: DIRECT_ERROR, repr=False
    )
    reach: Callable[[ConvProblem, Any], int] = field(default=lambda problem, tile: 0, repr=False)

    def error_bound(self, problem: ConvProblem, tile: Any) -> ErrorBound:
        """Return the bound of every element's error.

        The rounding errors of n additions to a sum that only grows add up to about sqrt(n) / 2 of its eps
        (Higham and Mary 2019, doi:10.1137/18M1226312): 29.7 was measured for 4,608 taps of one sign, where
        sqrt(n) is 67.9.
        """
        factor = max(self.error_factor(problem, tile), math.sqrt(problem.terms))
        return ErrorBound(factor, self.reach(problem, tile))


def _accepts_all(problem: ConvProblem) -> str | None:
    return None


def _winograd_refuses(problem: ConvProblem) -> str | None:
    extents, strides, taps = (problem.R, problem.S), problem.stride[1:], problem.phase_taps
    if problem.dilation[1:] != (1, 1):
        return "needs dilation 1 along rows and columns"
    if problem.direction != "forward" and strides != (1, 1):
        return "needs stride 1 along rows and columns for a gradient"
    if not set(strides) <= {1, 2, 4}:
        return "needs stride 1, 2 or 4 along rows and columns"
    if strides[1] == 4 and problem.compute_dtype == "float64":  # a vector of 16 bytes holds two
        return "needs stride 1 or 2 along columns in float64"
    if any(extent < stride for extent, stride in zip(extents, strides, strict=True)):
        return "needs as many taps as the stride along rows and columns"
    if max(taps) not in (2, 3, 4, 5) or min(taps) not in (1, max(taps)):
        return "needs as many taps along rows as along columns, 2 to 5 in steps of the stride, or 1 along one"
    if problem.precision == "highest" and max(taps) > 3:
        return "needs 2 or 3 taps, in steps of the stride, for precision 'highest'"
    return None


def _winograd_error(problem: ConvProblem, tile: Any) -> float:
    """Return a factor above the worst that was measured, of one channel.

    On normal data that is 2.6 for F(2 x 2, 3 x 3), 17.3 for F(4 x 4, 3 x 3), 9.0 for F(2 x 2, 5 x 5) and 17.9
    for F(4, 5); under filters of one tap, in a corner, 4.7, 48, 50 and 36. In the gradient of the weight it
    is less: 3.8, 21, 35 and 22 where every channel of grad_output has one element. In a corner of filters
    of 2 or 4 taps, or of so many in a phase, it is 4 for F(2 x 2, 2 x 2), 16 for F(4 x 4, 2 x 2), 17 for
    F(2 x 2, 4 x 4) and 80 for F(4 x 4, 4 x 4).
    """
    if _is_like_direct(problem, tile):
        return DIRECT_ERROR
    return 128.0 if tile.m == max(problem.phase_taps) == 4 else 64.0


def _pointwise_refuses(problem: ConvProblem) -> str | None:
    if problem.weight_shape5[2:] != (1, 1, 1):
        return "needs a kernel of extent 1"
    if any(pair != (0, 0) for pair in problem.padding):
        return "needs padding 0"
    return None


def _is_like_direct(problem: ConvProblem, tile: Any) -> bool:
    """Say whether F(m, k) is F(2, 2) or F(2, 3), whose transforms only add and halve."""
    return bool(tile.m == 2) and max(problem.phase_taps) <= 3


def _depthwise_refuses(problem: ConvProblem) -> str | None:
    if problem.groups != problem.C:
        return f"needs groups = C = {problem.C}"
    if problem.direction == "grad_input" and problem.K != problem.C:
        return f"needs K = C = {problem.C} for the gradient of the input"
    return None


TABLE: dict[str, Algorithm] = {
    row.name: row
    for row in (
        Algorithm(
            "direct",
            "every tap is a shift of a padded band of the input; nothing is gathered per tap",
            "Zhang, Franchetti, Low 2018, arXiv:1809.10170; Dukhan 2019, arXiv:1907.02129",
            _accepts_all,
        ),
        Algorithm(
            "im2col",
            "the taps of a block of pixels are gathered into columns of a matrix, then multiplied",
            "Chellapilla, Puri, Simard 2006, inria-00112631; Jia 2014 (Caffe), arXiv:1408.5093",
            _accepts_all,
        ),
        Algorithm(
            "winograd",
            "F(2x2, 3x3), F(4x4, 3x3), F(4x4, 4x4) ...: 1.4 to 5 times fewer multiplications, by transforms",
            "Winograd 1980; Lavin and Gray 2016, arXiv:1509.09308; Barabasz et al. 2018, arXiv:1803.10986; "
            "Huang et al. 2020, arXiv:2002.00552",
            _winograd_refuses,
            exact=_is_like_direct,
            error_factor=_winograd_error,
            reach=lambda problem, tile: (
                (tile.m - 1) * max(problem.stride[1:]) + max(problem.R, problem.S) - 1
            ),
        ),
        Algorithm(
            "pointwise",
            "1x1: a matrix product of the weight and the pixels, read where they lie",
            "Lin, Chen, Yan 2013, arXiv:1312.4400",
            _pointwise_refuses,
        ),
        Algorithm(
            "depthwise",
            "every channel has its own filters: rows of one channel stay in registers or near them",
            "Sifre 2014; Howard et al. 2017 (MobileNets), arXiv:1704.04861",
            _depthwise_refuses,
        ),
    )
}
