"""The residual networks for small images, with one path or with parallel paths (§3.4.2, Table 3.3)."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from fastroute.models.conversion import multipath
from fastroute.models.layers import Network, SqueezeExcite, conv, conv_bn, pool_and_classify
from fastroute.models.registry import register_model
from fastroute.nn import CrossPrediction2d, MultiPathNetwork, ParallelPaths

WIDTHS = (16, 32, 64)


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """An identity, or a 1×1 projection where the shape changes (option B)."""
    same = in_channels == out_channels and stride == 1
    return nn.Identity() if same else nn.Sequential(*conv_bn(in_channels, out_channels, 1, stride))


class ResidualBlock(nn.Module):
    """relu(residual(x) + shortcut(x)) (He et al., 2016)."""

    def __init__(self, residual: list[nn.Module], in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(*residual)
        self.shortcut = shortcut(in_channels, out_channels, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.residual(x) + self.shortcut(x))


class BasicBlock(ResidualBlock):
    """Two 3×3 convolutions around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        residual = [
            *conv_bn(in_channels, out_channels, stride=stride),
            nn.ReLU(inplace=True),
            *conv_bn(out_channels, out_channels),
        ]
        super().__init__(residual, in_channels, out_channels, stride)


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
        reduction: of a squeeze-and-excitation of the residual; None for none.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, reduction: int | None = None):
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True))
        self.residual = nn.Sequential(
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
    """How many blocks of each of three stacks give a network of `depth` layers, `others` of them outside of blocks.

    Raises:
        ValueError: no number of blocks does.
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
    """Blocks of one width, the first of which has the stride."""
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def cifar_resnet(
    depth: int,
    paths: int = 1,
    routing: str | None = "cc",
    *,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int = 32,
) -> Network | MultiPathNetwork:
    """ResNet-depth for small images: a stem, three stacks of widths 16, 32 and 64, and a dense layer (§3.4.2).

    With parallel paths, the stem is shared, each path has its own stacks and dense layer, and the logits are averaged.
    Routers stand after the stem (one to many) and after each stack. Under "cp" the stem itself is a cross-prediction
    from one to many, and 3×3 cross-predictions that keep the width stand before the second and the third stack.

    Args:
        depth: the number of layers, 6k + 2 for k blocks in each stack.
        paths: the number of parallel paths.
        routing: "cc", cross-connections; "cp", cross-predictions; or None, parallel paths that meet only at the stem
            and the logits.
        num_classes, in_chans: as in `create_model`.
        img_size: not used: any size works, since the network ends in global pooling.

    Raises:
        ValueError: depth is not 6k + 2, paths is less than 1 or more than 8, or routing is unknown.
    """
    blocks = blocks_per_stack(depth)
    if paths < 1:
        raise ValueError(f"paths is {paths}; it must be at least 1")
    if routing not in ("cc", "cp", None):
        raise ValueError(f"routing is {routing!r}; it must be 'cc', 'cp' or None")

    def network() -> Network:
        layers, width = OrderedDict(), WIDTHS[0]
        layers["stem"] = nn.Sequential(*conv_bn(in_chans, width), nn.ReLU(inplace=True))
        for i, out_width in enumerate(WIDTHS, start=1):
            layers[f"stack{i}"] = stack(BasicBlock, width, out_width, blocks, stride=1 if i == 1 else 2)
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

    networks, layers = [network() for _ in range(paths)], OrderedDict(stem=predict(in_chans, WIDTHS[0], 1))
    for name, width in (("stack1", None), ("stack2", WIDTHS[0]), ("stack3", WIDTHS[1]), ("head", None)):
        if width:
            layers[f"{name}_router"] = predict(width, width, paths)
        layers[name] = ParallelPaths(network.get_submodule(name) for network in networks)
    return MultiPathNetwork(layers)


def resnet164(*, num_classes: int = 10, in_chans: int = 3, img_size: int = 32) -> Network:
    """ResNet-164 of bottlenecks, in the order of He et al. (2016), whose errors the thesis quotes.

    It has 1.7 million parameters, as in the literature; Table 3.3 prints 2.5.
    """
    blocks, width = blocks_per_stack(164, layers_per_block=3), WIDTHS[0]
    layers = OrderedDict(stem=nn.Sequential(*conv_bn(in_chans, width), nn.ReLU(inplace=True)))
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
    """A residual network of pre-activation blocks: WRN-depth-widen (Zagoruyko and Komodakis, 2016), or an SENet on one.

    Args:
        depth: the number of layers: 6k + 4 as wide residual networks are counted, the projections among them, or
            6k + 2 without.
        widen: what the widths of the stacks are multiplied by.
        reduction: of the squeeze-and-excitation of each block; None for none.
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


_PARAMS = {
    "resnet20": "0.27",
    "resnet110": "1.7",
    "resnet20_cp2": "0.59",
    "resnet20_cp3": "0.92",
    "resnet20_cp4": "1.29",
    "resnet20_cc2": "0.55",
    "resnet20_cc3": "0.82",
    "resnet20_cc4": "1.1",
    "resnet32_cc2": "0.94",
    "resnet32_cc3": "1.41",
    "resnet32_cc4": "1.88",
}


def _register(name: str, depth: int, *options) -> None:
    params = _PARAMS.get(name, "")
    register_model(partial(cifar_resnet, depth, *options), name, table="3.3" if params else "", params=params)


for _depth in (20, 32, 110):
    _register(f"resnet{_depth}", _depth)
for _depth in (20, 32):
    for _paths in (2, 3, 4):
        _register(f"resnet{_depth}_cc{_paths}", _depth, _paths)
        _register(f"resnet{_depth}_x{_paths}", _depth, _paths, None)
for _paths in (2, 3, 4):
    _register(f"resnet20_cp{_paths}", 20, _paths, "cp")

register_model(resnet164, table="3.3", params="2.5")
register_model(partial(pre_activation_resnet, 40, 2), "wrn_40_2", table="3.3", params="2.2")
register_model(partial(pre_activation_resnet, 110, 1, 16), "se_resnet110", table="3.3", params="1.7")
