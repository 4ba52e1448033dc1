"""How many threads the kernels use."""

from __future__ import annotations

import os

from fastconv import environment
from fastconv.problem import ConvError


def thread_count() -> int:
    """Return the threads to use: FASTCONV_THREADS, else the cores that this process may run on."""
    wanted = environment.read("THREADS")
    if not wanted:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ConvError(f"FASTCONV_THREADS must be a whole number of at least 1, got {wanted!r}")
    return int(wanted)
