"""Who decides what runs: the argument, FASTCONV_ALGO, a measurement, the cost model, in this order."""

import dataclasses
import importlib
import re

import numpy as np
import pytest

import fastconv
from fastconv import measured
from fastconv import plan as planning
from fastconv.algorithms import TABLE
from fastconv.cpu import direct, im2col, pointwise
from fastconv.cpu.device import Device
from fastconv.cpu.simd import Tile
from fastconv.plan import Plan, explain_problem, fitting_plans, make_plan, possible_plans
from fastconv.problem import ConvError, make_problem
from tests.cases import CASES
from tests.compare import integers
from tests.kernels import DTYPES, ORDERS, make_layer

PROBLEM = make_problem("conv2d", (1, 64, 56, 56), (64, 64, 3, 3), padding=1)
# Winograd's filters take megabytes here, more than a band of anything.
LARGE = make_problem("conv2d", (1, 256, 56, 56), (256, 256, 3, 3), padding=1)
KNOWN = "direct, im2col, winograd, pointwise, depthwise"


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """A store of measurements, and an environment, of the test's own."""
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path))
    for name in ("FASTCONV_ALGO", "FASTCONV_WORKSPACE", "FASTCONV_THREADS", "FASTCONV_VECTOR_BITS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def plans_of(problem):
    return [plan for name in TABLE for plan in possible_plans(problem, name)]


def remember(problem, algorithm, tile):
    """Store a measurement as tune does."""
    device = plans_of(problem)[0].device.label()
    measured.store(problem, device, {"algorithm": algorithm, "tile": str(tile), "seconds": 1e-3})
    planning.forget_plans()


def chosen(problem=PROBLEM, *arguments, **options):
    plan = make_plan(problem, *arguments, **options)
    return plan.algorithm.name, str(plan.tile)


class TestOrder:
    def test_cost_model(self):
        """Left alone: the cheapest of all estimates, on every case."""
        for case in CASES:
            for dtype in DTYPES:
                problem = case.problem(dtype=dtype)
                assert make_plan(problem).cost() == min(plan.cost() for plan in plans_of(problem))

    def test_measured_beats_the_cost_model(self):
        for plan in plans_of(PROBLEM):
            remember(PROBLEM, plan.algorithm.name, plan.tile)
            assert chosen() == (plan.algorithm.name, str(plan.tile))

    def test_environment_beats_measured(self, monkeypatch):
        remember(PROBLEM, "direct", possible_plans(PROBLEM, "direct")[0].tile)
        monkeypatch.setenv("FASTCONV_ALGO", "im2col")
        assert chosen()[0] == "im2col"

    def test_argument_beats_the_environment(self, monkeypatch):
        remember(PROBLEM, "direct", possible_plans(PROBLEM, "direct")[0].tile)
        monkeypatch.setenv("FASTCONV_ALGO", "im2col")
        assert chosen(PROBLEM, "winograd")[0] == "winograd"

    def test_of_a_named_algorithm_the_cheapest_tile(self):
        for name in ("direct", "im2col", "winograd"):
            plans = possible_plans(PROBLEM, name)
            assert make_plan(PROBLEM, name).cost() == min(plan.cost() for plan in plans)

    def test_a_tile_by_name(self):
        for plan in plans_of(PROBLEM):
            name, tile = plan.algorithm.name, str(plan.tile)
            assert chosen(PROBLEM, name, tile=tile) == (name, tile)

    def test_the_environment_is_read_at_every_call(self, monkeypatch):
        first = chosen()
        for name in ("im2col", "direct", "winograd", "im2col"):
            monkeypatch.setenv("FASTCONV_ALGO", name)
            assert chosen()[0] == name
        monkeypatch.setenv("FASTCONV_ALGO", "")
        assert chosen() == first

    def test_the_environment_names_no_algorithm_for_what_it_refuses(self, monkeypatch):
        """It is said once for a whole network: layers that the algorithm cannot run are chosen as ever."""
        problem = make_problem("conv2d", (1, 3, 30, 30), (8, 3, 7, 7), stride=3)
        usual = chosen(problem)
        monkeypatch.setenv("FASTCONV_ALGO", "winograd")
        assert chosen(problem) == usual

    def test_auto_in_the_environment_is_no_wish(self, monkeypatch):
        usual = chosen()
        monkeypatch.setenv("FASTCONV_ALGO", "auto")
        assert chosen() == usual
        remember(PROBLEM, "direct", possible_plans(PROBLEM, "direct")[0].tile)
        assert chosen()[0] == "direct"
        assert explain_problem(PROBLEM).reason == "measured fastest by tune"

    def test_a_measurement_of_another_problem_says_nothing(self):
        usual = chosen()
        shapes = PROBLEM.input_shape, PROBLEM.weight_shape
        for other in ({"padding": 0}, {"padding": 1, "dtype": "float64"}, {"padding": 1, "order": "NHWC"}):
            remember(make_problem("conv2d", *shapes, **other), "im2col", "4x3")
        assert chosen() == usual

    def test_a_measurement_that_cannot_run_is_passed_over(self):
        usual = chosen()
        remember(PROBLEM, "direct", "99x99")
        assert chosen() == usual
        remember(PROBLEM, "pointwise", possible_plans(PROBLEM, "direct")[0].tile)
        with pytest.warns(UserWarning, match="'pointwise' cannot run") as caught:
            assert chosen() == usual
        assert {warning.filename for warning in caught} == {__file__}

    def test_what_tune_finds_is_taken(self, rng, monkeypatch):
        monkeypatch.setattr(importlib.import_module("fastconv.tune"), "BUDGET", 0.01)
        x, w = integers(rng, (1, 4, 9, 9)), integers(rng, (5, 4, 3, 3))
        result = fastconv.tune(x, w)
        assert chosen(result.problem) == (result.best.algorithm, result.best.tile)
        monkeypatch.setenv("FASTCONV_CACHE", "/nowhere")
        assert make_plan(result.problem).cost() == min(plan.cost() for plan in plans_of(result.problem))


def inexact_plan():
    """A plan of Winograd F(4 x 4, 3 x 3)."""
    return next(p for p in possible_plans(PROBLEM, "winograd") if not p.algorithm.exact(p.problem, p.tile))


class TestPrecision:
    HIGHEST = make_problem("conv2d", (1, 64, 56, 56), (64, 64, 3, 3), padding=1, precision="highest")

    def test_highest_admits_no_algorithm_with_a_larger_error(self):
        bounds = {plan.error_bound().factor for plan in possible_plans(self.HIGHEST, "direct")}
        for plan in plans_of(self.HIGHEST):
            assert plan.error_bound().factor in bounds
        assert len(plans_of(self.HIGHEST)) < len(plans_of(PROBLEM))
        assert possible_plans(self.HIGHEST, "winograd"), "F(2) is as exact as a direct sum"

    def test_a_measurement_does_not_lower_it(self):
        large = inexact_plan()
        remember(self.HIGHEST, "winograd", large.tile)
        assert chosen(self.HIGHEST) != ("winograd", str(large.tile))

    def test_nor_does_a_tile_by_name(self):
        large = inexact_plan()
        with pytest.raises(ConvError, match=f"tile of winograd must be one of .*, got '{large.tile}'"):
            make_plan(self.HIGHEST, "winograd", tile=str(large.tile))


class TestWorkspace:
    def test_another_algorithm_is_chosen(self, monkeypatch):
        """At every limit from all to nothing: the cheapest of those that keep to it."""
        plans = plans_of(LARGE)
        sizes = sorted({plan.workspace() for plan in plans})
        assert len(sizes) > 3
        found = set()
        for limit in sizes:
            monkeypatch.setenv("FASTCONV_WORKSPACE", str(limit))
            plan = make_plan(LARGE)
            assert plan.workspace() <= limit
            assert plan.cost() == min(plan.cost() for plan in plans if plan.workspace() <= limit)
            found.add(plan.algorithm.name)
        assert len(found) > 1

    def test_another_tile_of_a_named_algorithm(self, monkeypatch):
        plans = possible_plans(LARGE, "winograd")
        least = min(plan.workspace() for plan in plans)
        assert make_plan(LARGE, "winograd").workspace() > least
        monkeypatch.setenv("FASTCONV_WORKSPACE", str(least))
        assert make_plan(LARGE, "winograd").workspace() == least

    def test_a_named_algorithm_that_needs_more_is_an_error(self, monkeypatch):
        least = min(plan.workspace() for plan in possible_plans(LARGE, "winograd"))
        monkeypatch.setenv("FASTCONV_WORKSPACE", str(least - 1))
        with pytest.raises(ConvError) as caught:
            make_plan(LARGE, "winograd")
        rule = f"FASTCONV_WORKSPACE must be at least {least} bytes, which algo='winograd' takes"
        assert str(caught.value) == f"conv2d: {rule}, got '{least - 1}' ({LARGE})"

    def test_a_limit_that_nothing_keeps_to_is_an_error(self, monkeypatch):
        least = min(plans_of(LARGE), key=Plan.workspace)
        monkeypatch.setenv("FASTCONV_WORKSPACE", "1")
        with pytest.raises(ConvError) as caught:
            make_plan(LARGE)
        name = least.algorithm.name
        rule = f"FASTCONV_WORKSPACE must be at least {least.workspace()} bytes, which algo={name!r} takes"
        assert str(caught.value) == f"conv2d: {rule}, got '1' ({LARGE})"

    def test_neither_environment_nor_measurement_exceeds_it(self, monkeypatch):
        plan = max(plans_of(LARGE), key=Plan.workspace)
        monkeypatch.setenv("FASTCONV_WORKSPACE", str(plan.workspace() - 1))
        remember(LARGE, plan.algorithm.name, plan.tile)
        assert make_plan(LARGE).workspace() < plan.workspace()
        least = min(p.workspace() for p in possible_plans(LARGE, "winograd"))
        monkeypatch.setenv("FASTCONV_ALGO", "winograd")
        monkeypatch.setenv("FASTCONV_WORKSPACE", str(least - 1))
        assert chosen(LARGE)[0] != "winograd"

    @pytest.mark.parametrize(
        ("text", "limit"),
        [
            ("0", 0),
            ("12", 12),
            ("64K", 64 << 10),
            ("5m", 5 << 20),
            (" 2 GB ", 2 << 30),
            ("1kb", 1024),
            ("", None),
        ],
    )
    def test_units(self, text, limit, monkeypatch):
        monkeypatch.setenv("FASTCONV_WORKSPACE", text)
        assert planning.workspace_limit() == limit

    @pytest.mark.parametrize("text", ["lots", "-1", "1.5M", "1T", "M", "64 M M", "²"])
    def test_nonsense_is_an_error(self, text, monkeypatch):
        monkeypatch.setenv("FASTCONV_WORKSPACE", text)
        with pytest.raises(ConvError) as caught:
            make_plan(PROBLEM)
        assert str(caught.value) == (
            "FASTCONV_WORKSPACE must be a whole number of bytes, or of kilo-, mega- or gigabytes with "
            f"K, M or G, such as 64M, got {text!r}"
        )

    def test_more_threads_hold_more(self, monkeypatch):
        """The figure is for as many as there are, of which each may have a band of its own."""
        monkeypatch.setenv("FASTCONV_THREADS", "1")
        one = [plan.workspace() for plan in possible_plans(LARGE, "direct")]
        monkeypatch.setenv("FASTCONV_THREADS", "4")
        four = [plan.workspace() for plan in possible_plans(LARGE, "direct")]
        assert all(a < b <= 4 * a for a, b in zip(one, four, strict=True))

    def test_fitting_plans(self, monkeypatch):
        plans = possible_plans(LARGE, "winograd")
        assert fitting_plans(LARGE, "winograd") == plans
        limit = sorted(plan.workspace() for plan in plans)[len(plans) // 2]
        monkeypatch.setenv("FASTCONV_WORKSPACE", str(limit))
        fitting = fitting_plans(LARGE, "winograd")
        assert 0 < len(fitting) < len(plans)
        assert max(plan.workspace() for plan in fitting) == limit


class TestErrors:
    @pytest.mark.parametrize("op", ["conv1d", "conv2d", "conv3d"])
    def test_unknown_algorithm(self, op):
        problem = next(case for case in CASES if case.op == op).problem()
        with pytest.raises(ConvError) as caught:
            make_plan(problem, "fft")
        assert str(caught.value) == f"{op}: algo must be one of auto, {KNOWN}, got 'fft'"

    def test_unknown_algorithm_in_the_environment(self, monkeypatch):
        monkeypatch.setenv("FASTCONV_ALGO", "winogrd")
        with pytest.raises(ConvError) as caught:
            make_plan(PROBLEM)
        assert str(caught.value) == f"conv2d: FASTCONV_ALGO must be one of auto, {KNOWN}, got 'winogrd'"
        assert chosen(PROBLEM, "direct")[0] == "direct"

    @pytest.mark.parametrize("tile", ["", "1x1", "8X3", "f4"])
    def test_unknown_tile(self, tile):
        known = ", ".join(str(plan.tile) for plan in possible_plans(PROBLEM, "direct"))
        with pytest.raises(ConvError) as caught:
            make_plan(PROBLEM, "direct", tile=tile)
        assert str(caught.value) == f"conv2d: tile of direct must be one of {known}, got {tile!r}"

    @pytest.mark.parametrize("algo", [None, 3, ["direct"], b"direct"])
    def test_no_string(self, algo):
        with pytest.raises(TypeError) as caught:
            make_plan(PROBLEM, algo)
        assert str(caught.value) == f"conv2d: algo must be a string, got {algo!r}"

    def test_refused(self):
        with pytest.raises(ConvError) as caught:
            make_plan(PROBLEM, "pointwise")
        assert str(caught.value) == (
            f"conv2d: algo='pointwise' cannot run {PROBLEM}: needs a kernel of extent 1"
        )

    def test_the_message_names_the_operation_of_the_call(self):
        """A conv1d and a conv2d of one row are different calls, though their problems may look alike."""
        signal = make_problem("conv1d", (1, 4, 9), (4, 4, 7))
        image = make_problem("conv2d", (1, 4, 1, 9), (4, 4, 1, 7))
        for problem in (signal, image, signal):
            with pytest.raises(ConvError, match=f"^{problem.op}: algo='winograd' cannot run"):
                make_plan(problem, "winograd")

    @pytest.mark.parametrize("text", ["64", "1024", "wide", "-128"])
    def test_vector_bits(self, text, monkeypatch):
        monkeypatch.setenv("FASTCONV_VECTOR_BITS", text)
        with pytest.raises(ConvError, match=rf"^FASTCONV_VECTOR_BITS must be one of 128.* got '{text}'$"):
            make_plan(PROBLEM)


@pytest.mark.parametrize("size", range(3, 40))
def test_the_bits_of_winograd_do_not_depend_on_the_batch(size):
    """m of F(m, 3) decides them; the rest of the tile does not."""
    problems = [make_problem("conv2d", (n, 16, size, size), (16, 16, 3, 3)) for n in (1, 2, 16, 300)]
    assert len({make_plan(problem, "winograd").tile.m for problem in problems}) == 1


@pytest.mark.parametrize(("one", "many", "m"), [(1.0, 50, 4), (4.0, 50, 2), (1.0, 10, 2)])
def test_bits_are_those_of_the_batches_that_direct_does_not_take(one, many, m, monkeypatch):
    """With F(4), one sample is slow: that does not count where `auto` computes it by direct, and not all."""
    seconds = {("direct", 1): one, ("direct", 32): many, (2, 1): 1.9, (2, 32): 32, (4, 1): 3.7, (4, 32): 20}

    def cost(plan):
        return seconds[getattr(plan.tile, "m", plan.algorithm.name), plan.problem.N]

    monkeypatch.setattr(planning.Plan, "cost", cost)
    problem = make_problem("conv2d", (1, 16, 7, 7), (16, 16, 3, 3))
    assert {plan.tile.m for plan in planning._cheapest(problem, "winograd", "cpu")} == {m}


class TestPlan:
    def test_weight_form_tells_prepared_weights_apart(self, rng):
        """Plans of one form accept each other's prepared weight, whatever the size of the input."""
        small = make_problem("conv2d", (2, 6, 8, 9), (5, 6, 3, 3), padding=1)
        large = make_problem("conv2d", (3, 6, 40, 31), (5, 6, 3, 3), padding=1)
        for order in ORDERS:
            for name in ("direct", "im2col", "winograd"):
                problems = [dataclasses.replace(problem, order=order) for problem in (small, large)]
                layers = [make_layer(rng, problem, integers) for problem in problems]
                pairs = zip(*(possible_plans(layer.problem, name) for layer in layers), strict=True)
                for one, other in pairs:
                    assert one.weight_form == other.weight_form
                    layer = layers[1].with_array(w=layers[0].w)
                    layer.judge(other, layer.run(other, layers[0].prepare(one)))

    def test_prepared_for_another_width_is_another_form(self, monkeypatch):
        forms = set()
        for bits in ("128", ""):
            monkeypatch.setenv("FASTCONV_VECTOR_BITS", bits)
            forms.add(make_plan(PROBLEM, "direct", tile="4x3").weight_form)
        assert len(forms) == 2 or planning.make_plan(PROBLEM).device.vector_bits == 128

    def test_figures(self):
        for case in CASES:
            for plan in plans_of(case.problem()):
                assert plan.workspace() >= 0
                assert plan.cost() > 0 or plan.problem.N == 0
                assert plan.error_bound().factor >= 1

    def test_more_work_costs_more(self):
        for name in ("direct", "im2col", "winograd"):
            costs = []
            for channels in (32, 64, 128):
                shapes = (1, channels, 56, 56), (64, channels, 3, 3)
                costs.append(make_plan(make_problem("conv2d", *shapes, padding=1), name).cost())
            assert costs == sorted(costs)
            assert costs[0] < costs[2]

    def test_str(self):
        tile = possible_plans(PROBLEM, "direct")[0].tile
        assert str(make_plan(PROBLEM, "direct", tile=str(tile))) == f"direct {tile} on cpu: {PROBLEM}"


class TestExplain:
    def test_everything_is_told(self):
        text = str(explain_problem(PROBLEM))
        for line in (
            f"conv2d {PROBLEM}",
            "  input (1, 64, 56, 56), weight (64, 64, 3, 3), output (1, 64, 56, 56)",
            "  231 MFLOP, 1.75 MB moved at least, 131.9 FLOP/B, 36,864 parameters",
            "  every row and column of the padded input is read",
            f"  on {plans_of(PROBLEM)[0].device.name}: winograd, of the lowest estimate",
            "  times are estimates for one core; errors are bounds per element, in eps * conv(|x|, |w|)",
            "    pointwise  refused: needs a kernel of extent 1",
            "    depthwise  refused: needs groups = C = 64",
        ):
            assert line in text.split("\n"), f"{line!r} is not in\n{text}"

    def test_who_chose(self, monkeypatch):
        device = plans_of(PROBLEM)[0].device
        assert f"{device.name}: im2col, because algo names it" in str(explain_problem(PROBLEM, "im2col"))
        tile = str(possible_plans(PROBLEM, "direct")[0].tile)
        record = measured.Record(algorithm="direct", tile=tile, seconds=1.0)
        measured.store(PROBLEM, device.label(), record)
        planning.forget_plans()
        assert f"{device.name}: direct, measured fastest by tune" in str(explain_problem(PROBLEM))
        monkeypatch.setenv("FASTCONV_ALGO", "im2col")
        assert f"{device.name}: im2col, because FASTCONV_ALGO names it" in str(explain_problem(PROBLEM))

    def test_a_wish_that_cannot_be_met_is_told(self, monkeypatch):
        monkeypatch.setenv("FASTCONV_ALGO", "pointwise")
        reason = "of the lowest estimate; FASTCONV_ALGO=pointwise cannot run it"
        assert explain_problem(PROBLEM).reason == reason
        remember(PROBLEM, "direct", possible_plans(PROBLEM, "direct")[0].tile)
        reason = "measured fastest by tune; FASTCONV_ALGO=pointwise cannot run it"
        assert explain_problem(PROBLEM).reason == reason

    def test_one_line_per_row_of_the_table_in_its_order(self):
        text = str(explain_problem(PROBLEM))
        assert re.findall(rf"^ (?:->|  ) ({'|'.join(TABLE)}) ", text, re.MULTILINE) == list(TABLE)

    def test_the_mark_is_on_the_plan_that_runs(self):
        for name in ("auto", "direct", "im2col", "winograd"):
            text = str(explain_problem(PROBLEM, name))
            marked = re.findall(r"^ -> (\w+) .* tile (\S+)", text, re.MULTILINE)
            assert marked == [chosen(PROBLEM, name)]

    def test_the_figures_are_those_of_the_plans(self):
        explanation = explain_problem(PROBLEM)
        lines = str(explanation).split("\n")[-len(TABLE) :]
        for (name, found), line in zip(explanation.others, lines, strict=True):
            if isinstance(found, str):
                assert line == f"    {name:<10} refused: {found}"
                assert TABLE[name].refuses(PROBLEM) == found
                continue
            figures = re.fullmatch(
                r" (?:->|  ) (\w+) +([\d.]+) ms +(\d+) GFLOP/s "
                r" tile (\S+) +workspace (\S+ \S+) +error <= (\d+) eps",
                line,
            )
            milliseconds, rate = float(figures[2]), float(figures[3])
            assert figures[1] == found.algorithm.name == name
            assert milliseconds == pytest.approx(found.cost() * 1e3, abs=5e-4)
            assert rate == pytest.approx(PROBLEM.flops / found.cost() / 1e9, abs=0.5)
            assert figures[4] == str(found.tile)
            assert int(figures[6]) == round(found.error_bound().factor)
            value, unit = figures[5].split()
            bytes = float(value) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit]
            assert bytes == pytest.approx(found.workspace(), rel=5e-3)

    @pytest.mark.parametrize(
        ("op", "shapes", "options", "told"),
        [
            ("conv2d", ((1, 3, 8, 9), (4, 3, 3, 3)), {"stride": 2}, "1 row"),
            ("conv2d", ((1, 3, 9, 8), (4, 3, 3, 3)), {"stride": 2}, "1 column"),
            ("conv2d", ((1, 3, 8, 11), (4, 3, 3, 2)), {"stride": (4, 3)}, "2 rows and 3 columns"),
            ("conv1d", ((1, 3, 11), (4, 3, 3)), {"stride": 5}, "5 columns"),
            ("conv3d", ((1, 3, 8, 9, 8), (4, 3, 3, 3, 3)), {"stride": 2}, "1 plane and 1 column"),
            ("conv2d", ((1, 3, 9, 9), (4, 3, 3, 3)), {"stride": 2}, None),
            ("conv2d", ((1, 3, 8, 8), (4, 3, 3, 3)), {"stride": 2, "padding": ((0, 1), (1, 0))}, None),
        ],
    )
    def test_what_no_window_reads(self, op, shapes, options, told):
        text = str(explain_problem(make_problem(op, *shapes, **options)))
        everything = "  every row and column of the padded input is read"
        expected = f"  no window reads {told} of the padded input" if told else everything
        assert expected in text.splitlines()

    def test_unread_elements_are_really_not_read(self, rng):
        """NaN in what is told to be unread does not show in the result."""
        problem = make_problem("conv2d", (1, 3, 8, 11), (4, 3, 3, 2), stride=(4, 3))
        assert problem.unread == (0, 2, 3)
        for plan in plans_of(problem):
            layer = make_layer(rng, problem, integers)
            clean = layer.run(plan)
            layer.x[:, :, 3::4] = layer.x[:, :, :, 2::3] = np.nan
            assert np.array_equal(layer.run(plan), clean)

    def test_too_large_a_workspace_is_a_reason(self, monkeypatch):
        least = min(plan.workspace() for plan in possible_plans(LARGE, "winograd"))
        monkeypatch.setenv("FASTCONV_WORKSPACE", str(least - 1))
        line = "    winograd   refused: needs more workspace than FASTCONV_WORKSPACE permits"
        assert line in str(explain_problem(LARGE)).split("\n")

    def test_no_kernel_is_compiled(self, monkeypatch):
        """A question is answered in milliseconds."""
        monkeypatch.setattr(Plan, "run", None)
        monkeypatch.setattr(Plan, "prepare", None)
        for case in CASES:
            assert case.op in str(explain_problem(case.problem()))


class TestCpuCost:
    """What the estimates for the CPU know of caches; the device is any one with vectors as wide as a line."""

    WIDE = Device("any", 512, 32, 48 << 10, 1 << 20)
    TILE = Tile(8, 3)

    def test_vectors_that_lie_in_two_lines(self):
        sizes = self.TILE, 64, 3136, 64, "float32"
        assert self.WIDE.multiply_cycles(*sizes, aligned=True) < self.WIDE.multiply_cycles(
            *sizes, aligned=False
        )
        narrow = dataclasses.replace(self.WIDE, vector_bits=256)
        assert narrow.multiply_cycles(*sizes, aligned=True) == narrow.multiply_cycles(*sizes, aligned=False)

    def test_many_channels_pay_for_panels(self):
        """1x1: many output channels read pixels from panels, few where they lie; all, if rows begin alike."""
        for size, K, faster, slower in (
            (27, 16, pointwise, im2col),
            (27, 1024, im2col, pointwise),
            (28, 1024, pointwise, im2col),
        ):
            problem = make_problem("conv2d", (1, 128, size, size), (K, 128, 1, 1))
            assert faster.cost(problem, self.TILE, self.WIDE) < slower.cost(problem, self.TILE, self.WIDE)

    def test_direct_stores_short_rows_one_by_one(self):
        """7 x 7 pixels: direct has not to gather, but no tile of it ends with a row."""
        problem = make_problem("conv2d", (1, 48, 7, 7), (128, 48, 3, 3), padding=1)
        assert im2col.cost(problem, Tile(6, 4), self.WIDE) < direct.cost(problem, self.TILE, self.WIDE)

    def test_a_weight_that_every_block_reads_again(self):
        """9 MB of weights, in blocks of one panel: twice the pixels take more than twice the time."""
        costs = [
            im2col.cost(make_problem("conv2d", (1, 512, 5, W + 2), (512, 512, 3, 3)), self.TILE, self.WIDE)
            for W in (16, 32)
        ]
        assert costs[1] > 2.02 * costs[0]
