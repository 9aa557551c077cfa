"""DeepCluster (Caron et al. 2018): k-means of a network's features labels the images for its next epoch."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.clustering.augment import Augmentation
from fastroute.clustering.centers import FeatureClustering
from fastroute.clustering.module import check_positive
from fastroute.clustering.networks import layers_of
from fastroute.data.seeding import derived_seed, generator

if TYPE_CHECKING:
    from fastroute.clustering.build import Setting

COMPONENTS = 256
"""The most principal components of the features that k-means sees."""


def whitened(features: Tensor, seed: int) -> np.ndarray:
    """Return the principal components of features, each of variance 1, and then each row of length 1.

    Args:
        features: (N, D).
        seed: of the randomised solver that scikit-learn takes for large matrices.

    Returns:
        (N, min(N, D, `COMPONENTS`)), float32.
    """
    count = min(*features.shape, COMPONENTS)
    return normalize(PCA(count, whiten=True, random_state=seed).fit_transform(features.cpu().numpy()))


class DeepCluster(FeatureClustering):
    """Cluster images by k-means of features that learn to predict finer clusters of themselves.

    Before each epoch, as in the paper, k-means of the whitened features of all images finds `labels` clusters, and the
    last layer starts anew. Where epochs have fewer than `STEPS` steps, this happens only after that many. The loss is
    the cross-entropy of augmented images to them, in which an image counts by the inverse of its cluster's size: the
    paper, which samples uniformly over the clusters, calls this equivalent. At each validation, k-means of the features
    gives K clusters.

    Args:
        network: from images to features (N, D), before their ReLU.
        dims: D.
        num_clusters: K.
        labels: the clusters that are learnt; they are at most a tenth of the images. The paper has ten to a class.
        augmentation: the transform.
        lr: the learning rate of SGD with momentum 0.9; the default is the paper's.
        seed: of k-means and of the last layer.

    Raises:
        ValueError: `lr` is not positive.
    """

    STEPS = 100
    """The fewest steps that learn the same labels; the paper's epoch has 5,000."""

    def __init__(
        self,
        network: nn.Module,
        dims: int,
        num_clusters: int,
        *,
        labels: int,
        augmentation: Augmentation | None = None,
        lr: float = 0.05,
        seed: int = 0,
    ):
        super().__init__(num_clusters, dims, seed)
        check_positive(lr=lr)
        self.network, self.head = network, nn.Linear(dims, labels)
        self.augment, self.lr = augmentation or Augmentation(), lr

    def configure_optimizers(self):
        parameters = [*self.network.parameters(), *self.head.parameters()]
        return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=1e-5)

    def features(self, images: Tensor) -> Tensor:
        """Return features (N, D) of length 1 of images (N, C, H, W)."""
        return F.normalize(self.network(images).float())

    def on_train_epoch_start(self) -> None:
        if self.current_epoch % math.ceil(self.STEPS / self.trainer.num_training_batches):
            return
        seed = derived_seed(self.seed, self.current_epoch) % 2**32
        components = whitened(self.over_images(self.network), seed)
        count = max(self.num_clusters, min(self.head.out_features, len(components) // 10))
        kmeans = KMeans(count, n_init=1, random_state=seed).fit(components)
        self.kept["labels"] = torch.from_numpy(kmeans.labels_).long().to(self.device)
        fresh = torch.empty(self.head.weight.shape).normal_(std=0.01, generator=generator(seed))
        self.head.weight.data.copy_(fresh)
        self.head.bias.data.zero_()
        for parameter in self.head.parameters():
            self.trainer.optimizers[0].state.pop(parameter, None)  # the momentum of the earlier layer

    def step(self, images: Tensor, index: Tensor) -> Tensor:
        labels = self.kept["labels"]
        sizes = torch.bincount(labels, minlength=self.head.out_features)
        scores = self.head(F.relu(self.network(self.augment(images))))
        return F.cross_entropy(scores.float(), labels[index], weight=1 / sizes.clamp(min=1))


def build(setting: "Setting") -> DeepCluster:
    """Build the module of a run of DeepCluster; the features are those before the last layer of Table 4.2."""
    run = setting.run
    network = setting.network(run.clusters)[:-1]  # without the scores
    if isinstance(network[-1], nn.Flatten):  # of maps: their means are the features
        network[-1] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    else:
        network = network[:-1]  # without the ReLU
    widths = [width for _, width in layers_of(run.architecture) if width]
    if not widths:
        raise ValueError(f"architecture is {run.architecture!r}; the method 'deepcluster' needs a layer with weights")
    return DeepCluster(
        network,
        widths[-1],
        run.clusters,
        labels=10 * run.clusters,
        augmentation=setting.augmentation,
        seed=setting.seed,
    )
