"""What only the GPU's kernels have: parts of sums, turns of gathering, long indices, stages of a patch."""

import dataclasses
import itertools

import numpy as np
import pytest

from fastconv.gpu import depthwise, direct, im2col, launch, product, winograd
from fastconv.plan import fitting_plans, possible_plans
from fastconv.problem import ConvError, make_problem
from tests.backends import EMULATOR, GPU
from tests.cases import CASES, HEAVY, Case
from tests.compare import integers, normals
from tests.emulator import EmulatorDriver
from tests.kernels import ORDERS, Way, forms, in_order, make_layer, on_backends

every_form = on_backends(forms, backends=[EMULATOR, GPU])
every_order = pytest.mark.parametrize("order", ORDERS)

DEEP = Case("deep", "conv2d", (3, 150, 12, 20), (37, 150, 3, 3), {"padding": 1})
TILED = Case("tiled", "conv2d", (3, 5, 41, 43), (7, 5, 3, 3), {"padding": 1})
PIXELS = Case("pixels", "conv2d", (3, 650, 12, 20), (37, 650, 1, 1))
CHANNELS = Case("channels", "conv2d", (3, 37, 12, 20), (37, 1, 3, 3), {"groups": 37, "padding": 1})


def large_tiles(backend):
    """The tiles that float64 has too."""
    return [Way(algorithm, "128x128", backend) for algorithm in ("im2col", "pointwise")]


def any_tile(backend):
    """One way for each algorithm."""
    return list({way.algorithm: way for way in forms(backend)}.values())


def patches(backend):
    return [Way("direct", str(tile), backend) for tile in direct.TILES]


def tile_width(way):
    return next(tile.block_q for tile in direct.TILES if str(tile) == way.tile)


def depthwise_tiles(backend):
    return [Way("depthwise", str(tile), backend) for tile in depthwise.TILES]


def depthwise_tile(name):
    return next(tile for tile in depthwise.TILES if str(tile) == name)


def gathered(backend):
    return [Way("im2col", "64x64-gathered", backend)]


def with_parts(backend):
    """The forms whose long sums are cut."""
    found = (way for way in forms(backend) if way.algorithm in ("im2col", "pointwise"))
    return [way for way in found if way not in gathered(backend)]


def transforming(backend):
    """Winograd by way of memory, tiles by turns."""
    return [Way("winograd", tile, backend) for tile in ("f4_64x64", "f2_64x64")]


def fused_or_not(backend):
    return [Way("winograd", "f2_64x64", backend)]


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that a test launches."""
    names = []
    real = launch.launch

    def remember(kernel, blocks, **arguments):
        names.append(kernel.name)
        real(kernel, blocks, **arguments)

    monkeypatch.setattr(launch, "launch", remember)
    return names


def with_device(plan, **changes):
    """The same plan for another GPU, such as one with more processors or a smaller cache."""
    return dataclasses.replace(plan, device=dataclasses.replace(plan.device, **changes))


def tiles_of(plan):
    """The tiles that a Winograd plan transforms."""
    problem, m = plan.problem, plan.tile.m
    return problem.N * -(-problem.P // m) * -(-problem.Q // m)


@every_order
@every_form
def test_long_indices(way, order, rng, monkeypatch, launched):
    """Offsets of 64 bits give what those of 32 bits give: with every form on every kind of problem."""
    monkeypatch.setattr(product, "_FIRST_LONG", 0)
    for problem in way.problems([case for case in CASES if case not in HEAVY], order=order):
        make_layer(rng, problem, integers).check(way.plan(problem))
    assert launched
    assert all("_long" in name for name in launched)


@on_backends(forms, backends=[EMULATOR])
def test_any_order_of_threads(way, rng):
    """Between two barriers the threads of a block may run in any order: same bits."""
    for problem in way.problems(
        [case for case in CASES if case.name in ("padded_3x3", "pointwise", "stem_7x7")]
    ):
        layer, plan = make_layer(rng, problem, normals), way.plan(problem)
        expected = layer.run(plan)
        for seed in (1, 2, 3):
            with launch.use_driver(EmulatorDriver(seed)):
                assert layer.run(plan).tobytes() == expected.tobytes()


class TestParts:
    """A sum of many terms is cut into parts, which one block adds or the stage REDUCE."""

    @pytest.fixture
    def layer(self, way, rng):
        problems = way.problems([CHANNELS, DEEP, PIXELS])
        return make_layer(rng, problems[-1], normals)

    @pytest.fixture(autouse=True)
    def seven_parts(self, monkeypatch):
        monkeypatch.setattr(product, "count_parts", lambda problem, slices, device: 7)

    @on_backends(with_parts, backends=[EMULATOR, GPU])
    def test_same_bits_in_one_block_and_in_many(self, way, layer, launched):
        plan = way.plan(layer.problem)
        split = layer.run(with_device(plan, processors=1000))
        assert_parts(launched, reduced=True)
        launched.clear()
        inside = layer.run(with_device(plan, processors=1))
        assert_parts(launched, reduced=False)
        layer.judge(plan, split)
        assert split.tobytes() == inside.tobytes()

    @on_backends(with_parts, backends=[EMULATOR, GPU])
    def test_sums_that_would_leave_the_level_2_cache_stay_in_one_block(self, way, layer, launched):
        layer.check(with_device(way.plan(layer.problem), processors=1000, l2=0))
        assert_parts(launched, reduced=False)

    @on_backends(large_tiles, backends=[EMULATOR, GPU])
    def test_float64_is_always_split(self, way, rng, launched):
        """Twice 64 sums in float64 are more than a thread's registers hold."""
        problem = way.problems([DEEP, PIXELS], dtype="float64")[-1]
        make_layer(rng, problem, normals).check(with_device(way.plan(problem), processors=1))
        assert_parts(launched, reduced=True)

    @every_order
    @on_backends(with_parts, backends=[EMULATOR, GPU])
    def test_every_end_of_a_sum(self, way, order, rng):
        """Bias, residual, activation and memory order when the stage REDUCE finishes the sums."""
        for problem in way.problems([DEEP, PIXELS], order=order):
            layer, plan = make_layer(rng, problem, integers), with_device(way.plan(problem), processors=1000)
            layer.check(plan)
            layer.with_array(bias=None, residual=None, activation="gelu").run(plan)
            layer.with_array(residual=layer.residual[:, :, ::-1]).check(plan)


def assert_parts(launched, reduced):
    """Parts were added by the stage REDUCE, or inside of the product's blocks."""
    assert any("_reduce_" in name for name in launched) == reduced
    assert any("_parts_inside1_" in name for name in launched) != reduced


def test_parts_do_not_depend_on_the_batch():
    """One sample's output decides, so that a sample has the same bits in every batch."""
    one = DEEP.problem()
    many = dataclasses.replace(one, N=64)
    with EMULATOR.running():
        device = launch.driver().device()
    parts = product.count_parts(one, 171, device)
    assert parts > 1
    assert product.count_parts(many, 171, device) == parts


@every_order
@on_backends(gathered, backends=[EMULATOR, GPU])
def test_gathering_in_turns(way, order, rng, monkeypatch, launched):
    """With room for few windows they are gathered and multiplied in several turns, to the same bits."""
    problem = DEEP.problem(order=order)
    layer, plan = make_layer(rng, problem, normals), way.plan(problem)
    whole = layer.run(plan)
    assert sum("_gather_" in name for name in launched) == 1
    launched.clear()
    monkeypatch.setattr(im2col, "MOST_GATHERED", 1)
    turns = layer.run(plan)
    assert sum("_gather_" in name for name in launched) == 12
    layer.judge(plan, whole)
    assert whole.tobytes() == turns.tobytes()


class TestWinograd:
    @on_backends(transforming, backends=[EMULATOR, GPU])
    def test_filters(self, way, rng):
        """Several blocks of rows, of columns and of groups, along either axis and both."""
        for shape, weight in (
            ((2, 38, 1, 301), (130, 19, 1, 3)),
            ((2, 38, 1, 301), (130, 19, 1, 5)),
            ((1, 6, 67, 9), (14, 3, 3, 1)),
            ((1, 6, 67, 9), (14, 3, 5, 1)),
            ((1, 6, 15, 9), (14, 3, 5, 5)),
        ):
            for order, fill in itertools.product(ORDERS, (integers, normals)):
                padding = [(tap - 1, tap // 3) for tap in weight[2:]]
                problem = make_problem("conv2d", shape, weight, groups=2, padding=padding, order=order)
                make_layer(rng, problem, fill).check(way.plan(problem))

    @every_order
    @on_backends(transforming, backends=[EMULATOR, GPU])
    def test_transforming_in_turns(self, way, order, rng, monkeypatch, launched):
        """With room for few tiles they go through the stages in several turns, to the same bits."""
        problem = TILED.problem(order=order)
        layer, plan = make_layer(rng, problem, normals), way.plan(problem)
        whole = layer.run(plan)
        assert sum("_input_" in name for name in launched) == 1
        launched.clear()
        monkeypatch.setattr(winograd, "MOST_TRANSFORMED", 1)
        turns = layer.run(with_device(plan, l2=1))
        assert sum("_input_" in name for name in launched) == -(-tiles_of(plan) // 64) > 1
        layer.judge(plan, whole)
        assert whole.tobytes() == turns.tobytes()

    @pytest.mark.parametrize(("l2", "most", "turns"), [(1 << 26, 1, 1), (1, 1 << 26, 1), (1, 1, 6)])
    def test_a_turn_fills_half_the_cache_or_what_is_set(self, l2, most, turns, monkeypatch):
        monkeypatch.setattr(winograd, "MOST_TRANSFORMED", most)
        with EMULATOR.running():
            plan = with_device(Way("winograd", "f4_64x64", EMULATOR).plan(TILED.problem()), l2=l2)
        tiles = winograd._turn_tiles(plan.problem, plan.tile, plan.device)
        assert -(-tiles_of(plan) // tiles) == turns

    @every_order
    @on_backends(fused_or_not, backends=[EMULATOR, GPU])
    def test_fused_or_not_the_bits_are_the_same(self, way, order, rng):
        layer = make_layer(rng, DEEP.problem(order=order), normals)
        fused = layer.run(Way("winograd", "f2_fused", way.backend).plan(layer.problem))
        assert layer.run(way.plan(layer.problem)).tobytes() == fused.tobytes()

    @pytest.mark.parametrize(
        ("input_shape", "K", "largest"),
        [((3, 5, 41, 43), 7, "V"), ((1, 1, 41, 43), 65, "products"), ((1, 128, 4, 4), 128, "U")],
    )
    def test_indices_count_what_is_transformed(self, input_shape, K, largest, rng, monkeypatch, launched):
        """It is larger than input and output, and its offsets can need 64 bits where theirs do not."""
        problem = make_problem("conv2d", input_shape, (K, input_shape[1], 3, 3), padding=1)
        with EMULATOR.running():
            plan = Way("winograd", "f4_64x64", EMULATOR).plan(problem)
            rows, tiles = winograd._rows(problem), winograd._turn_tiles(problem, plan.tile, plan.device)
            sizes = {"U": rows * product.pitch(problem), "V": rows * tiles, "products": K * tiles}
            assert max(sizes, key=sizes.get) == largest
            monkeypatch.setattr(product, "_FIRST_LONG", 36 * sizes[largest])
            make_layer(rng, problem, integers).check(plan)
        assert ["_long" in name for name in launched] == [largest == "U", True, True, True]

    def test_indices_count_the_tiles_of_the_last_block(self, rng, monkeypatch, launched):
        problem = make_problem("conv2d", (2000, 1, 1, 1), (1, 1, 3, 3), padding=1)
        monkeypatch.setattr(product, "_FIRST_LONG", 2000 + 32)
        with EMULATOR.running():
            make_layer(rng, problem, integers).check(Way("winograd", "f2_fused", EMULATOR).plan(problem))
        assert ["_long" in name for name in launched] == [False, True]


class TestStages:
    """What a patch of the input serves at a time: a filter, a row of it, or a tap."""

    KNOWN = (
        ((1, 64, 56, 56), (64, 64, 3, 3), {}, (7, 3, 3)),
        ((1, 3, 224, 224), (64, 3, 7, 7), {"stride": 2}, (1, 7, 7)),
        ((1, 3, 224, 224), (64, 3, 16, 16), {"stride": 16}, (3, 1, 16)),
        ((1, 4, 99, 99), (8, 4, 3, 3), {"dilation": (40, 1)}, (4, 1, 3)),
        ((1, 4, 99, 2999), (8, 4, 3, 3), {"dilation": (40, 1400)}, (4, 1, 1)),
    )

    @pytest.mark.parametrize(("input_shape", "weight_shape", "options", "stage"), KNOWN)
    def test_largest_that_fits(self, input_shape, weight_shape, options, stage):
        assert direct._stage(make_problem("conv2d", input_shape, weight_shape, **options), False) == stage

    @pytest.mark.parametrize("options", [{"dilation": (40, 1)}, {"dilation": (12, 300)}, {"stride": (9, 40)}])
    @on_backends(patches, backends=[EMULATOR, GPU])
    def test_right_results(self, way, options, rng):
        """Rows of taps and single taps, of several chunks of channels."""
        problem = make_problem("conv2d", (1, 70, 83, 650), (9, 70, 3, 3), **options, padding=2)
        make_layer(rng, problem, integers).check(way.plan(problem))

    @on_backends(patches, backends=[EMULATOR, GPU])
    def test_pixels_behind_the_last(self, way, rng, launched):
        """Where their inputs would lie 2**31 elements away, that number is in no int."""
        problem = make_problem("conv1d", (1, 1, 10), (1, 1, 1), stride=2**25)
        make_layer(rng, problem, integers).check(way.plan(problem))
        assert ("_long" in launched[-1]) == (tile_width(way) == 128)


class TestDepthwise:
    """Filters in registers or in stages through shared memory; planes, or channels read where they lie."""

    # Input, filter, options, dtype and tile; then taps_r and taps_s of a stage, which fills what it may.
    STAGES = (
        ((40, 40), (31, 31), {}, "float32", "1x16x128", (31, 31)),
        ((40, 40), (31, 31), {}, "float32", "8x16x16", (8, 31)),  # 8, 8, 8 and 7 rows
        ((40, 40), (31, 31), {}, "float64", "2x32x32", (8, 31)),
        ((900, 40), (9, 9), {"dilation": (100, 1)}, "float32", "1x16x128", (1, 9)),
        ((40, 40), (31, 31), {}, "float64", "8x16x16", (1, 1)),
        ((99, 3999), (3, 3), {"dilation": (40, 1900)}, "float32", "1x16x128", (1, 1)),
    )
    LARGE = (
        Case("large", "conv2d", (2, 9, 20, 21), (9, 1, 31, 31), {"groups": 9, "padding": 15}),
        Case("large_multiplier", "conv2d", (1, 3, 19, 18), (9, 1, 8, 9), {"groups": 3, "padding": 3}),
        Case("large_stride", "conv2d", (1, 2, 29, 28), (2, 1, 9, 10), {"groups": 2, "stride": (2, 1)}),
        Case("large_dilation", "conv2d", (1, 2, 37, 19), (2, 1, 8, 8), {"groups": 2, "dilation": (4, 1)}),
        Case("plain", "conv2d", (1, 5, 31, 39), (5, 1, 9, 7), {"groups": 5, "stride": (1, 3), "dilation": 2}),
        Case("far_taps", "conv2d", (1, 2, 83, 650), (2, 1, 3, 3), {"groups": 2, "dilation": (12, 300)}),
        Case("far_pixels", "conv2d", (1, 2, 83, 650), (2, 1, 2, 3), {"groups": 2, "stride": (9, 40)}),
        Case("one_tap_high", "conv1d", (2, 3, 99), (6, 1, 50), {"groups": 3, "padding": 25}),
        Case("deep", "conv3d", (1, 2, 5, 9, 9), (2, 1, 2, 8, 8), {"groups": 2, "padding": 1}),
    )
    SMALL = (
        Case("causal", "conv1d", (1, 8, 531), (8, 1, 4), {"groups": 8, "padding": [(3, 0)]}),
        Case("one_pixel", "conv2d", (1, 70, 1, 1), (70, 1, 3, 3), {"groups": 70, "padding": 1}),
        Case("tiny_maps", "conv2d", (2, 300, 3, 5), (300, 1, 3, 3), {"groups": 300, "padding": 1}),
        Case("strips", "conv2d", (1, 5, 35, 67), (10, 1, 3, 3), {"groups": 5, "padding": [(0, 2), (2, 1)]}),
        Case("stride_2", "conv2d", (1, 4, 37, 41), (4, 1, 3, 3), {"groups": 4, "stride": 2, "padding": 1}),
        Case("mixed", "conv2d", (1, 3, 23, 29), (9, 1, 4, 2), {"groups": 3, "stride": (3, 2), "dilation": 4}),
        Case("one_wide", "conv2d", (1, 3, 23, 29), (3, 1, 5, 1), {"groups": 3, "stride": (1, 3)}),
        Case("volume", "conv3d", (2, 5, 5, 6, 7), (5, 1, 3, 3, 3), {"groups": 5, "padding": 1, "stride": 2}),
    )  # fmt: skip

    @pytest.mark.parametrize(("sizes", "taps", "options", "dtype", "tile", "stage"), STAGES)
    def test_stage_fills_what_it_may(self, sizes, taps, options, dtype, tile, stage):
        shapes = (1, 4, *sizes), (4, 1, *taps)
        problem = make_problem("conv2d", *shapes, groups=4, dtype=dtype, **options)
        found = depthwise._stage(problem, depthwise_tile(tile))
        assert (found.taps_r, found.taps_s) == stage
        assert found.size * product.accumulator(problem).itemsize <= depthwise.SHARED[-1]

    @every_order
    @on_backends(depthwise_tiles, backends=[EMULATOR, GPU])
    def test_right_results(self, way, order, rng):
        """Every kind of filter with every tile; which of two halves a tile meets differs by order."""
        cases = (*self.LARGE, *self.SMALL)
        turn = ORDERS.index(order) + [str(tile) for tile in depthwise.TILES].index(way.tile)
        for problem in way.problems(cases[turn % 2 :: 2], order=order):
            make_layer(rng, problem, integers).check(way.plan(problem))

    @pytest.mark.parametrize("dtype", ["float64", "float16"])
    @on_backends(depthwise_tiles, backends=[EMULATOR, GPU])
    def test_stages_of_other_dtypes(self, way, dtype, rng):
        """In float64 half as much fits, a row or a tap at a time."""
        for problem in way.problems(self.LARGE[:1], dtype=dtype):
            make_layer(rng, problem, integers).check(way.plan(problem))

    @on_backends(lambda backend: depthwise_tiles(backend)[:1], backends=[EMULATOR, GPU])
    def test_same_bits_with_every_tile(self, way, rng):
        """Terms are added in one order, whatever a tile holds at a time, and in both memory orders."""
        chosen = (*self.LARGE[:2], *self.SMALL[-3:])
        for case in chosen:
            layer = make_layer(rng, case.problem(), normals)
            results = set()
            for order in ORDERS:
                problem = case.problem(order=order)
                same = layer.with_array(problem=problem, x=in_order(layer.x, order))
                for other in depthwise_tiles(way.backend):
                    results.add(np.ascontiguousarray(same.run(other.plan(problem))).tobytes())
            assert len(results) == 1, case

    @on_backends(lambda backend: depthwise_tiles(backend)[-3:], backends=[EMULATOR, GPU])
    def test_lanes(self, way, rng, launched):
        """Four channels at a time where their addresses permit, else one; blocks begin amid the channels."""
        for channels, multiplier, dtype, shift, lanes in (
            (300, 1, "float32", 0, 4), (300, 1, "float16", 0, 4), (12, 1, "bfloat16", 0, 4),
            (300, 1, "float32", 1, 1), (70, 1, "float32", 0, 1), (8, 2, "float32", 0, 1),
            (8, 1, "float64", 0, 1),
        ):  # fmt: skip
            shapes = (2, channels, 5, 6), (channels * multiplier, 1, 3, 3)
            options = {"groups": channels, "padding": 1, "dtype": dtype, "order": "NHWC"}
            problem = make_problem("conv2d", *shapes, **options)
            layer = make_layer(rng, problem, integers)
            layer.with_array(x=shifted(layer.x, shift)).check(way.plan(problem))
            assert f"_lanes{lanes}_" in launched[-1], (channels, multiplier, dtype, shift)

    @pytest.mark.parametrize("axis", [0, 2, 3])
    @on_backends(lambda backend: depthwise_tiles(backend)[-3:], backends=[EMULATOR, GPU])
    def test_lanes_whose_steps_are_not_in_fours(self, way, axis, rng, launched):
        problem = make_problem("conv2d", (2, 8, 5, 6), (8, 1, 3, 3), groups=8, padding=1, order="NHWC")
        layer = make_layer(rng, problem, integers)
        layer.with_array(x=one_more_between(layer.x, axis)).check(way.plan(problem))
        assert "_lanes1_" in launched[-1]

    @on_backends(lambda backend: depthwise_tiles(backend)[-3:], backends=[EMULATOR, GPU])
    def test_tiles_of_channels_fall_back_on_planes(self, way, rng, launched):
        for problem in way.problems([self.SMALL[4], self.LARGE[1]]):
            plan = way.plan(problem)
            make_layer(rng, problem, integers).check(plan)
            assert plan not in fitting_plans(problem, "depthwise", way.backend.package)
        large = way.problems(self.LARGE[1:2], order="NHWC")[0]
        make_layer(rng, large, integers).check(way.plan(large))
        assert ["_planes_" in name for name in launched] == [True, False, False]
        assert ["_large_" in name for name in launched] == [False, True, True]

    @on_backends(lambda backend: depthwise_tiles(backend)[:7], backends=[EMULATOR, GPU])
    def test_no_tap_behind_a_row_multiplies(self, way, rng):
        """Rows of a filter are filled up with zeros, by which inf must not be multiplied."""
        problem = make_problem("conv2d", (1, 1, 9, 26), (1, 1, 9, 10), padding=(4, 0))
        layer = make_layer(rng, problem, integers, epilogue=False)
        layer.x[0, 0, :, 10:] = np.inf
        assert np.isfinite(layer.run(way.plan(problem))[..., 0]).all()

    @on_backends(depthwise_tiles, backends=[EMULATOR, GPU])
    def test_pixels_behind_the_last(self, way, rng, launched):
        """Where their inputs would lie 2**31 elements away, that number is in no int."""
        problem = make_problem("conv1d", (1, 1, 10), (1, 1, 1), stride=2**25)
        make_layer(rng, problem, integers).check(way.plan(problem))
        tile = depthwise_tile(way.tile)
        assert isinstance(tile, depthwise.ChannelTile) or ("_long" in launched[-1]) == (tile.block_q >= 64)


def one_more_between(array, axis):
    """The same values with channels last, and an element more between neighbours along an axis."""
    steps, step = [0, 1, 0, 0], array.shape[1]
    for at in (3, 2, 0):
        steps[at] = step + (at == axis)
        step = steps[at] * array.shape[at]
    far = np.lib.stride_tricks.as_strided(
        np.full(step, np.nan, array.dtype), array.shape, [array.itemsize * step for step in steps]
    )
    far[...] = array
    return far


def shifted(array, count):
    """The same values at an address that lies `count` elements behind an aligned one."""
    memory = np.empty(array.size + count, array.dtype)[count:]
    moved = np.lib.stride_tricks.as_strided(memory, array.shape, array.strides)
    moved[...] = array
    return moved


class TestBeyondInt:
    """Samples that lie 2**31 elements apart: offsets of 32 bits would come out negative."""

    PROBLEMS = (
        Case("far", "conv2d", (2, 5, 6, 7), (9, 5, 3, 3), {"padding": 1}),
        Case("far_pixels", "conv2d", (2, 8, 6, 6), (9, 8, 1, 1)),
        Case("far_channels", "conv2d", (2, 8, 6, 6), (8, 1, 3, 3), {"groups": 8}),
    )

    @every_form
    def test_input(self, way, rng, launched):
        for problem in way.problems(self.PROBLEMS):
            layer = make_layer(rng, problem, integers)
            layer.with_array(x=far_apart(layer.x)).check(way.plan(problem))
        assert any("_long" in name for name in launched)

    @on_backends(forms, backends=[EMULATOR])
    def test_output_and_residual(self, way, rng):
        for problem in way.problems(self.PROBLEMS):
            layer, plan = make_layer(rng, problem, integers), way.plan(problem)
            out = far_apart(np.full(problem.output_shape, np.nan, np.float32))
            layer.judge(plan, layer.with_array(residual=far_apart(layer.residual)).run(plan, out=out))


def far_apart(array):
    """The same values, in memory of which the system gives only the pages that are touched."""
    step = 2**31 + 64
    memory = np.empty(step * (len(array) - 1) + array[0].size, array.dtype)
    strides = (step * array.itemsize, *np.empty(array.shape[1:], array.dtype).strides)
    far = np.lib.stride_tricks.as_strided(memory, array.shape, strides)
    far[...] = array
    return far


class TestWorkspace:
    @every_form
    def test_as_stated(self, way, monkeypatch):
        """What a run allocates is what the plan says, whether it splits sums, works in turns or neither."""
        for problem, room, processors in itertools.product(
            way.problems([case for case in (*CASES, DEEP, PIXELS, TILED) if case not in HEAVY]),
            (1 << 26, 1),
            (1, 132),
        ):
            if problem.N == 0:
                continue
            monkeypatch.setattr(im2col, "MOST_GATHERED", room)
            monkeypatch.setattr(winograd, "MOST_TRANSFORMED", room)
            plan = with_device(way.plan(problem), processors=processors, l2=room)
            driver = Allocating()
            with launch.use_driver(driver):
                make_layer(np.random.default_rng(0), problem, integers).run(plan)
            assert driver.allocated == plan.workspace(), plan


class Allocating:
    """A driver that allocates and adds up, and runs nothing."""

    def __init__(self):
        self.allocated = 0

    def empty(self, shape, dtype):
        array = np.empty(shape, dtype)
        self.allocated += array.nbytes
        return array

    def copy(self, array, target):
        pass

    def clear(self, array):
        pass

    def launch(self, kernel, blocks, arguments):
        pass


class TestIndex:
    @pytest.mark.parametrize(
        ("largest", "kind"), [(0, "int"), (2**31 - 1, "int"), (2**31, "long long"), (2**40, "long long")]
    )
    def test_type(self, largest, kind):
        assert product.index_type(largest) == kind

    @pytest.mark.parametrize(
        ("input_shape", "options", "strides", "least"),
        [
            ((2, 8, 9, 10), {}, (2**33, 400, 40, 4), 2**31),  # samples far apart
            ((2, 8, 9, 10), {}, (-(2**33), 400, 40, 4), 2**31),  # and backwards
            ((1, 8, 9, 10), {"padding": 2**20}, (2880, 360, 2**14, 4), 2**31),  # rows of the padding
            ((2**31, 1, 1, 1), {}, (4, 4, 4, 4), 2**31),
            ((1, 1, 9, 10), {"stride": 2**31}, (360, 360, 40, 4), 2**31),
        ],
    )
    def test_reach(self, input_shape, options, strides, least):
        problem = make_problem("conv2d", input_shape, (4, input_shape[1], 1, 1), **options)
        n, c, h, w = strides
        _, reach = product.describe(problem, (("x", (n, c, 0, h, w)),), 0.0)
        assert reach >= least


@every_form
def test_nan_of_half_types(way, rng):
    """The GPU's NaN has all bits set: rounded as a number it would become -0."""
    for dtype in filter(way.takes, way.backend.dtypes):
        problem = way.problems([PIXELS, DEEP, CHANNELS], dtype=dtype)[0]
        layer = make_layer(rng, problem, integers)
        layer.residual.view(f"u{layer.residual.itemsize}").fill((1 << 8 * layer.residual.itemsize - 1) - 1)
        assert np.isnan(layer.run(way.plan(problem)).astype(np.float64)).all()


@on_backends(any_tile, backends=[EMULATOR, GPU])
def test_a_packed_weight_fits_every_tile_of_its_form(way, rng):
    """A layer packs once for all tiles that its inputs lead to, again for those that want another form."""
    layer = make_layer(rng, way.problems([DEEP, PIXELS, *CASES])[0], integers)
    packed = {}
    for plan in possible_plans(layer.problem, way.algorithm, way.backend.package):
        if plan.weight_form not in packed:
            packed[plan.weight_form] = layer.prepare(plan)
        layer.judge(plan, layer.run(plan, packed[plan.weight_form]))
    assert len(packed) == {"direct": 2, "im2col": 2, "winograd": 2}.get(way.algorithm, 1)


class TestLaunch:
    """What is wrong with a launch is said before anything runs."""

    KERNEL = product.stage_kernel("im2col", "PACK", "float32", {}, 256, "int")

    @pytest.fixture
    def given(self):
        array, conv = np.ones(4, np.float32), product.describe(DEEP.problem(), (), 0.0)[0]
        return {"weight": array, "packed": array, "conv": conv, "together": 1, "rows": 8, "pitch": 4}

    def test_unknown_and_missing_arguments(self, given):
        names = "weight, packed, conv, together, rows, pitch"
        for wrong in ({**given, "height": 3}, {"weight": None}):
            with pytest.raises(TypeError, match=f"^{self.KERNEL.name} takes {names}, got weight"):
                launch.launch(self.KERNEL, 1, **wrong)

    def test_dtype_of_an_array(self, given):
        given["packed"] = np.ones(4, np.float64)
        with pytest.raises(TypeError, match="packed must be an array of float32, got float64"):
            launch.launch(self.KERNEL, 1, **given)

    @pytest.mark.parametrize("blocks", [0, 2**31])
    def test_grid(self, given, blocks):
        rule = "must be launched on 1 to 2147483647 blocks of 1 to 1024 threads"
        with pytest.raises(ConvError, match=f"{rule}, got {blocks} of 256"):
            launch.launch(self.KERNEL, blocks, **given)

    def test_a_struct_for_each_kernel(self, given):
        """Fields become other structs for a kernel with long indices."""
        long = product.stage_kernel("im2col", "PACK", "float32", {}, 256, "long long")
        structs = [given["conv"].struct(kernel, kernel.parameters[2].dtype) for kernel in (self.KERNEL, long)]
        assert structs[0].dtype != structs[1].dtype
        assert structs[0]["W"] == structs[1]["W"] == 20
