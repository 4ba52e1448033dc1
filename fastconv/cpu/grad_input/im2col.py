"""im2col turned round: the gradient of the input of windows with strides, as columns that are added up.

    w (K, C T R S), turned  x  grad_y (K, pixels)   --1x1-->   columns (C T R S, pixels)   --fold-->   grad_x

The product reads the weight as it lies. Convolutions, phase by phase, would read filters whose channels have
changed places first: with many output channels that takes longer than to add up columns (col2im).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fastconv.cpu import memory, pointwise
from fastconv.cpu.band import add_row, columns_inside, finish, locate, make_ending, padded_bias, task_threads
from fastconv.cpu.compiling import part
from fastconv.cpu.device import itemsize
from fastconv.cpu.im2col import TILES, Windows, make_windows
from fastconv.cpu.simd import Block, Kernel, Tile, advance, allocate, release, spread_rows, table, view_of
from fastconv.problem import Epilogue, Operands

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.cpu.pointwise import AnyTile
    from fastconv.problem import ConvProblem

LEAST_CHANNELS = 512  # of the output: with fewer, columns take longer than the exchange
IN_CACHE = 16  # times L2: so much the columns of some images may take
ROW_CYCLES = 6  # to add a row of a column, and to move each of its elements
ELEMENT_CYCLES = 1.5


@lru_cache(maxsize=256)
def suits(problem: ConvProblem, tile: Tile) -> bool:
    """Say whether columns are made; of a part of a problem as of the whole, so that bits are the same."""
    extents = problem.weight_shape5[2:]
    overlaps = any(stride < extent for stride, extent in zip(problem.stride, extents, strict=True))
    is_plain = problem.stride == (1, 1, 1) or problem.groups > 1 or problem.order == "NHWC"
    return overlaps and not is_plain and problem.K >= LEAST_CHANNELS


@lru_cache(maxsize=256)
def _make_product(problem: ConvProblem, device: Device, images: int) -> tuple[ConvProblem, AnyTile]:
    """Return the 1x1 convolution that makes the columns of some images, and the tile that costs least."""
    O, P, Q = problem.output_shape5[2:]
    product = replace(
        problem, direction="forward", N=images, C=problem.K, K=problem.gemm_k, D=O, H=P, W=Q, T=1, R=1, S=1,
        stride=(1, 1, 1), dilation=(1, 1, 1), padding=((0, 0),) * 3,
    )  # fmt: skip
    tiles = (tile for tile in pointwise.TILES if device.fits(tile, problem.compute_dtype))
    return product, min(tiles, key=lambda tile: pointwise.cost(product, tile, device))


def _share_images(problem: ConvProblem, device: Device) -> int:
    """Return how many images have their columns in memory at a time."""
    image = itemsize(problem) * problem.gemm_k * math.prod(problem.output_shape5[2:])
    return max(1, min(problem.N, IN_CACHE * device.l2 // image))


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds on one core; the first of all tiles stands for the product's."""
    if tile != TILES[0]:
        return math.inf
    product, best = _make_product(problem, device, problem.N)
    O, P, Q = problem.output_shape5[2:]
    fold = problem.N * problem.gemm_k * O * P * (ROW_CYCLES + Q * ELEMENT_CYCLES)
    return pointwise.cost(product, best, device) + device.seconds(problem, fold)


def workspace(problem: ConvProblem, tile: Tile, device: Device, of_parts: int) -> int:
    """Return the bytes of the columns, and what their product takes."""
    product, best = _make_product(problem, device, _share_images(problem, device))
    return itemsize(problem) * math.prod(product.output_shape5) + pointwise.workspace(product, best, device)


def prepare(problem: ConvProblem, tile: Tile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the weight in line: which form its product likes best depends on the size of the images."""
    return np.ascontiguousarray(weight)


def _turn(weight: np.ndarray) -> np.ndarray:
    """Return the weight of the product, a row for each (c, t, r, s): a view, if the weight lies in line."""
    return weight.reshape(weight.shape[0], -1).T[:, :, None, None, None]


def reads(operands: Operands) -> bool:
    """Say that arrays with any strides are read and written."""
    return True


def run(problem: ConvProblem, tile: Tile, device: Device, operands: Operands) -> None:
    """Compute the gradient, some images at a time; the weight is prepared or as given."""
    o, images, workers = operands, _share_images(problem, device), task_threads(problem)
    product, best = _make_product(problem, device, images)
    weight, columns = _turn(o.weight), memory.allocate(product.output_shape5, problem.compute_dtype)
    block, windows = _plan(problem, device)
    bias, ending = padded_bias(replace(problem, K=problem.C), o.bias, 0), make_ending(o)
    for n in range(0, problem.N, images):
        count = min(images, problem.N - n)
        x, some = o.x[n : n + count], columns[:count]
        own = Operands(x, weight, None, None, Epilogue(), some)
        pointwise.run(replace(product, N=count), best, device, own)
        _fold(block, count * problem.C, workers, windows, n, some, bias, o.out, ending)


@lru_cache(maxsize=256)
def _plan(problem: ConvProblem, device: Device) -> tuple[Block, Windows]:
    """Return what of the arguments of `_fold` does not change from call to call."""
    dtype = problem.compute_dtype
    return Block(dtype, 1, 1, device.lanes(dtype)), make_windows(problem)


@Kernel
def _fold(block, first, last, g, first_image, columns, bias, out, ending):
    """Add up the columns of channels of some images, the first of which is `first_image` of out.

    Columns of out whose distance is the stride lie side by side until all is added.
    """
    columns, bias, out = view_of(columns), table(bias), view_of(out)
    taps, pitch = g.T * g.R * g.S, (g.W + g.stride_w - 1) // g.stride_w
    size = g.D * g.H * g.stride_w * pitch
    sums = allocate(block, size)
    for task in range(first, last):
        n, c = divmod(task, g.C)
        for i in range(size):
            sums[i] = bias[c]
        for tap in range(taps):
            _add_column(block, g, tap, locate(block, columns, (n, c * taps + tap, 0, 0, 0)), sums, pitch)
        for d in range(g.D):
            for phase in range(min(g.stride_w, g.W)):
                spread_rows(
                    block, g.H, locate(block, out, (first_image + n, c, d, 0, phase)),
                    out[4], g.stride_w * out[5],
                    advance(sums, (d * g.H * g.stride_w + phase) * pitch), g.stride_w * pitch,
                    (g.W - phase + g.stride_w - 1) // g.stride_w,
                )  # fmt: skip
            finish(block, out, (first_image + n, c, d, 0, 0), (1, g.H, g.W), ending)
    release(sums)


@part
def _add_column(block, g, tap, column, sums, pitch):
    """Add one tap of all windows to the elements that they read it from."""
    rest, s = divmod(tap, g.S)
    t, r = divmod(rest, g.R)
    w = s * g.dilation_w - g.pad_w
    low, high = columns_inside(w, g.stride_w, g.Q, g.W)
    place, phase = divmod(w + low * g.stride_w, g.stride_w)
    for o in range(g.O):
        d = o * g.stride_d + t * g.dilation_d - g.pad_d
        for p in range(g.P):
            h = p * g.stride_h + r * g.dilation_h - g.pad_h
            if 0 <= d < g.D and 0 <= h < g.H:
                row = advance(sums, ((d * g.H + h) * g.stride_w + phase) * pitch + place)
                add_row(block, row, advance(column, (o * g.P + p) * g.Q + low), high - low)
