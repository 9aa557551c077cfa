"""The base of Lightning modules for clustering: posteriors and metrics."""

import math
import warnings

import pytorch_lightning as pl
import torch
from torch import Tensor

from fastroute.clustering.metrics import label_metrics


class ClusteringModule(pl.LightningModule):
    """A module whose `forward` returns posteriors (N, K): the softmax of its `responses`, by default.

    Batches are images (N, C, H, W), values from 0 to 1, and labels (N,), which are used for metrics alone. Each
    validation logs `entropy` (of the posteriors, as a share of log K: 1 is no clustering) and `empty` (the number of
    clusters without a sample), and unless a label is −1, `acc`, `acc_many` (many clusters to a label), `nmi` and `ari`,
    over exactly the images seen. It warns if the clustering has collapsed.

    Args:
        num_clusters: K.

    Attributes:
        sizes: the number of samples of each cluster at the last validation.
    """

    EVEN = 0.98
    """The entropy above which posteriors count as even."""

    def __init__(self, num_clusters: int):
        super().__init__()
        self.num_clusters = num_clusters
        self.sizes, self._seen = [], []

    def forward(self, images: Tensor) -> Tensor:
        """Return posteriors (N, K) of images (N, C, H, W)."""
        return torch.softmax(self.responses(images), -1)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["epochs"] = self.trainer.max_epochs

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self._seen.append((self(images).float().cpu(), labels.cpu()))

    def on_validation_epoch_end(self) -> None:
        posterior, labels = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        clusters = posterior.argmax(1)
        sizes = torch.bincount(clusters, minlength=self.num_clusters)
        self.sizes = sizes.tolist()
        entropy = torch.special.entr(posterior).sum(1).mean() / (math.log(self.num_clusters) or 1)
        empty = int((sizes == 0).sum())
        metrics = {
            **label_metrics(labels, clusters),
            "entropy": entropy.item(),
            "empty": float(empty),
        }
        self.log_dict(metrics)
        if empty >= self.num_clusters / 2 or metrics["entropy"] > self.EVEN:
            warnings.warn(
                f"the clustering has collapsed: {empty} of {self.num_clusters} clusters are empty, and the posteriors' "
                f"entropy is {metrics['entropy']:.0%} of that of even ones",
                stacklevel=1,
            )
