"""Parameters with their gradients enter; they leave changed, so that the loss falls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.train.layers import Parameter


class SGD:
    """Stochastic gradient descent with momentum: the gradients push, and the parameters keep rolling.

    Polyak 1964, "Some methods of speeding up the convergence of iteration methods".
    """

    def __init__(self, parameters: Sequence[Parameter], momentum: float):
        self.parameters = parameters
        self.momentum = momentum
        self.velocities = [np.zeros_like(parameter.value) for parameter in parameters]

    def step(self, rate: float) -> None:
        """Move every parameter by `rate` times its velocity."""
        for parameter, velocity in zip(self.parameters, self.velocities):
            velocity *= self.momentum
            velocity += parameter.gradient
            parameter.value -= rate * velocity


def decay_in_steps(rate: float, epoch: int, every: int) -> float:
    """The rate of an epoch, the first of which is 1: halved after every so many.

    >>> [decay_in_steps(0.1, epoch, every=2) for epoch in (1, 2, 3, 4, 5)]
    [0.1, 0.1, 0.05, 0.05, 0.025]
    """
    return rate * 0.5 ** ((epoch - 1) // every)
