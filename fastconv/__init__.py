"""Neural-network convolution for NumPy arrays, CuPy arrays and torch tensors, without a framework.

Every public name is loaded when it is first used, so that `import fastconv` alone costs next to nothing.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastconv import reference as reference
    from fastconv import torch as torch
    from fastconv.ops import Conv1d as Conv1d
    from fastconv.ops import Conv2d as Conv2d
    from fastconv.ops import Conv3d as Conv3d
    from fastconv.ops import algorithms as algorithms
    from fastconv.ops import conv1d as conv1d
    from fastconv.ops import conv2d as conv2d
    from fastconv.ops import conv3d as conv3d
    from fastconv.ops import explain as explain
    from fastconv.problem import ConvError as ConvError
    from fastconv.transposed import conv_transpose1d as conv_transpose1d
    from fastconv.transposed import conv_transpose2d as conv_transpose2d
    from fastconv.transposed import conv_transpose3d as conv_transpose3d
    from fastconv.tune import tune as tune

# public name -> module that holds it
_HOME = {
    "Conv1d": "ops",
    "Conv2d": "ops",
    "Conv3d": "ops",
    "ConvError": "problem",
    "algorithms": "ops",
    "conv1d": "ops",
    "conv2d": "ops",
    "conv3d": "ops",
    "conv_transpose1d": "transposed",
    "conv_transpose2d": "transposed",
    "conv_transpose3d": "transposed",
    "explain": "ops",
    "tune": "tune",
}
_MODULES = ("reference",)
_ON_DEMAND = ("torch",)  # not what `from fastconv import *` brings: it needs torch

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name: str) -> object:
    if name in (*_MODULES, *_ON_DEMAND):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(types.ModuleType):
    """The package: here `algorithms` and `tune` are the functions, although modules of these names exist.

    Importing a submodule binds it to its name in the package; for a public function that is declined, or
    `fastconv.tune(...)` would call a module as soon as any code had imported fastconv.tune.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
