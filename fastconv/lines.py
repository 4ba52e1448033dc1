"""Memory that begins with a cache line: a vector as wide as a line then lies in one, not in two.

NumPy's large arrays begin 16 bytes into a line, as glibc's blocks do.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

CACHE_LINE = 64  # bytes


def allocate(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array, not set, that begins with a cache line: a view, which cannot be resized in place.

    >>> allocate((2, 3), "float32").__array_interface__["data"][0] % CACHE_LINE
    0
    """
    count = math.prod(shape)
    item = np.dtype(dtype).itemsize
    raw = np.empty(count + CACHE_LINE // item, dtype)
    first = -raw.__array_interface__["data"][0] % CACHE_LINE // item
    return raw[first : first + count].reshape(shape)
