"""The windows of images enter, the columns of a matrix leave (im2col), and the sums of such columns go back.

Names, argument order, defaults and meaning are those of torch.nn.functional. Each operation is the other's
transpose, and so its gradient: the two gradients are here too.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from fastconv import arrays
from fastconv.borrowing import Loan, borrow
from fastconv.pool_problem import Windows, check_outputs
from fastconv.problem import Call, PerAxis, check_shape, output_size, per_axis, shape_of, span

ArrayT = TypeVar("ArrayT")

_DEFAULTS = {"dilation": 1, "padding": 0, "stride": 1}


def unfold(
    input: ArrayT, kernel_size: PerAxis, dilation: PerAxis = 1, padding: PerAxis = 0, stride: PerAxis = 1
) -> ArrayT:
    """Return the windows of every image as columns, by which a convolution is a product of matrices.

    ========  ======================================================================================
    input     (N, C, H, W), or (C, H, W) without a batch; N may be 0
    returns   (N, C * R * S, L) or (C * R * S, L): L = P * Q windows, row by row; the input's dtype
    ========  ======================================================================================

    kernel_size, dilation, padding, stride
        Elements: an int, or one per spatial axis; the padding is of zeros, on both sides. As in a convolution
        P = (H + 2 * padding - dilation * (R - 1) - 1) // stride + 1.

    Channels last in memory give columns that lie so: (N, L, C * R * S). Kinds of arrays, dtypes and streams
    are those of fastconv.conv2d. Raises ConvError for sizes that do not fit, TypeError for what is no size.

    >>> import numpy as np
    >>> unfold(np.arange(6.0).reshape(1, 2, 3), 2)
    array([[0., 1.],
           [1., 2.],
           [3., 4.],
           [4., 5.]])
    """
    return _unfold("unfold", "input", input, _options(kernel_size, dilation, padding, stride))


def fold(
    input: ArrayT,
    output_size: PerAxis,
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    padding: PerAxis = 0,
    stride: PerAxis = 1,
) -> ArrayT:
    """Put the columns of unfold back where they were, and return the sums of what lies on each other.

    ===========  =================================================================================
    input        (N, C * R * S, L), or (C * R * S, L) without a batch; N may be 0
    output_size  H, or (H, W): the size of the images from which unfold makes L columns
    returns      (N, C, H, W) or (C, H, W), the input's dtype; half types are summed in float32
    ===========  =================================================================================

    Options, memory order and errors are those of unfold.

    >>> import numpy as np
    >>> fold(np.ones((4, 2)), (2, 3), 2)
    array([[[1., 2., 1.],
            [1., 2., 1.]]])
    """
    op, options = "fold", _options(kernel_size, dilation, padding, stride)
    with borrow(op, {"input": input}) as loan:
        shape = loan.shape("input")
        call = Call(op, {"input": shape}, {"output_size": output_size, **options}, _DEFAULTS)
        rows, columns = _make_windows(call, per_axis(call, "output_size", 2))
        _check_columns(call, shape, rows, columns)
        return loan.give(_sum_columns(loan, "input", rows, columns))


def unfold_input(
    input_size: Any,
    grad_output: ArrayT,
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    padding: PerAxis = 0,
    stride: PerAxis = 1,
) -> ArrayT:
    """Return the gradient of unfold with respect to its input, which is fold.

    ===========  ====================================
    input_size   (N, C, H, W) or (C, H, W)
    grad_output  (N, C * R * S, L) or (C * R * S, L)
    returns      the shape input_size
    ===========  ====================================

    >>> import numpy as np
    >>> unfold_input((1, 1, 3), np.ones((2, 2)), (1, 2))
    array([[[1., 2., 1.]]])
    """
    op, options = "unfold_input", _options(kernel_size, dilation, padding, stride)
    with borrow(op, {"grad_output": grad_output}) as loan:
        found = loan.shape("grad_output")
        call = Call(op, {"grad_output": found}, {"input_size": input_size, **options}, _DEFAULTS)
        size = shape_of(call, "input_size", input_size)
        _check_image(call, "input", size)
        rows, columns = _make_windows(call, size[-2:])
        wanted = (*size[:-3], size[-3] * rows.kernel * columns.kernel, rows.outputs * columns.outputs)
        if found != wanted:
            raise call.error(f"grad_output.shape must be that of the output = {wanted}, got {found}")
        return loan.give(_sum_columns(loan, "grad_output", rows, columns))


def fold_input(
    grad_output: ArrayT,
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    padding: PerAxis = 0,
    stride: PerAxis = 1,
) -> ArrayT:
    """Return the gradient of fold with respect to its input, which is unfold.

    ===========  ====================================
    grad_output  (N, C, H, W) or (C, H, W)
    returns      (N, C * R * S, L) or (C * R * S, L)
    ===========  ====================================

    >>> import numpy as np
    >>> fold_input(np.array([[[1.0, 2.0, 3.0]]]), (1, 2))
    array([[1., 2.],
           [2., 3.]])
    """
    options = _options(kernel_size, dilation, padding, stride)
    return _unfold("fold_input", "grad_output", grad_output, options)


def _options(kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> dict[str, Any]:
    return {"kernel_size": kernel_size, "dilation": dilation, "padding": padding, "stride": stride}


def _unfold(op: str, name: str, image: Any, options: dict[str, Any]) -> Any:
    """Unfold the argument `name` of an operation."""
    with borrow(op, {name: image}) as loan:
        shape = loan.shape(name)
        call = Call(op, {name: shape}, options, _DEFAULTS)
        _check_image(call, name, shape)
        rows, columns = _make_windows(call, shape[-2:])
        return loan.give(_copy_windows(loan, name, rows, columns))


def _check_image(call: Call, name: str, shape: tuple[int, ...]) -> None:
    check_shape(call, name, (1, *shape) if len(shape) == 3 else shape, ("N", "C", "H", "W"), " (3 without N)")


def _check_columns(call: Call, shape: tuple[int, ...], rows: Windows, columns: Windows) -> None:
    """Raise unless the shape is that of columns of these windows."""
    letters = ("N", "C * R * S", "L")
    check_shape(call, "input", (1, *shape) if len(shape) == 2 else shape, letters, " (2 without N)")
    taps, windows = rows.kernel * columns.kernel, rows.outputs * columns.outputs
    if shape[-2] % taps:
        rule = f"a multiple of R * S = {rows.kernel} * {columns.kernel} = {taps}"
        raise call.error(f"input.shape[-2] must be {rule}, got {shape[-2]}")
    if shape[-1] != windows:
        rule = f"L = P * Q = {rows.outputs} * {columns.outputs} = {windows}"
        raise call.error(f"input.shape[-1] must be {rule}, got {shape[-1]}")


def _make_windows(call: Call, sizes: tuple[int, ...]) -> tuple[Windows, Windows]:
    """Check the options and return the windows along H and W."""
    kernels, dilations, strides = (per_axis(call, name, 2) for name in ("kernel_size", "dilation", "stride"))
    windows = []
    for axis in zip(sizes, kernels, strides, per_axis(call, "padding", 2, least=0), dilations):
        size, kernel, stride, padding, dilation = axis
        outputs = output_size(size, kernel, stride, padding, padding, dilation)
        windows.append(Windows(size, outputs, kernel, stride, padding, dilation, padding))
    check_outputs(call, windows)
    padded = tuple(axis.size + 2 * axis.padding for axis in windows)
    if padded[0] * padded[1] >= 2**60:
        raise call.error(f"an image and its padding must have fewer than 2**60 elements, got {padded}")
    rows, columns = windows
    return rows, columns


def _copy_windows(loan: Loan, name: str, rows: Windows, columns: Windows) -> Any:
    """Return the columns of images: a view of all windows, copied once."""
    xp, x = loan.xp, loan.raw(name)
    *batch, C, _, _ = x.shape
    width, L = C * rows.kernel * columns.kernel, rows.outputs * columns.outputs
    pads = [(axis.padding, axis.padding) for axis in (rows, columns)]
    padded = xp.pad(x, [(0, 0)] * (x.ndim - 2) + pads)
    spans = tuple(span(axis.kernel, axis.dilation) for axis in (rows, columns))
    view = xp.lib.stride_tricks.sliding_window_view(padded, spans, (-2, -1))  # C, H, W, R, S with every step
    windows = view[..., :: rows.stride, :: columns.stride, :: rows.dilation, :: columns.dilation]
    if _is_last(loan, name, 3):
        return xp.moveaxis(windows, -5, -3).copy().reshape(*batch, L, width).swapaxes(-1, -2)
    return xp.moveaxis(windows, (-2, -1), (-4, -3)).copy().reshape(*batch, width, L)


def _sum_columns(loan: Loan, name: str, rows: Windows, columns: Windows) -> Any:
    """Return the images whose windows are added up: tap by tap, in one order, all windows at once."""
    xp, x, is_last = loan.xp, loan[name], _is_last(loan, name, 2)
    R, S, P, Q = rows.kernel, columns.kernel, rows.outputs, columns.outputs
    batch, C = x.shape[:-2], x.shape[-2] // (R * S)
    H, W = (axis.padding + axis.size + axis.padding for axis in (rows, columns))
    if is_last:
        taps = xp.moveaxis(x.swapaxes(-1, -2).reshape(*batch, P, Q, C, R, S), (-5, -4), (-2, -1))
        total = xp.moveaxis(xp.zeros((*batch, H, W, C), x.dtype), -1, -3)
    else:
        taps, total = x.reshape(*batch, C, R, S, P, Q), xp.zeros((*batch, C, H, W), x.dtype)
    for r, s in np.ndindex(R, S):
        total[..., _seen(rows, r), _seen(columns, s)] += taps[..., r, s, :, :]
    inside = (slice(axis.padding, axis.padding + axis.size) for axis in (rows, columns))
    return total[(..., *inside)].copy(order="K")


def _seen(axis: Windows, tap: int) -> slice:
    """Return the padded places at which the windows along an axis have one of their taps."""
    first = tap * axis.dilation
    return slice(first, first + (axis.outputs - 1) * axis.stride + 1, axis.stride)


def _is_last(loan: Loan, name: str, ndim: int) -> bool:
    """Say whether the channels, the first of a sample's axes, lie last in memory."""
    view = loan.given[name]
    return arrays.memory_order(view.shape[-ndim:], view.strides[-ndim:], 0, "NCHW") == "NHWC"
