"""Cases enter; for each layer and algorithm a row leaves: run, checked against the reference, timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from bench.cases import Case
from bench.check import WRONG, Oracle, Verdict
from bench.rows import Row
from bench.timing import measure
from bench.workload import in_order, make_arrays, make_call, numpy_dtype
from fastconv.algorithms import TABLE
from fastconv.plan import make_plan
from fastconv.problem import ConvProblem

REFERENCE_SHARE = 0.1  # of the multiply-add peak that the float64 reference reaches at least
ALGORITHM_SHARE = 0.25  # and an algorithm


@dataclass(frozen=True)
class Settings:
    """What is run on a case: `seconds` for all cases together, `sampling` to time one algorithm on one."""

    algorithms: tuple[str, ...]
    prepared: bool = False
    seconds: float = float("inf")
    sampling: float = 0.1


class Runner:
    """Runs cases one after the other until its time is up; the machine's peak helps to foresee that."""

    def __init__(self, settings: Settings, peak_gflops: float, clock: Callable[[], float] = perf_counter):
        self.settings = settings
        self.peak_gflops = peak_gflops
        self.clock = clock
        self.deadline = clock() + settings.seconds

    def run(self, case: Case) -> list[Row]:
        """The rows of one case; a single left_out row if the time that is left cannot hold it."""
        if self.clock() + estimate_seconds(case.problem, self.settings, self.peak_gflops) > self.deadline:
            reason = f"did not fit into {self.settings.seconds:g} seconds"
            return [{"kind": "left_out", **case.columns(), "reason": reason}]
        return run_case(case, self.settings)


def estimate_seconds(problem: ConvProblem, settings: Settings, peak_gflops: float) -> float:
    """A cautious guess of what checking and timing one case takes."""
    at_peak = problem.flops / (peak_gflops * 1e9)
    accepting = sum(TABLE[name].refuses(problem) is None for name in settings.algorithms)
    reference = 2 * at_peak / REFERENCE_SHARE
    # Five calls: the checked one, the warm-up and three samples.
    return reference + accepting * max(settings.sampling, 5 * at_peak / ALGORITHM_SHARE)


def run_case(case: Case, settings: Settings) -> list[Row]:
    """Run every algorithm on one layer: a `layer` row if it accepts, a `refusal` row if not."""
    problem = case.problem
    x, w = make_arrays(problem)
    oracle = Oracle(problem, x, w)
    chosen = make_plan(problem).algorithm.name
    rows = []
    for name in settings.algorithms:
        reason = TABLE[name].refuses(problem)
        if reason is not None:
            rows.append({"kind": "refusal", **case.columns(), "algorithm": name, "reason": reason})
            continue
        row = run_algorithm(case, name, settings, x, w, oracle)
        rows.append({**row, "auto": name == chosen})
    return rows


def run_algorithm(
    case: Case, name: str, settings: Settings, x: np.ndarray, w: np.ndarray, oracle: Oracle
) -> Row:
    """Check the output of one algorithm, written over NaNs, then time the call as a user writes it."""
    problem = case.problem
    plan = make_plan(problem, algo=name)
    bound = plan.error_bound()
    call = make_call(problem, x, w, name, settings.prepared)
    poison = np.full(problem.output_shape, np.nan, dtype=numpy_dtype(problem.dtype))
    checked = call(out=in_order(poison, problem.order))
    verdict = oracle.judge(checked, bound)
    times = measure(call, settings.sampling)
    if verdict.passed and not np.array_equal(call(), checked):
        verdict = Verdict(WRONG, "the timed call gave other bits than the checked one")
    return {
        "kind": "layer", **case.columns(), "batch": problem.N, "dtype": problem.dtype,
        "order": problem.order, "algorithm": name, "tile": str(plan.tile), "estimate": plan.cost(),
        "prepared": settings.prepared, "min": times.minimum, "median": times.median, "p80": times.p80,
        "samples": len(times.samples), "bound_factor": bound.factor, "error": verdict.error,
        "passed": verdict.passed, "reason": verdict.reason,
    }  # fmt: skip
