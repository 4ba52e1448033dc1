"""THE TABLE: one row per algorithm says what it is, which problems it refuses and how exact it is.

Dispatch, `explain`, the tests and the benchmarks iterate over it. What an algorithm costs, in seconds and in bytes of
workspace, depends on a backend's tiles and stands in that backend's file of the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastconv.problem import ConvProblem

DIRECT_ERROR = 4.0
"""Bound of a direct sum in units of eps * conv(|x|, |w|); 1.5 is the worst that was measured."""


@dataclass(frozen=True)
class Algorithm:
    """One row. Applicable means correct: a problem that is not refused is computed within the error bound.

    name      as in algo=, and of the files that hold it: cpu/<name>.py, gpu/<name>.py, kernels/<name>.cu
    summary   one sentence
    source    the paper it comes from
    refuses   problem -> why it cannot be run, in words, or None
    error_factor  tile -> c in |y - reference| <= c * eps * conv(|x|, |w|), element by element
    exact     tile -> whether sums of small integers come out exact
    """

    name: str
    summary: str
    source: str
    refuses: Callable[[ConvProblem], str | None]
    error_factor: Callable[[Any], float] = lambda tile: DIRECT_ERROR
    exact: Callable[[Any], bool] = lambda tile: True

    def error_bound(self, problem: ConvProblem, tile: Any) -> float:
        """Return c in |y - reference| <= c * eps * conv(|x|, |w|), eps that of the arithmetic's dtype."""
        return self.error_factor(tile)


def _accepts_all(problem: ConvProblem) -> str | None:
    return None


def _winograd_refuses(problem: ConvProblem) -> str | None:
    if problem.weight_shape5[2:] != (1, 3, 3) or problem.D != 1 or problem.padding[0] != (0, 0):
        return "needs a 3 x 3 kernel over one plane"
    if problem.stride != (1, 1, 1) or problem.dilation != (1, 1, 1):
        return "needs stride 1 and dilation 1"
    return None


def _pointwise_refuses(problem: ConvProblem) -> str | None:
    if problem.weight_shape5[2:] != (1, 1, 1):
        return "needs a kernel of extent 1"
    if any(pair != (0, 0) for pair in problem.padding):
        return "needs padding 0"
    return None


def _depthwise_refuses(problem: ConvProblem) -> str | None:
    if problem.groups != problem.C:
        return f"needs groups = C = {problem.C}"
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
            "F(2x2, 3x3) or F(4x4, 3x3): 2.25 or 4 times fewer multiplications, by transforms of tiles",
            "Winograd 1980; Lavin and Gray 2016, arXiv:1509.09308",
            _winograd_refuses,
            error_factor=lambda tile: 64.0 if tile.m == 4 else DIRECT_ERROR,
            exact=lambda tile: tile.m == 2,
        ),
        Algorithm(
            "pointwise",
            "1x1: a matrix product of the weight and the pixels, read where they lie",
            "Lin, Chen, Yan 2013, arXiv:1312.4400",
            _pointwise_refuses,
        ),
        Algorithm(
            "depthwise",
            "every channel has its own filters: rows of one channel stay in the nearest cache",
            "Sifre 2014; Howard et al. 2017 (MobileNets), arXiv:1704.04861",
            _depthwise_refuses,
        ),
    )
}
