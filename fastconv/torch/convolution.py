"""The convolutions as torch operations: tensors that may need gradients enter, and leave with a history.

Four operators are registered with torch, which are each other's derivatives:

    convolution          needs  convolution_input and convolution_weight
    convolution_input           convolution_weight and convolution
    convolution_weight          convolution_input and convolution
    convolution_transposed      convolution and convolution_weight
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastconv
from fastconv import conv_grad
from fastconv.problem import OPERATIONS, make_problem, make_transposed, output_size, same_padding
from fastconv.torch.operators import Numbers, Size, check_tensors, define, empty_like, is_plain, per_axis

Padding = str | int | Sequence[int | Sequence[int]]

# What every operator takes at its end; padding is before, after, before, after ...
_GEOMETRY = "int[] stride, SymInt[] padding, int[] dilation, int groups, str algo, str precision"


class Geometry(NamedTuple):
    """How windows lie: one number per spatial axis, of padding two."""

    stride: list[int]
    padding: list[Any]
    dilation: list[int]
    groups: int
    algo: str
    precision: str

    def options(self) -> dict[str, Any]:
        """Return the arguments of fastconv's functions."""
        pairs = list(zip(self.padding[::2], self.padding[1::2], strict=True))
        return {**self._asdict(), "padding": pairs}


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Padding = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
) -> Tensor:
    """Do what fastconv.conv1d does, differentiably.

    >>> signal = torch.tensor([[1.0, 2.0, 4.0]], requires_grad=True)
    >>> conv1d(signal, torch.tensor([[[1.0, 10.0]]])).sum().backward()
    >>> signal.grad
    tensor([[ 1., 11., 10.]])
    """
    return _convolve(1, input, weight, bias, stride, padding, dilation, groups, algo, precision)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Padding = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
) -> Tensor:
    """Do what fastconv.conv2d does, differentiably: torch.nn.functional.conv2d by fastconv's algorithms.

    =======  =====================================================
    input    (N, C, H, W) or (C, H, W), on the CPU or a CUDA device
    weight   (K, C // groups, R, S)
    bias     (K,)
    returns  (N, K, P, Q) or (K, P, Q), in the input's memory order
    =======  =====================================================

    Gradients and their gradients are fastconv's too. Padding may also be a (before, after) pair per axis, or
    "same" with a stride. Under autocast the tensors are cast to its dtype. Raises what fastconv.conv2d does.

    >>> image = torch.ones(1, 1, 2, 3, requires_grad=True)
    >>> conv2d(image, torch.ones(1, 1, 1, 2)).sum().backward()
    >>> image.grad.tolist()
    [[[[1.0, 2.0, 1.0], [1.0, 2.0, 1.0]]]]
    """
    return _convolve(2, input, weight, bias, stride, padding, dilation, groups, algo, precision)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Padding = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
) -> Tensor:
    """Do what fastconv.conv3d does, differentiably.

    >>> conv3d(torch.ones(1, 2, 3, 3, 3), torch.ones(1, 2, 3, 3, 3)).item()
    54.0
    """
    return _convolve(3, input, weight, bias, stride, padding, dilation, groups, algo, precision)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Padding = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
) -> Tensor:
    """Do what fastconv.conv_transpose1d does, differentiably.

    >>> conv_transpose1d(torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0, 10.0]]]), stride=2)
    tensor([[ 1., 10.,  2., 20.]])
    """
    options = (stride, padding, dilation, groups, algo, precision)
    return _transpose(1, input, weight, bias, output_padding, *options)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Padding = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
) -> Tensor:
    """Do what fastconv.conv_transpose2d does, differentiably.

    >>> conv_transpose2d(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), stride=2).tolist()
    [[[[1.0, 1.0, 1.0, 1.0]]]]
    """
    options = (stride, padding, dilation, groups, algo, precision)
    return _transpose(2, input, weight, bias, output_padding, *options)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Padding = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
) -> Tensor:
    """Do what fastconv.conv_transpose3d does, differentiably.

    >>> conv_transpose3d(torch.ones(1, 2, 1, 1, 1), torch.ones(2, 1, 1, 1, 2)).flatten()
    tensor([2., 2.])
    """
    options = (stride, padding, dilation, groups, algo, precision)
    return _transpose(3, input, weight, bias, output_padding, *options)


def _convolve(
    ndim: int, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Numbers, padding: Padding,
    dilation: Numbers, groups: int, algo: str, precision: str,
) -> Tensor:  # fmt: skip
    options = _options(stride, padding, dilation, groups, precision)
    _check(f"conv{ndim}d", ndim, input, weight, bias, algo, options)
    steps, spread = per_axis(stride, ndim), per_axis(dilation, ndim)
    pads = _pads(padding, input.shape[-ndim:], weight.shape[2:], steps, spread)
    x, weight, bias = _autocast(input, weight, bias)
    is_single = input.dim() == ndim + 1
    geometry = Geometry(steps, pads, spread, operator.index(groups), algo, precision)
    y = _convolution(x.unsqueeze(0) if is_single else x, weight, bias, *geometry)
    return y.squeeze(0) if is_single else y


def _transpose(
    ndim: int, input: Tensor, weight: Tensor, bias: Tensor | None, output_padding: Numbers, stride: Numbers,
    padding: Padding, dilation: Numbers, groups: int, algo: str, precision: str,
) -> Tensor:  # fmt: skip
    options = _options(stride, padding, dilation, groups, precision, output_padding=output_padding)
    _check(f"conv_transpose{ndim}d", ndim, input, weight, bias, algo, options)
    steps, spread = per_axis(stride, ndim), per_axis(dilation, ndim)
    pads = _pads(padding, (), (), steps, spread)
    x, weight, bias = _autocast(input, weight, bias)
    is_single = input.dim() == ndim + 1
    geometry = Geometry(steps, pads, spread, operator.index(groups), algo, precision)
    beyond = per_axis(output_padding, ndim)
    y = _convolution_transposed(x.unsqueeze(0) if is_single else x, weight, bias, beyond, *geometry)
    return y.squeeze(0) if is_single else y


def _options(
    stride: Any, padding: Any, dilation: Any, groups: Any, precision: Any, **more: Any
) -> dict[str, Any]:
    found = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return {**found, "precision": precision, **more}


def _check(
    op: str, ndim: int, input: Any, weight: Any, bias: Any, algo: Any, options: dict[str, Any]
) -> None:
    """Raise what fastconv's function of this name raises for what an operator cannot be given.

    Whole numbers pass, symbolic ones too; whether they are right is checked where the operator is computed.
    """
    check_tensors(op, input=input, weight=weight, **({} if bias is None else {"bias": bias}))
    if not isinstance(algo, str):
        raise TypeError(f"{op}: algo must be a string, got {algo!r}")
    ranks = input.dim() - ndim, weight.dim() - ndim
    if ranks in ((1, 2), (2, 2)) and _are_plain(ndim, **options):
        return
    shape = tuple(input.shape) if ranks[0] != 1 else (1, *input.shape)
    make: Any = make_problem if op in OPERATIONS else make_transposed
    dtype = str(input.dtype).removeprefix("torch.")
    bias_shape = None if bias is None else tuple(bias.shape)
    make(op, shape, tuple(weight.shape), dtype=dtype, bias_shape=bias_shape, **options)


def _are_plain(
    ndim: int, *, stride: Any, padding: Any, dilation: Any, groups: Any, precision: Any, **more: Any
) -> bool:
    """True where nothing has to be converted or refused before the operator."""
    if more and (isinstance(padding, str) or not is_plain(more["output_padding"], ndim, 0)):
        return False
    numbers = is_plain(stride, ndim, 1) and is_plain(dilation, ndim, 1) and is_plain([groups], 1, 1)
    return numbers and isinstance(precision, str) and _is_plain_padding(padding, ndim)


def _is_plain_padding(padding: Any, ndim: int) -> bool:
    if isinstance(padding, str):
        return padding in ("same", "valid")
    if not isinstance(padding, (tuple, list)):
        return is_plain(padding, ndim, 0)
    return len(padding) == ndim and all(is_plain(e, 2, 0) for e in padding)


def _autocast(*tensors: Any) -> Any:
    """Cast tensors as autocast wants it; it leaves float64 alone, and devices such as "meta"."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in tensors]


def _pads(padding: Any, sizes: Size, kernels: Size, stride: list[int], dilation: list[int]) -> list[Any]:
    """Return before, after, before, after ... of every axis; what was checked enters."""
    if isinstance(padding, str) and padding == "same":
        pairs = [same_padding(*axis) for axis in zip(sizes, kernels, stride, dilation, strict=True)]
        return [number for pair in pairs for number in pair]
    entries = 0 if isinstance(padding, str) else padding.tolist() if hasattr(padding, "tolist") else padding
    listed = entries if isinstance(entries, (tuple, list)) else [entries] * len(stride)
    return [number for entry in listed for number in per_axis(entry, 2)]


def _plain(*tensors: Tensor | None) -> Iterable[Any]:
    """Return the tensors without their history: fastconv's functions refuse tensors that need a gradient."""
    return [tensor if tensor is None else tensor.detach() for tensor in tensors]


@define("convolution", f"Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}")
def _convolution(input: Any, weight: Any, bias: Any, *geometry: Any) -> Any:
    function = getattr(fastconv, f"conv{weight.dim() - 2}d")
    return function(*_plain(input, weight, bias), **Geometry(*geometry).options())


@define("convolution_input", f"SymInt[] input_size, Tensor weight, Tensor grad_output, {_GEOMETRY}", leader=2)
def _convolution_input(input_size: Any, weight: Any, grad_output: Any, *geometry: Any) -> Any:
    function = getattr(conv_grad, f"conv{weight.dim() - 2}d_input")
    options = _for_gradient(Geometry(*geometry), has_kernel=True).options()
    return function(tuple(input_size), *_plain(weight, grad_output), **options)


@define("convolution_weight", f"Tensor input, SymInt[] weight_size, Tensor grad_output, {_GEOMETRY}")
def _convolution_weight(input: Any, weight_size: Any, grad_output: Any, *geometry: Any) -> Any:
    function = getattr(conv_grad, f"conv{len(weight_size) - 2}d_weight")
    input, grad_output = _plain(input, grad_output)
    options = _for_gradient(Geometry(*geometry), has_kernel=not input.is_cuda).options()
    return function(input, tuple(weight_size), grad_output, **options)


@define(
    "convolution_transposed", f"Tensor input, Tensor weight, Tensor? bias, int[] output_padding, {_GEOMETRY}"
)
def _convolution_transposed(input: Any, weight: Any, bias: Any, output_padding: Any, *geometry: Any) -> Any:
    function = getattr(fastconv, f"conv_transpose{weight.dim() - 2}d")
    options = Geometry(*geometry).options()
    return function(*_plain(input, weight, bias), output_padding=output_padding, **options)


def _for_gradient(geometry: Geometry, has_kernel: bool) -> Geometry:
    """Let the cost model choose where Winograd, asked for by name, has no gradient.

    That is where rows or columns have a stride, and for the gradient of the weight on a GPU.
    """
    is_missing = not has_kernel or max(geometry.stride[-2:]) > 1
    return geometry._replace(algo="auto") if is_missing and geometry.algo == "winograd" else geometry


@_convolution.register_fake
def _fake_convolution(input: Tensor, weight: Tensor, bias: Any, *geometry: Any) -> Tensor:
    g = Geometry(*geometry)
    pads = zip(g.padding[::2], g.padding[1::2], strict=True)
    axes = zip(input.shape[2:], weight.shape[2:], g.stride, pads, g.dilation, strict=True)
    sizes = [output_size(size, kernel, step, *pad, spread) for size, kernel, step, pad, spread in axes]
    return empty_like(input, [input.shape[0], weight.shape[0], *sizes])


@_convolution_input.register_fake
def _fake_convolution_input(input_size: Size, weight: Tensor, grad_output: Tensor, *geometry: Any) -> Tensor:
    return empty_like(grad_output, list(input_size))


@_convolution_weight.register_fake
def _fake_convolution_weight(input: Tensor, weight_size: Size, grad_output: Tensor, *geometry: Any) -> Tensor:
    return input.new_empty(list(weight_size))


@_convolution_transposed.register_fake
def _fake_convolution_transposed(
    input: Tensor, weight: Tensor, bias: Any, output_padding: list[int], *geometry: Any
) -> Tensor:
    g = Geometry(*geometry)
    pads = [before + after for before, after in zip(g.padding[::2], g.padding[1::2], strict=True)]
    axes = zip(input.shape[2:], weight.shape[2:], g.stride, pads, g.dilation, output_padding, strict=True)
    sizes = [(H - 1) * step - pad + spread * (R - 1) + 1 + more for H, R, step, pad, spread, more in axes]
    return empty_like(input, [input.shape[0], weight.shape[1] * g.groups, *sizes])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what the derivatives need: tensors, and the geometry at the end of the arguments."""
    tensors = [argument for argument in inputs if isinstance(argument, Tensor)]
    ctx.save_for_backward(*tensors[:2])

    ctx.geometry = Geometry(*inputs[-len(Geometry._fields) :])


def _nothing(count: int) -> tuple[None, ...]:
    return (None,) * (count + len(Geometry._fields))


def _sum_of_pixels(grad: Tensor) -> Tensor:
    """Return the gradient of a bias."""
    return grad.sum(dim=[0, *range(2, grad.dim())])


def _differentiate_convolution(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight = ctx.saved_tensors
    needs, geometry = ctx.needs_input_grad, ctx.geometry
    of_input = _convolution_input(list(input.shape), weight, grad, *geometry) if needs[0] else None
    of_weight = _convolution_weight(input, list(weight.shape), grad, *geometry) if needs[1] else None
    return of_input, of_weight, _sum_of_pixels(grad) if needs[2] else None, *_nothing(0)


def _differentiate_input(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, grad_output = ctx.saved_tensors
    needs, geometry = ctx.needs_input_grad, ctx.geometry
    of_weight = _convolution_weight(grad, list(weight.shape), grad_output, *geometry) if needs[1] else None
    of_grad = _convolution(grad, weight, None, *geometry) if needs[2] else None
    return None, of_weight, of_grad, *_nothing(0)


def _differentiate_weight(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, grad_output = ctx.saved_tensors
    needs, geometry = ctx.needs_input_grad, ctx.geometry
    of_input = _convolution_input(list(input.shape), grad, grad_output, *geometry) if needs[0] else None
    of_grad = _convolution(input, grad, None, *geometry) if needs[2] else None
    return of_input, None, of_grad, *_nothing(0)


def _differentiate_transposed(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    seen, geometry = _undo_output_padding(grad, input, weight, ctx.geometry)
    of_input = _convolution(seen, weight, None, *geometry) if needs[0] else None
    of_weight = _convolution_weight(seen, list(weight.shape), input, *geometry) if needs[1] else None
    return of_input, of_weight, _sum_of_pixels(grad) if needs[2] else None, *_nothing(1)


def _undo_output_padding(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry
) -> tuple[Tensor, Geometry]:
    """Return what to convolve, and how, so that there are as many windows as the input has pixels.

    Whole strides of output_padding would be windows more: so much less is padded, or else cut off.
    """
    padding = list(geometry.padding)
    for axis, size in enumerate(input.shape[2:]):
        step, (before, after) = geometry.stride[axis], padding[2 * axis : 2 * axis + 2]
        span = geometry.dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        beyond = grad.shape[2 + axis] - ((size - 1) * step - before - after + span)
        left = after - beyond // step * step
        padding[2 * axis + 1] = max(left, 0)
        grad = grad.narrow(2 + axis, 0, grad.shape[2 + axis] + min(left, 0))
    return grad, geometry._replace(padding=padding)


_convolution.register_autograd(_differentiate_convolution, setup_context=_keep)
_convolution_input.register_autograd(_differentiate_input, setup_context=_keep)
_convolution_weight.register_autograd(_differentiate_weight, setup_context=_keep)
_convolution_transposed.register_autograd(_differentiate_transposed, setup_context=_keep)
