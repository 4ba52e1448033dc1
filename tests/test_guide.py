"""kernels/README.md teaches by numbers: its modelled times and intensities are computed anew."""

import re
from dataclasses import replace
from fractions import Fraction
from importlib import import_module
from pathlib import Path

import pytest

from fastconv.gpu import depthwise, direct, im2col, pointwise, winograd
from fastconv.gpu.grad_weight import outer
from fastconv.gpu.hardware import Device
from fastconv.problem import make_problem
from fastconv.winograd_math import matrices

GUIDE = (Path(__file__).parents[1] / "kernels" / "README.md").read_text(encoding="utf-8")

H100 = Device(
    "NVIDIA H100", (9, 0), processors=132, shared_per_block=48 << 10, shared_per_sm=228 << 10, l2=50 << 20,
    clock=1.98e9, bandwidth=2 * 2.619e9 * 5120 / 8,
)  # fmt: skip

# How the guide names a way to convolve -> whose cost model it is, and with which of the tiles.
WAYS = {
    "direct": (direct, lambda tile: True),
    "direct of 32 channels": (direct, lambda tile: tile.block_m == 32),
    "gathered": (im2col, lambda tile: tile.is_gathered),
    "implicit": (im2col, lambda tile: not tile.is_gathered),
    "pointwise": (pointwise, lambda tile: True),
    "depthwise": (depthwise, lambda tile: True),
    "F(2x2)": (winograd, lambda tile: tile.m == 2),
    "F(4x4)": (winograd, lambda tile: tile.m == 4),
    "F(4, 3)": (winograd, lambda tile: tile.m == 4),
    "F(4, 5)": (winograd, lambda tile: tile.m == 4),
}


def square(C, K, size, taps, N=32, **options):
    """A conv2d that keeps the image's size."""
    shapes = (N, C, size, size), (K, C // options.get("groups", 1), taps, taps)
    return make_problem("conv2d", *shapes, padding=taps // 2, **options)


def row_of(C, length, taps):
    """A conv1d that keeps channels and length."""
    return make_problem("conv1d", (32, C, length), (C, C, taps), padding=taps // 2)


EXAMPLE = square(128, 128, 28, 3)

# The rows of the second table, by what each begins with.
LAYERS = {
    "4: 1x1, 256 to 64 channels, 56 x 56": square(256, 64, 56, 1),
    "5: depthwise 3x3, 128 channels, 56 x 56": square(128, 128, 56, 3, groups=128),
    "the same in NHWC": square(128, 128, 56, 3, groups=128, order="NHWC"),
    "the same in NCHW, 31x31": square(128, 128, 56, 31, groups=128),
    "3x3, 128 channels in 32 groups, 56 x 56 (ResNeXt)": square(128, 128, 56, 3, groups=32),
    "3x3, 256 to 256 channels, 56 x 56 (VGG-16)": square(256, 256, 56, 3),
    "3x3, 512 to 512 channels, 14 x 14 (VGG-16)": square(512, 512, 14, 3),
    "the same at batch 1": square(512, 512, 14, 3, N=1),
    "conv1d, 3 taps, 256 to 256 channels, length 4096": row_of(256, 4096, 3),
    "the same with 5 taps": row_of(256, 4096, 5),
}


def table(head):
    """The cells of a table whose head begins with a word, row by row."""
    lines = GUIDE[GUIDE.index(f"\n| {head} |") + 1 :].split("\n\n")[0].split("\n")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def section(step):
    """The text of a step of the walk."""
    return GUIDE.split(f"\n## {step}. ")[1].split("\n## ")[0]


def cheapest(problem, way):
    """The tile that the cost model prefers among those of a way, and its microseconds."""
    module, is_meant = WAYS[way]
    seconds = {str(tile): module.cost(problem, tile, H100) for tile in module.TILES if is_meant(tile)}
    tile = min(seconds, key=seconds.get)
    return tile, seconds[tile] * 1e6


def plain_sum():
    """Microseconds of step 0: a warp's two loads take two clocks, its multiply-adds a quarter of one."""
    return 8 * EXAMPLE.flops / H100.peak("float32") * 1e6


def of_product(rows, columns):
    """FLOP per byte of a tile of a matrix product, which reads so many rows and columns for each k."""
    return 2 * rows * columns / (4 * (rows + columns))


def intensity(step, tile):
    """FLOP per byte that a block of the example reads from the level-2 cache."""
    C, K = EXAMPLE.C, EXAMPLE.K
    if step == "0":
        return 2 / 8
    if step == "1":
        channels, rows, columns = map(int, tile.split("x"))
        patch = (rows + 2) * -(-(columns + 2) // 4) * 4
        return 9 * 2 * channels * rows * columns / (4 * (9 * channels + patch))
    if step == "6":
        return 16 * 2 * 64 * 32 / (4 * (16 * 64 + 2 * 12 * 32))  # two threads load three rows of four each
    if step == "7":
        return 2 * C * K / (2 * 4 * (C + K))  # V and the products, written and read
    return of_product(*map(int, tile.removesuffix("-gathered").split("x")))


def test_device():
    said = f"{H100.processors} SMs at {H100.clock / 1e9} GHz, {H100.peak('float32') / 1e12:.1f} TFLOP/s"
    assert said in re.sub(r"\s+", " ", GUIDE)
    assert f"takes {EXAMPLE.flops / H100.peak('float32') * 1e6:.0f} us at the peak" in GUIDE


def test_steps():
    """Tile, intensity, microseconds and gain of the example's steps."""
    before, found = None, []
    for name, *_ in table("step"):
        step, way = name.split(" ", 1)
        tile, time = ("", plain_sum()) if step == "0" else cheapest(EXAMPLE, way)
        gain = f"{before / time:.2f}" if before else ""
        found.append([tile, f"{intensity(step, tile):.3g}", f"{time:.0f}", gain])
        before = time
    assert [[cells[column] for column in (1, 4, 5, 6)] for cells in table("step")] == found
    assert [cells[0][0] for cells in table("step")] == list("012367")


def test_layers():
    """Tiles, microseconds and gains of the other layers."""
    said = table("layer")
    assert [cells[0] for cells in said] == list(LAYERS)
    for name, fast, fast_time, slow, slow_time, gain in said:
        found = []
        for cell in (fast, slow):
            way = cell.rsplit(" ", 1)[0]
            tile, time = cheapest(LAYERS[name], way)
            found.append((f"{way} {tile}", time))
        (fast_found, a), (slow_found, b) = found
        expected = [fast_found, f"{a:.0f}", slow_found, f"{b:.0f}", f"{b / a:.2f}"]
        assert [fast, fast_time, slow, slow_time, gain] == expected, name


@pytest.mark.parametrize("step", list("01234567"))
def test_sections_agree_with_the_tables(step):
    """Each step states its intensity, its time and its gain: those of the tables."""
    if step in "45":
        name, cells = next((cells[0], cells) for cells in table("layer") if cells[0].startswith(step))
        time, gain, ratio = cells[2], cells[5], f"{LAYERS[name].intensity:.3g}"
    else:
        cells = next(cells for cells in table("step") if cells[0].startswith(step))
        ratio, time, gain = cells[4:7]
    text = re.sub(r"\s+", " ", section(step))
    assert re.findall(r"\*\*intensity ([\d.]+)\*\*", text) == [ratio]
    assert re.findall(r"\*\*([\d.]+) us\*\*", text) == [time]
    assert re.findall(r"([\d.]+) times as fast as", text)[:1] == ([gain] if gain else [])


def test_gradient_of_the_weight():
    """Tiles and microseconds of its table; into how many parts the example's sums are cut."""
    layers = {"the example": EXAMPLE, "the example in NHWC": replace(EXAMPLE, order="NHWC"), **LAYERS}
    for name, *cells in table("gradient of the weight"):
        problem, found = replace(layers[name], direction="grad_weight"), []
        for way in (cells[0].split()[0], cells[2].split()[0]):
            module = import_module(f"fastconv.gpu.grad_weight.{way}")
            seconds = {str(tile): module.cost(problem, tile, H100) for tile in module.TILES}
            tile = min(seconds, key=seconds.get)
            found += [f"{way} {tile}", f"{seconds[tile] * 1e6:.0f}"]
        assert cells == found, name
        assert float(found[1]) < float(found[3]), name
    problem = replace(EXAMPLE, direction="grad_weight")
    parts = outer.divide(problem, outer.TILES[0], H100).parts
    workspace = outer.workspace(problem, parts) / 1e6
    text = re.sub(r"\s+", " ", GUIDE)
    assert f"{problem.gemm_m} x {problem.gemm_k} sums of {problem.gemm_n:,} pixels" in text
    assert f"{outer.count_tiles(problem, 64, 64)} tiles of 64x64 for {H100.processors} SMs" in text
    assert f"here {parts}, each of blocks of its own; their sums, {workspace:.1f} MB" in text


def test_matrices_of_winograd():
    """Every entry of B^T, G and A^T as printed in section 7, row by row."""
    section = GUIDE[GUIDE.index("## 7. ") : GUIDE.index("## All steps")]
    rows = [
        [Fraction(entry) for entry in row.split()]
        for line in section.splitlines()
        for row in re.findall(r"\|([-\d/ ]+)\|", line)
    ]
    AT, G, BT = (list(map(list, matrix)) for matrix in matrices(4))
    assert rows == [row for pair in zip(BT, G, strict=True) for row in pair] + AT
