"""Every algorithm with every tile, forced by name, against the reference."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

import fastconv
from fastconv import reference
from fastconv.algorithms import TABLE
from fastconv.cpu import depthwise, im2col, pointwise, pointwise_channels, winograd
from fastconv.cpu.band import task_threads
from fastconv.cpu.device import current
from fastconv.cpu.pointwise_channels import ChannelTile
from fastconv.plan import make_plan, possible_plans
from fastconv.problem import ACTIVATIONS, ConvError
from tests.backends import CPU, EMULATOR
from tests.cases import CASES, HEAVY, TALL, WIDE, Case, around_tile, operands, options_of, sizes_around
from tests.compare import assert_bounded, assert_exact, finfo, integers, layouts, normals
from tests.kernels import (
    DTYPES,
    ORDERS,
    Way,
    forms,
    largest_tile,
    make_layer,
    on_backends,
    tile_plans,
    tiles,
    ways,
    with_caches,
)


def mixed_case(algorithm, **changes):
    """A problem with several channels, rows and samples that an algorithm accepts."""
    names = ("padded_3x3", "pointwise", "depthwise_7x7")
    cases = [case for case in CASES if case.name in names]
    return Way(algorithm, "").problems(cases, **changes)[0]


def tile_of(way, dtype):
    return next(tile for tile in tiles(way.algorithm, way.backend, dtype) if str(tile) == way.tile)


def exact_forms(backend):
    """The forms whose sums of small integers are exact in `mixed_case`."""
    pairs = ((way, mixed_case(way.algorithm)) for way in forms(backend))
    return [way for way, problem in pairs if TABLE[way.algorithm].exact(problem, tile_of(way, "float32"))]


every_way = on_backends(ways, dtypes=True)
every_form = on_backends(forms)
every_exact_form = on_backends(exact_forms)
every_exact_form_and_sum = on_backends(exact_forms, dtypes=DTYPES)  # what it is summed in
every_cpu_way = on_backends(ways, backends=[CPU])
every_algorithm = pytest.mark.parametrize("algorithm", TABLE)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_order = pytest.mark.parametrize("order", ORDERS)


def tile_sizes(way, dtype):
    """The two sides of a register tile: output channels, and pixels or Winograd's tiles of them."""
    tile = tile_of(way, dtype)
    if way.backend is CPU:
        return tile.rows, tile.vectors * current().lanes(dtype)
    return tile.block_m, getattr(tile, "block_q", tile.block_n)


@every_order
@every_way
class TestTile:
    def test_cases(self, way, dtype, order, rng):
        for turn, problem in enumerate(some_problems(way, rng, dtype=dtype, order=order)):
            plan, even = way.plan(problem), turn % 2 == 0
            layers = [make_layer(rng, problem, integers), make_layer(rng, problem, normals)]
            layers[even] = without_operands(way, layers[even])
            for layer in layers:
                layer.check(plan, prepared=even)
                if way.backend is CPU:
                    layer.check(plan, prepared=not even)

    def test_sizes_around_the_tile(self, way, dtype, order, rng):
        """Sizes around both sides of the tile, either side as output channels and as pixels."""
        for turn, problem in enumerate(around_tile_of(way, dtype, order, rng)):
            plan, even = way.plan(problem), turn % 2 == 0
            layer = make_layer(rng, problem, normals if turn % 7 == 0 else integers)
            bare = without_operands(way, layer)
            (layer if even else bare).check(plan)
            (bare if even else layer).check(plan, prepared=True)


@every_dtype
@pytest.mark.parametrize("stride", [1, (2, 1)])
def test_sizes_around_a_tile_of_rows(dtype, stride, rng):
    """Of depthwise convolutions with large filters, whose tiles are rows of outputs."""
    way = Way("depthwise", "rows6x2")
    height, width = tile_sizes(way, dtype)
    for rows, columns in itertools.product(sizes_around(height).values(), sizes_around(width).values()):
        options = {"groups": 2, "padding": "same", "stride": stride}
        case = Case("rows", "conv2d", (1, 2, rows, columns), (4, 1, 11, 3), options)
        make_layer(rng, case.problem(dtype=dtype), integers).check(way.plan(case.problem(dtype=dtype)))


def around_tile_of(way, dtype, order, rng):
    """Problems of every family and pair of sizes: a third of them, or what an emulated GPU has time for."""
    outputs, pixels = (sizes_around(size).values() for size in tile_sizes(way, dtype))
    m = getattr(tile_of(way, dtype), "m", 1)
    pairs = [*itertools.product(outputs, pixels), *itertools.product(pixels, outputs)]
    if way.backend is not CPU:
        pairs = [pair for pair in pairs[:25] if math.prod(pair) * m**2 <= 2**18]
    found = [way.problems(around_tile(*pair, m), dtype=dtype, order=order) for pair in pairs]
    if way.backend is CPU:
        return [problem for turn, problems in enumerate(found) for problem in problems[turn % 3 :: 3]]
    every = list(itertools.chain(*found))
    return [every[i] for i in rng.permutation(len(every))[: 6 if dtype == "float32" else 3]]


def some_problems(way, rng, **changes):
    """All cases; on an emulated GPU, which takes its time, a few of them, others in every test."""
    if way.backend is not EMULATOR:
        return way.problems(CASES + TALL, **changes)
    light = way.problems([case for case in CASES + TALL if case not in HEAVY], **changes)
    few = max(len(light) // 6, 4) if changes["dtype"] == "float32" else 3
    return [light[i] for i in rng.permutation(len(light))[:few]]


def without_operands(way, layer):
    """The layer without bias and residual; on the CPU without activation too: GPU kernels compile it in."""
    activation = None if way.backend is CPU else layer.activation
    return layer.with_array(bias=None, residual=None, activation=activation)


@every_order
@every_cpu_way
def test_caches_of_any_size(way, order, rng):
    """Small caches cut small problems into many bands, blocks and groups of channels."""
    for problem in way.problems(CASES + WIDE, order=order):
        for l1, l2 in ((1 << 9, 1 << 11), (1 << 12, 1 << 15)):
            plan = with_caches(way.plan(problem), l1, l2)
            make_layer(rng, problem, integers).check(plan)
            make_layer(rng, problem, integers, epilogue=False).check(plan, prepared=True)


@every_order
@every_form
class TestWay:
    """What does not depend on the dtype: float32 stands for all."""

    def test_heavy_cases(self, way, order, rng):
        for problem in way.problems(HEAVY, order=order):
            make_layer(rng, problem, integers).check(way.plan(problem))

    def test_any_memory_is_read(self, way, order, rng):
        for problem in various(way, order=order):
            layer, plan = make_layer(rng, problem, integers), way.plan(problem)
            for name in ("x", "w", "bias", "residual"):
                for label, view in layouts(getattr(layer, name)):
                    y = layer.with_array(**{name: view}).run(plan)
                    assert_same(layer, plan, y, f"{name} {label}")
            for label, view in layouts(layer.w):
                relaid = layer.with_array(w=view)
                assert_same(layer, plan, relaid.run(plan, relaid.prepare(plan)), f"prepared w {label}")

    def test_repeated_elements_are_read(self, way, order, rng):
        """A stride of zero along every axis in turn, and along all of them."""
        for problem in various(way, order=order):
            layer, plan = make_layer(rng, problem, integers), way.plan(problem)
            for name in ("x", "w", "residual"):
                array = getattr(layer, name)
                for axes in [*((axis,) for axis in range(array.ndim)), tuple(range(array.ndim))]:
                    one = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(array.ndim))
                    layer.with_array(**{name: np.broadcast_to(array[one], array.shape)}).check(plan)
            layer.with_array(bias=np.broadcast_to(layer.bias[:1], layer.bias.shape)).check(plan)

    def test_any_memory_is_written_and_no_other(self, way, order, rng):
        """Also where a whole vector would end just beyond a row of the output."""
        rows, width = tile_sizes(way, "float32")
        m = getattr(tile_of(way, "float32"), "m", 1)
        cases = around_tile(rows, width - 1, m)
        if way.backend is CPU:  # where the larger tiles do not take seconds each
            cases += around_tile(width, rows + 1, m)
        for problem in various(way, order=order) + way.problems(cases, order=order):
            layer, plan = make_layer(rng, problem, integers), way.plan(problem)
            for label, out in layouts(np.full(problem.output_shape, np.nan, np.float32)):
                if not out.flags.writeable:
                    continue
                untouched = count_nan(memory_of(out)) - out.size
                assert_same(layer, plan, layer.run(plan, out=out), f"out {label}")
                assert count_nan(memory_of(out)) == untouched, f"{plan}: wrote beside out, {label}"

    def test_operands_are_only_read(self, way, order, rng):
        problem = mixed_case(way.algorithm, order=order)
        layer, plan = make_layer(rng, problem, normals), way.plan(problem)
        before = [array.copy() for array in (layer.x, layer.w, layer.bias, layer.residual)]
        layer.run(plan)
        prepared = layer.prepare(plan)
        copy = prepared.tobytes()  # parts that no result depends on may be NaN
        layer.run(plan, prepared)
        assert prepared.tobytes() == copy
        for array, old in zip((layer.x, layer.w, layer.bias, layer.residual), before, strict=True):
            assert np.array_equal(array, old)

    def test_every_part_of_the_epilogue_by_itself(self, way, order, rng):
        for problem in various(way, order=order):
            whole = make_layer(rng, problem, integers)
            for is_absent in itertools.product((True, False), repeat=3):
                absent = itertools.compress(("bias", "residual", "activation"), is_absent)
                whole.with_array(**dict.fromkeys(absent)).check(way.plan(problem))

    def test_nan_passes_through(self, way, order, rng):
        """One NaN in the residual is one NaN in the result; one in the bias is one channel of them."""
        problem = mixed_case(way.algorithm, order=order)
        layer, plan = make_layer(rng, problem, integers), way.plan(problem)
        layer.residual[0, 2, 1, 3] = np.nan
        layer.bias[1] = np.nan
        for activation in (None, *ALL_ACTIVATIONS):
            y = layer.with_array(activation=activation).run(plan)
            expected = np.zeros(y.shape, bool)
            expected[0, 2, 1, 3] = expected[:, 1] = True
            assert np.array_equal(np.isnan(y), expected), f"{plan}, {activation}"

    def test_nan_and_inf_reach_the_outputs_that_see_them(self, way, order, rng):
        """Each of them makes its windows NaN or inf; a transform of tiles may hit their neighbours too."""
        problem = mixed_case(way.algorithm, order=order)
        for value in (np.nan, np.inf, -np.inf):
            layer, plan = make_layer(rng, problem, integers, epilogue=False), way.plan(problem)
            clean = layer.run(plan)
            layer.x[1, 3, 4, 5] = value
            y = layer.run(plan)
            seen = ~np.isfinite(layer.expected)
            assert seen.any()
            assert not np.isfinite(y[seen]).any()
            reach = plan.error_bound().reach + problem.R // 2
            rows, columns = (slice(max(i - reach, 0), i + 1 + reach) for i in (4, 5))
            far = np.ones(y.shape, bool)
            far[1, :, rows, columns] = False
            assert np.array_equal(y[far], clean[far])


ALL_ACTIVATIONS = [("leaky_relu", 0.125) if name == "leaky_relu" else name for name in ACTIVATIONS]


def various(way, **changes):
    """Problems with padding and groups, without them, and with strides where the algorithm takes them."""
    names = (
        "plain_3x3", "padding_pairs", "groups", "same_stride_3", "conv1d_causal", "conv3d_mixed", "pointwise",
        "pointwise_stride_2", "conv3d_pointwise", "depthwise", "depthwise_7x7", "depthwise_multiplier",
    )  # fmt: skip
    cases = [case for case in CASES if case.name in names]
    return way.problems(cases if way.backend is EMULATOR else cases + TALL, **changes)


def assert_same(layer, plan, y, what):
    try:
        layer.judge(plan, y)
    except AssertionError as error:
        raise AssertionError(f"{plan}, {what}\n{error}") from None


def memory_of(array):
    """The whole array that a view looks at."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def count_nan(array):
    return np.count_nonzero(np.isnan(array))


@pytest.mark.parametrize("activation", ALL_ACTIVATIONS, ids=str)
class TestActivation:
    @every_order
    @every_exact_form_and_sum
    def test_reference(self, way, activation, dtype, order, rng):
        """The sum is exact, its activation is computed in float64 and rounded once."""
        problem = mixed_case(way.algorithm, dtype=dtype, order=order, precision="highest")
        layer = make_layer(rng, problem, integers).with_array(activation=activation)
        bias, residual = layer.bias / 16, layer.residual / 16  # near zero too, where a curve is a curve
        layer = layer.with_array(bias=bias.astype(dtype), residual=residual.astype(dtype))
        linear = layer.with_array(activation=None).expected
        y = layer.run(way.plan(problem))
        rounding = finfo(dtype).eps * np.abs(layer.expected)
        slack = 4 * finfo(problem.compute_dtype).eps * (1 + np.abs(linear))
        assert_bounded(y, reference.activate(linear, activation), rounding + slack, dtype)

    @every_exact_form
    def test_far_from_zero(self, way, activation):
        """Where exp overflows, where a sigmoid is 0 or 1; in bounds that no large value loosens."""
        problem = mixed_case(way.algorithm, precision="highest")
        values = [-3e4, -800, -90, -20, -6, -1, -0.0, 0, 1e-30, 5.5, 7, 90, 800, 3e4]
        values = np.resize(np.float32(values), problem.K)
        layer = make_layer(np.random.default_rng(0), problem, integers)
        layer = layer.with_array(x=np.zeros_like(layer.x), bias=values, residual=None, activation=activation)
        y = layer.run(way.plan(problem))[0, :, 0, 0]
        assert_bounded(y, reference.activate(values, activation), 1e-6 * np.abs(values) + 1e-7, "float32")


@every_algorithm
class TestHalf:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_rounded_once(self, algorithm, dtype, rng):
        """Sums are whole numbers in float32; the result is the reference, rounded once."""
        for problem in various(Way(algorithm, ""), dtype=dtype, precision="highest"):
            x, w, bias, residual = operands(rng, problem, integers)
            operation = getattr(fastconv, problem.op)
            options = {**options_of(problem), "activation": "relu", "residual": residual}
            y = operation(x, w, bias, algo=algorithm, precision="highest", **options)
            options["residual"] = residual.astype(float)
            arrays = (array.astype(float) for array in (x, w, bias))
            assert_exact(y, getattr(reference, problem.op)(*arrays, **options), dtype)


@every_algorithm
class TestNarrowerVectors:
    @pytest.mark.parametrize("bits", ["128", "256"])
    def test_exact(self, algorithm, bits, rng, monkeypatch):
        """The narrower vectors of other CPUs, with the tile that takes most registers and fits."""
        if int(bits) > current().vector_bits:
            pytest.skip(f"this CPU has no vectors of {bits} bits")
        monkeypatch.setenv("FASTCONV_VECTOR_BITS", bits)
        assert current().vector_bits == int(bits)
        way = largest_tile(algorithm)
        tile = tile_of(way, "float32")
        for order in ORDERS:
            tiles = around_tile(tile.rows + 1, tile.vectors * current().lanes("float32") + 1)
            for problem in way.problems(CASES + tiles, order=order, precision="highest"):
                make_layer(rng, problem, integers).check(way.plan(problem))


@pytest.mark.parametrize("bits", ["128", "256", "512"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_planes_in_pairs(bits, dtype, rng, monkeypatch):
    """Planes of few columns share vectors of any width: a task has two planes, filters and biases."""
    if int(bits) > current().vector_bits:
        pytest.skip(f"this CPU has no vectors of {bits} bits")
    monkeypatch.setenv("FASTCONV_VECTOR_BITS", bits)
    way, lanes = Way("depthwise", "plane2"), current().lanes(dtype)
    for stride, Q in ((1, lanes // 2), (2, (lanes - 1) // 2)):
        for C, W in ((6, stride * Q), (6, stride * (Q + 1)), (3, stride * Q)):
            options = {"stride": stride, "padding": 1, "groups": C}
            case = Case("planes", "conv2d", (3, C, 5, max(W, 1)), (C, 1, 3, 3), options)
            problem = case.problem(dtype=dtype)
            plan = way.plan(problem)
            block, _ = depthwise._plan_planes(problem, plan.tile, plan.device)
            assert (block.rows == 2) == (problem.Q == Q and C % 2 == 0)
            layer = make_layer(rng, problem, integers)
            for threads in ("1", "2"):
                monkeypatch.setenv("FASTCONV_THREADS", threads)
                layer.check(plan)


def test_winograd_in_narrow_vectors(rng, monkeypatch):
    """Vectors of two lanes, when a tile of F(4) has four columns and its filters nine taps."""
    monkeypatch.setenv("FASTCONV_VECTOR_BITS", "128")
    tile = tile_plans("winograd", dtype="float64")[0].tile
    way = Way("winograd", str(tile))
    assert (tile.m, current().lanes("float64")) == (4, 2)
    for order in ORDERS:
        tiles = around_tile(tile.rows + 1, tile.vectors * 2 + 1, tile.m)
        for problem in way.problems(CASES + tiles, dtype="float64", order=order):
            make_layer(rng, problem, normals).check(way.plan(problem), prepared=order == "NHWC")


def test_channels_in_narrow_vectors(rng, monkeypatch):
    """Vectors of two lanes of output channels."""
    monkeypatch.setenv("FASTCONV_VECTOR_BITS", "128")
    plans = [plan for plan in tile_plans("pointwise", dtype="float64") if isinstance(plan.tile, ChannelTile)]
    for way in (Way("pointwise", str(plan.tile)) for plan in plans):
        for problem in way.problems(CASES + around_tile(5, 7), dtype="float64"):
            make_layer(rng, problem, integers).check(way.plan(problem), prepared=problem.groups == 1)
    assert plans


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("extents", [(1, 3, 3), (3, 3, 3), (1, 5, 5), (2, 1, 3), (1, 5, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_winograd_reads_any_weight(extents, dtype, stride, rng):
    """Taps that run backward, channels that change places: the bits are those of a contiguous weight."""
    x, w = normals(rng, (1, 7, 4, 9, 8), dtype), normals(rng, (19, 7, *extents), dtype)
    backward = np.ascontiguousarray(w[..., ::-1, ::-1])[..., ::-1, ::-1]
    planes_backward = np.ascontiguousarray(w[:, :, ::-1])[:, :, ::-1]
    exchanged = np.ascontiguousarray(w.swapaxes(0, 1)).swapaxes(0, 1)
    gaps = np.repeat(w, 2, axis=-1)[..., ::2]
    one_axis = np.ascontiguousarray(w[..., ::-1, :])[..., ::-1, :]
    options = {"algo": "winograd", "stride": (1, *(min(stride, extent) for extent in extents[1:]))}
    wanted = fastconv.conv3d(x, w, **options)
    for view in (backward, planes_backward, exchanged, np.asfortranarray(w), gaps, one_axis):
        assert np.array_equal(view, w)
        assert np.array_equal(fastconv.conv3d(x, view, **options), wanted)
        assert np.array_equal(fastconv.Conv3d(view, **options)(x), wanted)


class TestRefusal:
    FILTERS = "needs as many taps along rows as along columns, 2 to 5 in steps of the stride, or 1 along one"
    KNOWN = (
        ("winograd", "one_window", FILTERS),
        ("winograd", "even_kernel", FILTERS),
        ("winograd", "conv3d_pointwise", FILTERS),
        ("winograd", "patches_depthwise", FILTERS),
        ("winograd", "stride_per_axis", "needs stride 1, 2 or 4 along rows and columns"),
        ("winograd", "pointwise_stride_2", "needs as many taps as the stride along rows and columns"),
        ("winograd", "dilated", "needs dilation 1 along rows and columns"),
        ("pointwise", "plain_3x3", "needs a kernel of extent 1"),
        ("pointwise", "pointwise_padded", "needs padding 0"),
        ("depthwise", "groups", "needs groups = C = 6"),
        ("depthwise", "pointwise", "needs groups = C = 9"),
    )
    PADDED = Case("pointwise_padded", "conv2d", (1, 2, 3, 3), (4, 2, 1, 1), {"padding": 1})

    @pytest.mark.parametrize(("algorithm", "name", "reason"), KNOWN)
    def test_reason(self, algorithm, name, reason):
        case = next(case for case in [*CASES, self.PADDED] if case.name == name)
        self.check(case.problem(), algorithm, reason)

    @pytest.mark.parametrize("name", ["padded_5x5", "conv1d_of_5_taps", "stem_7x7"])
    def test_precision(self, name):
        """F(2, 2) and F(2, 3) are the only ones whose errors are those of a direct sum."""
        case = next(case for case in CASES if case.name == name)
        reason = "needs 2 or 3 taps, in steps of the stride, for precision 'highest'"
        self.check(case.problem(precision="highest"), "winograd", reason)
        assert TABLE["winograd"].refuses(case.problem()) is None

    @pytest.mark.parametrize("direction", ["grad_input", "grad_weight"])
    def test_gradients_of_strides(self, direction):
        case = next(case for case in CASES if case.name == "stride_2")
        reason = "needs stride 1 along rows and columns for a gradient"
        self.check(case.problem(direction=direction), "winograd", reason)

    def test_stride_4_in_float64(self):
        """A vector of two lanes has no room for four phases."""
        case = next(case for case in CASES if case.name == "stride_4")
        assert possible_plans(case.problem(), "winograd")
        reason = "needs stride 1 or 2 along columns in float64"
        self.check(case.problem(dtype="float64"), "winograd", reason)

    def check(self, problem, algorithm, reason):
        assert TABLE[algorithm].refuses(problem) == reason
        assert possible_plans(problem, algorithm) == []
        with pytest.raises(ConvError) as caught:
            fastconv.plan.make_plan(problem, algorithm)
        assert str(caught.value) == f"{problem.op}: algo={algorithm!r} cannot run {problem}: {reason}"

    def test_every_row_that_can_refuse_is_tried(self):
        refused = {name for name, row in TABLE.items() if any(row.refuses(case.problem()) for case in CASES)}
        assert refused == {algorithm for algorithm, _, _ in self.KNOWN}

    def test_every_problem_has_an_algorithm(self):
        for case in CASES:
            for dtype, order in itertools.product(DTYPES, ORDERS):
                problem = case.problem(dtype=dtype, order=order, precision="highest")
                assert any(possible_plans(problem, name) for name in TABLE)


class TestSameBits:
    """For a given algorithm a result depends on its operands only."""

    @pytest.fixture(params=ORDERS)
    def layer(self, request, way, rng):
        """Enough work that threads are worth waking, cut unevenly by 2, 3 and 5."""
        cases = [
            Case("dense", "conv2d", (3, 19, 23, 29), (37, 19, 3, 3)),
            Case("pixels", "conv2d", (3, 61, 23, 29), (37, 61, 1, 1)),
            Case("channels", "conv2d", (3, 61, 23, 29), (61, 1, 7, 7), {"groups": 61, "padding": 3}),
        ]
        return make_layer(rng, way.problems(cases, order=request.param)[0], normals)

    @every_cpu_way
    def test_any_thread_count(self, way, layer, monkeypatch):
        plan = way.plan(layer.problem)
        results = []
        for threads in ("1", "2", "3", "5"):
            monkeypatch.setenv("FASTCONV_THREADS", threads)
            results += [layer.run(plan), layer.run(plan, layer.prepare(plan))]
        layer.judge(plan, results[0])
        for y in results[1:]:
            assert y.tobytes() == results[0].tobytes()

    @pytest.mark.parametrize("C", [16, 150])
    @pytest.mark.parametrize("threads", ["2", "5"])
    @every_cpu_way
    def test_fewer_tiles_than_threads(self, way, threads, C, rng, monkeypatch):
        """Threads share output channels, or groups and channels; of few each transforms its inputs."""
        for groups, stride in ((1, 1), (3, 1), (1, 2)):
            options = {"groups": groups, "stride": stride}
            case = Case("few", "conv2d", (1, C * groups, 9, 10), (72, C, 3, 3), options)
            for problem in way.problems([case]):
                layer, plan = make_layer(rng, problem, normals), way.plan(problem)
                monkeypatch.setenv("FASTCONV_THREADS", "1")
                alone = layer.run(plan).tobytes()
                monkeypatch.setenv("FASTCONV_THREADS", threads)
                assert layer.run(plan).tobytes() == alone
                assert layer.run(plan, layer.prepare(plan)).tobytes() == alone

    @pytest.mark.parametrize(
        ("threads", "C", "K", "size", "l2", "shares"),
        [
            ("2", 40, 300, 12, 1 << 15, {"blocks": 1, "k_parts": 2, "panels": 6, "c_parts": 0, "U_first": 0}),
            ("2", 20, 1088, 12, 1 << 14, {"k_parts": 2, "panels": 17, "c_parts": 0, "U_first": 0}),
            ("3", 40, 60, 12, 1 << 15, {"blocks": 1, "k_parts": 3, "panels": 3, "c_parts": 0, "U_first": 0}),
            ("2", 150, 300, 20, 1 << 15, {"blocks": 1, "k_parts": 6, "c_parts": 4, "U_first": 0}),
            ("5", 20, 40, 60, 1 << 20, {"blocks": 4, "k_parts": 3, "c_parts": 2, "U_first": 1}),
            ("2", 33, 70, 34, 1 << 15, {"blocks": 2, "k_parts": 1, "c_parts": 0, "U_first": 0}),
            ("2", 33, 70, 60, 1 << 20, {"blocks": 4, "k_parts": 1, "c_parts": 0, "U_first": 1}),
        ],
    )
    def test_parts_of_winograd(self, threads, C, K, size, l2, shares, rng, monkeypatch):
        self.check_parts(1, threads, C, K, size, l2, shares, rng, monkeypatch)

    @pytest.mark.parametrize(
        ("threads", "C", "K", "size", "l2", "shares"),
        [
            ("2", 33, 70, 34, 1 << 15, {"k_parts": 2, "c_parts": 4, "U_first": 0, "c_step": 1}),
            ("2", 33, 70, 60, 1 << 18, {"k_parts": 2, "c_parts": 4, "U_first": 0, "c_step": 3}),
            ("2", 20, 70, 90, 1 << 16, {"blocks": 4, "k_parts": 1, "U_first": 1}),
            ("1", 33, 70, 34, 1 << 15, {"blocks": 1, "panels": 2, "stepwise": 1, "U_first": 0}),
            ("2", 33, 40, 70, 1 << 15, {"blocks": 2, "panels": 1, "stepwise": 1, "U_first": 0}),
            ("2", 33, 100, 90, 1 << 18, {"blocks": 4, "panels": 2, "stepwise": 1, "U_first": 1}),
        ],
    )
    def test_parts_of_phases(self, threads, C, K, size, l2, shares, rng, monkeypatch):
        """With strides too, whatever the steps in which channels are summed."""
        self.check_parts(1, threads, C, K, size, l2, shares, rng, monkeypatch, stride=2)

    @pytest.mark.parametrize("taps", [3, 7])
    def test_phases_of_a_batch(self, taps, rng):
        """Filters of a batch are transformed before all else, those of one sample some channels at a time."""
        x, w = normals(rng, (16, 40, 24, 24)), normals(rng, (40, 40, taps, taps))
        options = {"stride": 2, "padding": 1, "algo": "winograd"}
        assert np.array_equal(fastconv.conv2d(x, w, **options)[:1], fastconv.conv2d(x[:1], w, **options))

    def test_parts_of_planes(self, rng, monkeypatch):
        """The parts of transformed inputs end amid the channels of a plane."""
        shares = {"blocks": 1, "k_parts": 6, "c_parts": 4, "U_first": 0}
        self.check_parts(3, "2", 150, 300, 20, 1 << 15, shares, rng, monkeypatch)
        shares = {"blocks": 2, "k_parts": 1, "c_parts": 0, "stepwise": 1, "U_first": 0, "c_step": 16}
        self.check_parts(3, "2", 33, 70, 34, 1 << 15, shares, rng, monkeypatch)

    def check_parts(self, T, threads, C, K, size, l2, shares, rng, monkeypatch, stride=1):
        """Threads share panels of output channels or blocks of tiles, of transformed inputs and filters."""
        way = Way("winograd", "f4_6x4")
        options = {"padding": (0, 1, 1), "stride": (1, stride, stride)}
        case = Case("shared", "conv3d", (1, C, T, size, size), (K, C, T, 3, 3), options)
        problem = case.problem()
        layer, plan = make_layer(rng, problem, normals), with_caches(way.plan(problem), 1 << 12, l2)
        monkeypatch.setenv("FASTCONV_THREADS", "1")
        alone = layer.run(plan)
        layer.judge(plan, alone)
        monkeypatch.setenv("FASTCONV_THREADS", threads)
        if current().lanes("float32") == 16:
            g = winograd._geometry(problem, plan.tile, plan.device, int(threads))
            assert {name: getattr(g, name) for name in shares} == shares
            assert g.U_first or g.c_step < C
        for weight in (None, layer.prepare(plan)):
            assert layer.run(plan, weight).tobytes() == alone.tobytes()

    @every_form
    def test_any_run(self, way, layer):
        plan = way.plan(layer.problem)
        first = layer.run(plan).tobytes()
        for _ in range(20):
            assert layer.run(plan).tobytes() == first

    @every_form
    def test_any_batch(self, way, layer):
        whole = layer.run(way.plan(layer.problem))
        alone = dataclasses.replace(layer.problem, N=1)
        for n in range(layer.problem.N):
            sample = slice(n, n + 1)
            parts = {"problem": alone, "x": layer.x[sample], "residual": layer.residual[sample]}
            y = layer.with_array(**parts).run(way.plan(alone))
            assert y.tobytes() == whole[sample].tobytes()

    @pytest.mark.parametrize("tile", ["8x3", "2x4"])
    @every_order
    def test_images_that_share_vectors(self, tile, order, rng, monkeypatch):
        """Blocks that end amid images: the bits of each image alone, also where rows of y have gaps."""
        case = Case(
            "images", "conv2d", (5, 12, 13, 14), (18, 6, 3, 3), {"stride": 2, "padding": 1, "groups": 2}
        )
        problem = case.problem(order=order)
        layer, plan = make_layer(rng, problem, normals), Way("im2col", tile).plan(problem)
        plan = with_caches(plan, 1 << 12, 1 << 14)
        alone = dataclasses.replace(problem, N=1)
        d = im2col._divide(problem, plan.tile, plan.device, 1, im2col._joins(problem, plan.device))
        assert (d.images, d.blocks > 3, im2col._joins(alone, plan.device)) == (5, True, False)
        samples = [
            layer.with_array(problem=alone, x=layer.x[[n]], residual=layer.residual[[n]]) for n in range(5)
        ]
        wanted = np.concatenate([one.run(dataclasses.replace(plan, problem=alone)) for one in samples])
        for threads in ("1", "2"):
            monkeypatch.setenv("FASTCONV_THREADS", threads)
            assert np.array_equal(layer.run(plan), wanted)
            gaps = np.full((*problem.output_shape[:3], problem.Q + 3), np.nan, np.float32)
            layer.run(plan, out=gaps[..., : problem.Q])
            assert np.array_equal(gaps[..., : problem.Q], wanted)
            assert np.isnan(gaps[..., problem.Q :]).all()

    @pytest.mark.parametrize(("K", "shares"), [(64, (2, 1)), (128, (1, 2))])
    def test_a_block_that_threads_share(self, K, shares, rng, monkeypatch):
        """One small output plane: two threads gather half of it each, or all for half of many channels."""
        problem = Case("plane", "conv2d", (1, 32, 9, 9), (K, 32, 3, 3)).problem()
        layer, plan = make_layer(rng, problem, normals), Way("im2col", "8x3").plan(problem)
        for workers, expected in ((1, (1, 1)), (2, shares)):
            d = im2col._divide(problem, plan.tile, plan.device, workers, False)
            assert (d.blocks, d.k_parts) == expected
        results = set()
        for threads in ("1", "2"):
            monkeypatch.setenv("FASTCONV_THREADS", threads)
            results.add(layer.run(plan).tobytes())
        assert len(results) == 1

    @pytest.mark.parametrize("pixels", [7, 9, 196, 3137])
    @pytest.mark.parametrize("groups", [1, 2])
    def test_vectors_of_output_channels(self, pixels, groups, rng, monkeypatch):
        """Bands of pixels, of which the last has one, rounds of images, other panels: the bits of any 1x1."""
        case = Case(
            "channels", "conv2d", (2, 50 * groups, 1, pixels), (100 * groups, 50, 1, 1), {"groups": groups}
        )
        problem = case.problem()
        layer = make_layer(rng, problem, normals)
        wanted = layer.run(make_plan(problem, "pointwise", tile="4x3")).tobytes()
        for plan in possible_plans(problem, "pointwise"):
            if isinstance(plan.tile, ChannelTile):
                found, divisions = set(), set()
                caches = ((1 << 12, 1 << 20), (1 << 20, 1 << 20), (1 << 12, 1 << 7))
                for threads, (l1, l2) in itertools.product(("1", "2", "7"), caches):
                    monkeypatch.setenv("FASTCONV_THREADS", threads)
                    cut, workers = with_caches(plan, l1, l2), task_threads(problem)
                    divisions.add(pointwise_channels._divide(problem, cut.tile, cut.device, workers))
                    found.add(layer.run(cut).tobytes())
                    found.add(layer.run(cut, layer.prepare(cut)).tobytes())
                assert found == {wanted}
                assert len({d.c_step for d in divisions}) > 1
                assert {d.rounds for d in divisions} == {1, 2}
                assert len({d.parts for d in divisions}) > 1 or pixels < 196  # too few for two threads
                assert all(d.pixels - d.band * (d.bands - 1) == 1 for d in divisions) == (pixels == 3137)

    @pytest.mark.parametrize("groups", [1, 2])
    def test_prepared_panels_of_output_channels(self, groups, rng):
        """They fit planes of any size, and those that cannot be read in place."""
        shapes = [((2, 50 * groups, 3, width), (100 * groups, 50, 1, 1)) for width in (1, 14)]
        few, many = (Case("size", "conv2d", *both, {"groups": groups}).problem() for both in shapes)
        layer = make_layer(rng, many, normals)
        wanted = layer.run(make_plan(many, "pointwise", tile="4x3"))
        for plan in possible_plans(many, "pointwise"):
            if isinstance(plan.tile, ChannelTile):
                prepared = layer.prepare(plan)
                assert prepared.ndim == 2
                apart = layer.with_array(x=layer.x.repeat(2, axis=-1)[..., ::2])
                assert np.array_equal(apart.run(plan, prepared), wanted)
                small = layer.with_array(problem=few, x=layer.x[..., :1], residual=layer.residual[..., :1])
                of_few = dataclasses.replace(plan, problem=few)
                assert of_few.weight_form == plan.weight_form
                assert np.array_equal(small.run(of_few, prepared), wanted[..., :1])

    @every_dtype
    @pytest.mark.parametrize("threads", ["1", "2"])
    def test_planes_that_share_vectors(self, threads, dtype, rng, monkeypatch):
        """The last pixels of the planes of a batch are computed together, those of a sample are not."""
        monkeypatch.setenv("FASTCONV_THREADS", threads)
        case = Case("planes", "conv2d", (19, 200, 7, 7), (400, 100, 1, 1), {"groups": 2})
        way, problem = Way("pointwise", "8x3"), case.problem(dtype=dtype)
        plan = way.plan(problem)
        rows, shared = pointwise._divide(problem, plan.tile, plan.device)
        assert (rows.W, shared.H, shared.W) == (48, 19, 1)
        make_layer(rng, problem, integers).check(plan)
        layer = make_layer(rng, problem, normals)
        layer.check(plan, prepared=True)
        alone = layer.with_array(
            problem=dataclasses.replace(problem, N=1), x=layer.x[7:8], residual=layer.residual[7:8]
        )
        assert layer.run(plan)[7:8].tobytes() == alone.run(way.plan(alone.problem)).tobytes()

    @pytest.mark.parametrize("first", [0, 3, 12])
    @pytest.mark.parametrize("pitch", [8 * 28, 8 * 28 + 16, 8 * 28 + 5])
    @pytest.mark.parametrize("l2", [1 << 20, 1 << 11])
    def test_planes_that_begin_anywhere(self, first, pitch, l2, rng):
        """Wherever vectors and bands begin for the sake of cache lines: what lies around the planes stays."""
        problem = Case("planes", "conv2d", (2, 12, 8, 28), (20, 12, 1, 1)).problem()
        layer = make_layer(rng, problem, integers)
        plan = with_caches(Way("pointwise", "8x3").plan(problem), 1 << 12, l2)
        (x, _), (out, memory) = (self._spread(channels, pitch, first) for channels in (12, 20))
        x[...] = layer.x
        y = layer.with_array(x=x).run(plan, out=out)
        layer.judge(plan, y)
        assert np.isnan(memory).sum() == memory.size - y.size

    def _spread(self, channels: int, pitch: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Two samples of 8 x 28 pixels, their planes so far apart in memory full of NaN; and that memory."""
        memory = np.full(first + 2 * channels * pitch, np.nan, np.float32)
        planes = memory[first:].reshape(2, channels, pitch)[..., : 8 * 28]
        return np.lib.stride_tricks.as_strided(
            planes, (2, channels, 8, 28), (*planes.strides[:2], 28 * 4, 4)
        ), memory

    @every_cpu_way
    def test_any_caches(self, way, layer):
        plan = way.plan(layer.problem)
        assert layer.run(with_caches(plan, 1 << 12, 1 << 14)).tobytes() == layer.run(plan).tobytes()
