"""Merged layer rows enter, geometric means leave, and whether they reach what the project aims at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from bench.rows import Row, count_in
from bench.timing import geometric_mean
from fastconv.problem import ITEMSIZE, ORDERS

DENSE = ("resnet50", "vgg16")
DEPTHWISE = ("mobilenet_v1", "convnext_t", "replknet_31b")
CHOSEN = ("im2col", "direct", "pointwise")


def _is_any(layer: Row) -> bool:
    return True


def _has_few_channels(layer: Row) -> bool:
    return int(layer["C"]) <= 4


def _is_wide_3x3(layer: Row) -> bool:
    return layer["kernel"] == [3, 3] and int(layer["C"]) >= 64


def _is_depthwise(layer: Row) -> bool:
    return bool(layer["groups"] == layer["C"] > 1)


class Pick(NamedTuple):
    """Which numbers a mean is made of: of these layers, one of fastconv's entries, prepared and unfused.

    where      holds for the layers that count
    algorithm  its entry counts, whether auto chooses it or not; "": that of auto
    chosen     auto's entry counts where it is of one of these; (): everywhere
    column     of the entry: "ratio", to cuDNN with TF32 off, or "copy_share"
    """

    what: str
    networks: Sequence[str]
    batches: Sequence[int] = (1, 32)
    dtype: str = "float32"
    where: Callable[[Row], bool] = _is_any
    algorithm: str = ""
    chosen: Sequence[str] = ()
    column: str = "ratio"


_WINOGRAD = Pick("winograd", ("vgg16",), where=_is_wide_3x3, algorithm="winograd")
_DEPTHWISE = Pick("depthwise", DEPTHWISE, where=_is_depthwise, algorithm="depthwise")
_COPIES = _DEPTHWISE._replace(batches=(32,), column="copy_share")

# Of an H100, for fastconv in each of its memory orders; (pick, the least that its mean is to be)
TARGETS = (
    (Pick(f"{', '.join(CHOSEN)}, where chosen", DENSE, chosen=CHOSEN), 0.8),
    *((Pick(f"{name}, where chosen", DENSE, chosen=(name,)), 0.8) for name in CHOSEN),
    (Pick("first layers, C <= 4", DENSE, where=_has_few_channels), 1.2),
    (_WINOGRAD._replace(what="winograd, vgg16, C >= 64, batch 1", batches=(1,)), 1.0),
    (_WINOGRAD._replace(what="winograd, vgg16, C >= 64, batch 32", batches=(32,)), 1.3),
    (_DEPTHWISE._replace(what="depthwise, float32"), 3.0),
    (_DEPTHWISE._replace(what="depthwise, float16", dtype="float16"), 3.0),
    (_COPIES._replace(what="GB/s over a copy's, mobilenet_v1, batch 32", networks=("mobilenet_v1",)), 0.8),
    (_COPIES._replace(what="GB/s over a copy's, mamba, batch 32", networks=("mamba",)), 0.8),
)


@dataclass(frozen=True)
class Mean:
    """A geometric mean over `layers` layers, each counted as often as its networks have it."""

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
    """The targets and what was reached."""
    return [Target(find_mean(layers, pick, order), least) for order in ORDERS for pick, least in TARGETS]


def find_means(layers: Sequence[Row], networks: Sequence[str]) -> list[Mean]:
    """What auto reaches on each network, per dtype, batch and order."""
    batches = sorted({row["batch"] for row in layers})
    means = [
        find_mean(layers, Pick(f"{network} batch {batch} {dtype}", (network,), (batch,), dtype), order)
        for network in networks
        for dtype in ITEMSIZE
        for batch in batches
        for order in ORDERS
    ]
    return [mean for mean in means if mean.layers]


def find_mean(layers: Sequence[Row], pick: Pick, order: str) -> Mean:
    """The mean of what is picked, for fastconv in one memory order."""
    values, counts = [], []
    for layer in layers:
        entry = _find_entry(layer, pick, order)
        count = sum(count_in(layer, network) for network in pick.networks)
        if entry and pick.column in entry and count:
            values.append(entry[pick.column])
            counts.append(count)
    return Mean(pick.what, order, sum(counts), geometric_mean(values, counts))


def _find_entry(layer: Row, pick: Pick, order: str) -> Row | None:
    if layer["batch"] not in pick.batches or layer["dtype"] != pick.dtype or not pick.where(layer):
        return None
    if pick.algorithm:
        entries = (e for e in find_prepared(layer, order) if e["algorithm"] == pick.algorithm)
        return next(entries, None)
    auto = find_auto(layer, order)
    return auto if auto and (not pick.chosen or auto["algorithm"] in pick.chosen) else None


def find_prepared(layer: Row, order: str) -> list[Row]:
    """fastconv's entries with the weight prepared and nothing fused: one for each algorithm."""
    return [e for e in layer["fastconv"] if e["order"] == order and e["call"] == "prepared"]


def find_auto(layer: Row, order: str, call: str = "prepared") -> Row | None:
    """fastconv's entry for the algorithm that the table chooses."""
    entries = (e for e in layer["fastconv"] if e["order"] == order and e["auto"] and e["call"] == call)
    return next(entries, None)
