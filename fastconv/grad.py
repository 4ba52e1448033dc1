"""The gradients of the operations: for a training loop that is written by hand.

As in torch.nn.grad, <op>_input, <op>_weight and <op>_bias take the arrays of <op> that they need (where only
the size of the input matters, input_size), then grad_output, then the options of <op>. Two differ: batch_norm
has its own name and returns three gradients at once; cross_entropy_input may be called without grad_output.
"""

from fastconv.conv_grad import conv1d_bias as conv1d_bias
from fastconv.conv_grad import conv1d_input as conv1d_input
from fastconv.conv_grad import conv1d_weight as conv1d_weight
from fastconv.conv_grad import conv2d_bias as conv2d_bias
from fastconv.conv_grad import conv2d_input as conv2d_input
from fastconv.conv_grad import conv2d_weight as conv2d_weight
from fastconv.conv_grad import conv3d_bias as conv3d_bias
from fastconv.conv_grad import conv3d_input as conv3d_input
from fastconv.conv_grad import conv3d_weight as conv3d_weight
from fastconv.folding import fold_input as fold_input
from fastconv.folding import unfold_input as unfold_input
from fastconv.functional_grad import batch_norm as batch_norm
from fastconv.functional_grad import cross_entropy_input as cross_entropy_input
from fastconv.functional_grad import dropout_input as dropout_input
from fastconv.functional_grad import flatten_input as flatten_input
from fastconv.functional_grad import gelu_input as gelu_input
from fastconv.functional_grad import interpolate_input as interpolate_input
from fastconv.functional_grad import leaky_relu_input as leaky_relu_input
from fastconv.functional_grad import linear_bias as linear_bias
from fastconv.functional_grad import linear_input as linear_input
from fastconv.functional_grad import linear_weight as linear_weight
from fastconv.functional_grad import local_response_norm_input as local_response_norm_input
from fastconv.functional_grad import log_softmax_input as log_softmax_input
from fastconv.functional_grad import relu6_input as relu6_input
from fastconv.functional_grad import relu_input as relu_input
from fastconv.functional_grad import sigmoid_input as sigmoid_input
from fastconv.functional_grad import silu_input as silu_input
from fastconv.functional_grad import softmax_input as softmax_input
from fastconv.functional_grad import tanh_input as tanh_input
from fastconv.pool_grad import adaptive_avg_pool1d_input as adaptive_avg_pool1d_input
from fastconv.pool_grad import adaptive_avg_pool2d_input as adaptive_avg_pool2d_input
from fastconv.pool_grad import adaptive_avg_pool3d_input as adaptive_avg_pool3d_input
from fastconv.pool_grad import adaptive_max_pool1d_input as adaptive_max_pool1d_input
from fastconv.pool_grad import adaptive_max_pool2d_input as adaptive_max_pool2d_input
from fastconv.pool_grad import avg_pool1d_input as avg_pool1d_input
from fastconv.pool_grad import avg_pool2d_input as avg_pool2d_input
from fastconv.pool_grad import avg_pool3d_input as avg_pool3d_input
from fastconv.pool_grad import max_pool1d_input as max_pool1d_input
from fastconv.pool_grad import max_pool2d_input as max_pool2d_input
from fastconv.pool_grad import max_pool3d_input as max_pool3d_input
from fastconv.pool_grad import max_unpool2d_input as max_unpool2d_input

__all__ = [name for name in dir() if not name.startswith("_")]
