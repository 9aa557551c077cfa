import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, load_wine, make_blobs, make_moons
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.mixture import GaussianMixture
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from fastroute.clustering import NeuralMixture, _mixture_model, cluster_accuracy, neural_mixture
from fastroute.clustering._mixture_model import merged
from fastroute.nn import MixtureEMLoss


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # there, samples are few and random
@parametrize_with_checks(
    [NeuralMixture(), NeuralMixture(prior="learned", n_init=1), NeuralMixture("auto", max_clusters=6, n_init=1)],
    expected_failed_checks=lambda estimator: {
        "check_sample_weight_equivalence_on_dense_data": "batches are drawn at random, as in MiniBatchKMeans",
    },
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def blobs(samples=600, **options):
    X, y = make_blobs(samples, centers=3, cluster_std=0.6, random_state=3, **options)
    return X.astype(np.float32), y


def uneven():
    """Groups of 1,000, 300 and 100."""
    return make_blobs([1000, 300, 100], centers=[[0, 0], [6, 1], [-1, 6]], random_state=0)


def mean_accuracy(X, y, seeds=5, **options):
    clusters = len(np.unique(y))
    runs = [NeuralMixture(clusters, random_state=seed, **options).fit_predict(X) for seed in range(seeds)]
    return np.mean([cluster_accuracy(y, run) for run in runs])


def test_finds_blobs_and_says_how_sure_it_is():
    X, y = blobs()
    model = NeuralMixture(3, n_init=1, random_state=0)
    labels = model.fit_predict(X)
    assert cluster_accuracy(y, labels) > 0.98
    proba, scores = model.predict_proba(X), model.transform(X)
    assert proba.shape == scores.shape == (600, 3) and proba.dtype == np.float32
    np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-5)
    assert np.array_equal(labels, proba.argmax(1)) and np.array_equal(labels, scores.argmax(1))
    np.testing.assert_allclose(scores.mean(0), 0, atol=1e-4)  # Eq. 4.11, over all of the data
    np.testing.assert_allclose(scores.std(0), 1, atol=1e-4)
    assert model.score(X) == pytest.approx(-model.loss_) and model.loss_ < np.log(2)
    assert model.score(X) > NeuralMixture(3, n_init=1, epochs=0, random_state=0).fit(X).score(X)


AUTO = {
    "blobs": (blobs, 3, 0.98),
    "uneven blobs": (uneven, 3, 0.98),
    "moons": (lambda: make_moons(1500, noise=0.06, random_state=0), 2, 0.97),
    "one": (lambda: (np.random.default_rng(0).normal(size=(1000, 2)), np.zeros(1000, int)), 1, 1.0),
}


@pytest.mark.parametrize("data", AUTO)
def test_the_number_of_clusters_comes_from_the_data(data):
    make, clusters, accuracy = AUTO[data]
    X, y = make()
    model = NeuralMixture("auto", random_state=0).fit(X)
    assert model.n_clusters_ == clusters == len(model.get_feature_names_out())
    assert cluster_accuracy(y, model.labels_) >= accuracy
    proba, scores = model.predict_proba(X), model.transform(X)
    assert proba.shape == scores.shape == (len(X), clusters) and model.priors_.shape == (clusters,)
    assert model.priors_.sum() == pytest.approx(1)
    expected = np.exp(scores) * model.priors_  # Eq. 4.18
    np.testing.assert_allclose(proba, expected / expected.sum(1, keepdims=True), rtol=1e-4, atol=1e-6)
    model.partial_fit(X)
    assert model.n_clusters_ == clusters and np.isfinite(model.loss_)
    assert cluster_accuracy(y, model.labels_) >= accuracy - 0.02


def test_a_network_of_ones_own_has_the_clusters_to_begin_with():
    X, y = blobs()
    network = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 7))
    model = NeuralMixture("auto", max_clusters=7, network=network, random_state=0).fit(X)
    assert model.n_clusters_ == 3 and cluster_accuracy(y, model.labels_) > 0.98


def test_units_of_features_do_not_matter():
    X, y = load_wine(return_X_y=True)  # from 0.1 to 1,700
    options = {"n_init": 1, "random_state": 0}
    labels = [NeuralMixture(3, **options).fit_predict(x) for x in (X, StandardScaler().fit_transform(X))]
    assert cluster_accuracy(labels[0], labels[1]) > 0.98 and cluster_accuracy(y, labels[0]) > 0.85
    X, y = make_blobs(2000, n_features=6, centers=6, random_state=0)
    for unit in (1, 1e4):  # in which the seeds of k-means++ would all differ along one feature
        model = NeuralMixture(6, prior="learned", epochs=10, **options)
        assert cluster_accuracy(y, model.fit_predict(X * [unit, 1, 1, 1, 1, 1])) > 0.98
    rare = np.zeros((1000, 1))
    rare[:3] = 5.0
    X = np.hstack([np.random.default_rng(0).normal(size=(1000, 2)), rare, np.full((1000, 1), 0.1)])
    units = np.array([1e6, 1e-3, 1.0, 7.0])
    frames = [(x - center) * scale for x in (X, X * units + 3) for center, scale in [NeuralMixture()._frame(x)]]
    np.testing.assert_allclose(*frames, atol=1e-6)
    np.testing.assert_allclose(frames[0].mean(0), 0, atol=1e-9)
    spread = frames[0].std(0)
    share = np.abs(X[:, :3] - X[:, :3].mean(0)).mean(0) / X[:, :3].std(0)
    assert spread[:2] == pytest.approx(1) and spread[2] == pytest.approx(share[2] ** 2 / np.square(share).mean())
    assert spread[2] < 0.3 and not frames[0][:, 3].any()


def test_one_outlier_does_not_hide_a_feature():
    X, y = make_blobs(600, centers=[[0, 0], [6, 0], [3, 5]], cluster_std=0.7, random_state=0)
    X[0, 0] = 60.0
    assert cluster_accuracy(y, NeuralMixture(3, random_state=0).fit_predict(X)) > 0.98


def test_weights_count_as_so_many_samples():
    X, y = blobs()
    weights = np.where(y == 0, 0.0, np.where(y == 1, 2.0, 1.0))
    model = NeuralMixture(2, prior="learned", random_state=0).fit(X, sample_weight=weights)
    assert cluster_accuracy(y[y > 0], model.predict(X[y > 0])) > 0.98
    assert sorted(model.priors_) == pytest.approx([1 / 3, 2 / 3], abs=0.1)
    assert model.score(X, sample_weight=weights) == pytest.approx(-model.loss_, rel=1e-4)
    inner, kept = model._model, weights / weights.mean()
    seen = np.concatenate([index for index, _ in inner.batches(X, kept)])
    assert len(seen) == len(X) and (np.abs(np.bincount(seen, minlength=len(X)) - kept) < 1).all()
    repeated = np.repeat(X, weights.astype(int), 0)
    for weighted, plain in zip(model._frame(X, kept), model._frame(repeated), strict=True):
        np.testing.assert_allclose(weighted, plain, rtol=1e-5)
    statistics = inner.norm.running_mean.clone(), inner.norm.running_std.clone()
    inner.calibrate(repeated)
    torch.testing.assert_close((inner.norm.running_mean, inner.norm.running_std), statistics, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="at least one non-zero number"):
        model.fit(X, sample_weight=np.zeros(len(X)))


def test_auto_takes_fewer_samples_with_weight_than_clusters():
    X = np.random.default_rng(0).normal(size=(200, 2))
    X[:15] += 5
    weights = np.zeros(200)
    weights[:15] = 1
    model = NeuralMixture("auto", epochs=1, n_init=1, random_state=0).fit(X, sample_weight=weights)
    assert 1 <= model.n_clusters_ <= 15


def test_a_few_samples_with_weight_are_found_among_many(monkeypatch):
    monkeypatch.setattr(_mixture_model, "INFERENCE_BATCH", 32)
    X, y = blobs()
    rare = np.zeros(len(X))
    rare[::50] = 1
    model = NeuralMixture(3, prior="learned", epochs=20, random_state=0).fit(X, sample_weight=rare)
    assert cluster_accuracy(y[::50], model.labels_[::50]) > 0.9


def test_fits_go_on_and_say_so(capsys):
    X, y = blobs()
    model = NeuralMixture(3, n_init=1, epochs=2, random_state=0, warm_start=True, verbose=2).fit(X)
    before = model.loss_
    assert "run 1, pass 2 of 2: loss" in capsys.readouterr().out and model.n_iter_ == 2
    model.set_params(epochs=8, verbose=1).fit(X)
    assert model.n_iter_ == 10 and model.loss_ < before and cluster_accuracy(y, model.labels_) > 0.98
    assert capsys.readouterr().out == f"run 1 of 1: loss {model.loss_:.4f}\n"
    with pytest.raises(ValueError, match="n_clusters is 4; to train further, set it back to 3"):
        model.set_params(n_clusters=4).fit(X)
    assert model.set_params(n_clusters=3, warm_start=False).fit(X).n_iter_ == 8
    assert model.partial_fit(X).n_iter_ == 9


@pytest.mark.parametrize("prior", ["even", "learned"])
def test_each_sample_has_its_part_of_the_score(prior):
    X, _ = blobs()
    model = NeuralMixture(3, prior=prior, n_init=1, epochs=5, random_state=0).fit(X)
    parts = model.score_samples(X)
    assert parts.shape == (600,) and parts.mean() == pytest.approx(model.score(X), rel=1e-5)
    inner = model._model
    loss = MixtureEMLoss(model.gamma, inner.norm.eval())
    scores = next(inner.in_order(X))
    with torch.no_grad():
        expected = loss(inner.network(scores), prior=inner.prior if prior == "learned" else None).loss
    assert parts.mean() == pytest.approx(-expected.item(), rel=1e-5)  # Eq. 4.22


def test_names_of_features_are_kept_without_a_warning():
    pandas = pytest.importorskip("pandas")
    X = pandas.DataFrame(blobs()[0], columns=["length", "width"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = NeuralMixture(3, n_init=1, epochs=3, random_state=0).fit(X).partial_fit(X)
        assert model.feature_names_in_.tolist() == ["length", "width"]
        assert model.predict(X).shape == model.score_samples(X).shape == (600,)
        model.set_output(transform="pandas").fit_transform(X, sample_weight=pandas.Series(np.ones(600)))
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        model.predict(X.to_numpy())


def test_no_cluster_that_was_found_is_empty():
    X = np.random.default_rng(0).normal(size=(120, 8))
    model = NeuralMixture("auto", max_clusters=100, n_init=1, epochs=5, random_state=0).fit(X)
    assert set(model.labels_) == set(range(model.n_clusters_)) and model.priors_.sum() == pytest.approx(1)


@pytest.mark.parametrize("kind", [np.float64, np.float16, int, list])
def test_other_types_than_that_of_the_fit(kind):
    X = np.round(10 * blobs()[0]).astype(np.float32)
    model = NeuralMixture(3, n_init=1, epochs=3, random_state=0).fit(X)
    other = X.tolist() if kind is list else X.astype(kind)
    np.testing.assert_array_equal(model.predict(other), model.labels_)
    assert np.isfinite(model.partial_fit(other).loss_)


def test_a_fit_that_fails_leaves_the_last_one_whole():
    X, _ = blobs()
    model = NeuralMixture(3, n_init=1, epochs=3, random_state=0).fit(X)
    with pytest.raises(ValueError, match="network gives"):
        model.set_params(network=nn.Linear(2, 5)).fit(100 * X + 5)
    np.testing.assert_array_equal(model.predict(X), model.labels_)


def test_clusters_with_the_most_exchange_are_joined_first():
    # 0 and 1 exchange 3 of 10; 2, the half of them, a tenth of its samples with both together; 3 has none; 4 is apart.
    moved = np.zeros((5, 5), int)
    moved[:2, :2] = [[70, 30], [30, 70]]
    moved[2, :3] = [5, 0, 95]
    moved[1, 2] = 15
    moved[4, 4] = 50
    assert merged(moved, 0.2) == [[0, 1], [2], [4]]
    assert merged(moved, 0.05) == [[0, 1, 2], [4]]
    assert merged(moved, 0.5) == [[0], [1], [2], [4]]
    assert merged(np.array([[0, 0, 5], [0, 50, 0], [0, 0, 0]]), 0.1) == [[0], [1]]
    assert merged(np.ones((3, 3), int), 0.0) == [[0, 1, 2]] and merged(np.zeros((2, 2), int), 0.1) == []


def test_uneven_groups_need_a_learned_prior():
    X, y = uneven()
    model = NeuralMixture(3, prior="learned", random_state=0).fit(X)
    assert cluster_accuracy(y, model.labels_) > 0.97
    # Posteriors are soft, so that priors are evener than 1000 : 300 : 100.
    small, middle, large = np.sort(model.priors_)
    assert small < 0.2 < middle < 0.4 < large and model.priors_.sum() == pytest.approx(1)
    assert np.bincount(model.labels_).argmax() == model.priors_.argmax()
    even = NeuralMixture(3, n_init=1, random_state=0).fit(X)
    assert cluster_accuracy(y, even.labels_) < 0.8 and np.allclose(even.priors_, 1 / 3)


def test_a_given_prior_moves_the_borders():
    X, _ = make_blobs(400, centers=1, random_state=0)
    sizes = [
        np.bincount(NeuralMixture(2, prior=p, n_init=1, epochs=5, random_state=0).fit_predict(X), minlength=2)
        for p in ([0.5, 0.5], [0.8, 0.2])
    ]
    assert sizes[1][0] > sizes[0][0] + 40


def test_the_run_of_the_lowest_loss_is_kept():
    X, _ = make_moons(400, noise=0.05, random_state=0)
    random = np.random.RandomState(7)
    losses = [NeuralMixture(2, n_init=1, epochs=3, random_state=random).fit(X).loss_ for _ in range(3)]
    best = NeuralMixture(2, n_init=3, epochs=3, random_state=np.random.RandomState(7)).fit(X)
    assert best.loss_ == pytest.approx(min(losses)) and len(set(losses)) == 3


def test_same_seed_same_clusters_and_the_global_generator_is_left_alone():
    X, _ = blobs()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, second, other = (
        NeuralMixture(3, n_init=1, epochs=3, random_state=seed).fit(X).predict_proba(X) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, second) and not np.array_equal(first, other)
    assert torch.equal(torch.rand(1), expected)


def test_partial_fit_streams():
    X, y = blobs(3000)
    model = NeuralMixture(3, random_state=0)
    for _ in range(4):
        for part in np.array_split(X, 10):
            model.partial_fit(part)
    assert cluster_accuracy(y, model.predict(X)) > 0.98 and len(model.labels_) == 300
    with pytest.raises(ValueError, match="X has 3 features, but NeuralMixture is expecting 2"):
        model.partial_fit(np.zeros((10, 3)))


def test_reads_a_file_by_the_batch(tmp_path):
    X, y = blobs(2000)
    np.save(tmp_path / "x.npy", X)
    model = NeuralMixture(3, n_init=1, random_state=0).fit(np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert np.array_equal(model.labels_, NeuralMixture(3, n_init=1, random_state=0).fit_predict(X))
    assert cluster_accuracy(y, model.labels_) > 0.98


def test_tensors_and_networks_of_ones_own():
    X, y = blobs()
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.from_numpy(X)[:, None, None, :]
    model = NeuralMixture(3, network=network, n_init=2, epochs=15, random_state=0).fit(images)
    assert cluster_accuracy(y, model.labels_) > 0.98
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    # Whatever batch a sample comes in, and in whatever mode the network was left.
    model.network_.train()
    assert np.array_equal(np.concatenate([model.predict(images[i : i + 1]) for i in range(50)]), model.labels_[:50])
    with pytest.raises(ValueError, match=r"network gives \(.*, 3\); it must give \(N, n_clusters\)"):
        clone(model).set_params(n_clusters=4).fit(images)


def test_pickles_clones_and_pipelines():
    X, _ = blobs()
    model = make_pipeline(StandardScaler(), NeuralMixture(3, n_init=1, epochs=3, random_state=0)).fit(X)
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(X), model.predict(X))
    assert model.set_output(transform="default").get_feature_names_out().tolist() == [
        "neuralmixture0",
        "neuralmixture1",
        "neuralmixture2",
    ]
    with pytest.raises(NotFittedError):
        clone(model[-1]).predict(X)


def test_one_cluster():
    X, _ = blobs()
    model = NeuralMixture(1, n_init=1, epochs=2, random_state=0).fit(X)
    assert not model.labels_.any() and np.array_equal(model.predict_proba(X), np.ones((600, 1)))


@pytest.mark.parametrize("prior", ["even", "learned"])
def test_constant_features_are_one_cluster(prior):
    with pytest.warns(ConvergenceWarning, match="2 of 3 clusters are empty"):
        labels = NeuralMixture(3, n_init=1, epochs=2, prior=prior, random_state=0).fit_predict(np.full((50, 4), 0.1))
    assert len(set(labels)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tensors_of_half_the_precision(dtype):
    X = torch.cat([torch.randn(30, 2) - 4, torch.randn(30, 2) + 4]).to(dtype)
    options = {"n_init": 1, "epochs": 2, "random_state": 0}
    labels = [NeuralMixture(2, **options).fit_predict(x) for x in (X, X.float())]
    assert (labels[0] == labels[1]).all()


@pytest.mark.parametrize(
    ("options", "X", "message"),
    [
        ({}, np.full((20, 2), np.nan), "contains NaN"),
        ({}, np.full((20, 2), np.inf), "infinity"),
        ({"n_clusters": 30}, np.zeros((20, 2)), "n_samples=20 should be >= n_clusters=30"),
        ({}, np.zeros((1, 2)), "minimum of 2 is required"),
        ({}, np.zeros((20, 2, 2)), "Found array with dim 3"),
        ({"n_clusters": 0}, np.zeros((20, 2)), "n_clusters is 0; it must be an integer from 1 on"),
        ({"n_clusters": 1025}, np.zeros((2000, 2)), "n_clusters is 1025; it must be 1 to 1024"),
        ({"device": "cuda"}, np.zeros((20, 2)), "device is 'cuda'; this machine has no GPU"),
        ({"batch_size": 1}, np.zeros((20, 2)), "batch_size is 1; it must be an integer from 2 on"),
        ({"learning_rate": 0}, np.zeros((20, 2)), "learning_rate is 0; it must be greater than 0"),
        ({"noise": -1}, np.zeros((20, 2)), "noise is -1; it must be 0 or greater"),
        ({"hidden": (0,)}, np.zeros((20, 2)), r"hidden is \(0,\)"),
        ({"hidden": 5}, np.zeros((20, 2)), "hidden is 5; it must be the widths of layers"),
        ({"network": "resnet"}, np.zeros((20, 2)), "network is 'resnet'; it must be a torch.nn.Module or None"),
        ({"n_clusters": "many"}, np.zeros((20, 2)), "n_clusters is 'many'; it must be an integer from 1 on or 'auto'"),
        ({"n_clusters": "auto", "max_clusters": 0}, np.zeros((20, 2)), "max_clusters is 0; it must be an integer"),
        (
            {"n_clusters": "auto", "noise": 0},
            np.zeros((20, 2)),
            "noise is 0; with n_clusters='auto' it must be greater",
        ),
        (
            {"n_clusters": "auto", "prior": [0.5, 0.5], "max_clusters": 2},
            np.zeros((20, 2)),
            "with n_clusters='auto' it",
        ),
        (
            {"density": "cauchy"},
            np.zeros((20, 2)),
            "density is 'cauchy'; it must be one of 'sigmoid', 'gaussian'",
        ),
        ({"exclusive_layers": 4}, np.zeros((20, 2)), "exclusive_layers is 4; it must be 1 to 3, the layers of the"),
        (
            {"exclusive_layers": 2, "network": nn.Linear(2, 3)},
            np.zeros((20, 2)),
            "exclusive_layers is 2 with a network of your own; it must be 1, or network None",
        ),
        ({"emerging": True}, np.zeros((20, 2)), "emerging is True with prior 'even'; it needs prior='learned'"),
        ({"init": "first"}, np.zeros((20, 2)), "init is 'first'; it must be 'auto', 'random' or 'k-means\\+\\+'"),
        ({"prior": "flat"}, np.zeros((20, 2)), "prior is 'flat'; it must be 'even' or 'learned', or 3 numbers"),
        (
            {"n_clusters": "auto", "prior": "flat"},
            np.zeros((20, 2)),
            "prior is 'flat'; it must be 'even' or 'learned'$",
        ),
        (
            {"n_clusters": "auto", "network": nn.Linear(2, 30), "max_clusters": 30},
            np.zeros((20, 2)),
            "n_samples=20 should be >= max_clusters=30",
        ),
        (
            {"n_clusters": "auto", "network": nn.Linear(2, 5)},
            np.zeros((20, 2)),
            r"network gives \(20, 5\); it must give \(N, max_clusters\) = \(20, 20\)",
        ),
        ({"prior": [0.5, 0.6, -0.1]}, np.zeros((20, 2)), r"prior is \[0.5, 0.6, -0.1\]; .* sum 1"),
        ({"prior": [1.0, 1.0, 1.0]}, np.zeros((20, 2)), r"prior is .* sum 1"),
        ({"prior": [0.5, 0.5]}, np.zeros((20, 2)), "it must be 3 numbers, one for each cluster"),
    ],
)
def test_bad_input(options, X, message):
    with pytest.raises(ValueError, match=message):
        NeuralMixture(**{"n_clusters": 3, **options}).fit(X)


def test_files_without_the_newer_options():
    X, _ = blobs()
    model = NeuralMixture(3, n_init=1, epochs=1, random_state=0).fit(X)
    state = dict(model.__getstate__())
    for name in ("density", "exclusive_layers", "emerging"):
        del state[name]
    old = NeuralMixture.__new__(NeuralMixture)
    old.__setstate__(state)
    assert old.get_params() == model.get_params() and np.array_equal(old.predict(X), model.labels_)
    assert neural_mixture._Model is type(model._model)  # the name in those files


def test_without_scikit_learn_one_sentence_names_the_extra():
    code = "import sys; sys.modules['sklearn'] = None; sys.modules['scipy'] = None\nimport fastroute.clustering"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "fastroute.clustering needs the package" in done.stderr and "pip install 'fastroute[cluster]'" in done.stderr


@pytest.mark.slow
def test_shapes_by_default_settings():
    X, y = make_blobs(1500, centers=5, cluster_std=0.7, random_state=0)
    assert mean_accuracy(X, y) >= 0.98
    X, y = make_moons(1500, noise=0.05, random_state=30)
    gaussian = GaussianMixture(2, random_state=0).fit_predict(X)
    means = KMeans(2, n_init=10, random_state=0).fit_predict(X)
    assert mean_accuracy(X, y) >= max(cluster_accuracy(y, gaussian), cluster_accuracy(y, means))
    assert mean_accuracy(*uneven(), prior="learned") >= 0.95
    X, y = make_blobs(1500, random_state=170)
    assert mean_accuracy(X @ np.array([[0.6, -0.6], [-0.4, 0.8]]), y) >= 0.95


@pytest.mark.slow
def test_digits_by_default_settings():
    X, y = load_digits(return_X_y=True)
    X = X.astype(np.float32)
    means = KMeans(10, n_init=10, random_state=0).fit_predict(X)
    assert mean_accuracy(X, y) >= max(0.79, cluster_accuracy(y, means))


def test_a_model_of_a_gpu_is_read_where_there_is_none():
    X = np.random.default_rng(0).normal(size=(60, 2))
    model = NeuralMixture(3, epochs=2, random_state=0).fit(X)
    expected = model.predict_proba(X)
    model._model.device = torch.device("cuda", 77)  # as if it had been trained there
    model._model.built_with["device"] = model.device = "cuda:77"
    read = pickle.loads(pickle.dumps(model))
    assert read._model.device == torch.device("cpu") and np.array_equal(read.predict_proba(X), expected)
    before = next(read._model.network.parameters()).clone()
    read.set_params(device="cpu").partial_fit(X)
    assert not torch.equal(next(read._model.network.parameters()), before)  # the optimiser has its weights


def test_a_fit_on_the_cpu_leaves_gpus_alone(monkeypatch):
    forked, fork_rng = [], torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: forked.append(list(devices)) or fork_rng(devices))
    X = np.random.default_rng(0).normal(size=(60, 2))
    for network in (None, torch.nn.Linear(2, 3)):
        NeuralMixture(3, network=network, epochs=1, random_state=0).fit(X)
    assert forked and not any(forked)


def test_a_prior_that_is_changed_afterwards_changes_nothing():
    X, prior = np.random.default_rng(0).normal(size=(60, 2)), np.array([0.2, 0.3, 0.5])
    model = NeuralMixture(3, prior=prior, epochs=2, random_state=0).fit(X)
    before = model.predict_proba(X)
    prior[:] = [0.9, 0.05, 0.05]
    assert np.array_equal(model.predict_proba(X), before)
    with pytest.raises(ValueError, match=r"prior is .*; to train further, set it back"):
        model.partial_fit(X)


@pytest.mark.parametrize("weighted", [False, True])
def test_scores_are_normalised_over_all_batches(weighted, monkeypatch):
    monkeypatch.setattr(_mixture_model, "INFERENCE_BATCH", 100)
    X, y = blobs()
    X, y = X[y.argsort()], np.sort(y)  # batches that differ
    weights = np.where(y == 0, 3.0, 1.0) if weighted else None
    scores = NeuralMixture(3, n_init=1, epochs=3, random_state=0).fit(X, sample_weight=weights).transform(X)
    mean = np.average(scores, 0, weights)
    np.testing.assert_allclose(mean, 0, atol=1e-4)
    np.testing.assert_allclose(np.average(np.square(scores - mean), 0, weights), 1, atol=1e-4)


def test_features_are_centred_at_their_weighted_mean():
    X = np.random.default_rng(0).normal(50, 1, (200, 2))
    weights = np.where(X[:, 0] > 50, 10.0, 1.0)
    model = NeuralMixture(2, epochs=1, n_init=1, random_state=0).fit(X, sample_weight=weights)
    np.testing.assert_allclose(model._model.center, np.average(X, 0, weights))
