"""Densities of clusters, and layers that only one cluster has."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from fastroute.clustering import NeuralMixture, cluster_accuracy
from fastroute.clustering._densities import DensityEMLoss, em_loss, log_density
from fastroute.clustering.networks import ExclusiveLinear
from fastroute.nn import MixtureEMLoss
from tests.clustering.test_neural_mixture import blobs


@pytest.mark.parametrize("prior", [None, "learned"])
def test_the_gaussian_density_follows_the_equations(prior):
    torch.manual_seed(0)
    scores, augmented = torch.randn(2, 40, 3, dtype=torch.float64) * 3 + 1
    prior = None if prior is None else torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    loss, posterior = em_loss("gaussian", 5.0)(scores.requires_grad_(), augmented, prior)

    def h(a):
        return (-((a - 10) ** 2) / 50).exp()

    normal, other = ((a - a.mean(0)) / a.std(0, correction=0) for a in (scores, augmented))
    weights = torch.ones(3) if prior is None else prior
    p = (weights * normal.exp()).detach()
    p = p / p.sum(1, keepdim=True)
    expected = -(p * ((weights * h(normal)).log() + (weights * h(other)).log())).sum(1).mean()
    torch.testing.assert_close((loss, posterior), (expected, p))
    torch.testing.assert_close(torch.autograd.grad(loss, scores), torch.autograd.grad(expected, scores))


def test_the_loss_of_the_sigmoid_is_that_of_the_operator():
    torch.manual_seed(0)
    scores, augmented, prior = torch.randn(40, 3), torch.randn(40, 3), torch.tensor([0.2, 0.3, 0.5])
    torch.testing.assert_close(
        DensityEMLoss("sigmoid", 5.0)(scores, augmented, prior), MixtureEMLoss(5.0)(scores, augmented, prior)
    )


@pytest.mark.parametrize("options", [{"density": "gaussian"}, {"exclusive_layers": 2}], ids=str)
def test_other_densities_and_exclusive_layers_find_blobs(options):
    X, y = blobs()
    model = NeuralMixture(3, n_init=1, epochs=12, random_state=0, **options).fit(X)
    assert cluster_accuracy(y, model.labels_) > 0.98
    assert model.score(X) == pytest.approx(-model.loss_)
    density = options.get("density", "sigmoid")
    joint = log_density(torch.from_numpy(model.transform(X)), density, 5.0).numpy()
    np.testing.assert_allclose((model.predict_proba(X) * joint).sum(1), model.score_samples(X), rtol=1e-4)
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(X), model.labels_)


def test_exclusive_layers_see_one_cluster():
    X, _ = blobs()
    network = NeuralMixture(3, hidden=(8, 4), n_init=1, epochs=1, exclusive_layers=2).fit(X).network_
    assert [type(layer) for layer in network][::2] == [nn.Linear, ExclusiveLinear, ExclusiveLinear]
    x = torch.randn(5, 2)
    shared, *_ = network
    for k in range(3):
        y = torch.relu(shared(x))
        for layer in (network[2], network[4]):
            y = y @ layer.weight[k].T + layer.bias[k]
            y = torch.relu(y) if layer is network[2] else y
        torch.testing.assert_close(network(x)[:, k : k + 1], y)
    alone = NeuralMixture(3, hidden=(8, 4), n_init=1, epochs=1, exclusive_layers=3).fit(X).network_
    assert not any(isinstance(layer, nn.Linear) for layer in alone) and alone(x).shape == (5, 3)
