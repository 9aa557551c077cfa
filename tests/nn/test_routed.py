"""The routing of networks whose forward does not return it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fastroute.models import create_model
from fastroute.nn import CrossConnection, SparseRouter, forward_with_routing


class Own(nn.Module):
    """Routers called once, twice, and for the network's own use."""

    def __init__(self):
        super().__init__()
        self.split = CrossConnection(3, 1, 2)
        self.cross = CrossConnection(3, 2, 2, activation="relu")
        self.sparse = SparseRouter(3, [nn.Conv2d(3, 3, 1) for _ in range(2)])
        self.asked = []

    def forward(self, x):
        xs = self.cross(xs=self.cross(self.split([x])))
        y, routing = self.sparse(xs[0] + xs[1], return_routing=True)
        self.asked.append(routing)
        return y.mean((2, 3))


def test_asks_each_router_of_any_network():
    torch.manual_seed(0)
    network, x = Own(), torch.randn(4, 3, 5, 5)
    plain = network(x)
    output, routing = forward_with_routing(network, x)
    assert torch.equal(output, plain) and torch.equal(network(x), plain)
    assert list(routing) == ["split", "cross", "cross_2", "sparse"]
    assert routing["sparse"] is network.asked[1]
    xs, split = network.split([x], return_routing=True)
    xs, first = network.cross(xs, return_routing=True)
    _, second = network.cross(xs, return_routing=True)
    for name, expected in (("split", split), ("cross", first), ("cross_2", second)):
        assert torch.equal(routing[name].gates, expected.gates) and torch.equal(routing[name].scores, expected.scores)
    routing["cross_2"].scores[..., 0].sum().backward()
    assert network.split.w2.grad is not None
    assert not any(router._forward_hooks or router._forward_pre_hooks for router in network.modules())


def test_takes_the_routing_that_a_network_returns():
    network, x = create_model("resnet20_cc2").eval(), torch.randn(2, 3, 8, 8)
    output, routing = forward_with_routing(network, x)
    expected, other = network(x, return_routing=True)
    assert torch.equal(output, expected) and list(routing) == list(other)


def test_leaves_no_hooks_behind_an_error():
    network = Own()
    with pytest.raises(ValueError, match="channels=3"):
        forward_with_routing(network, torch.randn(2, 4, 5, 5))
    assert not any(router._forward_hooks or router._forward_pre_hooks for router in network.modules())


def test_calls_of_other_threads_are_not_taken():
    network, arrived = Own().eval(), threading.Barrier(2)

    def meet(*_) -> None:  # with the hooks of both threads in place
        arrived.wait(10)

    network.register_forward_pre_hook(meet)
    images = torch.randn(2, 2, 3, 5, 5)
    with ThreadPoolExecutor(2) as pool, torch.no_grad():
        both = list(pool.map(lambda x: forward_with_routing(network, x), images))
    network._forward_pre_hooks.clear()
    for x, (output, routing) in zip(images, both, strict=True):
        expected, gates = forward_with_routing(network, x)
        torch.testing.assert_close(output, expected)
        assert list(routing) == list(gates)
        for name in gates:
            torch.testing.assert_close(routing[name].gates, gates[name].gates)


def test_a_network_may_be_a_router_itself():
    router, x = SparseRouter(4, [nn.Identity() for _ in range(2)]), torch.randn(3, 4, 5, 5)
    y, routing = forward_with_routing(router, x)
    expected, own = router(x, return_routing=True)
    assert torch.equal(y, expected) and list(routing) == [""] and torch.equal(routing[""].gates, own.gates)


class Asks(nn.Module):
    """A network that asks its router by position."""

    def __init__(self):
        super().__init__()
        self.router = SparseRouter(3, [nn.Identity() for _ in range(2)])

    def forward(self, x):
        y, decided = self.router(x, True)
        return y * decided.gates.sum(1)[:, None]


def test_a_network_may_ask_by_position():
    network, x = Asks(), torch.randn(4, 3)
    output, decided = forward_with_routing(network, x)
    assert torch.equal(output, network(x)) and list(decided) == ["router"]


class Elsewhere(nn.Module):
    """A path that calls its router once more, in another thread."""

    def forward(self, x):
        if threading.current_thread() is threading.main_thread():
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(self.router[0], x).result()
        return x


def test_a_call_in_another_thread_meanwhile_is_not_taken():
    path = Elsewhere()
    router = SparseRouter(3, [path])
    path.router = [router]  # in a list, so that it is no module of the path
    x = torch.randn(4, 3)
    output, decided = forward_with_routing(nn.Sequential(router), x)
    assert torch.equal(output, x) and list(decided) == ["0"]
