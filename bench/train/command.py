"""A lesson and its options enter, networks are trained, their curves are kept, and an exit status leaves."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from rich.table import Table

from bench import rows, show
from bench.train import recipes
from bench.train.loop import Curve, Curves
from bench.train.plot import draw_curves
from bench.train.recipes import Course, Trained
from bench.versions import read_commit, read_versions
from fastconv.cpu import device
from fastconv.cpu.threads import thread_count

LESSONS: dict[str, Callable[[Course], None]] = {
    "mnist1d": recipes.learn_mnist1d,
    "digits": recipes.learn_digits,
    "digits-transfer": recipes.transfer_digits,
}
PACKAGES = ("numpy", "numba", "scikit-learn")

# Columns that a narrow terminal goes without, the first first.
SPARE = ("examples", "test accuracy", "training error", "seconds", "parameters", "epochs")


def train_networks(lesson: str, epochs: int | None, seed: int, folder: Path, arguments: Sequence[str]) -> int:
    """Train the networks of a lesson; what it leaves appears when all is done: nothing is half."""
    console = show.make_console()
    with show.make_progress(console) as progress:
        course = Course(np.random.default_rng(seed), epochs, _make_watch(progress))
        LESSONS[lesson](course)
    curves, plot = folder / f"train-{lesson}.json", folder / f"train-{lesson}.svg"
    found = {
        **_stamp(arguments),
        "lesson": lesson,
        "seed": seed,
        "networks": [asdict(t) for t in course.trained],
    }
    rows.replace(curves, json.dumps(found) + "\n")
    rows.replace(plot, draw_curves(course.trained))
    show.print_table(console, _make_table(f"{lesson}, seed {seed}", course.trained), SPARE)
    console.print(f"curves: {curves}\nplot: {plot}", markup=False, soft_wrap=True)
    return 0


def _make_watch(progress: Progress) -> recipes.Watch:
    """A bar for each network, with its latest test error; where no bar can move, a line when it begins."""

    def watch(name: str, epochs: int) -> Callable[[Curves], None]:
        if not progress.console.is_terminal:
            progress.console.print(f"training for {epochs} epochs: {name}", markup=False)
            progress.console.file.flush()  # a pipe would keep it until the end
        task = progress.add_task(name, total=epochs)

        def after_epoch(curves: Curves) -> None:
            error = curves.test.error[-1]
            progress.update(task, advance=1, description=f"{name}: {error:.1%} wrong")

        return after_epoch

    return watch


def _stamp(arguments: Sequence[str]) -> dict[str, Any]:
    commit, dirty = read_commit()
    return {
        "run": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench", *arguments]),
        "cpu": device.current().name,
        "threads": thread_count(),
        "versions": read_versions(PACKAGES),
        "commit": commit,
        "dirty": dirty,
    }


def _make_table(title: str, trained: Sequence[Trained]) -> Table:
    """One line per network; errors before the first epoch and after the last."""
    headers = ("parameters", "examples", "epochs", "seconds", "training error", "test error", "test accuracy")
    published = any(each.published is not None for each in trained)
    table = show.make_table(title, ("network",), (*headers, *["published test error"] * published))
    for each in trained:
        frozen = f" + {each.frozen:,} frozen" if each.frozen else ""
        table.add_row(
            each.name,
            f"{each.parameters:,}{frozen}",
            "{:,} + {:,}".format(*each.examples),
            str(each.recipe.epochs),
            f"{each.curves.seconds:.1f}",
            _change(each.curves.training),
            _change(each.curves.test),
            f"{1 - each.curves.test.error[-1]:.1%}",
            _published_text(each),
        )
    return table


def _published_text(each: Trained) -> str:
    """The published test error, unless the network has learned for fewer epochs."""
    if each.published is None:
        return ""
    if each.is_short:
        return f"{each.recipe.epochs} of {each.full_epochs} epochs: not comparable"
    return f"about {each.published:.0%}"


def _change(curve: Curve) -> str:
    return f"{curve.error[0]:.1%} -> {curve.error[-1]:.1%}"
