"""Memory of the CPU: what gpu/memory.py is to a GPU, as far as both backends need it."""

from __future__ import annotations

import math

import numpy as np

from fastconv.cpu.device import CACHE_LINE
from fastconv.cpu.device import itemsize as itemsize  # half types are converted before

BLOCK = 64  # elements along an axis: the lines of both sides stay in the caches


def allocate(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return an array, not set, that begins with a cache line; NumPy's begin with 16 bytes of one."""
    item = np.dtype(dtype).itemsize
    raw = np.empty(math.prod(shape) * item + CACHE_LINE, np.uint8)
    first = -raw.ctypes.data % CACHE_LINE
    return raw[first : first + math.prod(shape) * item].view(dtype).reshape(shape)


def copy(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Copy into contiguous memory, a transposed matrix block by block.

    NumPy copies row by row, which touches a cache line for each of its elements.
    """
    result = np.empty(array.shape, dtype)
    source, target = array.squeeze(), result.squeeze()
    if source.ndim != 2 or abs(source.strides[0]) >= abs(source.strides[1]):
        result[...] = array
        return result
    for i in range(0, source.shape[0], BLOCK):
        for j in range(0, source.shape[1], BLOCK):
            block = slice(i, i + BLOCK), slice(j, j + BLOCK)
            target[block] = source[block]
    return result


def write(array: np.ndarray, target: np.ndarray) -> None:
    """Copy into an array of the same shape and dtype."""
    target[...] = array


def clear(array: np.ndarray) -> None:
    """Set all elements to 0."""
    array[...] = 0


def zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return memory in which all elements are 0."""
    return np.zeros(shape, dtype)
