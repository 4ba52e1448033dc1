"""The driver that is CuPy: what it hands to CuPy's functions, seen through a CuPy that only takes notes."""

import contextlib
import sys
import types

import numpy as np
import pytest

from fastconv.gpu import cupy_driver, launch
from fastconv.gpu.caller import Caller, serving
from fastconv.gpu.cupy_driver import CupyDriver
from fastconv.gpu.source import Kernel, Parameter

STRUCT = np.dtype([("N", np.int32), ("slope", np.float64)], align=True)
KERNEL = Kernel(
    "fastconv_f32_probe__m8",
    "the source",
    (
        Parameter("x", "float32", True, False),
        Parameter("bias", "float32", True, False),
        Parameter("count", np.dtype(np.int32), False, False),
        Parameter("scale", np.dtype(np.float32), False, False),
        Parameter("conv", STRUCT, False, False),
    ),
    256,
    (("BLOCK_M", 8), ("INDEX", "int")),
)
ATTRIBUTES = {
    "MultiProcessorCount": 132,
    "MaxSharedMemoryPerBlock": 49152,
    "MaxSharedMemoryPerMultiprocessor": 233472,
    "L2CacheSize": 50 << 20,
    "ClockRate": 1_980_000,
    "MemoryClockRate": 2_619_000,
    "GlobalMemoryBusWidth": 5120,
}


class CompileException(Exception):
    pass


class Notes:
    """A module like CuPy, whose functions write down that and how they were called."""

    def __init__(self):
        self.said = []
        self.current_device = 0
        self.capturing = False
        self.fail_compile = self.fail_launch = None
        notes = self

        class Device:
            compute_capability = "90"
            attributes = ATTRIBUTES

            def __init__(self, index):
                self.index = index

            def __enter__(self):
                self.before, notes.current_device = notes.current_device, self.index

            def __exit__(self, *error):
                notes.current_device = self.before

        class Event:
            ptr = 500

            def __init__(self, **options):
                notes.say("event", options)

            def record(self, stream):
                notes.say("record", stream.ptr)

            def synchronize(self):
                notes.say("synchronize")

        runtime = types.SimpleNamespace(
            getDevice=lambda: self.current_device,
            getDeviceProperties=lambda index: {"name": b"NVIDIA H100"},
            streamIsCapturing=lambda stream: self.say("capturing", stream) or self.capturing,
            streamWaitEvent=lambda stream, event: self.say("wait", stream, event),
            memsetAsync=lambda address, value, size, stream: self.say("memset", size, stream),
        )
        self.cuda = types.SimpleNamespace(
            runtime=runtime,
            Device=Device,
            Event=Event,
            get_current_stream=lambda: types.SimpleNamespace(ptr=0),
            get_elapsed_time=lambda start, end: 2.5,
            compiler=types.SimpleNamespace(CompileException=CompileException),
            UnownedMemory=lambda address, size, owner, device: (address, size, device),
            MemoryPointer=lambda memory, offset: memory,
        )

    def say(self, *words):
        self.said.append(words)

    def RawModule(self, code, options):
        if self.fail_compile:
            raise self.fail_compile
        self.say("compile", code, options)
        return types.SimpleNamespace(get_function=lambda name: self.function)

    def function(self, grid, block, arguments, stream):
        if self.fail_launch:
            raise self.fail_launch
        self.say("launch", grid, block, arguments, None if stream is None else stream.ptr)

    def ElementwiseKernel(self, *words):
        return lambda source, target, stream: self.say("copy", source, target, stream and stream.ptr)

    def ndarray(self, shape, dtype, memory, strides):
        return shape, dtype, memory, strides


@pytest.fixture
def notes(monkeypatch):
    notes = Notes()
    monkeypatch.setitem(sys.modules, "cupy", notes)
    return notes


@pytest.fixture
def driver(notes):
    with launch.use_driver(CupyDriver()):
        yield launch.driver()


def caller(stream=None, device=0, producers=()):
    return Caller(device, np.empty, stream, frozenset(producers))


def arguments():
    array = np.ones((4, 3), np.float32)[::-1]
    conv = launch.Fields({"N": 3, "slope": 0.25})
    return array, {"x": array, "bias": None, "count": 7, "scale": 0.5, "conv": conv}


class TestLaunch:
    @pytest.mark.parametrize("stream", [None, 70])
    def test_arguments(self, notes, driver, stream):
        """All by value, in the types of the source: CuPy would pass an int as 64 bits, a float as double."""
        array, named = arguments()
        with serving(caller(stream)):
            launch.launch(KERNEL, 12, **named)
        assert notes.said[0] == ("compile", "the source", ("-std=c++17",))
        word, grid, block, passed, used = notes.said[1]
        assert (word, grid, block, used) == ("launch", (12,), (256,), stream)
        assert [value.dtype for value in passed] == [np.uint64, np.uint64, np.int32, np.float32, STRUCT]
        assert all(isinstance(value, np.ndarray) and value.size == 1 for value in passed)
        assert [value.tolist() for value in passed] == [
            array.__array_interface__["data"][0], 0, 7, 0.5, (3, 0.25),
        ]  # fmt: skip

    def test_compiled_once_per_device(self, notes, driver):
        for device in (0, 0, 1, 0, 1):
            with launch.calling(caller(device=device)):
                launch.launch(KERNEL, 1, **arguments()[1])
        assert [words[0] for words in notes.said].count("compile") == 2
        assert [words[0] for words in notes.said].count("launch") == 5

    NAMED = (
        r"^fastconv_f32_probe__m8 \(BLOCK_M=8, INDEX=int\) on NVIDIA H100 \(compute capability 9.0\) cannot"
    )

    def test_a_failed_compilation_names_all(self, notes, driver):
        notes.fail_compile = CompileException("\n".join(f"im2col.cu({line}): error" for line in range(99)))
        with pytest.raises(
            RuntimeError, match=self.NAMED + r" be compiled:\nim2col.cu\(0\): error\n"
        ) as caught:
            launch.launch(KERNEL, 1, **arguments()[1])
        assert len(str(caught.value).splitlines()) == 1 + cupy_driver.LOG_LINES
        assert caught.value.__cause__ is notes.fail_compile

    def test_a_failed_launch_names_all(self, notes, driver):
        notes.fail_launch = RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        with pytest.raises(
            RuntimeError, match=self.NAMED + " be launched on 5 blocks: CUDA_ERROR_INVALID_VALUE"
        ):
            launch.launch(KERNEL, 5, **arguments()[1])


class TestMemory:
    def test_from_the_callers_pool(self, driver):
        pool = []
        with serving(Caller(0, lambda shape, dtype: pool.append(np.empty(shape, dtype)) or pool[-1])):
            assert driver.empty((2, 3), np.dtype("float64")) is pool[0]

    def test_nobody_to_allocate_for(self, driver):
        with pytest.raises(RuntimeError, match=r"use it inside of launch\.calling"):
            driver.empty((1,), np.dtype("uint8"))

    @pytest.mark.parametrize(("stream", "kept"), [(None, 1), (70, 0)])
    def test_what_a_graph_writes_is_kept(self, notes, driver, stream, kept):
        """CuPy's pool would hand it out again; torch's has a pool for the graph."""
        notes.capturing = True
        with serving(caller(stream)):
            array = driver.empty((3,), np.dtype("uint8"))
        assert sys.getrefcount(array) - 2 == kept

    @pytest.mark.parametrize("stream", [None, 70])
    def test_copy(self, notes, driver, stream):
        source = np.arange(12, dtype=np.float16).reshape(3, 4)[::-1, ::2]
        target = np.zeros((2, 3), np.float16).T
        with serving(caller(stream)):
            driver.copy(source, target)
        (word, read, written, used) = notes.said[-1]
        address = source.__array_interface__["data"][0]
        assert (word, used) == ("copy", stream)
        assert read == ((3, 2), "u2", (address, 12, 0), (-8, 4))
        assert written == ((3, 2), "u2", (target.__array_interface__["data"][0], 12, 0), (2, 6))

    def test_copy_of_nothing(self, notes, driver):
        with serving(caller(70)):
            driver.copy(*np.empty((2, 0, 3), np.float32))
        assert "copy" not in [words[0] for words in notes.said]

    @pytest.mark.parametrize("stream", [None, 70])
    def test_clear(self, notes, driver, stream):
        array = np.ones((3, 4), np.float32)[:, ::2]
        with serving(caller(stream)):
            driver.clear(array)
        address = array.__array_interface__["data"][0]
        assert notes.said[-1] == ("copy", 0, ((3, 2), "u4", (address, 24, 0), (16, 8)), stream)

    def test_clear_nothing(self, notes, driver):
        with serving(caller(70)):
            driver.clear(np.empty((0, 3), np.float32))
        assert "copy" not in [words[0] for words in notes.said]


class TestServe:
    def test_device_is_current(self, notes, driver):
        with launch.calling(caller(device=1)):
            assert notes.current_device == 1
        assert notes.current_device == 0

    @pytest.mark.parametrize(
        ("stream", "producers", "waits"),
        [
            (None, {1}, []),  # the default stream, by its two names
            (None, {90}, [("record", 90), ("wait", 0, 500)]),
            (70, {70}, []),
            (70, {1}, [("record", 1), ("wait", 70, 500)]),
        ],
    )
    def test_other_streams_are_waited_for_on_the_device(self, notes, driver, stream, producers, waits):
        with launch.calling(caller(stream, producers=producers)):
            pass
        assert [words for words in notes.said if words[0] in ("record", "wait", "synchronize")] == waits

    def test_marks(self, notes, driver):
        with serving(caller(70)):
            mark = driver.mark()
        with serving(caller(71)):
            driver.wait_for(mark)
        assert [words for words in notes.said if words[0] in ("record", "wait")] == [
            ("record", 70), ("wait", 71, 500),
        ]  # fmt: skip

    def test_no_marks_in_a_capture(self, notes, driver):
        """A graph cannot wait for what it does not contain, nor may others wait for what it does."""
        with serving(caller(70)):
            mark = driver.mark()
            notes.capturing = True
            driver.wait_for(mark)
            assert driver.mark() is None
        assert "wait" not in [words[0] for words in notes.said]

    def test_nothing_is_synchronised(self, notes, driver):
        with launch.calling(caller(producers={90})), contextlib.suppress(KeyError):
            launch.launch(KERNEL, 1, **arguments()[1])
            driver.copy(*np.ones((2, 3), np.float32))
        assert ("synchronize",) not in notes.said


class TestDevice:
    def test_figures(self, driver):
        device = driver.device()
        assert (device.name, device.capability, device.processors) == ("NVIDIA H100", (9, 0), 132)
        assert (device.shared_per_block, device.shared_per_sm, device.l2) == (49152, 233472, 50 << 20)
        assert device.clock == 1.98e9
        assert device.bandwidth == pytest.approx(3.352e12, rel=1e-3)
        assert device.peak("float32") == pytest.approx(66.9e12, rel=1e-3)
        assert device.peak("float64") == device.peak("float32") / 2
        assert device is driver.device()

    def test_hidden_clocks(self, notes, driver, monkeypatch):
        monkeypatch.setitem(ATTRIBUTES, "ClockRate", 0)
        monkeypatch.delitem(ATTRIBUTES, "MemoryClockRate")
        assert driver.device().clock > 1e9
        assert driver.device().bandwidth > 1e11

    def test_time(self, notes, driver):
        """Seconds of the device between two events on the caller's stream, after the caches were cleared."""
        with serving(caller(70)):
            assert driver.time(lambda: notes.say("work")) == 2.5e-3
        found = [words for words in notes.said if words[0] != "event"]
        flush = ("memset", 100 << 20, 70)
        assert found == [flush, ("record", 70), ("work",), ("record", 70), ("synchronize",)]
