"""Parsed options enter, the parts are run one after the other, and the exit status leaves."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from time import monotonic

from bench import rows as files
from bench.gpu import child, choice, results, table, targets
from bench.gpu.clock import Deadline, share_of
from bench.rows import Row, networks_of, of_kind
from fastconv.gpu.cupy_driver import INSTALL

SECONDS = 480.0  # for everything
RESERVE = 20.0  # of these, to start, to stop what is late, and to write
DESCRIBE = "bench.gpu.device:describe"
DESCRIBE_SECONDS = 60.0

# part: (its function, its seconds if all run); in this order, the last takes what the others leave
PARTS = {
    "compile": ("bench.gpu.compile:run", 60.0),
    "verify": ("bench.gpu.verify:run", 110.0),
    "repeat": ("bench.gpu.repeat:run", 40.0),
    "sanitize": ("bench.gpu.sanitize:run", 50.0),
    "bench": ("bench.gpu.layers:run", 200.0),
}

RunPart = Callable[[str, float], Iterator[Row]]  # (target, seconds)


def run_gpu(options: Namespace, arguments: Sequence[str]) -> int:
    """0 if everything passed, 1 if a check failed or there is no GPU; a missed target is no failure."""
    if importlib.util.find_spec("cupy") is None:
        return _refuse(f"CuPy is not installed for {sys.executable} ({INSTALL})")
    deadline = Deadline(SECONDS - RESERVE)
    machine = describe(child.run)
    if "reason" in machine:
        return _refuse(machine["reason"])
    chosen = [name for name in PARTS if name in (options.parts or PARTS)]
    path = options.output / results.file_name(machine["gpu"])
    try:
        stored = results.read(path, machine["gpu"])
    except ValueError as error:
        return _refuse(str(error))
    print(f"{machine['gpu']}, driver {machine['driver']}, commit {machine['commit']}", flush=True)
    stamp = _stamp(machine, arguments)
    for name, found, seconds in run_parts(chosen, deadline, child.run):
        stored["parts"][name] = {**stamp, **finish_part(name, found, seconds)}
        files.replace(path, results.to_text(stored) + "\n")
        print("\n".join(report_part(name, stored["parts"][name], machine["gpu"])), flush=True)
    print(f"results: {path}")
    return 0 if all(stored["parts"][name]["passed"] for name in chosen) else 1


def _refuse(reason: str) -> int:
    print(f"python -m bench gpu: {reason}", file=sys.stderr)
    return 1


def describe(run_part: RunPart) -> Row:
    """The machine's row, or one with the reason why there is none."""
    rows = list(run_part(DESCRIBE, DESCRIBE_SECONDS))
    return rows[0] if rows else {"reason": "the GPU could not be described"}


def _stamp(machine: Row, arguments: Sequence[str]) -> Row:
    return {
        "run": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench", *arguments]),
        "machine": {name: value for name, value in machine.items() if name != "kind"},
    }


def run_parts(
    chosen: Sequence[str], deadline: Deadline, run_part: RunPart, clock: Callable[[], float] = monotonic
) -> Iterator[tuple[str, list[Row], float]]:
    """Yield (part, its rows, the seconds it took), each part within its share of the time that is left."""
    weights = {name: weight for name, (_, weight) in PARTS.items()}
    for name in chosen:
        target, _ = PARTS[name]
        seconds = deadline.left() * share_of(name, chosen, weights)
        print(f"\n== {name}: at most {seconds:.0f} s", flush=True)
        start = clock()
        found = list(run_part(target, seconds))
        yield name, found, clock() - start


def finish_part(name: str, found: Sequence[Row], seconds: float) -> Row:
    """The entry of a part in the file of results."""
    rows = results.merge(found)
    entry = {"seconds": round(seconds, 1), "passed": results.passed(rows), "rows": rows}
    if name == "bench":
        entry["targets"] = [each.as_row() for each in targets.find_targets(of_kind(rows, "layer"))]
    return entry


def report_part(name: str, entry: Row, gpu: str) -> list[str]:
    """The lines to print of a part."""
    lines = []
    layers = of_kind(entry["rows"], "layer")
    if layers:
        means = targets.find_means(layers, networks_of(layers))
        lines += [table.layer_table(layers), "", table.LEGEND, ""]
        lines += [table.mean_table(means), "", table.target_table(targets.find_targets(layers), gpu), ""]
        lines += [table.distance_table("auto over the fastest algorithm", choice.find_distances(layers)), ""]
    lines += table.summary_lines(entry["rows"])
    verdict = "passed" if entry["passed"] else "FAILED"
    return [*lines, f"{name}: {verdict} in {entry['seconds']:.0f} s"]
