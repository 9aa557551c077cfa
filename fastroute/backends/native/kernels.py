"""One function for each operator: the compiled kernels, by PyTorch's dispatch on the device."""

import torch

cross_connect = torch.ops.fastroute_native.cross_connect.default
cross_connect_backward = torch.ops.fastroute_native.cross_connect_backward.default
mix = torch.ops.fastroute_native.mix.default
mix_backward = torch.ops.fastroute_native.mix_backward.default
mixture_em_loss = torch.ops.fastroute_native.mixture_em_loss.default
mixture_em_loss_backward = torch.ops.fastroute_native.mixture_em_loss_backward.default
