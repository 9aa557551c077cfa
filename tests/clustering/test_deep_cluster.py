import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastroute.clustering.build import ClusteringRun, build
from fastroute.clustering.deep_cluster import DeepCluster, whitened
from fastroute.clustering.run import Batches
from tests.clustering.test_two_fold import digits, trainer_of


def test_whitened_components_are_uncorrelated_and_of_length_one():
    torch.manual_seed(0)
    features = torch.randn(500, 6) @ torch.randn(6, 6) + 3
    found = torch.from_numpy(whitened(features, 0))
    assert found.shape == (500, 6)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(500))
    # Before the lengths are made one, the covariance is the unit matrix; directions stay spread evenly.
    assert (found.T @ found / 500 - torch.eye(6) / 6).abs().max() < 0.05
    assert whitened(torch.randn(20, 300), 0).shape == (20, 20)


def test_images_count_by_the_inverse_of_their_clusters_size():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    module = DeepCluster(network, 5, 2, labels=3, augmentation=lambda x: x.flip(-1))
    module.kept["labels"] = torch.tensor([0, 0, 0, 1, 2, 2])
    images, index = torch.rand(3, 1, 4, 4), torch.tensor([1, 3, 4])
    each = F.cross_entropy(module.head(network(images.flip(-1)).relu()), torch.tensor([0, 1, 2]), reduction="none")
    weights = torch.tensor([1 / 3, 1, 1 / 2])
    torch.testing.assert_close(module.step(images, index), (weights * each).sum() / weights.sum())


def train(module, steps, look):
    """Train for three epochs of two steps each, with labels that last for at least `steps`.

    Returns the labels, and what `look()` returned, after the start of each epoch.
    """
    module.STEPS = steps
    images, labels = digits(128)
    seen, real = [], module.on_train_epoch_start

    def watch():
        real()
        seen.append((module.kept["labels"].clone(), look()))

    module.on_train_epoch_start = watch
    trainer_of(3).fit(module, Batches(images, labels, 64, 0), Batches(images, labels, 1000))
    return zip(*seen, strict=True)


@pytest.mark.parametrize(("architecture", "dims"), [("C4 M F8", 8), ("C4 M C6", 6)])
def test_clusters_label_the_images_anew(architecture, dims):
    run = ClusteringRun(
        dataset="digits", method="deepcluster", clusters=3, heads=1, batch_norm=True, architecture=architecture
    )
    module = build(run, (1, 8, 8), epochs=3)
    assert module.centers.shape == (3, dims) and module.head.out_features == 30
    seen, heads = train(module, 4, lambda: module.head.weight.clone())
    assert seen[0].max() == 11 and seen[0].shape == (128,)  # at most a tenth of the images
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert heads[2].std() < 0.02 and not torch.equal(heads[1], heads[2])  # drawn anew
    assert not torch.equal(heads[0], heads[1])  # trained between


def test_features_are_maps_where_a_pool_comes_last():
    def module(architecture):
        run = ClusteringRun(
            dataset="digits", method="deepcluster", clusters=3, heads=1, batch_norm=True, architecture=architecture
        )
        return build(run, (1, 8, 8))

    assert module("C6 M").features(torch.rand(2, 1, 8, 8)).shape == module("C6 M").centers[:2].shape == (2, 6)
    with pytest.raises(ValueError, match="architecture is 'M'; the method 'deepcluster' needs a layer with weights"):
        module("M")


def test_the_labels_follow_the_module():
    """A checkpoint is loaded before the trainer moves the module to a GPU, and labels last for several epochs."""
    module = DeepCluster(nn.Linear(2, 2), 2, 2, labels=2)
    module.on_load_checkpoint({"kept": {"labels": torch.tensor([0, 1])}})
    assert module.to("meta").kept["labels"].device.type == "meta"


def test_labels_last_a_number_of_steps_and_a_fresh_layer_has_no_momentum():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    module = DeepCluster(network, 5, 3, labels=6)
    seen, momentum = train(module, 3, lambda: module.head.weight in module.trainer.optimizers[0].state)
    assert seen[0].equal(seen[1]) and not seen[1].equal(seen[2])
    assert momentum == (False, True, False)
