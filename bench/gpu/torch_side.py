"""What torch does in the run on a GPU: it judges results in float64, and it is how cuDNN is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from bench.check import WRONG, Verdict
from bench.rows import Row
from bench.workload import as_torch
from fastconv.algorithms import ErrorBound
from fastconv.problem import ConvProblem

Call = Callable[[], Any]

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
POOLINGS = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class TorchJudge:
    """The float64 result of one problem and the scale of its rounding errors, wherever the arrays lie."""

    name = "torch in float64"

    def __init__(self, problem: ConvProblem, x: Any, weight: Any):
        self.problem = problem
        self.x, self.weight = torch.from_dlpack(x).double(), torch.from_dlpack(weight).double()
        self.options, self.drop = as_torch(problem)
        self.convolve = CONVOLUTIONS[problem.ndim]
        self.expected = self.drop(self.convolve(self.x, self.weight, **self.options))
        self.scales: dict[int, torch.Tensor] = {}

    def judge(self, y: Any, bound: ErrorBound) -> Verdict:
        """Compare an output of float32 or float64 with the reference, element by element."""
        found = torch.from_dlpack(y).double()
        if found.shape != self.expected.shape:
            return Verdict(WRONG, f"shape must be {tuple(self.expected.shape)}, got {tuple(found.shape)}")
        deviation = (found - self.expected).abs()
        eps = torch.finfo(getattr(torch, self.problem.compute_dtype)).eps
        units = deviation / (bound.factor * eps * self._scale(bound.reach))
        units = torch.where(deviation == 0, 0.0, units.nan_to_num(nan=WRONG, posinf=WRONG))
        worst = int(units.argmax())
        error = min(float(units.flatten()[worst]), WRONG)
        if error <= 1:
            return Verdict(error)
        got, wanted = float(found.flatten()[worst]), float(self.expected.flatten()[worst])
        place = tuple(int(i) for i in np.unravel_index(worst, found.shape))
        return Verdict(error, f"{error:.3g} times its bound: {got:.9g} for {wanted:.9g} at {place}")

    def _scale(self, reach: int) -> torch.Tensor:
        """fastconv.reference.error_scale, in torch."""
        if reach not in self.scales:
            before_after = [size for pair in reversed(self.options["padding"]) for size in (pair, pair)]
            x = functional.pad(self.x.abs(), before_after)
            if reach:
                x = POOLINGS[self.problem.ndim](x, 2 * reach + 1, stride=1, padding=reach)
            options = {**self.options, "padding": 0}
            self.scales[reach] = self.drop(self.convolve(x, self.weight.abs(), **options))
        return self.scales[reach]


def set_up() -> None:
    """Let cuDNN measure its algorithms for each new shape, and keep torch from recording gradients."""
    torch.backends.cudnn.benchmark = True
    torch.set_grad_enabled(False)


def cudnn_calls(
    problem: ConvProblem, x: Any, weight: Any, bias: Any, tf32: bool
) -> Iterator[tuple[Row, Call]]:
    """Yield every way to call cuDNN: columns, and the call; TF32 is set as asked when it is yielded."""
    torch.backends.cudnn.allow_tf32 = tf32
    (options, drop), convolve = as_torch(problem), CONVOLUTIONS[problem.ndim]
    tensors = [torch.from_dlpack(array) for array in (x, weight)]
    b = torch.from_dlpack(bias)
    for order in ("NCHW", "NHWC") if problem.ndim in CHANNELS_LAST else ("NCHW",):
        memory = torch.contiguous_format if order == "NCHW" else CHANNELS_LAST[problem.ndim]
        tx, tw = (tensor.contiguous(memory_format=memory) for tensor in tensors)
        for name, is_fused, call in _ways(convolve, tx, tw, b, options):
            yield {"order": order, "tf32": tf32, "call": name, "fused": is_fused}, _then(drop, call)


def _then(drop: Callable[[Any], Any], call: Call) -> Call:
    return lambda: drop(call())


def _ways(
    convolve: Callable[..., Any], x: Any, weight: Any, bias: Any, options: dict[str, Any]
) -> list[tuple[str, bool, Call]]:
    """(name, whether bias and ReLU are in it, call)."""
    ways: list[tuple[str, bool, Call]] = [
        ("conv", False, lambda: convolve(x, weight, **options)),
        ("relu_(conv + bias)", True, lambda: functional.relu_(convolve(x, weight, bias, **options))),
    ]
    if x.ndim > 3:
        order = ("stride", "padding", "dilation", "groups")
        values = [options[name] for name in order]
        fused = torch.cudnn_convolution_relu
        ways.append(("cudnn_convolution_relu", True, lambda: fused(x, weight, bias, *values)))
    return ways
