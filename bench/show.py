"""Rows enter, text for a terminal or a log leaves. What failed is red, and repeated at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.rows import (
    Row,
    bandwidth,
    count_in,
    gflops,
    layer_name,
    networks_of,
    of_kind,
    share_of_peak,
    speedups,
)
from bench.summary import compare_network

LOG_WIDTH = 160  # columns of a file or a pipe, which have none of their own


def make_console() -> Console:
    """A console that wraps no table when it writes to a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=LOG_WIDTH)


def make_progress(console: Console) -> Progress:
    """A progress bar with the name of what is running."""
    columns = (TextColumn("{task.description:36.36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def seconds_text(seconds: float) -> str:
    """Seconds in the unit that suits them.

    >>> seconds_text(0.0001234)
    '123 us'
    """
    unit, size = next(pair for pair in (("s", 1), ("ms", 1e-3), ("us", 0)) if seconds >= pair[1])
    return f"{seconds / (size or 1e-6):.3g} {unit}"


def machine_text(row: Row) -> str:
    """The machine of a row in one line."""
    changes = " with uncommitted changes" if row["dirty"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return (
        f"{row['cpu']} ({row['vector_bits']}-bit vectors), {row['cores']} cores; threads: {row['threads']}, "
        f"{row['peak_gflops']:.0f} GFLOP/s peak, {row['bandwidth_gbs']:.1f} GB/s copy; {row['system']}; "
        f"Python {row['python']}, {versions}; commit {row['commit']}{changes}"
    )


def layer_table(network: str, rows: Sequence[Row]) -> Table:
    """One line per layer and algorithm; a star marks the algorithm that `auto` takes."""
    headers = ("median", "GFLOP/s", "GB/s", "of peak", "over direct", "error/bound")
    table = make_table(network, ("layer", "algorithm", "tile"), headers)
    ratio, previous = speedups(rows), ""
    for row in rows:
        name = "" if row["key"] == previous else layer_name(row, network)
        previous = row["key"]
        speedup = ratio.get((row["key"], row["algorithm"]))
        style = None if row["passed"] else "bold red"
        table.add_row(escape(name), *_layer_cells(row, speedup), style=style)
    return table


def _layer_cells(row: Row, speedup: float | None) -> Iterator[str]:
    seconds = row["median"]
    yield row["algorithm"] + ("*" if row["auto"] else "")
    yield escape(row["tile"])
    yield seconds_text(seconds)
    yield f"{gflops(row, seconds):.1f}"
    yield f"{bandwidth(row, seconds):.1f}"
    yield f"{share_of_peak(row, seconds):.0%}"
    yield "-" if speedup is None else f"{speedup:.2f}"
    yield f"{row['error']:.2g}" + ("" if row["passed"] else " FAILED")


def print_comparison(console: Console, rows: Sequence[Row]) -> None:
    """A table per network, then the networks' means; a layer that is slower than the baseline's is red."""
    if not rows:
        return
    baseline = rows[0]["baseline"]
    headers = ("fastconv", baseline, "order", "min ratio", "ratio", "GFLOP/s", "of peak")
    for network in networks_of(rows):
        table = make_table(network, ("layer", "algorithm", "tile"), headers)
        for row in rows:
            if count_in(row, network):
                lost = row["baseline_median"] < row["median"]
                table.add_row(*_compare_cells(row, network), style="red" if lost else None)
        console.print(table)
    console.print(_means_table(rows, baseline))
    console.print(
        f"ratio: {baseline}'s median time over fastconv's, more than 1 means that fastconv is faster; "
        f"min ratio: of the minima. order: the memory order in which {baseline} was faster."
    )
    for conditions in dict.fromkeys(row["conditions"] for row in rows):
        console.print(conditions, markup=False)


def _compare_cells(row: Row, network: str) -> Iterator[str]:
    yield escape(layer_name(row, network))
    yield row["algorithm"] + (f" (asked-for one: {row['refusal']})" if row["refusal"] else "")
    yield escape(row["tile"])
    yield seconds_text(row["median"])
    yield seconds_text(row["baseline_median"])
    yield row["baseline_order"]
    yield f"{row['baseline_min'] / row['min']:.2f}"
    yield f"{row['baseline_median'] / row['median']:.2f}"
    yield f"{gflops(row, row['median']):.1f}"
    yield f"{share_of_peak(row, row['median']):.0%}"


def _means_table(rows: Sequence[Row], baseline: str) -> Table:
    headers = ("layers", "lost", "min ratio", "ratio", "fastconv", baseline)
    table = make_table("geometric means, each layer as often as it occurs", ("network",), headers)
    for network in networks_of(rows):
        each = compare_network(rows, network)
        table.add_row(
            each.network,
            str(each.layers),
            str(each.lost),
            f"{each.ratio_min:.2f}",
            f"{each.ratio_median:.2f}",
            seconds_text(each.seconds),
            seconds_text(each.baseline_seconds),
        )
    return table


def make_table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table that folds the cells of its widest column where a line is too short, and cuts none."""
    table = _make_empty(title)
    for header in texts:
        table.add_column(header, overflow="fold")
    for header in numbers:
        table.add_column(header, justify="right", overflow="fold")
    return table


def _make_empty(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def print_table(console: Console, table: Table, spare: Sequence[str]) -> None:
    """Print a table whole; on a terminal too narrow for it without columns, which the line below names.

    spare  headers of those that may go, the first to go first
    """
    fitting, dropped = _fit(console, table, spare) if console.is_terminal else (table, [])
    console.print(fitting)
    if dropped:
        console.print(f"no room for: {', '.join(dropped)} (a wider terminal or a pipe shows them)\n")


def _fit(console: Console, table: Table, spare: Sequence[str]) -> tuple[Table, list[str]]:
    """The table without as many of the spare columns as it needs to fit, and the headers of those."""
    unbounded = console.options.update(max_width=10_000)
    dropped: list[str] = []
    for header in spare:
        if Measurement.get(console, unbounded, table).maximum <= console.width:
            break
        if any(column.header == header for column in table.columns):
            table = _drop(table, header)
            dropped.append(header)
    for column in table.columns:
        column.no_wrap, column.overflow = True, "ellipsis"  # what is too wide even so is cut, not folded
    return table, dropped


def _drop(table: Table, header: str) -> Table:
    """The same table without a column."""
    kept = [column for column in table.columns if column.header != header]
    smaller = _make_empty(str(table.title))
    for column in kept:
        smaller.add_column(column.header, justify=column.justify, overflow=column.overflow)
    for row, cells in zip(table.rows, zip(*(column.cells for column in kept))):
        smaller.add_row(*cells, style=row.style, end_section=row.end_section)
    return smaller


def print_outcome(console: Console, rows: Sequence[Row]) -> None:
    """What was left out, what failed, and the counts."""
    for reason, missing in group_left_out(rows).items():
        console.print(f"left out, {len(missing)} layers: {reason}", style="yellow", markup=False)
        for text in layers_by_network(missing):
            console.print(f"  {text}", style="yellow", markup=False)
    failed = failures(rows)
    for row in failed:
        what = row.get("filter") or f"{row['network']} {row['layer']} {row['key']}"
        text = f"FAILED {what} {row['algorithm']} {row['tile']}: {row['reason']}"
        console.print(text, style="bold red", markup=False)
    if any(row["kind"] == "layer" for row in rows):
        console.print("*: the algorithm that auto takes; error/bound: at most 1 passes", markup=False)
    checked, refusals = sum("passed" in row for row in rows), len(of_kind(rows, "refusal"))
    console.print(
        f"{checked} results checked against the reference, {len(failed)} failed; "
        f"{refusals} times an algorithm does not apply",
        style="bold red" if failed else "bold green",
    )


def failures(rows: Iterable[Row]) -> list[Row]:
    """The rows whose check failed."""
    return [row for row in rows if not row.get("passed", True)]


def group_left_out(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The left_out rows by their reason."""
    groups: dict[str, list[Row]] = {}
    for row in of_kind(rows, "left_out"):
        groups.setdefault(row["reason"], []).append(row)
    return groups


def layers_by_network(rows: Iterable[Row]) -> list[str]:
    """The layers of the rows in words, a text for each network."""
    groups = groupby(rows, key=lambda row: row["network"])
    return [f"{network}: {', '.join(row['layer'] for row in group)}" for network, group in groups]
