"""Convolutions that are right in half precision on a CPU, whatever their geometry."""

import torch
from torch import Tensor, nn

from fastroute.ops._convolution import kernel_fits

HALF = (torch.bfloat16, torch.float16)


class _Exact:
    """Compute in float32 where the kernel does not fit the map, as a kernel of 3 on a map of 1."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type != "cpu":
            return super()._conv_forward(x, weight, bias)
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast and x.dtype != torch.float64 else x.dtype
        if dtype not in HALF or self._fits(x):
            return super()._conv_forward(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.float()
            return super()._conv_forward(x.float(), weight.float(), bias).to(dtype)

    def _fits(self, x: Tensor) -> bool:
        size, padding = x.shape, self.padding
        if padding == "same":
            padding = [d * (k - 1) // 2 for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        elif padding == "valid":
            padding = [0] * len(self.kernel_size)
        elif self.padding_mode != "zeros":  # then the map is padded with numbers first
            spatial = (s + 2 * p for s, p in zip(size[-len(padding) :], padding, strict=True))
            size, padding = (*size[: -len(padding)], *spatial), [0] * len(padding)
        first = 1 if len(size) == len(self.kernel_size) + 1 else 2  # without a batch, or with one
        crashes = any(k == 1 and d > 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))
        return not crashes and kernel_fits(
            (1, 1, *size[first:]), (1, 1, *self.kernel_size), self.stride, padding, self.dilation
        )


class Conv1d(_Exact, nn.Conv1d):
    pass


class Conv2d(_Exact, nn.Conv2d):
    pass


class Conv3d(_Exact, nn.Conv3d):
    pass


_EXACT = {nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d}


def exact_convolutions(network: nn.Module) -> nn.Module:
    """Have a network's convolutions computed in float32 where PyTorch's in half precision are wrong; return it.

    On a CPU, in bfloat16, PyTorch's convolutions give a wrong gradient of the weight, or crash, where some positions of
    the kernel meet padding alone: a kernel of 3 with padding 1 on a map of one pixel, as small images have in the last
    stage of a ResNet. Those layers of the types `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` become subclasses of the same
    name, in place, which compute such maps in float32, and all others as before. Parameters, their names and results in
    float32 stay. `create_model`, `multipath` and `RoutingClassifier` do this themselves.

    Example:
        >>> network = exact_convolutions(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)))
        >>> network.bfloat16()(torch.randn(2, 3, 1, 1, dtype=torch.bfloat16)).shape
        torch.Size([2, 8, 1, 1])
    """
    for module in network.modules():
        if type(module) in _EXACT:
            module.__class__ = _EXACT[type(module)]
    return network
