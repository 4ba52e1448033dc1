"""Rows of the parts enter, the text of bench/results/<gpu>.json leaves, and what it sums up to.

    {"gpu": its name,
     "parts": {"compile" | "verify" | "repeat" | "sanitize" | "bench": {
         "run", "command": when and how; "machine": GPU, driver, versions, commit; "seconds": what it took;
         "passed": whether no check failed; "rows": what it found; "targets": in "bench" alone}}}

A part that is run again replaces its own entry. Rows, by their "kind":

compiled    an algorithm's kernels: how many, the most registers, bytes of local memory of those that use it
tests       pytest: its exit status and its last line
checked     a layer and an algorithm: the worst error of all tiles and orders, in units of its bound
repeated    an algorithm, a tile, a problem: how many of the runs differed from the first
sanitized   a tool of compute-sanitizer: its exit status and summary
copy        a copy within the GPU's memory: bytes, median in seconds, gbs (read and written)
layer       a layer at a batch size; "uses": [network, layer, how often]; per entry of the two lists:
            "fastconv"  order, algorithm, tile, auto (whether the table chooses it), call, fused, estimate,
                        median and min in seconds, samples, gflops, gbs, copy_share (gbs over the copy's);
                        ratio and ratio_tf32: the least median of cuDNN's calls in either order, equally
                        fused, over this one, TF32 off and on
            "cudnn"     order, tf32, call, fused, median, min, samples
left_out    what was not done, and why
failure     what went wrong
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.rows import Row, bandwidth, gflops, of_kind

WIDTH = 160  # characters of a line of the file


def file_name(gpu: str) -> str:
    """The file of a GPU.

    >>> file_name("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3.json'
    """
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def read(path: Path, gpu: str) -> Row:
    """What the file holds; an empty entry for the GPU if there is none."""
    if not path.exists():
        return {"gpu": gpu, "parts": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a file of results: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a file of results")
    return found


def to_text(value: Any, indent: int = 0) -> str:
    """JSON in which whatever fits into a line stands on one."""
    line = json.dumps(value)
    if len(line) + indent <= WIDTH or not isinstance(value, (dict, list)):
        return line
    inner, margin = indent + 1, " " * (indent + 1)
    if isinstance(value, dict):
        entries = [f"{json.dumps(key)}: {to_text(entry, inner)}" for key, entry in value.items()]
    else:
        entries = [to_text(entry, inner) for entry in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return f"{start}\n{margin}" + f",\n{margin}".join(entries) + f"\n{' ' * indent}{end}"


def passed(rows: Iterable[Row]) -> bool:
    """Whether no row tells of a failure; what was left out is none."""
    return all(row["kind"] != "failure" and row.get("passed", True) for row in rows)


def merge(rows: Sequence[Row]) -> list[Row]:
    """The rows, those of a layer joined to one, with rates and ratios."""
    layers: dict[str, Row] = {}
    others = []
    for row in rows:
        if row["kind"] != "layer":
            others.append(row)
        elif row["key"] in layers:
            known = layers[row["key"]]
            layers[row["key"]] = {
                **known,
                **{side: known[side] + row[side] for side in ("fastconv", "cudnn")},
            }
        else:
            layers[row["key"]] = row
    copy = next(iter(of_kind(others, "copy")), None)
    return [*(with_ratios(row, copy) for row in layers.values()), *others]


def with_ratios(layer: Row, copy: Row | None = None) -> Row:
    """The layer's row with rates and ratios in the entries of fastconv."""
    entries = []
    for entry in layer["fastconv"]:
        seconds = entry["median"]
        found = {"gflops": gflops(layer, seconds), "gbs": bandwidth(layer, seconds)}
        if copy:
            found["copy_share"] = found["gbs"] / copy["gbs"]
        for name, tf32 in (("ratio", False), ("ratio_tf32", True)):
            best = best_cudnn(layer, tf32, entry["fused"])
            if best:
                found[name] = best["median"] / seconds
        entries.append({**entry, **{name: float(f"{value:.4g}") for name, value in found.items()}})
    return {**layer, "fastconv": entries}


def best_cudnn(layer: Row, tf32: bool, fused: bool) -> Row | None:
    """cuDNN's fastest entry of that kind in either memory order; None if it was not measured."""
    entries = [e for e in layer["cudnn"] if e["tf32"] == tf32 and e["fused"] == fused]
    return min(entries, key=lambda entry: float(entry["median"])) if entries else None
