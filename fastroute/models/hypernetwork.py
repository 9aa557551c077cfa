"""A wide residual network with generated weights (Ha et al., 2017), a baseline of Table 3.3."""

import math

import torch
from torch import Tensor, nn

from fastroute.models.cifar_resnet import WIDTHS, blocks_per_stack
from fastroute.models.layers import conv, pool_and_classify
from fastroute.models.registry import register_model
from fastroute.nn import Routing
from fastroute.nn._classifier import Classifies
from fastroute.ops._convolution import convolve

UNIT = 16  # kernels are generated in pieces of 16 × 16 channels
EMBEDDING = 64


class KernelGenerator(nn.Module):
    """Generate a 3×3 kernel from an embedding by a two-layer linear network, the same for all convolutions.

    It has no biases: with them the whole network would have 0.156 million parameters; Table 3.3 prints 0.15.

    Shape:
        z: (O, I, 64), an embedding for each piece of 16 × 16 channels.
        output: (16·O, 16·I, 3, 3), with entries of variance 1 at the start.
    """

    def __init__(self):
        super().__init__()
        self.inner = nn.Parameter(torch.empty(EMBEDDING, UNIT, EMBEDDING))
        self.outer = nn.Parameter(torch.empty(EMBEDDING, UNIT, 3, 3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in (self.inner, self.outer):
            nn.init.normal_(parameter, std=1 / math.sqrt(EMBEDDING))

    def forward(self, z: Tensor) -> Tensor:
        hidden = torch.einsum("oiz,zcd->oicd", z, self.inner)
        kernel = torch.einsum("oicd,dekl->oeickl", hidden, self.outer)
        return kernel.flatten(0, 1).flatten(1, 2)


class GeneratedConv2d(nn.Module):
    """A 3×3 convolution whose parameters are embeddings; its kernel is generated and scaled to He's variance."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(out_channels // UNIT, in_channels // UNIT, EMBEDDING))
        self.scale, self.stride = math.sqrt(2 / (9 * out_channels)), stride
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding)

    def forward(self, x: Tensor, generate: KernelGenerator) -> Tensor:
        kernel = generate(self.embedding) * self.scale
        return convolve(x, kernel, None, [self.stride] * 2, [1, 1], [1, 1])


class GeneratedBlock(nn.Module):
    """A pre-activation block of two generated convolutions and a plain projection."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(out_channels)
        self.conv1 = GeneratedConv2d(in_channels, out_channels, stride)
        self.conv2 = GeneratedConv2d(out_channels, out_channels, 1)
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor, generate: KernelGenerator) -> Tensor:
        y = torch.relu(self.norm1(x))
        residual = self.conv2(torch.relu(self.norm2(self.conv1(y, generate))), generate)
        return residual + (x if self.shortcut is None else self.shortcut(y))


class HyperWideResNet(Classifies, nn.Module):
    """WRN-depth-widen with 3×3 kernels from one `KernelGenerator`, except the stem's.

    Args:
        depth: the number of layers, 6k + 4.
        widen: the factor of the stacks' widths.
        num_classes, in_chans: as in `create_model`.
        img_size: not used: any size works.

    Shape:
        x: (N, in_chans, H, W).
        output: logits (N, num_classes); with `return_routing=True` also an empty dict: there are no routers.
    """

    def __init__(self, depth: int, widen: int, *, num_classes: int = 10, in_chans: int = 3, img_size: int = 32):
        super().__init__()
        blocks, width = blocks_per_stack(depth, others=4), WIDTHS[0]
        self.generator = KernelGenerator()
        self.stem = conv(in_chans, width)
        self.blocks = nn.ModuleList()
        for i, out_width in enumerate(WIDTHS):
            for k in range(blocks):
                stride = 2 if i and not k else 1
                self.blocks.append(GeneratedBlock(width, widen * out_width, stride))
                width = widen * out_width
        self.activation = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.head = pool_and_classify(width, num_classes)

    def _body(self, x: Tensor, maps: list[list[Tensor]] | None = None) -> tuple[list[Tensor], dict[str, Routing]]:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, self.generator)
            if maps is not None:
                maps.append([x])
        return [self.activation(x)], {}

    def _head(self, xs: list[Tensor]) -> list[Tensor]:
        return [self.head(xs[0])]

    def _heads(self) -> list[str]:
        return ["head"]


@register_model(table="3.3", params="0.15")
def hyper_wrn_40_2(**options) -> nn.Module:
    """Build Hyper-WRN-40-2: `wrn_40_2` with generated kernels."""
    return HyperWideResNet(40, 2, **options)
