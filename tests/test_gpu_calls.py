"""The CUDA backend from end to end: arrays of CuPy, torch and others go in, kernels run in the emulator."""

import importlib
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import fastconv
from fastconv import ConvError, conv_grad, reference
from fastconv import plan as planning
from fastconv.gpu import launch
from tests import cuda_stand_in
from tests.compare import assert_exact, integers
from tests.emulator import EmulatorDriver

pytestmark = pytest.mark.emulator

tuning = importlib.import_module("fastconv.tune")  # fastconv.tune itself is the function

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
ALGORITHMS = ("direct", "im2col", "pointwise", "depthwise")


class Watched(EmulatorDriver):
    """The emulator; `taken` holds the addresses of all arrays that kernels took."""

    def __init__(self):
        super().__init__()
        self.taken = set()

    def launch(self, kernel, blocks, arguments):
        arrays = [argument for argument in arguments if isinstance(argument, np.ndarray)]
        self.taken |= {array.__array_interface__["data"][0] for array in arrays}
        super().launch(kernel, blocks, arguments)


@pytest.fixture
def allocated():
    """What CuPy's and torch's pools have given, in order."""
    return []


@pytest.fixture(autouse=True)
def kernels(allocated, monkeypatch):
    """An emulated GPU, by way of a CuPy that is not there."""
    monkeypatch.setitem(sys.modules, "cupy", cuda_stand_in.make_cupy(allocated))
    planning.forget_plans()
    emulator = Watched()
    with launch.use_driver(cuda_stand_in.StandInDriver(emulator)):
        yield emulator
    planning.forget_plans()


@pytest.fixture(params=cuda_stand_in.KINDS)
def kind(request, allocated, monkeypatch):
    return cuda_stand_in.make_kind(request.param, allocated, monkeypatch)


def layer(rng, algorithm, dtype="float32"):
    """Input, weight, bias, residual and options of a conv2d that an algorithm takes, and its result."""
    size = 1 if algorithm == "pointwise" else 3
    groups = 4 if algorithm == "depthwise" else 1
    shapes = (2, 4, 7, 6), (8, 4 // groups, size, size), (8,)
    x, w, bias = (integers(rng, shape, DTYPES[dtype]) for shape in shapes)
    options = {"stride": (1, 2), "padding": size // 2, "groups": groups, "activation": ("leaky_relu", 0.5)}
    residual = integers(rng, reference.conv2d(x, w, bias, **options).shape, DTYPES[dtype])
    return (x, w, bias, residual), options, reference.conv2d(x, w, bias, residual=residual, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_call(kind, algorithm, dtype, rng, kernels, allocated):
    """Exact, in the caller's memory and without any other than that of the caller's pool."""
    (x, w, bias, residual), options, expected = layer(rng, algorithm, dtype)
    host = np.full(expected.shape, np.nan).astype(DTYPES[dtype])
    arguments = [kind.make(array) for array in (x, w, bias)]
    out = kind.make(host)
    fastconv.conv2d(*arguments, residual=kind.make(residual), out=out, algo=algorithm, **options)
    assert_exact(host, expected, dtype)
    given = {array.__array_interface__["data"][0] for array in (x, w, bias, residual, host)}
    assert given <= kernels.taken
    assert kernels.taken - given <= {array.__array_interface__["data"][0] for array in allocated}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients(kind, algorithm, rng):
    """Of weight and input, as many outputs as inputs: what `depthwise` takes."""
    (x, w, *_), options, y = layer(rng, algorithm)
    w, grad = w[:4], integers(rng, y[:, :4].shape)
    options.pop("activation")
    of_weight = conv_grad.conv2d_weight(kind.make(x), w.shape, kind.make(grad), algo=algorithm, **options)
    of_input = conv_grad.conv2d_input(x.shape, kind.make(w), kind.make(grad), algo=algorithm, **options)
    assert type(of_weight) is type(of_input) is kind.result
    assert_exact(kind.host(of_weight), reference.conv2d_weight(x, w.shape, grad, **options), "float32")
    assert_exact(kind.host(of_input), reference.conv2d_input(x.shape, w, grad, **options), "float32")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_layer(kind, algorithm, rng):
    (x, w, bias, residual), options, expected = layer(rng, algorithm)
    conv = fastconv.Conv2d(kind.make(w), kind.make(bias), algo=algorithm, **options)
    w[...] = bias[...] = np.nan
    for image, more, y in ((x, residual, expected), (x[:1], residual[:1], expected[:1])):
        result = conv(kind.make(image), kind.make(more))
        assert type(result) is kind.result
        assert_exact(kind.host(result), y, "float32")


def test_channels_last_and_flipped(kind, rng):
    (x, w, _, _), _, _ = layer(rng, "direct")
    for algorithm in ("direct", "im2col"):
        y = fastconv.conv2d(
            kind.make(np.ascontiguousarray(x.transpose(0, 2, 3, 1))), kind.make(w),
            layout="NHWC", flip=True, algo=algorithm,
        )  # fmt: skip
        expected = reference.conv2d(x, w, flip=True).transpose(0, 2, 3, 1)
        assert_exact(kind.host(y), expected, "float32")


def test_other_ranks(kind, rng):
    for op, shape in (("conv1d", (2, 4, 9)), ("conv3d", (1, 4, 5, 4, 3))):
        x, w = integers(rng, shape), integers(rng, (6, 4, *(2,) * (len(shape) - 2)))
        y = getattr(fastconv, op)(kind.make(x), kind.make(w), padding=1)
        assert_exact(kind.host(y), getattr(reference, op)(x, w, padding=1), "float32")


def test_explain_and_workspace(kind, rng, kernels, monkeypatch):
    (x, w, _, _), _, _ = layer(rng, "direct")
    arguments = kind.make(x), kind.make(w)
    text = str(fastconv.explain(*arguments))
    for line in ("on Stand-in GPU: ", "refused: needs a kernel of extent 1", "estimates for this GPU"):
        assert line in text
    assert kernels.taken == set()
    monkeypatch.setenv("FASTCONV_WORKSPACE", "0")
    with pytest.raises(
        ConvError, match=r"^conv2d: FASTCONV_WORKSPACE must be at least \d+ bytes, which algo="
    ):
        fastconv.conv2d(*arguments)


def test_tune(kind, rng, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "BUDGET", 0.0)
    (x, w, _, _), _, _ = layer(rng, "direct")
    result = fastconv.tune(kind.make(x), kind.make(w))
    assert {timing.algorithm for timing in result.timings} == {"direct", "im2col", "winograd"}
    assert fastconv.explain(kind.make(x), kind.make(w)).reason == "measured fastest by tune"


def test_numba_is_not_needed():
    """Nor anything else that only the CPU's kernels want: a fresh interpreter that cannot import it."""
    code = """
import sys
sys.modules.update(numba=None, llvmlite=None)
import numpy as np, fastconv
from fastconv.gpu import launch
from tests import cuda_stand_in
from tests.emulator import EmulatorDriver
sys.modules["cupy"] = cuda_stand_in.make_cupy([])
x, w = np.ones((1, 2, 5, 5), np.float32), np.ones((3, 2, 3, 3), np.float32)
with launch.use_driver(cuda_stand_in.StandInDriver(EmulatorDriver())):
    y = fastconv.conv2d(cuda_stand_in.CupyArray(x), cuda_stand_in.CupyArray(w))
print((y.host == 18).all(), *(name for name in sys.modules if name.startswith("fastconv.cpu")))
"""
    root = Path(fastconv.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True"], done.stdout + done.stderr
