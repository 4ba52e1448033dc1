"""Pooling: the caller's array enters, the maxima or averages of its windows leave, in the same memory order.

Names, argument order, defaults and meaning are those of torch.nn.functional; the gradients are in pool_grad.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from importlib import import_module
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fastconv import arrays, lazy
from fastconv.borrowing import borrow
from fastconv.pool_problem import PoolProblem, make_adaptive_pool, make_pool, read_name, unpooled_size
from fastconv.problem import Call, ConvError, PerAxis, check_count, flag

ArrayT = TypeVar("ArrayT")
Array = Any

INDEX = np.dtype("int64")


def max_pool2d(
    input: ArrayT,
    kernel_size: PerAxis,
    stride: PerAxis | None = None,
    padding: PerAxis = 0,
    dilation: PerAxis = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Return the maximum of every window of every channel.

    ========  =====================================================================================
    input     (N, C, H, W), or (C, H, W) without a batch; N may be 0
    returns   (N, C, P, Q) or (C, P, Q): P = (H + 2 * padding - dilation * (R - 1) - 1) // stride + 1
    ========  =====================================================================================

    kernel_size, stride, padding, dilation
        Elements: an int, or one per spatial axis. The stride is by default the kernel's size; the padding,
        of -inf on both sides, is at most half of the kernel.
    ceil_mode
        Round P up: a last window may reach over the end, if it begins in the input or in the padding before.
    return_indices
        Return (maxima, indices): int64, each the place h * W + w of the maximum in its plane of the input.

    Of equal elements the first is the maximum; a NaN is greater than all, of several the last counts. A
    window that sees nothing but padding gives -inf and the index -1. Kinds of arrays, Dask's among them,
    dtypes, memory order, streams and errors are those of fastconv.conv2d.

    >>> import numpy as np
    >>> image = np.arange(16.0).reshape(1, 4, 4)
    >>> max_pool2d(image, 2)
    array([[[ 5.,  7.],
            [13., 15.]]])
    """
    options = _options(kernel_size, stride, padding, dilation=dilation, ceil_mode=ceil_mode)
    return _pool("max_pool2d", input, options, return_indices)


def max_pool1d(
    input: ArrayT,
    kernel_size: PerAxis,
    stride: PerAxis | None = None,
    padding: PerAxis = 0,
    dilation: PerAxis = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Return the maximum of every window of (N, C, L) or (C, L); options and errors as for max_pool2d.

    >>> import numpy as np
    >>> max_pool1d(np.array([[1.0, 5.0, 2.0, 7.0, 3.0]]), 3, stride=2, return_indices=True)
    (array([[5., 7.]]), array([[1, 3]]))
    """
    options = _options(kernel_size, stride, padding, dilation=dilation, ceil_mode=ceil_mode)
    return _pool("max_pool1d", input, options, return_indices)


def max_pool3d(
    input: ArrayT,
    kernel_size: PerAxis,
    stride: PerAxis | None = None,
    padding: PerAxis = 0,
    dilation: PerAxis = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Return the maximum of every window of (N, C, D, H, W) or (C, D, H, W); options as for max_pool2d.

    An index is the place (d * H + h) * W + w of the maximum in its volume.

    >>> import numpy as np
    >>> max_pool3d(np.arange(8.0).reshape(1, 2, 2, 2), 2).item()
    7.0
    """
    options = _options(kernel_size, stride, padding, dilation=dilation, ceil_mode=ceil_mode)
    return _pool("max_pool3d", input, options, return_indices)


def avg_pool2d(
    input: ArrayT,
    kernel_size: PerAxis,
    stride: PerAxis | None = None,
    padding: PerAxis = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> ArrayT:
    """Return the average of every window of every channel.

    ========  ==================================================================================
    input     (N, C, H, W), or (C, H, W) without a batch; N may be 0
    returns   (N, C, P, Q) or (C, P, Q): P = (H + 2 * padding - R) // stride + 1
    ========  ==================================================================================

    kernel_size, stride, padding, ceil_mode
        As for max_pool2d, with zeros as padding. What lies behind the padding (ceil_mode) is never counted.
    count_include_pad
        Whether the zeros of the padding count as elements of a window.
    divisor_override
        Divide the sum of every window by this number.

    >>> import numpy as np
    >>> avg_pool2d(np.array([[[1.0, 2.0], [3.0, 4.0]]]), 2, padding=1, count_include_pad=False)
    array([[[1., 2.],
            [3., 4.]]])
    """
    options = _options(
        kernel_size, stride, padding,
        ceil_mode=ceil_mode, count_include_pad=count_include_pad, divisor_override=divisor_override,
    )  # fmt: skip
    return _pool("avg_pool2d", input, options)


def avg_pool1d(
    input: ArrayT,
    kernel_size: PerAxis,
    stride: PerAxis | None = None,
    padding: PerAxis = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> ArrayT:
    """Return the average of every window of (N, C, L) or (C, L); options and errors as for avg_pool2d.

    >>> import numpy as np
    >>> avg_pool1d(np.array([[1.0, 5.0, 2.0, 7.0]]), 2)
    array([[3. , 4.5]])
    """
    options = _options(kernel_size, stride, padding, ceil_mode=ceil_mode, count_include_pad=count_include_pad)
    return _pool("avg_pool1d", input, options)


def avg_pool3d(
    input: ArrayT,
    kernel_size: PerAxis,
    stride: PerAxis | None = None,
    padding: PerAxis = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> ArrayT:
    """Return the average of every window of (N, C, D, H, W) or (C, D, H, W); options as for avg_pool2d.

    >>> import numpy as np
    >>> avg_pool3d(np.arange(8.0).reshape(1, 2, 2, 2), 2, divisor_override=4).item()
    7.0
    """
    options = _options(
        kernel_size, stride, padding,
        ceil_mode=ceil_mode, count_include_pad=count_include_pad, divisor_override=divisor_override,
    )  # fmt: skip
    return _pool("avg_pool3d", input, options)


def adaptive_avg_pool2d(input: ArrayT, output_size: Any) -> ArrayT:
    """Return averages of P x Q windows that share out the input as evenly as can be.

    ===========  ================================================================================
    input        (N, C, H, W), or (C, H, W) without a batch; N may be 0
    output_size  P, or (P, Q); None for an axis keeps its size; 1 is global average pooling
    returns      (N, C, P, Q) or (C, P, Q); window i covers rows i * H // P to (i + 1) * H / P, rounded up
    ===========  ================================================================================

    >>> import numpy as np
    >>> adaptive_avg_pool2d(np.arange(10.0).reshape(1, 2, 5), (1, 2))
    array([[[3.5, 5.5]]])
    """
    return _pool("adaptive_avg_pool2d", input, output_size)


def adaptive_avg_pool1d(input: ArrayT, output_size: Any) -> ArrayT:
    """Return averages of Q windows that share out (N, C, L) or (C, L), as adaptive_avg_pool2d does.

    >>> import numpy as np
    >>> adaptive_avg_pool1d(np.arange(5.0).reshape(1, 5), 2)
    array([[1., 3.]])
    """
    return _pool("adaptive_avg_pool1d", input, output_size)


def adaptive_avg_pool3d(input: ArrayT, output_size: Any) -> ArrayT:
    """Return averages of windows that share out (N, C, D, H, W) or (C, D, H, W), as adaptive_avg_pool2d does.

    >>> import numpy as np
    >>> adaptive_avg_pool3d(np.arange(8.0).reshape(1, 2, 2, 2), (2, 1, 1)).ravel()
    array([1.5, 5.5])
    """
    return _pool("adaptive_avg_pool3d", input, output_size)


def adaptive_max_pool2d(input: ArrayT, output_size: Any, return_indices: bool = False) -> Any:
    """Return maxima of the windows of adaptive_avg_pool2d, with indices as max_pool2d does if asked for.

    >>> import numpy as np
    >>> adaptive_max_pool2d(np.arange(10.0).reshape(1, 2, 5), (1, 2), return_indices=True)
    (array([[[7., 9.]]]), array([[[7, 9]]]))
    """
    return _pool("adaptive_max_pool2d", input, output_size, return_indices)


def adaptive_max_pool1d(input: ArrayT, output_size: Any, return_indices: bool = False) -> Any:
    """Return maxima of Q windows that share out (N, C, L) or (C, L), as adaptive_max_pool2d does.

    >>> import numpy as np
    >>> adaptive_max_pool1d(np.arange(5.0).reshape(1, 5), 2)
    array([[2., 4.]])
    """
    return _pool("adaptive_max_pool1d", input, output_size, return_indices)


def max_unpool2d(
    input: ArrayT,
    indices: Array,
    kernel_size: PerAxis,
    stride: PerAxis | None = None,
    padding: PerAxis = 0,
    output_size: Any = None,
) -> ArrayT:
    """Put every element where its index says, zeros elsewhere: max_pool2d backwards, as far as that goes.

    ===========  ===================================================================================
    input        (N, C, P, Q), or (C, P, Q) without a batch; N may be 0
    indices      the shape of the input; int64, as max_pool2d returns them
    output_size  (H, W), or a whole shape that ends so; by default (P - 1) * stride - 2 * padding + R
    returns      (N, C, H, W) or (C, H, W)
    ===========  ===================================================================================

    An index that comes twice in a plane takes the later element on the CPU, either of them on a GPU. An index
    outside of [0, H * W), as the -1 of a window of nothing but padding, is a ConvError on the CPU; on a GPU
    nobody looks, and its element goes anywhere.

    >>> import numpy as np
    >>> pooled, indices = max_pool2d(np.arange(16.0).reshape(1, 4, 4), 2, return_indices=True)
    >>> max_unpool2d(pooled, indices, 2)[0, 1]
    array([0., 5., 0., 7.])
    """
    op = "max_unpool2d"
    options = _options(kernel_size, stride, padding, output_size=output_size)
    with borrow(op, {"input": input, "indices": indices}) as loan:
        shape = loan.shape("input")
        H, W = unpooled_size(op, shape, options)
        check_indices(op, loan.given, shape, "input")
        check_places(op, loan.kind, loan.given, H * W)
        x, xp = loan["input"], loan.xp
        *batch, C, P, Q = shape
        if find_order(loan.given["input"], 2) == "NHWC":
            planes = xp.moveaxis(xp.zeros((*batch, H, W, C), x.dtype), -1, -3)
            flat = xp.moveaxis(planes, -3, -1).reshape(*batch, H * W, C).swapaxes(-1, -2)
        else:
            planes = xp.zeros((*batch, C, H, W), x.dtype)
            flat = planes.reshape(*batch, C, H * W)
        places = loan["indices"].reshape(*batch, C, P * Q)
        xp.put_along_axis(flat, places, x.reshape(*batch, C, P * Q), axis=-1)
        return loan.give(planes)


def _options(kernel_size: Any, stride: Any, padding: Any, **others: Any) -> dict[str, Any]:
    return {"kernel_size": kernel_size, "stride": stride, "padding": padding, **others}


def _pool(op: str, input: Any, options: Any, return_indices: bool = False) -> Any:
    """The one implementation of all poolings; `options` of an adaptive one are its output size."""
    flag(
        Call(op, {"input": getattr(input, "shape", None)}, {"return_indices": return_indices}, {}),
        "return_indices",
    )
    if arrays.is_dask(input):
        return _pool_lazily(op, input, options, return_indices)
    given = {"input": input}
    kind = arrays.adapt(op, given)
    return _run(kind, make_frame(op, kind, given, options), input, given["input"], return_indices)


def _run(kind: arrays.Kind, frame: Frame, input: Any, view: np.ndarray, return_indices: bool) -> Any:
    """Pool the caller's array, which `view` shows, into new ones of its kind."""
    with kind.serve([view]):
        out = frame.allocate(kind, frame.problem.output_shape5, frame.compute)
        indices = frame.allocate(kind, out.shape, INDEX) if return_indices else None
        if frame.problem.N:
            x = frame.view5(arrays.to_computable(view, frame.compute))
            backend(kind).pool(frame.problem, x, out, indices)
        result = frame.unframe(out, view.dtype)
    wrapped = kind.wrap(result, input)
    return wrapped if indices is None else (wrapped, kind.wrap(frame.unframe(indices, INDEX), input))


def _pool_lazily(op: str, input: Any, options: Any, return_indices: bool) -> Any:
    """Check a call, and return Dask arrays that pool chunk by chunk, with the bits of the undivided result.

    The memory order is channels first: a Dask array has no strides to read another one from.
    """
    given = {"input": arrays.stand_in(op, "input", input)}
    problem = make_frame(op, arrays.adapt(op, given), given, options).problem
    first = input.ndim - problem.ndim
    axes = dict(enumerate(problem.windows[-problem.ndim :], first))
    sweep = lazy.Sweep(
        input,
        {
            axis: lazy.Window(window.kernel, window.stride, window.dilation, window.padding)
            for axis, window in axes.items()
            if window.kernel
        },
        problem.output_shape[2 - first :],
        tuple(axis for axis, window in axes.items() if not window.kernel),
    )
    dtype = arrays.to_native(input.dtype)
    pooled = sweep.map(partial(_pool_chunk, problem=problem, return_indices=return_indices), dtype)
    if not return_indices:
        return pooled
    return tuple(
        pooled.map_blocks(itemgetter(i), dtype=dtype, meta=pooled._meta.astype(dtype))
        for i, dtype in enumerate((dtype, INDEX))
    )


def _pool_chunk(
    chunk: Any, *, parts: tuple[lazy.Part, ...], problem: PoolProblem, return_indices: bool
) -> Any:
    """Pool a chunk of a larger problem's input; indices are places in the undivided input."""
    given = {"input": chunk}
    kind = arrays.adapt(problem.op, given)
    is_single = chunk.ndim == problem.ndim + 1
    N, C, *sizes = (1, *chunk.shape) if is_single else chunk.shape
    windows, starts = list(problem.windows), [0, 0, 0]
    waiting = iter(parts)
    for axis, size in enumerate(sizes, 3 - problem.ndim):
        if windows[axis].kernel:
            part = next(waiting)
            windows[axis] = windows[axis].part(size, part.before, part.after)
            starts[axis] = part.start
    d, h, w = windows
    here = replace(problem, N=N, C=C, windows=(d, h, w))
    frame = Frame(here, is_single, compute_dtype(here, kind))
    result = _run(kind, frame, chunk, given["input"], return_indices)
    if not return_indices:
        return result
    pooled, indices = result
    return pooled, _move_places(indices, pooled, here, problem, starts)


def _move_places(
    indices: Any, pooled: Any, here: PoolProblem, whole: PoolProblem, starts: Sequence[int]
) -> Any:
    """Turn places in a part of the input into places in the whole; -1, of nothing, stays."""
    with borrow(whole.op, {"input": pooled, "indices": indices}) as loan:
        place, moved, scale = loan["indices"], 0, 1
        for part, axis, start in reversed(list(zip(here.windows, whole.windows, starts))):
            moved = moved + (place % part.size + start) * scale
            place, scale = place // part.size, scale * axis.size
        return loan.give(loan.xp.where(loan["indices"] < 0, -1, moved))


def backend(kind: arrays.Kind) -> Any:
    """Return the module whose kernels compute: cpu.pool or gpu.pool."""
    return import_module(f"fastconv.{kind.backend}.pool")


class Frame(NamedTuple):
    """How the caller's array lies in the rank-5 problem, and how results are allocated."""

    problem: PoolProblem
    is_single: bool  # without a batch
    compute: np.dtype

    def view5(self, array: np.ndarray) -> np.ndarray:
        """Add the axes that the caller does not have."""
        axes = (None if self.is_single else slice(None), slice(None), *(None,) * (3 - self.problem.ndim))
        return array[axes]

    def unframe(self, array5: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Take away the axes that the caller does not have, and round to a dtype."""
        axes = (0 if self.is_single else slice(None), slice(None), *(0,) * (3 - self.problem.ndim))
        return arrays.to_storage(array5[axes], dtype)

    def allocate(self, kind: arrays.Kind, shape5: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return memory in the problem's order."""
        if self.problem.order == "NCHW":
            return kind.empty(shape5, dtype)
        return kind.empty((shape5[0], *shape5[2:], shape5[1]), dtype).transpose(0, 4, 1, 2, 3)


def make_frame(
    op: str, kind: arrays.Kind, given: arrays.Given, options: Any, input_shape: tuple[int, ...] | None = None
) -> Frame:
    """State the problem of the first array of `given`: the input, or, with input_shape, grad_output."""
    name, array = next(iter(given.items()))
    dtype = arrays.common_dtype(op, {name: array})
    _, ndim = read_name(op)
    shape = array.shape if input_shape is None else input_shape
    is_single = len(shape) == ndim + 1
    order = find_order(array, ndim)
    problem = _find_problem(op, (1, *shape) if is_single else tuple(shape), _ByText(options), dtype, order)
    return Frame(problem, is_single, compute_dtype(problem, kind))


def compute_dtype(problem: PoolProblem, kind: arrays.Kind) -> np.dtype:
    """Return the dtype that a backend's kernels read and write: those of the GPU know half types."""
    return np.dtype(problem.compute_dtype if kind.backend == "cpu" else problem.dtype)


class _ByText:
    """Options as a key of a cache: compared as text, because 1.0 and True would pass for 1."""

    def __init__(self, options: Any) -> None:
        self.options, self.text = options, repr(options)

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByText) and self.text == other.text


@lru_cache(maxsize=1024)
def _find_problem(op: str, shape: tuple[int, ...], options: _ByText, dtype: str, order: str) -> PoolProblem:
    make = make_adaptive_pool if op.startswith("adaptive") else make_pool
    problem = make(op, shape, options.options, dtype, order)
    for result in (problem.output_shape, problem.input_shape):  # the latter is that of a gradient
        check_count(op, result, shape)
    return problem


def find_order(array: np.ndarray, ndim: int) -> str:
    """Read the memory order off the strides of a sample."""
    if array.flags.c_contiguous or array.ndim <= ndim:
        return "NCHW"
    sample = slice(-ndim - 1, None)
    return arrays.memory_order(array.shape[sample], array.strides[sample], 0, "NCHW")


def check_indices(op: str, given: arrays.Given, shape: tuple[int, ...], like: str) -> None:
    """Raise unless given["indices"] holds int64 and has the shape of what `like` names."""
    indices = given["indices"]
    if arrays.to_native(indices.dtype) != INDEX:
        found = f"got {indices.dtype.name} ({arrays.describe(given)})"
        raise TypeError(
            f"{op}: indices.dtype must be int64, as {op.split('_')[0]}_pool returns them, {found}"
        )
    if indices.shape != shape:
        rule = f"indices.shape must be {like}.shape = {shape}, got {indices.shape}"
        raise ConvError(f"{op}: {rule} ({arrays.describe(given)})")


def check_places(op: str, kind: arrays.Kind, given: arrays.Given, plane: int, least: int = 0) -> None:
    """Raise unless all indices lie in [least, plane); on a GPU that would mean to wait for it."""
    indices = given["indices"]
    if kind.backend == "gpu" or not indices.size:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < least or high >= plane:
        found = low if low < least else high
        rule = f"indices must lie in the plane, from 0 to {plane - 1}, got {found}"
        raise ConvError(f"{op}: {rule} ({arrays.describe(given)})")
