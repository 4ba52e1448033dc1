"""Sizes and options of a resize enter, per axis the elements that each of its results reads leave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastconv.problem import Call, check_count, check_shape, number, per_axis

_BETWEEN = ("linear", "bilinear", "trilinear")  # by spatial axes
_NEAREST = ("nearest", "nearest-exact")
_DEFAULTS = {"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None}


class Read(NamedTuple):
    """One element that every result along an axis reads, and its weight; None: 1."""

    places: np.ndarray
    weights: np.ndarray | None


class Resize(NamedTuple):
    """The resize of one axis, from `size` elements; the places of every read do not decrease."""

    size: int
    reads: tuple[Read, ...]

    def gather(self, xp: Any, x: Any, axis: int) -> Any:
        """Return the results along an axis."""
        total = None
        for places, weights in self.reads:
            part = xp.take(x, xp.asarray(places), axis)
            if weights is not None:
                part = part * _along(xp.asarray(weights.astype(x.dtype)), axis, x.ndim)
            total = part if total is None else total + part
        return total

    def scatter(self, xp: Any, grad: Any, axis: int) -> Any:
        """Return what the gradients of the results give to the elements that they read.

        Results that read one element follow one another, so that each element gathers them: first those
        that come first, then those that come second, and so on, in the same order in every run.
        """
        total = None
        for places, weights in self.reads:
            weighted = grad
            if weights is not None:
                weighted = grad * _along(xp.asarray(weights.astype(grad.dtype)), axis, grad.ndim)
            counts = np.bincount(places, minlength=self.size)
            first = np.cumsum(counts) - counts
            for turn in range(max(counts)):
                is_read = xp.asarray(turn < counts)
                at = xp.asarray(np.minimum(first + turn, len(places) - 1))
                part = xp.where(_along(is_read, axis, grad.ndim), xp.take(weighted, at, axis), 0)
                total = part if total is None else total + part
        return total


def _along(vector: Any, axis: int, ndim: int) -> Any:
    return vector.reshape(-1, *(1,) * (ndim - axis - 1))


def make_resizes(
    op: str,
    input_shape: Sequence[int],
    size: Any,
    scale_factor: Any,
    mode: str,
    align_corners: bool | None,
) -> list[Resize]:
    """Check the options of an interpolation and return the resize of each spatial axis."""
    options = {"size": size, "scale_factor": scale_factor, "mode": mode, "align_corners": align_corners}
    call = Call(op, {"input": input_shape}, options, _DEFAULTS)
    if not 3 <= len(input_shape) <= 5:
        rule = "input (N, C, W), (N, C, H, W) or (N, C, D, H, W) must have 3, 4 or 5 axes"
        raise call.error(f"{rule}, got {len(input_shape)}")
    ndim = len(input_shape) - 2
    check_shape(call, "input", tuple(input_shape), ("N", "C", *"DHW"[-ndim:]), "")
    _check_mode(call, ndim)
    sizes, scales = _sizes(call, input_shape[2:])
    for result in ((*input_shape[:2], *sizes), input_shape):  # the latter is that of a gradient
        check_count(op, result, input_shape)
    axes = zip(input_shape[2:], sizes, scales)
    return [_make_resize(before, after, scale, mode, bool(align_corners)) for before, after, scale in axes]


def _check_mode(call: Call, ndim: int) -> None:
    mode, align_corners = call.options["mode"], call.options["align_corners"]
    known = (*_NEAREST, _BETWEEN[ndim - 1])
    rule = f"mode must be one of {', '.join(known)} for {ndim} spatial axes"
    if not isinstance(mode, str):
        raise call.type_error(rule, mode)
    if mode not in known:
        raise call.error(f"{rule}, got {mode!r}")
    if align_corners is not None and not isinstance(align_corners, bool):
        raise call.type_error("align_corners must be None, True or False", align_corners)
    if align_corners is not None and mode in _NEAREST:
        raise call.error(f"align_corners must be None for mode {mode!r}, got {align_corners}")


def _sizes(call: Call, before: Sequence[int]) -> tuple[list[int], list[float | None]]:
    """Return the sizes of the result, and how many times as long an axis becomes where that was given."""
    size, factor = call.options["size"], call.options["scale_factor"]
    if (size is None) == (factor is None):
        found = "neither" if factor is None else "both"
        raise call.error(f"one of size and scale_factor must be given, got {found}")
    if factor is None:
        return list(per_axis(call, "size", len(before))), [None] * len(before)
    factor = factor.tolist() if isinstance(factor, np.ndarray) else factor
    factors = list(factor) if isinstance(factor, (tuple, list)) else [factor] * len(before)
    if len(factors) != len(before):
        rule = f"len(scale_factor) must be the number of spatial axes = {len(before)}"
        raise call.error(f"{rule}, got {len(factors)}")
    scales = [number(call._replace(options={"scale_factor": one}), "scale_factor") for one in factors]
    lengths = tuple(length * scale for length, scale in zip(before, scales))
    if min(lengths) < 1 or math.inf in lengths:
        raise call.error(f"the size of the result must be at least 1 and finite, got {lengths}")
    return list(map(math.floor, lengths)), list(scales)


def _make_resize(before: int, after: int, scale: float | None, mode: str, align_corners: bool) -> Resize:
    step = before / after if scale is None else 1 / scale  # elements of the input from one result to the next
    at = np.arange(after)
    # An axis that keeps its size is copied and one that doubles is repeated, whatever the scale: as in torch,
    # of whose kernels for "nearest" some do so (those of all gradients, of small images) and some do not.
    if before == after and mode != "nearest-exact":
        return Resize(before, _copy(at, mode))
    if after == 2 * before and mode == "nearest":
        step = 0.5
    if mode in _NEAREST:
        return Resize(before, (Read(_nearest(at, before, step, mode), None),))
    if align_corners:
        position = at * ((before - 1) / (after - 1) if after > 1 else 0.0)
    else:
        position = np.maximum((at + 0.5) * step - 0.5, 0)
    low = np.minimum(position.astype(np.int64), before - 1)
    high = np.minimum(low + 1, before - 1)
    share = np.clip(position - low, 0, 1)
    return Resize(before, (Read(low, 1 - share), Read(high, share)))


def _copy(at: np.ndarray, mode: str) -> tuple[Read, ...]:
    """Return the reads of an axis that keeps its size; between neighbours 0 times infinity is NaN."""
    ones = np.ones(len(at))
    return (Read(at, None),) if mode in _NEAREST else (Read(at, ones), Read(at, 0 * ones))


def _nearest(at: np.ndarray, before: int, step: float, mode: str) -> np.ndarray:
    """Return the element that is nearest to every result, found in float32.

    As torch finds it; but those of its kernels that copy nothing find that of float64 in float64.
    """
    shift = np.float32(0.5 if mode == "nearest-exact" else 0)
    places = np.floor((at.astype(np.float32) + shift) * np.float32(step)).astype(np.int64)
    return np.minimum(places, before - 1)
