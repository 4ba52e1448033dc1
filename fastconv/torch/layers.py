"""torch's convolutional layers, with its arguments and state, computed by fastconv; those of a model too."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastconv.torch.convolution import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)


class Conv1d(nn.Conv1d):
    """torch.nn.Conv1d, its arguments and its state dict, computed by fastconv; see Conv2d.

    >>> Conv1d(3, 8, 3, padding="same")(torch.ones(1, 3, 9)).shape
    torch.Size([1, 8, 9])
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _forward(self, conv1d, input, weight, bias)


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d, its arguments and its state dict, computed by fastconv.

    >>> Conv2d(3, 8, 3, padding="same")(torch.ones(1, 3, 5, 5)).shape
    torch.Size([1, 8, 5, 5])
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _forward(self, conv2d, input, weight, bias)


class Conv3d(nn.Conv3d):
    """torch.nn.Conv3d, its arguments and its state dict, computed by fastconv; see Conv2d.

    >>> Conv3d(3, 8, 3, padding="same")(torch.ones(1, 3, 5, 5, 5)).shape
    torch.Size([1, 8, 5, 5, 5])
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _forward(self, conv3d, input, weight, bias)


class ConvTranspose1d(nn.ConvTranspose1d):
    """torch.nn.ConvTranspose1d, its arguments and its state dict, computed by fastconv.

    >>> ConvTranspose1d(3, 8, 4, stride=2, padding=1)(torch.ones(1, 3, 5)).shape
    torch.Size([1, 8, 10])
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve; output_size chooses among the possible extents."""
        return _forward_transposed(self, conv_transpose1d, 1, input, output_size)


class ConvTranspose2d(nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d, its arguments and its state dict, computed by fastconv.

    >>> ConvTranspose2d(3, 8, 4, stride=2, padding=1)(torch.ones(1, 3, 5, 5)).shape
    torch.Size([1, 8, 10, 10])
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve; output_size chooses among the possible extents."""
        return _forward_transposed(self, conv_transpose2d, 2, input, output_size)


class ConvTranspose3d(nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d, its arguments and its state dict, computed by fastconv.

    >>> ConvTranspose3d(3, 8, 4, stride=2, padding=1)(torch.ones(1, 3, 5, 5, 5)).shape
    torch.Size([1, 8, 10, 10, 10])
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve; output_size chooses among the possible extents."""
        return _forward_transposed(self, conv_transpose3d, 3, input, output_size)


_SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d, nn.ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d, nn.ConvTranspose3d: ConvTranspose3d,
}  # fmt: skip
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Conversion(NamedTuple):
    """What `convert` did.

    model    the model that was given, changed
    swapped  names of the layers that fastconv computes now
    left     name -> why a convolution was left alone
    already  how many convolutions were layers of fastconv before

    >>> conversion = convert(nn.Sequential(nn.Conv1d(1, 2, 3), Conv1d(2, 2, 3)))
    >>> conversion.swapped, conversion.left, conversion.already
    (['0'], {}, 1)
    """

    model: nn.Module
    swapped: list[str]
    left: dict[str, str]
    already: int = 0

    def __str__(self) -> str:
        counts = f"{len(self.swapped)} convolutions are computed by fastconv, {len(self.left)} are left alone"
        line = counts + (f", {self.already} already were fastconv's" if self.already else "")
        return "\n".join([line, *(f"  {name}: {reason}" for name, reason in self.left.items())])


def convert(model: nn.Module) -> Conversion:
    """Change the model itself, so that fastconv computes its convolutions, and return a report of it.

    The report is a Conversion: print it, or take the model out of it (`.model`, the same object). Layers
    change their class in place; parameters, buffers, hooks and names stay, so that optimisers and state dicts
    go on working. Only torch's convolutional layers are changed: poolings stay torch's, and so does what a
    model computes by calling functions, such as torch.nn.functional.conv2d.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, dtype=torch.complex64))
    >>> print(convert(model))
    1 convolutions are computed by fastconv, 1 are left alone
      2: fastconv has no torch.complex64
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    swapped, left, already = [], {}, 0
    for name, layer in model.named_modules():
        if type(layer) in _SWAPS.values():
            already += 1
            continue
        if not isinstance(layer, tuple(_SWAPS)):
            continue
        reason = _why_left(layer)
        if reason is None:
            layer.__class__ = _SWAPS[type(layer)]
            swapped.append(name or type(layer).__name__)
        else:
            left[name or type(layer).__name__] = reason
    return Conversion(model, swapped, left, already)


def _why_left(layer: nn.Module) -> str | None:
    if type(layer) not in _SWAPS:
        return f"{type(layer).__module__}.{type(layer).__qualname__} may compute something of its own"
    weight: Any = layer.weight
    if weight.dtype not in _DTYPES:
        return f"fastconv has no {weight.dtype}"
    if weight.device.type not in ("cpu", "cuda", "meta"):
        return f"fastconv has no kernels for {weight.device.type}"
    return None


def _forward(layer: Any, function: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Do what torch's layers do in _conv_forward."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        input = nn.functional.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    return function(input, weight, bias, layer.stride, padding, layer.dilation, layer.groups)


def _forward_transposed(
    layer: Any, function: Any, ndim: int, input: Tensor, output_size: list[int] | None
) -> Tensor:
    """Do what torch's transposed layers do in forward."""
    beyond = layer._output_padding(
        input, output_size, layer.stride, layer.padding, layer.kernel_size, ndim, layer.dilation
    )
    return function(
        input, layer.weight, layer.bias, layer.stride, layer.padding, beyond, layer.groups, layer.dilation
    )
