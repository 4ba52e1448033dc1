"""Gradients with respect to input and weight: problems with data, and plans that are checked on them."""

import dataclasses

import numpy as np

from fastconv import reference
from fastconv.plan import Plan, possible_plans, why_refused
from fastconv.problem import ConvProblem, Epilogue
from tests.cases import CASES, options_of
from tests.compare import assert_bounded, assert_exact, finfo, poisoned
from tests.kernels import in_order


@dataclasses.dataclass(frozen=True)
class Gradient:
    """A problem of one of the two directions with its data: first and second are what a plan takes."""

    problem: ConvProblem
    first: np.ndarray  # grad_output, or the input
    second: np.ndarray  # the weight, or grad_output

    @property
    def shape(self):
        is_input = self.problem.direction == "grad_input"
        return self.problem.input_shape if is_input else self.problem.weight_shape

    def refer(self, first, second, **changes):
        problem, options = self.problem, {**options_of(self.problem), **changes}
        name = problem.op.removesuffix("_input").removesuffix("_weight")
        if problem.direction == "grad_input":
            return getattr(reference, f"{name}_input")(problem.input_shape, second, first, **options)
        return getattr(reference, f"{name}_weight")(first, problem.weight_shape, second, **options)

    def run(self, plan: Plan, out=None, prepared=False):
        absent = (slice(None), slice(None), *(None,) * (3 - self.problem.ndim))
        if out is None:
            order = self.problem.order if self.problem.direction == "grad_input" else "NCHW"
            out = poisoned(self.shape, self.problem.dtype, order)
        second = self.second[absent]
        second = plan.prepare(second) if prepared else second
        plan.run(self.first[absent], second, None, None, Epilogue(), out[absent])
        return out

    def check(self, plan: Plan, **how):
        try:
            assert_exact(self.run(plan, **how), self.refer(self.first, self.second), self.problem.dtype)
        except AssertionError as error:
            raise AssertionError(f"{plan}\n{how}\n{error}") from None

    def scale(self, reach: int) -> np.ndarray:
        """The sum of the terms' magnitudes, for errors that travel so many rows and columns of `first`."""
        first, changes = np.abs(self.first), {}
        if self.problem.direction == "grad_weight":  # into the padding too: some taps meet nothing else
            first = np.pad(first, [(0, 0), (0, 0), *options_of(self.problem)["padding"]])
            changes = {"padding": 0}
        return self.refer(reference.largest_near(first, reach), np.abs(self.second), **changes)

    def check_bounded(self, plan: Plan):
        (factor, reach), dtype = plan.error_bound(), self.problem.dtype
        bound = factor * finfo(dtype).eps * self.scale(reach)
        try:
            assert_bounded(self.run(plan), self.refer(self.first, self.second), bound, dtype)
        except AssertionError as error:
            raise AssertionError(f"{plan}\n{error}") from None


def make_gradient(rng, problem: ConvProblem, fill) -> Gradient:
    direction = problem.direction
    shapes = {"grad_input": (problem.output_shape, problem.weight_shape)}
    shapes["grad_weight"] = (problem.input_shape, problem.output_shape)
    first, second = (fill(rng, shape, problem.dtype) for shape in shapes[direction])
    first = in_order(first, problem.order)
    return Gradient(problem, first, second if direction == "grad_input" else in_order(second, problem.order))


def problems(algorithm, direction, cases=CASES, **changes):
    """Those of the cases that an algorithm accepts, without the empty batch."""
    found = [case.problem(direction=direction, **changes) for case in cases]
    return [problem for problem in found if why_refused(problem, algorithm) is None and problem.N]


def exact_plans(problem, algorithm):
    """A plan per tile that is exact on integers; two for the input's gradient, by the forward kernels."""
    plans = [plan for plan in possible_plans(problem, algorithm) if plan.algorithm.exact(problem, plan.tile)]
    return plans[:2] if problem.direction == "grad_input" else plans
