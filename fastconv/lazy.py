"""A Dask array and the windows of an operation enter, a Dask array leaves; nothing is computed.

    input    |     chunk 0     |     chunk 1     |     chunk 2     |
    block              [ before |    chunk 1     | after ]            brought together by map_overlap
    part                    [--------------------]                    what the windows of chunk 1 read
    result   |    chunk 0    |      chunk 1      |     chunk 2     |

map_overlap alone serves stride 1: it has one halo for all chunks, writes padding around the image and expects
a result as large as the block. Here every block is cut to what its own windows read, which is right for any
stride and dilation, and padding is told to the operation in (before, after) pairs: no zeros are stored.

A chunk has the bits that it has in the undivided result if every sum is taken in the same order: one plan for
all chunks names algorithm, memory order (that of the layout: a Dask array has no strides) and kind of tile,
and chunks begin where tiles do. Then a result depends neither on the chunks nor on the machine, except that
- silu, gelu, sigmoid and tanh are as exact as the mathematical library of the machine that computes a chunk;
- on a GPU, im2col and pointwise cut long sums into parts, more of them the smaller the image and the larger
  the GPU (gpu/product.py, count_parts): there a chunk agrees with the undivided result within error bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple


class Window(NamedTuple):
    """How the windows of an operation lie along one axis, in elements.

    before    padding in front of the first element
    multiple  of which the first output of every chunk has to be one: where tiles of outputs begin
    """

    kernel: int
    stride: int = 1
    dilation: int = 1
    before: int = 0
    multiple: int = 1

    @property
    def span(self) -> int:
        """From the first tap of a window to the last, both included."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def reach(self) -> int:
        """A bound of how far windows read beyond the chunk that `first_output` gives them."""
        return max((self.span - 1) // 2 + (self.multiple - 1) * self.stride, self.span // 2)

    def first_output(self, element: int) -> int:
        """Return the first output whose middle tap is an element or behind it, or the multiple below."""
        middle = (self.span - 1) // 2 - self.before  # of the window of output 0
        first = -((middle - element) // self.stride)
        return first // self.multiple * self.multiple

    def reads(self, first: int, end: int) -> tuple[int, int]:
        """Return from where up to where outputs first ... end-1 read, padding included."""
        begin = first * self.stride - self.before
        return begin, begin + (end - first - 1) * self.stride + self.span


class Part(NamedTuple):
    """What a chunk of the result is computed from along one axis.

    start          its first element, counted in the undivided input
    before, after  elements of padding that it lacks
    """

    start: int
    before: int
    after: int


class Division(NamedTuple):
    """How an axis is divided: chunks of input and result, and the halo on either side of an input's chunk."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    before: int
    after: int


def divide(chunks: Sequence[int], window: Window, outputs: int) -> Division:
    """Divide an axis: an output goes to the chunk that holds the middle of its window.

    A chunk is joined to the next where it is smaller than its neighbours' halo, where no output is left for
    it, or where what is left would read nothing but padding.

    >>> divide((8, 1, 8), Window(5, before=2), 17)
    Division(inputs=(8, 9), outputs=(8, 9), before=2, after=2)
    >>> divide((8, 8), Window(3, stride=2), 7)
    Division(inputs=(8, 8), outputs=(4, 3), before=0, after=1)
    """
    size, least = sum(chunks), max(window.reach, 1)
    borders = [(0, 0)]  # elements, and outputs, before each
    for border in accumulate(chunks):
        first = window.first_output(border)
        is_wide = border - borders[-1][0] >= least and size - border >= least
        is_needed = borders[-1][1] < first < outputs
        reads_input = window.reads(0, first)[1] > 0 and window.reads(first, outputs)[0] < size
        if is_wide and is_needed and reads_input:
            borders.append((border, first))
    borders.append((size, outputs))
    inputs, results = ([end - start for start, end in pairwise(ends)] for ends in zip(*borders))
    begins, ends = zip(*[window.reads(start[1], end[1]) for start, end in pairwise(borders)])
    inner = [border for border, _ in borders[1:-1]]
    return Division(
        tuple(inputs),
        tuple(results),
        max([0, *(border - begin for border, begin in zip(inner, begins[1:]))]),
        max([0, *(end - border for border, end in zip(inner, ends))]),
    )


@dataclass(frozen=True, eq=False)
class Sweep:
    """Windows that move over a Dask array.

    ========  =============================================================================
    input     Dask array with known chunk sizes
    windows   axis -> its windows; the chunks of the other axes stay
    shape     of the result, as many axes as the input
    joined    the axes of which a window takes all: neither input nor result is divided there
    ========  =============================================================================
    """

    input: Any
    windows: Mapping[int, Window]
    shape: tuple[int, ...]
    joined: tuple[int, ...] = ()

    @cached_property
    def divisions(self) -> dict[int, Division]:
        """How each axis of windows is divided."""
        chunks = self.input.chunks
        return {axis: divide(chunks[axis], window, self.shape[axis]) for axis, window in self.windows.items()}

    @property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """The chunk sizes of the result, per axis."""
        chunks = [
            (size,) if axis in self.joined else sizes
            for axis, (size, sizes) in enumerate(zip(self.shape, self.input.chunks))
        ]
        for axis, division in self.divisions.items():
            chunks[axis] = division.outputs
        return tuple(chunks)

    def map(self, function: Callable[..., Any], dtype: Any, *aligned: Any, **whole: Any) -> Any:
        """Return the Dask array whose chunks are function(chunk of the input and its halo, ..., parts=, ...).

        ========  =====================================================================================
        function  a chunk of the input, one of each `aligned`, then by name: `parts`, a Part per window,
                  and `whole` -> a chunk of the result, of the input's kind; pickled by its name
        aligned   arrays of the result's shape, divided as it is
        whole     arrays or None, of which every chunk gets all
        ========  =====================================================================================

        `aligned` and `whole` may be arrays in memory, which go into the graph once, or Dask arrays.
        """
        import dask.array as da

        inputs = {axis: division.inputs for axis, division in self.divisions.items()}
        halos = {axis: (division.before, division.after) for axis, division in self.divisions.items()}
        chunks = self.chunks
        return da.map_overlap(
            partial(move_windows, function=function, windows=self.windows, halos=halos),
            self.input.rechunk({**dict.fromkeys(self.joined, -1), **inputs}),
            *[_align(array, chunks) for array in aligned],
            depth=[halos] + [0] * len(aligned),
            boundary="none",
            trim=False,
            align_arrays=False,
            allow_rechunk=False,
            chunks=chunks,
            dtype=dtype,
            meta=self.input._meta,
            **{key: _delay(array) for key, array in whole.items()},
        )

    def __str__(self) -> str:
        read = list(map(max, self.input.chunks))
        for axis in self.joined:
            read[axis] = self.input.shape[axis]
        for axis, division in self.divisions.items():
            whole = max(division.inputs) + division.before + division.after
            read[axis] = min(whole, self.input.shape[axis])
        count, largest = math.prod(map(len, self.chunks)), tuple(map(max, self.chunks))
        return f"{count} chunks, {largest} at most, computed from {tuple(read)} of the input at most"


def _align(array: Any, chunks: tuple[tuple[int, ...], ...]) -> Any:
    """Return an array as a Dask array of these chunks."""
    import dask.array as da

    return array.rechunk(chunks) if isinstance(array, da.Array) else da.from_array(array, chunks)


def _delay(array: Any) -> Any:
    """Return an array as one that is computed, or sent to a worker, once for all chunks.

    Of one in memory a copy: a change made to it between the call and the computation has no effect.
    """
    import dask

    if array is None:
        return None
    return dask.delayed(array if dask.is_dask_collection(array) else array.copy(), pure=True)


def move_windows(
    block: Any,
    *aligned: Any,
    function: Callable[..., Any],
    windows: Mapping[int, Window],
    halos: Mapping[int, tuple[int, int]],
    block_info: Any,
    **whole: Any,
) -> Any:
    """Cut a block to what its chunk of the result is computed from, and compute that."""
    of_block, of_result = block_info[0], block_info[None]
    taken, parts = [slice(None)] * block.ndim, []
    for axis, window in windows.items():
        # Dask counts the elements of the blocks before, all but the first of which begin in a neighbour.
        counted, index = of_block["array-location"][axis][0], of_block["chunk-location"][axis]
        offset = counted - index * sum(halos[axis])
        begin, end = window.reads(*of_result["array-location"][axis])
        edge = offset + block.shape[axis]
        start, stop = max(begin, offset), min(end, edge) if end > offset else edge  # else: padding alone
        taken[axis] = slice(start - offset, stop - offset)
        parts.append(Part(start, start - begin, max(end - stop, 0)))
    return function(block[tuple(taken)], *aligned, parts=tuple(parts), **whole)
