"""Hypothesis strategies: problems of every kind, as many as there is time for."""

import hypothesis
from hypothesis import strategies as st

from fastconv.problem import OPERATIONS, ConvProblem, make_problem

# The first call of a kernel compiles it, which no deadline per example allows for.
hypothesis.settings.register_profile(
    "fastconv", deadline=None, derandomize=True, max_examples=60, print_blob=True
)
hypothesis.settings.load_profile("fastconv")


def problems(family: str | None = None, **fixed) -> st.SearchStrategy[ConvProblem]:
    """Valid problems of every rank, of one family or all; `fixed` (dtype, order) goes to make_problem."""
    families = {
        "anything": _anything(),
        "three_by_three": _three_by_three(),
        "pointwise": _pointwise(),
        "depthwise": _depthwise(),
    }
    chosen = families.values() if family is None else [families[family]]
    return st.one_of(*chosen).map(lambda arguments: make_problem(**{**arguments, **fixed}))


@st.composite
def _anything(draw):
    ndim = draw(st.sampled_from(tuple(OPERATIONS.values())))
    kernel = draw(_per_axis(ndim, 1, {1: 9, 2: 5, 3: 3}[ndim]))
    groups = draw(st.integers(1, 3))
    return draw(
        _geometry(ndim, kernel, groups, groups * draw(st.integers(1, 6)), groups * draw(st.integers(1, 6)))
    )


@st.composite
def _three_by_three(draw):
    groups = draw(st.integers(1, 2))
    channels, outputs = draw(_per_axis(2, 1, 20))
    return draw(
        _geometry(2, (3, 3), groups, groups * channels, groups * outputs, most_stride=1, most_dilation=1)
    )


@st.composite
def _pointwise(draw):
    ndim = draw(st.sampled_from(tuple(OPERATIONS.values())))
    return draw(_geometry(ndim, (1,) * ndim, 1, *draw(_per_axis(2, 1, 33)), most_dilation=1))


@st.composite
def _depthwise(draw):
    ndim = draw(st.sampled_from(tuple(OPERATIONS.values())))
    channels, multiplier = draw(st.integers(1, 19)), draw(st.integers(1, 3))
    kernel = draw(_per_axis(ndim, 1, {1: 12, 2: 7, 3: 3}[ndim]))
    return draw(_geometry(ndim, kernel, channels, channels, channels * multiplier))


@st.composite
def _geometry(draw, ndim, kernel, groups, channels, outputs, most_stride=3, most_dilation=3):
    """Padding and an input that is large enough: at least one window fits along every axis."""
    stride, dilation = draw(_per_axis(ndim, 1, most_stride)), draw(_per_axis(ndim, 1, most_dilation))
    pairs = st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * ndim)
    padding = draw(st.one_of(st.sampled_from(("same", "valid")), pairs))
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    given = [(0, 0)] * ndim if isinstance(padding, str) else padding
    least = [max(extent - before - after, 1) for extent, (before, after) in zip(extents, given, strict=True)]
    size = [low + draw(st.integers(0, {1: 40, 2: 12, 3: 5}[ndim])) for low in least]
    return {
        "op": f"conv{ndim}d",
        "input_shape": (draw(st.sampled_from((1, 2, 3, 0))), channels, *size),
        "weight_shape": (outputs, channels // groups, *kernel),
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }


def _per_axis(count, low, high):
    return st.tuples(*[st.integers(low, high)] * count)
