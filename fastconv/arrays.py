"""Arrays of any accepted kind enter, NumPy views of their memory leave; results go back in the caller's kind.

Nothing is imported on the user's behalf: an array of a framework exists only if that framework is already in
sys.modules. Views of CUDA arrays hold a device's addresses: their elements must not be looked at here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from fastconv import lines
from fastconv.problem import ConvError

DTYPES = ("float16", "bfloat16", "float32", "float64")
WHOLE = frozenset({"indices", "mask", "target"})
"""Arguments that may hold whole numbers, or True and False."""
ACCEPTED = "a NumPy or CuPy array, a torch tensor or an array with __cuda_array_interface__"

# Deciding exactly whether two strided arrays share an element can take exponential time; past this many
# steps of the search they count as overlapping.
_MAX_OVERLAP_WORK = 10_000

LARGE = 1 << 20
"""Bytes from which on a result on the CPU begins with a cache line; to find one takes a microsecond."""

Given = dict[str, Any]  # argument name -> array, without the arguments that were not given


_NO_CONTEXT = nullcontext()


def _serve_numpy(views: Iterable[np.ndarray]) -> AbstractContextManager[None]:
    return _NO_CONTEXT


def _empty_numpy(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    is_large = math.prod(shape) * dtype.itemsize >= LARGE
    return lines.allocate(shape, dtype) if is_large else np.empty(shape, dtype)


def _copy_numpy(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.array(view, dtype=dtype, order="C")


def _mark_numpy() -> bool:
    return True


def _wait_numpy(mark: Any) -> None:
    pass


class Kind(NamedTuple):
    """One kind of array: what to call it, how to see its memory as NumPy, where to allocate, how to go back.

    ========  =====================================================================================
    view      (op, argument, array) -> NumPy view
    wrap      (view made by `empty`, input) -> array of the caller's kind
    empty     (shape, dtype) -> view of new memory
    copy      (view, dtype) -> contiguous view of memory of its own
    serve     views of a call -> context in which it allocates, copies and computes
    mark      () -> what has been computed by now; None while that is recorded in a CUDA graph instead
    wait_for  mark -> None: what is computed from now on comes after it
    backend   whose kernels compute: "cpu" or "gpu"
    device    index of the CUDA device that holds the array, None on the CPU
    ========  =====================================================================================
    """

    name: str
    view: Callable[[str, str, Any], np.ndarray]
    wrap: Callable[[np.ndarray, Any], Any]
    empty: Callable[[tuple[int, ...], np.dtype], np.ndarray] = _empty_numpy
    copy: Callable[[np.ndarray, np.dtype], np.ndarray] = _copy_numpy
    serve: Callable[[Iterable[np.ndarray]], AbstractContextManager[None]] = _serve_numpy
    mark: Callable[[], Any] = _mark_numpy
    wait_for: Callable[[Any], None] = _wait_numpy
    backend: str = "cpu"
    device: int | None = None

    def __str__(self) -> str:
        return _noun(self.name) if self.device is None else f"{_noun(self.name)} on device {self.device}"


def adapt(op: str, given: Given) -> Kind:
    """Replace every array in `given` by a NumPy view of the same memory and return their common kind.

    Raises TypeError for what is no array or for a mixture of kinds, ConvError for a tensor that requires
    gradients, for CUDA arrays of several devices and where there is nothing to compute on them.

    >>> adapt("conv1d", {"input": np.zeros((2, 5)), "weight": np.zeros((4, 2, 3))}).name
    'NumPy'
    """
    for array in given.values():
        if type(array) is not np.ndarray:
            return _adapt_others(op, given)
    return NUMPY


def _adapt_others(op: str, given: Given) -> Kind:
    names = {argument: _kind_name(op, argument, array) for argument, array in given.items()}
    first, name = next(iter(names.items()))
    if name == DASK:
        hint = "call its compute() first, or let its map_blocks() call this where chunks are independent"
        raise TypeError(f"{op}: {first} must be in memory here, got a Dask array ({hint})")
    for argument, other in names.items():
        if other != name:
            rule = f"{argument} must be a {_noun(name)} like {first}, got a {_noun(other)}"
            raise TypeError(f"{op}: {rule} ({_join(f'{key} {value}' for key, value in names.items())})")
    kind = KINDS.get(name) or _cuda_kind(op, name, given)
    # A new dict first: if one of them is refused, `given` still holds what the caller passed.
    given.update({argument: kind.view(op, argument, array) for argument, array in given.items()})
    return kind


def _kind_name(op: str, argument: str, array: Any) -> str:
    if isinstance(array, np.ndarray):
        return NUMPY.name
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    if tensor is not None and isinstance(array, tensor):
        return TORCH_CUDA if array.device.type == "cuda" else TORCH.name
    ndarray = getattr(sys.modules.get("cupy"), "ndarray", None)
    if ndarray is not None and isinstance(array, ndarray):
        return CUPY
    if hasattr(array, "__cuda_array_interface__"):
        return CUDA
    if is_dask(array):
        return DASK
    raise TypeError(f"{op}: {argument} must be {ACCEPTED}, got {_type_name(array)}")


def _cuda_kind(op: str, name: str, given: Given) -> Kind:
    """Return the kind of arrays of one CUDA device."""
    from fastconv.gpu import launch, memory

    launch.check_available(op)
    index_of = {TORCH_CUDA: memory.device_of_torch, CUPY: memory.device_of_cupy, CUDA: memory.device_of}[name]
    devices = {argument: index_of(array) for argument, array in given.items()}
    first, device = next(iter(devices.items()))
    for argument, other in devices.items():
        if other != device:
            rule = f"{argument} must be on CUDA device {device} like {first}, got device {other}"
            raise ConvError(f"{op}: {rule} ({_join(f'{key} {value}' for key, value in devices.items())})")
    return _make_cuda_kind(name, device)


@lru_cache(maxsize=64)
def _make_cuda_kind(name: str, device: int) -> Kind:
    from fastconv.gpu import memory

    shared: dict[str, Any] = {
        "copy": memory.copy,
        "mark": memory.mark,
        "wait_for": memory.wait_for,
        "backend": "gpu",
        "device": device,
    }
    if name == TORCH_CUDA:
        empty, serve = partial(memory.empty_torch, device), partial(memory.serve_torch, device)
        return Kind(name, _view_torch_cuda, memory.to_torch, empty=empty, serve=serve, **shared)
    serve = partial(memory.serve_cupy if name == CUPY else memory.serve_interface, device)
    return Kind(name, _view_interface, memory.to_cupy, empty=memory.empty_cupy, serve=serve, **shared)


def _view_numpy(op: str, argument: str, array: np.ndarray) -> np.ndarray:
    if isinstance(array, np.ma.MaskedArray):
        hint = "the mask would be ignored; use .filled(value) or .data"
        raise TypeError(f"{op}: {argument} must be an array without a mask, got {_type_name(array)} ({hint})")
    return np.asarray(array)


def _wrap_numpy(result: np.ndarray, like: np.ndarray) -> np.ndarray:
    # NumPy's own protocol: a subclass gets its own kind; a memmap, whose result is in no file, an array.
    return result if type(like) is np.ndarray else like.__array_wrap__(result)


def _view_torch(op: str, argument: str, tensor: Any) -> np.ndarray:
    torch, plain = sys.modules["torch"], _plain_tensor(op, argument, tensor, "cpu")
    if plain.dtype is not torch.bfloat16:
        return plain.numpy()
    import ml_dtypes

    return plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _plain_tensor(op: str, argument: str, tensor: Any, place: str) -> Any:
    """Return a tensor as nothing but memory, or raise."""
    torch = sys.modules["torch"]
    if tensor.requires_grad and torch.is_grad_enabled():
        rule = f"{argument}.requires_grad must be False, because no gradient would flow back, got True"
        raise ConvError(
            f"{op}: {rule} (autograd knows fastconv.torch; without it use .detach() or no_grad())"
        )
    if argument not in WHOLE:
        _check_dtype_name(op, argument, str(tensor.dtype).removeprefix("torch."))
    if tensor.device.type != place or tensor.layout is not torch.strided:
        form = "dense" if tensor.layout is torch.strided else tensor.layout
        found = f"a {form} tensor on {tensor.device}"
        raise TypeError(f"{op}: {argument} must be a dense tensor on the CPU or a CUDA device, got {found}")
    if argument == "out" and tensor.is_neg():
        raise ConvError(f"{op}: out must be no negated view, got a tensor whose is_neg() is True")
    return tensor.detach().resolve_neg()


def _wrap_torch(result: np.ndarray, like: Any) -> Any:
    torch = sys.modules["torch"]
    if result.dtype.name == "bfloat16":
        return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(result)


def _view_torch_cuda(op: str, argument: str, tensor: Any) -> np.ndarray:
    from fastconv.gpu import memory

    return memory.from_torch(_plain_tensor(op, argument, tensor, "cuda"))


def _view_interface(op: str, argument: str, array: Any) -> np.ndarray:
    """View a CuPy array or any other with __cuda_array_interface__; a kernel must be able to read it."""
    from fastconv.gpu import memory

    interface = array.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise TypeError(f"{op}: {argument} must be an array without a mask, got {_type_name(array)}")
    view = memory.from_interface(array, interface)
    found = ""
    if view.size and not interface["data"][0]:
        found = "have memory, got a null pointer"
    elif not view.flags.aligned or not view.dtype.isnative:
        address = f"address % {view.itemsize} = {interface['data'][0] % view.itemsize}"
        found = f"be aligned and in the machine's byte order, got {address}, "
        found += f"strides {view.strides}, {view.dtype.str}"
    if found:
        raise ConvError(f"{op}: {argument} on a CUDA device must {found} ({argument} {view.shape})")
    return view


NUMPY = Kind("NumPy", _view_numpy, _wrap_numpy)
TORCH = Kind("torch", _view_torch, _wrap_torch)
KINDS = {kind.name: kind for kind in (NUMPY, TORCH)}
CUPY, TORCH_CUDA, CUDA = "CuPy", "torch CUDA", "CUDA"
"""Names of the kinds that there are once per device; CUDA are all that have __cuda_array_interface__."""
DASK = "Dask"
"""Name of arrays that are of no kind: of what kind their chunks are shows when they are computed."""


def is_dask(array: Any) -> bool:
    """Say whether this is a Dask array."""
    lazy = getattr(sys.modules.get("dask.array"), "Array", None)
    return lazy is not None and isinstance(array, lazy)


def stand_in(op: str, argument: str, array: Any) -> Any:
    """Return an array without memory that has shape, dtype and kind of a Dask array; any other array itself.

    By it the arguments of a lazy call can be checked. Raises ConvError where the shape is not known yet.
    """
    if not is_dask(array):
        return array
    if any(math.isnan(size) for size in array.shape):
        rule = f"{argument} must have known chunk sizes"
        raise ConvError(f"{op}: {rule}, got shape {array.shape} (call its compute_chunk_sizes() first)")
    adapt(op, {argument: array._meta})
    # By way of NumPy's protocols: for chunks of CuPy's this calls CuPy.
    return np.broadcast_to(np.empty_like(array._meta, shape=()), array.shape)


def common_dtype(op: str, given: Given) -> str:
    """Name the dtype that all arrays of an adapted `given` share; byte order does not count.

    Raises TypeError naming the first array whose dtype is not one of DTYPES or not that of the others.

    >>> common_dtype("conv1d", {"input": np.zeros((2, 5)), "weight": np.zeros((4, 2, 3), ">f8")})
    'float64'
    """
    expected: np.dtype | None = None
    name = first = ""
    for argument, array in given.items():
        if array.dtype is not expected:
            found = _check_dtype_name(op, argument, _dtype_name(array.dtype))
            if expected is None:
                expected, name, first = array.dtype, found, argument
            elif found != name:
                rule = f"{argument}.dtype must be {first}.dtype = {name}, got {found}"
                raise TypeError(f"{op}: {rule}; convert one of them ({describe(given)})")
    return name


@lru_cache(maxsize=64)
def _dtype_name(dtype: np.dtype) -> str:
    return dtype.name


def _check_dtype_name(op: str, argument: str, name: str) -> str:
    if name in DTYPES:
        return name
    hint = f"convert it first, for example to float32; {argument} is never converted silently"
    raise TypeError(f"{op}: {argument}.dtype must be {_join(DTYPES, ' or ')}, got {name} ({hint})")


def is_computable(array: np.ndarray, dtype: np.dtype) -> bool:
    """True if a kernel for `dtype` can read or write this memory: native, aligned, whole-element strides.

    >>> is_computable(np.zeros((4, 4))[::-1, ::2], np.dtype("float64"))
    True
    >>> is_computable(np.zeros(4, np.dtype("float64").newbyteorder()), np.dtype("float64"))
    False
    """
    return array.dtype == dtype and array.flags.aligned


def to_computable(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array itself where a kernel for `dtype` can read it, else a copy in the same memory order."""
    return array if is_computable(array, dtype) else array.astype(dtype, order="K")


def to_storage(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round to the dtype of the input, in the byte order of the machine; no copy where nothing changes.

    >>> to_storage(np.array([0.1, 1e6], dtype="float32"), np.dtype("float16"))
    array([0.1, inf], dtype=float16)
    """
    native = to_native(dtype)
    if array.dtype == native:
        return array
    with np.errstate(over="ignore"):  # inf is what rounding gives
        return array.astype(native, order="K")


def to_native(dtype: np.dtype) -> np.dtype:
    """Return a dtype in the byte order of the machine."""
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def store(array: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Round into `out`, whatever its byte order and alignment, and return it."""
    with np.errstate(over="ignore"):
        out[...] = array
    return out


@lru_cache(maxsize=1024)
def memory_order(shape: tuple[int, ...], strides: tuple[int, ...], channel_axis: int, default: str) -> str:
    """Read "NCHW" (channels first) or "NHWC" (channels last) off the strides of one sample, without batch.

    Where they say nothing (one channel, one pixel, broadcast zeros) the answer is `default`.

    >>> memory_order((64, 56, 56), (1, 3584, 64), 0, "NCHW")
    'NHWC'
    """
    steps = [abs(stride) if size > 1 else 0 for size, stride in zip(shape, strides)]
    channel = steps.pop(channel_axis)
    pixels = [step for step in steps if step]
    if not channel or not pixels:
        return default
    return "NHWC" if channel < min(pixels) else "NCHW"


def check_out(op: str, given: Given, shape: tuple[int, ...]) -> None:
    """Raise ConvError unless given["out"] has this shape, can be written and shares no memory with the rest.

    >>> check_out("conv1d", {"input": np.zeros(4), "out": np.zeros(3)}, (3,))
    """
    out = given["out"]
    found = ""
    if out.shape != shape:
        found = f"out.shape must be result.shape = {shape}, got {out.shape}"
    elif not out.flags.writeable:
        found = "out must be writeable, got a read-only array"
    elif _overlaps_itself(out):
        found = f"elements of out must not share memory, got strides {out.strides}"
    else:
        for argument, array in given.items():
            if argument != "out" and _overlap(out, array):
                found = f"out must not share memory with {argument}, got overlapping arrays"
    if found:
        raise ConvError(f"{op}: {found} ({describe(given)})")


def _overlap(out: np.ndarray, array: np.ndarray) -> bool:
    if not np.may_share_memory(out, array):
        return False
    try:
        return np.shares_memory(out, array, max_work=_MAX_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(array: np.ndarray) -> bool:
    """True unless each axis steps over all that those of smaller stride span, as slices of an array do."""
    if array.flags.c_contiguous or array.size == 0:
        return False
    axes = sorted((abs(stride), size) for size, stride in zip(array.shape, array.strides) if size > 1)
    span = array.itemsize
    for stride, size in axes:
        if stride < span:
            return True
        span += stride * (size - 1)
    return False


def describe(given: Given) -> str:
    """Shapes and dtypes of all arrays, for the end of an error message."""
    return _join(f"{argument} {array.shape} {array.dtype.name}" for argument, array in given.items())


def _noun(kind: str) -> str:
    return f"{kind} {'tensor' if kind in (TORCH.name, TORCH_CUDA) else 'array'}"


def _type_name(array: Any) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")


def _join(words: Any, last: str = ", ") -> str:
    *most, final = words
    return ", ".join(most) + last + final if most else final
