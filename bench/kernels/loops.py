"""The branches of some code enter, the span of its main loop leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Span = tuple[int, int]  # positions of the first instruction and of the last one


def main_span(branches: Iterable[Span], multiply_adds: Callable[[Span], int]) -> Span | None:
    """Return the innermost loop with multiply-adds that has most of them; None without such a loop.

    branches  from where, to where; those that go back close a loop
    """
    ends: dict[int, int] = {}  # several branches to one place close one loop
    for at, target in branches:
        if target <= at:
            ends[target] = max(at, ends.get(target, at))
    busy = {span: count for span in ends.items() if (count := multiply_adds(span))}
    innermost = [span for span in busy if not any(_is_inside(other, span) for other in busy)]
    return max(innermost, key=lambda span: busy[span], default=None)


def _is_inside(span: Span, other: Span) -> bool:
    return span != other and other[0] <= span[0] and span[1] <= other[1]
