"""A call and a budget of seconds enter, its measured times leave."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter

SAMPLE_FLOOR = 2e-3  # seconds; a shorter call is repeated within one sample, so that the clock does not count
MAX_SAMPLES = 50


@dataclass(frozen=True)
class Times:
    """Seconds per call, one number per sample, in the order they were taken."""

    samples: tuple[float, ...]

    @property
    def minimum(self) -> float:
        return min(self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p80(self) -> float:
        """The sample that four fifths of all samples do not exceed."""
        return sorted(self.samples)[math.ceil(0.8 * len(self.samples)) - 1]


def measure(call: Callable[[], object], budget: float = 0.1, min_samples: int = 3) -> Times:
    """Warm up, then take samples until `budget` seconds are spent and `min_samples` are there."""
    calls = calls_per_sample(call)
    samples: list[float] = []
    start = perf_counter()
    while len(samples) < min_samples or perf_counter() - start < budget:
        samples.append(sample(call, calls))
        if len(samples) == MAX_SAMPLES:
            break
    return Times(tuple(samples))


def calls_per_sample(call: Callable[[], object]) -> int:
    """How many calls fill a sample of SAMPLE_FLOOR seconds; the first call only warms up."""
    call()
    calls = 1
    while (seconds := calls * sample(call, calls)) < SAMPLE_FLOOR:
        calls = max(2 * calls, math.ceil(calls * SAMPLE_FLOOR / seconds)) if seconds else 2 * calls
    return calls


def sample(call: Callable[[], object], calls: int) -> float:
    """Seconds per call over `calls` calls in a row."""
    start = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - start) / calls


def geometric_mean(values: Iterable[float], weights: Iterable[float] | None = None) -> float:
    """Weighted geometric mean; NaN of nothing, because nothing was measured."""
    pairs = [(value, 1.0) for value in values] if weights is None else list(zip(values, weights, strict=True))
    total = sum(weight for _, weight in pairs)
    if not total:
        return math.nan
    return math.exp(sum(weight * math.log(value) for value, weight in pairs) / total)


def settle(call: Callable[[], object], seconds: float) -> None:
    """Call without timing for about that long, at least once."""
    start = perf_counter()
    while True:
        call()
        if perf_counter() - start >= seconds:
            return
