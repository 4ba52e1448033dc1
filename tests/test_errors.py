"""Bad input of every kind is refused in words before any kernel runs: `out` keeps what it held."""

import collections

import numpy as np
import pytest

import fastconv
from fastconv import ConvError, plan
from tests.test_arrays import FakeCudaArray

NAN = float("nan")
OUT = (2, 6, 5, 5)  # of the good call below
ARRAY = "must be a NumPy or CuPy array, a torch tensor or an array with __cuda_array_interface__, got "
DTYPE = "must be float16, bfloat16, float32 or float64, got "
AXES = "must be an int or one int per spatial axis"


def good(**changes):
    """A call that succeeds, less what the changes spoil."""
    arguments = {
        "input": np.ones((2, 4, 7, 7), np.float32),
        "weight": np.ones((6, 4, 3, 3), np.float32),
        "bias": np.ones(6, np.float32),
        "out": np.full(OUT, 7, np.float32),
    }
    return {**arguments, **changes}


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def structured():
    return np.ones((2, 4, 7, 7), [("a", "f4")])


# name: (changes to the good call, exception, what its message must hold)
BAD = {
    # ranks
    "scalar input": ({"input": np.float32(1)}, TypeError, f"input {ARRAY}"),
    "input without axes": (
        {"input": np.array(1, np.float32)}, ConvError,
        "must have 4 axes (3 without N), got 0",
    ),
    "input with one axis": ({"input": ones(4)}, ConvError, "must have 4 axes (3 without N), got 1"),
    "input of conv1d": ({"input": ones(4, 7)}, ConvError, "must have 4 axes (3 without N), got 2"),
    "input of conv3d": ({"input": ones(2, 4, 7, 7, 7)}, ConvError, "must have 4 axes (3 without N), got 5"),
    "weight of conv1d": (
        {"weight": ones(6, 4, 3)}, ConvError,
        "weight (K, C // groups, R, S) must have 4 axes, got 3",
    ),
    "weight without axes": ({"weight": np.array(1, np.float32)}, ConvError, "must have 4 axes, got 0"),
    "bias with two axes": ({"bias": ones(6, 1)}, ConvError, "bias.shape must be (K,) = (6,), got (6, 1)"),
    "scalar bias": ({"bias": np.array(1, np.float32)}, ConvError, "bias.shape must be (K,) = (6,), got ()"),
    # sizes
    "other channels": (
        {"input": ones(2, 5, 7, 7)}, ConvError,
        "weight.shape[1] must be C // groups = 5 // 1 = 5, got 4",
    ),
    "channels not divisible": (
        {"groups": 3}, ConvError,
        "input.shape[1] must be a multiple of groups = 3, got 4",
    ),
    "outputs not divisible": (
        {"groups": 4, "weight": ones(6, 1, 3, 3)}, ConvError,
        "weight.shape[0] must be a multiple",
    ),
    "weight of all channels": (
        {"groups": 2}, ConvError,
        "weight.shape[1] must be C // groups = 4 // 2 = 2, got 4",
    ),
    "no channels": (
        {"input": ones(2, 0, 7, 7), "weight": ones(6, 0, 3, 3)}, ConvError,
        "input.shape[1] must be at least 1",
    ),
    "no outputs": (
        {"weight": ones(0, 4, 3, 3), "bias": None}, ConvError,
        "weight.shape[0] must be at least 1, got 0",
    ),
    "no taps": ({"weight": ones(6, 4, 0, 3)}, ConvError, "weight.shape[2] must be at least 1, got 0"),
    "no rows": (
        {"input": ones(2, 4, 0, 7), "padding": 3}, ConvError,
        "input.shape[2] must be at least 1, got 0",
    ),
    "kernel too large": (
        {"weight": ones(6, 4, 8, 3)}, ConvError,
        "(R - 1) + 1 must be at most padding + H + padding = 0 + 7 + 0 = 7",
    ),
    "dilated kernel too large": ({"dilation": 4}, ConvError, "got 4 * (3 - 1) + 1 = 9"),
    "kernel of absurd extent": ({"dilation": 10**30}, ConvError, "must be at most padding + H + padding"),
    "short bias": ({"bias": ones(5)}, ConvError, "bias.shape must be (K,) = (6,), got (5,)"),
    "residual of the input's shape": (
        {"residual": ones(2, 4, 7, 7)}, ConvError,
        "residual.shape must be output.shape = (2, 6, 5, 5)",
    ),
    "residual without batch": ({"residual": ones(6, 5, 5)}, ConvError, "residual.shape must be output.shape"),
    "residual to be broadcast": (
        {"residual": ones(2, 6, 1, 1)}, ConvError,
        "residual.shape must be output.shape",
    ),
    # options
    "zero stride": ({"stride": 0}, ConvError, "stride must be at least 1, got 0"),
    "negative stride": ({"stride": (1, -2)}, ConvError, "stride must be at least 1, got -2"),
    "stride for three axes": (
        {"stride": (1, 1, 1)}, ConvError,
        "len(stride) must be the number of spatial axes (H, W) = 2, got 3",
    ),
    "stride 2.0": ({"stride": 2.0}, TypeError, f"stride {AXES}, got 2.0 of type float"),
    "stride NaN": ({"stride": NAN}, TypeError, f"stride {AXES}, got nan"),
    "stride NaN in an array": ({"stride": np.array([NAN, 1])}, TypeError, "got nan of type float"),
    "stride True": ({"stride": True}, TypeError, "got True of type bool"),
    "stride None": ({"stride": None}, TypeError, "got None of type NoneType"),
    "stride in words": ({"stride": "2"}, TypeError, f"stride {AXES}, got '2'"),
    "stride in a set": ({"stride": {1, 2}}, TypeError, f"stride {AXES}"),
    "stride in a dict": ({"stride": {}}, TypeError, f"stride {AXES}"),
    "zero dilation": ({"dilation": 0}, ConvError, "dilation must be at least 1, got 0"),
    "dilation 1.0 in a tuple": ({"dilation": (1, 1.0)}, TypeError, f"dilation {AXES}, got 1.0"),
    "negative padding": ({"padding": -1}, ConvError, "padding must be at least 0, got -1"),
    "padding of three numbers": ({"padding": ((1, 2, 3), 0)}, ConvError, "pair in padding must be 2, got 3"),
    "padding in other words": ({"padding": "full"}, ConvError, "padding must be 'same', 'valid', an int"),
    "padding 0.5": ({"padding": 0.5}, TypeError, "got 0.5 of type float"),
    "zero groups": ({"groups": 0}, ConvError, "groups must be at least 1, got 0"),
    "negative groups": ({"groups": -2}, ConvError, "groups must be at least 1, got -2"),
    "groups per axis": ({"groups": (1, 1)}, TypeError, "groups must be an int, got (1, 1)"),
    "groups None": ({"groups": None}, TypeError, "groups must be an int, got None"),
    # names
    "unknown algorithm": (
        {"algo": "fft"}, ConvError,
        "algo must be one of auto, direct, im2col, winograd, pointwise, depthwise, got 'fft'",
    ),
    "algorithm that refuses": (
        {"algo": "pointwise"}, ConvError,
        "algo='pointwise' cannot run n2c4h7w7_k6r3s3_",
    ),
    "algorithm None": ({"algo": None}, TypeError, "algo must be a string, got None"),
    "algorithm in a list": ({"algo": ["direct"]}, TypeError, "algo must be a string, got ['direct']"),
    "unknown precision": (
        {"precision": "low"}, ConvError,
        "precision must be one of highest, high, medium, got 'low'",
    ),
    "precision None": (
        {"precision": None}, TypeError,
        "precision must be one of highest, high, medium, got None",
    ),
    "unknown activation": (
        {"activation": "swish"}, ConvError,
        "'relu', 'relu6', 'silu', 'gelu', 'sigmoid', 'tanh' or",
    ),
    "leaky_relu without slope": (
        {"activation": "leaky_relu"}, ConvError,
        "('leaky_relu', slope), got 'leaky_relu'",
    ),
    "slope NaN": (
        {"activation": ("leaky_relu", NAN)}, ConvError,
        "slope of 'leaky_relu' must be a finite number, got nan",
    ),
    "activation as a function": ({"activation": np.tanh}, TypeError, "activation must be None, 'relu'"),
    "unknown layout": ({"layout": "NWHC"}, ConvError, "layout must be one of NCHW, NHWC, got 'NWHC'"),
    "layout of conv1d": ({"layout": "NCL"}, ConvError, "layout must be one of NCHW, NHWC, got 'NCL'"),
    "layout without a name": ({"layout": ""}, ConvError, "layout must be one of NCHW, NHWC, got ''"),
    "layout None": ({"layout": None}, TypeError, "layout must be one of NCHW, NHWC, got None"),
    "flip 1": ({"flip": 1}, TypeError, "flip must be True or False, got 1"),
    "flip in words": ({"flip": "no"}, TypeError, "flip must be True or False, got 'no'"),
    # kinds of array
    "input None": ({"input": None}, TypeError, f"input {ARRAY}NoneType"),
    "weight None": ({"weight": None}, TypeError, f"weight {ARRAY}NoneType"),
    "weight in lists": ({"weight": ones(6, 4, 3, 3).tolist()}, TypeError, f"weight {ARRAY}list"),
    "bias a number": ({"bias": 1.0}, TypeError, f"bias {ARRAY}float"),
    "residual a number": ({"residual": 0}, TypeError, f"residual {ARRAY}int"),
    "masked input": (
        {"input": np.ma.ones((2, 4, 7, 7), np.float32)}, TypeError,
        "input must be an array without a mask, got numpy.ma.MaskedArray",
    ),
    "masked bias": ({"bias": np.ma.ones(6, np.float32)}, TypeError, "bias must be an array without a mask"),
    "CUDA weight": (
        {"weight": FakeCudaArray()}, TypeError,
        "weight must be a NumPy array like input, got a CUDA array",
    ),
    "CUDA arrays": (
        dict.fromkeys(("input", "weight", "bias", "out"), FakeCudaArray()), ConvError,
        "CUDA",  # nothing computes on it here, or, with a GPU, it has no memory
    ),
    # dtypes
    "integers": ({"input": ones(2, 4, 7, 7, dtype=np.int64)}, TypeError, f"input.dtype {DTYPE}int64"),
    "booleans": ({"weight": ones(6, 4, 3, 3, dtype=bool)}, TypeError, f"weight.dtype {DTYPE}bool"),
    "complex": ({"bias": ones(6, dtype=np.complex64)}, TypeError, f"bias.dtype {DTYPE}complex64"),
    "objects": ({"input": ones(2, 4, 7, 7, dtype=object)}, TypeError, "got object"),
    "strings": ({"input": ones(2, 4, 7, 7).astype("U3")}, TypeError, "input.dtype must be"),
    "structured": ({"input": structured()}, TypeError, "got void32"),
    "dates": ({"input": ones(2, 4, 7, 7, dtype=np.int64).view("M8[s]")}, TypeError, "got datetime64[s]"),
    "mixed weight": (
        {"weight": ones(6, 4, 3, 3, dtype=np.float64)}, TypeError,
        "weight.dtype must be input.dtype = float32, got float64",
    ),
    "mixed bias": (
        {"bias": ones(6, dtype=np.float16)}, TypeError,
        "bias.dtype must be input.dtype = float32, got float16",
    ),
    "mixed residual": (
        {"residual": ones(*OUT, dtype=np.float64)}, TypeError,
        "residual.dtype must be input.dtype",
    ),
    "mixed out": (
        {"out": ones(*OUT, dtype=np.float64)}, TypeError,
        "out.dtype must be input.dtype = float32, got float64",
    ),
    # out
    "out of another shape": (
        {"out": ones(2, 6, 7, 7)}, ConvError,
        "out.shape must be result.shape = (2, 6, 5, 5), got (2, 6, 7, 7)",
    ),
    "out without batch": ({"out": ones(6, 5, 5)}, ConvError, "out.shape must be result.shape"),
    "out a list": ({"out": []}, TypeError, f"out {ARRAY}list"),
    "out with shared elements": (
        {"out": np.lib.stride_tricks.as_strided(ones(2, 6, 5), OUT, (120, 20, 4, 0))}, ConvError,
        "elements of out must not share memory",
    ),
}  # fmt: skip


class TestFunctions:
    @pytest.mark.parametrize("name", BAD)
    def test_refused(self, name, monkeypatch):
        changes, error, text = BAD[name]
        arguments = good(**changes)
        kept = arguments["out"]
        before = kept.copy() if isinstance(kept, np.ndarray) else None
        monkeypatch.setattr(plan.Plan, "run", None)  # it must not be reached
        for _ in range(2):  # again: a refusal is not remembered as a success
            with pytest.raises(error) as caught:
                fastconv.conv2d(**arguments)
            assert type(caught.value) is error
            assert str(caught.value).startswith("conv2d: ")
            assert text in str(caught.value)
        if before is not None:
            assert np.array_equal(kept, before)

    def test_the_call_without_changes_is_good(self):
        arguments = good()
        assert fastconv.conv2d(**arguments) is arguments["out"]
        assert (arguments["out"] == 37).all()

    @pytest.mark.parametrize("op", ["conv1d", "conv2d", "conv3d"])
    def test_refused_by_every_rank(self, op):
        ndim = int(op[4])
        x, w = ones(1, 4, *(5,) * ndim), ones(6, 4, *(3,) * ndim)
        for changes in ({"stride": 0}, {"groups": 3}, {"dilation": 3}, {"layout": "CHWN"}, {"algo": "fft"}):
            with pytest.raises(ConvError, match=rf"^{op}: "):
                getattr(fastconv, op)(x, w, **changes)

    def test_a_layer_takes_the_weight_itself(self):
        text = "^conv2d: weight of Conv2d must be an array, got 3 .fastconv.torch.Conv2d takes numbers"
        with pytest.raises(TypeError, match=text):
            fastconv.Conv2d(3, 8, 3)

    @pytest.mark.parametrize("bad", [1.0, True, np.float64(1), np.True_])
    def test_what_equals_one_is_not_one(self, bad):
        """After a call with 1 was remembered: 1.0 == True == 1, and their hashes are the same."""
        x, w = ones(1, 1, 4, 4), ones(1, 1, 3, 3)
        for option in ("stride", "dilation", "groups", "padding"):
            fastconv.conv2d(x, w, **{option: 1})
            with pytest.raises(TypeError, match=option):
                fastconv.conv2d(x, w, **{option: bad})
            if option != "groups":
                with pytest.raises(TypeError, match=option):
                    fastconv.conv2d(x, w, **{option: (1, bad)})

    @pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
    def test_out_overlaps(self, name):
        buffer = np.zeros(2000, np.float32)
        arguments = good(residual=ones(*OUT), out=buffer[:300].reshape(OUT))
        shape = arguments[name].shape
        arguments[name] = buffer[299 : 299 + np.prod(shape)].reshape(shape)
        with pytest.raises(
            ConvError, match=f"^conv2d: out must not share memory with {name}, got overlapping arrays"
        ):
            fastconv.conv2d(**arguments)
        assert not buffer.any()

    def test_out_is_residual(self):
        residual = ones(*OUT)
        with pytest.raises(ConvError, match="out must not share memory with residual"):
            fastconv.conv2d(**good(residual=residual, out=residual))

    def test_out_overlaps_an_input_that_would_be_copied(self):
        """Not only where it would do harm: whether it is an error must not depend on a dtype."""
        buffer = np.zeros(1000, np.float16)
        x, w = buffer[:392].reshape(2, 4, 7, 7), ones(6, 4, 3, 3, dtype=np.float16)
        with pytest.raises(ConvError, match="out must not share memory with input"):
            fastconv.conv2d(x, w, out=buffer[391:691].reshape(OUT))

    def test_out_is_read_only(self):
        out = ones(*OUT)
        out.setflags(write=False)
        with pytest.raises(ConvError, match="out must be writeable, got a read-only array"):
            fastconv.conv2d(**good(out=out))

    def test_empty_batch_is_checked_too(self):
        x = ones(0, 4, 7, 7)
        for changes in ({"stride": 0}, {"bias": ones(5)}, {"algo": "depthwise"}, {"out": ones(1, 6, 5, 5)}):
            with pytest.raises(ConvError):
                fastconv.conv2d(**{**good(input=x, out=None), **changes})


class TestMessages:
    """The whole text, for some: rule, numbers, what was got, and all shapes and options."""

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (
                lambda: fastconv.conv2d(ones(8, 64, 56, 56), ones(128, 64, 3, 3), groups=2),
                "conv2d: weight.shape[1] must be C // groups = 64 // 2 = 32, got 64 "
                "(input (8, 64, 56, 56), weight (128, 64, 3, 3), groups 2)",
            ),
            (
                lambda: fastconv.conv1d(
                    ones(4, 9), ones(6, 4, 3), ones(5), padding="same", precision="highest"
                ),
                "conv1d: bias.shape must be (K,) = (6,), got (5,) (input (1, 4, 9), weight (6, 4, 3), "
                "padding 'same', precision 'highest', bias (5,)); "
                "for an input without a batch N = 1 is listed",
            ),
            (
                lambda: fastconv.conv2d(ones(2, 7, 7, 4), ones(6, 4, 3, 3), stride=-1, layout="NHWC"),
                "conv2d: stride must be at least 1, got -1 (input (2, 4, 7, 7), weight (6, 4, 3, 3), "
                "stride -1, order 'NHWC'); for layout NHWC shapes are listed channels first",
            ),
            (
                lambda: fastconv.conv1d(ones(2, 7, 4), ones(6, 4, 3), stride=-1, layout="NLC"),
                "conv1d: stride must be at least 1, got -1 (input (2, 4, 7), weight (6, 4, 3), "
                "stride -1, order 'NLC'); for layout NLC shapes are listed channels first",
            ),
            (
                lambda: fastconv.conv3d(ones(1, 7, 7, 7, 4), ones(6, 4, 3, 3, 3), stride=0, layout="NDHWC"),
                "conv3d: stride must be at least 1, got 0 (input (1, 4, 7, 7, 7), weight (6, 4, 3, 3, 3), "
                "stride 0, order 'NDHWC'); for layout NDHWC shapes are listed channels first",
            ),
            (
                lambda: fastconv.conv2d(ones(2, 4, 7, 7), ones(6, 4, 3, 3), dilation=2, algo="winograd"),
                "conv2d: algo='winograd' cannot run "
                "n2c4h7w7_k6r3s3_st1x1_pad0x0_dil2x2_g1_float32: needs dilation 1 along rows and columns",
            ),
            (
                lambda: fastconv.conv3d(ones(1, 2, 3, 3, 3), ones(1, 2, 3, 3, 3, dtype=np.float64)),
                "conv3d: weight.dtype must be input.dtype = float32, got float64; convert one of them "
                "(input (1, 2, 3, 3, 3) float32, weight (1, 2, 3, 3, 3) float64)",
            ),
            (
                lambda: fastconv.conv2d(ones(1, 1, 3, 3, dtype=np.int64), ones(1, 1, 3, 3)),
                "conv2d: input.dtype must be float16, bfloat16, float32 or float64, got int64 "
                "(convert it first, for example to float32; input is never converted silently)",
            ),
            (
                lambda: fastconv.conv2d(ones(1, 1, 3, 3), ones(1, 1, 3, 3), out=ones(1, 1, 2, 1)),
                "conv2d: out.shape must be result.shape = (1, 1, 1, 1), got (1, 1, 2, 1) "
                "(input (1, 1, 3, 3) float32, weight (1, 1, 3, 3) float32, out (1, 1, 2, 1) float32)",
            ),
            (
                lambda: fastconv.Conv2d(ones(6, 4, 3, 3), groups=4),
                "conv2d: weight.shape[0] must be a multiple of groups = 4, got 6 "
                "(weight (6, 4, 3, 3), groups 4)",
            ),
            (
                lambda: fastconv.Conv2d(ones(6, 4, 3, 3))(ones(1, 4, 3, 3, dtype=np.float64)),
                "conv2d: input must be a NumPy array of dtype float32 like weight, "
                "got a NumPy array of dtype float64 (input (1, 4, 3, 3) float64)",
            ),
            (
                lambda: fastconv.explain(ones(1, 4), ones(6, 4)),
                "explain: weight must be an array of 3, 4 or 5 axes (for conv1d, conv2d or conv3d), got 2",
            ),
        ],
    )
    def test_text(self, call, message):
        with pytest.raises((ConvError, TypeError)) as caught:
            call()
        assert str(caught.value) == message
        assert caught.value.__cause__ is None


class TestExplain:
    @pytest.mark.parametrize(
        "name", [name for name, (changes, _, _) in BAD.items() if changes != {"layout": None}]
    )
    def test_refuses_what_the_operation_refuses(self, name):
        changes, error, _ = BAD[name]
        with pytest.raises(error):
            fastconv.explain(**good(**changes))


# Arguments of a layer's call, and what a layer cannot see before it.
CALLED_WITH = frozenset({"input", "out", "residual"})
SEEN_LATER = frozenset({
    "channels not divisible", "weight of all channels", "no channels", "no rows", "kernel too large",
    "dilated kernel too large", "kernel of absurd extent", "CUDA weight",
    "mixed weight", "CUDA arrays", "layout None",
})  # fmt: skip


class TestLayers:
    """A layer refuses at construction what needs no input to be seen."""

    @pytest.mark.parametrize(
        "name", [n for n, (c, _, _) in BAD.items() if not set(c) <= CALLED_WITH and n not in SEEN_LATER]
    )
    def test_refused(self, name):
        changes, error, _ = BAD[name]
        options = {key: value for key, value in good(**changes).items() if key not in CALLED_WITH}
        with pytest.raises(error, match=r"^conv2d: "):
            fastconv.Conv2d(**options)

    def test_errors_quote_no_input(self):
        with pytest.raises(ConvError) as caught:
            fastconv.Conv3d(ones(2, 1, 3, 3, 3), stride=0)
        assert (
            str(caught.value) == "conv3d: stride must be at least 1, got 0 (weight (2, 1, 3, 3, 3), stride 0)"
        )

    @pytest.mark.parametrize(
        ("op", "shape", "options", "text"),
        [
            (
                "conv2d", (6, 4, 3, 3), {"algo": "winograd", "stride": 3},
                "'winograd' cannot run k6r3s3_st3x3_pad0x0_dil1x1_g1_float32: needs stride 1, 2 or 4 along "
                "rows and columns",
            ),
            (
                "conv2d", (6, 4, 1, 1), {"algo": "pointwise", "padding": 1},
                "'pointwise' cannot run k6r1s1_st1x1_pad1x1_dil1x1_g1_float32: needs padding 0",
            ),
            (
                "conv1d", (6, 2, 3), {"algo": "depthwise", "groups": 2},
                "'depthwise' cannot run k6s3_st1_pad0_dil1_g2_float32: needs groups = C = 4",
            ),
        ],
    )  # fmt: skip
    def test_algorithm_that_refuses_every_input(self, op, shape, options, text):
        with pytest.raises(ConvError) as caught:
            getattr(fastconv, op.capitalize())(ones(*shape), **options)
        assert str(caught.value) == f"{op}: algo={text}"

    def test_algorithm_that_accepts_every_input(self):
        fastconv.Conv2d(ones(6, 4, 1, 1), algo="pointwise", stride=2, padding="same")
        fastconv.Conv2d(ones(6, 4, 3, 3), algo="winograd", padding="same")
        fastconv.Conv3d(ones(6, 1, 3, 3, 3), algo="depthwise", groups=3)

    @pytest.mark.parametrize(
        ("input", "error"),
        [
            (None, TypeError),
            (ones(2, 4, 7, 7, dtype=np.float64), TypeError),
            (ones(2, 4, 7, 7, dtype=np.int32), TypeError),
            (FakeCudaArray(), (ConvError, TypeError)),  # TypeError where there is a GPU
            (ones(2, 3, 7, 7), ConvError),
            (ones(2, 4, 2, 7), ConvError),
            (ones(4, 7), ConvError),
        ],
    )
    def test_call(self, input, error):
        conv = fastconv.Conv2d(ones(6, 4, 3, 3))
        out = np.full(OUT, 7, np.float32)
        with pytest.raises(error, match=r"^conv2d: "):
            conv(input)
        with pytest.raises((ConvError, TypeError), match=r"^conv2d: "):
            conv(input, out=out)
        assert (out == 7).all()

    def test_out_overlaps_input(self):
        buffer = np.zeros(1000, np.float32)
        with pytest.raises(ConvError, match="out must not share memory with input"):
            fastconv.Conv2d(ones(6, 4, 3, 3))(
                buffer[:392].reshape(2, 4, 7, 7), out=buffer[391:691].reshape(OUT)
            )


class TestTorch:
    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch", reason="torch is not installed")

    @pytest.fixture
    def tensors(self, torch):
        return collections.ChainMap({"input": torch.ones(2, 4, 7, 7), "weight": torch.ones(6, 4, 3, 3)})

    def refuse(self, tensors, error, text, **changes):
        with pytest.raises(error) as caught:
            fastconv.conv2d(**{**tensors, **changes})
        assert text in str(caught.value)

    def test_mixed_kinds(self, tensors):
        self.refuse(
            tensors,
            TypeError,
            "weight must be a torch tensor like input, got a NumPy array",
            weight=ones(6, 4, 3, 3),
        )
        self.refuse(
            tensors, TypeError, "bias must be a torch tensor like input, got a NumPy array", bias=ones(6)
        )
        self.refuse(
            tensors, TypeError, "out must be a torch tensor like input, got a NumPy array", out=ones(*OUT)
        )
        self.refuse(
            tensors, TypeError, "must be a NumPy array like input, got a torch tensor", input=ones(2, 4, 7, 7)
        )
        self.refuse(tensors, TypeError, "got a CUDA array", bias=FakeCudaArray())

    def test_layer_of_the_other_kind(self, tensors):
        with pytest.raises(
            TypeError, match="input must be a torch tensor of dtype float32 like weight, got a NumPy array"
        ):
            fastconv.Conv2d(tensors["weight"])(ones(2, 4, 7, 7))

    def test_gradients(self, tensors, torch):
        text = "weight.requires_grad must be False, because no gradient would flow back, got True"
        self.refuse(tensors, ConvError, text, weight=torch.ones(6, 4, 3, 3, requires_grad=True))

    def test_dtypes(self, tensors, torch):
        for name in ("int64", "bool", "complex64", "float8_e4m3fn"):
            bad = torch.ones(6, 4, 3, 3).to(getattr(torch, name))
            self.refuse(
                tensors,
                TypeError,
                f"weight.dtype must be float16, bfloat16, float32 or float64, got {name}",
                weight=bad,
            )
        self.refuse(
            tensors, TypeError, "weight.dtype must be input.dtype", weight=torch.ones(6, 4, 3, 3).double()
        )

    def test_other_devices_and_forms(self, tensors, torch):
        weight = torch.ones(6, 4, 3, 3)
        rule = "weight must be a dense tensor on the CPU or a CUDA device"
        text = f"{rule}, got a dense tensor on meta"
        self.refuse(tensors, TypeError, text, weight=weight.to("meta"))
        text = f"{rule}, got a torch.sparse_coo tensor on cpu"
        self.refuse(tensors, TypeError, text, weight=weight.to_sparse())

    def test_negated_out(self, tensors, torch):
        """Its memory holds the opposite of its values: what is written there is read with other signs."""
        out = torch.zeros(OUT, dtype=torch.complex64).conj().imag
        self.refuse(tensors, ConvError, "out must be no negated view", out=out)

    def test_out(self, tensors, torch):
        self.refuse(
            tensors, ConvError, "elements of out must not share memory", out=torch.ones(1).expand(OUT)
        )
        self.refuse(
            tensors,
            ConvError,
            "out must not share memory with input",
            out=tensors["input"].reshape(-1)[:300].reshape(OUT),
        )
