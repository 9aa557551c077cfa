"""Residual networks for small images whose stacks are sparse: each image takes one or a few of the paths (§5.3)."""

from collections import OrderedDict

from torch import nn

from fastroute.models.cifar_resnet import WIDTHS, BasicBlock, blocks_per_stack, stack
from fastroute.models.layers import Network, conv_bn, pool_and_classify
from fastroute.models.registry import register_model
from fastroute.nn import FusedSequential, SparseRouter


def sparse_resnet(
    depth: int,
    paths: int,
    top_k: int,
    routing: str = "topk",
    *,
    gates: str = "straight_through",
    capacity_factor: float | None = None,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int = 32,
) -> Network:
    """Build ResNet-depth for small images with `paths` copies of each stack, of which each image takes `top_k`.

    The stem and the dense layer are shared. In front of each of the three stacks, a `SparseRouter` divides the batch
    among the paths; the sum of their outputs, weighted by the gates, is the input of the next.

    Args:
        depth: the number of layers of the way of an image through one path, 6k + 2 for k blocks in each stack.
        paths: the number of parallel paths in each stack.
        top_k, routing, gates, capacity_factor: see `SparseRouter`; with routing="cluster", train with
            `GateClusteringLoss` (`--gate-reg-weight`).
        num_classes, in_chans: as in `create_model`.
        img_size: not used: any size works.

    Raises:
        ValueError: depth is not 6k + 2, or an argument of the routers is out of range.
    """
    blocks, width = blocks_per_stack(depth), WIDTHS[0]
    layers = OrderedDict(stem=FusedSequential(*conv_bn(in_chans, width), nn.ReLU(inplace=True)))
    for i, out_width in enumerate(WIDTHS, start=1):
        stride = 1 if i == 1 else 2
        layers[f"stack{i}"] = SparseRouter(
            width,
            [stack(BasicBlock, width, out_width, blocks, stride) for _ in range(paths)],
            top_k,
            gates=gates,
            routing=routing,
            capacity_factor=capacity_factor,
        )
        width = out_width
    layers["head"] = pool_and_classify(width, num_classes)
    return Network(layers)


@register_model
def resnet20_sparse4_top1(**options) -> nn.Module:
    """Build a ResNet20 with four paths in each stack, of which each image takes one."""
    return sparse_resnet(20, 4, 1, **options)


@register_model
def resnet20_sparse4_top2(**options) -> nn.Module:
    """Build a ResNet20 with four paths in each stack, of which each image takes two."""
    return sparse_resnet(20, 4, 2, **options)
