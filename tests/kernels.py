"""A problem and a plan enter, the output of its kernels is judged: for tests that go past the operations.

Plan.run takes any strides and any tile by name, which fastconv.conv2d does not hand out.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest

from fastconv import plan as planning
from fastconv import reference
from fastconv.algorithms import TABLE
from fastconv.plan import Plan
from fastconv.problem import ConvProblem, make_epilogue
from tests.backends import BACKENDS, CPU, Backend, get, put, why_absent
from tests.cases import CASES, Case, operands, options_of
from tests.compare import assert_bounded, assert_exact, finfo, poisoned

ORDERS = ("NCHW", "NHWC")
DTYPES = CPU.dtypes


class Way(NamedTuple):
    """One way to compute: an algorithm and one of its tiles, by name, on a backend."""

    algorithm: str
    tile: str
    backend: Backend = CPU

    def plan(self, problem: ConvProblem) -> Plan:
        return planning.make_plan(problem, self.algorithm, self.backend.package, tile=self.tile)

    def takes(self, dtype: str) -> bool:
        """Whether the tile fits the backend in a dtype."""
        return self.tile in map(str, tiles(self.algorithm, self.backend, dtype))

    def problems(self, cases: Iterable[Case], **changes) -> list[ConvProblem]:
        """Those of the cases that the algorithm accepts."""
        problems = (case.problem(**changes) for case in cases)
        refuses = TABLE[self.algorithm].refuses
        return [problem for problem in problems if refuses(problem) is None]

    def __str__(self) -> str:
        prefix = "" if self.backend is CPU else f"{self.backend.name}-"
        return f"{prefix}{self.algorithm}-{self.tile}"


def tile_plans(algorithm: str, **changes) -> list[Plan]:
    """A plan for every tile of an algorithm that fits this CPU, each for the first case it accepts."""
    return planning.possible_plans(Way(algorithm, "").problems(CASES, **changes)[0], algorithm)


def tiles(algorithm: str, backend: Backend, dtype: str = "float32") -> list:
    """Every tile of an algorithm that fits a backend, which need not be there if it is a GPU."""
    if backend is CPU:
        return [plan.tile for plan in tile_plans(algorithm, dtype=dtype)]
    module = f"fastconv.gpu.{algorithm}"
    found = import_module(module).TILES if find_spec(module) else ()
    return [tile for tile in found if tile.takes(dtype)]


@lru_cache(maxsize=8)
def ways(backend: Backend = CPU) -> list[Way]:
    """Every algorithm with every tile that fits a backend."""
    return [Way(name, str(tile), backend) for name in TABLE for tile in tiles(name, backend)]


@lru_cache(maxsize=8)
def forms(backend: Backend) -> list[Way]:
    """Every algorithm with one tile for each order in which its terms are added; on the CPU with every tile.

    On a GPU all tiles share their source, and each that is compiled and emulated takes its time.
    """
    if backend is CPU:
        return ways(CPU)
    found = {}
    for name in TABLE:
        for tile in tiles(name, backend):
            found[name, getattr(tile, "bits", None)] = Way(name, str(tile), backend)  # the last one stays
    return list(found.values())


def on_backends(
    choose: Callable[[Backend], list[Way]],
    dtypes: bool | Iterable[str] = False,
    backends: Iterable[Backend] = BACKENDS,
) -> pytest.MarkDecorator:
    """Parametrize a test by `way`, and by `dtype` if asked for; the backend's name is a mark of the test.

    choose  backend -> its ways
    dtypes  True for all of the backend's, or which ones of them
    """
    params, count = [], 2 if dtypes else 1
    for backend in backends:
        marks, reason = [getattr(pytest.mark, backend.name)], why_absent(backend)
        if reason is not None:
            marks.append(pytest.mark.skip(reason=reason))
            params.append(pytest.param(*(None, "")[:count], id=backend.name, marks=marks))
            continue
        wanted = [dtype for dtype in backend.dtypes if dtypes is True or (dtypes and dtype in dtypes)]
        pairs = (pair for pair in product(choose(backend), wanted) if pair[0].takes(pair[1]))
        chosen = pairs if dtypes else zip(choose(backend))
        params += [pytest.param(*one, id="-".join(map(str, one)), marks=marks) for one in chosen]
    return pytest.mark.parametrize(("way", "dtype")[:count], params, indirect=["way"])


def largest_tile(algorithm: str) -> Way:
    """The exact tile that takes the most registers of those that fit the vectors of now."""
    plans = tile_plans(algorithm, precision="highest")
    return Way(algorithm, str(max(plans, key=lambda plan: plan.tile.rows * plan.tile.vectors).tile))


def in_order(array: np.ndarray, order: str) -> np.ndarray:
    """The same values, contiguous in a memory order."""
    if order == "NCHW":
        return np.ascontiguousarray(array)
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A problem with its data, and what the reference makes of them.

    whole  the data are compare.integers: where an algorithm is exact on them, equality is asked for
    """

    problem: ConvProblem
    x: np.ndarray
    w: np.ndarray
    bias: np.ndarray | None = None
    residual: np.ndarray | None = None
    activation: str | tuple[str, float] | None = None
    whole: bool = True

    def with_array(self, **changes) -> "Layer":
        """The same layer with an array in another memory layout, or without it."""
        return dataclasses.replace(self, **changes)

    def _refer(self, *arrays: np.ndarray | None, **more) -> np.ndarray:
        return getattr(reference, self.problem.op)(*arrays, **options_of(self.problem), **more)

    @cached_property
    def expected(self) -> np.ndarray:
        more = {"residual": self.residual, "activation": self.activation}
        return self._refer(self.x, self.w, self.bias, **more)

    def scale(self, reach: int) -> np.ndarray:
        """The sum of the magnitudes of all terms, in whose rounding errors the bound is stated."""
        total = reference.error_scale(self.x, self.w, **options_of(self.problem), reach=reach)
        if self.bias is not None:
            total = total + np.abs(self.bias).reshape(-1, *(1,) * self.problem.ndim)
        return total if self.residual is None else total + np.abs(self.residual)

    def run(self, plan: Plan, weight=None, out: np.ndarray | None = None) -> np.ndarray:
        """The output of a plan; `weight` if it was prepared, `out` if it is not to be a new array."""
        problem = self.problem
        if out is None:
            out = poisoned(problem.output_shape, problem.dtype, problem.order)
        weight = put(self.rank5(self.w)) if weight is None else weight
        epilogue = make_epilogue(problem.op, self.activation)
        x, residual, written = self.rank5(self.x), self.rank5(self.residual), self.rank5(out)
        shown = put(written)
        plan.run(put(x), weight, put(self.bias), put(residual), epilogue, shown)
        get(shown, written)
        return out

    def prepare(self, plan: Plan):
        return plan.prepare(put(self.rank5(self.w)))

    def rank5(self, array: np.ndarray | None) -> np.ndarray | None:
        """The view of an array that a plan takes: the axes that a conv1d or conv2d lacks have extent 1."""
        absent = (None,) * (3 - self.problem.ndim)
        return None if array is None else array[(slice(None), slice(None), *absent)]

    def judge(self, plan: Plan, y: np.ndarray) -> None:
        """Ask for equality where the algorithm is exact, else for every element within its bound."""
        dtype = self.problem.dtype
        if self.whole and plan.algorithm.exact(plan.problem, plan.tile):
            assert_exact(y, self.expected, dtype)
        else:
            factor, reach = plan.error_bound()
            bound = factor * np.finfo(self.problem.compute_dtype).eps * self.scale(reach)
            if dtype != self.problem.compute_dtype:  # rounded once more, to the half type
                info = finfo(dtype)
                bound = bound + info.eps / 2 * (np.abs(self.expected) + bound) + info.smallest_subnormal
            assert_bounded(y, self.expected, bound, dtype)

    def check(self, plan: Plan, prepared: bool = False) -> None:
        weight = self.prepare(plan) if prepared else None
        try:
            self.judge(plan, self.run(plan, weight))
        except AssertionError as error:
            form = "prepared" if prepared else "given"
            extra = f"activation {self.activation}, bias {self.bias is not None}, weight {form}"
            raise AssertionError(f"{plan}\n{extra}\n{error}") from None


def make_layer(rng, problem: ConvProblem, fill, epilogue: bool = True) -> Layer:
    """A layer with data, in the problem's memory order; with bias, residual and relu, or with none."""
    x, w, bias, residual = operands(rng, problem, fill)
    x, residual = in_order(x, problem.order), in_order(residual, problem.order)
    whole = fill.__name__ == "integers"
    extras = (bias, residual, "relu") if epilogue else (None, None, None)
    return Layer(problem, x, w, *extras, whole)


def with_caches(plan: Plan, l1: int, l2: int) -> Plan:
    """The same plan for a CPU with smaller caches: small problems are then cut into many parts."""
    return dataclasses.replace(plan, device=dataclasses.replace(plan.device, l1=l1, l2=l2))
