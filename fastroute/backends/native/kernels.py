"""One function for each operator: the compiled kernels, by PyTorch's dispatch on the device."""

import torch

from fastroute.backends.native.cross_predict import cross_predict, cross_predict_backward

cross_connect = torch.ops.fastroute_native.cross_connect.default
cross_connect_backward = torch.ops.fastroute_native.cross_connect_backward.default
gate = torch.ops.fastroute_native.gate.default
gate_backward = torch.ops.fastroute_native.gate_backward.default
mix = torch.ops.fastroute_native.mix.default
mix_backward = torch.ops.fastroute_native.mix_backward.default
mixture_em_loss = torch.ops.fastroute_native.mixture_em_loss.default
mixture_em_loss_backward = torch.ops.fastroute_native.mixture_em_loss_backward.default

__all__ = [
    "cross_connect",
    "cross_connect_backward",
    "cross_predict",
    "cross_predict_backward",
    "gate",
    "gate_backward",
    "mix",
    "mix_backward",
    "mixture_em_loss",
    "mixture_em_loss_backward",
]
