"""Which axis of a map `multipath` takes for its channels."""

import pytest
import torch
from torch import nn

from fastroute.models import multipath
from tests.models.toys import routers


class ChannelsAtTheEnd(nn.Module):
    """Maps (N, H, W, C) of changing resolution, with as many channels as rows in the middle; images of any size."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 2, 2)
        self.first, self.second, self.fc = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 5)

    def forward(self, x):
        x = self.first(self.patch(x).permute(0, 2, 3, 1)).relu()
        x = self.second(x[:, ::2, ::2])
        return self.fc(x.mean((1, 2)))


@pytest.mark.parametrize("cuts", ["auto", ["first", "second"]])
def test_maps_whose_channels_come_last(cuts):
    network, x = ChannelsAtTheEnd().eval(), torch.randn(3, 3, 16, 16)
    model = multipath(network, 2, cuts, input_size=(3, 16, 16), init="copy", noise=0)
    assert [router.w1.shape[-1] for router in routers(model).values()] == [8, 4]
    for router in routers(model).values():
        router.w2.data.zero_()
    torch.testing.assert_close(model(x), network(x))
    model(torch.randn(3, 3, 24, 20))  # of another size


def test_swin_which_takes_one_size_of_images():
    timm = pytest.importorskip("timm")
    network = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=5
    )
    model = multipath(network, 2, "auto", input_size=(3, 56, 56))
    assert [router.w1.shape[-1] for router in routers(model).values()] == [24, 48]


def test_sequences():
    network = nn.Sequential(
        *(nn.Conv1d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 4)),
    )
    model = multipath(network, 2, ["1", "3"], input_size=(2, 20))
    assert [router.w1.shape[-1] for router in routers(model).values()] == [8, 16]
    assert model(torch.randn(3, 2, 40)).shape == (3, 4)
