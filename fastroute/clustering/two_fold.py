"""Image clustering by two-fold optimisation (Alg. 3), as a Lightning module."""

from typing import Literal

import torch
from torch import Tensor, nn

from fastroute.clustering.augment import Augmentation
from fastroute.clustering.module import ClusteringModule
from fastroute.nn import ConsistencyLoss, MixtureEMLoss, RelevanceNorm


class TwoFoldClustering(ClusteringModule):
    """Cluster images by a network that is trained for the mixture-EM loss and for consistency in turn (§4.4.3, Alg. 3).

    Args:
        network: from images to relevance scores (N, K), such as `clustering_network` gives.
        num_clusters: K.
        method: "two-fold" (Alg. 3), or one of its two steps alone: "em" (Eq. 4.23) or "consistency" (Eq. 4.24).
        augmentation: the transform T.
        lr_em, lr_consistency: learning rates of the two Adam optimisers; the thesis's by default.
        gamma: γ.
        training_statistics: of `RelevanceNorm`.
    """

    def __init__(
        self,
        network: nn.Module,
        num_clusters: int,
        *,
        method: Literal["two-fold", "em", "consistency"] = "two-fold",
        augmentation: Augmentation | None = None,
        lr_em: float = 5e-5,
        lr_consistency: float = 1e-4,
        gamma: float = 5.0,
        training_statistics: Literal["running", "batch"] = "running",
    ):
        super().__init__(num_clusters)
        if method not in ("two-fold", "em", "consistency"):
            raise ValueError(f"method is {method!r}; it must be 'two-fold', 'em' or 'consistency'")
        for name, lr in (("lr_em", lr_em), ("lr_consistency", lr_consistency)):
            if not lr > 0:
                raise ValueError(f"{name} is {lr}; it must be greater than 0")
        self.automatic_optimization = False
        self.network, self.method = network, method
        self.augment = augmentation or Augmentation()
        self.lr_em, self.lr_consistency = lr_em, lr_consistency
        self.normalize = RelevanceNorm(num_clusters, training_statistics=training_statistics)
        self.em_loss, self.consistency_loss = MixtureEMLoss(gamma, self.normalize), ConsistencyLoss()

    def configure_optimizers(self):
        adam = torch.optim.Adam
        return [adam(self.network.parameters(), lr=lr) for lr in (self.lr_em, self.lr_consistency)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, _ = batch
        x_tr = self.augment(x)
        em, consistency = self.optimizers()

        if self.method != "consistency":  # EM optimisation: relevance scores, posteriors and clustering loss
            loss, _ = self.em_loss(self.network(x), self.network(x_tr))
            self._step(em, loss)
            self.log("em_loss", loss, on_step=False, on_epoch=True, batch_size=len(x))

        if self.method != "em":  # consistency optimisation, with the posteriors of the updated network
            with torch.no_grad():
                p = torch.softmax(self.normalize(self.network(x), track=self.method == "consistency"), -1)
            loss = self.consistency_loss(p, self.normalize(self.network(x_tr), track=False))
            self._step(consistency, loss)
            self.log("consistency_loss", loss, on_step=False, on_epoch=True, batch_size=len(x))

    def _step(self, optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def forward(self, images: Tensor) -> Tensor:
        """Posteriors (N, K)."""
        return torch.softmax(self.normalize(self.network(images), track=False), -1)
