"""Filters, maps and pictures enter, figures leave."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.forward.maps import MOST, paint_filters, paint_maps

PANEL = 4.4  # inches
PER_ROW = 3
OVERLAY = 0.55  # opacity of a class-activation map over the picture


def draw_filters(title: str, weight: np.ndarray) -> Figure:
    """The filters (K, C, ...) of a first layer."""
    figure = Figure(figsize=(PANEL, PANEL + 0.3), layout="constrained")
    shown = f"{_count(len(weight), 'filters')} of {_times(weight.shape[2:])}"
    _draw(figure.subplots(), f"{title}: {shown}", paint_filters(weight), weight.ndim == 3)
    return figure


def draw_features(title: str, maps: Mapping[str, np.ndarray]) -> Figure:
    """A panel for each layer: the first of its maps (C, H, W), or (C, L) as rows."""
    columns = min(PER_ROW, len(maps))
    rows = -(-len(maps) // PER_ROW)
    figure = Figure(figsize=(PANEL * columns, (PANEL + 0.3) * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=12)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (name, each) in zip(panels, maps.items()):
        shown = f"{_count(len(each), 'maps')} of {_times(each.shape[1:])}"
        _draw(axis, f"{name}: {shown}", paint_maps(each), each.ndim == 2)
    for axis in panels[len(maps) :]:
        axis.set_axis_off()
    return figure


def draw_class(title: str, image: np.ndarray, activation: np.ndarray) -> Figure:
    """The picture, and over it in colours a map of the same size in 0 ... 1."""
    figure = Figure(figsize=(2 * PANEL, PANEL + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axis in (left_right := figure.subplots(1, 2)):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set_axis_off()
    left_right[1].imshow(activation, cmap="inferno", alpha=OVERLAY)
    return figure


def _draw(axis: Axes, title: str, image: np.ndarray, is_signal: bool) -> None:
    axis.imshow(
        image, cmap="gray", interpolation="nearest", vmin=0, vmax=1, aspect="auto" if is_signal else None
    )
    axis.set_title(title, fontsize=10)
    axis.set_axis_off()


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count <= MOST else f"{MOST} of {count} {what}"


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
