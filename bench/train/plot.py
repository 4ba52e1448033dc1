"""Curves of learning enter, a figure leaves as SVG text."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.plots import PALETTE, STYLE, to_svg
from bench.train.loop import Curve
from bench.train.recipes import Trained

GREY, TEST, TRAINING = PALETTE[:3]
PANEL = 4.4, 3.6  # inches


def draw_curves(trained: Sequence[Trained]) -> str:
    """A panel for each network: training and test error over the epochs, the last of each in figures."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PANEL[0] * len(trained), PANEL[1]), layout="constrained")
        panels = figure.subplots(1, len(trained), sharey=True, squeeze=False)[0]
        for axis, each in zip(panels, trained):
            axis.set_title(f"{each.name}: {each.parameters:,} parameters", fontsize=10)
            axis.set_xlabel("epoch")
            _draw_errors(axis, each.curves.epochs, each.curves.training, TRAINING, "training")
            _draw_errors(axis, each.curves.epochs, each.curves.test, TEST, "test")
            if each.published is not None and not each.is_short:
                label = f"published test error, {100 * each.published:.0f} %"
                axis.axhline(100 * each.published, color=GREY, linestyle="--", linewidth=1, label=label)
            axis.legend(frameon=False, loc="upper right")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_ylabel("error (%)")
        panels[0].set_ylim(0, 105)  # guessing, with which every curve begins, belongs to it
        return to_svg(figure)


def _draw_errors(axis: Axes, epochs: Sequence[int], curve: Curve, colour: str, label: str) -> None:
    errors = [100 * error for error in curve.error]
    axis.plot(epochs, errors, color=colour, linewidth=1.3, label=f"{label}, {errors[-1]:.1f} % in the end")
