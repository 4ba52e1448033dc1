"""Merged layer rows enter, geometric means leave, and whether they reach what the project aims at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from bench.rows import Row, count_in
from bench.timing import geometric_mean
from fastconv.problem import ORDERS

NETWORKS = ("resnet50", "vgg16")
BATCHES = (1, 32)
CHOSEN = ("im2col", "direct", "pointwise")
LEAST, LEAST_FIRST = 0.8, 1.2
FEW_CHANNELS = 4

Picks = Callable[[Row, Row], bool]  # (layer, entry of fastconv)


@dataclass(frozen=True)
class Mean:
    """A geometric mean of ratios over `layers` layers, each counted as often as its networks have it."""

    what: str
    order: str
    layers: int
    ratio: float


@dataclass(frozen=True)
class Target:
    """A mean and the least that it is to be."""

    mean: Mean
    least: float

    @property
    def verdict(self) -> str:
        """In a word; nothing measured is neither met nor missed."""
        if not self.mean.layers:
            return "not measured"
        return "met" if self.mean.ratio >= self.least else "MISSED"

    def as_row(self) -> Row:
        """For the file of results, where NaN is no number."""
        row = asdict(self.mean)
        row["ratio"] = None if math.isnan(self.mean.ratio) else round(self.mean.ratio, 3)
        return {**row, "least": self.least, "verdict": self.verdict}


def find_targets(layers: Sequence[Row]) -> list[Target]:
    """The targets of an H100, for fastconv in each of its memory orders."""
    named = [((name,), f"{name}, where chosen") for name in CHOSEN]
    groups = [(CHOSEN, f"{', '.join(CHOSEN)}, where chosen"), *named]
    found = []
    for order in ORDERS:
        for names, what in groups:
            mean = mean_ratio(layers, what, order, NETWORKS, BATCHES, _is_one_of(names))
            found.append(Target(mean, LEAST))
        what = f"first layers, C <= {FEW_CHANNELS}"
        mean = mean_ratio(layers, what, order, NETWORKS, BATCHES, _has_few_channels)
        found.append(Target(mean, LEAST_FIRST))
    return found


def find_means(layers: Sequence[Row], networks: Sequence[str]) -> list[Mean]:
    """What auto reaches on each network, per batch and order."""
    batches = sorted({row["batch"] for row in layers})
    means = [
        mean_ratio(layers, f"{network} batch {batch}", order, (network,), (batch,), lambda layer, entry: True)
        for network in networks
        for batch in batches
        for order in ORDERS
    ]
    return [mean for mean in means if mean.layers]


def mean_ratio(
    layers: Sequence[Row],
    what: str,
    order: str,
    networks: Sequence[str],
    batches: Sequence[int],
    picks: Picks,
) -> Mean:
    """The mean of `ratio` (TF32 off) over the layers whose auto entry, prepared and unfused, is picked."""
    ratios, counts = [], []
    for layer in layers:
        entry = find_auto(layer, order)
        count = sum(count_in(layer, network) for network in networks)
        if entry and "ratio" in entry and count and layer["batch"] in batches and picks(layer, entry):
            ratios.append(entry["ratio"])
            counts.append(count)
    return Mean(what, order, sum(counts), geometric_mean(ratios, counts))


def find_auto(layer: Row, order: str, call: str = "prepared") -> Row | None:
    """fastconv's entry for the algorithm that the table chooses."""
    entries = (e for e in layer["fastconv"] if e["order"] == order and e["auto"] and e["call"] == call)
    return next(entries, None)


def _is_one_of(names: Sequence[str]) -> Picks:
    return lambda layer, entry: entry["algorithm"] in names


def _has_few_channels(layer: Row, entry: Row) -> bool:
    return int(layer["C"]) <= FEW_CHANNELS
