"""Pooling and its gradients against their definition, on every backend; and against torch if it is there."""

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastconv
from fastconv import ConvError, grad
from fastconv.gpu import pool as gpu_pool
from fastconv.gpu import product
from fastconv.pool_problem import make_adaptive_pool, make_pool
from tests import cuda_stand_in
from tests.backends import EMULATOR
from tests.compare import assert_bounded, assert_exact, finfo, foreign_layouts, integers, layouts, normals
from tests.places import everywhere

ORDERS = ("NCHW", "NHWC")


# ---- the definition: windows as lists of places ----


def slide(size, kernel, stride, padding, dilation, ceil_mode):
    """The windows along an axis, each as the list of its taps, found by sliding it until it falls off."""
    windows, extent, start = [], dilation * (kernel - 1) + 1, -padding
    while start + extent <= size + padding:
        windows.append([start + tap * dilation for tap in range(kernel)])
        start += stride
    over = start + extent - size - padding
    if ceil_mode and start < size and 0 < over < stride:
        windows.append([start + tap * dilation for tap in range(kernel)])
    return windows


def share_out(size, outputs):
    """The windows along an axis that adaptive pooling shares out."""
    return [
        list(range(math.floor(i * size / outputs), math.ceil((i + 1) * size / outputs)))
        for i in range(outputs)
    ]


def per_axis(value, ndim):
    return value if isinstance(value, (tuple, list)) else (value,) * ndim


def windows_of(op, sizes, options):
    """Per spatial axis the windows of a call."""
    ndim = len(sizes)
    if op.startswith("adaptive"):
        wanted = per_axis(options["output_size"], ndim)
        return [share_out(size, out or size) for size, out in zip(sizes, wanted)]
    kernel = per_axis(options["kernel_size"], ndim)
    stride = per_axis(options.get("stride") or kernel, ndim)
    rest = [per_axis(options.get(name, least), ndim) for name, least in (("padding", 0), ("dilation", 1))]
    ceil_mode = options.get("ceil_mode", False)
    return [slide(*axis, ceil_mode) for axis in zip(sizes, kernel, stride, *rest)]


def look(windows, sizes):
    """Every output's place with the places of the elements that its window sees, in order."""
    for at in itertools.product(*(range(len(axis)) for axis in windows)):
        taps = [axis[i] for axis, i in zip(windows, at)]
        inside = [[tap for tap in axis if 0 <= tap < size] for axis, size in zip(taps, sizes)]
        yield at, taps, list(itertools.product(*inside))


def greatest(elements):
    """The number of the greatest element: the first of equal ones, the last NaN."""
    best = 0
    for i, element in enumerate(elements):
        if element > elements[best] or math.isnan(element):
            best = i
    return best


def define_max(x, windows):
    """The maxima and their places, of x (N, C, ...)."""
    sizes, shape = x.shape[2:], (*x.shape[:2], *map(len, windows))
    maxima, places = np.full(shape, -np.inf), np.full(shape, -1)
    for at, _, seen in look(windows, sizes):
        for n, c in np.ndindex(x.shape[:2]) if seen else ():
            best = seen[greatest([x[(n, c, *place)] for place in seen])]
            maxima[(n, c, *at)] = x[(n, c, *best)]
            places[(n, c, *at)] = np.ravel_multi_index(best, sizes)
    return maxima, places


def divisor_of(op, taps, seen, sizes, options):
    if options.get("divisor_override") is not None:
        return options["divisor_override"]
    if op.startswith("adaptive") or not options.get("count_include_pad", True):
        return len(seen)
    paddings = per_axis(options.get("padding", 0), len(sizes))
    return math.prod(
        sum(tap < size + padding for tap in axis) for axis, size, padding in zip(taps, sizes, paddings)
    )


def define_average(op, x, windows, options):
    result = np.zeros((*x.shape[:2], *map(len, windows)))
    for at, taps, seen in look(windows, x.shape[2:]):
        total = sum(x[(slice(None), slice(None), *place)].astype(np.float64) for place in seen)
        result[(slice(None), slice(None), *at)] = total / divisor_of(op, taps, seen, x.shape[2:], options)
    return result


def define_average_input(op, sizes, gradient, windows, options):
    result = np.zeros((*gradient.shape[:2], *sizes))
    for at, taps, seen in look(windows, sizes):
        share = gradient[(slice(None), slice(None), *at)] / divisor_of(op, taps, seen, sizes, options)
        for place in seen:
            result[(slice(None), slice(None), *place)] += share
    return result


def define_max_input(sizes, places, gradient):
    outer = math.prod(gradient.shape[:2])
    result = np.zeros((outer, math.prod(sizes)))
    rows = np.arange(outer)[:, None]
    np.add.at(result, (rows, places.reshape(outer, -1)), gradient.reshape(outer, -1))
    return result.reshape(*gradient.shape[:2], *sizes)


# ---- what is pooled ----

MAXIMA = {
    "global": ("max_pool2d", (2, 3, 4, 5), {"kernel_size": (4, 5)}),
    "stem": ("max_pool2d", (2, 3, 11, 20), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "dense": ("max_pool2d", (1, 5, 7, 30), {"kernel_size": (2, 3), "stride": 1, "padding": (1, 0)}),
    "ceil": ("max_pool2d", (1, 2, 8, 9), {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True}),
    "dilated": (
        "max_pool2d", (1, 2, 9, 23),
        {"kernel_size": 3, "stride": (1, 3), "padding": 1, "dilation": (2, 3)},
    ),
    "gaps": ("max_pool2d", (1, 2, 9, 40), {"kernel_size": 1, "stride": 4}),
    "signal": ("max_pool1d", (2, 3, 17), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    "volume": ("max_pool3d", (1, 2, 5, 6, 9), {"kernel_size": (2, 3, 1), "stride": 2, "padding": (1, 1, 0)}),
    "uneven": ("adaptive_max_pool2d", (2, 3, 7, 10), {"output_size": (3, 4)}),
    "uneven signal": ("adaptive_max_pool1d", (2, 3, 5), {"output_size": 7}),
}  # fmt: skip
AVERAGES = {
    "pairs": ("avg_pool2d", (2, 3, 6, 20), {"kernel_size": 2}),
    "padded": (
        "avg_pool2d", (1, 3, 8, 19),
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    ),
    "uncounted": (
        "avg_pool2d", (1, 3, 8, 9),
        {"kernel_size": (4, 3), "stride": 3, "padding": 1, "ceil_mode": True, "count_include_pad": False},
    ),
    "divided": ("avg_pool2d", (1, 3, 8, 9), {"kernel_size": 3, "padding": 1, "divisor_override": -2}),
    "signal": ("avg_pool1d", (2, 3, 17), {"kernel_size": 4, "stride": 3, "padding": 2}),
    "volume": (
        "avg_pool3d", (1, 2, 5, 6, 9),
        {"kernel_size": 3, "stride": (1, 2, 2), "padding": 1, "count_include_pad": False},
    ),
    "global": ("adaptive_avg_pool2d", (2, 3, 7, 9), {"output_size": 1}),
    "even": ("adaptive_avg_pool2d", (1, 3, 6, 30), {"output_size": (None, 10)}),
    "uneven": ("adaptive_avg_pool2d", (1, 3, 7, 10), {"output_size": (4, 13)}),
    "uneven signal": ("adaptive_avg_pool1d", (2, 3, 11), {"output_size": 4}),
    "uneven volume": ("adaptive_avg_pool3d", (1, 2, 5, 6, 7), {"output_size": (2, 6, 3)}),
}  # fmt: skip
BOTH = [*MAXIMA.values(), *AVERAGES.values()]

every_maximum = pytest.mark.parametrize(("op", "shape", "options"), MAXIMA.values(), ids=list(MAXIMA))
every_average = pytest.mark.parametrize(("op", "shape", "options"), AVERAGES.values(), ids=list(AVERAGES))
every_order = pytest.mark.parametrize("order", ORDERS)


def in_order(array, order):
    """The same values with the channels first or last in memory."""
    if order == "NCHW":
        return np.ascontiguousarray(array)
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)


def is_in_order(array, order):
    return (array if order == "NCHW" else np.moveaxis(array, 1, -1)).flags.c_contiguous


def tells_order(array):
    """Whether strides say how an array lies: one pixel has its channels first and last."""
    return math.prod(array.shape[2:]) > 1


def strange(rng, shape, dtype="float32"):
    """Whole numbers, of which many are equal, among them -inf and NaN."""
    x, chance = integers(rng, shape, dtype), rng.random(shape)
    x[chance < 0.3] = -np.inf
    x[chance < 0.05] = np.nan
    return x


class TestForward:
    @every_order
    @every_maximum
    @everywhere
    def test_maxima_and_their_places(self, place, op, shape, options, order, rng):
        x = in_order(strange(rng, shape), order)
        maxima, places = define_max(x, windows_of(op, shape[2:], options))
        function = getattr(fastconv, op)
        found, indices = map(place.host, function(place.make(x), **options, return_indices=True))
        assert_exact(found, maxima, "float32")
        assert_exact(indices, places, "int64")
        assert is_in_order(found, order)
        assert is_in_order(indices, order)
        assert_exact(place.host(function(place.make(x), **options)), maxima, "float32")

    @every_order
    @every_average
    @everywhere
    def test_averages(self, place, op, shape, options, order, rng):
        """Sums of small whole numbers are exact, so that only the division rounds."""
        x = in_order(integers(rng, shape), order)
        expected = define_average(op, x, windows_of(op, shape[2:], options), options)
        found = place.host(getattr(fastconv, op)(place.make(x), **options))
        assert_exact(found, expected, "float32")
        assert is_in_order(found, order)

    @every_average
    @everywhere
    def test_rounding_of_averages(self, place, op, shape, options, rng):
        x = normals(rng, shape)
        windows = windows_of(op, shape[2:], options)
        terms = math.prod(max(map(len, axis)) for axis in windows)
        bound = terms * finfo("float32").eps * np.abs(define_average(op, np.abs(x), windows, options))
        found = place.host(getattr(fastconv, op)(place.make(x), **options))
        assert_bounded(found, define_average(op, x, windows, options), bound, "float32")

    @pytest.mark.parametrize("case", ["stem", "uneven"])
    @pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
    @everywhere
    def test_dtypes(self, place, dtype, case, rng):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        if place.backend.name == "gpu" and dtype == "bfloat16":
            pytest.skip("CuPy makes no arrays of bfloat16")
        dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
        op, shape, options = MAXIMA[case]
        x, windows = integers(rng, shape, dtype), windows_of(op, shape[2:], options)
        maxima, places = define_max(x.astype("float64"), windows)
        found, indices = getattr(fastconv, op)(place.make(x), **options, return_indices=True)
        assert_exact(place.host(found), maxima, dtype)
        assert_exact(place.host(indices), places, "int64")
        op, shape, options = AVERAGES["padded"]
        x, windows = integers(rng, shape, dtype), windows_of(op, shape[2:], options)
        found = fastconv.avg_pool2d(place.make(x), **options)
        expected = define_average(op, x, windows, options)
        assert_exact(place.host(found), expected.astype("float32" if dtype.itemsize < 4 else dtype), dtype)

    @pytest.mark.parametrize("form", ["layouts", "foreign_layouts"])
    @pytest.mark.parametrize("case", ["stem", "uneven", "dilated"])
    def test_any_memory_layout(self, case, form, rng):
        op, shape, options = MAXIMA[case]
        values = strange(rng, shape)
        maxima, places = define_max(values, windows_of(op, shape[2:], options))
        for name, x in (layouts if form == "layouts" else foreign_layouts)(values):
            found, indices = getattr(fastconv, op)(x, **options, return_indices=True)
            assert_exact(found, maxima, "float32")
            assert np.array_equal(indices, places), name

    @everywhere
    def test_strided_arrays(self, place, rng):
        values = strange(rng, (2, 3, 11, 20))
        op, _, options = MAXIMA["stem"]
        expected, _ = define_max(values, windows_of(op, values.shape[2:], options))
        for name, x in layouts(values):
            if name != "read-only":  # which arrays of CuPy never are
                assert_exact(place.host(fastconv.max_pool2d(place.make(x), **options)), expected, "float32")

    @pytest.mark.parametrize(("op", "shape", "options"), BOTH)
    def test_without_a_batch_and_without_samples(self, op, shape, options, rng):
        x, function = integers(rng, shape), getattr(fastconv, op)
        whole = function(x[:1], **options)
        assert_exact(function(x[0], **options), whole[0].astype("float64"), "float32")
        empty = function(x[:0], **options)
        assert (empty.shape, empty.dtype) == ((0, *whole.shape[1:]), np.float32)

    @everywhere
    def test_windows_of_nothing_but_padding(self, place):
        x = place.make(np.ones((1, 1, 4), np.float32))
        found, indices = fastconv.max_pool1d(x, 2, padding=1, dilation=5, return_indices=True)
        assert place.host(found).tolist() == [[[-np.inf]]]
        assert place.host(indices).tolist() == [[[-1]]]
        back = grad.max_pool1d_input((1, 1, 4), indices, found, 2, padding=1, dilation=5)
        assert place.host(back).tolist() == [[[0, 0, 0, 0]]]

    def test_threads_do_not_change_a_bit(self, rng, monkeypatch):
        x = normals(rng, (2, 16, 60, 60))
        for order in ORDERS:
            for function, options in (
                (fastconv.avg_pool2d, {"kernel_size": 3, "stride": 1, "padding": 1}),
                (fastconv.adaptive_avg_pool2d, {"output_size": 7}),
            ):
                results = []
                for threads in ("1", "3"):
                    monkeypatch.setenv("FASTCONV_THREADS", threads)
                    results.append(function(in_order(x, order), **options).tobytes())
                assert results[0] == results[1]

    def test_a_sample_has_the_same_bits_in_every_batch(self, rng):
        x = normals(rng, (5, 3, 20, 20))
        whole = fastconv.avg_pool2d(x, 3, 2, 1)
        assert whole[3:4].tobytes() == fastconv.avg_pool2d(x[3:4], 3, 2, 1).tobytes()


class TestGradients:
    @every_order
    @every_maximum
    @everywhere
    def test_of_maxima(self, place, op, shape, options, order, rng):
        x = integers(rng, shape)
        maxima, places = define_max(x, windows_of(op, shape[2:], options))
        gradient = in_order(integers(rng, maxima.shape), order)
        rest = {} if op.startswith("adaptive") else options
        arguments = place.make(in_order(places, order)), place.make(gradient)
        found = place.host(getattr(grad, f"{op}_input")(shape, *arguments, **rest))
        assert_exact(found, define_max_input(shape[2:], places, gradient), "float32")
        assert is_in_order(found, order if tells_order(gradient) else "NCHW")

    @every_order
    @every_average
    @everywhere
    def test_of_averages(self, place, op, shape, options, order, rng):
        windows = windows_of(op, shape[2:], options)
        gradient = in_order(integers(rng, (*shape[:2], *map(len, windows))), order)
        rest = {} if op.startswith("adaptive") else options
        found = place.host(getattr(grad, f"{op}_input")(shape, place.make(gradient), **rest))
        expected = define_average_input(op, shape[2:], gradient, windows, options)
        shares = define_average_input(op, shape[2:], np.abs(gradient), windows, options)
        assert_bounded(found, expected, 30 * finfo("float32").eps * np.abs(shares), "float32")
        assert is_in_order(found, order if tells_order(gradient) else "NCHW")

    @every_average
    def test_of_averages_are_the_transpose(self, op, shape, options, rng):
        """<avg_pool(x), g> = <x, avg_pool_input(g)>, for a pooling is linear."""
        x = normals(rng, shape, "float64")
        y = getattr(fastconv, op)(x, **options)
        gradient = normals(rng, y.shape, "float64")
        rest = {} if op.startswith("adaptive") else options
        back = getattr(grad, f"{op}_input")(shape, gradient, **rest)
        assert math.isclose((y * gradient).sum(), (x * back).sum(), rel_tol=1e-12)

    @every_maximum
    def test_of_maxima_by_differences(self, op, shape, options, rng):
        x = (
            rng.permutation(math.prod(shape)).reshape(shape).astype(np.float64)
        )  # no two alike: differentiable
        function = getattr(fastconv, op)
        y, indices = function(x, **options, return_indices=True)
        gradient, step = normals(rng, y.shape, "float64"), normals(rng, shape, "float64")
        rest = {} if op.startswith("adaptive") else options
        back = getattr(grad, f"{op}_input")(shape, indices, gradient, **rest)
        moved = (function(x + 1e-3 * step, **options) - function(x - 1e-3 * step, **options)) / 2e-3
        finite = np.isfinite(y)
        assert math.isclose((moved * gradient)[finite].sum(), (back * step).sum(), rel_tol=1e-8, abs_tol=1e-8)

    @pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
    @everywhere
    def test_dtypes(self, place, dtype, rng):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        if place.backend.name == "gpu" and dtype == "bfloat16":
            pytest.skip("CuPy makes no arrays of bfloat16")
        dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
        op, shape, options = MAXIMA["stem"]
        maxima, places = define_max(integers(rng, shape), windows_of(op, shape[2:], options))
        gradient = integers(rng, maxima.shape, dtype)
        found = grad.max_pool2d_input(shape, place.make(places), place.make(gradient), **options)
        assert_exact(place.host(found), define_max_input(shape[2:], places, gradient), dtype)
        gradient = integers(rng, (1, 2, 3, 4), dtype)
        found = place.host(grad.avg_pool2d_input((1, 2, 6, 8), place.make(gradient), 2))
        assert_exact(found, np.repeat(np.repeat(gradient / 4, 2, 2), 2, 3).astype(dtype), dtype)

    @pytest.mark.parametrize("case", ["stem", "uneven"])
    def test_any_memory_layout(self, case, rng):
        op, shape, options = MAXIMA[case]
        maxima, places = define_max(integers(rng, shape), windows_of(op, shape[2:], options))
        gradient = integers(rng, maxima.shape)
        rest = {} if op.startswith("adaptive") else options
        expected = define_max_input(shape[2:], places, gradient)
        every_second = np.zeros((*places.shape[:-1], 2 * places.shape[-1]), np.int64)
        every_second[..., ::2] = places
        for indices in (places, every_second[..., ::2]):
            for _, array in (*layouts(gradient), *foreign_layouts(gradient)):
                found = getattr(grad, f"{op}_input")(shape, indices, array, **rest)
                assert_exact(found, expected, "float32")

    def test_without_a_batch_and_without_samples(self, rng):
        _, shape, options = MAXIMA["stem"]
        y, indices = fastconv.max_pool2d(integers(rng, shape), **options, return_indices=True)
        whole = grad.max_pool2d_input(shape, indices, y, **options)
        one = grad.max_pool2d_input(shape[1:], indices[0], y[0], **options)
        assert np.array_equal(one, whole[0])
        none = grad.max_pool2d_input((0, *shape[1:]), indices[:0], y[:0], **options)
        assert none.shape == (0, *shape[1:])
        assert (
            grad.avg_pool2d_input([3, 4, 4], np.ones((3, 2, 2)), 2).tolist()
            == np.full((3, 4, 4), 0.25).tolist()
        )

    @everywhere
    def test_many_channels(self, place, rng):
        """More of them than one task of the CPU takes, channels last."""
        x = in_order(integers(rng, (2, 70, 5, 6)), "NHWC")
        maxima, places = define_max(x, windows_of("max_pool2d", (5, 6), {"kernel_size": 2, "stride": 1}))
        gradient = in_order(integers(rng, maxima.shape), "NHWC")
        arguments = place.make(in_order(places, "NHWC")), place.make(gradient)
        found = place.host(grad.max_pool2d_input(x.shape, *arguments, 2, 1))
        assert_exact(found, define_max_input((5, 6), places, gradient), "float32")


class TestUnpool:
    @every_order
    @everywhere
    def test_puts_every_element_back(self, place, order, rng):
        x = in_order(rng.permutation(2 * 3 * 6 * 8).reshape(2, 3, 6, 8).astype(np.float32), order)
        y, indices = fastconv.max_pool2d(place.make(x), 2, return_indices=True)
        found = place.host(fastconv.max_unpool2d(y, indices, 2))
        maxima, places = define_max(x, windows_of("max_pool2d", (6, 8), {"kernel_size": 2}))
        assert_exact(found, define_max_input((6, 8), places, maxima), "float32")
        if place.backend.name == "cpu":
            assert is_in_order(found, order)

    @everywhere
    def test_its_gradient_takes_from_there(self, place, rng):
        indices = rng.permuted(np.tile(np.arange(30), (2, 3, 1)), axis=2)[..., :8].reshape(2, 3, 2, 4)
        gradient = integers(rng, (2, 3, 5, 6))
        found = place.host(grad.max_unpool2d_input(place.make(indices), place.make(gradient)))
        expected = np.take_along_axis(gradient.reshape(2, 3, 30), indices.reshape(2, 3, 8), 2)
        assert_exact(found, expected.reshape(2, 3, 2, 4).astype(np.float64), "float32")

    @pytest.mark.parametrize("output", [(7, 8), (3, 7, 8), [5, 8]])
    def test_other_sizes(self, output, rng):
        y, indices = integers(rng, (3, 3, 4)), np.tile(np.arange(12).reshape(3, 4), (3, 1, 1))
        assert fastconv.max_unpool2d(y, indices, 2, output_size=output).shape == (3, *output[-2:])
        assert fastconv.max_unpool2d(y, indices, 3, 2, 1).shape == (3, 5, 7)

    @everywhere
    def test_memory_order_of_the_gradient(self, place, rng):
        gradient = np.moveaxis(integers(rng, (2, 5, 6, 3)), -1, 1)
        indices = rng.integers(0, 30, (2, 3, 2, 4))
        found = place.host(grad.max_unpool2d_input(place.make(indices), place.make(gradient)))
        assert np.moveaxis(found, 1, -1).flags.c_contiguous
        expected = np.take_along_axis(gradient.reshape(2, 3, 30), indices.reshape(2, 3, 8), 2)
        assert_exact(found, expected.reshape(2, 3, 2, 4).astype(np.float64), "float32")

    def test_byte_order_of_the_indices(self, rng):
        y, indices = integers(rng, (2, 3, 2, 4)), rng.permuted(np.tile(np.arange(32), (2, 3, 1)), axis=2)
        indices = indices[..., :8].reshape(y.shape)
        foreign = indices.astype(indices.dtype.newbyteorder())
        up = fastconv.max_unpool2d(y, foreign, 2)
        assert np.array_equal(up, fastconv.max_unpool2d(y, indices, 2))
        assert np.array_equal(grad.max_unpool2d_input(foreign, up), y)
        found = grad.max_pool2d_input(up.shape, foreign, y, 2)
        assert np.array_equal(found, grad.max_pool2d_input(up.shape, indices, y, 2))

    def test_half_types_and_no_samples(self):
        assert grad.max_unpool2d_input(np.ones((0, 2, 3, 3), int), np.ones((0, 2, 6, 6))).shape == (
            0,
            2,
            3,
            3,
        )
        y, indices = np.ones((0, 2, 3, 3), np.float16), np.ones((0, 2, 3, 3), np.int64)
        found = fastconv.max_unpool2d(y, indices, 2)
        assert (found.shape, found.dtype) == ((0, 2, 6, 6), np.float16)


class TestArrays:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_tensors(self, dtype, rng):
        torch = pytest.importorskip("torch")
        x = torch.from_numpy(integers(rng, (2, 3, 9, 11))).to(getattr(torch, dtype))
        y, indices = fastconv.max_pool2d(x, 3, 2, 1, return_indices=True)
        wanted, places = torch.nn.functional.max_pool2d(x, 3, 2, 1, return_indices=True)
        assert torch.equal(y, wanted)
        assert torch.equal(indices, places)
        back = grad.max_pool2d_input(x.shape, indices, y, 3, 2, 1)
        assert (back.dtype, back.shape) == (x.dtype, x.shape)
        up = fastconv.max_unpool2d(y, indices, 3, 2, 1)
        assert torch.equal(up, torch.nn.functional.max_unpool2d(wanted, places, 3, 2, 1))

    def test_channels_last_tensors(self, rng):
        torch = pytest.importorskip("torch")
        x = torch.from_numpy(integers(rng, (2, 3, 9, 11))).contiguous(memory_format=torch.channels_last)
        assert fastconv.avg_pool2d(x, 2).is_contiguous(memory_format=torch.channels_last)

    def test_subclasses_keep_their_kind(self):
        class Picture(np.ndarray):
            pass

        x = np.ones((1, 4, 4)).view(Picture)
        y, indices = fastconv.max_pool2d(x, 2, return_indices=True)
        assert type(y) is type(indices) is Picture

    @pytest.mark.emulator
    @pytest.mark.parametrize("place", [EMULATOR], indirect=True)
    def test_long_indices(self, place, rng, monkeypatch):
        """Offsets of 64 bits give what those of 32 bits give."""
        monkeypatch.setattr(product, "_FIRST_LONG", 0)
        for op, shape, options in (MAXIMA["stem"], MAXIMA["uneven"]):
            TestForward().test_maxima_and_their_places(place, op, shape, options, "NCHW", rng)
            TestGradients().test_of_maxima(place, op, shape, options, "NCHW", rng)
        for op, shape, options in (AVERAGES["padded"], AVERAGES["uneven"]):
            TestForward().test_averages(place, op, shape, options, "NCHW", rng)
            TestGradients().test_of_averages(place, op, shape, options, "NCHW", rng)

    def test_the_bound_counts_what_adaptive_windows_multiply(self):
        """Window i begins at i * size // outputs: a product that is larger than every size."""
        problem = make_adaptive_pool("adaptive_avg_pool1d", (1, 1, 60000), 40000)
        given = np.zeros(problem.input_shape5, np.int8), np.zeros(problem.output_shape5, np.int8), None
        assert gpu_pool._describe(problem, given)[1] >= 2**31

    @pytest.mark.parametrize("kind", cuda_stand_in.KINDS)
    @pytest.mark.emulator
    @pytest.mark.parametrize("place", [EMULATOR], indirect=True)
    def test_every_kind_on_a_device(self, place, kind, rng, monkeypatch):
        kind = cuda_stand_in.make_kind(kind, [], monkeypatch)
        x = integers(rng, (2, 3, 8, 8))
        y, indices = fastconv.max_pool2d(kind.make(x), 2, return_indices=True)
        assert type(y) is type(indices) is kind.result
        back = grad.max_pool2d_input(x.shape, indices, y, 2)
        maxima, places = define_max(x, windows_of("max_pool2d", (8, 8), {"kernel_size": 2}))
        assert_exact(kind.host(back), define_max_input((8, 8), places, maxima), "float32")
        up = kind.host(fastconv.max_unpool2d(y, indices, 2))
        assert_exact(up, define_max_input((8, 8), places, maxima), "float32")


# ---- memory ----


def run_guarded():
    """Every case on the CPU, with arrays that end or begin at a page that nobody may touch."""
    from fastconv.cpu import pool as cpu_pool
    from tests import guard_pages  # here, because a GPU's tests need no Numba

    rng = np.random.default_rng(0)
    for (op, shape, options), order, at_end in itertools.product(BOTH, ORDERS, (False, True)):
        make = make_adaptive_pool if op.startswith("adaptive") else make_pool
        problem = make(op, shape, options.get("output_size", {"padding": 0, **options}), order=order)
        outputs = np.zeros(problem.output_shape5)

        def guard(array):
            return guard_pages.place(in_order(array, order), at_end)  # noqa: B023 - called before the next turn

        x = guard(integers(rng, problem.input_shape5))
        out, gradient = guard(outputs.astype(np.float32)), guard(integers(rng, outputs.shape))
        for places in (None, guard(outputs.astype(np.int64))):
            if places is None or problem.pool == "max":
                cpu_pool.pool(problem, x, out, places)
        cpu_pool.pool_input(problem, gradient, places if problem.pool == "max" else None, x)


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made with Linux's mprotect")
def test_no_access_beside_an_array():
    code = "from tests import test_pool; test_pool.run_guarded(); print('passed')"
    root = Path(fastconv.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "passed\n", f"exit status {done.returncode}\n{done.stderr}"


# ---- what is refused ----

X = np.ones((2, 3, 8, 8), np.float32)
Y, PLACES = np.ones((2, 3, 4, 4), np.float32), np.zeros((2, 3, 4, 4), np.int64)

BAD = {
    "rank": (lambda: fastconv.max_pool2d(X[0, 0], 2), ConvError, "must have 4 axes (3 without N), got 2"),
    "no channels": (lambda: fastconv.max_pool2d(X[:, :0], 2), ConvError, "input.shape[1] must be at least 1"),
    "no array": (lambda: fastconv.max_pool2d([1.0], 2), TypeError, "max_pool2d: input must be a NumPy"),
    "dtype": (lambda: fastconv.max_pool2d(X.astype(int), 2), TypeError, "input.dtype must be float16"),
    "kernel 0": (lambda: fastconv.avg_pool2d(X, 0), ConvError, "kernel_size must be at least 1, got 0"),
    "kernel of one": (lambda: fastconv.avg_pool2d(X, (2,)), ConvError, "len(kernel_size) must be"),
    "real kernel": (lambda: fastconv.avg_pool2d(X, 2.0), TypeError, "kernel_size must be an int"),
    "stride 0": (lambda: fastconv.avg_pool2d(X, 2, 0), ConvError, "stride must be at least 1, got 0"),
    "dilation 0": (lambda: fastconv.max_pool2d(X, 2, dilation=0), ConvError, "dilation must be at least 1"),
    "padding": (
        lambda: fastconv.max_pool2d(X, 3, padding=2), ConvError,
        "max_pool2d: padding must be at most kernel_size // 2 = 3 // 2 = 1, got 2 "
        "(input (2, 3, 8, 8), kernel_size 3, padding 2)",
    ),
    "negative padding": (lambda: fastconv.max_pool2d(X, 3, padding=-1), ConvError, "at least 0, got -1"),
    "large kernel": (
        lambda: fastconv.max_pool2d(X, (8, 11), padding=(0, 1)), ConvError,
        "the window's extent must be at most padding + W + padding = 1 + 8 + 1 = 10, "
        "got 1 * (11 - 1) + 1 = 11",
    ),
    "ceil_mode": (lambda: fastconv.max_pool2d(X, 3, ceil_mode=1), TypeError, "must be True or False"),
    "count_include_pad": (
        lambda: fastconv.avg_pool2d(X, 3, count_include_pad=None), TypeError,
        "count_include_pad must be True or False",
    ),
    "divisor 0": (
        lambda: fastconv.avg_pool2d(X, 3, divisor_override=0), ConvError, "divisor_override must not be 0",
    ),
    "return_indices": (
        lambda: fastconv.max_pool2d(X, 3, return_indices="no"), TypeError,
        "max_pool2d: return_indices must be True or False, got 'no' (input (2, 3, 8, 8), return_indices 'no'",
    ),
    "return_indices of adaptive windows": (
        lambda: fastconv.adaptive_max_pool2d(X, 3, return_indices=1), TypeError, "return_indices must be Tru",
    ),
    "large divisor": (
        lambda: fastconv.avg_pool2d(X, 3, divisor_override=-(2**70)), ConvError,
        "divisor_override must be below 2**63, got 1180591620717411303424 (input",
    ),
    "large stride": (
        lambda: fastconv.max_pool2d(X, 3, 2**70), ConvError, "stride must be below 2**63, got 11805",
    ),
    "large dilation": (
        lambda: fastconv.max_pool2d(X, 1, 1, 0, 2**63), ConvError, "dilation must be below 2**63, got 92",
    ),
    "large output": (
        lambda: fastconv.adaptive_max_pool2d(X, 2**30), ConvError,
        "adaptive_max_pool2d: the result must have fewer than 2**60 elements, got shape (2, 3, 1073741824,",
    ),
    "large input of a gradient": (
        lambda: grad.adaptive_avg_pool2d_input((2, 3, 2**70, 8), Y), ConvError, "fewer than 2**60 elements",
    ),
    "large unpooled output": (
        lambda: fastconv.max_unpool2d(Y, PLACES, 2, 2**70), ConvError, "fewer than 2**60 elements, got shape",
    ),
    "negative unpooled output": (
        lambda: fastconv.max_unpool2d(Y[..., :1, :1], PLACES[..., :1, :1], 2, 5, output_size=(-2, -1)),
        ConvError,
        "max_unpool2d: output_size must be at least 1, got -2 (input (2, 3, 1, 1)",
    ),
    "no unpooled output": (
        lambda: fastconv.max_unpool2d(Y[..., :1, :1], PLACES[..., :1, :1], 2, padding=1), ConvError,
        "output_size must be at least 1, got 0",
    ),
    "real divisor": (
        lambda: fastconv.avg_pool2d(X, 3, divisor_override=2.0), TypeError,
        "divisor_override must be None or an int",
    ),
    "output 0": (
        lambda: fastconv.adaptive_avg_pool2d(X, (0, 3)), ConvError,
        "adaptive_avg_pool2d: output_size must be at least 1, got 0 (input (2, 3, 8, 8), output_size (0, 3))",
    ),
    "output of three": (lambda: fastconv.adaptive_max_pool2d(X, (1, 2, 3)), ConvError, "len(output_size)"),
    "real output": (lambda: fastconv.adaptive_max_pool2d(X, 2.0), TypeError, "output_size must be an int"),
    "shape of a gradient": (
        lambda: grad.avg_pool2d_input(X.shape, Y[..., 1:], 2), ConvError,
        "avg_pool2d_input: grad_output.shape must be that of the output = (2, 3, 4, 4), got (2, 3, 4, 3)",
    ),
    "input_size": (lambda: grad.avg_pool2d_input(8, Y, 2), TypeError, "input_size must be a tuple of ints"),
    "an array for its size": (
        lambda: grad.avg_pool2d_input(X, Y, 2), TypeError,
        f"input_size must be a tuple of ints, got an array of shape {X.shape} (say its shape)",
    ),
    "rank of input_size": (lambda: grad.avg_pool2d_input((8, 8), Y, 2), ConvError, "must have 4 axes"),
    "indices of another type": (
        lambda: grad.max_pool2d_input(X.shape, PLACES.astype(np.int32), Y, 2), TypeError,
        "max_pool2d_input: indices.dtype must be int64, as max_pool returns them, got int32",
    ),
    "real indices": (lambda: grad.max_pool2d_input(X.shape, Y, Y, 2), TypeError, "indices.dtype must be"),
    "shape of indices": (
        lambda: grad.max_pool2d_input(X.shape, PLACES[:1], Y, 2), ConvError,
        "indices.shape must be grad_output.shape = (2, 3, 4, 4), got (1, 3, 4, 4)",
    ),
    "no indices": (lambda: grad.max_pool2d_input(X.shape, None, Y, 2), TypeError, "indices must be a NumPy"),
    "an index behind the plane": (
        lambda: grad.max_pool2d_input(X.shape, PLACES + 64, Y, 2), ConvError,
        "indices must lie in the plane, from 0 to 63, got 64",
    ),
    "a negative index": (
        lambda: fastconv.max_unpool2d(Y, PLACES - 1, 2), ConvError,
        "max_unpool2d: indices must lie in the plane, from 0 to 63, got -1",
    ),
    "unpooled size": (
        lambda: fastconv.max_unpool2d(Y, PLACES, 2, output_size=(8, 10)), ConvError,
        "output_size must lie between 6 and 10, so that it pools to the input, got 10",
    ),
    "axes of an unpooled size": (
        lambda: fastconv.max_unpool2d(Y, PLACES, 2, output_size=(8,)), ConvError,
        "len(output_size) must be 2",
    ),
    "rank of what is unpooled": (
        lambda: fastconv.max_unpool2d(Y[0, 0], PLACES[0, 0], 2), ConvError, "must have 4 axes (3 without N)",
    ),
    "planes of an unpooled gradient": (
        lambda: grad.max_unpool2d_input(PLACES, X[:1]), ConvError, "or both without N, got (2, 3, 4, 4) and",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=list(BAD))
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("bad", [True, 1.0])
def test_what_equals_one_is_not_one(bad):
    """Problems are remembered by their options, and these are equal."""
    x = np.ones((1, 1, 3, 5), np.float32)
    fastconv.max_pool2d(x, 1)
    with pytest.raises(TypeError, match="kernel_size must be an int"):
        fastconv.max_pool2d(x, bad)


# ---- torch ----


def draw(rng, ndim):
    """A shape and options that a pooling may have."""
    pick = lambda low, high: [int(rng.integers(low, high)) for _ in range(ndim)]  # noqa: E731
    kernel = pick(1, 5)
    options = {
        "kernel_size": kernel,
        "stride": pick(1, 4),
        "padding": [min(padding, size // 2) for padding, size in zip(pick(0, 3), kernel)],
        "ceil_mode": bool(rng.integers(2)),
    }
    return (int(rng.integers(1, 4)), int(rng.integers(1, 4)), *pick(9, 15)), options


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("pool", ["max", "avg", "adaptive_max", "adaptive_avg"])
def test_against_torch(pool, ndim, rng):
    torch = pytest.importorskip("torch")
    if (pool, ndim) == ("adaptive_max", 3):
        return  # which is not here
    name = f"{pool}_pool{ndim}d"
    for _ in range(10):
        shape, options = draw(rng, ndim)
        if pool == "max":
            options |= {"dilation": int(rng.integers(1, 3)), "return_indices": True}
        elif pool == "avg":
            options["count_include_pad"] = bool(rng.integers(2))
        else:
            options = {"output_size": [int(rng.integers(1, 16)) for _ in range(ndim)]}
            options |= {"return_indices": True} if pool == "adaptive_max" else {}
        x = in_order(strange(rng, shape) if "max" in pool else integers(rng, shape), rng.choice(ORDERS))
        tensor = torch.tensor(x, requires_grad=True)
        found = getattr(fastconv, name)(x, **options)
        wanted = getattr(torch.nn.functional, name)(tensor, **options)
        indices = []
        if "max" in pool:
            (found, *indices), (wanted, places) = found, wanted
            # Of other windows torch names a place outside of the plane, or, in volumes, of another plane.
            is_seen = (indices[0] >= 0) & ((found != -np.inf) | (ndim < 3))
            assert np.array_equal(indices[0][is_seen], places.numpy()[is_seen])
            assert is_seen.mean() > 0.5
            del options["return_indices"]
        bound = 4 * finfo("float32").eps * np.abs(wanted.detach().double().numpy())
        assert_bounded(found, wanted.detach().double().numpy(), bound, "float32")
        gradient = integers(rng, found.shape) * (is_seen if "max" in pool else 1)
        wanted.backward(torch.tensor(gradient))
        rest = {} if "adaptive" in pool else options
        back = getattr(grad, f"{name}_input")(shape, *indices, gradient, **rest)
        assert_bounded(back, tensor.grad.double().numpy(), 1e-5 * (1 + 27), "float32")
