"""Shapes and options of a convolution enter, a checked and frozen ConvProblem (or a ConvError) leaves.

Only this module validates the shapes of a convolution or computes its output size; pool_problem, folding and
resizing do so for theirs, with its parts. Sizes are Python ints, so nothing overflows.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from numbers import Real
from typing import Any, NamedTuple, SupportsIndex, TypeVar

PerAxis = SupportsIndex | Sequence[SupportsIndex]
Padding = str | SupportsIndex | Sequence[SupportsIndex | Sequence[SupportsIndex]]
Triple = tuple[int, int, int]
Pair = tuple[int, int]

Value = TypeVar("Value")

OPERATIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
TRANSPOSED = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
DIRECTIONS = {"forward": "", "grad_input": "_input", "grad_weight": "_weight"}
"""The three passes, and what each adds to the name of an operation, as in torch.nn.grad."""
ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
ORDERS = ("NCHW", "NHWC")
PRECISIONS = ("highest", "high", "medium")
ACTIVATIONS = ("relu", "relu6", "silu", "gelu", "sigmoid", "tanh", "leaky_relu")

_MOST_ELEMENTS = 2**60  # of 8 bytes are more than an address reaches
_INPUT_AXES = "DHW"
_WEIGHT_AXES = "TRS"
_DEFAULTS: dict[str, object] = {
    "stride": 1, "padding": 0, "dilation": 1, "groups": 1,
    "dtype": "float32", "order": "NCHW", "precision": "high", "bias": None, "residual": None,
    "grad_output": None, "output_padding": 0,
}  # fmt: skip


class ConvError(ValueError):
    """A convolution, or an operation around one, that cannot be computed as asked.

    The message reads `<op>: <rule> = <numbers>, got <value> (<shapes and options>)`.
    """


def output_size(
    size: int,
    kernel: int,
    stride: int,
    padding_before: int,
    padding_after: int,
    dilation: int,
    ceil_mode: bool = False,
) -> int:
    """Count the windows that fit along one axis, in elements; zero or less means that none fits.

    With ceil_mode (pooling) a last window counts that reaches over the end, if it begins in the input or in
    the padding before it. The windows of convolutions, poolings and unfold are all counted here.

    >>> output_size(224, kernel=7, stride=2, padding_before=3, padding_after=3, dilation=1)
    112
    """
    room = padding_before + size + padding_after - span(kernel, dilation)
    if not ceil_mode:
        return room // stride + 1
    windows = -(-room // stride) + 1
    begins_behind = (windows - 1) * stride >= padding_before + size
    return windows - 1 if begins_behind else windows  # a SymBool of torch cannot be subtracted


def span(kernel: int, dilation: int) -> int:
    """Extent of a dilated kernel: first to last tap, both included."""
    return dilation * (kernel - 1) + 1


class HashedOnce:
    """A frozen dataclass that is the key of many caches: its fields are not hashed at every call.

    A class says `__hash__ = HashedOnce.__hash__`, else it gets another one as a dataclass.
    """

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self) if f.compare))  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, object]:
        """Leave out what is remembered: the hash of a string differs between processes."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class ConvProblem(HashedOnce):
    """One convolution without its data: what is computed, never how. make_problem checks and builds it.

    ========  ==========================================================================
    input     (N, C, D, H, W)
    weight    (K, C // groups, T, R, S)
    output    (N, K, O, P, Q)
    ========  ==========================================================================

    A 1-D or 2-D convolution is a 3-D one whose outer axes have extent 1, stride 1 and no padding. `stride`
    and `dilation` are in elements along (d, h, w); `padding` is ((before, after), ...) along the same axes.
    Shapes always list the channels second; `order` says how input and output lie in memory. `direction` says
    what is computed: the output ("forward"), or the gradient with respect to input or weight ("grad_input",
    "grad_weight") of a convolution whose sizes these are.

    >>> problem = make_problem("conv2d", (8, 64, 56, 56), (128, 64, 3, 3), padding=1)
    >>> problem.output_shape, problem.macs
    ((8, 128, 56, 56), 1849688064)
    >>> print(problem)
    n8c64h56w56_k128r3s3_st1x1_pad1x1_dil1x1_g1_float32
    """

    op: str = field(compare=False)
    ndim: int
    N: int
    C: int
    D: int
    H: int
    W: int
    K: int
    T: int
    R: int
    S: int
    stride: Triple
    dilation: Triple
    padding: tuple[Pair, Pair, Pair]
    groups: int
    dtype: str = "float32"
    order: str = "NCHW"
    precision: str = "high"
    direction: str = "forward"

    __hash__ = HashedOnce.__hash__

    @cached_property
    def _output_sizes(self) -> Triple:
        o, p, q = (output_size(*axis) for axis in self._axes)
        return o, p, q

    @property
    def _axes(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """The arguments of output_size along d, h and w."""
        sizes, kernels = self.input_shape5[2:], self.weight_shape5[2:]
        for size, kernel, stride, pad, dilation in zip(
            sizes, kernels, self.stride, self.padding, self.dilation, strict=True
        ):
            yield size, kernel, stride, *pad, dilation

    @property
    def O(self) -> int:  # noqa: E743 - the field's letter for the output depth
        """Output depth; 1 for a 1-D or 2-D convolution."""
        return self._output_sizes[0]

    @property
    def P(self) -> int:
        """Output height; 1 for a 1-D convolution."""
        return self._output_sizes[1]

    @property
    def Q(self) -> int:
        """Output width."""
        return self._output_sizes[2]

    @property
    def input_shape5(self) -> tuple[int, int, int, int, int]:
        """(N, C, D, H, W)."""
        return self.N, self.C, self.D, self.H, self.W

    @property
    def weight_shape5(self) -> tuple[int, int, int, int, int]:
        """(K, C // groups, T, R, S)."""
        return self.K, self.C // self.groups, self.T, self.R, self.S

    @property
    def output_shape5(self) -> tuple[int, int, int, int, int]:
        """(N, K, O, P, Q)."""
        return self.N, self.K, *self._output_sizes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Input shape with as many spatial axes as the caller has."""
        return self._caller_axes(self.input_shape5)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Weight shape with as many spatial axes as the caller has."""
        return self._caller_axes(self.weight_shape5)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Output shape with as many spatial axes as the caller has."""
        return self._caller_axes(self.output_shape5)

    def _caller_axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:2] + shape[5 - self.ndim :]

    @property
    def padding_before(self) -> Triple:
        """Padding before the first plane, row and column."""
        d, h, w = (before for before, _ in self.padding)
        return d, h, w

    @property
    def gemm_m(self) -> int:
        """Rows of one group's matrix product: its output channels."""
        return self.K // self.groups

    @property
    def gemm_n(self) -> int:
        """Columns of the matrix product: output pixels of the whole batch."""
        return self.N * math.prod(self._output_sizes)

    @property
    def gemm_k(self) -> int:
        """Length of each sum: the taps of one group's input channels."""
        return math.prod(self.weight_shape5[1:])

    @property
    def phase_taps(self) -> Pair:
        """Taps along rows and columns, in steps of the stride: of the largest phase of a filter."""
        return -(-self.R // self.stride[1]), -(-self.S // self.stride[2])

    @property
    def terms(self) -> int:
        """Length of each sum of this pass: gemm_k; output channels and taps; or all output pixels."""
        if self.direction == "grad_weight":
            return self.gemm_n
        return self.gemm_k if self.direction == "forward" else self.gemm_m * math.prod(self.weight_shape5[2:])

    @property
    def macs(self) -> int:
        """Multiply-adds of a direct sum, those with padding included; the same in every pass."""
        return self.groups * self.gemm_m * self.gemm_n * self.gemm_k

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of a direct sum: two per multiply-add."""
        return 2 * self.macs

    @property
    def bytes(self) -> int:
        """Bytes of input, weight and output, each moved once."""
        shapes = (self.input_shape5, self.weight_shape5, self.output_shape5)
        return self.itemsize * sum(math.prod(shape) for shape in shapes)

    @property
    def intensity(self) -> float:
        """Arithmetic intensity in FLOP per byte."""
        return self.flops / self.bytes

    @property
    def parameters(self) -> int:
        """Weight elements (a bias would add K)."""
        return math.prod(self.weight_shape5)

    @property
    def unread(self) -> Triple:
        """Rows of the padded input along (d, h, w) that no window reads, behind the last or between taps."""
        d, h, w = (
            before + size + after - _count_read(windows, kernel, stride, dilation)
            for windows, (size, kernel, stride, before, after, dilation) in zip(
                self._output_sizes, self._axes, strict=True
            )
        )
        return d, h, w

    @property
    def itemsize(self) -> int:
        """Bytes per stored element."""
        return ITEMSIZE[self.dtype]

    @property
    def compute_dtype(self) -> str:
        """The dtype of the arithmetic: half types are summed in float32."""
        return "float64" if self.dtype == "float64" else "float32"

    @cached_property
    def key(self) -> str:
        """The problem in one word, for tables and files; equal keys are equal problems."""
        names, kernels = _INPUT_AXES[-self.ndim :].lower(), _WEIGHT_AXES[-self.ndim :].lower()
        sizes = "".join(f"{name}{size}" for name, size in zip(names, self.input_shape[2:], strict=True))
        extents = "".join(f"{name}{size}" for name, size in zip(kernels, self.weight_shape[2:], strict=True))
        pads = (str(b) if b == a else f"{b}-{a}" for b, a in self.padding[-self.ndim :])
        parts = [
            f"n{self.N}c{self.C}{sizes}",
            f"k{self.K}{extents}",
            "st" + "x".join(map(str, self.stride[-self.ndim :])),
            "pad" + "x".join(pads),
            "dil" + "x".join(map(str, self.dilation[-self.ndim :])),
            f"g{self.groups}",
            self.dtype,
        ]
        options = ((self.order, "NCHW"), (self.precision, "high"), (self.direction, "forward"))
        return "_".join(parts + [value.lower() for value, default in options if value != default])

    def __str__(self) -> str:
        return self.key


def _count_read(windows: int, kernel: int, stride: int, dilation: int) -> int:
    """Distinct values of a * stride + b * dilation for a < windows, b < kernel.

    Pairs (a, b) and (a - d, b + s) name the same row when d and s are dilation and stride without their
    common divisor, so of each chain of such pairs only the first is counted.
    """
    common = math.gcd(stride, dilation)
    d, s = dilation // common, stride // common
    return windows * kernel - max(windows - d, 0) * max(kernel - s, 0)


def make_problem(
    op: str,
    input_shape: Sequence[SupportsIndex],
    weight_shape: Sequence[SupportsIndex],
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: SupportsIndex = 1,
    dtype: str = "float32",
    order: str = "NCHW",
    precision: str = "high",
    bias_shape: Sequence[SupportsIndex] | None = None,
    residual_shape: Sequence[SupportsIndex] | None = None,
    direction: str = "forward",
    grad_shape: Sequence[SupportsIndex] | None = None,
) -> ConvProblem:
    """Check shapes and options and return the problem they state.

    ============  ================================================================================
    input_shape   (N, C, W), (N, C, H, W) or (N, C, D, H, W), as `op` says; only N may be 0
    weight_shape  (K, C // groups, S), (K, C // groups, R, S) or (K, C // groups, T, R, S)
    stride        elements; an int, or one per spatial axis; the same for dilation
    padding       elements; an int, an int or (before, after) per spatial axis, "valid" (none), or
                  "same" (output ceil(size / stride), an odd element of padding goes after)
    dtype         "float32", "float64", "float16" or "bfloat16"
    order         "NCHW" (channels first in memory) or "NHWC" (channels last), whatever the rank
    direction     "forward", "grad_input" or "grad_weight"
    grad_shape    of the gradient with respect to the output, for the last two
    ============  ================================================================================

    Raises ConvError for a value that breaks a rule and TypeError for one of the wrong type.

    >>> make_problem("conv2d", (1, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3).output_shape
    (1, 64, 112, 112)
    >>> make_problem("conv1d", (1, 3, 9), (6, 2, 3))
    Traceback (most recent call last):
    fastconv.problem.ConvError: conv1d: weight.shape[1] must be C // groups = 3 // 1 = 3, got 2 (input ...
    """
    options = {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "dtype": dtype,
        "order": order, "precision": precision, "bias": bias_shape, "residual": residual_shape,
        "grad_output": grad_shape,
    }  # fmt: skip
    call = Call(
        f"{op}{DIRECTIONS[direction]}", {"input": input_shape, "weight": weight_shape}, options, _DEFAULTS
    )
    if op not in OPERATIONS:
        raise call.error(f"operation must be one of {', '.join(OPERATIONS)}, got {show(op)}")
    _check_options(call)
    ndim = OPERATIONS[op]
    inputs, weights = _check_shapes(call, ndim, ("K", "C // groups"))
    strides, dilations = per_axis(call, "stride", ndim), per_axis(call, "dilation", ndim)
    checked_groups = _check_groups(call, inputs[1], weights)
    pads = _resolve_padding(call, inputs[2:], weights[2:], strides, dilations)
    d, h, w = _with_absent(inputs[2:], 1)
    t, r, s = _with_absent(weights[2:], 1)
    problem = ConvProblem(
        op=call.op, ndim=ndim, N=inputs[0], C=inputs[1], D=d, H=h, W=w, K=weights[0], T=t, R=r, S=s,
        stride=_with_absent(strides, 1), dilation=_with_absent(dilations, 1),
        padding=_with_absent(pads, (0, 0)), groups=checked_groups,
        dtype=dtype, order=order, precision=precision, direction=direction,
    )  # fmt: skip
    _check_windows(call, problem)
    _check_operands(call, problem)
    return problem


def make_transposed(
    op: str,
    input_shape: Sequence[SupportsIndex],
    weight_shape: Sequence[SupportsIndex],
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    output_padding: PerAxis = 0,
    dilation: PerAxis = 1,
    groups: SupportsIndex = 1,
    dtype: str = "float32",
    order: str = "NCHW",
    precision: str = "high",
    bias_shape: Sequence[SupportsIndex] | None = None,
    residual_shape: Sequence[SupportsIndex] | None = None,
) -> ConvProblem:
    """Check a transposed convolution and return it as the gradient of the input that it is.

    ==============  ============================================================================
    input_shape     (N, C, H, W) in 2-D: the shape of the gradient of the problem's output
    weight_shape    (C, K // groups, R, S)
    output_padding  rows of the output beyond the last window: fewer than stride or dilation
    result          (N, K, P, Q): P = (H - 1) * stride - before - after + dilation * (R - 1) + 1
                    + output_padding; the problem's input_shape
    ==============  ============================================================================

    The problem's letters are those of the convolution whose gradient it is: C and K, H and P exchange roles.

    >>> make_transposed("conv_transpose2d", (1, 8, 7, 7), (8, 4, 3, 3), stride=2, padding=1).input_shape
    (1, 4, 13, 13)
    """
    options = {
        "stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation,
        "groups": groups, "dtype": dtype, "order": order, "precision": precision, "bias": bias_shape,
        "residual": residual_shape,
    }  # fmt: skip
    call = Call(op, {"input": input_shape, "weight": weight_shape}, options, _DEFAULTS)
    ndim = TRANSPOSED[op]
    _check_options(call)
    inputs, weights = _check_shapes(call, ndim, ("C", "K // groups"))
    strides, dilations = per_axis(call, "stride", ndim), per_axis(call, "dilation", ndim)
    beyond = per_axis(call, "output_padding", ndim, least=0)
    checked_groups = _check_transposed_groups(call, inputs[1], weights[0])
    rule = "padding must be an int, or an int or (before, after) pair per spatial axis"
    pads = tuple(_pair(call, rule, entry) for entry in entries(call, "padding", rule, ndim))
    axes = list(zip(inputs[2:], weights[2:], strides, dilations, pads, beyond, strict=True))
    sizes = tuple(_transposed_size(call, *axis) for axis in axes)
    d, h, w = _with_absent(sizes, 1)
    t, r, s = _with_absent(weights[2:], 1)
    # Whole strides of output_padding would be windows more: so much less is padded.
    whole = [(before, after - more // step * step) for _, _, step, _, (before, after), more in axes]
    problem = ConvProblem(
        op=op, ndim=ndim, N=inputs[0], C=weights[1] * checked_groups, D=d, H=h, W=w, K=inputs[1],
        T=t, R=r, S=s, stride=_with_absent(strides, 1), dilation=_with_absent(dilations, 1),
        padding=_with_absent(tuple(whole), (0, 0)), groups=checked_groups,
        dtype=dtype, order=order, precision=precision, direction="grad_input",
    )  # fmt: skip
    _check_shape_of(call, "bias", "(K,)", (problem.C,))
    _check_shape_of(call, "residual", "output.shape", problem.input_shape)
    return problem


def _check_transposed_groups(call: Call, channels: int, rows: int) -> int:
    groups = integer(call, "groups must be an int", call.options["groups"])
    if groups < 1:
        raise call.error(f"groups must be at least 1, got {groups}")
    if rows != channels:
        raise call.error(f"weight.shape[0] must be C = input.shape[1] = {channels}, got {rows}")
    if channels % groups:
        raise call.error(f"input.shape[1] must be a multiple of groups = {groups}, got {channels}")
    return groups


def _transposed_size(
    call: Call, size: int, kernel: int, stride: int, dilation: int, padding: Pair, beyond: int
) -> int:
    """Return the extent of the output along an axis."""
    if beyond >= max(stride, dilation):
        most = f"max(stride, dilation) = max({stride}, {dilation}) = {max(stride, dilation)}"
        raise call.error(f"output_padding must be below {most}, got {beyond}")
    found = (size - 1) * stride - sum(padding) + span(kernel, dilation) + beyond
    if found < 1:
        numbers = f"({size} - 1) * {stride} - {padding[0]} - {padding[1]} + {dilation} * ({kernel} - 1) + 1"
        rule = "output size (size - 1) * stride - padding - padding + dilation * (kernel - 1) + 1"
        raise call.error(f"{rule} + output_padding must be at least 1, got {numbers} + {beyond} = {found}")
    return found


def _with_absent(values: tuple[Value, ...], absent: Value) -> tuple[Value, Value, Value]:
    """Put the value of an absent axis in front, so that there are three."""
    d, h, w = (absent,) * (3 - len(values)) + values
    return d, h, w


class Call(NamedTuple):
    """What the caller of an operation wrote, kept to be quoted in errors.

    shapes    of the arrays, by argument
    options   by argument; those that have their default are not quoted
    """

    op: str
    shapes: Mapping[str, object]
    options: Mapping[str, object]
    defaults: Mapping[str, object]

    def error(self, rule: str) -> ConvError:
        return ConvError(self._message(rule))

    def type_error(self, rule: str, value: object) -> TypeError:
        kind = "" if isinstance(value, str) else f" of type {type(value).__name__}"
        return TypeError(self._message(f"{rule}, got {show(value)}{kind}"))

    def _message(self, rule: str) -> str:
        quoted = [f"{name} {show(shape)}" for name, shape in self.shapes.items()]
        # Compared as text: an option may be anything, such as an array whose == is not a bool.
        shown = ((name, show(value)) for name, value in self.options.items())
        quoted += [
            f"{name} {text}"
            for name, text in shown
            if name not in self.defaults or text != show(self.defaults[name])
        ]
        return f"{self.op}: {rule} ({', '.join(quoted)})"


_quote = reprlib.Repr()
_quote.maxtuple = _quote.maxlist = 8
_quote.maxstring = _quote.maxother = 60


def show(value: object) -> str:
    """A repr short enough for one line of an error; a tuple subclass such as torch.Size reads as a tuple."""
    return _quote.repr(tuple(value) if isinstance(value, tuple) else value)


def _check_options(call: Call) -> None:
    for name, known in (("dtype", tuple(ITEMSIZE)), ("order", ORDERS), ("precision", PRECISIONS)):
        value = call.options[name]
        rule = f"{name} must be one of {', '.join(known)}"
        if not isinstance(value, str) or (name == "dtype" and value not in known):
            raise call.type_error(rule, value)
        if value not in known:
            raise call.error(f"{rule}, got {value!r}")


def _check_shapes(
    call: Call, ndim: int, channels: tuple[str, str]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    inputs, weights = (shape_of(call, name, call.shapes[name]) for name in ("input", "weight"))
    check_shape(call, "input", inputs, ("N", "C", *_INPUT_AXES[-ndim:]), f" ({ndim + 1} without N)")
    check_shape(call, "weight", weights, (*channels, *_WEIGHT_AXES[-ndim:]), "")
    return inputs, weights


def check_shape(
    call: Call, name: str, shape: tuple[int, ...], letters: tuple[str, ...], unbatched: str
) -> None:
    if len(shape) != len(letters):
        axes = f"{name} ({', '.join(letters)}) must have {len(letters)} axes{unbatched}"
        raise call.error(f"{axes}, got {len(shape)}")
    for axis, (size, letter) in enumerate(zip(shape, letters, strict=True)):
        least = 0 if letter == "N" else 1
        if size < least:
            raise call.error(f"{name}.shape[{axis}] must be at least {least}, got {size}")


def _check_groups(call: Call, channels: int, weights: tuple[int, ...]) -> int:
    groups = integer(call, "groups must be an int", call.options["groups"])
    if groups < 1:
        raise call.error(f"groups must be at least 1, got {groups}")
    for name, size in (("input.shape[1]", channels), ("weight.shape[0]", weights[0])):
        if size % groups:
            raise call.error(f"{name} must be a multiple of groups = {groups}, got {size}")
    if weights[1] != channels // groups:
        numbers = f"{channels} // {groups} = {channels // groups}"
        raise call.error(f"weight.shape[1] must be C // groups = {numbers}, got {weights[1]}")
    return groups


def _check_windows(call: Call, problem: ConvProblem) -> None:
    for axis, taps, (size, kernel, _, before, after, dilation) in zip(
        _INPUT_AXES, _WEIGHT_AXES, problem._axes, strict=True
    ):
        extent, padded = span(kernel, dilation), before + size + after
        if extent > padded:
            limit = f"padding + {axis} + padding = {before} + {size} + {after} = {padded}"
            value = f"{dilation} * ({kernel} - 1) + 1 = {extent}"
            raise call.error(
                f"kernel extent dilation * ({taps} - 1) + 1 must be at most {limit}, got {value}"
            )


def _check_operands(call: Call, problem: ConvProblem) -> None:
    _check_shape_of(call, "bias", "(K,)", (problem.K,))
    _check_shape_of(call, "residual", "output.shape", problem.output_shape)
    _check_shape_of(call, "grad_output", "output.shape", problem.output_shape)


def _check_shape_of(call: Call, name: str, rule: str, shape: tuple[int, ...]) -> None:
    given = call.options[name]
    if given is not None and (actual := shape_of(call, name, given)) != shape:
        raise call.error(f"{name}.shape must be {rule} = {shape}, got {actual}")


def shape_of(call: Call, name: str, shape: object) -> tuple[int, ...]:
    """Return the shape of an array, or a size that is an argument itself."""
    is_argument = name.endswith("_size")
    rule = f"{name + '.shape' * (not is_argument)} must be a tuple of ints"
    sizes = _as_tuple(shape)
    if is_argument and getattr(shape, "ndim", 1) != 1:
        raise TypeError(f"{call.op}: {rule}, {_found(shape)}")
    if sizes is None:
        raise call.type_error(rule, shape)
    return tuple(integer(call, rule, size) for size in sizes)


def to_sizes(op: str, name: str, value: object) -> tuple[int, ...]:
    """Return a shape that is given as such, not as an array's; raise TypeError for anything else."""
    entries = _as_tuple(value)
    if entries is None or not all(map(_is_integer, entries)):
        raise TypeError(f"{op}: {name} must be a tuple of ints, {_found(value)}")
    return tuple(operator.index(entry) for entry in entries)  # type: ignore[arg-type]


def _found(value: Any) -> str:
    """Say what was given in place of sizes."""
    if getattr(value, "ndim", 1) != 1:
        return f"got an array of shape {tuple(value.shape)} (say its shape)"
    return f"got {show(value)} of type {type(value).__name__}"


def _as_tuple(value: object) -> tuple[object, ...] | None:
    """The entries of a tuple, list or array; None for anything else, such as a string or a set."""
    listed = value.tolist() if hasattr(value, "tolist") else value
    return tuple(listed) if isinstance(listed, (tuple, list)) else None


def integer(call: Call, rule: str, value: object) -> int:
    if _is_integer(value):
        return operator.index(value)  # type: ignore[arg-type]
    raise call.type_error(rule, value)


def _is_integer(value: object) -> bool:
    """True for an int of any kind, NumPy's included; 2.0 and True are no sizes."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):  # also those of NumPy and torch
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def entries(call: Call, name: str, rule: str, ndim: int) -> tuple[object, ...]:
    """One entry per spatial axis: a single int is repeated, a sequence must have the right length."""
    value = call.options[name]
    if _is_integer(value):
        return (value,) * ndim
    listed = _as_tuple(value)
    if listed is None:
        raise call.type_error(rule, value)
    if len(listed) != ndim:
        axes = f"number of spatial axes ({', '.join(_INPUT_AXES[-ndim:])})"
        raise call.error(f"len({name}) must be the {axes} = {ndim}, got {len(listed)}")
    return listed


def per_axis(call: Call, name: str, ndim: int, least: int = 1) -> tuple[int, ...]:
    rule = f"{name} must be an int or one int per spatial axis"
    values = tuple(integer(call, rule, entry) for entry in entries(call, name, rule, ndim))
    if min(values) < least:
        raise call.error(f"{name} must be at least {least}, got {min(values)}")
    return values


def _resolve_padding(
    call: Call,
    sizes: tuple[int, ...],
    kernels: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> tuple[Pair, ...]:
    padding = call.options["padding"]
    rule = "padding must be 'same', 'valid', an int, or an int or (before, after) pair per spatial axis"
    if not isinstance(padding, str):
        return tuple(_pair(call, rule, entry) for entry in entries(call, "padding", rule, len(sizes)))
    if padding == "valid":
        return ((0, 0),) * len(sizes)
    if padding == "same":
        return tuple(same_padding(*axis) for axis in zip(sizes, kernels, strides, dilations, strict=True))
    raise call.error(f"{rule}, got {show(padding)}")


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> Pair:
    """Return the padding before and after one axis that makes ceil(size / stride) windows.

    >>> same_padding(size=7, kernel=4, stride=1, dilation=1)
    (1, 2)
    """
    windows = -(-size // stride)
    total = max((windows - 1) * stride + span(kernel, dilation) - size, 0)
    return total // 2, total - total // 2


def _pair(call: Call, rule: str, entry: object) -> Pair:
    both = (entry, entry) if _is_integer(entry) else _as_tuple(entry)
    if both is None:
        raise call.type_error(rule, entry)
    if len(both) != 2:
        raise call.error(f"len of a (before, after) pair in padding must be 2, got {len(both)}")
    before, after = (integer(call, rule, number) for number in both)
    if min(before, after) < 0:
        raise call.error(f"padding must be at least 0, got {min(before, after)}")
    return before, after


@dataclass(frozen=True)
class Epilogue:
    """What follows the sum before it is stored: activation(conv + bias + residual).

    `activation` is None or one of ACTIVATIONS; `slope` is used by "leaky_relu" alone.
    """

    activation: str | None = None
    slope: float = 0.0


class Operands(NamedTuple):
    """What one run of a problem reads and writes; the arrays are of rank 5.

    ========  =======================================================================
    x         (N, C, D, H, W)
    weight    (K, C // groups, T, R, S), or what the algorithm's `prepare` made of it
    bias      (K,) or None
    residual  (N, K, O, P, Q) or None
    epilogue  what follows the sum
    out       (N, K, O, P, Q); is written
    ========  =======================================================================
    """

    x: Any
    weight: Any
    bias: Any | None
    residual: Any | None
    epilogue: Epilogue
    out: Any


class Cuts(NamedTuple):
    """What the convolutions that make an input's gradient take of the filters, each to be made contiguous.

    slices    of the axes of each part's taps, for filters of any axes that end with (T, R, S)
    shapes    of each part's filters, of rank 5
    begins    where they begin, and how many elements there are in all
    taps      of all parts, a row for each: its number in (T, R, S), where the part begins, how many taps that
              has, and which of them it is
    """

    slices: list[tuple[Any, ...]]
    shapes: list[tuple[int, ...]]
    begins: list[int]
    elements: int
    taps: Any


def make_epilogue(op: str, activation: str | tuple[str, float] | None) -> Epilogue:
    """Check an activation: None, a name, or ("leaky_relu", slope).

    "gelu" is the exact one, x * Phi(x) with erf (Hendrycks and Gimpel, arXiv 1606.08415), as torch's default.
    Raises ConvError for an unknown name or a slope that is not finite, TypeError for anything else.

    >>> make_epilogue("conv2d", ("leaky_relu", 0.1))
    Epilogue(activation='leaky_relu', slope=0.1)
    """
    if activation is None:
        return Epilogue()
    names = ", ".join(repr(name) for name in ACTIVATIONS if name != "leaky_relu")
    rule = f"activation must be None, {names} or ('leaky_relu', slope)"
    if isinstance(activation, str):
        if activation in ACTIVATIONS and activation != "leaky_relu":
            return Epilogue(activation)
        raise ConvError(f"{op}: {rule}, got {show(activation)}")
    if not isinstance(activation, (tuple, list)):
        raise TypeError(f"{op}: {rule}, got {show(activation)} of type {type(activation).__name__}")
    if len(activation) != 2 or not isinstance(activation[0], str) or activation[0] != "leaky_relu":
        raise ConvError(f"{op}: {rule}, got {show(activation)}")
    return Epilogue("leaky_relu", _check_slope(op, activation[1]))


def _check_slope(op: str, slope: object) -> float:
    rule = f"{op}: slope of 'leaky_relu' must be a finite number"
    if not _is_number(slope):
        raise TypeError(f"{rule}, got {show(slope)} of type {type(slope).__name__}")
    if not math.isfinite(found := _to_float(slope)):
        raise ConvError(f"{rule}, got {show(slope)}")
    return found


def number(call: Call, name: str) -> float:
    """Return an option that must be a finite number."""
    rule, value = f"{name} must be a finite number", call.options[name]
    if not _is_number(value):
        raise call.type_error(rule, value)
    if not math.isfinite(found := _to_float(value)):
        raise call.error(f"{rule}, got {show(value)}")
    return found


def flag(call: Call, name: str) -> bool:
    """Return an option that must be True or False."""
    value = call.options[name]
    if value is not True and value is not False:
        raise call.type_error(f"{name} must be True or False", value)
    return value


def check_count(op: str, shape: Sequence[int], input_shape: Sequence[int]) -> None:
    """Raise where a result has more elements than any memory; axes of 0 count as 1."""
    if math.prod(max(size, 1) for size in shape) >= _MOST_ELEMENTS:
        rule = f"the result must have fewer than 2**60 elements, got shape {tuple(shape)}"
        raise ConvError(f"{op}: {rule} (input {tuple(input_shape)})")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _to_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an int beyond every float
        return math.inf
