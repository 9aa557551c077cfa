"""Highway networks (Srivastava et al., 2015), a baseline of Table 3.2."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from fastroute.models.layers import Network, conv
from fastroute.models.registry import register_model

GROUPS = ((32, 32, 32, 48, 48), (80,) * 6, (128,) * 6)


class HighwayConv(nn.Module):
    """y = T·relu(H x) + (1 − T)·x, with a transform gate T = sigmoid(W x + b) for each pixel and channel.

    b starts at −2, so that the layer at first carries most of its input through.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.transform = conv(channels, channels, bias=True)
        self.gate = conv(channels, channels, bias=True)
        nn.init.constant_(self.gate.bias, -2.0)

    def forward(self, x: Tensor) -> Tensor:
        transformed = torch.relu(self.transform(x))
        return torch.lerp(x.to(transformed.dtype), transformed, torch.sigmoid(self.gate(x)))  # x may be an image


@register_model(table="3.2", params="2.3")
def highway(*, num_classes: int = 10, in_chans: int = 3, img_size: int = 32) -> Network:
    """Build a highway network of 19 layers with the widths of FitNet-4: 17 convolutions and two dense layers.

    Neither the thesis nor its source gives the layers. Layers that change the width are plain convolutions, all others
    are highway layers, with ReLU for FitNet's maxout; the hidden dense layer of 500 follows global pooling. This gives
    2.34 million parameters; Table 3.2 prints 2.3.

    Args:
        num_classes, in_chans: as in `create_model`.
        img_size: not used: any size of at least 4 works.
    """
    layers, width, depth = OrderedDict(), in_chans, 0
    for i, group in enumerate(GROUPS, start=1):
        for out_width in group:
            depth += 1
            if out_width == width:
                layers[f"conv{depth}"] = HighwayConv(width)
            else:
                layers[f"conv{depth}"] = nn.Sequential(conv(width, out_width, bias=True), nn.ReLU(inplace=True))
            width = out_width
        layers[f"pool{i}"] = nn.MaxPool2d(2) if i < len(GROUPS) else nn.AdaptiveMaxPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["dense1"] = nn.Sequential(nn.Linear(width, 500), nn.ReLU(inplace=True))
    layers["logits"] = nn.Linear(500, num_classes)
    return Network(layers)
