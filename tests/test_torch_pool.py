"""The poolings of fastconv.torch: against torch's, their gradients, and torch's checks of the operators."""

import inspect
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.autograd import gradcheck, gradgradcheck  # noqa: E402 - torch may be missing
from torch.library import opcheck  # noqa: E402
from torch.nn import functional  # noqa: E402

import fastconv  # noqa: E402
import fastconv.torch as ft  # noqa: E402
from fastconv import pool_grad  # noqa: E402
from fastconv.problem import ConvError  # noqa: E402

# name -> function, shape of the input, options
MAXIMA = {
    "signal": ("max_pool1d", (2, 3, 9), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    "pairs": ("max_pool2d", (2, 3, 6, 5), {"kernel_size": 2}),
    "stem": (
        "max_pool2d", (2, 3, 7, 8),
        {"kernel_size": (3, 2), "stride": 2, "padding": 1, "dilation": (1, 2)},
    ),
    "volume": ("max_pool3d", (1, 2, 4, 5, 6), {"kernel_size": 2, "stride": (1, 2, 3), "padding": 1}),
    "shared out": ("adaptive_max_pool2d", (2, 3, 7, 5), {"output_size": (3, 4)}),
    "shared signal": ("adaptive_max_pool1d", (2, 3, 7), {"output_size": 3}),
}  # fmt: skip
AVERAGES = {
    "signal": ("avg_pool1d", (2, 3, 9), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "pairs": ("avg_pool2d", (2, 3, 6, 5), {"kernel_size": 2}),
    "uncounted": (
        "avg_pool2d", (2, 3, 7, 8),
        {"kernel_size": (4, 3), "stride": 3, "padding": 1, "ceil_mode": True, "count_include_pad": False},
    ),
    "divided": ("avg_pool2d", (1, 2, 5, 6), {"kernel_size": 2, "divisor_override": 8}),
    "volume": ("avg_pool3d", (1, 2, 4, 5, 6), {"kernel_size": 2, "stride": (1, 2, 3), "padding": 1}),
    "shared out": ("adaptive_avg_pool2d", (2, 3, 7, 5), {"output_size": (3, None)}),
    "shared signal": ("adaptive_avg_pool1d", (2, 3, 7), {"output_size": 3}),
    "shared volume": ("adaptive_avg_pool3d", (1, 2, 4, 5, 6), {"output_size": 2}),
}  # fmt: skip
ALL = [*MAXIMA.values(), *AVERAGES.values()]
IDS = [*(f"maxima {name}" for name in MAXIMA), *(f"averages {name}" for name in AVERAGES)]

every_maximum = pytest.mark.parametrize(("op", "shape", "options"), MAXIMA.values(), ids=list(MAXIMA))
every_pool = pytest.mark.parametrize(("op", "shape", "options"), ALL, ids=IDS)


def make(shape, dtype=torch.float64, is_last=False):
    """A tensor that needs a gradient, of distinct whole numbers, so that every maximum is one element."""
    count = torch.Size(shape).numel()
    x = torch.randperm(count, generator=torch.Generator().manual_seed(count)).reshape(shape).to(dtype)
    return (x.movedim(1, -1).contiguous().movedim(-1, 1) if is_last else x).requires_grad_()


def bound(dtype):
    """Averages of ours and of torch's are each rounded once, and their sums in float64 or float32."""
    return {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0}


def channels_last(x):
    return x.movedim(1, -1).is_contiguous()


@every_pool
class TestPools:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("is_last", [False, True], ids=["NCHW", "NHWC"])
    def test_torch(self, op, shape, options, dtype, is_last):
        x, theirs = make(shape, dtype, is_last), make(shape, dtype, is_last)
        y, wanted = getattr(ft, op)(x, **options), getattr(functional, op)(theirs, **options)
        torch.testing.assert_close(y, wanted, **bound(dtype))
        (y * y).sum().backward()
        (wanted * wanted).sum().backward()
        torch.testing.assert_close(x.grad, theirs.grad, **bound(dtype))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_types(self, op, shape, options, dtype):
        """As in float32, rounded once; the gradient too, where it is not summed over windows."""
        x, wide = make(shape, dtype), make(shape, dtype).detach().float().requires_grad_()
        y, wanted = getattr(ft, op)(x, **options), getattr(ft, op)(wide, **options)
        assert y.dtype == dtype
        assert torch.equal(y, wanted.to(dtype))
        y.sum().backward()
        wanted.sum().backward()
        assert torch.equal(x.grad, wide.grad.to(dtype))

    def test_gradients(self, op, shape, options):
        def function(x):
            return getattr(ft, op)(x, **options)

        assert gradcheck(function, make(shape), fast_mode=True)
        assert gradgradcheck(function, make(shape), fast_mode=True)

    def test_compiled_without_a_break(self, op, shape, options):
        """Also for sizes that the compiler does not know, forwards and backwards, in either memory order."""
        torch.compiler.reset()
        function = getattr(ft, op)
        compiled = torch.compile(
            lambda x: function(x, **options).square(), fullgraph=True, backend="aot_eager"
        )
        for is_last, more in ((False, 0), (False, 1), (False, 2), (True, 3)):
            size = (*shape[:-1], shape[-1] + more)
            x, own = make(size, is_last=is_last), make(size, is_last=is_last)
            y, wanted = compiled(x), function(own, **options).square()
            assert torch.equal(y, wanted)
            y.sum().backward()
            wanted.sum().backward()
            assert torch.equal(x.grad, own.grad)

    def test_without_batch(self, op, shape, options):
        x = make(shape)
        y = getattr(ft, op)(x[0], **options)
        assert torch.equal(y, getattr(ft, op)(x, **options)[0])
        y.sum().backward()
        assert x.grad[0].any()

    def test_memory_order_is_kept(self, op, shape, options):
        x = make(shape, is_last=True)
        y = getattr(ft, op)(x, **options)
        assert channels_last(y)
        y.backward(torch.ones_like(y))
        assert channels_last(x.grad)

    def test_autocast_changes_nothing(self, op, shape, options):
        x = make(shape, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert getattr(ft, op)(x, **options).dtype == torch.float32
            assert getattr(ft, op)(x.bfloat16(), **options).dtype == torch.bfloat16

    def test_no_samples(self, op, shape, options):
        x = torch.zeros((0, *shape[1:]), requires_grad=True)
        y = getattr(ft, op)(x, **options)
        assert y.shape == (0, *getattr(ft, op)(make(shape), **options).shape[1:])
        y.sum().backward()
        assert x.grad.shape == x.shape

    def test_it_is_computed_by_fastconv(self, op, shape, options, monkeypatch):
        """Both passes."""
        called = []
        for module, name in ((fastconv, op), (pool_grad, f"{op}_input")):
            real = getattr(module, name)
            monkeypatch.setattr(
                module, name, lambda *a, real=real, n=name, **k: called.append(n) or real(*a, **k)
            )
        getattr(ft, op)(make(shape), **options).sum().backward()
        assert called == [op, f"{op}_input"]

    def test_signature(self, op, shape, options):
        assert signature(getattr(ft, op)) == signature(getattr(fastconv, op))


def signature(function):
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


@every_maximum
class TestMaxima:
    def test_indices(self, op, shape, options):
        x = make(shape)
        maxima, indices = getattr(ft, op)(x, **options, return_indices=True)
        wanted, places = getattr(functional, op)(x, **options, return_indices=True)
        assert torch.equal(maxima, wanted)
        assert torch.equal(indices, places)
        assert not indices.requires_grad
        maxima, indices = getattr(ft, op)(x[0], **options, return_indices=True)
        assert torch.equal(indices, places[0])

    def test_second_gradient(self, op, shape, options):
        """Of a sum of squares: that of the maxima is 2, that of the others 0; torch agrees."""
        results = []
        for function in (getattr(ft, op), getattr(functional, op)):
            x = make(shape)
            (first,) = torch.autograd.grad(function(x, **options).pow(3).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x)
            results.append(second)
        assert results[0].any()
        assert torch.equal(*results)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("name", ["max_pool", "avg_pool"])
def test_random_options(name, ndim, rng):
    for _ in range(30):
        kernel = rng.integers(1, 4, ndim)
        sizes = 2 * kernel + rng.integers(0, 5, ndim)
        options = {
            "kernel_size": kernel.tolist(),
            "padding": (rng.integers(0, 2, ndim) % (kernel // 2 + 1)).tolist(),
        }
        options |= {"stride": rng.integers(1, 4, ndim).tolist(), "ceil_mode": bool(rng.integers(2))}
        if name == "max_pool":
            options["dilation"] = rng.integers(1, 3, ndim).tolist()
        else:
            options["count_include_pad"] = bool(rng.integers(2))
        results = []
        for module in (ft, functional):
            x = make((2, 3, *sizes.tolist()), torch.float32)
            y = getattr(module, f"{name}{ndim}d")(x, **options)
            y.sum().backward()
            results.append((y, x.grad))
        for found, wanted in zip(*results):
            torch.testing.assert_close(
                found, wanted, **({"rtol": 0, "atol": 0} if name == "max_pool" else bound(x.dtype))
            )


def test_sizes_of_numpy():
    x = make((2, 3, 6, 6))
    assert torch.equal(ft.max_pool2d(x, np.int64(2), np.int32(3)), ft.max_pool2d(x, 2, 3))


def test_windows_of_padding_only():
    """They give -inf and no gradient, once or twice."""
    x = torch.tensor([[[1.0]]], dtype=torch.float64, requires_grad=True)
    options = {"kernel_size": 2, "stride": 3, "padding": 1, "dilation": 4}
    y, indices = ft.max_pool1d(torch.ones(1, 1, 5), 2, 1, 1, 3, return_indices=True)
    assert (y.isfinite() == (indices >= 0)).all()
    y = ft.max_pool1d(x.expand(1, 1, 3), **options)
    assert y.isinf().tolist() == [[[True]]]
    (first,) = torch.autograd.grad(y, x, torch.ones_like(y).requires_grad_(), create_graph=True)
    assert first.item() == 0
    (second,) = torch.autograd.grad(
        torch.ops.fastconv.max_pool_input(
            grad := torch.ones(1, 1, 1, dtype=torch.float64, requires_grad=True),
            torch.tensor([[[-1]]]), [1, 1, 3], 1, [2], [3], [1], [4], False,
        ).sum(),
        grad,
    )  # fmt: skip
    assert second.item() == 0


class TestUnpool:
    @pytest.mark.parametrize("size", [None, (7, 6), (2, 3, 7, 6)], ids=["least", "size", "shape"])
    @pytest.mark.parametrize("is_last", [False, True], ids=["NCHW", "NHWC"])
    def test_torch(self, size, is_last):
        pooled, indices = ft.max_pool2d(make((2, 3, 6, 6), is_last=is_last), 2, return_indices=True)
        results = []
        for function in (ft.max_unpool2d, functional.max_unpool2d):
            x = pooled.detach().requires_grad_()
            y = function(x, indices, 2, output_size=size)
            (y * y).sum().backward()
            results.append((y, x.grad))
        assert all(torch.equal(*pair) for pair in zip(*results))
        assert channels_last(results[0][0]) == is_last
        one = ft.max_unpool2d(pooled[0], indices[0], 2, output_size=size and size[-3:])
        assert torch.equal(one, results[0][0][0])

    def test_gradients(self):
        """Of windows that do not overlap: an element that is written twice has one of the two."""
        pooled, indices = ft.max_pool2d(make((1, 2, 4, 5)), 2, return_indices=True)
        pooled = pooled.detach().requires_grad_()
        assert gradcheck(lambda x: ft.max_unpool2d(x, indices, 2), pooled)
        assert gradgradcheck(lambda x: ft.max_unpool2d(x, indices, 2), pooled)

    def test_compiled_without_a_break(self):
        torch.compiler.reset()

        def there_and_back(x):
            return ft.max_unpool2d(*ft.max_pool2d(x, 2, return_indices=True), 2, output_size=x.shape)

        compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
        for size in (5, 6, 7):
            x, own = make((2, 3, 5, size)), make((2, 3, 5, size))
            y, wanted = compiled(x), there_and_back(own)
            assert torch.equal(y, wanted)
            y.sum().backward()
            wanted.sum().backward()
            assert torch.equal(x.grad, own.grad)

    def test_signature(self):
        assert signature(ft.max_unpool2d) == signature(fastconv.max_unpool2d)


GRAD = (2, 3, 3, 3)
WINDOWS = ([2, 3], [3, 2], [1, 0])  # of (2, 3, 6, 8), which gives GRAD
INDICES = torch.arange(54).reshape(GRAD) % 48
OPERATORS = {
    "max_pool": ((2, 3, 6, 8), (2, *WINDOWS, [1, 1], False)),
    "max_pool_input": (GRAD, (INDICES, [2, 3, 6, 8], 2, *WINDOWS, [1, 1], False)),
    "adaptive_max_pool": ((2, 3, 6, 8), (2, [3, 3])),
    "adaptive_max_pool_input": (GRAD, (INDICES, [2, 3, 6, 8], 2)),
    "avg_pool": ((2, 3, 6, 8), (2, *WINDOWS, True, True, None)),
    "avg_pool_input": (GRAD, ([2, 3, 6, 8], 2, *WINDOWS, False, False, 5)),
    "adaptive_avg_pool": ((2, 3, 6, 8), (2, [3, 3])),
    "adaptive_avg_pool_input": (GRAD, ([2, 3, 6, 8], 2)),
    "max_unpool": (GRAD, (INDICES % 36, [2, 2], [2, 2], [0, 0], None)),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("is_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("samples", [2, 0])
def test_operators(name, is_last, samples):
    """Schema, autograd, the fake with its strides, and symbolic sizes, by torch's own checks."""
    shape, options = OPERATORS[name]
    operator = getattr(torch.ops.fastconv, name).default
    options = [option[:samples] if isinstance(option, torch.Tensor) else option for option in options]
    options = [
        [samples, *option[1:]] if isinstance(option, list) and len(option) == 4 else option
        for option in options
    ]
    x = make((samples, *shape[1:]), torch.float32, is_last)
    opcheck(operator, (x, *options))
    meta = [option.to("meta") if isinstance(option, torch.Tensor) else option for option in (x, *options)]
    results = [operator(*arguments) for arguments in ((x, *options), meta)]
    pairs = [result if isinstance(result, tuple) else (result,) for result in results]
    for found, promised in zip(*pairs, strict=True):
        assert found.stride() == promised.stride()  # of no samples too


BAD = {
    "axes": (
        lambda: ft.max_pool2d(make((1, 2, 3, 4, 5)), 2), ConvError,
        "max_pool2d: input (N, C, H, W) must have 4 axes (3 without N), got 5",
    ),
    "kernels": (lambda: ft.max_pool2d(make((2, 3, 4)), (2, 2, 2)), ConvError, "max_pool2d: len(kernel_size)"),
    "kernel of another type": (
        lambda: ft.max_pool2d(make((2, 3, 4)), 2.0), TypeError,
        "max_pool2d: kernel_size must be an",
    ),
    "size of another type": (
        lambda: ft.adaptive_avg_pool1d(make((2, 3)), 2.5), TypeError,
        "adaptive_avg_pool1d: output_size must",
    ),
    "kernel that is a truth": (
        lambda: ft.max_pool2d(make((2, 3, 4)), True), TypeError,
        "got True of type bool",
    ),
    "stride": (
        lambda: ft.avg_pool2d(make((2, 3, 4)), 2, 1.5), TypeError,
        "avg_pool2d: stride must be an int",
    ),
    "no stride": (
        lambda: ft.avg_pool2d(make((2, 3, 4)), 2, 0), ConvError,
        "avg_pool2d: stride must be at least",
    ),
    "size that is a truth": (
        lambda: ft.adaptive_max_pool1d(make((2, 3)), True), TypeError,
        "adaptive_max_pool1d: output_size must",
    ),
    "size of no shape": (
        lambda: ft.max_unpool2d(make((1, 2, 2)), INDICES[0, :1, :2, :2], 2, output_size=4), TypeError,
        "max_unpool2d: output_size must be a tuple of ints, got 4",
    ),
    "array": (
        lambda: ft.max_pool2d(np.ones((1, 3, 4)), 2), TypeError,
        "max_pool2d: input must be a torch tensor, got numpy.ndarray",
    ),
    "array to average": (
        lambda: ft.adaptive_avg_pool2d(np.ones((1, 3, 4)), 2), TypeError,
        "adaptive_avg_pool2d: input must be a torch tensor, got numpy.ndarray",
    ),
    "array of indices": (
        lambda: ft.max_unpool2d(make((1, 2, 2)), np.ones((1, 2, 2)), 2), TypeError,
        "max_unpool2d: indices must be a torch tensor, got numpy.ndarray",
    ),
    "padding": (
        lambda: ft.avg_pool2d(make((2, 3, 4)), 2, padding=2), ConvError,
        "avg_pool2d: padding must be at most kernel_size // 2 = 2 // 2 = 1, got 2",
    ),
    "divisor": (
        lambda: ft.avg_pool3d(make((2, 3, 4, 5)), 2, divisor_override=0), ConvError,
        "avg_pool3d: divisor_override must not be 0",
    ),
    "size": (
        lambda: ft.adaptive_avg_pool1d(make((2, 3)), 0), ConvError,
        "adaptive_avg_pool1d: output_size must be at least 1, got 0",
    ),
    "sizes": (lambda: ft.adaptive_max_pool2d(make((2, 3, 4)), (1, 1, 1)), ConvError, "len(output_size) must"),
    "dtype": (lambda: ft.max_pool1d(torch.ones(1, 3).int(), 2), TypeError, "max_pool1d: input.dtype must be"),
    "unpooled size": (
        lambda: ft.max_unpool2d(make((1, 2, 2)), INDICES[0, :1, :2, :2], 2, output_size=(9, 4)), ConvError,
        "max_unpool2d: output_size must lie between 2 and 6",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=list(BAD))
def test_errors_are_those_of_fastconv(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
