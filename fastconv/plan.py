"""A problem enters, a Plan leaves: which algorithm runs it, on which backend, with which tile.

Who decides, in this order: the caller's argument, FASTCONV_ALGO, a measurement kept by `tune`, the cost
model. FASTCONV_WORKSPACE (bytes, with K, M or G) bounds what is allocated beside input and output.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastconv import environment, grad_input, measured
from fastconv.algorithms import DIRECT_ERROR, TABLE, Algorithm, ErrorBound
from fastconv.problem import ConvError, ConvProblem, Epilogue, Operands

LARGEST = 1 << 60  # kernels count elements in 64-bit integers
TYPICAL_BATCHES = (1, 32)  # samples; what is best for both decides what no batch may decide by itself
_CHOICES = ("auto", *TABLE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Recipe(NamedTuple):
    """What of a plan decides the bits of its result: names and a number, which hold on any machine.

    multiple  a problem is cut without a change of bits where an output's row and column are multiples of it
    """

    algorithm: str
    bits: Any
    multiple: int


@dataclass(frozen=True)
class Plan:
    """How one problem is computed; made by `make_plan`."""

    problem: ConvProblem
    backend: str
    algorithm: Algorithm
    tile: Any
    device: Any
    module: Any

    def prepare(self, weight: np.ndarray) -> Any:
        """Return the weight (K, C // groups, T, R, S) packed or transformed, to be passed to `run` often.

        It fits every plan with the same `weight_form`. There is none for the gradient of the weight.
        """
        return self.module.prepare(self.problem, self.tile, self.device, weight)

    @cached_property
    def weight_form(self) -> tuple[Any, ...]:
        """What the form of a prepared weight depends on."""
        return self.algorithm.name, getattr(self.tile, "packing", self.tile), self.problem.order, self.device

    @property
    def recipe(self) -> Recipe:
        """Return what another plan, of a part of the problem, needs to give the same bits."""
        return Recipe(self.algorithm.name, _bits_of(self), getattr(self.tile, "m", 1))

    def run(
        self,
        x: np.ndarray,
        weight: Any,
        bias: np.ndarray | None,
        residual: np.ndarray | None,
        epilogue: Epilogue,
        out: np.ndarray,
    ) -> None:
        """Compute out = activation(conv(x, weight) + bias + residual).

        x (N, C, D, H, W), weight (K, C // groups, T, R, S) or prepared, bias (K,), residual and out
        (N, K, O, P, Q): native, aligned, with any strides of whole elements; on the CPU of the problem's
        compute_dtype, on a GPU of its dtype and in the device's memory.

        grad_input: x is the gradient with respect to the output, out that with respect to the input, to which
        bias (C,) and residual belong. grad_weight: weight is the gradient with respect to the output, out
        that with respect to the weight; bias, residual and activation are not applied.
        """
        operands = Operands(x, weight, bias, residual, epilogue, out)
        if self.problem.N:
            self.module.run(self.problem, self.tile, self.device, operands)
        elif self.problem.direction == "grad_weight":
            importlib.import_module(f"fastconv.{self.backend}.memory").clear(out)

    def workspace(self) -> int:
        """Return the bytes that `run` allocates beside input and output."""
        return 0 if self.problem.N == 0 else int(self.module.workspace(self.problem, self.tile, self.device))

    def cost(self) -> float:
        """Return the estimated seconds on one core or on the GPU, at a nominal clock."""
        return 0.0 if self.problem.N == 0 else float(self.module.cost(self.problem, self.tile, self.device))

    def error_bound(self) -> ErrorBound:
        """Return the bound of every element's error."""
        return self.algorithm.error_bound(self.problem, self.tile)

    def __str__(self) -> str:
        return f"{self.algorithm.name} {self.tile} on {self.backend}: {self.problem}"


_forgotten = 0  # how often `forget_plans` was called


def settings(backend: str) -> tuple[Any, ...]:
    """Return what a plan depends on beside its problem: the environment, the GPU and what was measured."""
    return *environment.read_all(), None if backend == "cpu" else _device(backend), _forgotten


def make_plan(
    problem: ConvProblem,
    algo: str = "auto",
    backend: str = "cpu",
    tile: str | None = None,
    *,
    bits: Any = None,
) -> Plan:
    """Choose an algorithm and a tile for a problem.

    algo   "auto" or the name of a row of the table
    tile   a tile by name, as `tiles` lists them; None: the one that the cost model prefers
    bits   of an algorithm that is named: what the tile has to have, as a Recipe says; None: any

    Raises ConvError for an unknown name, for an algorithm that cannot run the problem (with the reason), and
    where nothing that can run it keeps to the workspace limit.
    """
    check_algorithm(problem.op, algo)
    return _make_plan(problem, problem.op, algo, backend, tile, bits, settings(backend))


def check_algorithm(op: str, algo: str) -> None:
    """Raise TypeError for what is no string, ConvError for what is neither "auto" nor a row of the table."""
    if not isinstance(algo, str):
        raise TypeError(f"{op}: algo must be a string, got {algo!r}")
    _check_name(op, "algo", algo, _CHOICES)


@lru_cache(maxsize=4096)
def _make_plan(
    problem: ConvProblem, op: str, algo: str, backend: str, tile: str | None, bits: Any, settings: Any
) -> Plan:
    """Do what `make_plan` does; `settings` are there to be remembered with the plan."""
    _check_sizes(problem, op)
    if algo != "auto":
        return _named_plan(problem, op, algo, backend, tile, bits)
    wanted = environment.read("ALGO")
    if wanted:
        _check_name(op, "FASTCONV_ALGO", wanted, _CHOICES)
    plans = [plan for name in TABLE for plan in _cheapest(problem, name, backend)]
    if not plans:
        raise _out_of_workspace(problem, backend, tuple(TABLE))
    for plan in plans:
        if wanted == plan.algorithm.name:
            return plan
    return _remembered_plan(problem, plans[0]) or min(plans, key=Plan.cost)


def _check_sizes(problem: ConvProblem, op: str) -> None:
    padded = (sum(pad) + size for pad, size in zip(problem.padding, problem.input_shape5[2:], strict=True))
    sizes = {
        "stride": max(problem.stride),
        "dilation": max(problem.dilation),
        "elements of the padded input": problem.C * math.prod(padded),
        "bytes of input, weight and output": problem.bytes,
    }
    for name, size in sizes.items():
        if size >= LARGEST:
            raise ConvError(f"{op}: {name} must be below 2**60, got {size} ({problem})")


def forget_plans() -> None:
    """Let the next plan of every problem be made anew, because more has been measured."""
    global _forgotten
    _forgotten += 1
    _make_plan.cache_clear()


def _remembered_plan(problem: ConvProblem, any_plan: Plan) -> Plan | None:
    """Return the plan that was measured fastest on this device, if it is possible here and now."""
    record = measured.lookup(problem, any_plan.device.label())
    if record is None:
        return None
    plans = fitting_plans(problem, record["algorithm"], any_plan.backend)
    return next((plan for plan in plans if str(plan.tile) == record["tile"]), None)


def _named_plan(problem: ConvProblem, op: str, algo: str, backend: str, tile: str | None, bits: Any) -> Plan:
    """Return the plan of an algorithm that the caller asks for by name."""
    check_accepted(problem, op, algo, backend, str(problem))
    if tile is not None:
        plans = {str(plan.tile): plan for plan in possible_plans(problem, algo, backend)}
        _check_name(op, f"tile of {algo}", tile, tuple(plans))
        return plans[tile]
    found = _cheapest(problem, algo, backend, bits)
    if not found:
        raise _out_of_workspace(problem, backend, (algo,))
    return found[0]


def _out_of_workspace(problem: ConvProblem, backend: str, names: tuple[str, ...]) -> ConvError:
    """Return the error that says how little workspace would do for one of these algorithms."""
    plans = [plan for name in names for plan in possible_plans(problem, name, backend)]
    plans = [plan for plan in plans if plan.cost() < math.inf]  # others would not be taken
    least = min(plans, key=Plan.workspace)
    need = f"{least.workspace()} bytes, which algo={least.algorithm.name!r} takes"
    rule = f"FASTCONV_WORKSPACE must be at least {need}"
    return ConvError(f"{problem.op}: {rule}, got {environment.read('WORKSPACE')!r} ({problem})")


def _check_name(op: str, what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ConvError(f"{op}: {what} must be one of {', '.join(known)}, got {name!r}")


def why_refused(problem: ConvProblem, algo: str, backend: str = "cpu") -> str | None:
    """Return why an algorithm cannot run a problem on a backend, in words, or None."""
    reason = TABLE[algo].refuses(problem)
    if reason is None and not _is_written(backend, algo, problem.direction):
        return f"has no kernel for {problem.direction} on the {backend.upper()} yet"
    return reason


def check_accepted(problem: ConvProblem, op: str, algo: str, backend: str, shown: str) -> None:
    """Raise ConvError if an algorithm cannot run a problem, which the error quotes as `shown`."""
    reason = why_refused(problem, algo, backend)
    if reason is not None:
        raise ConvError(f"{op}: algo={algo!r} cannot run {shown}: {reason}")


def possible_plans(problem: ConvProblem, algo: str, backend: str = "cpu") -> list[Plan]:
    """Return a plan per tile with which an algorithm can run the problem on this machine; none if refused."""
    if why_refused(problem, algo, backend) is not None:
        return []
    row, device = TABLE[algo], _device(backend)
    module = _find_module(backend, algo, problem.direction)
    tiles = (tile for tile in module.TILES if device.fits(tile, problem.compute_dtype))
    plans = (Plan(problem, backend, row, tile, device, module) for tile in tiles)
    is_any = problem.precision != "highest"
    return [plan for plan in plans if is_any or row.error_factor(problem, plan.tile) <= DIRECT_ERROR]


def _find_module(backend: str, algo: str, direction: str) -> Any:
    """Return what computes one pass of an algorithm on a backend: TILES, cost, workspace, prepare, run."""
    if direction == "grad_input":
        return grad_input.turn(backend, algo)
    return importlib.import_module(_module_name(backend, algo, direction))


def _module_name(backend: str, algo: str, direction: str) -> str:
    folder = ".grad_weight" if direction == "grad_weight" else ""
    return f"fastconv.{backend}{folder}.{algo}"


@lru_cache(maxsize=64)
def _is_written(backend: str, algo: str, direction: str) -> bool:
    """Say whether a backend has a file for a row of the table and a pass."""
    return importlib.util.find_spec(_module_name(backend, algo, direction)) is not None


def _device(backend: str) -> Any:
    """Return the device that a backend's kernels run on."""
    return importlib.import_module(f"fastconv.{backend}.device").current()


def fitting_plans(problem: ConvProblem, algo: str, backend: str = "cpu") -> list[Plan]:
    """Return those of `possible_plans` that keep to FASTCONV_WORKSPACE, each with the tile it names.

    A tile that does not suit a problem is run by another one; its cost is infinite.
    """
    limit = workspace_limit()
    plans = [plan for plan in possible_plans(problem, algo, backend) if plan.cost() < math.inf]
    return plans if limit is None else [plan for plan in plans if plan.workspace() <= limit]


def _cheapest(problem: ConvProblem, algo: str, backend: str, bits: Any = None) -> list[Plan]:
    """Return the plan with the cheapest tile, or nothing.

    Where a tile decides the bits of a result, and they are not given, the batch has no say in which bits: the
    result of a sample then does not depend on its batch. Those are taken with which typical batches cost
    least, where "auto" takes `direct` for a batch that costs less by it; by name too, so that the bits are
    the same.
    """
    by_bits: dict[Any, list[Plan]] = {}
    for plan in fitting_plans(problem, algo, backend):
        if bits in (None, _bits_of(plan)):
            by_bits.setdefault(_bits_of(plan), []).append(plan)
    if not by_bits:
        return []
    direct = possible_plans(problem, "direct", backend) if len(by_bits) > 1 else []
    best = min(by_bits.values(), key=lambda plans: (_typical_cost([*plans, *direct]), _typical_cost(plans)))
    return [min(best, key=Plan.cost)]


def _typical_cost(plans: list[Plan]) -> float:
    """Return the product of what typical batches take in seconds, each by the cheapest of the plans."""
    problems = (replace(plans[0].problem, N=batch) for batch in TYPICAL_BATCHES)
    return math.prod(min(replace(plan, problem=problem).cost() for plan in plans) for problem in problems)


def _bits_of(plan: Plan) -> Any:
    """Return what in a tile decides the bits of a result, such as m of Winograd's F(m, 3), or None."""
    return getattr(plan.tile, "bits", None)


def workspace_limit() -> int | None:
    """Return the bytes that FASTCONV_WORKSPACE states, such as 64M; None for no limit."""
    text = environment.read("WORKSPACE")
    if not text:
        return None
    match = re.fullmatch(r"(\d+)\s*([KMG]?)B?", text.strip().upper())
    if match is None:
        rule = "must be a whole number of bytes, or of kilo-, mega- or gigabytes with K, M or G, such as 64M"
        raise ConvError(f"FASTCONV_WORKSPACE {rule}, got {text!r}")
    return int(match[1]) * _UNITS[match[2]]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the plan, and for every row of the table its plan or why there is none.

    division  how a Dask array is divided, in words
    """

    plan: Plan
    reason: str
    others: tuple[tuple[str, Plan | str], ...]
    division: str = ""

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        p = self.plan.problem
        place = "one core" if self.plan.backend == "cpu" else "this GPU"
        width = max(len(str(found.tile)) for _, found in self.others if isinstance(found, Plan))
        return "\n".join([
            f"{p.op} {p}",
            f"  input {p.input_shape}, weight {p.weight_shape}, output {p.output_shape}",
            f"  {_count(p.flops, 'FLOP')}, {_count(p.bytes, 'B')} moved at least, "
            f"{p.intensity:.1f} FLOP/B, {p.parameters:,} parameters",
            f"  {_unread(p)}",
            *([f"  in {self.division}"] if self.division else []),
            f"  on {self.plan.device.name}: {self.plan.algorithm.name}, {self.reason}",
            f"  times are estimates for {place}; errors are bounds per element, in eps * conv(|x|, |w|)",
            "",
            *(self._line(name, found, width) for name, found in self.others),
        ])  # fmt: skip

    def _line(self, name: str, found: Plan | str, width: int) -> str:
        if isinstance(found, str):
            return f"    {name:<10} refused: {found}"
        mark = "->" if found.algorithm is self.plan.algorithm else "  "
        rate = found.problem.flops / found.cost() / 1e9 if found.problem.N else 0.0
        return (
            f" {mark} {name:<10} {found.cost() * 1e3:10.3f} ms {rate:7.0f} GFLOP/s  "
            f"tile {found.tile!s:<{width}} workspace {_count(found.workspace(), 'B'):<9} "
            f"error <= {found.error_bound().factor:.0f} eps"
        )


def explain_problem(problem: ConvProblem, algo: str = "auto", backend: str = "cpu") -> Explanation:
    """Tell which plan `make_plan` chooses, what it is estimated to cost, and why not the others."""
    chosen = make_plan(problem, algo, backend)
    rows: list[tuple[str, Plan | str]] = []
    for name in TABLE:
        reason = why_refused(problem, name, backend)
        fitting = _cheapest(problem, name, backend)
        if name == chosen.algorithm.name:
            rows.append((name, chosen))
        elif fitting:
            rows.append((name, fitting[0]))
        else:
            rows.append((name, reason or "needs more workspace than FASTCONV_WORKSPACE permits"))
    return Explanation(chosen, _why(chosen, algo), tuple(rows))


def _why(chosen: Plan, algo: str) -> str:
    """Say who chose a plan."""
    if algo != "auto":
        return "because algo names it"
    wish = environment.read("ALGO")
    if wish == chosen.algorithm.name:
        return "because FASTCONV_ALGO names it"
    is_measured = _remembered_plan(chosen.problem, chosen) == chosen
    reason = "measured fastest by tune" if is_measured else "of the lowest estimate"
    return f"{reason}; FASTCONV_ALGO={wish} cannot run it" if wish in TABLE else reason


def _unread(problem: ConvProblem) -> str:
    """Say how much of the padded input no window reads."""
    names = ("plane", "row", "column")[-problem.ndim :]
    counts = problem.unread[-problem.ndim :]
    if not any(counts):
        return "every row and column of the padded input is read"
    found = [f"{n} {name}{'s' * (n > 1)}" for n, name in zip(counts, names, strict=True) if n]
    return f"no window reads {' and '.join(found)} of the padded input"


def _count(value: float, unit: str) -> str:
    """Return a count with a metric prefix."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} T{unit}"
