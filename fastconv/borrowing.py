"""Arrays of any kind enter as NumPy's or CuPy's own, for the functions of these libraries; results go back.

For operations that such functions serve well, beside the convolutions: an activation, a softmax, a sum.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from fastconv import arrays


class Loan:
    """The arrays of one call.

    xp     the module whose functions take them: numpy or cupy
    dtype  of the arithmetic; half types are computed in float32 and rounded once
    """

    def __init__(self, kind: arrays.Kind, given: arrays.Given, like: Any, stored: np.dtype) -> None:
        self.kind, self.given, self.like, self.stored = kind, given, like, stored
        self.dtype = np.dtype("float32" if stored.itemsize < 4 else stored.name)
        self.xp: Any = np if kind.backend == "cpu" else sys.modules["cupy"]

    def __contains__(self, argument: str) -> bool:
        return argument in self.given

    def __getitem__(self, argument: str) -> Any:
        """Return an array to compute with, None if it was not given."""
        view = self.given.get(argument)
        if view is None or view.dtype.kind in "iub":
            return view if view is None or self.xp is np else _memory().view_in_cupy(view)
        if self.xp is np:
            return arrays.to_computable(view, self.dtype)
        found = _memory().view_in_cupy(view)
        return _from_bits(found) if view.dtype.name == "bfloat16" else found.astype(self.dtype, copy=False)

    def raw(self, argument: str) -> Any:
        """Return an array as it is stored, to be moved and not computed with."""
        view = self.given[argument]
        return view if self.xp is np else _memory().view_in_cupy(view)

    def shape(self, argument: str) -> tuple[int, ...]:
        """Return the shape of an array."""
        return self.given[argument].shape

    def describe(self) -> str:
        """Shapes and dtypes of all arrays, for the end of an error message."""
        return arrays.describe(self.given)

    def put(self, host: np.ndarray) -> Any:
        """Return a NumPy array, such as a table that was computed on the host, as one of the library."""
        return self.xp.asarray(host)

    def write(self, argument: str, values: Any) -> None:
        """Write values into the caller's array."""
        view = self.given[argument]
        if self.xp is np:
            arrays.store(values, view)
        else:
            _memory().view_in_cupy(view)[...] = self._to_storage(values)

    def give(self, result: Any) -> Any:
        """Return a result as an array of the caller's kind, numbers in the dtype of the first array."""
        if self.xp is not np:
            return self._give_on_device(self._to_storage(result))
        if result.dtype.kind == "f":
            result = arrays.to_storage(np.asarray(result), self.stored)
        result = self.kind.wrap(np.asarray(result), self.like)
        return result[()] if isinstance(result, np.ndarray) and result.ndim == 0 else result

    def erf(self, x: Any) -> Any:
        """Return the error function, which neither library has."""
        if self.xp is np:
            from fastconv.cpu import special as cpu_special

            return cpu_special.erf(x)
        from fastconv.gpu import special as gpu_special

        return gpu_special.erf(x)

    def _to_storage(self, values: Any) -> Any:
        if values.dtype.kind != "f":
            return values
        return _to_bits(values) if self.stored.name == "bfloat16" else values.astype(self.stored, copy=False)

    def _give_on_device(self, result: Any) -> Any:
        is_bits = result.dtype == np.uint16  # of bfloat16: no operation here has results of this kind
        if self.kind.name == arrays.TORCH_CUDA:
            tensor = _memory().cupy_to_torch(result.view(np.int16) if is_bits else result)
            return tensor.view(sys.modules["torch"].bfloat16) if is_bits else tensor
        return result.view(self.stored) if is_bits else result


@contextmanager
def borrow(op: str, given: arrays.Given, **optional: Any) -> Iterator[Loan]:
    """Lend the arrays of a call, those that are not None of the optional ones too.

    A number of NumPy's, which is what a result without axes becomes, counts as an array. All but arguments of
    whole numbers share one dtype. No warning is given of inf and NaN: they are results.
    """
    given = {**given, **{name: array for name, array in optional.items() if array is not None}}
    given = {
        name: np.asarray(array) if isinstance(array, np.generic) else array for name, array in given.items()
    }
    like = next(iter(given.values()))
    kind = arrays.adapt(op, given)
    numbers = {name: view for name, view in given.items() if name not in arrays.WHOLE or is_real(view)}
    arrays.common_dtype(op, numbers)
    stored = next(iter(numbers.values())).dtype
    with kind.serve(given.values()), _on_stream(kind), np.errstate(all="ignore"):
        yield Loan(kind, given, like, stored)


def is_real(view: np.ndarray) -> bool:
    """Say whether an array holds no whole numbers."""
    return view.dtype.kind not in "iub"


def _on_stream(kind: arrays.Kind) -> AbstractContextManager[Any]:
    return nullcontext() if kind.backend == "cpu" else _memory().on_callers_stream()


def _memory() -> Any:
    from fastconv.gpu import memory

    return memory


def _from_bits(bits: Any) -> Any:
    """Widen bfloat16, the upper half of a float32, from its bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bits(values: Any) -> Any:
    """Round float32 to bfloat16, ties to even, as its bits; a NaN stays one."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    rounded[values != values] = 0x7FC0
    return rounded.astype(np.uint16)
