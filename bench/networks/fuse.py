"""A network with its arrays enters; one leaves whose convolutions do what followed them point by point.

    conv -> batch norm -> add -> relu        becomes   conv' with bias, residual and activation
                           |                             |
                        shortcut                      shortcut

A factor and a summand per channel go into weight and bias; the sum with another map and the activation go
into the convolution's epilogue, which works on the output while it is in cache. Every layer that stays has
the same output as before, but for rounding, and a fused one has name and output of the last that it replaces.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from bench.networks.network import Layer, Network
from bench.networks.nodes import Activation, Add, BatchNorm, Conv, LayerScale

Weights = dict[str, np.ndarray]


def fuse(
    network: Network, weights: Mapping[str, np.ndarray], keep: Collection[str] = ()
) -> tuple[Network, Weights]:
    """The fused network and its arrays; layers named in `keep` keep an output of their own.

    >>> from bench.networks import draw_weights, get_network
    >>> net = get_network("resnet18")
    >>> fused, _ = fuse(net, draw_weights(net))
    >>> len(net.layers), len(fused.layers)
    (69, 24)
    """
    readers: dict[str, list[Layer]] = {}
    for layer in network.layers:
        for name in layer.reads:
            readers.setdefault(name, []).append(layer)
    chains: dict[str, _Chain] = {}  # by the last layer of each: all that it reads is computed by then
    replaced: set[str] = set()
    for layer in network.layers:
        if isinstance(layer.node, Conv):
            chain = _Chain(layer, layer.node, _take(layer.name, weights))
            while (following := readers.get(chain.layer.name, [])) and chain.layer.name not in keep:
                if (
                    len(following) > 1
                    or following[0].name in replaced
                    or not chain.join(following[0], weights)
                ):
                    break
                replaced.add(following[0].name)
            replaced.add(layer.name)
            chains[chain.layer.name] = chain
    kept = [layer for layer in network.layers if layer.name in chains or layer.name not in replaced]
    layers = tuple(chains[layer.name].layer if layer.name in chains else layer for layer in kept)
    arrays = {
        f"{layer.name}.{name}": array
        for layer in layers
        for name, array in (
            chains[layer.name].arrays if layer.name in chains else _take(layer.name, weights)
        ).items()
    }
    return replace(network, layers=layers), arrays


def _take(layer: str, weights: Mapping[str, np.ndarray]) -> Weights:
    """The arrays of one layer by their own names."""
    prefix = f"{layer}."
    return {
        name.removeprefix(prefix): array
        for name, array in weights.items()
        if name.startswith(prefix) and "." not in name.removeprefix(prefix)
    }


@dataclass
class _Chain:
    """A convolution that takes in one layer after the other."""

    layer: Layer
    node: Conv
    arrays: Weights

    def join(self, following: Layer, weights: Mapping[str, np.ndarray]) -> bool:
        """Take in the layer that reads this output; False, and nothing is changed, if that is impossible."""
        node, inputs = self.node, self.layer.inputs
        is_plain = not node.residual and node.activation is None
        if isinstance(following.node, BatchNorm | LayerScale):
            if not is_plain or (node.transposed and node.groups > 1):
                return False
            self._scale(*following.node.affine(_take(following.name, weights)))
            node = replace(node, bias=True)
        elif isinstance(following.node, Add) and is_plain and len(following.inputs) == 2:
            inputs += tuple(name for name in following.inputs if name != self.layer.name)
            node = replace(node, residual=True)
        elif isinstance(following.node, Activation) and node.activation is None:
            node = replace(node, activation=following.node)
        else:
            return False
        fused = (*(self.layer.fused or (self.layer.name,)), following.name)
        self.node, self.layer = node, Layer(following.name, node, inputs, fused)
        return True

    def _scale(self, scale: np.ndarray, shift: np.ndarray) -> None:
        """Put a factor and a summand (K,) for every output channel into weight and bias."""
        weight, bias = self.arrays["weight"], self.arrays.get("bias", 0)
        channels = 1 if self.node.transposed else 0
        along = [-1 if axis == channels else 1 for axis in range(weight.ndim)]
        self.arrays = {
            "weight": (weight * scale.reshape(along)).astype(weight.dtype),
            "bias": (bias * scale + shift).astype(weight.dtype),
        }
