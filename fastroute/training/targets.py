"""The labels of images as losses take them."""

from torch import Tensor
from torch.nn import functional as F


def checked_labels(labels: Tensor) -> Tensor:
    """Return labels (N,) as int64, or shares of classes (N, K) as they are.

    Raises:
        ValueError: labels have another shape or type.
    """
    if labels.dim() == 1 and not labels.is_floating_point():
        return labels.long()
    if labels.dim() == 2 and labels.shape[1] > 1 and labels.is_floating_point():
        return labels
    raise ValueError(
        f"labels are {str(labels.dtype).removeprefix('torch.')} of the shape {tuple(labels.shape)}; they must be "
        "integers (N,), or floating-point shares of the classes (N, num_classes), whose rows sum to 1"
    )


def class_shares(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Return the shares of the classes in each image, (N, num_classes), whose rows sum to 1.

    Args:
        labels: (N,), or of mixed images, shares (N, K) of at most num_classes.
        num_classes: the number of logits.
        smoothing: label smoothing.
    """
    if labels.dim() == 1:
        labels = F.one_hot(labels, num_classes)
    check_classes(labels.shape[1], num_classes)
    labels = F.pad(labels, (0, num_classes - labels.shape[1])).float()
    return labels * (1 - smoothing) + smoothing / num_classes


def check_classes(classes: int, logits: int) -> None:
    """Check that a network has a logit for each class.

    Raises:
        ValueError: it has fewer.
    """
    if classes > logits:
        raise ValueError(f"the images have {classes} classes; the network has {logits} logits, and must have as many")
