"""Where the operations around the convolutions run in the tests: the arrays of one backend, and back."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest

from fastconv.gpu import launch
from tests import cuda_stand_in
from tests.backends import BACKENDS, CPU, EMULATOR, Backend, bytes_of, why_absent
from tests.emulator import EmulatorDriver


class Place(NamedTuple):
    """The arrays of a backend.

    make  NumPy array -> array there
    host  array there -> NumPy array
    """

    backend: Backend
    make: Callable[[np.ndarray], Any]
    host: Callable[[Any], np.ndarray]


def everywhere(function: Any) -> Any:
    """Parametrize a test by `place`: the CPU, a GPU that is emulated, and a GPU if there is one."""
    return pytest.mark.parametrize("place", [_param(backend) for backend in BACKENDS], indirect=True)(
        function
    )


def _param(backend: Backend) -> Any:
    reason = why_absent(backend)
    marks = [getattr(pytest.mark, backend.name)]
    return pytest.param(
        backend, id=backend.name, marks=marks if reason is None else [*marks, pytest.mark.skip(reason=reason)]
    )


@contextmanager
def entering(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Let arrays of a backend be computed with."""
    if backend is CPU:
        yield Place(backend, lambda host: host, np.asarray)
    elif backend is EMULATOR:
        monkeypatch.setitem(sys.modules, "cupy", cuda_stand_in.make_cupy([]))
        with launch.use_driver(cuda_stand_in.StandInDriver(EmulatorDriver())):
            yield Place(backend, cuda_stand_in.CupyArray, cuda_stand_in.CupyKind().host)
    else:
        yield Place(backend, _to_gpu, _from_gpu)


def _to_gpu(host: np.ndarray) -> Any:
    """A CuPy array with the strides of one on the host, which cupy.asarray would not keep."""
    import cupy

    if not host.size:
        return cupy.empty(host.shape, host.dtype)
    low, high = np.lib.array_utils.byte_bounds(host)
    raw = cupy.empty(high - low, np.uint8)
    raw.set(bytes_of(host))
    start = raw.data + (host.__array_interface__["data"][0] - low)
    return cupy.ndarray(host.shape, host.dtype, start, host.strides)


def _from_gpu(array: Any) -> np.ndarray:
    """A copy on the host with its axes in the same order in memory."""
    import cupy

    axes = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    return cupy.asnumpy(array.transpose(axes)).transpose(np.argsort(axes))
