"""A kernel's source and a C++ compiler enter, a library that runs it on this machine leaves.

The compiler puts in the sanitizers' checks, but what they call is runtime.cpp instead of their libraries.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fastconv.gpu.source import Kernel

PRELUDE = "prelude.h"

_FLAGS = (
    *("-std=c++17", "-O2", "-g1", "-gdwarf-4", "-w", "-fPIC", "-fvisibility=hidden"),
    *("-fno-exceptions", "-fno-rtti", "-fno-stack-protector", "-ffp-contract=off"),
)
_CHECKS = (
    *("-fsanitize=thread", "-fno-sanitize-recover=all", "-fsanitize=alignment,signed-integer-overflow"),
    "-fsanitize=shift,integer-divide-by-zero,float-cast-overflow,unreachable,return",
)
# By itself GCC leaves out memcpy and memset, also those it makes of loops: as calls they reach the runtime.
_GCC_CHECKS = (
    *(*_CHECKS, "-fsanitize=bounds-strict", "-fno-tree-loop-distribute-patterns"),
    *("-fno-builtin-memcpy", "-fno-builtin-memmove", "-fno-builtin-memset"),
)
# By itself clang leaves out the read in x += 1, and vectors beyond 16 bytes, which it makes of loops.
_CLANG_CHECKS = (
    *(*_CHECKS, "-fsanitize=array-bounds", "-mllvm", "-tsan-instrument-read-before-write"),
    *("-fno-vectorize", "-fno-slp-vectorize"),
)


class EmulatorError(Exception):
    """A kernel did what a GPU does not allow, or could not be built or launched."""


class Compiler(NamedTuple):
    """A C++ compiler: the words that start it, its version, and the flags that make it put in the checks."""

    command: tuple[str, ...]
    version: str
    checks: tuple[str, ...]


@lru_cache(maxsize=8)
def find_compiler(command: str = "") -> Compiler:
    """Return the compiler of a command, by default `c++`, else the wheel ziglang; or raise EmulatorError."""
    words = tuple(shlex.split(command))
    if not words and shutil.which("c++"):
        words = ("c++",)
    if not words and importlib.util.find_spec("ziglang"):
        words = (sys.executable, "-m", "ziglang", "c++")
    if not words:
        raise EmulatorError("no C++ compiler: install g++ or clang, or `pip install ziglang`, or set CXX")
    version = run(*words, "--version")
    if "ziglang" in words:
        words += ("-mcpu=baseline",)  # else for this very CPU, and what is kept may be met by another
    return Compiler(words, version, _CLANG_CHECKS if "clang" in version else _GCC_CHECKS)


@lru_cache(maxsize=2048)
def build_kernel(compiler: Compiler, kernel: Kernel) -> Path:
    """Build a kernel, linked with the runtime: a library that needs no other than those Python has loaded."""
    head, tail = f'#line 1 "{PRELUDE}"\n{_read(PRELUDE)}', f"EMULATED_ENTRY({kernel.name})\n"
    text = f'{head}#line 1 "{kernel.name}"\n{kernel.source}\n{tail}'
    return _build(compiler, text, compiler.checks, _build(compiler, _read("runtime.cpp")))


def run(*words: str) -> str:
    """Run a command and return what it prints; raises EmulatorError with all it says if it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise EmulatorError(f"{words[0]} cannot be run: {error}") from None
    if done.returncode:
        raise EmulatorError(f"{done.stderr}{done.stdout}\nThis was said by {shlex.join(words)}")
    return done.stdout


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _build(compiler: Compiler, text: str, checks: tuple[str, ...] = (), runtime: Path | None = None) -> Path:
    """Compile a text to an object file, or to a library with the runtime.

    Built aside and then renamed: of several processes that build the same, each finds a whole file. What was
    built is kept from run to run, by a hash of all that went in; it may be deleted at any time.
    """
    flags = (*_FLAGS, *checks)
    parts = (text, *compiler.command, compiler.version, *flags, runtime.name if runtime else "")
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    result = _cache_dir() / f"{digest}.{'so' if runtime else 'o'}"
    if result.exists():
        return result
    result.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=result.parent, prefix="building-") as folder:
        source, built = f"{folder}/kernel.cpp", f"{folder}/kernel.o"
        Path(source).write_text(text, encoding="utf-8")
        run(*compiler.command, *flags, "-c", source, "-o", built)
        if runtime:
            objects, built = (built, str(runtime)), f"{folder}/kernel.so"
            run(*compiler.command, "-shared", "-nostdlib", "-Wl,-Bsymbolic", *objects, "-o", built)
        os.replace(built, result)
    return result


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastconv-emulator"
