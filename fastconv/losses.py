"""A call's input and target enter, its losses leave: the softmax, and the cross entropy on it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastconv.borrowing import Loan, is_real
from fastconv.problem import Call, integer, number


def softmax_of(xp: Any, x: Any, axis: int) -> Any:
    """Return the softmax along an axis."""
    if x.size == 0:
        return x
    if x.ndim == 0:
        return xp.exp(x - x)  # 1; NaN of NaN and infinities, as along an axis
    powers = xp.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def log_softmax_of(xp: Any, x: Any, axis: int) -> Any:
    """Return the logarithm of the softmax along an axis."""
    if x.size == 0 or x.ndim == 0:
        return x - x
    lower = x - x.max(axis, keepdims=True)
    return lower - xp.log(xp.exp(lower).sum(axis, keepdims=True))


class Loss:
    """The cross entropy of a call; the classes lie along `axis`."""

    def __init__(
        self, op: str, loan: Loan, ignore_index: int, reduction: str, label_smoothing: float
    ) -> None:
        self.loan, self.xp, self.x = loan, loan.xp, loan["input"]
        self.axis = 0 if self.x.ndim == 1 else 1
        self.is_real = is_real(loan.given["target"])
        options = {
            "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing,
        }  # fmt: skip
        shapes = {name: view.shape for name, view in loan.given.items()}
        call = Call(op, shapes, options, {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0})
        if reduction not in ("none", "mean", "sum"):
            raise call.error(f"reduction must be one of none, mean, sum, got {reduction!r}")
        self.ignore_index = integer(call, "ignore_index must be an int", ignore_index)
        self.smoothing = number(call, "label_smoothing")
        if not 0 <= self.smoothing <= 1:
            raise call.error(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
        self._check_shapes(call)
        self.classes = self.x.shape[self.axis]
        self.target = loan["target"] if self.is_real else loan["target"].astype(np.int64)
        if not self.is_real:
            self._find_classes(call)
        weight = loan["weight"]
        outer = (1,) * (self.x.ndim - self.axis - 1)
        self.weight = None if weight is None else weight.reshape(-1, *outer)

    def _check_shapes(self, call: Call) -> None:
        shape = self.x.shape
        if self.loan.given["target"].dtype.kind == "b":
            raise call.type_error("target must hold class indices or probabilities", "bool")
        if not shape or not shape[self.axis]:
            raise call.error(f"input must have an axis of at least one class, got shape {shape}")
        wanted = shape if self.is_real else shape[: self.axis] + shape[self.axis + 1 :]
        if (found := self.loan.shape("target")) != wanted:
            kind = "of probabilities" if self.is_real else "of class indices"
            raise call.error(f"target.shape {kind} must be {wanted}, got {found}")
        if "weight" in self.loan and self.loan.shape("weight") != (shape[self.axis],):
            found = self.loan.shape("weight")
            raise call.error(f"weight.shape must be (C,) = ({shape[self.axis]},), got {found}")

    def _find_classes(self, call: Call) -> None:
        """Find the targets that count, and their classes; others read class 0 and count for nothing."""
        self.counts = self.target != self.ignore_index
        is_class = (self.target >= 0) & (self.target < self.classes)
        if self.xp is np and not (is_class | ~self.counts).all():
            found = self.target[self.counts & ~is_class].flat[0]
            raise call.error(f"target must be a class from 0 to {self.classes - 1}, got {found}")
        self.is_unknown = self.counts & ~is_class
        self.classes_read = self.xp.expand_dims(self.xp.where(is_class, self.target, 0), self.axis)

    def losses(self) -> Any:
        """Return the loss of every element of the target."""
        log_p = log_softmax_of(self.xp, self.x, self.axis)
        weighted = log_p if self.weight is None else log_p * self.weight
        if self.is_real:
            return -(weighted * self.soft_target()).sum(self.axis)
        losses = -self.xp.take_along_axis(weighted, self.classes_read, self.axis).squeeze(self.axis)
        if self.smoothing:
            even = -weighted.sum(self.axis) / self.classes
            losses = (1 - self.smoothing) * losses + self.smoothing * even
        losses = self.xp.where(self.counts, losses, 0)
        return self.xp.where(self.is_unknown, np.nan, losses)

    def counts_wide(self) -> Any:
        """Return which elements of the target count, for every class."""
        return self.xp.expand_dims(self.counts, self.axis)

    def soft_target(self) -> Any:
        """Return the probabilities of the target, smoothed."""
        target = self.target
        return target if not self.smoothing else (1 - self.smoothing) * target + self.smoothing / self.classes

    def divisor(self) -> Any:
        """Return what the sum of all losses is divided by to have their mean."""
        if self.is_real:
            return self.loan.dtype.type(self.x.size // self.classes)
        return self.target_weights().sum()

    def target_weights(self) -> Any:
        """Return the weight of the class of every element of the target, 0 if it is ignored."""
        counts = self.counts.astype(self.loan.dtype)
        if self.weight is None:
            return counts
        weight = self.xp.broadcast_to(self.weight, self.x.shape)
        return counts * self.xp.take_along_axis(weight, self.classes_read, self.axis).squeeze(self.axis)
