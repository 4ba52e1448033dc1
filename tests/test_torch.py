"""fastconv.torch: its names; convolutions under autograd, torch.compile, autocast and DDP; layers; a network.

Its poolings are tested in test_torch_pool.py.
"""

import copy
import inspect
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402 - torch may be missing
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402
from torch.library import opcheck  # noqa: E402

import fastconv  # noqa: E402
import fastconv.torch as ft  # noqa: E402
from fastconv.problem import ConvError  # noqa: E402
from fastconv.torch import convolution  # noqa: E402

NDIM = (1, 2, 3)
SIZES, KERNELS = (6, 5, 4), (3, 2, 2)

# What is no operation on arrays, or tells and measures how one would run: these take tensors as they are.
ABOUT = {"ConvError", "algorithms", "explain", "grad", "reference", "tune", "__version__"}
OPERATIONS = sorted(set(fastconv.__all__) - ABOUT)
ONLY_OURS = {"rng", "return_mask"}  # of dropout: what NumPy needs, and what a gradient by hand needs

every_ndim = pytest.mark.parametrize("ndim", NDIM)
either = pytest.mark.parametrize("name", ["conv", "conv_transpose"])


def tensors(ndim, name="conv", dtype=torch.float64):
    """Input, weight and bias that need gradients, of two groups; whole numbers if the dtype is float32."""
    generator = torch.Generator().manual_seed(ndim)
    channels = (6, 2) if name == "conv" else (4, 3)
    shapes = (2, 4, *SIZES[:ndim]), (*channels, *KERNELS[:ndim]), (6,)
    if dtype == torch.float32:
        found = [torch.randint(-4, 5, shape, generator=generator).to(dtype) for shape in shapes]
    else:
        found = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in found]


def options(name):
    more = {"output_padding": 1} if name == "conv_transpose" else {}
    return {"stride": 2, "padding": 1, "groups": 2, "dilation": 1, **more}


def ours(name, ndim):
    return getattr(ft, f"{name}{ndim}d")


def theirs(name, ndim):
    return getattr(nn.functional, f"{name}{ndim}d")


class TestNames:
    def test_every_operation_has_its_name_here(self):
        assert set(OPERATIONS) <= set(dir(ft))
        assert all(callable(getattr(ft, name)) for name in OPERATIONS)

    def test_public_names(self):
        """What help() and `import *` show: all functions and layers, no module, each with a docstring."""
        found = {name for name, value in vars(ft).items() if callable(value) and not name.startswith("_")}
        assert set(ft.__all__) == found
        assert set(OPERATIONS) | {"ConvTranspose2d", "Conversion", "convert"} <= found
        assert ft.__all__ == sorted(ft.__all__)
        assert all(inspect.getdoc(getattr(ft, name)) for name in ft.__all__)
        own = [name for name in ft.__all__ if getattr(ft, name).__module__.startswith("fastconv")]
        assert [name for name in own if ">>> " not in getattr(ft, name).__doc__] == []

    @pytest.mark.parametrize("name", [name for name in OPERATIONS if not name.startswith(("conv", "Conv"))])
    def test_arguments_are_those_for_arrays(self, name):
        """The same names in the same order and the same defaults, or one where there was none."""
        try:
            here = inspect.signature(getattr(ft, name)).parameters
        except ValueError:  # compiled, without a signature; tested by a call below
            return
        for place, parameter in enumerate(inspect.signature(getattr(fastconv, name)).parameters.values()):
            if parameter.name not in ONLY_OURS:
                twin = here[parameter.name]
                assert parameter.default in (parameter.empty, twin.default)
                if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                    assert list(here)[place] == parameter.name

    @pytest.mark.parametrize(
        ("name", "arguments"),
        {
            "avg_pool1d": (2,), "gelu": (), "flatten": (1,), "linear": (torch.ones(2, 6), torch.ones(2)),
            "relu": (), "relu6": (), "sigmoid": (), "silu": (), "tanh": (), "softmax": (1,),
            "log_softmax": (1,), "leaky_relu": (0.2,), "unfold": ((1, 2), 1, 0, (1, 2)),
            "fold": ((2, 4), (2, 1)), "local_response_norm": (2, 0.1, 0.5, 2.0),
            "interpolate": (3, None, "linear", False), "adaptive_avg_pool1d": (2,), "dropout": (0.0, True),
            "batch_norm": (torch.ones(4), torch.ones(4), torch.ones(4), torch.ones(4), False, 0.2, 0.3),
        }.items(),
    )  # fmt: skip
    def test_a_call_gives_what_it_gives_on_an_array(self, name, arguments):
        shape = {"unfold": (3, 4, 6), "fold": (2, 4, 4)}.get(name, (3, 4, 6))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        on_array = [a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments]
        found = getattr(ft, name)(x.clone().requires_grad_(), *arguments)
        assert found.requires_grad
        expected = torch.from_numpy(getattr(fastconv, name)(x.numpy(), *on_array))
        torch.testing.assert_close(found.detach(), expected)


@either
@every_ndim
class TestFunctions:
    def test_torch(self, name, ndim):
        """On whole numbers the result and all gradients are equal."""
        found, expected = tensors(ndim, name, torch.float32), tensors(ndim, name, torch.float32)
        y, wanted = ours(name, ndim)(*found, **options(name)), theirs(name, ndim)(*expected, **options(name))
        assert torch.equal(y, wanted)
        (y * y).sum().backward()
        (wanted * wanted).sum().backward()
        for ours_, theirs_ in zip(found, expected, strict=True):
            assert torch.equal(ours_.grad, theirs_.grad)

    def test_gradients(self, name, ndim):
        arguments = [tensor[:, :, :4] if tensor.dim() > 2 else tensor for tensor in tensors(ndim, name)]
        arguments = [tensor.detach().requires_grad_() for tensor in arguments]

        def function(*arguments):
            return ours(name, ndim)(*arguments, **options(name))

        assert gradcheck(function, arguments, fast_mode=True)
        assert gradgradcheck(function, arguments, fast_mode=True)

    def test_only_what_needs_a_gradient_gets_one(self, name, ndim):
        for needed in range(3):
            arguments = [tensor.detach() for tensor in tensors(ndim, name)]
            arguments[needed].requires_grad_()
            ours(name, ndim)(*arguments, **options(name)).sum().backward()
            assert [tensor.grad is not None for tensor in arguments] == [i == needed for i in range(3)]

    def test_compiled_without_a_break(self, name, ndim):
        """Also for sizes that the compiler does not know."""
        torch.compiler.reset()
        arguments, function = tensors(ndim, name, torch.float32), ours(name, ndim)
        compiled = torch.compile(
            lambda *tensors: function(*tensors, **options(name)).relu(), fullgraph=True, backend="aot_eager"
        )
        for size in (slice(None), slice(0, 5), slice(0, 4)):
            x = arguments[0].detach()[:, :, size].requires_grad_()
            y = compiled(x, *arguments[1:])
            assert torch.equal(y, function(x, *arguments[1:], **options(name)).relu())
            y.sum().backward()
            found, x.grad = x.grad, None
            function(x, *arguments[1:], **options(name)).relu().sum().backward()
            assert torch.equal(found, x.grad)

    def test_autocast(self, name, ndim):
        arguments = tensors(ndim, name, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = ours(name, ndim)(*arguments, **options(name))
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, theirs(name, ndim)(*arguments, **options(name)).bfloat16())
        y.float().sum().backward()
        assert all(tensor.grad.dtype == torch.float32 for tensor in arguments)

    def test_float64_is_not_cast(self, name, ndim):
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(name, ndim)(*tensors(ndim, name), **options(name)).dtype == torch.float64

    def test_without_batch(self, name, ndim):
        x, w, b = tensors(ndim, name, torch.float32)
        y = ours(name, ndim)(x[0], w, b, **options(name))
        assert torch.equal(y, theirs(name, ndim)(x[0], w, b, **options(name)))

    def test_dilation_wider_than_the_stride(self, name, ndim):
        """Then output_padding may be whole strides and more: rows that no window of the gradient may see."""
        wide = {"padding": 1, "groups": 2, "dilation": 3}
        wide |= {"output_padding": 2} if name == "conv_transpose" else {}
        found, expected = tensors(ndim, name, torch.float32), tensors(ndim, name, torch.float32)
        y, wanted = ours(name, ndim)(*found, **wide), theirs(name, ndim)(*expected, **wide)
        assert torch.equal(y, wanted)
        (y * y).sum().backward()
        (wanted * wanted).sum().backward()
        for ours_, theirs_ in zip(found, expected, strict=True):
            assert torch.equal(ours_.grad, theirs_.grad)


def test_output_padding_beyond_the_padding():
    """Without padding there is none to take away: what lies behind the last window is cut off."""
    x, w = torch.ones(1, 1, 4, requires_grad=True), torch.ones(1, 1, 2, requires_grad=True)
    ft.conv_transpose1d(x, w, dilation=3, output_padding=2).sum().backward()
    assert x.grad.tolist() == [[[2, 2, 2, 2]]]
    assert w.grad.tolist() == [[[4, 4]]]


def lay_out(tensor, is_last):
    """A tensor without history, that needs a gradient, in one of the two memory orders."""
    order = torch.channels_last if is_last else torch.contiguous_format
    return tensor.detach().contiguous(memory_format=order).requires_grad_()


@pytest.mark.parametrize("name", ["convolution", "input", "weight", "transposed"])
@pytest.mark.parametrize("samples", [2, 0])
@pytest.mark.parametrize("is_last", [False, True], ids=["NCHW", "NHWC"])
def test_operators(name, samples, is_last):
    """Schema, autograd, the fake and symbolic sizes, by torch's own checks."""
    x, w, b = tensors(2)
    x, (image, *rest) = x[:samples], tensors(2, "conv_transpose")
    x, image = (lay_out(tensor, is_last) for tensor in (x, image[:samples]))
    grad = ft.conv2d(x, w, b, 2, ((1, 0), (0, 2)), (2, 1), 2)
    grad = lay_out(grad, is_last)
    geometry = ([2, 2], [1, 0, 0, 2], [2, 1], 2, "auto", "high")
    operator, arguments = {
        "convolution": (torch.ops.fastconv.convolution, (x, w, b)),
        "input": (torch.ops.fastconv.convolution_input, (list(x.shape), w, grad)),
        "weight": (torch.ops.fastconv.convolution_weight, (x, list(w.shape), grad)),
        "transposed": (torch.ops.fastconv.convolution_transposed, (image, *rest, [1, 0])),
    }[name]
    opcheck(operator.default, (*arguments, *geometry))
    meta = [argument.to("meta") if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    assert (
        operator(*arguments, *geometry).stride() == operator(*meta, *geometry).stride()
    )  # of no samples too


@pytest.mark.parametrize("padding", [0, 2, "same", "valid", (1, 2), [(1, 0), (0, 3)]], ids=str)
def test_padding(padding):
    x, w, b = (tensor.detach() for tensor in tensors(2, dtype=torch.float32))
    found = ft.conv2d(x, w, b, 2, padding, groups=2)
    assert torch.equal(found, fastconv.conv2d(x, w, b, 2, padding, groups=2))


# What an operator of torch's would crash on, or read as something else: op, arguments.
WRONG = [
    *(
        ("conv2d", {"padding": value})
        for value in (True, (1, True), 1.5, None, "full", -1, ((1, 2, 3), (4,)))
    ),
    *(("conv2d", {"padding": value}) for value in (((1, 2, 3), (4, 5)), (1, 2, 3), ((1.0, 2), 1))),
    *(("conv2d", {"stride": value}) for value in (True, 1.5, "a", None, (1, 1, 1), 0)),
    *(("conv2d", {"stride": value, "padding": "same"}) for value in (0, (1, 1, 1), -1)),
    *(("conv2d", {"dilation": value}) for value in (True, 2.0, (1,), (0, 1))),
    *(("conv2d", {"groups": value}) for value in (True, 1.0, "1", None, 0)),
    *(("conv2d", {name: value}) for name in ("algo", "precision") for value in (3, None, "no")),
    *(("conv_transpose2d", {"output_padding": value}) for value in (1.5, True, "a", (1,), -1)),
    *(("conv_transpose2d", {"padding": value}) for value in ("same", "valid", True, ((1, 2, 3), (4,)))),
    *(("conv_transpose2d", {"stride": value}) for value in (True, 0, 1.5)),
    *((op, {}) for op in ("conv1d", "conv3d", "conv_transpose1d", "conv_transpose3d")),
]


class TestWrong:
    @pytest.mark.parametrize(("op", "more"), WRONG, ids=str)
    def test_as_for_arrays(self, op, more):
        """The same exception by the same rule, under the name of the function that was called."""
        x, w = torch.ones(1, 2, 8, 8), torch.ones(2, 2, 3, 3)
        with pytest.raises((TypeError, ValueError)) as expected:
            getattr(fastconv, op)(x, w, **more)
        with pytest.raises((TypeError, ValueError)) as found:
            getattr(ft, op)(x, w, **more)
        assert found.type is expected.type
        assert str(found.value).split(" (input")[0] == str(expected.value).split(" (input")[0]
        assert str(found.value).startswith(f"{op}: ")

    @pytest.mark.parametrize("rank", [0, 3, 5])
    def test_axes_of_the_weight(self, rank):
        message = rf"^conv2d: weight \(K, C // groups, R, S\) must have 4 axes, got {rank} "
        with pytest.raises(ConvError, match=message):
            ft.conv2d(torch.ones(1, 2, 8, 8), torch.ones((2,) * rank))

    @pytest.mark.parametrize("place", ["input", "weight", "bias"])
    @pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d"])
    def test_no_tensor(self, op, place):
        arguments = {"input": torch.ones(1, 2, 8, 8), "weight": torch.ones(2, 2, 3, 3), "bias": torch.ones(2)}
        arguments[place] = arguments[place].numpy()
        message = f"^{op}: {place} must be a torch tensor, got numpy.ndarray$"
        with pytest.raises(TypeError, match=message):
            getattr(ft, op)(**arguments)

    def test_no_model(self):
        with pytest.raises(TypeError, match=r"^convert: model must be a torch.nn.Module, got int$"):
            ft.convert(3)


@pytest.mark.parametrize(
    "more",
    [
        {"padding": np.int64(1)}, {"padding": [np.int64(1), (0, np.int32(2))]}, {"stride": np.array([1, 2])},
        {"padding": np.array([[1, 2], [0, 1]])}, {"groups": np.int64(2)}, {"dilation": torch.tensor(2)},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_of_numpy(more):
    x, w, _ = (tensor.detach() for tensor in tensors(2, dtype=torch.float32))
    assert torch.equal(
        ft.conv2d(x, w, **{"groups": 2, **more}), fastconv.conv2d(x, w, **{"groups": 2, **more})
    )


def test_errors_are_those_of_fastconv():
    x, w, _ = tensors(2)
    with pytest.raises(ConvError, match=r"^conv2d: weight.shape\[1\] must be C // groups = .* got 2"):
        ft.conv2d(x, w)
    with pytest.raises(TypeError, match=r"^conv2d: weight.dtype must be input.dtype = float64, "):
        ft.conv2d(x, w.float(), groups=2)


@every_ndim
def test_memory_order_is_kept(ndim):
    """As the fake promises: channels last in, channels last out, forwards and backwards."""
    x, w, _ = tensors(ndim, dtype=torch.float32)
    last = x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    y = ours("conv", ndim)(last, w, padding=1, groups=2)
    assert y.movedim(1, -1).is_contiguous()
    y.backward(torch.ones_like(y))
    assert last.grad.movedim(1, -1).is_contiguous()


def test_an_algorithm_by_name():
    """Forwards and backwards; not for gradients that Winograd does not have."""
    x, w = torch.rand(1, 2, 8, 8, requires_grad=True), torch.rand(2, 2, 3, 3, requires_grad=True)
    y = ft.conv2d(x, w, padding=1, algo="winograd")
    y.sum().backward()
    arrays, options = (x.detach().numpy(), w.detach().numpy()), {"padding": 1, "algo": "winograd"}
    assert np.array_equal(y.detach().numpy(), fastconv.conv2d(*arrays, **options))
    ones = np.ones(y.shape, np.float32)
    assert np.array_equal(w.grad.numpy(), fastconv.grad.conv2d_weight(arrays[0], w.shape, ones, **options))
    geometry = convolution.Geometry([1, 1], [1, 1, 1, 1], [1, 1], 1, "winograd", "high")
    assert [convolution._for_gradient(geometry, has).algo for has in (1, 0)] == ["winograd", "auto"]
    for stride, algo in (([1, 2], "auto"), ([2, 1, 1], "winograd")):
        assert convolution._for_gradient(geometry._replace(stride=stride), has_kernel=True).algo == algo
    w.grad = None
    y = ft.conv2d(x, w, stride=2, algo="winograd")
    y.sum().backward()
    wanted = fastconv.grad.conv2d_weight(arrays[0], w.shape, np.ones(y.shape, np.float32), stride=2)
    assert np.array_equal(w.grad.numpy(), wanted)
    with pytest.raises(ConvError, match="needs dilation 1"):
        ft.conv2d(x, w, dilation=2, algo="winograd")


LAYERS = {
    "Conv1d": (nn.Conv1d, (4, 6, 3), {"stride": 2, "padding": 1, "groups": 2}, (2, 4, 9)),
    "Conv2d": (nn.Conv2d, (4, 6, 3), {"padding": "same", "dilation": 2}, (2, 4, 9, 8)),
    "Conv2d circular": (nn.Conv2d, (4, 6, 3), {"padding": 1, "padding_mode": "circular"}, (2, 4, 9, 8)),
    "Conv3d": (nn.Conv3d, (4, 6, 2), {"bias": False}, (2, 4, 5, 4, 3)),
    "ConvTranspose1d": (nn.ConvTranspose1d, (4, 6, 3), {"stride": 2, "output_padding": 1}, (2, 4, 9)),
    "ConvTranspose2d": (nn.ConvTranspose2d, (4, 6, 3), {"stride": 2, "groups": 2}, (2, 4, 9, 8)),
    "ConvTranspose2d dilated": (nn.ConvTranspose2d, (4, 6, 3), {"padding": 1, "dilation": 2}, (2, 4, 5, 6)),
    "ConvTranspose3d": (nn.ConvTranspose3d, (4, 6, 2), {"padding": 1}, (2, 4, 5, 4, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
class TestLayers:
    def make(self, name):
        """A layer of torch's, ours with the same state, and an input; whole numbers."""
        kind, arguments, more, shape = LAYERS[name]
        layer, own = kind(*arguments, **more), getattr(ft, name.split()[0])(*arguments, **more)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=generator))
        own.load_state_dict(layer.state_dict())
        return layer, own, torch.randint(-4, 5, shape, generator=generator).float()

    def test_torch(self, name):
        layer, own, x = self.make(name)
        assert torch.equal(own(x), layer(x))
        assert own.state_dict().keys() == layer.state_dict().keys()

    def test_it_is_computed_by_fastconv(self, name, monkeypatch):
        _, own, x = self.make(name)
        called = []
        for function in (
            "conv1d",
            "conv2d",
            "conv3d",
            "conv_transpose1d",
            "conv_transpose2d",
            "conv_transpose3d",
        ):
            real = getattr(fastconv, function)
            monkeypatch.setattr(
                fastconv, function, lambda *a, real=real, f=function, **k: called.append(f) or real(*a, **k)
            )
        own(x)
        assert len(called) == 1

    def test_copies(self, name):
        _, own, x = self.make(name)
        for twin in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
            assert torch.equal(twin(x), own(x))

    def test_convert(self, name):
        layer, own, x = self.make(name)
        parameters = dict(layer.named_parameters())
        conversion = ft.convert(nn.Sequential(layer))
        assert conversion.swapped == ["0"]
        assert type(layer) is type(own)
        assert all(parameters[key] is value for key, value in layer.named_parameters())
        assert torch.equal(conversion.model(x), own(x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_model_without_memory(name):
    """On the device "meta" a converted layer says what it would return."""
    kind, arguments, more, shape = LAYERS[name]
    layer, x = kind(*arguments, **more, device="meta"), torch.ones(shape, device="meta")
    expected = layer(x)
    found = ft.convert(layer).model(x)
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)


def test_output_size_of_a_transposed_layer():
    layer = ft.ConvTranspose2d(3, 4, 3, stride=2)
    assert layer(torch.ones(1, 3, 5, 5), output_size=[12, 11]).shape == (1, 4, 12, 11)


def test_convert_leaves_what_it_cannot_compute():
    class Own(nn.Conv2d):
        pass

    model = nn.ModuleDict(
        {"a": nn.Conv2d(1, 2, 3), "b": Own(1, 2, 3), "c": nn.Conv1d(1, 2, 3, dtype=torch.complex64)}
    )
    model["d"] = ft.Conv2d(1, 2, 3)
    conversion = ft.convert(model)
    assert conversion.swapped == ["a"]
    assert conversion.left.keys() == {"b", "c"}
    assert "Own may compute something of its own" in conversion.left["b"]
    assert conversion.already == 1
    first = "1 convolutions are computed by fastconv, 2 are left alone, 1 already were fastconv's\n  b: "
    assert str(conversion).startswith(first)
    assert str(ft.convert(nn.ReLU())) == "0 convolutions are computed by fastconv, 0 are left alone"
    assert ft.convert(nn.Conv2d(1, 2, 3)).swapped == ["Conv2d"]


def test_hooks_stay():
    layer, seen = nn.Conv2d(1, 2, 3), []
    layer.register_forward_hook(lambda *arguments: seen.append(type(arguments[0])))
    ft.convert(layer).model(torch.ones(1, 1, 3, 3))
    assert seen == [ft.Conv2d]


class LeNet(nn.Module):
    """A small network that takes its functions from a module: fastconv.torch, or torch's own."""

    def __init__(self, functions):
        super().__init__()
        generator, self.functions = torch.Generator().manual_seed(0), functions
        shapes = (6, 1, 5, 5), (6,), (8, 6, 3, 3), (8,), (4, 8 * 2 * 2), (4,)
        self.parts = nn.ParameterList(0.2 * torch.randn(shape, generator=generator) for shape in shapes)

    def forward(self, x):
        f, (w1, b1, w2, b2, w3, b3) = self.functions, self.parts
        x = f.max_pool2d(f.relu(f.conv2d(x, w1, b1, padding=2)), 2)
        x = f.avg_pool2d(f.relu(f.conv2d(x, w2, b2)), 3, 2, 1)
        return f.linear(f.adaptive_avg_pool2d(x, 2).flatten(1), w3, b3)

    def learn(self, steps):
        """Losses of plain gradient descent on one batch."""
        generator = torch.Generator().manual_seed(1)
        x, labels = torch.randn(8, 1, 12, 12, generator=generator), torch.arange(8) % 4
        optimiser, losses = torch.optim.SGD(self.parameters(), lr=0.1), []
        for _ in range(steps):
            optimiser.zero_grad()
            loss = self.functions.cross_entropy(self(x), labels)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses


def test_a_network_learns_as_on_torchs_own_functions():
    found, expected = LeNet(ft).learn(20), LeNet(nn.functional).learn(20)
    assert expected[-1] < 0.5 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_network_compiled_without_a_break():
    """Its losses, through compiled forward and backward passes, are those of the network as it stands."""
    torch.compiler.reset()
    network = LeNet(ft)
    expected = LeNet(ft).learn(3)
    network.forward = torch.compile(network.forward, fullgraph=True, backend="aot_eager")
    np.testing.assert_allclose(network.learn(3), expected, rtol=1e-5)


def make_network():
    torch.manual_seed(0)
    return ft.convert(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3))).model


def gradients_of_half(rank, folder):
    """One of two processes: the network's gradients, averaged over both halves of a batch."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    network = nn.parallel.DistributedDataParallel(make_network())
    half = make_batch()[2 * rank : 2 * rank + 2]
    network(half).square().mean().backward()
    np.savez(f"{folder}/{rank}.npz", *(parameter.grad.numpy() for parameter in network.parameters()))
    torch.distributed.destroy_process_group()


def make_batch():
    return torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def test_distributed_data_parallel(tmp_path):
    """Two processes with half a batch each get the gradients of one process with the whole batch."""
    torch.multiprocessing.spawn(gradients_of_half, (str(tmp_path),), nprocs=2)
    network = make_network()
    network(make_batch()).square().mean().backward()
    expected = [parameter.grad.numpy() for parameter in network.parameters()]
    for rank in (0, 1):
        with np.load(tmp_path / f"{rank}.npz") as found:
            for key, gradient in zip(found.files, expected, strict=True):
                np.testing.assert_allclose(found[key], gradient, rtol=1e-5, atol=1e-6)
