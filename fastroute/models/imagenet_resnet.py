"""The residual networks for ImageNet, from torchvision: one path or parallel paths (§3.4.3, Table 3.4)."""

from torch import nn

from fastroute.models.conversion import multipath
from fastroute.models.registry import register_model
from fastroute.nn import MultiPathNetwork

SHAPES = {18: ("basic", [2, 2, 2, 2]), 34: ("basic", [3, 4, 6, 3])}
SHAPES |= {50: ("bottleneck", [3, 4, 6, 3]), 101: ("bottleneck", [3, 4, 23, 3])}


def imagenet_resnet(depth: int, **options) -> nn.Module:
    """Build torchvision's ResNet-depth.

    Args:
        depth: the number of layers: 18, 34, 50 or 101.
        options: of `_torchvision.ResNet`, such as num_classes and in_chans.
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
    """Build ResNetN-X-CC: a one-to-many router after the first max-pool, and a router after every stack.

    Args:
        depth: the number of layers: 18, 34, 50 or 101.
        paths: the number of parallel paths.
        routing: as in `multipath`.
        num_classes, in_chans: as in `create_model`.
        img_size: of the images by which `multipath` finds the channels at its cuts; the network takes any size.
    """
    network = imagenet_resnet(depth, num_classes=num_classes, in_chans=in_chans)
    cuts = ["maxpool", "layer1", "layer2", "layer3", "layer4"]
    return multipath(network, paths, cuts, routing, input_size=(in_chans, img_size, img_size))


@register_model(num_classes=1000, img_size=224, table="3.4", params="11.7")
def resnet18(**options) -> nn.Module:
    """Build torchvision's ResNet-18."""
    return imagenet_resnet(18, **options)


@register_model(num_classes=1000, img_size=224, table="3.4", params="21.8")
def resnet34(**options) -> nn.Module:
    """Build torchvision's ResNet-34."""
    return imagenet_resnet(34, **options)


@register_model(num_classes=1000, img_size=224, table="3.4", params="25.9")
def wrn_18_1_5(**options) -> nn.Module:
    """Build WRN-18-1.5: ResNet-18 with stacks of 1.5 times the width."""
    # Widening the stacks alone, as wide residual networks do, comes to the thesis's 25.9 million.
    return imagenet_resnet(18, widen=1.5, **options)


@register_model(num_classes=1000, img_size=224, table="3.4", params="23.4")
def resnet18_cc2(**options) -> nn.Module:
    """Build ResNet18-2-CC: two paths with cross-connections."""
    return imagenet_resnet_cc(18, 2, **options)


@register_model(num_classes=100, img_size=224, table="3.4", params="23.71")
def resnet50(**options) -> nn.Module:
    """Build torchvision's ResNet-50."""
    return imagenet_resnet(50, **options)


@register_model(num_classes=100, img_size=224, table="3.4", params="42.7")
def resnet101(**options) -> nn.Module:
    """Build torchvision's ResNet-101."""
    return imagenet_resnet(101, **options)


@register_model(num_classes=100, img_size=224, table="3.4", params="62.0")
def wide_resnet50_2(**options) -> nn.Module:
    """Build torchvision's Wide ResNet-50-2."""
    return imagenet_resnet(50, width_per_group=128, **options)


@register_model(num_classes=100, img_size=224, table="3.4", params="47.5")
def resnext50_2x64d(**options) -> nn.Module:
    """Build ResNeXt-50 with two groups of 64 channels."""
    return imagenet_resnet(50, groups=2, width_per_group=64, **options)


@register_model(num_classes=100, img_size=224, table="3.4", params="47.5")
def resnet50_cc2(**options) -> nn.Module:
    """Build ResNet50-2-CC: two paths with cross-connections."""
    return imagenet_resnet_cc(50, 2, **options)
