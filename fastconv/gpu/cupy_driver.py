"""CuPy as a Driver: the one module that imports it, and only when a CUDA array has come in.

CuPy keeps what it compiles on disk, by source, options, architecture and compiler version: a second process
compiles nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv.gpu import caller as callers
from fastconv.gpu.hardware import Device, describe

if TYPE_CHECKING:
    from fastconv.gpu.caller import Caller
    from fastconv.gpu.source import Kernel

OPTIONS = ("-std=c++17",)
LOG_LINES = 12
"""Lines of the compiler's log that an error quotes."""
FLUSHED = 64 << 20
"""Bytes that are written before each timed run, at least: they clear the caches, and keep the device busy
until all that is timed has been enqueued."""

INSTALL = 'pip install "cupy-cuda13x[ctk]", or "cupy-cuda12x[ctk]" for a driver of CUDA 12'
"""What to do without CuPy, wherever fastconv itself came from; [ctk] brings NVRTC."""

_checked_process: int | None = None


def why_unavailable() -> str | None:
    """Return what is missing to compute on a GPU, and what to do about it; None if nothing is."""
    global _checked_process
    if _checked_process == os.getpid():
        return None
    try:
        import cupy
    except ImportError as error:
        return f"CUDA arrays need CuPy, which cannot be imported: {error} ({INSTALL})"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if "InitializationError" in str(error):
            hint = "start the process by multiprocessing's 'spawn', or use no GPU before the fork"
            return f"CUDA does not work in a process forked from one that has used it: {error} ({hint})"
        return f"CUDA arrays need a CUDA driver and a GPU: {error} (nvidia-smi tells what the system has)"
    if count == 0:
        return "CUDA arrays need a GPU, and the CUDA driver finds none (nvidia-smi tells what the system has)"
    _checked_process = os.getpid()
    return None


class CupyDriver:
    """The GPU, by way of CuPy."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._kept: list[np.ndarray] = []
        self._compiled = lru_cache(maxsize=None)(self._compile)
        self._described = lru_cache(maxsize=None)(self._describe)
        self._copy = cupy.ElementwiseKernel("T source", "T target", "target = source", "fastconv_copy")

    def device(self) -> Device:
        """Describe the current device."""
        return self._described(self._index())

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Allocate from the caller's pool.

        CuPy's pool would give memory freed during a capture to others, while the graph still writes it at
        every launch: such memory is kept. (Torch has a pool per graph.)
        """
        caller = _served()
        array = caller.empty(shape, dtype)
        if caller.stream is None and self._is_capturing():
            self._kept.append(array)
        return array

    def launch(self, kernel: Kernel, blocks: int, arguments: list[Any]) -> None:
        """Compile the kernel unless that was done before, and enqueue it on the caller's stream."""
        function = self._compiled(kernel, self._index())
        try:
            function((blocks,), (kernel.threads,), tuple(map(_by_value, arguments)), stream=_stream())
        except RuntimeError as error:  # CuPy's errors of the driver are of this kind
            raise RuntimeError(
                f"{self._name(kernel)} cannot be launched on {blocks} blocks: {error}"
            ) from error

    def clear(self, array: np.ndarray) -> None:
        """Enqueue that all elements become 0."""
        if array.size:
            bits = self._bits(array)
            self._copy(np.dtype(f"u{array.itemsize}").type(0), bits, stream=_stream())

    def copy(self, array: np.ndarray, target: np.ndarray) -> None:
        """Enqueue a copy into another array of the same shape and dtype."""
        if array.size:
            self._copy(self._bits(array), self._bits(target), stream=_stream())

    def time(self, function: Callable[[], None]) -> float:
        """Return the seconds between two events around what the function enqueues, from cold caches."""
        cuda, stream = self._cupy.cuda, self._current_stream()
        start, end = cuda.Event(), cuda.Event()
        scratch = self.empty((max(FLUSHED, 2 * self.device().l2),), np.dtype("uint8"))
        cuda.runtime.memsetAsync(_address(scratch), 0, scratch.nbytes, stream.ptr)
        start.record(stream)
        function()
        end.record(stream)
        end.synchronize()
        return float(cuda.get_elapsed_time(start, end)) * 1e-3

    @contextmanager
    def serve(self, caller: Caller) -> Iterator[None]:
        """Make the caller's device current, and its stream wait for those that write its arrays."""
        with self._cupy.cuda.Device(caller.device):
            for producer in caller.producers - {self._current_stream().ptr or _DEFAULT_STREAM}:
                self.wait_for(self._record(SimpleNamespace(ptr=producer)))
            yield

    def mark(self) -> Any:
        """Return a mark after all that is enqueued, None while that becomes part of a CUDA graph instead."""
        return None if self._is_capturing() else self._record(self._current_stream())

    def wait_for(self, mark: Any) -> None:
        """Let the caller's stream go on after a mark; the host does not wait.

        A stream that is captured cannot wait for what no graph contains. Who captures has waited before.
        """
        if not self._is_capturing():
            self._cupy.cuda.runtime.streamWaitEvent(self._current_stream().ptr, mark.ptr)

    def _is_capturing(self) -> bool:
        return bool(self._cupy.cuda.runtime.streamIsCapturing(self._current_stream().ptr))

    def _index(self) -> int:
        return int(self._cupy.cuda.runtime.getDevice())

    def _describe(self, index: int) -> Device:
        device = self._cupy.cuda.Device(index)
        name = self._cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
        capability = divmod(int(device.compute_capability), 10)
        return describe(name, capability, device.attributes)

    def _compile(self, kernel: Kernel, index: int) -> Any:
        """Return the compiled kernel; `index` because compiled kernels belong to a device."""
        try:
            return self._cupy.RawModule(code=kernel.source, options=OPTIONS).get_function(kernel.name)
        except (self._cupy.cuda.compiler.CompileException, RuntimeError) as error:
            log = "\n".join(str(error).splitlines()[:LOG_LINES])
            raise RuntimeError(f"{self._name(kernel)} cannot be compiled:\n{log}") from error

    def _name(self, kernel: Kernel) -> str:
        defines = ", ".join(f"{key}={value}" for key, value in kernel.defines)
        device = self.device()
        capability = ".".join(map(str, device.capability))
        return f"{kernel.name} ({defines}) on {device.name} (compute capability {capability})"

    def _current_stream(self) -> Any:
        return _stream() or self._cupy.cuda.get_current_stream()

    def _record(self, stream: Any) -> Any:
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(stream)
        return event

    def _bits(self, array: np.ndarray) -> Any:
        """Return CuPy's view of a device array, as integers: CuPy does not know every float."""
        cuda = self._cupy.cuda
        memory = cuda.UnownedMemory(_address(array), array.nbytes, array, self._index())
        pointer = cuda.MemoryPointer(memory, 0)
        return self._cupy.ndarray(array.shape, f"u{array.itemsize}", pointer, array.strides)


_DEFAULT_STREAM = 1  # what __cuda_array_interface__ calls the stream of address 0


def _served() -> Caller:
    caller = callers.current()
    if caller is None:
        raise RuntimeError("device memory is allocated for a caller: use it inside of launch.calling")
    return caller


def _stream() -> Any:
    """Return the caller's stream as CuPy's functions take it, None for CuPy's own current one."""
    caller = callers.current()
    return None if caller is None or caller.stream is None else SimpleNamespace(ptr=caller.stream)


def _by_value(argument: Any) -> np.ndarray:
    """Return the bytes of a kernel's parameter: CuPy passes arrays of one element by value, of any dtype."""
    if argument is None:
        return np.array(0, np.uint64)
    if isinstance(argument, np.ndarray):
        return np.array(_address(argument), np.uint64)
    return np.asarray(argument)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
