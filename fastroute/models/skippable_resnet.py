"""Residual networks for small images of which each image uses or skips each block (Table 3.3)."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.models.cifar_resnet import WIDTHS, BasicBlock, blocks_per_stack, stack
from fastroute.models.layers import conv_bn, pool_and_classify
from fastroute.nn import FusedSequential, Routing
from fastroute.nn._classifier import Classifies

STACKS = ("stack1", "stack2", "stack3")


class SkippableBlock(BasicBlock):
    """relu(shortcut(x) + g·residual(x)), where g is 0 or 1 for each sample."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return the output.

        Args:
            x: (N, C, H, W).
            gate: (N,).

        Returns:
            (N, C', H', W').
        """
        return self.relu(self.shortcut(x) + gate.to(x.dtype).reshape(-1, 1, 1, 1) * self.residual(x))


class SkippableResNet(Classifies, nn.Module):
    """The base of ResNets for small images with a gate for each block, whose modules have the names of ResNet-depth's.

    Every block is computed and weighted by its gate; only a sparse implementation would save the skipped blocks.
    Subclasses implement `_body`.

    Args:
        depth: the number of layers, 6k + 2.
        num_classes, in_chans: as in `create_model`.
        img_size: not used: any size works.

    Shape:
        x: (N, in_chans, H, W).
        output: logits (N, num_classes); with `return_routing=True` also {block's name: Routing of shape (N, 1, 2)}, the
            weights of skipping and of computing. `executed_blocks` counts from them.
    """

    block: type[nn.Module] = SkippableBlock

    def __init__(self, depth: int, *, num_classes: int = 10, in_chans: int = 3, img_size: int = 32):
        super().__init__()
        blocks, width = blocks_per_stack(depth), WIDTHS[0]
        self.stem = FusedSequential(*conv_bn(in_chans, width), nn.ReLU(inplace=True))
        for i, out_width in enumerate(WIDTHS, start=1):
            self.add_module(f"stack{i}", stack(self.block, width, out_width, blocks, stride=1 if i == 1 else 2))
            width = out_width
        self.head = pool_and_classify(width, num_classes)

    def _blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Return the names and the blocks, in order."""
        for name in STACKS:
            for i, block in enumerate(self.get_submodule(name)):
                yield f"{name}.{i}", block

    def _head(self, xs: list[Tensor]) -> list[Tensor]:
        return [self.head(xs[0])]

    def _heads(self) -> list[str]:
        return ["head"]


def decision(score: Tensor, gate: Tensor) -> Routing:
    """Return the routing of a block, of shape (N, 1, 2).

    Args:
        score: (N,), the log-odds of computing the block.
        gate: (N,), 1 to compute the block and 0 to skip it.
    """
    return Routing(torch.stack([1 - gate, gate], 1).unsqueeze(1), F.pad(score[:, None, None], (1, 0)))


def executed_blocks(routing: Mapping[str, Routing]) -> Tensor:
    """Return how many blocks each image executes, (N,).

    Args:
        routing: of `convnet_aig110`, `blockdrop110` or `skipnet110`.

    Example:
        >>> model = create_model("skipnet110").eval()
        >>> _, routing = model(torch.zeros(2, 3, 8, 8), return_routing=True)
        >>> executed_blocks(routing)
        tensor([54., 54.])
    """
    return torch.stack([gates[:, 0, 1] for gates, *_ in routing.values()]).sum(0)


def check_share(name: str, share: float) -> None:
    """Check a share of a run.

    Raises:
        ValueError: it is below 0 or above 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"{name} is {share}; it must be from 0 to 1, a share of the run")
