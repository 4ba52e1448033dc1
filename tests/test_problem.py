"""The sizes a problem computes, against counting, and every error it can raise, by its text."""

import pickle
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastconv.problem import (
    ACTIVATIONS,
    PRECISIONS,
    ConvError,
    Epilogue,
    make_epilogue,
    make_problem,
    output_size,
)
from tests.cases import CASES, options_of
from tests.strategies import problems

X2, W2 = (8, 64, 56, 56), (128, 64, 3, 3)
SHAPES2 = "(input (8, 64, 56, 56), weight (128, 64, 3, 3)"

axes = st.tuples(
    st.integers(1, 24),
    st.integers(1, 7),
    st.integers(1, 9),
    st.integers(0, 6),
    st.integers(0, 6),
    st.integers(1, 8),
)  # size, kernel, stride, before, after, dilation


def windows_of(size, kernel, stride, before, after, dilation):
    """Every window as the list of padded rows that it reads, found by sliding it until it falls off."""
    windows, start = [], 0
    while start + dilation * (kernel - 1) < before + size + after:
        windows.append([start + tap * dilation for tap in range(kernel)])
        start += stride
    return windows


@given(axes)
def test_output_size_counts_windows(axis):
    assert max(output_size(*axis), 0) == len(windows_of(*axis))


@given(axes)
def test_output_size_in_ceil_mode(axis):
    """One more window that reaches over the end, if it begins before it; a pooling has this much padding."""
    size, kernel, stride, padding, _, dilation = axis
    padding = min(padding, kernel // 2)
    padded, begin = padding + size + padding, 0
    count = 0
    while begin + dilation * (kernel - 1) < padded:
        count, begin = count + 1, begin + stride
    over = begin + dilation * (kernel - 1) + 1 - padded
    count += begin < padding + size and over < stride
    found = output_size(size, kernel, stride, padding, padding, dilation, ceil_mode=True)
    assert max(found, 0) == count


@given(axes)
def test_unread_rows_are_those_no_window_touches(axis):
    size, kernel, stride, before, after, dilation = axis
    windows = windows_of(*axis)
    if not windows:
        return
    problem = make_problem(
        "conv1d", (1, 1, size), (1, 1, kernel), stride=stride, padding=[(before, after)], dilation=dilation
    )
    read = {row for window in windows for row in window}
    assert problem.unread == (0, 0, before + size + after - len(read))


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_same_padding_gives_ceil_of_size_over_stride(size, kernel, stride, dilation):
    problem = make_problem(
        "conv1d", (1, 1, size), (1, 1, kernel), stride=stride, padding="same", dilation=dilation
    )
    before, after = problem.padding[2]
    assert problem.output_shape[-1] == -(-size // stride)
    assert 0 <= after - before <= 1
    # No less padding would do: with one element fewer the last window does not fit.
    if before + after:
        assert output_size(size, kernel, stride, before, after - 1, dilation) == problem.Q - 1


def test_sizes_beyond_2_to_the_31_and_63():
    problem = make_problem("conv1d", (1, 1, 2**40), (2**30, 1, 3), stride=2)
    assert problem.Q == 2**39 - 1
    assert problem.macs == 3 * 2**30 * (2**39 - 1)
    assert problem.unread == (0, 0, 1)
    assert output_size(2**70 + 1, 3, 1, 0, 0, 2**69) == 1
    assert make_problem("conv1d", (1, 1, np.int32(2**31 - 1)), (1, 1, 1), padding=np.int8(100)).W == 2**31 - 1


@given(problems())
def test_every_problem_is_consistent(problem):
    n, k, o, p, q = problem.output_shape5
    assert min(k, o, p, q) >= 1
    assert problem.input_shape5 == (problem.N, problem.C, problem.D, problem.H, problem.W)
    assert problem.output_shape == (n, k, o, p, q)[:2] + (o, p, q)[3 - problem.ndim :]
    assert problem.macs == n * k * o * p * q * np.prod(problem.weight_shape[1:], dtype=object)
    assert problem.macs == problem.groups * problem.gemm_m * problem.gemm_n * problem.gemm_k
    assert all(row >= 0 for row in problem.unread)
    restated = make_problem(problem.op, problem.input_shape, problem.weight_shape, **options_of(problem))
    assert restated == problem
    assert hash(restated) == hash(problem)
    assert restated.key == problem.key


def test_numbers_of_a_known_layer():
    problem = make_problem("conv2d", X2, W2, padding=1)
    assert problem.output_shape == (8, 128, 56, 56)
    assert (problem.gemm_m, problem.gemm_n, problem.gemm_k) == (128, 8 * 56 * 56, 64 * 9)
    assert problem.flops == 2 * 128 * 8 * 56 * 56 * 64 * 9
    assert problem.parameters == 73728
    assert problem.bytes == 4 * (8 * 64 * 56 * 56 + 73728 + 8 * 128 * 56 * 56)
    assert problem.intensity == problem.flops / problem.bytes


@pytest.mark.parametrize(
    ("dtype", "itemsize", "compute"),
    [
        ("float32", 4, "float32"),
        ("float64", 8, "float64"),
        ("float16", 2, "float32"),
        ("bfloat16", 2, "float32"),
    ],
)
def test_dtypes(dtype, itemsize, compute):
    problem = make_problem("conv2d", X2, W2, dtype=dtype)
    assert (problem.itemsize, problem.compute_dtype) == (itemsize, compute)
    assert problem.bytes * 4 == make_problem("conv2d", X2, W2).bytes * itemsize


def test_absent_axes_are_1():
    problem = make_problem("conv1d", (2, 4, 9), (6, 2, 3), stride=2, padding=[(1, 0)], dilation=3, groups=2)
    assert problem.input_shape5 == (2, 4, 1, 1, 9)
    assert problem.weight_shape5 == (6, 2, 1, 1, 3)
    assert problem.output_shape5 == (2, 6, 1, 1, 2)
    assert (problem.input_shape, problem.weight_shape) == ((2, 4, 9), (6, 2, 3))
    assert problem.output_shape == (2, 6, 2)
    assert problem.stride == (1, 1, 2)
    assert problem.dilation == (1, 1, 3)
    assert problem.padding == ((0, 0), (0, 0), (1, 0))
    assert (problem.O, problem.P, problem.Q) == (1, 1, 2)


@pytest.mark.parametrize(
    ("padding", "resolved"),
    [
        (2, ((0, 0), (2, 2), (2, 2))),
        ((1, 2), ((0, 0), (1, 1), (2, 2))),
        ([(1, 2), (0, 3)], ((0, 0), (1, 2), (0, 3))),
        ((1, [0, 3]), ((0, 0), (1, 1), (0, 3))),
        (np.array([[1, 2], [0, 3]]), ((0, 0), (1, 2), (0, 3))),
        ("valid", ((0, 0), (0, 0), (0, 0))),
        ("same", ((0, 0), (1, 1), (1, 1))),
    ],
)
def test_padding_in_every_form(padding, resolved):
    assert make_problem("conv2d", X2, W2, padding=padding).padding == resolved


@pytest.mark.parametrize("stride", [2, np.int64(2), np.uint8(2), (2, 2), [2, 2], np.array([2, 2])])
def test_stride_in_every_form(stride):
    problem = make_problem("conv2d", X2, W2, stride=stride)
    assert problem.stride == (1, 2, 2)
    assert all(type(step) is int for step in problem.stride)


KEYS = {
    "n8c64h56w56_k128r3s3_st1x1_pad1x1_dil1x1_g1_float32": {"padding": 1},
    "n8c64h56w56_k128r3s3_st2x1_pad0x0_dil1x3_g1_float32": {"stride": (2, 1), "dilation": (1, 3)},
    "n8c64h56w56_k128r3s3_st1x1_pad1-2x0-1_dil1x1_g1_float32": {"padding": ((1, 2), (0, 1))},
    "n8c64h56w56_k128r3s3_st1x1_pad4x0-1_dil1x1_g1_float64": {"padding": (4, (0, 1)), "dtype": "float64"},
    "n8c64h56w56_k128r3s3_st1x1_pad0x0_dil1x1_g1_float16_nhwc": {"dtype": "float16", "order": "NHWC"},
    "n8c64h56w56_k128r3s3_st1x1_pad0x0_dil1x1_g1_float32_highest": {"precision": "highest"},
}


@pytest.mark.parametrize(("key", "options"), KEYS.items())
def test_key(key, options):
    problem = make_problem("conv2d", X2, W2, **options)
    assert problem.key == str(problem) == key


def test_key_of_other_ranks_and_passes():
    problem = make_problem("conv1d", (2, 4, 9), (6, 2, 3), groups=2)
    assert problem.key == "n2c4w9_k6s3_st1_pad0_dil1_g2_float32"
    assert replace(problem, direction="grad_input").key == problem.key + "_grad_input"
    volume = make_problem("conv3d", (1, 2, 4, 8, 9), (4, 2, 3, 2, 1), padding=(1, 0, 0))
    assert volume.key == "n1c2d4h8w9_k4t3r2s1_st1x1x1_pad1x0x0_dil1x1x1_g1_float32"


def test_keys_of_different_cases_differ():
    keys = [
        case.problem(**change).key
        for case in CASES
        for change in ({}, {"dtype": "float64"}, {"order": "NHWC"})
    ]
    assert len(set(keys)) == len(keys)


def test_problem_is_frozen_hashable_and_picklable():
    problem = make_problem("conv2d", X2, W2)
    with pytest.raises(FrozenInstanceError):
        problem.N = 3
    assert pickle.loads(pickle.dumps(problem)) == problem
    assert replace(problem, op="another name") == problem


def test_empty_batch_is_a_problem():
    problem = make_problem("conv2d", (0, 64, 56, 56), W2)
    assert problem.output_shape == (0, 128, 54, 54)
    assert (problem.macs, problem.gemm_n) == (0, 0)


FULL_TEXTS = [
    (
        {"input_shape": (8, 64, 56, 56), "groups": 2},
        f"conv2d: weight.shape[1] must be C // groups = 64 // 2 = 32, got 64 {SHAPES2}, groups 2)",
    ),
    (
        {"input_shape": (8, 64, 1, 56), "padding": ((0, 1), (1, 1)), "dilation": (3, 1)},
        "conv2d: kernel extent dilation * (R - 1) + 1 must be at most padding + H + padding = 0 + 1 + 1 = 2, "
        "got 3 * (3 - 1) + 1 = 7 "
        "(input (8, 64, 1, 56), weight (128, 64, 3, 3), padding ((0, 1), (1, 1)), dilation (3, 1))",
    ),
    ({"stride": 0}, f"conv2d: stride must be at least 1, got 0 {SHAPES2}, stride 0)"),
    (
        {"precision": "low"},
        f"conv2d: precision must be one of highest, high, medium, got 'low' {SHAPES2}, precision 'low')",
    ),
    ({"bias_shape": (64,)}, f"conv2d: bias.shape must be (K,) = (128,), got (64,) {SHAPES2}, bias (64,))"),
    (
        {"input_shape": (64, 56, 56)},
        "conv2d: input (N, C, H, W) must have 4 axes (3 without N), got 3 "
        "(input (64, 56, 56), weight (128, 64, 3, 3))",
    ),
]


@pytest.mark.parametrize(("arguments", "text"), FULL_TEXTS)
def test_error_reads_as_the_design_says(arguments, text):
    with pytest.raises(ConvError) as caught:
        make_problem(**{"op": "conv2d", "input_shape": X2, "weight_shape": W2, **arguments})
    assert str(caught.value) == text


CONV_ERRORS = [
    ({"op": "conv4d"}, "operation must be one of conv1d, conv2d, conv3d, got 'conv4d'"),
    ({"input_shape": (1, 8, 64, 56, 56)}, r"input \(N, C, H, W\) must have 4 axes \(3 without N\), got 5"),
    ({"input_shape": ()}, "must have 4 axes .*, got 0"),
    ({"weight_shape": (64, 3, 3)}, r"weight \(K, C // groups, R, S\) must have 4 axes, got 3"),
    ({"op": "conv1d"}, r"input \(N, C, W\) must have 3 axes \(2 without N\), got 4"),
    ({"op": "conv3d"}, r"input \(N, C, D, H, W\) must have 5 axes \(4 without N\), got 4"),
    ({"input_shape": (-1, 64, 56, 56)}, r"input.shape\[0\] must be at least 0, got -1"),
    ({"input_shape": (8, 0, 56, 56)}, r"input.shape\[1\] must be at least 1, got 0"),
    ({"input_shape": (8, 64, 0, 56), "padding": 9}, r"input.shape\[2\] must be at least 1, got 0"),
    ({"weight_shape": (0, 64, 3, 3)}, r"weight.shape\[0\] must be at least 1, got 0"),
    ({"weight_shape": (128, 0, 3, 3)}, r"weight.shape\[1\] must be at least 1, got 0"),
    ({"weight_shape": (128, 64, 3, 0)}, r"weight.shape\[3\] must be at least 1, got 0"),
    ({"weight_shape": (128, 32, 3, 3)}, r"weight.shape\[1\] must be C // groups = 64 // 1 = 64, got 32"),
    ({"groups": 0}, "groups must be at least 1, got 0"),
    ({"groups": -2}, "groups must be at least 1, got -2"),
    ({"groups": 3}, r"input.shape\[1\] must be a multiple of groups = 3, got 64"),
    (
        {"groups": 64, "weight_shape": (96, 1, 3, 3)},
        r"weight.shape\[0\] must be a multiple of groups = 64, got 96",
    ),
    ({"stride": -1}, "stride must be at least 1, got -1"),
    ({"stride": (1, 0)}, "stride must be at least 1, got 0"),
    ({"stride": (1, 2, 3)}, r"len\(stride\) must be the number of spatial axes \(H, W\) = 2, got 3"),
    ({"stride": ()}, r"len\(stride\) must be .* = 2, got 0"),
    ({"dilation": 0}, "dilation must be at least 1, got 0"),
    ({"dilation": (2,)}, r"len\(dilation\) must be the number of spatial axes \(H, W\) = 2, got 1"),
    ({"padding": -1}, "padding must be at least 0, got -1"),
    ({"padding": (0, (1, -2))}, "padding must be at least 0, got -2"),
    ({"padding": (1, 2, 3, 4)}, r"len\(padding\) must be the number of spatial axes \(H, W\) = 2, got 4"),
    ({"padding": (1, (1, 2, 3))}, r"len of a \(before, after\) pair in padding must be 2, got 3"),
    ({"padding": "full"}, "padding must be 'same', 'valid', an int, or .* pair per spatial axis, got 'full'"),
    (
        {"input_shape": (8, 64, 2, 56)},
        r"padding \+ H \+ padding = 0 \+ 2 \+ 0 = 2, got 1 \* \(3 - 1\) \+ 1 = 3",
    ),
    ({"dilation": (1, 28)}, r"dilation \* \(S - 1\) \+ 1 must be at most .* W .* = 56, got .* = 57"),
    ({"bias_shape": (128, 1)}, r"bias.shape must be \(K,\) = \(128,\), got \(128, 1\)"),
    ({"bias_shape": ()}, r"bias.shape must be \(K,\) = \(128,\), got \(\)"),
    (
        {"residual_shape": X2},
        r"residual.shape must be output.shape = \(8, 128, 54, 54\), got \(8, 64, 56, 56\)",
    ),
    ({"residual_shape": (128, 54, 54)}, r"residual.shape must be output.shape = .*, got \(128, 54, 54\)"),
    ({"order": "CHWN"}, "order must be one of NCHW, NHWC, got 'CHWN'"),
    ({"precision": "HIGH"}, "precision must be one of highest, high, medium, got 'HIGH'"),
]


@pytest.mark.parametrize(
    ("arguments", "pattern"), CONV_ERRORS, ids=[pattern[:48] for _, pattern in CONV_ERRORS]
)
def test_broken_rule_is_a_conv_error(arguments, pattern):
    with pytest.raises(ConvError, match=pattern) as caught:
        make_problem(**{"op": "conv2d", "input_shape": X2, "weight_shape": W2, **arguments})
    assert re.fullmatch(r"conv\dd: .+, got .+ \(input \(.*\), weight \(.*\).*\)", str(caught.value))


PER_AXIS = "must be an int or one int per spatial axis, got"
TYPE_ERRORS = [
    ({"stride": 2.0}, f"stride {PER_AXIS} 2.0 of type float"),
    ({"stride": float("nan")}, f"stride {PER_AXIS} nan of type float"),
    ({"stride": None}, f"stride {PER_AXIS} None of type NoneType"),
    ({"stride": True}, f"stride {PER_AXIS} True of type bool"),
    ({"stride": (1, True)}, f"stride {PER_AXIS} True of type bool"),
    ({"stride": (1, 2.0)}, f"stride {PER_AXIS} 2.0 of type float"),
    ({"stride": "2"}, f"stride {PER_AXIS} '2'"),
    ({"stride": {1, 2}}, f"stride {PER_AXIS} {{1, 2}} of type set"),
    ({"stride": np.array(2.0)}, rf"stride {PER_AXIS} array\(2.\) of type ndarray"),
    ({"stride": np.bool_(True)}, f"stride {PER_AXIS} .*True.* of type bool"),
    ({"dilation": 1.5}, f"dilation {PER_AXIS} 1.5 of type float"),
    ({"dilation": None}, f"dilation {PER_AXIS} None of type NoneType"),
    ({"padding": 1.0}, "padding must be 'same', .* got 1.0 of type float"),
    ({"padding": None}, "padding must be 'same', .* got None of type NoneType"),
    ({"padding": False}, "padding must be 'same', .* got False of type bool"),
    ({"padding": (1, None)}, "padding must be 'same', .* got None of type NoneType"),
    ({"padding": (1, (0, 1.0))}, "padding must be 'same', .* got 1.0 of type float"),
    ({"padding": ("same", "same")}, "padding must be 'same', .* got 'same'"),
    ({"padding": b"same"}, "padding must be 'same', .* got b'same' of type bytes"),
    ({"groups": 1.0}, "groups must be an int, got 1.0 of type float"),
    ({"groups": None}, "groups must be an int, got None of type NoneType"),
    ({"groups": True}, "groups must be an int, got True of type bool"),
    ({"groups": (1,)}, r"groups must be an int, got \(1,\) of type tuple"),
    (
        {"input_shape": (8, 64, float("nan"), 56)},
        "input.shape must be a tuple of ints, got nan of type float",
    ),
    ({"input_shape": (8, 64, 56.0, 56)}, "input.shape must be a tuple of ints, got 56.0 of type float"),
    ({"input_shape": None}, "input.shape must be a tuple of ints, got None of type NoneType"),
    ({"weight_shape": 3}, "weight.shape must be a tuple of ints, got 3 of type int"),
    ({"weight_shape": "3333"}, "weight.shape must be a tuple of ints, got '3333'"),
    ({"bias_shape": 128}, "bias.shape must be a tuple of ints, got 128 of type int"),
    (
        {"residual_shape": (8, 128, None, 54)},
        "residual.shape must be a tuple of ints, got None of type NoneType",
    ),
    ({"dtype": "int32"}, "dtype must be one of float32, float64, float16, bfloat16, got 'int32'"),
    ({"dtype": np.float32}, "dtype must be one of float32, .* of type type"),
    ({"dtype": None}, "dtype must be one of float32, .* got None of type NoneType"),
    ({"order": 1}, "order must be one of NCHW, NHWC, got 1 of type int"),
    ({"precision": None}, "precision must be one of highest, high, medium, got None of type NoneType"),
]


@pytest.mark.parametrize(
    ("arguments", "pattern"), TYPE_ERRORS, ids=[str(arguments) for arguments, _ in TYPE_ERRORS]
)
def test_wrong_type_is_a_type_error(arguments, pattern):
    with pytest.raises(TypeError, match=pattern) as caught:
        make_problem(**{"op": "conv2d", "input_shape": X2, "weight_shape": W2, **arguments})
    assert re.fullmatch(r"conv2d: .+, got .+ \(input .*, weight .*\)", str(caught.value))


def test_error_quotes_a_huge_value_shortened():
    with pytest.raises(ConvError, match="got 1000000") as caught:
        make_problem("conv2d", X2, W2, stride=np.arange(1_000_000))
    assert len(str(caught.value)) < 300


def test_every_precision_is_a_problem():
    assert [make_problem("conv2d", X2, W2, precision=name).precision for name in PRECISIONS] == list(
        PRECISIONS
    )


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "leaky_relu"])
def test_named_activations(name):
    assert make_epilogue("conv2d", name) == Epilogue(name, 0.0)


@pytest.mark.parametrize("slope", [0.25, 0, -1, np.float32(0.25), np.int64(2)])
def test_leaky_slope(slope):
    assert make_epilogue("conv2d", ("leaky_relu", slope)) == Epilogue("leaky_relu", float(slope))
    assert make_epilogue("conv2d", ["leaky_relu", slope]) == Epilogue("leaky_relu", float(slope))


def test_no_activation():
    assert make_epilogue("conv2d", None) == Epilogue(None, 0.0)


KNOWN = (
    "conv2d: activation must be None, 'relu', 'relu6', 'silu', 'gelu', 'sigmoid', 'tanh' "
    "or ('leaky_relu', slope), got "
)
SLOPE = "conv2d: slope of 'leaky_relu' must be a finite number, got "


@pytest.mark.parametrize(
    ("activation", "kind", "text"),
    [
        ("swish", ConvError, KNOWN + "'swish'"),
        ("leaky_relu", ConvError, KNOWN + "'leaky_relu'"),
        (("relu", 0.1), ConvError, KNOWN + "('relu', 0.1)"),
        (("leaky_relu",), ConvError, KNOWN + "('leaky_relu',)"),
        (3, TypeError, KNOWN + "3 of type int"),
        (max, TypeError, KNOWN + "<built-in function max> of type builtin_function_or_method"),
        (("leaky_relu", float("inf")), ConvError, SLOPE + "inf"),
        (("leaky_relu", float("nan")), ConvError, SLOPE + "nan"),
        (("leaky_relu", 10**400), ConvError, SLOPE + "1" + "0" * 17 + "..." + "0" * 19),
        (("leaky_relu", True), TypeError, SLOPE + "True of type bool"),
        (("leaky_relu", "0.1"), TypeError, SLOPE + "'0.1' of type str"),
        (("leaky_relu", None), TypeError, SLOPE + "None of type NoneType"),
    ],
)
def test_wrong_activation(activation, kind, text):
    with pytest.raises(kind) as caught:
        make_epilogue("conv2d", activation)
    assert str(caught.value) == text


def test_a_copy_from_another_process_is_the_same_key():
    """A remembered hash must not travel: that of a string is salted anew in every process."""
    problem = make_problem("conv2d", (1, 3, 9, 9), (4, 3, 3, 3))
    code = (
        "import pickle, sys; from fastconv.problem import make_problem;"
        "p = make_problem('conv2d', (1, 3, 9, 9), (4, 3, 3, 3)); hash(p);"
        "sys.stdout.buffer.write(pickle.dumps(p))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert {problem: "found"}[pickle.loads(run.stdout)] == "found"
