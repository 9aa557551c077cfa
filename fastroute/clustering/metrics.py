"""How well clusters match labels that they were found without."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.utils import check_consistent_length
from torch import Tensor


def label_metrics(labels: Sequence, clusters: Sequence) -> dict[str, float]:
    """`cluster_accuracy`, `many_to_one_accuracy`, normalised mutual information and adjusted Rand index, by the names
    of summary.csv; nothing where samples have no labels, which is −1."""
    if len(labels) and min(labels) < 0:
        return {}
    return {
        "acc": cluster_accuracy(labels, clusters),
        "acc_many": many_to_one_accuracy(labels, clusters),
        "nmi": normalized_mutual_info_score(labels, clusters),
        "ari": adjusted_rand_score(labels, clusters),
    }


def cluster_accuracy(labels: Sequence, clusters: Sequence) -> float:
    """The share of samples whose cluster is matched to their label, in the best one-to-one matching (§4.5.2).

    Args:
        labels: the true label of each sample.
        clusters: the cluster of each sample; there may be more or fewer clusters than labels.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    counts = _counts(labels, clusters)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels))


def many_to_one_accuracy(labels: Sequence, clusters: Sequence) -> float:
    """The share of samples that have the most frequent label of their cluster: what over-clustering is judged by.

    Arguments and errors are those of `cluster_accuracy`, than which it is never lower: it grows with the clusters.
    """
    return float(_counts(labels, clusters).max(0).sum() / len(labels))


def mutual_information(joint: Tensor) -> Tensor:
    """I(z, z') in nats, (), from the joint distribution (K, K') of two variables, with sum 1."""
    joint = joint.clamp(min=torch.finfo(joint.dtype).tiny)
    return (joint * (joint.log() - joint.sum(0).log() - joint.sum(1, keepdim=True).log())).sum()


def _counts(labels: Sequence, clusters: Sequence) -> np.ndarray:
    check_consistent_length(labels, clusters)
    if len(labels) == 0:
        raise ValueError("labels are empty; there must be at least one sample")
    return contingency_matrix(np.asarray(labels), np.asarray(clusters))
