"""A problem enters, a Plan leaves: which algorithm runs it, on which backend, with which tile.

Who decides, in this order: the caller's argument, FASTCONV_ALGO, a measurement kept by `tune`, the cost model.
FASTCONV_WORKSPACE (bytes, with K, M or G) bounds what an algorithm may allocate beside input and output.
"""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastconv import measured
from fastconv.algorithms import DIRECT_ERROR, TABLE, Algorithm
from fastconv.problem import ConvError, ConvProblem, Epilogue

BACKENDS = ("cpu",)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Plan:
    """How one problem is computed; made by `make_plan`."""

    problem: ConvProblem
    backend: str
    algorithm: Algorithm
    tile: Any
    device: Any
    module: ModuleType

    def prepare(self, weight: np.ndarray) -> Any:
        """Return the weight (K, C // groups, T, R, S) packed or transformed, to be passed to `run` many times.

        It fits every plan with the same `weight_form`.
        """
        return self.module.prepare(self.problem, self.tile, self.device, weight)

    @property
    def weight_form(self) -> tuple[Any, ...]:
        """What the form of a prepared weight depends on."""
        return self.algorithm.name, self.tile, self.problem.order

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
        (N, K, O, P, Q): native, aligned, of the problem's compute_dtype, with any strides of whole elements.
        """
        self.module.run(self.problem, self.tile, self.device, x, weight, bias, residual, epilogue, out)

    def workspace(self) -> int:
        """Return the bytes that `run` allocates beside input and output."""
        return int(self.module.workspace(self.problem, self.tile, self.device))

    def cost(self) -> float:
        """Return the estimated seconds on one core, at a nominal clock."""
        return float(self.module.cost(self.problem, self.tile, self.device))

    def error_bound(self) -> float:
        """Return c in |y - reference| <= c * eps * conv(|x|, |w|)."""
        return self.algorithm.error_bound(self.problem, self.tile)

    def __str__(self) -> str:
        return f"{self.algorithm.name} {self.tile} on {self.backend}: {self.problem}"


class _Settings(NamedTuple):
    """What the environment says, read at every call and part of every cache's key."""

    algo: str
    workspace: str
    threads: str
    vector_bits: str


def _settings() -> _Settings:
    get = os.environ.get
    return _Settings(
        get("FASTCONV_ALGO", ""), get("FASTCONV_WORKSPACE", ""),
        get("FASTCONV_THREADS", ""), get("FASTCONV_VECTOR_BITS", ""),
    )  # fmt: skip


def make_plan(problem: ConvProblem, algo: str = "auto", backend: str = "cpu", tile: str | None = None) -> Plan:
    """Choose an algorithm and a tile for a problem.

    algo   "auto" or the name of a row of the table
    tile   a tile by name, as `tiles` lists them; None: the one that the cost model prefers

    Raises ConvError for an unknown name, for an algorithm that cannot run the problem (with the reason), and where
    nothing that can run it keeps to the workspace limit.
    """
    return _make_plan(problem, problem.op, algo, backend, tile, _settings())


@lru_cache(maxsize=4096)
def _make_plan(
    problem: ConvProblem, op: str, algo: str, backend: str, tile: str | None, settings: _Settings
) -> Plan:
    if algo != "auto":
        return _named_plan(problem, algo, backend, tile, settings)
    limit = _workspace_limit(settings.workspace)
    plans = [plan for name in TABLE for plan in _cheapest(problem, name, backend, settings, limit)]
    if not plans:
        least = min(p.workspace() for name in TABLE for p in possible_plans(problem, name, backend))
        rule = f"FASTCONV_WORKSPACE must be at least {least} bytes for any algorithm"
        raise ConvError(f"{problem.op}: {rule}, got {settings.workspace} ({problem})")
    for plan in plans:
        if settings.algo == plan.algorithm.name:
            return plan
    remembered = measured.lookup(problem, plans[0].device.name)
    if remembered is not None:
        for plan in possible_plans(problem, remembered["algorithm"], backend):
            if str(plan.tile) == remembered["tile"] and _fits(plan, limit):
                return plan
    return min(plans, key=Plan.cost)


def _named_plan(
    problem: ConvProblem, algo: str, backend: str, tile: str | None, settings: _Settings
) -> Plan:
    """Return the plan of an algorithm that the caller asks for by name."""
    _check_name(problem.op, "algo", algo, ("auto", *TABLE))
    reason = TABLE[algo].refuses(problem)
    if reason is not None:
        raise ConvError(f"{problem.op}: algo={algo!r} cannot run {problem}: {reason}")
    if tile is not None:
        plans = {str(plan.tile): plan for plan in possible_plans(problem, algo, backend)}
        _check_name(problem.op, f"tile of {algo}", tile, tuple(plans))
        return plans[tile]
    limit = _workspace_limit(settings.workspace)
    plans = _cheapest(problem, algo, backend, settings, limit)
    if not plans:
        least = min(plan.workspace() for plan in possible_plans(problem, algo, backend))
        rule = f"FASTCONV_WORKSPACE must be at least {least} bytes for algo={algo!r}"
        raise ConvError(f"{problem.op}: {rule}, got {settings.workspace} ({problem})")
    return plans[0]


def _check_name(op: str, what: str, name: object, known: tuple[str, ...]) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{op}: {what} must be a string, got {name!r}")
    if name not in known:
        raise ConvError(f"{op}: {what} must be one of {', '.join(known)}, got {name!r}")


def possible_plans(problem: ConvProblem, algo: str, backend: str = "cpu") -> list[Plan]:
    """Return a plan for every tile with which an algorithm can run the problem on this machine; none if refused."""
    row = TABLE[algo]
    if row.refuses(problem) is not None:
        return []
    module, device = _backend(backend, algo)
    plans = (Plan(problem, backend, row, tile, device, module) for tile in module.TILES if device.fits(tile))
    return [p for p in plans if problem.precision != "highest" or p.error_bound() <= DIRECT_ERROR]


def _backend(backend: str, algo: str) -> tuple[ModuleType, Any]:
    device = importlib.import_module(f"fastconv.{backend}.device").current()
    return importlib.import_module(f"fastconv.{backend}.{algo}"), device


def _cheapest(
    problem: ConvProblem, algo: str, backend: str, settings: _Settings, limit: int | None
) -> list[Plan]:
    """Return the plan with the cheapest tile among those that keep to the limit, or nothing."""
    plans = [plan for plan in possible_plans(problem, algo, backend) if _fits(plan, limit)]
    return [min(plans, key=Plan.cost)] if plans else []


def _fits(plan: Plan, limit: int | None) -> bool:
    return limit is None or plan.workspace() <= limit


def _workspace_limit(text: str) -> int | None:
    """Return the bytes that a text such as 64M states; None for no limit."""
    if not text:
        return None
    match = re.fullmatch(r"(\d+)\s*([KMG]?)B?", text.strip().upper())
    if match is None:
        raise ConvError(f"FASTCONV_WORKSPACE must be bytes, with K, M or G, such as 64M, got {text!r}")
    return int(match[1]) * _UNITS[match[2]]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the plan, and for every row of the table its plan or the reason for its refusal."""

    plan: Plan
    others: tuple[tuple[str, Plan | str], ...]

    def __str__(self) -> str:
        p = self.plan.problem
        return "\n".join([
            f"{p.op} {p}",
            f"  input {p.input_shape}, weight {p.weight_shape}, output {p.output_shape}",
            f"  {_count(p.flops, 'FLOP')}, {_count(p.bytes, 'B')} moved at least, "
            f"{p.intensity:.1f} FLOP/B, {p.parameters:,} parameters",
            f"  {_unread(p)}",
            f"  on {self.plan.device.name}; times are estimates for one core",
            "",
            *(self._line(name, found) for name, found in self.others),
        ])  # fmt: skip

    def _line(self, name: str, found: Plan | str) -> str:
        if isinstance(found, str):
            return f"    {name:<10} refused: {found}"
        mark = "->" if found.algorithm is self.plan.algorithm else "  "
        rate = found.problem.flops / found.cost() / 1e9
        return (
            f" {mark} {name:<10} {found.cost() * 1e3:10.3f} ms {rate:7.0f} GFLOP/s  tile {found.tile!s:<8} "
            f"workspace {_count(found.workspace(), 'B'):<9} error <= {found.error_bound():.0f} eps"
        )


def explain_problem(problem: ConvProblem, algo: str = "auto", backend: str = "cpu") -> Explanation:
    """Tell which plan `make_plan` chooses, what it is estimated to cost, and why not the others."""
    chosen = make_plan(problem, algo, backend)
    limit = _workspace_limit(_settings().workspace)
    rows: list[tuple[str, Plan | str]] = []
    for name, row in TABLE.items():
        reason = row.refuses(problem)
        fitting = _cheapest(problem, name, backend, _settings(), limit)
        if name == chosen.algorithm.name:
            rows.append((name, chosen))
        elif fitting:
            rows.append((name, fitting[0]))
        else:
            rows.append((name, reason or "needs more workspace than FASTCONV_WORKSPACE permits"))
    return Explanation(chosen, tuple(rows))


def _unread(problem: ConvProblem) -> str:
    """Say how much of the padded input no window reads."""
    names = ("planes", "rows", "columns")[-problem.ndim :]
    counts = problem.unread[-problem.ndim :]
    if not any(counts):
        return "every row and column of the padded input is read"
    found = " and ".join(f"{count} {name}" for count, name in zip(counts, names, strict=True) if count)
    return f"{found} of the padded input are read by no window"


def _count(value: float, unit: str) -> str:
    """Return a count with a metric prefix."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} T{unit}"
