"""Conventional convolutional networks, with one path or with parallel paths (§3.4.1, Tables 3.1 and 3.2; §3.5)."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from fastroute.models.conversion import multipath
from fastroute.models.layers import Network, SqueezeExcite, conv_bn
from fastroute.models.registry import register_model
from fastroute.nn import CrossPrediction2d, CrossPredictionLinear, FusedSequential, MultiPathNetwork, ParallelPaths

BASE = ((32, 32), (64, 64), (128, 128))
WIDE = ((64, 64), (128, 128), (256, 256))
DEEP = ((32, 32), (64, 64), (128, 128, 128), (256, 256, 256))
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG13_HALF = ((32, 32), (64, 64), (128, 128), (256, 256), (256, 256))


class FlattenMaps(nn.Flatten):
    """Flatten maps, and refuse those of other images than the dense layers were built for.

    Args:
        size: the height and width of the maps.
        img_size: that of the images, for the message.
    """

    def __init__(self, size: int, img_size: int):
        super().__init__()
        self.size, self.img_size = size, img_size

    def forward(self, x: Tensor) -> Tensor:
        """Return maps (N, C, size, size) as vectors (N, C·size²).

        Raises:
            ValueError: the maps have another size.
        """
        if x.shape[2:] != (self.size, self.size):
            height, width = x.shape[2:]
            raise ValueError(
                f"the last maps are {height}×{width}; the dense layers of this network are of images of "
                f"{self.img_size}×{self.img_size}, whose last maps are {self.size}×{self.size}: resize the images, or "
                "build the network with their img_size"
            )
        return super().forward(x)


def cnn(
    groups: Sequence[Sequence[int]],
    hidden: int = 32,
    final_pool: bool = False,
    reduction: int | None = None,
    *,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int = 32,
) -> Network:
    """Build 3×3 convolutions in groups of one resolution, then two hidden dense layers (Table 3.1).

    Convolutions have biases, batch normalisation and ReLU, and 2×2 max-pools stand between the groups. This gives the
    thesis's numbers of parameters. The layers are conv1, conv2, pool1, conv3, …, flatten, dense1, dense2, logits.

    Args:
        groups: the widths of the convolutions in each group.
        hidden: the width of the dense layers.
        final_pool: whether a pool follows the last group as well.
        reduction: that of a squeeze-and-excitation after each convolution; None builds none.
        num_classes, in_chans, img_size: as in `create_model`.

    Raises:
        ValueError: img_size is too small for the pools.
    """
    pools = len(groups) - (not final_pool)
    size = img_size >> pools
    if size < 1:
        raise ValueError(f"img_size is {img_size}; it must be at least {1 << pools} for {pools} pools")
    layers, channels, depth = OrderedDict(), in_chans, 0
    for i, widths in enumerate(groups, start=1):
        for width in widths:
            depth += 1
            excite = [SqueezeExcite(width, reduction)] if reduction else []
            layers[f"conv{depth}"] = FusedSequential(
                *conv_bn(channels, width, bias=True), nn.ReLU(inplace=True), *excite
            )
            channels = width
        if i <= pools:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
    layers["flatten"] = FlattenMaps(size, img_size)
    layers["dense1"] = nn.Sequential(nn.Linear(channels * size**2, hidden), nn.ReLU(inplace=True))
    layers["dense2"] = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(inplace=True))
    layers["logits"] = nn.Linear(hidden, num_classes)
    return Network(layers)


def base_cnn_cc(paths: int, routing: str | None = "cc", **sizes) -> MultiPathNetwork:
    """Build BaseCNN-X-CC: routers at the image, after convolutions 2, 4 and 6, and after the first dense layer.

    Args:
        paths: the number of parallel paths.
        routing: as in `multipath`; None builds BaseCNN-X, whose paths share only the image and the mean of the logits.
        sizes: num_classes, in_chans and img_size.
    """
    network = cnn(BASE, **sizes)
    cuts = ["input", "conv2", "conv4", "conv6", "dense1"]
    return multipath(network, paths, cuts, routing, input_size=_input_size(**sizes))


def base_cnn_cp(paths: int, **sizes) -> MultiPathNetwork:
    """Build BaseCNN-X-CP: cross-predictions for convolutions 1, 3 and 5 and the second dense layer (Fig. 3.2).

    Each output of a convolutional cross-prediction has batch normalisation before its ReLU. One for each output, not
    for each prediction, gives the thesis's number of parameters.

    Args:
        paths: the number of parallel paths.
        sizes: num_classes, in_chans and img_size.
    """
    networks = [cnn(BASE, **sizes) for _ in range(paths)]
    layers, width = OrderedDict(), 1
    for name, layer in networks[0].named_children():
        if name in ("conv1", "conv3", "conv5"):
            channels = layer[0].in_channels, layer[0].out_channels
            layers[name] = CrossPrediction2d(*channels, 3, width, paths, padding=1, norm_layer=nn.BatchNorm2d)
            width = paths
        elif name == "dense2":
            layers[name] = CrossPredictionLinear(layer[0].in_features, layer[0].out_features, paths, paths)
        else:
            layers[name] = ParallelPaths(network.get_submodule(name) for network in networks)
    return MultiPathNetwork(layers)


def vgg13_cc(paths: int, routing: str | None = "cc", **sizes) -> MultiPathNetwork:
    """Build VGG13-X-CC with half the filters (§3.5): routers at the image, after each pool and the first dense layer.

    Args:
        paths: the number of parallel paths.
        routing: as in `multipath`.
        sizes: num_classes, in_chans and img_size.
    """
    network = cnn(VGG13_HALF, 256, final_pool=True, **sizes)
    cuts = ["input", *(f"pool{i}" for i in range(1, 6)), "dense1"]
    return multipath(network, paths, cuts, routing, input_size=_input_size(**sizes))


def _input_size(in_chans: int = 3, img_size: int = 32, **_) -> tuple[int, int, int]:
    return in_chans, img_size, img_size


@register_model(table="3.2", params="0.55")
def base_cnn(**options) -> nn.Module:
    """Build BaseCNN: six convolutions of 32 to 128 filters (Table 3.1)."""
    return cnn(BASE, **options)


@register_model(table="3.2", params="1.67")
def wide_cnn(**options) -> nn.Module:
    """Build WideCNN: BaseCNN with twice the filters (Table 3.1)."""
    return cnn(WIDE, **options)


@register_model(table="3.2", params="2.0")
def deep_cnn(**options) -> nn.Module:
    """Build DeepCNN: ten convolutions of 32 to 256 filters (Table 3.1)."""
    return cnn(DEEP, **options)


@register_model(table="3.2", params="1.5")
def base_cnn_x3(**options) -> nn.Module:
    """Build BaseCNN-3: three paths that share only the image and the mean of their logits."""
    return base_cnn_cc(3, None, **options)


@register_model(table="3.2", params="0.58")
def se_base_cnn(**options) -> nn.Module:
    """Build BaseCNN with a squeeze-and-excitation after each convolution."""
    return cnn(BASE, reduction=16, **options)


@register_model(table="3.2", params="2.06")
def se_deep_cnn(**options) -> nn.Module:
    """Build DeepCNN with a squeeze-and-excitation after each convolution."""
    return cnn(DEEP, reduction=16, **options)


@register_model(table="3.2", params="1.11")
def cross_stitch_base_cnn2(**options) -> nn.Module:
    """Build BaseCNN with two paths and cross-stitch units."""
    return base_cnn_cc(2, "stitch", **options)


@register_model(table="3.2", params="14.9")
def vgg16(**options) -> nn.Module:
    """Build VGG-16 for small images."""
    # Dense layers of 256, as the thesis's VGG13 has them, come to its 14.9 million.
    return cnn(VGG16, 256, final_pool=True, **options)


@register_model(table="3.2", params="1.3")
def base_cnn_cp2(**options) -> nn.Module:
    """Build BaseCNN-2-CP: two paths with cross-predictions."""
    return base_cnn_cp(2, **options)


@register_model(table="3.2", params="2.23")
def base_cnn_cp3(**options) -> nn.Module:
    """Build BaseCNN-3-CP: three paths with cross-predictions."""
    return base_cnn_cp(3, **options)


@register_model(table="3.2", params="3.34")
def base_cnn_cp4(**options) -> nn.Module:
    """Build BaseCNN-4-CP: four paths with cross-predictions."""
    return base_cnn_cp(4, **options)


@register_model(table="3.2", params="1.11")
def base_cnn_cc2(**options) -> nn.Module:
    """Build BaseCNN-2-CC: two paths with cross-connections."""
    return base_cnn_cc(2, **options)


@register_model(table="3.2", params="1.67")
def base_cnn_cc3(**options) -> nn.Module:
    """Build BaseCNN-3-CC: three paths with cross-connections."""
    return base_cnn_cc(3, **options)


@register_model(table="3.2", params="2.22")
def base_cnn_cc4(**options) -> nn.Module:
    """Build BaseCNN-4-CC: four paths with cross-connections."""
    return base_cnn_cc(4, **options)


@register_model(num_classes=100, img_size=224, table="§3.5")
def vgg13_cc2(**options) -> nn.Module:
    """Build VGG13-2-CC with half the filters: two paths with cross-connections."""
    return vgg13_cc(2, **options)
