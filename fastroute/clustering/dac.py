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

FIRST, LAST = 0.9, 0.5
"""The thresholds with which a run begins and, after all epochs, ends."""


def pair_loss(similar: Tensor, augmented: Tensor, threshold: float) -> Tensor:
    """Return the mean squared error of similarities; the target is 1 for pairs above a threshold, and 0 for others.

    Args:
        similar: cosine similarities (N, N) of images, which tell the pairs. They are held constant.
        augmented: those of the augmented images, from 0 to 1.
        threshold: above it, a pair is of one cluster.

    Returns:
        ().
    """
    return F.mse_loss(augmented, (similar > threshold).to(augmented.dtype))


def label_layers(num_clusters: int) -> nn.Sequential:
    """Return the layers from scores (N, K) to label features before their normalisation, both (N, K).

    Batch norm and a ReLU spread the scores over a batch: without them all pairs are similar at first, and one cluster
    takes all images. Two dense layers follow, each the identity at first, with batch norm and a ReLU of their own.
    """
    layers: list[nn.Module] = [nn.BatchNorm1d(num_clusters), nn.ReLU()]
    for _ in range(2):
        dense = nn.Linear(num_clusters, num_clusters)
        nn.init.eye_(dense.weight)
        nn.init.zeros_(dense.bias)
        layers += [dense, nn.BatchNorm1d(num_clusters), nn.ReLU()]
    return nn.Sequential(*layers)


class DAC(ClusteringModule):
    """Cluster images by deciding, ever less strictly, which pairs of a batch are of one cluster.

    The label features l are non-negative and of length 1: exp(a) / ‖exp(a)‖ of the scores a after `label_layers`. The
    dot products of l tell the pairs, and those of the augmented images learn them.

    It follows the program of the authors for MNIST. Its one threshold falls in equal steps from 0.9 to 0.5, and
    all pairs count, by squared error; the paper has cross-entropy, and two thresholds with pairs between them that do
    not count. RMSProp's decay is the program's, 0.9: by PyTorch's, 0.99, sudden gradients move the weights far. In a
    validation, batch norm uses the statistics of all images under the current weights; the program uses those of the
    batch.

    Args:
        network: from images to (N, K).
        num_clusters: K.
        epochs: of the whole run.
        augmentation: the transform.
        lr: the learning rate of RMSProp; the default is the paper's.

    Raises:
        ValueError: an argument is out of range.
    """

    SCHEDULE = ("schedule_epochs",)  # the threshold stays at the last in the epochs that a longer run adds

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
        self.network, self.norm = network, label_layers(num_clusters)
        self.schedule_epochs, self.lr = epochs, lr
        self.augment = augmentation or Augmentation()

    def configure_optimizers(self):
        return torch.optim.RMSprop(self.parameters(), lr=self.lr, alpha=0.9)

    def threshold(self) -> float:
        """Return the threshold of the epoch."""
        return FIRST + (LAST - FIRST) * min(1.0, self.current_epoch / self.schedule_epochs)

    def step(self, images: Tensor, index: Tensor | None) -> Tensor:
        with torch.no_grad():
            labels = self.label_features(images)
        augmented = self.label_features(self.augment(images))
        with without_autocast(images.device.type):  # in bfloat16, a similarity has two or three digits
            return pair_loss(labels @ labels.T, augmented @ augmented.T, self.threshold())

    def on_validation_epoch_start(self) -> None:
        with self.trainer.precision_plugin.forward_context():
            update_bn(self.trainer.val_dataloaders, self, self.device)

    def label_features(self, images: Tensor) -> Tensor:
        """Return label features (N, K), non-negative and of length 1, of images (N, C, H, W)."""
        return F.normalize(self(images))

    def responses(self, images: Tensor) -> Tensor:
        """Return scores (N, K) of images (N, C, H, W)."""
        scores = self.network(images).float()
        with without_autocast(images.device.type):
            return self.norm(scores)


def build(setting: "Setting") -> DAC:
    """Build the module of a run of DAC; the threshold falls until self-labelling begins."""
    run = setting.run
    return DAC(
        setting.network(run.clusters), run.clusters, epochs=setting.method_epochs, augmentation=setting.augmentation
    )
