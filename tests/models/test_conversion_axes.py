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


def test_maps_that_are_not_square():
    model = multipath(ChannelsAtTheEnd(), 2, "auto", input_size=(3, 20, 28))
    assert [router.w1.shape[-1] for router in routers(model).values()] == [8, 4]
    model(torch.randn(3, 3, 24, 20))


@pytest.mark.parametrize("size", [(56, 56), (56, 112)])
def test_swin_which_takes_one_size_of_images(size):
    timm = pytest.importorskip("timm")
    network = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=size, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=5
    )
    model = multipath(network, 2, "auto", input_size=(3, *size))
    assert [router.w1.shape[-1] for router in routers(model).values()] == [24, 48]


class Tokens(nn.Module):
    """Tokens of patches, of one size of images."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm, self.fc = nn.Conv2d(3, 24, 4, 4), nn.BatchNorm1d(24), nn.Linear(24, 2)
        self.block = nn.Sequential(self.patches, nn.Flatten(2))

    def tokens(self, x):
        assert x.shape[2:] == (16, 16)
        return self.block(x).transpose(1, 2)


class Tokenised(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc = Tokens(), nn.Linear(24, 2)
        self.embed.forward = self.embed.tokens

    def forward(self, x):
        return self.fc(self.embed(x).mean(1))


def test_tokens_of_one_size_of_images():
    model = multipath(Tokenised(), 2, ["embed"], input_size=(3, 16, 16))
    assert [router.w1.shape[-1] for router in routers(model).values()] == [24]
    timm = pytest.importorskip("timm")
    network = timm.create_model("vit_tiny_patch16_224", num_classes=2, depth=1, img_size=64, embed_dim=24, num_heads=2)
    model = multipath(network, 2, ["patch_embed"], input_size=(3, 64, 64))
    assert [router.w1.shape[-1] for router in routers(model).values()] == [24]


def test_sequences():
    network = nn.Sequential(
        *(nn.Conv1d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 4)),
    )
    model = multipath(network, 2, ["1", "3"], input_size=(2, 20))
    assert [router.w1.shape[-1] for router in routers(model).values()] == [8, 16]
    assert model(torch.randn(3, 2, 40)).shape == (3, 4)


class Spectrogram(nn.Module):
    """1-D convolutions over time, behind 2-D ones over frequency and time."""

    def __init__(self):
        super().__init__()
        self.maps = nn.Conv2d(1, 4, (20, 3), padding=(0, 1))
        self.first, self.second = nn.Conv1d(4, 16, 3, padding=1), nn.Conv1d(16, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(self.second(self.first(self.maps(x).squeeze(2)).relu()).mean(2))


def pooled(layer):
    return nn.Sequential(nn.AdaptiveAvgPool1d(10), layer, nn.Flatten(), nn.LazyLinear(3))


class Volumes(nn.Module):
    """Maps (N, D, H, W, C), as video transformers have them."""

    def __init__(self):
        super().__init__()
        self.patch, self.dense, self.fc = nn.Conv3d(3, 6, 2, 2), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.dense(self.patch(x).movedim(1, -1)).mean((1, 2, 3)))


@pytest.mark.parametrize(
    "network, cuts, size, channels",
    [
        (Spectrogram, ["first", "second"], (1, 20, 50), [16, 12]),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.Flatten(2), nn.LazyLinear(2), nn.Flatten(), nn.LazyLinear(2)),
         ["1"], (3, 32, 32), [8]),
        (lambda: pooled(nn.Conv1d(2, 16, 1)), ["1"], (2, 50), [16]),
        (lambda: pooled(nn.Linear(10, 7)), ["1"], (2, 50), [7]),
        (Volumes, ["patch", "dense"], (3, 8, 16, 16), [6, 8]),
        (lambda: nn.Sequential(nn.Conv1d(1, 6, 400, 160), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
                               nn.Linear(6, 2)), ["1"], (1, 16000), [6]),
    ],
    ids=["spectrogram", "flattened", "pooled", "pooled, dense", "volumes", "audio"],
)  # fmt: skip
def test_channels_are_the_axis_that_does_not_depend_on_the_size(network, cuts, size, channels):
    network = network()
    network(torch.zeros(2, *size))
    model = multipath(network, 2, cuts, input_size=size)
    assert [router.w1.shape[-1] for router in routers(model).values()] == channels
    assert model(torch.randn(3, *size)).shape[0] == 3


@pytest.mark.parametrize("dims", [1, 3])
def test_auto_finds_resolutions_of_sequences_and_volumes(dims):
    conv, pool = getattr(nn, f"Conv{dims}d"), getattr(nn, f"AdaptiveAvgPool{dims}d")
    layers = conv(2, 4, 3, 2, 1), nn.ReLU(), conv(4, 6, 3, 2, 1), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(6, 3)
    model = multipath(nn.Sequential(*layers), 2, input_size=(2, *[16] * dims))
    assert {name: router.w1.shape[-1] for name, router in routers(model).items()} == {"1_router": 4, "3_router": 6}


def test_the_size_is_a_tuple():
    with pytest.raises(TypeError, match=r"input_size is 12; it must be a tuple"):
        multipath(nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 2)), 2, ["0"], input_size=12)
