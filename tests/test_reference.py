"""The reference against seven plain loops, against torch where there is one, and against mathematics."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings

from fastconv import reference
from fastconv.problem import ACTIVATIONS, ConvError
from tests.cases import CASES, operands, options_of
from tests.compare import assert_bounded, assert_exact, foreign_layouts, integers, layouts, normals
from tests.strategies import problems

FORWARD = {1: reference.conv1d, 2: reference.conv2d, 3: reference.conv3d}
INPUT = {1: reference.conv1d_input, 2: reference.conv2d_input, 3: reference.conv3d_input}
WEIGHT = {1: reference.conv1d_weight, 2: reference.conv2d_weight, 3: reference.conv3d_weight}

small_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.problem().macs < 20_000], ids=str
)
all_cases = pytest.mark.parametrize("case", CASES, ids=str)


def seven_loops(problem, x, w):
    """The definition: a loop per letter (N, K, O, P, Q; C // groups, T, R, S), and an if for the padding."""
    x, w = x.reshape(problem.input_shape5), w.reshape(problem.weight_shape5)
    y = np.zeros(problem.output_shape5)
    channels = problem.C // problem.groups
    for n, k, *outputs in itertools.product(*map(range, problem.output_shape5)):
        first = k // (problem.K // problem.groups) * channels
        for c, *tap in itertools.product(*map(range, (channels, problem.T, problem.R, problem.S))):
            where = [
                out * stride + t * dilation - before
                for out, stride, t, dilation, (before, _) in zip(
                    outputs, problem.stride, tap, problem.dilation, problem.padding, strict=True
                )
            ]
            if all(0 <= at < size for at, size in zip(where, problem.input_shape5[2:], strict=True)):
                y[(n, k, *outputs)] += x[(n, first + c, *where)] * w[(k, c, *tap)]
    return y.reshape(problem.output_shape)


@small_cases
def test_forward_is_the_seven_loops(rng, case):
    problem = case.problem()
    x, w, bias, residual = operands(rng, problem, integers)
    actual = FORWARD[problem.ndim](x, w, bias, residual=residual, **options_of(problem))
    column = bias.reshape((-1,) + (1,) * problem.ndim)
    assert_exact(actual, seven_loops(problem, x, w) + column + residual)


@given(problems())
@settings(max_examples=25)
def test_any_problem_is_the_seven_loops(problem):
    if problem.macs > 30_000:
        return
    x, w, _, _ = operands(np.random.default_rng(problem.macs), problem, integers)
    assert_exact(FORWARD[problem.ndim](x, w, **options_of(problem)), seven_loops(problem, x, w))


@all_cases
def test_passes_are_adjoint(rng, case):
    """<conv(x, w), g> = <x, grad_input(w, g)> = <w, grad_weight(x, g)>, exactly on integers."""
    problem = case.problem()
    x, w, _, g = operands(rng, problem, integers)
    options = options_of(problem)
    y = FORWARD[problem.ndim](x, w, **options)
    grad_x = INPUT[problem.ndim](x.shape, w, g, **options)
    grad_w = WEIGHT[problem.ndim](x, w.shape, g, **options)
    assert (grad_x.shape, grad_w.shape) == (x.shape, w.shape)
    product = (y * g).sum()
    assert product == (x * grad_x).sum() == (w * grad_w).sum()
    if problem.N:
        assert product != 0


@given(problems())
def test_passes_of_any_problem_are_adjoint(problem):
    x, w, _, g = operands(np.random.default_rng(problem.macs), problem, integers)
    options = options_of(problem)
    product = (FORWARD[problem.ndim](x, w, **options) * g).sum()
    assert product == (x * INPUT[problem.ndim](x.shape, w, g, **options)).sum()
    assert product == (w * WEIGHT[problem.ndim](x, w.shape, g, **options)).sum()


@pytest.mark.parametrize(
    "name", ["stride_per_axis", "dilated", "groups", "padding_pairs", "conv1d", "conv3d_mixed"]
)
def test_gradients_are_finite_differences(rng, name):
    """The sum is linear in x and in w: one unit more of one element changes it by exactly the gradient."""
    problem = next(case for case in CASES if case.name == name).problem()
    x, w, _, g = operands(rng, problem, integers)
    options = options_of(problem)

    def loss(x, w):
        return (FORWARD[problem.ndim](x, w, **options) * g).sum()

    grad_x = INPUT[problem.ndim](x.shape, w, g, **options)
    grad_w = WEIGHT[problem.ndim](x, w.shape, g, **options)
    for _ in range(10):
        at_x, at_w = (tuple(rng.integers(size) for size in array.shape) for array in (x, w))
        step_x, step_w = np.zeros_like(x), np.zeros_like(w)
        step_x[at_x] = step_w[at_w] = 1
        assert loss(x + step_x, w) - loss(x, w) == grad_x[at_x]
        assert loss(x, w + step_w) - loss(x, w) == grad_w[at_w]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip(
        "torch", reason="torch is not installed: the reference is not compared with it"
    )


def torch_forward(torch, problem, x, w):
    """torch's convolution in float64; it pads both sides alike, so that the input is padded beforehand."""
    functional = torch.nn.functional
    axes = slice(3 - problem.ndim, None)
    pads = [number for pair in reversed(problem.padding[axes]) for number in pair]
    conv = getattr(functional, f"conv{problem.ndim}d")
    options = {"stride": problem.stride[axes], "dilation": problem.dilation[axes], "groups": problem.groups}
    return conv(functional.pad(x, pads), w, **options)


@all_cases
def test_three_passes_are_torch(torch, rng, case):
    problem = case.problem()
    x, w, _, g = operands(rng, problem, integers)
    tx, tw = (torch.from_numpy(array.astype("float64")).requires_grad_() for array in (x, w))
    y = torch_forward(torch, problem, tx, tw)
    y.backward(torch.from_numpy(g.astype("float64")))
    options = options_of(problem)
    assert_exact(FORWARD[problem.ndim](x, w, **options), y.detach().numpy())
    assert_exact(INPUT[problem.ndim](x.shape, w, g, **options), tx.grad.numpy())
    assert_exact(WEIGHT[problem.ndim](x, w.shape, g, **options), tw.grad.numpy())


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_gradient_arguments_are_those_of_torch(torch, rng, ndim):
    x, w = integers(rng, (2, 4, *(9,) * ndim), "float64"), integers(rng, (6, 2, *(3,) * ndim), "float64")
    g = integers(rng, (2, 6, *(5,) * ndim), "float64")
    geometry = (2, 1, 1, 2)  # stride, padding, dilation, groups, by position
    grads = torch.nn.grad
    tx, tw, tg = map(torch.from_numpy, (x, w, g))
    assert_exact(
        INPUT[ndim](x.shape, w, g, *geometry),
        getattr(grads, f"conv{ndim}d_input")(x.shape, tw, tg, *geometry).numpy(),
    )
    assert_exact(
        WEIGHT[ndim](x, w.shape, g, *geometry),
        getattr(grads, f"conv{ndim}d_weight")(tx, w.shape, tg, *geometry).numpy(),
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_torch(torch, name):
    functional = torch.nn.functional
    y = np.concatenate([np.linspace(-40, 40, 4001), [-1e3, 1e3, 0.0, -0.0, np.nan, np.inf]])
    leaky = ("leaky_relu", 0.1)
    theirs = getattr(functional, name)(torch.from_numpy(y), *leaky[1:] if name == "leaky_relu" else ())
    ours = reference.activate(y, leaky if name == "leaky_relu" else name)
    # torch's gelu cancels for negative y (1 + erf), ours does not: compare to a bound on the scale of y.
    assert_bounded(ours, theirs.numpy(), 4 * np.finfo("float64").eps * np.maximum(np.abs(y), 1))


KNOWN_VALUES = {
    "relu": {-1: 0, 2: 2},
    "relu6": {-1: 0, 2: 2, 7: 6},
    "silu": {0: 0, 1: 1 / (1 + math.exp(-1)), -1000: 0},
    "gelu": {0: 0, 1: 0.5 * (1 + math.erf(math.sqrt(0.5))), -10: -10 * 0.5 * math.erfc(10 * math.sqrt(0.5))},
    "sigmoid": {0: 0.5, 1: 1 / (1 + math.exp(-1)), -1000: 0, 1000: 1},
    "tanh": {0: 0, 1: math.tanh(1)},
    ("leaky_relu", 0.25): {-4: -1, 4: 4, 0: 0},
    None: {-3: -3, 3: 3},
}


@pytest.mark.parametrize(("activation", "values"), KNOWN_VALUES.items(), ids=str)
def test_activation_of_known_values(activation, values):
    y = np.array(list(values), dtype="float32")
    expected = np.array(list(values.values()), dtype="float64")
    assert_bounded(reference.activate(y, activation), expected, 1e-13 * np.abs(expected))


def test_every_activation_has_known_values():
    assert {name if name is None or isinstance(name, str) else name[0] for name in KNOWN_VALUES} == {
        None,
        *ACTIVATIONS,
    }


def test_epilogue_order_is_bias_residual_activation(rng):
    x, w, bias, residual = operands(rng, CASES[3].problem(), integers)
    plain = reference.conv2d(x, w, padding=1)
    fused = reference.conv2d(x, w, bias, padding=1, residual=residual, activation=("leaky_relu", 0.5))
    summed = plain + bias[:, None, None] + residual
    assert_exact(fused, np.where(summed > 0, summed, summed / 2))


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_flip_is_the_convolution_of_mathematics(rng, ndim):
    """With flip, conv(conv(x, a), b) = conv(x, a * b); a delta gives the kernel back unreversed."""
    delta = np.zeros((1, 1, *(5,) * ndim))
    delta[(0, 0, *(2,) * ndim)] = 1
    kernel = integers(rng, (1, 1, *(3,) * ndim))
    forward = FORWARD[ndim]
    assert_exact(
        forward(delta, kernel, padding=1, flip=True)[(..., *(slice(1, 4),) * ndim)], kernel, "float64"
    )
    image, other = integers(rng, (1, 1, *(9,) * ndim)), integers(rng, (1, 1, *(2,) * ndim))
    product = forward(kernel, other, padding=1, flip=True)
    twice = forward(forward(image, kernel, flip=True), other, flip=True)
    assert_exact(forward(image, product, flip=True), twice)


def test_conv1d_flip_is_numpy_convolve(rng):
    x, w = integers(rng, (1, 30)), integers(rng, (1, 1, 4))
    assert_exact(reference.conv1d(x, w, flip=True)[0], np.convolve(x[0], w[0, 0], "valid"), "float64")
    assert_exact(reference.conv1d(x, w)[0], np.correlate(x[0], w[0, 0], "valid"), "float64")


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_unbatched_is_a_batch_of_one(rng, ndim):
    x, w = integers(rng, (4, *(6,) * ndim)), integers(rng, (2, 2, *(3,) * ndim))
    residual = integers(rng, (2, *(4,) * ndim))
    y = FORWARD[ndim](x, w, groups=2, residual=residual)
    assert_exact(y, FORWARD[ndim](x[None], w, groups=2, residual=residual[None])[0])
    assert_exact(INPUT[ndim](x.shape, w, y, groups=2), INPUT[ndim]((1, *x.shape), w, y[None], groups=2)[0])
    assert_exact(WEIGHT[ndim](x, w.shape, y, groups=2), WEIGHT[ndim](x[None], w.shape, y[None], groups=2))


def test_layouts_and_dtypes_do_not_matter(rng):
    x, w = integers(rng, (2, 3, 6, 7)), integers(rng, (4, 3, 3, 3))
    expected = reference.conv2d(x, w)
    for name, view in [*layouts(x), *foreign_layouts(x)]:
        assert np.array_equal(reference.conv2d(view, w), expected), name
    for dtype in ("float16", "bfloat16", "float64", "int8"):
        assert_exact(reference.conv2d(x.astype(dtype), w.astype(dtype)), expected)
    assert_exact(reference.conv2d(x.tolist(), w.tolist()), expected)


def test_arguments_are_left_alone(rng):
    problem = CASES[3].problem()
    arrays = operands(rng, problem, normals)
    x, w, bias, residual = (array.astype("float64") for array in arrays)
    for array in (x, w, bias, residual):
        array.setflags(write=False)
    y = reference.conv2d(x, w, bias, padding=1, residual=residual, flip=True)
    assert not any(np.shares_memory(y, array) for array in (x, w, bias, residual))
    gradient = reference.conv2d_input(x.shape, w, y, padding=1)
    assert gradient.base is None or gradient.base.nbytes == gradient.nbytes  # holds no padded image alive


def ones(*shape):
    return np.ones(shape)


WRONG = [
    (lambda: reference.conv2d(ones(1, 2, 4, 4), ones(1, 3, 3, 3)), r"weight.shape\[1\] must be C // groups"),
    (lambda: reference.conv2d(ones(4, 4), ones(1, 1, 3, 3)), r"input \(N, C, H, W\) must have 4 axes"),
    (
        lambda: reference.conv1d(ones(1, 9), ones(1, 1, 3), bias=[1, 2]),
        r"bias.shape must be \(1,\), got \(2,\)",
    ),
    (
        lambda: reference.conv1d(ones(1, 9), ones(1, 1, 3), residual=ones(1, 1, 7)),
        r"conv1d: residual.shape must be \(1, 7\), got \(1, 1, 7\)",
    ),
    (
        lambda: reference.conv1d_input((1, 9), ones(1, 1, 3), ones(1, 8)),
        r"conv1d: grad_output.shape must be \(1, 7\), got \(1, 8\)",
    ),
    (
        lambda: reference.conv3d_weight(ones(1, 1, 4, 4, 4), (1, 1, 3, 3, 3), ones(1, 2, 2, 2)),
        r"conv3d: grad_output.shape must be \(1, 1, 2, 2, 2\), got \(1, 2, 2, 2\)",
    ),
    (lambda: reference.activate(ones(3), "mish"), "activate: activation must be None, 'relu'"),
]


@pytest.mark.parametrize(("call", "pattern"), WRONG)
def test_errors(call, pattern):
    with pytest.raises(ConvError, match=pattern):
        call()
