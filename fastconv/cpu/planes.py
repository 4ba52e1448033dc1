"""Planes read where they lie, under one small filter whose taps are unrolled: depthwise, channels first.

A strip of a plane, one or two vectors wide, is passed over row after row: for the outputs (`convolve_plane`,
also of two planes of few columns, which share a vector), for the gradient of the filter
(`differentiate_plane`) or, with stride 2, for that of the input (`spread_plane`). Masks leave out what lies
beside a row, and rows beside the plane are skipped, so that nothing is packed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from fastconv.cpu.compiling import part
from fastconv.cpu.simd import (
    INT,
    Block,
    BlockType,
    Vectors,
    block_lanes,
    emit_merge,
    emit_split,
    join,
    keep_rolled,
    shuffle,
    widths,
)

FETCHED_ROWS = 16  # of a plane, that far ahead of the row in hand; a row takes 20 to 40 cycles
SHARING_ROWS = 3  # of outputs, for whose gradient an input row is loaded once


class _Plane:
    """Emits loads of rows of a plane, as a strip of outputs reads them.

    S, step  columns of the filter, and the distance of the columns that neighbouring outputs read
    far      None, or distance of a second plane: its columns take the second half of each vector
    shares   whether a vector is loaded once for all columns of the filter; else for each step of them
    columns  of each such load: where its vectors begin
    masks    the lanes of those that are read: they lie in the plane and, with a count, belong to an output
    """

    def __init__(
        self, builder: Any, block: Block, vectors: int, args: list[Any], S: int, step: int,
        count: Any = None, far: Any = None,
    ) -> None:  # fmt: skip
        self.x, self.x_row, self.H, W, column, dilation_w = args
        self.builder, self.block, self.vectors, self.S, self.step = builder, block, vectors, S, step
        self.simd = simd = Vectors(builder, block)
        simd.align_frame()
        self.is_pair, self.shares = far is not None, step == 2 and count is None
        shifts = [builder.add(column, builder.mul(dilation_w, INT(s))) for s in range(0, S, step)]
        shifts = shifts[:1] if self.shares else shifts
        ends = [W if count is None else self._end(shift, count, W) for shift in shifts]
        begins = self._find_begins()
        self.columns = [[builder.add(shift, INT(begin)) for begin in begins] for shift in shifts]
        self.masks = [
            [simd.within(column, end) for column in row] for row, end in zip(self.columns, ends, strict=True)
        ]
        if self.is_pair:
            self._add_plane(far)

    def _find_begins(self) -> list[int]:
        """Return where the vectors of a load begin, counted from its first column."""
        lanes = self.block.lanes
        if self.is_pair:  # `emit_split` brings the second plane's columns into the second half by itself
            return [0, 0 if self.shares else -lanes // 2]
        columns = 2 * lanes * self.vectors + self.S - 2 if self.shares else self.vectors * self.step * lanes
        return list(range(0, columns, lanes))

    def _add_plane(self, far: Any) -> None:
        """Let the second of each two vectors be one of the other plane."""
        builder, simd, lanes = self.builder, self.simd, self.block.lanes
        self.columns = [[first, builder.add(second, far)] for first, second in self.columns]
        if not self.shares:  # both are loaded into one
            half = INT(lanes // 2)
            sides = simd.mask(simd.bits(INT(0), half)), simd.mask(simd.bits(half, INT(lanes)))
            self.masks = [list(map(builder.and_, masks, sides)) for masks in self.masks]

    def _end(self, shift: Any, count: Any, W: Any) -> Any:
        """Return the column before which `count` outputs read the plane, from `shift` on."""
        builder = self.builder
        end = builder.add(shift, builder.mul(count, INT(self.step)))
        end = builder.select(builder.icmp_signed("<", end, W), end, W)
        return builder.select(builder.icmp_signed("<", end, INT(0)), INT(0), end)

    def read(self, h: Any, sums: list[Any], add: Callable[[list[list[Any]]], list[Any]]) -> list[Any]:
        """Return add(the vectors of row h for each column of the filter), or sums where it lies outside."""
        builder = self.builder
        before = builder.block
        inside, after = builder.append_basic_block("inside"), builder.append_basic_block("after")
        builder.cbranch(builder.icmp_unsigned("<", h, self.H), inside, after)  # a negative row is a large one
        builder.position_at_end(inside)
        added = add(self._load(builder.gep(self.x, [builder.mul(h, self.x_row)])))
        builder.branch(after)
        builder.position_at_end(after)
        phis = [builder.phi(self.simd.type) for _ in sums]
        for phi, old, new in zip(phis, sums, added, strict=True):
            join(phi, (old, before), (new, inside))
        return phis

    def fetch(self, h: Any) -> None:
        """Ask for the lines of row h, which may lie in the next plane."""
        for column in self.columns[0]:
            self.simd.prefetch(self.x, self.builder.add(self.builder.mul(h, self.x_row), column))

    def _load(self, line: Any) -> list[list[Any]]:
        """Return the vectors of a row for each column of the filter."""
        if self.shares:
            return self._load_shared(line)
        if self.is_pair:
            return [[self._load_both(line, *row)] for row in zip(self.columns, self.masks, strict=True)]
        step, read = self.step, []
        for first, columns, masks in zip(itertools.count(0, step), self.columns, self.masks):
            loaded = [self.simd.load_masked(line, c, m) for c, m in zip(columns, masks, strict=True)]
            pairs = [loaded[j * step : (j + 1) * step] for j in range(self.vectors)]
            split = [emit_split(self.builder, pair, self.block.lanes) for pair in pairs]
            read += [[values[s] for values in split] for s in range(min(step, self.S - first))]
        return read

    def _load_both(self, line: Any, columns: list[Any], masks: list[Any]) -> Any:
        """Return a vector of columns of both planes."""
        first = self.simd.load_masked(line, columns[0], masks[0])
        return self.simd.load_masked(line, columns[1], masks[1], first)

    def _load_shared(self, line: Any) -> list[list[Any]]:
        """Do what `_load` does, with step 2: taps shift the even or the odd columns of all vectors."""
        builder, lanes = self.builder, self.block.lanes
        places = zip(self.columns[0], self.masks[0], strict=True)
        loaded = [self.simd.load_masked(line, column, mask) for column, mask in places]
        loaded += [ir.Constant(self.simd.type, None)] * (2 + len(loaded) % 2)  # what is shifted in
        split = [emit_split(builder, loaded[i : i + 2], lanes) for i in range(0, len(loaded), 2)]
        read = []
        for s in range(self.S):
            row, (later, shift) = [pair[s % 2] for pair in split], divmod(s // 2, lanes)
            neighbours = zip(row[later : later + self.vectors], row[later + 1 :])
            ways = list(range(shift, shift + lanes))
            read.append([shuffle(builder, a, b, ways) if shift else a for a, b in neighbours])
        return read


def _broadcast(simd: Vectors, is_pair: bool, p: Any, i: int, apart: int) -> Any:
    """Return element i in all lanes, or, in the half of a second plane, the one `apart` from it."""
    first = simd.broadcast(p, INT(i))
    return simd.halves(first, simd.broadcast(p, INT(i + apart))) if is_pair else first


def _emit_outputs(builder: Any, block: Block, vectors: int, args: Any) -> None:
    """Emit the loop over a plane, `vectors` vectors of columns wide.

    Rolling, one pass over the input rows, block.step of them at a time: each is loaded once and added to all
    outputs that it takes part in, which then move up one place. Otherwise one pass over the output rows, each
    of which loads R.
    """
    *strip, w, h, stride_h, dilation_h, bias, y, y_row, P, count, x_plane, y_plane = args
    (R, S), is_pair = block.extents, block.rows == 2
    plane = _Plane(builder, block, vectors, strip, S, block.step, far=x_plane if is_pair else None)
    simd = plane.simd
    broadcast = partial(_broadcast, simd, is_pair)
    factors = [[broadcast(w, r * S + s, R * S) for s in range(S)] for r in range(R)]

    def add(sums: list[Any], taps: range, read: list[list[Any]]) -> list[Any]:
        """Return the sums of `vectors` vectors each with row taps[i] of the filter times a row added."""
        new = list(sums)
        for s, (i, r) in itertools.product(range(S), enumerate(taps)):
            for j, value in enumerate(read[s], i * vectors):
                new[j] = simd.fma(factors[r][s], value, new[j])
        return new

    start = [broadcast(bias, 0, 1)] * vectors
    pending = (R - 1) // block.step if block.rolling else 0  # outputs that the rows before have begun
    before = builder.block
    loop, done = builder.append_basic_block("row"), builder.append_basic_block("done")
    builder.branch(loop)

    builder.position_at_end(loop)
    i = builder.phi(INT, "i")
    begun = [builder.phi(simd.type) for _ in range(pending * vectors)]
    top = builder.add(h, builder.mul(i, stride_h))
    for new in range(block.step if block.rolling else min(R, 2)):
        plane.fetch(builder.add(top, INT(FETCHED_ROWS + new)))
    sums = [*start, *begun]
    for r in range(min(R, block.step) if block.rolling else R):
        taps = range(r, R, block.step) if block.rolling else range(r, r + 1)
        sums = plane.read(builder.add(top, builder.mul(dilation_h, INT(r))), sums, partial(add, sums, taps))
    p = builder.sub(i, INT(pending))
    with builder.if_then(builder.icmp_signed(">=", p, INT(0))):
        target = builder.gep(y, [builder.mul(p, y_row)])
        for j, value in enumerate(sums[-vectors:]):
            simd.store_first(value, target, INT(j * block.lanes), count)
        if is_pair:
            simd.store_half(sums[-1], builder.gep(target, [y_plane]), count)
    following = builder.add(i, INT(1))
    latch = builder.block
    more = builder.icmp_signed("<", following, builder.add(P, INT(pending)))
    keep_rolled(builder.cbranch(more, loop, done))
    values = [following, *sums[: pending * vectors]]
    for phi, first, later in zip([i, *begun], [INT(0), *start * pending], values, strict=True):
        join(phi, (first, before), (later, latch))
    builder.position_at_end(done)


@intrinsic
def _outputs(
    typingctx, block, vectors, x, x_row, H, W, column, dilation_w, w, h, stride_h, dilation_h, bias, y, y_row,
    P, count, x_plane, y_plane,
):  # fmt: skip
    p, n = types.CPointer(block.float), types.int64
    signature = types.void(block, n, p, n, n, n, n, n, p, n, n, n, p, p, n, n, n, n, n)
    return signature, widths(_emit_outputs, block.block)


@part
def convolve_plane(
    block, vectors, x, x_row, H, W, column, dilation_w, w, h, stride_h, dilation_h, bias, y, y_row, P, count,
    x_plane, y_plane,
):  # fmt: skip
    """Convolve a plane x (H, W) with a filter w of block.extents; y gets P rows and `count` columns.

    The first output reads the input from row h and from `column` on; both may be negative, and what lies
    outside the plane reads as zero. The columns of neighbouring outputs are block.step apart; x_row and y_row
    are the distances of rows, in elements. `vectors` vectors, at most block.vectors, hold the columns.

    With block.rows = 2 also a second plane, x_plane further on, with the filter and the bias that follow; its
    outputs lie y_plane further on. Columns of both share a vector: ask `fits_pairs`.
    """
    _outputs(
        block, vectors, x, x_row, H, W, column, dilation_w, w, h, stride_h, dilation_h, bias, y, y_row, P,
        count, x_plane, y_plane,
    )  # fmt: skip


def fits_pairs(block: Block, Q: int) -> bool:
    """Say whether Q columns of outputs take half a vector; with step 2, all that they read one vector."""
    columns = 2 * Q + block.extents[1] - 2 if block.step == 2 else 2 * Q
    return columns <= block.lanes


def _emit_gradient(builder: Any, block: Block, args: Any) -> None:
    """Emit the loops over rows of outputs of a strip one vector wide: a vector of sums for each tap.

    Rolling, SHARING_ROWS at a time as long as there are so many: they read most rows of the input together.
    """
    totals = args[-1]
    simd = Vectors(builder, block)
    places = [INT(tap * block.lanes) for tap in range(block.extents[0] * block.extents[1])]
    sums, first = [simd.load(totals, place) for place in places], INT(0)
    for rows in (SHARING_ROWS, 1) if block.rolling else (1,):
        first, sums = _emit_gradient_rows(builder, block, args, rows, first, sums)
    for place, value in zip(places, sums, strict=True):
        simd.store(value, totals, place)


def _emit_gradient_rows(
    builder: Any, block: Block, args: Any, rows: int, first: Any, sums: list[Any]
) -> tuple[Any, list[Any]]:
    """Emit a loop from row `first` on, `rows` rows at a time; return where it ends, and the sums."""
    *strip, h, stride_h, dilation_h, y, y_row, P, count, _ = args
    R, S = block.extents
    plane = _Plane(builder, block, 1, strip, S, block.step, count)
    simd, live = plane.simd, plane.simd.first_lanes(count)
    before = builder.block
    loop, done = builder.append_basic_block("rows"), builder.append_basic_block("done")
    last = builder.sub(P, INT(rows))
    builder.cbranch(builder.icmp_signed("<=", first, last), loop, done)

    builder.position_at_end(loop)
    p, begun = builder.phi(INT, "p"), [builder.phi(simd.type) for _ in sums]
    top = builder.add(h, builder.mul(p, stride_h))
    lines = [builder.mul(builder.add(p, INT(i)), y_row) for i in range(rows)]
    for i in range(max(rows, block.step)):
        plane.fetch(builder.add(top, INT(FETCHED_ROWS + i)))
    for line in lines:
        simd.prefetch(y, builder.add(line, builder.mul(y_row, INT(FETCHED_ROWS // block.step))))
    gradients = [simd.load_masked(y, line, live) for line in lines]

    def add(sums: list[Any], met: list[tuple[int, int]], read: list[list[Any]]) -> list[Any]:
        """Return the sums with a row times the gradients i added, for the rows r of taps that meet it."""
        sums = list(sums)
        for (i, r), s in itertools.product(met, range(S)):
            sums[r * S + s] = simd.fma(gradients[i], read[s][0], sums[r * S + s])
        return sums

    new: list[Any] = begun
    for j in range(R + rows - 1):  # of the rows of the input; with one row of outputs, j is a row of taps
        met = [(i, j - i) for i in range(rows) if 0 <= j - i < R]
        row = builder.add(top, builder.mul(dilation_h, INT(j)))
        new = plane.read(row, new, partial(add, new, met))
    following = builder.add(p, INT(rows))
    latch = builder.block
    keep_rolled(builder.cbranch(builder.icmp_signed("<=", following, last), loop, done))
    for phi, start, later in zip([p, *begun], [first, *sums], [following, *new], strict=True):
        join(phi, (start, before), (later, latch))

    builder.position_at_end(done)
    ends = [builder.phi(value.type) for value in [first, *sums]]
    for phi, start, later in zip(ends, [first, *sums], [following, *new], strict=True):
        join(phi, (start, before), (later, latch))
    return ends[0], ends[1:]


@intrinsic
def _gradient(
    typingctx, block, x, x_row, H, W, column, dilation_w, h, stride_h, dilation_h, y, y_row, P, count, totals
):
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _emit_gradient(builder, block.block, args[1:])
        return context.get_dummy_value()

    p, n = types.CPointer(block.float), types.int64
    return types.void(block, p, n, n, n, n, n, n, n, n, p, n, n, n, p), codegen


@part
def differentiate_plane(
    block, x, x_row, H, W, column, dilation_w, h, stride_h, dilation_h, y, y_row, P, count, totals
):
    """Add the gradient of a filter of block.extents to totals: for each tap a vector, whose sum it is.

    y is the gradient of P rows and `count` columns of outputs, at most a vector; the others are as in
    `convolve_plane`.
    """
    _gradient(block, x, x_row, H, W, column, dilation_w, h, stride_h, dilation_h, y, y_row, P, count, totals)


def _emit_spread(builder: Any, block: Block, args: Any) -> None:
    """Emit the loop over pairs of rows of outputs, two vectors wide: one pass over y, row after row.

    Row 2 i + a meets rows r = a + 2 m of the filter, with row i - m of y; columns alike. Of 3x3 taps four
    vectors of y, each at one of two columns in one of two rows, make four vectors of outputs.
    """
    y, y_row, P, Q, w, bias, i_first, i_last, j_first, pad_h, pad_w, out, out_row, H, W = args
    R, S = block.extents
    rows, columns = -(-R // 2), -(-S // 2)
    strip = [y, y_row, P, Q, builder.sub(j_first, INT(columns - 1)), INT(1)]
    plane = _Plane(builder, block, 1, strip, columns, 1)
    simd = plane.simd
    factors = [[simd.broadcast(w, INT(r * S + s)) for s in range(S)] for r in range(R)]
    start = [simd.broadcast(bias, INT(0))] * 4
    column = builder.sub(builder.mul(j_first, INT(2)), pad_w)
    places = [column, builder.add(column, INT(block.lanes))]
    masks = [simd.within(place, W) for place in places]

    def add(m: int, sums: list[Any], read: list[list[Any]]) -> list[Any]:
        """Return the sums of the outputs (a, b) of pairs of rows and columns, with row i - m of y added."""
        sums = list(sums)
        for (q, (value,)), a, b in itertools.product(enumerate(read), range(2), range(2)):
            r, s = a + 2 * m, b + 2 * (columns - 1 - q)
            if r < R and s < S:
                sums[2 * a + b] = simd.fma(factors[r][s], value, sums[2 * a + b])
        return sums

    before = builder.block
    loop, done = builder.append_basic_block("pair"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(INT, "i")
    plane.fetch(builder.add(i, INT(FETCHED_ROWS)))
    sums = start
    for m in reversed(range(rows)):  # rows of y in order, as convolutions phase by phase add them
        sums = plane.read(builder.sub(i, INT(m)), sums, partial(add, m, sums))
    top = builder.sub(builder.mul(i, INT(2)), pad_h)
    for a in range(2):
        h = builder.add(top, INT(a))
        with builder.if_then(builder.icmp_unsigned("<", h, H)):
            line = builder.gep(out, [builder.mul(h, out_row)])
            both = emit_merge(builder, sums[2 * a], sums[2 * a + 1], block.lanes)
            for value, place, mask in zip(both, places, masks, strict=True):
                simd.store_masked(value, builder.gep(line, [place]), mask)
    following = builder.add(i, INT(1))
    latch = builder.block
    keep_rolled(builder.cbranch(builder.icmp_signed("<", following, i_last), loop, done))
    join(i, (i_first, before), (following, latch))
    builder.position_at_end(done)


@intrinsic
def _spread(
    typingctx, block, y, y_row, P, Q, w, bias, i_first, i_last, j_first, pad_h, pad_w, out, out_row, H, W
):
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _emit_spread(builder, block.block, args[1:])
        return context.get_dummy_value()

    p, n = types.CPointer(block.float), types.int64
    return types.void(block, p, n, n, n, p, p, n, n, n, n, n, p, n, n, n), codegen


@part
def spread_plane(block, y, y_row, P, Q, w, bias, pad_h, pad_w, out, out_row, H, W):
    """Compute out (H, W), the gradient of the input of a convolution with stride 2, from y (P, Q).

    Each element of y adds the filter w of block.extents, times itself, to the outputs of its window, whose
    corner lies twice its place less the padding from the first output; all outputs begin with the bias.
    """
    lanes = block_lanes(block)
    for j in range(pad_w // 2, (pad_w + W + 1) // 2, lanes):
        _spread(
            block, y, y_row, P, Q, w, bias, pad_h // 2, (pad_h + H + 1) // 2, j, pad_h, pad_w, out, out_row,
            H, W,
        )  # fmt: skip


@intrinsic
def sum_lanes(typingctx: Any, block: BlockType, p: Any) -> Any:
    """Return the sum of the elements of a vector: of its halves, of the halves of that, and so on."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        simd = Vectors(builder, block.block)
        value, lanes = simd.load(args[1], INT(0)), simd.lanes
        while lanes > 1:
            lanes //= 2
            low, high = list(range(lanes)), list(range(lanes, 2 * lanes))
            value = builder.fadd(shuffle(builder, value, value, low), shuffle(builder, value, value, high))
        return builder.extract_element(value, ir.IntType(32)(0))

    return block.float(block, types.CPointer(block.float)), codegen
