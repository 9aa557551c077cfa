"""Image clustering by two-fold optimisation (Alg. 3), as a Lightning module."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute._defaults import GAMMA, LR_CONSISTENCY, LR_EM
from fastroute.clustering.augment import Augmentation
from fastroute.clustering.metrics import mutual_information
from fastroute.clustering.module import ClusteringModule
from fastroute.nn import ConsistencyLoss, MixtureEMLoss, RelevanceNorm


class TwoFoldClustering(ClusteringModule):
    """Cluster images by a network that is trained for the mixture-EM loss and for consistency in turn (§4.4.3, Alg. 3).

    Args:
        network: from images to relevance scores (N, heads·K), such as `clustering_network` gives.
        num_clusters: K.
        heads: clusterings that are trained at once, of one network but for its last layer or of networks side by
            side. After each validation `head` is the one whose clusters of the images seen share the most information
            with those of augmented copies: clusters that are even in size and that augmentation does not change. It is
            a choice without labels.
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
        heads: int = 1,
        method: Literal["two-fold", "em", "consistency"] = "two-fold",
        augmentation: Augmentation | None = None,
        lr_em: float = LR_EM,
        lr_consistency: float = LR_CONSISTENCY,
        gamma: float = GAMMA,
        training_statistics: Literal["running", "batch"] = "running",
    ):
        super().__init__(num_clusters)
        if method not in ("two-fold", "em", "consistency"):
            raise ValueError(f"method is {method!r}; it must be 'two-fold', 'em' or 'consistency'")
        if heads < 1:
            raise ValueError(f"heads is {heads}; it must be at least 1")
        for name, lr in (("lr_em", lr_em), ("lr_consistency", lr_consistency)):
            if not lr > 0:
                raise ValueError(f"{name} is {lr}; it must be greater than 0")
        self.automatic_optimization = False
        self.network, self.heads, self.method = network, heads, method
        self.augment = augmentation or Augmentation()
        self.lr_em, self.lr_consistency = lr_em, lr_consistency
        self.normalize = RelevanceNorm(num_clusters, num_gates=heads, training_statistics=training_statistics)
        self.em_loss, self.consistency_loss = MixtureEMLoss(gamma, self.normalize), ConsistencyLoss()
        self.register_buffer("head", torch.zeros((), dtype=torch.long))

    def configure_optimizers(self):
        adam = torch.optim.Adam
        return [adam(self.network.parameters(), lr=lr) for lr in (self.lr_em, self.lr_consistency)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, _ = batch
        x_tr = self.augment(x)
        em, consistency = self.optimizers()

        if self.method != "consistency":  # EM optimisation: relevance scores, posteriors and clustering loss
            losses, _ = self.em_loss(self.scores(x), self.scores(x_tr))
            self._step(em, losses.sum())
            self.log("em_loss", losses.mean(), on_step=False, on_epoch=True, batch_size=len(x))

        if self.method != "em":  # consistency optimisation, with the posteriors of the updated network
            with torch.no_grad():
                p = torch.softmax(self.normalize(self.scores(x), track=self.method == "consistency"), -1)
            losses = self.consistency_loss(p, self.normalize(self.scores(x_tr), track=False))
            self._step(consistency, losses.sum())
            self.log("consistency_loss", losses.mean(), on_step=False, on_epoch=True, batch_size=len(x))

    def _step(self, optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def scores(self, images: Tensor) -> Tensor:
        """Relevance scores (N, heads, K)."""
        return self.network(images).unflatten(1, (self.heads, self.num_clusters))

    def responses(self, images: Tensor) -> Tensor:
        """Normalised relevance scores (N, K) of the chosen head."""
        return self.normalize(self.scores(images), track=False)[:, self.head]

    @torch.no_grad()
    def on_validation_epoch_start(self) -> None:
        if self.heads == 1:
            return
        counts = torch.zeros(self.heads, self.num_clusters, self.num_clusters, device=self.device)
        for images, _ in self.trainer.val_dataloaders:
            images = images.to(self.device)
            with self.trainer.precision_plugin.forward_context():
                scores = [self.normalize(self.scores(x), track=False) for x in (images, self.augment(images))]
            clusters, augmented = (F.one_hot(a.argmax(-1), self.num_clusters).float() for a in scores)
            counts += torch.einsum("nhi,nhj->hij", clusters, augmented)
        self.head.copy_(torch.stack([mutual_information(of_head / of_head.sum()) for of_head in counts]).argmax())
