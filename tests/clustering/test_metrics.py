import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch.nn.functional import one_hot

from fastroute.clustering import cluster_accuracy
from fastroute.clustering.metrics import label_metrics, many_to_one_accuracy, mutual_information


def test_the_best_matching_counts():
    assert cluster_accuracy([0, 0, 1, 1, 2], [5, 5, 3, 3, 0]) == 1
    assert cluster_accuracy([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 0]) == pytest.approx(4 / 6)


def test_other_numbers_of_clusters_than_labels():
    assert cluster_accuracy([0, 0, 1, 1], [0, 0, 0, 0]) == 0.5  # one cluster is matched to one label
    assert cluster_accuracy([0, 0, 1, 1], [0, 1, 2, 3]) == 0.5  # and so each of two


def test_many_clusters_to_a_label():
    assert many_to_one_accuracy([0, 0, 1, 1], [0, 1, 2, 3]) == 1
    assert many_to_one_accuracy([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]) == pytest.approx(5 / 6)
    assert many_to_one_accuracy([0, 0, 1], [4, 4, 4]) == pytest.approx(2 / 3)


def test_accepts_names_as_labels():
    assert cluster_accuracy(["ant", "bee", "bee"], [1, 0, 0]) == 1
    assert label_metrics(["ant", "bee", "bee"], [1, 0, 0]) == {"acc": 1, "acc_many": 1, "nmi": 1, "ari": 1}
    assert label_metrics([0, -1, 1], [1, 0, 0]) == {}


@pytest.mark.parametrize(("labels", "clusters"), [([0, 1], [0]), ([], [])])
def test_bad_input(labels, clusters):
    with pytest.raises(ValueError, match=r"inconsistent|empty"):
        label_metrics([-1] * len(labels), clusters)
    with pytest.raises(ValueError, match=r"inconsistent|empty"):
        cluster_accuracy(labels, clusters)


@pytest.mark.parametrize("metric", [cluster_accuracy, many_to_one_accuracy, label_metrics])
def test_labels_of_two_dimensions_are_refused(metric):
    with pytest.raises(ValueError, match=r"labels has the shape \(2, 1\); it must have one number or name a sample"):
        metric([[0], [1]], [0, 1])
    with pytest.raises(ValueError, match=r"clusters has the shape \(1, 2\)"):
        metric([0, 1], [[0, 1]])


def test_mutual_information_matches_scikit_learn():
    z, w = torch.tensor([0, 0, 1, 1, 2, 0, 1]), torch.tensor([1, 1, 0, 2, 2, 1, 0])
    joint = one_hot(z).float().T @ one_hot(w).float() / len(z)
    assert mutual_information(joint).item() == pytest.approx(mutual_info_score(z, w))


def test_no_label_as_a_float_is_none():
    assert label_metrics(np.array([0.0, -1.0, 1.0]), [1, 0, 0]) == {}


def test_each_metric_has_its_own_name():
    found = label_metrics([0, 0, 1, 1], [0, 1, 2, 2])
    assert found == pytest.approx({"acc": 0.75, "acc_many": 1, "nmi": 0.8, "ari": 4 / 7})
