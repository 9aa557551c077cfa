"""Associative deep clustering (ADC; Haeusser et al. 2018), as a Lightning module."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.clustering.augment import Augmentation
from fastroute.clustering.centers import k_means
from fastroute.clustering.module import ClusteringModule, check_positive
from fastroute.clustering.networks import layers_of
from fastroute.data.seeding import generator
from fastroute.ops._library import without_autocast

if TYPE_CHECKING:
    from fastroute.clustering.build import Setting


def association_loss(starts: Tensor, others: Tensor, labels: Tensor, visit_weight: float) -> Tensor:
    """Return the walker loss and the weighted visit loss of walks from embeddings to others and back.

    The probabilities of a step are a softmax of dot products. The walker loss is the cross-entropy between the end of a
    walk and a uniform choice among the starts of its label. The visit loss is the cross-entropy between the visits to
    the others and uniform visits.

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

    Walks from augmented copies to images and back to copies of the same image make similar images neighbours. The first
    tenth of the epochs has these alone. Then k-means of all embeddings places the centroids, the optimiser starts anew,
    and walks from copies count a fifth. A dense layer learns to tell the centroids' clusters, and gives the scores of
    images. The weights are those of the authors' command for MNIST: 1 for both walks and their visits, 0.5 for the
    dense layer, and 2e-4, over 400 embeddings, for their length, which is to be 1. As in its 10,000 steps, the learning
    rate rises in the first fifth of the epochs, and falls to a third after half of them.

    Args:
        network: from images to embeddings (N, `EMBEDDING`).
        num_clusters: K.
        epochs: of the whole run.
        augmentation: the transform.
        lr: the learning rate of Adam with β = (0.8, 0.9); the default is that of the authors' program. Their command
            has 1e-3, with which embeddings of networks with batch norm do not settle.
        seed: of k-means.

    Raises:
        ValueError: an argument is out of range.
    """

    SCHEDULE = ("schedule_epochs",)  # a longer run keeps the last rate
    EVEN = math.inf  # none are: the scores order the clusters long before the dense layer has grown
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
        seed: int = 0,
    ):
        super().__init__(num_clusters)
        check_positive(epochs=epochs, lr=lr)
        self.network, self.augment = network, augmentation or Augmentation()
        self.schedule_epochs, self.lr, self.seed = epochs, lr, seed
        self.dense = nn.Linear(self.EMBEDDING, num_clusters)
        self.centroids = nn.Parameter(0.3 * torch.randn(num_clusters * self.CENTROIDS, self.EMBEDDING))

    @property
    def first_epochs(self) -> int:
        """The number of epochs before the clusters; 0 in a run of one."""
        return min(max(1, self.schedule_epochs // 10), self.schedule_epochs - 1)

    @property
    def has_clusters(self) -> bool:
        return self.current_epoch >= self.first_epochs

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, betas=(0.8, 0.9))
        # A method would be saved with the checkpoint; a function is not.
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: self.rate(epoch))]

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, as a share of `lr`."""
        warm_up = max(1, self.schedule_epochs // 5)
        return min(1.0, (epoch + 1) / warm_up) * 0.33 ** min(1, 2 * epoch // self.schedule_epochs)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch == self.first_epochs:
            centers, _ = k_means(self.over_images(self.network), self.num_clusters, self.seed)
            near = centers.repeat_interleave(self.CENTROIDS, 0)
            near += 1e-4 * (2 * torch.rand(near.shape, generator=generator(self.seed)) - 1)
            self.centroids.data.copy_(near)
            self.trainer.optimizers[0].state.clear()

    def step(self, images: Tensor, index: Tensor | None) -> Tensor:
        copies = torch.cat([self.augment(images) for _ in range(self.COPIES)])
        embedded = self.network(torch.cat([images, copies])).float()
        plain, moved = embedded[: len(images)], embedded[len(images) :]
        places = torch.arange(len(images), device=images.device).repeat(self.COPIES)
        neighbours = association_loss(moved, plain, places, 1.0)
        # The authors sum over the embeddings of 100 images and three copies of each, and over the centroids.
        length = 400 * (embedded.norm(dim=1) - 1).square().mean()
        if self.current_epoch < self.first_epochs:
            return neighbours + 2e-4 * length
        clusters = torch.arange(self.num_clusters, device=images.device).repeat_interleave(self.CENTROIDS)
        length = length + (self.centroids.norm(dim=1) - 1).square().sum()
        return (
            association_loss(self.centroids, plain, clusters, 1.0)
            + 0.2 * neighbours
            + 0.5 * F.cross_entropy(self.dense(self.centroids), clusters)
            + 2e-4 * length
        )

    def responses(self, images: Tensor) -> Tensor:
        """Return scores (N, K) of images (N, C, H, W)."""
        return self.dense(self.network(images))


def build(setting: "Setting") -> ADC:
    """Build the module of a run of ADC; the embedding is the first dense layer, as in the authors' network.

    Behind the 32 rectified nodes of Table 4.2, embeddings of MNIST became one point in the first steps.
    """
    run = setting.run
    convolutions = " ".join(f"{kind}{width or ''}" for kind, width in layers_of(run.architecture) if kind != "F")
    setting = replace(setting, run=replace(run, architecture=convolutions))
    return ADC(
        setting.network(ADC.EMBEDDING),
        run.clusters,
        epochs=setting.method_epochs,
        augmentation=setting.augmentation,
        seed=setting.seed,
    )
