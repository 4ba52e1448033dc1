"""A profile enters, tables for a terminal or a log leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from bench import show
from bench.forward.profile import LayerRun, Profile

# Columns that a narrow terminal goes without, the first first; layer, algorithm and time stay.
SPARE = (
    "workspace",
    "live",
    "output size",
    "output",
    "of peak",
    "operation",
    "GFLOP/s",
    "layers",
    "of total",
)


def layer_table(title: str, profile: Profile, peak_gflops: float) -> Table:
    """One line per layer, then their sum, and beside it what whole runs took."""
    headers = ("output", "time", "of total", "GFLOP/s", "of peak", "output size", "live", "workspace")
    table = show.make_table(title, ("layer", "operation", "algorithm"), headers)
    for layer in profile.layers:
        table.add_row(*_layer_cells(layer, profile.layer_seconds, peak_gflops))
    table.add_section()
    table.add_row(*_sum_cells(profile, peak_gflops), style="bold")
    table.add_row(*_whole_cells(profile, peak_gflops), style="bold")
    return table


def _layer_cells(layer: LayerRun, total: float, peak_gflops: float) -> Iterator[str]:
    yield escape(_name(layer))
    yield layer.operation
    yield escape(f"{layer.algorithm} {layer.tile}".strip())
    yield "x".join(map(str, layer.shape))
    yield show.seconds_text(layer.seconds)
    yield f"{layer.seconds / total:.1%}"
    yield from _rates([layer], layer.seconds, peak_gflops)
    yield size_text(layer.output_bytes)
    yield size_text(layer.live_bytes)
    yield size_text(layer.workspace) if layer.workspace else ""


def _name(layer: LayerRun) -> str:
    """The layer's name; of a fused one the first and, without what they share, the last name."""
    if not layer.fused:
        return layer.name
    shared = len(layer.fused[0].rpartition(".")[0])
    is_inside = layer.name.startswith(layer.fused[0][: shared + 1]) and shared
    return f"{layer.fused[0]} .. {layer.name[shared + 1 :] if is_inside else layer.name}"


def _sum_cells(profile: Profile, peak_gflops: float) -> Iterator[str]:
    yield f"sum of {len(profile.layers)} layers"
    yield from ("", "", "")
    yield show.seconds_text(profile.layer_seconds)
    yield f"{1:.1%}"
    yield from _rates(profile.layers, profile.layer_seconds, peak_gflops)
    yield ""
    yield size_text(max(layer.live_bytes for layer in profile.layers))
    yield size_text(max(layer.workspace for layer in profile.layers))


def _whole_cells(profile: Profile, peak_gflops: float) -> Iterator[str]:
    yield "a whole run"
    yield from ("", "", "")
    yield show.seconds_text(profile.seconds)
    yield ""
    yield from _rates(profile.layers, profile.seconds, peak_gflops)


def kind_table(profile: Profile, peak_gflops: float) -> Table:
    """One line per kind of layer, the one that takes longest first."""
    headers = ("layers", "time", "of total", "GFLOP/s", "of peak")
    table = show.make_table("time by kind of layer", ("kind",), headers)
    for kind, layers in profile.by_kind().items():
        seconds = sum(layer.seconds for layer in layers)
        cells = (str(len(layers)), show.seconds_text(seconds), f"{seconds / profile.layer_seconds:.1%}")
        table.add_row(kind, *cells, *_rates(layers, seconds, peak_gflops))
    return table


def _rates(layers: Sequence[LayerRun], seconds: float, peak_gflops: float) -> tuple[str, str]:
    """GFLOP/s and share of the peak; nothing where no operation is counted."""
    flops = sum(layer.flops for layer in layers)
    if not flops:
        return "", ""
    rate = flops / seconds / 1e9
    return f"{rate:.1f}", f"{rate / peak_gflops:.0%}"


def size_text(count: int) -> str:
    """Bytes in the unit that suits them.

    >>> size_text(3_211_264)
    '3.21 MB'
    """
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, size = next((pair for pair in units if count >= pair[1]), ("B", 1))
    return f"{count / size:.3g} {unit}"
