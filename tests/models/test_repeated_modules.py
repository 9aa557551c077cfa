"""`multipath` of networks that call a module more than once, work in-place, or end a part in a dropout."""

import pytest
import torch
from torch import nn

from fastroute import multipath


class Reused(nn.Module):
    """One ReLU and one pool for all layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.conv3, self.head = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 5)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.mean, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()

    def forward(self, x):
        x = self.pool(self.relu(self.conv2(self.pool(self.relu(self.conv1(x))))))
        x = self.relu(self.conv3(x))
        return self.head(self.flat(self.mean(self.relu(self.pool(x)))))


def sequential():
    relu = nn.ReLU()
    first = [nn.Conv2d(3, 8, 3), relu, nn.Conv2d(8, 8, 3), relu, nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Conv2d(8, 8, 3), relu, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def test_layers_that_are_called_again_are_kept():
    torch.manual_seed(0)
    x = torch.randn(3, 3, 16, 16)
    for network, cut in ((Reused(), "conv2"), (Reused(), "conv3"), (sequential(), "4"), (sequential(), "5")):
        for routing in (None, "cc", "stitch"):
            paths = multipath(network, 2, [cut], routing, init="copy", noise=0.0, input_size=(3, 16, 16))
            torch.testing.assert_close(paths(x), network(x))
            paths(x).sum().backward()


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.again, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.again(self.conv(self.again(x))).mean((2, 3)))


def test_no_path_shares_weights_with_the_stem():
    network = multipath(Shared(), 2, ["conv"], "stitch", init="copy", noise=0.0, input_size=(3, 8, 8))
    shared = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    assert shared == {name for name, _ in network.named_parameters()}
    x = torch.randn(2, 3, 8, 8)
    assert network(x).shape == (2, 4)


class OneToAll(nn.Module):
    """A router without `out_paths`."""

    def __init__(self, paths):
        super().__init__()
        self.paths = paths

    def forward(self, xs):
        return [sum(xs) for _ in range(self.paths)]


def test_own_routers_before_the_head_open_all_paths():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    paths = multipath(network, 2, ["3"], routing=lambda channels, m, n: OneToAll(n), input_size=(3, 8, 8)).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(paths.forward_head(paths.forward_features(x)), paths(x))


class InPlace(nn.Module):
    """A ReLU that overwrites the value of the cut, which is read once more."""

    def __init__(self):
        super().__init__()
        self.stem, self.relu, self.head = nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Linear(8, 5)
        self.dropout = nn.Dropout()

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.dropout(self.relu(x) + x).mean((2, 3)))


@pytest.mark.parametrize("routing", [None, "cc", "stitch"])
@pytest.mark.parametrize("cut", ["stem", "dropout"])
def test_values_that_are_overwritten_are_those_of_the_network(cut, routing):
    network, x = InPlace().eval(), torch.randn(2, 3, 8, 8)
    paths = multipath(network, 2, [cut], routing, init="copy", noise=0.0, input_size=(3, 8, 8)).eval()
    torch.testing.assert_close(paths(x), network(x))
