"""A seed enters; data are made, networks are trained on them, and what they have learned leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from bench.train import nets
from bench.train.data import Dataset, Examples, choose_classes, load_digits, make_mnist1d
from bench.train.layers import Network
from bench.train.loop import Curves, Recipe, train

# What is trained and its number of epochs enter, what to call after each epoch leaves.
Watch = Callable[[str, int], Callable[[Curves], object]]

# The book's small steps, taken in fewer epochs. With larger ones the convolutional net does better than the
# published result: a rate of 0.05, halved every 50 of 200 epochs, leads to test errors of 8 to 11 %.
MNIST1D = Recipe(epochs=600, rate=0.004, halve_every=500, measure_every=5)
DIGITS = Recipe(epochs=25, rate=0.01, halve_every=8, batch=16)
FINE_TUNING = Recipe(epochs=25, rate=0.001, halve_every=8, batch=16)

# Test errors of Prince 2023, "Understanding deep learning", section 10.2.7.
PUBLISHED_CONVOLUTIONAL, PUBLISHED_FULLY_CONNECTED = 0.17, 0.40


@dataclass(frozen=True)
class Trained:
    """One training: what was trained, how, on how many examples, and the curves of its learning."""

    name: str
    parameters: int
    frozen: int  # further parameters, which were not trained
    examples: tuple[int, int]  # to learn from, to be judged by
    recipe: Recipe
    curves: Curves
    published: float | None  # test error
    full_epochs: int  # of the recipe, as the published ones were found

    @property
    def is_short(self) -> bool:
        """Whether it learned for less time than its recipe says: its errors are not comparable."""
        return self.recipe.epochs < self.full_epochs


class Course:
    """Trains one network after the other, each watched by a progress bar.

    epochs  of each training; None for those of its recipe
    """

    def __init__(self, rng: np.random.Generator, epochs: int | None, watch: Watch):
        self.rng = rng
        self.epochs = epochs
        self.watch = watch
        self.trained: list[Trained] = []

    def train(
        self,
        name: str,
        network: Network,
        data: Dataset,
        recipe: Recipe,
        *,
        frozen: Network | None = None,
        published: float | None = None,
    ) -> None:
        """Train the network on what the frozen one makes of the data."""
        full_epochs = recipe.epochs
        if self.epochs is not None:
            recipe = replace(recipe, epochs=self.epochs)
        if frozen is not None:
            data = look_through(frozen, data)
        curves = train(network, data, recipe, self.rng, self.watch(name, recipe.epochs))
        self.trained.append(
            Trained(
                name,
                network.count_parameters(),
                frozen.count_parameters() if frozen else 0,
                (len(data.training), len(data.test)),
                recipe,
                curves,
                published,
                full_epochs,
            )
        )


def look_through(network: Network, data: Dataset) -> Dataset:
    """What a network that no longer changes hands on: computed once, however long the next one learns."""

    def look(examples: Examples) -> Examples:
        return Examples(network.forward(examples.inputs), examples.classes)

    return Dataset(look(data.training), look(data.test))


def learn_mnist1d(course: Course) -> None:
    """A convolutional net beside a fully connected one with as many hidden units."""
    data = make_mnist1d(course.rng)
    convolutional = nets.make_convolutional(course.rng)
    connected = nets.make_fully_connected(course.rng)
    course.train("convolutional", convolutional, data, MNIST1D, published=PUBLISHED_CONVOLUTIONAL)
    course.train("fully connected", connected, data, MNIST1D, published=PUBLISHED_FULLY_CONNECTED)


def learn_digits(course: Course) -> None:
    """A LeNet on all ten digits."""
    data = load_digits(course.rng)
    first, last = nets.make_lenet_stages(course.rng)
    head = nets.make_lenet_head(10, course.rng)
    course.train("LeNet", Network([*first, *last, *head]), data, DIGITS)


def transfer_digits(course: Course) -> None:
    """What convolutions have learned on the digits 0-4 serves to tell 5-9 apart.

    Yosinski, Clune, Bengio and Lipson 2014, "How transferable are features in deep neural networks?"
    (arXiv 1411.1792).
    """
    data = load_digits(course.rng)
    low, high = choose_classes(data, 0, 4), choose_classes(data, 5, 9)
    first, last = nets.make_lenet_stages(course.rng)
    old_head, new_head = (nets.make_lenet_head(5, course.rng) for _ in range(2))

    course.train("base, digits 0-4", Network([*first, *last, *old_head]), low, DIGITS)
    course.train("new head, digits 5-9", Network(new_head), high, DIGITS, frozen=Network([*first, *last]))
    course.train(
        "fine-tuned, digits 5-9", Network([*last, *new_head]), high, FINE_TUNING, frozen=Network(first)
    )
