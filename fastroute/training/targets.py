"""The labels of images as losses take them."""

from torch import Tensor
from torch.nn import functional as F

from fastroute.models._shapes import described


def checked_batch(batch: object) -> tuple[Tensor, Tensor]:
    """Return the images of a batch and its labels; see `checked_labels`.

    Raises:
        ValueError: it is no pair of tensors, or the labels have another shape or type.
    """
    pair = isinstance(batch, list | tuple) and len(batch) == 2
    if not (pair and isinstance(batch[0], Tensor) and isinstance(batch[1], Tensor)):
        types = f" of {', '.join(type(item).__name__ for item in batch)}" if isinstance(batch, list | tuple) else ""
        raise ValueError(
            f"a batch is a {type(batch).__name__}{types}; it must be a pair of tensors, images (N, C, H, W) and labels "
            "(N,)"
        )
    return batch[0], checked_labels(batch[1]) if batch[1].numel() else batch[1]


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


def check_values(labels: Tensor) -> None:
    """Check the values of labels that `checked_labels` returned.

    Raises:
        ValueError: a label is negative, or shares of classes are, or they do not sum to 1.
    """
    if labels.dim() == 1:
        if len(labels) and labels.min() < 0:
            raise ValueError(f"labels have {int(labels.min())}; they must be the numbers of the classes, from 0")
        return
    wrong = (labels < 0).any(1) | ((labels.float().sum(1) - 1).abs() > 1e-2)
    if wrong.any():
        row = [round(share, 4) for share in labels[wrong][0, :5].tolist()]
        raise ValueError(
            f"labels have a row that begins with {row}; rows must be shares of the classes, at least 0, whose sum is "
            "1. For several labels of an image or for regression, write a Lightning module of your own, or a network "
            "with a method training_loss"
        )


def check_logits(logits: object, model: str) -> None:
    """Check the type and the shape of what a network returns.

    Raises:
        ValueError: it is no tensor (N, num_classes).
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(
            f"model is {model}; for a batch of images it returns {described(logits)}, expected logits (N, "
            "num_classes): wrap it in a module that returns these alone"
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
