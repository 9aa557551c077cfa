"""Joint unsupervised learning by merging clusters (JULE; Yang et al. 2016), as a Lightning module."""

import math
import warnings
from typing import TYPE_CHECKING

import torch
from sklearn.cluster import AgglomerativeClustering
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.clustering.centers import FeatureClustering
from fastroute.clustering.triplet import triplet_loss

if TYPE_CHECKING:
    from fastroute.clustering.build import Setting


class JULE(FeatureClustering):
    """Cluster images by merging clusters of features, which learn from the clusters that there are after each merging.

    A run has periods, which begin with merging: to clusters of about four images in the first, to a tenth of the
    clusters in each later one, and to K in the last. In its epochs an image is to be closer to one of its own cluster
    than to one of the five nearest clusters. At each validation, the features are merged to K clusters, and an image is
    of the cluster with the nearest mean.

    Clusters are merged by Ward's criterion, as in scikit-learn, over the graph of the 20 nearest neighbours. The paper
    has an affinity of its own over that graph.

    Args:
        network: from images to features (N, D).
        dims: D.
        num_clusters: K.
        epochs: of the whole run.
        lr: the learning rate of SGD with momentum 0.9; the default is the paper's.

    Raises:
        ValueError: an argument is out of range.
    """

    MEMBERS, KEPT, NEIGHBOURS, NEAREST, MARGIN = 4, 0.1, 20, 5, 0.2

    def __init__(self, network: nn.Module, dims: int, num_clusters: int, *, epochs: int, lr: float = 0.01):
        super().__init__(num_clusters, dims)
        if num_clusters < 2:
            raise ValueError(f"clusters is {num_clusters}; the method 'jule' compares clusters, and needs at least 2")
        for name, value in (("epochs", epochs), ("lr", lr)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be greater than 0")
        self.network, self.epochs, self.lr = network, epochs, lr

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-5)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["schedule_epochs"] = self.epochs

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        self.epochs = checkpoint["schedule_epochs"]  # the epochs that a longer run adds are a last period

    def counts(self, images: int) -> list[int]:
        """Return the number of clusters in each period.

        Args:
            images: N.
        """
        found = [max(self.num_clusters, images // self.MEMBERS)]
        while found[-1] > self.num_clusters:
            found.append(max(self.num_clusters, math.floor(self.KEPT * found[-1])))
        return found

    def features(self, images: Tensor) -> Tensor:
        """Return features (N, D) of length 1 of images (N, C, H, W)."""
        return F.normalize(self.network(images).float())

    def merged(self, features: Tensor, clusters: int) -> Tensor:
        """Return the cluster (N,) of features (N, D)."""
        values = features.cpu().numpy()
        graph = kneighbors_graph(values, min(self.NEIGHBOURS, len(values) - 1), include_self=False)
        with warnings.catch_warnings():  # of a graph in several parts, which scikit-learn joins
            warnings.filterwarnings("ignore", message="the number of connected components")
            found = AgglomerativeClustering(clusters, connectivity=0.5 * (graph + graph.T)).fit_predict(values)
        return torch.from_numpy(found).long().to(features.device)

    def on_train_epoch_start(self) -> None:
        counts = self.counts(len(self.trainer.train_dataloader.images))
        last, epoch = len(counts) - 1, self.current_epoch
        period, before = (min(last, e * len(counts) // self.epochs) for e in (epoch, epoch - 1))
        if period == before:  # before the first epoch it is −1
            return
        count, features = counts[period], self.over_images(self.features)
        labels = self.merged(features, count)
        means = cluster_means(features, labels, count)
        distances = torch.cdist(means, means).fill_diagonal_(math.inf)
        self.kept["labels"], self.kept["images"] = labels, labels.argsort(stable=True)
        self.kept["sizes"] = torch.bincount(labels, minlength=count)
        self.kept["nearest"] = distances.topk(min(self.NEAREST, count - 1), largest=False).indices

    def members(self, clusters: Tensor) -> Tensor:
        """Return a random image (N,) of each of some clusters (N,)."""
        sizes = self.kept["sizes"]
        place = (torch.rand(len(clusters)).to(clusters.device) * sizes[clusters]).long()
        return self.kept["images"][(sizes.cumsum(0) - sizes)[clusters] + place]

    def step(self, images: Tensor, index: Tensor) -> Tensor:
        own, nearest = self.kept["labels"][index], self.kept["nearest"]
        choice = torch.randint(nearest.shape[1], (len(own),)).to(own.device)
        others = self.members(own), self.members(nearest[own, choice])
        pixels = self.trainer.train_dataloader.images
        features = self.features(torch.cat([images, *(pixels[places] for places in others)]))
        return triplet_loss(*features.chunk(3), margin=self.MARGIN)

    def on_validation_epoch_start(self) -> None:
        features = self.over_images(self.features)
        means = cluster_means(features, self.merged(features, self.num_clusters), self.num_clusters)
        self.centers.copy_(means)
        spread = torch.cdist(features, means).min(1).values.square().mean() / features.shape[1]
        self.variance.copy_(spread.clamp(min=1e-12))


def cluster_means(features: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Return the mean (clusters, D) of the features of each cluster.

    Args:
        features: (N, D).
        labels: (N,), the cluster of each.
        clusters: their number.
    """
    sums = torch.zeros(clusters, features.shape[1], device=features.device).index_add_(0, labels, features)
    return sums / torch.bincount(labels, minlength=clusters).clamp(min=1)[:, None]


def build(setting: "Setting") -> JULE:
    """Build the module of a run of JULE; the features have the paper's 160 dimensions."""
    run = setting.run
    return JULE(setting.network(160), 160, run.clusters, epochs=setting.epochs)
