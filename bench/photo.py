"""A photograph enters; its maps under the classical kernels leave as a picture, with a checked row each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import cbook
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

import fastconv
from bench.check import Oracle
from bench.rows import Row
from bench.timing import measure
from fastconv.plan import make_plan
from fastconv.problem import make_problem

_BINOMIAL = np.array([1, 8, 28, 56, 70, 56, 28, 8, 1]) / 256  # close to a Gaussian of 1.4 pixels

# A kernel whose entries sum to 1 gives an image; one whose entries sum to 0 gives signed differences.
FILTERS = {
    "horizontal edges (Sobel)": np.array([[-1, -2, -1], [0, 0, 0], [1, 2, 1]]),
    "vertical edges (Sobel)": np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]),
    "blur (9 x 9 binomial)": np.outer(_BINOMIAL, _BINOMIAL),
    "sharpen": np.array([[0, -1, 0], [-1, 5, -1], [0, -1, 0]]),
    "Laplacian": np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]]),
}


def run_photo(picture: Path) -> list[Row]:
    """Filter the photograph, save the picture of its maps, and return one row per filter."""
    photo = load_photo()
    rows, maps = [], {}
    for name, kernel in FILTERS.items():
        row, maps[name] = filter_photo(photo, name, kernel)
        rows.append({**row, "picture": picture.name})
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_maps(photo, maps).savefig(picture, dpi=110)
    return rows


def load_photo() -> np.ndarray:
    """Matplotlib's portrait of Grace Hopper as (1, 3, H, W) float32 in 0 ... 1."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        pixels = imread(file, format="jpg")
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0)[None], dtype=np.float32) / 255


def filter_photo(photo: np.ndarray, name: str, kernel: np.ndarray) -> tuple[Row, np.ndarray]:
    """Convolve every colour with `kernel`, check the result and time the call."""
    channels = photo.shape[1]
    weight = np.broadcast_to(kernel, (channels, 1, *kernel.shape)).astype(np.float32)
    problem = make_problem("conv2d", photo.shape, weight.shape, padding="same", groups=channels)
    plan = make_plan(problem)

    def call() -> np.ndarray:
        return fastconv.conv2d(photo, weight, padding="same", groups=channels)

    result = call()
    verdict = Oracle(problem, photo, weight).judge(result, plan.error_bound())
    times = measure(call)
    row = {
        "kind": "photo", "filter": name, "key": problem.key, "algorithm": plan.algorithm.name,
        "tile": str(plan.tile), "min": times.minimum, "median": times.median, "p80": times.p80,
        "error": verdict.error, "passed": verdict.passed, "reason": verdict.reason,
    }  # fmt: skip
    return row, result


def draw_maps(photo: np.ndarray, maps: dict[str, np.ndarray]) -> Figure:
    """The photograph and its maps side by side."""
    figure = Figure(figsize=(3.1 * (len(maps) + 1) / 2, 7.8), layout="constrained")
    axes = figure.subplots(2, (len(maps) + 2) // 2).flat
    draw_image(next(axes), "the photograph", photo)
    for axis, (name, result) in zip(axes, maps.items()):
        if abs(FILTERS[name].sum()) < 1e-6:
            draw_differences(axis, name, result)
        else:
            draw_image(axis, name, result)
    return figure


def draw_image(axis: Axes, title: str, image: np.ndarray) -> None:
    """An image keeps the photograph's own range: what leaves it is clipped, as on any screen."""
    axis.imshow(np.moveaxis(image[0].clip(0, 1), 0, -1))
    _label(axis, title)


def draw_differences(axis: Axes, title: str, result: np.ndarray) -> None:
    """Signed differences, mean of the colours: grey is zero, and 2 % of the pixels may be off the scale."""
    grey = result[0].mean(axis=0)
    limit = np.quantile(np.abs(grey), 0.98)
    axis.imshow(grey, cmap="gray", vmin=-limit, vmax=limit)
    _label(axis, f"{title}, grey = 0, ±{limit:.2g}")


def _label(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_axis_off()
