"""A network and the outputs of layers enter; what of it can be looked at leaves, as arrays in 0 ... 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bench.networks import Layer, Network
from bench.networks.nodes import AdaptivePool, Conv, Dropout, Flatten, Linear
from bench.session import CommandError
from fastconv import interpolate

MOST = 64  # maps or filters in a picture
COLUMNS = 8
PANELS = 5


class Head(NamedTuple):
    """The end of a network that averages maps, and weighs the averages for each class."""

    maps: str
    linear: Layer


def find_head(network: Network) -> Head | None:
    """The end of a network if it is global average pooling and one linear layer, else None."""
    layers = [layer for layer in network.layers if not isinstance(layer.node, Dropout)]
    kinds = tuple(type(layer.node) for layer in layers[-3:])
    if kinds != (AdaptivePool, Flatten, Linear):
        return None
    pool = layers[-3]
    is_global = network.shapes[pool.name][1:] == (1,) * (len(network.input_shape) - 1)
    return Head(pool.inputs[0], layers[-1]) if is_global else None


def map_class(maps: np.ndarray, weight: np.ndarray, chosen: int) -> np.ndarray:
    """The class-activation map (H, W) of maps (C, H, W): their sum, weighed as the class weighs their means.

    Zhou et al. 2016, "Learning deep features for discriminative localization" (arXiv 1512.04150). Its mean is
    the score of the class, but for the bias.
    """
    return np.tensordot(weight[chosen], maps, axes=1)


def spread(activation: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """A map as large as the picture, in 0 ... 1, smooth between the pixels that it has."""
    return stretch(interpolate(activation[None, None], tuple(size), mode="bilinear")[0, 0])


def find_filters(network: Network, weights: Mapping[str, np.ndarray]) -> tuple[str, np.ndarray]:
    """Name and weight (K, C // groups, ...) of the first convolution."""
    first = next(layer for layer in network.layers if isinstance(layer.node, Conv))
    return first.name, weights[f"{first.name}.weight"]


def paint_filters(weight: np.ndarray) -> np.ndarray:
    """Filters (K, C, R, S) side by side: in colours where C = 3, else their first channel in grey.

    Each goes from 0 to 1 by itself. Those of a 1-D convolution are the rows of one image.
    """
    filters = weight[:MOST] if weight.shape[1] == 3 else weight[:MOST, :1]
    images = np.moveaxis(stretch(filters, batched=True), 1, -1)  # (K, R, S, C)
    return images[..., 0] if weight.ndim == 3 else tile(images)


def paint_maps(maps: np.ndarray) -> np.ndarray:
    """The first maps of (C, H, W) side by side, each from 0 to 1; those of a signal (C, L) as rows."""
    images = stretch(maps[:MOST], batched=True)
    return images if maps.ndim == 2 else tile(images[..., None])


def stretch(values: np.ndarray, batched: bool = False) -> np.ndarray:
    """Values moved and scaled to 0 ... 1, as a whole or each of a batch; what is constant becomes 0."""
    axes = tuple(range(1 if batched else 0, values.ndim))
    low, high = values.min(axes, keepdims=True), values.max(axes, keepdims=True)
    return (values - low) / np.where(high > low, high - low, 1)


def tile(images: np.ndarray) -> np.ndarray:
    """Images (K, H, W, C) in rows of 8 with white between them, as one image (rows, columns, C)."""
    count, height, width, channels = images.shape
    gap = max(1, height // 16)
    rows = -(-count // COLUMNS)
    columns = min(count, COLUMNS)
    canvas = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), images.dtype)
    for index, image in enumerate(images):
        top, left = (index // COLUMNS) * (height + gap), (index % COLUMNS) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def choose_layers(network: Network, names: Sequence[str]) -> list[str]:
    """The named layers, which must have maps; if none is named, some from the first map to the last.

    Those are the last layers of their map size, as a block's output is.
    """
    mapped = [layer.name for layer in network.layers if len(network.shapes[layer.name]) > 1]
    if not names:
        last = {network.shapes[name][1:]: name for name in mapped if max(network.shapes[name][1:]) > 1}
        found = list(last.values())
        chosen = np.linspace(0, len(found) - 1, min(PANELS, len(found))).round().astype(int)
        return [found[index] for index in chosen]
    if unknown := [name for name in names if name not in network.shapes]:
        listed = f"`python -m bench networks {network.name}` lists them"
        raise CommandError(
            f"--layers must be of the layers of {network.name} ({listed}), got {', '.join(unknown)}"
        )
    if flat := [name for name in names if name not in mapped]:
        raise CommandError(f"--layers must be of layers whose output is a map, got {', '.join(flat)}")
    return list(dict.fromkeys(names))
