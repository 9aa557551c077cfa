"""The residual networks for small images, with one path or with parallel paths (§3.4.2, Table 3.3)."""

from functools import partial

from torch import Tensor, nn

from fastroute.models.registry import register_model
from fastroute.nn import CrossConnection, MultiPathNetwork, ParallelPaths

WIDTHS = (16, 32, 64)


def conv_bn(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(out_channels)]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around an identity, or a 1×1 projection where the shape changes (option B)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(
            *conv_bn(in_channels, out_channels, stride=stride),
            nn.ReLU(inplace=True),
            *conv_bn(out_channels, out_channels),
        )
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_bn(in_channels, out_channels, 1, stride))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.residual(x) + self.shortcut(x))


def _stack(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def _head(channels: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def cifar_resnet(
    depth: int,
    paths: int = 1,
    routing: str | None = "cc",
    *,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int = 32,
) -> MultiPathNetwork:
    """ResNet-depth for small images: a stem, three stacks of widths 16, 32 and 64, and a dense layer (§3.4.2).

    With parallel paths, the stem is shared, each path has its own stacks and dense layer, and the logits are averaged.
    Routers stand after the stem (one to many) and after each stack.

    Args:
        depth: the number of layers, 6k + 2 for k blocks in each stack.
        paths: the number of parallel paths.
        routing: "cc", cross-connections, or None, parallel paths that meet only at the stem and the logits.
        num_classes, in_chans: as in `create_model`.
        img_size: not used: any size works, since the network ends in global pooling.

    Raises:
        ValueError: depth is not 6k + 2, paths is less than 1, or routing is unknown.
    """
    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        raise ValueError(f"depth is {depth}; it must be 6k + 2, such as 20 or 32")
    if paths < 1:
        raise ValueError(f"paths is {paths}; it must be at least 1")
    if routing not in ("cc", None):
        raise ValueError(f"routing is {routing!r}; it must be 'cc' or None")
    routed = routing == "cc" and paths > 1

    width = WIDTHS[0]
    layers = {"stem": ParallelPaths([nn.Sequential(*conv_bn(in_chans, width), nn.ReLU(inplace=True))])}
    if routed:
        layers["stem_router"] = CrossConnection(width, 1, paths)
    for i, out_width in enumerate(WIDTHS, start=1):
        stride = 1 if i == 1 else 2
        layers[f"stack{i}"] = ParallelPaths(_stack(width, out_width, blocks, stride) for _ in range(paths))
        if routed:
            layers[f"stack{i}_router"] = CrossConnection(out_width, paths, paths)
        width = out_width
    layers["head"] = ParallelPaths(_head(width, num_classes) for _ in range(paths))
    return MultiPathNetwork(layers)


for _depth in (20, 32):
    register_model(partial(cifar_resnet, _depth), name=f"resnet{_depth}")
    for _paths in (2, 3, 4):
        register_model(partial(cifar_resnet, _depth, _paths), name=f"resnet{_depth}_cc{_paths}")
        register_model(partial(cifar_resnet, _depth, _paths, None), name=f"resnet{_depth}_x{_paths}")
