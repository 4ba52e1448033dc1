"""What stands around convolutions, against plain definitions, on every kind of array; and against torch."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest

import fastconv
from fastconv import ConvError, borrowing
from tests import cuda_stand_in
from tests.backends import EMULATOR
from tests.compare import assert_bounded, assert_exact, finfo, foreign_layouts, integers, layouts, normals
from tests.places import everywhere

SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-3, -1e-3, 7.0, -7.0, 800.0, -800.0])

# The definitions, of one number.
ACTIVATIONS = {
    "relu": lambda x: x if x > 0 or x != x else 0.0,
    "relu6": lambda x: x if x != x else min(max(x, 0.0), 6.0),
    "leaky_relu": lambda x: x if x > 0 or x != x else 0.01 * x,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)) if x > -700 else math.exp(max(x, -745)),
    "silu": lambda x: x * ACTIVATIONS["sigmoid"](x),
    "tanh": math.tanh,
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
}

every_activation = pytest.mark.parametrize("name", ACTIVATIONS)


def each(function, x):
    """A function of every number; what has no limit at an infinity is NaN there."""
    return np.vectorize(function, otypes=[np.float64])(x.astype(np.float64))


class TestActivations:
    @every_activation
    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
    @everywhere
    def test_definition(self, place, name, dtype, rng):
        x = (4 * normals(rng, (3, 5, 7), "float64")).astype(dtype)
        expected = each(ACTIVATIONS[name], x)
        # gelu: erf is near -1 where x is negative, so that the rounding of 1 is left of its sum
        bound = 8 * finfo(dtype).eps * (np.abs(expected) + (np.abs(x) if name == "gelu" else 0))
        found = place.host(getattr(fastconv, name)(place.make(x)))
        assert_bounded(found, expected, bound + 4 * finfo(dtype).smallest_subnormal, dtype)

    @every_activation
    def test_special_numbers(self, name):
        """NaN stays NaN, infinities have their limits, and nothing warns."""
        torch = pytest.importorskip("torch")
        found = getattr(fastconv, name)(SPECIAL)
        wanted = getattr(torch.nn.functional, name)(torch.from_numpy(SPECIAL)).numpy()
        assert_bounded(found, wanted, 1e-14 + 1e-14 * np.abs(wanted))

    @pytest.mark.parametrize(("x", "y"), [(-2.0, 0.0), (0.0, 0.0), (3.0, 3.0), (np.inf, np.inf)])
    def test_relu_and_nan(self, x, y):
        assert fastconv.relu(np.array([x, np.nan]))[0] == y
        assert all(np.isnan(getattr(fastconv, name)(np.array([x, np.nan]))[1]) for name in ACTIVATIONS)

    def test_slope(self):
        assert fastconv.leaky_relu(np.array([-2.0, 2.0]), negative_slope=0.25).tolist() == [-0.5, 2.0]

    @every_activation
    def test_any_memory_layout(self, name, rng):
        values = integers(rng, (2, 3, 4, 5))
        expected = getattr(fastconv, name)(values)
        for _, x in (*layouts(values), *foreign_layouts(values)):
            assert_exact(getattr(fastconv, name)(x), expected)

    def test_memory_order_is_kept(self, rng):
        x = np.moveaxis(normals(rng, (2, 5, 4, 3)), -1, 1)
        for name in ACTIVATIONS:
            assert np.moveaxis(getattr(fastconv, name)(x), 1, -1).flags.c_contiguous

    def test_no_axes(self):
        y = fastconv.relu(np.array(-1.0))
        assert (type(y), y) == (np.float64, 0.0)
        assert fastconv.relu(y) == 0.0
        half = fastconv.sigmoid(np.float16(0))
        assert (type(half), half) == (np.float16, 0.5)


def softmax_of(x):
    powers = [math.exp(value - max(x)) for value in x]
    return [power / sum(powers) for power in powers]


class TestSoftmax:
    @pytest.mark.parametrize("dim", [0, 1, -1])
    @everywhere
    def test_definition(self, place, dim, rng):
        x = 5 * normals(rng, (3, 4, 5), "float64")
        share = np.apply_along_axis(softmax_of, dim, x)
        assert_bounded(place.host(fastconv.softmax(place.make(x), dim)), share, 1e-14 * share)
        found = place.host(fastconv.log_softmax(place.make(x), dim))
        assert_bounded(found, np.log(share), 1e-14 * (1 + np.abs(np.log(share))))

    def test_large_numbers(self):
        x = np.array([[1000.0, -np.inf, 999.0]], np.float32)
        assert fastconv.softmax(x, 1)[0, 1] == 0
        assert_bounded(
            fastconv.log_softmax(x, 1), np.array([[-0.3132617, -np.inf, -1.3132617]]), 1e-6, "float32"
        )
        assert np.isnan(fastconv.softmax(np.full(3, -np.inf), 0)).all()

    def test_empty_and_without_axes(self):
        assert fastconv.softmax(np.zeros((0, 3)), 0).shape == (0, 3)
        assert fastconv.softmax(np.array(3.0), 0) == 1
        assert fastconv.log_softmax(np.array(3.0), -1) == 0

    @pytest.mark.parametrize("x", [np.nan, np.inf, -np.inf])
    def test_no_number_without_axes(self, x):
        assert np.isnan(fastconv.softmax(np.array(x), 0))
        assert np.isnan(fastconv.log_softmax(np.array(x), 0))


class TestLinear:
    @pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4)])
    @everywhere
    def test_definition(self, place, shape, rng):
        x, w, b = integers(rng, shape), integers(rng, (5, 4)), integers(rng, (5,))
        found = place.host(fastconv.linear(*map(place.make, (x, w, b))))
        assert_exact(found, np.einsum("...c,kc->...k", x, w) + b)
        assert_exact(place.host(fastconv.linear(place.make(x), place.make(w))), found - b)

    def test_one_row_of_weights(self):
        assert fastconv.linear(np.ones((2, 3)), np.ones(3)).tolist() == [3, 3]

    def test_half_types_are_summed_in_float32(self):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        for dtype in (np.float16, ml_dtypes.bfloat16):
            x = np.ones((1, 4096), dtype)
            assert fastconv.linear(x, x)[0, 0] == 4096


def cross_entropy_by_definition(x, target, weight, ignore_index, reduction, label_smoothing):
    """Of x (N, C, L); target (N, L) of indices, or (N, C, L)."""
    classes, losses, weights = x.shape[1], np.zeros((x.shape[0], x.shape[2])), []
    for n, i in np.ndindex(losses.shape):
        log_p = np.log(softmax_of(x[n, :, i]))
        wanted = target[n, :, i] if target.ndim == 3 else np.eye(classes)[max(target[n, i], 0)]
        wanted = (1 - label_smoothing) * wanted + label_smoothing / classes
        is_ignored = target.ndim == 2 and target[n, i] == ignore_index
        losses[n, i] = 0 if is_ignored else -(weight * wanted * log_p).sum()
        weights.append(0 if is_ignored else 1 if target.ndim == 3 else weight[target[n, i]])
    if reduction == "none":
        return losses
    return losses.sum() / (sum(weights) if reduction == "mean" else 1)


class TestCrossEntropy:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
    @pytest.mark.parametrize("form", ["indices", "probabilities"])
    @everywhere
    def test_definition(self, place, form, label_smoothing, reduction, rng):
        x, weight = normals(rng, (3, 5, 4), "float64"), rng.random(5)
        target = rng.integers(0, 5, (3, 4)) if form == "indices" else rng.random((3, 5, 4))
        if form == "indices":
            target[1, 2] = target[2, 0] = -7
        options = {"ignore_index": -7, "reduction": reduction, "label_smoothing": label_smoothing}
        expected = np.asarray(cross_entropy_by_definition(x, target, weight, **options))
        arguments = map(place.make, (x, target, weight))
        found = np.asarray(place.host(fastconv.cross_entropy(*arguments, **options)))
        assert_bounded(found, expected, 1e-13)

    def test_one_sample_and_many_axes(self, rng):
        x = normals(rng, (6,), "float64")
        loss = fastconv.cross_entropy(x, np.array(2))
        assert math.isclose(loss, -math.log(softmax_of(x)[2]))
        x = normals(rng, (2, 3, 4, 5), "float64")
        target = rng.integers(0, 3, (2, 4, 5)).astype(np.int32)
        flat = np.moveaxis(x, 1, -1).reshape(-1, 3)
        expected = fastconv.cross_entropy(flat, target.ravel())
        assert math.isclose(fastconv.cross_entropy(x, target), expected, rel_tol=1e-14)

    def test_classes_that_cannot_be(self):
        """A logit of -inf counts for nothing where another class is right."""
        x = np.array([[0.0, -np.inf, 0.0]])
        assert fastconv.cross_entropy(x, np.array([0])) == np.log(2)
        assert fastconv.cross_entropy(x, np.array([1])) == np.inf

    def test_what_is_ignored_may_be_nan(self):
        x = np.array([[np.nan, 1.0], [0.0, 0.0]])
        assert fastconv.cross_entropy(x, np.array([-100, 0])) == np.log(2)

    def test_nothing_counts(self):
        x = np.zeros((2, 3))
        assert np.isnan(fastconv.cross_entropy(x, np.array([-100, -100])))
        assert fastconv.cross_entropy(x, np.array([-100, -100]), reduction="sum") == 0
        assert np.isnan(fastconv.cross_entropy(x[:0], np.zeros(0, int)))

    def test_half_types_are_computed_in_float32(self):
        loss = fastconv.cross_entropy(np.zeros((1, 3), np.float16), np.array([1]))
        assert (loss.dtype, loss) == (np.float16, np.float16(np.log(3)))

    @pytest.mark.emulator
    @pytest.mark.parametrize("place", [EMULATOR], indirect=True)
    def test_a_class_that_does_not_exist_is_nan_on_a_gpu(self, place):
        losses = fastconv.cross_entropy(
            place.make(np.zeros((3, 2))), place.make(np.array([0, 2, -100])), reduction="none"
        )
        assert np.isnan(place.host(losses)).tolist() == [False, True, False]


class TestBatchNorm:
    @pytest.mark.parametrize("shape", [(6, 3), (2, 3, 5), (2, 3, 4, 5)])
    @pytest.mark.parametrize("training", [True, False])
    @everywhere
    def test_definition(self, place, training, shape, rng):
        x = 3 + normals(rng, shape, "float64")
        mean, var, weight, bias = rng.random((4, 3)) + 0.5
        given = [place.make(array.copy()) for array in (x, mean, var, weight, bias)]
        found = place.host(fastconv.batch_norm(*given, training=training, momentum=0.2, eps=1e-3))
        expected, running = np.zeros(shape), [mean.copy(), var.copy()]
        for c in range(3):
            values = x[:, c]
            m, v = (values.mean(), values.var()) if training else (mean[c], var[c])
            expected[:, c] = (values - m) / math.sqrt(v + 1e-3) * weight[c] + bias[c]
            if training:
                running[0][c] = 0.8 * mean[c] + 0.2 * m
                running[1][c] = 0.8 * var[c] + 0.2 * values.var(ddof=1)
        assert_bounded(found, expected, 1e-13 * (1 + np.abs(expected)))
        for array, wanted in zip(given[1:3], running):
            assert_bounded(place.host(array), wanted, 1e-13 * np.abs(wanted))

    def test_many_samples_in_float32(self, rng):
        """Mean and variance are summed in float64: numbers far from zero keep their digits.

        With channels last NumPy adds element by element, so that float32 would err by 1.2e-3.
        """
        x = np.moveaxis((1000 + normals(rng, (64, 40, 40, 2))).astype(np.float32), -1, 1)
        running = np.zeros(2, np.float32), np.ones(2, np.float32)
        fastconv.batch_norm(x, *running, training=True, momentum=1.0)
        exact = x.astype(np.float64).transpose(1, 0, 2, 3).reshape(2, -1)
        assert_bounded(running[0], exact.mean(1), 1e-6 * 1000, "float32")
        assert_bounded(running[1], exact.var(1, ddof=1), 1e-4, "float32")

    def test_half_types_and_no_samples(self):
        x, running = np.ones((0, 2, 3), np.float16), np.full(2, 0.5, np.float16)
        y = fastconv.batch_norm(x, running, running.copy(), training=True)
        assert (y.shape, y.dtype) == (x.shape, np.float16)
        assert running.tolist() == [0.5, 0.5]
        x = np.array([[1.0], [3.0]], np.float16)
        fastconv.batch_norm(x, mean := np.zeros(1, np.float16), np.ones(1, np.float16), training=True)
        assert mean.tolist() == [np.float16(0.2)]

    def test_memory_order_is_kept(self, rng):
        x = np.moveaxis(normals(rng, (2, 5, 4, 3)), -1, 1)
        y = fastconv.batch_norm(x, None, None, np.ones(3, np.float32), training=True)
        assert np.moveaxis(y, 1, -1).flags.c_contiguous


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
@everywhere
def test_local_response_norm(place, size, rng):
    x, (alpha, beta, k) = normals(rng, (2, 6, 3), "float64"), (0.5, 0.7, 1.5)
    expected = np.zeros(x.shape)
    for c in range(6):
        near = x[:, max(c - size // 2, 0) : c + (size - 1) // 2 + 1]
        expected[:, c] = x[:, c] / (k + alpha / size * (near**2).sum(1)) ** beta
    found = place.host(fastconv.local_response_norm(place.make(x), size, alpha, beta, k))
    assert_bounded(found, expected, 1e-14)


class TestDropout:
    @everywhere
    def test_keeps_and_scales(self, place):
        x = np.arange(1, 10001, dtype=np.float32).reshape(100, 100)
        y, mask = fastconv.dropout(place.make(x), 0.2, rng=3, return_mask=True)
        mask = place.host(mask)
        assert mask.dtype == bool
        assert 0.78 < mask.mean() < 0.82
        assert_bounded(
            place.host(y), np.where(mask, x / 0.8, 0.0), 2 * finfo("float32").eps * x / 0.8, "float32"
        )
        again = place.host(fastconv.dropout(place.make(x), 0.2, rng=np.random.default_rng(3)))
        assert np.array_equal(again, place.host(y))

    def test_the_elements_do_not_depend_on_memory(self, rng):
        x = normals(rng, (4, 5, 6))
        expected = fastconv.dropout(x, rng=1)
        for _, array in layouts(x):
            assert np.array_equal(fastconv.dropout(array, rng=1), expected)

    @everywhere
    def test_memory_order_is_kept(self, place, rng):
        x = np.moveaxis(normals(rng, (2, 5, 4, 3)), -1, 1)
        y, mask = fastconv.dropout(place.make(x), 0.5, rng=1, return_mask=True)
        assert np.moveaxis(place.host(y), 1, -1).flags.c_contiguous
        assert np.moveaxis(place.host(mask), 1, -1).flags.c_contiguous
        assert_exact(
            place.host(y), fastconv.dropout(np.ascontiguousarray(x), 0.5, rng=1).astype("float64"), "float32"
        )

    def test_without_a_seed_chance_differs(self):
        x = np.ones(1000)
        assert not np.array_equal(fastconv.dropout(x), fastconv.dropout(x))

    def test_ends(self):
        x = np.array([1.0, -2.0])
        assert fastconv.dropout(x, training=False) is x
        assert np.array_equal(fastconv.dropout(x, 0.0), x)
        assert fastconv.dropout(x, 1.0).tolist() == [0, 0]
        assert fastconv.dropout(x, training=False, return_mask=True)[1].tolist() == [True, True]


class TestFlatten:
    @pytest.mark.parametrize(
        ("dims", "shape"), [((), (120,)), ((1,), (2, 60)), ((1, 2), (2, 12, 5)), ((-2, -1), (2, 3, 20))]
    )
    @everywhere
    def test_shapes(self, place, dims, shape, rng):
        x = integers(rng, (2, 3, 4, 5))
        assert_exact(place.host(fastconv.flatten(place.make(x), *dims)), x.reshape(shape))

    def test_a_view_where_that_can_be(self):
        x = np.zeros((2, 3, 4), np.float16)
        assert np.shares_memory(fastconv.flatten(x, 1), x)
        assert fastconv.flatten(np.array(3.0)).shape == (1,)


def sample(x, places):
    """The value of x (...,) at real places between its elements, along its last axes, one after the other."""
    if not places:
        return x
    low = min(math.floor(places[0]), x.shape[0] - 1)
    high, share = min(low + 1, x.shape[0] - 1), places[0] - low
    return (1 - share) * sample(x[low], places[1:]) + share * sample(x[high], places[1:])


def place_of(i, before, after, mode, align_corners):
    if mode == "nearest":
        return math.floor(i * before / after)
    if mode == "nearest-exact":
        return math.floor((i + 0.5) * before / after)
    if align_corners:
        return i * (before - 1) / max(after - 1, 1)
    return max((i + 0.5) * before / after - 0.5, 0.0)


class TestInterpolate:
    @pytest.mark.parametrize(
        ("sizes", "size", "mode"),
        [
            ((5,), (8,), "linear"),
            ((5, 4), (3, 9), "bilinear"),
            ((3, 1), (1, 4), "bilinear"),
            ((2, 3, 4), (4, 2, 7), "trilinear"),
            ((5, 4), (10, 4), "nearest"),
            ((7,), (3,), "nearest"),
            ((5, 4), (3, 9), "nearest-exact"),
        ],
    )
    @pytest.mark.parametrize("align_corners", [None, True])
    @pytest.mark.parametrize("order", ["NCHW", "NHWC"])
    @everywhere
    def test_definition(self, place, sizes, size, mode, align_corners, order, rng):
        if align_corners and "nearest" in mode:
            align_corners = None
        x = normals(rng, (2, 3, *sizes), "float64")
        if order == "NHWC":
            x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
        expected = np.zeros((2, 3, *size))
        axes = [
            [place_of(i, before, after, mode, align_corners) for i in range(after)]
            for before, after in zip(sizes, size)
        ]
        for n, c in np.ndindex(2, 3):
            for at, places in zip(np.ndindex(*size), itertools.product(*axes)):
                expected[(n, c, *at)] = sample(x[n, c], places)
        found = place.host(fastconv.interpolate(place.make(x), size, None, mode, align_corners))
        assert_bounded(found, expected, 1e-14)
        if order == "NHWC" and math.prod(size) > 1:
            assert np.moveaxis(found, 1, -1).flags.c_contiguous

    def test_scale_factor(self, rng):
        x = normals(rng, (1, 2, 5, 6))
        assert fastconv.interpolate(x, scale_factor=1.5).shape == (1, 2, 7, 9)
        assert fastconv.interpolate(x, scale_factor=(2, 0.5)).shape == (1, 2, 10, 3)
        assert fastconv.interpolate(x, scale_factor=np.array([2, 0.5])).shape == (1, 2, 10, 3)
        twice = fastconv.interpolate(x, scale_factor=2)
        assert np.array_equal(twice, x.repeat(2, 2).repeat(2, 3))

    def test_nearest_is_found_in_float32(self):
        """As torch does in 2-D: element 41 of 82 is that of 41 * float32(2 / 82) = 0.99999994."""
        x = np.array([[[[0.0, 1.0]]]])
        found = fastconv.interpolate(x, (1, 82))[0, 0, 0]
        assert found.tolist() == [0] * 42 + [1] * 40

    def test_nan_stays_where_it_is(self):
        x = np.array([[[1.0, np.nan, 3.0, 4.0]]])
        y = fastconv.interpolate(x, scale_factor=2, mode="linear")
        assert (
            np.isnan(y[0, 0]).tolist() == [True] * 5 + [False] * 3
        )  # of the first its weight is 0, as in torch

    @everywhere
    def test_no_samples(self, place):
        none = place.make(np.zeros((0, 2, 3)))
        assert place.host(fastconv.interpolate(none, 6)).shape == (0, 2, 6)


# images (C, H, W) and the options kernel_size, dilation, padding, stride
WINDOWS = {
    "plain": ((3, 4, 5), (2,)),
    "one tap": ((3, 4, 5), (1,)),
    "padded": ((2, 3, 4), (3, 1, 1)),
    "far padding": ((1, 2, 1), (2, 1, (0, 5))),
    "steps": ((2, 7, 8), ((3, 2), (2, 3), (0, 1), (2, 1))),
    "gaps": ((2, 5, 9), (1, 1, 0, (2, 4))),
    "all": ((2, 3, 4), ((3, 4),)),
}
every_window = pytest.mark.parametrize(("shape", "options"), WINDOWS.values(), ids=list(WINDOWS))


def read_by_windows(shape, kernel_size, dilation=1, padding=0, stride=1):
    """What lies in every window: (row and column of the result of unfold, (c, h, w)), without the padding."""
    pairs = (value if isinstance(value, tuple) else (value, value) for value in (dilation, padding, stride))
    (dh, dw), (ph, pw), (sh, sw) = pairs
    R, S = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    tops = range(-ph, shape[1] + ph - dh * (R - 1), sh)
    lefts = range(-pw, shape[2] + pw - dw * (S - 1), sw)
    reads = []
    for column, (top, left) in enumerate(itertools.product(tops, lefts)):
        for row, (c, r, s) in enumerate(np.ndindex(shape[0], R, S)):
            h, w = top + r * dh, left + s * dw
            if 0 <= h < shape[1] and 0 <= w < shape[2]:
                reads.append((row, column, (c, h, w)))
    return (shape[0] * R * S, len(tops) * len(lefts)), reads


class TestUnfold:
    @every_window
    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
    @pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
    @everywhere
    def test_definition(self, place, batch, dtype, shape, options, rng):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
        size, reads = read_by_windows(shape, *options)
        x = integers(rng, (*batch, *shape), dtype)
        expected = np.zeros((*batch, *size), dtype)
        for row, column, place_read in reads:
            expected[..., row, column] = x[(..., *place_read)]
        assert_exact(place.host(fastconv.unfold(place.make(x), *options)), expected)

    @every_window
    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
    @pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
    @everywhere
    def test_fold(self, place, batch, dtype, shape, options, rng):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
        size, reads = read_by_windows(shape, *options)
        columns = integers(rng, (*batch, *size), dtype)
        expected = np.zeros((*batch, *shape), dtype)
        for row, column, place_read in reads:
            expected[(..., *place_read)] += columns[..., row, column]
        assert_exact(place.host(fastconv.fold(place.make(columns), shape[1:], *options)), expected)

    @every_window
    def test_each_is_the_transpose_of_the_other(self, shape, options, rng):
        size, _ = read_by_windows(shape, *options)
        x, columns = normals(rng, (2, *shape), "float64"), normals(rng, (2, *size), "float64")
        found = (x * fastconv.fold(columns, shape[1:], *options)).sum()
        assert math.isclose((fastconv.unfold(x, *options) * columns).sum(), found, rel_tol=1e-12)

    def test_a_convolution_is_a_product_of_matrices(self, rng):
        x, w = integers(rng, (2, 3, 7, 8)), integers(rng, (5, 3, 3, 2))
        product = w.reshape(5, -1) @ fastconv.unfold(x, (3, 2), (2, 1), (1, 2), (1, 3))
        expected = fastconv.conv2d(x, w, stride=(1, 3), padding=(1, 2), dilation=(2, 1))
        assert_exact(product.reshape(expected.shape), expected)

    def test_any_memory_layout(self, rng):
        image, columns = integers(rng, (2, 3, 4, 5)), integers(rng, (2, 12, 12))
        unfolded, folded = fastconv.unfold(image, 2), fastconv.fold(columns, (4, 5), 2)
        for _, x in (*layouts(image), *foreign_layouts(image)):
            assert_exact(fastconv.unfold(x, 2), unfolded)
        for _, x in (*layouts(columns), *foreign_layouts(columns)):
            assert_exact(fastconv.fold(x, (4, 5), 2), folded)

    @pytest.mark.parametrize("order", ["NCHW", "NHWC"])
    @pytest.mark.parametrize("padding", [0, 1])
    @everywhere
    def test_memory_order_is_kept(self, place, padding, order, rng):
        """There and back; the result is never a view, of what the caller has or of something larger."""
        x = integers(rng, (2, 4, 5, 3))
        x = np.moveaxis(x, -1, 1) if order == "NHWC" else x.transpose(0, 3, 1, 2).copy()
        columns = place.host(fastconv.unfold(place.make(x), 1, padding=padding))
        assert (columns.swapaxes(1, 2) if order == "NHWC" else columns).flags.c_contiguous
        back = place.host(fastconv.fold(place.make(columns), (4, 5), 1, padding=padding))
        assert (np.moveaxis(back, 1, -1) if order == "NHWC" else back).flags.c_contiguous
        assert_exact(back, x)
        for result in (columns, back):
            assert not np.shares_memory(result, x)
            assert result.flags.writeable

    def test_half_types_are_summed_in_float32(self):
        """2048 and eight times 1: in float16 each 1 would be lost."""
        columns = np.ones((9, 9), np.float16)
        columns[0, 8] = 2048
        assert fastconv.fold(columns, 5, 3)[0, 2, 2] == 2056

    @everywhere
    def test_no_samples(self, place):
        none = place.make(np.zeros((0, 2, 3, 4), np.float32))
        assert place.host(fastconv.unfold(none, 2)).shape == (0, 8, 6)
        none = place.make(np.zeros((0, 8, 6), np.float32))
        assert place.host(fastconv.fold(none, (3, 4), 2)).shape == (0, 2, 3, 4)


CALLS = {
    "relu": lambda x, whole: fastconv.relu(x),
    "gelu": lambda x, whole: fastconv.gelu(x),
    "softmax": lambda x, whole: fastconv.softmax(x, 1),
    "linear": lambda x, whole: fastconv.linear(x, x),
    "cross_entropy": lambda x, whole: fastconv.cross_entropy(x, whole),
    "batch_norm": lambda x, whole: fastconv.batch_norm(x, None, None, training=True),
    "dropout": lambda x, whole: fastconv.dropout(x, rng=0),
    "flatten": lambda x, whole: fastconv.flatten(x),
    "unfold": lambda x, whole: fastconv.unfold(x, 2, padding=1),
    "fold": lambda x, whole: fastconv.fold(x, (3, 4), 2),
}
SHAPES = {"unfold": (2, 4, 6)}  # of the input, where it is not (4, 6)


class TestKinds:
    """Arrays of every kind give what NumPy's give, in their own kind and dtype."""

    @pytest.mark.parametrize("name", CALLS)
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("kind", cuda_stand_in.KINDS)
    @pytest.mark.emulator
    @pytest.mark.parametrize("place", [EMULATOR], indirect=True)
    def test_on_a_device(self, place, kind, dtype, name, rng, monkeypatch):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        kind = cuda_stand_in.make_kind(kind, [], monkeypatch)
        x = normals(rng, SHAPES.get(name, (4, 6))).astype(getattr(ml_dtypes, dtype, dtype))
        whole = rng.integers(0, 6, 4)
        expected = np.asarray(CALLS[name](x, whole))
        result = CALLS[name](kind.make(x), kind.make(whole))
        if kind.name == "torch CUDA":
            assert type(result) is kind.result
            assert cuda_stand_in.TORCH_STREAM in __import__("cupy").streams
        assert_bounded(kind.host(result), expected.astype(np.float64), _rounding(expected), x.dtype)

    @pytest.mark.parametrize("name", CALLS)
    @pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
    def test_tensors(self, name, dtype, rng):
        torch = pytest.importorskip("torch")
        x = torch.from_numpy(normals(rng, SHAPES.get(name, (4, 6)))).to(getattr(torch, dtype))
        whole = torch.from_numpy(rng.integers(0, 6, 4))
        result = CALLS[name](x, whole)
        assert type(result) is torch.Tensor
        assert result.dtype == x.dtype
        expected = np.asarray(CALLS[name](x.double().numpy(), whole.numpy()))
        eps = torch.finfo(x.dtype).eps
        assert_bounded(result.double().numpy(), expected, 8 * eps * (1 + np.abs(expected)))

    def test_cupy_has_every_function_that_is_asked_for(self):
        """The stand-in is NumPy, which may have more."""
        cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
        sources = [path.read_text(encoding="utf-8") for path in Path(fastconv.__file__).parent.glob("*.py")]
        names = {name for source in sources for name in re.findall(r"\bxp\.(\w+)", source)}
        assert "take_along_axis" in names
        assert {name for name in names if not hasattr(cupy, name)} == set()

    def test_bfloat16_is_rounded_on_a_device_too(self, rng):
        """By its bits, which CuPy's functions can handle: to nearest, ties to even."""
        ml_dtypes = pytest.importorskip("ml_dtypes")
        x = rng.integers(0, 2**32, 10000, np.uint32)
        x[:5000] &= 0xFFFF8000  # halfway between two, or on one
        values = np.concatenate([x.view(np.float32), SPECIAL.astype(np.float32)])
        with np.errstate(invalid="ignore"):
            expected = values.astype(ml_dtypes.bfloat16)
        found = borrowing._to_bits(values).view(ml_dtypes.bfloat16)
        assert_exact(found.astype(np.float64), expected.astype(np.float64))
        assert_exact(borrowing._from_bits(found.view(np.uint16)), found.astype(np.float32))

    def test_subclasses_and_running_tensors(self, rng):
        class Picture(np.ndarray):
            pass

        assert type(fastconv.relu(np.ones((2, 2)).view(Picture))) is Picture
        torch = pytest.importorskip("torch")
        mean, var = torch.zeros(3), torch.ones(3)
        x = torch.from_numpy(5 + normals(rng, (8, 3)))
        fastconv.batch_norm(x, mean, var, training=True)
        assert torch.allclose(mean, 0.1 * x.mean(0))


def _rounding(expected):
    """A bound of what two ways of rounding once may differ by."""
    return 2 * finfo(expected.dtype).eps * (1 + np.abs(expected.astype(np.float64)))


# ---- what is refused ----

X = np.ones((2, 3, 4), np.float32)
LABELS = np.zeros((2, 4), np.int64)
STATS = np.ones(3, np.float32)
READ_ONLY = np.ones(3, np.float32)
READ_ONLY.setflags(write=False)


def entropy(target=LABELS, **options):
    return fastconv.cross_entropy(X, target, **options)


def norm(mean=STATS, var=STATS, x=X, **options):
    return fastconv.batch_norm(x, mean, var, **options)


BAD = {
    "no array": (lambda: fastconv.relu(1.0), TypeError, "relu: input must be a NumPy"),
    "whole numbers": (lambda: fastconv.relu(LABELS), TypeError, "input.dtype must be float16"),
    "slope": (lambda: fastconv.leaky_relu(X, np.nan), ConvError, "must be a finite number, got nan"),
    "axis": (
        lambda: fastconv.softmax(X, 3), ConvError,
        "softmax: dim must be an axis of the input, from -3 to 2, got 3",
    ),
    "real axis": (
        lambda: fastconv.log_softmax(X, 1.0), TypeError, "log_softmax: dim must be an int, got 1.0",
    ),
    "axes of linear": (
        lambda: fastconv.linear(X[0, 0, :1].reshape(()), X[0]), ConvError,
        "input (..., C) must have at least 1 axis, got 0 (input () float32, weight (3, 4) float32)",
    ),
    "rank of weight": (
        lambda: fastconv.linear(X, X), ConvError,
        "weight (K, C) must have 2 axes (1 without K), got 3 (input (2, 3, 4) float32, weight (2, 3, 4) floa",
    ),
    "size of weight": (
        lambda: fastconv.linear(X, X[0].T), ConvError,
        "linear: weight.shape[-1] must be C = input.shape[-1] = 4, got 3 (input (2, 3, 4), weight (4, 3))",
    ),
    "size of bias": (
        lambda: fastconv.linear(X, X[0], X[0, 0]), ConvError, "bias.shape must be (K,) = (3,), got (4,)",
    ),
    "dtypes": (lambda: fastconv.linear(X, X[0].astype("f8")), TypeError, "weight.dtype must be input.dtype"),
    "reduction": (
        lambda: entropy(reduction="max"), ConvError, "reduction must be one of none, mean, sum, got 'max'",
    ),
    "smoothing": (
        lambda: entropy(label_smoothing=1.5), ConvError, "label_smoothing must be from 0 to 1, got 1.5",
    ),
    "ignore_index": (lambda: entropy(ignore_index=0.5), TypeError, "ignore_index must be an int"),
    "shape of indices": (
        lambda: entropy(LABELS[0]), ConvError,
        "cross_entropy: target.shape of class indices must be (2, 4), got (4,)",
    ),
    "shape of probabilities": (
        lambda: entropy(X[0]), ConvError, "target.shape of probabilities must be (2, 3, 4)",
    ),
    "truth as target": (lambda: entropy(LABELS > 0), TypeError, "class indices or probabilities"),
    "class": (lambda: entropy(LABELS + 3), ConvError, "target must be a class from 0 to 2, got 3"),
    "negative class": (lambda: entropy(LABELS - 1), ConvError, "target must be a class from 0 to 2, got -1"),
    "class weights": (
        lambda: entropy(weight=X[0, 0]), ConvError, "weight.shape must be (C,) = (3,), got (4,)",
    ),
    "no classes": (lambda: fastconv.cross_entropy(X[:, :0], LABELS), ConvError, "at least one class"),
    "no statistics": (lambda: norm(None, None), ConvError, "must be given unless training, got None"),
    "size of statistics": (
        lambda: norm(STATS[:2]), ConvError, "running_mean.shape must be (C,) = (3,), got (2,)",
    ),
    "read-only statistics": (
        lambda: norm(READ_ONLY, training=True), ConvError, "running_mean must be writeable",
    ),
    "one element": (
        lambda: norm(x=X[:1, :, :1], training=True), ConvError, "more than one element per channel",
    ),
    "axes of batch_norm": (lambda: norm(x=X[0, 0]), ConvError, "input (N, C, ...) must have at least 2 axes"),
    "training": (lambda: norm(training=1), TypeError, "training must be True or False"),
    "momentum": (lambda: norm(momentum=None), TypeError, "momentum must be a finite number"),
    "eps": (lambda: norm(eps=np.inf), ConvError, "eps must be a finite number, got inf"),
    "size of response": (
        lambda: fastconv.local_response_norm(X, 0), ConvError, "size must be at least 1, got 0",
    ),
    "axes of response": (lambda: fastconv.local_response_norm(X[0], 2), ConvError, "at least 3 axes, got 2"),
    "chance": (lambda: fastconv.dropout(X, -0.1), ConvError, "dropout: p must be from 0 to 1, got -0.1"),
    "rng": (
        lambda: fastconv.dropout(X, rng="seed"), TypeError, "rng must be a NumPy Generator, a seed or None",
    ),
    "negative seed": (
        lambda: fastconv.dropout(X, rng=-1), ConvError,
        "dropout: rng must be at least 0 where it is a seed, got -1 (input (2, 3, 4))",
    ),
    "truth as a seed": (lambda: fastconv.dropout(X, rng=True), TypeError, "rng must be a NumPy Generator"),
    "dropout in training": (lambda: fastconv.dropout(X, training=None), TypeError, "training must be True"),
    "dims": (
        lambda: fastconv.flatten(X, 2, 1), ConvError, "start_dim must not lie behind end_dim = 1, got 2",
    ),
    "end_dim": (lambda: fastconv.flatten(X, 0, 3), ConvError, "end_dim must be an axis of the input"),
    "axes of interpolate": (
        lambda: fastconv.interpolate(X[0], 2), ConvError, "must have 3, 4 or 5 axes, got 2",
    ),
    "no size": (
        lambda: fastconv.interpolate(X), ConvError, "one of size and scale_factor must be given, got neither",
    ),
    "both sizes": (lambda: fastconv.interpolate(X, 2, 2.0), ConvError, "must be given, got both"),
    "mode": (
        lambda: fastconv.interpolate(X, 2, mode="bilinear"), ConvError,
        "interpolate: mode must be one of nearest, nearest-exact, linear for 1 spatial axes, got 'bilinear'",
    ),
    "size and scale 0": (lambda: fastconv.interpolate(X, 2, 0), ConvError, "must be given, got both"),
    "mode of another type": (
        lambda: fastconv.interpolate(X, 2, mode=3), TypeError,
        "interpolate: mode must be one of nearest, nearest-exact, linear for 1 spatial axes, got 3 of type i",
    ),
    "large size": (
        lambda: fastconv.interpolate(X, 2**70), ConvError, "result must have fewer than 2**60 elements, got ",
    ),
    "large scale": (
        lambda: fastconv.interpolate(X, scale_factor=1e300), ConvError, "fewer than 2**60 elements, got shap",
    ),
    "scale beyond all numbers": (
        lambda: fastconv.interpolate(X, scale_factor=1e308), ConvError, "at least 1 and finite, got (inf,) (",
    ),
    "negative scale": (
        lambda: fastconv.interpolate(X, scale_factor=-1e308), ConvError, "at least 1 and finite, got (-inf,)",
    ),
    "corners": (
        lambda: fastconv.interpolate(X, 2, align_corners=True), ConvError, "must be None for mode 'nearest'",
    ),
    "corners of another type": (
        lambda: fastconv.interpolate(X, 2, mode="linear", align_corners=1), TypeError, "None, True or False",
    ),
    "size 0": (lambda: fastconv.interpolate(X, 0), ConvError, "size must be at least 1, got 0"),
    "scale": (lambda: fastconv.interpolate(X, scale_factor=0.1), ConvError, "the size of the result must be"),
    "scales": (lambda: fastconv.interpolate(X, scale_factor=(2, 2)), ConvError, "len(scale_factor) must be"),
    "axes of unfold": (
        lambda: fastconv.unfold(X[0], 1), ConvError,
        "unfold: input (N, C, H, W) must have 4 axes (3 without N), got 2 (input (3, 4), kernel_size 1)",
    ),
    "no channels": (lambda: fastconv.unfold(X[:0], 1), ConvError, "input.shape[1] must be at least 1, got 0"),
    "large kernel": (
        lambda: fastconv.unfold(X, (3, 2), 2, (0, 1)), ConvError,
        "unfold: the window's extent must be at most padding + H + padding = 0 + 3 + 0 = 3, got 2 * (3 - 1)",
    ),
    "kernel 0": (lambda: fastconv.unfold(X, 0), ConvError, "kernel_size must be at least 1, got 0"),
    "stride 0": (lambda: fastconv.unfold(X, 1, stride=0), ConvError, "stride must be at least 1, got 0"),
    "dilation 0": (lambda: fastconv.unfold(X, 1, (1, 0)), ConvError, "dilation must be at least 1, got 0"),
    "padding -1": (lambda: fastconv.unfold(X, 1, 1, -1), ConvError, "padding must be at least 0, got -1"),
    "kernels": (lambda: fastconv.unfold(X, (1, 1, 1)), ConvError, "len(kernel_size) must be the number of"),
    "kernel of another type": (lambda: fastconv.unfold(X, 2.0), TypeError, "unfold: kernel_size must be an"),
    "large padding": (
        lambda: fastconv.unfold(X, 1, padding=2**70), ConvError, "its padding must have fewer than 2**60",
    ),
    "large fold": (
        lambda: fastconv.fold(X, 2**70, 1, stride=2**70), ConvError, "fewer than 2**60 elements, got (11805",
    ),
    "axes of fold": (
        lambda: fastconv.fold(X[0, 0], 2, 1), ConvError,
        "fold: input (N, C * R * S, L) must have 3 axes (2 without N), got 1",
    ),
    "rows of fold": (
        lambda: fastconv.fold(X, (2, 3), (1, 2)), ConvError,
        "fold: input.shape[-2] must be a multiple of R * S = 1 * 2 = 2, got 3 (input (2, 3, 4), output_size",
    ),
    "columns of fold": (
        lambda: fastconv.fold(X, (2, 3), 1), ConvError,
        "fold: input.shape[-1] must be L = P * Q = 2 * 3 = 6, got 4",
    ),
    "size of fold": (lambda: fastconv.fold(X, (4, 0), 1), ConvError, "output_size must be at least 1, got 0"),
    "sizes of fold": (lambda: fastconv.fold(X, X.shape, 1), ConvError, "len(output_size) must be the number"),
    "window of fold": (lambda: fastconv.fold(X, 2, 3), ConvError, "padding + H + padding = 0 + 2 + 0 = 2"),
    "scale of another type": (lambda: fastconv.interpolate(X, scale_factor="2"), TypeError, "finite number"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=list(BAD))
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_statistics_are_written_last(monkeypatch):
    def fail(loan, result):
        raise MemoryError

    monkeypatch.setattr(borrowing.Loan, "give", fail)
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    with pytest.raises(MemoryError):
        fastconv.batch_norm(X, mean, var, training=True)
    assert (mean.tolist(), var.tolist()) == ([0, 0, 0], [1, 1, 1])


def test_statistics_are_not_touched_by_a_bad_call():
    mean = np.zeros(3, np.float32)
    for bad in ({"running_var": READ_ONLY}, {"eps": np.inf}, {"momentum": np.nan}, {"bias": STATS[:2]}):
        with pytest.raises(ConvError):
            fastconv.batch_norm(X, mean, **{"running_var": STATS, "training": True, **bad})
    assert not mean.any()


# ---- torch ----


class TestAgainstTorch:
    @pytest.fixture(autouse=True)
    def functional(self):
        self.torch = pytest.importorskip("torch")
        return self.torch.nn.functional

    @pytest.mark.parametrize("target", ["indices", "probabilities"])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
    def test_cross_entropy(self, functional, target, reduction, label_smoothing, rng):
        x, weight = normals(rng, (4, 5, 3), "float64"), rng.random(5)
        labels = rng.integers(-1, 5, (4, 3)) if target == "indices" else rng.random(x.shape)
        options = {"ignore_index": -1, "reduction": reduction, "label_smoothing": label_smoothing}
        found = fastconv.cross_entropy(x, labels, weight, **options)
        wanted = functional.cross_entropy(*map(self.torch.from_numpy, (x, labels, weight)), **options).numpy()
        assert_bounded(np.asarray(found), wanted, 1e-13)

    @pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
    @pytest.mark.parametrize("align_corners", [None, False, True])
    def test_interpolate(self, functional, mode, align_corners, rng):
        if "nearest" in mode:
            align_corners = None
        for _ in range(20):
            x = normals(rng, (2, 3, *rng.integers(1, 12, 2)), "float64")
            size = tuple(rng.integers(1, 20, 2).tolist())
            wanted = functional.interpolate(self.torch.from_numpy(x), size, None, mode, align_corners).numpy()
            assert_bounded(fastconv.interpolate(x, size, None, mode, align_corners), wanted, 1e-13)

    def test_scale_factor_itself_is_the_scale(self, functional, rng):
        """And not the ratio of the sizes, which are rounded."""
        x = normals(rng, (1, 2, 7, 9), "float64")
        for scale in (1.3, 0.7, 2.6):
            wanted = functional.interpolate(self.torch.from_numpy(x), scale_factor=scale, mode="bilinear")
            found = fastconv.interpolate(x, scale_factor=scale, mode="bilinear")
            assert_bounded(found, wanted.numpy(), 1e-13)
            wanted = functional.interpolate(self.torch.from_numpy(x), scale_factor=scale)
            assert_exact(fastconv.interpolate(x, scale_factor=scale), wanted.numpy())

    @pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
    @pytest.mark.parametrize("align_corners", [None, True])
    def test_sizes_that_stay_and_double(self, functional, mode, align_corners, rng):
        """Whatever the scale they are copied and repeated."""
        if "nearest" in mode:
            align_corners = None
        for size, scale in itertools.product(range(1, 10), (1.1, 1.3, 2.1)):
            x, options = normals(rng, (1, 2, size, 5), "float64"), (None, (scale, 2.0), mode, align_corners)
            tensor = self.torch.tensor(x, requires_grad=True)
            wanted = functional.interpolate(tensor, *options)
            assert_bounded(fastconv.interpolate(x, *options), wanted.detach().numpy(), 1e-13)
            gradient = normals(rng, wanted.shape, "float64")
            wanted.backward(self.torch.from_numpy(gradient))
            found = fastconv.grad.interpolate_input(x.shape, gradient, *options)
            assert_bounded(found, tensor.grad.numpy(), 1e-13)

    @pytest.mark.parametrize("numbers", [[1.0, np.inf], [np.inf, 1.0], [np.nan, 1.0]])
    def test_a_size_that_stays_mixes_no_neighbours(self, functional, numbers):
        x = np.array([[numbers]])
        wanted = functional.interpolate(self.torch.from_numpy(x), 2, mode="linear").numpy()
        assert np.array_equal(fastconv.interpolate(x, 2, mode="linear"), wanted, equal_nan=True)

    @pytest.mark.parametrize("training", [True, False])
    def test_batch_norm(self, functional, training, rng):
        x, stats = normals(rng, (3, 4, 5, 6), "float64"), rng.random((4, 4)) + 0.5
        arrays, tensors = stats.copy(), self.torch.tensor(stats)
        found = fastconv.batch_norm(x, *arrays, training=training)
        wanted = functional.batch_norm(self.torch.from_numpy(x), *tensors, training=training).numpy()
        assert_bounded(found, wanted, 1e-12)
        assert_bounded(arrays, tensors.numpy(), 1e-13)

    def test_unfold_and_fold(self, functional, rng):
        for _ in range(50):
            kernel, dilation, stride = rng.integers(1, 4, (3, 2))
            padding = rng.integers(0, 4, 2)
            sizes = tuple((dilation * (kernel - 1) + 1 + rng.integers(0, 6, 2)).tolist())
            options = [tuple(value.tolist()) for value in (kernel, dilation, padding, stride)]
            x = integers(rng, (2, 3, *sizes))
            columns = functional.unfold(self.torch.from_numpy(x), *options)
            assert_exact(fastconv.unfold(x, *options), columns.numpy())
            images = functional.fold(columns, sizes, *options)
            assert_exact(fastconv.fold(columns.numpy(), sizes, *options), images.numpy())

    @pytest.mark.parametrize("size", [1, 4, 5, 12])
    def test_local_response_norm(self, functional, size, rng):
        x = normals(rng, (2, 6, 3, 4), "float64")
        wanted = functional.local_response_norm(self.torch.from_numpy(x), size, 0.3, 0.6, 1.2).numpy()
        assert_bounded(fastconv.local_response_norm(x, size, 0.3, 0.6, 1.2), wanted, 1e-14)
