"""fastconv's functions as torch operations: under autograd (twice too), torch.compile, autocast and DDP.

`fastconv.conv2d` takes tensors that need no gradient; here they may. What fastconv has kernels for, the
convolutions and the poolings, is registered with torch as operators. The other functions are torch's own:
they stand here so that every function of fastconv has its name for tensors, and on arrays too they are only
the library's own functions.

Signatures are torch's, and `algo` and `precision` for convolutions; `activation`, `residual` and `layout` of
fastconv.conv2d are not taken. The derivatives of torch.func (such as grad) are not supported, by torch's
custom operators in general; vmap without a derivative calls the operators one by one.
"""

try:
    import torch as _torch  # noqa: F401 - to say what is missing
except ImportError as error:
    raise ImportError(f"fastconv.torch needs torch: pip install torch ({error})") from error

from torch import flatten
from torch.nn.functional import (
    batch_norm,
    cross_entropy,
    dropout,
    fold,
    gelu,
    interpolate,
    leaky_relu,
    linear,
    local_response_norm,
    log_softmax,
    relu,
    relu6,
    sigmoid,
    silu,
    softmax,
    tanh,
    unfold,
)

from fastconv.torch.convolution import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from fastconv.torch.layers import (
    Conv1d,
    Conv2d,
    Conv3d,
    Conversion,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    convert,
)
from fastconv.torch.pooling import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    max_unpool2d,
)

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Conversion",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convert",
    "cross_entropy",
    "dropout",
    "flatten",
    "fold",
    "gelu",
    "interpolate",
    "leaky_relu",
    "linear",
    "local_response_norm",
    "log_softmax",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_unpool2d",
    "relu",
    "relu6",
    "sigmoid",
    "silu",
    "softmax",
    "tanh",
    "unfold",
]
