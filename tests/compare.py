"""Arrays enter, nothing or an AssertionError leaves; and the arrays that tests compare.

An element is wrong by itself: no mean, norm or cosine in which one wrong element could hide.
"""

import contextlib
from collections.abc import Iterator

import numpy as np

with contextlib.suppress(ImportError):  # then bfloat16 is not tested
    import ml_dtypes


def assert_exact(actual, expected, dtype=None):
    """Every element equals expected rounded once to dtype (by default its own); NaN equals only NaN."""
    _assert_same_kind(actual, expected, dtype)
    with np.errstate(over="ignore"):  # a sum beyond float16 is right to become inf
        rounded = expected.astype(actual.dtype)
    _assert_elements(actual, rounded, np.zeros(expected.shape))


def assert_bounded(actual, expected, bound, dtype=None):
    """Every element lies within its own bound of expected, which is not rounded to the dtype asked for.

    Where expected or bound is inf or NaN, only the same inf or NaN is right.
    """
    _assert_same_kind(actual, expected, dtype)
    _assert_elements(actual, expected, np.broadcast_to(np.asarray(bound, dtype=np.float64), expected.shape))


def _assert_same_kind(actual, expected, dtype):
    assert isinstance(actual, np.ndarray), f"expected a NumPy array, got {type(actual).__name__}"
    assert actual.shape == expected.shape, f"expected shape {expected.shape}, got {actual.shape}"
    wanted = expected.dtype if dtype is None else np.dtype(dtype)
    assert actual.dtype == wanted, f"expected dtype {wanted}, got {actual.dtype}"


def _assert_elements(actual, expected, bound):
    got, want = actual.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf: not within any bound, yet equal
        error = np.abs(got - want)
    equal = (got == want) | (np.isnan(got) & np.isnan(want))
    within = np.isfinite(bound) & (error <= bound)
    wrong = np.argwhere(~(equal | within))
    if len(wrong):
        lines = [_describe(tuple(index.tolist()), got, want, error, bound) for index in wrong[:5]]
        raise AssertionError("\n".join([f"{len(wrong)} of {got.size} elements are wrong", *lines]))


def _describe(index, got, want, error, bound):
    text = f"  {list(index)}: got {got[index]:.9g}, expected {want[index]:.9g}, error {error[index]:.3g}"
    return f"{text} = {error[index] / bound[index]:.3g} bounds" if bound[index] > 0 else text


def finfo(dtype):
    """What NumPy's finfo tells, of bfloat16 too."""
    return ml_dtypes.finfo(dtype) if np.dtype(dtype).name == "bfloat16" else np.finfo(dtype)


def poisoned(shape, dtype, order="NCHW"):
    """An output whose every element is NaN until it is written, in either memory order."""
    if order == "NCHW":
        return np.full(shape, np.nan, dtype=dtype)
    channels, *sizes = shape[1:]
    return np.moveaxis(np.full((shape[0], *sizes, channels), np.nan, dtype=dtype), -1, 1)


def layouts(array) -> Iterator[tuple[str, np.ndarray]]:
    """The same values in every memory layout that kernels must read, each in memory of its own.

    What surrounds a view is NaN, so that a read past its edge shows in the result.
    """
    yield "contiguous", np.array(array, order="C")
    yield (
        "sliced",
        _embed(array, tuple(slice(1, 1 + size) for size in array.shape), [size + 3 for size in array.shape]),
    )
    every_second = tuple(slice(0, 2 * size, 2) for size in array.shape)
    yield "strided", _embed(array, every_second, [2 * size for size in array.shape])
    yield "transposed", np.array(array.T, order="C").T
    backwards = (slice(None, None, -1),) * array.ndim
    yield "negative-strided", np.array(array[backwards], order="C")[backwards]
    yield "offset", _embed(array.ravel(), slice(1, None), [array.size + 1]).reshape(array.shape)
    read_only = np.array(array, order="C")
    read_only.setflags(write=False)
    yield "read-only", read_only
    if array.ndim >= 3:
        yield "channels-last", np.moveaxis(np.array(np.moveaxis(array, 1, -1), order="C"), -1, 1)


def foreign_layouts(array) -> Iterator[tuple[str, np.ndarray]]:
    """The same values in memory that no kernel can read: the operations must take a copy."""
    raw = np.zeros(array.nbytes + 1, dtype=np.uint8)
    misaligned = raw[1:].view(array.dtype).reshape(array.shape)
    misaligned[...] = array
    yield "misaligned", misaligned
    yield "byte-swapped", array.astype(array.dtype.newbyteorder())


def _embed(array, where, shape):
    around = np.full(shape, np.nan, dtype=array.dtype)
    around[where] = array
    return around[where]


def integers(rng, shape, dtype="float32"):
    """Whole numbers in [-4, 4]: their sums of products are exact in any order that the accumulator holds."""
    return rng.integers(-4, 5, size=shape).astype(dtype)


def normals(rng, shape, dtype="float32"):
    """Normal numbers, mean 0 and deviation 1, of both signs: sums cancel, as they do in a network."""
    return rng.standard_normal(shape).astype(dtype)
