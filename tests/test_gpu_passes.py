"""The gradients on a GPU: of the weight by kernels of its own, of the input by those of the convolution."""

import dataclasses
import itertools
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest

from fastconv import reference
from fastconv.algorithms import TABLE
from fastconv.gpu import launch, product
from fastconv.gpu.grad_weight import depthwise, direct, outer
from fastconv.plan import why_refused
from fastconv.problem import ConvProblem, Epilogue, make_problem
from tests.backends import EMULATOR, GPU, get, put
from tests.cases import CASES, HEAVY, Case, options_of
from tests.compare import assert_bounded, assert_exact, finfo, integers, layouts, normals, poisoned
from tests.emulator import EmulatorDriver
from tests.kernels import ORDERS, Way, forms, in_order, on_backends
from tests.test_gpu_kernels import Allocating

BACKENDS = [EMULATOR, GPU]
LIGHT = [case for case in CASES if case not in HEAVY]

# Several tiles of rows, of columns and of pixels; several parts, of which the last ends amid a slice.
PRODUCTS = (
    Case("rows_and_columns", "conv2d", (2, 15, 5, 13), (134, 15, 3, 3), {"padding": 1}),
    Case("fours", "conv2d", (3, 12, 6, 8), (36, 12, 1, 3), {"padding": (0, 1)}),
    Case("groups", "conv2d", (2, 4, 9, 20), (6, 2, 5, 5), {"groups": 2, "padding": 2, "stride": (1, 2)}),
    Case("far_taps", "conv2d", (1, 3, 43, 70), (4, 3, 3, 3), {"dilation": (16, 30)}),
    Case("far_pixels", "conv2d", (1, 3, 49, 199), (5, 3, 2, 3), {"stride": (9, 40)}),
    Case("volume", "conv3d", (1, 5, 5, 6, 7), (9, 5, 2, 3, 2), {"padding": 1}),
    Case("pixels", "conv2d", (2, 131, 5, 7), (133, 131, 1, 1)),
    Case("pixels_in_fours", "conv2d", (2, 132, 6, 10), (68, 132, 1, 1)),
    Case("pixels_stride_2", "conv2d", (3, 12, 13, 17), (16, 6, 1, 1), {"groups": 2, "stride": 2}),
)
CHANNELS = (
    Case("channels", "conv2d", (3, 35, 19, 37), (35, 1, 3, 3), {"groups": 35, "padding": 1}),
    Case("multiplier", "conv2d", (2, 3, 35, 67), (6, 1, 5, 4), {"groups": 3, "stride": 2}),
    Case("blocks_of_taps", "conv3d", (2, 2, 3, 16, 17), (2, 1, 2, 10, 9), {"groups": 2, "padding": 3}),
    Case("far_taps", "conv2d", (1, 2, 43, 90), (4, 1, 3, 3), {"groups": 2, "dilation": (12, 40)}),
    Case("far_pixels", "conv2d", (1, 2, 83, 350), (2, 1, 2, 3), {"groups": 2, "stride": (9, 40)}),
)

every_order = pytest.mark.parametrize("order", ORDERS)


def weight_ways(backend):
    """Every algorithm that has the pass, with every tile."""
    found = []
    for name in TABLE:
        path = f"fastconv.gpu.grad_weight.{name}"
        tiles = import_module(path).TILES if find_spec(path) else ()
        found += [WeightWay(name, str(tile), backend) for tile in tiles]
    return found


def weight_forms(backend):
    """Every algorithm that has the pass, with one tile: all tiles of one share their source."""
    return list({way.algorithm: way for way in weight_ways(backend)}.values())


def large_forms(backend):
    """Every algorithm that has the pass, with its first tile: one that float64 has too."""
    return list({way.algorithm: way for way in reversed(weight_ways(backend))}.values())


def products(backend):
    """The tiles of im2col."""
    return [way for way in weight_ways(backend) if way.algorithm == "im2col"]


def unlike_forms(backend):
    """One tile of each algorithm, of depthwise also one whose threads have several rows."""
    return [*weight_forms(backend), WeightWay("depthwise", "8x16x16", backend)]


class WeightWay(Way):
    """One way to compute the gradient of the weight."""

    def takes(self, dtype):
        tiles = import_module(f"fastconv.gpu.grad_weight.{self.algorithm}").TILES
        return any(str(tile) == self.tile and tile.takes(dtype) for tile in tiles)

    def problems(self, cases, **changes):
        return super().problems(cases, direction="grad_weight", **changes)

    def large(self, *names, **changes):
        """The large problems that are for the algorithm, or those of a name."""
        cases = CHANNELS if self.algorithm == "depthwise" else PRODUCTS
        return self.problems([case for case in cases if not names or case.name in names], **changes)


@dataclasses.dataclass(frozen=True)
class Gradient:
    """A problem with its data: x, or the weight, and the gradient of the output, of the problem's rank."""

    problem: ConvProblem
    other: np.ndarray
    grad: np.ndarray
    whole: bool

    @property
    def shape(self):
        return self.problem.weight_shape if self.is_of_weight else self.problem.input_shape

    @property
    def is_of_weight(self):
        return self.problem.direction == "grad_weight"

    def refer(self, other, grad):
        ndim, options = self.problem.ndim, options_of(self.problem)
        if self.is_of_weight:
            return getattr(reference, f"conv{ndim}d_weight")(other, self.shape, grad, **options)
        return getattr(reference, f"conv{ndim}d_input")(self.shape, other, grad, **options)

    @cached_property
    def expected(self):
        return self.refer(self.other, self.grad)

    def run(self, plan, out=None):
        axes = (slice(None), slice(None), *(None,) * (3 - self.problem.ndim))
        if out is None:
            order = "NCHW" if self.is_of_weight else self.problem.order
            out = poisoned(self.shape, self.problem.dtype, order)
        written, other, grad = out[axes], put(self.other[axes]), put(self.grad[axes])
        first, second = (other, grad) if self.is_of_weight else (grad, other)
        shown = put(written)
        plan.run(first, second, None, None, Epilogue(), shown)
        get(shown, written)
        return out

    def judge(self, plan, found):
        if self.whole and plan.algorithm.exact(plan.problem, plan.tile):
            assert_exact(found, self.expected, self.problem.dtype)
            return
        factor, reach = plan.error_bound()
        scale = self.refer(np.abs(self.other), reference.largest_near(np.abs(self.grad), reach))
        bound = factor * np.finfo(self.problem.compute_dtype).eps * scale
        if self.problem.dtype != self.problem.compute_dtype:
            info = finfo(self.problem.dtype)
            bound = bound + info.eps / 2 * (np.abs(self.expected) + bound) + info.smallest_subnormal
        assert_bounded(found, self.expected, bound, self.problem.dtype)

    def check(self, plan):
        try:
            self.judge(plan, self.run(plan))
        except AssertionError as error:
            raise AssertionError(f"{plan}\n{error}") from None


def make_gradient(rng, problem, fill):
    of_weight = problem.direction == "grad_weight"
    other = fill(rng, problem.input_shape if of_weight else problem.weight_shape, problem.dtype)
    grad = in_order(fill(rng, problem.output_shape, problem.dtype), problem.order)
    other = in_order(other, problem.order) if of_weight else other
    return Gradient(problem, other, grad, fill.__name__ == "integers")


def with_device(plan, **changes):
    """The same plan for another GPU, such as one with more processors."""
    return dataclasses.replace(plan, device=dataclasses.replace(plan.device, **changes))


@pytest.fixture
def launched(monkeypatch):
    """The kernels that a test launches, by name, and their arguments."""
    found = []
    real = launch.launch

    def remember(kernel, blocks, **arguments):
        found.append((kernel.name, arguments))
        real(kernel, blocks, **arguments)

    monkeypatch.setattr(launch, "launch", remember)
    return found


class TestWeight:
    @every_order
    @on_backends(weight_forms, backends=BACKENDS)
    def test_every_case(self, way, order, rng):
        """Each in one of the two orders; which one differs by algorithm."""
        turn = ORDERS.index(order) + list(TABLE).index(way.algorithm)
        for problem in way.problems(LIGHT, order=order)[turn % 2 :: 2]:
            make_gradient(rng, problem, integers).check(way.plan(problem))

    @on_backends(weight_ways, backends=BACKENDS)
    def test_every_tile(self, way, rng):
        """Beyond one tile in rows, columns and pixels; a tile meets half of the cases, in two orders."""
        turn = [str(one) for one in weight_ways(way.backend)].index(str(way))
        for i, problem in enumerate(way.large()[turn % 2 :: 2]):
            ordered = dataclasses.replace(problem, order=ORDERS[(turn // 2 + i) % 2])
            make_gradient(rng, ordered, integers).check(way.plan(ordered))

    @on_backends(weight_forms, dtypes=("float16", "bfloat16"), backends=BACKENDS)
    def test_half_types(self, way, dtype, rng):
        """Sums of float32, rounded once."""
        names = "fours", "pixels_in_fours", "channels"
        for order, fill in zip(ORDERS, (integers, normals)):
            for problem in way.large(*names, dtype=dtype, order=order):
                make_gradient(rng, problem, fill).check(way.plan(problem))

    @on_backends(large_forms, dtypes=("float64",), backends=BACKENDS)
    def test_float64(self, way, dtype, rng):
        for problem in way.large("groups", "pixels", "multiplier", "blocks_of_taps", dtype=dtype):
            make_gradient(rng, problem, normals).check(way.plan(problem))

    @on_backends(weight_forms, backends=BACKENDS)
    def test_within_the_bound(self, way, rng):
        for problem in way.large():
            make_gradient(rng, problem, normals).check(way.plan(problem))

    @on_backends(weight_forms, backends=BACKENDS)
    def test_any_layout(self, way, rng):
        """Of input, gradient and result."""
        names = ("padded_3x3", "pointwise_groups", "depthwise")
        problem = way.problems([case for case in CASES if case.name in names])[-1]
        gradient, plan = make_gradient(rng, problem, integers), way.plan(problem)
        for name in ("other", "grad"):
            for _, view in layouts(getattr(gradient, name)):
                dataclasses.replace(gradient, **{name: view}).check(plan)
        for label, out in layouts(np.full(gradient.shape, np.nan, np.float32)):
            if label != "read-only":
                gradient.judge(plan, gradient.run(plan, out))

    @on_backends(weight_forms, backends=BACKENDS)
    def test_long_indices(self, way, rng, monkeypatch, launched):
        monkeypatch.setattr(product, "_FIRST_LONG", 0)
        names = ("dilation_per_axis", "groups", "pointwise_groups", "depthwise_multiplier", "conv3d_mixed")
        for i, problem in enumerate(way.problems([case for case in CASES if case.name in names])):
            ordered = dataclasses.replace(problem, order=ORDERS[i % 2])
            make_gradient(rng, ordered, integers).check(way.plan(ordered))
        assert launched
        assert all("_long" in name for name, _ in launched)

    @on_backends(weight_forms, backends=BACKENDS)
    def test_samples_that_no_int_reaches(self, way, rng, launched):
        """Of input and gradient, 2**31 elements apart; and of pixels behind the last ones."""
        problem = way.large("groups", "pixels_stride_2", "channels")[-1]
        gradient, plan = make_gradient(rng, problem, integers), way.plan(problem)
        for name in ("other", "grad"):
            far = far_apart(getattr(gradient, name))
            dataclasses.replace(gradient, **{name: far}).check(plan)
        assert all("_long" in name for name, _ in launched)
        spread = make_problem("conv1d", (1, 1, 10), (1, 1, 1), stride=2**25, direction="grad_weight")
        make_gradient(rng, spread, integers).check(way.plan(spread))

    @on_backends(weight_forms, backends=[EMULATOR])
    def test_any_order_of_threads(self, way, rng):
        """Between two barriers the threads of a block may run in any order: same bits."""
        for problem in way.large("groups", "pixels_stride_2", "channels"):
            gradient, plan = make_gradient(rng, problem, normals), way.plan(problem)
            expected = gradient.run(plan)
            for seed in (1, 2):
                with launch.use_driver(EmulatorDriver(seed)):
                    assert gradient.run(plan).tobytes() == expected.tobytes()

    @every_order
    @on_backends(unlike_forms, backends=BACKENDS)
    def test_what_no_tap_meets_does_not_count(self, way, order, rng):
        """Inputs that only outputs behind the last ones, or taps behind the last ones, would see are inf."""
        for shape, taps, stride in (((6, 11), (3, 3), 3), ((13, 13), (8, 8), 1), ((5, 7), (1, 1), 2)):
            groups = 2 if way.algorithm == "depthwise" else 1
            shapes = (2, 2, *shape), (2, 2 // groups, *taps)
            problem = make_problem(
                "conv2d", *shapes, stride=stride, groups=groups, order=order, direction="grad_weight"
            )
            if why_refused(problem, way.algorithm, "gpu") is None:
                check_unseen(make_gradient(rng, problem, integers), way.plan(problem))

    @on_backends(weight_forms, backends=[EMULATOR])
    def test_workspace_as_stated(self, way):
        for problem, processors in itertools.product([*way.problems(LIGHT), *way.large()], (1, 132)):
            if problem.N == 0:
                continue
            plan, driver = with_device(way.plan(problem), processors=processors), Allocating()
            with launch.use_driver(driver):
                make_gradient(np.random.default_rng(0), problem, integers).run(plan)
            assert driver.allocated == plan.workspace(), plan
            assert plan.cost() > 0

    def test_winograd_is_not_written(self):
        problem = make_problem("conv2d", (1, 2, 9, 9), (2, 2, 3, 3), direction="grad_weight")
        assert why_refused(problem, "winograd", "gpu") == "has no kernel for grad_weight on the GPU yet"


def check_unseen(gradient, plan):
    """With inf in every input in turn exactly those taps that meet it differ: here all of one channel."""
    x = gradient.other
    for h, w in itertools.product(*({0, size // 2, size - 1} for size in x.shape[2:])):
        x[...] = np.where(np.isfinite(x), x, 1)
        x[0, 0, h, w] = np.inf
        gradient.grad[...] = np.abs(gradient.grad) + 1
        assert_exact(gradient.run(plan), gradient.refer(x, gradient.grad), "float32")


def far_apart(array):
    """The same values, in memory of which the system gives only the pages that are touched."""
    step = 2**31 + 64
    memory = np.empty(step * (len(array) - 1) + array[0].size, array.dtype)
    strides = (step * array.itemsize, *np.empty(array.shape[1:], array.dtype).strides)
    far = np.lib.stride_tricks.as_strided(memory, array.shape, strides)
    far[...] = array
    return far


class TestParts:
    """Pixels are summed in parts, so that all SMs have work; the stage ADD adds them."""

    @pytest.mark.parametrize("processors", [1, 3, 1000])
    @on_backends(weight_forms, backends=BACKENDS)
    def test_of_any_number(self, way, processors, rng, launched):
        for problem in way.large():
            make_gradient(rng, problem, integers).check(with_device(way.plan(problem), processors=processors))
        parts = [arguments["parts"] for name, arguments in launched if "_weight__" in name]
        assert sum("_add__" in name for name, _ in launched) == sum(count > 1 for count in parts)
        assert processors == 1 or max(parts) > 1

    @on_backends(weight_forms, backends=BACKENDS)
    def test_same_bits_in_every_run(self, way, rng):
        problem = way.large()[0]
        gradient, plan = make_gradient(rng, problem, normals), way.plan(problem)
        assert len({gradient.run(plan).tobytes() for _ in range(3)}) == 1

    @on_backends(products, backends=BACKENDS)
    def test_same_bits_with_every_tile(self, way, rng):
        """A tile decides neither where a part begins nor the order within it; nor does the memory order."""
        problem = PRODUCTS[0].problem(direction="grad_weight")
        gradient = make_gradient(rng, problem, normals)
        first = products(way.backend)[0]
        assert gradient.run(way.plan(problem)).tobytes() == gradient.run(first.plan(problem)).tobytes()
        last = dataclasses.replace(problem, order="NHWC")
        other = dataclasses.replace(
            gradient, problem=last, **{n: in_order(getattr(gradient, n), "NHWC") for n in ("other", "grad")}
        )
        assert other.run(way.plan(last)).tobytes() == gradient.run(first.plan(problem)).tobytes()

    def test_how_many(self):
        """As many as keep an H100 busy, each of 64 pixels at least; one where there are sums enough."""
        with EMULATOR.running():
            device = launch.driver().device()
        tile = outer.TILES[0]
        for input_shape, weight_shape, parts in (
            ((32, 64, 56, 56), (64, 64, 3, 3), 118),  # 9 squares of 64 x 64: 8 * 132 / 9
            ((32, 512, 7, 7), (512, 512, 3, 3), 2),
            ((32, 2048, 7, 7), (2048, 2048, 3, 3), 1),
            ((1, 64, 7, 7), (64, 64, 3, 3), 1),  # 49 pixels
        ):
            problem = make_problem("conv2d", input_shape, weight_shape, padding=1, direction="grad_weight")
            assert outer.divide(problem, tile, device).parts == parts


class TestLoads:
    """What threads load at once: four pixels or four channels where these lie together and aligned."""

    @pytest.mark.parametrize(
        ("shape", "order", "shift", "loads"),
        [
            ((2, 8, 6, 6), "NCHW", 0, "PIXELS"),
            ((2, 8, 7, 7), "NCHW", 0, "SINGLE"),
            ((2, 8, 6, 6), "NCHW", 1, "SINGLE"),
            ((2, 8, 7, 7), "NHWC", 0, "CHANNELS"),
            ((2, 7, 6, 6), "NHWC", 0, "SINGLE"),
            ((2, 8, 7, 7), "NHWC", 1, "SINGLE"),
        ],
    )
    @on_backends(
        lambda backend: [w for w in weight_forms(backend) if w.algorithm == "pointwise"], backends=BACKENDS
    )
    def test_of_both_operands(self, way, shape, order, shift, loads, rng, launched):
        for dtype in ("float32", "float16"):
            problem = make_problem(
                "conv2d", shape, (shape[1], shape[1], 1, 1), order=order, dtype=dtype, direction="grad_weight"
            )
            gradient = make_gradient(rng, problem, integers)
            moved = {name: shifted(getattr(gradient, name), shift) for name in ("other", "grad")}
            dataclasses.replace(gradient, **moved).check(way.plan(problem))
            assert f"_{loads.lower()}_{loads.lower()}_" in launched[-1][0]

    def test_of_windows_pixels_come_one_by_one(self, rng, launched):
        with EMULATOR.running():
            problem = make_problem("conv2d", (1, 8, 6, 6), (4, 8, 1, 1), direction="grad_weight")
            make_gradient(rng, problem, integers).check(Way("im2col", "64x64", EMULATOR).plan(problem))
        assert "_single_pixels_" in launched[-1][0]


def shifted(array, count):
    """The same values at an address that lies `count` elements behind an aligned one."""
    memory = np.empty(array.size + count + 16, array.dtype)
    start = -(memory.ctypes.data // array.itemsize) % (16 // array.itemsize) + count
    moved = np.lib.stride_tricks.as_strided(memory[start : start + array.size], array.shape, array.strides)
    moved[...] = array
    return moved


class TestStrips:
    """Of direct: the pixels that shared memory holds, and which taps share a plane of x."""

    @pytest.mark.parametrize(
        ("input_shape", "weight_shape", "options", "dtype", "strip"),
        [
            ((2, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}, "float32", (8, 8, 3, 3)),
            ((2, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}, "float64", (4, 8, 3, 3)),
            ((2, 64, 7, 7), (64, 64, 3, 3), {"padding": 1}, "float32", (7, 7, 3, 3)),
            ((2, 3, 224, 224), (64, 3, 7, 7), {"stride": 2, "padding": 3}, "float32", (8, 8, 7, 7)),
            ((1, 9, 99, 299), (8, 9, 3, 3), {"dilation": (40, 1)}, "float32", (1, 60, 1, 3)),
            ((1, 9, 99, 2999), (8, 9, 3, 3), {"dilation": (40, 1400)}, "float32", (1, 50, 1, 1)),
        ],
    )
    def test_loads_least(self, input_shape, weight_shape, options, dtype, strip):
        problem = make_problem(
            "conv2d", input_shape, weight_shape, dtype=dtype, direction="grad_weight", **options
        )
        found = direct._strip(problem, direct.TILES[0])
        assert found[:4] == strip
        assert found.patches * np.dtype(problem.compute_dtype).itemsize <= direct.PATCH_BYTES
        assert found.height * found.width * 64 * np.dtype(dtype).itemsize <= direct.PIXEL_BYTES

    @pytest.mark.parametrize("taps", [(1, 1), (3, 3), (5, 4), (7, 7), (12, 12)])
    def test_room_for_all_planes(self, taps):
        """A tile of terms begins amid a plane: as many patches are counted as it can then meet."""
        problem = make_problem("conv2d", (1, 70, 19, 19), (64, 70, *taps), direction="grad_weight")
        for tile in direct.TILES:
            strip = direct._strip(problem, tile)
            area = (strip.height + taps[0] - 1) * (strip.width + taps[1] - 1)
            tiles = (
                range(problem.gemm_k)[at:][: tile.block_n] for at in range(0, problem.gemm_k, tile.block_n)
            )
            most = max(len({term // (taps[0] * taps[1]) for term in terms}) for terms in tiles)
            assert most * area <= strip.patches <= (most + 1) * area


class TestTapsAtATime:
    """Depthwise, a thread has the sums of all taps, or of a block of them."""

    @pytest.mark.parametrize(
        ("taps", "options", "tile", "dtype", "block"),
        [
            ((3, 3), {}, "1x32x64", "float32", (3, 3)),
            ((7, 7), {}, "1x32x64", "float32", (7, 7)),
            ((7, 7), {}, "1x32x64", "float64", (3, 7)),  # 3 blocks; of 5 x 5 it would be 4
            ((31, 31), {}, "1x32x64", "float32", (3, 16)),  # 22 blocks; of 7 x 7 it would be 25
            ((3, 3), {"dilation": (1, 40)}, "1x32x64", "float32", (3, 1)),
            ((3, 3), {"stride": 2}, "32x8x8", "float32", (1, 3)),  # shared memory is full
        ],
    )
    def test_largest_that_fits(self, taps, options, tile, dtype, block):
        problem = make_problem("conv2d", (1, 4, 99, 99), (4, 1, *taps), groups=4, dtype=dtype, **options)
        (chosen,) = (one for one in depthwise.TILES if str(one) == tile)
        assert depthwise._taps_at_a_time(problem, chosen)[:2] == block


class TestInput:
    """The gradient of the input: convolutions of its phases, by the kernels of the convolution."""

    @on_backends(forms, backends=BACKENDS)
    def test_cases(self, way, rng):
        names = (
            "padded_3x3",
            "stride_per_axis",
            "pointwise_stride_2",
            "groups",
            "depthwise",
            "conv1d_causal",
            "conv3d_frames",
            "patches",
            "patches_depthwise",
        )
        for i, case in enumerate(case for case in CASES if case.name in names):
            problem = case.problem(direction="grad_input", order=ORDERS[i % 2])
            if why_refused(problem, way.algorithm, "gpu") is None:
                make_gradient(rng, problem, integers).check(way.plan(problem))

    @pytest.mark.parametrize("dtype", ["float64", "float16"])
    @on_backends(
        lambda backend: list({way.algorithm: way for way in forms(backend)}.values()), backends=BACKENDS
    )
    def test_dtypes(self, way, dtype, rng):
        problem = one_case(way.algorithm, dtype)
        if way.takes(dtype):
            make_gradient(rng, problem, integers).check(way.plan(problem))

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    @on_backends(forms, backends=[EMULATOR])
    def test_workspace_as_stated(self, way, dtype, rng):
        """Of a single part, with the rearranged weight."""
        problem = one_case(way.algorithm, dtype)
        if way.takes(dtype):
            plan, driver = way.plan(problem), Allocating()
            with launch.use_driver(driver):
                make_gradient(rng, problem, integers).run(plan)
            assert driver.allocated == plan.workspace(), plan


def one_case(algorithm, dtype):
    """A gradient of the input with stride 1 that an algorithm accepts."""
    name = {"pointwise": "pointwise", "depthwise": "depthwise"}.get(algorithm, "padded_3x3")
    return next(case for case in CASES if case.name == name).problem(direction="grad_input", dtype=dtype)
