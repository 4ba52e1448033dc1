"""The poolings as torch operations: tensors that may need gradients enter, and leave with a history.

    operator           its derivative           and that one's
    max_pool           max_pool_input           torch's gather, by the indices
    adaptive_max_pool  adaptive_max_pool_input  torch's gather, by the indices
    avg_pool           avg_pool_input           avg_pool
    adaptive_avg_pool  adaptive_avg_pool_input  adaptive_avg_pool
    max_unpool         torch's gather

The operators take a batch, and one number per spatial axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastconv
from fastconv import pool_grad
from fastconv.problem import output_size as count_windows
from fastconv.problem import to_sizes
from fastconv.torch.operators import Numbers, Size, check_tensors, define, empty_like, is_plain, numbers

_WINDOWS = "int ndim, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding"
_MAX = f"{_WINDOWS}, SymInt[] dilation, bool ceil_mode"
_AVERAGE = f"{_WINDOWS}, bool ceil_mode, bool count_include_pad, int? divisor_override"


def max_pool1d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Do what fastconv.max_pool1d does, differentiably.

    >>> signal = torch.tensor([[1.0, 5.0, 2.0]], requires_grad=True)
    >>> max_pool1d(signal, 2, stride=1).sum().backward()
    >>> signal.grad
    tensor([[0., 2., 0.]])
    """
    return _maxima(1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Do what fastconv.max_pool2d does, differentiably: torch.nn.functional.max_pool2d by fastconv's kernels.

    =======  =====================================================================================
    input    (N, C, H, W) or (C, H, W), on the CPU or a CUDA device
    returns  (N, C, P, Q) or (C, P, Q), in the input's memory order; (maxima, indices) if asked for
    =======  =====================================================================================

    float16, bfloat16, float32 and float64; autocast changes nothing. Gradients may be differentiated again.
    Raises what fastconv.max_pool2d does.

    >>> image = torch.tensor([[[1.0, 5.0], [2.0, 3.0]]], requires_grad=True)
    >>> max_pool2d(image, 2).sum().backward()
    >>> image.grad.tolist()
    [[[0.0, 1.0], [0.0, 0.0]]]
    """
    return _maxima(2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool3d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Do what fastconv.max_pool3d does, differentiably.

    >>> max_pool3d(torch.arange(8.0).reshape(1, 2, 2, 2), 2).item()
    7.0
    """
    return _maxima(3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def avg_pool1d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Do what fastconv.avg_pool1d does, differentiably.

    >>> avg_pool1d(torch.tensor([[1.0, 5.0, 2.0, 7.0]]), 2)
    tensor([[3.0000, 4.5000]])
    """
    return _averages(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


def avg_pool2d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Do what fastconv.avg_pool2d does, differentiably; see max_pool2d.

    >>> image = torch.ones(1, 2, 2, requires_grad=True)
    >>> avg_pool2d(image, 2).sum().backward()
    >>> image.grad.tolist()
    [[[0.25, 0.25], [0.25, 0.25]]]
    """
    return _averages(2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def avg_pool3d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Do what fastconv.avg_pool3d does, differentiably.

    >>> avg_pool3d(torch.arange(8.0).reshape(1, 2, 2, 2), 2).item()
    3.5
    """
    return _averages(3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def adaptive_avg_pool1d(input: Tensor, output_size: Any) -> Tensor:
    """Do what fastconv.adaptive_avg_pool1d does, differentiably.

    >>> adaptive_avg_pool1d(torch.arange(5.0).reshape(1, 5), 2)
    tensor([[1., 3.]])
    """
    return _adaptive(1, _adaptive_avg_pool, input, output_size)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """Do what fastconv.adaptive_avg_pool2d does, differentiably; see max_pool2d.

    >>> adaptive_avg_pool2d(torch.arange(10.0).reshape(1, 2, 5), (1, 2)).tolist()
    [[[3.5, 5.5]]]
    """
    return _adaptive(2, _adaptive_avg_pool, input, output_size)


def adaptive_avg_pool3d(input: Tensor, output_size: Any) -> Tensor:
    """Do what fastconv.adaptive_avg_pool3d does, differentiably.

    >>> adaptive_avg_pool3d(torch.arange(8.0).reshape(1, 2, 2, 2), 1).item()
    3.5
    """
    return _adaptive(3, _adaptive_avg_pool, input, output_size)


def adaptive_max_pool1d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Do what fastconv.adaptive_max_pool1d does, differentiably.

    >>> adaptive_max_pool1d(torch.arange(5.0).reshape(1, 5), 2, return_indices=True)
    (tensor([[2., 4.]]), tensor([[2, 4]]))
    """
    both = _adaptive(1, _adaptive_max_pool, input, output_size)
    return both if return_indices else both[0]


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Do what fastconv.adaptive_max_pool2d does, differentiably; see max_pool2d.

    >>> adaptive_max_pool2d(torch.arange(10.0).reshape(1, 2, 5), (1, 2)).tolist()
    [[[7.0, 9.0]]]
    """
    both = _adaptive(2, _adaptive_max_pool, input, output_size)
    return both if return_indices else both[0]


def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    output_size: Any = None,
) -> Tensor:
    """Do what fastconv.max_unpool2d does, differentiably.

    >>> pooled, indices = max_pool2d(torch.arange(16.0).reshape(1, 4, 4), 2, return_indices=True)
    >>> max_unpool2d(pooled, indices, 2)[0, 1]
    tensor([0., 5., 0., 7.])
    """
    op = "max_unpool2d"
    check_tensors(op, input=input, indices=indices)
    options = _windows(op, 2, input, kernel_size, stride, padding)
    size = output_size
    if size is not None:
        is_plain_shape = isinstance(size, (tuple, list)) and is_plain(size, len(size), 0)
        size = list(size if is_plain_shape else to_sizes(op, "output_size", size))
    if input.dim() != 3:
        return _max_unpool(input, indices, *options, size)
    size = [1, *size] if size is not None and len(size) == 3 else size
    return _max_unpool(input.unsqueeze(0), indices.unsqueeze(0), *options, size).squeeze(0)


def _maxima(
    ndim: int, input: Tensor, kernel_size: Numbers, stride: Numbers | None, padding: Numbers,
    dilation: Numbers, ceil_mode: bool, return_indices: bool,
) -> Any:  # fmt: skip
    """Return maxima, with their indices if asked for; computed they are always, for the gradient."""
    op = f"max_pool{ndim}d"
    windows = _windows(op, ndim, input, kernel_size, stride, padding)
    spread = numbers(op, input, "dilation", dilation, ndim)
    both = _with_batch(ndim, _max_pool, input, *windows, spread, ceil_mode)
    return both if return_indices else both[0]


def _averages(
    ndim: int, input: Tensor, kernel_size: Numbers, stride: Numbers | None, padding: Numbers, *options: Any
) -> Tensor:
    windows = _windows(f"avg_pool{ndim}d", ndim, input, kernel_size, stride, padding)
    return _with_batch(ndim, _avg_pool, input, *windows, *options)


def _windows(
    op: str, ndim: int, input: Tensor, kernel_size: Any, stride: Any, padding: Any
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return kernel_size, stride and padding, one whole number per axis."""
    check_tensors(op, input=input)
    kernels = numbers(op, input, "kernel_size", kernel_size, ndim)
    strides = kernels if stride is None else numbers(op, input, "stride", stride, ndim)
    return kernels, strides, numbers(op, input, "padding", padding, ndim, least=0)


def _adaptive(ndim: int, operator: Any, input: Tensor, output_size: Any) -> Any:
    """Call an adaptive operator; None for an axis keeps its size."""
    name = "avg" if operator is _adaptive_avg_pool else "max"
    op = f"adaptive_{name}_pool{ndim}d"
    check_tensors(op, input=input)
    listed = output_size.tolist() if hasattr(output_size, "tolist") else output_size
    wanted = listed if isinstance(listed, (tuple, list)) else [listed] * ndim
    sizes = [size if wish is None else wish for size, wish in zip(input.shape[-ndim:], wanted)]
    sizes += wanted[ndim:]
    return _with_batch(ndim, operator, input, numbers(op, input, "output_size", sizes, ndim))


def _with_batch(ndim: int, operator: Any, input: Tensor, *options: Any) -> Any:
    if input.dim() != ndim + 1:
        return operator(input, ndim, *options)
    result = operator(input.unsqueeze(0), ndim, *options)
    if isinstance(result, Tensor):
        return result.squeeze(0)
    return tuple(part.squeeze(0) for part in result)


# ---- the operators ----


@define("max_pool", f"Tensor input, {_MAX}", "(Tensor, Tensor)")
def _max_pool(input: Any, ndim: int, *options: Any) -> Any:
    return getattr(fastconv, f"max_pool{ndim}d")(input, *options, return_indices=True)


@define("max_pool_input", f"Tensor grad_output, Tensor indices, SymInt[] input_size, {_MAX}")
def _max_pool_input(grad_output: Any, indices: Any, input_size: Any, ndim: int, *options: Any) -> Any:
    function = getattr(pool_grad, f"max_pool{ndim}d_input")
    return function(tuple(input_size), indices, grad_output, *options)


@define("adaptive_max_pool", "Tensor input, int ndim, SymInt[] output_size", "(Tensor, Tensor)")
def _adaptive_max_pool(input: Any, ndim: int, output_size: Any) -> Any:
    function = getattr(fastconv, f"adaptive_max_pool{ndim}d")
    return function(input, output_size, return_indices=True)


@define("adaptive_max_pool_input", "Tensor grad_output, Tensor indices, SymInt[] input_size, int ndim")
def _adaptive_max_pool_input(grad_output: Any, indices: Any, input_size: Any, ndim: int) -> Any:
    function = getattr(pool_grad, f"adaptive_max_pool{ndim}d_input")
    return function(tuple(input_size), indices, grad_output)


@define("avg_pool", f"Tensor input, {_AVERAGE}")
def _avg_pool(input: Any, ndim: int, *options: Any) -> Any:
    return getattr(fastconv, f"avg_pool{ndim}d")(input, *_known(ndim, options))


@define("avg_pool_input", f"Tensor grad_output, SymInt[] input_size, {_AVERAGE}")
def _avg_pool_input(grad_output: Any, input_size: Any, ndim: int, *options: Any) -> Any:
    function = getattr(pool_grad, f"avg_pool{ndim}d_input")
    return function(tuple(input_size), grad_output, *_known(ndim, options))


@define("adaptive_avg_pool", "Tensor input, int ndim, SymInt[] output_size")
def _adaptive_avg_pool(input: Any, ndim: int, output_size: Any) -> Any:
    return getattr(fastconv, f"adaptive_avg_pool{ndim}d")(input, output_size)


@define("adaptive_avg_pool_input", "Tensor grad_output, SymInt[] input_size, int ndim")
def _adaptive_avg_pool_input(grad_output: Any, input_size: Any, ndim: int) -> Any:
    function = getattr(pool_grad, f"adaptive_avg_pool{ndim}d_input")
    return function(tuple(input_size), grad_output)


@define(
    "max_unpool",
    "Tensor input, Tensor indices, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding,"
    " SymInt[]? output_size",
)
def _max_unpool(
    input: Any, indices: Any, kernel_size: Any, stride: Any, padding: Any, output_size: Any
) -> Any:
    return fastconv.max_unpool2d(input, indices, kernel_size, stride, padding, output_size)


def _known(ndim: int, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the options that an average over so many axes has: in one dimension no divisor."""
    return options[:-1] if ndim == 1 else options


# ---- what they return, by size and memory order ----


@_max_pool.register_fake
def _fake_max_pool(input: Tensor, ndim: int, *options: Any) -> tuple[Tensor, Tensor]:
    shape = _pooled_shape(input, *options)
    return empty_like(input, shape), empty_like(input, shape, torch.int64)


@_avg_pool.register_fake
def _fake_avg_pool(
    input: Tensor, ndim: int, kernel_size: Size, stride: Size, padding: Size, ceil_mode: bool, *options: Any
) -> Tensor:
    return empty_like(input, _pooled_shape(input, kernel_size, stride, padding, [1] * ndim, ceil_mode))


def _pooled_shape(
    input: Tensor, kernel_size: Size, stride: Size, padding: Size, dilation: Size, ceil_mode: bool
) -> list[Any]:
    sizes = [
        count_windows(size, kernel, step, pad, pad, spread, ceil_mode)
        for size, kernel, step, pad, spread in zip(
            input.shape[2:], kernel_size, stride, padding, dilation, strict=True
        )
    ]
    return [*input.shape[:2], *sizes]


@_adaptive_max_pool.register_fake
def _fake_adaptive_max_pool(input: Tensor, ndim: int, output_size: Size) -> tuple[Tensor, Tensor]:
    shape = [*input.shape[:2], *output_size]
    return empty_like(input, shape), empty_like(input, shape, torch.int64)


@_adaptive_avg_pool.register_fake
def _fake_adaptive_avg_pool(input: Tensor, ndim: int, output_size: Size) -> Tensor:
    return empty_like(input, [*input.shape[:2], *output_size])


@_max_pool_input.register_fake
@_adaptive_max_pool_input.register_fake
def _fake_max_input(grad_output: Tensor, indices: Tensor, input_size: Size, *options: Any) -> Tensor:
    return empty_like(grad_output, list(input_size))


@_avg_pool_input.register_fake
@_adaptive_avg_pool_input.register_fake
def _fake_avg_input(grad_output: Tensor, input_size: Size, *options: Any) -> Tensor:
    return empty_like(grad_output, list(input_size))


@_max_unpool.register_fake
def _fake_max_unpool(
    input: Tensor, indices: Tensor, kernel_size: Size, stride: Size, padding: Size, output_size: Size | None
) -> Tensor:
    axes = zip(input.shape[2:], kernel_size, stride, padding, strict=True)
    least = [(size - 1) * step - 2 * pad + kernel for size, kernel, step, pad in axes]
    return empty_like(input, [*input.shape[:2], *(least if output_size is None else output_size[-2:])])


# ---- their derivatives ----


def _keep_indices(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(output[1])
    ctx.size, ctx.options = list(inputs[0].shape), inputs[1:]


def _differentiate_max_pool(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    return _max_pool_input(grad, indices, ctx.size, *ctx.options), *(None for _ in ctx.options)


def _differentiate_adaptive_max_pool(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    return _adaptive_max_pool_input(grad, indices, ctx.size, ctx.options[0]), None, None


def _keep_places(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep the indices, the second argument of operators whose derivative gathers by them."""
    ctx.save_for_backward(inputs[1])
    ctx.count = len(inputs)


def _gather(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return what lies where the indices say; nothing for -1, a window that saw nothing but padding."""
    (indices,) = ctx.saved_tensors
    places = indices.flatten(2)
    found = grad.flatten(2).gather(-1, places.clamp(min=0)).masked_fill(places < 0, 0)
    return found.reshape(indices.shape), *(None,) * (ctx.count - 1)


def _keep_size(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.size, ctx.options = list(inputs[0].shape), inputs[1:]


def _differentiate_avg_pool(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _avg_pool_input(grad, ctx.size, *ctx.options), *(None for _ in ctx.options)


def _differentiate_avg_pool_input(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    _, *options = ctx.options
    return _avg_pool(grad, *options), None, *(None for _ in options)


def _differentiate_adaptive_avg_pool(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _adaptive_avg_pool_input(grad, ctx.size, ctx.options[0]), None, None


def _differentiate_adaptive_avg_pool_input(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _adaptive_avg_pool(grad, ctx.options[1], ctx.size[2:]), None, None


_max_pool.register_autograd(_differentiate_max_pool, setup_context=_keep_indices)
_max_pool_input.register_autograd(_gather, setup_context=_keep_places)
_adaptive_max_pool.register_autograd(_differentiate_adaptive_max_pool, setup_context=_keep_indices)
_adaptive_max_pool_input.register_autograd(_gather, setup_context=_keep_places)
_avg_pool.register_autograd(_differentiate_avg_pool, setup_context=_keep_size)
_avg_pool_input.register_autograd(_differentiate_avg_pool_input, setup_context=_keep_size)
_adaptive_avg_pool.register_autograd(_differentiate_adaptive_avg_pool, setup_context=_keep_size)
_adaptive_avg_pool_input.register_autograd(_differentiate_adaptive_avg_pool_input, setup_context=_keep_size)
_max_unpool.register_autograd(_gather, setup_context=_keep_places)
