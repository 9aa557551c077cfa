"""k-meansNet (Peng et al. 2018): k-means as a layer of a network, as a Lightning module."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute.clustering.autoencoder import autoencoder
from fastroute.clustering.module import ClusteringModule, check_positive
from fastroute.ops._library import without_autocast

if TYPE_CHECKING:
    from fastroute.clustering.build import Setting


def squared_distances(points: Tensor, centers: Tensor) -> Tensor:
    """Return ‖z − Ω‖² = 2 − 2 zᵀΩ of points and centres of length 1: a layer with weights and no bias.

    Args:
        points: (N, D), each of length 1.
        centers: (K, D), of any length; each is scaled to 1.

    Returns:
        (N, K), from 0 to 4.
    """
    with without_autocast(points.device.type):  # which would leave the difference of close points with few digits
        return 2 - 2 * points @ F.normalize(centers).T


class KMeansNet(ClusteringModule):
    """Cluster images by a layer whose weights are the centres, on the code of an autoencoder, learnt together.

    Codes z and centres Ω have length 1. The assignments I are the softmax of −‖z − Ω‖² / τ, which is k-means' as τ
    falls to 0. The loss is the mean squared error of the pixels, plus `WEIGHT` times the mean of I ‖z − Ω‖² over images
    and centres. Weight and optimiser are those of the authors' program for the paper's journal version.

    Args:
        architecture: as `clustering_network` takes it; the code follows its layers.
        shape: (C, H, W) of an image.
        num_clusters: K.
        code: dimensions of the code.
        temperature: τ.
        batch_norm: whether batch norm follows each convolution.
        lr: the learning rate of Adadelta.

    Raises:
        ValueError: the architecture is unknown, or `temperature` or `lr` is not positive.
    """

    WEIGHT = 0.01
    """Of the clustering loss."""
    STEP = 0.1

    def __init__(
        self,
        architecture: str,
        shape: torch.Size,
        num_clusters: int,
        *,
        code: int = 10,
        temperature: float = 0.1,
        batch_norm: bool = True,
        lr: float = 1.0,
    ):
        super().__init__(num_clusters)
        check_positive(temperature=temperature, lr=lr)
        self.encoder, self.decoder = autoencoder(architecture, shape, code, code, batch_norm)
        self.register_buffer("centers", F.normalize(torch.randn(num_clusters, code)))
        self.temperature, self.lr = temperature, lr

    def configure_optimizers(self):
        return torch.optim.Adadelta(self.parameters(), lr=self.lr)

    def codes(self, images: Tensor) -> Tensor:
        """Return codes (N, D) of length 1 of images (N, C, H, W)."""
        return F.normalize(self.encoder(images).float())

    def step(self, images: Tensor, index: Tensor | None) -> Tensor:
        codes = self.codes(images)
        distances = squared_distances(codes, self.centers)
        assigned = torch.softmax(-distances / self.temperature, 1)
        self._move(codes.detach(), assigned.detach())
        made = self.decoder(codes).float().sigmoid()
        return F.mse_loss(made, images) + self.WEIGHT * (assigned * distances).mean()

    def _move(self, codes: Tensor, assigned: Tensor) -> None:
        """Move each centre by `STEP` against its gradient."""
        with without_autocast(codes.device.type):
            moved = self.centers + self.STEP * F.normalize(assigned.T @ codes)
        self.centers.copy_(F.normalize(moved))

    def responses(self, images: Tensor) -> Tensor:
        """Return −‖z − Ω‖² / τ (N, K) of images (N, C, H, W); its softmax is I."""
        return -squared_distances(self.codes(images), self.centers) / self.temperature


def build(setting: "Setting") -> KMeansNet:
    """Build the module of a run of k-meansNet."""
    run = setting.run
    return setting.laid_out(KMeansNet(run.architecture, setting.shape, run.clusters, batch_norm=run.batch_norm))
