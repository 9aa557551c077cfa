"""Self-labelling, the last step of SCAN (Van Gansbeke et al. 2020): confident images teach their augmented copies."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute.clustering.augment import Augmentation

THRESHOLD = 0.99
"""SCAN's posterior from which an image is confident."""
LEARNING_RATE = 1e-4
"""SCAN's, of Adam."""


def self_label_loss(responses: Tensor, augmented: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Return the cross-entropy of augmented images to the clusters of the confident ones, balanced over the clusters.

    An image is confident if its posterior reaches the threshold, or is in the upper half of its cluster in the batch:
    normalised scores (Eq. 4.11) reach SCAN's threshold only after some training. With the upper half of the whole batch
    instead, clusters of less certain images had no confident images, and became empty. As in SCAN, an image counts by
    the inverse of the number of confident images in its cluster.

    Args:
        responses: (N, K), before the softmax, of the images; no gradient flows to them.
        augmented: (N, K), of the augmented images.
        threshold: the posterior.

    Returns:
        ().
    """
    certainty, labels = torch.softmax(responses.float(), 1).max(1)
    order = certainty.argsort(descending=True)
    members = F.one_hot(labels[order], responses.shape[1])
    rank = (members.cumsum(0) * members).sum(1)  # 1 for the most certain image of a cluster
    upper = torch.empty_like(order, dtype=torch.bool)
    upper[order] = 2 * rank <= members.sum(0)[labels[order]] + 1
    confident = upper | (certainty >= threshold)
    sizes = torch.zeros(responses.shape[1], device=labels.device).index_add_(0, labels, confident.float())
    weights = confident / sizes[labels].clamp(min=1)
    return (weights * F.cross_entropy(augmented.float(), labels, reduction="none")).sum() / weights.sum()


def cut_out(images: Tensor, share: float) -> Tensor:
    """Return images with a black square at a random place in each, cut off at the borders (DeVries & Taylor 2017).

    Args:
        images: (N, C, H, W).
        share: the side of the square as a share of the image's.
    """
    height, width = images.shape[2:]
    centers = torch.rand(2, len(images), 1).to(images.device)
    down, right = (
        ((torch.arange(size, device=images.device) + 0.5) / size - center).abs() < share / 2
        for size, center in zip((height, width), centers, strict=True)
    )
    return images.masked_fill((down[:, :, None] & right[:, None, :])[:, None], 0)


def restart(optimizer: torch.optim.Optimizer) -> None:
    """Begin the last step with a fresh optimiser state, at the method's learning rate or SCAN's, whichever is lower.

    With Adam's moments from the method, the first steps emptied three of ten clusters of the digits.
    """
    optimizer.state.clear()
    if isinstance(optimizer, torch.optim.Adam | torch.optim.RMSprop):  # others have rates of another scale
        for group in optimizer.param_groups:
            group["lr"] = min(group["lr"], LEARNING_RATE)


@dataclass
class SelfLabelling:
    """The last step of a run.

    Attributes:
        start: the epoch, from 0, at which it begins.
        augmentation: of the images that learn, stronger than the method's.
        cut: the side of the square that is cut out, as a share of the image's.
    """

    start: int
    augmentation: Augmentation = field(default_factory=Augmentation)
    cut: float = 0.3

    @classmethod
    def after(cls, start: int, augmentation: Augmentation) -> "SelfLabelling":
        """Return the step with one and a half times the method's geometric changes, and twice those of intensity."""
        strong = Augmentation(
            shift=1.5 * augmentation.shift,
            degrees=1.5 * augmentation.degrees,
            scale=1.5 * augmentation.scale,
            brightness=2 * augmentation.brightness,
            contrast=2 * augmentation.contrast,
            flip=augmentation.flip,
        )
        return cls(start, strong)

    def strong(self, images: Tensor) -> Tensor:
        """Return strongly augmented copies of images."""
        return cut_out(self.augmentation(images), self.cut)
