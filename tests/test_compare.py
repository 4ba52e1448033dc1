"""The comparison helpers can fail, and the arrays they hand out are what they say."""

import ml_dtypes  # noqa: F401 - makes np.dtype("bfloat16") known
import numpy as np
import pytest

from fastconv.problem import ITEMSIZE
from tests.cases import CASES, operands, sizes_around
from tests.compare import (
    assert_bounded,
    assert_exact,
    foreign_layouts,
    integers,
    layouts,
    normals,
    poisoned,
)

SHAPE = (2, 3, 4, 5)


@pytest.fixture
def expected(rng):
    return normals(rng, SHAPE, "float32")


@pytest.fixture(params=["exact", "bounded"])
def check(request):
    """Either helper; the bound is small enough that one step of float32 is wrong."""
    if request.param == "exact":
        return assert_exact
    return lambda actual, expected, **options: assert_bounded(actual, expected, 1e-9, **options)


def test_accepts_equal_arrays(check, expected):
    check(expected.copy(), expected)
    check(expected[::-1][::-1], expected)


def test_accepts_the_same_nan_and_inf(check, expected):
    expected[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    check(expected.copy(), expected)


def test_accepts_empty_arrays(check):
    check(np.zeros((0, 3), "float32"), np.zeros((0, 3), "float32"))


@pytest.mark.parametrize("index", [(0, 0, 0, 0), (1, 2, 3, 4), (1, 0, 2, 0)])
def test_one_element_one_step_off_fails(check, expected, index):
    actual = expected.copy()
    actual[index] = np.nextafter(actual[index], np.float32(9))
    with pytest.raises(AssertionError, match=r"1 of 120 elements are wrong"):
        check(actual, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_element_not_finite_fails(check, expected, value):
    actual = expected.copy()
    actual[1, 1, 1, 1] = value
    with pytest.raises(AssertionError, match=r"1 of 120 .*\n  \[1, 1, 1, 1\]: got -?(nan|inf)"):
        check(actual, expected)
    with pytest.raises(AssertionError, match=r"1 of 120 .*\n  \[1, 1, 1, 1\]: .*expected -?(nan|inf)"):
        check(expected, actual)


def test_opposite_infinities_fail(check):
    with pytest.raises(AssertionError, match="1 of 1"):
        check(np.array([np.inf]), np.array([-np.inf]))


@pytest.mark.parametrize("order", ["NCHW", "NHWC"])
def test_untouched_output_fails(check, expected, order):
    with pytest.raises(AssertionError, match="120 of 120"):
        check(poisoned(SHAPE, "float32", order), expected)


def test_wrong_dtype_fails(check, expected):
    with pytest.raises(AssertionError, match="expected dtype float32, got float64"):
        check(expected.astype("float64"), expected)
    with pytest.raises(AssertionError, match="expected dtype float64, got float32"):
        check(expected, expected, dtype="float64")
    with pytest.raises(AssertionError, match="expected dtype float32, got >f4"):
        check(expected.astype(">f4"), expected)


def test_wrong_shape_fails(check, expected):
    with pytest.raises(AssertionError, match=r"expected shape \(2, 3, 4, 5\), got \(2, 3, 4, 1\)"):
        check(expected[..., :1], expected)
    with pytest.raises(AssertionError, match=r"expected shape \(2, 3, 4, 5\), got \(1, 2, 3, 4, 5\)"):
        check(expected[None], expected)


def test_not_an_array_fails(check, expected):
    with pytest.raises(AssertionError, match="expected a NumPy array, got list"):
        check(expected.tolist(), expected)


def test_exact_compares_with_the_reference_rounded_once():
    reference = np.array([2049.0, 1e6, 0.1])
    rounded = np.array([2048.0, np.inf, 0.1], dtype="float16")
    assert_exact(rounded, reference, dtype="float16")
    with pytest.raises(AssertionError, match="1 of 3"):
        assert_exact(np.array([2050.0, np.inf, 0.1], dtype="float16"), reference, dtype="float16")


def test_bounded_does_not_round_the_reference():
    reference = np.array([1.0 + 2**-25])
    assert_bounded(np.ones(1, "float32"), reference, 2**-25, dtype="float32")
    with pytest.raises(AssertionError, match="1 of 1"):
        assert_bounded(np.ones(1, "float32"), reference, 2**-26, dtype="float32")


def test_each_element_has_its_own_bound():
    bound = np.array([1.0, 0.0, 0.5])
    assert_bounded(np.array([1.0, 0.0, 0.5]), np.zeros(3), bound)
    with pytest.raises(AssertionError) as caught:
        assert_bounded(np.array([2.0, 0.25, 0.5]), np.zeros(3), bound)
    assert str(caught.value) == (
        "2 of 3 elements are wrong\n"
        "  [0]: got 2, expected 0, error 2 = 2 bounds\n"
        "  [1]: got 0.25, expected 0, error 0.25"
    )


@pytest.mark.parametrize("bound", [np.nan, np.inf])
def test_a_bound_that_is_not_finite_permits_nothing(bound):
    assert_bounded(np.ones(2), np.ones(2), bound)
    with pytest.raises(AssertionError, match="1 of 2"):
        assert_bounded(np.array([1.0, 2.0]), np.ones(2), bound)


def test_a_bound_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="broadcast"):
        assert_bounded(np.ones(3), np.ones(3), np.ones(4))


def test_failure_lists_the_first_five():
    with pytest.raises(AssertionError) as caught:
        assert_bounded(np.arange(10.0), np.zeros(10), 0.5)
    lines = str(caught.value).splitlines()
    assert lines[0] == "9 of 10 elements are wrong"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["[1]", "[2]", "[3]", "[4]", "[5]"]


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("shape", [(2, 3, 5), SHAPE, (2, 3, 2, 4, 5)])
def test_poisoned(shape, dtype):
    for order, strided in (("NCHW", -1), ("NHWC", 1)):
        output = poisoned(shape, dtype, order)
        assert output.shape == shape
        assert output.dtype == dtype
        assert np.isnan(output.astype("float64")).all()
        assert output.strides[strided] == output.itemsize


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("shape", [(6,), (2, 3, 5), SHAPE, (2, 3, 2, 4, 5), (0, 3, 4, 5)])
def test_layouts_hold_the_same_values_differently(rng, shape, dtype):
    array = integers(rng, shape, dtype)
    seen = {}
    for name, view in [*layouts(array), *foreign_layouts(array)]:
        assert view.shape == shape
        assert np.array_equal(view.astype("float64"), array.astype("float64")), name
        assert not np.shares_memory(view, array)
        seen[name] = view
    if array.size == 0:
        return
    assert seen["contiguous"].flags.c_contiguous
    assert not seen["sliced"].flags.c_contiguous or len(shape) == 1
    assert all(step % (2 * array.itemsize) == 0 for step in seen["strided"].strides)
    assert seen["transposed"].flags.f_contiguous
    assert max(seen["negative-strided"].strides) < 0
    assert seen["offset"].ctypes.data - seen["offset"].base.ctypes.data in (0, array.itemsize)
    assert not seen["read-only"].flags.writeable
    assert not seen["misaligned"].flags.aligned
    assert not seen["byte-swapped"].dtype.isnative
    if len(shape) >= 3:
        assert seen["channels-last"].strides[1] == array.itemsize


def test_integers_and_normals(rng):
    whole = integers(rng, (1000,), "float16")
    assert set(whole.tolist()) == set(range(-4, 5))
    assert whole.dtype == "float16"
    wide = normals(rng, (1000,), "float64")
    assert wide.min() < -2 < 2 < wide.max()
    assert (wide.astype("float32") != wide).any()


def test_sizes_around_a_tile():
    assert sizes_around(6) == {"lt": 5, "eq": 6, "gt": 7, "div": 12, "multi": 19}
    assert min(sizes_around(1).values()) >= 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases_are_problems_with_operands(rng, case):
    problem = case.problem(dtype="bfloat16")
    x, w, bias, residual = operands(rng, problem, normals)
    assert (x.shape, w.shape) == (case.input_shape, case.weight_shape)
    assert (bias.shape, residual.shape) == ((problem.K,), problem.output_shape)
    assert {array.dtype for array in (x, w, bias, residual)} == {np.dtype("bfloat16")}
    assert problem.macs < 5_000_000  # small enough to run each with every algorithm, tile and layout


def test_case_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)
