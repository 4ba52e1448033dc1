"""The gradients with respect to input and weight: every algorithm and tile against the reference."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest

import fastconv
from fastconv.algorithms import TABLE
from fastconv.cpu import memory
from fastconv.cpu.grad_input import depthwise as grad_input
from fastconv.cpu.grad_input import im2col as columns
from fastconv.cpu.grad_weight import depthwise as grad_weight
from fastconv.cpu.grad_weight import pointwise, winograd
from fastconv.cpu.pointwise_channels import ChannelTile
from fastconv.plan import make_plan, possible_plans
from fastconv.problem import ConvError, make_problem
from tests.cases import CASES, TALL, WIDE, around_tile
from tests.compare import assert_exact, integers, layouts, normals
from tests.gradients import exact_plans, make_gradient, problems
from tests.kernels import DTYPES, ORDERS, with_caches

DIRECTIONS = ("grad_input", "grad_weight")

every_algorithm = pytest.mark.parametrize("algorithm", TABLE)
every_direction = pytest.mark.parametrize("direction", DIRECTIONS)
every_order = pytest.mark.parametrize("order", ORDERS)


@every_order
@every_direction
@every_algorithm
class TestAlgorithm:
    def test_cases(self, algorithm, direction, order, rng):
        for problem in problems(algorithm, direction, CASES + TALL, order=order):
            gradient = make_gradient(rng, problem, integers)
            for plan in exact_plans(problem, algorithm):
                gradient.check(plan)
                if direction == "grad_input":
                    gradient.check(plan, prepared=True)

    def test_bounds(self, algorithm, direction, order, rng):
        for dtype in DTYPES:
            for problem in problems(algorithm, direction, order=order, dtype=dtype):
                gradient = make_gradient(rng, problem, normals)
                for plan in possible_plans(problem, algorithm):
                    gradient.check_bounded(plan)

    def test_caches_of_any_size(self, algorithm, direction, order, rng):
        """Small caches cut small problems into many bands, blocks, channels and parts."""
        for problem in problems(algorithm, direction, CASES + WIDE, order=order):
            gradient = make_gradient(rng, problem, integers)
            for plan in exact_plans(problem, algorithm):
                gradient.check(with_caches(plan, 1 << 9, 1 << 11))
                gradient.check(with_caches(plan, 1 << 12, 1 << 15))

    def test_sizes_around_the_vectors(self, algorithm, direction, order, rng):
        for outputs, pixels in ((1, 17), (15, 33), (16, 16), (17, 1), (33, 15), (129, 3), (3, 129)):
            for problem in problems(algorithm, direction, around_tile(outputs, pixels), order=order):
                gradient = make_gradient(rng, problem, integers)
                for plan in exact_plans(problem, algorithm):
                    gradient.check(plan)

    def test_any_memory(self, algorithm, direction, order, rng):
        names = (
            "padded_3x3",
            "groups",
            "stride_2",
            "pointwise_stride_2",
            "depthwise",
            "depthwise_stride_2",
            "conv3d_mixed",
            "conv1d",
        )
        cases = [case for case in CASES if case.name in names]
        for problem in problems(algorithm, direction, cases, order=order, precision="highest"):
            gradient, plan = make_gradient(rng, problem, integers), make_plan(problem, algorithm)
            for _, view in layouts(gradient.first):
                dataclasses.replace(gradient, first=view).check(plan)
            for _, view in layouts(gradient.second):
                dataclasses.replace(gradient, second=view).check(plan)
            for label, out in layouts(np.full(gradient.shape, np.nan, np.float32)):
                if out.flags.writeable:
                    gradient.check(plan, out=out)
                    assert np.isnan(surroundings(out)).all(), f"{plan}: wrote beside out, {label}"

    def test_one_thread_or_many(self, algorithm, direction, order, rng, monkeypatch):
        names = {"tall", "tall_pixels", "tall_channels", "tall_planes", "depthwise_stride_2"}
        cases = [case for case in TALL + CASES if case.name in names]
        for problem in problems(algorithm, direction, cases, order=order):
            gradient = make_gradient(rng, problem, normals)
            found = set()
            for threads in ("1", "2", "5"):
                monkeypatch.setenv("FASTCONV_THREADS", threads)
                found.add(gradient.run(make_plan(problem, algorithm)).tobytes())
            assert len(found) == 1


@every_algorithm
def test_rows_of_the_weight_that_almost_fill_a_vector(algorithm, rng):
    """One tap less than 4, 8 or 16 hold: were a whole vector stored, it would end behind the gradient."""
    K = 32
    for C, taps in ((15, (1, 1)), (31, (1, 1)), (5, (1, 3)), (1, (3, 5)), (1, (1, 7))):
        groups = K if algorithm == "depthwise" else 1
        shapes = (1, C * groups, 9, 11), (K, C, *taps)
        problem = make_problem("conv2d", *shapes, groups=groups, direction="grad_weight")
        gradient = make_gradient(rng, problem, integers)
        for plan in exact_plans(problem, algorithm):
            for label, out in layouts(np.full(gradient.shape, np.nan, np.float32)):
                if out.flags.writeable:
                    gradient.check(plan, out=out)
                    assert np.isnan(surroundings(out)).all(), f"{plan}: wrote beside out, {label}"


@every_order
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("batch", "size", "blocks"), [(3, (26, 39), {4, 13}), (1, (13, 12), {1})])
def test_winograd_in_blocks_and_panels(batch, size, blocks, groups, order, rng, monkeypatch):
    """Sums of many tiles, block after block, or of few: the same bits for any panels, threads and tile."""
    problem = make_problem(
        "conv2d", (batch, 70 * groups, *size), (81 * groups, 70, 3, 3), padding=1, groups=groups, order=order,
        direction="grad_weight",
    )  # fmt: skip
    for m in (2, 4):
        found, panels = set(), set()
        gradient = make_gradient(rng, problem, integers if m == 2 else normals)
        for any_caches in possible_plans(problem, "winograd"):
            if any_caches.tile.m == m:
                for threads, l2 in itertools.product(("1", "2", "5"), (1 << 17, 1 << 24)):
                    monkeypatch.setenv("FASTCONV_THREADS", threads)
                    plan = with_caches(any_caches, 1 << 12, l2)
                    d = winograd._divide(problem, plan.tile, plan.device, int(threads))
                    assert d.blocks in blocks
                    assert d.c_parts > 1
                    panels.add(d.k_parts)
                    found.add(gradient.run(plan).tobytes())
                gradient.check(plan) if m == 2 else gradient.check_bounded(plan)
        assert len(found) == 1 < len(panels)


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("size", [1, 6])
def test_winograd_where_taps_meet_padding_alone(m, size, rng):
    """Of one element of grad_output in a corner: their gradient is 0, but for the rounding of transforms."""
    problem = make_problem("conv2d", (1, 3, size, size), (5, 3, 3, 3), padding=1, direction="grad_weight")
    gradient = make_gradient(rng, problem, normals)
    gradient.second[..., 1:, :] = gradient.second[..., 1:] = 0
    for plan in possible_plans(problem, "winograd"):
        if plan.tile.m == m:
            gradient.check_bounded(plan)


@pytest.mark.parametrize("algorithm", ["winograd", "pointwise"])
def test_weights_in_narrow_vectors(algorithm, rng, monkeypatch):
    """Vectors of two lanes, fewer than a register tile has rows."""
    monkeypatch.setenv("FASTCONV_VECTOR_BITS", "128")
    for order in ORDERS:
        cases = CASES + around_tile(5, 7)
        for problem in problems(algorithm, "grad_weight", cases, dtype="float64", order=order):
            gradient = make_gradient(rng, problem, normals)
            for plan in possible_plans(problem, algorithm):
                gradient.check_bounded(plan)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("groups", [1, 2])
def test_parts_of_the_pixels(groups, order, rng, monkeypatch):
    """Few output channels, many pixels: their parts have sums of their own, which are added up at last."""
    problem = make_problem(
        "conv2d", (3, 70 * groups, 61, 60), (13 * groups, 70, 1, 1), stride=2, groups=groups, order=order,
        direction="grad_weight",
    )  # fmt: skip
    gradient = make_gradient(rng, problem, integers)
    for plan in possible_plans(problem, "pointwise"):
        assert pointwise._divide(problem, plan.tile, plan.device, 1).parts == 2
        for threads in ("1", "3"):
            monkeypatch.setenv("FASTCONV_THREADS", threads)
            gradient.check(plan)


@pytest.mark.parametrize("order", ORDERS)
def test_bits_of_1x1_for_any_threads(order, rng, monkeypatch):
    """Where threads share the output channels, tiles begin as if there were one task, block after block."""
    problem = make_problem(
        "conv2d", (1, 70, 40, 30), (300, 70, 1, 1), order=order, direction="grad_weight"
    )  # fmt: skip
    gradient = make_gradient(rng, problem, normals)
    for any_caches in possible_plans(problem, "pointwise"):
        plan, found, shares = with_caches(any_caches, 16 << 10, 64 << 10), set(), set()
        for threads in ("1", "2", "8"):
            monkeypatch.setenv("FASTCONV_THREADS", threads)
            d = pointwise._divide(problem, plan.tile, plan.device, int(threads))
            assert d.blocks > d.parts
            shares.add(d.k_parts)
            found.add(gradient.run(plan).tobytes())
        assert len(found) == 1 < len(shares)


@pytest.mark.parametrize("algorithm", ["im2col", "pointwise"])
@pytest.mark.parametrize("size", [2, 5, 12])
@pytest.mark.parametrize("batch", [1, 2])
def test_weight_of_1x1_left_as_it_lies_or_exchanged(algorithm, size, batch, rng, monkeypatch):
    """Of one image its rows are packed tile by tile, or read in place, unless lines drive out each other.

    Tiles of output channels pack panels of it, however it lies.
    """
    problem = make_problem("conv2d", (batch, 256, size, size), (24, 256, 1, 1), direction="grad_input")
    exchange, called = memory.exchange, []
    monkeypatch.setattr(memory, "exchange", lambda *given: called.append(given) or exchange(*given))
    for plan in possible_plans(problem, algorithm):
        for l2 in (1 << 20, 16 << 10):
            called.clear()
            make_gradient(rng, problem, integers).check(with_caches(plan, 16 << 10, l2))
            is_left = batch == 1 and l2 > 16 << 10 and (algorithm == "im2col" or size > 2)
            assert len(called) == (not is_left and not isinstance(plan.tile, ChannelTile))


class TestColumns:
    """The gradient of the input as columns, which are added up."""

    @pytest.fixture(autouse=True)
    def of_few_channels(self, monkeypatch):
        monkeypatch.setattr(columns, "LEAST_CHANNELS", 1)
        columns.suits.cache_clear()
        yield
        columns.suits.cache_clear()

    def problems(self):
        found = problems("im2col", "grad_input", CASES + TALL)
        some = [problem for problem in found if columns.suits(problem, columns.TILES[0])]
        assert {problem.ndim for problem in some} == {1, 2, 3}
        assert max(problem.N for problem in some) > 1
        return some

    def test_cases(self, rng):
        for problem in self.problems():
            gradient, plan = make_gradient(rng, problem, integers), make_plan(problem, "im2col")
            gradient.check(plan)
            gradient.check(plan, prepared=True)
            gradient.check(with_caches(plan, 1 << 9, 1 << 8))  # the columns of one image at a time
            bounded = make_gradient(rng, problem, normals)
            bounded.check_bounded(plan)

    def test_any_memory(self, rng):
        for problem in self.problems():
            gradient, plan = make_gradient(rng, problem, integers), make_plan(problem, "im2col")
            for _, view in layouts(gradient.first):
                dataclasses.replace(gradient, first=view).check(plan)
            for _, view in layouts(gradient.second):
                dataclasses.replace(gradient, second=view).check(plan)

    def test_same_bits(self, rng, monkeypatch):
        """However many images have their columns in memory at a time, and for any number of threads."""
        problem = make_problem("conv2d", (5, 9, 17, 14), (40, 9, 3, 3), stride=2, direction="grad_input")
        gradient, plan, found = make_gradient(rng, problem, normals), make_plan(problem, "im2col"), set()
        for threads in ("1", "2", "3"):
            monkeypatch.setenv("FASTCONV_THREADS", threads)
            found |= {
                gradient.run(with_caches(plan, 1 << 14, l2)).tobytes() for l2 in (1 << 8, 1 << 14, 1 << 20)
            }
        assert len(found) == 1

    def test_ending(self, rng, monkeypatch):
        """Of each image its own, whichever are computed together."""
        x, w, bias = integers(rng, (3, 6, 5, 4)), integers(rng, (6, 4, 3, 2)), integers(rng, (4,))
        plain = fastconv.conv_transpose2d(x, w, stride=2, algo="im2col")
        residual = integers(rng, plain.shape)
        monkeypatch.setattr(columns, "IN_CACHE", 0)  # one image at a time
        ending = {"residual": residual, "activation": "relu"}
        found = fastconv.conv_transpose2d(x, w, bias, stride=2, algo="im2col", **ending)
        assert_exact(found, np.maximum(plain + bias[:, None, None] + residual, 0), "float32")

    def test_which(self, monkeypatch):
        def suits(K, **options):
            problem = make_problem("conv2d", (1, 8, 9, 9), (K, 8, 3, 3), direction="grad_input", **options)
            return columns.suits(problem, columns.TILES[0])

        monkeypatch.undo()
        columns.suits.cache_clear()
        K = columns.LEAST_CHANNELS
        assert suits(K, stride=2)
        assert suits(K, stride=(1, 2), order="NCHW")
        assert not suits(K - 1, stride=2)
        assert not suits(K)
        assert not suits(K, stride=3)  # windows side by side
        assert not suits(K, stride=2, order="NHWC")


class TestDepthwisePlanes:
    """Planes that are read in place, for either gradient."""

    @pytest.mark.parametrize(
        ("direction", "module", "stride"),
        [("grad_weight", grad_weight, 1), ("grad_weight", grad_weight, 2), ("grad_input", grad_input, 2)],
    )
    def test_which_arrays(self, direction, module, stride, rng, monkeypatch):
        """Those whose columns lie side by side, for the tile that is meant for them."""
        kernel, called = module._run_planes, []
        monkeypatch.setattr(module, "_run_planes", lambda *given: called.append(given) or kernel(*given))
        problem = make_problem(
            "conv2d", (2, 7, 13, 14), (7, 1, 3, 3), stride=stride, padding=1, groups=7, direction=direction
        )  # fmt: skip
        gradient = make_gradient(rng, problem, integers)
        for plan in possible_plans(problem, "depthwise"):
            gradient.check(plan)
            assert len(called) == str(plan.tile).startswith("plane")
            called.clear()
            dataclasses.replace(gradient, first=gradient.first[..., ::-1].copy()[..., ::-1]).check(plan)
            assert not called

    def test_blocks_of_rows(self, rng, monkeypatch):
        """Few channels, many rows: blocks of them are parts with sums of their own."""
        problem = make_problem(
            "conv2d", (2, 3, 150, 9), (3, 1, 3, 3), padding=1, groups=3, direction="grad_weight"
        )
        assert grad_weight._divide(problem) == (64, 3, 6, 6)
        gradient, found = make_gradient(rng, problem, normals), set()
        make_gradient(rng, problem, integers).check(make_plan(problem, "depthwise", tile="plane1"))
        for threads in ("1", "2", "5"):
            monkeypatch.setenv("FASTCONV_THREADS", threads)
            found.add(gradient.run(make_plan(problem, "depthwise", tile="plane1")).tobytes())
        assert len(found) == 1

    def test_limit_that_is_told_is_enough(self, monkeypatch):
        """Of a filter too large for planes as well."""
        problem = make_problem("conv2d", (2, 64, 28, 28), (64, 1, 7, 7), groups=64, direction="grad_weight")
        monkeypatch.setenv("FASTCONV_WORKSPACE", "1")
        with pytest.raises(ConvError, match="must be at least") as caught:
            make_plan(problem, "depthwise")
        monkeypatch.setenv("FASTCONV_WORKSPACE", re.search(r"at least (\d+)", str(caught.value))[1])
        assert make_plan(problem, "depthwise").cost() < math.inf


def surroundings(view):
    """What lies around the elements of a view, in the whole array that it looks at."""
    whole = view
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    values, view_copy = whole.copy(), view.copy()
    view[...] = 0
    outside = whole != 0
    view[...] = view_copy
    return values[outside]
