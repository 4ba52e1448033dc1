"""Merged layer rows enter; how far auto's choice is from the fastest algorithm leaves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.gpu.targets import find_prepared
from bench.rows import Row
from bench.timing import geometric_mean
from fastconv.problem import ITEMSIZE, ORDERS

AIM = 1.05  # for the mean

Choose = Callable[[Sequence[Row]], Row | None]  # one of an order's entries, with the weight prepared


@dataclass(frozen=True)
class Distance:
    """The chosen algorithm's median time over the fastest one's: 1 where the fastest is chosen.

    choices    layers, in each of fastconv's memory orders
    mean       geometric; a layer counts once, however often a network has it
    where      the layer of the worst, what is chosen there and what is fastest
    """

    batch: int
    dtype: str
    choices: int
    mean: float
    worst: float
    where: str


def chosen_by_auto(entries: Sequence[Row]) -> Row | None:
    """The entry of the algorithm that the table chooses; None if it was not reached."""
    return next((entry for entry in entries if entry["auto"]), None)


def find_distances(layers: Sequence[Row], choose: Choose = chosen_by_auto) -> list[Distance]:
    """The distances, small batches first."""
    groups: dict[tuple[str, int], list[tuple[float, str]]] = defaultdict(list)
    for layer in layers:
        for order in ORDERS:
            entries = find_prepared(layer, order)
            chosen = choose(entries)
            if chosen:
                fastest = min(entries, key=lambda entry: float(entry["median"]))
                names = f"{chosen['algorithm']}, not {fastest['algorithm']}"
                where = f"{layer['network']} {layer['layer']} {order}: {names}"
                groups[layer["dtype"], layer["batch"]].append((chosen["median"] / fastest["median"], where))
    found = []
    for dtype, batch in sorted(groups, key=lambda group: (list(ITEMSIZE).index(group[0]), group[1])):
        ratios = [ratio for ratio, _ in groups[dtype, batch]]
        worst, where = max(groups[dtype, batch])
        where = where if worst > 1 else ""
        found.append(Distance(batch, dtype, len(ratios), geometric_mean(ratios), worst, where))
    return found
