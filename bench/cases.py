"""Names of networks enter, the distinct convolutions leave: a shape that several layers share is one case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.networks import NETWORKS, ConvLayer, get_network
from bench.rows import Row
from fastconv.problem import ConvProblem, make_problem

# What the main job runs first; the other networks follow as far as its time reaches.
FIRST = (
    "lenet5", "mnist1d", "keras_mnist", "alexnet", "vgg16", "resnet50", "mobilenet_v1", "vit_b16_patches",
    "googlenet", "yolo_v1",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One convolution, its shape in words, and the layers (network, layer, count) that it stands for."""

    problem: ConvProblem
    label: str
    uses: tuple[tuple[str, str, int], ...]

    @property
    def network(self) -> str:
        """The network that has the shape first."""
        return self.uses[0][0]

    @property
    def layer(self) -> str:
        """The first layer that has the shape."""
        return self.uses[0][1]

    def columns(self) -> Row:
        """What every row about this case says of it."""
        return {
            "network": self.network, "layer": self.layer, "uses": [list(use) for use in self.uses],
            "label": self.label, "op": self.problem.op, "key": self.problem.key,
            "flops": self.problem.flops, "bytes": self.problem.bytes,
        }  # fmt: skip


def all_networks() -> list[str]:
    """Every network, the most asked-for first."""
    return list(dict.fromkeys([*FIRST, *NETWORKS]))


def collect(
    networks: Sequence[str], batch: int = 1, dtype: str = "float32", order: str = "NCHW"
) -> tuple[list[Case], list[Row]]:
    """The cases in order of first appearance, and a left_out row per layer that is not timed here."""
    cases: dict[ConvProblem, Case] = {}
    left_out: list[Row] = []
    for layer in (layer for name in networks for layer in get_network(name).convolutions()):
        use = (layer.network, layer.name, layer.count)
        if layer.transposed:
            left_out.append(_cannot_run(layer, "python -m bench network times transposed convolutions"))
            continue
        problem = _problem(layer, batch, dtype, order)
        known = cases.get(problem)
        case = replace(known, uses=(*known.uses, use)) if known else Case(problem, _shape(layer), (use,))
        cases[problem] = case
    return list(cases.values()), left_out


def _problem(layer: ConvLayer, batch: int, dtype: str, order: str) -> ConvProblem:
    return make_problem(
        layer.op, layer.input_shape(batch), layer.weight_shape, stride=layer.stride, padding=layer.padding,
        dilation=layer.dilation, groups=layer.groups, dtype=dtype, order=order,
    )  # fmt: skip


def _shape(layer: ConvLayer) -> str:
    """The layer's label without its names, because several layers may share the shape."""
    return replace(layer, network="", name="").label.strip()


def _cannot_run(layer: ConvLayer, reason: str) -> Row:
    return {
        "kind": "left_out", "network": layer.network, "layer": layer.name,
        "uses": [[layer.network, layer.name, layer.count]], "label": _shape(layer), "op": layer.op,
        "key": layer.label, "reason": reason,
    }  # fmt: skip
