"""Memory of the CPU: what gpu/memory.py is to a GPU, as far as both backends need it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fastconv.cpu import device, threads
from fastconv.cpu.band import locate
from fastconv.cpu.compiling import part
from fastconv.cpu.device import itemsize as itemsize  # half types are converted before
from fastconv.cpu.simd import (
    Block,
    Kernel,
    advance,
    block_lanes,
    lane_bits,
    pointer,
    spread_rows,
    transpose,
    view_of,
)
from fastconv.lines import allocate as allocate

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import Cuts

FILTERS = 64  # of a task: what is read of them, a line of each, stays in L1
STAGES = True  # what has columns that lie apart is computed elsewhere first: kernels store them one by one
CUT_SECONDS = 0.7e-9  # to exchange an element of filters, or to pack it from where it lies
SERIAL_ELEMENTS = 20_000  # below this, about 10 us, a second thread costs more than it saves


def exchange(filters: np.ndarray, cuts: Cuts) -> list[np.ndarray]:
    """Return parts of filters (G, K, C, T, R, S), with any strides, as contiguous (G, C, K, T, R, S)."""
    if filters.shape[2] == 1:  # depthwise: nothing changes places but the taps
        parts = (np.ascontiguousarray(filters[taps]) for taps in cuts.slices)
        return [part.reshape(shape) for part, shape in zip(parts, cuts.shapes, strict=True)]
    G, K, C, T, R, S = filters.shape
    item, dtype = filters.itemsize, "float32" if filters.itemsize == 4 else "float64"
    steps = zip((T, R, S), filters.strides[3:], (R * S * item, S * item, item), strict=True)
    if any(size > 1 and step != wanted for size, step, wanted in steps):
        filters = np.ascontiguousarray(filters)
    block = _make_block(dtype, device.current())
    tasks = math.ceil(K / FILTERS)
    workers = threads.thread_count() if filters.size > SERIAL_ELEMENTS else 1
    result = allocate((cuts.elements,), dtype)
    _exchange(block, G * tasks, workers, (K, C, tasks), cuts.taps, filters, result)
    return [result[i : i + math.prod(shape)].reshape(shape) for i, shape in zip(cuts.begins, cuts.shapes)]


@lru_cache(maxsize=16)
def _make_block(dtype: str, device: Device) -> Block:
    return Block(dtype, 1, 1, device.lanes(dtype))


@Kernel
def _exchange(block, first, last, sizes, taps, x, y):
    """Exchange the channels of some blocks of filters, which are read once for all parts."""
    x, y, lanes, (K, C, blocks) = view_of(x), view_of(y), block_lanes(block), sizes
    for task in range(first, last):
        group, index = divmod(task, blocks)
        begin, end = index * FILTERS, min(index * FILTERS + FILTERS, K)
        source = advance(pointer(block, x[0]), group * x[1] + begin * x[2])
        if len(taps) == 1 and x[3] == 1:
            source = advance(source, taps[0, 0])
            target = advance(pointer(block, y[0]), group * C * K + begin)
            for k in range(0, end - begin, lanes):
                rows = end - begin - k
                _transpose_rows(block, advance(source, k * x[2]), x[2], rows, C, advance(target, k), K)
            continue
        for c in range(C):
            for i in range(len(taps)):
                number, origin, count, place = taps[i]
                to = advance(pointer(block, y[0]), origin + ((group * C + c) * K + begin) * count + place)
                of = advance(source, c * x[3] + number)
                for k in range(end - begin):
                    to[k * count] = of[k * x[2]]


@part
def _transpose_rows(block, source, source_step, rows, columns, target, target_step):
    """Copy rows, at most as many as there are lanes, to columns."""
    lanes = block_lanes(block)
    for c in range(0, columns, lanes):
        transpose(
            block, advance(source, c), source_step, rows, lane_bits(block, 0, columns - c),
            advance(target, c * target_step), target_step, columns - c, lane_bits(block, 0, rows),
        )  # fmt: skip


def copy(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Copy into contiguous memory."""
    return np.array(array, dtype, order="C")


def put(array: np.ndarray, place: np.ndarray) -> None:
    """Copy contiguous (N, C, D, H, W) to where its columns lie apart."""
    N, C, D, H, W = array.shape
    dtype = array.dtype.name
    block = _make_block(dtype, device.current())
    workers = threads.thread_count() if array.size > SERIAL_ELEMENTS else 1
    _put(block, N * C, workers, (C, D, H, W), array, place)


@Kernel
def _put(block, first, last, sizes, x, y):
    x, y, (C, D, H, W) = view_of(x), view_of(y), sizes
    for task in range(first, last):
        n, c = divmod(task, C)
        for d in range(D):
            source, target = locate(block, x, (n, c, d, 0, 0)), locate(block, y, (n, c, d, 0, 0))
            spread_rows(block, H, target, y[4], y[5], source, x[4], W)


def write(array: np.ndarray, target: np.ndarray) -> None:
    """Copy into an array of the same shape and dtype."""
    target[...] = array


def clear(array: np.ndarray) -> None:
    """Set all elements to 0."""
    array[...] = 0


def zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return memory in which all elements are 0."""
    return np.zeros(shape, dtype)
