import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastroute.clustering.adc import ADC, association_loss


def test_walks_by_hand():
    starts, others = torch.randn(4, 3), torch.randn(5, 3)
    labels = torch.tensor([0, 0, 1, 2])
    match = starts @ others.T
    walks = match.exp() / match.exp().sum(1, keepdim=True) @ (match.T.exp() / match.T.exp().sum(1, keepdim=True))
    walker = -(walks[0, :2].log().sum() / 2 + walks[1, :2].log().sum() / 2 + walks[2, 2].log() + walks[3, 3].log())
    visits = (match.exp() / match.exp().sum(1, keepdim=True)).mean(0)
    expected = walker / 4 - 0.3 * visits.log().mean()
    torch.testing.assert_close(association_loss(starts, others, labels, 0.3), expected, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_authors():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 128))
    module = ADC(network, 2, epochs=8, augmentation=lambda x: x.flip(-1))
    images = torch.rand(6, 1, 4, 4)
    plain, moved = network(images), network(images.flip(-1).repeat(3, 1, 1, 1))
    clusters, places = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.arange(6).repeat(3)
    expected = association_loss(module.centroids, plain, clusters, 0.5)
    expected = expected + association_loss(moved, plain, places, 1.0)
    expected = expected + 0.5 * F.cross_entropy(module.dense(module.centroids), clusters)
    for e, count in ((torch.cat([plain, moved]), 400), (module.centroids, 8)):
        expected = expected + 2e-4 * count * (e.abs().sum(1) + (e.square().sum(1).sqrt() - 1).square()).mean()
    torch.testing.assert_close(module.step(images, None), expected)
    torch.testing.assert_close(module.responses(images), module.dense(plain))
    # Centroids of a cluster start close to each other.
    spread = module.centroids.unflatten(0, (2, 4)).std(1)
    assert spread.max() < 0.02 < module.centroids.std()


def test_the_learning_rate_rises_and_falls():
    rate = ADC(nn.Linear(2, 3), 3, epochs=80).rate
    assert [rate(epoch) for epoch in (0, 1, 3, 19)] == [0.25, 0.5, 1, 1]
    assert [rate(epoch) for epoch in (20, 40, 79, 99)] == pytest.approx([0.33, 0.33**2, 0.33**3, 0.33**3])


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
