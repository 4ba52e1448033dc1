"""Seconds enter, the moment when they are over is known to whoever asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic


class Deadline:
    """The end of a span of seconds that begins now."""

    def __init__(self, seconds: float, clock: Callable[[], float] = monotonic):
        self.clock = clock
        self.seconds = seconds
        self.end = clock() + seconds

    def left(self) -> float:
        """Seconds until the end, 0 after it."""
        return max(self.end - self.clock(), 0.0)

    def is_over(self) -> bool:
        """Whether the end has passed."""
        return self.left() == 0

    def part(self, share: float) -> Deadline:
        """The deadline of that share of the seconds that are left."""
        return Deadline(share * self.left(), self.clock)


def share_of(part: str, parts: Sequence[str], weights: Mapping[str, float]) -> float:
    """The share of the time left that `part` may take, if it and those behind it in `parts` are to run.

    What a part does not use goes to the later ones.

    >>> share_of("b", ["a", "b", "c"], {"a": 5, "b": 1, "c": 3})
    0.25
    """
    to_come = parts[parts.index(part) :]
    return weights[part] / sum(weights[name] for name in to_come)
