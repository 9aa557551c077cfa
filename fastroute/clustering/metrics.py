"""How well clusters match labels that they were found without."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics.cluster import contingency_matrix
from sklearn.utils import check_consistent_length


def cluster_accuracy(labels: Sequence, clusters: Sequence) -> float:
    """The share of samples whose cluster is matched to their label, in the best one-to-one matching (§4.5.2).

    Args:
        labels: the true label of each sample.
        clusters: the cluster of each sample; there may be more or fewer clusters than labels.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    check_consistent_length(labels, clusters)
    if len(labels) == 0:
        raise ValueError("labels are empty; there must be at least one sample")
    counts = contingency_matrix(np.asarray(labels), np.asarray(clusters))
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels))
