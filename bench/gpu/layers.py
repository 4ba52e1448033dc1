"""Times the layers of the networks: every algorithm of fastconv, and cuDNN through torch.

A row per layer and pass leaves; `results.merge` joins the passes. Order of passes: the dense networks of the
targets and MobileNet with TF32 off, depthwise and grouped layers, depthwise layers in float16, the same with
TF32 on, then the other networks, as far as the time reaches.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import fastconv
from bench.cases import Case, all_networks, collect
from bench.gpu import device, work
from bench.gpu.clock import Deadline
from bench.gpu.stopwatch import Gpu, measure
from bench.rows import Row
from bench.timing import Times
from bench.workload import keywords, make_call
from fastconv.algorithms import TABLE
from fastconv.plan import make_plan, why_refused

SUITE = ("resnet50", "vgg16", "mobilenet_v1")
GROUPED = ("convnext_t", "replknet_31b", "resnext50_32x4d", "mamba")  # their layers that have groups
HALF = ("mobilenet_v1", "convnext_t", "replknet_31b", "mamba")  # their depthwise layers, in float16
BATCHES = (1, 32)
COPIED = 256 << 20  # bytes

Call = Callable[[], Any]
Side = Callable[[Case, Any, Any, Any], Iterator[tuple[Row, Call]]]  # (case, x, weight, bias)


class Pass(NamedTuple):
    """Cases that are timed one after the other, and the sides that are timed on each."""

    name: str
    cases: Sequence[Case]
    sides: dict[str, Side]


def run(deadline: Deadline) -> Iterator[Row]:
    """A `layer` row per case and pass; what was not reached is a `left_out` row."""
    has_torch = device.has_torch()
    if has_torch:
        from bench.gpu import torch_side

        torch_side.set_up()
    else:
        yield {
            "kind": "left_out",
            "reason": "there is no torch that can use the GPU, so nothing to compare with",
        }
    gpu = device.CudaEvents()
    yield time_copy(gpu)
    with tempfile.TemporaryDirectory(prefix="fastconv-") as store:
        os.environ["FASTCONV_CACHE"] = store  # auto is then the table's choice, not what this user has tuned
        for each in passes(has_torch):
            yield from run_pass(each, gpu, deadline)


def time_copy(gpu: Gpu) -> Row:
    """A `copy` row: the rate at which the GPU's memory is read and written, timed as the layers are."""
    seconds = measure(gpu, device.make_copy(COPIED)).median
    rate = _short(2 * COPIED / seconds / 1e9)  # each byte is read and written
    return {"kind": "copy", "bytes": COPIED, "median": _short(seconds), "gbs": rate}


def passes(has_torch: bool) -> list[Pass]:
    """All there is to time, the most asked-for first."""
    small, _ = collect(list(dict.fromkeys([*SUITE, *GROUPED, *all_networks()])))
    cases = [*small, *large_cases()]
    suite = [case for case in cases if case.network in SUITE]
    grouped = [case for case in cases if _is_grouped(case)]
    others = [case for case in small if case.network not in SUITE and not _is_grouped(case)]
    first: dict[str, Side] = {"fastconv": fastconv_calls}
    if has_torch:
        first["cudnn"] = _cudnn_side(tf32=False)
    again = {"cudnn": _cudnn_side(tf32=True)}
    found = [
        Pass("suite, TF32 off", suite, first),
        Pass("depthwise and grouped, TF32 off", grouped, first),
        Pass("depthwise, float16", half_cases(), first),
        Pass("suite, TF32 on", suite, again),
        Pass("depthwise and grouped, TF32 on", grouped, again),
        Pass("other networks, TF32 off", others, first),
        Pass("other networks, TF32 on", others, again),
    ]
    return [each for each in found if has_torch or each.sides is first]


def large_cases() -> list[Case]:
    """What is timed in float32 at the larger batch."""
    cases, _ = collect([*SUITE, *GROUPED], BATCHES[1])
    return [case for case in cases if case.network in SUITE or _is_grouped(case)]


def half_cases() -> list[Case]:
    """What is timed in float16, at either batch."""
    cases = [case for batch in BATCHES for case in collect(HALF, batch, "float16")[0]]
    return [case for case in cases if case.problem.groups == case.problem.C > 1]


def _is_grouped(case: Case) -> bool:
    return case.network in GROUPED and case.problem.groups > 1


def run_pass(each: Pass, gpu: Gpu, deadline: Deadline) -> Iterator[Row]:
    """The rows of one pass; a case that has begun is finished, unless the deadline cuts it short."""
    print(f"{each.name}: {len(each.cases)} layers", flush=True)
    for number, case in enumerate(each.cases):
        if deadline.is_over():
            for missing in each.cases[number:]:
                yield _left_out(missing, f"{each.name}: no time was left")
            return
        yield from run_case(each, case, gpu, deadline)


def run_case(each: Pass, case: Case, gpu: Gpu, deadline: Deadline) -> Iterator[Row]:
    """One row with the times of all calls, and a `left_out` row per reason why some are missing."""
    times, missing = time_sides(each, case, gpu, deadline)
    device.free_memory()
    p = case.problem
    sizes = {"C": p.C, "K": p.K, "kernel": list(p.weight_shape[2:]), "groups": p.groups}
    yield {"kind": "layer", **case.columns(), **sizes, "dtype": p.dtype, "batch": p.N, **times}
    for reason in missing:
        yield _left_out(case, f"{each.name}: {reason}")


def time_sides(
    each: Pass, case: Case, gpu: Gpu, deadline: Deadline
) -> tuple[dict[str, list[Row]], list[str]]:
    """The entries of each side, and why there are not more of them."""
    times: dict[str, list[Row]] = {"fastconv": [], "cudnn": []}
    missing: list[str] = []
    try:
        arrays = device.make_arrays(case.problem)
        for side, calls in each.sides.items():
            for columns, call in calls(case, *arrays):
                if deadline.is_over():
                    return times, [*missing, "no time was left for some calls"]
                entry, reason = time_call(gpu, call, can_refuse=side == "cudnn")
                if reason:
                    missing.append(f"{side} {columns['call']} {columns['order']}: {reason}")
                else:
                    times[side].append({**columns, **entry})
    except MemoryError as error:
        missing.append(f"the GPU's memory is too small: {error}")
    return times, missing


def time_call(gpu: Gpu, call: Call, can_refuse: bool) -> tuple[Row, str]:
    """The columns of a call's times, or why there are none; only cuDNN may refuse."""
    try:
        return _columns(measure(gpu, call)), ""
    except RuntimeError as error:
        if not can_refuse:
            raise
        return {}, str(error).partition("\n")[0]


def _columns(times: Times) -> Row:
    return {"median": _short(times.median), "min": _short(times.minimum), "samples": len(times.samples)}


def _short(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def fastconv_calls(case: Case, x: Any, weight: Any, bias: Any) -> Iterator[tuple[Row, Call]]:
    """Per order: every algorithm, its weight prepared; auto as a plain call; auto with bias and ReLU."""
    for problem in work.in_both_orders(case.problem):
        ordered = device.in_order(x, problem.order)
        auto = make_plan(problem, backend="gpu")
        for name in TABLE:
            if why_refused(problem, name, "gpu") is None:
                plan = make_plan(problem, name, "gpu")
                columns = _ours(plan, "prepared", is_auto=name == auto.algorithm.name)
                yield columns, make_call(problem, ordered, weight, name, prepared=True)
        yield _ours(auto, "plain", is_auto=True), make_call(problem, ordered, weight, "auto", prepared=False)
        make_layer = getattr(fastconv, problem.op.capitalize())
        layer = make_layer(weight, bias, **keywords(problem), activation="relu")
        yield _ours(auto, "prepared + bias + relu", is_auto=True), _bind(layer, ordered)


def _bind(layer: Callable[[Any], Any], x: Any) -> Call:
    return lambda: layer(x)


def _ours(plan: Any, call: str, is_auto: bool) -> Row:
    return {
        "order": plan.problem.order, "algorithm": plan.algorithm.name, "tile": str(plan.tile),
        "auto": is_auto, "call": call, "fused": "relu" in call, "estimate": _short(plan.cost()),
    }  # fmt: skip


def _cudnn_side(tf32: bool) -> Side:
    def calls(case: Case, x: Any, weight: Any, bias: Any) -> Iterator[tuple[Row, Call]]:
        from bench.gpu import torch_side

        return torch_side.cudnn_calls(case.problem, x, weight, bias, tf32)

    return calls


def _left_out(case: Case, reason: str) -> Row:
    return {
        "kind": "left_out", "network": case.network, "layer": case.layer, "key": case.problem.key,
        "batch": case.problem.N, "reason": reason,
    }  # fmt: skip
