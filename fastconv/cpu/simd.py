"""The vector microkernel that every CPU algorithm calls, written as LLVM vector code.

Numba alone does not keep a block of vector accumulators in registers, so the inner loop is emitted here:

                     B: `vectors` vectors of the tap            a_rows   distance of the rows of A, or a table
      A              b[b_taps[t] + j * lanes ...]                        of one offset per row
    row i  ----->  +---------+---------+---------+              a_taps   one offset per tap, added to each row
    a[i * a_rows   | c[i][0] | c[i][1] | c[i][2] |              b_taps   one offset per tap; either may be
      + a_taps[t]] +---------+---------+---------+                       the distance of neighbours
                     accumulators, in registers                 c[i][j] += A[i, t] * B[t, j], t in order

A tap is one (c, t, r, s) of the weight. The tables of tap offsets are the idea of the indirect convolution
algorithm (Dukhan 2019, arXiv:1907.02129): direct, 1x1, im2col and Winograd differ in offsets only.
Each sum runs over the taps in order, one fused multiply-add each, whatever the tile: same input, same bits.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.compiler_lock import global_compiler_lock as compiler_lock
from numba.core.datamodel import models
from numba.extending import NativeValue, intrinsic, register_model, typeof_impl, unbox

from fastconv.cpu import team
from fastconv.cpu.compiling import UNCALLED, compile_cached, compile_for, part
from fastconv.cpu.team import launch
from fastconv.lines import CACHE_LINE
from fastconv.problem import HashedOnce
from fastconv.winograd_math import Matrices, Matrix, matrices

INT = ir.IntType(64)
FETCHED_TAPS = 16  # ahead of the tap in hand, which takes 12 cycles in a tile of 8x3


def _digest() -> str:
    """Return a digest of the sources of this folder, of those in it and of the constants beside it.

    Numba's disk cache looks at the file of a function, not at those it calls; the digest is part of
    every kernel's argument types, so that an edited helper never runs as a stale binary.
    """
    here = Path(__file__).parent
    files = [*sorted(here.rglob("*.py")), here.parent / "lines.py", here.parent / "winograd_math.py"]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


DIGEST = _digest()

# Kernels take the same megabytes in every call. glibc hands what is freed back to the system, and to fault
# it in again takes as long as a layer (64 -> 64 channels at 56 x 56: 1.15 ms, not 0.59), until the program
# has freed a large array: from then on it keeps twice its size. This one is freed at once, and never touched.
np.empty(31 << 20, np.uint8)


if hasattr(os, "register_at_fork"):  # a child forked while another thread compiles would wait for it for ever
    os.register_at_fork(
        before=compiler_lock.acquire,
        after_in_parent=compiler_lock.release,
        after_in_child=compiler_lock.release,
    )


class Kernel:
    """A function compiled with Numba, without the GIL, that runs some of a number of tasks.

    Written as kernel(block, first, last, ...) for the tasks first ... last-1, called as
    kernel(block, tasks, workers, ...) for all of them, on so many threads. Compiled once per block.

    Numba finds out the types of all arguments at every call, in 5 us. Here they follow from the block, so
    that is done once per block, and later calls go to the machine code in 0.5 us.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.dispatcher = compile_cached(function, **UNCALLED)
        self.entries: dict[Block, tuple[Callable[..., int], int]] = {}

    def __call__(self, block: Block, tasks: int, workers: int, *arguments: Any) -> None:
        entry = self.entries.get(block)
        if entry is None:
            entry = self.entries[block] = self._compile(block, arguments)
        run, address = entry
        jobs, helpers = team.gather(min(workers, tasks) - 1) if workers > 1 else (0, 0)
        if run(jobs, helpers, tasks, address, arguments):
            raise MemoryError("a kernel could not allocate its workspace")

    def _compile(self, block: Block, arguments: tuple[Any, ...]) -> tuple[Callable[..., int], int]:
        """Return the machine code that takes the arguments from Python, and the address of the kernel's."""
        kinds = [_typeof(argument) for argument in arguments]
        with compiler_lock:  # for LLVM's sake too, which a fork must not find at work
            kernel = compile_for(self.dispatcher, (numba.typeof(block), types.int64, types.int64, *kinds))
            address = kernel.library.get_pointer_to_function(kernel.fndesc.llvm_func_name)
            return compile_for(launch, (*[types.int64] * 4, types.Tuple(kinds))).entry_point, address


def _typeof(argument: Any) -> Any:
    """Return Numba's type of an argument; for arrays of numbers to convolve one that allows all strides."""
    if isinstance(argument, np.ndarray) and argument.dtype.kind == "f":
        return types.Array(numba.from_dtype(argument.dtype), argument.ndim, "A")
    return numba.typeof(argument)


class Tile(NamedTuple):
    """Register tile of the microkernel: `rows` rows of A times `vectors` vectors of B."""

    rows: int
    vectors: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.vectors}"


@dataclass(frozen=True)
class Block(HashedOnce):
    """A tile for one dtype and vector width: the compile-time part of a kernel's arguments.

    Numba's cache holds blocks that an older version has pickled: a new field needs a default.

    dtype    "float32" or "float64"
    rows     rows of the tile; "plane": 2 where the columns of two planes take half a vector each
    vectors  vectors in each of its rows
    lanes    elements in each vector
    form     "rows"         A is broadcast, the bias belongs to the rows (weights x pixels, channels first)
             "columns"      A is broadcast, the bias belongs to the columns (pixels x weights, channels last)
             "elementwise"  A is a vector like B: c[i][j] += A[i, t, j] * B[t, j] (depthwise, channels last)
             "plane"        no A: a strip of a plane, row by row, under one filter (planes.py)
             "ragged"       A is one filter, a row of which meets other rows of B in every row of the tile
                            (`multiply_filter`)
    adds     whether a tile begins with what lies in memory as C does, in place of a bias
    m        Winograd: outputs of a tile along an axis of several taps
    step     "plane": distance of the columns that neighbouring outputs read, 1 or 2
             "ragged": distance of the rows of B that neighbouring rows of the tile begin with
    extents  "plane" and Winograd: (R, S) of the filter
    strides  Winograd: distance of the rows, and of the columns, that neighbouring outputs read
    rolling  "plane": whether a row serves many outputs; dilation along the rows is 1 then, and their stride
             `step`, or, in gradients of filters, 1
    """

    dtype: str
    rows: int
    vectors: int
    lanes: int
    form: str = "rows"
    adds: bool = False
    m: int = 0
    step: int = 1
    extents: tuple[int, int] = (0, 0)
    rolling: bool = False
    strides: tuple[int, int] = (1, 1)

    __hash__ = HashedOnce.__hash__

    @property
    def taps(self) -> tuple[int, int]:
        """Winograd: the most taps of one phase, along rows and columns: ceil(extent / stride)."""
        (R, S), (s_h, s_w) = self.extents, self.strides
        return -(-R // s_h), -(-S // s_w)

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """Winograd: rows and columns of a tile's outputs, then of its inputs in one phase.

        An axis with one tap is not transformed.
        """
        m_h, m_w = (self.m if taps > 1 else 1 for taps in self.taps)
        return m_h, m_w, m_h + self.taps[0] - 1, m_w + self.taps[1] - 1


class BlockType(types.Type):
    """Numba's type of a `Block`: its fields are known at compile time."""

    def __init__(self, block: Block, digest: str) -> None:
        self.block = block
        self.float = types.float32 if block.dtype == "float32" else types.float64
        super().__init__(name=f"{block}_{digest}")


register_model(BlockType)(models.OpaqueModel)


@typeof_impl.register(Block)
def _typeof_block(value: Block, context: Any) -> BlockType:
    return BlockType(value, DIGEST)


@unbox(BlockType)
def _unbox_block(typ: BlockType, value: Any, context: Any) -> NativeValue:
    return NativeValue(context.context.get_dummy_value())


def _constant(read: Callable[[Block], int]) -> Any:
    """Return an intrinsic f(block) for a number that is known at compile time."""

    @intrinsic
    def apply(typingctx: Any, block: BlockType) -> Any:
        return types.int64(block), lambda context, builder, sig, args: INT(read(block.block))

    return apply


def _constants(read: Callable[[Block], tuple[int, ...]]) -> Any:
    """Return an intrinsic f(block) for a tuple of numbers that are known at compile time."""

    @intrinsic
    def apply(typingctx: Any, block: BlockType) -> Any:
        numbers = [INT(number) for number in read(block.block)]

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return context.make_tuple(builder, sig.return_type, numbers)

        return types.UniTuple(types.int64, len(numbers))(block), codegen

    return apply


block_rows = _constant(lambda block: block.rows)
block_columns = _constant(lambda block: block.vectors * block.lanes)  # elements in one row of the tile
block_lanes = _constant(lambda block: block.lanes)
block_extents = _constants(lambda block: block.extents)
block_sides = _constants(lambda block: block.sides)
block_strides = _constants(lambda block: block.strides)


@intrinsic
def pointer(typingctx: Any, block: BlockType, address: types.Integer) -> Any:
    """Return an address as a pointer to the block's dtype; `p[i]` reads without bounds or wrap-around."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], context.get_value_type(sig.return_type))

    return types.CPointer(block.float)(block, types.int64), codegen


@intrinsic
def allocate(typingctx: Any, block: BlockType, elements: types.Integer) -> Any:
    """Return memory for `elements` elements, aligned to a cache line, not set; `release` gives it back.

    Not an array: Numba frees an array after its last mention, which a pointer to its data is not.
    """
    size = block.float.bitwidth // 8

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        count = builder.add(builder.mul(args[1], INT(size)), INT(CACHE_LINE + 8))
        raw = builder.ptrtoint(context.nrt.allocate(builder, count), INT)
        line = builder.and_(builder.add(raw, INT(CACHE_LINE + 7)), INT(-CACHE_LINE))
        slot = builder.inttoptr(builder.sub(line, INT(8)), INT.as_pointer())
        builder.store(raw, slot)  # where it begins, for `release`
        return builder.inttoptr(line, context.get_value_type(sig.return_type))

    return types.CPointer(block.float)(block, types.int64), codegen


@intrinsic
def release(typingctx: Any, p: types.CPointer) -> Any:
    """Free the memory that `allocate` returned."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        slot = builder.sub(builder.ptrtoint(args[0], INT), INT(8))
        raw = builder.load(builder.inttoptr(slot, INT.as_pointer()))
        context.nrt.free(builder, builder.inttoptr(raw, ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.void(p), codegen


@intrinsic
def advance(typingctx: Any, p: types.CPointer, offset: types.Integer) -> Any:
    """Return pointer `p` moved by `offset` elements."""
    return p(p, types.int64), lambda context, builder, sig, args: builder.gep(args[0], [args[1]])


@intrinsic
def address_of(typingctx: Any, p: types.CPointer) -> Any:
    """Return a pointer as a number, in elements."""
    size = p.dtype.bitwidth // 8

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.udiv(builder.ptrtoint(args[0], INT), INT(size))

    return types.int64(p), codegen


@intrinsic
def view_of(typingctx: Any, array: types.Array) -> Any:
    """Return an array as (address, strides in elements...)."""
    item = array.dtype.bitwidth // 8

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        parts = context.make_array(sig.args[0])(context, builder, args[0])
        strides = cgutils.unpack_tuple(builder, parts.strides, array.ndim)
        steps = [builder.sdiv(stride, INT(item)) for stride in strides]
        return context.make_tuple(builder, sig.return_type, [builder.ptrtoint(parts.data, INT), *steps])

    return types.UniTuple(types.int64, array.ndim + 1)(array), codegen


@intrinsic
def table(typingctx: Any, array: types.Array) -> Any:
    """Return the data pointer of a contiguous array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.make_array(sig.args[0])(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), codegen


class Vectors:
    """Emits loads, stores and arithmetic on vectors of block.lanes elements, where the builder stands."""

    def __init__(self, builder: Any, block: Block) -> None:
        self.builder = builder
        self.bytes = 4 if block.dtype == "float32" else 8
        self.element = ir.FloatType() if self.bytes == 4 else ir.DoubleType()
        self.lanes = block.lanes
        self.type = ir.VectorType(self.element, self.lanes)
        name = f"llvm.fma.v{self.lanes}f{8 * self.bytes}"
        signature = ir.FunctionType(self.type, [self.type] * 3)
        self._fma = cgutils.get_or_insert_function(builder.module, signature, name)

    def align_frame(self) -> None:
        """Let the frame of the function begin with a cache line: for code with more vectors than registers.

        LLVM keeps the others there, aligned to 16 bytes: in three of four processes each lies in two lines.
        """
        slot = cgutils.alloca_once(self.builder, self.type)
        slot.align = CACHE_LINE
        use = ir.FunctionType(ir.VoidType(), [slot.type])
        self.builder.asm(use, "", "r", [slot], True)  # an empty use, without which LLVM drops the slot

    def load(self, p: Any, offset: Any) -> Any:
        return self.builder.load(self._address(p, offset), align=self.bytes)

    def store(self, value: Any, p: Any, offset: Any) -> None:
        self.builder.store(value, self._address(p, offset), align=self.bytes)

    def _address(self, p: Any, offset: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(p, [offset]), self.type.as_pointer())

    def splat(self, scalar: Any, kind: Any = None) -> Any:
        undefined = ir.Constant(kind or self.type, ir.Undefined)
        one = self.builder.insert_element(undefined, scalar, ir.IntType(32)(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(one, undefined, zeros)

    def constant(self, value: float) -> Any:
        return ir.Constant(self.type, [self.element(value)] * self.lanes)

    def broadcast(self, p: Any, offset: Any) -> Any:
        return self.splat(self.builder.load(self.builder.gep(p, [offset])))

    def narrow(self, number: Any) -> Any:
        """Return a float64 in the block's dtype."""
        return self.builder.fptrunc(number, self.element) if self.bytes == 4 else number

    def within(self, column: Any, W: Any) -> Any:
        """Return the mask of the lanes in [0, W), the first lane being in `column`."""
        number = ir.IntType(32)  # half the width of a pointer, and rows are shorter than 2**31
        kind = ir.VectorType(number, self.lanes)
        first = self.splat(self.builder.trunc(column, number), kind)
        at = self.builder.add(first, ir.Constant(kind, list(range(self.lanes))))
        width = self.splat(self.builder.trunc(W, number), kind)
        return self.builder.icmp_unsigned("<", at, width)  # a negative column is a large one

    def load_masked(self, p: Any, offset: Any, mask: Any, others: Any = None) -> Any:
        """Load a vector; the lanes outside the mask are not read: they are those of `others`, or zero."""
        others = ir.Constant(self.type, None) if others is None else others
        align = ir.IntType(32)(self.bytes)
        return self._masked("load", self.type, [self._address(p, offset), align, mask, others])

    def halves(self, a: Any, b: Any) -> Any:
        """Return the first half of a followed by the first half of b."""
        half = self.lanes // 2
        return shuffle(self.builder, a, b, [*range(half), *range(self.lanes, self.lanes + half)])

    def store_first(self, value: Any, p: Any, offset: Any, count: Any) -> None:
        """Store the lanes of a vector at p + offset that come before p + count."""
        self.store_masked(
            value, self.builder.gep(p, [offset]), self.first_lanes(self.builder.sub(count, offset))
        )

    def store_half(self, value: Any, p: Any, count: Any) -> None:
        """Store the first `count` lanes of the second half of a vector."""
        half = INT(self.lanes // 2)
        lanes = self.mask(self.bits(half, self.builder.add(half, count)))
        self.store_masked(value, self.builder.gep(p, [INT(-self.lanes // 2)]), lanes)

    def store_masked(self, value: Any, p: Any, mask: Any) -> None:
        """Store the lanes of a vector that are in the mask."""
        align = ir.IntType(32)(self.bytes)
        self._masked("store", ir.VoidType(), [value, self._address(p, INT(0)), align, mask])

    def first_lanes(self, count: Any) -> Any:
        """Return the mask of the first `count` lanes."""
        return self.mask(self.bits(INT(0), self.clamp(count)))

    def clamp(self, lane: Any, vectors: int = 1) -> Any:
        """Return the number of a lane of so many vectors, or the nearest from 0 to the last and one more."""
        lane = self.builder.select(self.builder.icmp_signed("<", lane, INT(0)), INT(0), lane)
        last = INT(self.lanes * vectors)
        return self.builder.select(self.builder.icmp_signed("<", lane, last), lane, last)

    def bits(self, low: Any, high: Any) -> Any:
        """Return a number whose bits low ... high-1 are set."""
        below = self.builder.sub(self.builder.shl(INT(1), high), INT(1))
        return self.builder.and_(below, self.builder.shl(INT(-1), low))

    def mask(self, bits: Any) -> Any:
        """Return the mask of the lanes whose bits are set."""
        few = self.builder.trunc(bits, ir.IntType(self.lanes))
        return self.builder.bitcast(few, ir.VectorType(ir.IntType(1), self.lanes))

    def _masked(self, access: str, result: Any, arguments: list[Any]) -> Any:
        """Call LLVM's masked "load" or "store"."""
        name = f"llvm.masked.{access}.v{self.lanes}f{8 * self.bytes}.p0"
        signature = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, signature, name)
        return self.builder.call(function, arguments)

    def prefetch(self, p: Any, offset: Any) -> None:
        """Ask for the cache line at p + offset, into L1; it may be nobody's memory."""
        number, address = ir.IntType(32), ir.IntType(8).as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [address, number, number, number])
        function = cgutils.get_or_insert_function(self.builder.module, signature, "llvm.prefetch.p0")
        place = self.builder.bitcast(self.builder.gep(p, [offset]), address)
        self.builder.call(function, [place, number(0), number(3), number(1)])  # to read, near, data

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.builder.call(self._fma, [a, b, c])


def keep_rolled(branch: Any) -> None:
    """Forbid unrolling of the loop that `branch` closes: LLVM would double it and spill the accumulators."""
    module = branch.parent.parent.module
    rule = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    count = len(module.metadata)  # any distinct operand: equal nodes would be merged into one
    loop = module.add_metadata([rule, INT(count)])
    loop.operands = (loop, rule)  # a loop's identity is a node whose first operand is itself
    branch.set_metadata("llvm.loop", loop)


def _emit_tile(builder: Any, block: Block, vectors: int, args: Any) -> None:
    """Emit the loop over the taps for a tile of `vectors` vectors, from loading its start to storing."""
    a, a_rows, a_taps, b, b_taps, taps, bias, c, c_row = args
    simd = Vectors(builder, block)
    column = [INT(j * block.lanes) for j in range(vectors)]
    if isinstance(a_rows.type, ir.PointerType):
        rows = [builder.load(builder.gep(a_rows, [INT(i)])) for i in range(block.rows)]
    else:  # needs fewer registers: x86 addresses scale a distance by 2, 4 and 8
        rows = [builder.mul(a_rows, INT(i)) for i in range(block.rows)]
    cells = [builder.add(builder.mul(c_row, INT(i)), offset) for i in range(block.rows) for offset in column]
    if block.adds:
        start = [simd.load(bias, cell) for cell in cells]
    elif block.form == "rows":
        start = [simd.broadcast(bias, INT(i)) for i in range(block.rows) for _ in range(vectors)]
    else:
        start = [simd.load(bias, offset) for _ in range(block.rows) for offset in column]

    # Pixels of the next channel lie far away, so that the processor does not foresee them.
    fetches = block.form == "rows" and not block.adds and not isinstance(b_taps.type, ir.PointerType)
    fetch = _Fetch(builder, simd, block, vectors, b, b_taps, taps) if fetches else None
    carried = [INT(0), *start] if fetch is None else [INT(0), *start, fetch.first]
    before = builder.block
    loop, done = builder.append_basic_block("taps"), builder.append_basic_block("done")
    builder.branch(loop)

    builder.position_at_end(loop)
    phis = [builder.phi(value.type) for value in carried]
    tap, sums, ahead = phis[0], phis[1 : 1 + len(start)], phis[-1]
    a_tap, b_tap = (builder.gep(p, [_offset(builder, taps, tap)]) for p, taps in ((a, a_taps), (b, b_taps)))
    new = _emit_tap(builder, simd, block, column, rows, a_tap, b_tap, sums)
    following = builder.add(tap, INT(1))
    later = [following, *new]
    if fetch is not None:
        later.append(fetch.emit(tap, ahead))
    keep_rolled(builder.cbranch(builder.icmp_signed("<", following, taps), loop, done))
    for phi, first, value in zip(phis, carried, later, strict=True):
        join(phi, (first, before), (value, loop))

    builder.position_at_end(done)
    for cell, value in zip(cells, new, strict=True):
        simd.store(value, c, cell)


class _Fetch:
    """Emits requests for taps of B, FETCHED_TAPS ahead, and at last for those of the tile that follows."""

    def __init__(
        self, builder: Any, simd: Vectors, block: Block, vectors: int, b: Any, b_taps: Any, taps: Any
    ) -> None:
        self.builder, self.simd, self.b_taps = builder, simd, b_taps
        width = vectors * block.lanes
        self.lines = [INT(offset) for offset in range(0, width, CACHE_LINE // simd.bytes)]
        is_panel = builder.icmp_signed("==", b_taps, INT(block.vectors * block.lanes))
        after = builder.select(is_panel, builder.mul(taps, b_taps), INT(width))  # panels follow one another
        self.next_tile = builder.gep(b, [after])
        self.last = builder.sub(taps, INT(FETCHED_TAPS + 1))  # with it the last tap is asked for
        ahead = builder.gep(b, [builder.mul(b_taps, INT(FETCHED_TAPS))])
        self.first = builder.select(builder.icmp_signed("<", self.last, INT(0)), self.next_tile, ahead)

    def emit(self, tap: Any, ahead: Any) -> Any:
        """Ask for the tap of B at `ahead`; return where the one lies that the next tap is to ask for."""
        for line in self.lines:
            self.simd.prefetch(ahead, line)
        is_last = self.builder.icmp_signed("==", tap, self.last)
        return self.builder.select(is_last, self.next_tile, self.builder.gep(ahead, [self.b_taps]))


def _offset(builder: Any, offsets: Any, tap: Any) -> Any:
    """Return the offset of a tap from their table, or from the distance of neighbours."""
    if isinstance(offsets.type, ir.PointerType):
        return builder.load(builder.gep(offsets, [tap]))
    return builder.mul(offsets, tap)


def _emit_tap(
    builder: Any, simd: Vectors, block: Block, column: Any, rows: Any, a_tap: Any, b_tap: Any, sums: list[Any]
) -> list[Any]:
    """Emit what one tap adds to the accumulators, row after row."""
    b_vectors = [simd.load(b_tap, offset) for offset in column]
    before, new = iter(sums), []
    for row in rows:
        if block.form == "elementwise":
            a_row = builder.gep(a_tap, [row])
            a_vectors = [simd.load(a_row, offset) for offset in column]
        else:
            a_vectors = [simd.broadcast(a_tap, row)] * len(column)
        new += [simd.fma(a, b, next(before)) for a, b in zip(a_vectors, b_vectors, strict=True)]
    return new


@intrinsic
def _microkernel(typingctx, block, vectors, a, a_rows, a_taps, b, b_taps, taps, bias, c, c_row):
    floats = types.CPointer(block.float)
    rows, a_offsets, b_offsets = (
        types.CPointer(types.int64) if isinstance(given, types.CPointer) else types.int64
        for given in (a_rows, a_taps, b_taps)
    )
    operands = (floats, rows, a_offsets, floats, b_offsets, types.int64, floats, floats, types.int64)
    return types.void(block, types.int64, *operands), widths(_emit_tile, block.block)


@part
def multiply_tile(block, vectors, a, a_rows, a_taps, b, b_taps, taps, bias, c, c_row):
    """Compute one tile: c[i * c_row + j] = bias + sum over the taps (at least one) of A[i, t] * B[t, j].

    If block.adds, sums begin with a tile at `bias` whose rows lie c_row apart: C itself, to add to it.

    block    Block; its rows, and at most its vectors, make the tile
    vectors  how many vectors wide this tile is, 1 ... block.vectors
    a, b     pointers to the operands
    a_rows   distance of the rows of A, or pointer to the offsets of block.rows rows; all in elements
    a_taps, b_taps  likewise of the taps in A and B: a distance spares a load per tap
    bias     pointer to block.rows values (form "rows") or to one row of the tile (the other forms)
    c, c_row pointer to the tile and the distance of its rows
    """
    _microkernel(block, vectors, a, a_rows, a_taps, b, b_taps, taps, bias, c, c_row)


class _FilterRows:
    """Emits the loops over a filter whose rows meet other rows of B in every row of a tile.

    Row j of B meets row j - i * step of the filter in row i of the tile, where there is such a row:

        j      0  1  2  3  4  5  6        R = 5, step 1, three rows
        i = 0  0  1  2  3  4              the first and the last (rows - 1) * step rows of B, its edges, meet
        i = 1     0  1  2  3  4           fewer rows of the tile; each of them has a loop of its own
        i = 2        0  1  2  3  4
    """

    def __init__(self, builder: Any, block: Block, vectors: int, args: Any) -> None:
        self.w, self.R, self.S, self.b, self.b_rows, self.b_columns, self.low, self.high = args
        self.builder, self.block, self.simd = builder, block, Vectors(builder, block)
        self.column = [INT(v * block.lanes) for v in range(vectors)]
        self.edge = (block.rows - 1) * block.step

    def emit(self, sums: list[list[Any]]) -> list[list[Any]]:
        """Return the sums of all rows of the tile with the taps of rows low ... high-1 of B added."""
        builder, rows, step = self.builder, self.block.rows, self.block.step
        for j in range(self.edge):
            sums = self._emit_edge(INT(j), range(j // step + 1), sums)
        sums = self._emit_middle(sums)
        for e in range(self.edge):
            sums = self._emit_edge(builder.add(self.R, INT(e)), range(e // step + 1, rows), sums)
        return sums

    def _emit_edge(self, j: Any, active: range, sums: list[list[Any]]) -> list[list[Any]]:
        builder = self.builder
        inside = builder.and_(builder.icmp_signed("<=", self.low, j), builder.icmp_signed("<", j, self.high))
        return self._loop(j, builder.add(j, builder.zext(inside, INT)), active, sums)

    def _emit_middle(self, sums: list[list[Any]]) -> list[list[Any]]:
        builder = self.builder
        first = builder.select(builder.icmp_signed("<", self.low, INT(self.edge)), INT(self.edge), self.low)
        last = builder.select(builder.icmp_signed("<", self.R, self.high), self.R, self.high)
        return self._loop(first, last, range(self.block.rows), sums)

    def _loop(self, first: Any, last: Any, active: range, sums: list[list[Any]]) -> list[list[Any]]:
        """Emit a loop over rows of B around one over the columns of the filter, for some rows of the tile."""
        builder, before = self.builder, self.builder.block
        head, tap, end, done = (builder.append_basic_block(name) for name in ("row", "tap", "end", "done"))
        builder.cbranch(builder.icmp_signed("<", first, last), head, done)

        builder.position_at_end(head)
        j = builder.phi(INT, "j")
        outer = [[builder.phi(self.simd.type) for _ in self.column] for _ in active]
        line = builder.gep(self.b, [builder.load(builder.gep(self.b_rows, [j]))])
        taps = [self._filter_row(j, i) for i in active]
        builder.branch(tap)

        builder.position_at_end(tap)
        s = builder.phi(INT, "s")
        inner = [[builder.phi(self.simd.type) for _ in self.column] for _ in active]
        new = self._emit_tap(line, taps, s, inner)
        following = builder.add(s, INT(1))
        keep_rolled(builder.cbranch(builder.icmp_signed("<", following, self.S), tap, end))

        builder.position_at_end(end)
        next_row = builder.add(j, INT(1))
        keep_rolled(builder.cbranch(builder.icmp_signed("<", next_row, last), head, done))

        builder.position_at_end(done)
        join(s, (INT(0), head), (following, tap))
        join(j, (first, before), (next_row, end))
        result = list(sums)
        for i, outer_row, inner_row, new_row in zip(active, outer, inner, new, strict=True):
            cells = zip(sums[i], outer_row, inner_row, new_row, strict=True)
            result[i] = []
            for old, of_row, of_tap, value in cells:
                join(of_tap, (of_row, head), (value, tap))
                join(of_row, (old, before), (value, end))
                result[i].append(builder.phi(self.simd.type))
                join(result[i][-1], (old, before), (value, end))
        return result

    def _filter_row(self, j: Any, i: int) -> Any:
        """Return a pointer to the row of the filter that row j of B meets in row i of the tile."""
        row = self.builder.sub(j, INT(i * self.block.step))
        return self.builder.gep(self.w, [self.builder.mul(row, self.S)])

    def _emit_tap(self, line: Any, taps: list[Any], s: Any, sums: list[list[Any]]) -> list[list[Any]]:
        builder, simd = self.builder, self.simd
        here = builder.gep(line, [builder.load(builder.gep(self.b_columns, [s]))])
        vectors = [simd.load(here, offset) for offset in self.column]
        return [
            [simd.fma(factor, vector, total) for vector, total in zip(vectors, row, strict=True)]
            for factor, row in zip([simd.broadcast(tap, s) for tap in taps], sums, strict=True)
        ]


def join(phi: Any, *sources: tuple[Any, Any]) -> None:
    """Let a phi take a value from each block it may be reached from."""
    for value, block in sources:
        phi.add_incoming(value, block)


def _emit_filter(builder: Any, block: Block, vectors: int, args: Any) -> None:
    """Emit a tile of outputs of one filter, from its bias to storing."""
    *loops, bias, c, c_row = args
    rows = _FilterRows(builder, block, vectors, loops)
    start = [[rows.simd.broadcast(bias, INT(0))] * vectors] * block.rows
    for i, row in enumerate(rows.emit(start)):
        for offset, value in zip(rows.column, row, strict=True):
            rows.simd.store(value, c, builder.add(builder.mul(c_row, INT(i)), offset))


@intrinsic
def _filter_kernel(typingctx, block, vectors, w, R, S, b, b_rows, b_columns, low, high, bias, c, c_row):
    p, n, offsets = types.CPointer(block.float), types.int64, types.CPointer(types.int64)
    signature = types.void(block, n, p, n, n, p, offsets, offsets, n, n, p, p, n)
    return signature, widths(_emit_filter, block.block)


@part
def multiply_filter(block, vectors, w, R, S, b, b_rows, b_columns, low, high, bias, c, c_row):
    """Compute one tile of outputs of a filter w (R, S): c[i * c_row + v] = bias + the sum over r and s of

        w[r, s] * b[b_rows[i * block.step + r] + b_columns[s] + v]

    in order, of those rows of B whose number is in low ... high-1: the others are known to be zero.
    R > (block.rows - 1) * block.step, so that every row of B meets some row of the filter.
    """
    _filter_kernel(block, vectors, w, R, S, b, b_rows, b_columns, low, high, bias, c, c_row)


def widths(emit: Callable[..., None], block: Block) -> Callable[..., Any]:
    """Return the code of an intrinsic f(block, vectors, ...): a switch to what `emit` makes per width."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, vectors, *operands = args
        end = builder.append_basic_block("end")
        choose = builder.switch(vectors, end)
        for width in range(1, block.vectors + 1):
            case = builder.append_basic_block(f"vectors_{width}")
            choose.add_case(INT(width), case)
            builder.position_at_end(case)
            emit(builder, block, width, operands)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return codegen


@intrinsic
def lane_bits(typingctx: Any, block: BlockType, low: types.Integer, high: types.Integer) -> Any:
    """Return a number whose bits low ... high-1 are set, as far as they are lanes of two vectors."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        simd = Vectors(builder, block.block)
        return simd.bits(simd.clamp(args[1], 2), simd.clamp(args[2], 2))

    return types.int64(block, types.int64, types.int64), codegen


def _copy_vector(step: int) -> Any:
    """Return an intrinsic that copies one vector of elements that lie `step` apart, 1 or 2, in the source.

    f(block, target, source, read, written): the lanes of `step` vectors of the source whose bits are set in
    `read` are read, the others taken for zeros; those of the target that are set in `written` are written.
    """

    @intrinsic
    def apply(typingctx: Any, block: BlockType, target: Any, source: Any, read: Any, written: Any) -> Any:
        floats = types.CPointer(block.float)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            _, target, source, read, written = args
            simd = Vectors(builder, block.block)
            parts = [INT(part * simd.lanes) for part in range(step)]
            loaded = [simd.load_masked(source, part, simd.mask(builder.lshr(read, part))) for part in parts]
            simd.store_masked(emit_split(builder, loaded, simd.lanes)[0], target, simd.mask(written))
            return context.get_dummy_value()

        return types.void(block, floats, floats, types.int64, types.int64), codegen

    return apply


copy_lanes = _copy_vector(1)
copy_even_lanes = _copy_vector(2)


@intrinsic
def copy_whole(typingctx: Any, block: BlockType, target: Any, source: Any) -> Any:
    """Copy one vector, all of it."""
    floats = types.CPointer(block.float)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        simd = Vectors(builder, block.block)
        simd.store(simd.load(args[2], INT(0)), args[1], INT(0))
        return context.get_dummy_value()

    return types.void(block, floats, floats), codegen


def _finish_vector(is_whole: bool) -> Any:
    """Return an intrinsic that finishes one vector: it adds `more`, then clips to 0 ... most.

    f(block, target, more, bits, adds, clips, most): of the elements whose bits are set, or of all. Either is
    done only if `adds` or `clips` says so; else `more` is not read. NaN is not clipped.
    """

    @intrinsic
    def apply(
        typingctx: Any, block: BlockType, target: Any, more: Any, bits: Any, adds: Any, clips: Any, most: Any
    ) -> Any:
        floats = types.CPointer(block.float)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            _, target, more, bits, adds, clips, most = args
            simd, first = Vectors(builder, block.block), INT(0)
            mask = simd.mask(bits)
            v = simd.load(target, first) if is_whole else simd.load_masked(target, first, mask)
            added = simd.load_masked(more, first, simd.mask(builder.select(adds, bits, INT(0))))
            v = builder.select(adds, builder.fadd(v, added), v)
            zero, limit = ir.Constant(simd.type, None), simd.splat(simd.narrow(most))
            clipped = builder.select(builder.fcmp_ordered("<", v, zero), zero, v)
            clipped = builder.select(builder.fcmp_ordered(">", clipped, limit), limit, clipped)
            v = builder.select(clips, clipped, v)
            if is_whole:
                simd.store(v, target, first)
            else:
                simd.store_masked(v, target, mask)
            return context.get_dummy_value()

        kinds = (block, floats, floats, types.int64, types.boolean, types.boolean, types.float64)
        return types.void(*kinds), codegen

    return apply


finish_lanes = _finish_vector(is_whole=False)
finish_whole = _finish_vector(is_whole=True)


@intrinsic
def zero_lanes(typingctx: Any, block: BlockType, target: Any, count: Any) -> Any:
    """Set the first `count` elements of a vector, at most block.lanes, to zero."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        simd = Vectors(builder, block.block)
        simd.store_first(ir.Constant(simd.type, None), args[1], INT(0), args[2])
        return context.get_dummy_value()

    return types.void(block, types.CPointer(block.float), types.int64), codegen


@intrinsic
def prefetch(typingctx: Any, block: BlockType, p: Any) -> Any:
    """Ask for the cache line at p, which will be needed soon."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        Vectors(builder, block.block).prefetch(args[1], INT(0))
        return context.get_dummy_value()

    return types.void(block, types.CPointer(block.float)), codegen


@part
def fill(block, target, count):
    """Set `count` elements to zero."""
    for i in range(0, count, block_lanes(block)):
        zero_lanes(block, advance(target, i), count - i)


@part
def copy_padded(block, target, source, step, count, low, high):
    """Copy elements low ... high-1, which lie `step` apart in the source; zeros for the others of `count`."""
    copy_rows(block, 1, target, 0, source, 0, step, count, low, high)


@part
def copy_rows(block, rows, target, target_row, source, source_row, step, count, low, high):
    """Copy the same elements of several rows, as `copy_padded` does of one; the rows lie so far apart.

    Column of vectors by column, since what is to be read and written of each is the same in all rows.
    """
    lanes = block_lanes(block)
    if step < 1 or step > 2:
        for row in range(rows):
            to, of = advance(target, row * target_row), advance(source, row * source_row)
            fill(block, to, low)
            for i in range(low, high):
                to[i] = of[i * step]
            fill(block, advance(to, high), count - high)
        return
    for i in range(0, count, lanes):
        to, of = advance(target, i), advance(source, i * step)
        written = lane_bits(block, 0, count - i)
        if step == 2:  # the last element read is 2 * (high - 1): what follows may be nobody's memory
            read = lane_bits(block, 2 * (low - i), 2 * (high - i) - 1)
            for row in range(rows):
                copy_even_lanes(
                    block, advance(to, row * target_row), advance(of, row * source_row), read, written
                )
        elif low <= i and i + lanes <= high:
            for row in range(rows):
                copy_whole(block, advance(to, row * target_row), advance(of, row * source_row))
        else:
            read = lane_bits(block, low - i, high - i)
            for row in range(rows):
                copy_lanes(block, advance(to, row * target_row), advance(of, row * source_row), read, written)


@part
def spread_rows(block, rows, target, target_row, step, source, source_row, count):
    """Copy `count` consecutive elements of each row of the source to places `step` apart in the target.

    The rows lie `target_row` and `source_row` apart.
    """
    if step == 1:
        copy_rows(block, rows, target, target_row, source, source_row, 1, count, 0, count)
        return
    for row in range(rows):
        to, of = advance(target, row * target_row), advance(source, row * source_row)
        for i in range(count):
            to[i * step] = of[i]


def _emit_product(builder: Any, simd: Vectors, matrix: Any, column: list[Any]) -> list[Any]:
    """Emit matrix @ column for a constant matrix and a list of vectors; zeros and ones cost nothing.

    The matrices of points p, -p hold pairs of rows, or of columns, that differ in some signs only. Columns:
    their sum and their difference take the places of both. Rows: what they share, plus or minus the rest.
    """
    matrix, column = [list(row) for row in matrix], list(column)
    for j in range(len(column) - 1):
        both = [(row[j], row[j + 1]) for row in matrix]
        if all(abs(a) == abs(b) for a, b in both) and {a == b for a, b in both if a} == {True, False}:
            a, b = column[j : j + 2]
            column[j : j + 2] = builder.fadd(a, b), builder.fsub(a, b)
            for row, (a, b) in zip(matrix, both, strict=True):
                row[j : j + 2] = (a, 0) if a == b else (0, a)
    product: list[Any] = []
    while len(product) < len(matrix):
        row, *others = matrix[len(product) :]
        if others and list(map(abs, row)) == list(map(abs, others[0])) and row != others[0]:
            shared = [a if a == b else 0 for a, b in zip(row, others[0], strict=True)]
            rest = [a - b for a, b in zip(row, shared, strict=True)]
            even, odd = (_emit_sum(builder, simd, factors, column) for factors in (shared, rest))
            product += [builder.fadd(even, odd), builder.fsub(even, odd)]
        else:
            product.append(_emit_sum(builder, simd, row, column))
    return product


def _emit_sum(builder: Any, simd: Vectors, factors: list[Any], column: list[Any]) -> Any:
    """Emit the sum of vectors times constant factors, a factor 1 first if there is one."""
    if not any(factors):
        return simd.constant(0.0)
    terms = [(factor, value) for factor, value in zip(factors, column, strict=True) if factor != 0]
    (factor, value), *others = sorted(terms, key=lambda term: term[0] != 1)
    total = value if factor == 1 else builder.fmul(simd.constant(float(factor)), value)
    for factor, value in others:
        if abs(factor) == 1:
            total = (builder.fadd if factor == 1 else builder.fsub)(total, value)
        else:
            total = simd.fma(simd.constant(float(factor)), value, total)
    return total


def _emit_sandwich(builder: Any, simd: Vectors, left: Any, right: Any, X: list[list[Any]]) -> list[list[Any]]:
    """Emit Y = left X right^T on vectors and return the columns of Y; X is given by its rows."""
    half = [_emit_product(builder, simd, right, row) for row in X]
    return [_emit_product(builder, simd, left, list(column)) for column in zip(*half, strict=True)]


def _axes(block: Block) -> tuple[Matrices, Matrices]:
    """Return Winograd's matrices for the rows and for the columns of a block's tiles."""
    (m_h, m_w, _, _), (r_h, r_w) = block.sides, block.taps
    return matrices(m_h, r_h), matrices(m_w, r_w)


def _begin_transform(builder: Any, block: Block) -> Vectors:
    """Return what emits a transform, of up to 64 vectors."""
    simd = Vectors(builder, block)
    simd.align_frame()
    return simd


@intrinsic
def transform_filters(
    typingctx: Any, block: BlockType, source: Any, target: Any, target_step: Any, phase_step: Any
) -> Any:
    """Winograd: U = G w G^T of a vector of filters, for each phase of their taps.

    source      pointer to the filters: of each tap one vector, one after the other
    target      pointer to U: element e of its rows, one after the other, is the vector at e * target_step
    phase_step  how far apart the U of two phases lie; those of columns follow each other
    """
    floats, number, (s_h, s_w) = types.CPointer(block.float), types.int64, block.block.strides
    (R, S), (rows, columns) = block.block.extents, _axes(block.block)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, source, target, target_step, phase_step = args
        simd = _begin_transform(builder, block.block)
        for phase in range(s_h * s_w):
            h, v = divmod(phase, s_w)
            places = [[(r * S + s) * simd.lanes for s in range(v, S, s_w)] for r in range(h, R, s_h)]
            w = [[simd.load(source, INT(place)) for place in row] for row in places]
            U = _emit_sandwich(builder, simd, _of_taps(rows.G, len(w)), _of_taps(columns.G, len(w[0])), w)
            here = builder.gep(target, [builder.mul(phase_step, INT(phase))])
            _store_columns(builder, simd, U, here, target_step)
        return context.get_dummy_value()

    return types.void(block, floats, floats, number, number), codegen


def _of_taps(G: Matrix, taps: int) -> Matrix:
    """Return G for a phase with so many taps, whose others are zeros."""
    return tuple(row[:taps] for row in G)


@intrinsic
def transform_filter_gradient(
    typingctx: Any, block: BlockType, source: Any, source_step: Any, target: Any
) -> Any:
    """Winograd: grad_w = G^T U G of a vector of filters, U the gradient of what `transform_filters` makes.

    source  pointer to U: element e of its rows, one after the other, is the vector at e * source_step
    target  pointer to the gradients: of each tap one vector, one after the other
    """
    floats, (_, _, a_h, a_w) = types.CPointer(block.float), block.block.sides
    G_rows, G_columns = (_transposed(axis.G) for axis in _axes(block.block))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, source, source_step, target = args
        simd = _begin_transform(builder, block.block)
        U = _load_rows(builder, simd, source, source_step, (a_h, a_w))
        w = _emit_sandwich(builder, simd, G_rows, G_columns, U)
        _store_columns(builder, simd, w, target, INT(simd.lanes))
        return context.get_dummy_value()

    return types.void(block, floats, types.int64, floats), codegen


@intrinsic
def transform_input(
    typingctx: Any, block: BlockType, source: Any, source_row: Any, target: Any, target_step: Any
) -> Any:
    """Winograd: V = B^T d B of one tile, for a vector of channels.

    source  pointer to the tile's inputs: rows `source_row` apart, of one vector for each pixel
    target  pointer to V: element e of its rows, one after the other, is the vector at e * target_step
    """
    floats, (_, _, a_h, a_w) = types.CPointer(block.float), block.block.sides
    rows, columns = _axes(block.block)
    signature = types.void(block, floats, types.int64, floats, types.int64)
    return signature, _pixels_transform(block.block, (a_h, a_w), rows.BT, columns.BT)


@intrinsic
def transform_output_gradient(
    typingctx: Any, block: BlockType, source: Any, source_row: Any, target: Any, target_step: Any
) -> Any:
    """Winograd: M = A grad_y A^T of one tile, the gradient of what `transform_output` takes.

    source  pointer to the gradients of the tile's outputs, target pointer to M: as in `transform_input`
    """
    floats, (m_h, m_w, _, _) = types.CPointer(block.float), block.block.sides
    A_rows, A_columns = (_transposed(axis.AT) for axis in _axes(block.block))
    signature = types.void(block, floats, types.int64, floats, types.int64)
    return signature, _pixels_transform(block.block, (m_h, m_w), A_rows, A_columns)


def _pixels_transform(block: Block, shape: tuple[int, int], left: Matrix, right: Matrix) -> Any:
    """Return what emits left X right^T of `shape` pixels X."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, source, source_row, target, target_step = args
        simd = _begin_transform(builder, block)
        lines = [builder.gep(source, [builder.mul(source_row, INT(i))]) for i in range(shape[0])]
        X = [[simd.load(line, INT(j * simd.lanes)) for j in range(shape[1])] for line in lines]
        _store_columns(builder, simd, _emit_sandwich(builder, simd, left, right, X), target, target_step)
        return context.get_dummy_value()

    return codegen


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


@intrinsic
def transform_output(
    typingctx: Any, block: BlockType, source: Any, source_step: Any, bias: Any, target: Any, target_row: Any
) -> Any:
    """Winograd: y = A^T M A + bias of one tile, for a vector of output channels.

    source  pointer to M: element e of its rows, one after the other, is the vector at e * source_step
    bias    pointer to the bias of these channels
    target  pointer to the tile's outputs: rows `target_row` apart, of one vector for each pixel
    """
    floats, (_, _, a_h, a_w) = types.CPointer(block.float), block.block.sides
    rows, columns = _axes(block.block)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, source, source_step, bias, target, target_row = args
        simd = _begin_transform(builder, block.block)
        products = _load_rows(builder, simd, source, source_step, (a_h, a_w))
        added = simd.load(bias, INT(0))
        for j, column in enumerate(_emit_sandwich(builder, simd, rows.AT, columns.AT, products)):
            for i, value in enumerate(column):
                line = builder.gep(target, [builder.mul(target_row, INT(i))])
                simd.store(builder.fadd(value, added), line, INT(j * simd.lanes))
        return context.get_dummy_value()

    return types.void(block, floats, types.int64, floats, floats, types.int64), codegen


def _load_rows(
    builder: Any, simd: Vectors, source: Any, step: Any, shape: tuple[int, int]
) -> list[list[Any]]:
    """Load the vectors of a matrix, row after row, `step` apart."""
    rows: list[list[Any]] = []
    for _ in range(shape[0]):
        rows.append([])
        for _ in range(shape[1]):
            source = _hide(builder, source)
            rows[-1].append(simd.load(source, INT(0)))
            source = builder.gep(source, [step])
    return rows


def _store_columns(builder: Any, simd: Vectors, columns: list[list[Any]], target: Any, step: Any) -> None:
    """Store the vectors of a matrix, row after row, `step` apart."""
    for row in zip(*columns, strict=True):
        for value in row:
            target = _hide(builder, target)
            simd.store(value, target, INT(0))
            target = builder.gep(target, [step])


def _hide(builder: Any, p: Any) -> Any:
    """Return the same pointer, but LLVM does not know that it is the same.

    Else it keeps all places of a matrix in memory, and adds to all of them from one matrix to the next.
    """
    return builder.asm(ir.FunctionType(p.type, [p.type]), "", "=r,0", [p], False)


@intrinsic
def transpose_inputs(
    typingctx: Any,
    block: BlockType,
    source: Any,
    channel_step: Any,
    row_step: Any,
    lane: Any,
    channels: Any,
    low_row: Any,
    high_row: Any,
    low: Any,
    high: Any,
    target: Any,
) -> Any:
    """Winograd: copy a row's pixels of as many channels as fill a vector, so that channels are on the lanes.

    A lane is a channel and, where there are strides, one phase of its rows and of its columns: lanes count
    (channel, row, column). Each of block.lanes columns of the target takes `stride` of the source. Pixels
    that do not exist are taken for zeros, and so are channels, or, without strides, for the first one.

    source             pointer to the first pixel, of channel 0 and the first phase
    channel_step       how far apart the channels lie, and the rows
    lane, channels     the first lane, a multiple of block.lanes, and how many channels there are
    low_row, high_row  which phases of the rows lie in the image, one at least; which pixels of a row do
    target             pointer to block.lanes vectors, one after the other
    """
    floats, number, (s_h, s_w) = types.CPointer(block.float), types.int64, block.block.strides

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, source, channel_step, row_step, lane, channels, low_row, high_row, low, high, target = args
        simd = Vectors(builder, block.block)
        ends = [[builder.sub(end, INT(v * simd.lanes)) for end in (low, high)] for v in range(s_w)]
        bits = [simd.bits(simd.clamp(a), simd.clamp(b)) for a, b in ends]
        anywhere = builder.mul(low_row, row_step)
        loaded = []
        for i in range(simd.lanes // s_w):
            at = builder.add(builder.sdiv(lane, INT(s_w)), INT(i))
            channel, row = builder.sdiv(at, INT(s_h)), builder.srem(at, INT(s_h))
            exists = builder.icmp_signed("<", channel, channels)
            read = bits
            if s_h > 1:
                is_inside = builder.icmp_signed("<=", low_row, row), builder.icmp_signed("<", row, high_row)
                exists = builder.and_(exists, builder.and_(*is_inside))
            if s_h > 1 or s_w > 1:
                read = [builder.select(exists, number, INT(0)) for number in bits]
            place = builder.add(builder.mul(channel, channel_step), builder.mul(row, row_step))
            place = builder.select(exists, place, anywhere)
            columns = [
                simd.load_masked(source, builder.add(place, INT(v * simd.lanes)), simd.mask(read[v]))
                for v in range(s_w)
            ]
            loaded += emit_split(builder, columns, simd.lanes)
        for i, column in enumerate(emit_split(builder, loaded, simd.lanes)):
            simd.store(column, target, INT(i * simd.lanes))
        return context.get_dummy_value()

    return types.void(block, floats, *[number] * 8, floats), codegen


@intrinsic
def transpose(
    typingctx: Any,
    block: BlockType,
    source: Any,
    source_step: Any,
    rows: Any,
    read: Any,
    target: Any,
    target_step: Any,
    columns: Any,
    written: Any,
) -> Any:
    """Copy a square of block.lanes rows, `source_step` apart, column by column to rows `target_step` apart.

    Of the rows only the first `rows` exist, and the elements whose bits are set in `read`; the others are
    taken for zeros, rows for the first one. Only the first `columns` columns are written, and of those the
    elements whose bits are set in `written`.
    """
    floats, number = types.CPointer(block.float), types.int64

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, source, source_step, rows, read, target, target_step, columns, written = args
        simd = Vectors(builder, block.block)
        lanes = range(simd.lanes)

        def place(i: int, step: Any, count: Any) -> Any:
            return builder.select(builder.icmp_signed("<", INT(i), count), builder.mul(step, INT(i)), INT(0))

        mask = simd.mask(read)
        loaded = [simd.load_masked(source, place(i, source_step, rows), mask) for i in lanes]
        turned, mask = emit_split(builder, loaded, simd.lanes), simd.mask(written)
        for i in reversed(lanes):  # what does not exist is written where the first column will be
            simd.store_masked(turned[i], builder.gep(target, [place(i, target_step, columns)]), mask)
        return context.get_dummy_value()

    kinds = (block, floats, number, number, number, floats, number, number, number)
    return types.void(*kinds), codegen


def shuffle(builder: Any, a: Any, b: Any, indices: list[int]) -> Any:
    """Return the vector of the elements at `indices` of a followed by b."""
    kind = ir.VectorType(ir.IntType(32), len(indices))
    return builder.shuffle_vector(a, b, ir.Constant(kind, indices))


def emit_split(builder: Any, vectors: list[Any], lanes: int) -> list[Any]:
    """Return m = len(vectors) vectors, the p-th holding the elements p, p + m, p + 2 m ... of the given."""
    if len(vectors) == 1:
        return vectors
    pairs = list(zip(vectors[0::2], vectors[1::2], strict=True))
    even = [shuffle(builder, a, b, list(range(0, 2 * lanes, 2))) for a, b in pairs]
    odd = [shuffle(builder, a, b, list(range(1, 2 * lanes, 2))) for a, b in pairs]
    halves = emit_split(builder, even, lanes), emit_split(builder, odd, lanes)
    return [v for pair in zip(*halves, strict=True) for v in pair]


def emit_merge(builder: Any, even: Any, odd: Any, lanes: int) -> list[Any]:
    """Return two vectors that hold the elements of two others in turn."""
    halves = (range(lanes // 2), range(lanes // 2, lanes))
    return [shuffle(builder, even, odd, [e + o for e in half for o in (0, lanes)]) for half in halves]
