"""One run: its machine is measured, its rows are collected and printed, then written with the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from bench import report, rows, show
from bench.cases import Case
from bench.layers import Runner, Settings
from bench.machine import describe
from bench.rows import Row
from fastconv.cpu.threads import thread_count


class CommandError(Exception):
    """A run that cannot start; the message says what to do about it."""


class Session:
    """Collects the rows of the run `name` and leaves `<name>.jsonl` and `report.html` in `folder`."""

    def __init__(self, name: str, folder: Path, arguments: Sequence[str], dtype: str = "float32"):
        self.name = name
        self.folder = folder
        self.console = show.make_console()
        self.rows: list[Row] = []
        self.stamp = rows.stamp(describe(thread_count(), dtype), arguments)
        self.console.print(show.machine_text(self.stamp), markup=False)

    def add(self, found: Iterable[Row]) -> list[Row]:
        """Stamp rows and keep them."""
        stamped = [{**row, **self.stamp} for row in found]
        self.rows += stamped
        return stamped

    def run(self, cases: Sequence[Case], settings: Settings) -> None:
        """Run the cases, and print a table whenever a network is done."""
        runner = Runner(settings, self.stamp["peak_gflops"])
        with show.make_progress(self.console) as progress:
            task = progress.add_task("", total=len(cases))
            for network, group in groupby(cases, key=lambda case: case.network):
                found: list[Row] = []
                for case in group:
                    progress.update(task, description=f"{network} {case.layer}")
                    found += self.add(runner.run(case))
                    progress.advance(task)
                if timed := rows.of_kind(found, "layer"):
                    progress.console.print(show.layer_table(network, timed))

    def finish(self, append: bool = False) -> int:
        """Write the rows and the report, print the outcome, and return the exit status."""
        path = self.folder / f"{self.name}.jsonl"
        (rows.append if append else rows.write)(path, self.rows)
        page = write_report(self.rows, self.folder)
        show.print_outcome(self.console, self.rows)
        self.console.print(f"rows: {path}\nreport: {page}", markup=False, soft_wrap=True)
        return 1 if show.failures(self.rows) else 0


def write_report(found: Sequence[Row], folder: Path, pictures: Path | None = None) -> Path:
    """Render rows into `folder`; pictures that they name lie in `pictures`, or in the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    page.write_text(report.render(found, pictures or folder), encoding="utf-8")
    return page
