"""Invariant information clustering (IIC; Ji et al. 2019) in the setting of §4.5.2, as a Lightning module."""

import torch
from torch import Tensor, nn

from fastroute._defaults import LR_CONSISTENCY
from fastroute.clustering.augment import Augmentation
from fastroute.clustering.metrics import mutual_information
from fastroute.clustering.module import ClusteringModule


def iic_loss(p: Tensor, q: Tensor) -> Tensor:
    """Return −I(z, z'), the negative mutual information of the clusters of samples and of their augmented copies.

    The joint distribution is P = 1/N Σ_i p_i q_iᵀ, symmetrised.

    Args:
        p, q: posteriors (N, K) of the samples and of the augmented ones.

    Returns:
        (), in nats, from −log K, if both agree on certain clusters of equal size, to 0.
    """
    joint = p.T @ q / len(p)
    return -mutual_information((joint + joint.T) / 2)


class IIC(ClusteringModule):
    """Cluster images by maximising the mutual information between the clusters of images and of augmented copies.

    It has one head, and augments each image once a step, as in the thesis's comparison.

    Args:
        network: from images to scores (N, K); their softmax are the posteriors.
        num_clusters: K.
        augmentation: the transform.
        lr: the learning rate of Adam.

    Raises:
        ValueError: `lr` is not positive.
    """

    def __init__(
        self,
        network: nn.Module,
        num_clusters: int,
        *,
        augmentation: Augmentation | None = None,
        lr: float = LR_CONSISTENCY,
    ):
        super().__init__(num_clusters)
        if not lr > 0:
            raise ValueError(f"lr is {lr}; it must be greater than 0")
        self.network, self.augment, self.lr = network, augmentation or Augmentation(), lr

    def configure_optimizers(self):
        return torch.optim.Adam(self.network.parameters(), lr=self.lr)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, _ = batch
        loss = iic_loss(self(x).float(), self(self.augment(x)).float())
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def responses(self, images: Tensor) -> Tensor:
        """Return scores (N, K) of images (N, C, H, W)."""
        return self.network(images)
