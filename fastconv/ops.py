"""The public operations: the caller's arrays enter, a plan runs, an array of the caller's kind leaves.

The steps of every call: adapt the arrays, state the problem, let plan.make_plan choose an algorithm, run it
into the output. For NumPy arrays and plain options all but the last are remembered by the form of the call.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fastconv import arrays, lazy
from fastconv import plan as planning
from fastconv.algorithms import TABLE, Algorithm
from fastconv.problem import (
    DIRECTIONS,
    OPERATIONS,
    ORDERS,
    TRANSPOSED,
    ConvError,
    ConvProblem,
    Epilogue,
    Padding,
    PerAxis,
    make_epilogue,
    make_problem,
    make_transposed,
)

ArrayT = TypeVar("ArrayT")
Array = Any
Activation = str | tuple[str, float] | None
Shape = tuple[int, ...]


class Shapes(NamedTuple):
    """Of the arrays of a convolution, as the caller has them; None where there is none."""

    input: Shape
    weight: Shape
    bias: Shape | None = None
    residual: Shape | None = None
    grad_output: Shape | None = None


Options = tuple[Any, ...]  # the values of _NUMBERS, then layout and flip

NDIM = OPERATIONS | TRANSPOSED
_LAYOUTS_OF = {1: ("NCL", "NLC"), 2: ("NCHW", "NHWC"), 3: ("NCDHW", "NDHWC")}
LAYOUTS = {op: _LAYOUTS_OF[ndim] for op, ndim in NDIM.items()}
"""Per operation, the names of the shapes with channels first and with channels last."""

_NUMBERS = ("stride", "padding", "dilation", "groups", "precision")
_TRANSPOSED_NUMBERS = (*_NUMBERS, "output_padding")
_PLAIN = (*[int] * 4, str, str, bool)  # types of most options, which are then as good as `_plain` ones
_NO_EPILOGUE = Epilogue()

# Larger than any array, yet only a Python int: the input a layer is checked against before it has seen one.
_UNKNOWN_SIZE = 2**62


def conv2d(
    input: ArrayT,
    weight: Array,
    bias: Array | None = None,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
    activation: Activation = None,
    residual: Array | None = None,
    layout: str = "NCHW",
    flip: bool = False,
    out: Array | None = None,
) -> ArrayT:
    """Convolve a batch of images with a bank of filters: activation(conv(input, weight) + bias + residual).

    ========  ==================================================================================
    input     (N, C, H, W), or (C, H, W) without a batch; N may be 0
    weight    (K, C // groups, R, S)
    bias      (K,)
    residual  the shape of the result
    out       the shape of the result; written and returned
    returns   (N, K, P, Q) or (K, P, Q): P = (before + H + after - dilation * (R - 1) - 1) // stride + 1
    ========  ==================================================================================

    As in torch and in all deep learning this is the cross-correlation: a learned kernel makes the flip
    superfluous. `flip=True` reverses the kernel along its spatial axes, which gives the true convolution of
    mathematics and signal processing (SciPy's `convolve`).

    stride, dilation
        Elements: an int, or one per spatial axis.
    padding
        Zeros around the input, in elements: an int, one int per axis, a (before, after) pair per axis,
        "valid" (none) or "same" (P = ceil(H / stride), an odd row of zeros goes after).
    algo
        "auto", or the name of a row of `fastconv.algorithms()`.
    precision
        "highest": the error of a direct sum in the arrays' dtype; "high": Winograd beyond F(2x2, 3x3) too,
        whose error is some times larger, which overflows at about 1/100 of the dtype's range and spreads a
        NaN over its tile; "medium" permits reduced-precision multiplication where a backend has it.
    activation
        "relu", "relu6", "silu", "gelu", "sigmoid", "tanh" or ("leaky_relu", slope).
    layout
        "NHWC" if the *shapes* of input, residual, out and result have the channels last; the weight keeps its
        shape. The order in *memory* is read off the strides of the input, and the result has the same.

    All arrays are of one kind: NumPy (a subclass gets its own kind back; a memmap, as in NumPy's own
    operations, an ndarray), torch tensors on the CPU, or on one CUDA device torch tensors, CuPy arrays or any
    that have __cuda_array_interface__ (the result is then a CuPy array); and of one dtype: float32, float64,
    or float16 or bfloat16 (ml_dtypes), which are summed in float32 and rounded once. Raises TypeError for
    arrays or options of another type, ConvError for values that break a rule, both before `out` is touched.

    A Dask array, of NumPy's or CuPy's chunks, gives a Dask array: the call checks all arguments, chooses the
    algorithm for the undivided problem and computes nothing. weight, bias and residual may lie in memory or
    be Dask arrays too. A chunk of the result is computed from a chunk of the input and what it needs of its
    neighbours, with the bits it has in the undivided result (fastconv/lazy.py tells the exceptions).

    Tensors and CUDA arrays go in without a copy. On a CUDA device work is enqueued on the caller's current
    stream, which nobody waits for, and all memory comes from the caller's pool: CuPy's or torch's. There a
    kernel is compiled when it is first called, and subnormal numbers of float32 and bfloat16 count as 0.

    Each algorithm names the paper it comes from in `fastconv.algorithms()`; the padding arithmetic is that of
    Dumoulin and Visin, "A guide to convolution arithmetic for deep learning" (arXiv 1603.07285).

    >>> import numpy as np
    >>> image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> edges = np.array([[[[-1, 0, 1]]]], dtype=np.float32)
    >>> conv2d(image, edges)[0, 0, 0], conv2d(image, edges, flip=True)[0, 0, 0]
    (array([2., 2.], dtype=float32), array([-2., -2.], dtype=float32))
    """
    options = (stride, padding, dilation, groups, precision, layout, flip)
    return convolve("conv2d", input, weight, bias, options, algo, activation, residual, out)


def conv1d(
    input: ArrayT,
    weight: Array,
    bias: Array | None = None,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
    activation: Activation = None,
    residual: Array | None = None,
    layout: str = "NCL",
    flip: bool = False,
    out: Array | None = None,
) -> ArrayT:
    """Convolve a batch of signals with a bank of filters; options, dtypes, errors and methods as for conv2d.

    ========  ========================================
    input     (N, C, L) or (C, L)
    weight    (K, C // groups, S)
    bias      (K,)
    returns   (N, K, Q) or (K, Q); residual, out alike
    layout    "NCL" or "NLC"
    ========  ========================================

    >>> import numpy as np
    >>> conv1d(np.array([[1.0, 2.0, 4.0]]), np.array([[[1.0, 1.0]]]), padding="same")
    array([[3., 6., 4.]])
    """
    options = (stride, padding, dilation, groups, precision, layout, flip)
    return convolve("conv1d", input, weight, bias, options, algo, activation, residual, out)


def conv3d(
    input: ArrayT,
    weight: Array,
    bias: Array | None = None,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
    activation: Activation = None,
    residual: Array | None = None,
    layout: str = "NCDHW",
    flip: bool = False,
    out: Array | None = None,
) -> ArrayT:
    """Convolve a batch of volumes with a bank of filters; options, dtypes, errors and methods as for conv2d.

    ========  ================================================
    input     (N, C, D, H, W) or (C, D, H, W)
    weight    (K, C // groups, T, R, S)
    bias      (K,)
    returns   (N, K, O, P, Q) or (K, O, P, Q); residual, out alike
    layout    "NCDHW" or "NDHWC"
    ========  ================================================

    >>> import numpy as np
    >>> conv3d(np.ones((1, 2, 3, 3, 3)), np.ones((1, 2, 3, 3, 3))).item()
    54.0
    """
    options = (stride, padding, dilation, groups, precision, layout, flip)
    return convolve("conv3d", input, weight, bias, options, algo, activation, residual, out)


def convolve(
    op: str,
    input: Any,
    weight: Any,
    bias: Any,
    options: Options,
    algo: str,
    activation: Activation,
    residual: Any,
    out: Any,
) -> Any:
    """The one implementation of conv1d, conv2d, conv3d and the transposed ones."""
    form = find_form(as_key(op, algo, activation, options), (input, weight, bias, residual, out))
    route = find_route(form)
    if route is not None:
        given = _given({"input": input, "weight": weight}, bias=bias, residual=residual, out=out)
        return Call(arrays.NUMPY, given, route.frame, route.epilogue).run(op, route.plan)
    if arrays.is_dask(input) and op in OPERATIONS:
        return _convolve_lazily(op, input, weight, bias, options, algo, activation, residual, out)
    call = bind(op, input, weight, bias, options, activation, residual, out)
    with call.kind.serve(call.given.values()):
        plan = planning.make_plan(call.frame.problem, algo, call.kind.backend)
        remember(form, plan, call.frame, call.epilogue)
        result = call.run(op, plan)
    return call.kind.wrap(result, input) if out is None else out


class Route(NamedTuple):
    """What a call comes to before anything is computed."""

    plan: planning.Plan
    frame: Frame
    epilogue: Epilogue


# By form: a call like one that was checked before is not checked again, which takes 10 to 20 us.
_routes: dict[Any, Route] = {}
_MOST_ROUTES = 4096
_ARRAYS = {np.ndarray, type(None)}


def find_route(form: Any) -> Route | None:
    """Return what a call of this form came to, if there was one."""
    return _routes.get(form)


def find_form(key: Any, given: tuple[Array, ...]) -> Any:
    """Return all that a route depends on, or None where there is no key or another kind of array.

    The elements of arrays, whether they are aligned and whether they overlap have no part in it.
    """
    if key is None or not set(map(type, given)) <= _ARRAYS:
        return None
    forms = [None if array is None else (array.shape, array.strides, array.dtype) for array in given]
    return key, *forms, planning.settings("cpu")


def gradient_key(op: str, algo: str, options: Options, size: Any) -> tuple[Any, ...] | None:
    """Return what `as_key` returns, for a gradient: the size of what it is made for belongs to it."""
    key, plain = as_key(op, algo, None, options), _plain(size)
    return None if key is None or plain is None else (key, plain)


def as_key(op: str, algo: str, activation: Activation, options: Options) -> tuple[Any, ...] | None:
    """Return what is no array in a form, or None where other values, maybe wrong ones, would equal these."""
    if (
        activation is None
        and tuple(map(type, options)) == _PLAIN
        and options[-1] is False
        and type(algo) is str
    ):
        return op, algo, options
    *numbers, layout, flip = options
    names = (op, algo, layout) if activation is None else (op, algo, layout, activation)
    if flip is not False or set(map(type, names)) != {str}:
        return None
    plain = _plain(numbers)
    return None if plain is None else (names, plain)


def remember(form: Any, plan: planning.Plan, frame: Frame, epilogue: Epilogue) -> None:
    """Keep the route of a form, and not too many of them."""
    if form is not None:
        if len(_routes) >= _MOST_ROUTES:
            _routes.clear()
        _routes[form] = Route(plan, frame, epilogue)


class Call(NamedTuple):
    """The checked arguments of an operation; explain and tune look at the same."""

    kind: arrays.Kind
    given: arrays.Given
    frame: Frame
    epilogue: Epilogue

    def filters(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Weight of rank 5 and bias, as a plan takes them."""
        compute, bias = self.frame.compute, self.given.get("bias")
        weight = arrays.to_computable(self.given["weight"], compute)[self.frame.weight_insert]
        return weight, None if bias is None else arrays.to_computable(bias, compute)

    def run(self, op: str, plan: planning.Plan) -> Any:
        """Return what a plan computes of the arguments."""
        return _run(op, plan, self, *self.filters())


def bind(
    op: str,
    input: Any,
    weight: Any,
    bias: Any,
    options: Options,
    activation: Activation,
    residual: Any,
    out: Any,
) -> Call:
    """Adapt the arrays and check all arguments but the algorithm and the memory of `out`."""
    given = _given({"input": input, "weight": weight}, bias=bias, residual=residual, out=out)
    kind = arrays.adapt(op, given)
    dtype = arrays.common_dtype(op, given)
    epilogue = _NO_EPILOGUE if activation is None else make_epilogue(op, activation)
    direction = "grad_input" if op in TRANSPOSED else "forward"
    frame = find_frame(op, direction, given["input"], _shapes(given), dtype, options, kind.backend)
    return Call(kind, given, frame, epilogue)


def _convolve_lazily(
    op: str,
    input: Any,
    weight: Any,
    bias: Any,
    options: Options,
    algo: str,
    activation: Activation,
    residual: Any,
    out: Any,
) -> Any:
    """Check a call, choose how its undivided problem is computed, and return a Dask array that does so."""
    call = _bind_lazily(op, input, weight, bias, options, activation, residual, out)
    problem, (*_, layout, flip) = call.frame.problem, options
    with call.kind.serve(call.given.values()):
        recipe = planning.make_plan(problem, algo, call.kind.backend).recipe
    convolve = partial(
        _convolve_chunk, problem=problem, layout=layout, flip=flip, epilogue=call.epilogue, recipe=recipe
    )
    aligned = [] if residual is None else [residual]
    dtype = arrays.to_native(input.dtype)
    return _sweep(input, call.frame, recipe).map(convolve, dtype, *aligned, weight=weight, bias=bias)


def _bind_lazily(
    op: str,
    input: Any,
    weight: Any,
    bias: Any,
    options: Options,
    activation: Activation,
    residual: Any,
    out: Any,
) -> Call:
    """Check all arguments of a call that a Dask array enters, by stand-ins for what has no memory yet."""
    if out is not None:
        raise ConvError(f"{op}: out must be None where input is a Dask array, which is computed later")
    given = _given({"input": input, "weight": weight}, bias=bias, residual=residual)
    known = {argument: arrays.stand_in(op, argument, array) for argument, array in given.items()}
    operands = known["input"], known["weight"], known.get("bias")
    return bind(op, *operands, options, activation, known.get("residual"), None)


def _sweep(input: Any, frame: Frame, recipe: planning.Recipe) -> lazy.Sweep:
    """Return how the windows of a problem move over a Dask array; all channels take part in each of them."""
    p = frame.problem
    is_last = frame.channels_first is not None
    first = input.ndim - p.ndim - is_last
    multiples = (1, recipe.multiple, recipe.multiple)  # planes are not cut into tiles
    axes = zip(p.weight_shape5[2:], p.stride, p.dilation, p.padding_before, multiples, strict=True)
    windows = {axis: lazy.Window(*along) for axis, along in enumerate(list(axes)[-p.ndim :], first)}
    return lazy.Sweep(input, windows, frame.result_shape, (input.ndim - 1 if is_last else first - 1,))


def _convolve_chunk(
    chunk: Any,
    residual: Any = None,
    *,
    parts: tuple[lazy.Part, ...],
    weight: Any,
    bias: Any,
    problem: ConvProblem,
    layout: str,
    flip: bool,
    epilogue: Epilogue,
    recipe: planning.Recipe,
) -> Any:
    """Convolve a chunk of a larger problem's input, with the bits that the undivided result has.

    The memory order is the problem's, whatever the strides of the chunk: it decides the order of sums.
    """
    op, ndim = problem.op, problem.ndim
    given = _given({"input": chunk, "weight": weight}, bias=bias, residual=residual)
    kind = arrays.adapt(op, given)
    dtype = arrays.common_dtype(op, given)
    padding = tuple((part.before, part.after) for part in parts)
    numbers = (problem.stride[-ndim:], padding, problem.dilation[-ndim:], problem.groups, problem.precision)
    is_last = is_channels_last(op, layout)
    frame = _make_frame(
        op, problem.direction, _shapes(given), dtype, problem.order, is_last, flip, numbers, kind.backend
    )
    with kind.serve(given.values()):
        plan = planning.make_plan(frame.problem, recipe.algorithm, kind.backend, bits=recipe.bits)
        result = Call(kind, given, frame, epilogue).run(op, plan)
    return kind.wrap(result, chunk)


def find_op(caller: str, weight: Any) -> str:
    """Name the operation that a weight of this rank belongs to."""
    rank = getattr(weight, "ndim", None)
    if rank is None and hasattr(weight, "__cuda_array_interface__"):  # which asks for no ndim
        rank = len(weight.__cuda_array_interface__["shape"])
    for op, ndim in OPERATIONS.items():
        if rank == ndim + 2:
            return op
    rule = "weight must be an array of 3, 4 or 5 axes (for conv1d, conv2d or conv3d)"
    raise (TypeError if rank is None else ConvError)(f"{caller}: {rule}, got {rank or type(weight).__name__}")


def _given(required: arrays.Given, **optional: Any) -> arrays.Given:
    """Add the optional arrays that are not None; a required one that is None stays, to be refused."""
    for argument, array in optional.items():
        if array is not None:
            required[argument] = array
    return required


def _shapes(given: arrays.Given) -> Shapes:
    return Shapes(**{argument: array.shape for argument, array in given.items() if argument != "out"})


def _shape(array: np.ndarray | None) -> Shape | None:
    return None if array is None else array.shape


def _run(
    op: str,
    plan: planning.Plan,
    call: Call,
    weight: Any,
    bias: np.ndarray | None,
) -> Any:
    """Run a plan into `out`, or into a new array of the input's dtype, shape letters and memory order."""
    kind, given, frame, epilogue = call
    input, residual, out = given["input"], given.get("residual"), given.get("out")
    compute = frame.compute
    if out is not None:
        arrays.check_out(op, given, frame.result_shape)
    work = out if out is not None and arrays.is_computable(out, compute) else frame.allocate(kind)
    if frame.problem.N:
        input5 = frame.view5(arrays.to_computable(input, compute))
        residual5 = None if residual is None else frame.view5(arrays.to_computable(residual, compute))
        plan.run(input5, weight, bias, residual5, epilogue, frame.view5(work))
    return finish(work, out, input.dtype)


def finish(work: np.ndarray, out: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """Return what was computed, in `out` or in the dtype of the caller's arrays."""
    if out is None:
        return arrays.to_storage(work, dtype)
    return work if work is out else arrays.store(work, out)


class Frame(NamedTuple):
    """How the caller's arrays lie in the rank-5, channels-first problem, and how the result is allocated.

    The result is the output, or the gradient that the problem's direction names.
    """

    problem: ConvProblem
    compute: np.dtype  # what the backend's kernels read and write: those of the GPU know half types
    channels_first: Shape | None  # transposition of the caller's axes; None if they are in this order
    insert: tuple[Any, ...]  # index that adds the absent axes
    weight_insert: tuple[Any, ...]  # the same for the weight; reverses its taps for a true convolution
    result_shape: Shape
    memory_shape: Shape  # of the result, axes in the order of memory
    memory_axes: Shape | None  # transposition from there to result_shape

    def view5(self, array: np.ndarray) -> np.ndarray:
        if self.channels_first is not None:
            array = array.transpose(self.channels_first)
        return array[self.insert]

    def allocate(self, kind: arrays.Kind) -> np.ndarray:
        array = kind.empty(self.memory_shape, self.compute)
        return array if self.memory_axes is None else array.transpose(self.memory_axes)


def find_frame(
    op: str, direction: str, leader: np.ndarray, shapes: Shapes, dtype: str, options: Options, backend: str
) -> Frame:
    """Return the frame of a call; the strides of `leader` say in which order memory is computed."""
    settled = _settle(op, options, "" if op in TRANSPOSED else DIRECTIONS[direction])
    return _frame_of(op, direction, leader, shapes, dtype, settled, backend)


class _Settled(NamedTuple):
    """Options as a frame takes them; is_plain: whether the numbers may be the key of a cache."""

    numbers: tuple[Any, ...]
    is_plain: bool
    is_last: bool
    flip: bool


def _settle(op: str, options: Options, gradient: str = "") -> _Settled:
    """Check layout and flip, and bring the numbers into one form; a layer does so once for all its calls."""
    *numbers, layout, flip = options
    is_last = is_channels_last(op, layout, gradient)
    _check_flip(op, flip)
    plain = _plain(numbers)
    return _Settled(plain or tuple(numbers), plain is not None, is_last, flip)


def _frame_of(
    op: str, direction: str, leader: np.ndarray, shapes: Shapes, dtype: str, settled: _Settled, backend: str
) -> Frame:
    numbers, is_plain, is_last, flip = settled
    order = ORDERS[is_last]
    if not leader.flags.c_contiguous:
        sample = slice(-NDIM[op] - 1, None)
        order = arrays.memory_order(leader.shape[sample], leader.strides[sample], -is_last, order)
    make = _make_frame if is_plain else _make_frame.__wrapped__
    return make(op, direction, shapes, dtype, order, is_last, flip, numbers, backend)


def is_channels_last(op: str, layout: str, gradient: str = "") -> bool:
    """Say whether a layout has the channels last, or raise; `gradient`: the end of its name, as "_input"."""
    names = LAYOUTS[op]
    if isinstance(layout, str) and layout in names:
        return layout == names[1]
    error = ConvError if isinstance(layout, str) else TypeError
    raise error(f"{op}{gradient}: layout must be one of {', '.join(names)}, got {layout!r}")


def _check_flip(op: str, flip: bool) -> None:
    if flip is not True and flip is not False:
        raise TypeError(f"{op}: flip must be True or False, got {flip!r}")


def _plain(value: Any) -> Any:
    """The value in ints, strings and tuples, or None: as a key of a cache 1.0 and True would pass for 1."""
    kind = type(value)
    if kind is int or kind is str:
        return value
    if kind is tuple or kind is list:
        entries = tuple([e if type(e) is int or type(e) is str else _plain(e) for e in value])
        return None if None in entries else entries
    return _plain(value.tolist()) if isinstance(value, (np.generic, np.ndarray)) else None


@lru_cache(maxsize=1024)
def _make_frame(
    op: str,
    direction: str,
    shapes: Shapes,
    dtype: str,
    order: str,
    is_last: bool,
    flip: bool,
    numbers: tuple[Any, ...],
    backend: str,
) -> Frame:
    ndim = NDIM[op]
    is_single = len(shapes.input) == ndim + 1
    problem = _make_problem(op, direction, shapes, dtype, order, is_last, is_single, numbers)
    absent = (None,) * (3 - ndim)
    taps = slice(None, None, -1 if flip else None)
    channel, *pixels = range(0 if is_single else 1, ndim + 2 - is_single)
    batch = [] if is_single else [0]
    to_last = (*batch, *pixels, channel)  # transposition from channels first
    to_first = (*batch, pixels[-1], channel, *pixels[:-1])  # and back
    first_shape = (problem.input_shape if direction == "grad_input" else problem.output_shape)[is_single:]
    last_shape = tuple(first_shape[axis] for axis in to_last)
    is_memory_last = order == "NHWC"
    frame = Frame(
        problem=problem,
        compute=np.dtype(problem.compute_dtype if backend == "cpu" else dtype),
        channels_first=to_first if is_last else None,
        insert=(None if is_single else slice(None), slice(None), *absent),
        weight_insert=(slice(None), slice(None), *absent, *(taps,) * ndim),
        result_shape=last_shape if is_last else first_shape,
        memory_shape=last_shape if is_memory_last else first_shape,
        memory_axes=None if is_memory_last == is_last else to_last if is_last else to_first,
    )
    if direction != "grad_weight":
        return frame
    return frame._replace(result_shape=shapes.weight, memory_shape=shapes.weight, memory_axes=None)


def _make_problem(
    op: str,
    direction: str,
    shapes: Shapes,
    dtype: str,
    order: str,
    is_last: bool,
    is_single: bool,
    numbers: tuple[Any, ...],
) -> ConvProblem:
    """State the problem with a batch and channels first; an error tells where that differs from the call."""
    input_shape = _to_channels_first(shapes.input, is_single, is_last)
    options: dict[str, Any] = {"dtype": dtype, "order": order, "bias_shape": shapes.bias}
    if shapes.residual is not None:
        options["residual_shape"] = _to_channels_first(shapes.residual, is_single, is_last)
    if shapes.grad_output is not None:
        options["grad_shape"] = _to_channels_first(shapes.grad_output, is_single, is_last)
    try:
        if op in TRANSPOSED:
            return make_transposed(
                op, input_shape, shapes.weight, **options, **dict(zip(_TRANSPOSED_NUMBERS, numbers))
            )
        options |= dict(zip(_NUMBERS, numbers))
        return make_problem(op, input_shape, shapes.weight, direction=direction, **options)
    except (ConvError, TypeError) as error:
        # A problem names the order of memory as if every image had two axes: the caller knows other names.
        message = str(error).replace(f"order {order!r}", f"order {LAYOUTS[op][ORDERS.index(order)]!r}")
        notes = [f"for layout {LAYOUTS[op][1]} shapes are listed channels first"] * is_last
        notes += ["for an input without a batch N = 1 is listed"] * is_single
        channels = shapes.weight[:1] if op in TRANSPOSED else shapes.weight[1:2]
        taken_for_channels = not is_last and len(channels) > 0 and shapes.input[-1:] == channels
        notes += [f"if the channels are last, say layout={LAYOUTS[op][1]!r}"] * taken_for_channels
        raise type(error)("; ".join([message, *notes])) from None


def _to_channels_first(shape: Shape, is_single: bool, is_last: bool) -> Shape:
    if is_single:
        shape = (1, *shape)
    return (shape[0], shape[-1], *shape[1:-1]) if is_last and len(shape) > 2 else shape


class _Conv:
    """What Conv1d, Conv2d and Conv3d share."""

    _op: str

    def __init__(
        self,
        weight: Array,
        bias: Array | None = None,
        stride: PerAxis = 1,
        padding: Padding = 0,
        dilation: PerAxis = 1,
        groups: int = 1,
        *,
        algo: str = "auto",
        precision: str = "high",
        activation: Activation = None,
        layout: str | None = None,
        flip: bool = False,
    ) -> None:
        op = self._op
        if isinstance(weight, int):
            name = type(self).__name__
            hint = f"fastconv.torch.{name} takes numbers of channels and has parameters"
            raise TypeError(f"{op}: weight of {name} must be an array, got {weight!r} ({hint})")
        given = _given({"weight": weight}, bias=bias)
        self._kind = arrays.adapt(op, given)
        self._dtype = arrays.common_dtype(op, given)
        self._activation, self._epilogue = activation, make_epilogue(op, activation)
        planning.check_algorithm(op, algo)
        self._algo = algo
        numbers = (stride, padding, dilation, groups, precision)
        layout = LAYOUTS[op][0] if layout is None else layout
        self._settled = _settle(op, (*numbers, layout, flip))
        self._options = (*self._settled.numbers, layout, flip)
        self._weight_shape, bias = given["weight"].shape, given.get("bias")
        frame = _stand_in_frame(
            op, self._weight_shape, _shape(bias), self._dtype, self._settled, self._kind.backend
        )
        if algo != "auto":
            shown = frame.problem.key.partition("_")[2]  # behind the sizes of the input, which is to come
            planning.check_accepted(frame.problem, op, algo, self._kind.backend, shown)
        # Copies: a weight the caller changes later would otherwise be half in what was prepared before.
        with self._kind.serve(given.values()):
            self._weight5 = self._kind.copy(given["weight"][frame.weight_insert], frame.compute)
            self._bias = None if bias is None else self._kind.copy(bias, frame.compute)
        self._prepared: dict[Any, Any] = {}
        weight_form = self._kind.name, self._dtype, self._weight_shape, _shape(bias)
        key = op, algo, self._epilogue.activation, self._epilogue.slope, self._settled, weight_form
        self._key = key if self._settled.is_plain else None

    def __call__(self, input: ArrayT, residual: Array | None = None, out: Array | None = None) -> ArrayT:
        """Convolve an input; all arrays are of the weight's kind and dtype."""
        op = self._op
        form = find_form(self._key, (input, residual, out))
        route = find_route(form)
        if route is not None:
            given = _given({"input": input}, residual=residual, out=out)
            call = Call(arrays.NUMPY, given, route.frame, route.epilogue)
            return _run(op, route.plan, call, self._prepare(route.plan), self._bias)
        if arrays.is_dask(input):
            return self._call_lazily(input, residual, out)
        given = _given({"input": input}, residual=residual, out=out)
        kind = arrays.adapt(op, given)
        dtype = arrays.common_dtype(op, given)
        if kind != self._kind or dtype != self._dtype:
            rule = f"input must be a {self._kind} of dtype {self._dtype} like weight"
            raise TypeError(f"{op}: {rule}, got a {kind} of dtype {dtype} ({arrays.describe(given)})")
        shapes = Shapes(given["input"].shape, self._weight_shape, residual=_shape(given.get("residual")))
        frame = _frame_of(op, "forward", given["input"], shapes, dtype, self._settled, kind.backend)
        with kind.serve(given.values()):
            plan = planning.make_plan(frame.problem, self._algo, kind.backend)
            remember(form, plan, frame, self._epilogue)
            call = Call(kind, given, frame, self._epilogue)
            result = _run(op, plan, call, self._prepare(plan), self._bias)
        return kind.wrap(result, input) if out is None else out

    def _call_lazily(self, input: Any, residual: Any, out: Any) -> Any:
        """Convolve a Dask array; its workers get the weight as it was given, but for a flip that is done."""
        dtype = np.dtype(self._dtype)

        def restore(view: np.ndarray) -> Any:
            return self._kind.wrap(arrays.to_storage(view, dtype), view)

        weight = restore(self._weight5.reshape(self._weight_shape))
        bias = None if self._bias is None else restore(self._bias)
        options = (*self._options[:-1], False)
        return _convolve_lazily(
            self._op, input, weight, bias, options, self._algo, self._activation, residual, out
        )

    def _prepare(self, plan: planning.Plan) -> Any:
        """The weight as this plan wants it, made once for all problems whose plans want the same.

        No lock: threads that come first at once prepare it twice with the same result, while a lock held
        by another thread would stay locked for ever in a forked child. On a GPU calls on other streams wait
        until it is prepared; what is captured in a graph is not computed before its launch, and not kept.
        """
        key = plan.weight_form
        if key in self._prepared:
            prepared, mark = self._prepared[key]
            self._kind.wait_for(mark)
            return prepared
        prepared = plan.prepare(self._weight5)
        mark = self._kind.mark()
        if mark is not None:
            self._prepared[key] = prepared, mark
        return prepared

    def __getstate__(self) -> dict[str, Any]:
        """Say what a copy or a pickle holds; the memory of a CUDA device is in neither."""
        if self._kind.device is not None:
            raise TypeError(
                f"{self._op}: a layer on a CUDA device cannot be copied or pickled: make it again"
            )
        return self.__dict__

    def __repr__(self) -> str:
        parts = [f"weight {self._weight_shape} {self._dtype}"]
        if self._bias is not None:
            parts.append(f"bias {self._bias.shape}")
        names = (*_NUMBERS, "layout", "flip", "algo", "activation")
        defaults = (1, 0, 1, 1, "high", LAYOUTS[self._op][0], False, "auto", None)
        values = (*self._options, self._algo, self._activation)
        parts += [f"{name}={v!r}" for name, v, d in zip(names, values, defaults) if repr(v) != repr(d)]
        return f"{type(self).__name__}({', '.join(parts)})"


def _stand_in_frame(
    op: str, weight_shape: Shape, bias_shape: Shape | None, dtype: str, settled: _Settled, backend: str
) -> Frame:
    """Check weight, bias and options of a layer against an input without limits, which no error quotes."""
    numbers, _, _, flip = settled
    groups = numbers[_NUMBERS.index("groups")]
    channels = weight_shape[1] if len(weight_shape) > 1 else 1
    if isinstance(groups, (int, np.integer)) and groups > 0:
        channels *= int(groups)
    input_shape = (1, channels, *(_UNKNOWN_SIZE,) * OPERATIONS[op])
    shapes = Shapes(input_shape, weight_shape, bias_shape)
    try:
        return _make_frame.__wrapped__(op, "forward", shapes, dtype, "NCHW", False, flip, numbers, backend)
    except (ConvError, TypeError) as error:
        raise type(error)(str(error).replace(f"input {input_shape}, ", "")) from None


class Conv1d(_Conv):
    """conv1d with a weight prepared once; see Conv2d.

    >>> import numpy as np
    >>> Conv1d(np.ones((1, 1, 2)))(np.array([[1.0, 2.0, 4.0]]))
    array([[3., 6.]])
    """

    _op = "conv1d"


class Conv2d(_Conv):
    """conv2d with a weight prepared once: packed or transformed as the chosen algorithm wants it.

    ========  =================================================
    weight    (K, C // groups, R, S)
    bias      (K,)
    call      conv(input, residual=None, out=None), as in conv2d
    ========  =================================================

    The options are those of conv2d. Weight and bias are copied: a change made to them later has no effect.
    What can be checked without an input is checked here, the rest at each call; errors are those of conv2d.
    One layer may be called from many threads at once. On a CUDA device a call may be captured in a graph;
    call the layer once with such an input before, so that kernels are compiled and the weight is prepared.

    >>> import numpy as np
    >>> conv = Conv2d(np.ones((1, 2, 3, 3), np.float32), padding=1, activation="relu")
    >>> conv
    Conv2d(weight (1, 2, 3, 3) float32, padding=1, activation='relu')
    >>> conv(np.ones((2, 2, 2), np.float32))
    array([[[8., 8.],
            [8., 8.]]], dtype=float32)
    """

    _op = "conv2d"


class Conv3d(_Conv):
    """conv3d with a weight prepared once; see Conv2d.

    >>> import numpy as np
    >>> Conv3d(np.ones((1, 1, 2, 2, 2)))(np.ones((1, 1, 2, 2, 2))).item()
    8.0
    """

    _op = "conv3d"


def explain(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
    activation: Activation = None,
    residual: Array | None = None,
    layout: str | None = None,
    flip: bool = False,
    out: Array | None = None,
) -> planning.Explanation:
    """Tell what a convolution with these arguments would do and why, without doing it; print the result.

    The arguments, shapes and errors are those of conv1d, conv2d or conv3d, as the rank of the weight says.
    Of a Dask array the plan of the undivided problem is told, and into what chunks it is divided.

    >>> import numpy as np
    >>> print(explain(np.ones((1, 64, 56, 56)), np.ones((64, 64, 3, 3)), padding=1))  # doctest: +ELLIPSIS
    conv2d n1c64h56w56_k64r3s3_st1x1_pad1x1_dil1x1_g1_float64
      input (1, 64, 56, 56), weight (64, 64, 3, 3), output (1, 64, 56, 56)
    ...
    """
    op = find_op("explain", weight)
    layout = LAYOUTS[op][0] if layout is None else layout
    options = (stride, padding, dilation, groups, precision, layout, flip)
    is_lazy = arrays.is_dask(input)
    call = (_bind_lazily if is_lazy else bind)(op, input, weight, bias, options, activation, residual, out)
    if out is not None:
        arrays.check_out(op, call.given, call.frame.result_shape)
    with call.kind.serve(call.given.values()):
        found = planning.explain_problem(call.frame.problem, algo, call.kind.backend)
    if not is_lazy:
        return found
    return replace(found, division=str(_sweep(input, call.frame, found.plan.recipe)))


def algorithms() -> tuple[Algorithm, ...]:
    """The rows of the table: name, summary, source and rules of every algorithm, in the order of the table.

    >>> [row.name for row in algorithms()]
    ['direct', 'im2col', 'winograd', 'pointwise', 'depthwise']
    """
    return tuple(TABLE.values())
