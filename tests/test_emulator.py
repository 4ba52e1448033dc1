"""The emulator runs sound kernels exactly and finds planted defects; their sound twins differ in one line."""

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest

from fastconv.gpu.launch import launch, use_driver
from fastconv.gpu.source import Kernel, Parameter
from tests.compare import assert_exact, integers
from tests.emulator import EmulatorDriver, EmulatorError, build

pytestmark = pytest.mark.emulator

ZIG = f"{sys.executable} -m ziglang c++"
HAS_ZIG = find_spec("ziglang") is not None
THREADS, BLOCKS = 64, 2


@pytest.fixture(params=["default", "zig"] if HAS_ZIG else ["default"])
def driver(request):
    """An emulator that builds with the compiler of this machine, and one with clang, where the wheel is."""
    return EmulatorDriver(compiler=ZIG if request.param == "zig" else None)


def toy(body: str, threads: int = THREADS) -> Kernel:
    """A kernel of arrays x, y and int n: i is its index in the block, at that in the grid, tile is shared."""
    source = f"""
        struct alignas(16) Vec {{ float v[4]; }};
        struct Row {{ float v[32]; }};
        extern "C" __global__ void __launch_bounds__({threads}) toy(
            const float* __restrict__ x, float* __restrict__ y, const int n)
        {{
            __shared__ alignas(16) float tile[{THREADS}];
            const int i = threadIdx.x;
            const int at = blockIdx.x * blockDim.x + i;
#line 1 "toy.cu"
{body}
        }}"""
    return Kernel("toy", source, X_Y_N, threads, ())


X_Y_N = (
    Parameter("x", "float32", True, False),
    Parameter("y", "float32", True, True),
    Parameter("n", np.dtype(np.int32), False, False),
)


def run(driver, kernel: Kernel, x: np.ndarray | None = None, blocks: int = BLOCKS) -> np.ndarray:
    """Run a toy kernel on an element per thread, and return y."""
    x = np.arange(1, BLOCKS * THREADS + 1, dtype=np.float32) if x is None else x
    y = driver.empty((BLOCKS * THREADS,), np.dtype(np.float32))
    driver.launch(kernel, blocks, [x, y, np.int32(len(x))])
    return y


# The body of a toy kernel: with the lines marked - it is sound, with those marked + it has a defect, of which
# the message must say what is marked with an exclamation mark.
DEFECTS = {
    # ---- global memory ----
    "read behind": """
        - y[at] = x[at];
        + y[at] = x[at + 1];
        ! reads 4 bytes at byte 512 of x, which has 512 bytes
    """,
    "read before": """
        - y[at] = x[at];
        + y[at] = x[at - 1];
        ! reads 4 bytes at byte -4 of x
    """,
    "read far off": """
        - y[at] = x[at];
        + y[at] = x[at + (1ll << 40)];
        ! in no argument, shared array or local variable
    """,
    "write behind": """
        - y[at] = 1;
        + y[at + 1] = 1;
        ! writes 4 bytes at byte 512 of y
    """,
    "write to const": """
        - y[at] = 1;
        + ((float*)x)[at] = 1;
        ! writes 4 bytes to x, which is declared const
    """,
    "vector read behind": """
        - if (i % 4 == 0) *(Vec*)&tile[i] = *(const Vec*)&x[at];
        + if (i % 4 == 0) *(Vec*)&tile[i] = *(const Vec*)&x[at + 4];
          __syncthreads();
          y[at] = tile[i];
        ! reads 16 bytes at byte 512 of x
    """,
    "memcpy behind": """
          if (i == 0)
        - memcpy(tile, x + at, sizeof(tile));
        + memcpy(tile, x + at + 1, sizeof(tile));
          __syncthreads();
          y[at] = tile[i];
        ! reads 256 bytes at byte 260 of x
    """,
    "large struct behind": """
          if (i == 0)
        - *(Row*)tile = *(const Row*)(x + at);
        + *(Row*)tile = *(const Row*)(x + at + 48);
          __syncthreads();
          y[at] = tile[i % 32];
        ! reads 128 bytes at byte 448 of x
    """,
    "misaligned global vector": """
        - if (i % 4 == 0) *(Vec*)&tile[i] = *(const Vec*)&x[at];
        + if (i % 4 == 0) *(Vec*)&tile[i] = *(const Vec*)&x[at + 2];
          __syncthreads();
          y[at] = tile[i];
        ! misaligned
    """,
    "misaligned member": """
        - y[at] = ((const Vec*)&x[at / 4 * 4])->v[3];
        + y[at] = ((const Vec*)&x[at / 4 * 2])->v[3];
        ! misaligned
    """,
    # ---- shared memory and local variables ----
    "misaligned shared vector": """
          tile[i] = x[at];
          __syncthreads();
          y[at] = 1;
          if (i % 8 == 0)
        - *(Vec*)&y[at] = *(const Vec*)&tile[i];
        + *(Vec*)&y[at] = *(const Vec*)&tile[i + 2];
        ! misaligned
    """,
    "shared index": """
        - tile[i] = x[at];
        + tile[i + 1] = x[at];
          __syncthreads();
          y[at] = tile[i];
        ! out of bounds: index 64 of
    """,
    "pointer behind shared": """
          float* p = tile + n % 2;
        - p[i] = 1;
        + p[i + 1] = 1;
          y[at] = 1;
        ! writes 4 bytes at byte 256 of shared memory
    """,
    "local index": """
          float v[4] = {x[at], 2, 3, 4};
        - y[at] = v[i % 4];
        + y[at] = v[i % 5];
        ! out of bounds: index 4 of
    """,
    "shared never written": """
        - tile[i] = x[at];
        + if (i != 7) tile[i] = x[at];
          __syncthreads();
          y[at] = tile[i];
        ! reads byte 28 of shared memory, which nothing wrote in this block
    """,
    "shared added to": """
        - tile[i] = 0;
        - tile[i] += 1;
        + tile[i] += 1;
          y[at] = tile[i];
        ! which nothing wrote in this block
    """,
    "shared of another block": """
        - tile[i] = x[at];
        + if (at < 64) tile[i] = x[at];
          __syncthreads();
          y[at] = tile[i];
        ! block 1,
    """,
    # ---- barriers ----
    "barrier in a branch": """
        - __syncthreads();
        + if (i < 48) __syncthreads();
          y[at] = 1;
        ! of 64 threads 48 wait at __syncthreads(), 0 for their warp, 16 ended
    """,
    "return before a barrier": """
          y[at] = 1;
        - if (at == n) return;
        + if (i == 5) return;
          __syncthreads();
        ! barrier that not all threads
    """,
    "read without barrier": """
          tile[i] = 0;
          __syncthreads();
          tile[i] = x[at];
        - __syncthreads();
          y[at] = tile[63 - i];
        ! race:
    """,
    "write without barrier": """
          tile[i] = x[at];
          __syncthreads();
          y[at] = tile[63 - i];
        - __syncthreads();
          tile[i] = 0;
        ! race:
    """,
    "two writers": """
        - tile[i] = 1;
        + tile[i / 2] = 1;
          y[at] = 1;
        ! race: writes byte
    """,
    "no warp barrier": """
          tile[i] = 0;
          __syncthreads();
          tile[i] = x[at];
        - __syncwarp();
          y[at] = tile[i ^ 1];
        ! race:
    """,
    "warp barrier between warps": """
          tile[i] = x[at];
          __syncwarp();
        - y[at] = tile[i ^ 1];
        + y[at] = tile[63 - i];
        ! race:
    """,
    "part of a warp": """
        - __syncwarp();
        + if (i % 2) __syncwarp();
          y[at] = 1;
        ! 64 threads 0 wait at __syncthreads(), 32 for their
    """,
    # ---- asynchronous copies ----
    "copy used too early": """
          if (i < 16) {
              copy_async_16(&tile[4 * i], &x[4 * i]);
        -     wait_async();
              y[at] = tile[4 * i];
        +     wait_async();
          }
          __syncthreads();
          y[at] = 1;
        ! copies asynchronously; no wait_async yet
    """,
    "copy waited for by nobody": """
          if (i < 16) {
              copy_async_16(&tile[4 * i], &x[4 * i]);
        -     wait_async();
          }
          __syncthreads();
          y[at] = tile[63 - i];
        ! no wait_async yet
    """,
    "copy left behind": """
          y[at] = 1;
          if (i < 16) {
              copy_async_16(&tile[4 * i], &x[4 * i]);
        -     wait_async();
          }
        ! ends with asynchronous copies that it has not waited for
    """,
    "copy seen without barrier": """
          tile[i] = 0;
          __syncthreads();
          if (i < 16) {
              copy_async_16(&tile[4 * i], &x[4 * i]);
              wait_async();
          }
        - __syncthreads();
          y[at] = tile[63 - i];
        ! race:
    """,
    "copy over what is read": """
          tile[i] = 1;
          __syncthreads();
          y[at] = tile[i];
        - __syncthreads();
          if (i < 16) {
              copy_async_16(&tile[4 * i], &x[4 * i]);
              wait_async();
          }
        ! race: copies asynchronously to byte
    """,
    "misaligned copy": """
          if (i < 16) {
        -     copy_async_16(&tile[4 * i], &x[4 * i]);
        +     copy_async_16(&tile[4 * i], &x[4 * i + 1]);
              wait_async();
          }
          __syncthreads();
          y[at] = tile[63 - i];
        ! misaligned: an asynchronous copy
    """,
    "copy from behind": """
          if (i < 16) {
        -     copy_async_16(&tile[4 * i], &x[4 * i]);
        +     copy_async_16(&tile[4 * i], &x[4 * i + n]);
              wait_async();
          }
          __syncthreads();
          y[at] = tile[63 - i];
        ! copies asynchronously 16 bytes at byte
    """,
    # ---- integers ----
    "sum too large": """
        - int k = n + 1;
        + int k = 2147483647 - 100 + n;
          y[at] = k;
        ! integer overflow:
    """,
    "product too large": """
        - int k = n * 1000;
        + int k = n * 100000000;
          y[at] = k;
        ! integer overflow: 128 * 100000000 in type 'int'
    """,
    "long product too large": """
        - long long k = n * (1ll << 55);
        + long long k = n * (1ll << 56);
          y[at] = k;
        ! in type 'long long
    """,
    "shift too far": """
        - int k = 1 << (n - 128);
        + int k = 1 << n;
          y[at] = k;
        ! 1 shifted by 128
    """,
    "divided by zero": """
        - int k = 7 / n;
        + int k = 7 / (n - 128);
          y[at] = k;
        ! integer overflow: 7 / 0
    """,
    "float too large for int": """
        - int k = int(x[at]);
        + int k = int(x[at] * 1e10f);
          y[at] = k;
        ! does not fit
    """,
}


def variant(name: str, mark: str) -> Kernel:
    """The sound (-) or broken (+) form of a kernel of DEFECTS."""
    lines = DEFECTS[name].strip("\n").splitlines()
    return toy("\n".join(line[10:] for line in lines if line[8:9] in ("", " ", mark)))


@pytest.mark.parametrize("name", DEFECTS)
def test_sound_kernel_runs(driver, name):
    assert np.isfinite(run(driver, variant(name, "-"))).all()


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found(driver, name):
    """The message names the kernel, where it happened and what; the next launch works."""
    message = DEFECTS[name].split("! ")[1].strip()
    with pytest.raises(EmulatorError, match=r"^toy: block [01],? .*: ") as caught:
        run(driver, variant(name, "+"))
    assert message in str(caught.value)
    assert np.isfinite(run(driver, variant(name, "-"))).all()


def test_null_pointer(driver):
    kernel = toy("y[at] = x ? x[at] : 7;")
    y = driver.empty((THREADS,), np.dtype(np.float32))
    driver.launch(kernel, 1, [None, y, np.int32(0)])
    assert (y == 7).all()
    with pytest.raises(EmulatorError, match="reads 4 bytes at byte 0 of a null pointer"):
        driver.launch(toy("if (i == 0) y[at] = x[at];"), 1, [None, y, np.int32(0)])


def test_message_in_full(driver):
    """An error in a loop of a device function, which the compiler puts into the kernel."""
    helper = """inline float sum(const float* p) {
        float total = 0;
        for (int j = 0; j < 3; ++j) total += p[j];
        return total;
    }
"""
    kernel = toy("y[at] = sum(&x[at]);")
    source = f'#line 10 "help.cuh"\n{helper}{kernel.source}'
    kernel = Kernel(kernel.name, source, kernel.parameters, kernel.threads, ())
    with pytest.raises(EmulatorError) as caught:
        run(driver, kernel)
    message = "out of bounds: reads 4 bytes at byte 51[26] of x, which has 512 bytes"
    assert caught.match(f"^toy: block 1, thread 6[23], help.cuh:12: {message}$")


def test_array_with_strides(driver):
    """What lies between its lowest and highest element may be read, whatever the signs of the strides."""
    x = np.arange(2 * THREADS, dtype=np.float32)
    y = driver.empty((THREADS,), np.dtype(np.float32))
    driver.launch(toy("y[at] = x[-i];"), 1, [x[:THREADS][::-1], y, np.int32(0)])
    assert_exact(y, x[:THREADS][::-1])
    with pytest.raises(EmulatorError, match="byte 256 of x, which has 256 bytes"):
        driver.launch(toy("y[at] = x[1];"), 1, [x[:THREADS][::-1], y, np.int32(0)])


def test_table_of_constants(driver):
    source = toy(
        "static const float table[4] = {3, 1, 4, 1};\nconst float* p = table;\ny[at] = p[(i + n) % 4];"
    )
    assert_exact(run(driver, source)[:4], np.array([3, 1, 4, 1], np.float32))


def test_halves_of_four_bytes_have_two_writers(driver):
    """Two threads may write neighbouring elements of 2 bytes at once, as on the GPU."""
    body = "unsigned short* p = (unsigned short*)tile;\np[i] = i;\n__syncthreads();\ny[at] = p[63 - i];"
    assert_exact(run(driver, toy(body))[:THREADS], np.arange(THREADS, dtype=np.float32)[::-1])


def test_too_many_local_variables(driver):
    body = "float v[40000];\nfor (int j = 0; j < n; ++j) v[j * 97 % 40000] = x[j];\ny[at] = v[i * 97];"
    with pytest.raises(EmulatorError, match="bytes of local variables"):
        run(driver, toy(body))


def test_warp_shuffles(driver):
    body = """
        float sum = x[at];
        for (int j = 16; j > 0; j /= 2) sum += __shfl_xor_sync(0xffffffff, sum, j);
        double last = __shfl_down_sync(0xffffffff, double(x[at]), 31);
        y[at] = sum + (i % 32 ? 0 : last) + __shfl_sync(0xffffffff, i, 5);"""
    x = np.arange(1, BLOCKS * THREADS + 1, dtype=np.float32)
    warps = x.reshape(-1, 32)
    expected = np.repeat(warps.sum(axis=1), 32).reshape(-1, 32) + np.array([[5], [37], [5], [37]])
    expected[:, 0] += warps[:, 31]
    assert_exact(run(driver, toy(body), x), expected.ravel().astype(np.float32))


MATMUL = """
    __shared__ float a[16][16], b[16][16 + 1];
    const int row = i / 16, column = i % 16;
    const int first = blockIdx.x * 16 * 48;
    float sum = 0;
    for (int k = 0; k < 48; k += 16) {
        a[row][column] = x[first + row * 48 + k + column];
        b[row][column] = x[(k + row) * 48 + column];
        __syncthreads();
        #pragma unroll
        for (int j = 0; j < 16; ++j) sum = fmaf(a[row][j], b[j][column], sum);
        __syncthreads();
    }
    y[blockIdx.x * 256 + i] = sum;"""


@pytest.mark.parametrize("seed", range(4))
def test_matrix_product_in_every_order(driver, rng, seed):
    driver.seed = seed
    x = integers(rng, (48, 48))
    y = driver.empty((48, 16), np.dtype(np.float32))
    driver.launch(toy(MATMUL, threads=256), 3, [x, y, np.int32(0)])
    assert_exact(y, x @ x[:, :16])


def test_threads_run_in_an_order_that_the_seed_gives(driver):
    """y[0] counts the threads, y[1 + i] is when thread i ran: in global memory no race is looked for."""
    kernel = toy("if (i == 0 && n == 0) return;\ny[1 + i] = y[0];\ny[0] += 1;", threads=32)
    orders = []
    for seed in (0, 0, 1, 2):
        driver.seed = seed
        y = np.zeros(33, np.float32)
        driver.launch(kernel, 1, [None, y, np.int32(1)])
        assert sorted(y[1:]) == list(range(32))
        orders.append(y.tolist())
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


def convert(driver, values: np.ndarray, to: str, call: str) -> np.ndarray:
    """Apply a conversion of ptx.cuh to every value."""
    kinds = {"uint16": "unsigned short", "float32": "float"}
    source = f"""extern "C" __global__ void convert(const {kinds[values.dtype.name]}* x, {kinds[to]}* y)
        {{ y[blockIdx.x * 1024 + threadIdx.x] = {call}(x[blockIdx.x * 1024 + threadIdx.x]); }}"""
    parameters = (Parameter("x", values.dtype.name, True, False), Parameter("y", to, True, True))
    y = driver.empty(values.shape, np.dtype(to))
    driver.launch(Kernel("convert", source, parameters, 1024, ()), len(values) // 1024, [values, y])
    return y


def test_every_half_as_float(driver):
    halves = np.arange(2**16, dtype=np.uint16)
    floats = convert(driver, halves, "float32", "half_to_float")
    np.testing.assert_array_equal(floats, halves.view(np.float16).astype(np.float32))  # NaN equals NaN
    assert (np.signbit(floats) == (halves >= 2**15)).all()


def test_floats_as_halves(driver, rng):
    """Every half, the ties between them, what lies beside the ties, and floats of all magnitudes."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    ties = (halves[:-1].astype(np.float64) + halves[1:]).astype(np.float32) / 2
    anything = rng.integers(0, 2**32, 2**16, dtype=np.uint32).view(np.float32)
    special = np.array(
        [65504, 65519.996, 65520, 1e30, np.inf, np.nan, 2**-25, 1.0001 * 2**-25, -0.0], np.float32
    )
    values = np.concatenate(
        [halves, ties, np.nextafter(ties, 9e9), np.nextafter(ties, -9e9), anything, special]
    )
    values = np.append(values, np.zeros(-len(values) % 1024, np.float32)).astype(np.float32)
    found = convert(driver, values, "uint16", "float_to_half").view(np.float16)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found, values.astype(np.float16))
    assert (np.signbit(found) == np.signbit(values))[~np.isnan(values)].all()


# ---- launches ----


@pytest.mark.parametrize("threads", [0, 1025])
def test_threads_beyond_the_limit(threads):
    with pytest.raises(
        EmulatorError, match=f"toy: launched with {threads} threads per block, must be 1 to 1024"
    ):
        run(EmulatorDriver(), toy("y[0] = 1;", threads=threads))


@pytest.mark.parametrize("blocks", [0, 2**31])
def test_blocks_beyond_the_limit(blocks):
    with pytest.raises(EmulatorError, match=f"toy: launched with {blocks} blocks, must be 1 to 2147483647"):
        run(EmulatorDriver(), toy("y[0] = 1;"), blocks=blocks)


def test_shared_memory_beyond_the_limit(driver):
    body = "__shared__ float more[{}];\nmore[i] = 1;\ny[at] = more[i];"
    assert (run(driver, toy(body.format(12288 - THREADS))) == 1).all()
    with pytest.raises(EmulatorError, match="has 49168 bytes of static shared memory, at most 49152 fit"):
        run(driver, toy(body.format(12292 - THREADS)))


def test_parameters_other_than_described(driver):
    """What fastconv.gpu.source reads off the text is compared with what the compiler makes of it."""
    kernel = toy("y[at] = 1;")

    def launch_as(*parameters):
        changed = Kernel(kernel.name, kernel.source, parameters, kernel.threads, ())
        driver.launch(changed, 1, [None] * len(parameters))

    with pytest.raises(EmulatorError, match="toy: has 3 parameters, 2 are described, 2 were passed"):
        launch_as(*X_Y_N[:2])
    for index, wrong in enumerate(
        [
            X_Y_N[0]._replace(is_written=True),
            X_Y_N[1]._replace(dtype="float16"),
            X_Y_N[2]._replace(dtype=np.dtype("i8")),
        ]
    ):
        with pytest.raises(
            EmulatorError, match=rf"toy: parameter {wrong.name} is .* in C\+\+ but described as"
        ):
            launch_as(*X_Y_N[:index], wrong, *X_Y_N[index + 1 :])


def test_argument_of_another_kind(driver):
    with pytest.raises(EmulatorError, match="toy: parameter n was passed 5"):
        driver.launch(toy("y[at] = 1;"), 1, [None, None, 5])
    with pytest.raises(EmulatorError, match="toy: parameter x was passed"):
        driver.launch(toy("y[at] = 1;"), 1, [np.zeros(4), None, np.int32(5)])


def test_struct_by_value(driver):
    """The dtype is aligned as the compiler aligns the struct."""
    dtype = np.dtype([("a", np.int32), ("b", np.float64), ("c", np.float32)], align=True)
    source = """struct Three { int a; double b; float c; };
        extern "C" __global__ void three(double* y, const Three t) { y[0] = t.a * 100 + t.b * 10 + t.c; }"""
    parameters = (Parameter("y", "float64", True, True), Parameter("t", dtype, False, False))
    y = np.zeros(1)
    driver.launch(Kernel("three", source, parameters, 1, ()), 1, [y, np.array((1, 2, 3), dtype)[()]])
    assert y[0] == 123


def test_launch_through_the_seam(driver):
    x, y = np.arange(THREADS, dtype=np.float32), driver.empty((THREADS,), np.dtype(np.float32))
    with use_driver(driver):
        launch(toy("y[at] = n * x[at];"), 1, n=2, y=y, x=x)
    assert_exact(y, 2 * x)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_new_memory_is_nan(dtype):
    y = EmulatorDriver().empty((3, 0, 2), np.dtype(dtype)), EmulatorDriver().empty((3, 5), np.dtype(dtype))
    assert y[0].shape == (3, 0, 2)
    assert y[1].shape == (3, 5)
    assert np.isnan(y[1]).all()


# ---- builds ----


def test_kernel_that_does_not_compile(driver):
    with pytest.raises(EmulatorError, match=r"toy\.cu:2:.*undeclared_name"):
        run(driver, toy("y[at] = 1;\ny[at] = undeclared_name;"))


def test_kernel_that_calls_what_there_is_not(driver):
    kernel = toy("y[at] = missing_function(i);")
    source = 'extern "C" float missing_function(int);\n' + kernel.source
    with pytest.raises(EmulatorError, match=r"toy calls what the emulator does not have: .*missing_function"):
        run(driver, Kernel("toy", source, kernel.parameters, kernel.threads, ()))


def test_compiler_is_that_of_cxx(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(EmulatorError, match="no-such-compiler cannot be run"):
        EmulatorDriver()


@pytest.mark.skipif(
    not HAS_ZIG,
    reason="ziglang is not installed: the tests of the emulator run with the C++ compiler found only",
)
def test_the_wheel_has_clang():
    """A second compiler, of another family than most machines', for every test that asks for a driver."""
    assert "clang" in build.find_compiler(ZIG).version


def test_without_any_compiler(monkeypatch):
    """An error that says what to install, not a skipped test."""
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmulatorError, match="pip install ziglang"):
        build.find_compiler.__wrapped__("")


def test_built_once_and_found_again(monkeypatch, tmp_path):
    """Also when several build the same at once; what is left are one kernel and one runtime."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler, kernel = EmulatorDriver().compiler, toy("y[at] = 1;")
    make = build.build_kernel.__wrapped__
    with ThreadPoolExecutor(4) as pool:
        (path,) = set(pool.map(lambda _: make(compiler, kernel), range(4)))
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".o", ".so"]
    monkeypatch.setattr(build, "run", lambda *words: pytest.fail(f"ran {words}"))
    assert make(compiler, kernel) == path
