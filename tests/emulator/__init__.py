"""A Kernel and NumPy arrays enter, a C++ compiler builds it for this machine, its threads run as fibers.

EmulatorDriver is put in place by fastconv.gpu.launch.use_driver. What a GPU does not forgive, or forgives by
chance, raises EmulatorError: runtime.cpp judges every memory access, prelude.h makes CUDA's words known to a
C++ compiler. GCC and clang differ in one check: clang finds a misaligned struct only if it is copied whole.
Linux only (the parts of an ELF file are named), on x86-64 and AArch64.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fastconv.gpu.caller import Caller
from fastconv.gpu.hardware import Device
from fastconv.gpu.launch import MAX_GRID_X, MAX_THREADS
from fastconv.gpu.source import Kernel
from tests.emulator.build import PRELUDE, Compiler, EmulatorError, build_kernel, find_compiler, run

MAX_SHARED = 48 << 10
MAX_PARAMETERS = 64


class EmulatorDriver:
    """Runs kernels on this machine's memory; a fastconv.gpu.launch.Driver.

    seed      of the order in which the threads of a block run between two barriers
    compiler  the command that starts a C++ compiler; by default $CXX, `c++`, or the wheel ziglang
    """

    def __init__(self, seed: int = 0, compiler: str | None = None):
        if not sys.platform.startswith("linux"):
            raise EmulatorError(f"the emulator needs Linux, this is {sys.platform}")
        self.seed = seed
        self.compiler = find_compiler(os.environ.get("CXX", "") if compiler is None else compiler)

    def device(self) -> Device:
        """Describe a GPU like the H100, with the shared memory that a block may declare."""
        return Device(
            name="emulated GPU",
            capability=(9, 0),
            processors=132,
            shared_per_block=MAX_SHARED,
            shared_per_sm=228 << 10,
            l2=50 << 20,
            clock=1.98e9,
            bandwidth=3.35e12,
        )

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return memory of which every byte is 0xFF, NaN in every float: what is left unwritten shows."""
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[...] = 0xFF
        return array

    def clear(self, array: np.ndarray) -> None:
        """Set all elements to 0."""
        array[...] = 0

    def copy(self, array: np.ndarray, target: np.ndarray) -> None:
        """Copy into another array."""
        target[...] = array

    def time(self, function: Callable[[], None]) -> float:
        """Return the seconds that a function takes: nothing runs behind its back."""
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def serve(self, caller: Caller) -> AbstractContextManager[None]:
        """Do nothing: there is one device and no stream."""
        return nullcontext()

    def mark(self) -> object:
        """Return a mark that says nothing: all that was launched has ended."""
        return object()

    def wait_for(self, mark: object) -> None:
        """Do nothing."""

    def launch(self, kernel: Kernel, blocks: int, arguments: list[Any]) -> None:
        """Run a kernel to its end; raises EmulatorError at its first fault, with memory half written."""
        library = _load(self.compiler, kernel)
        _check_limits(kernel, blocks, library)
        _check_parameters(kernel, library, arguments)
        library.launch(kernel, int(blocks), self.seed, arguments)


def _check_limits(kernel: Kernel, blocks: int, library: _Library) -> None:
    for what, size, most in (
        ("threads per block", kernel.threads, MAX_THREADS),
        ("blocks", blocks, MAX_GRID_X),
    ):
        if not 1 <= size <= most:
            raise EmulatorError(f"{kernel.name}: launched with {size} {what}, must be 1 to {most}")
    if library.shared_bytes > MAX_SHARED:
        size = library.shared_bytes
        raise EmulatorError(
            f"{kernel.name}: has {size} bytes of static shared memory, at most {MAX_SHARED} fit"
        )


def _check_parameters(kernel: Kernel, library: _Library, arguments: list[Any]) -> None:
    """Compare what was read off the text, and what was passed, with what the compiler made of the text."""
    taken, said = library.parameters, kernel.parameters
    if not len(taken) == len(said) == len(arguments):
        numbers = f"{len(taken)} parameters, {len(said)} are described, {len(arguments)} were passed"
        raise EmulatorError(f"{kernel.name}: has {numbers}")
    for have, parameter, value in zip(taken, said, arguments):
        itemsize = np.dtype(parameter.dtype).itemsize
        described = (itemsize, parameter.is_array, parameter.is_written)
        if have != described:
            forms = f"(bytes, is an array, is written) {have} in C++ but described as {described}"
            raise EmulatorError(f"{kernel.name}: parameter {parameter.name} is {forms}")
        fits = (
            (value is None or isinstance(value, np.ndarray))
            if parameter.is_array
            else isinstance(value, np.generic)
        )
        if not fits or (value is not None and value.dtype.itemsize != itemsize):
            raise EmulatorError(f"{kernel.name}: parameter {parameter.name} was passed {value!r}")


# ---- the built kernel; the structs' twins are in runtime.cpp and prelude.h ----


class _Array(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("start", ctypes.c_size_t),
        ("bytes", ctypes.c_size_t),
        ("is_written", ctypes.c_int),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("arguments", ctypes.c_void_p),
        ("arrays", ctypes.c_void_p),
        ("array_count", ctypes.c_int),
        ("blocks", ctypes.c_uint),
        ("threads", ctypes.c_uint),
        ("seed", ctypes.c_uint64),
        ("stacks", ctypes.c_void_p),
    )


class _Fault(ctypes.Structure):
    _fields_ = (
        ("block", ctypes.c_uint),
        ("thread", ctypes.c_int),
        ("code", ctypes.c_size_t),
        ("where", ctypes.c_char * 256),
        ("what", ctypes.c_char * 512),
    )


class _Parameter(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint64), ("is_array", ctypes.c_int), ("is_written", ctypes.c_int))


_one_launch = threading.Lock()  # the stacks are those of all launches, and a library has one state


class _Library:
    """A kernel that was built and loaded."""

    def __init__(self, path: Path):
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.emulated_shared_bytes.restype = ctypes.c_size_t
        self._library.emulated_stack_bytes.restype = ctypes.c_size_t
        self.shared_bytes: int = self._library.emulated_shared_bytes()
        found = (_Parameter * MAX_PARAMETERS)()
        count = self._library.emulated_parameters(found)
        self.parameters = [(one.bytes, bool(one.is_array), bool(one.is_written)) for one in found[:count]]

    def launch(self, kernel: Kernel, blocks: int, seed: int, arguments: list[Any]) -> None:
        """Run all blocks; raises EmulatorError."""
        arrays, values = [], []
        for parameter, value in zip(kernel.parameters, arguments):
            if not parameter.is_array:
                values.append(ctypes.create_string_buffer(value.tobytes()))
                continue
            values.append(ctypes.c_void_p(None if value is None else value.ctypes.data))
            if value is not None:
                arrays.append(_Array(parameter.name.encode(), *_span(value), parameter.is_written))
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        table = (_Array * len(arrays))(*arrays)
        given = _Launch(ctypes.addressof(addresses), ctypes.addressof(table), len(arrays))
        given.blocks, given.threads, given.seed = blocks, kernel.threads, seed
        given.stacks = ctypes.addressof(_make_stacks(self._library.emulated_stack_bytes()))
        fault = _Fault()
        with _one_launch:
            self._library.emulated_launch(ctypes.byref(given), ctypes.byref(fault))
        if fault.what:
            raise EmulatorError(self._describe(kernel, fault))

    def _describe(self, kernel: Kernel, fault: _Fault) -> str:
        thread = "" if fault.thread < 0 else f", thread {fault.thread}"
        where = fault.where.decode() or self._find_line(fault.code)
        return f"{kernel.name}: block {fault.block}{thread}{where and f', {where}'}: {fault.what.decode()}"

    def _find_line(self, code: int) -> str:
        """Return the kernel's file:line for an address in the library, nothing where binutils are missing."""
        if not code or not shutil.which("addr2line"):
            return ""
        frames = run("addr2line", "-i", "-e", str(self.path), hex(code)).splitlines()
        lines = [Path(frame.split(" (")[0]).name for frame in frames]
        return next((line for line in lines if "?" not in line and not line.startswith(PRELUDE)), "")


@lru_cache(maxsize=1)
def _make_stacks(nbytes: int) -> Any:
    """Return memory that is taken from the system as far as it is touched, and then kept."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return ctypes.c_char.from_buffer(memory)


@lru_cache(maxsize=2048)
def _load(compiler: Compiler, kernel: Kernel) -> _Library:
    """Return a kernel built and loaded; its calls of libm are bound to the one that this process has."""
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    try:
        return _Library(build_kernel(compiler, kernel))
    except OSError as error:
        raise EmulatorError(f"{kernel.name} calls what the emulator does not have: {error}") from None


def _span(array: np.ndarray) -> tuple[int, int]:
    """Return the lowest address of an array's elements, and the bytes from there to behind the highest."""
    if array.size == 0:
        return 0, 0
    low, high = np.lib.array_utils.byte_bounds(array)
    return low, high - low
