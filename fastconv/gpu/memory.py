"""CUDA arrays of any library enter, NumPy arrays of the same device memory leave, and back again.

Such an array has shape, strides, dtype and address, so that NumPy slices, transposes and compares it; its
elements lie on the device and are never looked at. No library is imported: one whose arrays come in is there,
and CuPy is once launch.check_available has passed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv.gpu import caller as callers
from fastconv.gpu import launch
from fastconv.gpu.caller import Caller

if TYPE_CHECKING:
    from fastconv.problem import ConvProblem, Cuts

_NO_ADDRESS = 64  # of an empty array: for a null pointer NumPy would allocate memory of its own


class _Holder:
    """What NumPy makes an array of; the array's `base`, and so what keeps the memory alive.

    owner   the library's array
    stream  on which the memory may still be written, as __cuda_array_interface__ states it
    """

    def __init__(self, owner: Any, interface: dict[str, Any]) -> None:
        self.owner = owner
        self.stream: int | None = interface.get("stream")
        address, read_only = interface["data"]
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(interface["shape"]),
            "strides": interface.get("strides"),
            "typestr": interface["typestr"],
            "data": (address or _NO_ADDRESS, read_only),
        }


def from_interface(array: Any, interface: dict[str, Any]) -> np.ndarray:
    """View an array that has __cuda_array_interface__, such as CuPy's."""
    view = np.asarray(_Holder(array, interface))
    # bfloat16 has no typestr of its own, only a size: the array itself knows.
    return view if view.dtype.kind != "V" else view.view(getattr(array, "dtype", view.dtype))


def from_torch(tensor: Any) -> np.ndarray:
    """View a dense CUDA tensor of torch."""
    name, itemsize = str(tensor.dtype).removeprefix("torch."), tensor.element_size()
    interface = {
        "shape": tensor.shape,
        "strides": tuple([stride * itemsize for stride in tensor.stride()]),
        "typestr": "<u2" if name == "bfloat16" else np.dtype(name).str,
        "data": (tensor.data_ptr(), False),
    }
    view = np.asarray(_Holder(tensor, interface))
    if name != "bfloat16":
        return view
    import ml_dtypes

    return view.view(ml_dtypes.bfloat16)


def empty_cupy(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate from CuPy's pool."""
    array = sys.modules["cupy"].empty(shape, dtype)
    return from_interface(array, array.__cuda_array_interface__)


def empty_torch(device: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate from torch's pool."""
    torch = sys.modules["torch"]
    return from_torch(torch.empty(shape, dtype=getattr(torch, dtype.name), device=f"cuda:{device}"))


def to_cupy(array: np.ndarray, like: Any) -> Any:
    """Return an array of `empty_cupy`, transposed or not, as CuPy's, whatever it shall be like."""
    as_strided = sys.modules["cupy"].lib.stride_tricks.as_strided
    return as_strided(_holder(array).owner, array.shape, array.strides)


def to_torch(array: np.ndarray, like: Any) -> Any:
    """Return an array of `empty_torch`, transposed or not, as torch's, whatever it shall be like."""
    strides = [stride // array.itemsize for stride in array.strides]
    return _holder(array).owner.as_strided(array.shape, strides)


def device_of_torch(tensor: Any) -> int:
    """Return the index of a tensor's device."""
    return int(tensor.device.index)


def device_of_cupy(array: Any) -> int:
    """Return the index of a CuPy array's device."""
    return int(array.device.id)


def device_of(array: Any) -> int:
    """Return the index of the device on which an array that has __cuda_array_interface__ lies."""
    runtime = sys.modules["cupy"].cuda.runtime
    address = array.__cuda_array_interface__["data"][0]
    return int(runtime.pointerGetAttributes(address).device if address else runtime.getDevice())


def serve_cupy(device: int, arrays: Iterable[np.ndarray]) -> AbstractContextManager[None]:
    """Compute on CuPy's current stream, for CuPy's own arrays."""
    return launch.calling(Caller(device, empty_cupy))


def serve_interface(device: int, arrays: Iterable[np.ndarray]) -> AbstractContextManager[None]:
    """Compute on CuPy's current stream, once the streams that the arrays name have written them."""
    streams = {_holder(array).stream for array in arrays}
    producers = frozenset(stream for stream in streams if stream is not None)
    return launch.calling(Caller(device, empty_cupy, producers=producers))


def serve_torch(device: int, arrays: Iterable[np.ndarray]) -> AbstractContextManager[None]:
    """Compute on torch's current stream."""
    stream = sys.modules["torch"].cuda.current_stream(device).cuda_stream

    def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return empty_torch(device, shape, dtype)

    return launch.calling(Caller(device, empty, stream))


class _Exported:
    """What CuPy makes an array of, without a copy: device memory that NumPy shows."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array  # keeps the memory alive
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "strides": array.strides,
            "typestr": array.dtype.str,
            "data": (array.__array_interface__["data"][0], False),
            "stream": None,
        }


class _Stream:
    """A stream of the caller's, as CuPy takes it."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


def view_in_cupy(array: np.ndarray) -> Any:
    """View device memory as a CuPy array, whose functions then compute on it; bfloat16 as its bits."""
    bits = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    cupy = sys.modules["cupy"]
    return cupy.asarray(_Exported(bits)) if bits.size else cupy.zeros(bits.shape, bits.dtype)


def on_callers_stream() -> AbstractContextManager[Any]:
    """Make the caller's stream that on which CuPy's functions compute."""
    caller = callers.current()
    if caller is None or caller.stream is None:
        return nullcontext()
    return sys.modules["cupy"].cuda.Stream.from_external(_Stream(caller.stream))


def cupy_to_torch(array: Any) -> Any:
    """Return a CuPy array as a tensor of the same memory."""
    return sys.modules["torch"].from_dlpack(array)


def copy(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Copy into contiguous memory of the caller's pool; the dtype is the array's own."""
    target = launch.driver().empty(array.shape, array.dtype)
    write(array, target)
    return target


STAGES = False  # kernels store any columns as they come: there is no `put`
CUT_SECONDS = 0.0  # to exchange an element of filters: every algorithm has to


def exchange(filters: np.ndarray, cuts: Cuts) -> list[np.ndarray]:
    """Return parts of filters (G, K, C, T, R, S) as contiguous (G, C, K, T, R, S)."""
    parts = [filters.swapaxes(1, 2)[taps] for taps in cuts.slices]
    return [copy(part, part.dtype).reshape(shape) for part, shape in zip(parts, cuts.shapes)]


def write(array: np.ndarray, target: np.ndarray) -> None:
    """Copy into an array of the same shape and dtype."""
    launch.driver().copy(array, target)


def zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return memory of the caller's pool in which all elements are 0."""
    array = launch.driver().empty(shape, dtype)
    clear(array)
    return array


def clear(array: np.ndarray) -> None:
    """Set all elements to 0."""
    launch.driver().clear(array)


def mark() -> Any:
    """Return what the caller's stream has been given by now, None while it is captured in a CUDA graph."""
    return launch.driver().mark()


def wait_for(mark: Any) -> None:
    """Let the caller's stream go on after a mark, which may be another stream's."""
    launch.driver().wait_for(mark)


def _holder(array: Any) -> _Holder:
    while isinstance(array, np.ndarray):
        array = array.base
    return array


def itemsize(problem: ConvProblem) -> int:
    """Return the bytes of one element of the arrays that kernels take: as it is stored."""
    return problem.itemsize
