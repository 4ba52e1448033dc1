"""Rows enter, figures leave as SVG text: nothing is fetched when they are shown."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.rows import Row, algorithms_of, gflops, layer_name, share_of_peak, speedups

# Okabe and Ito's colours, which remain distinct without red-green vision.
PALETTE = ("#7d8794", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
WON, LOST = "#0072b2", "#d55e00"
WIDTH = 12  # inches: that of the page
BAR = 0.15  # inches per bar
WRONG = {True: "", False: " wrong"}  # behind the number of a result that failed its check
LABEL: dict[str, Any] = {"fontsize": 6.5, "color": "#444", "padding": 2}
STYLE: Any = {
    "font.size": 9, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e3e6ea", "axes.edgecolor": "#aab0b8",
    "svg.fonttype": "none", "svg.hashsalt": "fastconv",
}  # fmt: skip

Colours = Mapping[str, str]


def colours(rows: Iterable[Row]) -> Colours:
    """One colour per algorithm."""
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(algorithms_of(rows))}


def to_svg(figure: Figure) -> str:
    """The figure as an <svg> element without prologue."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def draw_network(rows: Sequence[Row], network: str, palette: Colours) -> str:
    """Two panels of bars per layer and algorithm: speed-up over direct, and share of the measured peak."""
    ratio = speedups(rows)
    speedup = [ratio.get((row["key"], row["algorithm"]), np.nan) for row in rows]
    share = [100 * share_of_peak(row, row["median"]) for row in rows]
    heights, ticks = _place_bars(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.2 + BAR * heights[-1]), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_bars(left, rows, heights, speedup, palette)
        _draw_bars(right, rows, heights, share, palette)
        names = {row["key"]: layer_name(row, network) for row in rows}
        left.set_yticks(list(ticks.values()), [names[key] for key in ticks])
        left.set_ylim(heights[-1] + 1, heights[0] - 1)
        left.set_xlabel("speed-up over direct")
        right.set_xlabel("share of the measured peak (%)")
        _mark(left, 1)
        _mark(right, 100)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=7, frameon=False)
        return to_svg(figure)


def _place_bars(rows: Sequence[Row]) -> tuple[list[float], dict[str, float]]:
    """The height of each row's bar, from the top with a gap between layers, and of each layer's label."""
    heights: list[float] = []
    for before, row in zip([None, *rows], rows):
        step = 1 if before is None or before["key"] == row["key"] else 2
        heights.append(step + (heights[-1] if heights else 0))
    ticks = {
        key: float(np.mean([height for height, row in zip(heights, rows) if row["key"] == key]))
        for key in dict.fromkeys(row["key"] for row in rows)
    }
    return heights, ticks


def _draw_bars(
    axis: Axes, rows: Sequence[Row], heights: Sequence[float], values: Sequence[float], palette: Colours
) -> None:
    for name, colour in palette.items():
        mine = [index for index, row in enumerate(rows) if row["algorithm"] == name]
        if mine:
            bars = axis.barh(
                [heights[i] for i in mine], [values[i] for i in mine], 0.9, color=colour, label=name
            )
            axis.bar_label(bars, [_short(values[i]) + WRONG[rows[i]["passed"]] for i in mine], **LABEL)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)


def _short(value: float) -> str:
    """Two decimals below 10, none above."""
    if np.isnan(value):
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _mark(axis: Axes, value: float) -> None:
    """A line behind the bars."""
    axis.axvline(value, color="#333", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.9)


def draw_roofline(rows: Sequence[Row], palette: Colours) -> str:
    """Rate over arithmetic intensity: a point per layer and algorithm under the measured roofs.

    Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model".
    """
    peak, speed = rows[0]["peak_gflops"], rows[0]["bandwidth_gbs"]
    intensities = [row["flops"] / row["bytes"] for row in rows]
    reach = np.geomspace(min(intensities) / 1.5, max(intensities) * 1.5, 200)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
        axis = figure.subplots()
        axis.loglog(reach, np.minimum(peak, speed * reach), color="#333", linewidth=1.4)
        _name_roofs(axis, peak, speed, reach)
        for name, colour in palette.items():
            mine = [i for i, row in enumerate(rows) if row["algorithm"] == name]
            rates = [gflops(rows[i], rows[i]["median"]) for i in mine]
            places = [intensities[i] for i in mine]
            axis.scatter(places, rates, 26, colour, alpha=0.8, edgecolor="white", linewidth=0.5, label=name)
        axis.set_xlabel("arithmetic intensity: FLOP of the direct sum per byte of input, weight and output")
        axis.set_ylabel("GFLOP/s")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.legend(frameon=False, loc="lower right")
        return to_svg(figure)


def _name_roofs(axis: Axes, peak: float, speed: float, reach: np.ndarray) -> None:
    above: dict[str, Any] = {"textcoords": "offset points", "xytext": (0, 4)}
    axis.annotate(f"multiply-add peak {peak:.0f} GFLOP/s", (reach[-1], peak), ha="right", **above)
    below_ridge = (reach[0] * min(peak / speed, reach[-1])) ** 0.5
    text = f"copy {speed:.1f} GB/s  "
    axis.annotate(text, (below_ridge, speed * below_ridge), ha="right", **above)


def draw_comparison(rows: Sequence[Row], network: str) -> str:
    """A bar per layer: the baseline's median time over ours; losses are bars on the left of the line at 1."""
    ratios = [row["baseline_median"] / row["median"] for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.22 * len(rows)), layout="constrained")
        axis = figure.subplots()
        colour = [WON if ratio >= 1 else LOST for ratio in ratios]
        bars = axis.barh(range(len(rows)), [ratio - 1 for ratio in ratios], left=1, color=colour)
        axis.bar_label(bars, [_short(ratio) for ratio in ratios], **LABEL)
        axis.set_yticks(range(len(rows)), [layer_name(row, network) for row in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xscale("log", base=2)  # so that twice as fast and half as fast are equally long
        axis.set_xlim(min(0.8, *ratios) / 1.15, max(1.25, *ratios) * 1.15)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel(f"time of {rows[0]['baseline']} over time of fastconv")
        axis.grid(axis="y", visible=False)
        _mark(axis, 1)
        return to_svg(figure)
