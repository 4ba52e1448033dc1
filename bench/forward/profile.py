"""A model and its input enter; what each layer did leaves: algorithm, time, memory."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter

import numpy as np

from bench.networks import Layer, Model, Step
from bench.networks.nodes import Conv, Shape
from fastconv.plan import Plan, make_plan
from fastconv.pool import find_order
from fastconv.problem import make_problem, make_transposed

SECONDS = 2.0  # of repeated runs
FEWEST, MOST = 5, 50  # runs


@dataclass(frozen=True)
class LayerRun:
    """One layer of a run: bytes of its output, of all that is kept then, and of what it takes meanwhile.

    `seconds` is the median over the runs, `flops` count convolutions and matrix products as direct sums,
    algorithm and tile are those of a convolution, else empty; `fused` names the layers that it stands for.
    """

    name: str
    fused: tuple[str, ...]
    operation: str
    kind: str
    shape: Shape
    algorithm: str
    tile: str
    flops: int
    seconds: float
    output_bytes: int
    live_bytes: int
    workspace: int


@dataclass(frozen=True)
class Profile:
    """All layers of a run; `seconds` is the median of whole runs, `layer_seconds` the sum of the layers' own.

    These differ: a layer's median leaves out the runs in which that layer was interrupted, and a whole run is
    interrupted more often than one of its layers.
    """

    layers: tuple[LayerRun, ...]
    seconds: float
    runs: int
    output: np.ndarray
    kept: dict[str, np.ndarray]

    @property
    def layer_seconds(self) -> float:
        return sum(layer.seconds for layer in self.layers)

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    @property
    def peak_bytes(self) -> int:
        """The most that is taken at once, beside the weights."""
        return max(layer.live_bytes + layer.workspace for layer in self.layers)

    def by_kind(self) -> dict[str, list[LayerRun]]:
        """The layers by what they do, those that take longest first."""
        kinds: dict[str, list[LayerRun]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.kind, []).append(layer)
        return dict(sorted(kinds.items(), key=lambda item: -sum(layer.seconds for layer in item[1])))


def profile(model: Model, x: np.ndarray, keep: Collection[str] = ()) -> Profile:
    """Run a model once to look at it, which warms it up, then as often as fits into the time.

    keep  names of layers whose outputs are wanted
    """
    facts: list[LayerRun] = []
    kept: dict[str, np.ndarray] = {}
    times: dict[str, list[float]] = {layer.name: [] for layer in model.network.layers}

    def look(step: Step) -> None:
        facts.append(_describe(step))
        if step.layer.name in keep:
            kept[step.layer.name] = step.output.copy()  # a view would keep all that it looks into

    output = model.run(x, look)
    totals: list[float] = []
    end = perf_counter() + SECONDS
    while len(totals) < FEWEST or (perf_counter() < end and len(totals) < MOST):
        start = perf_counter()
        model.run(x, lambda step: times[step.layer.name].append(step.seconds))
        totals.append(perf_counter() - start)
    layers = tuple(replace(layer, seconds=median(times[layer.name])) for layer in facts)
    return Profile(layers, median(totals), len(totals), output, kept)


def _describe(step: Step) -> LayerRun:
    """What is the same in every run."""
    node, shape, plan = step.layer.node, step.inputs[0].shape[1:], find_plan(step.layer, step.inputs[0])
    return LayerRun(
        name=step.layer.name,
        fused=step.layer.fused,
        operation=node.describe(len(shape) - 1),
        kind=name_kind(step.layer, shape),
        shape=step.output.shape,
        algorithm=plan.algorithm.name if plan else "",
        tile=str(plan.tile) if plan else "",
        flops=2 * node.macs(shape) * len(step.output),
        seconds=math.nan,
        output_bytes=step.output.nbytes,
        live_bytes=step.live,
        workspace=plan.workspace() if plan else 0,
    )


def find_plan(layer: Layer, x: np.ndarray) -> Plan | None:
    """How fastconv computes a convolution of this input; None for other layers."""
    if not isinstance(layer.node, Conv):
        return None
    conv = layer.node.workload(x.shape[1:])
    make = make_transposed if conv.transposed else make_problem
    problem = make(
        conv.op, x.shape, conv.weight_shape, stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
        groups=conv.groups, dtype=x.dtype.name, order=find_order(x, conv.ndim),
    )  # fmt: skip
    return make_plan(problem)


def name_kind(layer: Layer, shape: Shape) -> str:
    """What a layer does, without what differs from one to the next: stride, groups, what is fused."""
    node, ndim = layer.node, len(shape) - 1
    if not isinstance(node, Conv):
        return node.describe(ndim)
    plain = replace(node, stride=1, groups=1, residual=False, activation=None).describe(ndim)
    if node.groups == 1:
        return plain
    return f"{plain} {'per channel' if node.groups == shape[0] else 'in groups'}"
