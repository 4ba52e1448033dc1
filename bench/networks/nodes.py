"""What a layer does: its output shape, arrays, multiply-adds and windows, and its run once it has its arrays.

Shapes leave out the batch and list the channels first: (C, *spatial) for maps, (features,) for vectors. Every
node holds all that is needed to execute it; options mean what PyTorch's modules mean by the same words. An
option given as one int holds for every spatial axis. A run takes and returns NumPy's or CuPy's arrays, with
the batch in front: by fastconv's functions, and by operators and NumPy functions that CuPy's arrays take up.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, ClassVar

import numpy as np

import fastconv
from fastconv.problem import ConvError, output_size

Shape = tuple[int, ...]
PerAxis = int | tuple[int, ...]
Pad = int | tuple[int, int]  # before and after alike, or a pair
Array = Any
Arrays = Mapping[str, Array]
Run = Callable[..., Array]


@dataclass(frozen=True)
class ConvLayer:
    """One convolution of a network as a workload: its shape, and how often the network contains it.

    ================  ==============================================================
    input             (N, C, *spatial)
    weight            (K, C // groups, *kernel), transposed (C, K // groups, *kernel)
    output            (N, K, *output_spatial)
    ================  ==============================================================

    `kernel`, `stride`, `padding` (a pair where before and after differ) and `dilation` are in elements per
    axis. `macs` are for one sample and one layer: the network spends count * macs.

    >>> image = ConvLayer("example", "blur", 1, 2, 3, (512, 512), 1, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    >>> image.macs
    7077888
    """

    network: str
    name: str
    count: int
    ndim: int
    C: int
    spatial: Shape
    K: int
    kernel: Shape
    stride: Shape
    padding: tuple[Pad, ...]
    dilation: Shape
    groups: int
    transposed: bool = False

    @property
    def op(self) -> str:
        """Name of the operation, as in torch.nn.functional."""
        return f"conv{'_transpose' if self.transposed else ''}{self.ndim}d"

    @property
    def label(self) -> str:
        """The layer in one line: network, name, channels, kernel, options that are not 1, input size."""
        options = _stride_text(self.stride)
        options += f" d{_times(self.dilation)}" if max(self.dilation) > 1 else ""
        options += f" g{self.groups}" if self.groups > 1 else ""
        options += " transposed" if self.transposed else ""
        shape = f"{self.C}->{self.K} {_times(self.kernel)}{options} @{_times(self.spatial)}"
        return f"{self.network} {self.name} {shape}"

    @property
    def weight_shape(self) -> Shape:
        """Shape of the weight array, as torch stores it."""
        if self.transposed:
            return (self.C, self.K // self.groups, *self.kernel)
        return (self.K, self.C // self.groups, *self.kernel)

    @property
    def output_spatial(self) -> Shape:
        """Extents of the output; a transposed convolution undoes the sizes of the convolution it mirrors."""
        axes = zip(self.spatial, self.kernel, self.stride, map(_pair, self.padding), self.dilation)
        if self.transposed:
            return tuple((size - 1) * s - sum(pads) + d * (k - 1) + 1 for size, k, s, pads, d in axes)
        return tuple(output_size(size, k, s, *pads, d) for size, k, s, pads, d in axes)

    @property
    def macs(self) -> int:
        """Multiply-adds for one sample: a weight meets each output pixel (transposed: input pixel) once."""
        pixels = self.spatial if self.transposed else self.output_spatial
        return math.prod(self.weight_shape) * math.prod(pixels)

    def input_shape(self, batch: int) -> Shape:
        """Shape of the input array for a batch of that many samples."""
        return (batch, self.C, *self.spatial)


@dataclass(frozen=True)
class Node:
    """Defaults of every node: one input, the same shape out, no parameters, pixel for pixel."""

    def output_shape(self, *inputs: Shape) -> Shape:
        """Shape that leaves the node, without the batch."""
        return inputs[0]

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        """Trainable arrays by PyTorch's name for them, for an input of that shape."""
        return {}

    def buffers(self, shape: Shape) -> dict[str, Shape]:
        """Arrays that a run needs beside them, which training gathers without a gradient."""
        return {}

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        """The node with its arrays: a function of inputs (N, *shape) that returns the output."""
        raise NotImplementedError(f"{type(self).__name__} has no run")

    def macs(self, shape: Shape) -> int:
        """Multiply-adds for one sample, of convolutions and matrix products only."""
        return 0

    def window(self, o: int, axis: int, shape: Shape) -> tuple[int, int]:
        """First and last input position, padding included, that output position `o` reads along an axis."""
        return o, o

    def phases(self, axis: int) -> int:
        """After how many output positions the pattern of the windows repeats: the factor of an upsampling."""
        return 1

    def describe(self, ndim: int) -> str:
        """The node in a few words, for a table; `ndim` is the number of spatial axes of its input."""
        return re.sub(r"\B(?=[A-Z])", " ", type(self).__name__).lower()


@dataclass(frozen=True)
class Conv(Node):
    """Cross-correlation with `channels` filters.

    `residual` and `activation` are set by `fuse`: a second input is added, then the function is applied,
    while the output is in cache.
    """

    channels: int
    kernel: PerAxis
    stride: PerAxis = 1
    padding: int | tuple[Pad, ...] = 0
    dilation: PerAxis = 1
    groups: int = 1
    bias: bool = True
    residual: bool = False
    activation: Activation | None = None
    transposed: ClassVar[bool] = False

    def workload(self, shape: Shape, network: str = "", name: str = "") -> ConvLayer:
        """This node on an input of that shape, ready for benchmarking."""
        (channels, *spatial), ndim = shape, len(shape) - 1
        return ConvLayer(
            network, name, 1, ndim, channels, tuple(spatial), self.channels, _per_axis(self.kernel, ndim),
            _per_axis(self.stride, ndim), tuple(self._pads(axis) for axis in range(ndim)),
            _per_axis(self.dilation, ndim),
            self.groups, self.transposed,
        )  # fmt: skip

    def output_shape(self, *inputs: Shape) -> Shape:
        shape = (self.channels, *self.workload(inputs[0]).output_spatial)
        if any(other != shape for other in inputs[1:]):
            raise ConvError(f"conv: residual must have the output's shape {shape}, got {inputs[1:]}")
        return shape

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        weight = {"weight": self.workload(shape).weight_shape}
        return weight | {"bias": (self.channels,)} if self.bias else weight

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        """fastconv's Conv1d, Conv2d or Conv3d: the weight is packed once, for every later run."""
        make = getattr(fastconv, f"Conv{len(shape) - 1}d")
        return make(arrays["weight"], arrays.get("bias"), **self._options())

    def _options(self) -> dict[str, Any]:
        """Keyword arguments of fastconv's operations."""
        options = {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}
        return options if self.activation is None else {**options, "activation": self.activation.epilogue}

    def macs(self, shape: Shape) -> int:
        return self.workload(shape).macs

    def window(self, o: int, axis: int, shape: Shape) -> tuple[int, int]:
        first = o * _on(self.stride, axis) - _pair(self._pads(axis))[0]
        return first, first + self._reach(axis)

    def describe(self, ndim: int) -> str:
        groups = f" groups {self.groups}" if self.groups > 1 else ""
        kind = "transposed conv" if self.transposed else "conv"
        fused = " + add" if self.residual else ""
        fused += f" + {self.activation.name}" if self.activation else ""
        return f"{kind} {_kernel_text(self.kernel, self.stride, ndim)}{groups}{fused}"

    def _pads(self, axis: int) -> Pad:
        return self.padding if isinstance(self.padding, int) else self.padding[axis]

    def _reach(self, axis: int) -> int:
        """Distance from the first to the last tap."""
        return _on(self.dilation, axis) * (_on(self.kernel, axis) - 1)


@dataclass(frozen=True)
class ConvTranspose(Conv):
    """Transposed convolution: each input pixel adds a multiple of the kernel, `stride` apart."""

    transposed: ClassVar[bool] = True

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        convolve = getattr(fastconv, f"conv_transpose{len(shape) - 1}d")
        weight, bias, options = arrays["weight"], arrays.get("bias"), self._options()
        return lambda x, residual=None: convolve(x, weight, bias, residual=residual, **options)

    def window(self, o: int, axis: int, shape: Shape) -> tuple[int, int]:
        stride, position = _on(self.stride, axis), o + _pair(self._pads(axis))[0]
        return -((self._reach(axis) - position) // stride), position // stride

    def phases(self, axis: int) -> int:
        return _on(self.stride, axis)


@dataclass(frozen=True)
class Pool(Node):
    """`mode` "max" or "avg" over windows; `ceil_mode` adds a last window that reaches over the edge.

    With `return_indices` a run returns (output, indices): the places of the maxima, for MaxUnpool.
    """

    mode: str
    kernel: PerAxis
    stride: PerAxis
    padding: PerAxis = 0
    ceil_mode: bool = False
    return_indices: bool = False

    def output_shape(self, *inputs: Shape) -> Shape:
        channels, *spatial = inputs[0]
        return (channels, *(self._size(size, axis) for axis, size in enumerate(spatial)))

    def window(self, o: int, axis: int, shape: Shape) -> tuple[int, int]:
        first = o * _on(self.stride, axis) - _on(self.padding, axis)
        return first, first + _on(self.kernel, axis) - 1

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        pool = getattr(fastconv, f"{self.mode}_pool{len(shape) - 1}d")
        indices = {"return_indices": True} if self.return_indices else {}
        return lambda x: pool(x, self.kernel, self.stride, self.padding, ceil_mode=self.ceil_mode, **indices)

    def describe(self, ndim: int) -> str:
        return f"{self.mode} pool {_kernel_text(self.kernel, self.stride, ndim)}"

    def _size(self, size: int, axis: int) -> int:
        kernel, stride, padding = (_on(v, axis) for v in (self.kernel, self.stride, self.padding))
        over = stride - 1 if self.ceil_mode else 0
        windows = output_size(size, kernel, stride, padding, padding + over, 1)
        # A window that would start in the padding after the data is not taken, as in torch.
        return windows - 1 if self.ceil_mode and (windows - 1) * stride >= size + padding else windows


@dataclass(frozen=True)
class AdaptivePool(Node):
    """Average over as many equal parts of the map as the output has pixels."""

    size: PerAxis

    def output_shape(self, *inputs: Shape) -> Shape:
        return (inputs[0][0], *_per_axis(self.size, len(inputs[0]) - 1))

    def window(self, o: int, axis: int, shape: Shape) -> tuple[int, int]:
        # The parts repeat with period 1 where the size divides, as it does in every network here.
        size, parts = shape[1 + axis], _on(self.size, axis)
        return o * size // parts, -(-(o + 1) * size // parts) - 1

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        pool = getattr(fastconv, f"adaptive_avg_pool{len(shape) - 1}d")
        return lambda x: pool(x, self.size)

    def describe(self, ndim: int) -> str:
        return f"avg pool to {_times(_per_axis(self.size, ndim))}"


@dataclass(frozen=True)
class MaxUnpool(Node):
    """Values go back to where the maxima of the layer named `pool` were; its window and stride are `size`."""

    size: PerAxis
    pool: str

    def output_shape(self, *inputs: Shape) -> Shape:
        channels, *spatial = inputs[0]
        return (channels, *(size * _on(self.size, axis) for axis, size in enumerate(spatial)))

    def window(self, o: int, axis: int, shape: Shape) -> tuple[int, int]:
        return o // _on(self.size, axis), o // _on(self.size, axis)

    def phases(self, axis: int) -> int:
        return _on(self.size, axis)

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        """A function of the input and of the indices of the pooling."""
        return lambda x, indices: fastconv.max_unpool2d(x, indices, self.size)

    def describe(self, ndim: int) -> str:
        return f"max unpool x{_times(_per_axis(self.size, ndim))}"


@dataclass(frozen=True)
class Crop(Node):
    """The middle `size` pixels of the map; of an odd rest the larger half is cut after them."""

    size: PerAxis

    def output_shape(self, *inputs: Shape) -> Shape:
        return (inputs[0][0], *_per_axis(self.size, len(inputs[0]) - 1))

    def window(self, o: int, axis: int, shape: Shape) -> tuple[int, int]:
        position = o + (shape[1 + axis] - _on(self.size, axis)) // 2
        return position, position

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        starts = [self.window(0, axis, shape)[0] for axis in range(len(shape) - 1)]
        sizes = _per_axis(self.size, len(starts))
        middle = tuple(slice(start, start + size) for start, size in zip(starts, sizes))
        return lambda x: x[(slice(None), slice(None), *middle)]


@dataclass(frozen=True)
class Linear(Node):
    """Matrix product with a vector of features, one row of the matrix for each output feature."""

    features: int
    bias: bool = True

    def output_shape(self, *inputs: Shape) -> Shape:
        if len(inputs[0]) != 1:
            raise ConvError(f"linear: input rank must be 1 without the batch, got {len(inputs[0])} {inputs}")
        return (self.features,)

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        weight: dict[str, Shape] = {"weight": (self.features, *shape)}
        return weight | {"bias": (self.features,)} if self.bias else weight

    def macs(self, shape: Shape) -> int:
        return self.features * shape[0]

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        return partial(fastconv.linear, weight=arrays["weight"], bias=arrays.get("bias"))


@dataclass(frozen=True)
class BatchNorm(Node):
    """Batch normalisation per channel (Ioffe and Szegedy 2015) with a trained scale and shift.

    A run takes mean and variance from the buffers, as after training: no sample depends on the others.
    """

    eps: float = 1e-5

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        return {"weight": shape[:1], "bias": shape[:1]}

    def buffers(self, shape: Shape) -> dict[str, Shape]:
        return {"running_mean": shape[:1], "running_var": shape[:1]}

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        return partial(fastconv.batch_norm, **arrays, eps=self.eps)

    def affine(self, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Factor and summand (C,) in float64 that do the same."""
        mean, variance, weight, bias = (
            arrays[name].astype(np.float64) for name in ("running_mean", "running_var", "weight", "bias")
        )
        scale = weight / np.sqrt(variance + self.eps)
        return scale, bias - mean * scale


@dataclass(frozen=True)
class LayerNorm(Node):
    """Normalisation over the channels of each pixel (Ba et al. 2016) with a trained scale and shift."""

    eps: float = 1e-6

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        return {"weight": shape[:1], "bias": shape[:1]}

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        weight, bias = (arrays[name].reshape(-1, *(1,) * (len(shape) - 1)) for name in ("weight", "bias"))

        def normalise(x: Array) -> Array:
            centred = x - x.mean(axis=1, keepdims=True)
            variance = (centred * centred).mean(axis=1, keepdims=True)
            return centred / np.sqrt(variance + self.eps) * weight + bias

        return normalise


@dataclass(frozen=True)
class LayerScale(Node):
    """A trained factor per channel (Touvron et al. 2021)."""

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        return {"layer_scale": (shape[0], 1, 1)}

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        return partial(operator.mul, arrays["layer_scale"])

    def affine(self, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Factor and summand (C,) in float64 that do the same."""
        scale = arrays["layer_scale"].astype(np.float64).ravel()
        return scale, np.zeros_like(scale)


@dataclass(frozen=True)
class LocalResponseNorm(Node):
    """Division by (k + alpha * mean of squares over `size` neighbouring channels) ** beta, as in torch."""

    size: int
    alpha: float
    beta: float
    k: float

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        return lambda x: fastconv.local_response_norm(x, self.size, self.alpha, self.beta, self.k)


@dataclass(frozen=True)
class Activation(Node):
    """Point-wise function by the name that fastconv's epilogue gives it; `slope` is for "leaky_relu"."""

    name: str
    slope: float = 0.0

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        activate = getattr(fastconv, self.name)
        return partial(activate, negative_slope=self.slope) if self.name == "leaky_relu" else activate

    @property
    def epilogue(self) -> str | tuple[str, float]:
        """The argument `activation` of a convolution that does the same."""
        return (self.name, self.slope) if self.name == "leaky_relu" else self.name

    def describe(self, ndim: int) -> str:
        return self.name


@dataclass(frozen=True)
class Dropout(Node):
    """Zeroes features with probability `p` in training; does nothing else, and nothing in a run."""

    p: float = 0.5

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        return lambda x: x


@dataclass(frozen=True)
class Softmax(Node):
    """Softmax over the channels."""

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        return partial(fastconv.softmax, dim=1)


@dataclass(frozen=True)
class Flatten(Node):
    """A map as one vector, channels outermost."""

    def output_shape(self, *inputs: Shape) -> Shape:
        return (math.prod(inputs[0]),)

    def window(self, o: int, axis: int, shape: Shape) -> tuple[int, int]:
        return 0, shape[1 + axis] - 1

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        return partial(fastconv.flatten, start_dim=1)


@dataclass(frozen=True)
class Reshape(Node):
    """A vector as a map of the given shape."""

    shape: Shape

    def output_shape(self, *inputs: Shape) -> Shape:
        if math.prod(self.shape) != math.prod(inputs[0]):
            raise ConvError(f"reshape: elements must be those of {inputs[0]}, got {self.shape}")
        return self.shape

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        return lambda x: x.reshape(-1, *self.shape)


@dataclass(frozen=True)
class Add(Node):
    """Sum of maps of one shape: a residual connection."""

    def output_shape(self, *inputs: Shape) -> Shape:
        if len(set(inputs)) != 1:
            raise ConvError(f"add: input shapes must be equal, got {inputs}")
        return inputs[0]

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        return lambda *inputs: reduce(operator.add, inputs)


@dataclass(frozen=True)
class Concat(Node):
    """Branches side by side, along the channels."""

    def output_shape(self, *inputs: Shape) -> Shape:
        if len({shape[1:] for shape in inputs}) != 1:
            raise ConvError(f"concat: spatial sizes of the inputs must be equal, got {inputs}")
        return (sum(shape[0] for shape in inputs), *inputs[0][1:])

    def bind(self, shape: Shape, arrays: Arrays) -> Run:
        return lambda *inputs: np.concatenate(inputs, axis=1)


def _pair(pad: Pad) -> tuple[int, int]:
    return (pad, pad) if isinstance(pad, int) else pad


def _on(value: PerAxis, axis: int) -> int:
    return value if isinstance(value, int) else value[axis]


def _per_axis(value: PerAxis, ndim: int) -> Shape:
    return tuple(_on(value, axis) for axis in range(ndim))


def _kernel_text(kernel: PerAxis, stride: PerAxis, ndim: int) -> str:
    return _times(_per_axis(kernel, ndim)) + _stride_text(_per_axis(stride, ndim))


def _stride_text(stride: Shape) -> str:
    """Nothing for stride 1, else "/2" or, where the axes differ, "/2x1"."""
    if len(set(stride)) > 1:
        return f"/{_times(stride)}"
    return f"/{stride[0]}" if stride[0] > 1 else ""


def _times(sizes: Shape) -> str:
    return "x".join(map(str, sizes))
