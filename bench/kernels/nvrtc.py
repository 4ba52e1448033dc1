"""CUDA C++ enters, machine code and what it takes of a GPU leave; no GPU and no driver is needed.

NVRTC, the compiler that CuPy calls at run time, comes in wheels of its own. The newest of them that knows an
architecture compiles for it, with the options that CuPy passes.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from functools import lru_cache
from importlib import metadata
from typing import NamedTuple

from bench.session import CommandError

WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")  # the second one still knows sm_70
_SYSTEMS = (("linux", "x86_64"), ("linux", "aarch64"), ("win32", "AMD64"))
_LIBRARY = re.compile(r"libnvrtc\.so\.\d+|nvrtc64_\d+_0\.dll")
_OPTIONS = ("-std=c++17", "-ftz=true", "--ptxas-options=-v")

_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


class CompileError(Exception):
    """The compiler refused; the message is its log."""


class Resources(NamedTuple):
    """What a kernel takes: registers of a thread, bytes of shared memory of a block, of stack of a thread."""

    registers: int
    shared: int
    stack: int
    spilled: int  # bytes stored and loaded because registers ran out


class Compiled(NamedTuple):
    """One kernel for one architecture: machine code, the assembly it was made from, and what it takes."""

    cubin: bytes
    ptx: str
    resources: Resources


def parse_log(log: str) -> Resources:
    """Read what ptxas says of the one kernel in a program, and of the functions it calls."""
    used = _USED.findall(log)
    if len(used) != 1:
        raise ValueError(f"the log must name the registers of one kernel, got {len(used)}:\n{log}")
    shared = _SHARED.findall(log)
    stacks = [tuple(map(int, found)) for found in _STACK.findall(log)]
    if not stacks:
        raise ValueError(f"the log must name the spills:\n{log}")
    return Resources(
        registers=int(used[0]),
        shared=int(shared[0]) if shared else 0,
        stack=sum(frame for frame, _, _ in stacks),
        spilled=sum(stores + loads for _, stores, loads in stacks),
    )


class Compiler:
    """One NVRTC library; it may be called from several threads."""

    def __init__(self, path: str):
        self._library = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        count = ctypes.c_int()
        self._call("GetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("GetSupportedArchs", found)
        self.architectures = frozenset(found)

    def compile(self, name: str, source: str, sm: int) -> Compiled:
        """Compile one kernel for sm_<sm>, not compute_<sm>, which lets illegal PTX pass."""
        program = ctypes.c_void_p()
        file = f"{name}.cu".encode()
        self._call("CreateProgram", ctypes.byref(program), source.encode(), file, 0, None, None)
        try:
            options = [option.encode() for option in (*_OPTIONS, f"--gpu-architecture=sm_{sm}")]
            array = (ctypes.c_char_p * len(options))(*options)
            failed = self._library.nvrtcCompileProgram(program, len(options), array)
            log = self._read("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if failed:
                raise CompileError(f"{name} for sm_{sm}:\n{log}")
            ptx = self._read("PTX", program).rstrip(b"\0").decode()
            return Compiled(self._read("CUBIN", program), ptx, parse_log(log))
        finally:
            self._call("DestroyProgram", ctypes.byref(program))

    def _read(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        if code := getattr(self._library, f"nvrtc{function}")(*arguments):
            raise RuntimeError(f"nvrtc{function} returned {code}")


def are_wheels_built() -> bool:
    """Say whether NVIDIA publishes the wheels for this system."""
    return (sys.platform, platform.machine()) in _SYSTEMS


@lru_cache(maxsize=1)
def compilers() -> tuple[Compiler, ...]:
    """Return the compilers of the installed wheels, the newest first."""
    return tuple(Compiler(_find_library(wheel)) for wheel in WHEELS)


def compiler_for(sm: int) -> Compiler:
    """Return the newest compiler that knows an architecture."""
    for compiler in compilers():
        if sm in compiler.architectures:
            return compiler
    raise CommandError(f"no installed NVRTC knows sm_{sm}")


def _find_library(wheel: str) -> str:
    try:
        files = metadata.files(wheel) or []
    except metadata.PackageNotFoundError:
        raise CommandError(f"{wheel} is missing: pip install {' '.join(WHEELS)}") from None
    return next(str(file.locate()) for file in files if _LIBRARY.fullmatch(file.name))
