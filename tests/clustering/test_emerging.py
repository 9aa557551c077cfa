"""Clusters that come and go in a stream."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from torch import nn

from fastroute.clustering import NeuralMixture, _emerging, cluster_accuracy
from fastroute.clustering._emerging import PATIENCE, SETTLED, Places
from fastroute.clustering._mixture_model import grow
from fastroute.clustering.networks import ExclusiveLinear

CENTERS = [[0, 0], [8, 0], [0, 8], [8, 8]]


def part(groups, seed, size=300):
    """Return some samples of groups, in the plane."""
    X, y = make_blobs(size, centers=[CENTERS[k] for k in groups], random_state=seed)
    return X.astype(np.float32), np.array(groups)[y]


def stream(model, groups, parts, seed=0):
    for i in range(parts):
        model.partial_fit(part(groups, 100 * seed + i)[0])
    X, y = part(groups, 100 * seed + 99)
    return model.n_clusters_, cluster_accuracy(y, model.predict(X))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # before a cluster goes, it is empty
@pytest.mark.parametrize("options", [{}, {"exclusive_layers": 2}], ids=str)
def test_clusters_come_and_go(options):
    model = NeuralMixture(3, prior="learned", emerging=True, random_state=0, hidden=(64, 64), **options)
    assert stream(model, [0, 1, 2], 12) >= (3, 0.98)
    assert model.n_clusters_ == 3, "a stream that stays the same"
    clusters, accuracy = stream(model, [0, 1, 2, 3], 2, seed=1)
    assert clusters == 4 and accuracy > 0.98 and len(model.get_feature_names_out()) == 4
    assert model.priors_.sum() == pytest.approx(1) and model.priors_.min() > 0.1
    assert model.predict_proba(part([0, 1, 2, 3], 5)[0]).shape == (300, 4)
    model = pickle.loads(pickle.dumps(model))
    stream(model, [0, 1, 2, 3], 10, seed=2)
    clusters, accuracy = stream(model, [1, 2, 3], PATIENCE + 2, seed=3)
    assert clusters == 3 and accuracy > 0.98
    clusters, accuracy = stream(model, [0, 1, 2, 3], 2, seed=4)
    assert clusters == 4 and accuracy > 0.98 and len(model._model.clusters) == 4, "in the place of the one that went"


def test_nothing_emerges_unless_asked():
    model = NeuralMixture(3, prior="learned", random_state=0, hidden=(16,))
    stream(model, [0, 1, 2], 3)
    assert stream(model, [0, 1, 2, 3], 2, seed=1)[0] == 3 and model._model.places is None


def test_few_or_scattered_samples_are_no_cluster():
    random = np.random.default_rng(0)
    x = torch.from_numpy(np.concatenate([random.normal(size=(200, 2)), random.normal(size=(200, 2)) + 12]))
    places = Places(2, 2, x[0, 0])
    places.follow(x, torch.arange(400) // 200, torch.ones(400))
    group = torch.from_numpy(random.normal(loc=[0, 20], size=(30, 2)))
    scattered = torch.from_numpy(random.uniform(-1, 1, (60, 2)) * 200) + 500

    def strangers(*parts):
        return places.strangers(torch.cat(parts), torch.ones(sum(map(len, parts))))

    assert strangers(x) == []
    assert strangers(x, group[:9]) == []
    assert strangers(x, scattered) == []
    (found,) = strangers(x, scattered, group)
    assert set(found.tolist()) == set(range(460, 490))
    both = strangers(x, group[:20], group + 50)
    assert [len(found) for found in both] == [30, 20]


def test_a_weight_is_that_of_repeated_samples():
    random = np.random.default_rng(0)
    x = torch.from_numpy(np.concatenate([random.normal(size=(200, 2)), random.normal(size=(200, 2)) + 12]))
    labels, weight = torch.arange(400) // 200, torch.from_numpy(random.integers(1, 4, 400))
    places, repeated = (Places(2, 2, x[0, 0]) for _ in range(2))
    places.follow(x, labels, weight)
    repeated.follow(x.repeat_interleave(weight, 0), labels.repeat_interleave(weight), torch.ones(int(weight.sum())))
    for name, value in vars(repeated).items():
        torch.testing.assert_close(getattr(places, name), value, rtol=1e-9, atol=0)
    group = torch.from_numpy(random.normal(loc=[0, 20], size=(12, 2)))
    many = torch.cat([x, group])
    assert places.strangers(many, torch.cat([torch.ones(400), torch.full((12,), 0.1)])) == []
    (found,) = places.strangers(many, torch.ones(412))
    assert found.tolist() == list(range(400, 412))
    one = torch.cat([x, group[:1]])
    assert places.strangers(one, torch.cat([torch.ones(400), torch.full((1,), 40.0)])) == [], "no group"


def test_samples_of_weight_zero_are_no_cluster():
    options = {"prior": "learned", "emerging": True, "random_state": 0, "hidden": (64, 64)}
    counted, left_out = NeuralMixture(3, **options), NeuralMixture(3, **options)
    for model in (counted, left_out):
        stream(model, [0, 1, 2], 6)
    for i in range(2):
        X, y = part([0, 1, 2, 3], 200 + i)
        counted.partial_fit(X, sample_weight=np.ones(len(X)))
        left_out.partial_fit(X, sample_weight=(y != 3).astype(float))
    assert (counted.n_clusters_, left_out.n_clusters_) == (4, 3)


def test_a_cluster_runs_dry_after_several_parts():
    random = np.random.default_rng(0)
    x = torch.from_numpy(np.concatenate([random.normal(size=(50, 2)), random.normal(size=(50, 2)) + 12]))
    places = Places(2, 2, x[0, 0])
    places.follow(x, torch.arange(100) // 50, torch.ones(100))
    for _ in range(PATIENCE - 1):
        assert places.dry(x[:50]) == []
    assert places.dry(x) == []
    for _ in range(PATIENCE - 1):
        assert places.dry(x[:50]) == []
    assert places.dry(x[:50]) == [1] and places.dry(x[:50]) == []


def test_networks_of_ones_own_get_another_output():
    torch.manual_seed(0)  # or all hidden units of a sample may be 0, and nothing changes for it
    draw = torch.Generator().manual_seed(0)
    network, x = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)), torch.randn(5, 2)
    before = network(x)
    grow(network, 3, draw)
    after = network(x)
    assert network[2].out_features == 4
    torch.testing.assert_close(after[:, :3], before)
    grow(network, 1, draw)
    changed = network(x) != after
    assert changed[:, 1].all() and not changed[:, [0, 2, 3]].any()
    grow(layer := ExclusiveLinear(3, 2, 4), 3, draw)
    assert layer(x).shape == (5, 4, 4)
    with pytest.raises(ValueError, match=r"network does not end in a torch.nn.Linear; with emerging=True it must"):
        grow(nn.Sequential(nn.Linear(2, 1), nn.Conv1d(1, 3, 1)), 3, draw)


@pytest.mark.parametrize("last", [nn.BatchNorm1d(2), nn.LayerNorm(2), nn.Softplus()])
def test_networks_that_cannot_grow_are_refused_at_once(last):
    X = torch.randn(100, 2).numpy()
    network = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2), last)
    model = NeuralMixture(2, network=network, prior="learned", emerging=True, random_state=0)
    with pytest.raises(ValueError, match=r"network does not end in a torch.nn.Linear; with emerging=True it must"):
        model.partial_fit(X)
    model.set_params(emerging=False).partial_fit(X)
    expected = model.predict_proba(X)
    with pytest.raises(ValueError, match=r"network does not end in a torch.nn.Linear; with emerging=True it must"):
        model.set_params(emerging=True).partial_fit(X)
    assert (model.predict_proba(X) == expected).all()


def test_a_warm_start_goes_on_with_the_clusters_that_emerged():
    model = NeuralMixture(
        2, prior="learned", emerging=True, warm_start=True, epochs=1, batch_size=50, random_state=0, hidden=(64, 64)
    )
    stream(model, [0, 3], 6)
    stream(model, [0, 1, 3], 2, seed=1)
    assert model.n_clusters_ == 3
    assert model.fit(part([0, 1, 3], 5)[0]).n_clusters_ == 3


def test_many_strangers_are_compared_with_a_part_of_them(monkeypatch):
    X = torch.cat([torch.randn(2000, 2), torch.randn(3000, 2) + 60, torch.randn(1500, 2) - 60])
    places = Places(1, 2, X)
    for _ in range(20):
        places.follow(X[:2000], torch.zeros(2000, dtype=torch.long), torch.ones(2000))
    whole = places.strangers(X, torch.ones(len(X)))
    monkeypatch.setattr(_emerging, "MOST_COMPARED", 300)
    groups = places.strangers(X, torch.ones(len(X)))
    assert len(groups) == len(whole) == 2
    for found, wanted, first, count in zip(groups, whole, (2000, 5000), (3000, 1500), strict=True):
        assert (found >= first).all() and (found < first + count).all()
        assert len(found) > 0.95 * count and abs(len(found) - len(wanted)) < 0.03 * count


def test_samples_of_another_group_do_not_move_a_settled_cluster():
    torch.manual_seed(0)
    places, labels, weight = Places(2, 2, torch.zeros(())), torch.arange(200) % 2, torch.ones(200)
    for _ in range(SETTLED):
        places.follow(torch.randn(200, 2) + 20 * labels[:, None], labels, weight)
    before = places.center[0].clone()
    places.follow(torch.randn(100, 2) + 20, torch.zeros(100, dtype=torch.long), weight[:100])
    assert torch.equal(places.center[0], before)
