"""Metrics of clusters against labels."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.utils import check_consistent_length
from torch import Tensor


def label_metrics(labels: Sequence, clusters: Sequence) -> dict[str, float]:
    """Return the metrics of summary.csv by name: accuracies, normalised mutual information, adjusted Rand index.

    Args:
        labels: (N,), the true label of each sample.
        clusters: (N,), the cluster of each sample.

    Returns:
        "acc", see `cluster_accuracy`; "acc_many", see `many_to_one_accuracy`; "nmi" and "ari". Empty if a label is
        −1, which is none.

    Raises:
        ValueError: the two differ in length, are empty, or have more than one dimension.
    """
    labels, clusters = _checked(labels, clusters)
    if labels.dtype.kind in "if" and (labels < 0).any():
        return {}
    return {
        "acc": cluster_accuracy(labels, clusters),
        "acc_many": many_to_one_accuracy(labels, clusters),
        "nmi": normalized_mutual_info_score(labels, clusters),
        "ari": adjusted_rand_score(labels, clusters),
    }


def cluster_accuracy(labels: Sequence, clusters: Sequence) -> float:
    """Return the share of samples whose cluster matches their label, in the best one-to-one matching (§4.5.2).

    Args:
        labels: (N,), the true label of each sample.
        clusters: (N,), the cluster of each sample; there may be more or fewer clusters than labels.

    Returns:
        the accuracy, from 0 to 1.

    Raises:
        ValueError: the two differ in length, are empty, or have more than one dimension.
    """
    counts = _counts(labels, clusters)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels))


def many_to_one_accuracy(labels: Sequence, clusters: Sequence) -> float:
    """Return the purity of a clustering: the share of samples with the most frequent label of their cluster.

    It is at least `cluster_accuracy`, and grows with the number of clusters: a metric for over-clustering.

    Args:
        labels: (N,), the true label of each sample.
        clusters: (N,), the cluster of each sample.

    Returns:
        the accuracy, from 0 to 1.

    Raises:
        ValueError: the two differ in length, are empty, or have more than one dimension.
    """
    return float(_counts(labels, clusters).max(0).sum() / len(labels))


def mutual_information(joint: Tensor) -> Tensor:
    """Return the mutual information I(z, z') of two variables, (), in nats.

    Args:
        joint: (K, K'), their joint distribution, with sum 1.
    """
    joint = joint.clamp(min=torch.finfo(joint.dtype).tiny)
    return (joint * (joint.log() - joint.sum(0).log() - joint.sum(1, keepdim=True).log())).sum()


def _counts(labels: Sequence, clusters: Sequence) -> np.ndarray:
    return contingency_matrix(*_checked(labels, clusters))


def _checked(labels: Sequence, clusters: Sequence) -> tuple[np.ndarray, np.ndarray]:
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    for name, value in (("labels", labels), ("clusters", clusters)):
        if value.ndim != 1:
            raise ValueError(f"{name} has the shape {value.shape}; it must have one number or name a sample: (N,)")
    check_consistent_length(labels, clusters)
    if len(labels) == 0:
        raise ValueError("labels are empty; there must be at least one sample")
    return labels, clusters
