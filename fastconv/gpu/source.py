"""An algorithm, a stage and defines enter, a Kernel leaves: its name, its one source text, its parameters.

Everything a kernel includes is put into one text: CuPy's cache of compiled kernels looks at the text alone,
so an edited header must change it. What a kernel takes is read off its source, so that it stands there only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_PACKAGE = Path(__file__).parents[1]
KERNEL_DIR = next(
    (path for path in (_PACKAGE / "kernels", _PACKAGE.parent / "kernels") if path.is_dir()), _PACKAGE
)

# dtype of the arrays -> its word in names, the C++ types it is stored and summed in
_TYPES = {
    "float32": ("f32", "float", "float"),
    "float64": ("f64", "double", "double"),
    "float16": ("f16", "Half", "float"),
    "bfloat16": ("bf16", "BFloat16", "float"),
}
_SCALARS = {"int": np.int32, "long long": np.int64, "float": np.float32, "double": np.float64}

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
_STRUCT = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r"^    (int|INDEX|ACC) ([\w, ]+);", re.MULTILINE)
_STAGE = re.compile(r"^#ifdef STAGE_", re.MULTILINE)
_COMMENT = re.compile(r"//[^\n]*")


class Parameter(NamedTuple):
    """One parameter of a kernel: an array (dtype is then that of its elements), a scalar or a struct."""

    name: str
    dtype: str | np.dtype  # of an array the name, of anything else the dtype itself
    is_array: bool
    is_written: bool


@dataclass(frozen=True)
class Kernel:
    """One specialised kernel, ready to be compiled; `name`, its symbol, says all that makes it special."""

    name: str
    source: str = field(repr=False)
    parameters: tuple[Parameter, ...] = field(repr=False)
    threads: int
    defines: tuple[tuple[str, int | str], ...]

    def __hash__(self) -> int:
        return hash(self.name)

    @cached_property
    def names(self) -> dict[str, None]:
        """The parameters' names, in their order."""
        return dict.fromkeys(parameter.name for parameter in self.parameters)


@lru_cache(maxsize=1024)
def make_kernel(algorithm: str, stage: str, dtype: str, defines: tuple[tuple[str, int | str], ...]) -> Kernel:
    """Return the kernel of a stage, which stands behind `#ifdef STAGE_<stage>` in kernels/<algorithm>.cu.

    defines  (name, value) pairs, THREADS and INDEX ("int" or "long long") among them
    """
    word, storage, accumulator = _TYPES[dtype]
    named = dict(defines)
    suffix = "_".join(_describe(key, value) for key, value in defines if _is_named(key, value))
    name = f"fastconv_{word}_{algorithm}_{stage.lower()}__{suffix}"
    fixed = {"STORAGE": storage, "ACC": accumulator, f"STAGE_{stage}": 1, "KERNEL_NAME": name}
    head = "".join(f"#define {key} {value}\n" for key, value in {**fixed, **named}.items())
    text = _read(f"{algorithm}.cu")
    scalars = {**_SCALARS, "INDEX": _SCALARS[str(named["INDEX"])], "ACC": _SCALARS[accumulator]}
    types = {**scalars, **_structs(text, scalars)}
    parameters = tuple(_parse_parameter(words, types, dtype) for words in _parameter_words(text, stage))
    return Kernel(name, head + text, parameters, int(named["THREADS"]), defines)


def _is_named(key: str, value: int | str) -> bool:
    """Say whether a kernel's name says a define: not if it follows from others, as a matrix does."""
    return key != "THREADS" and not str(value).startswith("{")


def _describe(key: str, value: int | str) -> str:
    """BLOCK_M, 128 -> m128; ORDER, NHWC -> nhwc; INDEX, long long -> long."""
    if isinstance(value, str):
        return value.split()[0].lower()
    return f"{key.removeprefix('BLOCK_').lower()}{value}"


@lru_cache(maxsize=32)
def _read(name: str) -> str:
    """Return a file in which each first #include is what it includes; lines are numbered as in the files."""
    seen: set[str] = set()

    def expand(file: str) -> str:
        text = (KERNEL_DIR / file).read_text(encoding="utf-8")

        def replace(match: re.Match[str]) -> str:
            included = match[1]
            if included in seen:
                return ""
            seen.add(included)
            line = text.count("\n", 0, match.end()) + 2
            return f'{expand(included)}\n#line {line} "{file}"'

        return f'#line 1 "{file}"\n' + _INCLUDE.sub(replace, text)

    return expand(name)


def _parameter_words(text: str, stage: str) -> list[list[str]]:
    """Return the words of each parameter of the kernel of a stage."""
    sections = (section for section in _STAGE.split(text) if section.startswith(f"{stage}\n"))
    (kernel,) = (section.split("KERNEL(")[1] for section in sections if "KERNEL(" in section)
    inside = _COMMENT.sub("", kernel[: kernel.index("\n{")])
    return [part.split() for part in inside.rstrip().removesuffix(")").split(",")]


def _parse_parameter(words: list[str], types: dict[str, Any], dtype: str) -> Parameter:
    """Read `const STORAGE* __restrict__ x` (an array to be read), `ACC* y` (one to be written), `int n`."""
    *kind, name = (word for word in words if word != "__restrict__")
    base = " ".join(word for word in kind if word != "const").removesuffix("*")
    if not kind[-1].endswith("*"):
        return Parameter(name, np.dtype(types[base]), False, False)
    element = dtype if base == "STORAGE" else np.dtype(types[base]).name
    return Parameter(name, element, True, kind[0] != "const")


def _structs(text: str, scalars: dict[str, Any]) -> dict[str, np.dtype]:
    """Return for every C++ struct the NumPy dtype of its numbers, aligned as the compiler aligns it."""
    found = {}
    for name, body in _STRUCT.findall(text):
        fields = _FIELD.findall(_COMMENT.sub("", body))
        pairs = [(field.strip(), scalars[kind]) for kind, names in fields for field in names.split(",")]
        found[name] = np.dtype(pairs, align=True)
    return found
