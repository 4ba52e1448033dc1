"""Filters, maps and pictures enter, figures leave."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.forward.maps import MOST, paint_filters, paint_maps

PANEL = 4.4  # inches
TITLE = 0.35
PER_ROW = 3
OVERLAY = 0.5, 0.9  # opacity of a class-activation map over the picture: where it is coldest, hottest
ROW = 0.07  # inches of a row of a signal's maps, of which a panel has at least MIN_ROWS
MIN_ROWS, LABELS = 24, 0.5


def draw_filters(title: str, weight: np.ndarray) -> Figure:
    """The filters (K, C, ...) of a first layer."""
    image, is_signal = paint_filters(weight), weight.ndim == 3
    figure = Figure(figsize=(PANEL, _height(image, is_signal) + TITLE), layout="constrained")
    shown = f"{_count(len(weight), 'filters')} of {_times(weight.shape[2:])}"
    _draw(figure.subplots(), f"{title}: {shown}", image, ("position", "filter") if is_signal else None)
    return figure


def draw_features(title: str, maps: Mapping[str, np.ndarray]) -> Figure:
    """A panel for each layer: the first of its maps (C, H, W), or (C, L) as rows."""
    rows = -(-len(maps) // PER_ROW)
    columns = -(-len(maps) // rows)
    images = {name: paint_maps(each) for name, each in maps.items()}
    heights = [_height(images[name], each.ndim == 2) + TITLE for name, each in maps.items()]
    ratios = [max(heights[columns * row : columns * (row + 1)]) for row in range(rows)]
    figure = Figure(figsize=(PANEL * columns, sum(ratios) + TITLE), layout="constrained")
    figure.suptitle(title, fontsize=12)
    panels = list(figure.subplots(rows, columns, squeeze=False, height_ratios=ratios).flat)
    for axis, (name, each) in zip(panels, maps.items()):
        shown = f"{_count(len(each), 'maps')} of {_times(each.shape[1:])}"
        _draw(axis, f"{name}: {shown}", images[name], ("position", "channel") if each.ndim == 2 else None)
    for axis in panels[len(maps) :]:
        axis.set_axis_off()
    return figure


def draw_class(title: str, image: np.ndarray, activation: np.ndarray) -> Figure:
    """The picture, and over it, in grey, in colours a map of the same size in 0 ... 1, with their scale."""
    figure = Figure(figsize=(2 * PANEL + 0.8, PANEL + TITLE), layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2)
    left.imshow(image, cmap="gray", vmin=0, vmax=1)
    right.imshow(image if image.ndim == 2 else image.mean(axis=-1), cmap="gray", vmin=0, vmax=1)
    low, high = OVERLAY
    right.imshow(activation, cmap="inferno", alpha=low + (high - low) * activation, vmin=0, vmax=1)
    opaque = ScalarMappable(Normalize(0, 1), "inferno")
    scale = figure.colorbar(opaque, ax=right, ticks=[0, 1], fraction=0.05)
    scale.ax.set_yticklabels(["least", "most"])
    for axis in (left, right):
        axis.set_axis_off()
    return figure


def _height(image: np.ndarray, is_signal: bool) -> float:
    """Inches of a panel that the image fills."""
    if is_signal:
        return ROW * max(MIN_ROWS, len(image)) + LABELS
    return PANEL * image.shape[0] / image.shape[1]


def _draw(axis: Axes, title: str, image: np.ndarray, labels: tuple[str, str] | None) -> None:
    """An image in a panel; labels are those of the axes of a signal."""
    axis.imshow(
        image, cmap="gray", interpolation="nearest", vmin=0, vmax=1, aspect="auto" if labels else None
    )
    axis.set_title(title, fontsize=10)
    if labels is None:
        axis.set_axis_off()
        return
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_locator(MaxNLocator(6, integer=True))


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count <= MOST else f"{MOST} of {count} {what}"


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
