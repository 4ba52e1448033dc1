"""A random generator enters, a network with fresh weights leaves."""

from __future__ import annotations

import numpy as np

from bench.train.layers import Conv1d, Conv2d, Flatten, Layer, Linear, MaxPool2d, Network, ReLU


def make_convolutional(rng: np.random.Generator) -> Network:
    """The 2,050 parameters of Prince 2023, "Understanding deep learning", section 10.2.7."""
    return Network([
        Conv1d(1, 15, 3, rng, stride=2), ReLU(),  # 40 points -> 19
        Conv1d(15, 15, 3, rng, stride=2), ReLU(),  # -> 9
        Conv1d(15, 15, 3, rng, stride=2), ReLU(),  # -> 4
        Flatten(),
        Linear(15 * 4, 10, rng),
    ])  # fmt: skip


def make_fully_connected(rng: np.random.Generator) -> Network:
    """The same section's net for comparison: as many hidden units in each layer, all connected."""
    return Network([
        Flatten(),
        Linear(40, 15 * 19, rng), ReLU(),
        Linear(15 * 19, 15 * 9, rng), ReLU(),
        Linear(15 * 9, 15 * 4, rng), ReLU(),
        Linear(15 * 4, 10, rng),
    ])  # fmt: skip


def make_lenet_stages(rng: np.random.Generator) -> tuple[list[Layer], list[Layer]]:
    """Images (N, 1, 8, 8) -> features (N, 64, 2, 2), in two stages of convolution and pooling.

    In the manner of LeCun, Bottou, Bengio and Haffner 1998, "Gradient-based learning applied to document
    recognition", for images of 8 x 8 pixels and with today's ReLU and max pooling.
    """
    first: list[Layer] = [Conv2d(1, 32, 3, rng, padding=1), ReLU(), MaxPool2d(2)]  # 8 x 8 pixels -> 4 x 4
    last: list[Layer] = [Conv2d(32, 64, 3, rng, padding=1), ReLU(), MaxPool2d(2)]  # -> 2 x 2
    return first, last


def make_lenet_head(classes: int, rng: np.random.Generator) -> list[Layer]:
    """Features (N, 64, 2, 2) -> a score for each class."""
    return [Flatten(), Linear(64 * 2 * 2, 64, rng), ReLU(), Linear(64, classes, rng)]
