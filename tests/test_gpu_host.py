"""The host's side of the CUDA backend: whose memory, which stream, which errors.

Everything runs on the stand-ins of cuda_stand_in.py: memory that a GPU would read can be looked at here. What
computes is the reference; the kernels have their own tests.
"""

import copy
import importlib
import pickle
import re
import sys
import threading

import ml_dtypes
import numpy as np
import pytest

import fastconv
from fastconv import ConvError, arrays, reference
from fastconv import plan as planning
from fastconv.algorithms import TABLE
from fastconv.gpu import cupy_driver, launch, memory
from tests import cuda_stand_in
from tests.compare import assert_exact, integers, layouts
from tests.cuda_stand_in import FOREIGN_STREAM, CupyArray, ForeignArray

tuning = importlib.import_module("fastconv.tune")  # fastconv.tune itself is the function

WRITTEN = ("direct", "im2col", "pointwise")
"""The rows that have kernels here; the others have none yet."""
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


class Tile(str):
    """A tile that is its name."""

    def takes(self, dtype):
        return True


class HostKernels:
    """In the place of a module of fastconv/gpu: computes by the reference, and writes down its operands."""

    TILES = (Tile("one"), Tile("two"))

    def __init__(self, name):
        self.name, self.prepared, self.seen = name, [], []
        self.__spec__ = importlib.machinery.ModuleSpec(f"fastconv.gpu.{name}", None)

    def cost(self, problem, tile, device):
        return 1e-6 * (1 + WRITTEN.index(self.name) + 0.5 * (tile == "two"))

    def workspace(self, problem, tile, device):
        return 0 if self.name == "direct" else 1000

    def prepare(self, problem, tile, device, weight):
        self.prepared.append(weight)
        return memory.copy(weight, weight.dtype)

    def run(self, problem, tile, device, operands):
        self.seen.append(operands)
        if self.workspace(problem, tile, device):
            launch.driver().empty((1000,), np.dtype("uint8"))
        epilogue = operands.epilogue
        activation = epilogue.activation
        if activation == "leaky_relu":
            activation = (activation, epilogue.slope)
        operands.out[...] = reference.conv3d(
            *(operands.x, operands.weight, operands.bias, problem.stride, problem.padding, problem.dilation),
            groups=problem.groups, residual=operands.residual, activation=activation,
        )  # fmt: skip


@pytest.fixture
def allocated():
    """What CuPy's and torch's pools have given, in order, as NumPy arrays."""
    return []


@pytest.fixture(autouse=True)
def driver(allocated, monkeypatch):
    """A GPU with a CuPy, neither of which is there, and a torch that knows CUDA if there is a torch."""
    monkeypatch.setitem(sys.modules, "cupy", cuda_stand_in.make_cupy(allocated))
    planning._is_written.cache_clear()
    planning.forget_plans()
    stand_in = cuda_stand_in.StandInDriver()
    with launch.use_driver(stand_in):
        yield stand_in
    planning._is_written.cache_clear()
    planning.forget_plans()


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Per name of an algorithm what computes it."""
    modules = {name: HostKernels(name) for name in WRITTEN}
    for name in TABLE:
        monkeypatch.setitem(sys.modules, f"fastconv.gpu.{name}", modules.get(name))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: sys.modules.get(name, True) and find_spec(name)
    )
    return modules


@pytest.fixture(params=cuda_stand_in.KINDS)
def kind(request, allocated, monkeypatch):
    """One kind of CUDA array: `make` one of a NumPy array's memory, see the memory of one as `host`."""
    return cuda_stand_in.make_kind(request.param, allocated, monkeypatch)


def small(rng, dtype="float32"):
    """Input, weight and bias of a small conv2d."""
    shapes = (2, 4, 7, 6), (6, 4, 3, 2), (6,)
    return [integers(rng, shape, DTYPES[dtype]) for shape in shapes]


def address(array):
    return array.__array_interface__["data"][0]


class TestCall:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_argument(self, kind, dtype, rng):
        x, w, bias = small(rng, dtype)
        options = {"stride": (1, 2), "padding": 1, "activation": ("leaky_relu", 0.5)}
        expected = reference.conv2d(x, w, bias, **options)
        residual = integers(rng, expected.shape, DTYPES[dtype])
        expected = reference.conv2d(x, w, bias, residual=residual, **options)
        arguments = [kind.make(array) for array in (x, w, bias)]
        y = fastconv.conv2d(*arguments, residual=kind.make(residual), **options)
        assert type(y) is kind.result
        assert_exact(kind.host(y), expected, dtype)

    def test_nothing_is_copied(self, kind, rng, kernels, driver, allocated):
        """The kernels get the caller's own addresses, also of half types; only the result is new."""
        for dtype in DTYPES:
            x, w, bias = small(rng, dtype)
            y = fastconv.conv2d(*(kind.make(array) for array in (x, w, bias)), algo="direct")
            seen = kernels["direct"].seen[-1]
            found = [address(array) for array in (seen.x, seen.weight, seen.bias, seen.out)]
            assert found == [address(array) for array in (x, w, bias, kind.host(y))]
            assert seen.x.dtype == x.dtype
            assert [address(array) for array in allocated] == [address(kind.host(y))]
            allocated.clear()
        assert driver.copied == []

    def test_workspace_comes_from_the_callers_pool(self, kind, rng, allocated):
        x, w, _ = small(rng)
        fastconv.conv2d(kind.make(x), kind.make(w), algo="im2col")
        assert sorted(array.nbytes for array in allocated) == [1000, 2 * 6 * 5 * 5 * 4]

    def test_out_is_written_in_place(self, kind, rng, allocated):
        for dtype in DTYPES:
            x, w, _ = small(rng, dtype)
            host = np.full((2, 6, 5, 5), np.nan).astype(DTYPES[dtype])
            out = kind.make(host)
            assert fastconv.conv2d(kind.make(x), kind.make(w), out=out) is out
            assert_exact(host, reference.conv2d(x, w), dtype)
        assert allocated == []

    def test_any_strides(self, kind, rng, kernels):
        x, w, _ = small(rng)
        for name, view in layouts(x):
            if kind.name == "torch CUDA" and name in ("negative-strided", "read-only"):
                continue  # torch has no such tensors
            y = fastconv.conv2d(kind.make(view), kind.make(w), algo="direct")
            assert_exact(kind.host(y), reference.conv2d(x, w), "float32")
            assert address(kernels["direct"].seen[-1].x) == address(view), name

    def test_memory_order_and_layout_are_kept(self, kind, rng):
        x, w, _ = small(rng)
        last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
        y = kind.host(fastconv.conv2d(kind.make(last), kind.make(w), layout="NHWC"))
        assert_exact(y, reference.conv2d(x, w).transpose(0, 2, 3, 1), "float32")
        assert y.flags.c_contiguous
        y = kind.host(fastconv.conv2d(kind.make(last.transpose(0, 3, 1, 2)), kind.make(w)))
        assert_exact(y, reference.conv2d(x, w), "float32")
        assert y.transpose(0, 2, 3, 1).flags.c_contiguous

    def test_without_batch_and_flipped(self, kind, rng):
        x, w, _ = small(rng)
        y = fastconv.conv2d(kind.make(x[0]), kind.make(w), flip=True)
        assert_exact(kind.host(y), reference.conv2d(x[0], w, flip=True), "float32")

    def test_other_ranks(self, kind, rng):
        for op, shape in (("conv1d", (2, 4, 9)), ("conv3d", (2, 4, 5, 4, 3))):
            x, w = integers(rng, shape), integers(rng, (6, 4, *(2,) * (len(shape) - 2)))
            y = getattr(fastconv, op)(kind.make(x), kind.make(w), padding=1)
            assert_exact(kind.host(y), getattr(reference, op)(x, w, padding=1), "float32")

    def test_strided_bias(self, kind, rng, driver):
        x, w, _ = small(rng)
        bias = integers(rng, (12,))[::2]
        y = fastconv.conv2d(kind.make(x), kind.make(w), kind.make(bias))
        assert_exact(kind.host(y), reference.conv2d(x, w, bias), "float32")
        assert driver.copied == []

    def test_empty_batch(self, kind, rng, kernels):
        x, w, _ = small(rng)
        y = fastconv.conv2d(kind.make(x[:0]), kind.make(w))
        assert type(y) is kind.result
        assert kind.host(y).shape == (0, 6, 5, 5)
        assert kernels["direct"].seen == []

    def test_inputs_live_as_long_as_they_are_seen(self):
        array = CupyArray(np.ones((2, 3), np.float32))
        given = {"input": array}
        before = sys.getrefcount(array)
        arrays.adapt("conv1d", given)
        view = given.pop("input").T[1:]
        assert sys.getrefcount(array) == before
        assert view.base.base.owner is array


class TestPlace:
    def test_stream_and_device(self, kind, rng, driver):
        x, w, _ = small(rng)
        fastconv.conv2d(kind.make(x), kind.make(w))
        (caller,) = driver.served
        assert (caller.device, caller.stream) == (0, kind.stream)
        assert caller.producers == ({FOREIGN_STREAM} if kind.name == "CUDA" else set())

    def test_an_array_without_a_stream_is_not_waited_for(self, rng, driver):
        x, w, _ = small(rng)
        fastconv.conv2d(ForeignArray(x, None), ForeignArray(w, 5))
        assert driver.served[0].producers == {5}

    def test_nobody_is_served_after_an_error(self, kind, rng, monkeypatch):
        x, w, _ = small(rng)
        with pytest.raises(ConvError):
            fastconv.conv2d(kind.make(x), kind.make(w), algo="depthwise")
        assert cuda_stand_in.callers.current() is None

    def test_threads_serve_their_own_callers(self, rng, kernels):
        """Two calls at once, of which each must allocate from its own pool."""
        x, w, _ = small(rng)
        meet, seen = threading.Barrier(2, timeout=60), {}

        def look(problem, tile, device, operands):
            meet.wait()
            seen[threading.current_thread().name] = cuda_stand_in.callers.current().device
            meet.wait()

        kernels["direct"].run = look
        threads = [
            threading.Thread(
                target=fastconv.conv2d,
                args=(CupyArray(x, device), CupyArray(w, device)),
                kwargs={"algo": "direct"},
                name=str(device),
            )
            for device in (0, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == {"0": 0, "1": 1}


class TestLayer:
    def test_as_the_function(self, kind, rng):
        for dtype in DTYPES:
            x, w, bias = small(rng, dtype)
            conv = fastconv.Conv2d(kind.make(w), kind.make(bias), padding=1, flip=True, activation="relu")
            expected = reference.conv2d(x, w, bias, padding=1, flip=True, activation="relu")
            assert_exact(kind.host(conv(kind.make(x))), expected, dtype)
            out = kind.make(np.zeros(expected.shape, DTYPES[dtype]))
            assert conv(kind.make(x), out=out) is out
            assert_exact(kind.host(out), expected, dtype)

    def test_weight_is_a_snapshot(self, kind, rng):
        x, w, bias = small(rng)
        expected = reference.conv2d(x, w, bias)
        conv = fastconv.Conv2d(kind.make(w), kind.make(bias))
        w[...] = bias[...] = np.nan
        assert_exact(kind.host(conv(kind.make(x))), expected, "float32")

    def test_a_second_call_allocates_the_result_only(self, kind, rng, kernels, driver, allocated):
        """So that it can be captured: no copy, no preparation, no memory of its own."""
        x, w, bias = small(rng)
        conv = fastconv.Conv2d(kind.make(w), kind.make(bias), algo="direct")
        conv(kind.make(x))
        allocated.clear()
        driver.copied.clear()
        driver.capturing = True
        y = conv(kind.make(x))
        assert [address(array) for array in allocated] == [address(kind.host(y))]
        assert driver.copied == []
        assert len(kernels["direct"].prepared) == 1

    def test_what_is_prepared_in_a_capture_is_not_kept(self, kind, rng, kernels, driver):
        """It is computed when the graph is launched: whoever calls before that must not get it."""
        x, w, _ = small(rng)
        conv = fastconv.Conv2d(kind.make(w), algo="direct")
        for driver.capturing in (True, False, False):
            conv(kind.make(x))
        assert len(kernels["direct"].prepared) == 2

    def test_other_streams_wait_for_what_is_prepared(self, kind, rng, driver):
        x, w, _ = small(rng)
        conv = fastconv.Conv2d(kind.make(w))
        for awaited in ([], ["mark 2"], ["mark 2"] * 2):  # the weight came first, then the first call
            conv(kind.make(x))
            assert driver.awaited == awaited

    def test_no_copies_and_no_pickles(self, kind, rng):
        """Both would read the device's memory from the host."""
        conv = fastconv.Conv2d(kind.make(small(rng)[1]))
        for clone in (copy.deepcopy, pickle.dumps):
            with pytest.raises(
                TypeError, match="conv2d: a layer on a CUDA device cannot be copied or pickled"
            ):
                clone(conv)

    def test_input_of_another_kind_or_device(self, kind, rng):
        x, w, _ = small(rng)
        conv = fastconv.Conv2d(kind.make(w))
        with pytest.raises(TypeError, match=rf"^conv2d: input must be a {kind.noun} on device 0 of dtype"):
            conv(x)
        with pytest.raises(TypeError, match="got a CuPy array on device 1 of dtype float32"):
            conv(CupyArray(x, device=1))
        with pytest.raises(TypeError, match="must be a NumPy array of dtype float32 like weight, got a"):
            fastconv.Conv2d(w)(kind.make(x))


class TestChoice:
    def test_explain(self, kind, rng, kernels):
        x, w, _ = small(rng)
        explanation = fastconv.explain(kind.make(x), kind.make(w))
        assert (explanation.plan.backend, explanation.plan.algorithm.name) == ("gpu", "direct")
        lines = str(explanation).split("\n")
        assert "  on Stand-in GPU: direct, of the lowest estimate" in lines
        assert (
            "  times are estimates for this GPU; errors are bounds per element, in eps * conv(|x|, |w|)"
            in lines
        )
        assert "    pointwise  refused: needs a kernel of extent 1" in lines
        w = integers(rng, (6, 4, 3, 3))
        assert "    winograd   refused: has no kernel for forward on the GPU yet" in str(
            fastconv.explain(kind.make(x), kind.make(w))
        )
        assert kernels["direct"].seen == []

    def test_an_unwritten_kernel_by_name(self, kind, rng):
        x, w = kind.make(small(rng)[0]), kind.make(integers(rng, (6, 4, 3, 3)))
        with pytest.raises(
            ConvError,
            match=r"^conv2d: algo='winograd' cannot run n2c4.*: has no kernel for forward on the GPU yet$",
        ):
            fastconv.conv2d(x, w, algo="winograd")

    def test_environment(self, kind, rng, kernels, monkeypatch):
        x, w = (kind.make(array) for array in small(rng)[:2])
        monkeypatch.setenv("FASTCONV_ALGO", "im2col")
        fastconv.conv2d(x, w)
        assert len(kernels["im2col"].seen) == 1
        monkeypatch.setenv("FASTCONV_WORKSPACE", "999")
        fastconv.conv2d(x, w)
        assert len(kernels["direct"].seen) == 1
        with pytest.raises(ConvError, match="FASTCONV_WORKSPACE must be at least 1000 bytes"):
            fastconv.conv2d(x, w, algo="im2col")

    def test_another_gpu_is_another_plan(self, kind, rng, driver, monkeypatch):
        x, w = (kind.make(array) for array in small(rng)[:2])
        assert fastconv.explain(x, w).plan.device.name == "Stand-in GPU"
        other = cuda_stand_in.Device("Other GPU", (8, 0), *(1,) * 6)
        monkeypatch.setattr(driver, "device", lambda: other)
        assert fastconv.explain(x, w).plan.device is other

    def test_the_same_shapes_on_the_cpu(self, kind, rng):
        x, w, _ = small(rng)
        for convert, backend in ((kind.make, "gpu"), (np.asarray, "cpu"), (kind.make, "gpu")):
            assert fastconv.explain(convert(x), convert(w)).plan.backend == backend
            assert fastconv.explain(convert(x), convert(w)).plan.problem.dtype == "float32"

    def test_tune(self, kind, rng, driver, monkeypatch, tmp_path):
        """By the device's own clock, and kept under the device's name."""
        monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path))
        monkeypatch.setattr(tuning, "BUDGET", 0.01)
        monkeypatch.setattr(tuning, "_time", None)
        x, w = (kind.make(array) for array in small(rng)[:2])
        result = fastconv.tune(x, w)
        assert result.device == "Stand-in GPU"
        assert {timing.algorithm for timing in result.timings} == {"direct", "im2col"}
        assert dict(result.refused)["pointwise"] == "needs a kernel of extent 1"
        assert driver.timed == sum(len(timing.samples) for timing in result.timings)
        explanation = fastconv.explain(x, w)
        assert explanation.plan.algorithm.name == result.best.algorithm
        assert explanation.reason == "measured fastest by tune"


class TestErrors:
    def test_several_devices(self, rng):
        x, w, bias = small(rng)
        with pytest.raises(ConvError) as caught:
            fastconv.conv2d(CupyArray(x), CupyArray(w, device=1), CupyArray(bias))
        assert str(caught.value) == (
            "conv2d: weight must be on CUDA device 0 like input, got device 1 (input 0, weight 1, bias 0)"
        )

    def test_several_devices_of_foreign_arrays(self, rng, monkeypatch):
        x, w, _ = small(rng)
        monkeypatch.setitem(cuda_stand_in.DEVICES, address(w), 1)
        with pytest.raises(ConvError, match="weight must be on CUDA device 0 like input, got device 1"):
            fastconv.conv2d(ForeignArray(x), ForeignArray(w))

    def test_mixed_kinds(self, kind, rng):
        x, w, _ = small(rng)
        other = ForeignArray(w) if kind.name == "CuPy" else CupyArray(w)
        with pytest.raises(TypeError, match=rf"^conv2d: weight must be a {kind.noun} like input, got a C"):
            fastconv.conv2d(kind.make(x), other)
        with pytest.raises(TypeError, match=rf"must be a {kind.noun} like input, got a NumPy array"):
            fastconv.conv2d(kind.make(x), w)
        with pytest.raises(TypeError, match=rf"must be a NumPy array like input, got a {kind.noun}"):
            fastconv.conv2d(x, kind.make(w))

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"data": (0, False)}, "input on a CUDA device must have memory, got a null pointer"),
            (
                {"typestr": ">f4"},
                "must be aligned and in the machine's byte order, got address % 4 = 0, strides .*, >f4",
            ),
            ({"strides": (673, 168, 24, 4)}, r"must be aligned and .*, strides \(673, 168, 24, 4\), <f4"),
        ],
    )
    def test_memory_that_no_kernel_can_read(self, rng, changes, text, kernels):
        x, w, _ = small(rng)
        with pytest.raises(ConvError, match=text):
            fastconv.conv2d(ForeignArray(x, **changes), ForeignArray(w))
        assert kernels["direct"].seen == []

    def test_misaligned_address(self, rng):
        x, w, _ = small(rng)
        with pytest.raises(ConvError, match="must be aligned"):
            fastconv.conv2d(ForeignArray(x, data=(address(x) + 2, False)), ForeignArray(w))

    def test_mask(self, rng):
        x, w, _ = small(rng)
        with pytest.raises(TypeError, match=r"input must be an array without a mask, got .*ForeignArray"):
            fastconv.conv2d(ForeignArray(x, mask=x), ForeignArray(w))

    def test_dtypes(self, rng):
        x, w, _ = small(rng)
        with pytest.raises(TypeError, match=r"input.dtype must be float16, .* got int32"):
            fastconv.conv2d(CupyArray(x.astype("int32")), CupyArray(w))
        with pytest.raises(TypeError, match=r"weight.dtype must be input.dtype = float32, got float64"):
            fastconv.conv2d(CupyArray(x), CupyArray(w.astype("float64")))

    def test_out(self, kind, rng):
        """Overlap is a matter of addresses, on a device as on the host."""
        x, w, _ = small(rng)
        buffer = np.zeros(1000, np.float32)
        inside = buffer[: x.size].reshape(x.shape)
        with pytest.raises(ConvError, match="out must not share memory with input, got overlapping arrays"):
            fastconv.conv2d(
                kind.make(inside), kind.make(w), out=kind.make(buffer[300:600].reshape(2, 6, 5, 5))
            )
        with pytest.raises(ConvError, match=r"out.shape must be result.shape"):
            fastconv.conv2d(kind.make(x), kind.make(w), out=kind.make(x.copy()))

    def test_read_only_out(self, rng):
        x, w, _ = small(rng)
        out = np.zeros((2, 6, 5, 5), np.float32)
        out.setflags(write=False)
        with pytest.raises(ConvError, match="out must be writeable, got a read-only array"):
            fastconv.conv2d(ForeignArray(x), ForeignArray(w), out=ForeignArray(out))

    def test_torch_tensors_that_are_no_plain_memory(self, rng, allocated, monkeypatch):
        kind = cuda_stand_in.make_kind("torch CUDA", allocated, monkeypatch)
        x, w, _ = (kind.make(array) for array in small(rng))
        with pytest.raises(ConvError, match=r"weight.requires_grad must be False"):
            fastconv.conv2d(x, w.detach().requires_grad_())
        with pytest.raises(TypeError, match=r"weight.dtype must be float16, .* got int64"):
            fastconv.conv2d(x, w.long())


class TestMissing:
    """What a CUDA array meets where it cannot be computed on: words that tell what to do."""

    @pytest.fixture(autouse=True)
    def no_stand_in(self, driver):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "_replacements", [])
            patch.setattr(cupy_driver, "_checked_process", None)
            yield

    @staticmethod
    def message(rng):
        x, w, _ = small(rng)
        with pytest.raises(ConvError) as caught:
            fastconv.conv2d(ForeignArray(x), ForeignArray(w))
        return str(caught.value)

    def test_cupy(self, rng, monkeypatch):
        monkeypatch.setitem(sys.modules, "cupy", None)
        assert re.match(r"conv2d: CUDA arrays need CuPy, which cannot be imported: .*cupy", self.message(rng))
        assert 'pip install "cupy-cuda13x[ctk]", or "cupy-cuda12x[ctk]" for' in self.message(rng)

    @pytest.mark.parametrize(
        ("error", "text"),
        [
            (
                "cudaErrorInsufficientDriver: no driver",
                "CUDA arrays need a CUDA driver and a GPU: cudaErrorIns",
            ),
            (
                "cudaErrorInitializationError: no",
                "CUDA does not work in a process forked from one that has used",
            ),
        ],
    )
    def test_driver(self, rng, error, text, monkeypatch):
        class CUDARuntimeError(RuntimeError):
            pass

        def fail():
            raise CUDARuntimeError(error)

        runtime = sys.modules["cupy"].cuda.runtime
        runtime.getDeviceCount, runtime.CUDARuntimeError = fail, CUDARuntimeError
        assert self.message(rng).startswith(f"conv2d: {text}")

    def test_gpu(self, rng):
        runtime = sys.modules["cupy"].cuda.runtime
        runtime.getDeviceCount, runtime.CUDARuntimeError = lambda: 0, RuntimeError
        assert "the CUDA driver finds none" in self.message(rng)

    def test_a_forked_child_is_checked_again(self, monkeypatch):
        counted = []
        runtime = sys.modules["cupy"].cuda.runtime
        runtime.getDeviceCount, runtime.CUDARuntimeError = lambda: counted.append(1) or 1, RuntimeError
        for process in (1, 1, 2):
            monkeypatch.setattr(cupy_driver.os, "getpid", lambda process=process: process)
            assert cupy_driver.why_unavailable() is None
        assert len(counted) == 2

    def test_the_cpu_needs_none_of_it(self, rng, monkeypatch):
        monkeypatch.setitem(sys.modules, "cupy", None)
        x, w, _ = small(rng)
        assert_exact(fastconv.conv2d(x, w, precision="highest"), reference.conv2d(x, w), "float32")
