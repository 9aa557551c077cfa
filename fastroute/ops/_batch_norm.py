"""The compiled batch normalisation of a CPU, which adds a residual and applies a ReLU, for `fastroute.nn.block_end`.

csrc/ops/batch_norm.cpp has its schemas and its derivative. It has no other implementation: PyTorch's layers compute the
same.
"""

import torch

from fastroute.ops._library import NOT_COMPILED, add_node
from fastroute.ops._paths import accumulate_dtype, empty_path


def _fake_forward(x, residual, weight, bias, mean, variance, eps, relu):
    moments = x.new_empty(x.shape[1] if mean is None else 0, dtype=accumulate_dtype(x.dtype))
    return empty_path(x), moments, torch.empty_like(moments)


def _fake_backward(grad, y, x, weight, mean, variance, eps, batch, residual):
    grad_weight = x.new_empty(x.shape[1], dtype=accumulate_dtype(x.dtype))
    grad_residual = empty_path(x) if residual else x.new_empty(0)
    return empty_path(x), grad_residual, grad_weight, torch.empty_like(grad_weight)


if not NOT_COMPILED:
    batch_norm = add_node("batch_norm", _fake_forward)
    add_node("batch_norm_backward", _fake_backward)
