"""A batch enters a layer and its output leaves; backwards, the gradient of the loss enters and leaves.

`forward(input)` remembers what `backward(grad_output)` needs. That one takes the gradient with respect to the
layer's output, leaves the gradients of the layer's own parameters with them, and returns the gradient with
respect to its input, which is the grad_output of the layer before: the chain rule, a link at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fastconv import conv1d, conv2d, grad, linear, max_pool2d, relu


class Parameter:
    """Numbers that are learned, and the gradient of the loss with respect to them."""

    def __init__(self, value: np.ndarray):
        self.value = value
        self.gradient = np.zeros_like(value)


class Layer:
    """What all layers share; most have nothing to learn."""

    def parameters(self) -> list[Parameter]:
        return []

    def forward(self, input: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def backward(self, grad_output: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class Weighted(Layer):
    """A layer with a weight (outputs, inputs, ...) and a bias (outputs,)."""

    def __init__(self, shape: Sequence[int], rng: np.random.Generator):
        """Draw weights whose outputs vary as much as their inputs do, behind a ReLU; biases are 0.

        He, Zhang, Ren and Sun 2015, "Delving deep into rectifiers" (arXiv 1502.01852).
        """
        deviation = math.sqrt(2 / math.prod(shape[1:]))
        self.weight = Parameter(rng.normal(0, deviation, shape).astype(np.float32))
        self.bias = Parameter(np.zeros(shape[0], np.float32))

    def parameters(self) -> list[Parameter]:
        return [self.weight, self.bias]


class Conv1d(Weighted):
    """(N, C, W) -> (N, K, Q): K filters that slide over C channels."""

    def __init__(
        self, C: int, K: int, S: int, rng: np.random.Generator, *, stride: int = 1, padding: int = 0
    ):
        super().__init__((K, C, S), rng)
        self.geometry = stride, padding

    def forward(self, input: np.ndarray) -> np.ndarray:
        self.input = input
        return conv1d(input, self.weight.value, self.bias.value, *self.geometry)

    def backward(self, grad_output: np.ndarray) -> np.ndarray:
        weight = self.weight.value
        self.weight.gradient = grad.conv1d_weight(self.input, weight.shape, grad_output, *self.geometry)
        self.bias.gradient = grad.conv1d_bias(grad_output)
        return grad.conv1d_input(self.input.shape, weight, grad_output, *self.geometry)


class Conv2d(Weighted):
    """(N, C, H, W) -> (N, K, P, Q): Conv1d with a row more, and square filters."""

    def __init__(
        self, C: int, K: int, S: int, rng: np.random.Generator, *, stride: int = 1, padding: int = 0
    ):
        super().__init__((K, C, S, S), rng)
        self.geometry = stride, padding

    def forward(self, input: np.ndarray) -> np.ndarray:
        self.input = input
        return conv2d(input, self.weight.value, self.bias.value, *self.geometry)

    def backward(self, grad_output: np.ndarray) -> np.ndarray:
        weight = self.weight.value
        self.weight.gradient = grad.conv2d_weight(self.input, weight.shape, grad_output, *self.geometry)
        self.bias.gradient = grad.conv2d_bias(grad_output)
        return grad.conv2d_input(self.input.shape, weight, grad_output, *self.geometry)


class Linear(Weighted):
    """(N, C) -> (N, K): every output sees every input."""

    def __init__(self, C: int, K: int, rng: np.random.Generator):
        super().__init__((K, C), rng)

    def forward(self, input: np.ndarray) -> np.ndarray:
        self.input = input
        return linear(input, self.weight.value, self.bias.value)

    def backward(self, grad_output: np.ndarray) -> np.ndarray:
        self.weight.gradient = grad.linear_weight(self.input, grad_output)
        self.bias.gradient = grad.linear_bias(grad_output)
        return grad.linear_input(self.weight.value, grad_output)


class ReLU(Layer):
    """max(x, 0), element by element."""

    def forward(self, input: np.ndarray) -> np.ndarray:
        self.input = input
        return relu(input)

    def backward(self, grad_output: np.ndarray) -> np.ndarray:
        return grad.relu_input(self.input, grad_output)


class MaxPool2d(Layer):
    """(N, C, H, W) -> (N, C, H / size, W / size): the largest of each size x size pixels."""

    def __init__(self, size: int):
        self.size = size

    def forward(self, input: np.ndarray) -> np.ndarray:
        self.shape = input.shape
        output, self.indices = max_pool2d(input, self.size, return_indices=True)
        return output

    def backward(self, grad_output: np.ndarray) -> np.ndarray:
        return grad.max_pool2d_input(self.shape, self.indices, grad_output, self.size)


class Flatten(Layer):
    """(N, C, ...) -> (N, features)."""

    def forward(self, input: np.ndarray) -> np.ndarray:
        self.shape = input.shape
        return input.reshape(len(input), -1)

    def backward(self, grad_output: np.ndarray) -> np.ndarray:
        return grad_output.reshape(self.shape)


class Network(Layer):
    """Layers one after the other, forwards and backwards."""

    def __init__(self, layers: Sequence[Layer]):
        self.layers = layers

    def parameters(self) -> list[Parameter]:
        return [parameter for layer in self.layers for parameter in layer.parameters()]

    def count_parameters(self) -> int:
        """How many numbers are learned."""
        return sum(parameter.value.size for parameter in self.parameters())

    def forward(self, input: np.ndarray) -> np.ndarray:
        for layer in self.layers:
            input = layer.forward(input)
        return input

    def backward(self, grad_output: np.ndarray) -> np.ndarray:
        for layer in reversed(self.layers):
            grad_output = layer.backward(grad_output)
        return grad_output
