"""A node of a network, its inputs and arrays enter; what torch makes of them in float64 leaves, and a bound.

Written from torch.nn.functional alone, so that a node that fastconv computes wrongly is judged by another
library, and one whose options are passed wrongly by another reading of them.
"""

import numpy as np

from bench.networks.nodes import (
    Activation,
    AdaptivePool,
    Add,
    BatchNorm,
    Concat,
    Conv,
    Crop,
    Dropout,
    Flatten,
    LayerNorm,
    LayerScale,
    Linear,
    LocalResponseNorm,
    MaxUnpool,
    Pool,
    Reshape,
    Softmax,
)

EPS = float(np.finfo(np.float32).eps)


def compute(torch, node, inputs, arrays):
    """The output of a node, for inputs (N, ...) and arrays by PyTorch's names; all are float64 tensors."""
    F, x, ndim = torch.nn.functional, inputs[0], inputs[0].ndim - 2
    match node:
        case Conv():
            return _convolve(torch, node, x, arrays, ndim)
        case Pool(mode="max", return_indices=True):
            return F.max_pool2d(x, node.kernel, node.stride, node.padding, return_indices=True)
        case Pool():
            pool = getattr(F, f"{node.mode}_pool{ndim}d")
            return pool(x, node.kernel, node.stride, node.padding, ceil_mode=node.ceil_mode)
        case AdaptivePool():
            return getattr(F, f"adaptive_avg_pool{ndim}d")(x, node.size)
        case MaxUnpool():
            return F.max_unpool2d(x, inputs[1], node.size)
        case Crop():
            starts = [(size - node.size) // 2 for size in x.shape[2:]]
            return x[(..., *(slice(start, start + node.size) for start in starts))]
        case Linear():
            return F.linear(x, arrays["weight"], arrays.get("bias"))
        case BatchNorm():
            return F.batch_norm(x, **arrays, training=False, eps=node.eps)
        case LayerNorm():
            last = F.layer_norm(x.movedim(1, -1), x.shape[1:2], arrays["weight"], arrays["bias"], node.eps)
            return last.movedim(-1, 1)
        case LayerScale():
            return arrays["layer_scale"] * x
        case LocalResponseNorm():
            return F.local_response_norm(x, node.size, node.alpha, node.beta, node.k)
        case Activation(name="leaky_relu"):
            return F.leaky_relu(x, node.slope)
        case Activation():
            return getattr(F, node.name)(x) if node.name != "tanh" else torch.tanh(x)
        case Dropout():
            return F.dropout(x, node.p, training=False)
        case Softmax():
            return F.softmax(x, 1)
        case Flatten():
            return torch.flatten(x, 1)
        case Reshape():
            return x.view(x.shape[0], *node.shape)
        case Add():
            return torch.stack(tuple(inputs)).sum(0)
        case Concat():
            return torch.cat(tuple(inputs), 1)
    raise NotImplementedError(node)


def _convolve(torch, node, x, arrays, ndim):
    F, options = torch.nn.functional, {"stride": node.stride, "dilation": node.dilation}
    if (
        ndim == 2 and node.groups > 1 and not node.transposed
    ):  # in float64 torch would take the groups one after the other
        return _convolve_groups(torch, node, x, arrays, options)
    convolve, padding = getattr(F, f"conv{'_transpose' * node.transposed}{ndim}d"), node.padding
    options["groups"] = node.groups
    if isinstance(padding, tuple) and isinstance(padding[0], tuple):  # torch's operations pad alike
        x, padding = F.pad(x, sum(reversed(padding), ())), 0
    return convolve(x, arrays["weight"], arrays.get("bias"), padding=padding, **options)


def _convolve_groups(torch, node, x, arrays, options):
    """A matrix product for each group: its filters with the windows of its channels."""
    weight, kernel = arrays["weight"], (node.kernel, node.kernel)
    windows = torch.nn.functional.unfold(x, kernel, padding=node.padding, **options)
    windows = windows.reshape(len(x), node.groups, -1, windows.shape[-1])
    result = weight.reshape(node.groups, node.channels // node.groups, -1) @ windows
    result = result.reshape(len(x), node.channels, *node.output_shape(x.shape[1:])[1:])
    return result if "bias" not in arrays else result + arrays["bias"].reshape(-1, 1, 1)


def bound(torch, node, inputs, arrays, expected, algorithm=None):
    """How far each element of a float32 result may be from `expected`, by what is rounded on the way.

    Sums are bounded by the same sum of absolute values, for which float32 will do; for a convolution times
    the factor of `algorithm`, the ErrorBound of the algorithm that computed it.
    """
    x = inputs[0]
    match node:
        case Conv():
            (x,) = _abs([x])
            if reach := algorithm.reach:
                x = torch.nn.functional.max_pool2d(x, 2 * reach + 1, 1, reach)
            return algorithm.factor * EPS * compute(torch, node, [x], _abs(arrays))
        case Linear() | Add() | LayerScale() | AdaptivePool() | Pool(mode="avg"):
            terms = x.shape[1] if isinstance(node, Linear) else x[0, 0].numel()
            return max(4, terms**0.5) * EPS * compute(torch, node, _abs(inputs), _abs(arrays))
        case BatchNorm():
            arrays = _abs(arrays)
            scale = compute(torch, node, _abs(inputs), {**arrays, "running_mean": -arrays["running_mean"]})
            return 4 * EPS * scale
        case LayerNorm():
            deviation = (x.var(1, unbiased=False, keepdim=True) + node.eps).sqrt()
            spread = x.abs().mean(1, keepdim=True) / deviation
            shape = (-1, *(1,) * (x.ndim - 2))
            weight = arrays["weight"].abs().reshape(shape)
            return 16 * EPS * (expected.abs() + weight * spread + arrays["bias"].abs().reshape(shape))
        case LocalResponseNorm() | Softmax() | Activation(name="tanh" | "silu"):
            return 16 * EPS * expected.abs() + 1e-37
        case Activation(name="gelu"):  # its erf is near -1 for negative x, and 1 is added to it
            return 8 * EPS * (expected.abs() + x.abs())
        case Activation(name="leaky_relu"):
            return EPS * expected.abs()
    return torch.zeros_like(expected)  # what is moved, chosen or cut off is exact


def _abs(tensors):
    if isinstance(tensors, dict):
        return {name: tensor.float().abs() for name, tensor in tensors.items()}
    return [tensor.float().abs() for tensor in tensors]
