"""k-means of an embedding that learns relative comparisons (Schultz & Joachims 2003), as a Lightning module."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.clustering.augment import Augmentation
from fastroute.clustering.centers import FeatureClustering
from fastroute.clustering.module import check_positive

if TYPE_CHECKING:
    from fastroute.clustering.build import Setting


def triplet_loss(anchors: Tensor, near: Tensor, far: Tensor, margin: float = 1.0) -> Tensor:
    """Return the mean of max(0, ‖a − n‖² − ‖a − f‖² + margin).

    Args:
        anchors, near, far: embeddings (N, D); each anchor is to be closer to its near one than to its far one.
        margin: by which the squared distances are to differ; the paper's is 1.

    Returns:
        ().
    """
    nearer, farther = ((anchors - others).square().sum(1) for others in (near, far))
    return F.relu(nearer - farther + margin).mean()


class Triplet(FeatureClustering):
    """Cluster images by k-means of an embedding, in which an image is closer to its augmented copy than to another.

    Without labels, the near image of a comparison is the augmented copy, and the far one the next image of the batch.

    Args:
        network: from images to embeddings (N, D).
        dims: D.
        num_clusters: K.
        augmentation: the transform.
        lr: the learning rate of Adam.
        seed: of k-means.

    Raises:
        ValueError: `lr` is not positive.
    """

    def __init__(
        self,
        network: nn.Module,
        dims: int,
        num_clusters: int,
        *,
        augmentation: Augmentation | None = None,
        lr: float = 1e-3,
        seed: int = 0,
    ):
        super().__init__(num_clusters, dims, seed)
        check_positive(lr=lr)
        self.network, self.augment, self.lr = network, augmentation or Augmentation(), lr

    def configure_optimizers(self):
        return torch.optim.Adam(self.network.parameters(), lr=self.lr)

    def features(self, images: Tensor) -> Tensor:
        """Return embeddings (N, D) of images (N, C, H, W)."""
        return self.network(images)

    def step(self, images: Tensor, index: Tensor | None) -> Tensor:
        anchors = self.network(images).float()
        return triplet_loss(anchors, self.network(self.augment(images)).float(), anchors.roll(1, 0))


def build(setting: "Setting") -> Triplet:
    """Build the module of a run; the embedding has the dimensions of the autoencoders' codes, 10."""
    run = setting.run
    return Triplet(setting.network(10), 10, run.clusters, augmentation=setting.augmentation, seed=setting.seed)
