"""im2col and GEMM: the windows of a block of pixels are gathered into panels, then multiplied.

    x[n, group]  --gather-->  panels[i, (c, t, r, s), pixels]        w[k, (c, t, r, s)]  --multiply-->  y

A panel is as wide as a tile and begins with a cache line, so that no vector of it lies in two lines. As a
rule most do that are read where they lie: two loads each, for which some processors have no time.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu.band import (
    arguments_of,
    columns_inside,
    count_parts,
    even_share,
    finish,
    flatten,
    lie_in_rows,
    locate,
    make_block,
    multiply,
    task_threads,
    weight_lies_well,
)
from fastconv.cpu.compiling import part, small_part
from fastconv.cpu.device import BOX_ROW_CYCLES, itemsize
from fastconv.cpu.simd import (
    Block,
    Kernel,
    Tile,
    advance,
    allocate,
    block_columns,
    block_lanes,
    block_rows,
    copy_rows,
    copy_whole,
    prefetch,
    release,
    table,
    view_of,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

FETCHED_CHANNELS = 4  # ahead of the channel in hand: 12 were as fast, 4 take less of the cache
SHARED_CHANNELS = 60  # output channels of each worker that pay for gathering a block once more
FAR = 1.3  # a panel that leaves no room in L2 for the weight takes so much longer

TILES = (Tile(8, 3), Tile(6, 4), Tile(4, 3), Tile(2, 4))


class Windows(NamedTuple):
    """Where the windows of one group's output pixels lie in its input."""

    C: int
    D: int
    H: int
    W: int
    O: int
    P: int
    Q: int
    T: int
    R: int
    S: int
    stride_d: int
    stride_h: int
    stride_w: int
    pad_d: int
    pad_h: int
    pad_w: int
    dilation_d: int
    dilation_h: int
    dilation_w: int


class Division(NamedTuple):
    """How the work is divided; C and K are those of one group."""

    groups: int
    K: int
    images: int  # whose pixels are counted one after the other
    vectors: int  # that they fill in a plane of outputs, and the blocks that share those evenly
    blocks: int
    panels: int  # of a block, and the vectors of each
    panel: int
    k_step: int  # output channels of one task, and how many tasks make a group
    k_parts: int


@lru_cache(maxsize=256)
def make_windows(problem: ConvProblem) -> Windows:
    """Return the windows of a problem."""
    return Windows(
        problem.C // problem.groups, problem.D, problem.H, problem.W, problem.O, problem.P, problem.Q,
        problem.T, problem.R, problem.S, *problem.stride, *problem.padding_before, *problem.dilation,
    )  # fmt: skip


def _joins(problem: ConvProblem, device: Device) -> bool:
    """Say whether images share vectors: of 7 x 7 pixels each alone leaves 15 lanes of 64 empty."""
    rest = problem.P * problem.Q % device.lanes(problem.compute_dtype)
    return problem.N > 1 and problem.O == 1 and rest > 0


@lru_cache(maxsize=256)
def _divide(problem: ConvProblem, tile: Tile, device: Device, workers: int, joins: bool) -> Division:
    """Cut output planes into blocks whose panels take half of L2, or one panel, for all workers.

    joins  whether the planes of all images are one

    Blocks that are fewer than workers are gathered by each of them, and the output channels are shared, where
    those are so many that they pay for it; else there are more blocks.
    """
    lanes, K = device.lanes(problem.compute_dtype), problem.gemm_m
    images = problem.N if joins else 1
    planes = problem.N // images * problem.groups * problem.O
    vectors = math.ceil(images * problem.P * problem.Q / lanes)
    room = device.l2 // 2 // itemsize(problem) // problem.gemm_k // lanes
    blocks = math.ceil(vectors / max(room, tile.vectors))
    is_short = planes * blocks < workers
    k_parts = workers if is_short and SHARED_CHANNELS * workers <= K else 1
    blocks = count_parts(blocks, vectors, planes * k_parts, workers)
    most = math.ceil(vectors / blocks)
    panel = even_share(most, tile.vectors)
    k_step = even_share(K, math.ceil(K / k_parts), tile.rows)
    return Division(
        problem.groups, K, images, vectors, blocks, math.ceil(most / panel), panel, k_step,
        math.ceil(K / k_step),
    )  # fmt: skip


def cost(problem: ConvProblem, tile: Tile, device: Device) -> float:
    """Return the estimated seconds on one core."""
    problem = flatten(problem) or problem  # as it lies in contiguous arrays
    d = _divide(problem, tile, device, 1, _joins(problem, device))
    lanes, dtype = device.lanes(problem.compute_dtype), problem.compute_dtype
    narrow, wider = divmod(d.vectors, d.blocks)
    multiply = sum(
        blocks * device.multiply_cycles(tile, d.K, vectors * lanes, problem.gemm_k, dtype, True)
        for blocks, vectors in ((d.blocks - wider, narrow), (wider, narrow + 1))
    )
    if d.panel * lanes * problem.gemm_k * itemsize(problem) > device.l2 // 2:
        multiply *= FAR
    weight = d.K * problem.gemm_k * itemsize(problem)
    fetch = device.fetch_cycles(weight * (d.blocks - 1)) / 2 if weight > device.l2 else 0  # half is hidden
    runs = d.images * problem.P + d.vectors / d.panel  # of pixels in a row of the image and in a panel
    rows, pixels = runs * problem.gemm_k, d.images * problem.P * problem.Q
    gather = device.copy_cycles(problem, rows, pixels / runs, problem.stride[2], BOX_ROW_CYCLES)
    scatter = d.K * pixels if problem.order == "NHWC" else 0  # stored element by element
    planes = problem.N // d.images * d.groups * problem.O
    return device.seconds(problem, planes * (multiply + fetch + gather + scatter))


def workspace(problem: ConvProblem, tile: Tile, device: Device) -> int:
    """Return the bytes of panels that all threads hold together."""
    workers = task_threads(problem)
    lanes = device.lanes(problem.compute_dtype)
    panels = max(
        _divide(problem, tile, device, workers, joins).panels for joins in {False, _joins(problem, device)}
    )
    return workers * itemsize(problem) * panels * problem.gemm_k * tile.vectors * lanes


def prepare(problem: ConvProblem, tile: Tile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the weight as the kernel reads it."""
    return np.ascontiguousarray(weight)


@lru_cache(maxsize=256)
def takes_view(problem: ConvProblem, device: Device) -> bool:
    """Say whether a weight of rank 5 is best left as it lies, whatever its strides."""
    return problem.T == problem.R == problem.S == 1 and weight_lies_well(problem, device)


def run(problem: ConvProblem, tile: Tile, device: Device, operands: Operands) -> None:
    """Convolve; the weight is prepared or as given."""
    rows = flatten(problem)
    if rows is not None and lie_in_rows(operands):
        problem = rows
    of_row, of_column = operands.out.strides[3:]
    joins = _joins(problem, device) and (problem.P == 1 or of_row == problem.Q * of_column)
    plan = _plan(problem, tile, device, task_threads(problem), joins)
    _run_blocks(*plan, *arguments_of(problem, operands, tile.rows, any_weight=takes_view(problem, device)))


@lru_cache(maxsize=256)
def _plan(
    problem: ConvProblem, tile: Tile, device: Device, workers: int, joins: bool
) -> tuple[Block, int, int, Windows, Division]:
    """Return what of the arguments of `_run_blocks` does not change from call to call."""
    d = _divide(problem, tile, device, workers, joins)
    tasks = problem.N // d.images * d.groups * problem.O * d.blocks * d.k_parts
    return make_block(problem, tile, device), tasks, workers, make_windows(problem), d


@Kernel
def _run_blocks(block, first, last, g, d, x, w, bias, y, ending):
    x, w_view, w, bias, y = view_of(x), view_of(w), table(w), table(bias), view_of(y)
    lanes, width, taps = block_lanes(block), block_columns(block), g.C * g.T * g.R * g.S
    w_steps = (w_view[1], w_view[2]) if taps == g.C else (taps, 1)
    panels = allocate(block, d.panels * taps * width)
    tile = allocate(block, block_rows(block) * width)
    size = d.panel * lanes
    row = g.P * g.Q if y[4] == g.Q * y[5] else g.Q  # rows that follow one another make one
    rows_of_y = y if d.images == 1 else (y[0], y[1], y[2], y[3], y[1], y[5])  # an image is a row then
    for task in range(first, last):
        rest, k_part = divmod(task, d.k_parts)
        rest, index = divmod(rest, d.blocks)
        rest, o = divmod(rest, g.O)
        n, group = divmod(rest, d.groups)
        pixel = d.vectors * index // d.blocks * lanes
        count = min(d.vectors * (index + 1) // d.blocks * lanes, d.images * g.P * g.Q) - pixel
        image = locate(block, x, (n, group * g.C, 0, 0, 0))
        gather(block, panels, size, width, image, x, g, o, pixel, count)
        k = k_part * d.k_step
        k_count, channel = min(d.k_step, d.K - k), group * d.K + k
        in_row = g.P == d.images == 1  # then pixels are finished while they lie in the cache
        begin, pitch, q = (0, count, pixel) if in_row else (pixel, row, 0)
        multiply(
            block, advance(w, channel * w_steps[0]), w_steps, k_count, panels, width, taps,
            advance(bias, channel),
            (count, size, size, taps * width), 0, begin, pitch, pitch,
            rows_of_y, (n, channel, o, 0, q), tile, int(in_row), ending,
        )  # fmt: skip
        while count > 0 and not in_row:  # one row of pixels at a time
            later, p, q = _find_pixel(g, pixel)
            run = min(count, g.Q - q)
            finish(block, y, (n + later, channel, o, p, q), (k_count, 1, run), ending)
            pixel, count = pixel + run, count - run
    release(panels)
    release(tile)


@small_part
def _find_pixel(g, pixel):
    """Return image, row and column of a pixel; images follow one another."""
    rest, q = divmod(pixel, g.Q)
    image, p = divmod(rest, g.P)
    return image, p, q


@part
def gather(block, panels, size, width, image, x, g, o, pixel, count):
    """Copy the taps (c, t, r, s) of pixels pixel ... pixel+count-1 to panels.

    size, width  pixels of a panel, and how far apart its taps lie
    image        pointer to the first image, from which pixels are counted

    Run by run of pixels in one row, tap by tap, of all channels at once. The lanes beyond the last pixel are
    zeros: what memory holds by chance may be subnormal, and a product with that takes 100 cycles.
    """
    lanes, step = block_lanes(block), g.T * g.R * g.S * width
    for begin in range(0, count, size):
        panel, exist = advance(panels, begin // size * g.C * step), min(size, count - begin)
        j = 0
        while j < exist:
            n, p, q = _find_pixel(g, pixel + begin + j)
            run, origin = min(exist - j, g.Q - q), advance(image, n * x[1])
            written = run if j + run < exist else min(width, (exist + lanes - 1) // lanes * lanes) - j
            target = advance(panel, j)
            for t in range(g.T):
                d = o * g.stride_d + t * g.dilation_d - g.pad_d
                for r in range(g.R):
                    h = p * g.stride_h + r * g.dilation_h - g.pad_h
                    W = g.W if 0 <= d < g.D and 0 <= h < g.H else 0
                    if g.stride_w > 1 and x[5] == 1 and W > 0 and r + g.stride_h >= g.R:
                        below = advance(origin, d * x[3] + (h + g.stride_h) * x[4] + q * g.stride_w)
                        _fetch_channels(block, g.C, below, x[2], run * g.stride_w)
                    for s in range(g.S):
                        w = q * g.stride_w + s * g.dilation_w - g.pad_w
                        low, high = columns_inside(w, g.stride_w, run, W)
                        source = advance(origin, d * x[3] + h * x[4] + w * x[5])
                        _copy_channels(
                            block, g.C, target, step, source, x[2], g.stride_w * x[5], written, low, high
                        )
                        target = advance(target, width)
            j += run


@small_part
def _fetch_channels(block, channels, source, channel_step, count):
    """Ask for the same pixels of all channels, which the next run of outputs is the first to read."""
    for c in range(channels):
        for i in range(0, count, block_lanes(block)):
            prefetch(block, advance(source, c * channel_step + i))


@part
def _copy_channels(block, channels, target, step, source, channel_step, column_step, count, low, high):
    """Copy the same pixels of all channels, as `copy_rows` does; whole vectors of them are fetched ahead.

    Channels lie too far apart for the processor to do that by itself.
    """
    lanes = block_lanes(block)
    if column_step != 1 or low > 0 or high < count or count % lanes:
        copy_rows(block, channels, target, step, source, channel_step, column_step, count, low, high)
        return
    for i in range(0, count, lanes):
        to, of = advance(target, i), advance(source, i)
        for c in range(channels):
            prefetch(block, advance(of, (c + FETCHED_CHANNELS) * channel_step))
            copy_whole(block, advance(to, c * step), advance(of, c * channel_step))
