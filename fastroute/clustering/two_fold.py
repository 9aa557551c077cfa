"""Image clustering by two-fold optimisation (Alg. 3), as a Lightning module."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute._defaults import GAMMA, LR_CONSISTENCY, LR_EM
from fastroute.clustering.augment import Augmentation
from fastroute.clustering.metrics import mutual_information
from fastroute.clustering.module import ClusteringModule, check_positive
from fastroute.nn import ConsistencyLoss, MixtureEMLoss, RelevanceNorm

if TYPE_CHECKING:
    from fastroute.clustering.build import Setting


class TwoFoldClustering(ClusteringModule):
    """Cluster images by training a network for the mixture-EM loss and for consistency in turn (§4.4.3, Alg. 3).

    Args:
        network: from images to relevance scores (N, heads·K), as from `clustering_network`.
        num_clusters: K.
        heads: the number of clusterings trained at once, by one network up to its last layer or by networks side by
            side. At each validation before self-labelling, `head` becomes the one whose clusters share the most
            information with those of augmented copies: they are even in size, and augmentation changes them least. The
            choice needs no labels.
        method: "two-fold" (Alg. 3), or one of its two steps alone: "em" (Eq. 4.23) or "consistency" (Eq. 4.24).
        augmentation: the transform T.
        lr_em, lr_consistency: learning rates of the two Adam optimisers; the defaults are the thesis's.
        gamma: γ of Eq. 4.12.
        training_statistics: of `RelevanceNorm`.

    Raises:
        ValueError: an argument is out of range or unknown.
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
        check_positive(lr_em=lr_em, lr_consistency=lr_consistency)
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

    def step(self, images: Tensor, index: Tensor | None) -> None:
        x = images
        x_tr = self.augment(x)
        em, consistency = self.optimizers()

        if self.method != "consistency":  # EM optimisation: relevance scores, posteriors and clustering loss
            losses, _ = self.em_loss(self.scores(x), self.scores(x_tr))
            self.descend(em, losses.sum())
            self.log("em_loss", losses.mean(), on_step=False, on_epoch=True, batch_size=len(x))

        if self.method != "em":  # consistency optimisation, with the posteriors of the updated network
            with torch.no_grad():
                p = torch.softmax(self.normalize(self.scores(x), track=self.method == "consistency"), -1)
            losses = self.consistency_loss(p, self.normalize(self.scores(x_tr), track=False))
            self.descend(consistency, losses.sum())
            self.log("consistency_loss", losses.mean(), on_step=False, on_epoch=True, batch_size=len(x))

    def scores(self, images: Tensor) -> Tensor:
        """Return relevance scores (N, heads, K) of images (N, C, H, W)."""
        return self.network(images).unflatten(1, (self.heads, self.num_clusters))

    def responses(self, images: Tensor) -> Tensor:
        """Return normalised relevance scores (N, K) of the chosen head."""
        return self.normalize(self.scores(images), track=False)[:, self.head]

    def label_responses(self, images: Tensor) -> Tensor:
        # The statistics of scores follow the network in self-labelling, too.
        return self.normalize(self.scores(images), track=True)[:, self.head]

    @torch.no_grad()
    def on_validation_epoch_start(self) -> None:
        if self.heads == 1 or self.labels_itself:  # which teaches the chosen head alone
            return
        counts = torch.zeros(self.heads, self.num_clusters, self.num_clusters, device=self.device)
        for images, _ in self.trainer.val_dataloaders:
            images = images.to(self.device)
            with self.trainer.precision_plugin.forward_context():
                scores = [self.normalize(self.scores(x), track=False) for x in (images, self.augment(images))]
            clusters, augmented = (F.one_hot(a.argmax(-1), self.num_clusters).float() for a in scores)
            counts += torch.einsum("nhi,nhj->hij", clusters, augmented)
        self.head.copy_(torch.stack([mutual_information(of_head / of_head.sum()) for of_head in counts]).argmax())


def build(setting: "Setting") -> TwoFoldClustering:
    """Build the module of a run of the two-fold optimisation, or of one of its steps."""
    run = setting.run
    return TwoFoldClustering(
        setting.network(run.heads * run.clusters),
        run.clusters,
        heads=run.heads * run.n_init,
        method=run.method,
        augmentation=setting.augmentation,
        lr_em=run.lr_em,
        lr_consistency=run.lr_consistency,
        gamma=setting.gamma,
        training_statistics=setting.statistics,
    )
