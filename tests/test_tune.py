"""tune measures every way that accepts the problem, and from then on make_plan takes the fastest."""

import importlib

import numpy as np
import pytest

import fastconv
from fastconv import measured
from fastconv import plan as planning
from fastconv.algorithms import TABLE
from fastconv.problem import ConvError
from fastconv.tune import BUDGET, NEAR, OPENING_ROUNDS, ROUNDS, Timing, TuneResult, _take_turns, tune
from tests.cases import CASES, operands, options_of
from tests.compare import integers, normals

tuning = importlib.import_module("fastconv.tune")  # fastconv.tune itself is the function


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """A store and choices of the test's own, and little time to measure."""
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "BUDGET", 0.01)
    planning.forget_plans()
    yield tmp_path
    planning.forget_plans()


@pytest.fixture
def layer(rng):
    """A layer that all but pointwise and depthwise accept."""
    return integers(rng, (1, 5, 9, 9)), integers(rng, (6, 5, 3, 3))


def ways(problem):
    """Every (algorithm, tile) that suits the problem."""
    return {(name, str(plan.tile)) for name in TABLE for plan in planning.fitting_plans(problem, name)}


NAMES = ["padded_3x3", "stride_2", "pointwise", "depthwise_multiplier", "conv1d_causal", "conv3d_mixed"]


@pytest.mark.parametrize("case", [case for case in CASES if case.name in NAMES], ids=str)
def test_every_way_is_measured_and_the_fastest_kept(rng, case):
    problem = case.problem()
    x, w, bias, residual = operands(rng, problem, normals)
    result = tune(x, w, bias, residual=residual, activation="relu", **options_of(problem))
    assert result.problem == problem
    assert {(timing.algorithm, timing.tile) for timing in result.timings} == ways(problem)
    assert len(result.timings) == len(ways(problem))
    reasons = {name: row.refuses(problem) for name, row in TABLE.items()}
    assert dict(result.refused) == {name: reason for name, reason in reasons.items() if reason is not None}
    minima = [timing.minimum for timing in result.timings]
    assert minima == sorted(minima)
    assert result.best is result.timings[0]
    assert measured.lookup(problem, result.device) == {
        "algorithm": result.best.algorithm,
        "tile": result.best.tile,
        "seconds": result.best.minimum,
    }
    plan = planning.make_plan(problem)
    assert (plan.algorithm.name, str(plan.tile)) == (result.best.algorithm, result.best.tile)


def test_plan_follows_even_a_surprising_winner(layer, monkeypatch):
    """Each way is made to win in its turn, whatever the cost model thinks and the plan was before."""
    problem = fastconv.explain(*layer).plan.problem
    for winner in sorted(ways(problem)):
        order = iter([*winner_first(problem, winner)] * ROUNDS)
        monkeypatch.setattr(tuning, "_time", lambda call, order=order: call() or next(order))
        result = tune(*layer)
        assert (result.best.algorithm, result.best.tile) == winner
        plan = fastconv.explain(*layer).plan
        assert (plan.algorithm.name, str(plan.tile)) == winner
        y = fastconv.conv2d(*layer)
        assert np.allclose(y, fastconv.reference.conv2d(*layer), atol=1e-3)


def winner_first(problem, winner):
    """Seconds for each way in the order tune takes them: the others are near enough to stay."""
    plans = [plan for name in TABLE for plan in planning.possible_plans(problem, name)]
    return [1.0 if (plan.algorithm.name, str(plan.tile)) == winner else 1.1 for plan in plans]


def test_it_prints_as_a_table(tmp_path, layer):
    problem = fastconv.explain(*layer).plan.problem
    timings = (Timing("winograd", "f4_6x4", (0.002, 0.001, 0.004)), Timing("direct", "8x3", (0.25,)))
    result = TuneResult(
        problem, "Some CPU", timings, (("pointwise", "needs a kernel of extent 1"),), tmp_path / "f.json"
    )
    assert (
        str(result)
        == f"""\
conv2d n1c5h9w9_k6r3s3_st1x1_pad0x0_dil1x1_g1_float32 on Some CPU
    algorithm  tile         min ms  median ms  GFLOP/s  runs
 -> winograd   f4_6x4       1.0000     2.0000      0.0     3
    direct     8x3        250.0000   250.0000      0.0     1
    pointwise  needs a kernel of extent 1
kept in {tmp_path / "f.json"}"""
    )
    assert str(tune(*layer)).count("->") == 1


class FakeWay:
    """A call that takes as long as it says, on a clock that only calls move."""

    def __init__(self, clock, *seconds):
        self.clock, self.seconds, self.runs = clock, seconds, 0

    def __call__(self):
        self.clock.now += self.seconds[min(self.runs, len(self.seconds) - 1)]
        self.runs += 1


class FakeClock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    fake = FakeClock()
    monkeypatch.setattr(tuning, "perf_counter", fake)
    monkeypatch.setattr(tuning, "BUDGET", BUDGET)
    return fake


def test_slow_ways_drop_out_after_the_opening(clock):
    near_enough = 0.001 * (NEAR - 0.01)
    fast, near, slow = FakeWay(clock, 0.001), FakeWay(clock, near_enough), FakeWay(clock, 0.01)
    samples = _take_turns([slow, fast, near], tuning._time)
    assert [len(times) for times in samples] == [OPENING_ROUNDS, ROUNDS, ROUNDS]
    assert fast.runs == ROUNDS + 1  # the first warms up and is not counted
    assert np.allclose(samples[2], near_enough)


def test_the_first_run_does_not_count(clock):
    samples = _take_turns([FakeWay(clock, 30.0, 0.001)], tuning._time)
    assert max(samples[0]) < 0.0011


def test_one_slow_moment_does_not_cost_the_victory(clock):
    hit = FakeWay(clock, 0.001, 0.016, 0.001)
    other = FakeWay(clock, 0.0011)
    hit_times, other_times = _take_turns([hit, other], tuning._time)
    assert min(hit_times) < min(other_times)
    assert len(hit_times) == ROUNDS


def test_the_budget_ends_it_with_every_way_measured(clock):
    samples = _take_turns([FakeWay(clock, BUDGET), FakeWay(clock, 3 * BUDGET)], tuning._time)
    assert [len(times) for times in samples] == [1, 1]


VIEWS = {
    "plain": lambda x, w: ((x, w), {}),
    "unbatched": lambda x, w: ((x[0], w), {}),
    "channels last": lambda x, w: ((x.transpose(0, 2, 3, 1), w), {"layout": "NHWC"}),
    "flipped": lambda x, w: ((x, w), {"flip": True}),
    "float16": lambda x, w: ((x.astype("float16"), w.astype("float16")), {}),
    "bfloat16": lambda x, w: ((x.astype("bfloat16"), w.astype("bfloat16")), {}),
    "float64": lambda x, w: ((x.astype("float64"), w.astype("float64")), {}),
    "byte-swapped": lambda x, w: ((x.astype(">f4"), w.astype(">f4")), {}),
    "reversed": lambda x, w: ((x[:, :, ::-1, ::-1], w[:, :, ::-1]), {}),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_what_conv2d_takes_is_measured_and_left_alone(layer, view):
    arguments, options = view(*layer)
    before = [array.copy() for array in arguments]
    result = tune(*arguments, **options)
    assert result.problem == fastconv.explain(*arguments, **options).plan.problem
    assert all(np.array_equal(array, copy) for array, copy in zip(arguments, before, strict=True))


def test_what_runs_is_the_callers_convolution(layer, monkeypatch, rng):
    """Each way, run as tune runs it, computes what the operation returns."""
    outputs = []
    x, w = layer
    bias, residual = integers(rng, (6,)), integers(rng, (7, 7, 6))
    run = planning.Plan.run
    monkeypatch.setattr(
        planning.Plan,
        "run",
        lambda plan, *arguments: run(plan, *arguments) or outputs.append((plan, arguments[-1].copy())),
    )
    arguments = (x[0].transpose(1, 2, 0), w, bias)
    options = {"residual": residual, "layout": "NHWC", "flip": True, "activation": ("leaky_relu", 0.5)}
    tune(*arguments, **options)
    expected = fastconv.reference.conv2d(
        x[0], w, bias, residual=residual.transpose(2, 0, 1), flip=True, activation=("leaky_relu", 0.5)
    )
    assert len(outputs) > 10
    for plan, y in outputs:
        difference = np.abs(y[0, :, 0] - expected).max()
        assert difference == 0 if plan.algorithm.exact(plan.problem, plan.tile) else difference < 1e-3


def test_highest_precision_is_measured_on_its_own(layer):
    result = tune(*layer, precision="highest")
    assert result.problem.key.endswith("_highest")
    assert {(timing.algorithm, timing.tile) for timing in result.timings} == ways(result.problem)
    assert not any(timing.tile.startswith("f4") for timing in result.timings)
    assert measured.lookup(fastconv.explain(*layer).plan.problem, result.device) is None


def test_workspace_limit_is_kept(layer, monkeypatch):
    needs = {
        name: [p.workspace() for p in planning.possible_plans(tune(*layer).problem, name)] for name in TABLE
    }
    limit = min(bytes for plans in needs.values() for bytes in plans)
    monkeypatch.setenv("FASTCONV_WORKSPACE", str(limit))
    result = tune(*layer)
    fitting = sum(bytes <= limit for plans in needs.values() for bytes in plans)
    assert len(result.timings) == fitting < sum(map(len, needs.values()))
    excluded = {name for name, plans in needs.items() if plans and min(plans) > limit}
    assert excluded
    for name in excluded:
        assert dict(result.refused)[name] == "needs more workspace than FASTCONV_WORKSPACE permits"
    monkeypatch.setenv("FASTCONV_WORKSPACE", "0")
    with pytest.raises(ConvError, match="FASTCONV_WORKSPACE must be at least"):
        tune(*layer)


def test_a_store_that_cannot_be_written_is_a_warning(layer, store, monkeypatch):
    (store / "file").write_text("")
    monkeypatch.setenv("FASTCONV_CACHE", str(store / "file"))
    with pytest.warns(UserWarning, match="is not kept|are ignored"):
        result = tune(*layer)
    assert result.path is None
    assert str(result).endswith("\nnot kept")


def test_a_kept_tile_that_is_unknown_is_passed_over(layer):
    result = tune(*layer)
    measured.store(result.problem, result.device, {"algorithm": "direct", "tile": "99x99", "seconds": 1e-9})
    planning.forget_plans()
    assert fastconv.conv2d(*layer).shape == (1, 6, 7, 7)


def test_torch_tensors_are_measured(layer):
    torch = pytest.importorskip("torch", reason="torch is not installed: its tensors are not tuned")
    tensors = [torch.from_numpy(array) for array in layer]
    assert tune(*tensors).problem == fastconv.explain(*layer).plan.problem


WRONG = [
    (
        {"input": np.ones((0, 5, 9, 9), "float32")},
        ConvError,
        "conv2d: N must be at least 1 to be measured, got 0",
    ),
    (
        {"weight": np.ones((6, 4, 3, 3), "float32")},
        ConvError,
        r"conv2d: weight.shape\[1\] must be C // groups",
    ),
    ({"weight": np.ones((6, 5), "float32")}, ConvError, "3, 4 or 5 axes"),
    ({"weight": None}, TypeError, "weight"),
    ({"stride": 0}, ConvError, "stride must be at least 1, got 0"),
    ({"activation": "swish"}, ConvError, "activation must be None"),
    ({"layout": "CHWN"}, ConvError, "layout must be one of"),
    ({"precision": "low"}, ConvError, "precision must be one of"),
    ({"bias": np.ones(5, "float32")}, ConvError, r"bias.shape must be \(K,\)"),
    ({"input": np.ones((1, 5, 9, 9), "int32")}, TypeError, "int32"),
    ({"flip": "yes"}, TypeError, "flip must be True or False"),
]


@pytest.mark.parametrize(("arguments", "kind", "pattern"), WRONG, ids=[pattern for *_, pattern in WRONG])
def test_wrong_arguments_are_the_errors_of_the_operation(layer, store, arguments, kind, pattern):
    with pytest.raises(kind, match=pattern):
        tune(**{"input": layer[0], "weight": layer[1], **arguments})
    assert list(store.iterdir()) == []
