"""CUDA without a GPU: arrays of CuPy's, torch's and a third kind whose "device memory" is the host's.

What is allocated, copied and served is written down, to be asked for.
"""

import math
import types
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from fastconv import arrays
from fastconv.gpu import caller as callers
from fastconv.gpu.hardware import Device

DEVICE = Device("Stand-in GPU", (9, 0), 8, 48 << 10, 96 << 10, 1 << 20, 1e9, 1e11)
CUPY_STREAM, TORCH_STREAM, FOREIGN_STREAM = 0, 70, 90
DEVICES: dict[int, int] = {}
"""Address -> index of the device that holds it, where that is not 0."""


class CupyArray:
    """The part of cupy.ndarray that is public and needed."""

    def __init__(self, host: np.ndarray, device: int = 0) -> None:
        self.host = host
        self.device = types.SimpleNamespace(id=device)

    dtype = property(lambda self: self.host.dtype)
    shape = property(lambda self: self.host.shape)
    ndim = property(lambda self: self.host.ndim)
    size = property(lambda self: self.host.size)
    nbytes = property(lambda self: self.host.nbytes)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return interface_of(self.host, CUPY_STREAM or 1)

    def __getitem__(self, key):
        return CupyArray(self.host[key])

    def astype(self, dtype):
        return CupyArray(self.host.astype(dtype))

    def copy(self):
        return CupyArray(self.host.copy())

    def __array_function__(self, function, types, args, kwargs):
        """NumPy's functions on arrays of CuPy's are CuPy's functions."""
        return CupyArray(function(*_hosts(args), **kwargs))


def _hosts(value: Any) -> Any:
    """A function's arguments with the memory of arrays in place of the arrays."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_hosts, value))
    return value.host if isinstance(value, CupyArray) else value


class OnDevice(np.ndarray):
    """What CuPy's functions compute with here; as CuPy's arrays, it does not mix with those of the host."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        if out is not None:
            options["out"] = tuple(map(_to_host, out))
        result = _on_device(getattr(ufunc, method))(*inputs, **options)
        return result if out is None else out[0]


def _to_host(value: Any) -> Any:
    if type(value) is np.ndarray:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return value.view(np.ndarray) if isinstance(value, OnDevice) else value


def _on_device(function: Any) -> Any:
    """A function of NumPy's as one of CuPy's."""

    def compute(*arguments, **options):
        result = function(*map(_to_host, arguments), **options)
        return np.asarray(result).view(OnDevice) if isinstance(result, (np.ndarray, np.generic)) else result

    return compute


def _find_function(name: str) -> Any:
    """What stands for a function of CuPy's that is not made by hand; a module's own names are none."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _on_device(getattr(np, name))


def _as_array(source: Any) -> np.ndarray:
    """cupy.asarray: a view of what has an interface, a copy of what comes from the host."""
    if isinstance(source, np.ndarray):
        return np.array(source).view(OnDevice)
    interface = dict(source.__cuda_array_interface__)
    del interface["stream"]
    view = np.asarray(types.SimpleNamespace(__array_interface__=interface, owner=source))
    return view.view(OnDevice)


class ForeignArray:
    """An array of a library that nobody knows, written on a stream of its own."""

    def __init__(self, host: np.ndarray, stream: int | None = FOREIGN_STREAM, **changes: Any) -> None:
        self.host, self.dtype = host, host.dtype
        self.__cuda_array_interface__ = {**interface_of(host, stream), **changes}


def interface_of(host: np.ndarray, stream: int | None) -> dict[str, Any]:
    address, read_only = host.__array_interface__["data"]
    return {
        "version": 3,
        "shape": host.shape,
        "strides": None if host.flags.c_contiguous else host.strides,
        "typestr": host.dtype.str,
        "data": (address if host.size else 0, read_only),
        "stream": stream,
    }


def poisoned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """New memory in which all bits are set: every float in it is NaN."""
    dtype = np.dtype(dtype)
    return np.full(math.prod(shape) * dtype.itemsize, 255, np.uint8).view(dtype).reshape(shape)


def make_cupy(allocated: list[np.ndarray]) -> types.ModuleType:
    """A module that passes for CuPy and writes down what it allocates."""

    def empty(shape, dtype):
        allocated.append(poisoned(shape, dtype))
        return CupyArray(allocated[-1])

    def as_strided(array, shape, strides):
        return CupyArray(np.lib.stride_tricks.as_strided(array.host, shape, strides))

    def attributes(address):
        return types.SimpleNamespace(device=DEVICES.get(address, 0))

    module = types.ModuleType("cupy")
    module.ndarray, module.empty = CupyArray, empty
    slide = np.lib.stride_tricks.sliding_window_view
    module.lib = types.SimpleNamespace(
        stride_tricks=types.SimpleNamespace(as_strided=as_strided, sliding_window_view=_on_device(slide))
    )

    @contextmanager
    def from_external(stream):
        module.streams.append(stream.__cuda_stream__()[1])
        yield

    runtime = types.SimpleNamespace(pointerGetAttributes=attributes, getDevice=lambda: 0)
    stream = types.SimpleNamespace(from_external=from_external)
    module.cuda = types.SimpleNamespace(runtime=runtime, Stream=stream)
    module.streams = []
    module.asarray = _as_array
    module.ElementwiseKernel = lambda *text: _on_device(np.vectorize(math.erf, otypes=[np.float64]))
    module.__getattr__ = _find_function
    return module


class StandInDriver:
    """A driver of the host's memory; `kernels`, if any, is a driver that runs kernels in it."""

    def __init__(self, kernels: Any = None) -> None:
        self.kernels = kernels
        self.served: list[callers.Caller] = []
        self.copied: list[np.ndarray] = []
        self.awaited: list[str] = []
        self.capturing = False
        self.timed = 0

    def device(self):
        return DEVICE

    def empty(self, shape, dtype):
        return callers.current().empty(shape, dtype)

    def launch(self, kernel, blocks, arguments):
        self.kernels.launch(kernel, blocks, arguments)

    def clear(self, array):
        array[...] = 0

    def copy(self, array, target):
        self.copied.append(array)
        target[...] = array

    def time(self, function):
        self.timed += 1
        function()
        return 1e-3 * self.timed

    @contextmanager
    def serve(self, caller):
        self.served.append(caller)
        yield

    def mark(self):
        return None if self.capturing else f"mark {len(self.served)}"

    def wait_for(self, mark):
        self.awaited.append(mark)


class CupyKind:
    name, noun, stream, result = "CuPy", "CuPy array", None, CupyArray

    def make(self, host):
        return CupyArray(host)

    def host(self, array):
        """What CuPy holds: an array that our kernels wrote, or one that CuPy's functions computed."""
        return array.view(np.ndarray) if isinstance(array, OnDevice) else array.host


class ForeignKind(CupyKind):
    name, noun = "CUDA", "CUDA array"

    def make(self, host):
        return ForeignArray(host)


class TorchKind:
    """A tensor in the host's memory that says it is on a CUDA device; allocations are written down."""

    name, noun, stream = "torch CUDA", "torch CUDA tensor", TORCH_STREAM

    def __init__(self, allocated, monkeypatch):
        torch = self.torch = pytest.importorskip("torch", reason="torch is not installed")

        class OnCuda(torch.Tensor):
            device = types.SimpleNamespace(type="cuda", index=0)

        def empty(shape, dtype, device):
            assert device == "cuda:0"
            allocated.append(poisoned(shape, str(dtype).removeprefix("torch.")))
            return self.make(allocated[-1])

        self.result = OnCuda
        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch, "from_dlpack", lambda array: self.make(array.view(np.ndarray)))
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=TORCH_STREAM)
        )

    def make(self, host):
        return arrays.TORCH.wrap(host, None).as_subclass(self.result)

    def host(self, tensor):
        return arrays.TORCH.view("", "", tensor.as_subclass(self.torch.Tensor))


KINDS = ("CuPy", "CUDA", "torch CUDA")


def make_kind(name: str, allocated: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kind of array of this name; what torch allocates goes to `allocated`, as what this CuPy does."""
    if name == "torch CUDA":
        return TorchKind(allocated, monkeypatch)
    return CupyKind() if name == "CuPy" else ForeignKind()
