import pytest
import torch
from torch.nn import functional as F

from fastroute.clustering.kmeans_net import KMeansNet, squared_distances


def test_distances_are_a_layer():
    points, centers = F.normalize(torch.randn(5, 3)), torch.randn(4, 3)
    expected = torch.cdist(points, F.normalize(centers)).square()
    torch.testing.assert_close(squared_distances(points, centers), expected, rtol=1e-4, atol=1e-5)


def test_a_step_weighs_distances_by_their_softmax_and_moves_the_centres():
    torch.manual_seed(0)
    module = KMeansNet("C4 M F6", torch.Size((1, 8, 8)), 3, temperature=0.5, batch_norm=False)
    images, before = torch.rand(6, 1, 8, 8), module.centers.clone()
    codes = F.normalize(module.encoder(images))
    square = (codes[:, None] - before).square().sum(-1)
    assigned = (-square / 0.5).softmax(1)
    torch.testing.assert_close(module(images), assigned)
    made = module.decoder(codes).sigmoid()
    expected = (made - images).square().mean() + 0.01 * (assigned * square).mean()
    torch.testing.assert_close(module.step(images, None), expected)
    # Against the gradient of Σ I ‖z − Ω‖², by a step of its own length.
    moved = F.normalize(before + 0.1 * F.normalize(assigned.T @ codes))
    torch.testing.assert_close(module.centers, moved)
    assert not torch.equal(before, moved)


@pytest.mark.parametrize("name", ["temperature", "lr"])
def test_bad_input(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be greater than 0"):
        KMeansNet("C4", torch.Size((1, 8, 8)), 3, **{name: 0})
