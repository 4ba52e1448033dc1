"""Rows of measurements as JSON lines: dicts enter and leave, and a broken run never leaves half a file.

Every row stands on its own: what was measured, on which machine, from which commit, by which command.

kind       columns besides those of `stamp`
---------  ------------------------------------------------------------------------------------------------
layer      problem, networks, algorithm, its tile, times, error in units of its bound, whether it passed
refusal    problem, networks, algorithm and the reason why it does not run the problem
left_out   problem, networks and the reason why it was not run
photo      a filtered photograph: picture (a file beside the rows), filters and their times
compare    problem, networks, algorithm, times of both sides
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastconv.algorithms import TABLE

if TYPE_CHECKING:
    from bench.machine import Machine

Row = dict[str, Any]

IDENTITY = (
    "kind",
    "key",
    "filter",
    "algorithm",
    "threads",
    "prepared",
    "baseline",
    "operation",
    "reason",
    "cpu",
)


def stamp(machine: Machine, arguments: Sequence[str]) -> Row:
    """The columns that all rows of one run share."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"run": now, "command": shlex.join(["python", "-m", "bench", *arguments]), **asdict(machine)}


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file by `rows`."""
    replace(path, "".join(json.dumps(row) + "\n" for row in rows))


def replace(path: Path, text: str) -> None:
    """Replace what the file holds, or leave it as it is if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes the file private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add `rows` behind those that the file holds."""
    write(path, [*(read(path) if path.exists() else []), *rows])


def read(path: Path) -> list[Row]:
    """All rows of a file, oldest first."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a row of measurements: {error}") from error
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """Keep the last row of each measurement: a file that runs were appended to repeats itself."""
    kept = {tuple(str(row.get(name)) for name in IDENTITY): row for row in rows}
    return list(kept.values())


def gflops(row: Row, seconds: float) -> float:
    """GFLOP/s that a direct sum would need; an algorithm with fewer operations may exceed the peak."""
    return float(row["flops"]) / seconds / 1e9


def bandwidth(row: Row, seconds: float) -> float:
    """GB/s if input, weight and output are each moved once."""
    return float(row["bytes"]) / seconds / 1e9


def share_of_peak(row: Row, seconds: float) -> float:
    """Rate over the multiply-add peak measured in the same run."""
    return gflops(row, seconds) / float(row["peak_gflops"])


def speedups(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """Median time of `direct` over that of each (key, algorithm), where direct was run."""
    rows = list(rows)
    direct = {row["key"]: row["median"] for row in rows if row["algorithm"] == "direct"}
    return {
        (row["key"], row["algorithm"]): direct[row["key"]] / row["median"]
        for row in rows
        if row["key"] in direct
    }


def count_in(row: Row, network: str) -> int:
    """How many layers of the network have the row's shape."""
    return sum(count for name, _, count in row["uses"] if name == network)


def layer_name(row: Row, network: str) -> str:
    """The row's layer as the network calls it, its shape, and how often it occurs there."""
    name = next(layer for used_by, layer, _ in row["uses"] if used_by == network)
    times = count_in(row, network)
    return f"{name}  {row['label']}" + (f"  x{times}" if times > 1 else "")


def networks_of(rows: Iterable[Row]) -> list[str]:
    """The networks that the rows belong to, those first under whose name a row was made."""
    rows = list(rows)
    also = (name for row in rows for name, _, _ in row["uses"])
    return list(dict.fromkeys([*(row["network"] for row in rows), *also]))


def algorithms_of(rows: Iterable[Row]) -> list[str]:
    """The algorithms of the rows, in the order of the table."""
    found = dict.fromkeys(row["algorithm"] for row in rows)
    return [*(name for name in TABLE if name in found), *(name for name in found if name not in TABLE)]


def by_conditions(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each set of conditions together, because the ratios of others cannot be averaged."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["conditions"], []).append(row)
    return list(groups.values())


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    """The rows of one kind."""
    return [row for row in rows if row["kind"] == kind]
