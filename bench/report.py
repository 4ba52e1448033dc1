"""Rows enter, one HTML page leaves that needs no other file and no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from bench import page, plots
from bench.page import Number
from bench.rows import (
    Row,
    bandwidth,
    by_conditions,
    count_in,
    gflops,
    latest,
    layer_name,
    networks_of,
    of_kind,
    share_of_peak,
    speedups,
)
from bench.show import failures, group_left_out, layers_by_network, machine_text, seconds_text
from bench.summary import auto_share, best_over_direct, compare_network, sum_up_algorithms

TEMPLATE = Path(__file__).with_name("report.html")

PEAKS = """Peak: fused multiply-adds on registers. Copy: a large array, bytes read plus bytes written.
Both were measured at the start of the run, on its threads."""
RATES = """Times are medians of the public call, weights as a user gives them unless prepared was asked for.
Rates count the multiply-adds of the direct sum: Winograd does fewer, so its share of the peak may pass
100 %. "Over direct" is a geometric mean over the layers that the algorithm accepts."""
LINES = """One line per distinct shape and algorithm, under the first layer that has the shape; * is what
auto takes. GB/s: input, weight and output, each moved once. A click on a heading sorts."""

UNFOLDED = 6  # networks whose figures are open from the start


def render(found: Sequence[Row], folder: Path) -> str:
    """The page; pictures that rows name are taken from `folder`."""
    rows = latest(found)
    layers = of_kind(rows, "layer")
    sections = [
        _compared(of_kind(rows, "compare")),
        _algorithms(rows),
        _roofline(layers),
        _networks(layers),
        _photo(of_kind(rows, "photo"), folder),
        _layers(layers),
        _refusals(of_kind(rows, "refusal")),
        _left_out(rows),
        _machine(rows),
    ]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        subtitle=escape(_subtitle(rows[-1])), cards=_cards(rows), sections="\n".join(filter(None, sections))
    )


def _subtitle(row: Row) -> str:
    time = row["run"][:16].replace("T", " ") + " UTC"
    changes = " with uncommitted changes" if row["dirty"] else ""
    peaks = f"{row['peak_gflops']:.0f} GFLOP/s, {row['bandwidth_gbs']:.1f} GB/s"
    return f"{row['cpu']}, threads: {row['threads']}, {peaks} · commit {row['commit']}{changes} · {time}"


def _cards(rows: Sequence[Row]) -> str:
    layers, compared = of_kind(rows, "layer"), of_kind(rows, "compare")
    failed, checked = len(failures(rows)), sum("passed" in row for row in rows)
    cards = [
        page.card(
            f"{failed} failed" if failed else f"{checked} of {checked}",
            "results lie within their error bound of the float64 reference",
            "bad" if failed else "good",
        )
    ]
    if layers:
        top = max(layers, key=lambda row: gflops(row, row["median"]))
        rate = f"{gflops(top, top['median']):.0f} GFLOP/s"
        cards += [
            page.card(f"{best_over_direct(layers):.2f}x", "fastest algorithm over direct, geometric mean"),
            page.card(rate, f"the highest rate: {top['algorithm']} on {top['label']}"),
            page.card(f"{auto_share(layers):.0%}", "speed of what auto takes, of the fastest algorithm's"),
        ]
    for network in networks_of(compared):
        result = compare_network(compared, network)
        text = f"{compared[0]['baseline']}'s time over fastconv's, {network}"
        cards.append(page.card(f"{result.ratio_median:.2f}x", text))
    return "\n".join(cards)


def _algorithms(rows: Sequence[Row]) -> str:
    headers = (
        "algorithm", "layers", "refused", "fastest on", "over direct", "best GFLOP/s", "best share of peak",
        "largest error / bound",
    )  # fmt: skip
    lines = [
        (
            each.name,
            page.count(each.layers),
            page.count(each.refused),
            page.count(each.fastest),
            Number(f"{each.speedup:.2f}", each.speedup),
            Number(f"{each.best_gflops:.0f}", each.best_gflops),
            Number(f"{each.best_share:.0%}", each.best_share),
            Number(f"{each.worst_error:.2g}", each.worst_error),
        )
        for each in sum_up_algorithms(rows)
    ]
    return page.section("The algorithms", page.table(headers, lines), page.paragraph(RATES)) if lines else ""


def _roofline(layers: Sequence[Row]) -> str:
    return page.section("Roofline", plots.draw_roofline(layers, plots.colours(layers))) if layers else ""


def _networks(layers: Sequence[Row]) -> str:
    palette, parts = plots.colours(layers), []
    for index, network in enumerate(networks_of(layers)):
        mine = [row for row in layers if count_in(row, network)]
        figure = plots.draw_network(mine, network, palette)
        parts.append(page.part(network, figure, folded=index >= UNFOLDED))
    return page.section("Speed-up per layer and algorithm", *parts) if parts else ""


def _photo(rows: Sequence[Row], folder: Path) -> str:
    if not rows:
        return ""
    headers = ("kernel", "algorithm", "median", "error / bound")
    lines = [
        (
            row["filter"],
            row["algorithm"],
            _seconds(row["median"]),
            Number(f"{row['error']:.2g}", row["error"]),
        )
        for row in rows
    ]
    table = page.table(headers, lines, [not row["passed"] for row in rows])
    return page.section("A photograph", _picture(folder / rows[0]["picture"]), table)


def _picture(path: Path) -> str:
    if not path.is_file():
        return page.paragraph(f"{path.name} does not lie beside the rows.")
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="maps of a photograph under five kernels" src="data:image/png;base64,{data}">'


def _layers(layers: Sequence[Row]) -> str:
    if not layers:
        return ""
    headers = (
        "network", "layer", "algorithm", "tile", "min", "median", "p80", "GFLOP/s", "GB/s", "of peak",
        "over direct", "error / bound",
    )  # fmt: skip
    ratio = speedups(layers)
    lines = [_layer_line(row, ratio.get((row["key"], row["algorithm"]))) for row in layers]
    table = page.table(headers, lines, [not row["passed"] for row in layers], sortable=True)
    return page.section("Every measurement", page.paragraph(LINES), table)


def _layer_line(row: Row, speedup: float | None) -> tuple[str, ...]:
    median = row["median"]
    rate, moved, share = gflops(row, median), bandwidth(row, median), share_of_peak(row, median)
    return (
        row["network"],
        layer_name(row, row["network"]),
        row["algorithm"] + ("*" if row["auto"] else ""),
        row["tile"],
        _seconds(row["min"]),
        _seconds(median),
        _seconds(row["p80"]),
        Number(f"{rate:.1f}", rate),
        Number(f"{moved:.1f}", moved),
        Number(f"{share:.0%}", share),
        Number("-", 0) if speedup is None else Number(f"{speedup:.2f}", speedup),
        Number(f"{row['error']:.2g}", row["error"]),
    )


def _seconds(seconds: float) -> Number:
    return Number(seconds_text(seconds), seconds)


def _compared(rows: Sequence[Row]) -> str:
    return "".join(_compared_alike(group) for group in by_conditions(rows))


def _compared_alike(rows: Sequence[Row]) -> str:
    baseline = rows[0]["baseline"]
    note = f"Ratio: {baseline}'s time over fastconv's, so more than 1 means that fastconv is faster."
    notes = [page.paragraph(text) for text in (note, rows[0]["conditions"])]
    parts = []
    for network in networks_of(rows):
        mine = [row for row in rows if count_in(row, network)]
        parts.append(page.part(network, plots.draw_comparison(mine, network)))
    means, every = _means_table(rows, baseline), _comparison_table(rows, baseline)
    return page.section(f"Against {baseline}", *notes, means, *parts, every)


def _means_table(rows: Sequence[Row], baseline: str) -> str:
    headers = (
        "network", "layers", "layers lost", "ratio of minima", "ratio of medians", "fastconv", baseline,
    )  # fmt: skip
    lines = [
        (
            each.network,
            page.count(each.layers),
            page.count(each.lost),
            Number(f"{each.ratio_min:.2f}", each.ratio_min),
            Number(f"{each.ratio_median:.2f}", each.ratio_median),
            _seconds(each.seconds),
            _seconds(each.baseline_seconds),
        )
        for each in (compare_network(rows, network) for network in networks_of(rows))
    ]
    return page.table(headers, lines)


def _comparison_table(rows: Sequence[Row], baseline: str) -> str:
    headers = (
        "network", "layer", "algorithm", "tile", "min", "median", f"{baseline} min", f"{baseline} median",
        "its order", "ratio of minima", "ratio of medians", "GFLOP/s", "of peak",
    )  # fmt: skip
    lines = [_comparison_line(row) for row in rows]
    return page.table(headers, lines, [not row["passed"] for row in rows], sortable=True)


def _comparison_line(row: Row) -> tuple[str, ...]:
    ratio_min, ratio_median = row["baseline_min"] / row["min"], row["baseline_median"] / row["median"]
    rate, share = gflops(row, row["median"]), share_of_peak(row, row["median"])
    return (
        row["network"],
        layer_name(row, row["network"]),
        row["algorithm"] + (f" (asked-for one: {row['refusal']})" if row["refusal"] else ""),
        row["tile"],
        _seconds(row["min"]),
        _seconds(row["median"]),
        _seconds(row["baseline_min"]),
        _seconds(row["baseline_median"]),
        row["baseline_order"],
        Number(f"{ratio_min:.2f}", ratio_min),
        Number(f"{ratio_median:.2f}", ratio_median),
        Number(f"{rate:.1f}", rate),
        Number(f"{share:.0%}", share),
    )


def _refusals(rows: Sequence[Row]) -> str:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["algorithm"], row["reason"]), []).append(row)
    if not groups:
        return ""
    lines = [
        (name, reason, page.count(len(refused)), "; ".join(layers_by_network(refused)))
        for (name, reason), refused in groups.items()
    ]
    note = page.paragraph("What an algorithm does not run, in its own words.")
    return page.section("Refused", note, page.table(("algorithm", "reason", "layers", "which"), lines))


def _left_out(rows: Sequence[Row]) -> str:
    lines = [
        (reason, page.count(len(missing)), "; ".join(layers_by_network(missing)))
        for reason, missing in group_left_out(rows).items()
    ]
    return page.section("Left out", page.table(("reason", "layers", "which"), lines)) if lines else ""


def _machine(rows: Sequence[Row]) -> str:
    machines = [f"<p>{escape(text)}</p>" for text in dict.fromkeys(map(machine_text, rows))]
    commands = page.code("\n".join(dict.fromkeys(row["command"] for row in rows)))
    how = page.paragraph("In a checkout of that commit, with the package installed:")
    return page.section("Machine, and how to repeat it", *machines, page.paragraph(PEAKS), how, commands)
