"""Shapes and options of a pooling enter, a checked and frozen PoolProblem (or a ConvError) leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from fastconv.problem import (
    Call,
    check_count,
    check_shape,
    entries,
    flag,
    integer,
    output_size,
    per_axis,
    shape_of,
    span,
)

POOLS = {"max_pool": "max", "avg_pool": "average", "adaptive_max_pool": "max", "adaptive_avg_pool": "average"}
"""First part of an operation's name -> what becomes of the elements of a window."""

_AXES = "DHW"
_DEFAULTS: dict[str, object] = {
    "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "count_include_pad": True,
    "divisor_override": None,
}  # fmt: skip


class Taps(NamedTuple):
    """The part of one window that lies in the input: taps first, first + dilation, ... before `last`.

    counted  taps that the window counts when it is averaged, with those in the padding if they count
    """

    first: int
    last: int
    counted: int


class Windows(NamedTuple):
    """The windows along one axis; kernel 0: adaptive ones, which share out the input unevenly.

    padding  in front of the input; `after`: behind it
    """

    size: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    after: int = 0

    def taps(self, i: int, count_padding: bool) -> Taps:
        """Return what window i sees; a window of nothing but padding is empty.

        >>> Windows(size=7, outputs=4, kernel=3, stride=2, padding=1, after=1).taps(0, count_padding=True)
        Taps(first=0, last=2, counted=3)
        """
        if not self.kernel:
            first, last = i * self.size // self.outputs, -(-(i + 1) * self.size // self.outputs)
            return Taps(first, last, last - first)
        begin = i * self.stride - self.padding
        end = begin + span(self.kernel, self.dilation)
        first = begin if begin >= 0 else begin % self.dilation
        last = min(end, self.size)
        # Only max pooling knows a dilation, and only averages count.
        return Taps(first, last, min(end, self.size + self.after) - begin if count_padding else last - first)

    def part(self, size: int, before: int, after: int) -> Windows:
        """Return the windows of a part of the input: of so many elements, and the padding that they lack.

        >>> Windows(size=8, outputs=4, kernel=3, stride=2, padding=1).part(size=5, before=0, after=0)
        Windows(size=5, outputs=2, kernel=3, stride=2, padding=0, dilation=1, after=0)
        """
        outputs = output_size(size, self.kernel, self.stride, before, after, self.dilation)
        return self._replace(size=size, outputs=outputs, padding=before)


@dataclass(frozen=True)
class PoolProblem:
    """One pooling without its data: what is computed, never how.

    ========  ==========================================
    input     (N, C, D, H, W)
    output    (N, C, O, P, Q); `windows` along D, H and W
    ========  ==========================================

    As in a ConvProblem the outer axes of a 1-D or 2-D pooling have extent 1, and `order` says how input and
    output lie in memory. `pool` is "max" or "average"; an average divides by `divisor`, by default by the
    taps that its window counts.

    >>> problem = make_pool("max_pool2d", (8, 64, 112, 112), {"kernel_size": 3, "stride": 2, "padding": 1})
    >>> problem.output_shape
    (8, 64, 56, 56)
    """

    op: str = field(compare=False)
    ndim: int
    pool: str
    N: int
    C: int
    windows: tuple[Windows, Windows, Windows]
    count_padding: bool = True
    divisor: int | None = None
    dtype: str = "float32"
    order: str = "NCHW"

    @property
    def input_shape5(self) -> tuple[int, int, int, int, int]:
        """(N, C, D, H, W)."""
        d, h, w = self.windows
        return self.N, self.C, d.size, h.size, w.size

    @property
    def output_shape5(self) -> tuple[int, int, int, int, int]:
        """(N, C, O, P, Q)."""
        d, h, w = self.windows
        return self.N, self.C, d.outputs, h.outputs, w.outputs

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Input shape with as many spatial axes as the caller has."""
        return self.input_shape5[:2] + self.input_shape5[5 - self.ndim :]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Output shape with as many spatial axes as the caller has."""
        return self.output_shape5[:2] + self.output_shape5[5 - self.ndim :]

    @property
    def compute_dtype(self) -> str:
        """The dtype of the arithmetic: half types are summed in float32."""
        return "float64" if self.dtype == "float64" else "float32"

    @cached_property
    def work(self) -> int:
        """Elements that all windows see together, about: those in the padding included."""
        seen = (axis.outputs * (axis.kernel or -(-axis.size // axis.outputs) + 1) for axis in self.windows)
        return self.N * self.C * math.prod(seen)


def make_pool(
    op: str,
    input_shape: Sequence[int],
    options: dict[str, Any],
    dtype: str = "float32",
    order: str = "NCHW",
) -> PoolProblem:
    """Check the options of a max_pool or avg_pool, by their names, and return the problem they state.

    Raises ConvError for a value that breaks a rule and TypeError for one of the wrong type.
    """
    call = Call(op, {"input": input_shape}, options, _DEFAULTS)
    pool, ndim = read_name(op)
    shape = _check_input(call, ndim)
    kernels = per_axis(call, "kernel_size", ndim)
    strides = kernels if options.get("stride") is None else per_axis(call, "stride", ndim)
    dilations = per_axis(call, "dilation", ndim) if "dilation" in options else (1,) * ndim
    _check_below_2_63(call, {"stride": strides, "dilation": dilations})
    paddings = _paddings(call, kernels)
    ceil_mode = _flag(call, "ceil_mode")
    windows = []
    for axis in zip(shape[2:], kernels, strides, paddings, dilations):
        size, kernel, stride, padding, dilation = axis
        outputs = output_size(size, kernel, stride, padding, padding, dilation, ceil_mode)
        windows.append(Windows(size, outputs, kernel, stride, padding, dilation, padding))
    check_outputs(call, windows)
    return PoolProblem(
        op, ndim, pool, shape[0], shape[1], _with_absent(windows),
        count_padding=_flag(call, "count_include_pad"), divisor=_divisor(call), dtype=dtype, order=order,
    )  # fmt: skip


def make_adaptive_pool(
    op: str, input_shape: Sequence[int], output: Any, dtype: str = "float32", order: str = "NCHW"
) -> PoolProblem:
    """Check the output size of an adaptive pooling, and return the problem it states.

    output  an int, or one int per spatial axis; None keeps the input's

    >>> make_adaptive_pool("adaptive_avg_pool2d", (1, 8, 10, 7), (5, None)).output_shape
    (1, 8, 5, 7)
    """
    call = Call(op, {"input": input_shape}, {"output_size": output}, {})
    pool, ndim = read_name(op)
    shape = _check_input(call, ndim)
    rule = "output_size must be an int or one int or None per spatial axis"
    wanted = entries(call, "output_size", rule, ndim) if output is not None else (None,) * ndim
    windows = []
    for size, entry in zip(shape[2:], wanted):
        outputs = size if entry is None else integer(call, rule, entry)
        if outputs < 1:
            raise call.error(f"output_size must be at least 1, got {outputs}")
        windows.append(_adaptive(size, outputs))
    return PoolProblem(op, ndim, pool, shape[0], shape[1], _with_absent(windows), dtype=dtype, order=order)


def unpooled_size(op: str, input_shape: Sequence[int], options: dict[str, Any]) -> tuple[int, ...]:
    """Return the size (H, W) of what max_unpool2d fills: the least that pools to the input, or the one given.

    >>> unpooled_size("max_unpool2d", (1, 8, 5, 5), {"kernel_size": 2, "stride": None, "padding": 0})
    (10, 10)
    """
    call = Call(op, {"input": input_shape}, options, _DEFAULTS | {"output_size": None})
    shape = shape_of(call, "input", input_shape)
    check_shape(
        call, "input", (1, *shape) if len(shape) == 3 else shape, ("N", "C", "P", "Q"), " (3 without N)"
    )
    kernels = per_axis(call, "kernel_size", 2)
    strides = kernels if options["stride"] is None else per_axis(call, "stride", 2)
    paddings = _paddings(call, kernels)
    least = [
        (size - 1) * stride - 2 * padding + kernel
        for size, stride, padding, kernel in zip(shape[-2:], strides, paddings, kernels)
    ]
    wanted = tuple(least) if options.get("output_size") is None else _unpool_output(call, shape)
    if min(wanted) < 1:
        raise call.error(f"output_size must be at least 1, got {min(wanted)}")
    check_count(op, (*shape[:-2], *wanted), shape)
    for size, default, stride in zip(wanted, least, strides):
        if not default - stride < size < default + stride:
            limits = f"between {default - stride} and {default + stride}"
            raise call.error(f"output_size must lie {limits}, so that it pools to the input, got {size}")
    return wanted


def _unpool_output(call: Call, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the last two of the output_size that was asked for, which may be a whole shape."""
    wanted = shape_of(call, "output_size", call.options["output_size"])
    if len(wanted) not in (2, len(shape)):
        raise call.error(f"len(output_size) must be 2 or the input's {len(shape)}, got {len(wanted)}")
    return wanted[-2:]


def _adaptive(size: int, outputs: int) -> Windows:
    """Return windows of one size where the input can be shared out evenly."""
    share = 0 if size % outputs else size // outputs
    return Windows(size, outputs, share, share or 1)


def read_name(op: str) -> tuple[str, int]:
    """Return what an operation, or its gradient, does with a window, and over how many axes.

    >>> read_name("adaptive_max_pool2d_input")
    ('max', 2)
    """
    end = op.index("_pool") + len("_pool")
    return POOLS[op[:end]], int(op[end])


def _check_input(call: Call, ndim: int) -> tuple[int, ...]:
    shape = shape_of(call, "input", call.shapes["input"])
    check_shape(call, "input", shape, ("N", "C", *_AXES[-ndim:]), f" ({ndim + 1} without N)")
    return shape


def _paddings(call: Call, kernels: tuple[int, ...]) -> tuple[int, ...]:
    rule = "padding must be an int or one int per spatial axis"
    paddings = tuple(integer(call, rule, entry) for entry in entries(call, "padding", rule, len(kernels)))
    for padding, kernel in zip(paddings, kernels):
        if padding < 0:
            raise call.error(f"padding must be at least 0, got {padding}")
        if padding > kernel // 2:
            rule = f"padding must be at most kernel_size // 2 = {kernel} // 2 = {kernel // 2}"
            raise call.error(f"{rule}, got {padding}")
    return paddings


def check_outputs(call: Call, windows: list[Windows]) -> None:
    """Raise unless a window fits along every axis."""
    for letter, axis in zip(_AXES[-len(windows) :], windows):
        if axis.outputs < 1:
            limit = f"{axis.padding} + {axis.size} + {axis.padding} = {axis.size + 2 * axis.padding}"
            extent = span(axis.kernel, axis.dilation)
            rule = f"the window's extent must be at most padding + {letter} + padding = {limit}"
            raise call.error(f"{rule}, got {axis.dilation} * ({axis.kernel} - 1) + 1 = {extent}")


def _flag(call: Call, name: str) -> bool:
    return flag(call, name) if name in call.options else bool(_DEFAULTS[name])


def _divisor(call: Call) -> int | None:
    value = call.options.get("divisor_override")
    if value is None:
        return None
    divisor = integer(call, "divisor_override must be None or an int", value)
    if divisor == 0:
        raise call.error("divisor_override must not be 0, got 0")
    _check_below_2_63(call, {"divisor_override": (abs(divisor),)})
    return divisor


def _check_below_2_63(call: Call, values: dict[str, tuple[int, ...]]) -> None:
    """Raise for what the 64 bits of a kernel's argument do not hold; a kernel_size is bound by the input."""
    for name, found in values.items():
        if max(found) >= 2**63:
            raise call.error(f"{name} must be below 2**63, got {max(found)}")


def _with_absent(windows: list[Windows]) -> tuple[Windows, Windows, Windows]:
    d, h, w = [Windows(1, 1)] * (3 - len(windows)) + windows
    return d, h, w
