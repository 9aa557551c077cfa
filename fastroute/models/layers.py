"""What the networks are made of."""

from torch import Tensor, nn

from fastroute.nn import Routing


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, bias: bool = False
) -> list[nn.Module]:
    """A convolution that keeps the resolution but for its stride, and its batch normalisation."""
    return [conv(in_channels, out_channels, kernel_size, stride, bias), nn.BatchNorm2d(out_channels)]


def conv(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the resolution but for its stride, with He's initial weights."""
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def pool_and_classify(channels: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class Network(nn.Sequential):
    """A network of one path: layers by name, from images to logits, with the call forms of all networks here.

    Shape:
        x: (N, in_chans, H, W).
        output: logits (N, num_classes); with `return_routing=True` also an empty dict: there are no routers.
    """

    def forward(self, x: Tensor, return_routing: bool = False) -> Tensor | tuple[Tensor, dict[str, Routing]]:
        logits = super().forward(x)
        return (logits, {}) if return_routing else logits


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
