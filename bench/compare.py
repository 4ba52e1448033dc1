"""Cases enter, a row per case leaves with the times of fastconv and of another library, losses included."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.cases import Case
from bench.machine import usable_cpus
from bench.operations import OPERATIONS, turn
from bench.rows import Row
from bench.session import CommandError
from bench.side import Failure, serve
from bench.timing import Times
from fastconv.algorithms import TABLE
from fastconv.plan import make_plan
from fastconv.problem import ConvProblem

INSTALL = {"torch": "pip install torch==2.13.0"}
THREAD_VARIABLES = ("FASTCONV_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Settings:
    """How the sides are run: `rounds` turns each, both bound to the same `threads` processors."""

    baseline: str
    operation: str
    algo: str
    prepared: bool
    rounds: int
    threads: int

    @property
    def cpus(self) -> list[int]:
        """The last of the usable processors, because the first ones serve most interrupts."""
        return usable_cpus()[-self.threads :]

    def conditions(self, batch: int) -> str:
        """What a reader has to know to believe the numbers."""
        weights = "prepared once" if self.prepared else "given as they are, in every call"
        return (
            f"What is timed: {OPERATIONS[self.operation].about}; samples: {batch}. "
            f"Each library in its own process, one at work at a time, turn about over {self.rounds} rounds, "
            f"threads: {self.threads}, bound to processors {self.cpus}. The same arrays are used again and "
            f"again, so they stay in cache where they fit. fastconv's weights are {weights}. "
            f"{self.baseline} runs eager, in the better of its memory orders, all operands "
            f"converted beforehand."
        )


def require(library: str, threads: int) -> None:
    """Stop if the library is missing, with the line that installs it, or if there are fewer processors."""
    if threads > len(usable_cpus()):
        raise CommandError(f"--threads must be at most {len(usable_cpus())} here, got {threads}")
    if importlib.util.find_spec(library) is None:
        raise CommandError(
            f"compare --baseline {library} needs {library}, which is not installed: {INSTALL[library]}"
        )


def run_cases(cases: Sequence[Case], settings: Settings) -> Iterator[Row]:
    """Yield one row per case; no layer is left out."""
    with start("fastconv", settings) as ours, start(settings.baseline, settings) as theirs:
        for case in cases:
            yield run_case(case, settings, ours, theirs)


def run_case(case: Case, settings: Settings, ours: Child, theirs: Child) -> Row:
    """Check both sides' results against the reference, then let them take turns."""
    problem = case.problem
    algo, refusal = _accepted(turn(problem, settings.operation), settings.algo)
    plan = make_plan(turn(problem, settings.operation), algo=algo)
    bound = plan.error_bound()
    oracle = OPERATIONS[settings.operation](problem).oracle()
    verdicts = {
        f"{side.library} {order}": oracle.judge(output, bound)
        for side in (ours, theirs)
        for order, output in side.ask("load", problem, settings.operation, algo, settings.prepared).items()
    }
    worst = max(verdicts, key=lambda name: verdicts[name].error)
    verdict = verdicts[worst]
    mine, baseline = _take_turns(settings.rounds, ours, theirs)
    best = min(baseline, key=lambda order: baseline[order].median)
    return {
        "kind": "compare", **case.columns(), "operation": settings.operation,
        "algorithm": plan.algorithm.name, "tile": str(plan.tile), "refusal": refusal,
        "prepared": settings.prepared, "order": problem.order, "dtype": problem.dtype,
        **_columns("", mine.values()), "baseline": settings.baseline, "baseline_order": best,
        **_columns("baseline_", baseline.values()),
        "baseline_orders": {order: times.median for order, times in baseline.items()},
        "error": verdict.error, "passed": verdict.passed,
        "reason": "" if verdict.passed else f"{worst}, {verdict.reason}",
        "conditions": settings.conditions(problem.N),
    }  # fmt: skip


def _accepted(problem: ConvProblem, algo: str) -> tuple[str, str]:
    """The algorithm to ask for: `auto`, with the reason, where the wanted one refuses."""
    refusal = TABLE[algo].refuses(problem) if algo in TABLE else None
    return ("auto", refusal) if refusal else (algo, "")


def _take_turns(rounds: int, ours: Child, theirs: Child) -> tuple[dict[str, Times], dict[str, Times]]:
    samples: dict[Child, dict[str, tuple[float, ...]]] = {ours: {}, theirs: {}}
    for number in range(rounds):
        # Who begins changes, so that neither always finds the caches as the other left them.
        for side in (ours, theirs) if number % 2 == 0 else (theirs, ours):
            for order, taken in side.ask("take_turn").items():
                samples[side][order] = samples[side].get(order, ()) + taken
    mine, baseline = (
        {order: Times(taken) for order, taken in samples[side].items()} for side in (ours, theirs)
    )
    return mine, baseline


def _columns(prefix: str, orders: Iterable[Times]) -> Row:
    """Each statistic is the least of any memory order's."""
    times = list(orders)
    return {
        f"{prefix}min": min(each.minimum for each in times),
        f"{prefix}median": min(each.median for each in times),
        f"{prefix}p80": min(each.p80 for each in times),
        f"{prefix}samples": len(times[0].samples),
    }


class Child:
    """A process that serves one library."""

    def __init__(self, library: str, connection: Any):
        self.library = library
        self.connection = connection

    def ask(self, *request: Any) -> Any:
        """Send a request and wait for its answer; what the child raised is raised here."""
        self.connection.send(request)
        try:
            answer = self.connection.recv()
        except EOFError:
            raise RuntimeError(f"the {self.library} process ended during {request[0]}") from None
        if isinstance(answer, Failure):
            raise RuntimeError(f"in the {self.library} process: {answer}")
        return answer


@contextmanager
def start(library: str, settings: Settings) -> Iterator[Child]:
    """A fresh process whose thread pools are told their size before they are made."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(settings.threads)))
    spawn = multiprocessing.get_context("spawn")
    connection, far_end = spawn.Pipe()
    process = spawn.Process(target=serve, args=(far_end, library, settings.cpus), daemon=True)
    process.start()
    far_end.close()
    try:
        yield Child(library, connection)
    finally:
        connection.close()
        process.join(timeout=5)
        process.kill()
