"""Dask arrays: divided anyhow, the result has the bits of the undivided one; the call computes nothing."""

import pickle
import re
import sys
import threading
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastconv
from fastconv import ConvError, lazy, reference
from fastconv import plan as planning
from fastconv.algorithms import TABLE
from fastconv.gpu import launch
from fastconv.problem import make_problem, output_size
from tests import cuda_stand_in
from tests import strategies as strategies  # its profile of Hypothesis
from tests.backends import EMULATOR
from tests.compare import assert_exact, integers, normals
from tests.emulator import EmulatorDriver
from tests.places import entering

cloudpickle = pytest.importorskip("cloudpickle", reason="Dask is not installed")
dask = pytest.importorskip("dask", reason="Dask is not installed")
da = pytest.importorskip("dask.array", reason="Dask is not installed")

ACTIVATIONS = (None, "relu", "gelu", ("leaky_relu", 0.5))
LAST = {"conv1d": "NLC", "conv2d": "NHWC", "conv3d": "NDHWC"}


@pytest.fixture(autouse=True)
def one_thread():
    """Compute in the thread of the test, chunk after chunk."""
    with dask.config.set(scheduler="synchronous"):
        yield


def assert_same_bits(actual, expected):
    """Every bit, those of a zero's sign and of a NaN too."""
    assert type(actual) is type(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    bits = f"u{expected.itemsize}"
    differ = np.argwhere(actual.view(bits) != expected.view(bits))
    assert not len(differ), f"{len(differ)} of {actual.size} differ, the first at {differ[0]}"


@st.composite
def chunks_of(draw, size):
    """Sizes of chunks that make up an axis; some may be 0."""
    borders = draw(st.lists(st.integers(0, size), max_size=5).map(sorted))
    return tuple(end - start for start, end in zip([0, *borders], [*borders, size]))


@st.composite
def windows(draw):
    """An axis in chunks, the windows that move along it, and how many there are."""
    chunks = draw(st.integers(1, 40).flatmap(chunks_of))
    kernel, stride, dilation = draw(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4)))
    before, after = draw(st.tuples(st.integers(0, 20), st.integers(0, 20)))
    window = lazy.Window(kernel, stride, dilation, before, draw(st.sampled_from((1, 1, 2, 4))))
    outputs = output_size(sum(chunks), kernel, stride, before, after, dilation)
    return chunks, window, outputs


class TestDivide:
    @settings(max_examples=600)
    @given(windows().filter(lambda drawn: drawn[2] > 0))
    def test_every_window_lies_in_its_block(self, drawn):
        """In the chunk, what it gets of its two neighbours, or the padding; and every chunk is needed."""
        chunks, window, outputs = drawn
        inputs, results, before, after = division = lazy.divide(chunks, window, outputs)
        size = sum(chunks)
        assert (sum(inputs), sum(results)) == (size, outputs)
        assert len(inputs) == len(results)
        assert min(inputs) > 0 < min(results)
        assert len(inputs) == 1 or max(before, after) <= min(inputs), "a halo is no more than a neighbour has"
        ends, first = np.cumsum(inputs), 0
        for end, length, count in zip(ends, inputs, results):
            low, high = max(end - length - before, 0), min(end + after, size)
            begin, stop = window.reads(first, first + count)
            assert len(inputs) == 1 or (begin < size and stop > 0)
            for output in range(first, first + count):
                taps = output * window.stride - window.before + window.dilation * np.arange(window.kernel)
                inside = taps[(taps >= 0) & (taps < size)]
                assert ((inside >= low) & (inside < high)).all(), (division, output)
            assert first % window.multiple == 0
            first += count

    @given(st.lists(st.integers(2, 9), min_size=1), st.integers(1, 5))
    def test_padding_same_keeps_the_chunks(self, chunks, kernel):
        window = lazy.Window(kernel, before=(kernel - 1) // 2)
        found = lazy.divide(chunks, window, sum(chunks))
        assert found.inputs == found.outputs == tuple(chunks)
        assert (found.before, found.after) == ((kernel - 1) // 2, kernel // 2) or len(chunks) == 1

    @pytest.mark.parametrize(
        ("chunks", "window", "outputs", "inputs"),
        [
            ((4, 4, 4), lazy.Window(3, stride=10), 1, (12,)),  # one output
            ((2, 2, 2, 2), lazy.Window(1, stride=4), 2, (2, 6)),  # one in every other chunk
            ((4, 4), lazy.Window(1, before=9, stride=20), 1, (8,)),  # nothing but padding is read
            ((4, 4), lazy.Window(1, stride=8, before=9), 3, (8,)),  # the first chunk would read padding alone
            ((4, 4), lazy.Window(1, stride=8), 3, (8,)),  # the last one
            ((1,) * 7, lazy.Window(5, before=2), 7, (2, 2, 3)),  # chunks smaller than the halo
            ((3, 3, 3, 3), lazy.Window(3, before=1, multiple=4), 12, (6, 6)),  # tiles of four outputs
        ],
    )
    def test_chunks_that_are_joined(self, chunks, window, outputs, inputs):
        assert lazy.divide(chunks, window, outputs).inputs == inputs


@st.composite
def divided_problems(draw):
    """A convolution of any rank whose kernel some algorithm likes, and the chunks of its input."""
    ndim = draw(st.sampled_from((1, 2, 2, 3)))
    kernel = draw(
        st.sampled_from({1: [(1,), (4,)], 2: [(1, 1), (3, 3), (2, 5)], 3: [(1, 1, 1), (2, 1, 3)]}[ndim])
    )
    groups = draw(st.sampled_from((1, 1, 2, 6)))
    steps = st.tuples(*[st.integers(1, 3)] * ndim)
    stride, dilation = draw(st.tuples(steps, steps) | st.just(((1,) * ndim,) * 2))
    pairs = st.tuples(*[st.tuples(st.integers(0, 5), st.integers(0, 5))] * ndim)
    padding = draw(pairs | st.sampled_from(("same", "valid")))
    least = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    sizes = [low + draw(st.integers(0, {1: 60, 2: 20, 3: 8}[ndim])) for low in least]
    shape = (draw(st.integers(1, 3)), 6, *sizes)
    problem = make_problem(
        f"conv{ndim}d", shape, (draw(st.sampled_from((6, 12))), 6 // groups, *kernel),
        stride=stride, padding=padding, dilation=dilation, groups=groups,
        dtype=draw(st.sampled_from(("float32", "float32", "float64"))),
    )  # fmt: skip
    return problem, tuple(draw(chunks_of(size)) for size in shape)


def options_of(problem):
    n = problem.ndim
    return {
        "stride": problem.stride[-n:], "padding": problem.padding[-n:], "dilation": problem.dilation[-n:],
        "groups": problem.groups,
    }  # fmt: skip


def operands(rng, problem, fill):
    shapes = problem.input_shape, problem.weight_shape, (problem.K,), problem.output_shape
    return [fill(rng, shape, problem.dtype) for shape in shapes]


def accepting(problem):
    return [name for name, row in TABLE.items() if row.refuses(problem) is None]


class TestBits:
    @given(divided_problems(), st.integers(0, 2**32 - 1), st.sampled_from(ACTIVATIONS), st.booleans())
    def test_as_undivided(self, drawn, seed, activation, is_last):
        """Normal numbers, all operands, every algorithm that takes the problem, both layouts."""
        problem, chunks = drawn
        x, w, bias, residual = operands(np.random.default_rng(seed), problem, normals)
        op, options = getattr(fastconv, problem.op), {**options_of(problem), "activation": activation}
        if is_last:
            x, residual = (np.ascontiguousarray(np.moveaxis(array, 1, -1)) for array in (x, residual))
            chunks = (chunks[0], *chunks[2:], chunks[1])
            options["layout"] = LAST[problem.op]
        divided = da.from_array(x, chunks)
        for name in accepting(problem):
            expected = op(x, w, bias, residual=residual, algo=name, **options)
            y = op(divided, w, bias, residual=da.from_array(residual), algo=name, **options)
            assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
            assert_same_bits(y.compute(), expected)

    @given(divided_problems(), st.integers(0, 2**32 - 1))
    def test_exact(self, drawn, seed):
        """Whole numbers, against the reference; whatever "auto" chooses."""
        problem, chunks = drawn
        x, w, bias, residual = operands(np.random.default_rng(seed), problem, integers)
        options = {**options_of(problem), "residual": residual}
        y = getattr(fastconv, problem.op)(da.from_array(x, chunks), w, bias, precision="highest", **options)
        assert_exact(y.compute(), getattr(reference, problem.op)(x, w, bias, **options), problem.dtype)

    def test_every_chunking_of_a_small_image(self, rng):
        """All 2^7 ways to cut 8 rows: chunks smaller than a tile, than the halo, and without a result."""
        x, w = normals(rng, (1, 3, 8, 5)), normals(rng, (4, 3, 3, 3))
        for name, padding in (("winograd", (2, 0)), ("direct", 1), ("im2col", (0, 3))):
            expected = fastconv.conv2d(x, w, padding=padding, algo=name)
            for cuts in range(1 << 7):
                borders = [0, *(row for row in range(1, 8) if cuts >> row - 1 & 1), 8]
                rows = tuple(np.diff(borders).tolist())
                divided = da.from_array(x, (1, 3, rows, 5))
                assert_same_bits(fastconv.conv2d(divided, w, padding=padding, algo=name).compute(), expected)

    @pytest.mark.parametrize("padding", [(9, 0), (9, 9), (0, 20), (9, 20)])
    def test_windows_that_read_padding_alone(self, rng, padding):
        x, w, bias = normals(rng, (1, 2, 5)), normals(rng, (3, 2, 2)), normals(rng, (3,))
        for stride in (8, 20):
            options = {"padding": [padding], "stride": stride}
            y = fastconv.conv1d(da.from_array(x, (1, 2, 2)), w, bias, **options)
            assert_same_bits(y.compute(), fastconv.conv1d(x, w, bias, **options))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", ">f4"])
    def test_other_dtypes(self, rng, dtype):
        dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        x, w, bias = (normals(rng, shape, dtype) for shape in ((2, 4, 20, 9), (6, 4, 3, 3), (6,)))
        expected = fastconv.conv2d(x, w, bias, padding=1)
        y = fastconv.conv2d(da.from_array(x, (1, 2, 7, 5)), w, bias, padding=1)
        assert y.dtype == y._meta.dtype == expected.dtype
        assert_same_bits(y.compute(), expected)

    @pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
    def test_without_a_batch(self, rng, layout):
        x, w = normals(rng, (12, 9, 12)), normals(rng, (7, 12, 3, 3))
        expected = fastconv.conv2d(x, w, padding=1, layout=layout)
        y = fastconv.conv2d(da.from_array(x, (5, 2, 4)), w, padding=1, layout=layout)
        assert_same_bits(y.compute(), expected)

    def test_empty_batch(self):
        w = np.ones((4, 3, 3, 3), np.float32)
        y = fastconv.conv2d(da.zeros((0, 3, 9, 9), chunks=4, dtype=np.float32), w)
        assert y.compute().shape == y.shape == (0, 4, 7, 7)

    def test_flip(self, rng):
        x, w = normals(rng, (1, 2, 9, 17)), normals(rng, (3, 2, 2, 3))
        y = fastconv.conv2d(da.from_array(x, (1, 2, 3, 4)), w, flip=True)
        assert_same_bits(y.compute(), fastconv.conv2d(x, w, flip=True))

    def test_nan_and_infinity_spread_as_undivided(self, rng):
        """A NaN spreads over its tile of Winograd's grid: the chunks have the same grid."""
        x, w = normals(rng, (1, 2, 30, 30)), normals(rng, (2, 2, 3, 3))
        x[0, 0, 13, 17], x[0, 1, 4, 9] = np.nan, np.inf
        for name in ("direct", "winograd"):
            expected = fastconv.conv2d(x, w, padding=1, algo=name)
            y = fastconv.conv2d(da.from_array(x, (1, 1, 7, 9)), w, padding=1, algo=name)
            np.testing.assert_array_equal(y.compute(), expected)

    def test_chunks_in_another_memory_order(self, rng):
        """A Dask array has no strides: the layout counts, not how a chunk happens to lie in memory."""
        x, w = normals(rng, (1, 20, 30, 6)), normals(rng, (4, 6, 3, 3))
        expected = fastconv.conv2d(np.ascontiguousarray(np.moveaxis(x, -1, 1)), w, padding=1)
        divided = da.moveaxis(da.from_array(x, (1, 7, 11, 6)), -1, 1)
        assert_same_bits(fastconv.conv2d(divided, w, padding=1).compute(), expected)


class TestPlan:
    """It is made once, for the undivided problem, and holds wherever the chunks are computed."""

    def test_a_chunk_does_not_choose(self, rng, monkeypatch):
        """Not even where a worker's environment, or its small image, asks for another algorithm."""
        x, w = normals(rng, (1, 16, 48, 48)), normals(rng, (32, 16, 3, 3))
        expected, divided = fastconv.conv2d(x, w, padding=1), da.from_array(x, (1, 16, 8, 8))
        y = fastconv.conv2d(divided, w, padding=1)
        chosen = fastconv.explain(divided, w, padding=1).plan.algorithm.name
        monkeypatch.setenv("FASTCONV_ALGO", "direct" if chosen == "winograd" else "winograd")
        assert_same_bits(y.compute(), expected)
        assert (fastconv.conv2d(divided, w, padding=1).compute() != expected).any()

    def test_a_recipe_finds_a_plan_of_its_bits(self):
        whole, part = (
            make_problem("conv2d", shape, (8, 4, 3, 3)) for shape in ((1, 4, 50, 50), (1, 4, 6, 9))
        )
        recipes = {plan.recipe for name in TABLE for plan in planning.possible_plans(whole, name)}
        assert {("winograd", 2, 2), ("winograd", 4, 4), ("direct", None, 1)} <= recipes
        for recipe in recipes:
            assert planning.make_plan(part, recipe.algorithm, bits=recipe.bits).recipe == recipe

    def test_another_cpu(self, rng, monkeypatch):
        """A worker with narrower vectors, fewer registers and another environment gives the same bits."""
        x, w = normals(rng, (1, 4, 25, 31)), normals(rng, (5, 4, 3, 3))
        expected = fastconv.conv2d(x, w, padding=1, algo="direct")
        y = fastconv.conv2d(da.from_array(x, (1, 4, 10, 9)), w, padding=1, algo="direct")
        monkeypatch.setenv("FASTCONV_VECTOR_BITS", "128")
        monkeypatch.setenv("FASTCONV_ALGO", "im2col")
        assert_same_bits(y.compute(), expected)

    def test_a_tile_of_other_bits(self, rng):
        """F(2 x 2) where "highest" admits no other, although each chunk would do with either."""
        x, w = normals(rng, (1, 3, 21, 22)), normals(rng, (4, 3, 3, 3))
        results = []
        for precision in ("highest", "high"):
            options = {"padding": 1, "algo": "winograd", "precision": precision}
            results.append(fastconv.conv2d(da.from_array(x, (1, 3, 6, 7)), w, **options).compute())
            assert_same_bits(results[-1], fastconv.conv2d(x, w, **options))

    def test_names_are_deterministic(self, rng):
        """The same call names the same tasks: Dask computes them once."""
        x, w = da.from_array(normals(rng, (1, 2, 9, 9)), 4), normals(rng, (3, 2, 3, 3))
        with dask.config.set({"tokenize.ensure-deterministic": True}):
            fastconv.conv2d(x, w, w[:, 0, 0, 0], residual=normals(rng, (1, 3, 7, 7)), activation="relu")
        assert fastconv.conv2d(x, w).name == fastconv.conv2d(x, w.copy()).name
        assert fastconv.conv2d(x, w).name != fastconv.conv2d(x, w, stride=2).name


class Source:
    """An image that is made chunk by chunk, and counts the chunks."""

    def __init__(self, chunks):
        self.made, self.lock = [], threading.Lock()
        self.array = da.map_blocks(self.make, chunks=chunks, dtype="f4", meta=np.empty((0,) * 4, "f4"))

    def make(self, block_info):
        where = block_info[None]["array-location"]
        with self.lock:
            self.made.append(block_info[None]["chunk-location"])
        return np.ones([end - start for start, end in where], np.float32)


class TestLaziness:
    def test_nothing_is_computed_by_the_call(self):
        source = Source(((1,), (2,), (8,) * 6, (8,) * 6))
        other = Source(((3,), (2,), (3,), (3,)))
        y = fastconv.conv2d(source.array, other.array, padding=1, activation="relu")
        fastconv.explain(source.array, other.array, padding=1)
        assert source.made == other.made == []
        assert y.compute().shape == (1, 3, 48, 48)
        assert len(set(source.made)) == len(source.made) == 36, "every chunk once"
        assert len(other.made) == 1, "the weight once for all chunks"

    def test_only_what_is_asked_for(self):
        """One chunk of the result needs its own chunk of the input and the neighbours."""
        source = Source(((1,), (2,), (8,) * 6, (8,) * 6))
        y = fastconv.conv2d(source.array, np.ones((1, 2, 3, 3), np.float32), padding=1)
        y[:, :, 16:24, :8].compute()
        assert set(source.made) == {(0, 0, row, column) for row in (1, 2, 3) for column in (0, 1)}

    def test_operands_of_every_kind(self, rng):
        """Weight, bias and residual as Dask arrays or in memory, chunked anyhow."""
        x, w, bias = normals(rng, (2, 4, 9, 9)), normals(rng, (6, 4, 3, 3)), normals(rng, (6,))
        residual = normals(rng, (2, 6, 7, 7))
        expected = fastconv.conv2d(x, w, bias, residual=residual)
        divided = da.from_array(x, (1, 3, 4, 5))
        lazies = [da.from_array(array, 2) for array in (w, bias, residual)]
        for some in ((w, bias, residual), lazies, (w, lazies[1], residual), (lazies[0], bias, lazies[2])):
            y = fastconv.conv2d(divided, some[0], some[1], residual=some[2])
            assert y.chunks == ((1, 1), (6,), (3, 4), (4, 3))
            assert_same_bits(y.compute(), expected)

    def test_many_threads(self, rng):
        x, w = normals(rng, (2, 8, 60, 60)), normals(rng, (8, 8, 3, 3))
        y = fastconv.conv2d(da.from_array(x, (1, 8, 10, 10)), w, padding=1)
        assert_same_bits(y.compute(scheduler="threads", num_workers=8), fastconv.conv2d(x, w, padding=1))

    def test_arrays_that_change_after_the_call(self, rng):
        """Weight and bias are those of the time of the call."""
        x, w, bias = (normals(rng, shape) for shape in ((1, 2, 9), (3, 2, 3), (3,)))
        expected = fastconv.conv1d(x, w, bias)
        y = fastconv.conv1d(da.from_array(x, 4), w, bias)
        w[...] = bias[...] = np.nan
        assert_same_bits(y.compute(), expected)

    def test_weight_is_in_the_graph_once(self):
        """Not in every task, each of which goes to a worker on its own."""
        w = np.ones((256, 256, 3, 3), np.float32)
        y = fastconv.conv2d(da.zeros((1, 256, 64, 64), chunks=(1, 256, 8, 8), dtype=np.float32), w)
        tasks = [cloudpickle.dumps(task) for task in dict(y.__dask_graph__()).values()]
        assert w.nbytes < sum(map(len, tasks)) < 2 * w.nbytes

    def test_graph_goes_to_another_process(self, rng):
        y = fastconv.conv2d(da.ones((1, 2, 9, 9), chunks=4), np.ones((3, 2, 3, 3)), np.ones(3))
        assert (pickle.loads(pickle.dumps(y)).compute() == 19).all()


class TestLayers:
    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_as_undivided(self, rng, flip, dtype):
        x, w, bias = (normals(rng, shape, dtype) for shape in ((2, 30, 4), (6, 4, 3), (6,)))
        layer = fastconv.Conv1d(w, bias, padding=1, activation="silu", layout="NLC", flip=flip)
        residual = normals(rng, (2, 30, 6), dtype)
        y = layer(da.from_array(x, (1, 7, 2)), da.from_array(residual, 9))
        w[...] = 0
        assert_same_bits(y.compute(), layer(x, residual))

    def test_errors(self):
        layer = fastconv.Conv1d(np.ones((1, 1, 3), np.float32))
        with pytest.raises(TypeError, match=r"conv1d: weight\.dtype must be input\.dtype = float64"):
            layer(da.ones((1, 1, 9)))
        with pytest.raises(ConvError, match="conv1d: out must be None"):
            layer(da.ones((1, 1, 9), dtype=np.float32), out=np.ones((1, 1, 7), np.float32))


@pytest.mark.emulator
class TestCupy:
    """Chunks of CuPy's, with a CuPy that is not there and an emulated GPU."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cupy", cuda_stand_in.make_cupy([]))
        planning.forget_plans()
        with launch.use_driver(cuda_stand_in.StandInDriver(EmulatorDriver())):
            yield
        planning.forget_plans()

    @pytest.mark.parametrize("algo", ["direct", "winograd", "depthwise", "im2col"])
    def test_as_undivided(self, rng, algo):
        """To the bit, but for im2col: it cuts long sums into as many parts as suit the size of an image."""
        groups = 6 if algo == "depthwise" else 1
        fill = integers if algo == "im2col" else normals
        x, w, bias, residual = (
            cuda_stand_in.CupyArray(fill(rng, shape))
            for shape in ((2, 6, 9, 14), (6, 6 // groups, 3, 3), (6,), (2, 6, 9, 14))
        )
        options = {"padding": 1, "algo": algo, "groups": groups, "activation": "relu"}
        expected = fastconv.conv2d(x, w, bias, residual=residual, **options)
        divided = da.from_array(x, (1, 4, 4, 5), asarray=False)
        y = fastconv.conv2d(divided, w, bias, residual=residual, **options)
        assert type(y._meta) is type(expected) is cuda_stand_in.CupyArray
        assert min(y.numblocks[2:]) > 1
        assert_same_bits(y.compute().host, expected.host)

    def test_operands_elsewhere(self, rng):
        divided = da.from_array(cuda_stand_in.CupyArray(normals(rng, (1, 1, 9))), 4, asarray=False)
        with pytest.raises(TypeError, match="weight must be a CuPy array like input, got a NumPy array"):
            fastconv.conv1d(divided, np.ones((1, 1, 3), np.float32))


class TestExplain:
    def test_undivided_plan_and_its_division(self):
        x, w = da.ones((2, 3, 400, 300), chunks=(1, 2, 100, 128)), np.ones((5, 3, 3, 3))
        text = str(fastconv.explain(x, w, padding=1, stride=2))
        chunks = fastconv.conv2d(x, w, padding=1, stride=2).chunks
        assert chunks == ((1, 1), (5,), (50,) * 4, (64, 64, 22))
        line = "in 24 chunks, (1, 5, 50, 64) at most, computed from (1, 3, 101, 129) of the input at most"
        assert line in text
        whole = str(fastconv.explain(np.broadcast_to(1.0, x.shape), w, padding=1, stride=2))
        assert text.replace(f"  {line}\n", "") == whole

    def test_no_block_is_larger_than_the_input(self):
        x = da.ones((1, 1, 100), chunks=(1, 1, (90, 10)), dtype=np.float32)
        text = str(fastconv.explain(x, np.ones((1, 1, 21), np.float32), padding=10))
        assert "in 2 chunks, (1, 1, 90) at most, computed from (1, 1, 100) of the input at most" in text


class TestErrors:
    X = da.ones((2, 4, 9, 9), chunks=4, dtype=np.float32)
    W = np.ones((6, 4, 3, 3), np.float32)
    LAZY_W = da.from_array(W)
    BIAS, OUT = np.ones(5, np.float32), np.ones((2, 6, 7, 7), np.float32)

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "message"),
        [
            ((X, W[:, :3]), {}, ConvError, r"= 4 // 1 = 4, got 3 \(input \(2, 4, 9, 9\)"),
            ((X[0, 0], W), {}, ConvError, r"must have 4 axes \(3 without N\), got 2"),
            ((X, W, BIAS), {}, ConvError, r"bias\.shape must be \(K,\) = \(6,\), got \(5,\)"),
            ((X, W), {"residual": X}, ConvError, r"residual\.shape must be output\.shape"),
            ((X, W), {"stride": 0}, ConvError, "stride must be at least 1"),
            ((X, W), {"algo": "pointwise"}, ConvError, "needs a kernel of extent 1"),
            ((X, W), {"algo": "fft"}, ConvError, "algo must be one of auto, direct"),
            ((X, W), {"activation": "swish"}, ConvError, "activation must be None"),
            ((X, W), {"layout": "NLC"}, ConvError, "layout must be one of NCHW, NHWC"),
            ((X, W), {"out": OUT}, ConvError, "out must be None where input is a Dask array"),
            ((X, W.astype("f8")), {}, TypeError, "weight.dtype must be input.dtype = float32"),
            ((X.astype(int), W), {}, TypeError, "input.dtype must be float16, bfloat16, float32 or float64"),
            ((X, LAZY_W.astype("f8")), {}, TypeError, "weight.dtype must be input.dtype"),
            ((X, W.tolist()), {}, TypeError, "weight must be"),
            ((X[X[:, 0, 0, 0] > 0], W), {}, ConvError, r"input must have known .*compute_chunk_sizes\(\)"),
            ((X, LAZY_W[da.ones(6) > 0]), {}, ConvError, "weight must have known chunk sizes"),
            ((OUT, LAZY_W), {}, TypeError, "weight must be a NumPy array like input, got a Dask array"),
            ((da.ma.masked_array(X), W), {}, TypeError, "input must be an array without a mask"),
        ],
    )
    def test_at_once(self, arguments, options, error, message):
        """In the call, not in a worker."""
        with pytest.raises(error, match=message):
            fastconv.conv2d(*arguments, **options)
        with pytest.raises(error, match=message):
            fastconv.explain(*arguments, **options)

    @pytest.mark.parametrize(
        "call", [lambda x, w: fastconv.tune(x, w), lambda x, w: fastconv.Conv2d(da.asarray(w))]
    )
    def test_where_there_must_be_memory(self, call):
        with pytest.raises(TypeError, match=r"(input|weight) must be in memory here, got a Dask array"):
            call(self.X, self.W)

    def test_workspace_of_the_undivided_problem(self, monkeypatch):
        monkeypatch.setenv("FASTCONV_WORKSPACE", "0")
        with pytest.raises(ConvError, match="FASTCONV_WORKSPACE must be at least"):
            fastconv.conv2d(self.X, self.W)


@st.composite
def poolings(draw):
    """A pooling by name, its options, the shape of its input, and the chunks of that."""
    op = draw(st.sampled_from(["max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool"]))
    ndim = draw(st.integers(1, 2 if op == "adaptive_max_pool" else 3))

    def per_axis(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * ndim))

    shape = (*draw(st.sampled_from([(2, 3), (3,)])), *per_axis(1, (40, 20, 9)[ndim - 1]))
    options = {}
    if op.startswith("adaptive"):
        options["output_size"] = per_axis(1, 9)
    else:
        options["kernel_size"] = per_axis(1, 5)
        options["stride"] = per_axis(1, 4)
        options["padding"] = tuple(draw(st.integers(0, kernel // 2)) for kernel in options["kernel_size"])
        options["ceil_mode"] = draw(st.booleans())
    if op == "max_pool":
        options["dilation"] = per_axis(1, 3)
    if op == "avg_pool":
        options["count_include_pad"] = draw(st.booleans())
    return f"{op}{ndim}d", options, shape, tuple(draw(chunks_of(size)) for size in shape)


class TestPooling:
    @settings(max_examples=80)
    @given(poolings(), st.integers(0, 2**32 - 1))
    def test_as_undivided(self, drawn, seed):
        op, options, shape, chunks = drawn
        pool, rng = getattr(fastconv, op), np.random.default_rng(seed)
        x = normals(rng, shape)
        x[rng.random(shape) < 0.02] = np.nan
        x[rng.random(shape) < 0.02] = -np.inf
        divided = da.from_array(x, chunks)
        try:
            expected = pool(x, **options)
        except ConvError as error:
            with pytest.raises(ConvError, match=f"^{re.escape(str(error))}$"):
                pool(divided, **options)
            return
        y = pool(divided, **options)
        assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
        assert_same_bits(y.compute(), expected)
        if "max" in op:
            y, places = pool(divided, **options, return_indices=True)
            expected, at = pool(x, **options, return_indices=True)
            assert (places.chunks, places.dtype) == (y.chunks, at.dtype)
            computed = dask.compute(y, places)
            assert_same_bits(computed[0], expected)
            assert_same_bits(computed[1], at)

    def test_chunks_stay(self):
        """As many of the result as of the input, but where windows share an axis out unevenly."""
        x = da.ones((2, 6, 24, 20), chunks=(1, 3, 8, 5), dtype=np.float32)
        assert fastconv.max_pool2d(x, 2).chunks == ((1, 1), (3, 3), (4, 4, 4), (3, 2, 3, 2))
        assert fastconv.avg_pool2d(x, 3, 1, 1).chunks == x.chunks
        assert fastconv.adaptive_avg_pool2d(x, (3, 3)).chunks == ((1, 1), (3, 3), (1, 1, 1), (3,))

    def test_nothing_is_computed_by_the_call(self):
        source = Source(((1,), (2, 2), (4, 4), (6,)))
        _, places = fastconv.max_pool2d(source.array, 2, return_indices=True)
        assert source.made == []
        assert places[0, 0, :2, 1:].compute().tolist() == [[2, 4], [14, 16]]
        assert sorted(source.made) == [(0, 0, 0, 0)]

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, ">f4"])
    def test_other_dtypes(self, rng, dtype):
        x = normals(rng, (1, 2, 9, 11)).astype(dtype)
        y = fastconv.avg_pool2d(da.from_array(x, 4), 3, 2, 1)
        assert_same_bits(y.compute(), fastconv.avg_pool2d(x, 3, 2, 1))

    def test_windows_that_see_nothing(self):
        x = da.ones((1, 1, 8), chunks=(1, 1, 4), dtype=np.float32)
        y, places = fastconv.max_pool2d(x, (2, 1), 1, (1, 0), (2, 1), return_indices=True)
        assert y.numblocks == (1, 1, 2)
        assert (y.compute() == -np.inf).all()
        assert (places.compute() == -1).all()

    def test_rows_shorter_than_the_image(self, rng):
        """Averages of windows one or two apart are summed in one order, however long the rows are."""
        x = normals(rng, (1, 3, 20, 40))
        for stride in (1, 2):
            y = fastconv.avg_pool2d(da.from_array(x, (1, 1, 5, 5)), (3, 5), stride)
            assert_same_bits(y.compute(), fastconv.avg_pool2d(x, (3, 5), stride))

    @pytest.mark.emulator
    def test_cupy(self, rng, monkeypatch):
        with entering(EMULATOR, monkeypatch) as place:
            x = place.make(normals(rng, (2, 3, 9, 14)))
            divided = da.from_array(x, (1, 2, 4, 5), asarray=False)
            for pool in (partial(fastconv.avg_pool2d, stride=2), partial(fastconv.max_pool2d, stride=1)):
                y, expected = pool(divided, 3, padding=1).compute(), pool(x, 3, padding=1)
                assert_same_bits(place.host(y), place.host(expected))
            _, places = fastconv.max_pool2d(divided, 3, 2, return_indices=True)
            _, expected = fastconv.max_pool2d(x, 3, 2, return_indices=True)
            # What NumPy's functions stand in for CuPy's to make, Dask puts together as NumPy's.
            assert_same_bits(np.asarray(places.compute()), place.host(expected))

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda x: fastconv.max_pool2d(x, 0), ConvError, "kernel_size must be at least 1"),
            (lambda x: fastconv.max_pool1d(x, 2), ConvError, r"must have 3 axes \(2 without N\), got 4"),
            (lambda x: fastconv.avg_pool2d(x.astype(int), 2), TypeError, "input.dtype must be"),
            (
                lambda x: fastconv.avg_pool2d(x[x[:, 0, 0, 0] > 0], 2),
                ConvError,
                "must have known chunk sizes",
            ),
            (lambda x: fastconv.adaptive_avg_pool2d(x, 0), ConvError, "output_size must be at least 1"),
            (lambda x: fastconv.max_unpool2d(x, x, 2), TypeError, "input must be in memory here"),
            (lambda x: fastconv.relu(x), TypeError, "input must be in memory here, got a Dask array"),
            (
                lambda x: fastconv.conv_transpose2d(x, np.ones((4, 2, 3, 3), np.float32)),
                TypeError,
                "^conv_transpose2d: input must be in memory here",
            ),
        ],
    )
    def test_errors_at_once(self, call, error, message):
        with pytest.raises(error, match=message):
            call(da.ones((2, 4, 9, 9), chunks=4, dtype=np.float32))


class TestCluster:
    LIMIT = 448 << 20  # bytes of each of two workers, half of which Python and its packages take

    @pytest.fixture
    def client(self, monkeypatch):
        """Two processes of one thread; one that passes its limit is ended, and what it computed with it."""
        distributed = pytest.importorskip("distributed", reason="distributed is not installed")
        monkeypatch.setenv("FASTCONV_THREADS", "1")
        settings = {f"distributed.worker.memory.{name}": False for name in ("target", "spill", "pause")}
        settings |= {"distributed.scheduler.allowed-failures": 0}
        with (
            dask.config.set(settings),
            distributed.LocalCluster(
                n_workers=2, threads_per_worker=1, memory_limit=self.LIMIT, dashboard_address=None
            ) as cluster,
            distributed.Client(cluster) as client,
            dask.config.set(scheduler=client),
        ):
            yield client

    def test_larger_than_memory(self, client, rng):
        """Samples from the last row and first column of every chunk, beside the reference on windows."""
        rows, columns, step = 80 << 10, 2 << 10, 1 << 10
        w, bias = integers(rng, (2, 1, 3, 3)), integers(rng, (2,))

        def draw(row, column):
            return (row**2 % 9 - 4).astype(np.float32)[:, None] + (column**2 % 7).astype(np.float32)

        def make(block_info):
            where = block_info[None]["array-location"]
            return draw(*(np.arange(*ends) for ends in where[2:]))[None, None]

        chunks = ((1,), (1,), (step,) * (rows // step), (step,) * (columns // step))
        image = da.map_blocks(make, chunks=chunks, dtype=np.float32, meta=np.empty((0,) * 4, np.float32))
        assert image.nbytes > self.LIMIT
        y = fastconv.conv2d(image, w, bias, padding=1, precision="highest")
        sampled = y[0, :, step - 1 :: step, ::step].compute()

        row, column, taps = np.arange(step - 1, rows, step), np.arange(0, columns, step), np.arange(-1, 2)
        windows = draw((row[:, None] + taps).ravel(), (column[:, None] + taps).ravel())
        windows = windows.reshape(len(row), 3, len(column), 3).transpose(0, 2, 1, 3).copy()
        windows[-1, :, 2], windows[:, 0, :, 0] = 0, 0  # padding
        expected = reference.conv2d(windows.reshape(-1, 1, 3, 3), w, bias)
        assert_exact(sampled, expected.reshape(len(row), len(column), 2).transpose(2, 0, 1), "float32")
