"""Containers for networks whose layers pass lists of parallel tensors."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastroute.nn.router import Router, Routing


class ParallelPaths(nn.ModuleList):
    """One module for each path, each applied to its own tensor.

    This is the one place that decides how parallel paths run: one after the other, each a convolution of its own, which
    on a CPU is faster than one grouped convolution.

    Shape:
        xs: list of n tensors for n modules, or a list of one tensor, which all of them share.
        output: list of n tensors.

    Raises:
        ValueError: xs has another number of tensors.
    """

    def __init__(self, paths: Iterable[nn.Module]):
        super().__init__(paths)

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        if len(xs) not in (1, len(self)):
            raise ValueError(f"xs has {len(xs)} tensors; it must have one for each of the {len(self)} paths, or one")
        return [path(xs[i if len(xs) > 1 else 0]) for i, path in enumerate(self)]


class MultiPathNetwork(nn.Module):
    """A network of layers that take and return lists of parallel tensors; the logits of its paths are averaged.

    The image enters as a list of one tensor. A plain network is the same with one path throughout.

    Args:
        layers: name → module, in the order in which they run. Each takes a list of tensors and returns one; the last
            returns logits (N, num_classes) for each path.

    Shape:
        x: (N, in_chans, H, W).
        output: logits (N, num_classes); with `return_routing=True` also a dict with the `Routing` of each router by
            the router's name among the layers, empty for a network without routers.
    """

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor, return_routing: bool = False) -> Tensor | tuple[Tensor, dict[str, Routing]]:
        xs, routing = [x], {}
        for name, layer in self.named_children():
            if isinstance(layer, Router):
                xs, routing[name] = layer(xs, return_routing=True)
            else:
                xs = layer(xs)
        logits = torch.stack(xs).mean(0)
        return (logits, routing) if return_routing else logits
