"""Compiles every kernel, of all algorithms, dtypes, orders and tiles, into CuPy's cache on disk."""

from __future__ import annotations

import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from itertools import product
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from bench.gpu.clock import Deadline
from bench.gpu.work import cover, kernels_of, sources
from bench.rows import Row
from fastconv.gpu.cupy_driver import OPTIONS
from fastconv.problem import ITEMSIZE

if TYPE_CHECKING:
    from fastconv.gpu.source import Kernel

MOST_WORKERS = 16  # each holds a CUDA context of some hundred MB
BATCH = 8  # kernels per task


class Compiled(NamedTuple):
    """What came of one kernel; `local` are a thread's bytes in local memory, where registers spill to."""

    algorithm: str
    name: str
    seconds: float
    registers: int = 0
    local: int = 0
    reason: str = ""


def run(deadline: Deadline) -> Iterator[Row]:
    """A `compiled` row per algorithm."""
    found = find_kernels()
    if not found:
        yield {"kind": "failure", "reason": "there is no kernel to compile"}
        return
    batches = [found[start : start + BATCH] for start in range(0, len(found), BATCH)]
    pool = ProcessPoolExecutor(
        min(os.cpu_count() or 1, MOST_WORKERS), mp_context=multiprocessing.get_context("spawn")
    )
    done, _ = wait([pool.submit(compile_batch, batch) for batch in batches], deadline.left())
    pool.shutdown(wait=False, cancel_futures=True)
    results = [result for task in done for result in task.result()]
    yield from summarise(results)
    if missing := len(found) - len(results):
        yield {"kind": "left_out", "reason": f"{missing} of {len(found)} kernels were not compiled in time"}


def find_kernels() -> list[tuple[str, Kernel]]:
    """All kernels with their sources, first as many as have every pair of settings: time may be short."""
    first, others = [], []
    for name, dtype in product(sources(), ITEMSIZE):
        kernels = kernels_of(name, dtype)
        chosen = dict.fromkeys(cover(kernels))
        first += [(name, kernel) for kernel in chosen]
        others += [(name, kernel) for kernel in kernels if kernel not in chosen]
    return first + others


def compile_batch(batch: list[tuple[str, Kernel]]) -> list[Compiled]:
    """Compile kernels in this process; an error of the compiler is a result."""
    return [_compile(algorithm, kernel) for algorithm, kernel in batch]


def _compile(algorithm: str, kernel: Kernel) -> Compiled:
    import cupy

    start = perf_counter()
    try:
        # The driver's source and options, so that what is compiled here is found in CuPy's cache there.
        function = cupy.RawModule(code=kernel.source, options=OPTIONS).get_function(kernel.name)
    except Exception as error:  # whatever CuPy raises: the next kernel is to be tried all the same
        reason = f"{type(error).__name__}: {error}"
        return Compiled(algorithm, kernel.name, perf_counter() - start, reason=reason)
    seconds = perf_counter() - start
    return Compiled(algorithm, kernel.name, seconds, function.num_regs, function.local_size_bytes)


def summarise(results: Iterable[Compiled]) -> Iterator[Row]:
    """A row per algorithm: how many kernels, the most registers, which ones spill and which ones fail."""
    groups: dict[str, list[Compiled]] = defaultdict(list)
    for result in results:
        groups[result.algorithm].append(result)
    for algorithm, group in groups.items():
        failed = {each.name: each.reason for each in group if each.reason}
        yield {
            "kind": "compiled", "algorithm": algorithm, "kernels": len(group),
            "seconds": round(sum(each.seconds for each in group), 2),
            "registers": max(each.registers for each in group),
            "spilled": {each.name: each.local for each in group if each.local},
            "passed": not failed, "reason": "; ".join(f"{name}: {why}" for name, why in failed.items()),
        }  # fmt: skip
