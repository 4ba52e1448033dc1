"""Problems for the tests, named ones that each try one thing; tests/strategies.py tries the rest."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastconv.problem import ConvProblem, make_problem


@dataclass(frozen=True)
class Case:
    """The arguments of one make_problem call under the name of what they try."""

    name: str
    op: str
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def problem(self, **changes) -> ConvProblem:
        return make_problem(self.op, self.input_shape, self.weight_shape, **{**self.options, **changes})

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("one_pixel", "conv2d", (1, 1, 1, 1), (1, 1, 1, 1)),
    Case("one_window", "conv2d", (1, 3, 5, 7), (4, 3, 5, 7)),
    Case("plain_3x3", "conv2d", (2, 5, 9, 11), (7, 5, 3, 3)),
    Case("padded_3x3", "conv2d", (2, 8, 14, 14), (16, 8, 3, 3), {"padding": 1}),
    Case("one_channel_in", "conv2d", (2, 1, 12, 13), (6, 1, 3, 3), {"padding": 1}),
    Case("one_channel_out", "conv2d", (2, 6, 12, 13), (1, 6, 3, 3), {"padding": 1}),
    Case("many_channels", "conv2d", (1, 67, 5, 6), (71, 67, 3, 3), {"padding": 1}),
    Case("odd_sizes", "conv2d", (1, 4, 7, 13), (5, 4, 3, 3), {"padding": 1}),
    Case("one_row", "conv2d", (1, 4, 1, 37), (5, 4, 1, 3)),
    Case("one_column", "conv2d", (1, 4, 37, 1), (5, 4, 3, 1)),
    Case("padded_5x5", "conv2d", (2, 6, 11, 13), (8, 3, 5, 5), {"padding": 2, "groups": 2}),
    Case("even_kernel", "conv2d", (2, 3, 8, 9), (4, 3, 2, 4), {"padding": 1}),
    Case("stride_2", "conv2d", (1, 3, 15, 16), (8, 3, 3, 3), {"stride": 2, "padding": 1}),
    Case("stride_per_axis", "conv2d", (1, 3, 15, 16), (8, 3, 3, 3), {"stride": (3, 2)}),
    Case("stride_beyond_kernel", "conv2d", (2, 3, 17, 19), (4, 3, 2, 2), {"stride": (5, 4)}),
    Case("patches", "conv2d", (2, 6, 8, 9), (4, 3, 4, 3), {"stride": (4, 3), "groups": 2}),
    Case("patches_depthwise", "conv2d", (1, 5, 6, 14), (5, 1, 2, 2), {"stride": 2, "groups": 5}),
    Case("stem_7x7", "conv2d", (1, 3, 30, 30), (8, 3, 7, 7), {"stride": 2, "padding": 3}),
    Case("stride_4", "conv2d", (1, 2, 37, 38), (5, 2, 11, 11), {"stride": 4, "padding": 2}),
    Case("dilated", "conv2d", (1, 4, 16, 15), (6, 4, 3, 3), {"dilation": 2, "padding": 2}),
    Case("dilation_per_axis", "conv2d", (1, 4, 16, 15), (6, 4, 3, 3), {"dilation": (3, 1), "stride": (1, 2)}),
    Case("padding_beyond_kernel", "conv2d", (1, 2, 3, 4), (3, 2, 2, 2), {"padding": 4}),
    Case("padding_pairs", "conv2d", (1, 2, 9, 8), (3, 2, 3, 3), {"padding": ((2, 0), (0, 1))}),
    Case("same_even_kernel", "conv2d", (1, 2, 9, 8), (3, 2, 4, 2), {"padding": "same"}),
    Case("same_stride_3", "conv2d", (1, 2, 10, 11), (3, 2, 3, 5), {"padding": "same", "stride": 3}),
    Case("groups", "conv2d", (2, 6, 10, 9), (9, 2, 3, 3), {"groups": 3, "padding": 1}),
    Case("pointwise", "conv2d", (2, 9, 7, 9), (11, 9, 1, 1)),
    Case("pointwise_stride_2", "conv2d", (2, 9, 7, 9), (11, 9, 1, 1), {"stride": 2}),
    Case("pointwise_stride_per_axis", "conv2d", (1, 8, 7, 16), (5, 8, 1, 1), {"stride": (3, 2)}),
    Case("pointwise_groups", "conv2d", (2, 8, 7, 9), (12, 4, 1, 1), {"groups": 2}),
    Case("depthwise", "conv2d", (2, 7, 12, 13), (7, 1, 3, 3), {"groups": 7, "padding": 1}),
    Case(
        "depthwise_stride_2", "conv2d", (2, 7, 13, 14), (7, 1, 3, 3),
        {"groups": 7, "stride": 2, "padding": 1},
    ),
    Case("depthwise_pairs", "conv2d", (2, 6, 9, 7), (6, 1, 3, 3), {"groups": 6, "padding": 1}),
    Case(
        "depthwise_pairs_stride_2", "conv2d", (2, 6, 12, 13), (6, 1, 3, 3),
        {"groups": 6, "stride": 2, "padding": 1},
    ),
    Case("depthwise_7x7", "conv2d", (2, 7, 12, 13), (7, 1, 7, 7), {"groups": 7, "padding": 3}),
    Case("depthwise_multiplier", "conv2d", (1, 5, 12, 13), (15, 1, 3, 3), {"groups": 5, "stride": 2}),
    Case("channels_dilated", "conv2d", (2, 4, 9, 9), (4, 1, 3, 3), {"groups": 4, "dilation": 2}),
    Case("channels_spread", "conv2d", (1, 4, 9, 9), (4, 1, 3, 3), {"groups": 4, "dilation": 2, "stride": 2}),
    Case(
        "depthwise_12x5", "conv2d", (1, 2, 40, 21), (4, 1, 12, 5),
        {"groups": 2, "stride": (2, 1), "dilation": (3, 2), "padding": (9, 3)},
    ),
    Case("depthwise_31x31", "conv2d", (1, 3, 33, 34), (3, 1, 31, 31), {"groups": 3, "padding": 15}),
    Case("empty_batch", "conv2d", (0, 3, 8, 8), (4, 3, 3, 3), {"padding": 1}),
    Case("batch_of_5", "conv2d", (5, 3, 6, 6), (4, 3, 3, 3), {"padding": 1}),
    Case("conv1d", "conv1d", (2, 3, 40), (5, 3, 3), {"stride": 2}),
    Case("conv1d_causal", "conv1d", (1, 4, 50), (4, 1, 4), {"groups": 4, "padding": [(3, 0)]}),
    Case("conv1d_dilated", "conv1d", (1, 4, 64), (6, 4, 5), {"dilation": 7, "padding": "same"}),
    Case("conv1d_of_5_taps", "conv1d", (2, 3, 40), (5, 3, 5), {"padding": 2}),
    Case("column_of_5_taps", "conv2d", (1, 4, 37, 2), (5, 4, 5, 1), {"padding": ((3, 1), (0, 0))}),
    Case("conv1d_pointwise", "conv1d", (3, 6, 21), (5, 6, 1)),
    Case("conv1d_pointwise_stride_2", "conv1d", (2, 5, 8), (5, 5, 1), {"stride": 2}),
    Case("conv3d", "conv3d", (1, 3, 6, 7, 8), (4, 3, 3, 3, 3), {"padding": 1}),
    Case("conv3d_mixed", "conv3d", (2, 4, 7, 6, 9), (6, 2, 2, 3, 1), {"stride": (2, 1, 3), "groups": 2}),
    Case(
        "conv3d_frames", "conv3d", (2, 5, 5, 6, 9), (6, 5, 1, 3, 3),
        {"stride": (2, 1, 1), "padding": (1, 1, 1)},
    ),
    Case(
        "conv3d_planes", "conv3d", (2, 34, 8, 5, 7), (10, 17, 3, 3, 3),
        {"stride": (2, 1, 1), "dilation": (3, 1, 1), "padding": ((2, 4), 1, (0, 1)), "groups": 2},
    ),
    Case(
        "conv3d_phases", "conv3d", (1, 38, 4, 11, 27), (6, 19, 2, 5, 9),
        {"stride": (1, 2, 4), "padding": 1, "groups": 2},
    ),
    Case("conv3d_depthwise", "conv3d", (1, 4, 5, 6, 7), (4, 1, 3, 3, 3), {"groups": 4, "dilation": 2}),
    Case("conv3d_pointwise", "conv3d", (1, 5, 3, 4, 5), (6, 5, 1, 1, 1)),
]  # fmt: skip

# Rows that small caches, and the narrowest band that is worth while, cut into several parts.
WIDE = [
    Case("wide", "conv2d", (2, 3, 4, 301), (5, 3, 3, 3), {"padding": 1}),
    Case("wide_and_deep", "conv2d", (1, 70, 3, 133), (18, 70, 3, 3), {"padding": 1}),
    Case("wide_stride_2", "conv2d", (1, 4, 7, 402), (6, 4, 3, 3), {"padding": (1, 2), "stride": 2}),
    Case("wide_dilated", "conv1d", (1, 6, 333), (8, 3, 5), {"dilation": 3, "groups": 2}),
    Case("wide_pixels", "conv2d", (2, 40, 1, 130), (9, 40, 1, 1)),
    Case("wide_pixels_of_batch", "conv2d", (19, 200, 7, 7), (400, 100, 1, 1), {"groups": 2}),
    Case("wide_pixels_of_rows", "conv2d", (1, 40, 11, 13), (9, 40, 1, 1)),
    Case("wide_pixels_stride_2", "conv2d", (1, 9, 5, 259), (7, 9, 1, 1), {"stride": 2}),
    Case("wide_channels", "conv2d", (1, 35, 4, 150), (35, 1, 3, 3), {"groups": 35, "padding": 1}),
    Case("wide_multiplier", "conv2d", (1, 3, 4, 150), (9, 1, 3, 3), {"groups": 3, "padding": 1}),
]  # fmt: skip

# Enough of all axes that tiles lie whole in the output, and some of them just so across the end of a row.
TALL = [
    Case("tall", "conv2d", (1, 2, 25, 51), (65, 2, 3, 3), {"padding": 1}),
    Case("tall_stride_2", "conv2d", (1, 3, 41, 103), (17, 3, 3, 3), {"stride": 2, "padding": 1}),
    Case("tall_pixels", "conv2d", (1, 3, 25, 51), (65, 3, 1, 1)),
    Case("tall_channels", "conv2d", (1, 65, 25, 51), (65, 1, 3, 3), {"groups": 65, "padding": 1}),
    Case("tall_planes", "conv2d", (2, 3, 150, 9), (3, 1, 3, 3), {"groups": 3, "padding": 1}),
    Case("tall_multiplier", "conv2d", (1, 3, 25, 51), (15, 1, 5, 5), {"groups": 3, "padding": 2}),
]  # fmt: skip

# Cases whose product is so much larger than their work that an emulated GPU takes long over them.
HEAVY = [case for case in CASES + TALL if case.name in ("depthwise_31x31", "tall_channels")]


def sizes_around(tile: int) -> dict[str, int]:
    """Sizes named by how they meet a tile: below it, equal, just past it, a multiple, several and a rest."""
    return {"lt": max(tile - 1, 1), "eq": tile, "gt": tile + 1, "div": 2 * tile, "multi": 3 * tile + 1}


def around_tile(outputs: int, pixels: int, m: int = 1) -> list[Case]:
    """Problems of every family with `outputs` output channels and `pixels` pixels (or m x m tiles) in a row.

    Either number is meant to be one of sizes_around a tile's rows or the elements of its vectors.
    """
    k, n = outputs, pixels
    return [
        Case("row", "conv2d", (1, 3, 1, n + 2), (k, 3, 1, 3)),
        Case("rows", "conv2d", (2, 2, 3, n), (k, 2, 3, 3), {"padding": 1}),
        Case("stride_2", "conv2d", (1, 3, 5, 2 * n + 1), (k, 3, 3, 3), {"stride": 2}),
        Case("groups", "conv2d", (1, 4, 4, n + 2), (2 * k, 2, 2, 2), {"groups": 2, "dilation": (1, 2)}),
        Case("signal", "conv1d", (2, 5, n), (k, 5, 4), {"padding": [(2, 1)]}),
        Case("volume", "conv3d", (1, 2, 3, 2, n), (k, 2, 2, 1, 3), {"padding": "same"}),
        Case("pixels", "conv2d", (2, 7, 1, n), (k, 7, 1, 1)),
        Case("pixels_of_rows", "conv2d", (1, 5, 3, n), (k, 5, 1, 1)),
        Case("pixels_stride_2", "conv2d", (1, 6, 2, 2 * n - 1), (2 * k, 3, 1, 1), {"stride": 2, "groups": 2}),
        Case("multiplier", "conv2d", (1, 3, 3, n), (3 * k, 1, 3, 3), {"groups": 3, "padding": 1}),
        Case("channels", "conv2d", (1, k, 2, n), (k, 1, 3, 3), {"groups": k, "padding": 1}),
        Case("channels_stride_2", "conv2d", (2, k, 4, 2 * n), (2 * k, 1, 2, 2), {"groups": k, "stride": 2}),
        Case("tiles", "conv2d", (1, 17, m, n * m), (k, 17, 3, 3), {"padding": 1}),
        Case("tiles_cut", "conv2d", (1, 5, m + 1, n * m + 1), (k, 5, 3, 3), {"padding": ((1, 0), (0, 1))}),
        Case("tiles_of_batch", "conv2d", (n, 2, m, m), (k, 2, 3, 3), {"padding": 1}),
        Case("tiles_groups", "conv2d", (1, 6, 2 * m, n * m), (2 * k, 3, 3, 3), {"padding": 1, "groups": 2}),
    ]  # fmt: skip


def operands(rng, problem: ConvProblem, fill) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Input, weight, bias and residual in the problem's dtype; fill is compare.integers or normals."""
    shapes = (problem.input_shape, problem.weight_shape, (problem.K,), problem.output_shape)
    x, w, bias, residual = (fill(rng, shape, problem.dtype) for shape in shapes)
    return x, w, bias, residual


def options_of(problem: ConvProblem) -> dict[str, Any]:
    """The keyword arguments that restate the problem to an operation."""
    axes = slice(3 - problem.ndim, None)
    return {
        "stride": problem.stride[axes],
        "padding": problem.padding[axes],
        "dilation": problem.dilation[axes],
        "groups": problem.groups,
    }
