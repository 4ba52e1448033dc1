"""Networks as lists of named nodes: their convolutions as workloads, and a summary with receptive fields."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from bench.networks.nodes import Conv, ConvLayer, MaxUnpool, Node, Shape
from fastconv.problem import ConvError

INPUT = "input"
INDICES = ".indices"  # behind the name of a pooling: the places of its maxima, as a value of their own


@dataclass(frozen=True)
class Layer:
    """A node with its name and the names of the layers whose outputs it takes ("input" is the network's).

    `fused`: names of the layers that it stands for, if `fuse` made it of several.
    """

    name: str
    node: Node
    inputs: tuple[str, ...]
    fused: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the values that its run takes: its inputs, and the indices of a pooling that it undoes."""
        indices = (self.node.pool + INDICES,) if isinstance(self.node, MaxUnpool) else ()
        return (*self.inputs, *indices)


@dataclass(frozen=True)
class Row:
    """What a summary says of one layer, for one sample.

    `receptive_field`: extent of the input, in pixels per axis, that can influence one output pixel by any
    path; image borders are ignored, and a fully connected layer is a convolution over its whole map.
    `jump`: distance in input pixels between neighbouring output pixels; 0 where the layer keeps no positions.
    """

    name: str
    operation: str
    output_shape: Shape
    parameters: int
    macs: int
    receptive_field: Shape
    jump: tuple[Fraction, ...]


@dataclass(frozen=True)
class Network:
    """A network in the order of its execution; `source` is the paper, and whose variant of it this is.

    `training_only`: prefixes of arrays that checkpoints hold for layers that only training has.
    """

    name: str
    source: str
    input_shape: Shape
    layers: tuple[Layer, ...]
    training_only: tuple[str, ...] = ()

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Output shape of every layer by name, and the input's, without the batch."""
        shapes = {INPUT: self.input_shape}
        for layer in self.layers:
            shape = layer.node.output_shape(*(shapes[name] for name in layer.inputs))
            if min(shape) < 1:
                rule = f"output extents of {layer.name} must be at least 1"
                raise ConvError(f"{self.name}: {rule}, got {shape} ({layer.node})")
            shapes[layer.name] = shape
        return shapes

    def convolutions(self) -> list[ConvLayer]:
        """The convolutions, transposed ones too: equal shapes once, under their first name, with a count.

        >>> from bench.networks import NETWORKS
        >>> [(layer.name, layer.count) for layer in NETWORKS["mnist1d"].convolutions()]
        [('conv1', 1), ('conv2', 1), ('conv3', 1)]
        """
        merged: dict[ConvLayer, ConvLayer] = {}
        for layer in self.layers:
            if isinstance(layer.node, Conv):
                conv = layer.node.workload(self.shapes[layer.inputs[0]], self.name, layer.name)
                key = replace(conv, name="")
                known = merged.get(key)
                merged[key] = replace(known, count=known.count + 1) if known else conv
        return list(merged.values())

    def parameters(self) -> dict[str, Shape]:
        """Shape of every trainable array by name: "layer.array", the array named as in PyTorch."""
        return {
            f"{layer.name}.{name}": shape
            for layer in self.layers
            for name, shape in layer.node.parameters(self.shapes[layer.inputs[0]]).items()
        }

    def buffers(self) -> dict[str, Shape]:
        """Shape of every array that a run needs beside the trainable ones, named alike."""
        return {
            f"{layer.name}.{name}": shape
            for layer in self.layers
            for name, shape in layer.node.buffers(self.shapes[layer.inputs[0]]).items()
        }

    def arrays(self) -> dict[str, Shape]:
        """Shape of every array that a run needs."""
        return {**self.parameters(), **self.buffers()}

    def summary(self) -> list[Row]:
        """One row for each layer."""
        fields = [self._fields(axis) for axis in range(len(self.input_shape) - 1)]
        rows = []
        for layer in self.layers:
            node, shape = layer.node, self.shapes[layer.inputs[0]]
            seen = [fields_on_axis[layer.name] for fields_on_axis in fields]
            parameters = sum(map(math.prod, node.parameters(shape).values()))
            rows.append(
                Row(layer.name, node.describe(len(shape) - 1), self.shapes[layer.name], parameters,
                    node.macs(shape), tuple(f.extent for f in seen), tuple(f.jump for f in seen))
            )  # fmt: skip
        return rows

    def _fields(self, axis: int) -> dict[str, _Field]:
        """What each layer sees of the input along one axis."""
        phases = math.prod(layer.node.phases(axis) for layer in self.layers)
        fields = {INPUT: _Field(tuple(range(phases)), tuple(range(phases)), phases)}
        for layer in self.layers:
            # One position more than the phases: how far it has moved is the step.
            seen = [self._seen(layer, fields, o, axis) for o in range(phases + 1)]
            first, last = zip(*seen)
            fields[layer.name] = _Field(first[:-1], last[:-1], first[-1] - first[0])
        return fields

    def _seen(self, layer: Layer, fields: dict[str, _Field], o: int, axis: int) -> tuple[int, int]:
        """First and last input pixel that output position `o` of a layer sees through any of its inputs."""
        firsts, lasts = [], []
        for name in layer.inputs:
            first, last = layer.node.window(o, axis, self.shapes[name])
            firsts.append(fields[name].at(first)[0])
            lasts.append(fields[name].at(last)[1])
        return min(firsts), max(lasts)


@dataclass(frozen=True)
class _Field:
    """The input pixels that positions along one axis see: those of the first few, which all others repeat.

    Position o sees first[o] ... last[o] for o < len(first); position o + len(first) the same, `step` further.
    After an upsampling neighbours differ, so there is more than one. The usual recurrence (Araujo et al.
    2019, "Computing Receptive Fields of Convolutional Neural Networks") is the case of a single one.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    step: int

    def at(self, position: int) -> tuple[int, int]:
        turn, phase = divmod(position, len(self.first))
        return self.first[phase] + turn * self.step, self.last[phase] + turn * self.step

    @property
    def extent(self) -> int:
        return max(last - first + 1 for first, last in zip(self.first, self.last))

    @property
    def jump(self) -> Fraction:
        return Fraction(self.step, len(self.first))


class Draft:
    """A network being written down: a layer takes the output of the one before, unless inputs are named."""

    def __init__(self, *input_shape: int) -> None:
        self._input_shape = input_shape
        self._layers: list[Layer] = []
        self.last = INPUT

    def add(self, name: str, node: Node, *inputs: str) -> str:
        """Append a layer and return its name."""
        self._layers.append(Layer(name, node, inputs or (self.last,)))
        self.last = name
        return name

    def stack(self, prefix: str, nodes: Sequence[Node]) -> None:
        """Append layers named by their index, as torch.nn.Sequential names them."""
        for index, node in enumerate(nodes):
            self.add(f"{prefix}.{index}", node)

    def network(self, name: str, source: str) -> Network:
        """The finished network."""
        return Network(name, source, self._input_shape, tuple(self._layers))


def print_summary(network: Network) -> None:
    """Print the summary as a table with totals; needs the `rich` package."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    rows = network.summary()
    shape = "x".join(map(str, network.input_shape))
    title = f"{network.name}, input {shape}"
    table = Table(title=title, caption=network.source, box=SIMPLE_HEAD, show_footer=True)
    parameters, macs = sum(row.parameters for row in rows), sum(row.macs for row in rows)
    totals = (f"{len(rows)} layers", "", "", f"{parameters:,}", f"{macs:,}", "", "")
    headers = ("layer", "operation", "output", "parameters", "multiply-adds", "receptive field", "jump")
    for index, (header, total) in enumerate(zip(headers, totals)):
        table.add_column(header, total, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a file or a log has no width that the table must fit
    console.print(table)


def _cells(row: Row) -> Iterator[str]:
    yield row.name
    yield row.operation
    yield "x".join(map(str, row.output_shape))
    yield f"{row.parameters:,}" if row.parameters else ""
    yield f"{row.macs:,}" if row.macs else ""
    yield "x".join(map(str, row.receptive_field))
    yield "x".join(map(str, row.jump)) if any(row.jump) else ""
