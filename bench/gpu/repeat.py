"""Runs every algorithm with every tile again and again: one bit that differs between runs is a race."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench.gpu import device, work
from bench.gpu.clock import Deadline
from bench.rows import Row
from fastconv.plan import Plan

RUNS = 1000
BLOCK = 50  # runs between two looks at the clock
DTYPES = ("float32", "float16")


def run(deadline: Deadline) -> Iterator[Row]:
    """A `repeated` row per plan; plans that the time did not reach, or not to the end, are counted."""
    plans = list(work.sample_plans(DTYPES))
    if not plans:
        yield {"kind": "failure", "reason": "there is no kernel to run"}
    complete = 0
    for plan in plans:
        if deadline.is_over():
            break
        row = repeat_plan(plan, deadline)
        complete += row["runs"] == RUNS
        yield row
    if complete < len(plans):
        reason = f"{len(plans) - complete} of {len(plans)} plans were not run {RUNS} times in time"
        yield {"kind": "left_out", "reason": reason}


def repeat_plan(plan: Plan, deadline: Deadline, make_races: Callable[[Any], Any] = device.Races) -> Row:
    """Run a plan RUNS times, each on top of another disturbance, or until the deadline."""
    x, weight, _ = device.make_arrays(plan.problem)
    out = device.make_output(plan.problem)
    races = make_races(out)
    runs = differing = 0
    while runs < RUNS and not (runs and deadline.is_over()):
        for number in range(runs, runs + BLOCK):
            races.disturb(number)
            work.run_plan(plan, x, weight, out)
            races.compare()
        runs += BLOCK
        differing = races.differing()  # waits, so that the clock is looked at when the runs are done
    return {
        "kind": "repeated", "key": plan.problem.key, "algorithm": plan.algorithm.name,
        "tile": str(plan.tile), "runs": runs, "differing": differing, "passed": differing == 0,
        "reason": f"{differing} of {runs} runs differ from the first" if differing else "",
    }  # fmt: skip
