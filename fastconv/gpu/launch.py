"""THE SEAM to the device: a Kernel and its arguments enter, the kernel runs on the caller's current stream.

Device arrays are NumPy arrays here, whose memory is on the device: shape, strides and address are looked at,
elements never. `driver()` is CuPy; the tests put an emulator in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastconv.gpu import cupy_driver
from fastconv.gpu.caller import Caller, serving
from fastconv.problem import ConvError

if TYPE_CHECKING:
    from fastconv.gpu.hardware import Device
    from fastconv.gpu.source import Kernel, Parameter

MAX_GRID_X = 2**31 - 1
MAX_THREADS = 1024

Argument = Any  # np.ndarray (device memory), None (a null pointer), or a NumPy scalar, also of a struct


class Driver(Protocol):
    """What a device can do. What is enqueued goes to the caller's stream; only `time` waits for it."""

    def device(self) -> Device:
        """Describe the current device."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Allocate from the caller's pool; the memory lives as long as the array and its views."""

    def launch(self, kernel: Kernel, blocks: int, arguments: list[Argument]) -> None:
        """Compile the kernel unless that was done before, and enqueue it."""

    def clear(self, array: np.ndarray) -> None:
        """Enqueue that all elements become 0."""

    def copy(self, array: np.ndarray, target: np.ndarray) -> None:
        """Enqueue a copy into another array of the same shape and dtype."""

    def time(self, function: Callable[[], None]) -> float:
        """Return the seconds that the device takes for what the function enqueues."""

    def serve(self, caller: Caller) -> AbstractContextManager[object]:
        """Make the caller's device current, and its stream wait for those that write its arrays."""

    def mark(self) -> Any:
        """Return a mark after all that is enqueued, None while that becomes part of a CUDA graph instead."""

    def wait_for(self, mark: Any) -> None:
        """Let the caller's stream go on after a mark, which may be another stream's."""


_replacements: list[Driver] = []


def driver() -> Driver:
    """Return the driver of now: CuPy, unless `use_driver` put another in its place."""
    return _replacements[-1] if _replacements else _cupy_driver()


@lru_cache(maxsize=1)
def _cupy_driver() -> Driver:
    return cupy_driver.CupyDriver()


@contextmanager
def use_driver(driver: Driver) -> Iterator[None]:
    """Put a driver in CuPy's place for a while, in all threads."""
    _replacements.append(driver)
    try:
        yield
    finally:
        _replacements.remove(driver)


@contextmanager
def calling(caller: Caller) -> Iterator[None]:
    """Serve a caller for a while, in this thread."""
    with serving(caller), driver().serve(caller):
        yield


def check_available(op: str) -> None:
    """Raise ConvError, which says what to install, where there is no CuPy, no CUDA driver or no GPU."""
    reason = None if _replacements else cupy_driver.why_unavailable()
    if reason is not None:
        raise ConvError(f"{op}: {reason}")


class Fields(dict[str, float]):
    """The fields of a struct by name; what becomes of them in memory is made once for each kernel."""

    def __init__(self, fields: Mapping[str, float]) -> None:
        super().__init__(fields)
        self._structs: dict[str, Any] = {}

    def struct(self, kernel: Kernel, dtype: np.dtype) -> Any:
        """Return the struct that a kernel takes."""
        found = self._structs.get(kernel.name)
        if found is None:
            found = np.array(tuple(self[name] for name in dtype.names or ()), dtype)[()]
            self._structs[kernel.name] = found
        return found


def launch(kernel: Kernel, blocks: int, **arguments: Any) -> None:
    """Launch a kernel on `blocks` blocks; arguments by the names they have in its source.

    Scalars are cast to the types declared there, Fields to a struct. Raises TypeError for an
    argument that the kernel does not have or lacks, ConvError for a grid beyond the hardware's limits.
    """
    if arguments.keys() != kernel.names.keys():
        raise TypeError(f"{kernel.name} takes {', '.join(kernel.names)}, got {', '.join(arguments)}")
    if not 0 < blocks <= MAX_GRID_X or not 0 < kernel.threads <= MAX_THREADS:
        limits = f"1 to {MAX_GRID_X} blocks of 1 to {MAX_THREADS} threads"
        raise ConvError(f"{kernel.name} must be launched on {limits}, got {blocks} of {kernel.threads}")
    cast = [_cast(kernel, parameter, arguments[parameter.name]) for parameter in kernel.parameters]
    driver().launch(kernel, blocks, cast)


def _cast(kernel: Kernel, parameter: Parameter, value: Any) -> Argument:
    dtype = parameter.dtype
    if isinstance(dtype, np.dtype) and not parameter.is_array:
        return value.struct(kernel, dtype) if isinstance(value, Fields) else dtype.type(value)
    if value is not None and (found := _dtype_name(value.dtype)) != dtype:
        raise TypeError(f"{kernel.name}: {parameter.name} must be an array of {dtype}, got {found}")
    return value


@lru_cache(maxsize=64)
def _dtype_name(dtype: np.dtype) -> str:
    return dtype.name
