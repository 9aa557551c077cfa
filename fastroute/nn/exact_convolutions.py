"""Convolutions that are right on a CPU, whatever their geometry and memory format."""

from torch import Tensor, nn
from torch.nn import functional

from fastroute.ops._convolution import prepared


class _Exact:
    """Pad the map first where the kernel does not fit it, as a kernel of 3 on a map of 1."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type != "cpu" or self.padding_mode != "zeros" or x.dim() != weight.dim():
            return super()._conv_forward(x, weight, bias)
        sides = self._reversed_padding_repeated_twice  # of "same" and "valid" too
        padding = [*reversed(sides[::2])]
        if sides[::2] != sides[1::2]:
            x, padding = functional.pad(x, sides), [0] * len(padding)
        x, weight, padding, dilation = prepared(x, weight, self.stride, padding, self.dilation)
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(padding) - 1]
        return convolve(x, weight, bias, self.stride, padding, dilation, self.groups)


class Conv1d(_Exact, nn.Conv1d):
    pass


class Conv2d(_Exact, nn.Conv2d):
    pass


class Conv3d(_Exact, nn.Conv3d):
    pass


_EXACT = {nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d}


def exact_convolutions(network: nn.Module) -> nn.Module:
    """Avoid the geometries for which PyTorch's convolutions on a CPU are wrong, and return the network.

    In bfloat16 they give a wrong gradient of the weight, or crash, where some positions of the kernel meet padding
    alone: a kernel of 3 with padding 1 on a map of one pixel, as small images have in the last stage of a ResNet. In
    float32 they are wrong for some strides over images of one channel in channels_last. Layers of the types
    `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` become subclasses of the same name, in place, which pad such maps first and
    compute all others as before. Parameters and their names stay. `create_model`, `multipath` and `RoutingClassifier`
    do this themselves.

    Example:
        >>> network = exact_convolutions(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)))
        >>> network.bfloat16()(torch.randn(2, 3, 1, 1, dtype=torch.bfloat16)).shape
        torch.Size([2, 8, 1, 1])
    """
    for module in network.modules():
        if type(module) in _EXACT:
            module.__class__ = _EXACT[type(module)]
    return network
