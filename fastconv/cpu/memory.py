"""Memory of the CPU: what gpu/memory.py is to a GPU, as far as both backends need it."""

from __future__ import annotations

import numpy as np

from fastconv.cpu.device import itemsize as itemsize  # half types are converted before


def copy(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Copy into contiguous memory."""
    return np.array(array, dtype=dtype, order="C")


def write(array: np.ndarray, target: np.ndarray) -> None:
    """Copy into an array of the same shape and dtype."""
    target[...] = array


def clear(array: np.ndarray) -> None:
    """Set all elements to 0."""
    array[...] = 0


def zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return memory in which all elements are 0."""
    return np.zeros(shape, dtype)
