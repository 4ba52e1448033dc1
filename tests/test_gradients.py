"""fastconv.grad and the transposed convolutions, as users call them."""

import dataclasses

import numpy as np
import pytest

import fastconv
from fastconv import conv_grad, reference
from fastconv.cpu import direct, memory
from fastconv.grad_input import Patches, find_cuts, find_parts
from fastconv.plan import make_plan, possible_plans
from fastconv.problem import ConvError, make_problem, make_transposed
from tests.compare import assert_exact, integers, normals

OPS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
SIZES, KERNELS = (9, 8, 10), (2, 3, 3)
OPTIONS = {"stride": 2, "padding": 1, "groups": 2}

every_op = pytest.mark.parametrize("op", OPS)


def arrays_of(rng, op, dtype="float32", fill=integers):
    """Input (2, 4, ...), weight (6, 2, ...) and the gradient of the output under OPTIONS."""
    ndim = OPS[op]
    x, w = fill(rng, (2, 4, *SIZES[:ndim]), dtype), fill(rng, (6, 2, *KERNELS[:ndim]), dtype)
    problem = make_problem(op, x.shape, w.shape, **OPTIONS)
    return x, w, fill(rng, problem.output_shape, dtype)


def of(module, op, which):
    return getattr(module, f"{op}_{which}")


def channels_last(array):
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


@every_op
class TestGradients:
    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
    def test_reference(self, op, dtype, rng):
        x, w, grad = arrays_of(rng, op, dtype)
        expected = of(reference, op, "input")(x.shape, w, grad, **OPTIONS)
        assert_exact(of(conv_grad, op, "input")(x.shape, w, grad, **OPTIONS), expected, dtype)
        expected = of(reference, op, "weight")(x, w.shape, grad, **OPTIONS)
        assert_exact(of(conv_grad, op, "weight")(x, w.shape, grad, **OPTIONS), expected, dtype)

    def test_finite_differences(self, op, rng):
        """The sum of conv * grad is linear in x and in w: no error but rounding."""
        x, w, grad = arrays_of(rng, op, "float64", normals)

        def loss(x, w):
            return float(np.sum(getattr(fastconv, op)(x, w, **OPTIONS) * grad))

        found = [of(conv_grad, op, "input")(x.shape, w, grad, **OPTIONS)]
        found.append(of(conv_grad, op, "weight")(x, w.shape, grad, **OPTIONS))
        for which, gradient in enumerate(found):
            for _ in range(20):
                moved = [x.copy(), w.copy()]
                index = tuple(rng.integers(size) for size in gradient.shape)
                moved[which][index] += 0.5
                assert abs((loss(*moved) - loss(x, w)) / 0.5 - gradient[index]) < 1e-10

    def test_channels_last_shapes(self, op, rng):
        x, w, grad = arrays_of(rng, op)
        layout = {"conv1d": "NLC", "conv2d": "NHWC", "conv3d": "NDHWC"}[op]
        last = channels_last(x)
        found = of(conv_grad, op, "input")(last.shape, w, channels_last(grad), layout=layout, **OPTIONS)
        assert found.flags.c_contiguous
        assert_exact(
            np.moveaxis(found, -1, 1), of(reference, op, "input")(x.shape, w, grad, **OPTIONS), "float32"
        )
        found = of(conv_grad, op, "weight")(last, w.shape, channels_last(grad), layout=layout, **OPTIONS)
        assert_exact(found, of(reference, op, "weight")(x, w.shape, grad, **OPTIONS), "float32")

    def test_memory_order_is_kept(self, op, rng):
        x, w, grad = arrays_of(rng, op)
        found = of(conv_grad, op, "input")(x.shape, w, np.moveaxis(channels_last(grad), -1, 1), **OPTIONS)
        assert np.moveaxis(found, 1, -1).flags.c_contiguous
        assert_exact(found, of(reference, op, "input")(x.shape, w, grad, **OPTIONS), "float32")

    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
    def test_bias(self, op, dtype, rng):
        _, _, grad = arrays_of(rng, op, dtype)
        last = {"conv1d": "NLC", "conv2d": "NHWC", "conv3d": "NDHWC"}[op]
        axes = tuple(range(2, grad.ndim))
        bias = of(conv_grad, op, "bias")
        expected = grad.astype("float64").sum(axis=(0, *axes))
        assert_exact(bias(grad), expected, dtype)
        assert_exact(bias(channels_last(grad), layout=last), expected, dtype)
        assert_exact(bias(grad[1]), grad[1].astype("float64").sum(axis=tuple(a - 1 for a in axes)), dtype)
        assert_exact(bias(grad[:0]), np.zeros(len(expected)), dtype)
        with pytest.raises(ConvError, match=f"^{op}_bias: "):
            bias(grad[0, 0])

    def test_layout_of_another_rank(self, op, rng):
        x, w, grad = arrays_of(rng, op)
        operands = {"input": (x.shape, w, grad), "weight": (x, w.shape, grad), "bias": (grad,)}
        for which, given in operands.items():
            with pytest.raises(ConvError, match=f"^{op}_{which}: layout must be one of .*, got 'NWC'$"):
                of(conv_grad, op, which)(*given, layout="NWC")

    def test_without_batch(self, op, rng):
        x, w, grad = arrays_of(rng, op)
        found = of(conv_grad, op, "input")(x.shape[1:], w, grad[0], **OPTIONS)
        assert_exact(found, of(reference, op, "input")(x[:1].shape, w, grad[:1], **OPTIONS)[0], "float32")
        found = of(conv_grad, op, "weight")(x[0], w.shape, grad[0], **OPTIONS)
        assert_exact(found, of(reference, op, "weight")(x[:1], w.shape, grad[:1], **OPTIONS), "float32")

    def test_empty_batch(self, op, rng):
        x, w, grad = arrays_of(rng, op)
        assert of(conv_grad, op, "input")((0, *x.shape[1:]), w, grad[:0], **OPTIONS).shape == (
            0,
            *x.shape[1:],
        )
        found = of(conv_grad, op, "weight")(x[:0], w.shape, grad[:0], **OPTIONS)
        assert_exact(found, np.zeros(w.shape), "float32")

    def test_out(self, op, rng):
        x, w, grad = arrays_of(rng, op)
        out = np.full(x.shape, np.nan, np.float32)[::-1]
        assert of(conv_grad, op, "input")(x.shape, w, grad, **OPTIONS, out=out) is out
        assert_exact(out, of(reference, op, "input")(x.shape, w, grad, **OPTIONS), "float32")
        out = np.full(w.shape, np.nan, ">f4")
        assert of(conv_grad, op, "weight")(x, w.shape, grad, **OPTIONS, out=out) is out
        assert_exact(
            out.astype("float32"), of(reference, op, "weight")(x, w.shape, grad, **OPTIONS), "float32"
        )

    def test_torch(self, op, rng):
        torch = pytest.importorskip("torch")
        x, w, grad = arrays_of(rng, op)
        of_torch = [torch.from_numpy(array) for array in (x, w, grad)]
        for which, arguments in (
            ("input", (x.shape, *of_torch[1:])),
            ("weight", (of_torch[0], w.shape, of_torch[2])),
        ):
            expected = of(torch.nn.grad, op, which)(*arguments, **OPTIONS)
            found = of(conv_grad, op, which)(*arguments, **OPTIONS)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


GRADIENT_ERRORS = {
    "input_size must be a tuple of ints, got 5 of type int": (TypeError, {"input_size": 5}),
    "input_size must be a tuple of ints, got (2, 4, 9.0, 8) of type tuple": (
        TypeError,
        {"input_size": (2, 4, 9.0, 8)},
    ),
    "input_size must be a tuple of ints, got an array of shape (2, 4, 9, 8) (say its shape)": (
        TypeError,
        {"input_size": np.ones((2, 4, 9, 8))},
    ),
    "grad_output.shape must be output.shape = (2, 6, 5, 4), got (2, 6, 5, 5)": (
        ConvError,
        {"grad_output": np.ones((2, 6, 5, 5), np.float32)},
    ),
    "grad_output.shape must be output.shape = (3, 6, 5, 4), got (2, 6, 5, 4)": (
        ConvError,
        {"input_size": (3, 4, 9, 8)},
    ),
    "weight.shape[1] must be C // groups = 6 // 2 = 3, got 2": (ConvError, {"input_size": (2, 6, 9, 8)}),
    "grad_output.dtype must be weight.dtype = float32, got float64": (
        TypeError,
        {"grad_output": np.ones((2, 6, 5, 4))},
    ),
    "out.shape must be result.shape = (2, 4, 9, 8), got (1,)": (ConvError, {"out": np.ones(1, np.float32)}),
    "algo='winograd' cannot run n2c4h9w8_k6r3s3_st2x2_pad1x1_dil1x1_g2_float32_grad_input: needs stride 1": (
        ConvError,
        {"algo": "winograd"},
    ),
}


@pytest.mark.parametrize("message", GRADIENT_ERRORS)
def test_errors_of_the_gradient_of_the_input(message):
    error, changes = GRADIENT_ERRORS[message]
    arguments = {"input_size": (2, 4, 9, 8), "weight": np.ones((6, 2, 3, 3), np.float32)}
    arguments["grad_output"] = np.ones((2, 6, 5, 4), np.float32)
    with pytest.raises(error) as caught:
        conv_grad.conv2d_input(**{**arguments, **OPTIONS, **changes})
    assert str(caught.value).startswith(f"conv2d_input: {message}")


def test_errors_of_the_gradient_of_the_weight():
    x, grad = np.ones((2, 4, 9, 8), np.float32), np.ones((2, 6, 5, 4), np.float32)
    rule = "needs stride 1 along rows and columns for a gradient"
    with pytest.raises(ConvError, match=rf"^conv2d_weight: algo='winograd' .* {rule}$"):
        conv_grad.conv2d_weight(x, (6, 2, 3, 3), grad, **OPTIONS, algo="winograd")
    with pytest.raises(ConvError, match=r"^conv2d_weight: weight \(K, .*\) must have 4 axes, got 3 "):
        conv_grad.conv2d_weight(x, (6, 2, 3), grad, **OPTIONS)


def test_depthwise_gradient_of_the_input_has_one_filter_per_channel():
    w, grad = np.ones((6, 1, 3), np.float32), np.ones((1, 6, 7), np.float32)
    with pytest.raises(ConvError, match="needs K = C = 3 for the gradient of the input"):
        conv_grad.conv1d_input((1, 3, 9), w, grad, groups=3, algo="depthwise")
    expected = reference.conv1d_input((1, 3, 9), w, grad, groups=3)
    assert_exact(conv_grad.conv1d_input((1, 3, 9), w, grad, groups=3), expected, "float32")


@pytest.mark.parametrize("stride", [(2, 3), (5, 3)])
def test_every_input_is_in_one_part(stride):
    """Beside the first, which makes all of them zero where a phase, here one with stride 5, meets no tap."""
    problem = make_problem("conv2d", (1, 1, 17, 11), (1, 1, 3, 3), stride=stride, dilation=(3, 2), padding=2)
    zeros, *parts = find_parts(problem) if stride == (5, 3) else (None, *find_parts(problem))
    seen = np.zeros(problem.input_shape5, int)
    for part in parts:
        seen[part.inputs] += 1
        assert part.problem.stride == (1, 1, 1)
        assert seen[part.inputs].shape == part.problem.output_shape5
    if zeros is None:
        assert (seen == 1).all()
    else:
        assert zeros.is_zero
        assert not any(part.is_zero for part in parts)
        assert zeros.problem.output_shape5 == problem.input_shape5
        assert sorted({*seen.flat}) == [0, 1]


def test_inputs_between_the_windows_are_made_zero_at_once():
    """However many phases they have: here 64 * 64 - 1 of 64 * 64."""
    problem = make_problem("conv2d", (1, 2, 130, 130), (2, 2, 1, 1), stride=64)
    assert len(find_parts(problem)) == 2


@pytest.mark.parametrize("output_padding", [0, 1, (0, 1)])
def test_ending_of_a_depthwise_transposed_convolution(output_padding, rng):
    """With stride 2, where all phases of a plane are made together."""
    x, w, bias = integers(rng, (2, 5, 7, 9)), integers(rng, (5, 1, 3, 3)), integers(rng, (5,))
    options = {"stride": 2, "padding": 1, "groups": 5, "output_padding": output_padding}
    plain = fastconv.conv_transpose2d(x, w, **options)
    sizes = {"stride": 2, "padding": 1, "groups": 5}
    assert_exact(plain, reference.conv2d_input(plain.shape, w, x, **sizes), "float32")
    residual = integers(rng, plain.shape)
    found = fastconv.conv_transpose2d(x, w, bias, **options, residual=residual, activation="relu")
    assert_exact(found, np.maximum(plain + bias[:, None, None] + residual, 0), "float32")


class TestSideBySide:
    """Windows that cover the input without overlap: one convolution makes all taps as channels."""

    @pytest.mark.parametrize(
        ("size", "options", "is_covered"),
        [
            ((8, 9), {"stride": (4, 3)}, True),
            ((8, 10), {"stride": (4, 3)}, False),
            ((8, 9), {"stride": (4, 2)}, False),
            ((8, 9), {"stride": (5, 3)}, False),
            ((8, 9), {"stride": (4, 3), "padding": (0, 3)}, False),
            ((8, 10), {"stride": (4, 5), "dilation": (1, 2)}, False),
        ],
    )
    def test_what_it_takes(self, size, options, is_covered):
        problem = make_problem("conv2d", (1, 2, *size), (3, 2, 4, 3), **options)
        assert any(isinstance(part, Patches) for part in find_parts(problem)) == is_covered

    @pytest.mark.parametrize("groups", [1, 2])
    def test_bias_residual_and_activation(self, groups, rng):
        x, w = integers(rng, (2, 6, 3, 5)), integers(rng, (6, 4, 2, 3))
        bias, residual = integers(rng, (4 * groups,)), integers(rng, (2, 4 * groups, 6, 15))
        ending = {"residual": residual, "activation": "relu"}
        found = fastconv.conv_transpose2d(x, w, bias, stride=(2, 3), groups=groups, **ending)
        plain = fastconv.conv_transpose2d(x, w, stride=(2, 3), groups=groups)
        assert_exact(found, np.maximum(plain + bias[:, None, None] + residual, 0), "float32")
        assert_exact(
            plain, reference.conv2d_input(plain.shape, w, x, stride=(2, 3), groups=groups), "float32"
        )

    def test_workspace_has_the_channels(self, rng, monkeypatch):
        """The made ones, and a bias and a residual of such channels."""
        made, copy, zeros = [], memory.copy, memory.zeros
        monkeypatch.setattr(memory, "copy", lambda *operands: made.append(copy(*operands)) or made[-1])
        monkeypatch.setattr(memory, "zeros", lambda *operands: made.append(zeros(*operands)) or made[-1])
        x, w = integers(rng, (1, 5, 4, 6)), integers(rng, (5, 3, 8, 8))
        bias, residual = integers(rng, (3,)), integers(rng, (1, 3, 32, 48))
        fastconv.conv_transpose2d(x, w, bias, stride=8, residual=residual, algo="direct")
        problem = make_transposed("conv_transpose2d", x.shape, w.shape, stride=8)
        plan = make_plan(problem, "direct")
        (part,) = find_parts(problem)
        of_forward = direct.workspace(part.problem, plan.tile, plan.device)
        assert plan.workspace() == of_forward + sum(array.nbytes for array in made)


@every_op
class TestTransposed:
    def test_is_the_gradient_of_the_input(self, op, rng):
        """Of every size that the convolution makes the same output of, output_padding names one."""
        _, w, y = arrays_of(rng, op)
        transposed = getattr(fastconv, op.replace("conv", "conv_transpose"))
        made = transposed(y, w, **OPTIONS)
        for beyond in (0, 1):
            found = transposed(y, w, **OPTIONS, output_padding=beyond)
            size = tuple(made.shape[:2]) + tuple(extent + beyond for extent in made.shape[2:])
            assert_exact(found, of(reference, op, "input")(size, w, y, **OPTIONS), "float32")

    def test_bias_residual_and_activation(self, op, rng):
        ndim = OPS[op]
        x, w = integers(rng, (2, 4, *SIZES[:ndim])), integers(rng, (4, 3, *KERNELS[:ndim]))
        transposed = getattr(fastconv, op.replace("conv", "conv_transpose"))
        bare = transposed(x, w, stride=3).astype(np.float64)
        bias, residual = integers(rng, (3,)), integers(rng, bare.shape)
        found = transposed(x, w, bias, stride=3, residual=residual, activation="relu")
        expected = np.maximum(bare + bias.reshape(-1, *(1,) * ndim) + residual, 0)
        assert_exact(found, expected, "float32")

    def test_without_batch_and_channels_last(self, op, rng):
        ndim = OPS[op]
        x, w = integers(rng, (1, 4, *SIZES[:ndim])), integers(rng, (4, 3, *KERNELS[:ndim]))
        transposed = getattr(fastconv, op.replace("conv", "conv_transpose"))
        expected = transposed(x, w, padding=1)
        assert_exact(transposed(x[0], w, padding=1), expected[0].astype(np.float64), "float32")
        layout = {"conv1d": "NLC", "conv2d": "NHWC", "conv3d": "NDHWC"}[op]
        found = transposed(channels_last(x), w, padding=1, layout=layout)
        assert_exact(found, channels_last(expected).astype(np.float64), "float32")

    def test_torch(self, op, rng):
        """Many geometries; integers, so equal."""
        torch = pytest.importorskip("torch")
        ndim, name = OPS[op], op.replace("conv", "conv_transpose")
        for _ in range(40):
            groups, stride, dilation = (int(number) for number in rng.integers(1, 4, 3))
            beyond, padding = int(rng.integers(max(stride, dilation))), int(rng.integers(3))
            x = integers(rng, (2, 2 * groups, *rng.integers(3, 7, ndim)))
            w, bias = integers(rng, (2 * groups, 3, *rng.integers(3, 5, ndim))), integers(rng, (3 * groups,))
            arguments = (stride, padding, beyond, groups, dilation)
            expected = getattr(torch, name)(*map(torch.from_numpy, (x, w, bias)), *arguments).numpy()
            assert_exact(
                getattr(fastconv, name)(x, w, bias, *arguments), expected.astype(np.float64), "float32"
            )


TRANSPOSED_ERRORS = {
    "output_padding must be below max(stride, dilation) = max(1, 1) = 1, got 1": {"output_padding": 1},
    "output_padding must be at least 0, got -1": {"output_padding": -1},
    "weight.shape[0] must be C = input.shape[1] = 4, got 3": {"weight": np.ones((3, 2, 3, 3), np.float32)},
    "input.shape[1] must be a multiple of groups = 3, got 4": {"groups": 3},
    "bias.shape must be (K,) = (2,), got (3,)": {"bias": np.ones(3, np.float32)},
    "residual.shape must be output.shape = (1, 2, 7, 7), got (1, 2, 7, 8)": {
        "residual": np.ones((1, 2, 7, 8), np.float32)
    },
    "output size (size - 1) * stride - padding - padding + dilation * (kernel - 1) + 1 + output_padding must "
    "be at least 1, got (5 - 1) * 1 - 9 - 9 + 1 * (3 - 1) + 1 + 0 = -11": {"padding": 9},
}


@pytest.mark.parametrize("message", TRANSPOSED_ERRORS)
def test_errors_of_a_transposed_convolution(message):
    arguments = {"input": np.ones((1, 4, 5, 5), np.float32), "weight": np.ones((4, 2, 3, 3), np.float32)}
    with pytest.raises(ConvError) as caught:
        fastconv.conv_transpose2d(**{**arguments, **TRANSPOSED_ERRORS[message]})
    assert str(caught.value).startswith(f"conv_transpose2d: {message} (input (1, 4, 5, 5), ")


def test_a_transposed_convolution_pads_by_no_name():
    arguments = np.ones((1, 4, 5, 5), np.float32), np.ones((4, 2, 3, 3), np.float32)
    with pytest.raises(TypeError, match=r"padding must be an int, or an int or .* got 'same'"):
        fastconv.conv_transpose2d(*arguments, padding="same")


@pytest.mark.parametrize("output_padding", [0, 1, 2])
def test_gradients_of_a_transposed_convolution(output_padding, rng):
    """As its docstring has them: it is linear in the input and in the weight."""
    x, w = integers(rng, (2, 4, 5, 6)), integers(rng, (4, 3, 3, 3))
    geometry = 1, 1, 3, 1
    y = fastconv.conv_transpose2d(x, w, None, *geometry[:2], output_padding, *geometry[:1:-1])
    g = integers(rng, y.shape)
    of_input = fastconv.conv2d(g, w, None, *geometry, precision="highest")[:, :, :5, :6]
    longer = np.pad(x, ((0, 0), (0, 0), (0, output_padding), (0, output_padding)))
    of_weight = conv_grad.conv2d_weight(g, w.shape, longer, *geometry)
    assert (of_input * x).sum() == (of_weight * w).sum() == (g * y).sum()


def test_inputs_that_no_tap_meets():
    """In front of the first one and behind the last: they lie beyond the memory of what is convolved."""
    one = np.ones((1, 1, 1), np.float32)
    padding = [(3, 0)]
    y = fastconv.conv_transpose1d(one, one, dilation=5, output_padding=4, padding=padding)
    assert y.tolist() == [[[0, 0]]]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_workspace_has_the_rearranged_weight(dtype, rng, monkeypatch):
    """In the dtype of the arithmetic, which is the one of the copy."""
    made, allocate = [], memory.allocate
    monkeypatch.setattr(memory, "allocate", lambda *operands: made.append(allocate(*operands)) or made[-1])
    shape, w = (1, 5, 9, 8), integers(rng, (7, 5, 3, 3)).astype(dtype)
    grad = integers(rng, (1, 7, 7, 6)).astype(dtype)
    conv_grad.conv2d_input(shape, w, grad, algo="direct")
    plan = make_plan(make_problem("conv2d", shape, w.shape, dtype=dtype, direction="grad_input"), "direct")
    (part,) = find_parts(plan.problem)
    of_forward = direct.workspace(part.problem, plan.tile, plan.device)
    (weights,) = made
    assert plan.workspace() == of_forward + weights.nbytes >= w.size * 4


def test_workspace_has_parts_whose_columns_lie_apart(rng, monkeypatch):
    """They are computed elsewhere, one after the other, from weights that are rearranged at once."""
    made, allocate = [], memory.allocate
    monkeypatch.setattr(memory, "allocate", lambda *operands: made.append(allocate(*operands)) or made[-1])
    shape, w, grad = (1, 5, 9, 8), integers(rng, (7, 5, 3, 3)), integers(rng, (1, 7, 4, 3))
    conv_grad.conv2d_input(shape, w, grad, stride=2, algo="direct")
    problem = make_problem("conv2d", shape, w.shape, stride=2, direction="grad_input")
    plan = make_plan(problem, "direct")
    weights, *parts = made
    bytes_of = [direct.workspace(part.problem, plan.tile, plan.device) for part in find_parts(problem)]
    most = max(own + part.nbytes for own, part in zip(bytes_of, parts, strict=True))
    assert plan.workspace() == weights.nbytes + most


class TestExchange:
    """The channels of filters change places; where taps are left out there are several parts."""

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize(("groups", "K", "C", "size", "stride"), [
        (1, 70, 50, 1, 1), (1, 16, 32, 1, 1), (3, 5, 7, 1, 1), (1, 66, 3, 3, 1), (2, 5, 18, 3, 2),
        (1, 3, 2, 5, 3), (1, 3, 2, 2, 3), (9, 1, 1, 3, 2), (4, 3, 1, 3, 1),
    ])  # fmt: skip
    def test_equals_numpy(self, groups, K, C, size, stride, dtype, rng):
        shape = groups * K, C, size, size
        problem = make_problem(
            "conv2d", (1, groups * C, 9, 9), shape, stride=stride, groups=groups, direction="grad_input"
        )
        filters = rng.standard_normal((groups, K, C, 1, size, size)).astype(dtype)
        parts = [part for part in find_parts(problem) if not part.is_zero]
        wanted = [filters[part.taps].swapaxes(1, 2).reshape(part.problem.weight_shape5) for part in parts]
        for given in (filters, np.asfortranarray(filters), filters[..., ::-1].copy()[..., ::-1]):
            found = memory.exchange(given, find_cuts(problem))
            assert [part.flags.c_contiguous for part in found] == [True] * len(parts)
            for part, want in zip(found, wanted, strict=True):
                assert np.array_equal(part, want)

    def test_one_tap_of_filters_that_share_memory(self, rng):
        """The neighbour of a channel's tap is the next channel's: only the second tap meets an input."""
        shared = integers(rng, (30,))
        w = np.lib.stride_tricks.as_strided(shared, (4, 2, 3), (24, 4, 4))
        grad = integers(rng, (1, 4, 1))
        options = {"stride": 3, "padding": 1}
        wanted = reference.conv1d_input((1, 2, 1), w.copy(), grad, **options)
        for algo in ("direct", "im2col"):
            assert_exact(conv_grad.conv1d_input((1, 2, 1), w, grad, algo=algo, **options), wanted, "float32")


@every_op
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_phases_of_a_stride(op, groups, threads, rng, monkeypatch):
    """What lies apart in batches, planes and volumes is put where it belongs, by several threads too."""
    monkeypatch.setenv("FASTCONV_THREADS", str(threads))
    monkeypatch.setattr(memory, "SERIAL_ELEMENTS", 0)
    ndim, options = OPS[op], {"stride": 3, "groups": groups}
    x, w = (2, 2 * groups, *(7, 8, 9)[:ndim]), integers(rng, (70 * groups, 2, *(2, 3, 3)[:ndim]))
    grad = integers(rng, make_problem(op, x, w.shape, **options).output_shape)
    wanted = of(reference, op, "input")(x, w, grad, **options)
    for algo in ("direct", "im2col"):
        assert_exact(of(conv_grad, op, "input")(x, w, grad, algo=algo, **options), wanted, "float32")


class TestCallsLikeOneBefore:
    """They are not checked again: what makes a difference must be seen all the same."""

    def test_not_checked_again(self, rng, monkeypatch):
        """But for memory to write to."""
        x, w, grad = integers(rng, (2, 3, 5, 4)), integers(rng, (3, 3, 3, 3)), integers(rng, (2, 3, 3, 2))
        conv_grad.conv2d_input(x.shape, w, grad)
        conv_grad.conv2d_input(x.shape, w, grad, out=x.copy())
        conv_grad.conv2d_weight(x, w.shape, grad)
        monkeypatch.setattr(conv_grad, "find_frame", None)
        conv_grad.conv2d_input(x.shape, w, grad)
        conv_grad.conv2d_weight(x, w.shape, grad)
        frozen = x.copy()
        frozen.flags.writeable = False
        with pytest.raises(ConvError, match="out must be writeable"):
            conv_grad.conv2d_input(x.shape, w, grad, out=frozen)
        with pytest.raises(TypeError, match="not callable"):
            conv_grad.conv2d_input(x.shape, w, grad, stride=(1, 1))

    def test_size(self, rng):
        w, grad = integers(rng, (3, 2, 3, 3)), integers(rng, (1, 3, 4, 4))
        for size in (9, 10, 9):
            shape = (1, 2, size, size)
            wanted = reference.conv2d_input(shape, w, grad, stride=2)
            for form in (shape, list(shape), np.array(shape)):
                assert_exact(conv_grad.conv2d_input(form, w, grad, stride=2), wanted, "float32")
        for wrong in ((1, 2, 9.0, 9), (True, 2, 9, 9)):
            with pytest.raises(TypeError, match="input_size must be a tuple of ints"):
                conv_grad.conv2d_input(wrong, w, grad, stride=2)

    def test_directions_and_out(self, rng):
        """The same shapes in both passes, into memory of the caller's too."""
        options = {"padding": 1, "precision": "highest"}
        x, w, grad = (integers(rng, (3, 3, 3, 3)) for _ in range(3))
        for _ in range(2):
            of_input = reference.conv2d_input(x.shape, w, grad, padding=1)
            of_weight = reference.conv2d_weight(x, w.shape, grad, padding=1)
            out = np.full(x.shape, np.nan, np.float32)
            assert conv_grad.conv2d_input(x.shape, w, grad, **options, out=out) is out
            assert_exact(out, of_input, "float32")
            assert_exact(conv_grad.conv2d_weight(x, w.shape, grad, **options), of_weight, "float32")
            with pytest.raises(ConvError, match=r"overlap|share"):
                conv_grad.conv2d_input(x.shape, w, grad, **options, out=grad)


@pytest.mark.parametrize(
    ("algorithm", "groups", "is_cut"), [("direct", 1, True), ("winograd", 1, False), ("winograd", 2, True)]
)
def test_cost_has_the_exchange_of_filters(algorithm, groups, is_cut):
    """Where there is one: a tile that reads any weight is given a view of it, unless there are groups."""
    shapes = (1, 4, 9, 9), (6, 4 // groups, 3, 3)
    problem = make_problem("conv2d", *shapes, groups=groups, direction="grad_input")
    (part,) = find_parts(problem)
    for plan in possible_plans(problem, algorithm):
        forward = dataclasses.replace(make_plan(part.problem, algorithm), tile=plan.tile)
        exchange = is_cut * problem.parameters * memory.CUT_SECONDS
        assert plan.cost() - forward.cost() == pytest.approx(exchange)


def test_output_padding_of_more_than_a_stride():
    """With a dilation of 3 and stride 1 torch takes 2 rows beyond the last window: they are zero."""
    problem = make_transposed("conv_transpose1d", (1, 1, 4), (1, 1, 2), dilation=3, output_padding=2)
    assert problem.input_shape == (1, 1, 9)
    found = fastconv.conv_transpose1d(np.ones((1, 4)), np.ones((1, 1, 2)), dilation=3, output_padding=2)
    assert found.tolist() == [[1, 1, 1, 2, 1, 1, 1, 0, 0]]
