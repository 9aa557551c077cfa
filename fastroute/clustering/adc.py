"""Associative deep clustering (ADC; Haeusser et al. 2018), as a Lightning module."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.clustering.augment import Augmentation
from fastroute.clustering.module import ClusteringModule, check_positive
from fastroute.ops._library import without_autocast

if TYPE_CHECKING:
    from fastroute.clustering.build import Setting


def association_loss(starts: Tensor, others: Tensor, labels: Tensor, visit_weight: float) -> Tensor:
    """Return the walker loss and the weighted visit loss of walks from embeddings to others and back.

    Steps have the probabilities of a softmax of dot products. The walker loss is the cross-entropy of where a walk ends
    to a uniform choice among the starts of its label, and the visit loss that of the others' visits to uniform ones.

    Args:
        starts: embeddings (A, D).
        others: embeddings (B, D).
        labels: (A,), of the starts.
        visit_weight: the weight of the visit loss.

    Returns:
        ().
    """
    with without_autocast(starts.device.type):  # which would leave the probabilities with 8 bits
        match = starts @ others.T
        there, back = match.softmax(1), match.T.softmax(1)
        around = there @ back
    same = (labels[:, None] == labels).to(match.dtype)
    ends = same / same.sum(1, keepdim=True)
    walker = -(ends * (around + 1e-8).log()).sum(1).mean()
    visit = -(there.mean(0) + 1e-8).log().mean()
    return walker + visit_weight * visit


class ADC(ClusteringModule):
    """Cluster images by walks between embeddings: from a cluster's centroids to images, and back to the same cluster.

    Walks from augmented copies to images and back to copies of the same image make similar images neighbours. A dense
    layer learns to tell the centroids' clusters, and gives the scores of images. Weights are those of the authors'
    program: 1 for both walks, 0.5 and 1 for their visits, 0.5 for the dense layer, and 2e-4, over 400 embeddings, for
    their size and for their length, which is to be 1. The learning rate rises in the first twentieth of the epochs, and
    falls to a third after each quarter; theirs rises in 1,000 steps, and falls every 5,000.

    Args:
        network: from images to embeddings (N, `EMBEDDING`).
        num_clusters: K.
        epochs: of the whole run.
        augmentation: the transform.
        lr: the learning rate of Adam with β = (0.8, 0.9); the default is the authors'.

    Raises:
        ValueError: an argument is out of range.
    """

    SCHEDULE = ("schedule_epochs",)  # a longer run keeps the last rate
    EMBEDDING, CENTROIDS, COPIES = 128, 4, 3
    """Dimensions of the embeddings, centroids of a cluster, and augmented copies of an image."""

    def __init__(
        self,
        network: nn.Module,
        num_clusters: int,
        *,
        epochs: int,
        augmentation: Augmentation | None = None,
        lr: float = 2e-4,
    ):
        super().__init__(num_clusters)
        check_positive(epochs=epochs, lr=lr)
        self.network, self.augment = network, augmentation or Augmentation()
        self.schedule_epochs, self.lr = epochs, lr
        self.dense = nn.Linear(self.EMBEDDING, num_clusters)
        centers = 0.3 * torch.randn(num_clusters, 1, self.EMBEDDING)
        noise = 0.02 * torch.rand(num_clusters, self.CENTROIDS, self.EMBEDDING) - 0.01
        self.centroids = nn.Parameter((centers + noise).flatten(0, 1))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, betas=(0.8, 0.9))
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: self.rate(epoch))]

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, as a share of `lr`."""
        warm_up, quarter = max(1, self.schedule_epochs // 20), 4 * epoch // self.schedule_epochs
        return min(1.0, (epoch + 1) / warm_up) * 0.33 ** min(3, quarter)

    def step(self, images: Tensor, index: Tensor | None) -> Tensor:
        copies = torch.cat([self.augment(images) for _ in range(self.COPIES)])
        embedded = self.network(torch.cat([images, copies])).float()
        plain, moved = embedded[: len(images)], embedded[len(images) :]
        clusters = torch.arange(self.num_clusters, device=images.device).repeat_interleave(self.CENTROIDS)
        places = torch.arange(len(images), device=images.device).repeat(self.COPIES)
        # The authors sum over the embeddings of 100 images and three copies of each, and over the centroids.
        parts = (400 / len(embedded), embedded), (1, self.centroids)
        size = sum(weight * e.abs().sum() for weight, e in parts)
        length = sum(weight * (e.norm(dim=1) - 1).square().sum() for weight, e in parts)
        return (
            association_loss(self.centroids, plain, clusters, 0.5)
            + association_loss(moved, plain, places, 1.0)
            + 0.5 * F.cross_entropy(self.dense(self.centroids), clusters)
            + 2e-4 * (size + length)
        )

    def responses(self, images: Tensor) -> Tensor:
        """Return scores (N, K) of images (N, C, H, W)."""
        return self.dense(self.network(images))


def build(setting: "Setting") -> ADC:
    """Build the module of a run of ADC."""
    run = setting.run
    network = setting.network(ADC.EMBEDDING)
    return ADC(network, run.clusters, epochs=setting.method_epochs, augmentation=setting.augmentation)
