"""The residual networks for small images, with one path or with parallel paths (§3.4.2, Table 3.3)."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from math import isfinite

from torch import Tensor, nn

from fastroute._extras import extra
from fastroute.models.conversion import multipath
from fastroute.models.layers import Network, SqueezeExcite, conv, conv_bn, pool_and_classify
from fastroute.models.registry import register_model
from fastroute.nn import CrossPrediction2d, FusedSequential, MultiPathNetwork, ParallelPaths, residual_sum

WIDTHS = (16, 32, 64)


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return an identity, or a 1×1 projection where the shape changes (option B)."""
    same = in_channels == out_channels and stride == 1
    return nn.Identity() if same else FusedSequential(*conv_bn(in_channels, out_channels, 1, stride))


class ResidualBlock(nn.Module):
    """relu(residual(x) + shortcut(x)) (He et al., 2016)."""

    def __init__(self, residual: list[nn.Module], in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.residual = FusedSequential(*residual)
        self.shortcut = shortcut(in_channels, out_channels, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return residual_sum(self.residual, x, self.shortcut, self.relu)


class BasicBlock(ResidualBlock):
    """Two 3×3 convolutions around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        residual = [
            *conv_bn(in_channels, out_channels, stride=stride),
            nn.ReLU(inplace=True),
            *conv_bn(out_channels, out_channels),
        ]
        super().__init__(residual, in_channels, out_channels, stride)


class AttentionBlock(ResidualBlock):
    """A basic block with one of timm's adaptive many-to-one units for its first convolution and ReLU.

    Args:
        unit: "split_attention", the sum of two convolutions, weighted by channel, each of half of the input (Zhang et
            al., 2022); or "selective_kernel", the same of two kernels of different size (Li et al., 2019).

    Raises:
        ModuleNotFoundError: timm is not installed.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, unit: str):
        with extra("timm", f"block {unit!r}"):
            from timm.layers import SelectiveKernel, SplitAttn
        if unit == "split_attention":
            first = SplitAttn(in_channels, out_channels, stride=stride, norm_layer=nn.BatchNorm2d)
        else:
            first = SelectiveKernel(in_channels, out_channels, stride=stride)
        for module in first.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        super().__init__([first, *conv_bn(out_channels, out_channels)], in_channels, out_channels, stride)


BLOCKS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "basic": BasicBlock,
    "split_attention": partial(AttentionBlock, unit="split_attention"),
    "selective_kernel": partial(AttentionBlock, unit="selective_kernel"),
}


class Bottleneck(ResidualBlock):
    """1×1, 3×3 and 1×1 convolutions around a shortcut, the inner ones with a quarter of the channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        width = out_channels // 4
        residual = [
            *conv_bn(in_channels, width, 1),
            nn.ReLU(inplace=True),
            *conv_bn(width, width, stride=stride),
            nn.ReLU(inplace=True),
            *conv_bn(width, out_channels, 1),
        ]
        super().__init__(residual, in_channels, out_channels, stride)


class PreActivationBlock(nn.Module):
    """Normalisation and ReLU before each of two 3×3 convolutions (He et al., 2016b), as in wide residual networks.

    Args:
        reduction: that of a squeeze-and-excitation of the residual; None builds none.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, reduction: int | None = None):
        super().__init__()
        self.activation = FusedSequential(nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True))
        self.residual = FusedSequential(
            *conv_bn(in_channels, out_channels, stride=stride),
            nn.ReLU(inplace=True),
            conv(out_channels, out_channels),
        )
        if reduction:
            self.residual.append(SqueezeExcite(out_channels, reduction))
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(x)
        return self.residual(y) + (x if self.shortcut is None else self.shortcut(y))


def blocks_per_stack(depth: int, layers_per_block: int = 2, others: int = 2) -> int:
    """Return the number of blocks in each of three stacks of a network of `depth` layers.

    Args:
        depth: the number of layers.
        layers_per_block: the number of layers in a block.
        others: the number of layers outside of blocks.

    Raises:
        ValueError: no number of blocks gives this depth.
    """
    blocks, rest = divmod(depth - others, 3 * layers_per_block)
    if blocks < 1 or rest:
        unit = 3 * layers_per_block
        raise ValueError(
            f"depth is {depth}; it must be {unit}k + {others}, such as {3 * unit + others} or {5 * unit + others}"
        )
    return blocks


def stack(
    block: Callable[..., nn.Module], in_channels: int, out_channels: int, blocks: int, stride: int
) -> nn.Sequential:
    """Build a stack of blocks of one width, the first of which has the stride."""
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def cifar_resnet(
    depth: int,
    paths: int = 1,
    routing: str | None = "cc",
    *,
    block: str = "basic",
    widen: float = 1.0,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int = 32,
) -> Network | MultiPathNetwork:
    """Build ResNet-depth for small images: a stem, three stacks of widths 16, 32 and 64, a dense layer (§3.4.2).

    With parallel paths, the stem is shared, each path has its own stacks and dense layer, and the logits are averaged.
    Routers stand after the stem (one to many) and after each stack. Under "cp" the stem itself is a cross-prediction
    from one to many, and 3×3 cross-predictions that keep the width stand before the second and the third stack.

    Args:
        depth: the number of layers, 6k + 2 for k blocks in each stack.
        paths: the number of parallel paths.
        routing: "cc", cross-connections; "cp", cross-predictions; or None, parallel paths that meet only at the stem
            and the logits.
        block: "basic", or with timm installed, the adaptive blocks "split_attention" and "selective_kernel"; see
            `AttentionBlock`.
        widen: the factor of the stem's and the stacks' widths, which are rounded; 1.42 doubles the parameters, as two
            parallel paths do.
        num_classes, in_chans: as in `create_model`.
        img_size: of the images by which `multipath` finds the channels at its cuts; the network takes any size, since
            it ends in global pooling.

    Raises:
        ValueError: depth is not 6k + 2, paths is less than 1 or more than 8, routing or block is unknown, or widen is
            less than 1/16 or not finite.
        ModuleNotFoundError: the block needs timm, which is not installed.
    """
    blocks = blocks_per_stack(depth)
    if paths < 1:
        raise ValueError(f"paths is {paths}; it must be at least 1")
    if routing not in ("cc", "cp", None):
        raise ValueError(f"routing is {routing!r}; it must be 'cc', 'cp' or None")
    if block not in BLOCKS:
        raise ValueError(f"block is {block!r}; it must be one of {', '.join(map(repr, BLOCKS))}")
    if not isfinite(widen) or WIDTHS[0] * widen < 1:
        raise ValueError(f"widen is {widen}; it must be finite and at least 1/{WIDTHS[0]}, one channel")
    widths = [round(widen * width) for width in WIDTHS]

    def network() -> Network:
        layers, width = OrderedDict(), widths[0]
        layers["stem"] = FusedSequential(*conv_bn(in_chans, width), nn.ReLU(inplace=True))
        for i, out_width in enumerate(widths, start=1):
            layers[f"stack{i}"] = stack(BLOCKS[block], width, out_width, blocks, stride=1 if i == 1 else 2)
            width = out_width
        layers["head"] = pool_and_classify(width, num_classes)
        return Network(layers)

    if paths == 1:
        return network()
    if routing != "cp":
        cuts = ["stem", "stack1", "stack2", "stack3"]
        return multipath(network(), paths, cuts, routing, input_size=(in_chans, img_size, img_size))

    def predict(in_channels: int, out_channels: int, in_paths: int) -> CrossPrediction2d:
        return CrossPrediction2d(
            in_channels, out_channels, 3, in_paths, paths, padding=1, bias=False, norm_layer=nn.BatchNorm2d
        )

    networks, layers = [network() for _ in range(paths)], OrderedDict(stem=predict(in_chans, widths[0], 1))
    for name, width in (("stack1", None), ("stack2", widths[0]), ("stack3", widths[1]), ("head", None)):
        if width:
            layers[f"{name}_router"] = predict(width, width, paths)
        layers[name] = ParallelPaths(network.get_submodule(name) for network in networks)
    return MultiPathNetwork(layers)


def resnet164(*, num_classes: int = 10, in_chans: int = 3, img_size: int = 32) -> Network:
    """Build ResNet-164 of bottlenecks, in the order of He et al. (2016), whose errors the thesis quotes.

    It has 1.7 million parameters, as in the literature; Table 3.3 prints 2.5.

    Args:
        num_classes, in_chans: as in `create_model`.
        img_size: not used: any size works.
    """
    blocks, width = blocks_per_stack(164, layers_per_block=3), WIDTHS[0]
    layers = OrderedDict(stem=FusedSequential(*conv_bn(in_chans, width), nn.ReLU(inplace=True)))
    for i, out_width in enumerate(WIDTHS, start=1):
        layers[f"stack{i}"] = stack(Bottleneck, width, 4 * out_width, blocks, stride=1 if i == 1 else 2)
        width = 4 * out_width
    layers["head"] = pool_and_classify(width, num_classes)
    return Network(layers)


def pre_activation_resnet(
    depth: int,
    widen: int = 1,
    reduction: int | None = None,
    *,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int = 32,
) -> Network:
    """Build a residual network of pre-activation blocks: WRN-depth-widen (Zagoruyko and Komodakis, 2016), or an SENet.

    Args:
        depth: the number of layers: 6k + 4 with the projections, as wide residual networks are counted, or 6k + 2
            without them.
        widen: the factor of the stacks' widths.
        reduction: that of the squeeze-and-excitation in each block; None builds none.
        num_classes, in_chans: as in `create_model`.
        img_size: not used: any size works.
    """
    blocks, width = blocks_per_stack(depth, others=4 if depth % 6 == 4 else 2), WIDTHS[0]
    block = partial(PreActivationBlock, reduction=reduction)
    layers = OrderedDict(stem=conv(in_chans, width))
    for i, out_width in enumerate(WIDTHS, start=1):
        layers[f"stack{i}"] = stack(block, width, widen * out_width, blocks, stride=1 if i == 1 else 2)
        width = widen * out_width
    layers["activation"] = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    layers["head"] = pool_and_classify(width, num_classes)
    return Network(layers)


@register_model(table="3.3", params="0.27")
def resnet20(**options) -> nn.Module:
    """Build ResNet-20 for small images."""
    return cifar_resnet(20, **options)


@register_model
def resnet32(**options) -> nn.Module:
    """Build ResNet-32 for small images."""
    return cifar_resnet(32, **options)


@register_model(table="3.3", params="1.7")
def resnet110(**options) -> nn.Module:
    """Build ResNet-110 for small images."""
    return cifar_resnet(110, **options)


@register_model(table="3.3", params="0.55")
def resnet20_cc2(**options) -> nn.Module:
    """Build ResNet20-2-CC: two paths with cross-connections."""
    return cifar_resnet(20, 2, **options)


@register_model(table="3.3", params="0.82")
def resnet20_cc3(**options) -> nn.Module:
    """Build ResNet20-3-CC: three paths with cross-connections."""
    return cifar_resnet(20, 3, **options)


@register_model(table="3.3", params="1.1")
def resnet20_cc4(**options) -> nn.Module:
    """Build ResNet20-4-CC: four paths with cross-connections."""
    return cifar_resnet(20, 4, **options)


@register_model
def resnet20_x2(**options) -> nn.Module:
    """Build ResNet20-2: two paths that meet only at the stem and the logits."""
    return cifar_resnet(20, 2, None, **options)


@register_model
def resnet20_x3(**options) -> nn.Module:
    """Build ResNet20-3: three paths that meet only at the stem and the logits."""
    return cifar_resnet(20, 3, None, **options)


@register_model
def resnet20_x4(**options) -> nn.Module:
    """Build ResNet20-4: four paths that meet only at the stem and the logits."""
    return cifar_resnet(20, 4, None, **options)


@register_model(table="3.3", params="0.94")
def resnet32_cc2(**options) -> nn.Module:
    """Build ResNet32-2-CC: two paths with cross-connections."""
    return cifar_resnet(32, 2, **options)


@register_model(table="3.3", params="1.41")
def resnet32_cc3(**options) -> nn.Module:
    """Build ResNet32-3-CC: three paths with cross-connections."""
    return cifar_resnet(32, 3, **options)


@register_model(table="3.3", params="1.88")
def resnet32_cc4(**options) -> nn.Module:
    """Build ResNet32-4-CC: four paths with cross-connections."""
    return cifar_resnet(32, 4, **options)


@register_model
def resnet32_x2(**options) -> nn.Module:
    """Build ResNet32-2: two paths that meet only at the stem and the logits."""
    return cifar_resnet(32, 2, None, **options)


@register_model
def resnet32_x3(**options) -> nn.Module:
    """Build ResNet32-3: three paths that meet only at the stem and the logits."""
    return cifar_resnet(32, 3, None, **options)


@register_model
def resnet32_x4(**options) -> nn.Module:
    """Build ResNet32-4: four paths that meet only at the stem and the logits."""
    return cifar_resnet(32, 4, None, **options)


@register_model(table="3.3", params="0.59")
def resnet20_cp2(**options) -> nn.Module:
    """Build ResNet20-2-CP: two paths with cross-predictions."""
    return cifar_resnet(20, 2, "cp", **options)


@register_model(table="3.3", params="0.92")
def resnet20_cp3(**options) -> nn.Module:
    """Build ResNet20-3-CP: three paths with cross-predictions."""
    return cifar_resnet(20, 3, "cp", **options)


@register_model(table="3.3", params="1.29")
def resnet20_cp4(**options) -> nn.Module:
    """Build ResNet20-4-CP: four paths with cross-predictions."""
    return cifar_resnet(20, 4, "cp", **options)


resnet164 = register_model(resnet164, table="3.3", params="2.5")


@register_model(table="3.3", params="2.2")
def wrn_40_2(**options) -> nn.Module:
    """Build WRN-40-2: a wide residual network of 40 layers, twice as wide."""
    return pre_activation_resnet(40, 2, **options)


@register_model(table="3.3", params="1.7")
def se_resnet110(**options) -> nn.Module:
    """Build SE-ResNet-110, of pre-activation blocks with a squeeze-and-excitation each."""
    return pre_activation_resnet(110, 1, 16, **options)
