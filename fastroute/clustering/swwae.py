"""Stacked what-where autoencoder (SWWAE; Zhao et al. 2016), as a Lightning module."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.clustering.autoencoder import autoencoder
from fastroute.clustering.centers import FeatureClustering
from fastroute.clustering.module import check_positive

if TYPE_CHECKING:
    from fastroute.clustering.build import Setting


class WhatWhere(FeatureClustering):
    """Cluster images by k-means of the code of an autoencoder whose decoder knows where each maximum came from.

    A pool passes on the maxima and remembers their positions, the switches. The mirrored layer of the decoder puts each
    value back in its position, and 0 in all others. So the code need not hold positions. The loss is the mean squared
    error of the pixels, plus `MIDDLE` times that of the maps after each pool, which the decoder reproduces before it
    puts them back.

    Args:
        architecture: as `clustering_network` takes it; the code follows its layers. Without a pool, there
            are no switches.
        shape: (C, H, W) of an image.
        num_clusters: K.
        code: dimensions of the code.
        batch_norm: whether batch norm follows each convolution.
        lr: the learning rate of Adam.
        seed: of k-means.

    Raises:
        ValueError: the architecture is unknown, or `lr` is not positive.
    """

    MIDDLE = 0.2
    """λ of the maps in the middle, as a share of that of the pixels."""

    def __init__(
        self,
        architecture: str,
        shape: torch.Size,
        num_clusters: int,
        *,
        code: int = 10,
        batch_norm: bool = True,
        lr: float = 1e-3,
        seed: int = 0,
    ):
        check_positive(lr=lr)
        super().__init__(num_clusters, code, seed)
        self.lr = lr
        encoder, decoder = autoencoder(architecture, shape, code, code, batch_norm)
        self.encoder = nn.Sequential(*(_other(layer, nn.MaxPool2d(2, return_indices=True)) for layer in encoder))
        self.decoder = nn.Sequential(*(_other(layer, nn.MaxUnpool2d(2)) for layer in decoder))

    def configure_optimizers(self):
        return torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], lr=self.lr)

    def encode(self, images: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, torch.Size]]]:
        """Return the codes (N, D) of images (N, C, H, W), and the maxima, switches and input's size of each pool."""
        x, pools = images, []
        for layer in self.encoder:
            if isinstance(layer, nn.MaxPool2d):
                size = x.shape
                x, where = layer(x)
                pools.append((x, where, size))
            else:
                x = layer(x)
        return x, pools

    def features(self, images: Tensor) -> Tensor:
        """Return the codes (N, D) of images (N, C, H, W)."""
        return self.encode(images)[0]

    def step(self, images: Tensor, index: Tensor | None) -> Tensor:
        x, pools = self.encode(images)
        loss = torch.zeros((), device=images.device)
        for layer in self.decoder:
            if isinstance(layer, nn.MaxUnpool2d):
                what, where, size = pools.pop()
                loss = loss + self.MIDDLE * F.mse_loss(x.float(), what.float())
                x = layer(x.float(), where, size)  # not for bfloat16 everywhere
            else:
                x = layer(x)
        return loss + F.mse_loss(x.float(), images)


def _other(layer: nn.Module, pool: nn.Module) -> nn.Module:
    """Return the pool in the place of a layer that changes the size of maps, and else the layer."""
    return pool if isinstance(layer, nn.MaxPool2d | nn.Upsample) else layer


def build(setting: "Setting") -> WhatWhere:
    """Build the module of a run of the stacked what-where autoencoder."""
    run = setting.run
    module = WhatWhere(run.architecture, setting.shape, run.clusters, batch_norm=run.batch_norm, seed=setting.seed)
    return setting.laid_out(module)
