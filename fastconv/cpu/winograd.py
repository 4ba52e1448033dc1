"""Winograd F(m x m, 3 x 3), m = 2 or 4: a block of tiles goes through all stages while it lies in cache.

    w (K, C, T, R, S)    --filters-->  U (places, T C, K)           places: the inputs of a tile, (m + 2)^2
    x, a block of tiles  --inputs-->   V (places, tiles, T C)
    V, U                 --multiply->  M (places, tiles, K panel)   as many independent products
    M                    --outputs->   y + bias                     m x m pixels per tile; then the epilogue

Filters of k x k = 2 x 2 or 4 x 4 take F(m x m, k x k), those of 5 x 5 F(2 x 2, 5 x 5), of 36 places. Those of
k = 2 to 5 taps in a row take F(m, k) along that axis: tiles of 1 x m or m x 1 pixels, m + k - 1 places. Depth
is not transformed: a tile lies in one plane of outputs, and the planes that its windows meet count as so many
times the channels.

So do the phases of a stride (Huang et al. 2020, arXiv:2002.00552): even rows of an input meet even rows of a
filter alone, with stride 1 from one to the next. With stride 2, filters of 3 x 3 are four phases of 2 x 2,
2 x 1, 1 x 2 and 1 x 1 taps. F(4 x 4, 2 x 2) on four times the channels takes 90 multiplications for 16
outputs, not 144: the last column of places, at infinity, holds the last tap, which one phase in two has.

Lanes are channels in all stages, so that one tile fills vectors as well as many do, and a transform needs
no shuffles. Arrays with channels first are transposed where they are read and written, a square of
registers at a time. Tiles are numbered through batch, planes, rows and columns.

U takes four times the memory of w (36 x 512 x 512 floats: 38 MB). It is made before all else only where
three blocks or more will read it. Else each panel of K is made when its turn comes, some channels at a time,
and multiplied while it lies in L2. Where blocks are fewer than threads, these share the panels of K; V is
then made by each of them if it is small, else before all else.

Where V of all channels would not fit L2, and takes more than M of all panels, as with strides, V too is made
some channels at a time; M then holds all panels.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv.cpu import memory
from fastconv.cpu.band import (
    columns_inside,
    count_parts,
    finish,
    locate,
    make_ending,
    padded_bias,
    task_threads,
)
from fastconv.cpu.compiling import part, small_part
from fastconv.cpu.device import BOX_ROW_CYCLES, L2_CYCLES, itemsize
from fastconv.cpu.simd import (
    Block,
    Kernel,
    advance,
    allocate,
    block_extents,
    block_lanes,
    block_rows,
    block_sides,
    block_strides,
    copy_rows,
    fill,
    lane_bits,
    multiply_tile,
    pointer,
    prefetch,
    release,
    spread_rows,
    table,
    transform_filters,
    transform_input,
    transform_output,
    transpose,
    transpose_inputs,
    view_of,
)

if TYPE_CHECKING:
    from fastconv.cpu.device import Device
    from fastconv.problem import ConvProblem, Operands

SQUARE_CYCLES = 5  # to transpose a square of registers, for each of its rows
ELEMENT_CYCLES = 2  # to copy an element alone
GATHERED = 4  # vectors of a row of pixels that are gathered at once: six rows of them are 24 KB of L1
OWN_INPUTS = 128  # up to so many vectors of tiles every worker transforms for itself: sharing costs more
BLOCK_TILES = 64  # V and M of 64 channels then take half a megabyte each; 32 to 128 are as fast


class WinogradTile(NamedTuple):
    """F(m x m, R x S) with a register tile of `rows` tiles times `vectors` vectors of output channels.

    In the gradient of the weight its rows are output channels and its vectors input channels.
    """

    m: int
    rows: int
    vectors: int

    @property
    def reads_any_weight(self) -> bool:
        """Whether a weight of rank 5 is best left as it lies, whatever its strides."""
        return True

    @property
    def bits(self) -> int:
        """What decides the bits of a result."""
        return self.m

    @property
    def packing(self) -> None:
        """What decides the form of a prepared weight: it is the same for all tiles."""

    def __str__(self) -> str:
        return f"f{self.m}_{self.rows}x{self.vectors}"


TILES = tuple(WinogradTile(m, *tile) for m in (4, 2) for tile in ((6, 4), (4, 3)))


class Geometry(NamedTuple):
    """The sizes of a Winograd convolution; C and K are those of one group."""

    groups: int
    C: int
    K: int
    D: int
    H: int
    W: int
    O: int
    P: int
    Q: int
    T: int  # planes that a window meets
    phases: int  # of rows and columns, each of which is a channel
    stride_d: int
    dilation_d: int
    pad_d: int
    pad_h: int
    pad_w: int
    tiles_h: int  # tiles of one plane along each side, and those of the whole batch
    tiles_w: int
    tiles: int
    blocks: int  # that share the tiles evenly
    height: int  # rows of V and M: the tiles of a block, in whole register tiles
    C_vectors: int  # that the input channels of a plane fill, all phases of them
    V_row: int  # elements of a tile in a matrix of V: the vectors of T planes
    c_parts: int  # in how many parts V is made before all else; 0 where a task makes its own
    K_vectors: int  # that the output channels fill
    panels: int  # that share those evenly, and the output channels of the largest
    panel: int
    k_parts: int  # how many tasks share the panels of a block
    c_step: int  # input channels of U that are made at a time
    stepwise: int  # 1 where V is made for so many at a time too, and M holds all panels of a task
    U_first: int  # 1 where U is made before all else
    places: int  # in a tile of inputs: each has a matrix of U, of V and of M
    U_step: int  # distance of those, in elements: one vector more than they need, because a power of two
    V_step: int  # would put all places' lines into one set of the cache
    M_step: int


@lru_cache(maxsize=256)
def _geometry(problem: ConvProblem, tile: WinogradTile, device: Device, workers: int) -> Geometry:
    """Divide a problem into blocks of tiles, panels of output channels and steps of input channels."""
    lanes = device.lanes(problem.compute_dtype)
    block = make_block(problem, tile, device)
    (m_h, m_w, a_h, a_w), phases = block.sides, math.prod(block.strides)
    groups, C, K = problem.groups, problem.C // problem.groups, problem.K // problem.groups
    tiles_h, tiles_w = math.ceil(problem.P / m_h), math.ceil(problem.Q / m_w)
    tiles = problem.N * problem.O * tiles_h * tiles_w
    rows = math.ceil(tiles / tile.rows)  # of register tiles
    blocks = math.ceil(tiles / BLOCK_TILES)
    C_vectors, K_vectors = math.ceil(C * phases / lanes), math.ceil(K / lanes)
    panels = math.ceil(K_vectors / tile.vectors)
    k_parts, c_parts = 1, 0
    if 0 < blocks * groups < workers:
        panels = count_parts(panels, K_vectors, blocks * groups, workers)
        k_parts = count_parts(1, panels, blocks * groups, workers)
        if tiles * problem.T * C_vectors > OWN_INPUTS:
            k_parts, c_parts = panels, min(problem.T * C_vectors, 2 * workers)
    else:
        blocks = count_parts(blocks, rows, groups, workers)
    height = math.ceil(rows / max(1, blocks)) * tile.rows
    panel = math.ceil(K_vectors / panels) * lanes
    U_first, places = blocks > 2, a_h * a_w
    room = device.l2 // 4 // itemsize(problem) // (places * phases * panel)
    c_step = C if U_first else math.ceil(C / math.ceil(C / max(1, room)))
    V_row = problem.T * C_vectors * lanes
    is_large = itemsize(problem) * places * height * V_row > device.l2 // 2
    stepwise = is_large and c_parts == 0 and problem.T * C_vectors > K_vectors
    if stepwise:
        room = device.l2 // 4 // itemsize(problem) // (places * phases * height)
        whole = max(1, lanes // phases)  # channels that fill a vector
        c_step = min(C, max(1, min(c_step, room) // whole) * whole)
        V_row = math.ceil(c_step * phases / lanes) * lanes
    U_rows = phases * (problem.T * C if U_first else c_step)
    return Geometry(
        groups, C, K, *problem.input_shape5[2:], *problem.output_shape5[2:],
        problem.T, phases, problem.stride[0], problem.dilation[0], *problem.padding_before,
        tiles_h, tiles_w, tiles, blocks, height, C_vectors, V_row,
        c_parts, K_vectors, panels, panel, k_parts, c_step, int(stepwise), int(U_first), places,
        U_rows * panel + lanes, height * V_row + lanes, height * panel + lanes,
    )  # fmt: skip


def cost(problem: ConvProblem, tile: WinogradTile, device: Device) -> float:
    """Return the estimated seconds on one core, the transform of the filters included."""
    if tile != possible(problem, tile):
        return float("inf")
    dtype, lanes = problem.compute_dtype, device.lanes(problem.compute_dtype)
    block, g = make_block(problem, tile, device), _geometry(problem, tile, device, 1)
    m_h, m_w, a_h, a_w = block.sides
    s_w, steps = block.strides[1], math.ceil(g.C / g.c_step)
    left_out = (1 - 1 / s_w) / a_w if problem.S % s_w == 1 else 0
    taps = g.C * g.phases / steps * (1 - left_out)
    product = device.multiply_cycles(tile, g.height, g.K_vectors * lanes, taps, dtype, True)
    V = g.places * g.V_step
    beyond = (g.panels + 1) * V / lanes * L2_CYCLES if itemsize(problem) * V > device.l2 else 0
    products = g.blocks * (g.places * g.T * steps * product + beyond)
    squares = lanes * math.ceil(problem.R * problem.S / lanes)
    each = 4 * squares + 6 * g.places * g.phases
    made = 1 if g.U_first else g.blocks
    filters: float = made * g.K_vectors * g.T * g.C * each
    if g.phases > 1 and g.U_first:  # so many times larger, it was seen to go to memory and back
        U = itemsize(problem) * g.places * g.phases * g.T * g.C * g.K
        filters += device.fetch_cycles((made + g.blocks) * U)
    square = SQUARE_CYCLES * lanes
    if problem.order == "NHWC":
        square = lanes * (BOX_ROW_CYCLES if g.phases == 1 else ELEMENT_CYCLES * lanes)
    gathered = g.tiles / g.tiles_w * a_h * math.ceil((g.tiles_w * m_w + a_w - m_w) / lanes)
    inputs = g.T * g.C_vectors * (g.tiles * 12 * g.places + gathered * square)
    scattered = g.tiles / g.tiles_w * m_h * math.ceil(g.tiles_w * m_w / lanes)
    outputs = g.K_vectors * (g.tiles * 12 * g.places + scattered * square)
    return device.seconds(problem, problem.groups * (products + filters + inputs + outputs))


def workspace(problem: ConvProblem, tile: WinogradTile, device: Device) -> int:
    """Return the bytes of transformed tensors: U and V once where they are shared, M in every thread."""
    workers = task_threads(problem)
    g = _geometry(problem, tile, device, workers)
    workers = min(workers, g.groups * g.blocks * g.k_parts)
    U = g.U_step * (g.groups * g.panels if g.U_first else workers)
    V = g.V_step * (g.groups * g.blocks if g.c_parts else workers)
    M = g.M_step * workers * (g.panels if g.stepwise else 1)
    return itemsize(problem) * g.places * (U + V + M)


def possible(problem: ConvProblem, tile: WinogradTile) -> WinogradTile:
    """Return the tile, or F(2 x 2) in place of F(4 x 4, 5 x 5), whose rounding errors reach 380 eps."""
    return tile._replace(m=2) if problem.phase_taps == (5, 5) else tile


def prepare(problem: ConvProblem, tile: WinogradTile, device: Device, weight: np.ndarray) -> np.ndarray:
    """Return the filters as their transform reads them: of each vector of K a row (T, C, taps, lanes).

    Not U, which is four times as large: to read that takes longer than to make it, where it is read once.
    """
    block = make_block(problem, tile, device)
    g = _geometry(problem, tile, device, 1)
    rows = g.groups * g.K_vectors
    size = g.T * g.C * problem.R * problem.S * block.lanes
    regrouped = memory.allocate((rows, size), problem.compute_dtype)
    _regroup_filters(block, rows, task_threads(problem), g, _with_taps_in_line(weight), regrouped)
    return regrouped


def _with_taps_in_line(weight: np.ndarray) -> np.ndarray:
    """Return a weight of rank 5, or a copy, whose taps of a plane lie in line, forward or backward."""
    return weight if find_tap_step(weight) else np.ascontiguousarray(weight)


def find_tap_step(weight: np.ndarray) -> int:
    """Return 1 where the taps of a plane of a weight of rank 5 lie in line, -1 where backward, else 0."""
    item, (R, S), (of_R, of_S) = weight.itemsize, weight.shape[3:], weight.strides[3:]
    step = of_S if S > 1 else of_R if R > 1 else item
    is_in_line = abs(step) == item and (R == 1 or of_R == S * step)
    return step // item if is_in_line else 0


@lru_cache(maxsize=256)
def make_block(problem: ConvProblem, tile: WinogradTile, device: Device) -> Block:
    """Return a tile as the microkernel and the transforms take it."""
    dtype, m = problem.compute_dtype, possible(problem, tile).m
    extents, strides = (problem.R, problem.S), (problem.stride[1], problem.stride[2])
    return Block(
        dtype, tile.rows, tile.vectors, device.lanes(dtype),
        adds=True, m=m, extents=extents, strides=strides,
    )  # fmt: skip


def run(problem: ConvProblem, tile: WinogradTile, device: Device, operands: Operands) -> None:
    """Convolve; the weight is prepared (rank 2) or as given (rank 5)."""
    workers, dtype = task_threads(problem), problem.compute_dtype
    block, g = _plan(problem, tile, device, workers)
    is_regrouped = operands.weight.ndim == 2
    x, y, weight = operands.x, operands.out, operands.weight
    bias, ending = padded_bias(problem, operands.bias, block.lanes), make_ending(operands)
    w = weight[:, :, None, None, None] if is_regrouped else _with_taps_in_line(weight)
    blocks, panels = g.groups * g.blocks, g.groups * g.panels
    U = V = np.empty((0, 0), dtype)
    if g.U_first:
        U = memory.allocate((panels, g.places * g.U_step), dtype)
        parts = min(g.T * g.C, 2 * workers)
        _prepare_filters(block, panels * parts, workers, g, parts, is_regrouped, w, U)
    if g.c_parts:
        V = memory.allocate((blocks, g.places * g.V_step), dtype)
        _prepare_inputs(block, blocks * g.c_parts, workers, g, x, V)
    _run_blocks(block, blocks * g.k_parts, workers, g, is_regrouped, U, V, x, w, bias, y, ending)


@lru_cache(maxsize=256)
def _plan(problem: ConvProblem, tile: WinogradTile, device: Device, workers: int) -> tuple[Block, Geometry]:
    """Return what of the arguments of kernels does not change from call to call."""
    return make_block(problem, tile, device), _geometry(problem, tile, device, workers)


@Kernel
def _regroup_filters(block, first, last, g, w, regrouped):
    """Bring vectors first ... last-1 of filters into the order in which they are transformed."""
    w, target, lanes, (R, S) = view_of(w), table(regrouped), block_lanes(block), block_extents(block)
    for vector in range(first, last):
        group, j = divmod(vector, g.K_vectors)
        for row in range(g.T * g.C):
            filters = advance(target, (vector * g.T * g.C + row) * R * S * lanes)
            _regroup(block, g, w, group, j * lanes, row, filters)


@small_part
def _regroup(block, g, w, group, k, row, target):
    """Make one vector of each tap of the filters of output channels k ... k+lanes-1 in a row (t, c) of U."""
    lanes, (R, S), (t, c) = block_lanes(block), block_extents(block), divmod(row, g.C)
    taps = R * S
    filters = advance(pointer(block, w[0]), (group * g.K + k) * w[1] + c * w[2] + t * w[3])
    is_back = w[5] < 0 if S > 1 else w[4] < 0 and R > 1
    if is_back:  # the first tap lies last
        filters, target = advance(filters, 1 - taps), advance(target, (taps - 1) * lanes)
    step = -lanes if is_back else lanes
    for tap in range(0, taps, lanes):
        transpose(
            block, advance(filters, tap), w[1], g.K - k, lane_bits(block, 0, taps - tap),
            advance(target, tap * step), step, taps - tap, lane_bits(block, 0, lanes),
        )  # fmt: skip


@Kernel
def _prepare_filters(block, first, last, g, parts, is_regrouped, w, all_U):
    """Transform the filters of all panels, some rows of U a task."""
    for task in range(first, last):
        here, part = divmod(task, parts)
        group, panel = divmod(here, g.panels)
        row, end = g.T * g.C * part // parts, g.T * g.C * (part + 1) // parts
        U = advance(table(all_U), here * g.places * g.U_step + row * g.phases * g.panel)
        _transform_filters(block, g, is_regrouped, view_of(w), group, panel, row, end - row, U)


@part
def _transform_filters(block, g, is_regrouped, w, group, panel, first, rows, U):
    """Transform the filters of a panel for some channels (t, c): U[e, row, k] = (G w G^T)[e]."""
    lanes, (R, S) = block_lanes(block), block_extents(block)
    size = R * S * lanes
    taps = allocate(block, size)
    k, channels = _find_panel(g, panel, lanes)
    for j in range(0, channels, lanes):
        vector = group * g.K_vectors + (k + j) // lanes
        for row in range(rows):
            filters = taps
            if is_regrouped:
                filters = advance(pointer(block, w[0]), (vector * g.T * g.C + first + row) * size)
            else:
                _regroup(block, g, w, group, k + j, first + row, taps)
            target = advance(U, row * g.phases * g.panel + j)
            transform_filters(block, filters, target, g.U_step, g.panel)
    release(taps)


@Kernel
def _prepare_inputs(block, first, last, g, x, all_V):
    """Transform the tiles of all blocks, some planes and channels a task."""
    x = view_of(x)
    for task in range(first, last):
        here, c_part = divmod(task, g.c_parts)
        group, tile_block = divmod(here, g.blocks)
        vectors = g.T * g.C_vectors
        vector, end = vectors * c_part // g.c_parts, vectors * (c_part + 1) // g.c_parts
        V = advance(table(all_V), here * g.places * g.V_step)
        _transform_inputs(block, x, g, group, tile_block, vector, end, V)


@Kernel
def _run_blocks(block, first, last, g, is_regrouped, all_U, all_V, x, w, bias, y, ending):
    x, w, bias, y = view_of(x), view_of(w), table(bias), view_of(y)
    own_V = allocate(block, 0 if g.c_parts else g.places * g.V_step)
    own_U = allocate(block, 0 if g.U_first else g.places * g.U_step)
    M = allocate(block, (g.panels if g.stepwise else 1) * g.places * g.M_step)
    zeros = allocate(block, block_rows(block) * g.panel)  # what sums begin with
    fill(block, zeros, block_rows(block) * g.panel)
    for task in range(first, last):
        here, k_part = divmod(task, g.k_parts)
        group, tile_block = divmod(here, g.blocks)
        V = advance(table(all_V), here * g.places * g.V_step) if g.c_parts else own_V
        first_panel, end_panel = g.panels * k_part // g.k_parts, g.panels * (k_part + 1) // g.k_parts
        if g.stepwise:
            every = group, tile_block, first_panel, end_panel
            _multiply_steps(block, g, is_regrouped, every, all_U, own_U, V, x, w, zeros, M)
        elif not g.c_parts:
            _transform_inputs(block, x, g, group, tile_block, 0, g.T * g.C_vectors, V)
        for panel in range(first_panel, end_panel):
            if not g.stepwise:
                at = group, tile_block, panel
                _multiply_panel(block, g, is_regrouped, at, all_U, own_U, V, w, zeros, M)
            products = advance(M, (panel - first_panel) * g.places * g.M_step if g.stepwise else 0)
            _transform_outputs(block, g, group, tile_block, panel, products, bias, y, ending)
    release(own_V)
    release(own_U)
    release(M)
    release(zeros)


@small_part
def _find_tiles(block, g, tile_block):
    """Return the first tile of a block and of the next one: blocks share whole register tiles."""
    height = block_rows(block)
    rows = (g.tiles + height - 1) // height
    first, end = rows * tile_block // g.blocks * height, rows * (tile_block + 1) // g.blocks * height
    return first, min(end, g.tiles)


@small_part
def find_run(g, tile, end):
    """Return a tile's image, plane, row, column, and how many from it on, before `end`, lie in this row."""
    rest, column = divmod(tile, g.tiles_w)
    plane, row = divmod(rest, g.tiles_h)
    n, o = divmod(plane, g.O)
    return n, o, row, column, min(g.tiles_w - column, end - tile)


@small_part
def _find_panel(g, panel, lanes):
    """Return the first output channel of a panel, and how many it has."""
    first, end = g.K_vectors * panel // g.panels * lanes, g.K_vectors * (panel + 1) // g.panels * lanes
    return first, min(end, g.K) - first


@part
def _transform_inputs(block, x, g, group, tile_block, first_vector, end_vector, V):
    """Gather the tiles of a block and transform them, some vectors of (t, c): V[e, tile, t, c] = B^T d B.

    Rows that no tile has are zeros: what memory holds by chance may be subnormal, which takes 100 cycles.
    """
    lanes = block_lanes(block)
    first, end = _find_tiles(block, g, tile_block)
    pixels = allocate_pixels(block)
    for vector in range(first_vector, end_vector):
        t, lane = vector // g.C_vectors, vector % g.C_vectors * lanes
        source = t, group * g.C, g.C, lane
        target = advance(V, vector * lanes)
        transform_tiles(block, x, g, source, first, end, pixels, target, g.V_row, g.V_step)
    if first_vector == 0:
        for e in range(g.places):
            rest = g.height - (end - first)
            fill(block, advance(V, e * g.V_step + (end - first) * g.V_row), rest * g.V_row)
    release(pixels)


@small_part
def allocate_pixels(block):
    """Return memory for the inputs of a run of tiles, a vector of channels; to be released."""
    lanes, (_, _, a_h, _) = block_lanes(block), block_sides(block)
    return allocate(block, a_h * GATHERED * lanes * lanes)


@part
def transform_tiles(block, x, g, source, first, end, pixels, V, V_row, V_step):
    """Gather tiles first ... end-1 of a vector of channels and transform them; V: where the first one goes.

    source         which of the planes that windows meet; the first channel, how many, and the lane of them
    V_row, V_step  how far apart tiles lie in V, and the places of a tile
    """
    lanes, (m_h, m, a_h, a_w), (s_h, s_w) = block_lanes(block), block_sides(block), block_strides(block)
    line, (t, channel, channels, lane) = GATHERED * lanes * lanes, source
    tile = first
    while tile < end:
        n, o, row, column, count = find_run(g, tile, end)
        count = min(count, (GATHERED * lanes - a_w + m) // m)
        d = o * g.stride_d + t * g.dilation_d - g.pad_d
        at = n, channel, d, row * m_h * s_h - g.pad_h, column * m * s_w - g.pad_w
        sizes = channels, a_h, count * m + a_w - m
        gather_pixels(block, x, (g.D, g.H, g.W), at, lane, sizes, pixels, line)
        for j in range(count):
            target = advance(V, (tile - first + j) * V_row)
            transform_input(block, advance(pixels, j * m * lanes), line, target, V_step)
        tile += count


@part
def gather_pixels(block, x, limits, at, lane, sizes, pixels, line):
    """Copy rows and columns of pixels of a plane, channels on the lanes, zeros for those outside the image.

    limits  planes, rows and columns of the image
    at      n, the first channel, d, h, w of the first pixel, which may lie outside
    lane    the first of a vector of lanes, which count the channels and the phases of each
    sizes   how many channels, rows and columns, those of a phase
    line    how far apart the rows lie in `pixels`
    """
    lanes, (D, H, W), (channels, rows, columns) = block_lanes(block), limits, sizes
    (s_h, s_w), (_, _, d, h, w) = block_strides(block), at
    source, (low, high) = locate(block, x, at), columns_inside(w, 1, columns * s_w, W)
    for i in range(rows):
        target, row, top = advance(pixels, i * line), advance(source, i * s_h * x[4]), h + i * s_h
        low_row, high_row = max(0, -top), min(s_h, H - top)  # phases that lie in the image
        if d < 0 or d >= D or low_row >= high_row:
            fill(block, target, columns * lanes)
        elif x[5] == 1:
            for j in range(0, columns, lanes):
                transpose_inputs(
                    block, advance(row, j * s_w), x[2], x[4], lane, channels, low_row, high_row,
                    low - j * s_w, high - j * s_w, advance(target, j * lanes),
                )  # fmt: skip
        elif s_h * s_w == 1:
            fill(block, target, low * lanes)
            copy_rows(
                block, high - low, advance(target, low * lanes), lanes,
                advance(row, lane * x[2] + low * x[5]), x[5], x[2], lanes, 0, min(lanes, channels - lane),
            )  # fmt: skip
            fill(block, advance(target, high * lanes), (columns - high) * lanes)
        else:
            fill(block, target, columns * lanes)
            for here in range(min(lanes, channels * s_h * s_w - lane)):
                channel, phase = divmod(lane + here, s_h * s_w)
                y_phase, x_phase = divmod(phase, s_w)
                if low_row <= y_phase < high_row:
                    of = advance(row, channel * x[2] + y_phase * x[4])
                    for j in range((low - x_phase + s_w - 1) // s_w, (high - x_phase + s_w - 1) // s_w):
                        target[j * lanes + here] = of[(j * s_w + x_phase) * x[5]]


@part
def _multiply_steps(block, g, is_regrouped, at, all_U, own_U, V, x, w, zeros, M):
    """Sum the products of a block of tiles and some panels, while V of some channels lies in cache.

    at  group, block of tiles, the first panel and the one behind the last
    """
    lanes, size = block_lanes(block), g.places * g.M_step
    group, tile_block, first_panel, end_panel = at
    for t in range(g.T):
        for c in range(0, g.C, g.c_step):
            first, end = c * g.phases // lanes, (min(c + g.c_step, g.C) * g.phases + lanes - 1) // lanes
            start = t * g.C_vectors + first
            here = advance(V, -start * lanes)  # where V of all channels would begin
            _transform_inputs(block, x, g, group, tile_block, start, start + end - first, here)
            for panel in range(first_panel, end_panel):
                of, products = (group, tile_block, panel), advance(M, (panel - first_panel) * size)
                _multiply_step(block, g, is_regrouped, of, t, c, all_U, own_U, V, w, zeros, products)


@part
def _multiply_panel(block, g, is_regrouped, at, all_U, own_U, V, w, zeros, M):
    """Sum the products of a block of tiles and a panel over all planes and channels.

    at  group, block of tiles, panel
    """
    for t in range(g.T):
        for c in range(0, g.C, g.c_step):
            source = advance(V, t * g.C_vectors * block_lanes(block) + c * g.phases)
            _multiply_step(block, g, is_regrouped, at, t, c, all_U, own_U, source, w, zeros, M)


@part
def _multiply_step(block, g, is_regrouped, at, t, c, all_U, own_U, V, w, zeros, M):
    """Add the products of a block of tiles and a panel over channels c ... of plane t, where V begins."""
    group, tile_block, panel = at
    row, rows = t * g.C + c, min(g.c_step, g.C - c)
    if g.U_first:
        start = (group * g.panels + panel) * g.places * g.U_step
        U = advance(table(all_U), start + row * g.phases * g.panel)
    else:
        U = own_U
        _transform_filters(block, g, is_regrouped, w, group, panel, row, rows, U)
    _multiply(block, g, tile_block, panel, rows, V, U, row > 0, zeros, M)


@part
def _multiply(block, g, tile_block, panel, channels, V, U, adds, zeros, M):
    """Multiply the matrices of all places: M[e] = V[e] U[e], or add that to M[e].

    Where only the first phase of columns has the last tap, the others are left out of the last column.
    """
    lanes, height = block_lanes(block), block_rows(block)
    (_, S), (_, s_w), (_, _, _, a_w) = block_extents(block), block_strides(block), block_sides(block)
    first, end = _find_tiles(block, g, tile_block)
    _, k_count = _find_panel(g, panel, lanes)
    vectors = (k_count + lanes - 1) // lanes
    for e in range(g.places):
        step = s_w if e % a_w == a_w - 1 and S % s_w == 1 else 1
        for row in range(0, end - first, height):
            target = advance(M, e * g.M_step + row * g.panel)
            multiply_tile(
                block, vectors, advance(V, e * g.V_step + row * g.V_row), g.V_row, step,
                advance(U, e * g.U_step), step * g.panel, channels * g.phases // step,
                target if adds else zeros, target, g.panel,
            )  # fmt: skip


@part
def _transform_outputs(block, g, group, tile_block, panel, M, bias, y, ending):
    """Transform the products, y = A^T M A + bias, store the pixels that exist, and finish them."""
    lanes, (m_h, m, _, _) = block_lanes(block), block_sides(block)
    span = max(m, lanes)
    pixels = allocate(block, m_h * span * lanes)
    k, channels = _find_panel(g, panel, lanes)
    channel = group * g.K + k
    first, end = _find_tiles(block, g, tile_block)
    tile = first
    while tile < end:
        n, o, row, column, count = find_run(g, tile, end)
        p, q = row * m_h, column * m
        rows, columns = min(m_h, g.P - p), min(count * m, g.Q - q)
        products = advance(M, (tile - first) * g.panel)
        for j in range(0, channels, lanes):
            target = locate(block, y, (n, channel + j, o, p, q))
            added = advance(bias, channel + j)
            sizes = min(lanes, channels - j), rows, columns
            _transform_run(block, g, advance(products, j), added, sizes, pixels, y, target)
        finish(block, y, (n, channel, o, p, q), (channels, rows, columns), ending)
        tile += count
    release(pixels)


@part
def _transform_run(block, g, M, bias, sizes, pixels, y, target):
    """Transform a run of tiles in one row, some channels of them, so many at a time as fill vectors.

    sizes  channels, at most a vector, rows and columns that exist
    """
    lanes, (_, m, _, _) = block_lanes(block), block_sides(block)
    channels, rows, columns = sizes
    span = max(m, lanes)
    for q in range(0, columns, span):
        count, here = min(span, columns - q), advance(target, q * y[5])
        if y[5] == 1:  # the transforms hide how long it takes to fetch what will be written
            for k in range(channels):
                for i in range(rows):
                    prefetch(block, advance(here, k * y[2] + i * y[4]))
        for j in range(0, count, m):
            tile = advance(M, (q + j) // m * g.panel)
            transform_output(block, tile, g.M_step, bias, advance(pixels, j * lanes), span * lanes)
        _scatter_pixels(block, pixels, span, y, here, (channels, rows, count))


@part
def _scatter_pixels(block, pixels, span, y, target, sizes):
    """Store rows of pixels, `span` in each, to y; sizes: the channels, rows and columns that exist."""
    lanes, (channels, rows, columns) = block_lanes(block), sizes
    every = lane_bits(block, 0, lanes)
    for i in range(rows):
        line, row = advance(pixels, i * span * lanes), advance(target, i * y[4])
        if y[5] == 1:
            for j in range(0, columns, lanes):
                transpose(
                    block, advance(line, j * lanes), lanes, lanes, every,
                    advance(row, j), y[2], channels, lane_bits(block, 0, columns - j),
                )  # fmt: skip
        else:
            spread_rows(block, columns, row, y[5], y[2], line, lanes, channels)
