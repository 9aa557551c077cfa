import math

import pytest
import torch
from torch import nn

from fastroute.nn import SparseRouter
from tests.nn.sparse.routers import GATES, convs, spread, weighted


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_capacity_drops_the_least_probable_samples(top_k, gates):
    torch.manual_seed(0)
    router = spread(SparseRouter(6, convs(4), top_k, gates=gates, capacity_factor=0.6))
    x = torch.randn(40, 6, 4, 4)
    y, routing = router(x, return_routing=True)
    capacity = math.ceil(0.6 * top_k * 40 / 4)
    left, kept = [capacity] * 4, torch.zeros(40, top_k, dtype=torch.bool)
    probabilities = routing.scores.softmax(1).gather(1, routing.chosen)
    for c in range(top_k):
        for s in probabilities[:, c].argsort(descending=True).tolist():
            kept[s, c] = left[routing.chosen[s, c]] > 0
            left[routing.chosen[s, c]] -= int(kept[s, c])
    assert torch.equal(routing.kept, kept) and 0 < kept.sum() < 40 * top_k
    assert torch.equal(routing.load, torch.bincount(routing.chosen[kept], minlength=4))
    assert torch.equal(routing.dropped, torch.bincount(routing.chosen[~kept], minlength=4))
    assert torch.equal(routing.gates.gather(1, routing.chosen) > 0, kept)
    expected = weighted(routing.gates, router, x)
    torch.testing.assert_close(y, expected)
    options = {"retain_graph": True, "materialize_grads": True}
    parameters = [*router.parameters()]
    actual, wanted = (torch.autograd.grad(z.square().sum(), parameters, **options) for z in (y, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_capacity_keeps_channels_last():
    torch.manual_seed(0)
    router = spread(SparseRouter(6, convs(4), 2, capacity_factor=0.5)).to(memory_format=torch.channels_last)
    y, routing = router(torch.randn(16, 6, 5, 5).to(memory_format=torch.channels_last), return_routing=True)
    assert routing.dropped.sum() > 0 and y.is_contiguous(memory_format=torch.channels_last)


def test_no_capacity_in_evaluation_nor_where_there_is_room():
    torch.manual_seed(0)
    router, x = spread(SparseRouter(6, convs(4), 2, capacity_factor=0.5)), torch.randn(16, 6, 4, 4)
    y, routing = router.eval()(x, return_routing=True)
    assert routing.kept is None and routing.dropped.tolist() == [0] * 4
    router.train().capacity_factor = 4
    roomy, routing = router(x, return_routing=True)
    assert routing.kept.all() and torch.equal(roomy, y)
    assert router(x[:0]).shape == (0, 5, 4, 4)


def test_a_capacity_on_the_meta_device_drops_nothing():
    router = SparseRouter(6, convs(4), top_k=2, capacity_factor=0.5).to("meta")
    assert router(torch.empty(4, 6, 3, 3, device="meta")).shape == (4, 5, 3, 3)


@pytest.mark.parametrize("factor, samples, paths, capacity", [(1.1, 100, 10, 11), (0.7, 100, 7, 10), (1.25, 8, 4, 3)])
def test_the_capacity_is_that_of_the_decimal_number(factor, samples, paths, capacity):
    router = SparseRouter(3, [torch.nn.Identity() for _ in range(paths)], capacity_factor=factor)
    with torch.no_grad():
        router.b2[0] = 100.0  # all want the first
    load = router(torch.randn(samples, 3), return_routing=True)[1].load
    assert load.tolist() == [capacity] + [0] * (paths - 1)


class Overflows(nn.Module):
    def forward(self, x):
        return x * torch.inf


def test_dropped_samples_are_zero_beside_paths_that_overflow():
    router = spread(SparseRouter(6, [Overflows(), Overflows()], capacity_factor=0.5))
    y, decided = router(torch.randn(32, 6, 4, 4), return_routing=True)
    dropped = ~decided.kept[:, 0]
    assert dropped.any() and not y[dropped].any()
