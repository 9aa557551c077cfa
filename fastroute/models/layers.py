"""Layers that the networks share."""

from torch import Tensor, nn

from fastroute.nn import SparseRouter, SparseRouting
from fastroute.nn._classifier import Classifies
from fastroute.nn.router import unwrapped


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, bias: bool = False
) -> list[nn.Module]:
    """Return a convolution padded to keep the resolution at stride 1, and its batch normalisation."""
    return [conv(in_channels, out_channels, kernel_size, stride, bias), nn.BatchNorm2d(out_channels)]


def conv(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """Return a convolution padded to keep the resolution at stride 1, with He's initial weights."""
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def pool_and_classify(channels: int, num_classes: int) -> nn.Sequential:
    """Return global average pooling and a dense layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class Network(Classifies, nn.Sequential):
    """A network of one path: layers by name, from images to logits, with the interface of `MultiPathNetwork`.

    Shape:
        x: (N, in_chans, H, W).
        output: logits (N, num_classes); with `return_routing=True` also a dict from the layer name of each
            `SparseRouter` to its `SparseRouting`; it is empty for a network without any.
    """

    def _body(self, x: Tensor, maps: list[list[Tensor]] | None = None) -> tuple[list[Tensor], dict[str, SparseRouting]]:
        routing = {}
        for name, layer in list(self._modules.items())[:-1]:  # also a layer that comes again
            if isinstance(unwrapped(layer), SparseRouter):
                x, routing[name] = layer(x, return_routing=True)
            else:
                x = layer(x)
            if maps is not None:
                maps.append([x])
        return [x], routing

    def _head(self, xs: list[Tensor]) -> list[Tensor]:
        return [self[-1](xs[0])]

    def _heads(self) -> list[str]:
        return [list(self._modules)[-1]]


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate in (0, 1) computed from all channels' means (Hu et al., 2018).

    Args:
        channels: C.
        reduction: the hidden layer has C / reduction channels, at least one.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)
