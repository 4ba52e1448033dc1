"""fastconv's functions as torch operations: under autograd (twice too), torch.compile, autocast and DDP.

`fastconv.conv2d` takes tensors that need no gradient; here they may. What fastconv has kernels for, the
convolutions and the poolings, is registered with torch as operators. The other functions are torch's own:
they stand here so that every function of fastconv has its name for tensors, and on arrays too they are only
the library's own functions.
"""

try:
    import torch as _torch  # noqa: F401 - to say what is missing
except ImportError as error:
    raise ImportError(f"fastconv.torch needs torch: pip install torch ({error})") from error

from torch import flatten as flatten
from torch.nn.functional import batch_norm as batch_norm
from torch.nn.functional import cross_entropy as cross_entropy
from torch.nn.functional import dropout as dropout
from torch.nn.functional import fold as fold
from torch.nn.functional import gelu as gelu
from torch.nn.functional import interpolate as interpolate
from torch.nn.functional import leaky_relu as leaky_relu
from torch.nn.functional import linear as linear
from torch.nn.functional import local_response_norm as local_response_norm
from torch.nn.functional import log_softmax as log_softmax
from torch.nn.functional import relu as relu
from torch.nn.functional import relu6 as relu6
from torch.nn.functional import sigmoid as sigmoid
from torch.nn.functional import silu as silu
from torch.nn.functional import softmax as softmax
from torch.nn.functional import tanh as tanh
from torch.nn.functional import unfold as unfold

from fastconv.torch.convolution import conv1d as conv1d
from fastconv.torch.convolution import conv2d as conv2d
from fastconv.torch.convolution import conv3d as conv3d
from fastconv.torch.convolution import conv_transpose1d as conv_transpose1d
from fastconv.torch.convolution import conv_transpose2d as conv_transpose2d
from fastconv.torch.convolution import conv_transpose3d as conv_transpose3d
from fastconv.torch.layers import Conv1d as Conv1d
from fastconv.torch.layers import Conv2d as Conv2d
from fastconv.torch.layers import Conv3d as Conv3d
from fastconv.torch.layers import Conversion as Conversion
from fastconv.torch.layers import ConvTranspose1d as ConvTranspose1d
from fastconv.torch.layers import ConvTranspose2d as ConvTranspose2d
from fastconv.torch.layers import ConvTranspose3d as ConvTranspose3d
from fastconv.torch.layers import convert as convert
from fastconv.torch.pooling import adaptive_avg_pool1d as adaptive_avg_pool1d
from fastconv.torch.pooling import adaptive_avg_pool2d as adaptive_avg_pool2d
from fastconv.torch.pooling import adaptive_avg_pool3d as adaptive_avg_pool3d
from fastconv.torch.pooling import adaptive_max_pool1d as adaptive_max_pool1d
from fastconv.torch.pooling import adaptive_max_pool2d as adaptive_max_pool2d
from fastconv.torch.pooling import avg_pool1d as avg_pool1d
from fastconv.torch.pooling import avg_pool2d as avg_pool2d
from fastconv.torch.pooling import avg_pool3d as avg_pool3d
from fastconv.torch.pooling import max_pool1d as max_pool1d
from fastconv.torch.pooling import max_pool2d as max_pool2d
from fastconv.torch.pooling import max_pool3d as max_pool3d
from fastconv.torch.pooling import max_unpool2d as max_unpool2d
