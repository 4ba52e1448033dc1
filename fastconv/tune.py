"""A convolution's arguments enter, the measured times of all ways to compute it leave; the fastest is kept.

This module stands above plan.py, which reads what is kept here: what tune finds fastest is from then on the
choice of algo="auto" for the same problem on the same device.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from fastconv import arrays, measured, ops
from fastconv import plan as planning
from fastconv.algorithms import TABLE
from fastconv.problem import ConvError, ConvProblem, Padding, PerAxis

Timer = Callable[[Callable[[], None]], float]

BUDGET = 2.0
"""Seconds of timed rounds. In each, every rival runs once: a slow moment of the machine hits them all."""
ROUNDS = 100
"""Rounds at most."""
OPENING_ROUNDS = 3
"""Rounds in which all take part; then those drop out whose fastest run is not NEAR the fastest of all."""
NEAR = 1.25


@dataclass(frozen=True)
class Timing:
    """Seconds of each run of one algorithm with one tile."""

    algorithm: str
    tile: str
    samples: tuple[float, ...]

    @property
    def minimum(self) -> float:
        """The fastest run in seconds, by which the ways are ranked: what disturbs a run only adds to it."""
        return min(self.samples)

    @property
    def median(self) -> float:
        """The middle run in seconds."""
        return statistics.median(self.samples)


@dataclass(frozen=True)
class TuneResult:
    """What tune measured, fastest first, and what it could not measure; print it.

    problem  the problem
    device   the name of the CPU or GPU
    timings  one per algorithm and tile
    refused  (algorithm, reason) of the others
    path     the file that remembers the fastest, None if it could not be written
    """

    problem: ConvProblem
    device: str
    timings: tuple[Timing, ...]
    refused: tuple[tuple[str, str], ...]
    path: Path | None

    @property
    def best(self) -> Timing:
        """The fastest."""
        return self.timings[0]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n".join([
            f"{self.problem.op} {self.problem} on {self.device}",
            f"    {'algorithm':<10} {'tile':<9} {'min ms':>9} {'median ms':>10} {'GFLOP/s':>8} {'runs':>5}",
            *(self._line(timing) for timing in self.timings),
            *(f"    {name:<10} {reason}" for name, reason in self.refused),
            f"kept in {self.path}" if self.path else "not kept",
        ])  # fmt: skip

    def _line(self, timing: Timing) -> str:
        mark = "->" if timing is self.best else "  "
        rate = self.problem.flops / timing.minimum / 1e9
        return (
            f" {mark} {timing.algorithm:<10} {timing.tile:<9} {timing.minimum * 1e3:9.4f} "
            f"{timing.median * 1e3:10.4f} {rate:8.1f} {len(timing.samples):5}"
        )


def tune(
    input: Any,
    weight: Any,
    bias: Any | None = None,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    *,
    precision: str = "high",
    activation: str | tuple[str, float] | None = None,
    residual: Any | None = None,
    layout: str | None = None,
    flip: bool = False,
) -> TuneResult:
    """Measure every algorithm with every tile on these arrays and remember the fastest for algo="auto".

    The arguments, shapes, dtypes and errors are those of conv1d, conv2d or conv3d, as the rank of the weight
    says; they are only read. What is timed is such a call: an algorithm that transforms the weight does so
    every time. It takes some seconds, and about a minute the first time, when all kernels are compiled. An
    empty batch is a ConvError: there is nothing to time.

    >>> import numpy as np
    >>> result = tune(np.ones((1, 8, 12, 12), np.float32), np.ones((8, 8, 1, 1), np.float32))
    >>> [name for name, reason in result.refused]
    ['winograd', 'depthwise']
    """
    op = ops.find_op("tune", weight)
    options = (stride, padding, dilation, groups, precision, layout or ops.LAYOUTS[op][0], flip)
    call = ops.bind(op, input, weight, bias, options, activation, residual, None)
    problem = call.frame.problem
    if problem.N == 0:
        raise ConvError(f"{op}: N must be at least 1 to be measured, got 0 ({problem})")
    backend = call.kind.backend
    with call.kind.serve(call.given.values()):
        # A ConvError if nothing keeps to the workspace limit.
        device = planning.make_plan(problem, backend=backend).device.label()
        plans, refused = _candidates(problem, backend)
        samples = _take_turns(_bind_plans(call, plans), _timer(backend))
    timings = [Timing(p.algorithm.name, str(p.tile), tuple(s)) for p, s in zip(plans, samples, strict=True)]
    timings.sort(key=lambda timing: timing.minimum)
    best = timings[0]
    record = measured.Record(algorithm=best.algorithm, tile=best.tile, seconds=best.minimum)
    path = measured.store(problem, device, record)
    planning.forget_plans()
    return TuneResult(problem, device, tuple(timings), refused, path)


def _bind_plans(call: ops.Call, plans: list[planning.Plan]) -> list[Callable[[], None]]:
    """The runs to be timed: every plan on the caller's arrays, into an output of their own."""
    frame, given = call.frame, call.given
    x = frame.view5(arrays.to_computable(given["input"], frame.compute))
    weight, bias = call.filters()
    residual = None
    if "residual" in given:
        residual = frame.view5(arrays.to_computable(given["residual"], frame.compute))
    out = frame.view5(frame.allocate(call.kind))
    return [partial(plan.run, x, weight, bias, residual, call.epilogue, out) for plan in plans]


def _candidates(
    problem: ConvProblem, backend: str
) -> tuple[list[planning.Plan], tuple[tuple[str, str], ...]]:
    """A plan per algorithm and tile within the workspace limit, and why there is none of the others."""
    plans: list[planning.Plan] = []
    refused: list[tuple[str, str]] = []
    for name in TABLE:
        fitting = planning.fitting_plans(problem, name, backend)
        plans += fitting
        if not fitting:
            reason = (
                planning.why_refused(problem, name, backend)
                or "needs more workspace than FASTCONV_WORKSPACE permits"
            )
            refused.append((name, reason))
    return plans, tuple(refused)


def _take_turns(calls: list[Callable[[], None]], time: Timer) -> list[list[float]]:
    """Seconds of every run of each call, after one that warms up (and compiles)."""
    for call in calls:
        call()
    samples: list[list[float]] = [[] for _ in calls]
    rivals = list(range(len(calls)))
    start = perf_counter()
    for finished in range(1, ROUNDS + 1):
        for index in rivals:
            samples[index].append(time(calls[index]))
        if perf_counter() - start >= BUDGET:
            break
        if finished >= OPENING_ROUNDS:
            near = NEAR * min(map(min, samples))
            rivals = [index for index in rivals if min(samples[index]) <= near]
    return samples


def _timer(backend: str) -> Timer:
    """What measures a run: the clock, or the device's own events, because a GPU computes after the call."""
    if backend == "cpu":
        return _time
    from fastconv.gpu import launch

    return launch.driver().time


def _time(call: Callable[[], None]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start
