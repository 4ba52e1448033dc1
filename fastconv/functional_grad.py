"""The gradients of what stands in functional: that of the output enters, that of an argument leaves.

As in torch.nn.grad, a function <op>_<argument> takes the arrays of <op> that it needs (where only the size of
the input matters, input_size), then grad_output, then the options of <op>. Two differ: batch_norm has its own
name and returns three gradients at once; cross_entropy_input may be called without grad_output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from fastconv.borrowing import Loan, borrow
from fastconv.functional import (
    channels,
    channels_in_order,
    check_axis,
    check_batch_norm,
    check_chance,
    check_linear,
    check_response_norm,
    check_slope,
    keep,
    logistic,
    moments,
    normal_share,
    response,
    sum_channels,
)
from fastconv.losses import Loss, softmax_of
from fastconv.problem import Call, ConvError, check_count, flag, number, shape_of
from fastconv.resizing import make_resizes

ArrayT = TypeVar("ArrayT")
Array = Any

_DENSITY = 0.3989422804014327  # of the normal distribution at 0: 1 / sqrt(2 * pi)


def relu_input(input: ArrayT, grad_output: Array) -> ArrayT:
    """Return the gradient of relu: grad_output where the input was positive.

    >>> import numpy as np
    >>> relu_input(np.array([-1.0, 2.0]), np.array([5.0, 5.0]))
    array([0., 5.])
    """
    return _activation("relu", input, grad_output)


def relu6_input(input: ArrayT, grad_output: Array) -> ArrayT:
    """Return the gradient of relu6: grad_output where the input was between 0 and 6.

    >>> import numpy as np
    >>> relu6_input(np.array([-1.0, 2.0, 7.0]), np.full(3, 5.0))
    array([0., 5., 0.])
    """
    return _activation("relu6", input, grad_output)


def leaky_relu_input(input: ArrayT, grad_output: Array, negative_slope: float = 0.01) -> ArrayT:
    """Return the gradient of leaky_relu.

    >>> import numpy as np
    >>> leaky_relu_input(np.array([-1.0, 2.0]), np.array([5.0, 5.0]), 0.1)
    array([0.5, 5. ])
    """
    return _activation("leaky_relu", input, grad_output, check_slope("leaky_relu_input", negative_slope))


def silu_input(input: ArrayT, grad_output: Array) -> ArrayT:
    """Return the gradient of silu.

    >>> import numpy as np
    >>> silu_input(np.array([0.0]), np.array([2.0]))
    array([1.])
    """
    return _activation("silu", input, grad_output)


def gelu_input(input: ArrayT, grad_output: Array) -> ArrayT:
    """Return the gradient of gelu.

    >>> import numpy as np
    >>> gelu_input(np.array([0.0]), np.array([2.0]))
    array([1.])
    """
    return _activation("gelu", input, grad_output)


def sigmoid_input(input: ArrayT, grad_output: Array) -> ArrayT:
    """Return the gradient of sigmoid.

    >>> import numpy as np
    >>> sigmoid_input(np.array([0.0]), np.array([2.0]))
    array([0.5])
    """
    return _activation("sigmoid", input, grad_output)


def tanh_input(input: ArrayT, grad_output: Array) -> ArrayT:
    """Return the gradient of tanh.

    >>> import numpy as np
    >>> tanh_input(np.array([0.0]), np.array([2.0]))
    array([2.])
    """
    return _activation("tanh", input, grad_output)


def _activation(name: str, input: Any, grad_output: Any, slope: float = 0.0) -> Any:
    op = f"{name}_input"
    with borrow(op, {"input": input, "grad_output": grad_output}) as loan:
        _check_like(op, loan, "input")
        return loan.give(_SLOPES[name](loan, loan["input"], loan["grad_output"], slope))


def _check_like(op: str, loan: Loan, name: str) -> None:
    wanted, found = loan.shape(name), loan.shape("grad_output")
    if found != wanted:
        rule = f"grad_output.shape must be {name}.shape = {wanted}, got {found}"
        raise ConvError(f"{op}: {rule} ({loan.describe()})")


def _silu(loan: Loan, x: Any, grad: Any, slope: float) -> Any:
    share = logistic(loan.xp, x)
    return grad * share * (1 + x * (1 - share))


def _gelu(loan: Loan, x: Any, grad: Any, slope: float) -> Any:
    return grad * (normal_share(loan, x) + x * _DENSITY * loan.xp.exp(-0.5 * x * x))


def _sigmoid(loan: Loan, x: Any, grad: Any, slope: float) -> Any:
    share = logistic(loan.xp, x)
    return grad * share * (1 - share)


# (loan, x, grad_output, slope) -> the gradient; where x is NaN it passes
_SLOPES: dict[str, Callable[[Loan, Any, Any, float], Any]] = {
    "relu": lambda loan, x, grad, slope: loan.xp.where(x <= 0, 0, grad),
    "relu6": lambda loan, x, grad, slope: loan.xp.where((x <= 0) | (x >= 6), 0, grad),
    "leaky_relu": lambda loan, x, grad, slope: loan.xp.where(x > 0, grad, slope * grad),
    "silu": _silu,
    "gelu": _gelu,
    "sigmoid": _sigmoid,
    "tanh": lambda loan, x, grad, slope: grad * (1 - loan.xp.tanh(x) ** 2),
}


def linear_input(weight: Array, grad_output: ArrayT) -> ArrayT:
    """Return the gradient of linear with respect to its input: grad_output @ weight.

    ===========  ============
    weight       (K, C) or (C,)
    grad_output  (..., K)
    returns      (..., C)
    ===========  ============

    >>> import numpy as np
    >>> linear_input(np.array([[3.0, 4.0], [5.0, 6.0]]), np.array([1.0, 2.0]))
    array([13., 16.])
    """
    op = "linear_input"
    with borrow(op, {"grad_output": grad_output, "weight": weight}) as loan:
        grad, weights = loan["grad_output"], loan["weight"]
        check_linear(op, loan, (*grad.shape[:-1], *weights.shape[-1:]))
        if weights.ndim == 1:
            return loan.give(grad[..., None] * weights)
        _check_last(op, loan, weights.shape[0])
        return loan.give(grad @ weights)


def linear_weight(input: Array, grad_output: ArrayT) -> ArrayT:
    """Return the gradient of linear with respect to its weight, summed over all but the last axis.

    ===========  ========
    input        (..., C)
    grad_output  (..., K)
    returns      (K, C)
    ===========  ========

    Of a weight (C,) the grad_output is (...,), and so is the gradient (C,).

    >>> import numpy as np
    >>> linear_weight(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]))
    array([[3., 6.],
           [4., 8.]])
    """
    op = "linear_weight"
    with borrow(op, {"grad_output": grad_output, "input": input}) as loan:
        x, grad = loan["input"], loan["grad_output"]
        outer = x.shape[:-1]
        is_one_row = grad.shape == outer
        if not x.ndim or not (is_one_row or (grad.ndim and grad.shape[:-1] == outer)):
            rule = f"grad_output.shape[:-1] must be input.shape[:-1] = {outer}"
            raise ConvError(
                f"{op}: {rule}, got {grad.shape[:-1]} (input {x.shape}, grad_output {grad.shape})"
            )
        rows = x.reshape(math.prod(outer), x.shape[-1])
        if is_one_row:
            return loan.give(grad.reshape(math.prod(outer)) @ rows)
        return loan.give(grad.reshape(math.prod(outer), grad.shape[-1]).T @ rows)


def linear_bias(grad_output: ArrayT) -> ArrayT:
    """Return the gradient of linear with respect to its bias: grad_output summed over all but the last axis.

    >>> import numpy as np
    >>> linear_bias(np.array([[1.0, 2.0], [3.0, 4.0]]))
    array([4., 6.])
    """
    op = "linear_bias"
    with borrow(op, {"grad_output": grad_output}) as loan:
        grad = loan["grad_output"]
        if not grad.ndim:
            raise ConvError(f"{op}: grad_output (..., K) must have at least 1 axis, got 0")
        return loan.give(grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1]).sum(0))


def _check_last(op: str, loan: Loan, outputs: int) -> None:
    shape = loan.shape("grad_output")
    if shape[-1:] != (outputs,):
        found = f"got {shape[-1:]} (weight {loan.shape('weight')}, grad_output {shape})"
        raise ConvError(f"{op}: grad_output.shape[-1:] must be (K,) = ({outputs},), {found}")


def softmax_input(input: ArrayT, grad_output: Array, dim: int) -> ArrayT:
    """Return the gradient of softmax along an axis.

    >>> import numpy as np
    >>> softmax_input(np.array([0.0, 0.0]), np.array([4.0, 0.0]), 0)
    array([ 1., -1.])
    """
    op = "softmax_input"
    with borrow(op, {"input": input, "grad_output": grad_output}) as loan:
        _check_like(op, loan, "input")
        axis = check_axis(op, "dim", dim, loan.shape("input"))
        share, grad = softmax_of(loan.xp, loan["input"], axis), loan["grad_output"]
        return loan.give(share * (grad - _sum(share * grad, axis)))


def log_softmax_input(input: ArrayT, grad_output: Array, dim: int) -> ArrayT:
    """Return the gradient of log_softmax along an axis.

    >>> import numpy as np
    >>> log_softmax_input(np.array([0.0, 0.0]), np.array([4.0, 0.0]), 0)
    array([ 2., -2.])
    """
    op = "log_softmax_input"
    with borrow(op, {"input": input, "grad_output": grad_output}) as loan:
        _check_like(op, loan, "input")
        axis = check_axis(op, "dim", dim, loan.shape("input"))
        share, grad = softmax_of(loan.xp, loan["input"], axis), loan["grad_output"]
        return loan.give(grad - share * _sum(grad, axis))


def _sum(x: Any, axis: int) -> Any:
    """Sum along an axis, which stays; a number has none."""
    return x.sum(axis, keepdims=True) if x.ndim else x


def cross_entropy_input(
    input: ArrayT,
    target: Array,
    weight: Array | None = None,
    grad_output: Array | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> ArrayT:
    """Return the gradient of cross_entropy with respect to its input; arguments and options are those of it.

    grad_output
        The shape of the loss; by default ones: the loss itself is what is made smaller.

    >>> import numpy as np
    >>> cross_entropy_input(np.zeros((1, 2)), np.array([0]))
    array([[-0.5,  0.5]])
    """
    op = "cross_entropy_input"
    with borrow(op, {"input": input, "target": target}, weight=weight, grad_output=grad_output) as loan:
        loss = Loss(op, loan, ignore_index, reduction, label_smoothing)
        factor = _loss_factor(op, loan, loss, reduction)
        share = softmax_of(loan.xp, loss.x, loss.axis)
        wanted = _target_shares(loss)
        gradient = (share * wanted.sum(loss.axis, keepdims=True) - wanted) * factor
        return loan.give(gradient if loss.is_real else loan.xp.where(loss.counts_wide(), gradient, 0))


def _loss_factor(op: str, loan: Loan, loss: Loss, reduction: str) -> Any:
    """Return what the gradient of every element's loss is multiplied by."""
    shape = loss.x.shape[: loss.axis] + loss.x.shape[loss.axis + 1 :] if reduction == "none" else ()
    factor: Any = 1.0
    if "grad_output" in loan:
        if loan.shape("grad_output") != shape:
            found = loan.shape("grad_output")
            rule = f"grad_output.shape must be that of the loss = {shape}, got {found}"
            raise ConvError(f"{op}: {rule} ({loan.describe()})")
        factor = loan["grad_output"]
    if reduction == "none":
        return loan.xp.expand_dims(factor, loss.axis) if "grad_output" in loan else factor
    return factor / loss.divisor() if reduction == "mean" else factor


def _target_shares(loss: Loss) -> Any:
    """Return what the loss multiplies the logarithm of each class's probability by."""
    xp, weight = loss.xp, 1 if loss.weight is None else loss.weight
    if loss.is_real:
        return loss.soft_target() * weight
    shares = xp.zeros_like(loss.x)
    xp.put_along_axis(shares, loss.classes_read, 1, loss.axis)
    if loss.smoothing:
        shares = (1 - loss.smoothing) * shares + loss.smoothing / loss.classes
    shares = shares * weight
    return xp.where(xp.expand_dims(loss.is_unknown, loss.axis), np.nan, shares)


def batch_norm(
    input: ArrayT,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None,
    grad_output: Array,
    training: bool = False,
    eps: float = 1e-5,
) -> tuple[ArrayT, Any, Any]:
    """Return the gradients of batch_norm with respect to input, weight and bias.

    =========================  ===========================================
    input, grad_output         (N, C) or (N, C, ...)
    running_mean, running_var  (C,); None, or not looked at, in training
    weight                     (C,) or None
    returns                    the shape of the input, (C,) and (C,)
    =========================  ===========================================

    In training the mean and the variance are functions of the input, and the gradient flows through them too.

    >>> import numpy as np
    >>> x = np.array([[1.0], [3.0]])
    >>> batch_norm(x, None, None, None, np.array([[1.0], [0.0]]), training=True, eps=0.0)[2]
    array([1.])
    """
    op = "batch_norm"
    if training is True:
        running_mean = running_var = None
    with borrow(
        op, {"input": input, "grad_output": grad_output},
        running_mean=running_mean, running_var=running_var, weight=weight,
    ) as loan:  # fmt: skip
        call = check_batch_norm(op, loan, training, {"training": training, "eps": eps})
        _check_like(op, loan, "input")
        x, grad = loan["input"], loan["grad_output"]
        mean, variance = moments(loan, training)
        rate = (1 / loan.xp.sqrt(variance + number(call, "eps"))).astype(x.dtype)
        normal = (x - mean.astype(x.dtype)) * rate
        axes = (0, *range(2, x.ndim))
        of_bias = grad.sum(axes, dtype=np.float64, keepdims=True).astype(x.dtype)
        of_weight = (grad * normal).sum(axes, dtype=np.float64, keepdims=True).astype(x.dtype)
        scale = rate * channels(loan, "weight") if "weight" in loan else rate
        count = max(x.size // max(x.shape[1], 1), 1)
        of_input = (grad - (of_bias + normal * of_weight) / count if training else grad) * scale
        return loan.give(of_input), loan.give(of_weight.reshape(-1)), loan.give(of_bias.reshape(-1))


def local_response_norm_input(
    input: ArrayT, grad_output: Array, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> ArrayT:
    """Return the gradient of local_response_norm.

    >>> import numpy as np
    >>> ones = np.ones((1, 1, 1))
    >>> local_response_norm_input(ones, ones, 1, alpha=1.0, beta=1.0).item()
    0.0
    """
    op = "local_response_norm_input"
    with borrow(op, {"input": input, "grad_output": grad_output}) as loan:
        norm = check_response_norm(op, loan.shape("input"), size, alpha, beta, k)
        _check_like(op, loan, "input")
        x, grad = loan["input"], loan["grad_output"]
        divisor = response(x, norm)
        share = grad * divisor**-norm.beta
        others = sum_channels(share * x / divisor, (norm.size - 1) // 2, norm.size // 2)
        return loan.give(share - x * others * (2 * norm.alpha * norm.beta / norm.size))


def dropout_input(mask: Array, grad_output: ArrayT, p: float = 0.5, training: bool = True) -> ArrayT:
    """Return the gradient of dropout, whose mask says what it kept; without training grad_output itself.

    >>> import numpy as np
    >>> dropout_input(np.array([True, False]), np.array([1.0, 1.0]))
    array([2., 0.])
    """
    op = "dropout_input"
    with borrow(op, {"grad_output": grad_output, "mask": mask}) as loan:
        shapes, options = (
            {name: view.shape for name, view in loan.given.items()},
            {"p": p, "training": training},
        )
        call = Call(op, shapes, options, {"p": 0.5, "training": True})
        flag(call, "training")
        if loan.given["mask"].dtype.kind != "b":
            raise call.type_error("mask must hold True and False", loan.given["mask"].dtype.name)
        _check_like(op, loan, "mask")
        chance = check_chance(call)
        return loan.give(keep(loan["grad_output"], loan["mask"], chance)) if training else grad_output


def flatten_input(input_size: Any, grad_output: ArrayT) -> ArrayT:
    """Return the gradient of flatten: grad_output with the axes of its input.

    >>> import numpy as np
    >>> flatten_input((2, 3, 4), np.zeros((2, 12))).shape
    (2, 3, 4)
    """
    op = "flatten_input"
    with borrow(op, {"grad_output": grad_output}) as loan:
        found = loan.shape("grad_output")
        size = shape_of(Call(op, {"grad_output": found}, {}, {}), "input_size", input_size)
        if min(size, default=0) < 0:
            rule = f"input_size must be at least 0 along every axis, got {min(size)}"
            raise ConvError(f"{op}: {rule} (input_size {size}, grad_output {found})")
        check_count(op, size, size)
        if math.prod(size) != math.prod(found):
            rule = f"input_size must have as many elements as grad_output {found} = {math.prod(found)}"
            raise ConvError(f"{op}: {rule}, got {size}")
        return loan.give(loan.raw("grad_output").reshape(size))


def interpolate_input(
    input_size: Any,
    grad_output: ArrayT,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
) -> ArrayT:
    """Return the gradient of interpolate, of shape input_size; options are those of interpolate.

    >>> import numpy as np
    >>> interpolate_input((1, 1, 2), np.array([[[1.0, 2.0, 3.0, 4.0]]]), scale_factor=2)
    array([[[3., 7.]]])
    """
    op = "interpolate_input"
    with borrow(op, {"grad_output": grad_output}) as loan:
        found = loan.shape("grad_output")
        shape = shape_of(Call(op, {"grad_output": found}, {}, {}), "input_size", input_size)
        resizes = make_resizes(op, shape, size, scale_factor, mode, align_corners)
        wanted = (*shape[:2], *(len(resize.reads[0].places) for resize in resizes))
        if found != wanted:
            rule = f"grad_output.shape must be that of the result = {wanted}, got {found}"
            raise ConvError(f"{op}: {rule} (input_size {shape}, {loan.describe()})")
        grad, is_last = channels_in_order(loan, "grad_output")
        for axis, resize in enumerate(resizes, start=2 - is_last):
            grad = resize.scatter(loan.xp, grad, axis)
        return loan.give(loan.xp.moveaxis(grad, -1, 1) if is_last else grad)
