"""Rows enter, the few numbers that sum them up leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from bench.rows import Row, algorithms_of, count_in, gflops, of_kind, share_of_peak, speedups
from bench.timing import geometric_mean


@dataclass(frozen=True)
class AlgorithmSummary:
    """One algorithm over all layers: how many it ran, refused and won, and how it did there."""

    name: str
    layers: int
    refused: int
    fastest: int
    speedup: float
    best_gflops: float
    best_share: float
    worst_error: float


def sum_up_algorithms(rows: Sequence[Row]) -> list[AlgorithmSummary]:
    """One summary per algorithm that ran."""
    layers, refusals = of_kind(rows, "layer"), of_kind(rows, "refusal")
    ratio = speedups(layers)
    winners = [fastest(group) for group in by_layer(layers)]
    summaries = []
    for name in algorithms_of(layers):
        mine = [row for row in layers if row["algorithm"] == name]
        summaries.append(
            AlgorithmSummary(
                name=name,
                layers=len(mine),
                refused=sum(row["algorithm"] == name for row in refusals),
                fastest=sum(row["algorithm"] == name for row in winners),
                speedup=geometric_mean(value for (_, of), value in ratio.items() if of == name),
                best_gflops=max(gflops(row, row["median"]) for row in mine),
                best_share=max(share_of_peak(row, row["median"]) for row in mine),
                worst_error=max(row["error"] for row in mine),
            )
        )
    return summaries


def by_layer(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each distinct problem together."""
    return [list(group) for _, group in groupby(sorted(rows, key=_key), key=_key)]


def _key(row: Row) -> str:
    return str(row["key"])


def fastest(rows: Iterable[Row]) -> Row:
    """The row with the least median time; a wrong result wins against nothing but wrong ones."""
    return min(rows, key=lambda row: (not row["passed"], float(row["median"])))


def auto_share(rows: Iterable[Row]) -> float:
    """Geometric mean of the best algorithm's time over that of the one `auto` takes: 1 is perfect."""
    return geometric_mean(_over_layers(rows, lambda row: bool(row["auto"])))


def best_over_direct(rows: Iterable[Row]) -> float:
    """Geometric mean of the speed-up of each layer's fastest algorithm over direct."""
    shares = _over_layers(rows, lambda row: row["algorithm"] == "direct")
    return geometric_mean(1 / share for share in shares)


def _over_layers(rows: Iterable[Row], picks: Callable[[Row], bool]) -> list[float]:
    """Per layer, the best time over the time of the row that is picked, where there is one."""
    shares = []
    for group in by_layer(rows):
        picked = [row for row in group if picks(row)]
        if picked:
            shares.append(fastest(group)["median"] / picked[0]["median"])
    return shares


@dataclass(frozen=True)
class Comparison:
    """A network against the baseline: its time over ours, so that more than 1 means fastconv is faster."""

    network: str
    layers: int
    ratio_min: float
    ratio_median: float
    lost: int
    seconds: float
    baseline_seconds: float


def compare_network(rows: Sequence[Row], network: str) -> Comparison:
    """Geometric means over the convolutions of a network, each counted as often as it occurs."""
    mine = [row for row in rows if count_in(row, network)]
    counts = [count_in(row, network) for row in mine]
    return Comparison(
        network=network,
        layers=sum(counts),
        ratio_min=geometric_mean((row["baseline_min"] / row["min"] for row in mine), counts),
        ratio_median=geometric_mean((row["baseline_median"] / row["median"] for row in mine), counts),
        lost=sum(count for row, count in zip(mine, counts) if row["baseline_median"] < row["median"]),
        seconds=sum(count * row["median"] for row, count in zip(mine, counts)),
        baseline_seconds=sum(count * row["baseline_median"] for row, count in zip(mine, counts)),
    )
