"""A file of results enters; how far times are from estimates leaves, and what to change."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.gpu import results
from bench.gpu.choice import Choose, find_distances
from bench.gpu.table import distance_table, format_table
from bench.gpu.targets import find_prepared
from bench.rows import Row, algorithms_of, of_kind, read
from bench.summary import by_layer
from bench.timing import geometric_mean
from fastconv.problem import ORDERS


class Fit(NamedTuple):
    """Median time over estimate of an algorithm's entries: geometric mean, 10th and 90th percentile."""

    algorithm: str
    entries: int
    mean: float
    low: float
    high: float


def run_fit(path: Path) -> int:
    """Print the fit of a file; 2 if it holds nothing to fit."""
    try:
        layers = read_layers(path)
    except (OSError, ValueError) as error:
        print(f"python -m bench fit: {error}", file=sys.stderr)
        return 2
    advise = advise_cpu if path.suffix == ".jsonl" else advise_gpu
    print("\n".join([*report_fit(layers), advise(find_fits(layers))]))
    return 0


def read_layers(path: Path) -> list[Row]:
    """The layer rows that `gpu` has written, or `layers`, all with estimates."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    return _read_rows(path) if path.suffix == ".jsonl" else _read_results(path)


def _read_rows(path: Path) -> list[Row]:
    """The rows of the last run of `layers`, in the form of a GPU's: all algorithms of a layer in one."""
    rows = of_kind(read(path), "layer")
    rows = [row for row in rows if row["run"] == rows[-1]["run"]]
    if any("estimate" not in row for row in rows) or not rows:
        raise ValueError(f"{path}: its last run has no estimates; python -m bench layers writes them")
    return [
        {**group[0], "fastconv": [{**row, "call": "prepared"} for row in group]} for group in by_layer(rows)
    ]


def _read_results(path: Path) -> list[Row]:
    """The layer rows of the part `bench`."""
    bench = results.read(path, gpu="").get("parts", {}).get("bench")
    if bench is None:
        raise ValueError(f'{path}: it has no part "bench"; make gpu PART=bench adds it')
    layers = of_kind(bench["rows"], "layer")
    entries = _prepared(layers)
    if not entries or any("estimate" not in entry for entry in entries):
        raise ValueError(f'{path}: its part "bench" has no estimates; make gpu PART=bench measures it again')
    return layers


def _prepared(layers: Sequence[Row]) -> list[Row]:
    return [entry for layer in layers for order in ORDERS for entry in find_prepared(layer, order)]


def find_fits(layers: Sequence[Row]) -> list[Fit]:
    """A fit per algorithm, in the order of the table."""
    entries = _prepared(layers)
    ratios: dict[str, list[float]] = defaultdict(list)
    for entry in entries:
        ratios[entry["algorithm"]].append(entry["median"] / entry["estimate"])
    return [_fit(name, sorted(ratios[name])) for name in algorithms_of(entries)]


def _fit(name: str, ratios: Sequence[float]) -> Fit:
    low, high = (ratios[math.ceil(tenths * len(ratios) / 10) - 1] for tenths in (1, 9))
    return Fit(name, len(ratios), geometric_mean(ratios), low, high)


def choose_by(fits: Sequence[Fit]) -> Choose:
    """What auto would choose if every estimate were multiplied by its algorithm's mean."""
    means = {fit.algorithm: fit.mean for fit in fits}

    def choose(entries: Sequence[Row]) -> Row | None:
        return min(entries, key=lambda each: float(each["estimate"] * means[each["algorithm"]]), default=None)

    return choose


def report_fit(layers: Sequence[Row]) -> list[str]:
    """The lines to print."""
    fits = find_fits(layers)
    lines = [
        [fit.algorithm, str(fit.entries), *(f"{ratio:.2f}" for ratio in (fit.mean, fit.low, fit.high))]
        for fit in fits
    ]
    return [
        format_table(["measured over estimated", "entries", "mean", "10 %", "90 %"], lines), "",
        distance_table("auto over the fastest, as it is", find_distances(layers)), "",
        distance_table("with estimates times their means", find_distances(layers, choose_by(fits))), "",
    ]  # fmt: skip


def advise_gpu(fits: Sequence[Fit]) -> str:
    """What to change so that estimates are right."""
    where = ", ".join(f"in fastconv/gpu/{fit.algorithm}.py by {fit.mean:.2f}" for fit in fits)
    return (
        f"To fit the estimates, divide EFFICIENCY and the constants whose names end so {where}; "
        "what memory or launches bound does not change."
    )


def advise_cpu(fits: Sequence[Fit]) -> str:
    """What to change so that estimates stand in the right relation: the clock is nominal."""
    common = geometric_mean([fit.mean for fit in fits])
    where = ", ".join(f"of fastconv/cpu/{fit.algorithm}.py by {fit.mean / common:.2f}" for fit in fits)
    return (
        f"To fit the estimates to each other, multiply the cycles {where}. "
        f"All are off by {common:.2f}, which changes no choice: the clock is nominal."
    )
