"""The benchmark run: its statistics, its rows, its report, and above all that a wrong result cannot pass."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import (
    cases,
    check,
    compare,
    layers,
    machine,
    operations,
    report,
    rows,
    show,
    side,
    summary,
    timing,
    workload,
)  # fmt: skip
from bench.__main__ import OPERATIONS, main
from fastconv import reference
from fastconv.algorithms import TABLE, ErrorBound
from fastconv.plan import make_plan, possible_plans
from fastconv.problem import make_problem

ROOT = Path(__file__).resolve().parent.parent
DIRECT = ErrorBound(factor=4, reach=0)
TINY = make_problem("conv2d", (1, 4, 9, 9), (6, 4, 3, 3), padding=1)
SMALL_RUN = ["layers", "--networks", "mnist1d", "--algorithms", "direct,pointwise"]


@pytest.fixture
def quick(monkeypatch):
    """Measure neither the machine nor, for long, a layer."""
    monkeypatch.setattr(machine, "total_peak", lambda threads, dtype: 1e11)
    monkeypatch.setattr(machine, "copy_bandwidth", lambda threads: 1e10)
    monkeypatch.setattr(timing, "SAMPLE_FLOOR", 1e-5)
    monkeypatch.setattr(timing, "MAX_SAMPLES", 3)


@pytest.fixture
def wrong(monkeypatch):
    """Make every algorithm return one wrong element."""

    def make_wrong_call(*arguments):
        call = workload.make_call(*arguments)

        def wrong_call(**options):
            y = call(**options)
            y.flat[-1] += 1e-3
            return y

        return wrong_call

    monkeypatch.setattr(layers, "make_call", make_wrong_call)


STAMP = {
    "cpu": "a cpu", "vector_bits": 256, "cores": 2, "threads": 2, "system": "Linux", "python": "3.12",
    "versions": {"numpy": "2.0"}, "commit": "abc", "dirty": False, "peak_gflops": 100.0,
    "bandwidth_gbs": 10.0, "run": "2026-01-01T00:00:00+00:00", "command": "python -m bench",
}  # fmt: skip
LAYER = {
    "kind": "layer", "key": "n1", "network": "net", "layer": "conv1", "uses": [["net", "conv1", 2]],
    "label": "4->6 3x3 @9x9", "algorithm": "direct", "tile": "8x3", "auto": True, "samples": 3, "min": 1e-3,
    "median": 2e-3, "p80": 3e-3, "flops": 10**8, "bytes": 10**6, "error": 0.5, "passed": True, "reason": "",
    **STAMP,
}  # fmt: skip
COMPARE = {
    **LAYER, "kind": "compare", "baseline": "torch", "baseline_min": 5e-4, "baseline_median": 1e-3,
    "baseline_order": "NHWC", "refusal": "", "conditions": "one thread",
}  # fmt: skip


def layer_row(**changes):
    return {**LAYER, **changes}


def compare_row(**changes):
    return {**COMPARE, **changes}


def test_statistics_of_samples():
    times = timing.Times((5.0, 1.0, 4.0, 2.0, 3.0))
    assert (times.minimum, times.median, times.p80) == (1, 3, 4)
    assert timing.Times((7.0,)).p80 == 7


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for the calls that are timed: each takes 0.5 ms."""
    now = [0.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])

    def call():
        now[0] += 0.5e-3

    return call


def test_a_short_call_is_repeated_within_a_sample(clock):
    assert timing.calls_per_sample(clock) == 4
    assert timing.measure(clock, budget=0.0199).samples == pytest.approx([0.5e-3] * 10)


def test_a_minimum_of_samples_is_taken_whatever_the_budget(clock):
    assert len(timing.measure(clock, budget=0, min_samples=5).samples) == 5


def test_geometric_mean_is_weighted():
    assert timing.geometric_mean([2, 8]) == pytest.approx(4)
    assert timing.geometric_mean([2, 8], [3, 1]) == pytest.approx(2 * math.sqrt(2))
    assert math.isnan(timing.geometric_mean([]))


def test_rows_come_back_and_are_appended_to(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    rows.write(path, [layer_row()])
    rows.append(path, [layer_row(algorithm="im2col")])
    assert rows.read(path) == [layer_row(), layer_row(algorithm="im2col")]
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


def test_a_broken_write_leaves_the_old_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.write(path, [layer_row()])
    with pytest.raises(TypeError):
        rows.write(path, [{"not": {1, 2}}])
    assert rows.read(path) == [layer_row()]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_damaged_file_is_named(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"kind": "layer"}\n{"kind": ')
    assert main(["report", str(path), "--output", str(tmp_path)]) == 2
    assert "rows.jsonl:2" in capsys.readouterr().err


def test_a_repeated_measurement_replaces_the_earlier_one():
    old, new, other = layer_row(median=9), layer_row(median=1), layer_row(algorithm="im2col")
    assert rows.latest([old, other, new]) == [new, other]


def test_every_row_names_its_machine_commit_and_command(quick):
    stamp = rows.stamp(machine.describe(2), ["layers", "--networks", "a b"])
    assert {"cpu", "cores", "threads", "versions", "commit", "dirty", "peak_gflops", "bandwidth_gbs"} <= set(
        stamp
    )
    assert stamp["command"] == "python -m bench layers --networks 'a b'"
    json.dumps(stamp)


@pytest.mark.parametrize("order", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_the_reference_rounded_to_the_dtype_passes(dtype, order):
    problem = make_problem("conv2d", (2, 4, 9, 8), (6, 4, 3, 3), padding=1, dtype=dtype, order=order)
    x, w = workload.make_arrays(problem)
    assert (x.shape, w.shape) == (problem.input_shape, problem.weight_shape)
    assert x.strides[1] == (x.itemsize if order == "NHWC" else 72 * x.itemsize)
    oracle = check.Oracle(problem, x, w)
    assert oracle.judge(oracle.expected.astype(x.dtype), DIRECT).passed
    assert not oracle.judge((oracle.expected * 1.02).astype(x.dtype), DIRECT).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, 0.01])
def test_one_wrong_element_fails(value):
    x, w = workload.make_arrays(TINY)
    oracle = check.Oracle(TINY, x, w)
    y = oracle.expected.astype(np.float32)
    assert oracle.judge(y, DIRECT).passed
    y[0, 2, 3, 4] = y[0, 2, 3, 4] + value
    verdict = oracle.judge(y, DIRECT)
    assert not verdict.passed
    assert "(0, 2, 3, 4)" in verdict.reason
    json.dumps(verdict.error, allow_nan=False)


def test_an_element_whose_bound_is_zero_must_be_exact():
    problem = make_problem("conv2d", (1, 1, 3, 3), (1, 1, 3, 3))
    oracle = check.Oracle(problem, np.zeros(problem.input_shape), np.ones(problem.weight_shape))
    y = np.zeros(problem.output_shape, np.float32)
    assert oracle.judge(y, DIRECT).error == 0
    assert not oracle.judge(y + np.float32(1e-30), DIRECT).passed


@pytest.mark.parametrize("y", [np.zeros((1, 6, 9, 8), np.float32), np.zeros((1, 6, 9, 9))])
def test_another_shape_or_dtype_fails(y):
    assert not check.Oracle(TINY, *workload.make_arrays(TINY)).judge(y, ErrorBound(1e30, 0)).passed


def test_a_shape_that_layers_share_is_one_case():
    found, left_out = cases.collect(["vgg16", "vgg19"])
    assert left_out == []
    assert len(found) == len({case.problem.key for case in found}) == 9
    twice = next(case for case in found if case.label == "256->256 3x3 @56x56")
    assert [(network, count) for network, _, count in twice.uses] == [("vgg16", 2), ("vgg19", 3)]


def test_every_layer_of_every_network_is_a_case_or_left_out_with_a_reason():
    found, left_out = cases.collect(cases.all_networks())
    covered = {tuple(use) for row in [*left_out, *(case.columns() for case in found)] for use in row["uses"]}
    everything = {
        (name, layer.name, layer.count)
        for name in cases.all_networks()
        for layer in cases.get_network(name).convolutions()
    }
    assert covered == everything
    assert all(row["reason"] for row in left_out)


def test_what_does_not_fit_into_the_time_is_named():
    found, _ = cases.collect(["mnist1d", "unet"])
    clock = itertools.count().__next__  # a second passes at every look
    runner = layers.Runner(layers.Settings(tuple(TABLE), seconds=3, sampling=0), 1e9, clock)
    out = [row for case in found for row in runner.run(case) if row["kind"] == "left_out"]
    assert {row["layer"] for row in out} == {case.layer for case in found} - {"conv1", "conv2"}
    assert {row["reason"] for row in out} == {"did not fit into 3 seconds"}
    assert show.layers_by_network(out)[0] == "mnist1d: conv3"


def test_a_case_gives_a_row_or_a_refusal_for_each_algorithm(quick):
    case = cases.Case(TINY, "4->6 3x3 @9x9", (("net", "conv1", 1),))
    found = layers.run_case(case, layers.Settings(tuple(TABLE), sampling=0))
    assert [row["algorithm"] for row in found] == list(TABLE)
    refused = {row["algorithm"]: row["reason"] for row in rows.of_kind(found, "refusal")}
    assert refused == {name: row.refuses(TINY) for name, row in TABLE.items() if row.refuses(TINY)}
    timed = rows.of_kind(found, "layer")
    assert all(row["passed"] and 0 < row["min"] <= row["median"] <= row["p80"] for row in timed)
    assert sum(row["auto"] for row in timed) == 1


@pytest.mark.parametrize("options", [[], ["--prepared"], ["--order", "NHWC"], ["--dtype", "bfloat16"]])
def test_a_run_writes_rows_and_a_report(quick, tmp_path, options):
    assert main([*SMALL_RUN, *options, "--output", str(tmp_path)]) == 0
    found = rows.read(tmp_path / "layers.jsonl")
    assert {row["kind"] for row in found} == {"layer", "refusal"}
    assert len(rows.of_kind(found, "layer")) == len(rows.of_kind(found, "refusal")) == 3
    assert "3 of 3" in (tmp_path / "report.html").read_text()


def test_a_wrong_result_ends_the_run_with_status_1(quick, wrong, tmp_path, capsys):
    assert main([*SMALL_RUN, "--output", str(tmp_path)]) == 1
    assert "3 failed" in capsys.readouterr().out
    assert not any(row["passed"] for row in rows.of_kind(rows.read(tmp_path / "layers.jsonl"), "layer"))
    assert "3 failed" in (tmp_path / "report.html").read_text()


def test_a_result_that_changes_between_calls_fails(quick, monkeypatch):
    x, w = workload.make_arrays(TINY)
    monkeypatch.setattr(layers, "make_call", lambda *_: lambda out=None: oracle_output(next(calls)))
    oracle, calls = check.Oracle(TINY, x, w), itertools.count()

    def oracle_output(number):
        return oracle.expected.astype(np.float32) * np.float32(1 + min(number, 1) * 1e-7)

    case = cases.Case(TINY, "", (("net", "conv1", 1),))
    row = layers.run_algorithm(case, "direct", layers.Settings(("direct",), sampling=0), x, w, oracle)
    assert not row["passed"]
    assert "other bits" in row["reason"]


def test_unknown_names_list_the_known_ones(quick, tmp_path, capsys):
    output = ["--output", str(tmp_path)]
    assert main(["layers", "--networks", "lenet,", *output]) == 2
    assert main(["layers", "--networks", "lenet5", "--algorithms", "fft", *output]) == 2
    shown = capsys.readouterr().err
    assert "lenet5" in shown
    assert "winograd" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_nothing_is_refused(quick, tmp_path, capsys):
    command = ["layers", "--networks", "vgg16", "--algorithms", "pointwise,depthwise"]
    assert main([*command, "--output", str(tmp_path)]) == 2
    text = "nothing was measured: pointwise or depthwise cannot run any layer of vgg16"
    assert capsys.readouterr().err == f"python -m bench: {text}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", [[], ["layers"], ["photo"], ["report", "x"], ["kernels"], ["gpu"], ["train", "digits"]]
)
def test_a_folder_that_cannot_be_is_named_at_once(tmp_path, capsys, command):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "below"
    assert main([*command, "--output", str(folder)]) == 2
    rule = "--output must be a folder that can be written to"
    assert capsys.readouterr().err == f"python -m bench: {rule}, got {folder}\n"


@pytest.mark.parametrize("command", [[], ["layers"]])
@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon"])
def test_a_time_that_is_none_is_refused(capsys, command, seconds):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--seconds", seconds])
    assert ended.value.code == 2
    assert f"must be a number of seconds above 0, got '{seconds}'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rich", "matplotlib"])
def test_a_missing_package_is_named(tmp_path, name):
    code = f"""
import sys
sys.modules["{name}"] = None  # importing it raises ModuleNotFoundError
from bench.__main__ import main
sys.exit(main(["photo", "--output", {str(tmp_path)!r}]))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    text = f'python -m bench: {name}[.a-z]* is not installed: pip install "\\.\\[bench]" in the checkout\n'
    assert done.returncode == 2
    assert re.fullmatch(text, done.stderr)


def test_the_photograph_is_filtered_checked_and_shown(quick, tmp_path):
    assert main(["photo", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "photo.png").read_bytes()[1:4] == b"PNG"
    found = rows.read(tmp_path / "photo.jsonl")
    assert len(found) == 5
    assert all(row["passed"] for row in found)
    assert "data:image/png;base64," in (tmp_path / "report.html").read_text()


def test_the_report_needs_nothing_from_outside(tmp_path):
    found = [
        layer_row(),
        layer_row(algorithm="winograd", tile="<b>", passed=False, error=2.0, reason="one & two"),
        {**layer_row(algorithm="depthwise"), "kind": "refusal", "reason": "needs groups = C"},
        {**layer_row(key="n2", layer="conv2"), "kind": "left_out", "reason": "did not fit into 3 seconds"},
        {**layer_row(), "kind": "photo", "filter": "blur", "picture": "photo.png"},
        compare_row(),
    ]
    page = report.render(found, tmp_path)
    assert re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", page) == []
    assert re.findall(r"url\((?!#)[^)]*\)|@import|<link", page) == []
    for text in (
        "1 failed",
        "needs groups = C",
        "did not fit into 3 seconds",
        "Roofline",
        "<svg",
        "&lt;b&gt;",
    ):
        assert text in page
    assert "<b>" not in re.sub(r'<b class="[a-z]*">', "", page)


def test_the_report_is_rendered_again_from_its_rows(tmp_path):
    rows.write(
        tmp_path / "main.jsonl", [layer_row(), layer_row(algorithm="winograd", median=1e-3, auto=False)]
    )
    assert main(["report", str(tmp_path / "main.jsonl"), "--output", str(tmp_path / "page")]) == 0
    assert "2.00x" in (tmp_path / "page" / "report.html").read_text()


def test_summary_over_layers():
    found = [
        layer_row(key="a", algorithm="direct", median=4.0, auto=False),
        layer_row(key="a", algorithm="winograd", median=1.0, auto=False),
        layer_row(key="a", algorithm="im2col", median=2.0, auto=True),
        layer_row(key="b", algorithm="direct", median=3.0, auto=True),
    ]
    assert summary.best_over_direct(found) == pytest.approx(2)
    assert summary.auto_share(found) == pytest.approx(math.sqrt(0.5))
    direct, _, winograd = summary.sum_up_algorithms(found)
    assert (direct.layers, direct.fastest, winograd.fastest) == (2, 1, 1)
    assert winograd.speedup == pytest.approx(4)


def test_a_comparison_counts_layers_as_often_as_they_occur_and_shows_losses():
    win = compare_row(key="a", median=1e-3, baseline_median=2e-3, uses=[["net", "conv1", 3]])
    loss = compare_row(key="b", median=4e-3, uses=[["net", "conv2", 1]])
    result = summary.compare_network([win, loss], "net")
    assert (result.layers, result.lost) == (4, 1)
    assert result.ratio_median == pytest.approx((2**3 * 0.25) ** 0.25)
    assert result.seconds == pytest.approx(7e-3)


def test_compare_runs_both_sides_and_appends(quick, tmp_path, capsys):
    pytest.importorskip("torch", reason="the baseline of the comparison")
    command = [
        "compare",
        "--networks",
        "mnist1d",
        "--rounds",
        "1",
        "--algo",
        "pointwise",
        "--output",
        str(tmp_path),
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "python -m bench compare --networks mnist1d" in shown
    found = rows.read(tmp_path / "compare.jsonl")
    assert [row["layer"] for row in found] == ["conv1", "conv2", "conv3"]
    assert all(row["passed"] and row["baseline_median"] > 0 for row in found)
    assert {row["refusal"] for row in found} == {"needs a kernel of extent 1"}


@pytest.mark.parametrize("name", operations.OPERATIONS)
class TestOperations:
    PROBLEMS = (
        make_problem("conv2d", (2, 70, 11, 13), (66, 35, 3, 3), padding=1, groups=2),
        make_problem("conv2d", (2, 6, 11, 13), (8, 6, 3, 3), stride=2, padding=1),
        make_problem("conv1d", (2, 6, 17), (6, 1, 4), padding=((3, 0),), groups=6),
        make_problem("conv3d", (2, 6, 5, 6, 7), (8, 6, 3, 3, 3), padding=(1, 0, 2)),
    )

    @pytest.mark.parametrize("problem", PROBLEMS, ids=str)
    @pytest.mark.parametrize("library", side.LIBRARIES)
    def test_both_libraries_compute_it(self, name, library, problem):
        """And the oracle hears of one element that is off, or of rounding errors that are too large."""
        if library == "torch":
            pytest.importorskip("torch", reason="the baseline of the comparison")
        operation = operations.OPERATIONS[name](problem)
        oracle, bound = operation.oracle(), make_plan(operations.turn(problem, name)).error_bound()
        for call in side.LIBRARIES[library](operation, "auto", False, 1).values():
            y = np.asarray(call()).copy()
            assert oracle.judge(y, bound).passed
            assert not oracle.judge(y * np.float32(1.001), bound).passed
            y.flat[-1] += 1
            assert not oracle.judge(y, bound).passed

    def test_errors_that_travel(self, name):
        """Winograd's are judged by the largest element nearby."""
        plans = possible_plans(operations.turn(self.PROBLEMS[0], name), "winograd")
        assert plans
        operation = operations.OPERATIONS[name](self.PROBLEMS[0])
        for plan in plans:
            oracle, bound = operation.oracle(), plan.error_bound()
            assert bound.reach > 0
            assert oracle.judge(operation.ours("winograd", prepared=False)(), bound).passed
            assert (oracle.scale(bound.reach) >= oracle.scale(0) * (1 - 1e-12)).all()

    def test_compare(self, name, quick, tmp_path, capsys):
        pytest.importorskip("torch", reason="the baseline of the comparison")
        command = ["compare", "--networks", "mnist1d", "--rounds", "1", "--operation", name]
        assert main([*command, "--output", str(tmp_path)]) == 0
        found = rows.read(tmp_path / "compare.jsonl")
        assert {row["operation"] for row in found} == {name}
        assert operations.OPERATIONS[name].about in " ".join(capsys.readouterr().out.split())
        assert all(row["passed"] for row in found)


def test_operations_are_summed_up_by_themselves(tmp_path):
    """Rows of one layer, appended to one file: each operation keeps its own, and has means of its own."""
    conditions = {}
    for name in OPERATIONS:
        conditions[name] = compare.Settings("torch", name, "auto", False, 1, 1).conditions(1)
    found = [compare_row(operation=name, conditions=text) for name, text in conditions.items()]
    assert rows.latest([*found, *found]) == found
    assert rows.by_conditions(found) == [[row] for row in found]
    page = report.render(found, tmp_path)
    assert page.count("Against torch</h2>") == len(found)


def test_the_command_line_knows_the_operations():
    assert tuple(operations.OPERATIONS) == OPERATIONS


def test_a_gradient_takes_no_prepared_weight(capsys):
    pytest.importorskip("torch", reason="the baseline of the comparison")
    assert main(["compare", "--operation", "grad_input", "--prepared"]) == 2
    assert "--prepared is for forward and fused" in capsys.readouterr().err


def test_compare_without_its_baseline_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    assert main(["compare"]) == 2
    assert "pip install torch" in capsys.readouterr().err


def test_torch_computes_a_causal_convolution():
    pytest.importorskip("torch", reason="the baseline of the comparison")
    problem = make_problem("conv1d", (2, 6, 17), (6, 1, 4), padding=((3, 0),), groups=6)
    (call,) = side.torch_calls(operations.Forward(problem), "auto", prepared=False, threads=1).values()
    expected = reference.conv1d(*workload.make_arrays(problem), padding=((3, 0),), groups=6)
    np.testing.assert_allclose(call().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_child_that_fails_is_heard(quick):
    settings = compare.Settings("torch", "forward", "auto", prepared=False, rounds=1, threads=1)
    with (
        compare.start("fastconv", settings) as child,
        pytest.raises(RuntimeError, match="must be one of"),
    ):
        child.ask("load", TINY, "forward", "fft", False)


def test_micro_benchmarks_need_no_torch():
    code = """
import sys, pytest
sys.modules["torch"] = None  # importing it raises ImportError
sys.exit(pytest.main(["bench", "--collect-only", "--quiet", "-p", "no:cacheprovider"]))"""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no xdist
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_layer[" in done.stdout


def test_help_names_every_run():
    command = [sys.executable, "-m", "bench", "--help"]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in (
        "main",
        "layers",
        "photo",
        "networks",
        "network",
        "compare",
        "report",
        "kernels",
        "gpu",
        "fit",
        "train",
    ):
        assert re.search(rf"^    {name}\b", shown, re.MULTILINE)


def test_networks_are_printed(capsys):
    assert main(["networks"]) == 0
    assert "resnet50" in capsys.readouterr().out.split()
    assert main(["networks", "lenet5"]) == 0
    assert "61,706" in capsys.readouterr().out
