"""The vector microkernel that every CPU algorithm calls, written as LLVM vector code.

Numba alone does not keep a block of vector accumulators in registers, so the inner loop is emitted here:

                     B: `vectors` vectors of the tap            a_rows   distance of the rows of A, or a table
      A              b[b_taps[t] + j * lanes ...]                        of one offset per row
    row i  ----->  +---------+---------+---------+              a_taps   one offset per tap, added to each row
    a[i * a_rows   | c[i][0] | c[i][1] | c[i][2] |              b_taps   one offset per tap
      + a_taps[t]] +---------+---------+---------+
                     accumulators, in registers                 c[i][j] += A[i, t] * B[t, j], t in order

A tap is one (c, t, r, s) of the weight. The two tables of tap offsets are the idea of the indirect
convolution algorithm (Dukhan 2019, arXiv:1907.02129): direct, 1x1, im2col and Winograd differ in tables only.
Each sum runs over the taps in order, one fused multiply-add each, whatever the tile: same input, same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import NativeValue, intrinsic, register_model, typeof_impl, unbox

from fastconv.winograd_math import matrices

INT = ir.IntType(64)
CACHE_LINE = 64  # bytes


def _digest() -> str:
    """Return a digest of the sources of this folder and of the Winograd constants.

    Numba's disk cache looks at the file of a function, not at those it calls; the digest is part of
    every kernel's argument types, so that an edited helper never runs as a stale binary.
    """
    here = Path(__file__).parent
    files = [*sorted(here.glob("*.py")), here.parent / "winograd_math.py"]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


DIGEST = _digest()


def jit(function: Callable[..., Any]) -> Any:
    """Compile a kernel with Numba: without the GIL, cached on disk, or uncached where nothing can be written."""
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # Numba found no folder that it may write to
        return numba.njit(nogil=True, error_model="numpy")(function)


def part(function: Callable[..., Any]) -> Any:
    """Compile a part of kernels, which Python does not call: without wrappers and a cache of its own."""
    return numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


class Tile(NamedTuple):
    """Register tile of the microkernel: `rows` rows of A times `vectors` vectors of B."""

    rows: int
    vectors: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.vectors}"


@dataclass(frozen=True)
class Block:
    """A tile for one dtype and vector width: the compile-time part of a kernel's arguments.

    form: "rows"         A is broadcast, the bias belongs to the rows (weights x pixels, channels first)
          "columns"      A is broadcast, the bias belongs to the columns (pixels x weights, channels last)
          "elementwise"  A is a vector like B: c[i][j] += A[i, t, j] * B[t, j] (depthwise, channels last)
    m     outputs along one side of a Winograd tile; 0 elsewhere
    """

    dtype: str
    rows: int
    vectors: int
    lanes: int
    form: str = "rows"
    m: int = 0


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


@intrinsic
def block_rows(typingctx: Any, block: BlockType) -> Any:
    """Return the rows of a block, as a compile-time constant."""
    return types.int64(block), lambda context, builder, sig, args: INT(block.block.rows)


@intrinsic
def block_columns(typingctx: Any, block: BlockType) -> Any:
    """Return the elements in one row of a block (vectors * lanes), as a compile-time constant."""
    width = block.block.vectors * block.block.lanes
    return types.int64(block), lambda context, builder, sig, args: INT(width)


@intrinsic
def block_lanes(typingctx: Any, block: BlockType) -> Any:
    """Return the elements of one vector, as a compile-time constant."""
    return types.int64(block), lambda context, builder, sig, args: INT(block.block.lanes)


@intrinsic
def block_m(typingctx: Any, block: BlockType) -> Any:
    """Return the side of a block's Winograd output tile, as a compile-time constant."""
    return types.int64(block), lambda context, builder, sig, args: INT(block.block.m)


@intrinsic
def pointer(typingctx: Any, block: BlockType, address: types.Integer) -> Any:
    """Return an address as a pointer to the block's dtype; `p[i]` then reads without bounds or wrap-around."""

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
def table(typingctx: Any, array: types.Array) -> Any:
    """Return the data pointer of a contiguous 1-D array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.make_array(sig.args[0])(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), codegen


class Vectors:
    """Emits loads, stores and arithmetic on <lanes x float> at one place of the code."""

    def __init__(self, builder: Any, block: Block) -> None:
        self.builder = builder
        self.bytes = 4 if block.dtype == "float32" else 8
        self.element = ir.FloatType() if self.bytes == 4 else ir.DoubleType()
        self.lanes = block.lanes
        self.type = ir.VectorType(self.element, self.lanes)
        name = f"llvm.fma.v{self.lanes}f{8 * self.bytes}"
        signature = ir.FunctionType(self.type, [self.type] * 3)
        self._fma = cgutils.get_or_insert_function(builder.module, signature, name)

    def load(self, p: Any, offset: Any) -> Any:
        address = self.builder.bitcast(self.builder.gep(p, [offset]), self.type.as_pointer())
        return self.builder.load(address, align=self.bytes)

    def store(self, value: Any, p: Any, offset: Any) -> None:
        address = self.builder.bitcast(self.builder.gep(p, [offset]), self.type.as_pointer())
        self.builder.store(value, address, align=self.bytes)

    def splat(self, scalar: Any) -> Any:
        undefined = ir.Constant(self.type, ir.Undefined)
        one = self.builder.insert_element(undefined, scalar, ir.IntType(32)(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(one, undefined, zeros)

    def constant(self, value: float) -> Any:
        return ir.Constant(self.type, [self.element(value)] * self.lanes)

    def broadcast(self, p: Any, offset: Any) -> Any:
        return self.splat(self.builder.load(self.builder.gep(p, [offset])))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.builder.call(self._fma, [a, b, c])


def _keep_rolled(branch: Any) -> None:
    """Forbid unrolling of the loop that `branch` closes: LLVM would double it and spill the accumulators."""
    module = branch.parent.parent.module
    rule = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    count = len(module.metadata)  # any distinct operand: equal nodes would be merged into one
    loop = module.add_metadata([rule, INT(count)])
    loop.operands = (loop, rule)  # a loop's identity is a node whose first operand is itself
    branch.set_metadata("llvm.loop", loop)


def _emit_tile(builder: Any, block: Block, vectors: int, args: Any) -> None:
    """Emit the loop over the taps for a tile of `vectors` vectors, from loading the bias to storing."""
    a, a_rows, a_taps, b, b_taps, taps, bias, c, c_row = args
    simd = Vectors(builder, block)
    cells = [(i, j) for i in range(block.rows) for j in range(vectors)]
    column = [INT(j * block.lanes) for j in range(vectors)]
    if isinstance(a_rows.type, ir.PointerType):
        rows = [builder.load(builder.gep(a_rows, [INT(i)])) for i in range(block.rows)]
    else:  # needs fewer registers: x86 addresses scale a distance by 2, 4 and 8
        rows = [builder.mul(a_rows, INT(i)) for i in range(block.rows)]
    if block.form == "rows":
        start = [simd.broadcast(bias, INT(i)) for i in range(block.rows) for _ in range(vectors)]
    else:
        start = [simd.load(bias, offset) for _ in range(block.rows) for offset in column]

    before = builder.block
    loop, done = builder.append_basic_block("taps"), builder.append_basic_block("done")
    builder.branch(loop)

    builder.position_at_end(loop)
    tap = builder.phi(INT, "tap")
    sums = [builder.phi(simd.type) for _ in cells]
    a_tap = builder.gep(a, [builder.load(builder.gep(a_taps, [tap]))])
    b_tap = builder.gep(b, [builder.load(builder.gep(b_taps, [tap]))])
    b_vectors = [simd.load(b_tap, offset) for offset in column]
    new = []
    for i in range(block.rows):
        if block.form == "elementwise":
            a_row = builder.gep(a_tap, [rows[i]])
            a_vectors = [simd.load(a_row, offset) for offset in column]
        else:
            a_vectors = [simd.broadcast(a_tap, rows[i])] * vectors
        for j in range(vectors):
            new.append(simd.fma(a_vectors[j], b_vectors[j], sums[i * vectors + j]))
    following = builder.add(tap, INT(1))
    _keep_rolled(builder.cbranch(builder.icmp_signed("<", following, taps), loop, done))
    for phi, first, later in zip([tap, *sums], [INT(0), *start], [following, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, loop)

    builder.position_at_end(done)
    for (i, j), value in zip(cells, new, strict=True):
        simd.store(value, c, builder.add(builder.mul(c_row, INT(i)), column[j]))


@intrinsic
def _microkernel(
    typingctx: Any,
    block: BlockType,
    vectors: Any,
    a: Any,
    a_rows: Any,
    a_taps: Any,
    b: Any,
    b_taps: Any,
    taps: Any,
    bias: Any,
    c: Any,
    c_row: Any,
) -> Any:
    floats, offsets = types.CPointer(block.float), types.CPointer(types.int64)
    rows = offsets if isinstance(a_rows, types.CPointer) else types.int64
    operands = (floats, rows, offsets, floats, offsets, types.int64, floats, floats, types.int64)
    signature = types.void(block, types.int64, *operands)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        end = builder.append_basic_block("end")
        choose = builder.switch(args[1], end)
        for count in range(1, block.block.vectors + 1):
            case = builder.append_basic_block(f"vectors_{count}")
            choose.add_case(INT(count), case)
            builder.position_at_end(case)
            _emit_tile(builder, block.block, count, args[2:])
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


@part
def multiply_tile(block, vectors, a, a_rows, a_taps, b, b_taps, taps, bias, c, c_row):
    """Compute one tile: c[i * c_row + j] = bias + sum over the taps (at least one) of A[i, t] * B[t, j].

    block    Block; its rows, and at most its vectors, make the tile
    vectors  how many vectors wide this tile is, 1 ... block.vectors
    a, b     pointers; a_rows (one distance, or block.rows offsets), a_taps and b_taps (taps): in elements
    bias     pointer to block.rows values (form "rows") or to one row of the tile (the other forms)
    c, c_row pointer to the tile and the distance of its rows, in elements
    """
    _microkernel(block, vectors, a, a_rows, a_taps, b, b_taps, taps, bias, c, c_row)


def _mask(simd: Vectors, count: Any) -> Any:
    """Emit the mask of the first `count` lanes."""
    builder, kind = simd.builder, ir.VectorType(INT, simd.lanes)
    undefined = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(undefined, count, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), simd.lanes), [0] * simd.lanes)
    limit = builder.shuffle_vector(one, undefined, zeros)
    return builder.icmp_signed("<", ir.Constant(kind, list(range(simd.lanes))), limit)


def _masked(simd: Vectors, name: str, result: Any, arguments: list[Any]) -> Any:
    """Call LLVM's masked load or store."""
    suffix = f"v{simd.lanes}f{8 * simd.bytes}.p0"
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(simd.builder.module, signature, f"llvm.masked.{name}.{suffix}")
    return simd.builder.call(function, arguments)


@intrinsic
def copy_lanes(typingctx: Any, block: BlockType, target: Any, source: Any, count: Any) -> Any:
    """Copy the first `count` elements of a vector, at most block.lanes; what lies behind is not touched."""
    floats = types.CPointer(block.float)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        simd = Vectors(builder, block.block)
        mask, align = _mask(simd, args[3]), ir.IntType(32)(simd.bytes)
        p, q = (builder.bitcast(args[i], simd.type.as_pointer()) for i in (1, 2))
        zeros = ir.Constant(simd.type, None)
        value = _masked(simd, "load", simd.type, [q, align, mask, zeros])
        _masked(simd, "store", ir.VoidType(), [value, p, align, mask])
        return context.get_dummy_value()

    return types.void(block, floats, floats, types.int64), codegen


@intrinsic
def zero_lanes(typingctx: Any, block: BlockType, target: Any, count: Any) -> Any:
    """Set the first `count` elements of a vector, at most block.lanes, to zero."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        simd = Vectors(builder, block.block)
        mask, align = _mask(simd, args[2]), ir.IntType(32)(simd.bytes)
        p = builder.bitcast(args[1], simd.type.as_pointer())
        _masked(simd, "store", ir.VoidType(), [ir.Constant(simd.type, None), p, align, mask])
        return context.get_dummy_value()

    return types.void(block, types.CPointer(block.float), types.int64), codegen


@intrinsic
def prefetch(typingctx: Any, p: types.CPointer) -> Any:
    """Ask for the cache line at p, to be read soon."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        number, address = ir.IntType(32), ir.IntType(8).as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [address, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
        builder.call(function, [builder.bitcast(args[0], address), number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(p), codegen


@intrinsic
def copy_pixels(typingctx: Any, block: BlockType, target: Any, source: Any) -> Any:
    """Copy block.m elements, the width of a Winograd tile, as one small vector."""
    floats = types.CPointer(block.float)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        simd = Vectors(builder, replace(block.block, lanes=block.block.m))
        simd.store(simd.load(args[2], INT(0)), args[1], INT(0))
        return context.get_dummy_value()

    return types.void(block, floats, floats), codegen


@part
def copy(block, target, source, step, count):
    """Copy `count` elements that lie `step` apart in the source to consecutive places."""
    if step == 1:
        for i in range(0, count, block_lanes(block)):
            copy_lanes(block, advance(target, i), advance(source, i), count - i)
    else:
        for i in range(count):
            target[i] = source[i * step]


@part
def spread(block, target, step, source, count):
    """Copy `count` consecutive elements to places `step` apart."""
    if step == 1:
        copy(block, target, source, 1, count)
    else:
        for i in range(count):
            target[i * step] = source[i]


@part
def fill(block, target, count):
    """Set `count` elements to zero."""
    for i in range(0, count, block_lanes(block)):
        zero_lanes(block, advance(target, i), count - i)


def _emit_product(builder: Any, simd: Vectors, matrix: Any, column: list[Any]) -> list[Any]:
    """Emit matrix @ column for a constant matrix and a list of vectors; zeros and ones cost nothing."""
    product = []
    for row in matrix:
        total = None
        for factor, value in zip(row, column, strict=True):
            if factor == 0:
                continue
            if total is None:
                total = value if factor == 1 else builder.fmul(simd.constant(float(factor)), value)
            elif factor == 1:
                total = builder.fadd(total, value)
            elif factor == -1:
                total = builder.fsub(total, value)
            else:
                total = simd.fma(simd.constant(float(factor)), value, total)
        product.append(total)
    return product


def _sandwich(name: str) -> Any:
    """Return an intrinsic for Y = M X M^T + bias on vectors, M the matrix `name` of F(block.m, 3).

    f(block, source, source_row, source_step, target, target_step, bias):
    source       pointer to X: element (i, j) is the vector at i * source_row + j * source_step
    target       pointer to Y: element e of its rows, one after the other, is the vector at e * target_step
    bias         pointer to one value added to every element
    """

    @intrinsic
    def apply(
        typingctx: Any,
        block: BlockType,
        source: Any,
        source_row: Any,
        source_step: Any,
        target: Any,
        target_step: Any,
        bias: Any,
    ) -> Any:
        floats = types.CPointer(block.float)
        matrix = getattr(matrices(block.block.m), name)
        rows, columns = len(matrix), len(matrix[0])

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            _, source, source_row, source_step, target, target_step, bias = args
            simd = Vectors(builder, block.block)
            added = simd.broadcast(bias, INT(0))
            half = []  # the columns of M X
            for j in range(columns):
                across = builder.mul(source_step, INT(j))
                down = [builder.mul(source_row, INT(i)) for i in range(columns)]
                column = [simd.load(source, builder.add(across, offset)) for offset in down]
                half.append(_emit_product(builder, simd, matrix, column))
            for i in range(rows):
                for j, value in enumerate(_emit_product(builder, simd, matrix, [h[i] for h in half])):
                    offset = builder.mul(target_step, INT(i * rows + j))
                    simd.store(builder.fadd(value, added), target, offset)
            return context.get_dummy_value()

        signature = types.void(block, floats, types.int64, types.int64, floats, types.int64, floats)
        return signature, codegen

    return apply


transform_filter = _sandwich("G")
transform_input = _sandwich("BT")
transform_output = _sandwich("AT")


def _shuffle(builder: Any, a: Any, b: Any, indices: list[int]) -> Any:
    kind = ir.VectorType(ir.IntType(32), len(indices))
    return builder.shuffle_vector(a, b, ir.Constant(kind, indices))


def _emit_split(builder: Any, vectors: list[Any], lanes: int) -> list[Any]:
    """Return len(vectors) vectors, the p-th holding the elements p, p + m, p + 2 m ... of the given ones."""
    if len(vectors) == 1:
        return vectors
    pairs = list(zip(vectors[0::2], vectors[1::2], strict=True))
    even = [_shuffle(builder, a, b, list(range(0, 2 * lanes, 2))) for a, b in pairs]
    odd = [_shuffle(builder, a, b, list(range(1, 2 * lanes, 2))) for a, b in pairs]
    halves = _emit_split(builder, even, lanes), _emit_split(builder, odd, lanes)
    return [v for pair in zip(*halves, strict=True) for v in pair]


def _emit_merge(builder: Any, vectors: list[Any], lanes: int) -> list[Any]:
    """Undo `_emit_split`."""
    if len(vectors) == 1:
        return vectors
    even = _emit_merge(builder, vectors[0::2], lanes)
    odd = _emit_merge(builder, vectors[1::2], lanes)
    merged = []
    for a, b in zip(even, odd, strict=True):
        for first in (0, lanes // 2):
            indices = [i for e in range(first, first + lanes // 2) for i in (e, e + lanes)]
            merged.append(_shuffle(builder, a, b, indices))
    return merged


def _regroup(emit: Any) -> Any:
    """Return an intrinsic f(block, source, source_step, target, target_step) that regroups block.m vectors."""

    @intrinsic
    def apply(
        typingctx: Any, block: BlockType, source: Any, source_step: Any, target: Any, target_step: Any
    ) -> Any:
        floats = types.CPointer(block.float)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            _, source, source_step, target, target_step = args
            simd = Vectors(builder, block.block)
            steps = [INT(i) for i in range(block.block.m)]
            vectors = [simd.load(source, builder.mul(source_step, i)) for i in steps]
            for i, vector in zip(steps, emit(builder, vectors, block.block.lanes), strict=True):
                simd.store(vector, target, builder.mul(target_step, i))
            return context.get_dummy_value()

        return types.void(block, floats, types.int64, floats, types.int64), codegen

    return apply


split_columns = _regroup(_emit_split)  # a line of tiles, m pixels each -> one vector per pixel of the tile
merge_columns = _regroup(_emit_merge)  # and back
