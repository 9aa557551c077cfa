"""Clusters in a plane (§4.5.1), with and without normalised relevance scores. Needs `fastroute[visualize]`."""

from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute._defaults import GAMMA
from fastroute._extras import extra
from fastroute._files import replacing
from fastroute.clustering.metrics import cluster_accuracy
from fastroute.clustering.networks import perceptron
from fastroute.nn import MixtureEMLoss, RelevanceNorm
from fastroute.ops import mixture_em_loss

with extra("visualize", "fastroute.clustering.two_dimensional"):
    from matplotlib.figure import Figure

BATCH = 128
STEPS = 4690
"""The steps of ten epochs of MNIST, for any data."""


class Clustering(NamedTuple):
    """A clustering of points in a plane.

    Attributes:
        network: a perceptron from points (N, 2) to relevance scores (N, K).
        norm: normalises the scores; None leaves them.
        means: (K,), of h over 128 points.
    """

    network: nn.Module
    norm: RelevanceNorm | None
    means: Tensor

    @torch.no_grad()
    def scores(self, points: Tensor) -> Tensor:
        """Return relevance scores (N, K) of points (N, 2), normalised if they were in training."""
        scores = self.network(points)
        return scores if self.norm is None else self.norm(scores)


def points_of(images: Tensor, labels: Tensor, steps: int = 2000) -> Tensor:
    """Train a CNN to classify images, and return the outputs (N, 2) of the two nodes before its last layer.

    Args:
        images: (N, C, H, W).
        labels: (N,).
        steps: of training.

    Returns:
        the points, (N, 2).
    """
    pool = nn.Sequential(nn.MaxPool2d(2), nn.Flatten())
    features = nn.Sequential(
        *(nn.Conv2d(images.shape[1], 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), pool, nn.LazyLinear(2)),
    )
    classify = nn.Linear(2, int(labels.max()) + 1)
    features(images[:2])  # gives the lazy layer its size
    optimizer = torch.optim.Adam([*features.parameters(), *classify.parameters()], lr=2e-3)
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(classify(features(images[batch])), labels[batch]).backward()
        optimizer.step()
    features.eval()
    with torch.no_grad():
        return torch.cat([features(part) for part in images.split(1000)])


def cluster_points(points: Tensor, clusters: int, normalized: bool, steps: int | None = None) -> Clustering:
    """Train a perceptron with two hidden layers of 32 by Adam (1e-3) for the mixture-EM loss (Eq. 4.22).

    Args:
        points: (N, 2).
        clusters: K.
        normalized: whether to normalise relevance scores.
        steps: of training; None is `STEPS`.

    Returns:
        the clustering.
    """
    network = perceptron(2, (32, 32), clusters)
    norm = RelevanceNorm(clusters) if normalized else None
    criterion = MixtureEMLoss(GAMMA, norm)
    zero, one = torch.zeros(clusters), torch.ones(clusters)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(steps or STEPS):
        scores = network(points[torch.randint(len(points), (BATCH,))])
        loss, _ = criterion(scores) if normalized else mixture_em_loss(scores, GAMMA, mean=zero, std=one)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if norm is not None:
        norm.eval()
    found = Clustering(network, norm, zero)
    batch = points[torch.randint(len(points), (BATCH,))]
    return found._replace(means=torch.sigmoid(found.scores(batch) / GAMMA).mean(0))


def means_table(without: Clustering, with_norm: Clustering) -> Table:
    """Return Table 4.1: the mean of each cluster's distribution over 128 points; equal integrals are equal means."""
    table = Table("cluster", title="mean of h over 128 points")
    for name in ("with a", "with a*"):
        table.add_column(name, justify="right")
    for j, means in enumerate(zip(without.means.tolist(), with_norm.means.tolist(), strict=True), start=1):
        table.add_row(str(j), *(f"{mean:.3f}" for mean in means))
    return table


def draw(points: Tensor, labels: Tensor, without: Clustering, with_norm: Clustering, folder: Path) -> list[Path]:
    """Draw Figure 4.4, the points by label and by cluster, and Figure 4.5, contours of h of three clusters, as SVG.

    Args:
        points: (N, 2).
        labels: (N,).
        without, with_norm: the clusterings.
        folder: to write into.

    Returns:
        the paths of the files.
    """
    found = with_norm.scores(points).argmax(1)
    sample = torch.randperm(len(points))[:4000]
    scatter = Figure((10, 5), layout="constrained")
    for axes, title, color in zip(scatter.subplots(1, 2), ("labels", "clusters"), (labels, found), strict=True):
        axes.scatter(*points[sample].T.numpy(), c=color[sample], s=3, cmap="tab10")
        axes.set_title(title)

    low, high = points.amin(0), points.amax(0)
    across, up = (torch.linspace(a, b, 100) for a, b in zip(low.tolist(), high.tolist(), strict=True))
    grid = torch.cartesian_prod(across, up)
    shown = torch.bincount(found, minlength=len(with_norm.means)).topk(3).indices.tolist()
    contours = Figure((12, 7), layout="constrained")
    for row, (name, clustering) in zip(contours.subplots(2, 3), (("a", without), ("a*", with_norm)), strict=True):
        h = torch.sigmoid(clustering.scores(grid) / GAMMA).view(100, 100, -1)
        for axes, j in zip(row, shown, strict=True):
            axes.scatter(*points[sample].T.numpy(), s=1, color="0.7")
            lines = axes.contour(across.numpy(), up.numpy(), h[..., j].T.numpy(), levels=8)
            axes.clabel(lines, fontsize=7)
            axes.set_title(f"h of cluster {j + 1}, from {name}")
    paths = []
    for name, figure in (("points", scatter), ("contours", contours)):
        paths.append(folder / f"{name}.svg")
        with replacing(paths[-1], encoding="utf-8") as file:
            figure.savefig(file, format="svg")
    return paths


def run(images: Tensor, labels: Tensor, clusters: int, seed: int, folder: Path, console: Console) -> None:
    """Run the whole experiment: print Table 4.1 and the accuracies, and draw Figures 4.4 and 4.5.

    Args:
        images: (N, C, H, W).
        labels: (N,).
        clusters: K, at least 3.
        seed: of PyTorch's generator.
        folder: for the figures; made if it is missing.
        console: to print on.

    Raises:
        ValueError: there are fewer than 3 clusters, the number that Figure 4.5 draws, or images have less than 4×4
            pixels.
    """
    if clusters < 3:
        raise ValueError(f"clusters is {clusters}; it must be at least 3, the number that is drawn")
    if min(images.shape[2:]) < 4:
        height, width = images.shape[2:]
        raise ValueError(f"images have {height}×{width} pixels; they must have at least 4×4, which are halved twice")
    torch.manual_seed(seed)
    with console.status("training a network with two nodes before the last layer"):
        points = points_of(images, labels)
    with console.status("clustering its points"):
        without, with_norm = (cluster_points(points, clusters, normalized) for normalized in (False, True))
    console.print(means_table(without, with_norm))
    for name, found in (("without", without), ("with", with_norm)):
        accuracy = cluster_accuracy(labels, found.scores(points).argmax(1))
        console.print(f"accuracy {name} normalisation: {accuracy:.3f}", highlight=False)
    folder.mkdir(parents=True, exist_ok=True)
    for path in draw(points, labels, without, with_norm, folder):
        console.print(str(path), soft_wrap=True)
