"""The gradient with respect to the input, by any algorithm, as convolutions with stride 1.

Of a convolution along one axis, y[q] = sum over t of x[q * stride + t * dilation - before] * w[t], it is

    grad_x[i] = sum of grad_y[q] * w[t]  over all q, t with  q * stride + t * dilation = i + before

Inputs i whose i + before leaves the same rest when divided by the stride, a *phase*, meet the same taps, and
neighbours among them meet neighbours of grad_y: a convolution of grad_y with some of the taps, reversed, and
stride 1 (the sub-pixel view of Shi et al. 2016, arXiv:1609.07009). With stride 1 there is one phase, of all
taps. Phases that meet no tap are zero: where there are some, all of grad_x is made zero first.

Windows that lie side by side, such as the patches of a vision transformer, would make a phase for each tap:
there one convolution with a 1x1 kernel makes all taps as channels, and a copy puts them in their places.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastconv.problem import ConvProblem, Cuts, Operands, Pair


class Phase(NamedTuple):
    """Some elements of grad_x along one axis and what they are convolved from.

    inputs    of grad_x, `stride` apart
    size      how many they are
    taps      of w, reversed; None if no tap meets these inputs
    outputs   of grad_y
    dilation, padding  of the convolution
    """

    inputs: slice
    size: int
    taps: slice | None
    outputs: slice
    dilation: int
    padding: Pair


@dataclass(frozen=True)
class Part:
    """One of the convolutions that make the gradient: a phase along d, h and w."""

    problem: ConvProblem
    phases: tuple[Phase, Phase, Phase]

    @cached_property
    def is_zero(self) -> bool:
        return any(phase.taps is None for phase in self.phases)

    @cached_property
    def columns_apart(self) -> bool:
        """Say whether the elements of a row that it makes have others between them."""
        return (self.phases[2].inputs.step or 1) > 1

    @cached_property
    def inputs(self) -> tuple[slice, ...]:
        """What of the input's gradient it makes."""
        return slice(None), slice(None), *(phase.inputs for phase in self.phases)

    @cached_property
    def taps(self) -> tuple[Any, ...]:
        """What it takes of the filters (..., T, R, S)."""
        return ..., *(phase.taps for phase in self.phases)

    @cached_property
    def outputs(self) -> tuple[slice, ...]:
        """What of the output's gradient it is made of."""
        return slice(None), slice(None), *(phase.outputs for phase in self.phases)


class Patches(NamedTuple):
    """The convolution that makes a channel for each (c, t, r, s), where windows lie side by side."""

    problem: ConvProblem


@lru_cache(maxsize=256)
def find_parts(problem: ConvProblem) -> tuple[Part | Patches, ...]:
    """Return the convolutions that together make the gradient, one after the other."""
    if _is_side_by_side(problem):
        return (_make_patches(problem),)
    sizes = zip(
        problem.input_shape5[2:], problem.weight_shape5[2:], problem.output_shape5[2:], problem.stride,
        problem.dilation, problem.padding_before, strict=True,
    )  # fmt: skip
    axes = [list(_find_phases(*axis)) for axis in sizes]
    met = [[phase for phase in axis if phase.taps is not None] for axis in axes]
    parts = [_make_part(problem, *phases) for phases in itertools.product(*met)]
    return tuple(parts) if met == axes else (_make_zeros(problem), *parts)


def _find_phases(
    size: int, kernel: int, windows: int, stride: int, dilation: int, before: int
) -> Iterator[Phase]:
    common = math.gcd(stride, dilation)
    step = stride // common  # from one tap of a phase to the next
    for first in range(min(stride, size)):
        count = -(-(size - first) // stride)
        row, rest = divmod(first + before, stride)
        # The first tap with tap * dilation = rest modulo stride, if there is one.
        tap = next((t for t in range(min(step, kernel)) if (t * dilation - rest) % stride == 0), None)
        inputs = slice(first, None, stride)
        if tap is None:
            yield Phase(inputs, count, None, slice(0), 1, (0, 0))
            continue
        taps, apart = -(-(kernel - tap) // step), dilation // common
        # The first input meets the last of these taps at this output, and the last input the first tap there.
        low = row - (tap * dilation - rest) // stride - (taps - 1) * apart
        high = low + count - 1 + (taps - 1) * apart
        outputs = slice(max(low, 0), min(high + 1, windows))
        padding = max(-low, 0), max(high + 1 - windows, 0)
        is_met = outputs.start < outputs.stop
        yield Phase(inputs, count, _reversed(tap, taps, step) if is_met else None, outputs, apart, padding)


def _reversed(first: int, count: int, step: int) -> slice:
    """Return the slice first, first + step ... of `count` elements, last one first."""
    return slice(first + (count - 1) * step, first - step if first >= step else None, -step)


def _make_part(problem: ConvProblem, *phases: Phase) -> Part:
    d, h, w = phases
    part = replace(
        problem, direction="forward", C=problem.K, K=problem.C, stride=(1, 1, 1),
        dilation=(d.dilation, h.dilation, w.dilation), padding=(d.padding, h.padding, w.padding),
    )  # fmt: skip
    D, H, W = (phase.outputs.stop - phase.outputs.start for phase in phases)
    T, R, S = (
        len(range(extent)[phase.taps or slice(0)])
        for extent, phase in zip(problem.weight_shape5[2:], phases, strict=True)
    )
    return Part(replace(part, D=D, H=H, W=W, T=T, R=R, S=S), (d, h, w))


def _is_side_by_side(problem: ConvProblem) -> bool:
    """Say whether every input lies in exactly one window, and windows have several."""
    extents, O_P_Q = problem.weight_shape5[2:], problem.output_shape5[2:]
    covered = tuple(count * extent for count, extent in zip(O_P_Q, extents, strict=True))
    is_dense = problem.dilation == (1, 1, 1) and problem.padding == ((0, 0),) * 3
    return is_dense and problem.stride == extents != (1, 1, 1) and covered == problem.input_shape5[2:]


def _make_patches(problem: ConvProblem) -> Patches:
    O, P, Q = problem.output_shape5[2:]
    part = replace(
        problem, direction="forward", C=problem.K, K=problem.C * math.prod(problem.weight_shape5[2:]),
        D=O, H=P, W=Q, T=1, R=1, S=1, stride=(1, 1, 1),
    )  # fmt: skip
    return Patches(part)


def _make_zeros(problem: ConvProblem) -> Part:
    """Return a convolution of nothing, with one tap and one channel per group, that makes all elements."""
    D, H, W = sizes = problem.input_shape5[2:]
    part = replace(
        problem, direction="forward", C=problem.groups, K=problem.C, D=D, H=H, W=W, T=1, R=1, S=1,
        stride=(1, 1, 1), dilation=(1, 1, 1), padding=((0, 0),) * 3,
    )  # fmt: skip
    d, h, w = (Phase(slice(None), size, None, slice(0), 1, (0, 0)) for size in sizes)
    return Part(part, (d, h, w))


@lru_cache(maxsize=256)
def find_cuts(problem: ConvProblem) -> Cuts:
    """Return what those parts of a problem that are not zero take of its filters."""
    numbers = np.arange(math.prod(problem.weight_shape5[2:])).reshape(problem.weight_shape5[2:])
    parts = _met_parts(problem)
    shapes: list[tuple[int, ...]] = [part.problem.weight_shape5 for part in parts]
    *begins, elements = itertools.accumulate((math.prod(shape) for shape in shapes), initial=0)
    rows = []
    for part, begin in zip(parts, begins, strict=True):
        taps = numbers[part.taps].reshape(-1).tolist()
        rows += [(number, begin, len(taps), place) for place, number in enumerate(taps)]
    table = np.array(rows, np.int64).reshape(-1, 4)
    return Cuts([part.taps for part in parts], shapes, begins, elements, table)


def _met_parts(problem: ConvProblem) -> list[Part]:
    return [part for part in find_parts(problem) if isinstance(part, Part) and not part.is_zero]


class InputGradient:
    """A backend's file of an algorithm turned round: the same members, for problems of direction grad_input.

    A tile that `reads_any_weight` is given a view of the weight, and a file that says so in `takes_view`;
    others what is cut of it. A file of the same name in a backend's folder grad_input computes the gradients
    that it `suits` as a whole.

    Operands.x is then the gradient with respect to the output, Operands.out that with respect to the input;
    bias (C,) and residual are of the latter's shape.
    """

    def __init__(self, forward: ModuleType, memory: ModuleType, whole: ModuleType | None) -> None:
        self.TILES = forward.TILES
        self._forward, self._memory, self._whole = forward, memory, whole

    def cost(self, problem: ConvProblem, tile: Any, device: Any) -> float:
        """Return the estimated seconds."""
        whole = self._find_whole(problem, tile)
        if whole is not None:
            return float(whole.cost(problem, tile, device))
        is_left = _reads_any_weight(tile) and self._takes_view(problem, tile, device)
        cut = 0 if is_left else problem.parameters
        parts = (float(self._forward.cost(part.problem, tile, device)) for part in find_parts(problem))
        return cut * self._memory.CUT_SECONDS + sum(parts)

    def workspace(self, problem: ConvProblem, tile: Any, device: Any) -> int:
        """Return the bytes that are allocated at a time."""
        of_parts, whole = self._workspace_of_parts(problem, tile, device), self._find_whole(problem, tile)
        return of_parts if whole is None else int(whole.workspace(problem, tile, device, of_parts))

    def _workspace_of_parts(self, problem: ConvProblem, tile: Any, device: Any) -> int:
        """Return the bytes that parts take one after the other, the rearranged weights of all included."""
        parts, is_matrix = find_parts(problem), math.prod(problem.weight_shape5[2:]) == 1
        # Of a matrix that is left as it lies some rows are packed, unless a tile counts them itself.
        is_packed = is_matrix and not _reads_any_weight(tile)
        is_cut = is_packed or not self._takes_view(problem, tile, device)
        weights = find_cuts(problem).elements if is_cut else 0
        most = max(self._workspace_of(part, tile, device) for part in parts)
        return most + weights * self._memory.itemsize(problem)

    def _workspace_of(self, part: Part | Patches, tile: Any, device: Any) -> int:
        """Return the bytes of a part beside what is cut of the weight."""
        held, own = 0, int(self._forward.workspace(part.problem, tile, device))
        if isinstance(part, Patches):  # the channels, and a bias and a residual of such channels
            held = 2 * math.prod(part.problem.output_shape5) + part.problem.K
            held += math.prod(part.problem.weight_shape5)
        elif self._is_staged(part):
            held = math.prod(part.problem.output_shape5)
        elif part.is_zero:
            held = math.prod(part.problem.weight_shape5)
        return own + held * self._memory.itemsize(part.problem)

    def prepare(self, problem: ConvProblem, tile: Any, device: Any, weight: np.ndarray) -> Any:
        """Return the weight of every part, rearranged and prepared."""
        whole = self._find_whole(problem, tile)
        if whole is not None:
            return whole.prepare(problem, tile, device, weight)
        weights = zip(find_parts(problem), self._weights_of(problem, tile, device, weight), strict=True)
        return [self._forward.prepare(part.problem, tile, device, own) for part, own in weights]

    def run(self, problem: ConvProblem, tile: Any, device: Any, operands: Operands) -> None:
        """Compute the gradient as a whole or part by part; the weight is prepared or as given."""
        o, whole = operands, self._find_whole(problem, tile)
        if whole is not None and not isinstance(o.weight, list) and whole.reads(operands):
            whole.run(problem, tile, device, operands)
            return
        is_list = isinstance(o.weight, list)
        weights = o.weight if is_list else self._weights_of(problem, tile, device, o.weight)
        for part, weight in zip(find_parts(problem), weights, strict=True):
            if isinstance(part, Patches):
                self._run_patches(problem, part, tile, device, o._replace(weight=weight))
                continue
            x = self._zeros(part.problem.input_shape5, o.x.dtype) if part.is_zero else o.x[part.outputs]
            residual = None if o.residual is None else o.residual[part.inputs]
            place = o.out[part.inputs]
            out = self._memory.allocate(place.shape, place.dtype.name) if self._is_staged(part) else place
            own = Operands(x, weight, o.bias, residual, o.epilogue, out)
            self._forward.run(part.problem, tile, device, own)
            if out is not place:
                self._memory.put(out, place)
            del own, out  # before the next part allocates as much

    def _find_whole(self, problem: ConvProblem, tile: Any) -> ModuleType | None:
        """Return the file that computes the gradient as a whole with this tile, if there is one."""
        return self._whole if self._whole is not None and self._whole.suits(problem, tile) else None

    def _is_staged(self, part: Part) -> bool:
        """Say whether a part is computed in memory of its own and copied then."""
        return self._memory.STAGES and part.columns_apart and part.problem.order == "NCHW"

    def _run_patches(
        self, problem: ConvProblem, part: Patches, tile: Any, device: Any, operands: Operands
    ) -> None:
        """Make all taps as channels, from a bias and a residual of such channels, then put them in place."""
        o, (T, R, S), (O, P, Q) = operands, problem.weight_shape5[2:], problem.output_shape5[2:]
        places, made = (problem.N, problem.C, O, T, P, R, Q, S), part.problem.output_shape5
        bias, residual = o.bias, o.residual
        if bias is not None:
            spread = np.broadcast_to(bias[:, None], (problem.C, T * R * S))
            bias = self._memory.copy(spread, bias.dtype).reshape(-1)
        if residual is not None:
            gathered = residual.reshape(places).transpose(0, 1, 3, 5, 7, 2, 4, 6)
            residual = self._memory.copy(gathered, residual.dtype).reshape(made)
        y = self._memory.zeros(made, o.out.dtype)
        self._forward.run(part.problem, tile, device, Operands(o.x, o.weight, bias, residual, o.epilogue, y))
        in_places = y.reshape(problem.N, problem.C, T, R, S, O, P, Q).transpose(0, 1, 5, 2, 6, 3, 7, 4)
        self._memory.write(in_places, o.out.reshape(places))

    def _weights_of(
        self, problem: ConvProblem, tile: Any, device: Any, weight: np.ndarray
    ) -> Iterator[np.ndarray]:
        """Yield the taps of every part, reversed, with the roles of input and output channels exchanged."""
        grouped = weight.reshape(problem.groups, problem.gemm_m, *weight.shape[1:])
        is_view, cuts = self._takes_view(problem, tile, device), find_cuts(problem)
        exchanged = iter(self._memory.exchange(grouped, cuts) if cuts.shapes and not is_view else ())
        for part in find_parts(problem):
            shape = part.problem.weight_shape5
            if isinstance(part, Patches):
                yield self._memory.copy(np.moveaxis(grouped, 1, -1), weight.dtype).reshape(shape)
            elif part.is_zero:
                yield self._zeros(shape, weight.dtype)
            else:
                yield weight.swapaxes(0, 1)[part.taps] if is_view else next(exchanged)

    def _takes_view(self, problem: ConvProblem, tile: Any, device: Any) -> bool:
        """Say whether the weight of the only part is a view of the one given."""
        return _takes_view(self._forward, problem, tile, device)

    def _zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return zeros of a shape: one element of memory, seen as often as needed."""
        return np.broadcast_to(self._memory.zeros((1,), dtype), shape)


@lru_cache(maxsize=256)
def _takes_view(forward: ModuleType, problem: ConvProblem, tile: Any, device: Any) -> bool:
    parts = _met_parts(problem)
    if not problem.groups == len(parts) == 1:
        return False
    takes_view = getattr(forward, "takes_view", lambda problem, device: False)
    return _reads_any_weight(tile) or bool(takes_view(parts[0].problem, device))


def _reads_any_weight(tile: Any) -> bool:
    return getattr(tile, "reads_any_weight", False)


@lru_cache(maxsize=16)
def turn(backend: str, algo: str) -> InputGradient:
    """Return a backend's file of an algorithm turned round."""
    package = f"fastconv.{backend}"
    forward, memory = import_module(f"{package}.{algo}"), import_module(f"{package}.memory")
    own = find_spec(f"{package}.grad_input") and find_spec(f"{package}.grad_input.{algo}")
    return InputGradient(forward, memory, import_module(own.name) if own else None)
