"""The base of methods that learn features, and cluster them by k-means."""

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from fastroute.clustering.module import ClusteringModule


def k_means(features: Tensor, clusters: int, seed: int) -> tuple[Tensor, float]:
    """Return the centres (K, D), on the CPU, and the sum of squared distances of the best of five runs.

    Args:
        features: (N, D).
        clusters: K.
        seed: of the first centres.
    """
    found = KMeans(clusters, n_init=5, random_state=seed).fit(features.cpu().numpy())
    return torch.from_numpy(found.cluster_centers_), found.inertia_


class FeatureClustering(ClusteringModule):
    """A module whose clusters are k-means of its features, found anew at each validation.

    A method defines `features` and `step`. The posteriors are those of Gaussians of one variance at the centres: the
    nearest centre has the highest.

    Args:
        num_clusters: K.
        dims: D of the features.
        seed: of k-means.
    """

    UNTRAINED_CLUSTERS = False

    def __init__(self, num_clusters: int, dims: int, seed: int = 0):
        super().__init__(num_clusters)
        self.seed = seed
        self.register_buffer("centers", torch.zeros(num_clusters, dims))
        self.register_buffer("variance", torch.ones(()))

    def features(self, images: Tensor) -> Tensor:
        """Return features (N, D) of images (N, C, H, W)."""
        raise NotImplementedError

    def on_validation_epoch_start(self) -> None:
        features = self.over_images(self.features)
        centers, inertia = k_means(features, self.num_clusters, self.seed)
        self.centers.copy_(centers)
        self.variance.fill_(max(inertia / features.numel(), 1e-12))

    def responses(self, images: Tensor) -> Tensor:
        """Return the Gaussians' log-densities (N, K) of images (N, C, H, W), up to a constant."""
        distances = torch.cdist(self.features(images).float(), self.centers)
        return -distances.square() / (2 * self.variance)
