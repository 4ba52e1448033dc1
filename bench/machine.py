"""Says what a measurement ran on: processor, versions, commit, and the peak and bandwidth measured now."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from bench import peak
from bench.versions import read_commit, read_versions
from fastconv.cpu import device

PACKAGES = ("numpy", "numba", "llvmlite", "ml_dtypes", "torch")
COPY_BYTES = 1 << 27  # larger than the last-level caches of most machines


@dataclass(frozen=True)
class Machine:
    """What the rows of a run say about the machine. Rates are those of all `threads` together."""

    cpu: str
    vector_bits: int
    cores: int
    system: str
    python: str
    versions: dict[str, str]
    commit: str
    dirty: bool
    threads: int
    peak_gflops: float
    bandwidth_gbs: float


def describe(threads: int, dtype: str = "float32") -> Machine:
    """Name the machine and measure it with `threads` threads; `dtype` is that of the arithmetic."""
    commit, dirty = read_commit()
    return Machine(
        cpu=device.current().name,
        vector_bits=device.current().vector_bits,
        cores=len(usable_cpus()),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=read_versions(PACKAGES),
        commit=commit,
        dirty=dirty,
        threads=threads,
        peak_gflops=total_peak(threads, dtype) / 1e9,
        bandwidth_gbs=copy_bandwidth(threads) / 1e9,
    )


def usable_cpus() -> list[int]:
    """The logical processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def total_peak(threads: int, dtype: str) -> float:
    """FLOP/s of fused multiply-adds in the nearest caches, one loop per thread."""
    peak.measure_peak(dtype, 0)  # compiles
    return sum(_on_each_thread(threads, lambda _: peak.measure_peak(dtype)))


def copy_bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes/s read and written by a copy of a large array, split over the threads; the best of several."""
    source = np.ones(COPY_BYTES // 8)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads)))

    def copy(thread: int) -> float:
        np.copyto(parts[thread][1], parts[thread][0])
        return 0.0

    best = float("inf")
    for _ in range(rounds):
        start = perf_counter()
        _on_each_thread(threads, copy)
        best = min(best, perf_counter() - start)
    return 2 * source.nbytes / best


def _on_each_thread(threads: int, work: Callable[[int], float]) -> list[float]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, range(threads)))
