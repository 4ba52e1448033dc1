"""A call that enqueues work on the GPU enters, the seconds leave that the GPU took for it, from a cold L2.

Per sample: overwrite a buffer of twice the L2 until the host has had time to enqueue what follows, then
event, call, event. The GPU never waits for the host between the events, so no Python is in the times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

from bench.timing import Times

SECONDS = 0.03  # for the samples of one call
FEWEST, MOST = 5, 50  # samples
MARGIN = 2.0  # the flush lasts so many times what the host was seen to need
MOST_PASSES = 200


class Gpu(Protocol):
    """What a stopwatch needs of a GPU: gpu.device.CudaEvents, or the tests' stand-in."""

    flush_seconds: float

    def flush(self) -> None:
        """Enqueue one pass over the flush buffer."""

    def record(self) -> Any:
        """Enqueue an event and return it."""

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds between two events, once `synchronize` has been called."""

    def synchronize(self) -> None:
        """Wait until the GPU has done everything."""


def measure(
    gpu: Gpu, call: Callable[[], object], seconds: float = SECONDS, clock: Callable[[], float] = perf_counter
) -> Times:
    """Warm up, then take FEWEST to MOST samples in about `seconds`."""
    call()  # compiles, prepares the weight, lets cuDNN choose its algorithm
    gpu.synchronize()
    passes = flush_passes(gpu, _host_seconds(gpu, call, clock))
    start = clock()
    pilot = _sample(gpu, call, passes, 2)
    each = (clock() - start) / len(pilot)
    count = min(max(math.ceil(seconds / each) if each else MOST, FEWEST), MOST)
    return Times(tuple(_sample(gpu, call, passes, count)))


def flush_passes(gpu: Gpu, host_seconds: float) -> int:
    """Passes of the flush that keep the GPU busy while the host enqueues the call."""
    return min(max(math.ceil(MARGIN * host_seconds / gpu.flush_seconds), 1), MOST_PASSES)


def _host_seconds(gpu: Gpu, call: Callable[[], object], clock: Callable[[], float]) -> float:
    """What the host needs to enqueue the call, the longest of three."""
    longest = 0.0
    for _ in range(3):
        start = clock()
        call()
        longest = max(longest, clock() - start)
        gpu.synchronize()
    return longest


def _sample(gpu: Gpu, call: Callable[[], object], passes: int, count: int) -> list[float]:
    events = []
    for _ in range(count):
        for _ in range(passes):
            gpu.flush()
        start = gpu.record()
        call()
        events.append((start, gpu.record()))
    gpu.synchronize()
    return [gpu.elapsed(start, end) for start, end in events]
