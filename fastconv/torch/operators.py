"""What all operators need: to be registered, one number per axis, and the strides of their results."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastconv import arrays

Numbers = int | Sequence[int]
Size = Sequence[Any]  # of ints, symbolic ones too


def define(name: str, arguments: str, results: str = "Tensor") -> Any:
    """Return the decorator that registers a function as the operator fastconv::<name>."""
    schema = f"({arguments}) -> {results}"
    return torch.library.custom_op(f"fastconv::{name}", mutates_args=(), schema=schema)


def per_axis(value: Any, ndim: int) -> list[Any]:
    """Return one whole number per axis; whether they are right is checked by fastconv's own functions."""
    entries = value if isinstance(value, Sequence) else [value] * ndim
    return [entry if isinstance(entry, (int, torch.SymInt)) else operator.index(entry) for entry in entries]


def empty_like(leader: Tensor, shape: Size, dtype: Any = None) -> Tensor:
    """Return a tensor whose memory has the order in which fastconv returns a result; its dtype by default."""
    order = arrays.memory_order.__wrapped__(tuple(leader.shape[1:]), tuple(leader.stride()[1:]), 0, "NCHW")
    if order == "NCHW":
        return leader.new_empty(shape, dtype=dtype)
    return leader.new_empty([shape[0], *shape[2:], shape[1]], dtype=dtype).movedim(-1, 1)
