"""Where kernels run in the tests: on the CPU, on a GPU that is emulated, and on a GPU if there is one."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import numpy as np

from fastconv.gpu import caller, cupy_driver, launch, memory
from tests.emulator import EmulatorDriver

_ALIGNED = 256  # bytes; what CuPy allocates begins at such an address


@dataclass(frozen=True)
class Backend:
    """One place to run.

    package  the part of fastconv that runs there: "cpu" or "gpu"
    dtypes   what its kernels read and write
    """

    name: str
    package: str
    dtypes: tuple[str, ...]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let this backend's plans be made and run."""
        if self.name == "emulator":
            with launch.use_driver(_emulator()):
                yield
        elif self.name == "gpu":
            with launch.calling(_CALLER):
                yield
        else:
            yield


_CALLER = caller.Caller(0, memory.empty_cupy)


def put(array: np.ndarray | None) -> np.ndarray | None:
    """Show kernels an array, with its strides, its alignment and what lies between its elements."""
    if array is None or caller.current() is not _CALLER:
        return array
    low, high = np.lib.array_utils.byte_bounds(array)
    raw = sys.modules["cupy"].empty(low % _ALIGNED + high - low, np.uint8)[low % _ALIGNED :]
    raw.set(bytes_of(array))
    start = raw.data.ptr + array.__array_interface__["data"][0] - low
    return _show(start, array.shape, array.strides, f"|V{array.itemsize}", raw).view(array.dtype)


def get(shown: np.ndarray | None, array: np.ndarray) -> None:
    """Bring back to an array what kernels wrote to what `put` showed them."""
    if shown is not array:
        bytes_of(array)[...] = shown.base.base.owner.get()


class _Shown:
    """What NumPy makes an array of: memory at an address, kept alive by its owner."""

    def __init__(self, interface, owner):
        self.__array_interface__, self.owner = interface, owner


def _show(address, shape, strides, typestr, owner):
    interface = {
        "version": 3,
        "data": (address, False),
        "shape": shape,
        "strides": strides,
        "typestr": typestr,
    }
    return np.asarray(_Shown(interface, owner))


def bytes_of(array):
    """All bytes from an array's first element to its last, in the order of memory."""
    low, high = np.lib.array_utils.byte_bounds(array)
    return _show(low, (high - low,), None, "|u1", array)


@lru_cache(maxsize=1)
def _emulator():
    return EmulatorDriver()


_HALVES = ("float16", "bfloat16") if find_spec("ml_dtypes") else ("float16",)

CPU = Backend("cpu", "cpu", ("float32", "float64"))  # half types are converted before
EMULATOR = Backend("emulator", "gpu", (*CPU.dtypes, *_HALVES))
GPU = Backend("gpu", "gpu", EMULATOR.dtypes)
BACKENDS = (CPU, EMULATOR, GPU)


@lru_cache(maxsize=4)
def why_absent(backend: Backend) -> str | None:
    """What this machine lacks to run a backend. The emulator's compiler is no reason to skip: it raises."""
    if backend is CPU:
        return None if find_spec("numba") else "Numba is not installed"
    return cupy_driver.why_unavailable() if backend is GPU else None
