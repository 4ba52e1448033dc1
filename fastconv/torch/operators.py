"""What all operators need: to be registered, one number per axis, and the strides of their results."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastconv import arrays, problem
from fastconv.problem import Call

Numbers = int | Sequence[int]
Size = Sequence[Any]  # of ints, symbolic ones too


def define(name: str, arguments: str, results: str = "Tensor", leader: int = 0) -> Any:
    """Return the decorator that registers a function as the operator fastconv::<name>.

    leader  place of the argument whose memory order results have
    """
    schema = f"({arguments}) -> {results}"
    register = torch.library.custom_op(f"fastconv::{name}", mutates_args=(), schema=schema)

    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def compute(*values: Any) -> Any:
            result = function(*values)
            if isinstance(result, tuple):
                return tuple(_with_strides(part, values[leader]) for part in result)
            return _with_strides(result, values[leader])

        return register(compute)

    return decorate


def _with_strides(result: Tensor, leader: Tensor) -> Tensor:
    """Give a result without elements, whose strides NumPy makes zeros, those that the fake promised."""
    return result if result.numel() else empty_like(leader, result.shape, result.dtype)


def check_tensors(op: str, **arguments: Any) -> None:
    """Raise TypeError for what is no tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            raise TypeError(f"{op}: {name} must be a torch tensor, got {kind}")


def is_plain(value: Any, count: int, least: int) -> bool:
    """True for a whole number, or one per axis, that needs no second look; symbolic ones too."""
    listed = value if isinstance(value, (tuple, list)) else [value] * count
    is_number = [isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in listed]
    return len(listed) == count and all(is_number) and all(n >= least for n in listed)


def per_axis(value: Any, ndim: int) -> list[Any]:
    """Return one whole number per axis of what was checked."""
    entries = value.tolist() if hasattr(value, "tolist") else value
    listed = entries if isinstance(entries, (tuple, list)) else [entries] * ndim
    return [entry if isinstance(entry, (int, torch.SymInt)) else operator.index(entry) for entry in listed]


def numbers(op: str, input: Any, name: str, value: Any, ndim: int, least: int = 1) -> list[Any]:
    """Check an option by the rules of fastconv's functions and return one whole number per axis."""
    if is_plain(value, ndim, least):
        return per_axis(value, ndim)
    return list(
        problem.per_axis(Call(op, {"input": tuple(input.shape)}, {name: value}, {}), name, ndim, least)
    )


def empty_like(leader: Tensor, shape: Size, dtype: Any = None) -> Tensor:
    """Return a tensor whose memory has the order in which fastconv returns a result; its dtype by default."""
    order = arrays.memory_order.__wrapped__(tuple(leader.shape[1:]), tuple(leader.stride()[1:]), 0, "NCHW")
    if order == "NCHW":
        return leader.new_empty(shape, dtype=dtype)
    return leader.new_empty([shape[0], *shape[2:], shape[1]], dtype=dtype).movedim(-1, 1)
