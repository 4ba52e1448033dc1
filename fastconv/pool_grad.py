"""The gradients of pooling: that of the output enters, that of the input leaves, in the same memory order.

As in torch.nn.grad, a function <op>_input takes the input's size, what it needs of the forward pass,
grad_output, and then the options of <op>.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

from fastconv import arrays
from fastconv.borrowing import borrow
from fastconv.pool import INDEX, Array, backend, check_indices, check_places, find_order, make_frame
from fastconv.pool_problem import read_name
from fastconv.problem import Call, ConvError, PerAxis, shape_of

ArrayT = TypeVar("ArrayT")


def max_pool2d_input(
    input_size: Any,
    indices: Array,
    grad_output: ArrayT,
    kernel_size: PerAxis,
    stride: PerAxis | None = None,
    padding: PerAxis = 0,
    dilation: PerAxis = 1,
    ceil_mode: bool = False,
) -> ArrayT:
    """Return the gradient of max_pool2d with respect to its input.

    ===========  =======================================================
    input_size   (N, C, H, W) or (C, H, W)
    indices      as max_pool2d returned them; the shape of grad_output
    grad_output  (N, C, P, Q) or (C, P, Q)
    returns      the shape input_size
    ===========  =======================================================

    Each element goes to the maximum of its window. The options are those of the forward pass; on a GPU every
    element of the input looks for the windows that see it, so that all runs give the same bits. An index
    outside of the plane is a ConvError on the CPU and nothing on a GPU.

    >>> import numpy as np
    >>> from fastconv import max_pool2d
    >>> x = np.array([[[1.0, 4.0], [3.0, 2.0]]])
    >>> y, indices = max_pool2d(x, 2, return_indices=True)
    >>> max_pool2d_input(x.shape, indices, np.ones_like(y), 2)
    array([[[0., 1.],
            [0., 0.]]])
    """
    options = _max_options(kernel_size, stride, padding, dilation, ceil_mode)
    return _gradient("max_pool2d_input", input_size, options, grad_output, indices)


def max_pool1d_input(
    input_size: Any,
    indices: Array,
    grad_output: ArrayT,
    kernel_size: PerAxis,
    stride: PerAxis | None = None,
    padding: PerAxis = 0,
    dilation: PerAxis = 1,
    ceil_mode: bool = False,
) -> ArrayT:
    """Return the gradient of max_pool1d with respect to its input (N, C, L) or (C, L); as max_pool2d_input.

    >>> import numpy as np
    >>> max_pool1d_input((1, 5), np.array([[1, 3]]), np.array([[1.0, 2.0]]), 3, stride=2)
    array([[0., 1., 0., 2., 0.]])
    """
    options = _max_options(kernel_size, stride, padding, dilation, ceil_mode)
    return _gradient("max_pool1d_input", input_size, options, grad_output, indices)


def max_pool3d_input(
    input_size: Any,
    indices: Array,
    grad_output: ArrayT,
    kernel_size: PerAxis,
    stride: PerAxis | None = None,
    padding: PerAxis = 0,
    dilation: PerAxis = 1,
    ceil_mode: bool = False,
) -> ArrayT:
    """Return the gradient of max_pool3d with respect to its input; as max_pool2d_input.

    >>> import numpy as np
    >>> max_pool3d_input((1, 2, 2, 2), np.array([[[[7]]]]), np.array([[[[3.0]]]]), 2)[0, 1, 1]
    array([0., 3.])
    """
    options = _max_options(kernel_size, stride, padding, dilation, ceil_mode)
    return _gradient("max_pool3d_input", input_size, options, grad_output, indices)


def avg_pool2d_input(
    input_size: Any,
    grad_output: ArrayT,
    kernel_size: PerAxis,
    stride: PerAxis | None = None,
    padding: PerAxis = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> ArrayT:
    """Return the gradient of avg_pool2d with respect to its input: elements are shared out over windows.

    ===========  ==========================
    input_size   (N, C, H, W) or (C, H, W)
    grad_output  (N, C, P, Q) or (C, P, Q)
    returns      the shape input_size
    ===========  ==========================

    >>> import numpy as np
    >>> avg_pool2d_input((1, 2, 4), np.array([[[4.0, 8.0]]]), 2)
    array([[[1., 1., 2., 2.],
            [1., 1., 2., 2.]]])
    """
    options = _avg_options(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _gradient("avg_pool2d_input", input_size, options, grad_output)


def avg_pool1d_input(
    input_size: Any,
    grad_output: ArrayT,
    kernel_size: PerAxis,
    stride: PerAxis | None = None,
    padding: PerAxis = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> ArrayT:
    """Return the gradient of avg_pool1d with respect to its input (N, C, L) or (C, L); as avg_pool2d_input.

    >>> import numpy as np
    >>> avg_pool1d_input((1, 4), np.array([[2.0, 4.0]]), 2)
    array([[1., 1., 2., 2.]])
    """
    options = _avg_options(kernel_size, stride, padding, ceil_mode, count_include_pad)
    return _gradient("avg_pool1d_input", input_size, options, grad_output)


def avg_pool3d_input(
    input_size: Any,
    grad_output: ArrayT,
    kernel_size: PerAxis,
    stride: PerAxis | None = None,
    padding: PerAxis = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> ArrayT:
    """Return the gradient of avg_pool3d with respect to its input; as avg_pool2d_input.

    >>> import numpy as np
    >>> avg_pool3d_input((1, 2, 2, 2), np.array([[[[8.0]]]]), 2)[0, 1]
    array([[1., 1.],
           [1., 1.]])
    """
    options = _avg_options(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _gradient("avg_pool3d_input", input_size, options, grad_output)


def adaptive_avg_pool2d_input(input_size: Any, grad_output: ArrayT) -> ArrayT:
    """Return the gradient of adaptive_avg_pool2d with respect to its input, of shape input_size.

    >>> import numpy as np
    >>> adaptive_avg_pool2d_input((1, 1, 4), np.array([[[2.0, 4.0]]]))
    array([[[1., 1., 2., 2.]]])
    """
    return _gradient("adaptive_avg_pool2d_input", input_size, None, grad_output)


def adaptive_avg_pool1d_input(input_size: Any, grad_output: ArrayT) -> ArrayT:
    """Return the gradient of adaptive_avg_pool1d with respect to its input, of shape input_size.

    >>> import numpy as np
    >>> adaptive_avg_pool1d_input((1, 3), np.array([[2.0, 4.0]]))
    array([[1., 3., 2.]])
    """
    return _gradient("adaptive_avg_pool1d_input", input_size, None, grad_output)


def adaptive_avg_pool3d_input(input_size: Any, grad_output: ArrayT) -> ArrayT:
    """Return the gradient of adaptive_avg_pool3d with respect to its input, of shape input_size.

    >>> import numpy as np
    >>> adaptive_avg_pool3d_input((1, 1, 1, 2), np.array([[[[4.0]]]]))
    array([[[[2., 2.]]]])
    """
    return _gradient("adaptive_avg_pool3d_input", input_size, None, grad_output)


def adaptive_max_pool2d_input(input_size: Any, indices: Array, grad_output: ArrayT) -> ArrayT:
    """Return the gradient of adaptive_max_pool2d with respect to its input; as max_pool2d_input.

    >>> import numpy as np
    >>> adaptive_max_pool2d_input((1, 1, 3), np.array([[[1, 1]]]), np.array([[[2.0, 4.0]]]))
    array([[[0., 6., 0.]]])
    """
    return _gradient("adaptive_max_pool2d_input", input_size, None, grad_output, indices)


def adaptive_max_pool1d_input(input_size: Any, indices: Array, grad_output: ArrayT) -> ArrayT:
    """Return the gradient of adaptive_max_pool1d with respect to its input; as max_pool2d_input.

    >>> import numpy as np
    >>> adaptive_max_pool1d_input((1, 3), np.array([[1, 1]]), np.array([[2.0, 4.0]]))
    array([[0., 6., 0.]])
    """
    return _gradient("adaptive_max_pool1d_input", input_size, None, grad_output, indices)


def max_unpool2d_input(indices: Array, grad_output: ArrayT) -> ArrayT:
    """Return the gradient of max_unpool2d with respect to its input: what lies where the indices say.

    ===========  ==========================
    indices      (N, C, P, Q) or (C, P, Q)
    grad_output  (N, C, H, W) or (C, H, W)
    returns      the shape of indices
    ===========  ==========================

    >>> import numpy as np
    >>> max_unpool2d_input(np.array([[[3]]]), np.array([[[1.0, 2.0], [3.0, 4.0]]]))
    array([[[4.]]])
    """
    op = "max_unpool2d_input"
    with borrow(op, {"grad_output": grad_output, "indices": indices}) as loan:
        shape, found = loan.shape("grad_output"), loan.shape("indices")
        if len(shape) not in (3, 4) or len(found) != len(shape) or found[:-2] != shape[:-2]:
            rule = "indices and grad_output must be (N, C, P, Q) and (N, C, H, W), or both without N"
            raise ConvError(f"{op}: {rule}, got {found} and {shape}")
        check_indices(op, loan.given, found, "indices")
        check_places(op, loan.kind, loan.given, shape[-2] * shape[-1])
        planes, places, xp = loan["grad_output"], loan["indices"], loan.xp
        *batch, C, P, Q = found
        H, W = shape[-2:]
        if find_order(loan.given["grad_output"], 2) == "NHWC":
            planes = xp.moveaxis(planes, -3, -1).reshape(*batch, H * W, C)
            # What is taken lies in memory as the places do.
            places = xp.ascontiguousarray(xp.moveaxis(places, -3, -1)).reshape(*batch, P * Q, C)
            taken = xp.take_along_axis(planes, places, axis=-2).reshape(*batch, P, Q, C)
            return loan.give(xp.moveaxis(taken, -1, -3))
        planes = planes.reshape(*batch, C, H * W)
        places = xp.ascontiguousarray(places).reshape(*batch, C, P * Q)
        return loan.give(xp.take_along_axis(planes, places, axis=-1).reshape(found))


def _max_options(kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any) -> Any:
    return {
        "kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation,
        "ceil_mode": ceil_mode,
    }  # fmt: skip


def _avg_options(
    kernel_size: Any, stride: Any, padding: Any, ceil_mode: Any, count_include_pad: Any, divisor: Any = None
) -> Any:
    return {
        "kernel_size": kernel_size, "stride": stride, "padding": padding, "ceil_mode": ceil_mode,
        "count_include_pad": count_include_pad, "divisor_override": divisor,
    }  # fmt: skip


def _gradient(op: str, input_size: Any, options: Any, grad_output: Any, indices: Any = None) -> Any:
    """The one implementation; the output size of an adaptive pooling is that of grad_output."""
    given = {"grad_output": grad_output}
    pool, ndim = read_name(op)
    if pool == "max":
        given["indices"] = indices
    kind = arrays.adapt(op, given)
    view = given["grad_output"]
    size = shape_of(Call(op, {"grad_output": view.shape}, {}, {}), "input_size", input_size)
    if op.startswith("adaptive"):
        options = view.shape[-ndim:]
    frame = make_frame(op, kind, given, options, size)
    problem = frame.problem
    expected = problem.output_shape[frame.is_single :]
    if view.shape != expected:
        rule = f"grad_output.shape must be that of the output = {expected}, got {view.shape}"
        raise ConvError(f"{op}: {rule} (input_size {size}, {arrays.describe(given)})")
    if pool == "max":
        check_indices(op, given, expected, "grad_output")
        check_places(op, kind, given, math.prod(problem.input_shape5[2:]), least=-1)
    with kind.serve(given.values()):
        out = frame.allocate(kind, problem.input_shape5, frame.compute)
        if kind.backend == "cpu":
            out[...] = 0
        if problem.N:
            places = arrays.to_computable(given["indices"], INDEX) if pool == "max" else None
            grad = frame.view5(arrays.to_computable(view, frame.compute))
            backend(kind).pool_input(problem, grad, None if places is None else frame.view5(places), out)
        return kind.wrap(frame.unframe(out, view.dtype), grad_output)
