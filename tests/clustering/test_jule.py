import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs, make_circles
from sklearn.metrics import adjusted_rand_score
from torch import nn

from fastroute._methods import METHODS
from fastroute.clustering import jule
from fastroute.clustering.jule import JULE, first_clusters, merged, neighbor_graph, path_weights, weighted_triplet_loss
from fastroute.clustering.run import Batches
from tests.clustering.test_two_fold import digits, trainer_of


def points(count=60):
    return np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)


def test_the_graph_has_the_nearest_neighbours():
    x = points()
    graph, nearest = neighbor_graph(x, 5)
    square = ((x[:, None] - x) ** 2).sum(-1)
    np.fill_diagonal(square, np.inf)
    expected = np.zeros_like(square)
    rows, places = np.arange(60)[:, None], square.argsort(1)[:, :5]
    found = square[rows, places]
    expected[rows, places] = np.exp(-found / found.mean())
    np.testing.assert_allclose(graph.toarray(), expected, rtol=1e-4)
    assert (nearest == places[:, 0]).all()
    labels = first_clusters(nearest)
    assert (labels[nearest] == labels).all() and 5 < labels.max() + 1 < 30


def test_path_weights_by_their_sum():
    graph, nearest = neighbor_graph(points(), 5)
    labels = first_clusters(nearest)
    dense, found = graph.toarray(), path_weights(graph, labels)
    for a in range(labels.max() + 1):
        for b in range(labels.max() + 1):
            part = dense[np.ix_(labels == a, labels == b)] @ dense[np.ix_(labels == b, labels == a)]
            assert found[a, b] == pytest.approx(0 if a == b else part.sum(), rel=1e-5)


@pytest.mark.parametrize("rivals", [1, 4])
def test_the_clusters_of_the_greatest_affinity_merge_first(rivals):
    graph, nearest = neighbor_graph(points(150), 8)
    labels = first_clusters(nearest)
    left, count = labels.copy(), labels.max() + 1
    weights, sizes = path_weights(graph, labels).astype(float), np.bincount(labels).astype(float)
    for _ in range(count - 8):  # as written, without what makes it fast
        affinity = weights / sizes[:, None] ** 2
        affinity = affinity + affinity.T
        top = -np.sort(-affinity, 0)
        scores = top[0] + (sum(top[0] - top[k] for k in range(1, rivals)) / max(1, rivals - 1))
        scores[top[0] == 0] = -np.inf
        a = scores.argmax()
        a, b = sorted((a, affinity[a].argmax()))
        for axis in (weights, weights.T):
            axis[a] += axis[b]
            axis[b] = 0
        weights[a, a], sizes[a] = 0, sizes[a] + sizes[b]
        left[left == b] = a
    found = jule._merged(path_weights(graph, labels), labels, 8, rivals)
    assert adjusted_rand_score(found, left) == 1 and set(found) == set(range(8))


def test_rings_are_told_apart_by_their_graph():
    x, y = make_circles(400, factor=0.4, noise=0.03, random_state=0)
    graph, nearest = neighbor_graph(x)
    assert adjusted_rand_score(merged(graph, first_clusters(nearest), 2, x), y) == 1


def test_clusters_that_nothing_connects_merge_by_their_means():
    x, y = make_blobs([30] * 4, centers=[[0, 0], [50, 0], [1000, 0], [1050, 0]], random_state=0)
    graph, nearest = neighbor_graph(x, 5)
    found = merged(graph, first_clusters(nearest), 2, x)
    assert adjusted_rand_score(found, y // 2) == 1


def test_triplets_of_a_cluster_and_any_other():
    features, labels = torch.tensor([[0.0], [0.5], [2.0], [0.6]]), torch.tensor([0, 0, 1, 1])
    # (0, 1): 0.25 − 4 + 1 < 0 and 0.25 − 0.36 + 1. (2, 3): 1.96 − 4 + 1 < 0 and 1.96 − 2.25 + 1.
    loss = weighted_triplet_loss(features, labels, 20, 1.0)
    torch.testing.assert_close(loss, torch.tensor((0.89 + 0.71) / 4))
    torch.testing.assert_close(weighted_triplet_loss(features, labels, 2, 1.0), loss)
    seen = {round(weighted_triplet_loss(features, labels, 1, 1.0).item(), 3) for _ in range(40)}
    assert seen == {0.0, 0.445, 0.355, 0.8}  # the others are drawn
    lonely = features.clone().requires_grad_()
    weighted_triplet_loss(lonely, torch.arange(4), 20, 1.0).backward()
    assert (lonely.grad == 0).all()
    assert weighted_triplet_loss(features, torch.zeros(4), 20, 1.0) == 0


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_clusters_merge_at_the_start_of_a_period(share):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
    module, seen, rates = JULE(network, 8, 3, epochs=6), [], []
    module.KEPT = share
    images, labels = digits(150)
    real = module.on_train_epoch_start

    def watch():
        real()
        seen.append(module.kept["labels"].clone())
        rates.append(module.trainer.optimizers[0].param_groups[0]["lr"])

    module.on_train_epoch_start = watch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer_of(8).fit(module, Batches(images, labels, 50, 0), Batches(images, labels, 64))
    counts = [len(found.unique()) for found in seen]
    assert counts[0] == counts[1] > 30 and counts[2] == counts[3] == int(share * counts[0])
    last = max(3, int(share * counts[2]))  # not below K
    assert counts[4:] == [last] * 4  # epochs beyond the schedule keep them
    for part in seen[2].unique():  # a cluster stays whole
        assert len(seen[4][seen[2] == part].unique()) == 1
    assert rates[3] == pytest.approx(0.01 * (1 + 1e-4 * 9) ** -0.75)


def test_the_nearest_part_tells_the_cluster():
    torch.manual_seed(0)
    module = JULE(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), 8, 3, epochs=1)
    images, labels = digits(150)
    trainer_of(1).fit(module, Batches(images, labels, 50, 0), Batches(images, labels, 64))
    features = module.features(images).detach()
    graph, nearest = neighbor_graph(features.numpy())
    parts = merged(graph, first_clusters(nearest), 30, features.numpy())
    whole = merged(graph, parts, 3, features.numpy())
    posterior = module(images)
    assert adjusted_rand_score(posterior.argmax(1), whole) > 0.9
    for part in range(30):
        torch.testing.assert_close(module.centers[part], features[parts == part].mean(0))
    distances = torch.cdist(features, module.centers).square()
    cluster = module.owners[distances.argmin(1)]
    assert (posterior.argmax(1) == cluster).all()
    rows = torch.arange(150)
    expected = -distances.min(1).values / (2 * module.variance)
    torch.testing.assert_close(module.responses(images)[rows, cluster], expected, rtol=1e-3, atol=1e-3)


def test_bad_input(monkeypatch):
    for name, options in (("epochs", {"epochs": 0}), ("lr", {"epochs": 1, "lr": 0})):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be greater than 0"):
            JULE(nn.Linear(2, 3), 3, 3, **options)
    monkeypatch.setitem(METHODS, "jule", METHODS["jule"]._replace(most=100))
    images, labels = digits(120)
    module = JULE(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), 8, 3, epochs=1)
    with pytest.raises(ValueError, match="images are 120; the method 'jule' takes at most 100"):
        trainer_of(1).fit(module, Batches(images, labels, 50, 0), Batches(images, labels, 64))


def test_triplets_are_drawn_in_parts_of_bounded_size(monkeypatch):
    torch.manual_seed(0)
    features, labels = torch.randn(12, 3), torch.arange(12) % 2
    whole = weighted_triplet_loss(features, labels, 12, 0.2)  # all of the others are drawn
    monkeypatch.setattr(jule, "MAX_DRAWS", 30)
    torch.testing.assert_close(weighted_triplet_loss(features, labels, 12, 0.2), whole)
    assert weighted_triplet_loss(features, torch.arange(12), 2, 0.2) == 0


def test_the_lead_is_the_mean_over_the_other_rivals():
    weights = np.zeros((5, 5), np.float32)
    weights[:2, :2] = 0.5 * (1 - np.eye(2))  # an affinity of 1, with a lead of 1
    weights[2:, 2:] = 0.85 * (1 - np.eye(3))  # affinities of 1.7, without a lead
    labels = jule._merged(weights, np.arange(5), 4, 2)
    assert labels[0] == labels[1] and len(set(labels)) == 4
