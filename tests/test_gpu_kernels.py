"""What only the GPU's kernels have: parts of sums, turns of gathering, long indices, stages of a patch."""

import dataclasses
import itertools

import numpy as np
import pytest

from fastconv.gpu import direct, im2col, launch, product, winograd
from fastconv.plan import possible_plans
from fastconv.problem import ConvError, make_problem
from tests.backends import EMULATOR, GPU
from tests.cases import CASES, HEAVY, Case
from tests.compare import integers, normals
from tests.emulator import EmulatorDriver
from tests.kernels import ORDERS, Way, forms, make_layer, on_backends

every_form = on_backends(forms, backends=[EMULATOR, GPU])
every_order = pytest.mark.parametrize("order", ORDERS)

DEEP = Case("deep", "conv2d", (3, 150, 12, 20), (37, 150, 3, 3), {"padding": 1})
TILED = Case("tiled", "conv2d", (3, 5, 41, 43), (7, 5, 3, 3), {"padding": 1})
PIXELS = Case("pixels", "conv2d", (3, 650, 12, 20), (37, 650, 1, 1))


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
        problems = way.problems([DEEP, PIXELS])
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

    @every_order
    @on_backends(fused_or_not, backends=[EMULATOR, GPU])
    def test_fused_or_not_the_bits_are_the_same(self, way, order, rng):
        layer = make_layer(rng, DEEP.problem(order=order), normals)
        fused = layer.run(Way("winograd", "f2_fused", way.backend).plan(layer.problem))
        assert layer.run(way.plan(layer.problem)).tobytes() == fused.tobytes()

    @on_backends(transforming, backends=[EMULATOR])
    def test_indices_count_what_is_transformed(self, way, rng, monkeypatch, launched):
        """V is larger than the input: its offsets can need 64 bits where those of the input do not."""
        problem = TILED.problem()
        plan = way.plan(problem)
        most = np.prod(problem.input_shape) * 2  # less than the elements of V
        monkeypatch.setattr(product, "_FIRST_LONG", int(most))
        make_layer(rng, problem, integers).check(plan)
        assert ["_long" in name for name in launched] == [False, True, True, True]


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
        assert direct._stage(make_problem("conv2d", input_shape, weight_shape, **options)) == stage

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


class TestBeyondInt:
    """Samples that lie 2**31 elements apart: offsets of 32 bits would come out negative."""

    PROBLEMS = (
        Case("far", "conv2d", (2, 5, 6, 7), (9, 5, 3, 3), {"padding": 1}),
        Case("far_pixels", "conv2d", (2, 8, 6, 6), (9, 8, 1, 1)),
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
        problem = way.problems([PIXELS, DEEP], dtype=dtype)[0]
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
    assert len(packed) == {"im2col": 2, "winograd": 2}.get(way.algorithm, 1)


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
