"""Small kernels whose faults are known, in place of those in kernels/: what looks for faults finds them."""

from pathlib import Path

import pytest

from fastconv.gpu import source
from fastconv.gpu.source import Kernel, make_kernel

HEADER = """\
// specimen.cuh - line 1
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS) KERNEL_NAME
#ifdef STAGE_BROKEN
int broken = "line 4 of the header";
#endif
"""

# ROW: floats of a row of shared memory. With 32 a warp reads a column from one bank, with 33 from all.
TEXT = """\
#include "specimen.cuh"

#ifdef STAGE_BROKEN
KERNEL(float* y)
{
}
#endif

#ifdef STAGE_COLUMNS
KERNEL(const float* x, float* y, int n)
{
    __shared__ float tile[32 * ROW];
    const int row = threadIdx.x / 32, column = threadIdx.x % 32;
    tile[row * ROW + column] = x[threadIdx.x];
    __syncthreads();
    float sum = 0;
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
        sum = fmaf(tile[column * ROW + row], x[i], sum);
        __syncthreads();
    }
    y[threadIdx.x] = sum;
}
#endif

#ifdef STAGE_SPILL
KERNEL(const float* x, float* y)
{
    float held[128];
    for (int i = 0; i < 128; ++i) held[i] = x[i * THREADS + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 128; ++i) y[i * THREADS + threadIdx.x] = held[i] * held[127 - i];
}
#endif

#ifdef STAGE_STACK
KERNEL(const int* x, int* y)
{
    int found[64] = {};
    for (int i = 0; i < 64; ++i) found[x[i] % 64] = i;
    y[threadIdx.x] = found[x[threadIdx.x] % 64];
}
#endif
"""


def specimen(stage: str, threads: int = 1024, row: int = 32, dtype: str = "float32") -> Kernel:
    """The kernel of a stage; only where KERNEL_DIR is a folder that `install` has filled."""
    return make_kernel("specimen", stage, dtype, (("ROW", row), ("THREADS", threads), ("INDEX", "int")))


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let make_kernel read the specimens."""
    (folder / "specimen.cuh").write_text(HEADER, encoding="utf-8")
    (folder / "specimen.cu").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(source, "KERNEL_DIR", folder)


def kernels_of_specimens(dtype: str) -> list[Kernel]:
    """As an algorithm's kernels: of two tiles, one of which has bank conflicts."""
    return [specimen("COLUMNS", row=tile, dtype=dtype) for tile in (32, 33)]
