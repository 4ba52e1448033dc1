"""A network, a data set and a recipe enter; the network leaves trained, with the curves of its learning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from bench.train.data import Dataset, Examples
from bench.train.layers import Network
from bench.train.optimiser import SGD, decay_in_steps
from fastconv import cross_entropy, grad


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; after every so many epochs the rate is halved, and errors are measured."""

    epochs: int
    rate: float
    halve_every: int
    measure_every: int = 1
    batch: int = 100
    momentum: float = 0.9


@dataclass
class Curve:
    """Loss, and error: the share that is classified wrongly."""

    loss: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)


@dataclass
class Curves:
    """How a network does after so many epochs: on what it learns from, and on what it is judged by."""

    epochs: list[int] = field(default_factory=list)
    training: Curve = field(default_factory=Curve)
    test: Curve = field(default_factory=Curve)
    seconds: float = 0.0


def train(
    network: Network,
    data: Dataset,
    recipe: Recipe,
    rng: np.random.Generator,
    after_epoch: Callable[[Curves], object],
) -> Curves:
    """Train the network; `after_epoch` is called with the curves so far."""
    start = perf_counter()
    optimiser = SGD(network.parameters(), recipe.momentum)
    curves = Curves()
    _measure(network, data, 0, curves)
    for epoch in range(1, recipe.epochs + 1):
        rate = decay_in_steps(recipe.rate, epoch, recipe.halve_every)
        for batch in data.training.batches(recipe.batch, rng):
            scores = network.forward(batch.inputs)
            network.backward(grad.cross_entropy_input(scores, batch.classes))
            optimiser.step(rate)
        if epoch % recipe.measure_every == 0 or epoch == recipe.epochs:
            _measure(network, data, epoch, curves)
        curves.seconds = perf_counter() - start
        after_epoch(curves)
    return curves


def _measure(network: Network, data: Dataset, epoch: int, curves: Curves) -> None:
    curves.epochs.append(epoch)
    for curve, examples in ((curves.training, data.training), (curves.test, data.test)):
        loss, error = evaluate(network, examples)
        curve.loss.append(loss)
        curve.error.append(error)


def evaluate(network: Network, examples: Examples) -> tuple[float, float]:
    """Mean loss, and the share of examples whose highest score is that of another class."""
    scores = network.forward(examples.inputs)
    loss = cross_entropy(scores, examples.classes)
    return float(loss), float(np.mean(scores.argmax(axis=1) != examples.classes))
