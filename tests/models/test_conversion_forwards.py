"""What a forward around the cuts of `multipath` may do."""

import random

import pytest
import torch
from torch import nn

from fastroute.models import multipath
from tests.models.toys import SIZE, routers


def does(what):
    """Return a network whose forward does something that a graph would lose."""

    class Doing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)
            self.count, self.keep = 0, nn.Identity()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            return what(self, self.conv(x))

    return Doing


def frozen(network, x):
    with torch.no_grad():
        x = 2 * network.keep(x)
    return network.fc(x.mean((2, 3)))


def in_full_precision(network, x):
    with torch.autocast("cpu", enabled=False):
        return network.fc(x.mean((2, 3)))


def with_gradients(network, x):
    with torch.enable_grad():
        return network.fc(x.mean((2, 3)))


def dropping(network, x):
    return network.fc((network.keep(x) if random.random() < 0.5 else x).mean((2, 3)))


def counting(network, x):
    network.count += 1
    return network.fc(x.mean((2, 3)))


def adding(network, x):
    network.calls.add_(1)
    return network.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    "forward, reason",
    [
        (frozen, "sets gradients or autocast"),
        (in_full_precision, "sets gradients or autocast"),
        (with_gradients, "sets gradients or autocast"),
        (dropping, "draws random numbers outside of tensors"),
        (counting, "changes count"),
        (adding, "changes calls"),
    ],
)
def test_refuses_what_a_graph_would_lose(forward, reason):
    for seed in range(4):
        random.seed(seed)
        with pytest.raises(ValueError, match=f"whose forward {reason}, .* into a module of its own"):
            multipath(does(forward)(), 2, ["conv"], input_size=SIZE)


def test_what_is_in_a_module_of_its_own_stays_as_it_is():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.last = does(frozen)(), nn.Linear(2, 2)

        def forward(self, x):
            return self.last(self.part(x))

    network, x = Whole(), torch.randn(2, *SIZE)
    model = multipath(network, 2, ["part"], input_size=SIZE, init="copy", noise=0)
    model(x).sum().backward()
    assert model.stem[0].part.conv.weight.grad is None and model.stem[0].part.fc.weight.grad is not None


@pytest.mark.parametrize("cuts", [["conv"], "auto"])
def test_keeps_tensors_that_a_forward_makes(cuts):
    ramp = does(lambda network, x: network.fc((network.keep(x) + torch.arange(3.0).view(3, 1, 1)).mean((2, 3))))
    network, x = ramp(), torch.randn(2, *SIZE)
    network.conv.stride = 2, 2
    model = multipath(network, 2, cuts, input_size=SIZE, init="copy", noise=0)
    for router in routers(model).values():
        router.w2.data.zero_()
    torch.testing.assert_close(model(x), network(x))
