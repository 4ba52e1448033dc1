"""A problem enters; what two libraries are compared in leaves: the operands, a call of each, the reference.

forward       the convolution
fused         relu(convolution + bias + residual): one call of ours, three of torch's, two in place
grad_input    the gradient of the input, by itself
grad_weight   that of the weight
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import fastconv
from bench.check import Oracle
from bench.workload import SEED, as_torch, in_order, keywords, make_arrays, make_call, numpy_dtype
from fastconv import reference
from fastconv.problem import ConvProblem

Call = Callable[[], Any]


class Forward:
    """The convolution alone."""

    about = "convolution"
    direction = "forward"

    def __init__(self, problem: ConvProblem):
        self.problem = problem
        self.x, self.w = make_arrays(problem)

    def like_output(self) -> np.ndarray:
        """Numbers of order one for a residual, or for the gradient of the output."""
        random = np.random.default_rng(SEED + 1)
        found = random.standard_normal(self.problem.output_shape, dtype=np.float32)
        return in_order(found.astype(numpy_dtype(self.problem.dtype)), self.problem.order)

    def ours(self, algo: str, prepared: bool) -> Call:
        """fastconv's call."""
        return make_call(self.problem, self.x, self.w, algo, prepared)

    def theirs(self, torch: Any, order: Any) -> Call:
        """torch's call, on tensors that lie in a memory order; its result may be a view."""
        convolve, (x, w) = getattr(torch.nn.functional, self.problem.op), self.tensors(torch, order)
        options, drop = as_torch(self.problem)
        return lambda: drop(convolve(x, w, **options))

    def tensors(self, torch: Any, order: Any, *more: np.ndarray) -> list[Any]:
        """The input, the weight and more arrays as tensors in a memory order."""
        arrays = [np.ascontiguousarray(array) for array in (self.x, self.w, *more)]
        return [torch.from_numpy(array).contiguous(memory_format=order) for array in arrays]

    def oracle(self) -> Oracle:
        """What judges the results."""
        return Oracle(self.problem, self.x, self.w)


class Fused(Forward):
    """The convolution with what follows it in a residual network."""

    about = "relu(convolution + bias + residual), one call of ours, three of torch's, two in place"

    def __init__(self, problem: ConvProblem):
        super().__init__(problem)
        self.residual = self.like_output()
        self.bias = np.linspace(-1, 1, problem.K).astype(self.w.dtype)

    def ours(self, algo: str, prepared: bool) -> Call:
        more = {"bias": self.bias, "activation": "relu"}
        call = make_call(self.problem, self.x, self.w, algo, prepared, **more)
        return lambda: call(residual=self.residual)

    def theirs(self, torch: Any, order: Any) -> Call:
        convolve = getattr(torch.nn.functional, self.problem.op)
        (x, w, residual), bias = self.tensors(torch, order, self.residual), torch.from_numpy(self.bias)
        options, drop = as_torch(self.problem)
        return lambda: drop(convolve(x, w, bias, **options)).add_(residual).relu_()

    def oracle(self) -> Oracle:
        return FusedOracle(self)


class FusedOracle(Oracle):
    """Judges a convolution with what is fused to it."""

    def __init__(self, fused: Fused):
        super().__init__(fused.problem, fused.x, fused.w)
        self.added = fused.bias.reshape(-1, *[1] * fused.problem.ndim), fused.residual
        self.expected = np.maximum(self.expected + sum(array.astype(np.float64) for array in self.added), 0)

    def scale(self, reach: int) -> np.ndarray:
        return super().scale(reach) + sum(np.abs(array.astype(np.float64)) for array in self.added)


class InputGradient(Forward):
    """The gradient of the input, made of the weight and the gradient of the output."""

    about = "the gradient of the input"
    direction = "grad_input"
    wanted = (True, False, False)  # of input, weight, bias

    def __init__(self, problem: ConvProblem):
        super().__init__(problem)
        self.grad = self.like_output()

    def ours(self, algo: str, prepared: bool) -> Call:
        function = getattr(fastconv.grad, f"{self.problem.op}_input")
        options = {**keywords(self.problem), "algo": algo}
        return lambda: function(self.problem.input_shape, self.w, self.grad, **options)

    def theirs(self, torch: Any, order: Any) -> Call:
        x, w, grad = self.tensors(torch, order, self.grad)
        options, drop = as_torch(self.problem)
        whole = torch.zeros_like(getattr(torch.nn.functional, self.problem.op)(x, w, **options))
        drop(whole).copy_(grad)  # outputs that are dropped have no gradient
        axes = [list(options[name]) for name in ("stride", "padding", "dilation")]
        tail = (*axes, False, [0] * self.problem.ndim, options["groups"], list(self.wanted))
        at = self.wanted.index(True)
        return lambda: torch.ops.aten.convolution_backward(whole, x, w, None, *tail)[at]

    def oracle(self) -> Oracle:
        return GradientOracle(self)

    def refer(self, w: np.ndarray, grad: np.ndarray) -> np.ndarray:
        """The reference's gradient."""
        function = getattr(reference, f"{self.problem.op}_input")
        return np.asarray(function(self.problem.input_shape, w, grad, **keywords(self.problem)))

    def operands(self) -> tuple[np.ndarray, np.ndarray]:
        return self.w, self.grad

    def scale(self, first: np.ndarray, grad: np.ndarray, reach: int) -> np.ndarray:
        """The sum of the terms' magnitudes, for errors that travel so many pixels of grad_output."""
        return self.refer(first, reference.largest_near(grad, reach))


class WeightGradient(InputGradient):
    """The gradient of the weight, made of the input and the gradient of the output."""

    about = "the gradient of the weight"
    direction = "grad_weight"
    wanted = (False, True, False)

    def ours(self, algo: str, prepared: bool) -> Call:
        function = getattr(fastconv.grad, f"{self.problem.op}_weight")
        options = {**keywords(self.problem), "algo": algo}
        return lambda: function(self.x, self.problem.weight_shape, self.grad, **options)

    def refer(self, x: np.ndarray, grad: np.ndarray) -> np.ndarray:
        function = getattr(reference, f"{self.problem.op}_weight")
        return np.asarray(function(x, self.problem.weight_shape, grad, **keywords(self.problem)))

    def operands(self) -> tuple[np.ndarray, np.ndarray]:
        return self.x, self.grad

    def scale(self, first: np.ndarray, grad: np.ndarray, reach: int) -> np.ndarray:
        """The sum of the terms' magnitudes, for errors that travel so many pixels of the padded input."""
        options = keywords(self.problem)
        padded = reference.largest_near(np.pad(first, [(0, 0), (0, 0), *options["padding"]]), reach)
        function = getattr(reference, f"{self.problem.op}_weight")
        return np.asarray(function(padded, self.problem.weight_shape, grad, **{**options, "padding": 0}))


class GradientOracle(Oracle):
    """Judges a gradient."""

    def __init__(self, gradient: InputGradient):
        self.gradient = gradient
        expected = gradient.refer(*(array.astype(np.float64) for array in gradient.operands()))
        super().__init__(gradient.problem, *gradient.operands(), expected)

    def scale(self, reach: int) -> np.ndarray:
        first, grad = (np.abs(array.astype(np.float64)) for array in self.gradient.operands())
        return self.gradient.scale(first, grad, reach)


OPERATIONS = {"forward": Forward, "fused": Fused, "grad_input": InputGradient, "grad_weight": WeightGradient}


def turn(problem: ConvProblem, operation: str) -> ConvProblem:
    """The problem of an operation, given that of its convolution."""
    return replace(problem, direction=OPERATIONS[operation].direction)
