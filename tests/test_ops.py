"""The public operations against the reference, NumPy and torch: what a call means, whatever runs it."""

import copy
import enum
import inspect
import pickle
import re
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastconv
from fastconv import ops, reference
from fastconv.plan import possible_plans
from fastconv.problem import ConvError, make_problem
from tests.cases import CASES, operands, options_of
from tests.compare import (
    assert_bounded,
    assert_exact,
    foreign_layouts,
    integers,
    layouts,
    normals,
    poisoned,
)
from tests.kernels import in_order
from tests.strategies import problems
from tests.test_arrays import Tagged, tagged

OPS = ["conv1d", "conv2d", "conv3d"]
LAYERS = {"conv1d": fastconv.Conv1d, "conv2d": fastconv.Conv2d, "conv3d": fastconv.Conv3d}
ACTIVATIONS = ["relu", "relu6", "silu", "gelu", "sigmoid", "tanh", ("leaky_relu", 0.125), ("leaky_relu", -2)]
HALVES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# Sums of small integers are exact in every algorithm that "highest" admits: results are compared as equal.
EXACT = {"precision": "highest"}


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


def small(rng, op, dtype="float32", batch=2, groups=1):
    """Input, weight, bias of a small problem of either rank; 4 channels in, 6 out."""
    ndim = int(op[4])
    x = integers(rng, (batch, 4, 7, 6, 9)[: ndim + 2], dtype)
    w = integers(rng, (6, 4 // groups, 3, 2, 3)[: ndim + 2], dtype)
    return x, w, integers(rng, (6,), dtype)


def call(op, *args, **options):
    return getattr(fastconv, op)(*args, **{**EXACT, **options})


def expect(op, *args, **options):
    return getattr(reference, op)(*args, **options)


def to_last(array, op):
    """The same values, channels last in shape and in memory."""
    return np.ascontiguousarray(np.moveaxis(array, -int(op[4]) - 1, -1))


@pytest.mark.parametrize("op", OPS)
class TestSignature:
    def test_as_in_torch(self, op, torch):
        """torch writes the signature of its built-in functions into the first line of their documentation."""
        documented = getattr(torch.nn.functional, op).__doc__.split("->")[0].strip()
        parameters = inspect.signature(getattr(fastconv, op)).parameters.values()
        positional = [p.replace(annotation=p.empty) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert documented == f"{op}({', '.join(str(p) for p in positional)})"

    def test_additions_are_keywords(self, op):
        parameters = inspect.signature(getattr(fastconv, op)).parameters.values()
        added = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        layout = {"conv1d": "NCL", "conv2d": "NCHW", "conv3d": "NCDHW"}[op]
        assert added == {
            "algo": "auto", "precision": "high", "activation": None, "residual": None,
            "layout": layout, "flip": False, "out": None,
        }  # fmt: skip

    def test_explain_takes_the_same_arguments(self, op):
        of_op = inspect.signature(getattr(fastconv, op)).parameters
        of_explain = inspect.signature(fastconv.explain).parameters
        assert list(of_explain) == list(of_op)
        assert all(of_explain[name].kind is of_op[name].kind for name in of_op)
        assert all(of_explain[name].default == of_op[name].default for name in of_op if name != "layout")

    def test_layer_takes_the_same_options(self, op):
        of_op = list(inspect.signature(getattr(fastconv, op)).parameters)
        of_layer = list(inspect.signature(LAYERS[op]).parameters)
        assert of_layer == [name for name in of_op if name not in ("input", "residual", "out")]


class TestValues:
    @pytest.mark.parametrize("case", CASES, ids=str)
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_reference(self, case, dtype, rng):
        problem = case.problem(dtype=dtype)
        x, w, bias, residual = operands(rng, problem, integers)
        y = call(case.op, x, w, bias, **case.options, residual=residual)
        assert_exact(y, expect(case.op, x, w, bias, **case.options, residual=residual), dtype)

    @pytest.mark.parametrize("op", OPS)
    def test_torch_by_position(self, op, torch, rng):
        x, w, bias = small(rng, op, groups=2)
        args = (2, 2, 2, 2) if op != "conv3d" else ((2, 1, 3), (2, 1, 0), (2, 1, 1), 2)
        theirs = getattr(torch.nn.functional, op)(*map(torch.from_numpy, (x, w, bias)), *args)
        assert_exact(call(op, x, w, bias, *args), theirs.numpy())

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_torch(self, case, torch, rng):
        """With NumPy's padding, since torch has no pairs."""
        problem = case.problem()
        x, w, bias, _ = operands(rng, problem, integers)
        padded = np.pad(x, [(0, 0), (0, 0), *problem.padding[-problem.ndim :]])
        tensors = map(torch.from_numpy, (padded, w, bias))
        theirs = getattr(torch.nn.functional, case.op)(*tensors, **{**case.options, "padding": 0})
        assert_exact(call(case.op, x, w, bias, **case.options), theirs.numpy())

    @pytest.mark.parametrize("precision", ["highest", "high", "medium"])
    def test_default_precision_is_close(self, precision, rng):
        x, w = normals(rng, (2, 16, 20, 20)), normals(rng, (16, 16, 3, 3))
        bound = 64 * np.finfo(np.float32).eps * reference.conv2d(abs(x), abs(w), padding=1)
        assert_bounded(
            fastconv.conv2d(x, w, padding=1, precision=precision),
            reference.conv2d(x, w, padding=1),
            bound,
            "float32",
        )

    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_is_rounded_once(self, op, dtype, rng):
        x, w, bias = (a.astype(HALVES[dtype]) for a in small(rng, op))
        y = call(op, 301 * x, w, bias)
        exact = expect(op, (301 * x).astype("f8"), w.astype("f8"), bias.astype("f8"))
        assert not np.array_equal(exact, exact.astype(HALVES[dtype]).astype("f8")), "nothing to round"
        assert_exact(y, exact, HALVES[dtype])

    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_overflows_to_inf(self, dtype):
        x = np.full((1, 1, 2), 6e4 if dtype == "float16" else 3e38, HALVES[dtype])
        assert np.isposinf(fastconv.conv1d(x, np.ones((1, 1, 2), HALVES[dtype])).astype("f8")).all()

    def test_input_is_only_read(self, rng):
        operands_ = [*small(rng, "conv2d"), integers(rng, (2, 6, 5, 5))]
        before = copy.deepcopy(operands_)
        for array in operands_:
            array.setflags(write=False)
        x, w, bias, residual = operands_
        call("conv2d", x, w, bias, residual=residual, activation="relu")
        assert all(map(np.array_equal, operands_, before))


class TestAnyCall:
    @given(problems(precision="highest"), st.data())
    def test_reference(self, problem, data):
        """Any problem, with any of the arguments that change what is read, written or returned."""
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
        flip, is_last, is_layer = (data.draw(st.booleans(), label=name) for name in ("flip", "last", "layer"))
        options = {
            **options_of(problem),
            "flip": flip,
            "activation": data.draw(st.sampled_from((None, "relu"))),
        }
        x, w, bias, residual = operands(rng, problem, integers)
        expected = expect(problem.op, x, w, bias, **options, residual=residual)
        out = poisoned(expected.shape, "float32", data.draw(st.sampled_from(("NCHW", "NHWC")), label="out"))
        if is_last:
            x, residual, expected = (to_last(array, problem.op) for array in (x, residual, expected))
            out = np.moveaxis(out, 1, -1)
        options |= {"layout": ops.LAYOUTS[problem.op][is_last], **EXACT}
        if is_layer:
            y = LAYERS[problem.op](w, bias, **options)(x, residual, out)
        else:
            y = getattr(fastconv, problem.op)(x, w, bias, **options, residual=residual, out=out)
        assert y is out
        assert_exact(y, expected, "float32")


@pytest.mark.parametrize("op", OPS)
class TestIdentities:
    """What holds for every convolution, whatever the reference says."""

    def test_shift(self, op, rng):
        """A shifted input gives a shifted output: away from the borders, the same numbers."""
        x, w, bias = small(rng, op)
        y = call(op, x, w, bias)
        for axis in range(2, x.ndim):
            shifted = call(op, np.roll(x, 1, axis), w, bias)
            assert_exact(np.delete(shifted, 0, axis), np.delete(y, -1, axis))

    def test_stride_is_a_sample_of_stride_1(self, op, rng):
        x, w, bias = small(rng, op)
        every = call(op, x, w, bias, padding=2)
        for stride in (2, 3):
            sampled = every[(slice(None), slice(None), *(slice(None, None, stride),) * int(op[4]))]
            assert_exact(call(op, x, w, bias, padding=2, stride=stride), np.ascontiguousarray(sampled))

    def test_kernel_of_one_is_a_linear_layer_per_pixel(self, op, rng):
        x, w, bias = small(rng, op)
        matrix = w[(slice(None), slice(None), *(0,) * int(op[4]))]
        pixels = np.moveaxis(x, 1, -1) @ matrix.T + bias
        w1 = matrix.reshape(*matrix.shape, *(1,) * int(op[4]))
        assert_exact(call(op, x, w1, bias), np.ascontiguousarray(np.moveaxis(pixels, -1, 1)))

    def test_kernel_as_large_as_the_input_is_a_dot_product(self, op, rng):
        x, _, bias = small(rng, op)
        w = integers(rng, (6, *x.shape[1:]))
        y = x.reshape(2, -1) @ w.reshape(6, -1).T + bias
        assert_exact(call(op, x, w, bias).reshape(2, 6), y)

    def test_linear_in_both(self, op, rng):
        x, w, _ = small(rng, op)
        x2, w2, _ = small(rng, op)
        both = call(op, x, w) + call(op, x2, w) + call(op, x, w2) + call(op, x2, w2)
        assert_exact(call(op, x + x2, w + w2), both)

    def test_one_dimension_less(self, op, rng):
        """An axis of extent 1 in input and kernel changes nothing."""
        x, w, bias = small(rng, op)
        y = call(op, x, w, bias)
        if op != "conv3d":
            higher = f"conv{int(op[4]) + 1}d"
            assert_exact(call(higher, x[:, :, None], w[:, :, None], bias)[:, :, 0], y)
        else:
            flat = [call("conv2d", x[:, :, d], w[:, :, t]) for t in range(3) for d in range(t, t + 5)]
            planes = np.stack(flat).reshape(3, 5, *flat[0].shape).sum(axis=0)
            assert_exact(np.ascontiguousarray(np.moveaxis(planes, 0, 2)) + bias[:, None, None, None], y)


class TestBatch:
    @pytest.mark.parametrize("op", OPS)
    def test_without_batch(self, op, rng):
        x, w, bias = small(rng, op, batch=1)
        residual = integers(rng, expect(op, x, w).shape)
        y = call(op, x[0], w, bias, residual=residual[0])
        assert_exact(y, expect(op, x, w, bias, residual=residual)[0], "float32")

    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_empty(self, op, dtype, rng):
        x, w, bias = small(rng, op, dtype, batch=0)
        y = call(op, x, w, bias, padding=1)
        assert_exact(y, expect(op, x, w, bias, padding=1), dtype)
        out = np.empty_like(y)
        assert call(op, x, w, bias, padding=1, out=out) is out

    def test_empty_batch_runs_no_kernel(self, rng, monkeypatch):
        monkeypatch.setattr(ops.planning.Plan, "run", None)
        x, w, bias = small(rng, "conv2d", batch=0)
        assert call("conv2d", x, w, bias).shape == (0, 6, 5, 5)

    @pytest.mark.parametrize("op", OPS)
    def test_a_sample_does_not_depend_on_its_batch(self, op, rng):
        x, w, _ = small(rng, op)
        x, w = normals(rng, (5, *x.shape[1:])), normals(rng, w.shape)
        together = getattr(fastconv, op)(x, w, algo="direct")
        alone = [getattr(fastconv, op)(sample, w, algo="direct") for sample in x]
        assert np.array_equal(together, np.stack(alone))


class TestOptions:
    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize("form", ["int", "per axis", "pairs", "mixed", "valid"])
    def test_padding(self, op, form, rng):
        ndim = int(op[4])
        pairs = {
            "int": ((2, 2),) * ndim,
            "per axis": ((1, 1), (0, 0), (2, 2))[:ndim],
            "pairs": ((2, 0), (0, 1), (1, 3))[:ndim],
            "mixed": ((1, 2), (1, 1), (0, 1))[:ndim],
            "valid": ((0, 0),) * ndim,
        }[form]
        padding = {"int": 2, "per axis": [b for b, _ in pairs], "pairs": pairs, "valid": "valid"}.get(form)
        if padding is None:
            padding = [before if before == after else (before, after) for before, after in pairs]
        x, w, bias = small(rng, op)
        padded = np.pad(x, [(0, 0), (0, 0), *pairs])
        assert_exact(call(op, x, w, bias, padding=padding), expect(op, padded, w, bias), "float32")

    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize("stride", [1, 2, 3, 5])
    @pytest.mark.parametrize("dilation", [1, 2])
    def test_same_padding_gives_every_stride_its_share(self, op, stride, dilation, rng):
        x, w, _ = small(rng, op)
        y = call(op, x, w, stride=stride, dilation=dilation, padding="same")
        assert y.shape[2:] == tuple(-(-size // stride) for size in x.shape[2:])
        assert_exact(y, expect(op, x, w, stride=stride, dilation=dilation, padding="same"), "float32")

    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
    @pytest.mark.parametrize("op", OPS)
    def test_same_padding_as_in_torch(self, op, torch, rng):
        x, w, bias = small(rng, op)
        theirs = getattr(torch.nn.functional, op)(*map(torch.from_numpy, (x, w, bias)), padding="same")
        assert_exact(call(op, x, w, bias, padding="same"), theirs.numpy())

    @pytest.mark.parametrize("integer", [np.int64, np.uint8, lambda n: np.array(n)])
    def test_integers_of_any_kind(self, integer, rng):
        x, w, bias = small(rng, "conv2d", groups=2)
        two = integer(2)
        y = call("conv2d", x, w, bias, stride=two, padding=[two, two], dilation=np.array([2, 2]), groups=two)
        options = {"stride": 2, "padding": 2, "dilation": 2, "groups": 2}
        assert_exact(y, expect("conv2d", x, w, bias, **options), "float32")

    def test_an_integer_of_a_class_of_its_own(self, rng):
        """Which no cache may take for another, beside a list, which none can have as a key."""
        x, w, bias = small(rng, "conv2d")
        expected = expect("conv2d", x, w, bias, stride=2, padding=1)
        two = enum.IntEnum("Step", {"TWO": 2}).TWO
        assert_exact(call("conv2d", x, w, bias, stride=two, padding=[1, 1]), expected, "float32")
        layer = fastconv.Conv2d(w, bias, stride=two, padding=[1, 1])
        assert_exact(layer(x), expected, "float32")

    @pytest.mark.parametrize("op", OPS)
    def test_groups_are_convolutions_side_by_side(self, op, rng):
        x, w, bias = small(rng, op, groups=2)
        halves = [
            expect(op, x[:, :2], w[:3], bias[:3]),
            expect(op, x[:, 2:], w[3:], bias[3:]),
        ]
        assert_exact(call(op, x, w, bias, groups=2), np.concatenate(halves, axis=1), "float32")

    @pytest.mark.parametrize("op", OPS)
    def test_flip(self, op, rng):
        x, w, bias = small(rng, op)
        reversed_ = w[(slice(None), slice(None), *(slice(None, None, -1),) * int(op[4]))]
        assert_exact(call(op, x, w, bias, flip=True), expect(op, x, reversed_, bias), "float32")

    def test_flip_is_the_convolution_of_numpy(self, rng):
        x, w = integers(rng, (30,)), integers(rng, (5,))
        y = call("conv1d", x[None], w[None, None], padding=4, flip=True)
        assert_exact(y[0], np.convolve(x, w, mode="full"))
        y = call("conv1d", x[None], w[None, None], padding=4)
        assert_exact(y[0], np.correlate(x, w, mode="full"))

    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_activation_comes_last(self, activation, dtype, rng):
        x, w, bias = small(rng, "conv2d", dtype)
        residual = integers(rng, (2, 6, 5, 5), dtype)
        x /= 8
        y = call("conv2d", x, w, bias, residual=residual, activation=activation)
        expected = expect("conv2d", x, w, bias, residual=residual, activation=activation)
        bound = 8 * np.finfo(dtype).eps * (1 + np.abs(expect("conv2d", x, w, bias, residual=residual)))
        assert_bounded(y, expected, bound, dtype)

    @pytest.mark.parametrize("activation", ["gelu", "silu", "relu6", "sigmoid", "tanh"])
    def test_activation_as_in_torch(self, activation, torch, rng):
        x, w = normals(rng, (1, 1, 400), "float64"), np.ones((1, 1, 1))
        theirs = getattr(torch.nn.functional, activation)(torch.from_numpy(x)).numpy()
        assert_bounded(fastconv.conv1d(x, w, activation=activation), theirs, np.full(x.shape, 1e-15))

    def test_residual_may_be_broadcast(self, rng):
        x, w, bias = small(rng, "conv2d")
        residual = np.broadcast_to(integers(rng, (1, 6, 1, 1)), (2, 6, 5, 5))
        y = call("conv2d", x, w, bias, residual=residual)
        assert_exact(y, expect("conv2d", x, w, bias, residual=residual), "float32")

    @pytest.mark.parametrize("algo", [row.name for row in fastconv.algorithms()])
    def test_algorithm_by_name(self, algo, rng):
        channels = 6 if algo == "depthwise" else 1
        kernel = 1 if algo == "pointwise" else 3
        x, w = integers(rng, (2, 6, 9, 9)), integers(rng, (6, 6 // channels, kernel, kernel))
        y = call("conv2d", x, w, groups=channels, algo=algo)
        assert_exact(y, expect("conv2d", x, w, groups=channels), "float32")


@pytest.mark.parametrize("op", OPS)
class TestLayout:
    def test_shapes_with_channels_last(self, op, rng):
        x, w, bias = small(rng, op)
        residual = integers(rng, expect(op, x, w).shape)
        last = ops.LAYOUTS[op][1]
        y = call(op, to_last(x, op), w, bias, layout=last, residual=to_last(residual, op))
        assert_exact(y, to_last(expect(op, x, w, bias, residual=residual), op), "float32")
        assert y.flags.c_contiguous

    def test_without_batch(self, op, rng):
        x, w, bias = small(rng, op)
        y = call(op, to_last(x[0], op), w, bias, layout=ops.LAYOUTS[op][1])
        assert_exact(y, to_last(expect(op, x[0], w, bias), op), "float32")
        assert y.flags.c_contiguous

    def test_out(self, op, rng):
        x, w, bias = small(rng, op)
        expected = to_last(expect(op, x, w, bias), op)
        out = np.full(expected.shape, np.nan, np.float32)
        assert call(op, to_last(x, op), w, bias, layout=ops.LAYOUTS[op][1], out=out) is out
        assert_exact(out, expected, "float32")

    def test_memory_order_is_kept(self, op, rng):
        """The memory of the result is ordered as the input's, whatever the layout says of the shapes."""
        x, w, _ = small(rng, op)
        first, last = ops.LAYOUTS[op]
        in_last = np.moveaxis(to_last(x, op), -1, 1)  # shape channels first, memory channels last
        in_first = np.moveaxis(x, 1, -1)  # the other way round
        assert call(op, x, w, layout=first).flags.c_contiguous
        assert np.moveaxis(call(op, in_last, w, layout=first), 1, -1).flags.c_contiguous
        assert call(op, to_last(x, op), w, layout=last).flags.c_contiguous
        assert np.moveaxis(call(op, in_first, w, layout=last), -1, 1).flags.c_contiguous
        assert np.moveaxis(call(op, in_last[0], w, layout=first), 0, -1).flags.c_contiguous
        assert np.moveaxis(call(op, in_first[0], w, layout=last), -1, 0).flags.c_contiguous
        assert_exact(call(op, in_last, w), expect(op, x, w), "float32")
        assert_exact(call(op, in_first, w, layout=last), to_last(expect(op, x, w), op), "float32")

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_memory_order_of_half_types(self, op, dtype, rng):
        x, w, _ = (a.astype(HALVES[dtype]) for a in small(rng, op))
        in_last = np.moveaxis(to_last(x, op), -1, 1)
        assert np.moveaxis(call(op, in_last, w), 1, -1).flags.c_contiguous


class TestArrays:
    @pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
    @pytest.mark.parametrize("order", ["NCHW", "NHWC"])
    def test_any_memory(self, name, order, rng):
        given = dict(zip(("input", "weight", "bias"), small(rng, "conv2d"), strict=True))
        given["residual"] = integers(rng, (2, 6, 5, 5))
        expected = expect("conv2d", **given)
        if order == "NHWC":
            given["input"] = np.moveaxis(to_last(given["input"], "conv2d"), -1, 1)
        for memory in (layouts, foreign_layouts):
            for label, view in memory(given[name]):
                y = call("conv2d", **{**given, name: view})
                assert y.dtype.isnative, label
                assert_exact(y, expected, "float32")

    def test_broadcast_input(self):
        x = np.broadcast_to(np.float32(2), (3, 4, 8, 8))
        w = np.broadcast_to(np.float32(1), (5, 4, 3, 3))
        assert (call("conv2d", x, w) == 72).all()

    def test_broadcast_input_larger_than_memory(self):
        """Half a terabyte by its shape: only what is used of it can have been touched."""
        x = np.broadcast_to(np.float32(1), (1, 1, 2**37))
        y = call("conv1d", x, np.ones((1, 1, 2), np.float32), stride=2**35)
        assert y.tolist() == [[[2.0] * 4]]

    def test_subclass_comes_back(self, rng):
        x, w, bias = small(rng, "conv2d")
        y = call("conv2d", tagged(x, "kept"), w, bias)
        assert type(y) is Tagged
        assert y.tag == "kept"
        assert_exact(np.asarray(y), expect("conv2d", x, w, bias), "float32")
        assert type(call("conv2d", x, tagged(w), bias)) is np.ndarray

    def test_memmap(self, rng, tmp_path):
        x, w, bias = small(rng, "conv2d")
        mapped = np.memmap(tmp_path / "x", dtype=x.dtype, mode="w+", shape=x.shape)
        mapped[...] = x
        out = np.memmap(tmp_path / "y", dtype=x.dtype, mode="w+", shape=(2, 6, 5, 5))
        assert_exact(call("conv2d", mapped, w, bias), expect("conv2d", x, w, bias), "float32")
        assert call("conv2d", mapped, w, bias, out=out) is out
        assert_exact(np.asarray(out), expect("conv2d", x, w, bias), "float32")

    @pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
    def test_matrix_is_a_sample_of_conv1d(self, rng):
        x, w, bias = small(rng, "conv1d")
        y = call("conv1d", np.asmatrix(x[0]), w, bias)
        assert type(y) is np.matrix
        assert_exact(np.asarray(y), expect("conv1d", x[0], w, bias), "float32")


class TestOut:
    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    @pytest.mark.parametrize("order", ["NCHW", "NHWC"])
    def test_every_element_is_written(self, op, dtype, order, rng):
        x, w, bias = small(rng, op, dtype)
        expected = expect(op, x, w, bias)
        out = poisoned(expected.shape, dtype, order)
        assert call(op, x, w, bias, out=out) is out
        assert_exact(out, expected, dtype)

    def test_any_memory(self, rng):
        x, w, bias = small(rng, "conv2d")
        expected = expect("conv2d", x, w, bias)
        for memory in (layouts, foreign_layouts):
            for label, view in memory(np.full(expected.shape, np.nan, np.float32)):
                if view.flags.writeable:
                    assert call("conv2d", x, w, bias, out=view) is view, label
                    assert_exact(view.astype(np.float32), expected, "float32")

    def test_only_out_is_written(self, rng):
        x, w, bias = small(rng, "conv2d")
        around = np.full((4, 8, 10, 10), 7, np.float32)
        where = np.s_[1:3, 1:7, ::2, 9:4:-1]
        call("conv2d", x, w, bias, out=around[where])
        assert_exact(around[where], expect("conv2d", x, w, bias), "float32")
        around[where] = 7
        assert (around == 7).all()

    def test_subclass_is_returned_itself(self, rng):
        x, w, bias = small(rng, "conv2d")
        out = tagged(np.full((2, 6, 5, 5), np.nan, np.float32))
        assert call("conv2d", x, w, bias, out=out) is out
        assert_exact(np.asarray(out), expect("conv2d", x, w, bias), "float32")


class TestForms:
    """A call of a form that was checked before goes straight to its plan."""

    @pytest.fixture
    def seen(self, rng, monkeypatch):
        """Operands of a function and of a layer which have been called with the like."""
        monkeypatch.setattr(ops, "_routes", {})
        x, w, bias = small(rng, "conv2d")
        layer = fastconv.Conv2d(w, bias, padding=1, algo="direct")
        for other in (x + 1, x):
            call("conv2d", other, w + 1, bias, padding=1)
            layer(other)
        assert len(ops._routes) == 2
        return x, w, bias, layer

    def test_is_not_checked_again(self, seen, monkeypatch):
        x, w, bias, layer = seen
        expected = expect("conv2d", x, w, bias, padding=1)
        monkeypatch.setattr(ops, "_frame_of", None)
        assert_exact(call("conv2d", x, w, bias, padding=1), expected, "float32")
        assert_exact(layer(x), expected, "float32")

    @pytest.mark.parametrize(
        "options",
        [
            {"padding": True},
            {"padding": 1.0},
            {"padding": (1.0, 1)},
            {"groups": True},
            {"flip": 0},
            {"algo": np.array("direct")},
            {"layout": np.array("NCHW")},
            {"activation": np.array("relu")},
            {"activation": ""},
        ],
        ids=str,
    )
    def test_a_wrong_value_that_equals_a_right_one(self, options, seen):
        x, w, bias, _ = seen
        for right in ({"padding": (1, 1)}, {"padding": 1, "activation": "relu"}):
            call("conv2d", x, w, bias, **right)
        with pytest.raises((TypeError, ConvError), match=r"^conv2d: "):
            call("conv2d", x, w, bias, **{"padding": 1, **options})

    @pytest.mark.parametrize("is_layer", [False, True])
    def test_out_is_looked_at(self, is_layer, seen):
        x, w, bias, layer = seen
        convolve = layer if is_layer else lambda x, out: call("conv2d", x, w, bias, padding=1, out=out)
        memory = np.zeros(2 * 6 * 7 * 7 + x.size, np.float32)
        out = memory[: 2 * 6 * 7 * 7].reshape(2, 6, 7, 7)
        convolve(x, out=out)
        with pytest.raises(ConvError, match="out must not share memory"):
            convolve(memory[4 : 4 + x.size].reshape(x.shape), out=out)
        out.flags.writeable = False
        with pytest.raises(ConvError, match="writeable"):
            convolve(x, out=out)

    def test_what_is_given_beside(self, seen, rng):
        x, w, bias, layer = seen
        residual = integers(rng, (2, 6, 7, 7), np.float32)
        expected = expect("conv2d", x, w, bias, padding=1)
        for _ in range(2):
            assert_exact(call("conv2d", x, w, padding=1), expected - bias[:, None, None], "float32")
            assert_exact(layer(x, residual), expected + residual, "float32")
            assert_exact(
                call("conv2d", x, w, bias, padding=1, activation="relu"), np.maximum(expected, 0), "float32"
            )
            y = call("conv2d", in_order(x, "NHWC"), w, bias, padding=1)
            assert_exact(y, expected, "float32")
            assert y.strides == in_order(expected.astype(np.float32), "NHWC").strides

    def test_a_subclass(self, seen):
        x, _, _, layer = seen
        assert type(layer(tagged(x))) is type(tagged(x))

    def test_a_layer_of_tensors(self, seen, torch):
        x, w, bias, _ = seen
        of_tensors = fastconv.Conv2d(torch.from_numpy(w), torch.from_numpy(bias), padding=1, algo="direct")
        with pytest.raises(TypeError, match="like weight"):
            of_tensors(x)

    def test_settings_and_measurements_count(self, seen, monkeypatch):
        x, w, bias, _ = seen
        names = []
        run = ops.planning.Plan.run
        monkeypatch.setattr(
            ops.planning.Plan,
            "run",
            lambda self, *arrays: (names.append(self.algorithm.name), run(self, *arrays)),
        )
        for algo in ("direct", "im2col", "direct"):
            monkeypatch.setenv("FASTCONV_ALGO", algo)
            fastconv.conv2d(x, w, bias, padding=1)
        assert names == ["direct", "im2col", "direct"]
        count = len(ops._routes)
        ops.planning.forget_plans()
        fastconv.conv2d(x, w, bias, padding=1)
        assert len(ops._routes) == count + 1

    def test_not_too_many_are_kept(self, seen, rng, monkeypatch):
        monkeypatch.setattr(ops, "_MOST_ROUTES", 3)
        for size in range(3, 12):
            call("conv2d", normals(rng, (1, 2, size, size)), np.ones((1, 2, 1, 1), np.float32))
        assert 1 <= len(ops._routes) <= 3


class TestTorch:
    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_tensors(self, op, dtype, torch, rng):
        x, w, bias = small(rng, op)
        tensors = [torch.from_numpy(a).to(getattr(torch, dtype)) for a in (x, w, bias)]
        y = call(op, *tensors)
        assert type(y) is torch.Tensor
        assert y.dtype == tensors[0].dtype
        assert not y.requires_grad
        expected = torch.from_numpy(expect(op, x, w, bias)).to(y.dtype)
        assert torch.equal(y, expected)

    def test_input_is_not_copied(self, torch, rng, monkeypatch):
        seen = []
        run = ops.planning.Plan.run
        monkeypatch.setattr(ops.planning.Plan, "run", lambda *args: (seen.extend(args), run(*args))[1])
        tensors = [torch.from_numpy(a) for a in small(rng, "conv2d")]
        call("conv2d", *tensors)
        addresses = {a.__array_interface__["data"][0] for a in seen if isinstance(a, np.ndarray)}
        assert {tensor.data_ptr() for tensor in tensors} <= addresses

    def test_channels_last_comes_back(self, torch, rng):
        x, w, bias = (torch.from_numpy(a) for a in small(rng, "conv2d"))
        y = call("conv2d", x.to(memory_format=torch.channels_last), w, bias)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, call("conv2d", x, w, bias))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_out(self, dtype, torch, rng):
        x, w, bias = (torch.from_numpy(a).to(getattr(torch, dtype)) for a in small(rng, "conv2d"))
        out = torch.full((2, 6, 5, 5), float("nan"), dtype=x.dtype)
        assert call("conv2d", x, w, bias, out=out) is out
        assert torch.equal(out, call("conv2d", x, w, bias))

    def test_residual(self, torch, rng):
        x, w, bias = small(rng, "conv2d")
        residual = integers(rng, (2, 6, 5, 5))
        y = call("conv2d", *map(torch.from_numpy, (x, w, bias)), residual=torch.from_numpy(residual))
        assert_exact(y.numpy(), expect("conv2d", x, w, bias, residual=residual), "float32")

    def test_empty_batch(self, torch):
        assert call("conv2d", torch.zeros(0, 4, 7, 6), torch.zeros(6, 4, 3, 2)).shape == (0, 6, 5, 5)

    def test_layer(self, torch, rng):
        x, w, bias = small(rng, "conv2d")
        y = fastconv.Conv2d(*map(torch.from_numpy, (w, bias)), **EXACT)(torch.from_numpy(x))
        assert_exact(y.numpy(), expect("conv2d", x, w, bias), "float32")


@pytest.mark.parametrize("op", OPS)
class TestLayer:
    def test_as_the_function(self, op, rng):
        x, w, bias = small(rng, op, groups=2)
        options = {"stride": 2, "padding": 1, "groups": 2, "flip": True, "activation": "relu"}
        conv = LAYERS[op](w, bias, **options, **EXACT)
        expected = expect(op, x, w, bias, **options)
        residual = integers(rng, expected.shape)
        out = poisoned(expected.shape, "float32")
        assert_exact(conv(x), expected, "float32")
        assert_exact(conv(x[0]), expected[0], "float32")
        assert conv(x, residual, out) is out
        assert_exact(out, expect(op, x, w, bias, residual=residual, **options), "float32")
        assert conv(x[:0]).shape == (0, *expected.shape[1:])

    @pytest.mark.parametrize("dtype", HALVES)
    def test_half(self, op, dtype, rng):
        x, w, bias = (a.astype(HALVES[dtype]) for a in small(rng, op))
        assert np.array_equal(LAYERS[op](w, bias, **EXACT)(x), call(op, x, w, bias))

    def test_layout(self, op, rng):
        x, w, bias = small(rng, op)
        conv = LAYERS[op](w, bias, layout=ops.LAYOUTS[op][1], **EXACT)
        assert_exact(conv(to_last(x, op)), to_last(expect(op, x, w, bias), op), "float32")

    def test_weight_is_a_snapshot(self, op, rng):
        x, w, bias = small(rng, op)
        expected = expect(op, x, w, bias)
        stride = [1] * int(op[4])
        conv = LAYERS[op](w, bias, stride, **EXACT)
        w[...] = bias[...] = np.nan
        stride[0] = 3
        assert_exact(conv(x), expected, "float32")

    @pytest.mark.parametrize("algo", ["auto", "direct"])
    def test_weight_is_prepared_once(self, op, algo, rng, monkeypatch):
        prepared = []
        prepare = ops.planning.Plan.prepare
        monkeypatch.setattr(
            ops.planning.Plan, "prepare", lambda *args: (prepared.append(1), prepare(*args))[1]
        )
        x, w, bias = small(rng, op)
        conv = LAYERS[op](w, bias, algo=algo)
        for _ in range(3):
            conv(x)
        assert len(prepared) == 1

    def test_other_inputs(self, op, rng):
        """One layer serves inputs of every size, order and batch, also where plans differ."""
        _, w, bias = small(rng, op)
        conv = LAYERS[op](w, bias, padding=1, **EXACT)
        for size in (1, 2, 5, 30):
            image = integers(rng, (2, 4, *(size + 3,) * int(op[4])))
            expected = expect(op, image, w, bias, padding=1)
            assert_exact(conv(image), expected, "float32")
            assert_exact(conv(np.moveaxis(to_last(image, op), -1, 1)), expected, "float32")

    def test_many_threads(self, op, rng):
        _, w, bias = small(rng, op)
        conv = LAYERS[op](w, bias, padding=1, **EXACT)
        images = [integers(rng, (1, 4, *(size + 4,) * int(op[4]))) for size in range(8)]
        results = [None] * len(images)
        start = threading.Barrier(len(images))

        def work(index):
            start.wait()
            results[index] = [conv(images[index]) for _ in range(3)]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(images))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for image, repeated in zip(images, results, strict=True):
            for y in repeated:
                assert_exact(y, expect(op, image, w, bias, padding=1), "float32")

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda conv: pickle.loads(pickle.dumps(conv))])
    def test_copies(self, op, clone, rng):
        x, w, bias = small(rng, op)
        conv = LAYERS[op](w, bias, activation="relu", **EXACT)
        conv(x)
        assert np.array_equal(clone(conv)(x), conv(x))


class TestRepr:
    def test_defaults_are_left_out(self):
        conv = fastconv.Conv2d(np.zeros((128, 64, 3, 3), np.float32))
        assert repr(conv) == "Conv2d(weight (128, 64, 3, 3) float32)"

    def test_options(self):
        w = np.zeros((6, 2, 3), np.float64)
        conv = fastconv.Conv1d(
            w, w[:, 0, 0], 2, [(2, 0)], groups=3, activation="relu", layout="NLC", algo="direct"
        )
        assert repr(conv) == (
            "Conv1d(weight (6, 2, 3) float64, bias (6,), stride=2, padding=((2, 0),), groups=3, "
            "layout='NLC', algo='direct', activation='relu')"
        )


class TestExplain:
    @pytest.mark.parametrize("op", OPS)
    def test_prints_the_table(self, op, rng):
        x, w, bias = small(rng, op)
        text = str(fastconv.explain(x, w, bias, padding=1, layout=ops.LAYOUTS[op][0]))
        for row in fastconv.algorithms():
            assert re.search(rf"\b{row.name}\b", text)

    def test_algorithms(self):
        rows = fastconv.algorithms()
        assert [row.name for row in rows] == ["direct", "im2col", "winograd", "pointwise", "depthwise"]
        assert all(row.summary and row.source for row in rows)


@pytest.mark.parametrize("algo", ["auto", "im2col"])
@pytest.mark.parametrize("before", [True, False])
def test_columns_far_outside_the_input(algo, before):
    """Counted in 32 bits, 2**32 would be column 0."""
    far = 2**32
    x, w = np.arange(5, dtype="f4").reshape(1, 1, 5), np.array([[[1, 10]]], "f4")
    y = fastconv.conv1d(x, w, padding=((far, 0) if before else (0, far),), dilation=far, algo=algo)
    assert_exact(y, (x * (10 if before else 1)).astype("f8"), "float32")


def test_depthwise_does_not_count_so_many_columns_in_32_bits():
    """It packs them, 16 GiB of them, so it is not run here; no tile that reads them in place is for it."""
    problem = make_problem("conv1d", (1, 1, 5), (1, 1, 2), padding=((2**32, 0),), dilation=2**32)
    costs = {str(plan.tile): plan.cost() for plan in possible_plans(problem, "depthwise")}
    in_place = [costs.pop(tile) for tile in ("plane2", "rows6x2", "rows7x2")]
    assert set(in_place) == {float("inf")}
    assert max(costs.values()) < float("inf")


@pytest.mark.parametrize(
    ("rule", "extent", "options"),
    [
        ("stride must be below 2**60, got 1152921504606846976 (n1", 1, {"stride": (1, 2**60)}),
        ("dilation must be below 2**60, got 1152921504606846976 (n1", 1, {"dilation": (2**60, 1)}),
        (
            "elements of the padded input must be below 2**60, got 24178516392336563",
            2,
            {"padding": ((2**40, 0), (2**40, 0)), "dilation": 2**40},
        ),
        ("bytes of input, weight and output must be below 2**60, got 9223", 1, {"padding": 2**28}),
    ],
)
def test_sizes_that_no_memory_holds(rule, extent, options):
    with pytest.raises(fastconv.ConvError, match=f"^conv2d: {re.escape(rule)}"):
        fastconv.conv2d(np.ones((1, 2, 1, 1)), np.ones((4, 2, extent, extent)), **options)
