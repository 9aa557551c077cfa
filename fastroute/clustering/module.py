"""What every clustering network's Lightning module measures."""

import math
import warnings

import pytorch_lightning as pl
import torch
from torch import Tensor

from fastroute.clustering.metrics import label_metrics


class ClusteringModule(pl.LightningModule):
    """A network that is trained to cluster images; `forward` gives posteriors (N, K), the softmax of `responses` if a
    method says no other.

    Batches are images (N, C, H, W), values from 0 to 1, and labels (N,), which are used for nothing but the metrics
    that each validation logs: `acc`, `acc_many` (many clusters to a label), `nmi` and `ari` over exactly the images
    seen, unless they have no labels, which is −1; `entropy` (of the posteriors, as a share of log K: 1 is no clustering
    at all) and `empty` (clusters without a sample). A collapse is said in a warning.
    """

    EVEN = 0.98  # an entropy above this is that of even posteriors

    def __init__(self, num_clusters: int):
        super().__init__()
        self.num_clusters = num_clusters
        self.sizes, self._seen = [], []  # samples of each cluster at the last validation

    def forward(self, images: Tensor) -> Tensor:
        """Posteriors (N, K)."""
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
