"""The base of methods that learn features, and cluster them by k-means."""

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from fastroute.clustering.module import ClusteringModule


class FeatureClustering(ClusteringModule):
    """A module whose clusters are k-means of its features, found anew at each validation.

    A method defines `features` and `step`. The posteriors are those of Gaussians of one variance at the centres: the
    nearest centre has the highest.

    Args:
        num_clusters: K.
        dims: D of the features.
        seed: of k-means.
    """

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
        kmeans = KMeans(self.num_clusters, n_init=5, random_state=self.seed).fit(features.cpu().numpy())
        self.centers.copy_(torch.from_numpy(kmeans.cluster_centers_))
        self.variance.fill_(max(kmeans.inertia_ / features.numel(), 1e-12))

    def responses(self, images: Tensor) -> Tensor:
        """Return the Gaussians' log-densities (N, K) of images (N, C, H, W), up to a constant."""
        distances = torch.cdist(self.features(images).float(), self.centers)
        return -distances.square() / (2 * self.variance)
