"""Convolutions that are correct on a CPU for every geometry and memory format."""

from torch import Tensor, nn
from torch.nn import functional

from fastroute.ops._convolution import convolve


class _Exact:
    """Mixin that pads or cuts the map first where PyTorch is wrong, such as for a kernel of 3 on a map of 1."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type != "cpu" or x.dim() not in (weight.dim() - 1, weight.dim()):  # PyTorch says what is wrong
            return super()._conv_forward(x, weight, bias)
        if x.dim() < weight.dim():  # a single map
            return self._conv_forward(x.unsqueeze(0), weight, bias).squeeze(0)
        sides = self._reversed_padding_repeated_twice  # also set for "same" and "valid"
        padding = [*reversed(sides[::2])]
        zeros = self.padding_mode == "zeros"
        if not zeros or sides[::2] != sides[1::2]:
            x, padding = functional.pad(x, sides, "constant" if zeros else self.padding_mode), [0] * len(padding)
        return convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv1d(_Exact, nn.Conv1d):
    """`nn.Conv1d` that is correct on a CPU; see `exact_convolutions`."""


class Conv2d(_Exact, nn.Conv2d):
    """`nn.Conv2d` that is correct on a CPU; see `exact_convolutions`."""


class Conv3d(_Exact, nn.Conv3d):
    """`nn.Conv3d` that is correct on a CPU; see `exact_convolutions`."""


_EXACT = {nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d}


def exact_convolutions(network: nn.Module) -> nn.Module:
    """Make the convolutions of a network correct on a CPU, in place, and return the network.

    In bfloat16, PyTorch's CPU convolutions give a wrong gradient of the weight, or crash, if some kernel positions see
    only padding: for example a kernel of 3 with padding 1 on a map of one pixel, as in the last stage of a ResNet on
    small images. On processors with AMX their output may be wrong with a stride above 1 along a size that has a single
    output, as for images of 32×4. In float32 they are wrong for some strides over one-channel images in channels_last.

    Layers of the types `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` become subclasses of the same name, which pad or cut
    such maps first and compute all others as before. Parameters and their names do not change. Subclasses of these
    types and transposed convolutions stay as they are. `multipath`, `RoutingClassifier`, and `create_model` for the
    networks of this package call this function themselves. `torch.ao.quantization` looks layers up by their exact
    types, and so leaves these out.

    Args:
        network: any module.

    Returns:
        The same network.

    Example:
        >>> import torch
        >>> network = exact_convolutions(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)))
        >>> network.bfloat16()(torch.randn(2, 3, 1, 1, dtype=torch.bfloat16)).shape
        torch.Size([2, 8, 1, 1])
    """
    for module in network.modules():
        if type(module) in _EXACT:
            module.__class__ = _EXACT[type(module)]
    return network
