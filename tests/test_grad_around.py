"""Gradients of what stands around convolutions, by finite differences, and against torch's autograd."""

import math
import re

import numpy as np
import pytest

import fastconv
from fastconv import ConvError, grad
from tests import cuda_stand_in
from tests.backends import EMULATOR
from tests.compare import assert_bounded, assert_exact, finfo, normals
from tests.places import everywhere

STEP = 1e-6
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "silu", "gelu", "sigmoid", "tanh")


def differences(function, x, gradient):
    """The gradient of sum(function(x) * gradient) with respect to x (float64), by central differences."""
    result = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[at] += sign * STEP
            ends.append(np.sum(function(moved) * gradient))
        result[at] = (ends[0] - ends[1]) / (2 * STEP)
    return result


def assert_gradient(found, function, x, gradient):
    """Equal to the differences, as far as these are right."""
    expected = differences(function, x, gradient)
    assert_bounded(np.asarray(found), expected, 1e-7 * (1 + np.abs(expected)))


def away_from_edges(rng, shape):
    """Numbers at which every activation has a derivative: none next to 0 or 6."""
    x = 4 * normals(rng, shape, "float64")
    return np.where(np.abs(x % 6) < 0.01, x + 0.1, x)


class TestActivations:
    @pytest.mark.parametrize("name", ACTIVATIONS)
    @everywhere
    def test_by_differences(self, place, name, rng):
        x, gradient = away_from_edges(rng, (3, 4, 5)), normals(rng, (3, 4, 5), "float64")
        slope = (0.3,) if name == "leaky_relu" else ()
        found = getattr(grad, f"{name}_input")(place.make(x), place.make(gradient), *slope)
        function = getattr(fastconv, name)
        assert_gradient(place.host(found), lambda x: function(x, *slope), x, gradient)

    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_of_half_types_and_in_memory_order(self, name, rng):
        x, gradient = normals(rng, (2, 3, 4, 5)), normals(rng, (2, 3, 4, 5))
        function = getattr(grad, f"{name}_input")
        half = function(x.astype(np.float16), gradient.astype(np.float16))
        assert half.dtype == np.float16
        assert_bounded(half.astype("float64"), function(x, gradient).astype("float64"), 0.02)
        last = [np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) for a in (x, gradient)]
        assert np.moveaxis(function(*last), 1, -1).flags.c_contiguous


class TestSoftmax:
    @pytest.mark.parametrize("dim", [0, 1, -1])
    @pytest.mark.parametrize("name", ["softmax", "log_softmax"])
    @everywhere
    def test_by_differences(self, place, name, dim, rng):
        x, gradient = normals(rng, (3, 4, 5), "float64"), normals(rng, (3, 4, 5), "float64")
        found = getattr(grad, f"{name}_input")(place.make(x), place.make(gradient), dim)
        assert_gradient(place.host(found), lambda x: getattr(fastconv, name)(x, dim), x, gradient)

    def test_without_axes(self):
        one = np.array(2.0)
        assert grad.softmax_input(one, one, 0) == grad.log_softmax_input(one, one, 0) == 0


class TestLinear:
    @pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
    @everywhere
    def test_by_differences(self, place, shape, rng):
        x, w, b = (normals(rng, shape, "float64") for shape in (shape, (5, 4), (5,)))
        gradient = normals(rng, (*shape[:-1], 5), "float64")
        found = grad.linear_input(place.make(w), place.make(gradient))
        assert_gradient(place.host(found), lambda x: fastconv.linear(x, w, b), x, gradient)
        found = grad.linear_weight(place.make(x), place.make(gradient))
        assert_gradient(place.host(found), lambda w: fastconv.linear(x, w, b), w, gradient)
        found = grad.linear_bias(place.make(gradient))
        assert_gradient(place.host(found), lambda b: fastconv.linear(x, w, b), b, gradient)

    @pytest.mark.parametrize("outer", [(), (3,), (2, 3)])
    @everywhere
    def test_one_row_of_weights(self, place, outer, rng):
        w, x = normals(rng, (4,), "float64"), normals(rng, (*outer, 4), "float64")
        gradient = np.asarray(normals(rng, outer, "float64"))
        found = place.host(grad.linear_input(place.make(w), place.make(gradient)))
        assert_gradient(found, lambda x: fastconv.linear(x, w), x, gradient)
        found = place.host(grad.linear_weight(place.make(x), place.make(gradient)))
        assert_gradient(found, lambda w: fastconv.linear(x, w), w, gradient)

    @pytest.mark.parametrize(("outputs", "channels"), [(0, 4), (5, 0), (0, 0)])
    def test_no_outputs_and_no_channels(self, outputs, channels):
        x, gradient = np.ones((2, 3, channels)), np.ones((2, 3, outputs))
        assert grad.linear_weight(x, gradient).shape == (outputs, channels)
        assert grad.linear_bias(gradient).tolist() == [6.0] * outputs


class TestCrossEntropy:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
    @pytest.mark.parametrize("form", ["indices", "probabilities"])
    @everywhere
    def test_by_differences(self, place, form, label_smoothing, reduction, rng):
        x, weight = normals(rng, (3, 4, 2), "float64"), rng.random(4)
        target = rng.integers(-1, 4, (3, 2)) if form == "indices" else rng.random((3, 4, 2))
        options = {"ignore_index": -1, "reduction": reduction, "label_smoothing": label_smoothing}
        gradient = normals(rng, (3, 2) if reduction == "none" else (), "float64") + np.zeros(())
        arguments = map(place.make, (x, target, weight, np.asarray(gradient)))
        found = place.host(grad.cross_entropy_input(*arguments, **options))
        assert_gradient(found, lambda x: fastconv.cross_entropy(x, target, weight, **options), x, gradient)

    def test_the_loss_itself_is_what_is_made_smaller(self, rng):
        x, target = normals(rng, (5, 3), "float64"), np.array([0, 2, 1, 0, 2])
        found = grad.cross_entropy_input(x, target)
        assert_gradient(found, lambda x: fastconv.cross_entropy(x, target), x, 1.0)
        assert fastconv.cross_entropy(x - 0.1 * found, target) < fastconv.cross_entropy(x, target)

    def test_a_loss_may_be_its_own_gradient(self, rng):
        """A result without axes is a number of NumPy's, and as good as an array without axes."""
        x, target = normals(rng, (5, 3), "float64"), np.array([0, 2, 1, 0, 2])
        loss = fastconv.cross_entropy(x, target)
        found = grad.cross_entropy_input(x, target, None, loss)
        assert_bounded(found, loss * grad.cross_entropy_input(x, target), 1e-14)

    def test_of_what_is_ignored(self):
        found = grad.cross_entropy_input(np.zeros((2, 3)), np.array([-100, -100]))
        assert_exact(found, np.zeros((2, 3)))


class TestBatchNorm:
    @pytest.mark.parametrize("shape", [(6, 3), (2, 3, 2, 2)])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("is_scaled", [True, False])
    @everywhere
    def test_by_differences(self, place, is_scaled, training, shape, rng):
        x, gradient = normals(rng, shape, "float64"), normals(rng, shape, "float64")
        mean, var, weight, bias = rng.random((4, 3)) + 0.5
        if not is_scaled:
            weight = np.ones(3)

        def run(x, weight, bias):
            return fastconv.batch_norm(x, mean.copy(), var.copy(), weight, bias, training, eps=1e-2)

        given = [place.make(array) for array in (x, mean, var)]
        scale = place.make(weight) if is_scaled else None
        found = grad.batch_norm(*given, scale, place.make(gradient), training, eps=1e-2)
        of_input, of_weight, of_bias = map(place.host, found)
        assert_gradient(of_input, lambda x: run(x, weight, bias), x, gradient)
        assert_gradient(of_weight, lambda weight: run(x, weight, bias), weight, gradient)
        assert_gradient(of_bias, lambda bias: run(x, weight, bias), bias, gradient)

    def test_statistics_stay_as_they_are(self, rng):
        x, mean, var = normals(rng, (4, 3)), np.zeros(3, np.float32), np.ones(3, np.float32)
        grad.batch_norm(x, mean, var, None, x, training=True)
        assert (mean.tolist(), var.tolist()) == ([0, 0, 0], [1, 1, 1])

    def test_statistics_are_not_looked_at_in_training(self, rng):
        x = normals(rng, (4, 3))
        frozen, other = np.zeros(3, np.float32), np.zeros(2)
        frozen.setflags(write=False)
        expected = grad.batch_norm(x, None, None, None, x, training=True)
        for array, wanted in zip(grad.batch_norm(x, frozen, other, None, x, training=True), expected):
            assert np.array_equal(array, wanted)

    def test_many_samples_in_float32(self, rng):
        """Sums are taken in float64: with channels last NumPy adds element by element, and float32 drifts."""
        x = np.moveaxis(normals(rng, (64, 40, 40, 2)), -1, 1)
        gradient = np.moveaxis((1000 + normals(rng, (64, 40, 40, 2))).astype(np.float32), -1, 1)
        of_bias = grad.batch_norm(x, None, None, None, gradient, training=True)[2]
        exact = gradient.sum((0, 2, 3), dtype=np.float64)
        assert_bounded(of_bias, exact, finfo("float32").eps * exact, "float32")

    def test_no_samples(self):
        none = np.zeros((0, 3), np.float32)
        found = grad.batch_norm(none, None, None, None, none, training=True)
        assert [array.shape for array in found] == [(0, 3), (3,), (3,)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
@everywhere
def test_local_response_norm(place, size, rng):
    x, gradient = normals(rng, (2, 6, 3), "float64"), normals(rng, (2, 6, 3), "float64")
    options = {"alpha": 0.5, "beta": 0.7, "k": 1.5}
    found = grad.local_response_norm_input(place.make(x), place.make(gradient), size, **options)
    assert_gradient(
        place.host(found), lambda x: fastconv.local_response_norm(x, size, **options), x, gradient
    )


@everywhere
def test_dropout(place, rng):
    """A seed means the same elements: the gradient is the dropout of the gradient."""
    x, gradient = normals(rng, (5, 6), "float64"), normals(rng, (5, 6), "float64")
    _, mask = fastconv.dropout(place.make(x), 0.3, rng=5, return_mask=True)
    mask = place.make(place.host(mask))
    found = place.host(grad.dropout_input(mask, place.make(gradient), 0.3))
    assert_exact(found, fastconv.dropout(gradient, 0.3, rng=5))
    assert_gradient(found, lambda x: fastconv.dropout(x, 0.3, rng=5), x, gradient)


@everywhere
def test_dropout_keeps_the_memory_order_of_the_gradient(place, rng):
    gradient, mask = np.moveaxis(normals(rng, (2, 5, 4, 3)), -1, 1), rng.random((2, 3, 5, 4)) < 0.5
    found = place.host(grad.dropout_input(place.make(mask), place.make(gradient)))
    assert np.moveaxis(found, 1, -1).flags.c_contiguous
    assert_exact(found, np.where(mask, 2.0 * gradient, 0.0), "float32")


def test_dropout_without_training(rng):
    x, gradient = normals(rng, (5, 6)), normals(rng, (5, 6))
    y, mask = fastconv.dropout(x, 0.5, False, return_mask=True)
    assert_exact(y, x.astype("float64"), "float32")
    assert_exact(grad.dropout_input(mask, gradient, 0.5, False), gradient.astype("float64"), "float32")


@everywhere
def test_flatten(place, rng):
    gradient = normals(rng, (2, 60))
    found = grad.flatten_input((2, 3, 4, 5), place.make(gradient))
    assert_exact(place.host(found), gradient.reshape(2, 3, 4, 5))


@pytest.mark.parametrize(
    "options", [(2,), ((2, 3), 1, (1, 2), 2), (2, (1, 3), 1)], ids=["plain", "steps", "dilated"]
)
@everywhere
def test_unfold_and_fold(place, options, rng):
    x = normals(rng, (2, 3, 4, 5), "float64")
    columns = fastconv.unfold(x, *options)
    gradient = normals(rng, columns.shape, "float64")
    found = place.host(grad.unfold_input(x.shape, place.make(gradient), *options))
    assert_gradient(found, lambda x: fastconv.unfold(x, *options), x, gradient)
    found = place.host(grad.unfold_input(x.shape[1:], place.make(gradient[0]), *options))
    assert_gradient(found, lambda x: fastconv.unfold(x, *options), x[0], gradient[0])
    gradient = normals(rng, x.shape, "float64")
    found = place.host(grad.fold_input(place.make(gradient), *options))
    assert_gradient(found, lambda c: fastconv.fold(c, (4, 5), *options), columns, gradient)


class TestInterpolate:
    @pytest.mark.parametrize(
        ("sizes", "size", "mode"),
        [
            ((5,), (8,), "linear"),
            ((4, 3), (3, 7), "bilinear"),
            ((3, 1), (1, 9), "bilinear"),
            ((2, 3, 2), (4, 2, 5), "trilinear"),
            ((4, 3), (9, 3), "nearest"),
            ((7,), (3,), "nearest-exact"),
        ],
    )
    @pytest.mark.parametrize("align_corners", [None, True])
    @pytest.mark.parametrize("order", ["NCHW", "NHWC"])
    @everywhere
    def test_by_differences(self, place, sizes, size, mode, align_corners, order, rng):
        if align_corners and "nearest" in mode:
            align_corners = None
        x, gradient = normals(rng, (2, 3, *sizes), "float64"), normals(rng, (2, 3, *size), "float64")
        if order == "NHWC":
            gradient = np.moveaxis(np.ascontiguousarray(np.moveaxis(gradient, 1, -1)), -1, 1)
        options = size, None, mode, align_corners
        found = place.host(grad.interpolate_input(x.shape, place.make(gradient), *options))
        assert_gradient(found, lambda x: fastconv.interpolate(x, *options), x, gradient)
        if order == "NHWC" and math.prod(size) > 1:
            assert np.moveaxis(found, 1, -1).flags.c_contiguous

    def test_scale_factor(self, rng):
        x, gradient = normals(rng, (1, 2, 3, 4), "float64"), normals(rng, (1, 2, 6, 5), "float64")
        options = {"scale_factor": (2, 1.3), "mode": "bilinear"}
        found = grad.interpolate_input(x.shape, gradient, **options)
        assert_gradient(found, lambda x: fastconv.interpolate(x, **options), x, gradient)


def test_a_step_downhill(rng):
    """A small network, trained by hand: pooling, norm, activation and loss, and the loss falls."""
    x, labels = normals(rng, (8, 4, 6, 6), "float64"), rng.integers(0, 3, 8)
    weight, bias = 0.1 * normals(rng, (3, 16), "float64"), np.zeros(3)
    scale, shift = np.ones(4), np.zeros(4)
    losses = []
    for _ in range(20):
        normal = fastconv.batch_norm(x, None, None, scale, shift, training=True)
        active = fastconv.relu(normal)
        pooled, indices = fastconv.max_pool2d(active, 3, return_indices=True)
        flat = fastconv.flatten(pooled, 1)
        logits = fastconv.linear(flat, weight, bias)
        losses.append(fastconv.cross_entropy(logits, labels))
        of_logits = grad.cross_entropy_input(logits, labels)
        of_flat = grad.linear_input(weight, of_logits)
        of_weight, of_bias = grad.linear_weight(flat, of_logits), grad.linear_bias(of_logits)
        of_pooled = grad.flatten_input(pooled.shape, of_flat)
        of_active = grad.max_pool2d_input(active.shape, indices, of_pooled, 3)
        of_normal = grad.relu_input(normal, of_active)
        _, of_scale, of_shift = grad.batch_norm(x, None, None, scale, of_normal, training=True)
        for parameter, gradient in (
            (weight, of_weight),
            (bias, of_bias),
            (scale, of_scale),
            (shift, of_shift),
        ):
            parameter -= 0.5 * gradient
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("kind", cuda_stand_in.KINDS)
@pytest.mark.emulator
@pytest.mark.parametrize("place", [EMULATOR], indirect=True)
def test_every_kind_on_a_device(place, kind, rng, monkeypatch):
    """Tensors and arrays give gradients in their own kind; those of a layer are the three of one call."""
    kind = cuda_stand_in.make_kind(kind, [], monkeypatch)
    x, gradient, weight = normals(rng, (4, 3)), normals(rng, (4, 3)), normals(rng, (3,))
    expected = grad.batch_norm(x, None, None, weight, gradient, training=True)
    found = grad.batch_norm(kind.make(x), None, None, kind.make(weight), kind.make(gradient), training=True)
    for result, wanted in zip(found, expected):
        if kind.name == "torch CUDA":
            assert type(result) is kind.result
        assert_bounded(kind.host(result), wanted.astype("float64"), 1e-5, "float32")


# ---- what is refused ----

X = np.ones((2, 3), np.float32)
SIZE = (2, 3, 4)

BAD = {
    "shape": (
        lambda: grad.relu_input(X, X[:1]), ConvError,
        "relu_input: grad_output.shape must be input.shape = (2, 3), got (1, 3) (input (2, 3) float32, grad_",
    ),
    "dtype": (lambda: grad.relu_input(X, X.astype("f8")), TypeError, "grad_output.dtype must be input.dtype"),
    "slope": (lambda: grad.leaky_relu_input(X, X, None), TypeError, "leaky_relu_input: slope of"),
    "axis": (lambda: grad.softmax_input(X, X, 2), ConvError, "softmax_input: dim must be an axis"),
    "axis of logarithms": (lambda: grad.log_softmax_input(X, X, 2), ConvError, "log_softmax_input: dim must"),
    "outputs": (
        lambda: grad.linear_input(X, X), ConvError, "grad_output.shape[-1:] must be (K,) = (2,), got (3,)",
    ),
    "outer axes": (
        lambda: grad.linear_weight(X, X[:1]), ConvError, "must be input.shape[:-1] = (2,), got (1,)",
    ),
    "no axes": (
        lambda: grad.linear_weight(X, X[0, :1].reshape(())), ConvError,
        "linear_weight: grad_output.shape[:-1] must be input.shape[:-1] = (2,), got () (input (2, 3), grad",
    ),
    "axes of a bias": (lambda: grad.linear_bias(X[0, :1].reshape(())), ConvError, "at least 1 axis, got 0"),
    "shape of a loss": (
        lambda: grad.cross_entropy_input(X, np.array([0, 1]), None, X), ConvError,
        "cross_entropy_input: grad_output.shape must be that of the loss = (), got (2, 3) (input (2, 3) floa",
    ),
    "shape of a norm": (
        lambda: grad.batch_norm(X, None, None, None, X[:1], training=True), ConvError, "must be input.shape",
    ),
    "statistics": (lambda: grad.batch_norm(X, None, None, None, X), ConvError, "given unless training"),
    "mask": (lambda: grad.dropout_input(X, X), TypeError, "mask must hold True and False"),
    "shape of a mask": (lambda: grad.dropout_input(X[:1] > 0, X), ConvError, "must be mask.shape = (1, 3)"),
    "chance": (lambda: grad.dropout_input(X > 0, X, 2.0), ConvError, "p must be from 0 to 1, got 2.0"),
    "training": (lambda: grad.dropout_input(X > 0, X, training=1), TypeError, "training must be True or"),
    "elements": (lambda: grad.flatten_input((2, 4), X), ConvError, "as grad_output (2, 3) = 6"),
    "large sizes": (lambda: grad.flatten_input((2**70, 0), X[:0]), ConvError, "fewer than 2**60 elements"),
    "large size of a resize": (
        lambda: grad.interpolate_input((2, 3, 2**70), np.ones(SIZE), 4), ConvError, "fewer than 2**60",
    ),
    "negative sizes": (
        lambda: grad.flatten_input((-2, -3), X), ConvError,
        "flatten_input: input_size must be at least 0 along every axis, got -3 (input_size (-2, -3), grad_ou",
    ),
    "size": (lambda: grad.flatten_input(6, X), TypeError, "input_size must be a tuple of ints, got 6"),
    "size of a result": (
        lambda: grad.interpolate_input(SIZE, np.ones((2, 3, 7)), 8), ConvError,
        "grad_output.shape must be that of the result = (2, 3, 8), got (2, 3, 7) (input_size (2, 3, 4), grad",
    ),
    "size of unfold": (
        lambda: grad.unfold_input((2, 2, 2), X, 1), ConvError,
        "unfold_input: grad_output.shape must be that of the output = (2, 4), got (2, 3)",
    ),
    "axes of unfold": (
        lambda: grad.unfold_input((1, 3), X, 1), ConvError,
        "unfold_input: input (N, C, H, W) must have 4 axes",
    ),
    "kernel of unfold": (
        lambda: grad.unfold_input((2, 1, 3), X, 2), ConvError, "padding + H + padding = 0 + 1 + 0 = 1, got",
    ),
    "axes of fold": (
        lambda: grad.fold_input(X, 1), ConvError, "fold_input: grad_output (N, C, H, W) must have 4 axes",
    ),
    "size of response": (
        lambda: grad.local_response_norm_input(np.ones(SIZE), np.ones(SIZE), 0), ConvError,
        "size must be at least 1, got 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=list(BAD))
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_every_gradient_is_listed():
    """Those of pooling are tested in test_pool.py."""
    names = {name for name in vars(grad) if not name.startswith("_") and name != "annotations"}
    pools = {f"{pool}_pool{axes}d" for pool in ("max", "avg", "adaptive_avg") for axes in (1, 2, 3)}
    pools |= {"adaptive_max_pool1d", "adaptive_max_pool2d", "max_unpool2d"}
    others = {*ACTIVATIONS, "softmax", "log_softmax", "linear", "cross_entropy", "local_response_norm"}
    others |= {"dropout", "flatten", "interpolate", "unfold", "fold"}
    assert names >= {f"{name}_input" for name in pools | others} | {
        "linear_weight",
        "linear_bias",
        "batch_norm",
    }


# ---- torch ----


class TestAgainstTorch:
    """Of numbers of every kind, at which differences say nothing."""

    @pytest.fixture(autouse=True)
    def torch(self):
        self.torch = pytest.importorskip("torch")
        return self.torch

    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_special_numbers(self, torch, name):
        x = np.array([np.inf, -np.inf, 0.0, -0.0, 6.0, 50.0, -50.0, np.nan])
        if name == "relu6":
            x = x[:-1]  # of whose gradient at NaN torch has two opinions, by the length of the array
        tensor, gradient = torch.tensor(x, requires_grad=True), np.full(len(x), 3.0)
        getattr(torch.nn.functional, name)(tensor).backward(torch.tensor(gradient))
        found = getattr(grad, f"{name}_input")(x, gradient)
        assert_bounded(found, tensor.grad.numpy(), 1e-13)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
    def test_cross_entropy(self, torch, label_smoothing, reduction, rng):
        x, weight = normals(rng, (6, 5), "float64"), rng.random(5)
        labels = np.array([0, 1, -100, 4, 2, -100])
        tensor = torch.tensor(x, requires_grad=True)
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        targets = torch.tensor(labels), torch.tensor(weight)
        torch.nn.functional.cross_entropy(tensor, *targets, **options).backward()
        assert_bounded(grad.cross_entropy_input(x, labels, weight, **options), tensor.grad.numpy(), 1e-14)

    @pytest.mark.parametrize("training", [True, False])
    def test_batch_norm(self, torch, training, rng):
        x, gradient = normals(rng, (3, 4, 5, 6), "float64"), normals(rng, (3, 4, 5, 6), "float64")
        mean, var, weight, bias = rng.random((4, 4)) + 0.5
        tensors = [torch.tensor(array, requires_grad=True) for array in (x, weight, bias)]
        running = torch.tensor(mean), torch.tensor(var)
        y = torch.nn.functional.batch_norm(tensors[0], *running, *tensors[1:], training=training)
        y.backward(torch.tensor(gradient))
        found = grad.batch_norm(x, mean, var, weight, gradient, training=training)
        for array, tensor in zip(found, tensors):
            assert_bounded(array, tensor.grad.numpy(), 1e-12)

    @pytest.mark.parametrize("mode", ["nearest", "bilinear"])
    def test_interpolate(self, torch, mode, rng):
        for _ in range(10):
            x = normals(rng, (2, 3, *rng.integers(1, 9, 2)), "float64")
            size = tuple(rng.integers(1, 20, 2).tolist())
            gradient = normals(rng, (2, 3, *size), "float64")
            tensor = torch.tensor(x, requires_grad=True)
            torch.nn.functional.interpolate(tensor, size, mode=mode).backward(torch.tensor(gradient))
            found = grad.interpolate_input(x.shape, gradient, size, mode=mode)
            assert_bounded(found, tensor.grad.numpy(), 1e-12)

    def test_tensors(self, torch, rng):
        x, gradient = (torch.tensor(normals(rng, (4, 5))) for _ in range(2))
        found = grad.gelu_input(x, gradient)
        assert type(found) is torch.Tensor
        tensor = x.clone().requires_grad_()
        torch.nn.functional.gelu(tensor).backward(gradient)
        assert torch.allclose(found, tensor.grad, atol=1e-6)
