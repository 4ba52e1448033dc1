"""A network and its options enter; its run is printed, kept and pictured, and an exit status leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bench import rows, show
from bench.forward import pictures, tables
from bench.forward.inputs import Shown, make_input
from bench.forward.maps import choose_layers, find_filters, find_head, map_class, spread
from bench.forward.profile import Profile, profile
from bench.machine import describe
from bench.networks import Model, Network, draw_weights, fuse, get_network, load_weights
from bench.networks.nodes import Softmax
from bench.session import CommandError
from fastconv import softmax
from fastconv.cpu.threads import thread_count

RANDOM = "random, seed 0: classes and maps mean nothing (--weights FILE loads trained ones)"
WAIT = "running {} (the first time its kernels are compiled, once for all: up to half a minute)"
NO_MAP = "it needs global average pooling and one linear layer at the end, which {} lacks"
DPI = 110


@dataclass(frozen=True)
class Request:
    """What is asked for; `run_network` checks it before it runs anything.

    layers   whose maps are pictured; none: some from the first to the last
    chosen   the class of the class-activation map; None: the one with the highest score
    unfused  every layer by itself
    """

    name: str
    image: Path | None = None
    weights: Path | None = None
    layers: tuple[str, ...] = ()
    batch: int = 1
    top: int = 5
    chosen: int | None = None
    unfused: bool = False


def run_network(request: Request, folder: Path, arguments: Sequence[str]) -> int:
    """Run a network; what it leaves appears when all is done."""
    network = get_network(request.name)
    layers, head = choose_layers(network, request.layers), find_head(network)
    _check_class(network, request.chosen)
    shown = make_input(network, request.image, request.batch)
    weights = load_weights(network, request.weights) if request.weights else draw_weights(network)
    stamp = rows.stamp(describe(thread_count()), arguments)
    console = show.make_console()
    console.print(show.machine_text(stamp), markup=False)

    console.print(WAIT.format(network.name), markup=False, soft_wrap=True)
    console.file.flush()  # a pipe would keep it until the end

    keep = {*layers, head.maps} if head else set(layers)
    model = Model(network, weights) if request.unfused else Model(*fuse(network, weights, keep))
    found = profile(model, shown.x, keep)
    scores = rank_classes(network, found.output[0])[: request.top]
    figures = _draw(network, weights, request, shown, found, layers, scores)
    result = {
        **stamp, **_sum_up(network, request, shown, found), "classes": scores,
        "layers": [asdict(layer) for layer in found.layers],
    }  # fmt: skip
    paths = _write(network.name, folder, result, figures)

    peak = stamp["peak_gflops"]
    for table in (
        tables.layer_table(_title(network, shown, request), found, peak),
        tables.kind_table(found, peak),
    ):
        show.print_table(console, table, tables.SPARE)
    for line in (*_outcome(network, request, found, scores), *map(str, paths)):
        console.print(line, markup=False, soft_wrap=True)
    return 0


def _check_class(network: Network, chosen: int | None) -> None:
    """Raise unless a class-activation map of that class can be made; None is that of the highest score."""
    if chosen is None:
        return
    if find_head(network) is None:
        raise CommandError(
            f"--class needs a network with a class-activation map: {NO_MAP.format(network.name)}"
        )
    (classes,) = network.shapes[network.layers[-1].name]
    if chosen >= classes:
        raise CommandError(f"--class must be from 0 to {classes - 1}, got {chosen}")


def rank_classes(network: Network, output: np.ndarray) -> list[tuple[int, float]]:
    """Index and probability of all classes, the most probable first; none where the output is a map."""
    if output.ndim != 1:
        return []
    is_share = isinstance(network.layers[-1].node, Softmax)
    shares = output if is_share else softmax(output, 0)
    order = np.argsort(-shares, kind="stable")
    return [(int(index), float(shares[index])) for index in order]


def _draw(
    network: Network,
    weights: Mapping[str, np.ndarray],
    request: Request,
    shown: Shown,
    found: Profile,
    layers: Sequence[str],
    scores: Sequence[tuple[int, float]],
) -> dict[str, Figure]:
    """The pictures of the first sample, by what they show."""
    (first, weight), maps = find_filters(network, weights), {name: found.kept[name][0] for name in layers}
    title = network.name if request.weights else f"{network.name} with random weights"
    figures = {
        "filters": pictures.draw_filters(f"{title}, {first}", weight),
        "features": pictures.draw_features(title, maps),
    }
    head = find_head(network)
    if head and shown.image is not None:
        index = scores[0][0] if request.chosen is None else request.chosen
        evidence = map_class(found.kept[head.maps][0], weights[f"{head.linear.name}.weight"], index)
        activation = spread(evidence, shown.image.shape[:2])
        text = f"{title}: where {head.maps} speaks for class {index}"
        figures["cam"] = pictures.draw_class(text, shown.image, activation)
    return figures


def _write(name: str, folder: Path, result: rows.Row, figures: Mapping[str, Figure]) -> list[Path]:
    """Save the pictures and, with their names in it, the result."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {what: folder / f"network-{name}-{what}.png" for what in figures}
    for what, path in paths.items():
        figures[what].savefig(path, dpi=DPI)
    path = folder / f"network-{name}.json"
    named = {what: picture.name for what, picture in paths.items()}
    rows.replace(path, json.dumps({**result, "pictures": named}) + "\n")
    return [*paths.values(), path]


def _sum_up(network: Network, request: Request, shown: Shown, found: Profile) -> rows.Row:
    return {
        "network": network.name, "source": network.source, "batch": request.batch, "input": shown.text,
        "weights": str(request.weights) if request.weights else "random", "fused": not request.unfused,
        "parameters": _count_parameters(network), "flops": found.flops, "seconds": found.seconds,
        "runs": found.runs, "peak_bytes": found.peak_bytes,
    }  # fmt: skip


def _count_parameters(network: Network) -> int:
    return sum(map(math.prod, network.parameters().values()))


def _title(network: Network, shown: Shown, request: Request) -> str:
    fused = "layer by layer" if request.unfused else "convolutions fused with what follows them"
    return f"{network.name}, input {'x'.join(map(str, shown.x.shape))}, {fused}"


def _outcome(
    network: Network, request: Request, found: Profile, scores: Sequence[tuple[int, float]]
) -> Iterator[str]:
    """The totals in words, and what the network says."""
    parameters = _count_parameters(network)
    yield (
        f"a whole run: {show.seconds_text(found.seconds)} (median of {found.runs} runs); the layers' medians "
        f"add up to {show.seconds_text(found.layer_seconds)}: each leaves out the runs in which it was "
        "interrupted, and what lies between layers"
    )
    yield (
        f"network: {found.flops / 1e9:.3g} GFLOP as direct sums, {parameters:,} parameters "
        f"({tables.size_text(4 * parameters)})"
    )
    if not request.unfused:
        yield "a .. b: convolution a with all that follows it up to b, whose name its output has"
    yield f"memory: at most {tables.size_text(found.peak_bytes)} of maps and workspace, beside the weights"
    yield f"weights: {request.weights or RANDOM}"
    if scores:
        yield "classes: " + ", ".join(f"{index} ({share:.1%})" for index, share in scores)
    if find_head(network) is None:
        yield f"no class-activation map: {NO_MAP.format(network.name)}"
