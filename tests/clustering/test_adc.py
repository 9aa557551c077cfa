from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastroute.clustering.adc import ADC, association_loss
from fastroute.clustering.build import ClusteringRun, build


def test_walks_by_hand():
    starts, others = torch.randn(4, 3), torch.randn(5, 3)
    labels = torch.tensor([0, 0, 1, 2])
    match = starts @ others.T
    walks = match.exp() / match.exp().sum(1, keepdim=True) @ (match.T.exp() / match.T.exp().sum(1, keepdim=True))
    walker = -(walks[0, :2].log().sum() / 2 + walks[1, :2].log().sum() / 2 + walks[2, 2].log() + walks[3, 3].log())
    visits = (match.exp() / match.exp().sum(1, keepdim=True)).mean(0)
    expected = walker / 4 - 0.3 * visits.log().mean()
    torch.testing.assert_close(association_loss(starts, others, labels, 0.3), expected, rtol=1e-4, atol=1e-4)


def module_at(epoch, monkeypatch, **options):
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 128))
    module = ADC(network, 2, epochs=20, augmentation=lambda x: x.flip(-1), **options)
    monkeypatch.setattr(ADC, "current_epoch", epoch)
    return network, module


@pytest.mark.parametrize("epoch", [0, 1, 2, 19])
def test_the_loss_is_the_authors(epoch, monkeypatch):
    torch.manual_seed(0)
    network, module = module_at(epoch, monkeypatch)
    images = torch.rand(6, 1, 4, 4)
    plain, moved = network(images), network(images.flip(-1).repeat(3, 1, 1, 1))
    clusters, places = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.arange(6).repeat(3)

    def length(embeddings, count):
        return 2e-4 * count * (embeddings.square().sum(1).sqrt() - 1).square().mean()

    neighbours = association_loss(moved, plain, places, 1.0)
    expected = (1 if epoch < 2 else 0.2) * neighbours + length(torch.cat([plain, moved]), 400)
    if epoch >= 2:
        expected = expected + association_loss(module.centroids, plain, clusters, 1.0) + length(module.centroids, 8)
        expected = expected + 0.5 * F.cross_entropy(module.dense(module.centroids), clusters)
    torch.testing.assert_close(module.step(images, None), expected)
    torch.testing.assert_close(module.responses(images), module.dense(plain))


def test_k_means_places_the_centroids_after_a_tenth_of_the_epochs(monkeypatch):
    torch.manual_seed(0)
    _, module = module_at(2, monkeypatch)
    [optimizer], _ = module.configure_optimizers()
    module.centroids.sum().backward()
    optimizer.step()
    embeddings = torch.cat([torch.full((5, 128), -1.0), torch.full((7, 128), 2.0)])
    monkeypatch.setattr(module, "over_images", lambda network: embeddings)
    monkeypatch.setattr(ADC, "trainer", SimpleNamespace(optimizers=[optimizer]))
    module.on_train_epoch_start()
    found = module.centroids.detach().unflatten(0, (2, 4))
    assert sorted(found.mean((1, 2)).tolist()) == pytest.approx([-1, 2], abs=1e-4)
    assert 0 < found.std(1).max() < 1e-4
    assert not optimizer.state
    before = module.centroids.clone()
    monkeypatch.setattr(ADC, "current_epoch", 3)
    module.on_train_epoch_start()
    assert torch.equal(module.centroids, before)


@pytest.mark.parametrize(("epochs", "first"), [(1, 0), (2, 1), (10, 1), (60, 6)])
def test_the_epochs_before_the_clusters(epochs, first):
    assert ADC(nn.Linear(2, 3), 3, epochs=epochs).first_epochs == first


def test_even_scores_are_no_collapse(monkeypatch, recwarn):
    torch.manual_seed(0)
    _, module = module_at(2, monkeypatch)
    monkeypatch.setattr(module, "log_dict", lambda metrics: None)
    images, labels = torch.rand(40, 1, 4, 4), torch.zeros(40, dtype=torch.long)
    with torch.no_grad():
        module.dense.weight.mul_(1e-3)
        module.dense.bias.zero_()
        module.dense.bias[1] = module.responses(images).diff(dim=1).neg().median()  # half of the images in each
    for epoch, bias, warns in ((0, 1.0, False), (2, 0.0, False), (2, 1.0, True)):
        monkeypatch.setattr(ADC, "current_epoch", epoch)
        module.dense.bias.data[0] = bias
        recwarn.clear()
        module.validation_step((images, labels), 0)
        module.on_validation_epoch_end()
        assert any("collapsed" in str(warning.message) for warning in recwarn) == warns


def test_the_learning_rate_rises_and_falls():
    rate = ADC(nn.Linear(2, 3), 3, epochs=20).rate
    assert [rate(epoch) for epoch in (0, 1, 3, 9)] == [0.25, 0.5, 1, 1]
    assert [rate(epoch) for epoch in (10, 19, 25)] == pytest.approx([0.33, 0.33, 0.33])


def test_the_embedding_is_the_first_dense_layer():
    run = ClusteringRun(dataset="mnist", method="adc", clusters=3, heads=1, batch_norm=True)
    network = build(run, (1, 28, 28)).network
    [dense] = [layer for layer in network if isinstance(layer, nn.Linear)]
    assert (dense.in_features, dense.out_features) == (256 * 7 * 7, ADC.EMBEDDING)
    assert sum(isinstance(layer, nn.Conv2d) for layer in network) == 3
    assert build(replace(run, architecture="F8"), (1, 28, 28)).network[-1].in_features == 2 * 28 * 28


@pytest.mark.parametrize(("options", "name"), [({"epochs": 0}, "epochs"), ({"epochs": 1, "lr": 0}, "lr")])
def test_bad_input(options, name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be greater than 0"):
        ADC(nn.Linear(2, 3), 3, **options)


def test_autocast_leaves_walks_in_float32():
    torch.manual_seed(0)
    arguments = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 0, 1, 2]), 0.3
    with torch.autocast("cpu", torch.bfloat16):
        found = association_loss(*arguments)
    assert torch.equal(found, association_loss(*arguments))
