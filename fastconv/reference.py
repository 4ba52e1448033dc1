"""Arrays enter, the convolution in float64 leaves: the oracle that judges every algorithm of the package.

One loop over the taps (t, r, s) of the kernel and one matrix product per tap; no tiles, no tricks. The three
passes differ only in which of input, weight and output the tap's product goes to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastconv.problem import (
    OPERATIONS,
    ConvError,
    ConvProblem,
    Padding,
    PerAxis,
    make_epilogue,
    make_problem,
)

Array = NDArray[np.float64]
Activation = str | tuple[str, float] | None
Geometry = tuple[PerAxis, Padding, PerAxis, int]

_ALL = (slice(None), slice(None))  # of batch and channels


def conv2d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    *,
    flip: bool = False,
    activation: Activation = None,
    residual: ArrayLike | None = None,
) -> Array:
    """Cross-correlate input with weight, then add bias and residual and apply the activation, all in float64.

    ========  ============================================
    input     (N, C, H, W) or (C, H, W)
    weight    (K, C // groups, R, S)
    bias      (K,)
    residual  the shape of the result
    returns   (N, K, P, Q) or (K, P, Q), dtype float64
    ========  ============================================

    Stride, padding and dilation are in elements. `flip=True` reverses the kernel, which makes it the
    convolution of mathematics. Raises ConvError or TypeError as fastconv.conv2d does.

    >>> conv2d([[[1, 2, 4]]], [[[[1, 10]]]])
    array([[[21., 42.]]])
    >>> conv2d([[[1, 2, 4]]], [[[[1, 10]]]], flip=True)
    array([[[12., 24.]]])
    """
    return _forward(
        "conv2d", input, weight, bias, (stride, padding, dilation, groups), flip, activation, residual
    )


def conv1d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    *,
    flip: bool = False,
    activation: Activation = None,
    residual: ArrayLike | None = None,
) -> Array:
    """Do what conv2d does for input (N, C, W) or (C, W) and weight (K, C // groups, S).

    >>> conv1d([[1, 2, 4]], [[[1, 10]]], bias=[100])
    array([[121., 142.]])
    """
    return _forward(
        "conv1d", input, weight, bias, (stride, padding, dilation, groups), flip, activation, residual
    )


def conv3d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    *,
    flip: bool = False,
    activation: Activation = None,
    residual: ArrayLike | None = None,
) -> Array:
    """Do what conv2d does for input (N, C, D, H, W) or (C, D, H, W) and weight (K, C // groups, T, R, S).

    >>> conv3d(np.ones((1, 2, 3, 3, 3)), np.ones((1, 2, 3, 3, 3))).item()
    54.0
    """
    return _forward(
        "conv3d", input, weight, bias, (stride, padding, dilation, groups), flip, activation, residual
    )


def error_scale(
    input: ArrayLike,
    weight: ArrayLike,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    *,
    reach: int = 0,
) -> Array:
    """Return conv(|input|, |weight|), the scale of a result's rounding errors; the input has a batch axis.

    With `reach` above 0, each |input| is first replaced by the largest so many rows and columns around it.

    >>> error_scale([[[1, -2, 0, 0]]], [[[-1]]]), error_scale([[[1, -2, 0, 0]]], [[[-1]]], reach=1)
    (array([[[1., 2., 0., 0.]]]), array([[[2., 2., 2., 0.]]]))
    """
    x, w = np.abs(np.asarray(input, np.float64)), np.abs(np.asarray(weight, np.float64))
    op = f"conv{w.ndim - 2}d"
    problem = make_problem(
        op, x.shape, w.shape, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    x = largest_near(np.pad(x, [(0, 0), (0, 0), *problem.padding[5 - w.ndim :]]), reach)
    return _forward(op, x, w, None, (stride, 0, dilation, groups), False, None, None)


def largest_near(x: Array, reach: int) -> Array:
    """Return, for each element of (N, C, ..., W), the largest at most `reach` rows and columns away.

    Planes do not count: tiles of pixels lie in one.

    >>> largest_near(np.array([[[[[0, 2, 0, 0]], [[1, 0, 0, 0]]]]]), 1)
    array([[[[[2, 2, 2, 0]],
    <BLANKLINE>
             [[1, 1, 0, 0]]]]])
    """
    for axis in range(max(2, x.ndim - 2), x.ndim):
        margins = [(reach, reach) if a == axis else (0, 0) for a in range(x.ndim)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, margins), 2 * reach + 1, axis)
        x = windows.max(axis=-1)
    return x


def conv2d_input(
    input_size: Sequence[int],
    weight: ArrayLike,
    grad_output: ArrayLike,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
) -> Array:
    """Return the gradient of sum(conv2d(input, weight) * grad_output) with respect to input, in float64.

    ===========  ======================================
    input_size   the shape of input
    weight       (K, C // groups, R, S)
    grad_output  (N, K, P, Q) or (K, P, Q)
    returns      (N, C, H, W) or (C, H, W), as input
    ===========  ======================================

    The arguments are those of torch.nn.grad.conv2d_input; `padding` may also be what conv2d accepts.

    >>> conv2d_input((1, 1, 3), [[[[1, 10]]]], [[[1, 1]]])
    array([[[ 1., 11., 10.]]])
    """
    return _grad_input("conv2d", input_size, weight, grad_output, (stride, padding, dilation, groups))


def conv1d_input(
    input_size: Sequence[int],
    weight: ArrayLike,
    grad_output: ArrayLike,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
) -> Array:
    """Do what conv2d_input does for input_size (N, C, W) or (C, W).

    >>> conv1d_input((1, 3), [[[1, 10]]], [[1, 1]])
    array([[ 1., 11., 10.]])
    """
    return _grad_input("conv1d", input_size, weight, grad_output, (stride, padding, dilation, groups))


def conv3d_input(
    input_size: Sequence[int],
    weight: ArrayLike,
    grad_output: ArrayLike,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
) -> Array:
    """Do what conv2d_input does for input_size (N, C, D, H, W) or (C, D, H, W).

    >>> conv3d_input((1, 1, 1, 3), [[[[[1, 10]]]]], [[[[1, 1]]]])
    array([[[[ 1., 11., 10.]]]])
    """
    return _grad_input("conv3d", input_size, weight, grad_output, (stride, padding, dilation, groups))


def conv2d_weight(
    input: ArrayLike,
    weight_size: Sequence[int],
    grad_output: ArrayLike,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
) -> Array:
    """Return the gradient of sum(conv2d(input, weight) * grad_output) with respect to weight, in float64.

    ===========  ======================================
    input        (N, C, H, W) or (C, H, W)
    weight_size  the shape of weight
    grad_output  (N, K, P, Q) or (K, P, Q)
    returns      (K, C // groups, R, S)
    ===========  ======================================

    The arguments are those of torch.nn.grad.conv2d_weight; `padding` may also be what conv2d accepts.

    >>> conv2d_weight([[[1, 2, 4]]], (1, 1, 1, 2), [[[1, 1]]])
    array([[[[3., 6.]]]])
    """
    return _grad_weight("conv2d", input, weight_size, grad_output, (stride, padding, dilation, groups))


def conv1d_weight(
    input: ArrayLike,
    weight_size: Sequence[int],
    grad_output: ArrayLike,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
) -> Array:
    """Do what conv2d_weight does for input (N, C, W) or (C, W).

    >>> conv1d_weight([[1, 2, 4]], (1, 1, 2), [[1, 1]])
    array([[[3., 6.]]])
    """
    return _grad_weight("conv1d", input, weight_size, grad_output, (stride, padding, dilation, groups))


def conv3d_weight(
    input: ArrayLike,
    weight_size: Sequence[int],
    grad_output: ArrayLike,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
) -> Array:
    """Do what conv2d_weight does for input (N, C, D, H, W) or (C, D, H, W).

    >>> conv3d_weight([[[[1, 2, 4]]]], (1, 1, 1, 1, 2), [[[[1, 1]]]])
    array([[[[[3., 6.]]]]])
    """
    return _grad_weight("conv3d", input, weight_size, grad_output, (stride, padding, dilation, groups))


def activate(y: ArrayLike, activation: Activation) -> Array:
    """Apply an activation, given as fastconv.conv2d takes it, element by element in float64.

    >>> activate([-1, 0, 8], "relu6")
    array([0., 0., 6.])
    """
    epilogue = make_epilogue("activate", activation)
    y = np.asarray(y, dtype=np.float64)
    match epilogue.activation:
        case "relu":
            return np.maximum(y, 0)
        case "relu6":
            return np.clip(y, 0, 6)
        case "silu":
            return y * _sigmoid(y)
        case "gelu":
            return y * np.vectorize(math.erfc, otypes=[np.float64])(-y / math.sqrt(2)) / 2
        case "sigmoid":
            return _sigmoid(y)
        case "tanh":
            return np.tanh(y)
        case "leaky_relu":
            return np.where(y > 0, y, epilogue.slope * y)
    return y


def _sigmoid(y: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(1000) is inf, and 1 / (1 + inf) is the right answer
        return np.asarray(1 / (1 + np.exp(-y)))


@np.errstate(invalid="ignore")  # inf - inf; and a BLAS may raise the flag over lanes without elements
def _forward(
    op: str,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    geometry: Geometry,
    flip: bool,
    activation: Activation,
    residual: ArrayLike | None,
) -> Array:
    x, w = _float64(input), _float64(weight)
    problem, batched = _state(op, x.shape, w.shape, geometry)
    if flip:
        w = np.flip(w, axis=tuple(range(2, w.ndim)))
    image, kernel = _pad(problem, x), _by_tap(problem, w)
    y: Array = np.zeros(problem.output_shape5)
    for tap in _taps(problem):
        y += (kernel[tap] @ _by_group(problem, _seen(problem, image, tap))).reshape(y.shape)
    y = _as_caller(y, problem.output_shape, batched)
    if bias is not None:
        y += _operand(op, "bias", bias, (problem.K,)).reshape((-1,) + (1,) * problem.ndim)
    if residual is not None:
        y += _operand(op, "residual", residual, y.shape)
    return activate(y, activation)


@np.errstate(invalid="ignore")  # inf - inf; and a BLAS may raise the flag over lanes without elements
def _grad_input(
    op: str, input_size: Sequence[int], weight: ArrayLike, grad_output: ArrayLike, geometry: Geometry
) -> Array:
    w = _float64(weight)
    problem, batched = _state(op, tuple(input_size), w.shape, geometry)
    grad, kernel = _output_gradient(problem, batched, grad_output), _by_tap(problem, w)
    image = _pad(problem, np.zeros(problem.input_shape5))
    for tap in _taps(problem):
        seen = _seen(problem, image, tap)
        seen += (np.swapaxes(kernel[tap], 1, 2) @ grad).reshape(seen.shape)
    sizes = zip(problem.padding, problem.input_shape5[2:], strict=True)
    inside = (*_ALL, *(slice(before, before + size) for (before, _), size in sizes))
    return _as_caller(image[inside].copy(), problem.input_shape, batched)


@np.errstate(invalid="ignore")  # inf - inf; and a BLAS may raise the flag over lanes without elements
def _grad_weight(
    op: str, input: ArrayLike, weight_size: Sequence[int], grad_output: ArrayLike, geometry: Geometry
) -> Array:
    x = _float64(input)
    problem, batched = _state(op, x.shape, tuple(weight_size), geometry)
    grad, image = _output_gradient(problem, batched, grad_output), _pad(problem, x)
    gradient = np.zeros(problem.weight_shape)
    kernel = _by_tap(problem, gradient)
    for tap in _taps(problem):
        seen = _by_group(problem, _seen(problem, image, tap))
        kernel[tap] = (grad @ np.swapaxes(seen, 2, 3)).sum(axis=0)
    return gradient


def _state(
    op: str, input_size: tuple[int, ...], weight_size: tuple[int, ...], geometry: Geometry
) -> tuple[ConvProblem, bool]:
    """The checked problem, and whether the caller's arrays have a batch axis."""
    stride, padding, dilation, groups = geometry
    batched = len(input_size) != OPERATIONS[op] + 1
    problem = make_problem(
        op,
        input_size if batched else (1, *input_size),
        weight_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        dtype="float64",
    )
    return problem, batched


def _pad(problem: ConvProblem, x: Array) -> Array:
    return np.pad(x.reshape(problem.input_shape5), ((0, 0), (0, 0), *problem.padding))


def _taps(problem: ConvProblem) -> Iterator[tuple[int, int, int]]:
    return itertools.product(range(problem.T), range(problem.R), range(problem.S))


def _seen(problem: ConvProblem, image: Array, tap: tuple[int, int, int]) -> Array:
    """View (N, C, O, P, Q) of the padded image: the pixel that the tap meets, for each output pixel."""
    axes = zip(tap, problem.dilation, problem.output_shape5[2:], problem.stride, strict=True)
    window = (slice(i * dil, i * dil + (count - 1) * step + 1, step) for i, dil, count, step in axes)
    index = (*_ALL, *window)
    return image[index]


def _by_tap(problem: ConvProblem, w: Array) -> Array:
    """View (T, R, S, groups, K // groups, C // groups) of the weight."""
    k, c, *extents = problem.weight_shape5
    return np.moveaxis(w.reshape(problem.groups, k // problem.groups, c, *extents), (3, 4, 5), (0, 1, 2))


def _by_group(problem: ConvProblem, image: Array) -> Array:
    """(N, channels, ...) as (N, groups, channels // groups, pixels)."""
    n, channels, *sizes = image.shape
    return image.reshape(n, problem.groups, channels // problem.groups, math.prod(sizes))


def _output_gradient(problem: ConvProblem, batched: bool, grad_output: ArrayLike) -> Array:
    shape = problem.output_shape if batched else problem.output_shape[1:]
    grad = _operand(problem.op, "grad_output", grad_output, shape)
    return _by_group(problem, grad.reshape(problem.output_shape5))


def _operand(op: str, name: str, value: ArrayLike, shape: tuple[int, ...]) -> Array:
    array = _float64(value)
    if array.shape != shape:
        raise ConvError(f"{op}: {name}.shape must be {shape}, got {array.shape}")
    return array


def _as_caller(y: Array, shape: tuple[int, ...], batched: bool) -> Array:
    return y.reshape(shape if batched else shape[1:])


def _float64(value: ArrayLike) -> Array:
    return np.asarray(value, dtype=np.float64)
