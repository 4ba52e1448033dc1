"""The gradients of a convolution with respect to its input and its weight, named as in torch.nn.grad.

Both are problems like the convolution itself, in another direction: the same table, plans and kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from fastconv import arrays
from fastconv import plan as planning
from fastconv.borrowing import borrow
from fastconv.ops import (
    Array,
    Frame,
    Shapes,
    find_form,
    find_frame,
    find_route,
    finish,
    gradient_key,
    is_channels_last,
    remember,
)
from fastconv.problem import DIRECTIONS, OPERATIONS, ConvError, Epilogue, Padding, PerAxis, to_sizes

Size = Sequence[SupportsIndex]
Options = tuple[Any, ...]  # stride, padding, dilation, groups, precision, layout, algo, out


def conv2d_input(
    input_size: Size,
    weight: Array,
    grad_output: Array,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
    layout: str = "NCHW",
    out: Array | None = None,
) -> Array:
    """Return the gradient of sum(conv2d(input, weight) * grad_output) with respect to the input.

    ===========  ===============================================
    input_size   the shape of input: (N, C, H, W) or (C, H, W)
    weight       (K, C // groups, R, S)
    grad_output  the shape of conv2d's result: (N, K, P, Q)
    out          input_size; written and returned
    returns      input_size, in the memory order of grad_output
    ===========  ===============================================

    Arguments, arrays, dtypes and errors are those of conv2d. Every algorithm but one computes it: inputs that
    leave the same rest when divided by the stride meet the same taps, so that it is one convolution with
    stride 1 for each rest; `winograd` takes stride 1 only. (The sub-pixel view of Shi et al. 2016,
    arXiv:1609.07009; the arithmetic is that of Dumoulin and Visin, arXiv:1603.07285.)

    >>> import numpy as np
    >>> conv2d_input((1, 1, 1, 3), np.array([[[[1.0, 10.0]]]]), np.ones((1, 1, 1, 2)))
    array([[[[ 1., 11., 10.]]]])
    """
    options = (stride, padding, dilation, groups, precision, layout, algo, out)
    return _input_gradient("conv2d", input_size, weight, grad_output, options)


def conv1d_input(
    input_size: Size,
    weight: Array,
    grad_output: Array,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
    layout: str = "NCL",
    out: Array | None = None,
) -> Array:
    """Do what conv2d_input does for input_size (N, C, L) or (C, L).

    >>> import numpy as np
    >>> conv1d_input((1, 1, 3), np.array([[[1.0, 10.0]]]), np.ones((1, 1, 2)))
    array([[[ 1., 11., 10.]]])
    """
    options = (stride, padding, dilation, groups, precision, layout, algo, out)
    return _input_gradient("conv1d", input_size, weight, grad_output, options)


def conv3d_input(
    input_size: Size,
    weight: Array,
    grad_output: Array,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
    layout: str = "NCDHW",
    out: Array | None = None,
) -> Array:
    """Do what conv2d_input does for input_size (N, C, D, H, W) or (C, D, H, W).

    >>> import numpy as np
    >>> conv3d_input((1, 1, 1, 1, 3), np.array([[[[[1.0, 10.0]]]]]), np.ones((1, 1, 1, 1, 2))).ravel()
    array([ 1., 11., 10.])
    """
    options = (stride, padding, dilation, groups, precision, layout, algo, out)
    return _input_gradient("conv3d", input_size, weight, grad_output, options)


def conv2d_weight(
    input: Array,
    weight_size: Size,
    grad_output: Array,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
    layout: str = "NCHW",
    out: Array | None = None,
) -> Array:
    """Return the gradient of sum(conv2d(input, weight) * grad_output) with respect to the weight.

    ===========  ==========================================
    input        (N, C, H, W) or (C, H, W)
    weight_size  the shape of weight: (K, C // groups, R, S)
    grad_output  the shape of conv2d's result: (N, K, P, Q)
    out          weight_size; written and returned
    returns      weight_size
    ===========  ==========================================

    Arguments, arrays, dtypes and errors are those of conv2d. It is the sum over all pixels of the products of
    each output channel's gradient with each input that a tap meets there (Chellapilla, Puri, Simard 2006).
    Every algorithm computes it on the CPU, `winograd` with stride 1, every one but `winograd` on a GPU. With
    precision "high" it may be computed by Winograd's F(4 x 4, 3 x 3), which spreads a NaN over all taps of a
    filter.

    >>> import numpy as np
    >>> conv2d_weight(np.array([[[[1.0, 2.0, 4.0]]]]), (1, 1, 1, 2), np.ones((1, 1, 1, 2)))
    array([[[[3., 6.]]]])
    """
    options = (stride, padding, dilation, groups, precision, layout, algo, out)
    return _weight_gradient("conv2d", input, weight_size, grad_output, options)


def conv1d_weight(
    input: Array,
    weight_size: Size,
    grad_output: Array,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
    layout: str = "NCL",
    out: Array | None = None,
) -> Array:
    """Do what conv2d_weight does for input (N, C, L) or (C, L).

    >>> import numpy as np
    >>> conv1d_weight(np.array([[[1.0, 2.0, 4.0]]]), (1, 1, 2), np.ones((1, 1, 2)))
    array([[[3., 6.]]])
    """
    options = (stride, padding, dilation, groups, precision, layout, algo, out)
    return _weight_gradient("conv1d", input, weight_size, grad_output, options)


def conv3d_weight(
    input: Array,
    weight_size: Size,
    grad_output: Array,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
    layout: str = "NCDHW",
    out: Array | None = None,
) -> Array:
    """Do what conv2d_weight does for input (N, C, D, H, W) or (C, D, H, W).

    >>> import numpy as np
    >>> conv3d_weight(np.array([[[[[1.0, 2.0, 4.0]]]]]), (1, 1, 1, 1, 2), np.ones((1, 1, 1, 1, 2))).ravel()
    array([3., 6.])
    """
    options = (stride, padding, dilation, groups, precision, layout, algo, out)
    return _weight_gradient("conv3d", input, weight_size, grad_output, options)


def conv2d_bias(grad_output: Array, *, layout: str = "NCHW") -> Array:
    """Return the gradient of conv2d with respect to its bias: grad_output summed over batch and pixels.

    ===========  ==============================================
    grad_output  the shape of conv2d's result: (N, K, P, Q)
    returns      (K,)
    ===========  ==============================================

    Half types are summed in float32. Raises ConvError for another number of axes.

    >>> import numpy as np
    >>> conv2d_bias(np.ones((2, 3, 4, 5)))
    array([40., 40., 40.])
    """
    return _bias_gradient("conv2d", grad_output, layout)


def conv1d_bias(grad_output: Array, *, layout: str = "NCL") -> Array:
    """Do what conv2d_bias does for grad_output (N, K, Q) or (K, Q).

    >>> import numpy as np
    >>> conv1d_bias(np.ones((2, 3, 4)))
    array([8., 8., 8.])
    """
    return _bias_gradient("conv1d", grad_output, layout)


def conv3d_bias(grad_output: Array, *, layout: str = "NCDHW") -> Array:
    """Do what conv2d_bias does for grad_output (N, K, O, P, Q) or (K, O, P, Q).

    >>> import numpy as np
    >>> conv3d_bias(np.ones((2, 3, 1, 4, 5)))
    array([40., 40., 40.])
    """
    return _bias_gradient("conv3d", grad_output, layout)


def _bias_gradient(op: str, grad_output: Any, layout: str) -> Any:
    name = f"{op}_bias"
    is_last = is_channels_last(op, layout, "_bias")
    with borrow(name, {"grad_output": grad_output}) as loan:
        grad, ndim = loan["grad_output"], OPERATIONS[op]
        if grad.ndim not in (ndim + 1, ndim + 2):
            axes = f"grad_output must have {ndim + 2} axes ({ndim + 1} without N)"
            raise ConvError(f"{name}: {axes}, got {grad.ndim} (grad_output {grad.shape})")
        channel = grad.ndim - 1 if is_last else grad.ndim - ndim - 1
        return loan.give(grad.sum(tuple(axis for axis in range(grad.ndim) if axis != channel)))


def _input_gradient(op: str, input_size: Size, weight: Any, grad_output: Any, options: Options) -> Any:
    given = {"weight": weight, "grad_output": grad_output}
    return _differentiate(op, "grad_input", given, "input_size", input_size, options)


def _weight_gradient(op: str, input: Any, weight_size: Size, grad_output: Any, options: Options) -> Any:
    given = {"input": input, "grad_output": grad_output}
    return _differentiate(op, "grad_weight", given, "weight_size", weight_size, options)


def _differentiate(
    op: str, direction: str, given: arrays.Given, what: str, size: Size, options: Options
) -> Any:
    """The one implementation of all gradients; `size` is the shape of the array that is not given."""
    *numbers, layout, algo, out = options
    name, example = op + DIRECTIONS[direction], next(iter(given.values()))
    form = find_form(gradient_key(name, algo, (*numbers, layout, False), size), (*given.values(), out))
    route = find_route(form)
    if out is not None:
        given["out"] = out
    if route is not None:
        return _run(name, route.plan, arrays.NUMPY, given, route.frame)
    shape = to_sizes(name, what, size)
    kind = arrays.adapt(name, given)
    dtype, grad = arrays.common_dtype(name, given), given["grad_output"]
    leader: Any = given.get("input", grad)
    of_input = shape if direction == "grad_input" else given["input"].shape
    of_weight = shape if direction == "grad_weight" else given["weight"].shape
    shapes = Shapes(of_input, of_weight, grad_output=grad.shape)
    frame = find_frame(op, direction, leader, shapes, dtype, (*numbers, layout, False), kind.backend)
    with kind.serve(given.values()):
        plan = planning.make_plan(frame.problem, algo, kind.backend)
        remember(form, plan, frame, Epilogue())
        result = _run(name, plan, kind, given, frame)
    return kind.wrap(result, example) if out is None else out


def _run(op: str, plan: planning.Plan, kind: arrays.Kind, given: arrays.Given, frame: Frame) -> np.ndarray:
    """Run a plan into `out`, or into a new array."""
    out, compute = given.get("out"), frame.compute
    if out is not None:
        arrays.check_out(op, given, frame.result_shape)
    work = out if out is not None and arrays.is_computable(out, compute) else frame.allocate(kind)
    operands = {name: arrays.to_computable(array, compute) for name, array in given.items() if name != "out"}
    grad = frame.view5(operands["grad_output"])
    if "weight" in operands:
        plan.run(grad, operands["weight"][frame.weight_insert], None, None, Epilogue(), frame.view5(work))
    else:
        plan.run(frame.view5(operands["input"]), grad, None, None, Epilogue(), work[frame.weight_insert])
    return finish(work, out, given["grad_output"].dtype)
