"""Micro-benchmarks: `pytest bench/` times every algorithm on a few layers with pytest-benchmark."""

import pytest

from bench.check import Oracle
from bench.workload import make_arrays, make_call
from fastconv.algorithms import TABLE
from fastconv.plan import make_plan
from fastconv.problem import make_problem

PROBLEMS = (
    make_problem("conv1d", (1, 15, 1000), (15, 15, 3), stride=2),
    make_problem("conv2d", (1, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3),
    make_problem("conv2d", (1, 64, 56, 56), (64, 64, 3, 3), padding=1),
    make_problem("conv2d", (1, 256, 14, 14), (256, 256, 3, 3), padding=1),
    make_problem("conv2d", (1, 256, 56, 56), (64, 256, 1, 1)),
    make_problem("conv2d", (1, 512, 14, 14), (512, 1, 3, 3), padding=1, groups=512),
    make_problem("conv3d", (1, 16, 8, 28, 28), (16, 16, 3, 3, 3), padding=1),
)
CASES = [
    pytest.param(problem, name, id=f"{problem}-{name}")
    for problem in PROBLEMS
    for name, algorithm in TABLE.items()
    if algorithm.refuses(problem) is None
]


@pytest.mark.parametrize(("problem", "algorithm"), CASES)
def test_layer(benchmark, problem, algorithm):
    benchmark.group = problem.key
    x, w = make_arrays(problem)
    y = benchmark(make_call(problem, x, w, algorithm, prepared=False))
    verdict = Oracle(problem, x, w).judge(y, make_plan(problem, algo=algorithm).error_bound())
    assert verdict.passed, verdict.reason
