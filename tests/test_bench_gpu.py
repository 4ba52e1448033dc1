"""The run on a GPU, without one: what it plans, what it makes of rows, and that no wrong result passes."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from bench import cases, workload
from bench.__main__ import GPU_PARTS, main
from bench.check import Oracle
from bench.gpu import (
    child,
    choice,
    command,
    compile,
    device,
    fit,
    layers,
    repeat,
    results,
    sanitize,
    stopwatch,
    table,
    targets,
    verify,
    work,
)
from bench.gpu.clock import Deadline, share_of
from bench.gpu.compile import Compiled
from bench.rows import write
from fastconv import reference
from fastconv.algorithms import ErrorBound
from fastconv.gpu import cupy_driver, launch
from fastconv.plan import make_plan, possible_plans
from fastconv.problem import ITEMSIZE, make_problem
from tests.emulator import EmulatorDriver

ROOT = Path(__file__).resolve().parent.parent
TINY = make_problem("conv2d", (1, 4, 9, 9), (6, 4, 3, 3), padding=1)
TINY_IN = {order: replace(TINY, order=order) for order in ("NCHW", "NHWC")}
CASE = cases.Case(TINY, "4->6 3x3 @9x9", (("net", "conv1", 2),))
MACHINE = {"kind": "machine", "gpu": "NVIDIA H100", "driver": "580", "commit": "abc"}


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def emulated(monkeypatch):
    """The emulator for the GPU, NumPy's arrays for CuPy's."""

    def make_arrays(problem):
        x, weight = workload.make_arrays(problem)
        return x, weight, np.ones(problem.K, problem.dtype)

    def make_output(problem):
        return workload.in_order(np.full(problem.output_shape, np.nan, problem.dtype), problem.order)

    monkeypatch.setattr(device, "make_arrays", make_arrays)
    monkeypatch.setattr(device, "make_output", make_output)
    monkeypatch.setattr(device, "in_order", workload.in_order)
    monkeypatch.setattr(device, "to_host", np.array)
    monkeypatch.setattr(device, "free_memory", lambda: None)
    monkeypatch.setattr(device, "total_memory", lambda: 80 << 30)
    with launch.use_driver(EmulatorDriver()):
        yield


def ours(**changes):
    entry = {
        "order": "NCHW", "algorithm": "direct", "tile": "a", "auto": True, "call": "prepared",
        "fused": False, "estimate": 1e-3, "median": 1e-3, "min": 1e-3, "samples": 9,
    }  # fmt: skip
    return {**entry, **changes}


def theirs(**changes):
    entry = {
        "order": "NCHW", "tf32": False, "call": "conv", "fused": False, "median": 2e-3, "min": 1e-3,
        "samples": 9,
    }  # fmt: skip
    return {**entry, **changes}


COPY = {"kind": "copy", "bytes": 1 << 28, "median": 1e-3, "gbs": 2.0}


def layer(**changes):
    row = {
        "kind": "layer", "network": "resnet50", "layer": "conv1", "uses": [["resnet50", "conv1", 1]],
        "label": "3->64 7x7", "key": "n1", "C": 64, "K": 64, "kernel": [3, 3], "groups": 1,
        "dtype": "float32", "batch": 1, "flops": 10**9, "bytes": 10**6, "fastconv": [ours()],
        "cudnn": [theirs()],
    }  # fmt: skip
    return results.with_ratios({**row, **changes}, COPY)


class TestCommandLine:
    def test_the_parts_are_those_of_the_command(self):
        assert tuple(command.PARTS) == GPU_PARTS

    def test_an_unknown_part_is_refused_and_the_known_ones_are_named(self, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["gpu", "verify", "party"])
        assert ended.value.code == 2
        assert (
            "must be one of compile, verify, repeat, sanitize, bench, got 'party'" in capsys.readouterr().err
        )

    @pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
    @pytest.mark.parametrize(("given", "python"), [(["PYTHON=py"], "py"), ([], "python3")])
    def test_make_gpu_neither_makes_nor_takes_an_environment(self, tmp_path, given, python):
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / ".venv" / "bin" / "python").touch()  # what `make test` leaves: it has no CuPy
        line = [
            "make", "--no-print-directory", "-n", "-f", str(ROOT / "Makefile"),
            "gpu", *given, "PART=verify bench", "ARGS=--output x",
        ]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
        shown = subprocess.run(
            line, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        ).stdout
        assert shown == f"{python} -m bench gpu verify bench --output x\n"

    def test_without_cupy_it_says_what_to_install(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
        assert main(["gpu", "--output", str(tmp_path)]) == 1
        shown = capsys.readouterr().err
        assert f"CuPy is not installed for {sys.executable} (pip install " in shown
        assert cupy_driver.INSTALL in shown
        assert list(tmp_path.iterdir()) == []

    def test_without_a_gpu_it_says_so(self, monkeypatch, tmp_path, capsys):
        run_fake(monkeypatch, {command.DESCRIBE: [{"kind": "no_gpu", "reason": "the driver finds none"}]})
        assert main(["gpu", "--output", str(tmp_path)]) == 1
        assert "the driver finds none" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_it_needs_only_what_a_machine_with_a_gpu_has(self):
        modules = [f"bench.gpu.{path.stem}" for path in (ROOT / "bench" / "gpu").glob("*.py")]
        modules.remove("bench.gpu.torch_side")
        code = f"""
import importlib, sys
missing = "rich matplotlib numba llvmlite ml_dtypes hypothesis cupy torch".split()
sys.modules.update(dict.fromkeys(missing))  # importing these raises ImportError
for module in {modules!r}:
    importlib.import_module(module)
"""
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def run_fake(monkeypatch, found):
    """Let the parts' rows be `found`, by their functions' names; other parts find nothing."""
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(command.child, "run", lambda target, seconds: iter(found.get(target, [])))


TESTS_PASSED = {"kind": "tests", "command": "pytest", "summary": "9 passed", "passed": True}
TESTS_FAILED = {**TESTS_PASSED, "summary": "1 failed", "passed": False, "reason": "boom"}
GOOD = {
    command.DESCRIBE: [MACHINE],
    "bench.gpu.verify:run": [TESTS_PASSED],
    "bench.gpu.layers:run": [layer()],
}


class TestWholeRun:
    def test_it_writes_a_file_and_passes(self, monkeypatch, tmp_path, capsys):
        run_fake(monkeypatch, GOOD)
        assert main(["gpu", "--output", str(tmp_path)]) == 0
        found = json.loads((tmp_path / "nvidia-h100.json").read_text())
        assert list(found["parts"]) == list(command.PARTS)
        bench = found["parts"]["bench"]
        assert bench["machine"]["driver"] == "580"
        assert bench["command"] == f"python -m bench gpu --output {tmp_path}"
        assert bench["rows"][0]["fastconv"][0]["ratio"] == 2
        assert len(bench["targets"]) == 2 * len(targets.TARGETS) == 22
        shown = capsys.readouterr().out
        assert "pytest: 9 passed" in shown
        assert "verify: passed" in shown

    def test_a_part_that_is_run_again_leaves_the_others(self, monkeypatch, tmp_path):
        run_fake(monkeypatch, GOOD)
        main(["gpu", "--output", str(tmp_path)])
        run_fake(monkeypatch, {command.DESCRIBE: [{**MACHINE, "commit": "new"}]})
        assert main(["gpu", "bench", "--output", str(tmp_path)]) == 0
        parts = json.loads((tmp_path / "nvidia-h100.json").read_text())["parts"]
        assert {name: part["machine"]["commit"] for name, part in parts.items()} == {
            **dict.fromkeys(("compile", "verify", "repeat", "sanitize"), "abc"),
            "bench": "new",
        }
        assert parts["bench"]["rows"] == []

    @pytest.mark.parametrize("row", [{"kind": "failure", "reason": "boom"}, TESTS_FAILED])
    def test_a_failure_ends_it_with_status_1_and_the_other_parts_are_run(
        self, monkeypatch, tmp_path, capsys, row
    ):
        run_fake(monkeypatch, {**GOOD, "bench.gpu.verify:run": [row]})
        assert main(["gpu", "--output", str(tmp_path)]) == 1
        shown = capsys.readouterr().out
        assert "boom" in shown
        assert "verify: FAILED" in shown
        assert "bench: passed" in shown

    def test_a_missed_target_is_no_failure(self, monkeypatch, tmp_path, capsys):
        slow = layer(fastconv=[ours(median=1.0)])
        run_fake(monkeypatch, {**GOOD, "bench.gpu.layers:run": [slow]})
        assert main(["gpu", "bench", "--output", str(tmp_path)]) == 0
        assert "MISSED" in capsys.readouterr().out

    def test_a_damaged_file_is_named_and_kept(self, monkeypatch, tmp_path, capsys):
        path = tmp_path / "nvidia-h100.json"
        path.write_text('{"gpu": ')
        run_fake(monkeypatch, GOOD)
        assert main(["gpu", "--output", str(tmp_path)]) == 1
        assert "nvidia-h100.json: not a file of results" in capsys.readouterr().err
        assert path.read_text() == '{"gpu": '


class TestTime:
    def test_a_deadline(self, clock):
        deadline = Deadline(10, clock)
        clock.now += 4
        assert (deadline.left(), deadline.part(0.5).left(), deadline.is_over()) == (6, 3, False)
        clock.now += 7
        assert (deadline.left(), deadline.is_over()) == (0, True)

    def test_what_a_part_does_not_use_goes_to_the_later_ones(self, clock):
        """Of 460 s, compile may take 60; it takes 6, and the last part what the others left."""
        spent = dict.fromkeys(command.PARTS, 6.0)
        allowed = self.run(clock, list(command.PARTS), 460, spent)
        assert allowed["compile"] == pytest.approx(60)
        assert allowed["verify"] == pytest.approx(454 * 110 / 400)
        assert allowed["bench"] == pytest.approx(460 - 4 * 6)

    def test_a_part_that_is_late_shortens_the_others_not_the_whole(self, clock):
        spent = {**dict.fromkeys(command.PARTS, 1.0), "verify": 300.0}
        allowed = self.run(clock, list(command.PARTS), 460, spent)
        assert allowed["bench"] == pytest.approx(460 - 303)

    def test_a_part_alone_has_all_the_time(self, clock):
        assert self.run(clock, ["bench"], 460, {"bench": 1.0}) == {"bench": pytest.approx(460)}

    @staticmethod
    def run(clock, chosen, seconds, spent):
        allowed = {}

        def run_part(target, limit):
            name = next(name for name, (of, _) in command.PARTS.items() if of == target)
            allowed[name] = limit
            clock.now += spent[name]
            yield {"kind": "left_out", "reason": name}

        for name, rows, took in command.run_parts(chosen, Deadline(seconds, clock), run_part, clock):
            assert (rows[0]["reason"], took) == (name, pytest.approx(spent[name]))
        return allowed

    def test_shares_of_the_parts_to_come(self):
        weights = {"a": 5, "b": 1, "c": 3}
        assert share_of("c", ["b", "c"], weights) == 1
        assert share_of("b", ["b", "c"], weights) == 0.25

    def test_all_parts_fit_into_eight_minutes(self):
        """Even if every part is stopped only at the end of its grace."""
        assert command.SECONDS <= 480
        late = len(command.PARTS) * child.GRACE  # at most: a late part takes from those behind it
        assert sum(weight for _, weight in command.PARTS.values()) <= command.SECONDS - command.RESERVE
        assert child.GRACE < command.RESERVE < late


def part_that_ends(deadline):
    yield {"kind": "left_out", "reason": f"{deadline.seconds:g}"}
    yield {"kind": "left_out", "reason": "second"}


def part_that_raises(deadline):
    yield {"kind": "left_out", "reason": "first"}
    raise ValueError("out of order")


def part_that_dies(deadline):
    yield {"kind": "left_out", "reason": "first"}
    os._exit(7)


def part_that_hangs(deadline):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield {"kind": "left_out", "reason": str(process.pid)}
    time.sleep(600)


class TestChild:
    @staticmethod
    def run(part, seconds=60.0, grace=5.0):
        return list(child.run(f"{__name__}:{part.__name__}", seconds, grace))

    def test_rows_come_back(self):
        assert [row["reason"] for row in self.run(part_that_ends)] == ["60", "second"]

    def test_an_exception_is_a_failure_behind_the_rows(self):
        first, failure = self.run(part_that_raises)
        assert first["reason"] == "first"
        assert failure["kind"] == "failure"
        assert "ValueError: out of order" in failure["reason"]

    def test_a_death_is_a_failure_behind_the_rows(self):
        first, failure = self.run(part_that_dies)
        assert first["reason"] == "first"
        assert failure == {"kind": "failure", "reason": "the process died with exit code 7"}

    @pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups on this system")
    def test_what_hangs_is_stopped_with_all_it_started(self):
        rows = child.run(f"{__name__}:part_that_hangs", 20.0, grace=0.0)
        first = next(rows)
        rows.close()  # as at the end of its time
        assert not is_running(int(first["reason"]))

    def test_what_is_late_is_left_out(self):
        (row,) = self.run(part_that_hangs, seconds=0.0, grace=0.0)
        assert row["kind"] == "left_out"
        assert "did not end within 0 s" in row["reason"]


def is_running(pid):
    """Whether a process lives; one that nobody has waited for yet does not."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.02)
    return True


class FakeGpu:
    """A GPU that does one thing after the other, and never before the host has enqueued it."""

    flush_seconds = 30e-6

    def __init__(self, host):
        self.host = host
        self.now = host.now
        self.flushed = 0

    def enqueue(self, seconds):
        self.now = max(self.now, self.host.now) + seconds

    def flush(self):
        self.flushed += 1
        self.enqueue(self.flush_seconds)

    def record(self):
        self.enqueue(0)
        return self.now

    def elapsed(self, start, end):
        return end - start

    def synchronize(self):
        self.host.now = max(self.now, self.host.now)


class TestStopwatch:
    @pytest.mark.parametrize("host_seconds", [1e-6, 200e-6, 2e-3])
    def test_the_time_of_the_host_does_not_count(self, clock, host_seconds):
        gpu = FakeGpu(clock)

        def call():
            clock.now += host_seconds
            gpu.enqueue(10e-6)

        times = stopwatch.measure(gpu, call, clock=clock)
        assert times.samples == pytest.approx([10e-6] * len(times.samples))

    def test_without_the_flush_it_would_count(self, clock, monkeypatch):
        """The test above can fail."""
        monkeypatch.setattr(stopwatch, "flush_passes", lambda gpu, seconds: 1)
        gpu = FakeGpu(clock)

        def call():
            clock.now += 200e-6
            gpu.enqueue(10e-6)

        assert stopwatch.measure(gpu, call, clock=clock).minimum > 100e-6

    @pytest.mark.parametrize(
        ("seconds", "samples"), [(1.0, stopwatch.FEWEST), (1e-6, stopwatch.MOST), (3e-3, 10)]
    )
    def test_samples_fill_the_time(self, clock, seconds, samples):
        gpu = FakeGpu(clock)
        times = stopwatch.measure(gpu, lambda: gpu.enqueue(seconds), clock=clock)
        assert len(times.samples) == samples
        assert gpu.flushed == samples + 2

    def test_every_sample_begins_with_a_cold_cache(self, clock):
        gpu, seen = FakeGpu(clock), []

        def call():
            seen.append(gpu.flushed)
            gpu.enqueue(1e-3)

        stopwatch.measure(gpu, call, clock=clock)
        timed = seen[4:]  # after the warm-up and the three calls that time the host
        assert timed == sorted(set(timed))


class TestResults:
    def test_the_name_of_the_file(self):
        assert results.file_name("NVIDIA GeForce RTX 4090 (Laptop)") == "nvidia-geforce-rtx-4090-laptop.json"

    def test_the_text_is_json_with_an_entry_per_line(self):
        value = {"gpu": "a", "empty": [], "rows": [{"n": number, "t": "x" * 40} for number in range(9)]}
        text = results.to_text(value)
        assert json.loads(text) == value
        assert '\n  {"n": 3, "t": "' in text
        assert max(map(len, text.splitlines())) <= results.WIDTH

    def test_the_passes_over_a_layer_are_joined(self):
        first = {**layer(), "cudnn": [theirs()]}
        second = {**layer(), "fastconv": [], "cudnn": [theirs(tf32=True, median=5e-4)]}
        other = layer(key="n32")
        left_out = {"kind": "left_out", "reason": "late"}
        joined, alone, copy, last = results.merge([first, {**COPY, "gbs": 0.5}, left_out, other, second])
        assert joined["fastconv"][0]["copy_share"] == 2
        assert copy["kind"] == "copy"
        assert [entry["tf32"] for entry in joined["cudnn"]] == [False, True]
        assert joined["fastconv"][0]["ratio_tf32"] == 0.5
        assert "ratio_tf32" not in alone["fastconv"][0]
        assert last == left_out

    def test_ratios_are_against_the_faster_order_and_the_same_work(self):
        cudnn = [
            theirs(median=4e-3),
            theirs(median=3e-3, order="NHWC"),
            theirs(median=1e-4, tf32=True),
            theirs(median=5e-3, call="relu_(conv + bias)", fused=True),
            theirs(median=6e-3, call="cudnn_convolution_relu", fused=True),
        ]
        row = layer(fastconv=[ours(), ours(call="prepared + bias + relu", fused=True)], cudnn=cudnn)
        plain, fused = row["fastconv"]
        assert (plain["ratio"], plain["ratio_tf32"], fused["ratio"]) == (3, 0.1, 5)
        assert "ratio_tf32" not in fused
        assert (plain["gflops"], plain["gbs"]) == (1000, 1)

    def test_what_was_left_out_is_no_failure(self):
        rows = [{"kind": "left_out", "reason": ""}, {"kind": "checked", "passed": True}]
        assert results.passed(rows)
        assert not results.passed([*rows, {"kind": "checked", "passed": False}])
        assert not results.passed([*rows, {"kind": "failure", "reason": ""}])


class TestTargets:
    def layers(self):
        """Two layers that direct is chosen for, one of winograd, one of another network, a first layer."""
        return [
            layer(key="a", uses=[["resnet50", "a", 3]], fastconv=[ours(median=4e-3)]),
            layer(key="b", batch=32, uses=[["vgg16", "b", 1]], fastconv=[ours(median=1e-3)]),
            layer(key="c", uses=[["vgg16", "c", 5]], fastconv=[ours(algorithm="winograd", median=1e-6)]),
            layer(key="d", uses=[["alexnet", "d", 5]], fastconv=[ours(median=1e-6)]),
            layer(key="e", C=3, uses=[["vgg16", "e", 1]], fastconv=[ours(algorithm="im2col", median=4e-3)]),
        ]

    def find(self, rows, what):
        return next(each for each in targets.find_targets(rows) if each.mean.what == what)

    def test_layers_count_as_often_as_they_occur(self):
        target = self.find(self.layers(), "direct, where chosen")
        assert target.mean.layers == 4
        assert target.mean.ratio == pytest.approx((0.5**3 * 2) ** 0.25)
        assert target.verdict == "MISSED"

    def test_all_three_together(self):
        target = self.find(self.layers(), "im2col, direct, pointwise, where chosen")
        assert (target.mean.layers, target.mean.ratio) == (5, pytest.approx((0.5**4 * 2) ** 0.2))

    def test_first_layers(self):
        target = self.find(self.layers(), "first layers, C <= 4")
        assert (target.mean.layers, target.mean.ratio, target.least) == (1, pytest.approx(0.5), 1.2)
        faster = [layer(C=3, fastconv=[ours(median=1e-3)])]
        assert self.find(faster, "first layers, C <= 4").verdict == "met"

    def test_an_algorithm_that_is_not_chosen_does_not_count(self):
        rows = [layer(fastconv=[ours(auto=False), ours(algorithm="im2col", median=1e-3)])]
        assert self.find(rows, "direct, where chosen").verdict == "not measured"
        assert self.find(rows, "im2col, where chosen").verdict == "met"

    def test_each_order_of_fastconv_is_judged(self):
        rows = [layer(fastconv=[ours(median=4e-3), ours(order="NHWC")])]
        verdicts = [each.verdict for each in targets.find_targets(rows) if each.mean.layers]
        assert verdicts == ["MISSED", "MISSED", "met", "met"]

    def test_without_cudnn_nothing_is_measured(self):
        found = targets.find_targets([layer(cudnn=[])])
        assert {each.verdict for each in found} == {"not measured"}
        json.dumps([each.as_row() for each in found], allow_nan=False)

    def test_means_of_networks(self):
        means = targets.find_means(self.layers(), ["vgg16", "zfnet"])
        assert [(mean.what, mean.layers) for mean in means] == [
            ("vgg16 batch 1 float32", 6),
            ("vgg16 batch 32 float32", 1),
        ]

    def test_winograd_counts_whether_it_is_chosen_or_not(self):
        entries = [ours(), ours(algorithm="winograd", auto=False, median=4e-3)]
        vgg = {"uses": [["vgg16", "a", 2]], "fastconv": entries}
        rows = [
            layer(key="a", **vgg),
            layer(key="b", C=3, **vgg),
            layer(key="c", kernel=[5, 5], **vgg),
            layer(key="d", dtype="float16", **vgg),
            layer(key="e", uses=[["resnet50", "b", 1]], fastconv=entries),
            layer(key="f", uses=[["vgg16", "b", 1]], fastconv=[ours()]),
            layer(key="g", batch=32, **{**vgg, "fastconv": [ours(algorithm="winograd", auto=False)]}),
        ]
        small, large = (self.find(rows, f"winograd, vgg16, C >= 64, batch {batch}") for batch in (1, 32))
        assert (small.mean.layers, small.mean.ratio, small.least) == (2, pytest.approx(0.5), 1.0)
        assert (large.mean.layers, large.mean.ratio, large.least) == (2, pytest.approx(2), 1.3)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_depthwise_counts_on_depthwise_layers_of_its_dtype(self, dtype):
        other = "float16" if dtype == "float32" else "float32"
        entries = [ours(), ours(algorithm="depthwise", auto=False, median=5e-4)]
        each = {"groups": 64, "fastconv": entries, "dtype": dtype}
        rows = [
            layer(key="a", **each, uses=[["mobilenet_v1", "a", 1]]),
            layer(key="b", **each, uses=[["convnext_t", "a", 3]], kernel=[7, 7], batch=32),
            layer(key="c", **each, uses=[["replknet_31b", "a", 2]], kernel=[31, 31]),
            layer(key="d", **each, uses=[["mamba", "a", 9]]),
            layer(key="e", **{**each, "groups": 32}, uses=[["convnext_t", "a", 9]]),
            layer(key="f", **{**each, "dtype": other}, uses=[["convnext_t", "a", 9]]),
            layer(key="g", **{**each, "groups": 1}, C=1, uses=[["convnext_t", "a", 9]]),
        ]
        target = self.find(rows, f"depthwise, {dtype}")
        assert (target.mean.layers, target.mean.ratio, target.least) == (6, pytest.approx(4), 3.0)

    @pytest.mark.parametrize(("network", "kernel"), [("mobilenet_v1", [3, 3]), ("mamba", [4])])
    def test_depthwise_layers_against_a_copy(self, network, kernel):
        """1 MB in 0.5 ms are 2 GB/s, as the copy has; without cuDNN too."""
        entries = [ours(), ours(algorithm="depthwise", auto=False, median=1e-3)]
        each = {"groups": 64, "fastconv": entries, "kernel": kernel, "cudnn": [], "uses": [[network, "a", 2]]}
        rows = [layer(key="a", batch=32, **each), layer(key="b", **each)]
        rows.append(layer(key="c", batch=32, **{**each, "groups": 1}))
        target = self.find(rows, f"GB/s over a copy's, {network}, batch 32")
        assert (target.mean.layers, target.mean.ratio, target.least) == (2, pytest.approx(0.5), 0.8)
        assert target.verdict == "MISSED"


def entries_of(**entries):
    """A layer's entries in one order: algorithm=(estimate, median); the lowest estimate is auto's."""
    least = min(entries, key=entries.get)
    return [
        ours(algorithm=name, estimate=estimate, median=median, auto=name == least)
        for name, (estimate, median) in entries.items()
    ]


class TestChoice:
    def test_the_mean_and_the_worst_of_each_batch_and_dtype(self):
        right = entries_of(direct=(1, 2), im2col=(2, 3))
        wrong = entries_of(direct=(1, 4), im2col=(2, 1))
        rows = [
            layer(key="a", fastconv=right, uses=[["resnet50", "a", 9]]),
            layer(key="b", fastconv=wrong, layer="conv2"),
            layer(key="c", fastconv=right, dtype="float16"),
            layer(key="d", fastconv=right, batch=32),
        ]
        first, large, half = choice.find_distances(rows)
        assert (first.batch, first.dtype, first.choices) == (1, "float32", 2)
        assert (first.mean, first.worst) == (pytest.approx(2), 4)
        assert first.where == "resnet50 conv2 NCHW: direct, not im2col"
        assert (large.batch, large.dtype, large.mean, large.worst, large.where) == (32, "float32", 1, 1, "")
        assert (half.batch, half.dtype) == (1, "float16")
        shown = table.distance_table("auto", [first, large]).splitlines()
        assert shown[1].split()[-5:] == ["2", "2.000", "<=", "1.05", "4.00"]
        assert "conv2 NCHW: direct, not im2col" in shown[1]

    def test_orders_are_choices_of_their_own_and_other_calls_do_not_count(self):
        entries = [*entries_of(direct=(1, 2), im2col=(2, 3)), ours(call="plain", median=1e-9)]
        other = [{**entry, "order": "NHWC"} for entry in entries_of(direct=(1, 6), im2col=(2, 3))]
        (found,) = choice.find_distances([layer(fastconv=[*entries, *other])])
        assert (found.choices, found.worst) == (2, 2)
        assert "NHWC" in found.where

    def test_a_layer_that_was_cut_short_does_not_count(self):
        assert choice.find_distances([layer(fastconv=[ours(auto=False)]), layer(fastconv=[])]) == []

    def test_the_report_says_it(self):
        entry = command.finish_part("bench", [layer(fastconv=entries_of(direct=(1, 4), im2col=(2, 1)))], 1.0)
        (line,) = [line for line in command.report_part("bench", entry, "H100") if "worst at" in line]
        assert "auto over the fastest algorithm" in line
        assert "resnet50 conv1 NCHW: direct, not im2col" in line


class TestFit:
    """direct is estimated at half of what it takes, so auto takes it where im2col is faster."""

    ROWS = (
        layer(key="a", fastconv=entries_of(direct=(2.0, 4.0), im2col=(3.0, 3.0))),
        layer(key="b", fastconv=entries_of(direct=(1.0, 2.0), im2col=(5.0, 5.0))),
        layer(key="c", batch=32, fastconv=entries_of(direct=(2.0, 4.0), im2col=(3.0, 3.0))),
    )

    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "nvidia-h100.json"
        entry = command.finish_part("bench", list(self.ROWS), 1.0)
        path.write_text(results.to_text({"gpu": "NVIDIA H100", "parts": {"bench": entry}}))
        return path

    def test_ratios_of_each_algorithm(self):
        entries = [ours(key=n, median=(n + 1) * 1e-3) for n in range(20)]
        rows = [layer(key=str(n), fastconv=[entry]) for n, entry in enumerate(entries)]
        rows.append(layer(fastconv=[ours(algorithm="winograd", estimate=2.0, median=1.0)]))
        rows.append(layer(fastconv=[ours(call="plain"), ours(call="prepared + bias + relu", fused=True)]))
        direct, winograd = fit.find_fits(rows)
        assert (direct.algorithm, direct.entries) == ("direct", 20)
        assert (direct.low, direct.high) == (pytest.approx(2), pytest.approx(18))
        assert direct.mean == pytest.approx(math.factorial(20) ** (1 / 20))
        assert winograd == ("winograd", 1, 0.5, 0.5, 0.5)

    def test_a_fit_mends_the_choice(self):
        as_it_is = choice.find_distances(self.ROWS)
        fitted = choice.find_distances(self.ROWS, fit.choose_by(fit.find_fits(self.ROWS)))
        assert [found.worst for found in as_it_is] == [pytest.approx(4 / 3)] * 2
        assert [(found.worst, found.choices) for found in fitted] == [(1, 2), (1, 1)]

    def test_the_command(self, path, capsys):
        assert main(["fit", str(path)]) == 0
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        assert lines[:3] == [
            "measured over estimated entries mean 10 % 90 %",
            "direct 3 2.00 2.00 2.00",
            "im2col 3 1.00 1.00 1.00",
        ]
        at = "resnet50 conv1 NCHW: direct, not im2col"
        assert lines[4:7] == [
            "auto over the fastest, as it is worst at choices mean aim worst",
            f"batch 1 float32 {at} 2 1.155 <= 1.05 1.33",
            f"batch 32 float32 {at} 1 1.333 <= 1.05 1.33",
        ]
        assert lines[8:11] == [
            "with estimates times their means worst at choices mean aim worst",
            "batch 1 float32 2 1.000 <= 1.05 1.00",
            "batch 32 float32 1 1.000 <= 1.05 1.00",
        ]
        assert "in fastconv/gpu/direct.py by 2.00, in fastconv/gpu/im2col.py by 1.00;" in lines[12]

    def test_every_algorithm_has_the_constant_that_is_named(self):
        for name in work.algorithms():
            assert import_module(f"fastconv.gpu.{name}").EFFICIENCY

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "there is no such file"),
            ('{"gpu": ', "not a file of results"),
            ("[1]", "not a file of results"),
            (
                '{"gpu": "a", "parts": {"verify": {"rows": []}}}',
                'has no part "bench"; make gpu PART=bench adds',
            ),
            ('{"gpu": "a", "parts": {"bench": {"rows": []}}}', 'its part "bench" has no estimates'),
        ],
    )
    def test_a_file_with_nothing_to_fit(self, tmp_path, capsys, text, message):
        path = tmp_path / "a.json"
        if text is not None:
            path.write_text(text)
        assert main(["fit", str(path)]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith(f"python -m bench fit: {path}: ")
        assert message in shown
        assert shown.count("\n") == 1

    def test_rows_of_a_cpu(self, tmp_path, capsys):
        """Those of the last run; only how algorithms stand to each other is to be changed."""
        path = tmp_path / "layers.jsonl"
        of_layer = {"kind": "layer", "network": "net", "layer": "conv", "uses": [["net", "conv", 1]]}
        of_layer |= {"batch": 1, "dtype": "float32", "order": "NCHW", "key": "a", "run": "now"}
        direct = {**of_layer, "algorithm": "direct", "auto": True, "estimate": 1.0, "median": 4.0}
        im2col = {**of_layer, "algorithm": "im2col", "auto": False, "estimate": 2.0, "median": 2.0}
        write(path, [{**direct, "run": "before", "median": 9.0}, direct, im2col])
        assert main(["fit", str(path)]) == 0
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        assert lines[1:3] == ["direct 1 4.00 4.00 4.00", "im2col 1 1.00 1.00 1.00"]
        assert lines[5] == "batch 1 float32 net conv NCHW: direct, not im2col 1 2.000 <= 1.05 2.00"
        assert lines[8] == "batch 1 float32 1 1.000 <= 1.05 1.00"
        assert "of fastconv/cpu/direct.py by 2.00, of fastconv/cpu/im2col.py by 0.50. All" in lines[-1]
        write(path, [direct, {**of_layer, "algorithm": "direct", "run": "later"}])
        assert main(["fit", str(path)]) == 2
        assert "its last run has no estimates" in capsys.readouterr().err

    def test_entries_of_an_older_run_have_no_estimates(self, path):
        path.write_text(path.read_text().replace('"estimate"', '"guess"', 1))
        with pytest.raises(ValueError, match="has no estimates"):
            fit.read_layers(path)


class TestTable:
    def test_columns_stand_below_each_other(self):
        header, first, second = table.format_table(["a", "n"], [["long", "1"], ["b", "100"]]).splitlines()
        assert (header, first, second) == ("a       n", "long    1", "b     100")

    def test_a_line_per_order_with_the_ratios_of_all_algorithms(self):
        entries = [
            ours(),
            ours(algorithm="im2col", auto=False, median=2e-3),
            ours(call="plain", median=4e-3),
            ours(order="NHWC", median=5e-4),
        ]
        cudnn = [theirs(), theirs(tf32=True, median=1e-3, order="NHWC")]
        row = layer(label="7x7", fastconv=entries, cudnn=cudnn)
        assert [" ".join(line.split()) for line in table.layer_table([row]).splitlines()] == [
            "layer tile batch dtype order direct im2col us GFLOP/s GB/s cuDNN us in plain fused TF32",
            "resnet50 conv1 7x7 direct a 1 float32 NCHW 2.00* 1.00 1000.0 1000 1 2000.0 NCHW 0.50 - 1.00",
            "resnet50 conv1 7x7 direct a 1 float32 NHWC 4.00* - 500.0 2000 2 2000.0 NCHW - - 2.00",
        ]

    def test_dtypes_stand_apart(self):
        found = [layer(key="a", dtype="float16", batch=1), layer(key="b", batch=32)]
        lines = [line.split() for line in table.layer_table(found).splitlines()[1:]]
        assert [line[6:8] for line in lines] == [["32", "float32"], ["1", "float16"]]
        means = targets.find_means(found, ["resnet50"])
        assert [mean.what for mean in means] == ["resnet50 batch 32 float32", "resnet50 batch 1 float16"]

    def test_a_layer_without_cudnn(self):
        line = table.layer_table([layer(cudnn=[])]).splitlines()[1]
        assert line.split()[-9:] == ["-*", "1000.0", "1000", "1", "-", "-", "-", "-", "-"]

    def test_targets(self):
        shown = table.target_table(targets.find_targets([layer()]), "NVIDIA L4")
        assert "stated for an H100" in shown
        assert any(line.split()[-3:] == ["0.8", "2.00", "met"] for line in shown.splitlines())

    def test_what_failed_and_what_was_left_out_is_listed(self):
        rows = [
            {"kind": "compiled", "algorithm": "direct", "kernels": 3, "registers": 96, "spilled": {"k": 8},
             "passed": True, "reason": ""},
            {"kind": "checked", "network": "net", "layer": "a", "key": "n1", "algorithm": "direct",
             "results": 4, "against": "torch", "error": 3.0, "passed": False, "reason": "tile b: 3 times"},
            {"kind": "repeated", "algorithm": "direct", "key": "n1", "tile": "b", "runs": 1000,
             "differing": 1, "passed": False, "reason": "1 of 1000 runs differ from the first"},
            {"kind": "left_out", "network": "net", "layer": "b", "batch": 32, "reason": "late"},
            {"kind": "left_out", "reason": "no compute-sanitizer"},
        ]  # fmt: skip
        assert table.summary_lines(rows) == [
            "direct: 3 kernels compiled, at most 96 registers, 1 use local memory",
            "direct: 4 results of 1 layers against torch, worst error 3 of its bound",
            "direct: 1 plans, 1000 runs, 1 differ from the first of their plan",
            "FAILED checked net a n1 direct: tile b: 3 times",
            "FAILED repeated n1 direct b: 1 of 1000 runs differ from the first",
            "left out: late (1 layers)",
            "  net b batch 32",
            "left out: no compute-sanitizer",
        ]


class TestCompile:
    def test_every_algorithm_has_kernels_for_every_dtype(self):
        for name in work.sources():
            kernels = [kernel for dtype in ITEMSIZE for kernel in work.kernels_of(name, dtype)]
            assert len({kernel.name for kernel in kernels}) == len(kernels)
            assert {kernel.name.split("_")[1] for kernel in kernels} == {"f32", "f64", "f16", "bf16"}

    def test_a_kernel_that_does_not_compile_fails(self):
        good = Compiled("direct", "k1", 1.0, registers=40, local=8)
        bad = Compiled("direct", "k2", 0.5, reason="CompileException: line 3")
        row, other = compile.summarise([good, bad, Compiled("im2col", "k3", 1.0, 64)])
        assert (row["kernels"], row["registers"], row["spilled"]) == (2, 40, {"k1": 8})
        assert not row["passed"]
        assert row["reason"] == "k2: CompileException: line 3"
        assert other["passed"]

    def test_every_pair_of_settings_is_compiled_before_the_rest(self):
        found = [kernel.name for _, kernel in compile.find_kernels()]
        sets = [work.kernels_of(name, dtype) for name in work.sources() for dtype in ITEMSIZE]
        covers = [kernel.name for kernels in sets for kernel in work.cover(kernels)]
        assert found[: len(covers)] == covers
        assert sorted(found) == sorted(kernel.name for kernels in sets for kernel in kernels)

    def test_nothing_to_compile_is_a_failure(self, monkeypatch):
        monkeypatch.setattr(compile, "sources", list)
        assert [row["kind"] for row in compile.run(Deadline(1))] == ["failure"]


class TestVerify:
    @pytest.mark.parametrize(
        ("code", "status"), [("def test_it(): pass", 0), ("def test_it(): assert 0, 'seen'", 1), ("", 5)]
    )
    def test_pytest_must_pass_and_find_tests(self, tmp_path, code, status):
        path = tmp_path / "test_it.py"
        path.write_text(code)
        row = verify.run_tests(Deadline(60), ["-m", "pytest", str(path), "-q", "-p", "no:cacheprovider"])
        assert (row["kind"], row["status"], row["passed"]) == ("tests", status, status == 0)
        assert ("seen" in row["reason"]) == (status == 1)
        assert row["summary"].startswith(("1 passed", "1 failed", "no tests ran"))

    def test_tests_that_were_stopped_have_failed(self):
        """One of them may have failed before, or hung."""
        row = verify.run_tests(Deadline(0), ["-c", "import time; time.sleep(600)"])
        assert not row["passed"]
        assert not results.passed([row])
        assert "did not end within 0 s" in row["reason"]

    def test_a_layer_with_every_algorithm_tile_and_order(self, emulated):
        rows = list(verify.check_case(CASE, verify.NumpyJudge))
        plans = {name: possible_plans(TINY, name, "gpu") for name in work.algorithms()}
        assert {row["algorithm"]: row["results"] for row in rows} == {
            name: 2 * len(found) for name, found in plans.items() if found
        }
        assert rows
        assert all(row["passed"] and row["error"] > 0 for row in rows)

    def test_one_wrong_element_fails(self, emulated, monkeypatch):
        def run_wrong(plan, x, weight, out):
            out[...] = reference.conv2d(x, weight, padding=1)
            if plan.problem.order == "NHWC":
                out[0, 5, 8, 8] += 0.01

        monkeypatch.setattr(work, "run_plan", run_wrong)
        for row in verify.check_case(CASE, verify.NumpyJudge):
            assert not row["passed"]
            assert "NHWC" in row["reason"]
            assert "(0, 5, 8, 8)" in row["reason"]

    def test_what_does_not_fit_into_the_time_is_counted(self, emulated, clock, monkeypatch):
        def check_slowly(case, make_judge):
            clock.now += 2
            yield {"kind": "checked"}

        monkeypatch.setattr(verify, "check_case", check_slowly)
        *rows, last = verify.check_cases([CASE] * 5, verify.NumpyJudge, Deadline(3, clock))
        assert len(rows) == 2
        assert last["reason"] == "3 of 5 layers were not verified in time"

    def test_what_does_not_fit_into_the_memory_is_named(self, emulated, monkeypatch):
        monkeypatch.setattr(device, "total_memory", lambda: verify.COPIES * TINY.bytes - 1)
        (row,) = verify.check_cases([CASE], verify.NumpyJudge, Deadline(60))
        assert (row["kind"], row["layer"], row["batch"]) == ("left_out", "conv1", 1)

    def test_what_is_timed_at_the_larger_batch_is_verified_too(self, monkeypatch):
        pytest.importorskip("torch", reason="torch is not installed")
        seen = []
        monkeypatch.setattr(verify, "run_tests", lambda deadline: TESTS_PASSED)
        monkeypatch.setattr(device, "has_torch", lambda: True)
        monkeypatch.setattr(verify, "check_cases", lambda found, judge, deadline: seen.extend(found) or [])
        list(verify.run(Deadline(9)))
        large = {(case.network, case.problem.N) for case in seen if case.problem.N > 1}
        assert large == {(name, 32) for name in (*layers.SUITE, *layers.GROUPED)}

    @pytest.mark.parametrize("reach", [0, 3])
    @pytest.mark.parametrize("problem", [
        TINY,
        make_problem("conv2d", (2, 6, 8, 9), (4, 3, 3, 2), stride=2, padding=(2, 1), groups=2, dilation=2),
        make_problem("conv1d", (2, 3, 17), (5, 3, 3), padding=1),
        make_problem("conv1d", (2, 6, 17), (6, 1, 4), padding=((3, 0),), groups=6),
        make_problem("conv2d", (1, 2, 9, 8), (3, 2, 4, 3), padding=((3, 1), (2, 2)), stride=(2, 1)),
        make_problem("conv3d", (1, 2, 5, 6, 7), (3, 2, 3, 3, 3), padding=1),
    ], ids=str)  # fmt: skip
    def test_torch_judges_as_the_reference_does(self, problem, reach):
        torch_side = pytest.importorskip("bench.gpu.torch_side", reason="torch is not installed")
        x, weight = workload.make_arrays(problem)
        bound = ErrorBound(factor=4, reach=reach)
        torch_judge, oracle = torch_side.TorchJudge(problem, x, weight), Oracle(problem, x, weight)
        y = oracle.expected.astype(np.float32)
        for _ in range(2):
            verdict, expected = torch_judge.judge(y, bound), oracle.judge(y, bound)
            assert verdict.error == pytest.approx(expected.error, rel=1e-6)
            assert verdict.passed == expected.passed
            y[1 % len(y), 2] += np.float32(1e-3)
        assert not verdict.passed

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_torch_lets_no_nan_pass(self, value):
        torch_side = pytest.importorskip("bench.gpu.torch_side", reason="torch is not installed")
        x, weight = workload.make_arrays(TINY)
        judge = torch_side.TorchJudge(TINY, x, weight)
        y = Oracle(TINY, x, weight).expected.astype(np.float32)
        y[0, 2, 3, 4] = value
        verdict = judge.judge(y, ErrorBound(4, 0))
        assert not verdict.passed
        json.dumps(verdict.error, allow_nan=False)
        assert "(0, 2, 3, 4)" in verdict.reason
        assert not judge.judge(y[:, :5], ErrorBound(1e300, 0)).passed


class FakeRaces:
    """Counts what repeat_plan does; the run with the number `wrong` differs."""

    def __init__(self, wrong, out):
        self.wrong, self.out = wrong, out
        self.runs = self.found = 0

    def disturb(self, number):
        assert number == self.runs
        self.out.fill(np.nan)

    def compare(self):
        assert not np.isnan(self.out).any()
        self.found += self.runs == self.wrong
        self.runs += 1

    def differing(self):
        return self.found


class TestRepeat:
    @pytest.fixture
    def plan(self, emulated, monkeypatch):
        monkeypatch.setattr(work, "run_plan", lambda plan, x, weight, out: out.fill(1))
        return next(work.sample_plans(("float32",)))

    def test_a_thousand_equal_runs_pass(self, plan):
        row = repeat.repeat_plan(plan, Deadline(1e9), partial(FakeRaces, -1))
        assert (row["runs"], row["differing"], row["passed"]) == (1000, 0, True)

    def test_one_run_that_differs_fails(self, plan):
        row = repeat.repeat_plan(plan, Deadline(1e9), partial(FakeRaces, 999))
        assert not row["passed"]
        assert row["reason"] == "1 of 1000 runs differ from the first"

    def test_plans_that_were_not_run_to_the_end_are_counted(self, plan, clock, monkeypatch):
        def repeat_plan(plan, deadline):
            clock.now += 2
            return {"kind": "repeated", "runs": 50 if deadline.is_over() else repeat.RUNS}

        monkeypatch.setattr(repeat, "repeat_plan", repeat_plan)
        monkeypatch.setattr(work, "sample_plans", lambda dtypes: [plan] * 5)
        *rows, last = repeat.run(Deadline(3, clock))
        assert [row["runs"] for row in rows] == [1000, 50]
        assert last["reason"] == "4 of 5 plans were not run 1000 times in time"

    def test_a_run_ends_at_its_deadline(self, plan, clock):
        deadline = Deadline(0, clock)
        assert repeat.repeat_plan(plan, deadline, partial(FakeRaces, -1))["runs"] == repeat.BLOCK

    def test_samples_try_every_tile_of_every_algorithm_in_both_orders(self, emulated):
        tried = {(p.algorithm.name, p.tile, p.problem.order) for p in work.sample_plans(("float32",))}
        for name in work.algorithms():
            tiles = {tile for algorithm, tile, _ in tried if algorithm == name}
            assert {(name, tile, order) for tile in tiles for order in ("NCHW", "NHWC")} <= tried
            assert tiles


CLEAN = "========= COMPUTE-SANITIZER\nplan 1 of 2: a\nplan 2 of 2: b\n========= ERROR SUMMARY: 0 errors\n"


class TestSanitize:
    def test_a_clean_run_passes(self):
        row = sanitize.judge_output("memcheck", 0, CLEAN)
        assert (row["passed"], row["plans"], row["summary"]) == (True, 2, "ERROR SUMMARY: 0 errors")

    @pytest.mark.parametrize(
        ("status", "text"),
        [
            (9, CLEAN.replace("0 errors", "1 error")),
            (0, CLEAN.replace("plan 2 of 2: b\n", "")),
            (0, "========= ERROR SUMMARY: 0 errors\n"),
            (0, "plan 1 of 1: a\n"),
            (1, "Unable to start the application"),
        ],
    )
    def test_findings_and_runs_that_did_nothing_fail(self, status, text):
        row = sanitize.judge_output("memcheck", status, text)
        assert not row["passed"]
        assert row["reason"]

    def test_a_tool_is_run_and_judged(self):
        code = f"print({CLEAN!r})"
        assert sanitize.run_tool("memcheck", [sys.executable, "-c", code], Deadline(60))["passed"]

    def test_a_tool_that_takes_too_long_says_how_far_it_came(self):
        code = "import time; print('plan 3 of 9: a', flush=True); time.sleep(600)"
        row = sanitize.run_tool("racecheck", [sys.executable, "-c", code], Deadline(2))
        assert row["kind"] == "left_out"
        assert row["reason"] == "racecheck was stopped after 2 s, 3 of 9 plans had run"

    def test_without_the_tool_that_is_said(self, monkeypatch):
        monkeypatch.setattr(sanitize, "SANITIZER_PATH", "")
        (row,) = sanitize.run(Deadline(1))
        assert row["kind"] == "left_out"

    def test_every_tool_has_its_share_of_the_time(self, clock, monkeypatch):
        limits = []

        def run_tool(tool, command, deadline):
            limits.append(deadline.seconds)
            assert command[1:5] == ["--tool", tool, "--error-exitcode", "9"]
            return {"kind": "sanitized"}

        monkeypatch.setattr(sanitize, "run_tool", run_tool)
        monkeypatch.setattr(sanitize.shutil, "which", lambda name, path: name)
        assert len(list(sanitize.run(Deadline(60, clock)))) == 4
        assert limits == [15, 20, 30, 60]


class TestLayers:
    def test_the_networks_of_the_targets_come_first_and_nothing_is_forgotten(self):
        first, grouped, half, *tf32, others, last = layers.passes(has_torch=True)
        assert [each.cases for each in tf32] == [first.cases, grouped.cases]
        assert others.cases is last.cases
        for each in (first, grouped, half, others):
            assert list(each.sides) == ["fastconv", "cudnn"]
        assert [list(each.sides) for each in (*tf32, last)] == [["cudnn"]] * 3
        timed = {(use[0], case.problem.N) for case in first.cases for use in case.uses}
        assert {(name, batch) for name in layers.SUITE for batch in layers.BATCHES} <= timed
        counts = [count for case in first.cases for name, _, count in case.uses if name == "resnet50"]
        assert sum(counts) == 2 * 53
        every, _ = cases.collect(cases.all_networks())
        small = [case for case in [*first.cases, *grouped.cases, *others.cases] if case.problem.N == 1]
        assert {case.problem for case in small} == {case.problem for case in every}
        assert len(small) == len(every)

    def test_layers_with_groups_are_timed_at_both_batches(self):
        _, grouped, half, *_ = layers.passes(has_torch=True)
        depthwise = {"convnext_t": 18, "replknet_31b": 29, "mamba": 1}
        for each, dtype, networks in (
            (grouped, "float32", {**depthwise, "resnext50_32x4d": 16}),
            (half, "float16", {**depthwise, "mobilenet_v1": 13}),
        ):
            assert self.counts(each, dtype) == {
                (name, n): networks[name] for name in networks for n in (1, 32)
            }
        assert all(case.problem.groups == case.problem.C for case in half.cases)
        large = [case for case in grouped.cases if case.problem.N == 32]
        assert [case for case in layers.large_cases() if case.network in layers.GROUPED] == large

    @staticmethod
    def counts(each, dtype):
        """How many layers of each network and batch a pass stands for."""
        assert {case.problem.dtype for case in each.cases} == {dtype}
        found = Counter()
        for case in each.cases:
            for name, _, count in case.uses:
                found[name, case.problem.N] += count
        return found

    def test_without_torch_fastconv_is_timed_alone(self):
        sides = [list(each.sides) for each in layers.passes(has_torch=False)]
        assert sides == [["fastconv"]] * 4

    def test_the_copy_is_timed_as_a_layer_is_and_kept(self, clock, monkeypatch):
        gpu = FakeGpu(clock)
        monkeypatch.setattr(device, "make_copy", lambda size: lambda: gpu.enqueue(size / 1e12))
        monkeypatch.setattr(device, "has_torch", lambda: False)
        monkeypatch.setattr(device, "CudaEvents", lambda: gpu)
        monkeypatch.setattr(layers, "measure", partial(stopwatch.measure, clock=clock))
        monkeypatch.setattr(layers, "passes", lambda has_torch: [])
        _, copy = layers.run(Deadline(9, clock))
        assert copy == {"kind": "copy", "bytes": 1 << 28, "median": 2.684e-4, "gbs": 2000}
        assert gpu.flushed > 5
        assert "copy of 256 MiB: 2000 GB/s" in table.summary_lines([copy])

    @pytest.fixture
    def timed(self, emulated, monkeypatch, clock):
        """Every call takes a second, and what it returns is its time."""

        def measure(gpu, call):
            clock.now += 1
            return stopwatch.Times((call(),))

        monkeypatch.setattr(layers, "measure", measure)

    @staticmethod
    def one_pass(**sides):
        """A pass over one case; each side is a list of calls."""

        def make(calls):
            return lambda case, x, weight, bias: [({"call": "conv", "order": "NCHW"}, call) for call in calls]

        return layers.Pass("first", [CASE], {name: make(calls) for name, calls in sides.items()})

    def test_a_row_holds_the_times_of_both_sides(self, timed, clock):
        each = self.one_pass(fastconv=[lambda: 1e-3], cudnn=[lambda: 2e-3, lambda: 3e-3])
        (row,) = layers.run_pass(each, None, Deadline(9, clock))
        assert (row["batch"], row["C"], row["K"], row["key"]) == (1, 4, 6, TINY.key)
        assert (row["kernel"], row["groups"], row["dtype"]) == ([3, 3], 1, "float32")
        assert [entry["median"] for entry in row["fastconv"]] == [1e-3]
        assert [entry["min"] for entry in row["cudnn"]] == [2e-3, 3e-3]

    def test_the_deadline_cuts_a_case_short_and_says_so(self, timed, clock):
        each = self.one_pass(fastconv=[lambda: 1e-3], cudnn=[lambda: 2e-3, lambda: 3e-3])
        row, left_out = layers.run_pass(each, None, Deadline(2, clock))
        assert [len(row["fastconv"]), len(row["cudnn"])] == [1, 1]
        assert left_out["reason"] == "first: no time was left for some calls"

    def test_cases_that_were_not_reached_are_named(self, timed, clock):
        each = self.one_pass(fastconv=[lambda: 1e-3])._replace(cases=[CASE] * 3)
        row, *left_out = layers.run_pass(each, None, Deadline(1, clock))
        assert row["kind"] == "layer"
        assert [(missing["layer"], missing["batch"]) for missing in left_out] == [("conv1", 1)] * 2

    def test_what_cudnn_refuses_is_left_out_and_what_fastconv_refuses_is_an_error(self, timed, clock):
        def refuse():
            raise RuntimeError("not supported\ntrace")

        each = self.one_pass(fastconv=[], cudnn=[refuse, lambda: 1e-3])
        row, left_out = layers.run_pass(each, None, Deadline(9, clock))
        assert len(row["cudnn"]) == 1
        assert left_out["reason"] == "first: cudnn conv NCHW: not supported"
        with pytest.raises(RuntimeError, match="not supported"):
            list(layers.run_pass(self.one_pass(fastconv=[refuse]), None, Deadline(9, clock)))

    def test_a_gpu_with_too_little_memory(self, timed, clock):
        def fill():
            raise MemoryError("411 MB")

        each = self.one_pass(fastconv=[lambda: 1e-3, fill], cudnn=[lambda: 2e-3])
        row, left_out = layers.run_pass(each, None, Deadline(9, clock))
        assert [len(row["fastconv"]), len(row["cudnn"])] == [1, 0]
        assert "memory is too small: 411 MB" in left_out["reason"]

    def test_a_pass_ends_in_the_table(self, emulated, monkeypatch):
        """Both sides for real, but for the clock; cudnn_convolution_relu, not there on a CPU, is left out."""
        pytest.importorskip("torch", reason="torch is not installed")

        def measure(gpu, call):
            call()
            return stopwatch.Times((1e-3,))

        monkeypatch.setattr(layers, "measure", measure)
        each = layers.passes(has_torch=True)[0]._replace(cases=[CASE])
        row, *left_out = results.merge(list(layers.run_pass(each, None, Deadline(600))))
        assert {entry["call"] for entry in row["cudnn"]} == {"conv", "relu_(conv + bias)"}
        assert {entry["ratio"] for entry in row["fastconv"]} == {1}
        assert ["cudnn_convolution_relu" in missing["reason"] for missing in left_out] == [True, True]
        assert len(table.layer_table([row]).splitlines()) == 3

    def test_a_causal_layer_in_float16_has_its_row(self, emulated, monkeypatch):
        """Both sides for real again; every entry of fastconv computes the same as torch."""
        pytest.importorskip("torch", reason="torch is not installed")
        outputs = []

        def measure(gpu, call):
            outputs.append(np.asarray(call(), np.float32))
            return stopwatch.Times((1e-3,))

        monkeypatch.setattr(layers, "measure", measure)
        shapes = (2, 6, 17), (6, 1, 4)
        causal = make_problem("conv1d", *shapes, padding=((3, 0),), groups=6, dtype="float16")
        each = layers.passes(has_torch=True)[2]._replace(cases=[replace(CASE, problem=causal)])
        (row,) = results.merge(list(layers.run_pass(each, None, Deadline(600))))
        assert row["dtype"] == "float16"
        entries = row["fastconv"] + row["cudnn"]
        assert [entry["call"] for entry in row["cudnn"]] == ["conv", "relu_(conv + bias)"]
        for fused in (False, True):
            same = [y for y, entry in zip(outputs, entries, strict=True) if entry["fused"] == fused]
            for y in same[:-1]:
                np.testing.assert_allclose(y, same[-1], rtol=1e-2, atol=4e-3)

    def test_calls_of_fastconv(self, emulated):
        found = list(layers.fastconv_calls(CASE, *device.make_arrays(TINY)))
        expected = np.maximum(reference.conv2d(*workload.make_arrays(TINY), padding=1) + 1, 0)
        for order in ("NCHW", "NHWC"):
            entries = [columns for columns, _ in found if columns["order"] == order]
            prepared = [entry for entry in entries if entry["call"] == "prepared"]
            accepting = [name for name in work.algorithms() if possible_plans(TINY, name, "gpu")]
            assert [entry["algorithm"] for entry in prepared] == accepting
            assert sum(entry["auto"] for entry in prepared) == 1
            for entry in entries:
                plan = make_plan(TINY_IN[order], entry["algorithm"], "gpu")
                assert entry["estimate"] == pytest.approx(plan.cost(), rel=1e-3)
            (chosen,) = (entry["estimate"] for entry in prepared if entry["auto"])
            assert chosen == min(entry["estimate"] for entry in prepared)
            assert [entry["call"] for entry in entries[len(prepared) :]] == [
                "plain",
                "prepared + bias + relu",
            ]
        fused = [call for columns, call in found if columns["fused"]]
        assert len(fused) == 2
        for call in fused:
            np.testing.assert_allclose(call(), expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("tf32", [False, True])
    def test_calls_of_cudnn(self, tf32):
        """On the CPU, where torch computes the same."""
        torch_side = pytest.importorskip("bench.gpu.torch_side", reason="torch is not installed")
        problem = make_problem("conv2d", (2, 6, 8, 9), (4, 3, 3, 2), stride=2, padding=(2, 1), groups=2)
        x, weight = workload.make_arrays(problem)
        bias = np.ones(problem.K, np.float32)
        found = list(torch_side.cudnn_calls(problem, x, weight, bias, tf32))
        assert torch_side.torch.backends.cudnn.allow_tf32 is tf32
        names = ["conv", "relu_(conv + bias)", "cudnn_convolution_relu"]
        assert [(columns["order"], columns["call"]) for columns, _ in found] == [
            (order, name) for order in ("NCHW", "NHWC") for name in names
        ]
        expected = reference.conv2d(x, weight, stride=2, padding=(2, 1), groups=2)
        for columns, call in found:
            if columns["call"] == "conv":
                np.testing.assert_allclose(call().numpy(), expected, rtol=1e-4, atol=1e-4)
            elif columns["call"] == "relu_(conv + bias)":
                np.testing.assert_allclose(call().numpy(), np.maximum(expected + 1, 0), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_cudnn_computes_a_causal_convolution_in_the_dtype_of_the_case(self, dtype):
        torch_side = pytest.importorskip("bench.gpu.torch_side", reason="torch is not installed")
        problem = make_problem("conv1d", (2, 6, 17), (6, 1, 4), padding=((3, 0),), groups=6, dtype=dtype)
        x, weight = workload.make_arrays(problem)
        bias = np.ones(problem.K, dtype)
        expected = reference.conv1d(x, weight, padding=((3, 0),), groups=6)
        found = list(torch_side.cudnn_calls(problem, x, weight, bias, tf32=False))
        assert [columns["call"] for columns, _ in found] == ["conv", "relu_(conv + bias)"]
        for columns, call in found:
            y = call().numpy()
            assert y.dtype == dtype
            wanted = np.maximum(expected + 1, 0) if columns["fused"] else expected
            np.testing.assert_allclose(y, wanted, rtol=1e-2, atol=2e-3 if dtype == "float16" else 1e-4)

    def test_torch_does_not_pad_more_behind(self):
        with pytest.raises(ValueError, match="torch pads no more behind than before"):
            workload.as_torch(make_problem("conv1d", (2, 6, 17), (6, 6, 4), padding=((0, 3),)))
