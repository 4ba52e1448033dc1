"""THE ONE MODULE TO SWAP: stand-ins for passes that fastconv will have, until it has them.

Names, order and meaning are those of fastconv and fastconv.grad; to swap, delete this module and import from
fastconv instead: `from fastconv import conv1d, ..., grad` in layers.py and loop.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastconv import conv1d as conv1d
from fastconv import conv2d as conv2d
from fastconv import reference


def relu(input: np.ndarray) -> np.ndarray:
    return np.maximum(input, 0)


def linear(input: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return input @ weight.T + bias


def max_pool2d(input: np.ndarray, kernel_size: int, *, return_indices: bool) -> tuple[np.ndarray, np.ndarray]:
    windows = _windows(input, kernel_size)
    offset = windows.argmax(axis=-1)
    rows, columns = np.indices(offset.shape[2:]) * kernel_size
    indices = (rows + offset // kernel_size) * input.shape[3] + columns + offset % kernel_size
    return windows.max(axis=-1), indices


def _windows(input: np.ndarray, size: int) -> np.ndarray:
    n, c, h, w = input.shape
    split = input.reshape(n, c, h // size, size, w // size, size)
    return np.moveaxis(split, 3, 4).reshape(n, c, h // size, w // size, size * size)


def cross_entropy(input: np.ndarray, target: np.ndarray) -> np.floating:
    return -np.log(_softmax(input)[np.arange(len(target)), target]).mean()


def _softmax(input: np.ndarray) -> np.ndarray:
    powers = np.exp(input - input.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


class grad:
    """Stands for the module fastconv.grad."""

    @staticmethod
    def conv1d_input(
        input_size: Sequence[int], weight: np.ndarray, grad_output: np.ndarray, *geometry: Any
    ) -> np.ndarray:
        return reference.conv1d_input(input_size, weight, grad_output, *geometry).astype(weight.dtype)

    @staticmethod
    def conv1d_weight(
        input: np.ndarray, weight_size: Sequence[int], grad_output: np.ndarray, *geometry: Any
    ) -> np.ndarray:
        return reference.conv1d_weight(input, weight_size, grad_output, *geometry).astype(input.dtype)

    @staticmethod
    def conv2d_input(
        input_size: Sequence[int], weight: np.ndarray, grad_output: np.ndarray, *geometry: Any
    ) -> np.ndarray:
        return reference.conv2d_input(input_size, weight, grad_output, *geometry).astype(weight.dtype)

    @staticmethod
    def conv2d_weight(
        input: np.ndarray, weight_size: Sequence[int], grad_output: np.ndarray, *geometry: Any
    ) -> np.ndarray:
        return reference.conv2d_weight(input, weight_size, grad_output, *geometry).astype(input.dtype)

    @staticmethod
    def relu_input(input: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
        return grad_output * (input > 0)

    @staticmethod
    def linear_input(weight: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
        return grad_output @ weight

    @staticmethod
    def linear_weight(input: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
        return grad_output.T @ input

    @staticmethod
    def linear_bias(grad_output: np.ndarray) -> np.ndarray:
        return grad_output.sum(axis=0)

    @staticmethod
    def max_pool2d_input(
        input_size: Sequence[int], indices: np.ndarray, grad_output: np.ndarray, kernel_size: int
    ) -> np.ndarray:
        n, c, h, w = input_size
        gradient = np.zeros((n, c, h * w), grad_output.dtype)
        np.put_along_axis(gradient, indices.reshape(n, c, -1), grad_output.reshape(n, c, -1), axis=2)
        return gradient.reshape(n, c, h, w)

    @staticmethod
    def cross_entropy_input(input: np.ndarray, target: np.ndarray) -> np.ndarray:
        gradient = _softmax(input)
        gradient[np.arange(len(target)), target] -= 1
        return gradient / input.dtype.type(len(target))
