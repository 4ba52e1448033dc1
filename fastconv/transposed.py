"""Transposed convolution: the gradient with respect to the input, with a size rule of its own."""

from __future__ import annotations

from fastconv.ops import Activation, Array, ArrayT, convolve
from fastconv.problem import Padding, PerAxis


def conv_transpose2d(
    input: ArrayT,
    weight: Array,
    bias: Array | None = None,
    stride: PerAxis = 1,
    padding: Padding = 0,
    output_padding: PerAxis = 0,
    groups: int = 1,
    dilation: PerAxis = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
    activation: Activation = None,
    residual: Array | None = None,
    layout: str = "NCHW",
    out: Array | None = None,
) -> ArrayT:
    """Convolve backwards: the gradient of conv2d with respect to its input, as an operation of its own.

    ========  ============================================================================================
    input     (N, C, H, W), or (C, H, W) without a batch
    weight    (C, K // groups, R, S)
    bias      (K,)
    residual  the shape of the result
    out       the shape of the result; written and returned
    returns   (N, K, P, Q): P = (H - 1) * stride - before - after + dilation * (R - 1) + output_padding + 1
    ========  ============================================================================================

    Every element of the input adds the filters of its channel, times itself, to a window of the output
    ("deconvolution" or fractionally strided convolution; Zeiler et al. 2010, doi:10.1109/CVPR.2010.5539957).
    With stride 2 the output has about twice as many rows and columns.

    output_padding
        Rows and columns of the output beyond the last window, fewer than stride or dilation: with stride 2
        conv2d makes 4 rows of 7 and of 8, and this says which of them is meant. They get the bias alone.
    padding
        Elements by which the output is cut: an int, or an int or a (before, after) pair per axis.

    All other arguments, the kinds of arrays, dtypes and errors are those of conv2d; the argument order is
    torch's. It is computed by the same algorithms: `winograd` with stride 1 only.

    Its gradients, of g with respect to the result, where `geometry` is stride, padding, dilation, groups:
    conv2d(g, weight, None, *geometry) with respect to the input, grad.conv2d_weight(g, weight.shape, input,
    *geometry) to the weight, grad.conv2d_bias(g) to the bias. If output_padding is a stride or more, conv2d
    gives more rows than the input has, of which the first are the gradient; for grad.conv2d_weight, zeros
    behind the input make up for them.

    >>> import numpy as np
    >>> conv_transpose2d(np.array([[[[1.0, 2.0]]]]), np.array([[[[1.0, 10.0, 100.0]]]]), stride=2)
    array([[[[  1.,  10., 102.,  20., 200.]]]])
    """
    options = (stride, padding, dilation, groups, precision, output_padding, layout, False)
    return convolve("conv_transpose2d", input, weight, bias, options, algo, activation, residual, out)


def conv_transpose1d(
    input: ArrayT,
    weight: Array,
    bias: Array | None = None,
    stride: PerAxis = 1,
    padding: Padding = 0,
    output_padding: PerAxis = 0,
    groups: int = 1,
    dilation: PerAxis = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
    activation: Activation = None,
    residual: Array | None = None,
    layout: str = "NCL",
    out: Array | None = None,
) -> ArrayT:
    """Do what conv_transpose2d does for input (N, C, L) or (C, L) and weight (C, K // groups, S).

    >>> import numpy as np
    >>> conv_transpose1d(np.array([[1.0, 2.0]]), np.array([[[1.0, 10.0]]]), stride=2, output_padding=1)
    array([[ 1., 10.,  2., 20.,  0.]])
    """
    options = (stride, padding, dilation, groups, precision, output_padding, layout, False)
    return convolve("conv_transpose1d", input, weight, bias, options, algo, activation, residual, out)


def conv_transpose3d(
    input: ArrayT,
    weight: Array,
    bias: Array | None = None,
    stride: PerAxis = 1,
    padding: Padding = 0,
    output_padding: PerAxis = 0,
    groups: int = 1,
    dilation: PerAxis = 1,
    *,
    algo: str = "auto",
    precision: str = "high",
    activation: Activation = None,
    residual: Array | None = None,
    layout: str = "NCDHW",
    out: Array | None = None,
) -> ArrayT:
    """Do what conv_transpose2d does for input (N, C, D, H, W) and weight (C, K // groups, T, R, S).

    >>> import numpy as np
    >>> conv_transpose3d(np.ones((1, 2, 1, 1, 1)), np.ones((2, 1, 1, 1, 3))).ravel()
    array([2., 2., 2.])
    """
    options = (stride, padding, dilation, groups, precision, output_padding, layout, False)
    return convolve("conv_transpose3d", input, weight, bias, options, algo, activation, residual, out)
