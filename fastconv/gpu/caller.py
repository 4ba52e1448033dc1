"""For whom the GPU works: device, stream and pool of the arrays of the call that runs in this thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np


class Caller(NamedTuple):
    """Where the arrays of a call come from: what is allocated and launched for it goes there too.

    device     index of the CUDA device that holds them
    empty      (shape, dtype) -> device array of the caller's pool
    stream     address of the caller's current stream; None: CuPy's own
    producers  streams on which the arrays may still be written
    """

    device: int
    empty: Callable[[tuple[int, ...], np.dtype], np.ndarray]
    stream: int | None = None
    producers: frozenset[int] = frozenset()


_current: ContextVar[Caller | None] = ContextVar("caller", default=None)


def current() -> Caller | None:
    """Return the caller who is served, None outside of a call."""
    return _current.get()


@contextmanager
def serving(caller: Caller) -> Iterator[None]:
    """Make a caller the current one for a while."""
    token = _current.set(caller)
    try:
        yield
    finally:
        _current.reset(token)
