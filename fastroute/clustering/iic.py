"""Invariant information clustering (IIC; Ji et al. 2019) in the setting of §4.5.2 and in its own."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastroute._defaults import LR_CONSISTENCY
from fastroute.clustering.augment import Augmentation
from fastroute.clustering.metrics import mutual_information
from fastroute.clustering.module import ClusteringModule, check_positive
from fastroute.ops._library import without_autocast

if TYPE_CHECKING:
    from fastroute.clustering.build import Setting


def iic_loss(p: Tensor, q: Tensor) -> Tensor:
    """Return −I(z, z'), the negative mutual information of the clusters of samples and of their augmented copies.

    The joint distribution is P = 1/N Σ_i p_i q_iᵀ, symmetrised.

    Args:
        p, q: posteriors (N, K) of the samples and of the augmented ones.

    Returns:
        (), in nats, from −log K, if both agree on certain clusters of equal size, to 0.
    """
    with without_autocast(p.device.type):  # which would leave the joint distribution with 8 bits
        joint = p.T @ q / len(p)
    return -mutual_information((joint + joint.T) / 2)


class IIC(ClusteringModule):
    """Cluster images by maximising the mutual information between the clusters of images and of augmented copies.

    It has one head, and augments each image once a step, as in the thesis's comparison.

    Args:
        network: from images to scores (N, K); their softmax are the posteriors.
        num_clusters: K.
        augmentation: the transform.
        lr: the learning rate of Adam.

    Raises:
        ValueError: `lr` is not positive.
    """

    def __init__(
        self,
        network: nn.Module,
        num_clusters: int,
        *,
        augmentation: Augmentation | None = None,
        lr: float = LR_CONSISTENCY,
    ):
        super().__init__(num_clusters)
        check_positive(lr=lr)
        self.network, self.augment, self.lr = network, augmentation or Augmentation(), lr

    def configure_optimizers(self):
        return torch.optim.Adam(self.network.parameters(), lr=self.lr)

    def step(self, images: Tensor, index: Tensor | None) -> Tensor:
        return iic_loss(self(images), self(self.augment(images)))

    def responses(self, images: Tensor) -> Tensor:
        """Return scores (N, K) of images (N, C, H, W)."""
        return self.network(images)


class ManyHeadedIIC(ClusteringModule):
    """IIC in its own setting: each image is augmented five times, and two sets of heads share a network.

    The heads of the main set have K clusters, and those of the auxiliary set `over` times as many. Steps train the two
    sets in turn, each by the mean loss of its heads; the paper's turns are epochs, and a short run has few. At each
    validation before self-labelling, `head` becomes the main one of the lowest loss over all images.

    Args:
        network: from images to scores (N, heads·(over + 1)·K), those of the main set first.
        num_clusters: K.
        heads: of either set; the paper has five.
        over: clusters of an auxiliary head for each of a main one; the paper has five on MNIST.
        copies: augmented copies of an image; the paper has five.
        augmentation: the transform.
        lr: the learning rate of Adam; the default is the paper's.

    Raises:
        ValueError: an argument is not positive.
    """

    HEADS, OVER, COPIES = 5, 5, 5

    def __init__(
        self,
        network: nn.Module,
        num_clusters: int,
        *,
        heads: int = HEADS,
        over: int = OVER,
        copies: int = COPIES,
        augmentation: Augmentation | None = None,
        lr: float = 1e-4,
    ):
        super().__init__(num_clusters)
        check_positive(heads=heads, over=over, copies=copies, lr=lr)
        self.network, self.heads, self.over, self.copies = network, heads, over, copies
        self.augment, self.lr = augmentation or Augmentation(), lr
        self.register_buffer("head", torch.zeros((), dtype=torch.long))

    def configure_optimizers(self):
        return torch.optim.Adam(self.network.parameters(), lr=self.lr)

    def posteriors(self, images: Tensor, main: bool) -> Tensor:
        """Return posteriors (N, heads, K) of the main heads, or (N, heads, over·K) of the auxiliary ones."""
        main_scores, auxiliary = self.network(images).float().tensor_split([self.heads * self.num_clusters], 1)
        return (main_scores if main else auxiliary).unflatten(1, (self.heads, -1)).softmax(-1)

    def step(self, images: Tensor, index: Tensor | None) -> Tensor:
        main = self.global_step % 2 == 0
        p = self.posteriors(images, main).repeat(self.copies, 1, 1)
        q = self.posteriors(torch.cat([self.augment(images) for _ in range(self.copies)]), main)
        return torch.stack([iic_loss(p[:, head], q[:, head]) for head in range(self.heads)]).mean()

    def on_validation_epoch_start(self) -> None:
        if self.labels_itself:  # which teaches the chosen head alone
            return
        p, q = (
            self.over_images(lambda images, t=transform: self.posteriors(t(images), True))
            for transform in (lambda images: images, self.augment)
        )
        losses = [iic_loss(p[:, head], q[:, head]) for head in range(self.heads)]
        self.head.copy_(torch.stack(losses).argmin())

    def responses(self, images: Tensor) -> Tensor:
        """Return scores (N, K) of the chosen head."""
        scores = self.network(images)[:, : self.heads * self.num_clusters]
        return scores.unflatten(1, (self.heads, self.num_clusters))[:, self.head]


def build(setting: "Setting") -> IIC | ManyHeadedIIC:
    """Build the module of a run of IIC, in the thesis's or in its own setting."""
    run, augmentation = setting.run, setting.augmentation
    if run.method == "iic":
        return IIC(setting.network(run.clusters), run.clusters, augmentation=augmentation, lr=run.lr_consistency)
    outputs = ManyHeadedIIC.HEADS * (ManyHeadedIIC.OVER + 1) * run.clusters
    return ManyHeadedIIC(setting.network(outputs), run.clusters, augmentation=augmentation)
