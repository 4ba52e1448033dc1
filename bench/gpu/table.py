"""Rows enter, plain text leaves: the machine that runs this may have no package that draws tables."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from bench.gpu.choice import AIM, Distance
from bench.gpu.results import best_cudnn
from bench.gpu.targets import Mean, Target, find_auto
from bench.rows import Row, layer_name, networks_of, of_kind
from fastconv.algorithms import TABLE
from fastconv.problem import ITEMSIZE, ORDERS

LEGEND = """\
Ratios are cuDNN's median time over fastconv's, more than 1 means that fastconv is faster: against the faster
of cuDNN's two memory orders ("in") with TF32 off. Below an algorithm's name stands its ratio, with a star if
the table chooses it; tile, us, GFLOP/s and GB/s are that one's, with its weight prepared. plain: auto, the
weight prepared in every call. fused: auto with bias and ReLU, against the faster of cuDNN's two ways. TF32:
against cuDNN with TF32 on. Medians of CUDA events, with a cold L2. The means of a network are over those of
its layers that were timed."""

_SHOWN = 12  # failures and reasons of a kind that are printed in full


def format_table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as their widest cell, the first `left` ones flush left, the others flush right.

    >>> print(format_table(["name", "n"], [["a", "10"]]))
    name   n
    a     10
    """
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in (header, *lines)
    )


def layer_table(layers: Sequence[Row]) -> str:
    """One line per layer, batch and order of fastconv's arrays; a shared layer under its first network."""
    present = {entry["algorithm"] for layer in layers for entry in layer["fastconv"]}
    names = [name for name in TABLE if name in present]
    header = ["layer", "tile", "batch", "dtype", "order", *names, "us", "GFLOP/s", "GB/s", "cuDNN us", "in"]
    lines = []
    networks = networks_of(layers)
    dtypes = list(ITEMSIZE)

    def place(row: Row) -> tuple[int, int, int]:
        return networks.index(row["network"]), dtypes.index(row["dtype"]), int(row["batch"])

    for layer in sorted(layers, key=place):
        name = f"{layer['network']} {layer_name(layer, layer['network'])}"
        lines += [_cells(layer, name, order, names) for order in ORDERS if find_auto(layer, order)]
    return format_table([*header, "plain", "fused", "TF32"], lines, left=2)


def _cells(layer: Row, name: str, order: str, names: Sequence[str]) -> list[str]:
    auto = find_auto(layer, order) or {}
    prepared = {
        entry["algorithm"]: entry
        for entry in layer["fastconv"]
        if entry["order"] == order and entry["call"] == "prepared"
    }
    cudnn = best_cudnn(layer, tf32=False, fused=False)
    ratios = [_ratio(prepared.get(each)) + "*" * (each == auto["algorithm"]) for each in names]
    return [
        name, f"{auto['algorithm']} {auto['tile']}", str(layer["batch"]), layer["dtype"], order, *ratios,
        f"{auto['median'] * 1e6:.1f}", f"{auto['gflops']:.0f}", f"{auto['gbs']:.0f}",
        f"{cudnn['median'] * 1e6:.1f}" if cudnn else "-", cudnn["order"] if cudnn else "-",
        _ratio(find_auto(layer, order, "plain")),
        _ratio(find_auto(layer, order, "prepared + bias + relu")), _ratio(auto, "ratio_tf32"),
    ]  # fmt: skip


def _ratio(entry: Row | None, name: str = "ratio") -> str:
    return f"{entry[name]:.2f}" if entry and name in entry else "-"


def mean_table(means: Sequence[Mean]) -> str:
    """The means of auto, a line each."""
    lines = [[mean.what, mean.order, str(mean.layers), _number(mean.ratio)] for mean in means]
    return format_table(["geometric mean of auto", "order", "layers", "ratio"], lines)


def target_table(targets: Sequence[Target], gpu: str) -> str:
    """The targets, a line each."""
    title = "target" if "H100" in gpu else "target (stated for an H100)"
    lines = [
        [each.mean.what, each.mean.order, str(each.mean.layers), f">= {each.least}",
         _number(each.mean.ratio), each.verdict]
        for each in targets
    ]  # fmt: skip
    return format_table([title, "order", "layers", "least", "ratio", ""], lines)


def distance_table(title: str, distances: Sequence[Distance]) -> str:
    """How far a choice is from the fastest algorithm, a line per batch and dtype."""
    lines = [
        [f"batch {each.batch} {each.dtype}", each.where, str(each.choices), f"{each.mean:.3f}",
         f"<= {AIM}", f"{each.worst:.2f}"]
        for each in distances
    ]  # fmt: skip
    return format_table([title, "worst at", "choices", "mean", "aim", "worst"], lines, left=2)


def _number(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{ratio:.2f}"


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """What a part found: what passed in a few lines, then every failure, then what was left out."""
    return [*_compiled(rows), *_tests(rows), *_checked(rows), *_repeated(rows), *_sanitized(rows),
            *_copied(rows), *_failures(rows), *_left_out(rows)]  # fmt: skip


def _compiled(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row['algorithm']}: {row['kernels']} kernels compiled, at most {row['registers']} registers"
        + (f", {len(row['spilled'])} use local memory" if row["spilled"] else "")
        for row in of_kind(rows, "compiled")
    ]


def _tests(rows: Sequence[Row]) -> list[str]:
    return [f"{row['command']}: {row['summary']}" for row in of_kind(rows, "tests")]


def _checked(rows: Sequence[Row]) -> list[str]:
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in of_kind(rows, "checked"):
        groups[row["algorithm"], row["against"]].append(row)
    return [
        f"{name}: {sum(row['results'] for row in group)} results of {len(group)} layers against {against}, "
        f"worst error {max(row['error'] for row in group):.3g} of its bound"
        for (name, against), group in groups.items()
    ]


def _repeated(rows: Sequence[Row]) -> list[str]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in of_kind(rows, "repeated"):
        groups[row["algorithm"]].append(row)
    return [
        f"{name}: {len(group)} plans, {sum(row['runs'] for row in group)} runs, "
        f"{sum(row['differing'] for row in group)} differ from the first of their plan"
        for name, group in groups.items()
    ]


def _sanitized(rows: Sequence[Row]) -> list[str]:
    return [f"{row['tool']}: {row['plans']} plans, {row['summary']}" for row in of_kind(rows, "sanitized")]


def _copied(rows: Sequence[Row]) -> list[str]:
    return [f"copy of {row['bytes'] >> 20} MiB: {row['gbs']:.0f} GB/s" for row in of_kind(rows, "copy")]


def _failures(rows: Sequence[Row]) -> list[str]:
    failed = [row for row in rows if row["kind"] == "failure" or not row.get("passed", True)]
    lines = []
    for row in failed[:_SHOWN]:
        columns = ("kind", "network", "layer", "key", "algorithm", "tile", "tool")
        what = " ".join(str(row[name]) for name in columns if name in row)
        lines.append(f"FAILED {what}: {row['reason']}")
    return lines + [f"FAILED: {len(failed) - _SHOWN} more"] * (len(failed) > _SHOWN)


def _left_out(rows: Sequence[Row]) -> list[str]:
    """Each reason with the number of layers that it holds for."""
    left_out = of_kind(rows, "left_out")
    counts = Counter(row["reason"] for row in left_out)
    layers: dict[str, list[str]] = defaultdict(list)
    for row in left_out:
        if "layer" in row:
            batch = f" batch {row['batch']}" if "batch" in row else ""
            layers[row["reason"]].append(f"{row['network']} {row['layer']}{batch}")
    lines = []
    for reason, count in counts.items():
        lines.append(f"left out: {reason}" + (f" ({count} layers)" if layers[reason] else ""))
        if layers[reason]:
            lines.append("  " + ", ".join(layers[reason]))
    return lines
