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
    from fastconv import grad as grad
    from fastconv import reference as reference
    from fastconv import torch as torch
    from fastconv.folding import fold as fold
    from fastconv.folding import unfold as unfold
    from fastconv.functional import batch_norm as batch_norm
    from fastconv.functional import cross_entropy as cross_entropy
    from fastconv.functional import dropout as dropout
    from fastconv.functional import flatten as flatten
    from fastconv.functional import gelu as gelu
    from fastconv.functional import interpolate as interpolate
    from fastconv.functional import leaky_relu as leaky_relu
    from fastconv.functional import linear as linear
    from fastconv.functional import local_response_norm as local_response_norm
    from fastconv.functional import log_softmax as log_softmax
    from fastconv.functional import relu as relu
    from fastconv.functional import relu6 as relu6
    from fastconv.functional import sigmoid as sigmoid
    from fastconv.functional import silu as silu
    from fastconv.functional import softmax as softmax
    from fastconv.functional import tanh as tanh
    from fastconv.ops import Conv1d as Conv1d
    from fastconv.ops import Conv2d as Conv2d
    from fastconv.ops import Conv3d as Conv3d
    from fastconv.ops import algorithms as algorithms
    from fastconv.ops import conv1d as conv1d
    from fastconv.ops import conv2d as conv2d
    from fastconv.ops import conv3d as conv3d
    from fastconv.ops import explain as explain
    from fastconv.pool import adaptive_avg_pool1d as adaptive_avg_pool1d
    from fastconv.pool import adaptive_avg_pool2d as adaptive_avg_pool2d
    from fastconv.pool import adaptive_avg_pool3d as adaptive_avg_pool3d
    from fastconv.pool import adaptive_max_pool1d as adaptive_max_pool1d
    from fastconv.pool import adaptive_max_pool2d as adaptive_max_pool2d
    from fastconv.pool import avg_pool1d as avg_pool1d
    from fastconv.pool import avg_pool2d as avg_pool2d
    from fastconv.pool import avg_pool3d as avg_pool3d
    from fastconv.pool import max_pool1d as max_pool1d
    from fastconv.pool import max_pool2d as max_pool2d
    from fastconv.pool import max_pool3d as max_pool3d
    from fastconv.pool import max_unpool2d as max_unpool2d
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
    "adaptive_avg_pool1d": "pool",
    "adaptive_avg_pool2d": "pool",
    "adaptive_avg_pool3d": "pool",
    "adaptive_max_pool1d": "pool",
    "adaptive_max_pool2d": "pool",
    "algorithms": "ops",
    "avg_pool1d": "pool",
    "avg_pool2d": "pool",
    "avg_pool3d": "pool",
    "batch_norm": "functional",
    "conv1d": "ops",
    "conv2d": "ops",
    "conv3d": "ops",
    "conv_transpose1d": "transposed",
    "conv_transpose2d": "transposed",
    "conv_transpose3d": "transposed",
    "cross_entropy": "functional",
    "dropout": "functional",
    "explain": "ops",
    "flatten": "functional",
    "fold": "folding",
    "gelu": "functional",
    "interpolate": "functional",
    "leaky_relu": "functional",
    "linear": "functional",
    "local_response_norm": "functional",
    "log_softmax": "functional",
    "max_pool1d": "pool",
    "max_pool2d": "pool",
    "max_pool3d": "pool",
    "max_unpool2d": "pool",
    "relu": "functional",
    "relu6": "functional",
    "sigmoid": "functional",
    "silu": "functional",
    "softmax": "functional",
    "tanh": "functional",
    "tune": "tune",
    "unfold": "folding",
}
_MODULES = ("grad", "reference")
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
