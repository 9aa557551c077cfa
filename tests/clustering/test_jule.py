import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import nn

from fastroute._methods import METHODS
from fastroute.clustering.jule import JULE, cluster_means
from fastroute.clustering.run import Batches
from tests.clustering.test_two_fold import digits, trainer_of


def network(dims=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, dims))


def test_the_clusters_of_each_period():
    module = JULE(network(), 6, 10, epochs=9)
    assert module.counts(1797) == [449, 44, 10] and module.counts(20000) == [5000, 500, 50, 10]
    assert module.counts(30) == [10]


def test_clear_groups_are_merged_although_their_graph_is_in_parts():
    torch.manual_seed(0)
    groups = torch.arange(3).repeat_interleave(40)
    features = torch.randn(120, 4) + 20 * torch.eye(4)[groups]
    found = JULE(network(), 6, 3, epochs=1).merged(features, 3)
    assert adjusted_rand_score(found, groups) == 1
    means = cluster_means(features, groups, 3)
    torch.testing.assert_close(means[1], features[40:80].mean(0))


def test_images_learn_from_their_own_and_from_near_clusters():
    images, labels = digits(200)
    module, seen = JULE(network(), 6, 4, epochs=4), []
    real = module.step

    def watch(images, index):
        kept = module.kept
        own = kept["labels"][index]
        torch.testing.assert_close(kept["labels"][module.members(own)], own)
        torch.manual_seed(3)
        choice = torch.randint(kept["nearest"].shape[1], (len(index),))
        near, far = module.members(own), module.members(kept["nearest"][own, choice])
        every = module.trainer.train_dataloader.images
        a, b, c = (module.features(x) for x in (images, every[near], every[far]))
        expected = (0.2 + (a - b).square().sum(1) - (a - c).square().sum(1)).clamp(min=0).mean()
        torch.manual_seed(3)
        loss = real(images, index)
        torch.testing.assert_close(loss, expected)
        seen.append((module.current_epoch, len(kept["sizes"])))
        assert not (kept["nearest"] == torch.arange(len(kept["sizes"]))[:, None]).any()
        return loss

    module.step = watch
    trainer_of(4).fit(module, Batches(images, labels, 100, 0), Batches(images, labels, 64))
    assert dict(seen) == {0: 50, 1: 50, 2: 5, 3: 4}
    assert sum(module.sizes) == 200 and all(module.sizes)


def test_it_takes_at_most_20_000_images():
    assert METHODS["jule"].most == 20_000


@pytest.mark.parametrize(
    ("clusters", "options", "message"),
    [
        (1, {"epochs": 1}, "clusters is 1; the method 'jule' compares clusters, and needs at least 2"),
        (3, {"epochs": 0}, "epochs is 0; it must be greater than 0"),
        (3, {"epochs": 1, "lr": 0}, "lr is 0; it must be greater than 0"),
    ],
)
def test_bad_input(clusters, options, message):
    with pytest.raises(ValueError, match=message):
        JULE(network(), 6, clusters, **options)
