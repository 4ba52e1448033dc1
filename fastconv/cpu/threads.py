"""Runs the tasks of a convolution on several threads, safely under many callers and after a fork.

Numba's own layers do not serve: `workqueue` ends the process when two Python threads call at once, and
GNU OpenMP ends it when a forked child calls after its parent did. The kernels release the GIL, so plain
Python threads are enough. The caller works too, and never waits for a worker that has not begun.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

from fastconv.problem import ConvError

CHUNKS_PER_THREAD = 4  # so that a thread that is held up does not hold up the others

Work = Callable[[int, int], None]


def thread_count() -> int:
    """Return the threads to use: FASTCONV_THREADS, else the cores that this process may run on."""
    wanted = os.environ.get("FASTCONV_THREADS", "")
    if not wanted:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ConvError(f"FASTCONV_THREADS must be a whole number of at least 1, got {wanted!r}")
    return int(wanted)


class _Job:
    """Tasks 0 ... count-1, handed out in chunks to whoever asks."""

    def __init__(self, work: Work, count: int, chunks: int) -> None:
        self.work = work
        self.edges = [count * i // chunks for i in range(chunks + 1)]
        self.following = itertools.count()  # next() on it is one step under the GIL
        self.unfinished = chunks
        self.error: BaseException | None = None  # after one, nothing more is begun
        self.lock = threading.Lock()
        self.done = threading.Event()

    def help(self) -> None:
        """Run chunks until none is left."""
        while (chunk := next(self.following)) < len(self.edges) - 1:
            try:
                if self.error is None:
                    self.work(self.edges[chunk], self.edges[chunk + 1])
            except BaseException as error:  # handed to the caller, who raises it
                self.error = error
            finally:
                with self.lock:
                    self.unfinished -= 1
                    if self.unfinished == 0:
                        self.done.set()


class _Pool:
    """Worker threads, started when first needed."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[_Job] = SimpleQueue()
        self.workers = 0
        self.lock = threading.Lock()

    def submit(self, job: _Job, helpers: int) -> None:
        with self.lock:
            while self.workers < helpers:
                try:
                    threading.Thread(target=self._serve, name="fastconv", daemon=True).start()
                except RuntimeError:  # the system gives no more threads; the caller does what they would have
                    break
                self.workers += 1
        for _ in range(helpers):
            self.queue.put(job)

    def _serve(self) -> None:
        while True:
            self.queue.get().help()


_pool = _Pool()


def _forget_pool() -> None:
    global _pool
    _pool = _Pool()  # a forked child has none of its parent's threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def run_tasks(work: Work, count: int, threads: int) -> None:
    """Call work(first, last) until every task in 0 ... count-1 has been covered once."""
    threads = min(threads, count)
    if threads <= 1:
        work(0, count)
        return
    job = _Job(work, count, min(count, threads * CHUNKS_PER_THREAD))
    _pool.submit(job, threads - 1)
    while not job.done.is_set():
        try:
            job.help()
            job.done.wait()
        except BaseException as error:  # such as Ctrl-C: workers may still write to the caller's arrays
            job.error = error
    if job.error is not None:
        raise job.error
