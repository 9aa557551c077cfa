"""Joint unsupervised learning (JULE; Yang et al. 2016): merging clusters of a graph teach a network by triplets."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import AgglomerativeClustering
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute._methods import check_count
from fastroute.clustering.centers import FeatureClustering
from fastroute.clustering.module import check_positive

MAX_DRAWS = 1 << 24
"""The most random numbers drawn at once for the triplets of a batch, 64 MiB."""

if TYPE_CHECKING:
    from fastroute.clustering.build import Setting

NEIGHBORS, RIVALS, FEW = 20, 5, 100
"""The authors' K_s of the graph and K_c of a merge, and the number of clusters from which K_c counts."""


def neighbor_graph(features: np.ndarray, neighbors: int = NEIGHBORS) -> tuple[csr_array, np.ndarray]:
    """Return the weights W_ij = exp(−d_ij² / σ²) of each sample's nearest neighbours, σ² being the mean of d² (Eq. 1).

    Args:
        features: (N, D).
        neighbors: of a sample; at most N − 1.

    Returns:
        W (N, N), and each sample's nearest neighbour (N,).
    """
    count = len(features)
    neighbors = min(neighbors, count - 1)
    distances, places = NearestNeighbors(n_neighbors=neighbors).fit(features).kneighbors()
    square = distances.astype(np.float64) ** 2
    weights = np.exp(-square / max(square.mean(), 1e-12))
    starts = np.arange(0, count * neighbors + 1, neighbors)
    return csr_array((weights.ravel(), places.ravel(), starts), (count, count)), places[:, 0]


def first_clusters(nearest: np.ndarray) -> np.ndarray:
    """Return the clusters (N,) of samples that their nearest neighbours (N,) connect."""
    count = len(nearest)
    links = csr_array((np.ones(count), (np.arange(count), nearest)), (count, count))
    return connected_components(links, directed=False)[1]


def path_weights(graph: csr_array, labels: np.ndarray) -> np.ndarray:
    """Return S_ab = 1ᵀ W_ab W_ba 1, the weight of the paths from a cluster a to a sample of b and back to a.

    Args:
        graph: W (N, N).
        labels: the clusters (N,), from 0.

    Returns:
        S (M, M), with a diagonal of 0.
    """
    count = labels.max() + 1
    members = csr_array((np.ones(len(labels)), (labels, np.arange(len(labels)))), (count, len(labels)))
    there, back = members @ graph, (graph @ members.T).T
    weights = (there.multiply(back) @ members.T).toarray().astype(np.float32)
    np.fill_diagonal(weights, 0)
    return weights


def merged(graph: csr_array, labels: np.ndarray, count: int, features: np.ndarray) -> np.ndarray:
    """Merge clusters until `count` are left.

    The affinity of clusters a and b is S_ab / |a|² + S_ba / |b|² (Eq. 2). While there are more than `FEW` other
    clusters, the next to merge are a cluster and its best neighbour with the greatest affinity plus its mean lead over
    the next `RIVALS` − 1 neighbours (Eq. 9). With fewer, the affinity alone counts. The affinities of a merged cluster
    are the authors' fast ones, which add S. Clusters that no path connects are merged by the distance of their means.

    Args:
        graph: W (N, N).
        labels: the clusters (N,), from 0.
        count: of the clusters to leave.
        features: (N, D), for what no path connects.

    Returns:
        the clusters (N,), from 0.
    """
    for rivals, least in ((RIVALS, max(count, FEW)), (1, count)):
        if labels.max() + 1 > least:
            labels = _merged(path_weights(graph, labels), labels, least, rivals)
    if labels.max() + 1 > count:
        means = cluster_means(features, labels)
        labels = AgglomerativeClustering(count, linkage="average").fit_predict(means)[labels]
    return labels


def _merged(weights: np.ndarray, labels: np.ndarray, count: int, rivals: int) -> np.ndarray:
    """Merge clusters that paths connect; `weights` (M, M) are changed in place."""
    sizes = np.bincount(labels).astype(np.float64)
    into, left = np.arange(len(sizes)), len(sizes)
    affinity = weights / sizes[:, None] ** 2
    affinity += affinity.T
    scores, best = np.empty(left), np.empty(left, np.int64)

    def rank(rows: np.ndarray) -> None:
        found = affinity[rows]
        best[rows] = found.argmax(1)
        top = -np.partition(-found, rivals - 1, 1)[:, :rivals]
        greatest = top.max(1)
        lead = (rivals * greatest - top.sum(1)) / max(1, rivals - 1)
        scores[rows] = np.where(greatest > 0, greatest + lead, -np.inf)

    rank(np.arange(left))
    while left > count:
        a = scores.argmax()
        if scores[a] == -np.inf:
            break  # nothing is connected
        a, b = sorted((a, best[a]))
        touched = (affinity[a] > 0) | (affinity[b] > 0)
        weights[a] += weights[b]
        weights[:, a] += weights[:, b]
        sizes[a] += sizes[b]
        weights[b] = weights[:, b] = affinity[b] = affinity[:, b] = weights[a, a] = 0
        affinity[a] = affinity[:, a] = weights[a] / sizes[a] ** 2 + weights[:, a] / sizes**2
        into[into == b] = a
        touched[b] = False
        scores[b] = -np.inf
        rank(touched.nonzero()[0])
        left -= 1
    return np.unique(into[labels], return_inverse=True)[1]


def cluster_means(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the means (M, D) of the features (N, D) of each cluster, whose labels (N,) count from 0."""
    count = labels.max() + 1
    sums = np.zeros((count, features.shape[1]), np.float64)
    np.add.at(sums, labels, features)
    return (sums / np.bincount(labels)[:, None]).astype(np.float32)


def weighted_triplet_loss(features: Tensor, labels: Tensor, negatives: int, margin: float) -> Tensor:
    """Return the mean of max(0, ‖a − p‖² − ‖a − n‖² + margin) over the pairs (a, p) of a cluster (Eq. 12, γ = 1).

    Args:
        features: (N, D).
        labels: the clusters (N,).
        negatives: the samples n of other clusters that are drawn for each pair.
        margin: by which the squared distances are to differ.

    Returns:
        (), 0 if there are no pairs.
    """
    same = labels[:, None] == labels
    anchors, positives = same.triu(1).nonzero(as_tuple=True)
    square = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").square()
    total, count, pairs = square.sum() * 0, 0, max(1, MAX_DRAWS // len(labels))
    for a, p in zip(anchors.split(pairs), positives.split(pairs), strict=True):
        draws = torch.rand(len(a), len(labels)).to(features.device).masked_fill(same[a], -1)
        drawn, others = draws.topk(min(negatives, len(labels)), 1)
        wrong = F.relu(square[a, p, None] - square[a[:, None], others] + margin) * (drawn >= 0)
        total, count = total + wrong.sum(), count + (drawn >= 0).sum()
    return total / count.clamp(min=1)


class JULE(FeatureClustering):
    """Cluster images by a neighbour graph of features, whose merging clusters teach the network that makes them.

    The run has three periods of as many epochs, the last of which is shorter where three do not divide the epochs. At
    the start of the first, images and the nearest ones of their pixels are clusters; at that of another, these merge
    until `KEPT` of them are left, by the features of then. An epoch lowers a triplet loss of the clusters. The rates
    are those of the authors' program, whose periods have 20 epochs, and which ends once K clusters are left.

    At each validation, as at the end of the authors' run, clusters of the features are found anew and merged until K
    are left. An image is in the cluster of the nearest of at most `PARTS`·K means of parts of these clusters.

    Args:
        network: from images to features (N, D).
        dims: D.
        num_clusters: K.
        epochs: of the whole run.
        lr: the learning rate of SGD with momentum 0.9, which falls by (1 + 10⁻⁴ t)^−0.75 with the step t.

    Raises:
        ValueError: an argument is not positive; in training, there are more images than the method takes.
    """

    SCHEDULE = ("schedule_epochs",)  # a longer run goes on with the last clusters
    PERIODS, KEPT, PARTS = 3, 0.1, 10
    NEGATIVES, MARGIN = 20, 0.2

    def __init__(self, network: nn.Module, dims: int, num_clusters: int, *, epochs: int, lr: float = 0.01):
        super().__init__(num_clusters, dims)
        check_positive(epochs=epochs, lr=lr)
        self.network, self.schedule_epochs, self.lr = network, epochs, lr
        self.centers = torch.zeros(self.PARTS * num_clusters, dims)
        self.register_buffer("owners", torch.zeros(self.PARTS * num_clusters, dtype=torch.long))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.network.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-5)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + 1e-4 * step) ** -0.75)
        return [optimizer], [{"scheduler": falling, "interval": "step"}]

    def features(self, images: Tensor) -> Tensor:
        """Return features (N, D) of length 1 of images (N, C, H, W)."""
        return F.normalize(self.network(images).float())

    def on_train_epoch_start(self) -> None:
        period = -(-self.schedule_epochs // self.PERIODS)
        if self.current_epoch % period or self.current_epoch >= self.PERIODS * period:
            return
        if self.current_epoch == 0:
            pixels = self.over_images(lambda images: F.normalize(images.flatten(1))).cpu().numpy()
            check_count("jule", len(pixels))
            labels = first_clusters(neighbor_graph(pixels)[1])
        else:
            features = self.over_images(self.features).cpu().numpy()
            labels = self.kept["labels"].cpu().numpy()
            count = max(self.num_clusters, int(self.KEPT * (labels.max() + 1)))
            labels = merged(neighbor_graph(features)[0], labels, count, features)
        self.kept["labels"] = torch.from_numpy(labels).long().to(self.device)

    def step(self, images: Tensor, index: Tensor) -> Tensor:
        return weighted_triplet_loss(self.features(images), self.kept["labels"][index], self.NEGATIVES, self.MARGIN)

    def on_validation_epoch_start(self) -> None:
        features = self.over_images(self.features).cpu().numpy()
        check_count("jule", len(features))
        graph, nearest = neighbor_graph(features)
        parts = merged(graph, first_clusters(nearest), len(self.centers), features)
        whole = merged(graph, parts, self.num_clusters, features)
        means = cluster_means(features, parts)
        owners = np.zeros(len(means), np.int64)
        owners[parts] = whole
        place = np.arange(len(self.centers)) % len(means)  # if there are fewer parts, some are repeated
        self.centers.copy_(torch.from_numpy(means[place]))
        self.owners.copy_(torch.from_numpy(owners[place]))
        self.variance.fill_(max(float(((features - means[parts]) ** 2).mean()), 1e-12))

    def responses(self, images: Tensor) -> Tensor:
        """Return the log-densities (N, K) of Gaussians at the nearest parts of each cluster, up to a constant."""
        square = torch.cdist(self.features(images), self.centers).square()
        nearest = square.new_full((len(square), self.num_clusters), 1e6)  # of a cluster without parts
        nearest = nearest.scatter_reduce(1, self.owners.expand_as(square), square, "amin")
        return -nearest / (2 * self.variance)


def build(setting: "Setting") -> JULE:
    """Build the module of a run of JULE; the features have the 160 dimensions of the authors' networks."""
    run = setting.run
    return JULE(setting.network(160), 160, run.clusters, epochs=setting.epochs)
