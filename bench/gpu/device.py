"""What touches the GPU through CuPy: arrays, events, streams, and the words that describe the machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from bench.gpu.clock import Deadline
from bench.rows import Row
from bench.versions import read_commit, read_versions
from bench.workload import SEED
from fastconv.gpu import cupy_driver
from fastconv.gpu import device as gpu_device
from fastconv.problem import ConvProblem

PACKAGES = ("numpy", "cupy", "cupy-cuda12x", "cupy-cuda13x", "torch", "pytest", "ml_dtypes")
LEAST_FLUSH = 64 << 20  # bytes
PERIOD = 1_048_573  # random numbers are drawn so many and repeated; a prime, so that no axis fits it
SANITIZER = "compute-sanitizer"
SANITIZER_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])


def describe(deadline: Deadline) -> Iterator[Row]:
    """One `machine` row, or one `no_gpu` row with the reason."""
    reason = cupy_driver.why_unavailable()
    if reason is not None:
        yield {"kind": "no_gpu", "reason": reason}
        return
    yield {"kind": "machine", **_describe_gpu(), **_describe_software()}


def _describe_gpu() -> Row:
    found = asdict(gpu_device.current())
    found["gpu"] = found.pop("name")
    return {**found, "memory": total_memory()}


def _describe_software() -> Row:
    import cupy

    commit, dirty = read_commit()
    runtime = cupy.cuda.runtime
    return {
        "driver": _driver_version(), "cuda_of_driver": runtime.driverGetVersion(),
        "cuda_runtime": runtime.runtimeGetVersion(), "nvrtc": list(cupy.cuda.nvrtc.getVersion()),
        "cudnn": _cudnn_version(), "sanitizer": shutil.which(SANITIZER, path=SANITIZER_PATH),
        "versions": read_versions(PACKAGES), "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count(),
        "commit": commit, "dirty": dirty,
    }  # fmt: skip


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return shown.splitlines()[0].strip() if shown.strip() else "unknown"


def _cudnn_version() -> int | None:
    if not has_torch():
        return None
    import torch

    return torch.backends.cudnn.version()


def has_torch() -> bool:
    """Whether torch is installed and can use a GPU."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def make_arrays(problem: ConvProblem) -> tuple[Any, Any, Any]:
    """Input, in the problem's memory order, weight and bias; scaled so that outputs are of order one."""
    x = in_order(_random(problem.input_shape, problem.dtype, 1.0), problem.order)
    weight = _random(problem.weight_shape, problem.dtype, problem.gemm_k**-0.5)
    return x, weight, _random((problem.K,), problem.dtype, 1.0)


def _random(shape: tuple[int, ...], dtype: str, scale: float) -> Any:
    """Normal numbers; the host draws them, because CuPy's own generator needs a library more."""
    import cupy

    size = int(np.prod(shape))
    numbers = np.random.default_rng(SEED + len(shape)).standard_normal(min(size, PERIOD), dtype=np.float32)
    block = cupy.asarray((numbers * np.float32(scale)).astype(dtype))
    return cupy.tile(block, -(-size // PERIOD))[:size].reshape(shape)


def in_order(array: Any, order: str) -> Any:
    """The same array with its channels last in memory if `order` says so; its shape stays channels-first."""
    import cupy

    if order == "NCHW":
        return array
    return cupy.moveaxis(cupy.ascontiguousarray(cupy.moveaxis(array, 1, -1)), -1, 1)


def make_output(problem: ConvProblem) -> Any:
    """An output of NaN in the problem's memory order."""
    import cupy

    return in_order(cupy.full(problem.output_shape, np.nan, dtype=problem.dtype), problem.order)


def to_host(array: Any) -> np.ndarray:
    """A copy in the memory of the host."""
    import cupy

    return cupy.asnumpy(array)


def total_memory() -> int:
    """Bytes of the device's memory."""
    import cupy

    return int(cupy.cuda.runtime.memGetInfo()[1])


def free_memory() -> None:
    """Give back to the driver what CuPy and torch keep for their next arrays."""
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def make_copy(size: int) -> Callable[[], None]:
    """A call that enqueues a copy of so many bytes within the device's memory."""
    import cupy

    source, target = (cupy.zeros(size, dtype=np.uint8) for _ in range(2))
    return lambda: target.data.copy_from_device_async(source.data, size)


class CudaEvents:
    """The GPU of a stopwatch; everything goes to the default stream, which is torch's too."""

    def __init__(self) -> None:
        import cupy

        self.cuda = cupy.cuda
        l2 = cupy.cuda.Device().attributes["L2CacheSize"]
        self.buffer = cupy.zeros(max(2 * l2, LEAST_FLUSH), dtype=np.uint8)
        self.flush_seconds = self._time(self.flush)

    def flush(self) -> None:
        self.buffer.data.memset_async(0, self.buffer.nbytes)

    def record(self) -> Any:
        event = self.cuda.Event()
        event.record()
        return event

    def elapsed(self, start: Any, end: Any) -> float:
        return self.cuda.get_elapsed_time(start, end) * 1e-3

    def synchronize(self) -> None:
        self.cuda.runtime.deviceSynchronize()

    def _time(self, work: Callable[[], None], count: int = 20) -> float:
        """Seconds of one of several in a row, after as many to let the clock rise."""
        for _ in range(count):
            work()
        start = self.record()
        for _ in range(count):
            work()
        end = self.record()
        self.synchronize()
        return self.elapsed(start, end) / count


class Races:
    """Counts runs whose output has other bits than the first; disturbs the GPU between the runs."""

    def __init__(self, out: Any):
        import cupy

        self.cupy = cupy
        self.out = out
        self.bits = np.dtype(f"u{out.dtype.itemsize}")
        self.first: Any = None
        self.tally = cupy.zeros((), dtype=np.int64)
        self.side = cupy.cuda.Stream(non_blocking=True)
        self.noise = cupy.zeros(LEAST_FLUSH, dtype=np.uint8)

    def disturb(self, number: int) -> None:
        """Fill the output with NaN, and let another stream write for a while that differs from run to run."""
        self.out.fill(np.nan)
        size = (number * 7919) % 97 * (LEAST_FLUSH // 97)
        if size:
            self.noise.data.memset_async(number % 256, size, self.side)

    def compare(self) -> None:
        """Count the output if its bits differ from the first one's."""
        if self.first is None:
            self.first = self.out.copy().view(self.bits)
        self.tally += (self.out.view(self.bits) != self.first).any()

    def differing(self) -> int:
        """Runs that differed so far; waits for them."""
        return int(self.tally)
