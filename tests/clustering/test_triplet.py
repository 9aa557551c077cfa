import pytest
import torch
from torch import nn

from fastroute.clustering.triplet import Triplet, triplet_loss


def test_squared_distances_differ_by_the_margin():
    anchors = torch.zeros(3, 2)
    near = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.0]])
    far = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    # 1 − 4 + 1 < 0; 4 − 1 + 1; 0.25 − 1 + 1.
    torch.testing.assert_close(triplet_loss(anchors, near, far), torch.tensor((0 + 4 + 0.25) / 3))


def test_the_augmented_copy_is_near_and_the_next_image_far():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    module = Triplet(network, 3, 2, augmentation=lambda x: x.flip(-1))
    images = torch.rand(4, 1, 4, 4)
    expected = triplet_loss(network(images), network(images.flip(-1)), network(images[[3, 0, 1, 2]]))
    torch.testing.assert_close(module.step(images, None), expected)
    torch.testing.assert_close(module.features(images), network(images))


def test_bad_input():
    with pytest.raises(ValueError, match="lr is 0; it must be greater than 0"):
        Triplet(nn.Linear(2, 3), 3, 3, lr=0)
