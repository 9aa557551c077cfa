"""Fits of `NeuralMixture` that diverge, and what it refuses."""

import copy
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from fastroute.clustering import NeuralMixture, cluster_accuracy
from tests.clustering.test_neural_mixture import blobs


def test_a_run_that_diverges_is_not_kept():
    X = blobs()[0]
    broken = nn.Sequential(nn.Linear(X.shape[1], 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.constant_(broken[2].weight, float("nan"))
    kept = NeuralMixture(3, network=broken, epochs=3, n_init=3, random_state=0).fit(X)  # later runs draw new weights
    assert np.isfinite(kept.loss_) and len(np.unique(kept.labels_)) == 3
    for fit in ("fit", "partial_fit"):
        with pytest.raises(ValueError, match=r"training diverged: .* lower learning_rate"):
            getattr(NeuralMixture(3, network=broken, epochs=1, n_init=1, random_state=0), fit)(X)
    model = NeuralMixture(3, warm_start=True, epochs=1, random_state=0).fit(X)
    for parameter in model._model.network.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"training diverged: .* lower learning_rate"):
        model.fit(X)


@pytest.mark.parametrize("options", [{}, {"prior": "learned"}, {"prior": "learned", "emerging": True}])
def test_a_part_that_is_refused_changes_nothing(options):
    X = blobs()[0]
    model = NeuralMixture(3, random_state=0, **options).partial_fit(X)
    before = model.predict_proba(X)
    with pytest.raises(ValueError, match="X has 1 sample; there must be at least 2"):
        model.partial_fit(X[:1])
    assert np.array_equal(model.predict_proba(X), before)
    model = NeuralMixture(3, network=nn.Linear(X.shape[1], 5), random_state=0)
    with pytest.raises(ValueError, match="network gives"):
        model.partial_fit(X)
    model.set_params(network=None).partial_fit(X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": True}, "n_clusters is True; it must be an integer"),
        ({"n_init": True}, "n_init is True"),
        ({"hidden": (True,)}, "hidden is"),
        ({"exclusive_layers": True}, "exclusive_layers is True"),
        ({"device": "gpu"}, "device is 'gpu'; it must be one of PyTorch's"),
        ({"device": "meta"}, "device is 'meta'; it must be one of PyTorch's"),
        ({"device": None}, "device is 'None'; it must be one of PyTorch's"),
        ({"device": "hpu"}, "device is 'hpu'; PyTorch cannot use it here"),
        ({"network": nn.Identity()}, "network has no parameter that requires gradients"),
        ({"network": nn.Linear(2, 3).requires_grad_(False)}, "network has no parameter that requires gradients"),
        ({"network": nn.LSTM(2, 3)}, "network returns a tuple; it must return scores"),
    ],
)
def test_bad_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        NeuralMixture(**{"n_clusters": 3, "epochs": 1, "random_state": 0} | options).fit(blobs()[0])


def test_samples_of_another_shape_are_refused():
    images = np.random.default_rng(0).random((20, 1, 4, 4), np.float32)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 2))
    model = NeuralMixture(2, network=network, epochs=1, n_init=1, random_state=0).fit(images)
    for call in (model.predict, model.partial_fit):
        with pytest.raises(ValueError, match=r"X has samples of the shape \(1, 8, 8\); fit had \(1, 4, 4\)"):
            call(np.zeros((5, 1, 8, 8), np.float32))


def test_weights_may_be_huge():
    X = blobs()[0]
    options = {"n_clusters": 3, "epochs": 1, "n_init": 1, "random_state": 0}
    weights = np.arange(len(X)) % 2 + 1.0
    expected = NeuralMixture(**options).fit(X, sample_weight=weights)
    found = NeuralMixture(**options).fit(X, sample_weight=0.5e308 * weights)
    assert found.loss_ == expected.loss_


def test_equal_weights_change_nothing():
    X = blobs()[0]
    options = {"n_clusters": 3, "epochs": 1, "n_init": 1, "random_state": 0}
    expected = NeuralMixture(**options).fit(X).predict_proba(X)
    for weight in (1, 3):
        found = NeuralMixture(**options).fit(X, sample_weight=np.full(len(X), weight))
        assert np.array_equal(found.predict_proba(X), expected)


def dropout_network(features):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_a_network_with_dropout_is_repeatable_and_leaves_the_global_generator(init):
    X = blobs()[0]
    model = NeuralMixture(3, network=dropout_network(X.shape[1]), init=init, epochs=2, n_init=1, random_state=0)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.rand(3)
        torch.manual_seed(seed)
        found.append(copy.deepcopy(model).fit(X).predict_proba(X))
        assert torch.equal(torch.rand(3), expected)
    assert np.array_equal(*found)
    without = NeuralMixture(
        3, network=dropout_network(X.shape[1]).eval(), init=init, epochs=2, n_init=1, random_state=0
    )
    assert np.array_equal(without.fit(X).predict_proba(X), found[0]), "dropout is at work in training"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_fits_where_gradients_are_off(context):
    X = blobs()[0]
    options = {"n_clusters": 3, "epochs": 2, "n_init": 1, "prior": "learned", "random_state": 0}
    expected = NeuralMixture(**options).fit(X).predict_proba(X)
    with context():
        found = NeuralMixture(**options).fit(X).predict_proba(X)
    assert np.array_equal(found, expected)


def test_options_changed_after_a_fit_count_in_the_next_training():
    X = blobs()[0]
    options = {"n_clusters": 3, "epochs": 1, "n_init": 1, "random_state": 0}
    model = NeuralMixture(**options, warm_start=True).fit(X)
    scores = model.score_samples(X)
    model.set_params(gamma=2.0, density="gaussian", learning_rate=1e-9, noise=0.0)
    assert np.array_equal(model.score_samples(X), scores), "what was fitted"
    before = [p.clone() for p in model.network_.parameters()]
    model.fit(X)
    for old, new in zip(before, model.network_.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-6)
    assert not np.allclose(model.score_samples(X), scores)


@pytest.mark.parametrize(
    "changed",
    [
        {"n_clusters": 4},
        {"network": torch.nn.Linear(2, 3)},
        {"hidden": (16,)},
        {"exclusive_layers": 2},
        {"prior": "learned"},
        {"prior": [0.2, 0.3, 0.5]},
        {"standardize": False},
        {"device": torch.device("cpu", 0)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_a_network_was_built_with_cannot_change(changed):
    X = blobs()[0]
    model = NeuralMixture(3, hidden=(8,), random_state=0, epochs=1, n_init=1, warm_start=True).fit(X)
    expected = model.score(X)
    [name] = changed
    model.set_params(**changed)
    for train in (model.fit, model.partial_fit):
        with pytest.raises(ValueError, match=f"{name} is .* set it back to"):
            train(X)
    assert model.score(X) == expected
    same = {"n_clusters": 3, "network": None, "hidden": [8], "exclusive_layers": 1, "prior": "even"}
    model.set_params(**same, standardize=True, device=torch.device("cpu")).fit(X).partial_fit(X)
    assert model.n_iter_ == 3


@pytest.mark.parametrize(
    "changed", [{"gamma": 0.0}, {"learning_rate": -0.1}, {"density": "foo"}, {"batch_size": 0}, {"learning_rate": "a"}]
)
def test_a_part_with_bad_options_changes_nothing(changed):
    X = blobs()[0]
    model = NeuralMixture(3, random_state=0, epochs=1, n_init=1).fit(X)
    expected = model.score(X)
    [name] = changed
    with pytest.raises(ValueError, match=f"{name} is"):
        model.set_params(**changed).partial_fit(X)
    assert model.score(X) == expected


@pytest.mark.parametrize("options", [{}, {"prior": "learned", "emerging": True}, {"network": nn.Linear(2, 3)}])
@pytest.mark.parametrize("train", ["fit", "partial_fit"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_training_that_ends_early_changes_nothing(monkeypatch, options, train, error):
    X, _ = blobs()
    model = NeuralMixture(3, epochs=2, n_init=1, warm_start=True, batch_size=50, random_state=0, **options)
    model.fit(X).partial_fit(X)
    before = {name: copy.deepcopy(getattr(model, name)) for name in ("n_iter_", "loss_", "labels_", "priors_")}
    posterior, steps = model.predict_proba(X), iter([True])
    step = type(model._model)._step

    def stop(self, loss):
        if not next(steps, False):
            raise KeyboardInterrupt
        step(self, loss)

    with monkeypatch.context() as patch:
        if error is KeyboardInterrupt:
            patch.setattr(type(model._model), "_step", stop)
        else:
            model.set_params(learning_rate=1e308)
        with pytest.raises(error):
            getattr(model, train)(X + 50)
    assert np.array_equal(model.predict_proba(X), posterior)
    for name, value in before.items():
        assert np.array_equal(getattr(model, name), value), name
    model.set_params(learning_rate=1e-3)
    assert np.isfinite(getattr(model, train)(X).loss_)


class Mixture(NeuralMixture):
    """With fewer parameters than its base."""

    def __init__(self, n_clusters=3, random_state=None):
        super().__init__(n_clusters, random_state=random_state, epochs=2, n_init=1)


def test_subclasses_with_parameters_of_their_own():
    X, y = blobs()
    assert cluster_accuracy(y, Mixture(random_state=0).fit(X).partial_fit(X).predict(X)) > 0.9


def test_networks_for_images_of_any_size_without_standardisation():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    images = np.random.default_rng(0).random((30, 1, 8, 8), np.float32)
    model = NeuralMixture(2, network=network, standardize=False, epochs=1, n_init=1, random_state=0).fit(images)
    assert model.predict(np.zeros((5, 1, 12, 12), np.float32)).shape == (5,)


def test_warnings_are_at_the_call_of_the_user():
    X = np.repeat(np.eye(2), 20, 0)
    for name in ("fit", "partial_fit"):
        with pytest.warns(ConvergenceWarning) as found:
            getattr(NeuralMixture(6, epochs=1, n_init=1, random_state=0), name)(X)
        assert found[0].filename == __file__


def test_the_draws_of_a_gpu_stay(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model = NeuralMixture(3, epochs=1, n_init=1, random_state=0).fit(blobs()[0])
    seeded.clear()
    model.partial_fit(blobs()[0])
    assert not seeded


class KeepsItsForward(nn.Module):
    """Keeps a tensor of its forward, as of an auxiliary loss, so that it cannot be copied."""

    def __init__(self, features):
        super().__init__()
        self.layer = nn.Linear(features, 3)

    def forward(self, x):
        self.aux = self.layer(x)
        return self.aux


def test_networks_that_cannot_be_copied_are_trained_on():
    X = blobs()[0]
    model = NeuralMixture(3, network=KeepsItsForward(X.shape[1]), epochs=1, n_init=1, random_state=0).partial_fit(X)
    assert model.partial_fit(X).n_iter_ == 2


def test_the_network_stays_the_same_object():
    X = blobs()[0]
    model = NeuralMixture(3, epochs=1, n_init=1, random_state=0, warm_start=True).partial_fit(X)
    network = model.network_
    assert model.partial_fit(X).network_ is network and model.fit(X).network_ is network


def test_a_warning_that_is_an_error_undoes_the_whole_part(monkeypatch):
    X = blobs()[0]
    model = NeuralMixture(3, prior="learned", epochs=1, n_init=1, random_state=0).partial_fit(X)
    before = model.priors_.copy(), model.predict_proba(X)
    monkeypatch.setattr("numpy.unique", lambda labels: labels[:1])  # as if all others were empty
    with warnings.catch_warnings(), pytest.raises(ConvergenceWarning):
        warnings.simplefilter("error")
        model.partial_fit(X)
    assert model.n_iter_ == 1
    for found, expected in zip((model.priors_, model.predict_proba(X)), before, strict=True):
        np.testing.assert_array_equal(found, expected)
