"""The vector code by itself, against NumPy: microkernel, Winograd transforms, regrouping and copies."""

import importlib
from itertools import product

import numpy as np
import pytest

import fastconv
from fastconv import arrays
from fastconv.algorithms import TABLE
from fastconv.cpu import band, memory, planes, simd
from fastconv.cpu.device import current
from fastconv.cpu.simd import (
    Block,
    Kernel,
    advance,
    allocate,
    block_extents,
    block_lanes,
    multiply_tile,
    pointer,
    release,
    table,
)
from fastconv.lines import CACHE_LINE
from fastconv.problem import make_problem
from fastconv.winograd_math import matrices
from tests.compare import assert_bounded, assert_exact, integers
from tests.kernels import DTYPES

TAPS = 7


def address(array):
    return array.__array_interface__["data"][0]


def shapes():
    """(rows, vectors) of the register tiles of all algorithms, on this machine."""
    modules = [importlib.import_module(f"fastconv.cpu.{name}") for name in TABLE]
    return sorted({(t.rows, t.vectors) for m in modules for t in m.TILES if current().fits(t, "float32")})


every_shape = pytest.mark.parametrize("shape", shapes(), ids=lambda shape: "x".join(map(str, shape)))
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_m = pytest.mark.parametrize("m", [2, 4])
every_width = pytest.mark.parametrize("lanes", [2, 4, 8, 16])  # this machine's, narrower and wider


@Kernel
def call_tile(block, first, last, vectors, a, a_rows, a_taps, b, b_taps, taps, bias, c, c_row):
    p = pointer(block, a), pointer(block, b), pointer(block, bias), pointer(block, c)
    multiply_tile(block, vectors, p[0], a_rows, table(a_taps), p[1], table(b_taps), taps, p[2], p[3], c_row)


@Kernel
def call_tile_in_order(block, first, last, vectors, a, a_rows, a_taps, b, b_taps, taps, bias, c, c_row):
    p = pointer(block, a), pointer(block, b), pointer(block, bias), pointer(block, c)
    multiply_tile(block, vectors, p[0], a_rows, a_taps, p[1], b_taps, taps, p[2], p[3], c_row)


@Kernel
def call_tile_by_table(block, first, last, vectors, a, a_rows, a_taps, b, b_taps, taps, bias, c, c_row):
    p = pointer(block, a), pointer(block, b), pointer(block, bias), pointer(block, c)
    multiply_tile(
        block, vectors, p[0], table(a_rows), table(a_taps), p[1], table(b_taps), taps, p[2], p[3], c_row
    )


class Product:
    """Operands of one tile in memory with gaps of NaN between all that may be read."""

    def __init__(self, rng, block, vectors, taps=TAPS, in_order=False):
        self.block, self.vectors, self.taps = block, vectors, taps
        self.width, self.rows = vectors * block.lanes, block.rows
        rows, width, dtype = self.rows, self.width, block.dtype
        order = np.arange if in_order else rng.permutation
        self.a_taps = order(taps) * (width + 3)  # unless in_order, none at its own place
        self.b_taps = order(taps) * (width + 5) + 1
        self.a_row = taps * (width + 3) + 2
        self.a = np.full((rows, self.a_row), np.nan, dtype)
        self.b = np.full(taps * (width + 5) + 1, np.nan, dtype)
        is_vector = block.form == "elementwise"
        self.A = integers(rng, (rows, taps, width if is_vector else 1), dtype)
        self.B = integers(rng, (taps, width), dtype)
        for t in range(taps):
            self.a[:, self.a_taps[t] : self.a_taps[t] + self.A.shape[2]] = self.A[:, t]
            self.b[self.b_taps[t] : self.b_taps[t] + width] = self.B[t]
        self.bias = integers(rng, (rows, 1) if block.form == "rows" else (1, width), dtype)
        self.c = np.full((rows, width + 4), np.nan, dtype)

    def expected(self):
        return self.bias + (self.A * self.B).sum(axis=1)

    def check(self, by_table=False):
        expected = self.expected()
        a_rows = np.arange(self.rows) * self.a_row if by_table else self.a_row
        call = call_tile_by_table if by_table else call_tile
        call(
            self.block, 1, 1, self.vectors, address(self.a), a_rows, self.a_taps, address(self.b),
            self.b_taps, self.taps, address(self.bias), address(self.c), self.c.shape[1],
        )  # fmt: skip
        self.compare(expected)

    def check_in_order(self):
        """The taps given by their distances."""
        call_tile_in_order(
            self.block, 1, 1, self.vectors, address(self.a), self.a_row, self.width + 3,
            address(self.b[1:]), self.width + 5, self.taps, address(self.bias), address(self.c),
            self.c.shape[1],
        )  # fmt: skip
        self.compare(self.expected())

    def compare(self, expected):
        assert_exact(self.c[:, : self.width], expected)
        assert np.isnan(self.c[:, self.width :]).all(), "wrote beside the tile"


@every_dtype
@every_shape
class TestMultiplyTile:
    def test_distance_of_rows(self, shape, dtype, rng):
        block = Block(dtype, *shape, current().lanes(dtype), "rows")
        for vectors, taps in product(range(1, shape[1] + 1), (1, 2, TAPS)):
            Product(rng, block, vectors, taps).check()

    def test_distance_of_taps(self, shape, dtype, rng):
        block = Block(dtype, *shape, current().lanes(dtype), "rows")
        for vectors, taps in product(range(1, shape[1] + 1), (1, 2, TAPS, 16, 17, 40)):
            Product(rng, block, vectors, taps, in_order=True).check_in_order()

    @pytest.mark.parametrize("form", ["columns", "elementwise"])
    def test_table_of_rows(self, shape, dtype, form, rng):
        block = Block(dtype, *shape, current().lanes(dtype), form)
        for vectors, taps in product(range(1, shape[1] + 1), (1, 2, TAPS)):
            Product(rng, block, vectors, taps).check(by_table=True)


@every_width
def test_any_number_of_lanes(lanes, rng):
    for dtype in DTYPES:
        Product(rng, Block(dtype, 3, 2, lanes), 2).check()


@every_dtype
def test_sums_begin_with_a_tile(dtype, rng):
    """Of a block that adds: a tile somewhere else, or C itself."""
    case = Product(rng, Block(dtype, 3, 2, current().lanes(dtype), adds=True), 2)
    begin = integers(rng, case.c.shape, dtype)
    for start in (begin, case.c):
        case.c[:, : case.width] = begin[:, : case.width]
        call_tile(
            case.block, 1, 1, 2, address(case.a), case.a_row, case.a_taps, address(case.b), case.b_taps,
            case.taps, address(start), address(case.c), case.c.shape[1],
        )  # fmt: skip
        case.bias = begin[:, : case.width]
        case.compare(case.expected())


def test_sums_run_in_the_order_of_the_taps():
    """1e8 + 1 - 1e8 is 0 in float32, 1e8 - 1e8 + 1 is 1: the order is part of the result's bits."""
    for order, expected in (((0, 1, 2), 0), ((0, 2, 1), 1)):
        case = Product(np.random.default_rng(0), Block("float32", 2, 1, 4), 1, taps=3)
        terms = np.float32([1e8, 1, -1e8])[list(order)]
        case.A[:], case.bias[:] = 1, 0
        case.B[:] = terms[:, None]
        for t in range(3):
            case.a[:, case.a_taps[t]] = 1
            case.b[case.b_taps[t] : case.b_taps[t] + 4] = terms[t]
        case.c[:] = np.nan
        a_row, c_row = case.a_row, case.c.shape[1]
        call_tile(
            case.block, 1, 1, 1, address(case.a), a_row, case.a_taps, address(case.b), case.b_taps, 3,
            address(case.bias), address(case.c), c_row,
        )  # fmt: skip
        assert (case.c[:, :4] == expected).all()


def test_multiply_and_add_round_once():
    """A fused multiply-add keeps what a rounded product loses: (1 + e)(1 - e) - 1 = -e * e."""
    case = Product(np.random.default_rng(0), Block("float32", 1, 1, 4), 1, taps=1)
    e = np.float32(2**-13)
    case.a[:, case.a_taps[0]], case.b[case.b_taps[0] :][:4], case.bias[:] = 1 + e, 1 - e, -1
    call_tile(
        case.block, 1, 1, 1, address(case.a), case.a_row, case.a_taps, address(case.b), case.b_taps, 1,
        address(case.bias), address(case.c), case.c.shape[1],
    )  # fmt: skip
    assert (case.c[0, :4] == -e * e).all()


@Kernel
def call_filters(block, first, last, w, U, U_step, phase_step):
    simd.transform_filters(block, pointer(block, w), pointer(block, U), U_step, phase_step)


@Kernel
def call_input(block, first, last, d, d_row, V, V_step):
    simd.transform_input(block, pointer(block, d), d_row, pointer(block, V), V_step)


@Kernel
def call_output(block, first, last, M, M_step, bias, y, y_row):
    simd.transform_output(block, pointer(block, M), M_step, pointer(block, bias), pointer(block, y), y_row)


@Kernel
def call_output_gradient(block, first, last, y, y_row, M, M_step):
    simd.transform_output_gradient(block, pointer(block, y), y_row, pointer(block, M), M_step)


@Kernel
def call_filter_gradient(block, first, last, U, U_step, w):
    simd.transform_filter_gradient(block, pointer(block, U), U_step, pointer(block, w))


@every_dtype
@pytest.mark.parametrize("extents", [(3, 3), (5, 5), (1, 3), (5, 1), (3, 1), (1, 5), (2, 2), (4, 4), (1, 4)])
@every_m
@every_width
class TestTransforms:
    """Y = L X R^T in every lane, a channel each; exact where floats hold the matrices L and R."""

    def test_filters(self, lanes, m, extents, dtype, rng):
        block = Block(dtype, 1, 1, lanes, m=m, extents=extents)
        w = integers(rng, (*extents, lanes), dtype)
        U = Gapped(places(block), lanes, dtype)
        call_filters(block, 1, 1, address(w), U.address, U.step, 0)
        left, right = axes("G", block)
        scale = sandwich(np.abs(left), np.abs(w), np.abs(right))
        bound = 4 * np.finfo(dtype).eps * scale
        assert_bounded(U.vectors(), sandwich(left, w, right), bound, dtype)

    def test_input(self, lanes, m, extents, dtype, rng):
        """Of rows longer than those of a tile."""
        block = Block(dtype, 1, 1, lanes, m=m, extents=extents)
        _, _, a_h, a_w = block.sides
        d = integers(rng, (a_h, a_w + 1, lanes), dtype)
        d[:, a_w] = np.nan
        V = Gapped(places(block), lanes, dtype)
        call_input(block, 1, 1, address(d), (a_w + 1) * lanes, V.address, V.step)
        left, right = axes("BT", block)
        assert_exact(V.vectors(), sandwich(left, d[:, :a_w], right), dtype)

    def test_output(self, lanes, m, extents, dtype, rng):
        block = Block(dtype, 1, 1, lanes, m=m, extents=extents)
        m_h, m_w, a_h, a_w = block.sides
        M = Gapped(places(block), lanes, dtype)
        M.array[:, :lanes] = rng.integers(-1, 2, (places(block), lanes))
        bias, y = integers(rng, lanes, dtype), Gapped(m_h, m_w * lanes, dtype)
        call_output(block, 1, 1, M.address, M.step, address(bias), y.address, y.step)
        left, right = axes("AT", block)
        products = M.vectors().reshape(a_h, a_w, lanes)
        found, expected = y.vectors().reshape(m_h * m_w, lanes), bias + sandwich(left, products, right)
        if (a_h, a_w) != (7, 7):
            assert_exact(found, expected, dtype)
        else:  # floats do not hold all sums of numbers from (5/8)^6 to 2^6
            scale = sandwich(np.abs(left), np.abs(products), np.abs(right))
            assert_bounded(found, expected, 4 * np.finfo(dtype).eps * scale, dtype)

    def test_output_gradient(self, lanes, m, extents, dtype, rng):
        """Of rows longer than those of a tile."""
        block = Block(dtype, 1, 1, lanes, m=m, extents=extents)
        m_h, m_w, _, _ = block.sides
        y = rng.integers(-1, 2, (m_h, m_w + 1, lanes)).astype(dtype)
        y[:, m_w] = np.nan
        M = Gapped(places(block), lanes, dtype)
        call_output_gradient(block, 1, 1, address(y), (m_w + 1) * lanes, M.address, M.step)
        left, right = axes("AT", block)
        assert_exact(M.vectors(), sandwich(left.T, y[:, :m_w], right.T), dtype)

    def test_filter_gradient(self, lanes, m, extents, dtype, rng):
        block = Block(dtype, 1, 1, lanes, m=m, extents=extents)
        _, _, a_h, a_w = block.sides
        U = Gapped(places(block), lanes, dtype)
        U.array[:, :lanes] = integers(rng, (places(block), lanes))
        w = np.full((extents[0] * extents[1] + 1, lanes), np.nan, dtype)
        call_filter_gradient(block, 1, 1, U.address, U.step, address(w))
        left, right = axes("G", block)
        products = U.vectors().reshape(a_h, a_w, lanes)
        bound = 4 * np.finfo(dtype).eps * sandwich(np.abs(left.T), np.abs(products), np.abs(right.T))
        assert_bounded(w[:-1], sandwich(left.T, products, right.T), bound, dtype)
        assert np.isnan(w[-1]).all()


@every_dtype
@every_m
@every_width
@pytest.mark.parametrize(
    ("extents", "strides"), [((3, 3), (2, 2)), ((7, 4), (2, 1)), ((2, 5), (1, 2)), ((11, 1), (4, 1))]
)
def test_filters_of_phases(lanes, m, extents, strides, dtype, rng):
    """Every phase of the taps is a filter by itself, with zeros for the taps that others have."""
    block = Block(dtype, 1, 1, lanes, m=m, extents=extents, strides=strides)
    w, (s_h, s_w), taps = integers(rng, (*extents, lanes), dtype), strides, block.taps
    U = Gapped(places(block) * s_h * s_w, lanes, dtype)
    call_filters(block, 1, 1, address(w), U.address, U.step, places(block) * U.step)
    left, right = axes("G", block)
    for phase, found in enumerate(np.split(U.vectors(), s_h * s_w)):
        here = w[phase // s_w :: s_h, phase % s_w :: s_w]
        here = np.pad(here, [(0, taps[0] - len(here)), (0, taps[1] - here.shape[1]), (0, 0)])
        bound = 4 * np.finfo(dtype).eps * sandwich(np.abs(left), np.abs(here), np.abs(right))
        assert_bounded(found, sandwich(left, here, right), bound, dtype)


class Gapped:
    """Rows of vectors with NaN between them, which has to stay there."""

    def __init__(self, rows, length, dtype):
        self.length, self.step = length, length + 2
        self.array = np.full((rows, self.step), np.nan, dtype)
        self.address = address(self.array)

    def vectors(self):
        assert np.isnan(self.array[:, self.length :]).all(), "wrote beside the vectors"
        return self.array[:, : self.length]


def places(block):
    return block.sides[2] * block.sides[3]


def axes(name, block):
    """The matrix of that name for the rows of a tile, and for its columns."""
    sides = zip(block.sides[:2], block.taps, strict=True)
    return [np.array(getattr(matrices(m, taps), name)).astype(np.float64) for m, taps in sides]


def sandwich(left, X, right):
    """The elements of L X R^T, row by row, for every lane, the last axis of X."""
    return np.einsum("ij,jkv,lk->ilv", left, X.astype(float), right).reshape(-1, X.shape[2])


@Kernel
def call_transpose(
    block, first, last, source, source_step, rows, read, target, target_step, columns, written
):
    p = pointer(block, source), pointer(block, target)
    simd.transpose(block, p[0], source_step, rows, read, p[1], target_step, columns, written)


@every_dtype
@every_width
def test_transpose(lanes, dtype, rng):
    """What is not to be read is NaN; what is not to be written keeps its value."""
    block, counts = Block(dtype, 1, 1, lanes), (1, lanes - 1, lanes, lanes + 3)
    for rows, columns, low, length in product(counts, counts, (0, 1), counts):
        exist = min(rows, lanes)
        source, square = np.full((lanes, lanes + 1), np.nan, dtype), np.zeros((lanes, lanes), dtype)
        square[:exist, low:] = integers(rng, (exist, lanes - low), dtype)
        source[:exist, low:lanes] = square[:exist, low:]
        square[exist:] = square[0]
        target = np.full((lanes + 1, lanes + 2), 99, dtype)
        expected = target.copy()
        written = min(columns, lanes), min(length, lanes)
        expected[: written[0], : written[1]] = square.T[: written[0], : written[1]]
        call_transpose(
            block, 1, 1, address(source), lanes + 1, rows, (1 << lanes) - (1 << low),
            address(target), lanes + 2, columns, (1 << length) - 1,
        )  # fmt: skip
        assert_exact(target, expected, dtype)


@Kernel
def call_copy(block, first, last, target, source, step, count, low, high):
    simd.copy_padded(block, pointer(block, target), pointer(block, source), step, count, low, high)


@Kernel
def call_copy_rows(block, first, last, rows, target, target_row, source, source_row, step, count, low, high):
    p = pointer(block, target), pointer(block, source)
    simd.copy_rows(block, rows, p[0], target_row, p[1], source_row, step, count, low, high)


@Kernel
def call_spread(block, first, last, rows, target, target_row, step, source, source_row, count):
    p = pointer(block, target), pointer(block, source)
    simd.spread_rows(block, rows, p[0], target_row, step, p[1], source_row, count)


@Kernel
def call_fill(block, first, last, target, count):
    simd.fill(block, pointer(block, target), count)


@every_dtype
class TestCopies:
    """Exactly `count` elements, whatever the vectors: below, at and above one and several of them."""

    @pytest.fixture
    def counts(self, dtype):
        lanes = current().lanes(dtype)
        return [0, 1, 2, 3, lanes - 1, lanes, lanes + 1, 3 * lanes - 1, 3 * lanes]

    @pytest.mark.parametrize("step", [1, 2, -1, 0])
    def test_copy(self, step, dtype, counts):
        block = Block(dtype, 1, 1, current().lanes(dtype))
        source = np.arange(1, 200, dtype=dtype)
        for count in counts:
            target = np.full(200, np.nan, dtype)
            call_copy(block, 1, 1, address(target[1:]), address(source[99:]), step, count, 0, count)
            assert np.array_equal(target[1 : count + 1], 100 + step * np.arange(count))
            assert np.isnan(target).sum() == 200 - count

    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_copy_pads_with_zeros(self, step, dtype, counts):
        block = Block(dtype, 1, 1, current().lanes(dtype))
        for count, low, high in product(counts, counts, counts):
            if not low <= high <= count:
                continue
            source, target = np.full((2, 400), np.nan, dtype)
            inside = np.arange(low, high)
            source[99 + step * inside] = inside + 1
            call_copy(block, 1, 1, address(target[1:]), address(source[99:]), step, count, low, high)
            assert np.array_equal(np.nonzero(target[1 : count + 1])[0], inside)
            assert np.array_equal(target[1:][inside], inside + 1)
            assert np.isnan(target).sum() == 400 - count

    @pytest.mark.parametrize("step", [1, 2, 3, -1])
    @pytest.mark.parametrize("rows", [0, 1, 2, 5])
    def test_copy_rows(self, rows, step, dtype, counts):
        """Each as if it were copied alone; nothing between the rows is written."""
        block = Block(dtype, 1, 1, current().lanes(dtype))
        source = np.arange(1, 2001, dtype=dtype).reshape(5, 400)[::-1]
        for count in counts:
            low, high = min(2, count), max(count - 3, min(2, count))
            target = np.full((5, 200), np.nan, dtype)
            places = address(target[0, 1:]), 200, address(source[0, 150:]), -400
            call_copy_rows(block, 1, 1, rows, *places, step, count, low, high)
            expected = np.zeros((rows, count), dtype)
            expected[:, low:high] = source[:rows, 150 + step * np.arange(low, high)]
            assert np.array_equal(target[:rows, 1 : count + 1], expected)
            assert np.isnan(target).sum() == target.size - expected.size

    @pytest.mark.parametrize("step", [1, 2, -1])
    def test_spread(self, step, dtype, counts):
        block = Block(dtype, 1, 1, current().lanes(dtype))
        source = np.arange(1, 601, dtype=dtype).reshape(3, 200)
        for rows, count in product((0, 1, 3), counts):
            target = np.full((3, 200), np.nan, dtype)
            places = address(target[0, 99:]), 200, step, address(source), 200
            call_spread(block, 1, 1, rows, *places, count)
            assert np.array_equal(target[:rows, 99 + step * np.arange(count)], source[:rows, :count])
            assert np.isnan(target).sum() == target.size - rows * count

    def test_fill(self, dtype, counts):
        block = Block(dtype, 1, 1, current().lanes(dtype))
        for count in counts:
            target = np.full(200, np.nan, dtype)
            call_fill(block, 1, 1, address(target[1:]), count)
            assert not target[1 : count + 1].any()
            assert np.isnan(target).sum() == 200 - count


@every_dtype
@pytest.mark.parametrize("shape", [(3, 5), (1000,), (0, 7)])
def test_memory_that_begins_with_a_cache_line(shape, dtype):
    for _ in range(9):
        array = memory.allocate(shape, dtype)
        assert (array.shape, array.dtype) == (shape, dtype)
        assert array.flags.c_contiguous
        assert address(array) % CACHE_LINE == 0 or not array.size


def test_large_results_begin_with_a_cache_line():
    y = fastconv.conv2d(np.ones((1, 1, 512, 512), np.float32), np.ones((1, 1, 1, 1), np.float32))
    assert y.nbytes == arrays.LARGE
    assert address(y) % CACHE_LINE == 0


@simd.intrinsic
def address_of(typingctx, p):
    return simd.types.int64(p), lambda context, builder, sig, args: builder.ptrtoint(args[0], simd.INT)


@Kernel
def allocate_and_write(block, first, last, elements, found):
    memory = allocate(block, elements)
    for i in range(elements):
        memory[i] = i
    for i in range(elements):
        found[0] += memory[i]
    found[1] = address_of(memory)
    release(memory)


@every_dtype
def test_allocate(dtype):
    """Memory holds what is written to it, and begins at a cache line."""
    for elements in (0, 1, 5, 7, 100, 1000, 12345, 1 << 20):
        found = np.zeros(2, np.int64)
        allocate_and_write(Block(dtype, 1, 1, current().lanes(dtype)), 1, 1, elements, found)
        assert found[0] == elements * (elements - 1) // 2
        assert found[1] % simd.CACHE_LINE == 0


@Kernel
def list_tiles(block, first, last, pixels, is_exact, found):
    done = i = 0
    while done < pixels:
        found[i] = band.find_vectors(block, done, pixels, is_exact)
        done = found[i, 1] + found[i, 2]
        i += 1


@pytest.mark.parametrize(
    ("vectors", "pixels", "is_exact", "tiles"),
    [
        (3, 112, 0, [(3, 0, 48), (2, 48, 32), (2, 80, 32)]),
        (4, 49, 0, [(4, 0, 49)]),
        (4, 49, 1, [(2, 0, 32), (2, 17, 32)]),
        (3, 28, 0, [(2, 0, 28)]),
        (3, 28, 1, [(1, 0, 16), (1, 12, 16)]),
        (3, 56, 0, [(2, 0, 32), (2, 24, 32)]),
    ],
)
def test_tiles_of_a_strip(vectors, pixels, is_exact, tiles):
    """Vectors, first pixel and pixels of each, with 16 lanes: no narrow tile behind wide ones."""
    found = np.zeros((len(tiles), 3), np.int64)
    list_tiles(Block("float32", 8, vectors, 16), 1, 1, pixels, is_exact, found)
    assert list(map(tuple, found.tolist())) == tiles


@pytest.mark.parametrize(
    ("size", "channels", "stride", "by_rows"),
    [(224, 3, 1, 1), (224, 3, 2, 1), (112, 16, 2, 0), (28, 3, 1, 0)],
)
def test_rows_of_few_taps_are_multiplied_one_by_one(size, channels, stride, by_rows):
    """Where they are whole vectors: 112 columns are 7 of 16 lanes; 56 would be 4 for 3.5, 28 2 for 1.75."""
    shapes = (1, channels, size, size), (64, channels, 3, 3)
    problem = make_problem("conv2d", *shapes, stride=stride, padding=1, dtype="float32")
    geometry, _ = band.plan_bands(problem, Block("float32", 8, 3, 16), 1 << 19, 1)
    assert geometry.by_rows == by_rows


@Kernel
def call_ragged(block, first, last, vectors, addresses, sizes, b_rows, b_columns, bounds, c_row):
    w, b, bias, c = addresses
    simd.multiply_filter(
        block, vectors, pointer(block, w), sizes[0], sizes[1], pointer(block, b), table(b_rows),
        table(b_columns), bounds[0], bounds[1], pointer(block, bias), pointer(block, c), c_row,
    )  # fmt: skip


@every_dtype
@pytest.mark.parametrize(("rows", "vectors", "step"), [(6, 4, 1), (4, 2, 1), (3, 2, 2), (2, 1, 3), (1, 1, 1)])
def test_multiply_filter(rows, vectors, step, dtype, rng):
    """Rows of the tile that share rows of B, in any place; those out of bounds, here NaN, are not read."""
    lanes, edge = current().lanes(dtype), (rows - 1) * step
    block = Block(dtype, rows, vectors, lanes, "ragged", step=step)
    for width, more, S in product(range(1, vectors + 1), (1, 2, 5), (1, 4)):
        R = edge + more
        count = R + edge
        w, bias = integers(rng, (R, S), dtype), integers(rng, 1, dtype)
        for low, high in ((0, count), (-3, count + 2), (1, count - 1), (count // 2, count), (2, 2)):
            seen = slice(max(low, 0), max(high, 0))
            lines = np.full((count, width * lanes + 2 * S), np.nan, dtype)
            lines[seen] = integers(rng, lines[seen].shape, dtype)
            places = rng.permutation(count)
            b, c = lines[np.argsort(places)], np.full((rows, width * lanes + 1), np.nan, dtype)
            call_ragged(
                block, 1, 1, width, tuple(map(address, (w, b, bias, c))), (R, S), places * b.shape[1],
                2 * np.arange(S), (low, high), c.shape[1],
            )  # fmt: skip
            expected = np.full((rows, width * lanes), bias[0], np.float64)
            for i, r, s in product(range(rows), range(R), range(S)):
                if low <= i * step + r < high:
                    expected[i] += w[r, s] * lines[i * step + r, 2 * s : 2 * s + width * lanes]
            assert_exact(c[:, :-1], expected, dtype)
            assert np.isnan(c[:, -1]).all(), "wrote beside the tile"


@Kernel
def call_plane(
    block,
    first,
    last,
    vectors,
    addresses,
    x_row,
    size,
    corner,
    stride_h,
    dilation,
    y_row,
    P,
    count,
    planes_apart,
):
    x, w, bias, y = addresses
    planes.convolve_plane(
        block, vectors, pointer(block, x), x_row, size[0], size[1], corner[1], dilation[1], pointer(block, w),
        corner[0], stride_h, dilation[0], pointer(block, bias), pointer(block, y), y_row, P, count,
        planes_apart[0], planes_apart[1],
    )  # fmt: skip


@every_dtype
class TestConvolvePlane:
    """One filter on one plane, from a corner that may lie outside it, against the same by NumPy."""

    @pytest.mark.parametrize(
        ("extents", "stride", "dilation", "rolling"),
        [
            ((3, 3), (1, 1), (1, 1), True),
            ((1, 1), (1, 1), (1, 1), False),
            ((2, 5), (1, 1), (1, 2), True),
            ((3, 3), (2, 2), (1, 1), False),
            ((3, 3), (2, 2), (1, 1), True),
            ((6, 5), (2, 2), (1, 1), True),
            ((1, 37), (1, 2), (1, 1), False),
            ((1, 4), (3, 2), (1, 1), False),
            ((3, 2), (1, 1), (2, 3), False),
        ],
    )
    def test_numpy(self, extents, stride, dilation, rolling, dtype, rng):
        lanes = current().lanes(dtype)
        block = Block(dtype, 1, 2, lanes, "plane", step=stride[1], extents=extents, rolling=rolling)
        w, bias = integers(rng, extents, dtype), integers(rng, 1, dtype)
        for size, corner, P, count in (
            ((1, 1), (0, 0), 1, 1),
            ((5, 6), (0, 0), 3, 2),
            ((5, 2 * lanes), (-2, -3), 8, lanes + 1),
            ((4, 3 * lanes), (1, lanes - 1), 3, 2 * lanes),
            ((3, 4 * lanes + 9), (0, -1), 2, 2 * lanes),
            ((2, lanes), (-7, -1), 4, lanes - 1),
            ((3, 5), (2, 4), 2, lanes),
        ):
            around = np.full((size[0] + 2, size[1] + 3), np.nan, dtype)
            x = around[1:-1, 1:-2]
            x[:] = integers(rng, size, dtype)
            y = np.full((P, 2 * lanes + 1), np.nan, dtype)
            addresses = tuple(map(address, (x, w, bias, y)))
            call_plane(
                block, 1, 1, -(-count // lanes), addresses, around.shape[1], size, corner, stride[0],
                dilation, y.shape[1], P, count, (0, 0),
            )  # fmt: skip
            expected = bias[0] + correlate_at(x, w, corner, stride, dilation, (P, count))
            assert_exact(y[:, :count], expected, dtype)
            assert np.isnan(y[:, count:]).all(), "wrote beside the outputs"

    @pytest.mark.parametrize(
        ("extents", "stride", "dilation", "rolling"),
        [
            ((3, 3), (1, 1), (1, 1), True),
            ((2, 5), (1, 1), (1, 2), True),
            ((3, 2), (3, 1), (2, 3), False),
            ((3, 3), (2, 2), (1, 1), True),
            ((1, 4), (3, 2), (1, 1), False),
        ],
    )
    def test_pairs(self, extents, stride, dilation, rolling, dtype, rng):
        """Two planes, filters and biases, each with its own outputs, whose columns share a vector."""
        lanes = current().lanes(dtype)
        block = Block(dtype, 2, 1, lanes, "plane", step=stride[1], extents=extents, rolling=rolling)
        w, bias = integers(rng, (2, *extents), dtype), integers(rng, 2, dtype)
        most = max(count for count in range(lanes) if planes.fits_pairs(block, count))
        if most == 0:  # vectors of two lanes
            return
        for size, corner, P, count in (
            ((1, 1), (0, 0), 1, 1),
            ((5, lanes), (-1, -1), 4, most),
            ((6, 2 * lanes), (-2, lanes - 1), 7, most),
            ((3, 2), (-4, -3), 6, most),
            ((4, lanes - 1), (1, lanes // 2), 2, max(1, most - 1)),
        ):
            around = np.full((2, size[0] + 2, size[1] + 3), np.nan, dtype)
            x = around[:, 1:-1, 1:-2]
            x[:] = integers(rng, x.shape, dtype)
            y = np.full((2, P, lanes + 1), np.nan, dtype)
            addresses = tuple(map(address, (x, w, bias, y)))
            call_plane(
                block, 1, 1, 1, addresses, around.shape[2], size, corner, stride[0], dilation, y.shape[2], P,
                count, (x.strides[0] // x.itemsize, y[0].size),
            )  # fmt: skip
            for i in range(2):
                expected = bias[i] + correlate_at(x[i], w[i], corner, stride, dilation, (P, count))
                assert_exact(y[i, :, :count], expected, dtype)
            assert np.isnan(y[..., count:]).all(), "wrote beside the outputs"


@Kernel
def call_gradient(block, first, last, addresses, x_row, size, corner, stride_h, dilation, y_row, P, count):
    x, y, totals, sums = addresses
    planes.differentiate_plane(
        block, pointer(block, x), x_row, size[0], size[1], corner[1], dilation[1], corner[0], stride_h,
        dilation[0], pointer(block, y), y_row, P, count, pointer(block, totals),
    )  # fmt: skip
    for tap in range(block_extents(block)[0] * block_extents(block)[1]):
        total = advance(pointer(block, totals), tap * block_lanes(block))
        pointer(block, sums)[tap] = planes.sum_lanes(block, total)


@every_dtype
@every_width
class TestDifferentiatePlane:
    """The gradient of one filter on one plane, whose corner may lie outside it, against the definition."""

    @pytest.mark.parametrize(
        ("extents", "stride", "dilation", "rolling"),
        [
            ((3, 3), (1, 1), (1, 1), True),
            ((1, 1), (1, 1), (1, 1), False),
            ((2, 5), (1, 1), (1, 2), True),
            ((5, 2), (1, 2), (1, 1), True),
            ((3, 3), (2, 2), (1, 1), False),
            ((1, 4), (3, 2), (1, 1), False),
            ((3, 2), (1, 1), (2, 3), False),
        ],
    )
    def test_definition(self, extents, stride, dilation, rolling, lanes, dtype, rng):
        """An infinite input makes the taps infinite that meet it, and no others."""
        block = Block(dtype, 1, 1, lanes, "plane", step=stride[1], extents=extents, rolling=rolling)
        for size, corner, P, count in (
            ((1, 1), (0, 0), 1, 1),
            ((5, 6), (0, 0), 3, 2),
            ((5, 2 * lanes), (-2, -3), 8, lanes),
            ((4, 3 * lanes), (1, lanes - 1), 3, max(lanes - 2, 1)),
            ((9, 2 * lanes), (-1, -1), 10, lanes - 1),
            ((2, lanes), (-7, -1), 4, lanes - 1),
            ((3, 5), (2, 4), 2, lanes),
            ((3, 5), (0, -3 * lanes), 2, lanes),
        ):
            around = np.full((size[0] + 2, size[1] + 3), np.nan, dtype)
            x = around[1:-1, 1:-2]
            y = np.full((P, lanes + 1), np.nan, dtype)
            y[:, :count] = rng.integers(1, 4, (P, count))
            for place in (None, *product((0, size[0] // 2, -1), (0, size[1] // 2, -1))):
                x[:] = integers(rng, size, dtype)
                if place is not None:
                    x[place] = np.inf
                sums = np.full(extents, np.nan, dtype)
                totals = np.zeros((*extents, lanes), dtype)
                totals[..., 0] = before = integers(rng, extents, dtype)
                call_gradient(
                    block, 1, 1, tuple(map(address, (x, y, totals, sums))), around.shape[1], size, corner,
                    stride[0], dilation, y.shape[1], P, count,
                )  # fmt: skip
                expected = before + meet(x, y[:, :count], corner, stride, dilation, extents)
                np.testing.assert_array_equal(sums, expected)


def meet(x, y, corner, stride, dilation, extents):
    """For each tap the sum of what its outputs read times their gradient, by the definition."""
    w = np.zeros(extents)
    for output, tap, place in meetings(x.shape, y.shape, extents, corner, stride, dilation):
        w[tap] += float(y[output]) * float(x[place])
    return w


def meetings(size, shape, extents, corner, stride, dilation):
    """Yield every output, each of its taps and what that reads, for what lies inside a plane of this size."""
    for p, q, r, s in product(*map(range, (*shape, *extents))):
        h, v = corner[0] + p * stride[0] + r * dilation[0], corner[1] + q * stride[1] + s * dilation[1]
        if 0 <= h < size[0] and 0 <= v < size[1]:
            yield (p, q), (r, s), (h, v)


def correlate_at(x, w, corner, stride, dilation, shape):
    """The outputs of a plane whose first window begins at a corner, by the definition; zeros outside."""
    y = np.zeros(shape)
    for output, tap, place in meetings(x.shape, shape, w.shape, corner, stride, dilation):
        y[output] += float(w[tap]) * float(x[place])
    return y


@Kernel
def call_spread_plane(block, first, last, addresses, y_row, y_size, padding, out_row, size):
    y, w, bias, out = addresses
    planes.spread_plane(
        block, pointer(block, y), y_row, y_size[0], y_size[1], pointer(block, w), pointer(block, bias),
        padding[0], padding[1], pointer(block, out), out_row, size[0], size[1],
    )  # fmt: skip


@every_dtype
@every_width
@pytest.mark.parametrize("extents", [(3, 3), (1, 1), (2, 5), (5, 2), (1, 4), (7, 7)])
class TestSpreadPlane:
    """The gradient of the input of one filter with stride 2 on one plane."""

    def test_definition(self, extents, lanes, dtype, rng):
        block = Block(dtype, 1, 1, lanes, "plane", extents=extents)
        w, bias = integers(rng, extents, dtype), integers(rng, 1, dtype)
        for y_size, padding, size in (
            ((1, 1), (0, 0), (1, 1)),
            ((3, 4), (1, 1), (6, 7)),
            ((4, lanes), (1, 0), (7, 2 * lanes)),
            ((2, lanes + 1), (0, 1), (9, 2 * lanes + 5)),
            ((5, 2 * lanes), (2, 3), (4, 3 * lanes)),
        ):
            around = np.full((y_size[0] + 2, y_size[1] + 3), np.nan, dtype)
            y = around[1:-1, 1:-2]
            y[:] = integers(rng, y_size, dtype)
            around_out = np.full((size[0] + 2, size[1] + 2), np.nan, dtype)
            out = around_out[1:-1, 1:-1]
            call_spread_plane(
                block, 1, 1, tuple(map(address, (y, w, bias, out))), around.shape[1], y_size, padding,
                around_out.shape[1], size,
            )  # fmt: skip
            expected = np.full(size, float(bias[0]))
            corner = (-padding[0], -padding[1])
            for output, tap, place in meetings(size, y_size, extents, corner, (2, 2), (1, 1)):
                expected[place] += float(y[output]) * float(w[tap])
            assert_exact(out, expected, dtype)
            out[:] = np.nan
            assert np.isnan(around_out).all(), "wrote beside the plane"


def test_an_edited_helper_is_compiled_anew():
    """The digest of all sources is in the type of every kernel's first argument."""
    kind = simd.BlockType(Block("float32", 1, 1, 4), "another digest")
    assert kind != simd.BlockType(Block("float32", 1, 1, 4), simd.DIGEST)
    assert simd.DIGEST in simd.BlockType(Block("float32", 1, 1, 4), simd.DIGEST).name
    assert simd._digest() == simd.DIGEST
