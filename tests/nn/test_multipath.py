import pytest
import torch
from torch import nn

from fastroute.nn import CrossConnection, MultiPathNetwork, ParallelPaths


def test_each_path_has_its_own_module():
    double, negate = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(double.weight, 2.0)
    nn.init.constant_(negate.weight, -1.0)
    parallel = ParallelPaths([double, negate])
    one, three = torch.ones(1, 1), torch.full((1, 1), 3.0)
    assert [y.item() for y in parallel([one, three])] == [2.0, -3.0]
    assert [y.item() for y in parallel([three])] == [6.0, -3.0]
    with pytest.raises(ValueError, match="xs has 3 tensors; it must have one for each of the 2 paths, or one"):
        parallel([one, one, one])


def test_network_averages_its_paths_and_names_its_routers():
    heads = [nn.Linear(4, 3), nn.Linear(4, 3)]
    network = MultiPathNetwork({"fork": CrossConnection(4, 1, 2), "head": ParallelPaths(heads)})
    x = torch.randn(5, 4)
    logits, routing = network(x, return_routing=True)
    assert list(routing) == ["fork"] and routing["fork"].gates.shape == (5, 1, 2)
    xs = network.fork([x])
    torch.testing.assert_close(logits, (heads[0](xs[0]) + heads[1](xs[1])) / 2)
    assert torch.equal(network(x), logits)
