"""Runs the tests that want a GPU, then every layer of every network with every algorithm, tile and order.

The layers' reference is torch in float64 on the GPU, where torch is there: then the layers that are timed at
the larger batch follow. Else it is the NumPy reference, the smallest layers first, as far as the time
reaches.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, Protocol

from bench.cases import Case, all_networks, collect
from bench.check import Oracle, Verdict
from bench.gpu import device, work
from bench.gpu.clock import Deadline
from bench.gpu.layers import large_cases
from bench.rows import Row
from bench.versions import CHECKOUT
from fastconv.algorithms import TABLE, ErrorBound
from fastconv.plan import possible_plans
from fastconv.problem import ConvProblem

TESTS_SHARE = 0.6  # of the part's time
FILES = [
    "tests/test_algorithms.py",
    "tests/test_gpu_kernels.py",
    "tests/test_pool.py",
    "tests/test_functional.py",
    "tests/test_grad_around.py",
]  # those of tests/ that need no more than pytest
# Most of their time goes into compiling kernels, which processes do side by side.
PROCESSES = ["--numprocesses", str(min(os.cpu_count() or 1, 8))] if find_spec("xdist") else []
TESTS = ["-m", "pytest", *FILES, "-m", "gpu", "-q", "-p", "no:cacheprovider", *PROCESSES]
COPIES = 30  # of input and output, in bytes of float32, that a judge in float64 needs at most
TAIL = 30  # lines of a failed pytest run that are kept


class Judge(Protocol):
    """What tells whether an output is right: NumpyJudge or torch_side.TorchJudge."""

    def judge(self, y: Any, bound: ErrorBound) -> Verdict:
        """Compare an output on the GPU with the reference."""


class NumpyJudge:
    """The reference that judges everything else too, on copies in the host's memory."""

    name = "the NumPy reference"

    def __init__(self, problem: ConvProblem, x: Any, weight: Any):
        self.oracle = Oracle(problem, device.to_host(x), device.to_host(weight))

    def judge(self, y: Any, bound: ErrorBound) -> Verdict:
        return self.oracle.judge(device.to_host(y), bound)


def run(deadline: Deadline) -> Iterator[Row]:
    """One `tests` row, a `checked` row per layer and algorithm, a `left_out` row for what did not fit."""
    yield run_tests(deadline.part(TESTS_SHARE))
    cases, impossible = collect(all_networks())
    yield from impossible
    if device.has_torch():
        from bench.gpu.torch_side import TorchJudge

        yield from check_cases([*cases, *large_cases()], TorchJudge, deadline)
    else:
        cases.sort(key=lambda case: case.problem.flops)
        yield from check_cases(cases, NumpyJudge, deadline)


def run_tests(deadline: Deadline, arguments: list[str] = TESTS) -> Row:
    """Run pytest in a process of its own; no test at all is a failure, and so are tests that were stopped."""
    row = {"kind": "tests", "command": "python " + " ".join(arguments)}
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(
            command, cwd=CHECKOUT, capture_output=True, text=True, timeout=deadline.left(), check=False
        )
    except subprocess.TimeoutExpired:
        reason = f"the tests did not end within {deadline.seconds:.0f} s and were stopped"
        return {**row, "status": None, "summary": "stopped", "passed": False, "reason": reason}
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
    passed = done.returncode == 0
    return {
        **row, "status": done.returncode, "summary": lines[-1].strip("= ") if lines else "",
        "passed": passed, "reason": "" if passed else "\n".join(lines[-TAIL:]),
    }  # fmt: skip


def check_cases(cases: list[Case], make_judge: Callable[..., Judge], deadline: Deadline) -> Iterator[Row]:
    """The rows of each case, as far as the time reaches."""
    for number, case in enumerate(cases):
        if deadline.is_over():
            reason = f"{len(cases) - number} of {len(cases)} layers were not verified in time"
            yield {"kind": "left_out", "reason": reason}
            return
        if COPIES * case.problem.bytes > device.total_memory():
            reason = "the GPU's memory is too small to verify it"
            yield {"kind": "left_out", **case.columns(), "batch": case.problem.N, "reason": reason}
            continue
        yield from check_case(case, make_judge)
        device.free_memory()


def check_case(case: Case, make_judge: Callable[..., Judge]) -> Iterator[Row]:
    """One row per algorithm that accepts the layer: the worst of all tiles in both orders."""
    x, weight, _ = device.make_arrays(case.problem)
    judge = make_judge(case.problem, x, weight)
    inputs = {problem: device.in_order(x, problem.order) for problem in work.in_both_orders(case.problem)}
    for name in TABLE:
        verdicts = {}
        for problem, ordered in inputs.items():
            for plan in possible_plans(problem, name, "gpu"):
                out = device.make_output(problem)
                work.run_plan(plan, ordered, weight, out)
                verdicts[f"tile {plan.tile}, {problem.order}"] = judge.judge(out, plan.error_bound())
        if verdicts:
            yield _row(case, name, verdicts, make_judge)


def _row(case: Case, name: str, verdicts: dict[str, Verdict], make_judge: Any) -> Row:
    worst = max(verdicts, key=lambda way: verdicts[way].error)
    verdict = verdicts[worst]
    return {
        "kind": "checked", "network": case.network, "layer": case.layer, "key": case.problem.key,
        "algorithm": name, "results": len(verdicts), "against": make_judge.name,
        "error": float(f"{verdict.error:.3g}"), "passed": verdict.passed,
        "reason": "" if verdict.passed else f"{worst}: {verdict.reason}",
    }  # fmt: skip
