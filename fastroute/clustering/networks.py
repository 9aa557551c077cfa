"""The image clustering networks of Table 4.2, and the perceptron of §4.5.1."""

import itertools
import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ARCHITECTURES = {
    "mnist": "C64 M C128 M C256 F32",
    "cifar": "C64 C64 M C128 C128 M C256 C256",
    "stl10": "C64 C64 M C128 C128 M C256 C256 M C256 C256",
}


class Sobel(nn.Module):
    """Replace colours by horizontal and vertical edges (§4.5.2).

    Shape:
        images: (N, C, H, W), with C = 1, or 3 for red, green and blue.
        output: (N, 2, H, W).
    """

    def __init__(self):
        super().__init__()
        across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
        self.register_buffer("kernels", torch.stack([across, across.T])[:, None], persistent=False)
        self.register_buffer("luma", torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        grey = images if images.shape[1] == 1 else (images * self.luma).sum(1, keepdim=True)
        return F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), self.kernels.to(grey.dtype))


class SideBySide(nn.Module):
    """Networks that share only their input; their outputs (N, K) are concatenated.

    Args:
        networks: n networks.

    Shape:
        images: (N, C, H, W).
        output: (N, n·K).
    """

    def __init__(self, networks: Iterable[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([network(images) for network in self.networks], 1)


def layers_of(architecture: str) -> list[tuple[str, int]]:
    """Return the layers of an architecture: "C", "M" or "F", and the width, which is 0 for max-pooling.

    Args:
        architecture: as `clustering_network` takes it.

    Raises:
        ValueError: it is unknown, or has a convolution or a pool after a dense layer.
    """
    layers, dense = [], False
    for layer in ARCHITECTURES.get(architecture, architecture).split():
        kind = layer[0]
        if not re.fullmatch(r"[CF][1-9]\d*|M", layer) or (dense and kind != "F"):
            names = ", ".join(map(repr, ARCHITECTURES))
            raise ValueError(
                f"architecture is {architecture!r}; it must be {names}, or layers such as 'C64 M C128 F32'"
            )
        dense = kind == "F"
        layers.append((kind, int(layer[1:] or 0)))
    return layers


def clustering_network(
    architecture: str, num_clusters: int, img_size: int, batch_norm: bool = True, n_init: int = 1
) -> nn.Module:
    """Build Sobel edges and a network of Table 4.2: 3×3 convolutions with ReLU, 2×2 max-pooling, and dense layers.

    Args:
        architecture: "mnist", "cifar" or "stl10", or layers written as in the table, without the last: "C64 M F32".
        num_clusters: K, the nodes of the last layer.
        img_size: height and width of the images.
        batch_norm: whether batch norm follows each convolution. The table has none.
        n_init: the number of networks side by side, each from its own initial weights; `TwoFoldClustering` trains them
            as as many heads.

    Returns:
        a network from images (N, C, H, W) to scores (N, n_init·K).

    Raises:
        ValueError: the architecture is unknown, the image is too small for its pools, or `n_init` is not positive.
    """
    if n_init < 1:
        raise ValueError(f"n_init is {n_init}; it must be at least 1")
    if n_init > 1:
        return SideBySide(clustering_network(architecture, num_clusters, img_size, batch_norm) for _ in range(n_init))
    layers, channels, size, features = [Sobel()], 2, img_size, None
    for kind, width in layers_of(architecture):
        if kind == "M":
            # Before the ReLU: the result is the same, and the ReLU has a quarter of the values.
            layers.insert(len(layers) - isinstance(layers[-1], nn.ReLU), nn.MaxPool2d(2))
            size //= 2
        elif kind == "C":
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm))
            layers += [nn.BatchNorm2d(width)] if batch_norm else []
            layers.append(nn.ReLU())
            channels = width
        else:
            layers += [nn.Flatten()] if features is None else []
            layers += [nn.Linear(features or channels * size**2, width), nn.ReLU()]
            features = width
    if size < 1:
        raise ValueError(f"img_size is {img_size}; it is too small for the pools of {architecture!r}")
    layers += [nn.Flatten()] if features is None else []
    return nn.Sequential(*layers, nn.Linear(features or channels * size**2, num_clusters))


class ExclusiveLinear(nn.Module):
    """A dense layer for each of K clusters.

    Shape:
        x: (N, in_features), or (N, K, in_features).
        output: (N, K, out_features).
    """

    def __init__(self, clusters: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(clusters, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(clusters, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `nn.Linear` does."""
        bound = 1 / math.sqrt(self.weight.shape[2])
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(len(self.weight), *x.shape) if x.dim() == 2 else x.transpose(0, 1)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2)).transpose(0, 1)


def perceptron(features: int, hidden: Sequence[int], clusters: int, exclusive_layers: int = 1) -> nn.Sequential:
    """Build dense layers with ReLU between, as in §4.5.1, and one score for each cluster.

    Args:
        features, clusters: of the input and the output.
        hidden: the widths between.
        exclusive_layers: how many of the last layers each cluster has for itself.
    """
    layers, widths = [], [features, *hidden]
    shared = len(widths) - exclusive_layers
    for i, (width, following) in enumerate(itertools.pairwise(widths)):
        layers += [
            nn.Linear(width, following) if i < shared else ExclusiveLinear(clusters, width, following),
            nn.ReLU(),
        ]
    if exclusive_layers == 1:
        return nn.Sequential(*layers, nn.Linear(widths[-1], clusters))
    return nn.Sequential(*layers, ExclusiveLinear(clusters, widths[-1], 1), nn.Flatten())
