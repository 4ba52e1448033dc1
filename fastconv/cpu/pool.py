"""Pooling and its gradients: every element of a window is taken where it lies, in either memory order.

    channels first:  a row of outputs takes tap (t, r, s) of all its windows at once, `stride` columns apart
    channels last:   a pixel of the output takes one tap at once for all channels, which lie side by side

Either way the innermost loop runs over a line of memory, which LLVM turns into vectors. Where windows differ
in width, or lie far apart, or rows of outputs are short, the line is a row of the input, whose columns are
then pooled.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from fastconv.cpu import band, threads
from fastconv.cpu.compiling import part, small_part
from fastconv.cpu.simd import Block, Kernel, advance, allocate, pointer, release

if TYPE_CHECKING:
    from fastconv.pool_problem import PoolProblem

MAX, MAX_AND_PLACE, AVERAGE = 0, 1, 2

SHORT_ROW = 8  # outputs: in rows of fewer, lines of them are too short for vectors
LONG_STRIDE = 3  # elements: so far apart, and farther, they do not come in vectors
SERIAL_WORK = 200_000  # taps; for fewer a second thread costs more than it saves
CHANNELS_TOGETHER = 32  # that one task of a gradient handles, channels last


class Geometry(NamedTuple):
    """The sizes of a pooling as the kernels take them."""

    mode: int
    C: int
    D: int
    H: int
    W: int
    O: int
    P: int
    Q: int
    S: int
    stride_w: int
    pad_w: int
    dilation_d: int
    dilation_h: int
    dilation_w: int
    divisor: int  # 0: the taps that a window counts


class Tables(NamedTuple):
    """Per window along an axis its first tap, the end of its taps and how many it counts.

    reach  per tap of a row's windows the first window in which it lies in the input, and the end of these
    """

    planes: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    reach: np.ndarray


def pool(problem: PoolProblem, x: np.ndarray, out: np.ndarray, indices: np.ndarray | None) -> None:
    """Pool x (N, C, D, H, W) into out and the places of its maxima into indices, both (N, C, O, P, Q).

    Both are contiguous in the problem's memory order.
    """
    geometry, tables = _plan(problem, indices is not None)
    places = 0 if indices is None else band.address(indices)
    arguments = (geometry, band.view(x), band.address(out), places, tables)
    kernel, tasks = _pool_pixels, problem.N * geometry.O * geometry.P
    if problem.order == "NCHW":
        by_window = _pool_columns if indices is None else _find_maxima
        kernel = _pool_rows if _is_by_rows(geometry) else by_window
        tasks *= geometry.C
    _run(problem, kernel, tasks, arguments)


def _is_by_rows(g: Geometry) -> bool:
    """Say whether the windows of a row take a tap together; of averages it decides the order of sums.

    There the extent of the input has no say: a part of an image has the averages of the whole.
    """
    is_even = g.S > 0
    return is_even and g.stride_w < LONG_STRIDE and (g.Q >= SHORT_ROW or g.mode == AVERAGE)


def pool_input(
    problem: PoolProblem, grad_output: np.ndarray, indices: np.ndarray | None, out: np.ndarray
) -> None:
    """Add what grad_output (N, C, O, P, Q) gives to the elements of out (N, C, D, H, W), which holds zeros.

    indices  of a max pooling, below D * H * W, or -1: of nothing; None: an average
    out      is contiguous in the problem's memory order
    """
    geometry, tables = _plan(problem, indices is not None)
    together = 1 if problem.order == "NCHW" else CHANNELS_TOGETHER
    tasks = problem.N * -(-problem.C // together)
    ends = (together, band.view(grad_output), band.view(out))
    if indices is None:
        _run(problem, _spread_averages, tasks, (geometry, *ends, tables))
    else:
        _run(problem, _return_to_maxima, tasks, (geometry, *ends, band.view(indices)))


def _run(problem: PoolProblem, kernel: Kernel, tasks: int, arguments: tuple[Any, ...]) -> None:
    block = Block(problem.compute_dtype, rows=1, vectors=1, lanes=1)
    kernel(block, tasks, threads.thread_count() if problem.work > SERIAL_WORK else 1, *arguments)


@lru_cache(maxsize=256)
def _plan(problem: PoolProblem, with_places: bool) -> tuple[Geometry, Tables]:
    mode = AVERAGE if problem.pool == "average" else MAX_AND_PLACE if with_places else MAX
    d, h, w = problem.windows
    geometry = Geometry(
        mode, problem.C, d.size, h.size, w.size, d.outputs, h.outputs, w.outputs, w.kernel, w.stride,
        w.padding, d.dilation, h.dilation, w.dilation, problem.divisor or 0,
    )  # fmt: skip
    planes, rows, columns = (
        np.array([axis.taps(i, problem.count_padding) for i in range(axis.outputs)])
        for axis in problem.windows
    )
    return geometry, Tables(planes, rows, columns, np.array(_find_reach(geometry)))


def _find_reach(g: Geometry) -> list[tuple[int, int]]:
    reach = []
    for s in range(max(g.S, 1)):  # adaptive windows have no taps in common, and this table no use
        begin = s * g.dilation_w - g.pad_w
        low = max(-(begin // g.stride_w), 0)
        reach.append((low, max(min(-((begin - g.W) // g.stride_w), g.Q), low)))
    return reach


@intrinsic
def place_pointer(typingctx: Any, address: types.Integer) -> Any:
    """Return an address as a pointer to int64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(64).as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@Kernel
def _pool_rows(block, first, last, g, x, y, places, tables):
    """Pool rows of outputs, channels first: a tap lies `stride` columns apart for neighbouring outputs."""
    planes, rows, columns, reach = tables
    for task in range(first, last):
        n, c, o, p = find_row(g, task)
        line, at = advance(pointer(block, y), task * g.Q), advance(place_pointer(places), task * g.Q)
        begin_line(g.mode, line, at, g.Q)
        for d in range(planes[o, 0], planes[o, 1], g.dilation_d):
            for h in range(rows[p, 0], rows[p, 1], g.dilation_h):
                for s in range(g.S):
                    q, w = reach[s, 0], reach[s, 0] * g.stride_w + s * g.dilation_w - g.pad_w
                    take_line(
                        g.mode, advance(line, q), advance(at, q), band.locate(block, x, (n, c, d, h, w)),
                        g.stride_w * x[5], reach[s, 1] - q, (d * g.H + h) * g.W + w, g.stride_w,
                    )  # fmt: skip
        if g.mode == AVERAGE:
            outer = planes[o, 2] * rows[p, 2]
            for q in range(g.Q):
                line[q] = line[q] / find_divisor(g, outer * columns[q, 2])


@Kernel
def _pool_columns(block, first, last, g, x, y, places, tables):
    """Pool rows of outputs, channels first: the columns of all windows of a row first, then each window."""
    planes, rows, columns, _ = tables
    pooled = allocate(block, g.W)
    for task in range(first, last):
        n, c, o, p = find_row(g, task)
        begin_line(g.mode, pooled, place_pointer(places), g.W)
        for d in range(planes[o, 0], planes[o, 1], g.dilation_d):
            for h in range(rows[p, 0], rows[p, 1], g.dilation_h):
                row = band.locate(block, x, (n, c, d, h, 0))
                take_line(g.mode, pooled, place_pointer(places), row, x[5], g.W, 0, 0)
        line = advance(pointer(block, y), task * g.Q)
        for q in range(g.Q):
            total, best = 0.0, -np.inf
            for w in range(columns[q, 0], columns[q, 1], g.dilation_w):
                total += pooled[w]
                best = pooled[w] if (pooled[w] > best) | (pooled[w] != pooled[w]) else best
            divisor = find_divisor(g, planes[o, 2] * rows[p, 2] * columns[q, 2])
            line[q] = total / divisor if g.mode == AVERAGE else best
    release(pooled)


@Kernel
def _find_maxima(block, first, last, g, x, y, places, tables):
    """Pool rows of outputs with the places of the maxima, channels first: window by window."""
    planes, rows, columns, _ = tables
    for task in range(first, last):
        n, c, o, p = find_row(g, task)
        line, at = advance(pointer(block, y), task * g.Q), advance(place_pointer(places), task * g.Q)
        for q in range(g.Q):
            best, place = -np.inf, -1
            for d in range(planes[o, 0], planes[o, 1], g.dilation_d):
                for h in range(rows[p, 0], rows[p, 1], g.dilation_h):
                    row = band.locate(block, x, (n, c, d, h, 0))
                    for w in range(columns[q, 0], columns[q, 1], g.dilation_w):
                        value = row[w * x[5]]
                        if value > best or value != value or place < 0:
                            best, place = value, (d * g.H + h) * g.W + w
            line[q], at[q] = best, place


@Kernel
def _pool_pixels(block, first, last, g, x, y, places, tables):
    """Pool rows of outputs, channels last: a line holds the channels of a pixel."""
    planes, rows, columns, _ = tables
    for task in range(first, last):
        n, o = divmod(task // g.P, g.O)
        p = task % g.P
        for q in range(g.Q):
            offset = (task * g.Q + q) * g.C
            line, at = advance(pointer(block, y), offset), advance(place_pointer(places), offset)
            begin_line(g.mode, line, at, g.C)
            for d in range(planes[o, 0], planes[o, 1], g.dilation_d):
                for h in range(rows[p, 0], rows[p, 1], g.dilation_h):
                    for w in range(columns[q, 0], columns[q, 1], g.dilation_w):
                        pixel = band.locate(block, x, (n, 0, d, h, w))
                        take_line(g.mode, line, at, pixel, x[2], g.C, (d * g.H + h) * g.W + w, 0)
            if g.mode == AVERAGE:
                divisor = find_divisor(g, planes[o, 2] * rows[p, 2] * columns[q, 2])
                for c in range(g.C):
                    line[c] = line[c] / divisor


@Kernel
def _return_to_maxima(block, first, last, g, together, grad, out, places):
    """Add each element of grad to the element of out that was the maximum of its window."""
    for task in range(first, last):
        n, begin, end = find_channels(g, together, task)
        plane = band.locate(block, out, (n, begin, 0, 0, 0))
        for o in range(g.O):
            for p in range(g.P):
                if together == 1:
                    line, at = (
                        band.locate(block, grad, (n, begin, o, p, 0)),
                        locate_place(places, n, begin, o, p, 0),
                    )
                    return_line(plane, out[5], 0, line, grad[5], at, places[5], g.Q)
                    continue
                for q in range(g.Q):
                    line, at = (
                        band.locate(block, grad, (n, begin, o, p, q)),
                        locate_place(places, n, begin, o, p, q),
                    )
                    return_line(plane, out[5], out[2], line, grad[2], at, places[2], end - begin)


@small_part
def locate_place(places, n, c, o, p, q):
    """Return a pointer to the place of a maximum."""
    offset = n * places[1] + c * places[2] + o * places[3] + p * places[4] + q * places[5]
    return advance(place_pointer(places[0]), offset)


@part
def return_line(plane, step, plane_step, line, line_step, places, place_step, count):
    """Add `count` elements of a line to where they came from: elements `step` apart of a plane.

    plane_step  from the plane of an element of the line to that of the next
    """
    for i in range(count):
        place = places[i * place_step]
        if place >= 0:
            plane[place * step + i * plane_step] += line[i * line_step]


@Kernel
def _spread_averages(block, first, last, g, together, grad, out, tables):
    """Share each element of grad out among the elements of out that its window averaged."""
    planes, rows, columns, _ = tables
    shares = allocate(block, together)
    for task in range(first, last):
        n, begin, end = find_channels(g, together, task)
        for o in range(g.O):
            for p in range(g.P):
                for q in range(g.Q):
                    divisor = find_divisor(g, planes[o, 2] * rows[p, 2] * columns[q, 2])
                    source = band.locate(block, grad, (n, begin, o, p, q))
                    for c in range(end - begin):
                        shares[c] = source[c * grad[2]] / divisor
                    for d in range(planes[o, 0], planes[o, 1]):
                        for h in range(rows[p, 0], rows[p, 1]):
                            row = band.locate(block, out, (n, begin, d, h, 0))
                            add_shares(row, out[5], columns[q, 0], columns[q, 1], out[2], shares, end - begin)
    release(shares)


@part
def add_shares(row, step, first, last, channel_step, shares, channels):
    """Add the shares of some channels to elements first ... last - 1 of a row, `step` apart."""
    if channels == 1:
        share = shares[0]
        for w in range(first, last):
            row[w * step] += share
    else:
        for w in range(first, last):
            pixel = advance(row, w * step)
            for c in range(channels):
                pixel[c * channel_step] += shares[c]


@small_part
def find_row(g, task):
    """Return n, c, o, p of a row of outputs, channels first."""
    rest, p = divmod(task, g.P)
    rest, o = divmod(rest, g.O)
    n, c = divmod(rest, g.C)
    return n, c, o, p


@small_part
def find_channels(g, together, task):
    """Return the sample of a task and its channels, the first and the end of them."""
    parts = (g.C + together - 1) // together
    n, part = divmod(task, parts)
    return n, part * together, min((part + 1) * together, g.C)


@small_part
def find_divisor(g, counted):
    """Return what the sum over a window is divided by."""
    return g.divisor if g.divisor else counted


@part
def begin_line(mode, line, places, count):
    """Set results to what they are before the first tap; place -1: no element has been seen."""
    start = 0.0 if mode == AVERAGE else -np.inf
    for i in range(count):
        line[i] = start
    if mode == MAX_AND_PLACE:
        for i in range(count):
            places[i] = -1


@part
def take_line(mode, line, places, source, step, count, place, place_step):
    """Take one tap, elements `step` apart whose places are `place_step` apart, into `count` results."""
    if step == 1:  # each distance that is known when this is compiled gets vectors of its own
        take_elements(mode, line, places, source, 1, count, place, place_step)
    elif step == 2:
        take_elements(mode, line, places, source, 2, count, place, place_step)
    else:
        take_elements(mode, line, places, source, step, count, place, place_step)


@small_part
def take_elements(mode, line, places, source, step, count, place, place_step):
    """Take elements; of equal ones the first counts, and a NaN wins, of several the last."""
    if mode == AVERAGE:
        for i in range(count):
            line[i] += source[i * step]
    elif mode == MAX:
        for i in range(count):
            value = source[i * step]
            line[i] = value if (value > line[i]) | (value != value) else line[i]
    else:
        for i in range(count):
            value = source[i * step]
            wins = (value > line[i]) | (value != value) | (places[i] < 0)
            line[i] = value if wins else line[i]
            places[i] = place + i * place_step if wins else places[i]
