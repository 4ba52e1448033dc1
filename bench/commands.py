"""Parsed options enter, one run is done, and its exit status leaves."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence

from rich.console import Console

from bench import compare, networks, photo, rows, show
from bench.cases import Case, all_networks, collect
from bench.forward.command import Request
from bench.forward.command import run_network as run_forward
from bench.kernels.instances import ARCHITECTURES, DTYPES
from bench.kernels.run import compile_kernels
from bench.layers import Settings
from bench.rows import Row
from bench.session import CommandError, Session, write_report
from bench.train.command import LESSONS, train_networks
from fastconv.algorithms import TABLE

PICTURE = "photo.png"


def run_main(options: Namespace, arguments: Sequence[str]) -> int:
    """The photograph, then the layers of all networks that fit into the time."""
    session = Session("main", options.output, arguments)
    session.add(photo.run_photo(options.output / PICTURE))
    cases, impossible = collect(all_networks())
    session.add(impossible)
    session.run(cases, Settings(tuple(TABLE), seconds=options.seconds))
    return session.finish()


def run_layers(options: Namespace, arguments: Sequence[str]) -> int:
    """The layers of chosen networks with chosen algorithms."""
    algorithms = tuple(_choose("--algorithms", options.algorithms, TABLE))
    cases, impossible = _collect(options)
    if all(TABLE[name].refuses(case.problem) for case in cases for name in algorithms):
        where = f"any layer of {', '.join(options.networks)}"
        raise CommandError(f"nothing was measured: {' or '.join(algorithms)} cannot run {where}")
    session = Session("layers", options.output, arguments, cases[0].problem.compute_dtype)
    session.add(impossible)
    session.run(cases, Settings(algorithms, options.prepared, options.seconds))
    return session.finish()


def _collect(options: Namespace) -> tuple[list[Case], list[Row]]:
    names = all_networks() if options.networks == ["all"] else options.networks
    return collect(names, options.batch, options.dtype, options.order)


def run_photo(options: Namespace, arguments: Sequence[str]) -> int:
    """The photograph alone."""
    session = Session("photo", options.output, arguments)
    session.add(photo.run_photo(options.output / PICTURE))
    session.console.print(f"picture: {options.output / PICTURE}", markup=False, soft_wrap=True)
    return session.finish()


def run_networks(options: Namespace, arguments: Sequence[str]) -> int:
    """The summary of each named network, or the names."""
    if not options.names:
        Console().print("\n".join(networks.NETWORKS), markup=False)
    for name in options.names:
        networks.print_summary(networks.get_network(name))
    return 0


def run_network(options: Namespace, arguments: Sequence[str]) -> int:
    """One network on a picture: what each layer takes, and what it makes of it."""
    names = ("image", "weights", "chosen", "unfused", "batch", "top")
    request = Request(
        options.name, layers=tuple(options.layers), **{name: getattr(options, name) for name in names}
    )
    return run_forward(request, options.output, arguments)


def run_compare(options: Namespace, arguments: Sequence[str]) -> int:
    """The layers of chosen networks beside another library; a loss is a result, not a failure."""
    compare.require(options.baseline, options.threads)
    if options.prepared and options.operation.startswith("grad"):
        raise CommandError("--prepared is for forward and fused: a gradient takes its operands as they are")
    cases, impossible = _collect(options)
    session = Session("compare", options.output, arguments, cases[0].problem.compute_dtype)
    session.add(impossible)
    settings = compare.Settings(
        options.baseline, options.operation, options.algo, options.prepared, options.rounds,
        session.stamp["threads"],
    )  # fmt: skip
    with show.make_progress(session.console) as progress:
        task = progress.add_task("", total=len(cases))
        for row in compare.run_cases(cases, settings):
            session.add([row])
            progress.update(task, advance=1, description=f"{row['network']} {row['layer']}")
    compared = rows.of_kind(session.rows, "compare")
    show.print_comparison(session.console, compared)
    session.console.print(f"repeat with: {session.stamp['command']}", markup=False, soft_wrap=True)
    return session.finish(append=True)


def run_report(options: Namespace, arguments: Sequence[str]) -> int:
    """The report of rows that earlier runs have written."""
    try:
        found = [row for path in options.files for row in rows.read(path)]
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    if not found:
        raise CommandError("the files hold no rows")
    Console().print(
        f"report: {write_report(found, options.output, options.files[0].parent)}",
        markup=False,
        soft_wrap=True,
    )
    return 0


def run_kernels(options: Namespace, arguments: Sequence[str]) -> int:
    """CUDA kernels compiled for chosen architectures; one that spills makes the exit status 1."""
    architectures = [int(sm) for sm in _choose("--architectures", options.architectures, ARCHITECTURES)]
    dtypes = _choose("--dtypes", options.dtypes, DTYPES)
    return compile_kernels(architectures, dtypes, options.all, options.output, arguments)


def run_train(options: Namespace, arguments: Sequence[str]) -> int:
    """Networks of courses on a data set."""
    lesson = options.data
    if options.transfer:
        lesson += "-transfer"
        if lesson not in LESSONS:
            raise CommandError(f"--transfer needs the data set digits, got {options.data}")
    return train_networks(lesson, getattr(options, "epochs", None), options.seed, options.output, arguments)


def _choose(option: str, names: list[str], known: Iterable[object]) -> list[str]:
    """The names, or all that are known."""
    listed = [str(name) for name in known]
    if unknown := [name for name in names if name not in (*listed, "all")]:
        raise CommandError(f"{option} must be of {', '.join(listed)}, got {', '.join(unknown)}")
    return listed if "all" in names else names
