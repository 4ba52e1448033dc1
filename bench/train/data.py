"""A random generator enters; a data set leaves, the same one for the same seed.

MNIST-1D is that of Greydanus 2020, "Scaling down deep learning" (arXiv 2011.14439). The templates and the
amounts of noise are facts of that data set, read in its public repository, github.com/greydanus/mnist1d.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bench.session import CommandError

# The ten digits as strokes of 12 heights, as a hand would write them on one line.
TEMPLATES = np.array([
    [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
    [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
    [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
    [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
    [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
    [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
    [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
    [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
    [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
    [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
])  # fmt: skip

PER_CLASS = 500
TRAINING = 4000  # of the 5,000 examples
LENGTH = 40

FEWEST_ZEROS, MOST_ZEROS = 36, 60  # behind a template
STRETCHED = TEMPLATES.shape[1] + MOST_ZEROS  # points while an example is made
SCALES = 0.8, 1.2
SHIFTS = 48
SMOOTH_NOISE, SMOOTH_WIDTH = 0.25, 2  # deviation before it is filtered, and of the Gaussian filter, in points
WHITE_NOISE = 0.02
SHEAR = 0.75 / 2  # the largest fall from end to end

PIXEL_MAX = 16  # of scikit-learn's digits
TEST_SHARE = 0.2  # of them


@dataclass(frozen=True)
class Examples:
    """What a network sees, inputs (N, C, ...) in float32, and what it should say, classes (N,)."""

    inputs: np.ndarray
    classes: np.ndarray

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, chosen: np.ndarray | slice) -> Examples:
        return Examples(self.inputs[chosen], self.classes[chosen])

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[Examples]:
        """All examples once, in random order, `size` at a time."""
        order = rng.permutation(len(self))
        for start in range(0, len(self), size):
            yield self[order[start : start + size]]


@dataclass(frozen=True)
class Dataset:
    """Examples to learn from, and others to be judged by."""

    training: Examples
    test: Examples


def make_mnist1d(rng: np.random.Generator) -> Dataset:
    """4,000 + 1,000 examples (N, 1, 40): all classes equally often, mean 0 and deviation 1 over all."""
    classes = rng.permutation(np.repeat(np.arange(len(TEMPLATES)), PER_CLASS))
    strokes = _normalise_templates()
    signals = np.array([_make_example(strokes[each], rng) for each in classes])
    signals = (signals - signals.mean()) / signals.std()
    examples = Examples(signals[:, None].astype(np.float32), classes)
    return Dataset(examples[:TRAINING], examples[TRAINING:])


def _normalise_templates() -> np.ndarray:
    """Each template with deviation 1/6, starting at 0, so that zeros continue it."""
    strokes = TEMPLATES / TEMPLATES.std(axis=1, keepdims=True) / 6
    return strokes - strokes[:, :1]


def _make_example(stroke: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pad, stretch, scale and shift a stroke, put it into noise, tilt it, and take 40 points of that."""
    padded = np.append(stroke, np.zeros(rng.integers(FEWEST_ZEROS, MOST_ZEROS, endpoint=True)))
    places = np.linspace(0, len(padded) - 1, STRETCHED)
    signal = np.interp(places, np.arange(len(padded)), padded) * rng.uniform(*SCALES)

    shift = rng.integers(SHIFTS)
    signal, beside = np.roll(signal, shift), np.roll(places >= len(stroke), shift)
    signal[beside] = _smooth(rng.normal(0, SMOOTH_NOISE, STRETCHED))[beside]
    signal += rng.normal(0, WHITE_NOISE, STRETCHED)

    signal -= rng.uniform(-SHEAR, SHEAR) * np.linspace(-0.5, 0.5, STRETCHED)
    return np.interp(np.linspace(0, STRETCHED - 1, LENGTH), np.arange(STRETCHED), signal)


def _smooth(noise: np.ndarray) -> np.ndarray:
    """Gaussian filter, mirrored at the ends: what was independent from point to point becomes waves."""
    reach = 4 * SMOOTH_WIDTH
    gaussian = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SMOOTH_WIDTH) ** 2)
    return np.convolve(np.pad(noise, reach, mode="symmetric"), gaussian / gaussian.sum(), mode="valid")


def load_digits(rng: np.random.Generator) -> Dataset:
    """scikit-learn's 1,797 handwritten digits (N, 1, 8, 8) in -1 ... 1, a fifth of them to be judged by."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        needed = (
            'scikit-learn, which holds the digits, is not installed: pip install ".[bench]" in the checkout'
        )
        raise CommandError(needed) from error
    images, classes = datasets.load_digits(return_X_y=True)
    inputs = (images.reshape(-1, 1, 8, 8) * 2 / PIXEL_MAX - 1).astype(np.float32)
    examples = Examples(inputs, classes.astype(np.int64))[rng.permutation(len(classes))]
    kept = round(len(examples) * TEST_SHARE)
    return Dataset(examples[kept:], examples[:kept])


def choose_classes(data: Dataset, first: int, last: int) -> Dataset:
    """The examples of the classes first ... last, which are then called 0, 1, ..."""

    def choose(examples: Examples) -> Examples:
        chosen = examples[(first <= examples.classes) & (examples.classes <= last)]
        return Examples(chosen.inputs, chosen.classes - first)

    return Dataset(choose(data.training), choose(data.test))
