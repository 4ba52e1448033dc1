"""A network and its arrays enter; a Model leaves, which runs the network on NumPy's or CuPy's arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from time import perf_counter
from typing import NamedTuple

from bench.networks.network import INDICES, INPUT, Layer, Network
from bench.networks.nodes import Array
from fastconv.problem import ConvError


class Step(NamedTuple):
    """One layer that has just run.

    seconds  of the layer's call; on a GPU until its work is enqueued
    live     bytes of all arrays that are kept at this moment, these inputs and this output among them
    """

    layer: Layer
    inputs: tuple[Array, ...]
    output: Array
    seconds: float
    live: int


Watch = Callable[[Step], object]


class Model:
    """A network with its arrays, packed once for all runs.

    >>> import numpy as np
    >>> from bench.networks import draw_weights, get_network
    >>> net = get_network("lenet5")
    >>> Model(net, draw_weights(net)).run(np.zeros((2, 1, 32, 32), np.float32)).shape
    (2, 10)
    """

    def __init__(self, network: Network, weights: Mapping[str, Array]) -> None:
        """Take the arrays by the names of Network.arrays; further ones are left alone."""
        self.network = network
        self._runs = []
        for layer in network.layers:
            node, shape = layer.node, network.shapes[layer.inputs[0]]
            names = {**node.parameters(shape), **node.buffers(shape)}
            self._runs.append(node.bind(shape, {name: weights[f"{layer.name}.{name}"] for name in names}))
        last_reader = {name: index for index, layer in enumerate(network.layers) for name in layer.reads}
        self._done: list[list[str]] = [[] for _ in network.layers]
        for name, index in last_reader.items():
            self._done[index].append(name)

    def run(self, x: Array, watch: Watch | None = None) -> Array:
        """The output for a batch (N, *input_shape); `watch` is called after every layer.

        The output of a layer is freed as soon as no later layer reads it, unless `watch` has kept it.
        """
        if tuple(x.shape[1:]) != self.network.input_shape:
            wanted = ", ".join(map(str, self.network.input_shape))
            raise ConvError(f"{self.network.name}: input.shape must be (N, {wanted}), got {tuple(x.shape)}")
        values, output = {INPUT: x}, x
        for layer, run, done in zip(self.network.layers, self._runs, self._done):
            start = perf_counter()
            output = run(*(values[name] for name in layer.reads))
            seconds = perf_counter() - start
            if isinstance(output, tuple):
                output, values[layer.name + INDICES] = output
            values[layer.name] = output
            if watch is not None:
                inputs = tuple(values[name] for name in layer.inputs)
                watch(Step(layer, inputs, output, seconds, count_bytes(values.values())))
                del inputs  # or they would live as long as the next layer runs
            for name in done:
                del values[name]
        return output


def count_bytes(arrays: Iterable[Array]) -> int:
    """Bytes of the memory that arrays lie in: a view takes none of its own."""
    owners = map(_find_owner, arrays)
    return sum({id(owner): owner.nbytes for owner in owners}.values())


def _find_owner(array: Array) -> Array:
    while hasattr(getattr(array, "base", None), "nbytes"):
        array = array.base
    return array
