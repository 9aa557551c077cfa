"""The residual networks for ImageNet, from torchvision: one path or parallel paths (§3.4.3, Table 3.4)."""

from functools import partial

from torch import nn

from fastroute.models.conversion import multipath
from fastroute.models.registry import register_model
from fastroute.nn import MultiPathNetwork

SHAPES = {18: ("basic", [2, 2, 2, 2]), 34: ("basic", [3, 4, 6, 3])}
SHAPES |= {50: ("bottleneck", [3, 4, 6, 3]), 101: ("bottleneck", [3, 4, 23, 3])}


def imagenet_resnet(depth: int, **options) -> nn.Module:
    """torchvision's ResNet-depth, for the depths 18, 34, 50 and 101.

    Args:
        depth: the number of layers.
        options: num_classes, in_chans, and what else `_torchvision.ResNet` takes.
    """
    from fastroute.models._torchvision import ResNet

    return ResNet(*SHAPES[depth], **options)


def imagenet_resnet_cc(
    depth: int,
    paths: int,
    routing: str | None = "cc",
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int = 224,
) -> MultiPathNetwork:
    """ResNetN-X-CC: a one-to-many router after the first convolution and its max-pool, and a router after every stack.

    Args:
        depth: the number of layers: 18, 34, 50 or 101.
        paths: the number of parallel paths.
        routing: as in `multipath`.
        num_classes, in_chans: as in `create_model`.
        img_size: not used: any size works.
    """
    network = imagenet_resnet(depth, num_classes=num_classes, in_chans=in_chans)
    cuts = ["maxpool", "layer1", "layer2", "layer3", "layer4"]
    return multipath(network, paths, cuts, routing, input_size=(in_chans, img_size, img_size))


for _name, _builder, _classes, _params in (
    ("resnet18", partial(imagenet_resnet, 18), 1000, "11.7"),
    ("resnet34", partial(imagenet_resnet, 34), 1000, "21.8"),
    # Widening the stacks alone, as wide residual networks do, comes to the thesis's 25.9 million.
    ("wrn_18_1_5", partial(imagenet_resnet, 18, widen=1.5), 1000, "25.9"),
    ("resnet18_cc2", partial(imagenet_resnet_cc, 18, 2), 1000, "23.4"),
    ("resnet50", partial(imagenet_resnet, 50), 100, "23.71"),
    ("resnet101", partial(imagenet_resnet, 101), 100, "42.7"),
    ("wide_resnet50_2", partial(imagenet_resnet, 50, width_per_group=128), 100, "62.0"),
    ("resnext50_2x64d", partial(imagenet_resnet, 50, groups=2, width_per_group=64), 100, "47.5"),
    ("resnet50_cc2", partial(imagenet_resnet_cc, 50, 2), 100, "47.5"),
):
    register_model(_builder, _name, num_classes=_classes, img_size=224, table="3.4", params=_params)
