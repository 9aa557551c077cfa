"""torchvision's residual networks, with the interface of all networks of this package. Needs torchvision."""

from torch import Tensor, nn

from fastroute._extras import extra
from fastroute.nn import FusedSequential, Routing, block_end
from fastroute.nn._classifier import Classifies

with extra("train", "this network"):
    from torchvision.models import resnet


class BasicBlock(resnet.BasicBlock):
    """torchvision's block; each normalisation is computed in one kernel with what follows (`block_end`)."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.downsample = _fused(self.downsample)
        self.end = nn.ReLU(inplace=True)  # a router behind the block may take it out

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the block."""
        y = block_end(self.bn1, self.conv1(x), end=self.relu)
        shortcut = x if self.downsample is None else self.downsample(x)
        return block_end(self.bn2, self.conv2(y), shortcut, self.end)


class Bottleneck(resnet.Bottleneck):
    """torchvision's bottleneck; each normalisation is computed in one kernel with what follows (`block_end`)."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.downsample = _fused(self.downsample)
        self.end = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the block."""
        y = block_end(self.bn1, self.conv1(x), end=self.relu)
        y = block_end(self.bn2, self.conv2(y), end=self.relu)
        shortcut = x if self.downsample is None else self.downsample(x)
        return block_end(self.bn3, self.conv3(y), shortcut, self.end)


def _fused(downsample: nn.Sequential | None) -> FusedSequential | None:
    return None if downsample is None else FusedSequential(*downsample)


class ResNet(Classifies, resnet.ResNet):
    """torchvision's `ResNet`, which loads its pretrained weights, for images of any number of channels.

    Args:
        block: "basic" or "bottleneck".
        layers: the number of blocks in each stack.
        widen: the factor of the stacks' widths; the stem keeps its 64 channels.
        groups, width_per_group: of the bottlenecks' 3×3 convolutions.
        num_classes, in_chans: as in `create_model`.
        img_size: not used: any size works.
    """

    def __init__(
        self,
        block: str,
        layers: list[int],
        *,
        widen: float = 1.0,
        groups: int = 1,
        width_per_group: int = 64,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int = 224,
    ):
        self._widen = widen
        kind = BasicBlock if block == "basic" else Bottleneck
        super().__init__(kind, layers, num_classes, groups=groups, width_per_group=width_per_group)
        if in_chans != 3:
            self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if widen != 1:
            self.fc = nn.Linear(self.inplanes, num_classes)

    def _make_layer(self, block, planes, *args, **options):
        return super()._make_layer(block, int(planes * self._widen), *args, **options)

    def _body(self, x: Tensor, maps: list[list[Tensor]] | None = None) -> tuple[list[Tensor], dict[str, Routing]]:
        x = self.maxpool(block_end(self.bn1, self.conv1(x), end=self.relu))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            if maps is not None:
                maps.append([x])
        return [x], {}

    def _head(self, xs: list[Tensor]) -> list[Tensor]:
        return [self.fc(self.avgpool(xs[0]).flatten(1))]

    def _heads(self) -> list[str]:
        return ["fc"]
