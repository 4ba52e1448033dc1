"""What a network needs beside convolutions and pooling, by NumPy's or CuPy's own functions.

Names, argument order, defaults and meaning are those of torch.nn.functional; the gradients are in
functional_grad. Arrays, dtypes and errors are those of fastconv.conv2d: half types are computed in float32.
On a CUDA device CuPy's functions run on the caller's current stream, and take their memory from CuPy's pool.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fastconv import arrays
from fastconv.borrowing import Loan, borrow
from fastconv.losses import Loss, log_softmax_of, softmax_of
from fastconv.problem import Call, ConvError, flag, integer, make_epilogue, number
from fastconv.resizing import make_resizes

ArrayT = TypeVar("ArrayT")
Array = Any

_ROOT_HALF = 0.7071067811865476  # sqrt(1 / 2)


def relu(input: ArrayT) -> ArrayT:
    """Return max(x, 0) of every element; NaN stays NaN.

    >>> import numpy as np
    >>> relu(np.array([-1.0, 2.0]))
    array([0., 2.])
    """
    return _activate("relu", input)


def relu6(input: ArrayT) -> ArrayT:
    """Return min(max(x, 0), 6) of every element.

    >>> import numpy as np
    >>> relu6(np.array([-1.0, 2.0, 7.0]))
    array([0., 2., 6.])
    """
    return _activate("relu6", input)


def leaky_relu(input: ArrayT, negative_slope: float = 0.01) -> ArrayT:
    """Return x of every element, negative ones times negative_slope.

    >>> import numpy as np
    >>> leaky_relu(np.array([-1.0, 2.0]))
    array([-0.01,  2.  ])
    """
    return _activate("leaky_relu", input, check_slope("leaky_relu", negative_slope))


def silu(input: ArrayT) -> ArrayT:
    """Return x * sigmoid(x) of every element.

    >>> import numpy as np
    >>> silu(np.array([0.0, 100.0]))
    array([  0., 100.])
    """
    return _activate("silu", input)


def gelu(input: ArrayT) -> ArrayT:
    """Return x * Phi(x) of every element, exactly: Phi is that of erf (arXiv 1606.08415).

    >>> import numpy as np
    >>> gelu(np.array([0.0, 100.0]))
    array([  0., 100.])
    """
    return _activate("gelu", input)


def sigmoid(input: ArrayT) -> ArrayT:
    """Return 1 / (1 + exp(-x)) of every element.

    >>> import numpy as np
    >>> sigmoid(np.array([-1000.0, 0.0, 1000.0]))
    array([0. , 0.5, 1. ])
    """
    return _activate("sigmoid", input)


def tanh(input: ArrayT) -> ArrayT:
    """Return the hyperbolic tangent of every element.

    >>> import numpy as np
    >>> tanh(np.array([0.0, 1000.0]))
    array([0., 1.])
    """
    return _activate("tanh", input)


def _activate(name: str, input: Any, slope: float = 0.0) -> Any:
    with borrow(name, {"input": input}) as loan:
        return loan.give(ACTIVATE[name](loan, loan["input"], slope))


def check_slope(op: str, negative_slope: float) -> float:
    """Return the slope of a leaky ReLU, which must be a finite number."""
    return make_epilogue(op, ("leaky_relu", negative_slope)).slope


def logistic(xp: Any, x: Any) -> Any:
    """Return 1 / (1 + exp(-x)), without overflow."""
    small = xp.exp(-xp.abs(x))
    return xp.where(x < 0, small, 1) / (1 + small)


def normal_share(loan: Loan, x: Any) -> Any:
    """Return Phi(x), the share of a normal distribution that lies below x."""
    return 0.5 * (1 + loan.erf(x * _ROOT_HALF))


# (loan, x, slope) -> what becomes of every element; maximum, minimum and where keep a NaN
ACTIVATE: dict[str, Callable[[Loan, Any, float], Any]] = {
    "relu": lambda loan, x, slope: loan.xp.maximum(x, 0),
    "relu6": lambda loan, x, slope: loan.xp.minimum(loan.xp.maximum(x, 0), 6),
    "leaky_relu": lambda loan, x, slope: loan.xp.where(x < 0, slope * x, x),
    "silu": lambda loan, x, slope: x * logistic(loan.xp, x),
    "gelu": lambda loan, x, slope: x * normal_share(loan, x),
    "sigmoid": lambda loan, x, slope: logistic(loan.xp, x),
    "tanh": lambda loan, x, slope: loan.xp.tanh(x),
}


def linear(input: ArrayT, weight: Array, bias: Array | None = None) -> ArrayT:
    """Return input @ weight.T + bias, by the matrix product of NumPy or CuPy.

    ========  ============
    input     (..., C)
    weight    (K, C) or (C,)
    bias      (K,)
    returns   (..., K)
    ========  ============

    >>> import numpy as np
    >>> linear(np.array([1.0, 2.0]), np.array([[3.0, 4.0], [5.0, 6.0]]), np.array([0.5, 0.5]))
    array([11.5, 17.5])
    """
    op = "linear"
    with borrow(op, {"input": input, "weight": weight}, bias=bias) as loan:
        check_linear(op, loan, loan.shape("input"))
        result = loan["input"] @ loan["weight"].T
        return loan.give(result if bias is None else result + loan["bias"])


def check_linear(op: str, loan: Loan, input_shape: tuple[int, ...]) -> None:
    """Raise unless weight and bias fit an input."""
    weight = loan.shape("weight")
    if len(weight) not in (1, 2):
        rule = f"weight (K, C) must have 2 axes (1 without K), got {len(weight)}"
        raise ConvError(f"{op}: {rule} ({loan.describe()})")
    if not input_shape:
        rule = "input (..., C) must have at least 1 axis, got 0"
        raise ConvError(f"{op}: {rule} ({loan.describe()})")
    if weight[-1] != input_shape[-1]:
        found = f"got {weight[-1]} (input {input_shape}, weight {weight})"
        raise ConvError(f"{op}: weight.shape[-1] must be C = input.shape[-1] = {input_shape[-1]}, {found}")
    if "bias" in loan and loan.shape("bias") != weight[:-1]:
        found = f"got {loan.shape('bias')} (input {input_shape}, weight {weight})"
        raise ConvError(f"{op}: bias.shape must be (K,) = {weight[:-1]}, {found}")


def softmax(input: ArrayT, dim: int) -> ArrayT:
    """Return exp(x) / sum(exp(x)) along an axis, without overflow.

    >>> import numpy as np
    >>> softmax(np.array([1000.0, 1000.0]), 0)
    array([0.5, 0.5])
    """
    with borrow("softmax", {"input": input}) as loan:
        x, axis = loan["input"], check_axis("softmax", "dim", dim, loan.shape("input"))
        return loan.give(softmax_of(loan.xp, x, axis))


def log_softmax(input: ArrayT, dim: int) -> ArrayT:
    """Return the logarithm of softmax along an axis, where that itself would be 0 too.

    >>> import numpy as np
    >>> log_softmax(np.array([0.0, 1000.0]), 0)
    array([-1000.,     0.])
    """
    with borrow("log_softmax", {"input": input}) as loan:
        x, axis = loan["input"], check_axis("log_softmax", "dim", dim, loan.shape("input"))
        return loan.give(log_softmax_of(loan.xp, x, axis))


def check_axis(op: str, name: str, axis: Any, shape: tuple[int, ...]) -> int:
    """Return an axis of a shape, counted from the front; a number has one axis, as in torch."""
    call = Call(op, {"input": shape}, {name: axis}, {})
    checked, ndim = integer(call, f"{name} must be an int", axis), max(len(shape), 1)
    if not -ndim <= checked < ndim:
        raise call.error(f"{name} must be an axis of the input, from {-ndim} to {ndim - 1}, got {checked}")
    return checked % ndim


def cross_entropy(
    input: ArrayT,
    target: Array,
    weight: Array | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> ArrayT:
    """Return the cross entropy between softmax(input) and a target, as torch does.

    ========  ===========================================================================
    input     (N, C), (N, C, d1, ...), or (C,) without a batch: one number for each class
    target    (N,), (N, d1, ...) or (): the index of the class, of any int type;
              or the shape of the input: the probability of each class
    weight    (C,), of the classes
    returns   a number, or the shape of indices if reduction is "none"
    ========  ===========================================================================

    ignore_index
        Elements of the target that count for nothing.
    reduction
        "mean": over elements that are not ignored, weighted; "sum" or "none".
    label_smoothing
        Part of every target that is shared out evenly over all classes (arXiv 1512.00567).

    A class that does not exist is a ConvError on the CPU; on a GPU nobody looks, and the loss is NaN.

    >>> import numpy as np
    >>> cross_entropy(np.zeros((2, 4)), np.array([0, 3])) / np.log(4)
    np.float64(1.0)
    """
    op = "cross_entropy"
    with borrow(op, {"input": input, "target": target}, weight=weight) as loan:
        loss = Loss(op, loan, ignore_index, reduction, label_smoothing)
        losses = loss.losses()
        if reduction == "none":
            return loan.give(losses)
        return loan.give(losses.sum() if reduction == "sum" else losses.sum() / loss.divisor())


def batch_norm(
    input: ArrayT,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> ArrayT:
    """Normalise every channel to mean 0 and variance 1, then scale and shift it (arXiv 1502.03167).

    =========================  =============================
    input                      (N, C) or (N, C, ...)
    running_mean, running_var  (C,); None only in training
    weight, bias               (C,): scale and shift
    returns                    the shape of the input
    =========================  =============================

    training
        Take mean and variance of this batch, and move the running ones towards them, in place: by `momentum`
        of the way, towards the unbiased variance. They have the input's dtype: a variance beyond 65504 is
        infinity in float16.
    eps
        Is added to the variance.

    >>> import numpy as np
    >>> batch_norm(np.array([[1.0], [3.0]]), None, None, training=True, eps=0.0)
    array([[-1.],
           [ 1.]])
    """
    op = "batch_norm"
    with borrow(
        op, {"input": input}, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
    ) as loan:
        call = check_batch_norm(op, loan, training, {"training": training, "momentum": momentum, "eps": eps})
        share, least = number(call, "momentum"), number(call, "eps")
        mean, variance = moments(loan, training)
        x = loan["input"]
        scale = (1 / loan.xp.sqrt(variance + least)).astype(x.dtype)
        if "weight" in loan:
            scale = scale * channels(loan, "weight")
        result = (x - mean.astype(x.dtype)) * scale
        result = loan.give(result + channels(loan, "bias") if "bias" in loan else result)
        if training and x.size:  # last: a call that fails leaves the statistics as they were
            count = x.size // mean.size
            for name, value in (("running_mean", mean), ("running_var", variance * (count / (count - 1)))):
                if name in loan:
                    loan.write(name, (1 - share) * loan[name] + share * value.reshape(-1))
        return result


def check_batch_norm(op: str, loan: Loan, training: bool, options: dict[str, Any]) -> Call:
    """Raise unless the arrays of a batch norm fit together."""
    shapes = {name: view.shape for name, view in loan.given.items()}
    call = Call(op, shapes, options, {"training": False, "momentum": 0.1, "eps": 1e-5})
    flag(call, "training")
    shape = loan.shape("input")
    if len(shape) < 2:
        raise call.error(f"input (N, C, ...) must have at least 2 axes, got {len(shape)}")
    for name, found in shapes.items():
        if name in ("running_mean", "running_var", "weight", "bias") and found != (shape[1],):
            raise call.error(f"{name}.shape must be (C,) = ({shape[1]},), got {found}")
        if name.startswith("running") and training and not loan.given[name].flags.writeable:
            raise call.error(f"{name} must be writeable, got a read-only array")
    if not training and not ("running_mean" in loan and "running_var" in loan):
        raise call.error("running_mean and running_var must be given unless training, got None")
    if training and math.prod(shape) == shape[1]:
        raise call.error(f"input must have more than one element per channel in training, got shape {shape}")
    return call


def moments(loan: Loan, training: bool) -> tuple[Any, Any]:
    """Return mean and variance of the channels, shaped like the input; those of a batch are in float64."""
    if not training:
        return channels(loan, "running_mean"), channels(loan, "running_var")
    x = loan["input"]
    axes = (0, *range(2, x.ndim))
    if not x.size:
        return loan.xp.zeros((1,) * x.ndim), loan.xp.ones((1,) * x.ndim)
    mean = x.mean(axes, dtype=np.float64, keepdims=True)
    return mean, ((x - mean.astype(x.dtype)) ** 2).mean(axes, dtype=np.float64, keepdims=True)


def channels(loan: Loan, name: str) -> Any:
    """Return an array (C,) shaped like the input."""
    return loan[name].reshape(1, -1, *(1,) * (len(loan.shape("input")) - 2))


def local_response_norm(
    input: ArrayT, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> ArrayT:
    """Divide by (k + alpha / size * s) ** beta, s being the sum of squares of `size` neighbouring channels.

    ========  ======================================
    input     (N, C, ...) with at least 3 axes
    returns   the shape of the input
    ========  ======================================

    Krizhevsky, Sutskever, Hinton 2012. Of an even size one channel more lies before than behind.

    >>> import numpy as np
    >>> local_response_norm(np.full((1, 1, 1), 2.0), 1, alpha=2.0, beta=1.0).item() == 2 / 9
    True
    """
    op = "local_response_norm"
    with borrow(op, {"input": input}) as loan:
        norm = check_response_norm(op, loan.shape("input"), size, alpha, beta, k)
        x = loan["input"]
        return loan.give(x * response(x, norm) ** -norm.beta)


class ResponseNorm(NamedTuple):
    """The options of a local response norm."""

    size: int
    alpha: float
    beta: float
    k: float


def check_response_norm(op: str, shape: tuple[int, ...], size: Any, *numbers: Any) -> ResponseNorm:
    """Check the options of a local response norm."""
    options = {"size": size, **dict(zip(("alpha", "beta", "k"), numbers))}
    call = Call(op, {"input": shape}, options, {"alpha": 1e-4, "beta": 0.75, "k": 1.0})
    checked = integer(call, "size must be an int", size)
    if checked < 1:
        raise call.error(f"size must be at least 1, got {checked}")
    if len(shape) < 3:
        raise call.error(f"input (N, C, ...) must have at least 3 axes, got {len(shape)}")
    return ResponseNorm(checked, *(number(call, name) for name in ("alpha", "beta", "k")))


def response(x: Any, norm: ResponseNorm) -> Any:
    """Return k + alpha / size * the sum of squares of neighbouring channels."""
    return norm.k + norm.alpha / norm.size * sum_channels(x * x, norm.size // 2, (norm.size - 1) // 2)


def sum_channels(x: Any, before: int, after: int) -> Any:
    """Add to every channel those before and after it."""
    count = x.shape[1]
    total = x.copy(order="K")
    for step in range(1, min(max(before, after), count - 1) + 1):
        if step <= before:
            total[:, step:] += x[:, :-step]
        if step <= after:
            total[:, :-step] += x[:, step:]
    return total


def dropout(
    input: ArrayT, p: float = 0.5, training: bool = True, *, rng: Any = None, return_mask: bool = False
) -> Any:
    """Set each element to zero with probability p, and multiply the others by 1 / (1 - p) (arXiv 1207.0580).

    rng
        Where chance comes from: a NumPy Generator, a seed, or None. It is drawn on the host, so that a seed
        means the same elements on every kind of array.
    return_mask
        Return (result, mask): True where an element was kept, for grad.dropout_input.

    Without training the input itself is returned.

    >>> import numpy as np
    >>> dropout(np.ones(6), 0.5, rng=1)
    array([0., 2., 2., 2., 0., 0.])
    """
    op = "dropout"
    with borrow(op, {"input": input}) as loan:
        shape = loan.shape("input")
        options = {"p": p, "training": training}
        call = Call(op, {"input": shape}, options, {"p": 0.5, "training": True})
        flag(call, "training")
        chance = check_chance(call)
        _check_rng(call, rng)
        host = np.ones(shape, bool)
        if training and chance:
            host = np.random.default_rng(rng).random(shape, dtype=np.float32) >= chance
        mask = _lay_like(loan, host, loan.given["input"])
        result = loan.give(keep(loan["input"], mask, chance)) if training else input
        return (result, loan.give(mask)) if return_mask else result


def _lay_like(loan: Loan, host: np.ndarray, view: np.ndarray) -> Any:
    """Return a table of the host as one of the library, with its axes in memory as those of a view lie."""
    axes = sorted(range(view.ndim), key=lambda axis: -abs(view.strides[axis]))
    return loan.put(host.transpose(axes).copy()).transpose(np.argsort(axes).tolist())


def _check_rng(call: Call, rng: Any) -> None:
    if rng is None or isinstance(rng, np.random.Generator):
        return
    if isinstance(rng, bool) or not isinstance(rng, (int, np.integer)):
        raise call.type_error("rng must be a NumPy Generator, a seed or None", rng)
    if rng < 0:
        raise call.error(f"rng must be at least 0 where it is a seed, got {rng}")


def check_chance(call: Call) -> float:
    """Return the option p, a probability."""
    chance = number(call, "p")
    if not 0 <= chance <= 1:
        raise call.error(f"p must be from 0 to 1, got {chance}")
    return chance


def keep(x: Any, mask: Any, p: float) -> Any:
    """Return what dropout makes of elements, and of their gradients; in memory it lies as they do."""
    factors = x.copy(order="K")
    factors[...] = mask
    factors *= 1 / (1 - p) if p < 1 else 0.0
    return x * factors


def flatten(input: ArrayT, start_dim: int = 0, end_dim: int = -1) -> ArrayT:
    """Make one axis of the axes from start_dim to end_dim; a view of the input where that is possible.

    >>> import numpy as np
    >>> flatten(np.zeros((2, 3, 4)), 1).shape
    (2, 12)
    """
    op = "flatten"
    with borrow(op, {"input": input}) as loan:
        shape = loan.shape("input")
        first, last = check_axis(op, "start_dim", start_dim, shape), check_axis(op, "end_dim", end_dim, shape)
        if first > last:
            rule = f"start_dim must not lie behind end_dim = {end_dim}, got {start_dim}"
            raise ConvError(f"{op}: {rule} (input {shape})")
        size = math.prod(shape[first : last + 1])
        return loan.give(loan.raw("input").reshape(shape[:first] + (size,) + shape[last + 1 :]))


def interpolate(
    input: ArrayT,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
) -> ArrayT:
    """Resize the spatial axes of an input.

    ============  ==========================================================================
    input         (N, C, W), (N, C, H, W) or (N, C, D, H, W)
    size          of the result: an int, or one per spatial axis; or else
    scale_factor  a number, or one per spatial axis: the size is size * scale_factor, rounded down
    returns       (N, C, *size)
    ============  ==========================================================================

    mode
        "nearest" (the element at or before), "nearest-exact" (the one whose centre is nearest), or between
        neighbours "linear", "bilinear" or "trilinear", as there are spatial axes.
    align_corners
        Of the latter: whether the centres of the outermost elements of input and result coincide, and not
        their edges.

    >>> import numpy as np
    >>> interpolate(np.array([[[1.0, 3.0]]]), scale_factor=2, mode="linear")
    array([[[1. , 1.5, 2.5, 3. ]]])
    """
    op = "interpolate"
    with borrow(op, {"input": input}) as loan:
        resizes = make_resizes(op, loan.shape("input"), size, scale_factor, mode, align_corners)
        x, is_last = channels_in_order(loan, "input")
        for axis, resize in enumerate(resizes, start=2 - is_last):
            x = resize.gather(loan.xp, x, axis)
        return loan.give(loan.xp.moveaxis(x, -1, 1) if is_last else x)


def channels_in_order(loan: Loan, name: str) -> tuple[Any, bool]:
    """Return an array with its axes as they lie in memory: with channels last or not, which is said."""
    array, view = loan[name], loan.given[name]
    is_last = arrays.memory_order(view.shape[1:], view.strides[1:], 0, "NCHW") == "NHWC"
    return (loan.xp.moveaxis(array, 1, -1) if is_last else array), is_last
