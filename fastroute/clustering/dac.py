"""Deep adaptive clustering (DAC; Chang et al. 2017), as a Lightning module."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from fastroute.clustering.augment import Augmentation
from fastroute.clustering.module import ClusteringModule, check_positive
from fastroute.ops._library import without_autocast

if TYPE_CHECKING:
    from fastroute.clustering.build import Setting

UPPER, LOWER, LAST = (0.95, -1.0), (0.455, 0.1), 0.45
"""The thresholds u(λ) = 0.95 − λ and l(λ) = 0.455 + 0.1 λ of the paper, and the λ at which they meet."""


def pair_loss(similar: Tensor, augmented: Tensor, upper: float, lower: float) -> Tensor:
    """Return the cross-entropy of the pairs that are clearly of one cluster, or clearly of two (DAC's Eq. 6).

    Args:
        similar: cosine similarities (N, N) of images, which tell the pairs: those above `upper` are of one cluster,
            those of at most `lower` of two, and the others do not count. They are held constant.
        augmented: those of the augmented images, from 0 to 1.
        upper, lower: u(λ) and l(λ).

    Returns:
        (), the mean over the pairs that count.
    """
    same = similar > upper
    counts = same | (similar <= lower)
    g = augmented.clamp(1e-6, 1 - 1e-6)
    loss = torch.where(same, -g.log(), -(1 - g).log())
    return (loss * counts).sum() / counts.sum().clamp(min=1)


class DAC(ClusteringModule):
    """Cluster images by deciding, ever less strictly, which pairs of a batch are of one cluster.

    The label features l are non-negative and of length 1: exp(a) / ‖exp(a)‖ of the scores a. Batch norm and a ReLU
    spread the scores over a batch, as in the authors' program; without that all pairs are similar at first, and one
    cluster takes all images. The dot products of l decide the pairs, and those of the augmented images learn them. λ
    grows in equal steps from 0, at which few pairs count, to the value at which all do, in the last epoch.

    For a validation, batch norm takes the statistics of all images by the weights of then, as the authors' has those of
    the batch in prediction. RMSProp's decay is theirs, 0.9: by PyTorch's, 0.99, sudden gradients move the weights far.

    Args:
        network: from images to (N, K).
        num_clusters: K.
        epochs: of the whole run.
        augmentation: the transform.
        lr: the learning rate of RMSProp; the default is the paper's.

    Raises:
        ValueError: an argument is out of range.
    """

    SCHEDULE = ("schedule_epochs",)  # all pairs count in the epochs that a longer run adds

    def __init__(
        self,
        network: nn.Module,
        num_clusters: int,
        *,
        epochs: int,
        augmentation: Augmentation | None = None,
        lr: float = 1e-3,
    ):
        super().__init__(num_clusters)
        check_positive(epochs=epochs, lr=lr)
        self.network, self.norm = network, nn.Sequential(nn.BatchNorm1d(num_clusters), nn.ReLU())
        self.schedule_epochs, self.lr = epochs, lr
        self.augment = augmentation or Augmentation()

    def configure_optimizers(self):
        return torch.optim.RMSprop(self.parameters(), lr=self.lr, alpha=0.9)

    def thresholds(self) -> tuple[float, float]:
        """Return u(λ) and l(λ) of the epoch."""
        share = min(1.0, self.current_epoch / max(1, self.schedule_epochs - 1))
        return tuple(at + by * LAST * share for at, by in (UPPER, LOWER))

    def step(self, images: Tensor, index: Tensor | None) -> Tensor:
        with torch.no_grad():
            labels = self.label_features(images)
        augmented = self.label_features(self.augment(images))
        with without_autocast(images.device.type):  # in bfloat16, similarities of almost 1 round to 1
            return pair_loss(labels @ labels.T, augmented @ augmented.T, *self.thresholds())

    def on_validation_epoch_start(self) -> None:
        with self.trainer.precision_plugin.forward_context():
            update_bn(self.trainer.val_dataloaders, self, self.device)

    def label_features(self, images: Tensor) -> Tensor:
        """Return label features (N, K), non-negative and of length 1, of images (N, C, H, W)."""
        return F.normalize(self(images))

    def responses(self, images: Tensor) -> Tensor:
        """Return scores (N, K) of images (N, C, H, W)."""
        return self.norm(self.network(images).float())


def build(setting: "Setting") -> DAC:
    """Build the module of a run of DAC; λ grows until self-labelling begins."""
    run = setting.run
    return DAC(
        setting.network(run.clusters), run.clusters, epochs=setting.method_epochs, augmentation=setting.augmentation
    )
