import io
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from fastroute import models
from fastroute.diagnostics.routing import skewed_gates
from fastroute.diagnostics.statistics import RouterStatistics, add_routing
from fastroute.models.cifar_resnet import cifar_resnet
from fastroute.nn import Routing, SparseRouting
from fastroute.training import gates_table, mean_gates, routing_share


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batches(*sizes):
    return [(torch.randn(size, 3, 8, 8), torch.zeros(size, dtype=torch.long)) for size in sizes]


class OnlyRouting(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = cifar_resnet(8, paths=2, in_chans=3).stack1_router
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x):
        x = x.mean(1, keepdim=True) * self.weight[:, None, None]
        xs = [x.repeat(1, 1, 8, 8)] * 2
        for _ in range(8):
            xs = self.router(xs)
        return xs[0].mean((2, 3))


def test_mean_gates_weigh_every_image_the_same():
    model = cifar_resnet(8, paths=2)
    nn.init.normal_(model.stem_router.w2, std=5)
    data = batches(5, 2)
    gates = mean_gates(model, data)
    assert model.training and next(iter(gates)) == "stem_router" and gates["stack3_router"].shape == (2, 2)
    model.eval()
    _, routing = model(torch.cat([images for images, _ in data]), return_routing=True)
    torch.testing.assert_close(gates["stem_router"].float(), routing["stem_router"].gates.mean(0))


def test_statistics_of_known_gates():
    gates = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.9, 0.1], [0.97, 0.03]]])  # 2 samples, 2 paths in, 2 out
    found = RouterStatistics.of(Routing(gates, gates.log())).cpu()
    torch.testing.assert_close(found.mean_gates.float(), torch.tensor([[0.7, 0.3], [0.985, 0.015]]))
    assert found.shares_of_maximum.tolist() == [[1, 0], [1, 0]]
    row = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)
    assert found.mean_entropy[0].item() == pytest.approx((1 + row) / 2)
    assert found.dead_fraction == 1 / 4


def test_skewed_gates_are_counted():
    first = torch.tensor([[[0.3, 0.7], [0.2, 0.8]], [[0.5, 0.5], [0.6, 0.4]]])  # path 1's first gate never above 0.5
    routers = {
        "a": RouterStatistics.of(Routing(first, first)),
        "one way": RouterStatistics.of(Routing(*[first[..., :1]] * 2)),
    }
    assert skewed_gates(routers) == {"gates": 4, "never_above": 1, "never_below": 1}
    parts = {}
    for sample in first.split(1):
        add_routing(parts, {"a": Routing(sample, sample)})
    assert skewed_gates(parts) == skewed_gates(routers)
    four = torch.tensor([[[0.1, 0.2, 0.3, 0.4]], [[0.2, 0.25, 0.2, 0.35]]])  # even shares of 0.25
    four = {"four": RouterStatistics.of(Routing(four, four))}
    assert skewed_gates(four) == {"gates": 4, "never_above": 2, "never_below": 1}
    assert skewed_gates({}) == {"gates": 0, "never_above": 0, "never_below": 0}


def test_a_sparse_router_is_one_of_one_incoming_path():
    gates = torch.tensor([[0.75, 0.0, 0.25], [0.0, 0.0, 1.0]])
    found = RouterStatistics.of(SparseRouting(gates, gates, None, None)).cpu()
    assert found.mean_gates.tolist() == [[0.375, 0, 0.625]] and found.dead_fraction == pytest.approx(1 / 3)


def test_statistics_add_up_over_batches_and_processes():
    gates = torch.rand(6, 2, 3).softmax(2)
    whole, parts = {}, {}
    add_routing(whole, {"a": Routing(gates, gates)})
    for part in gates.split([1, 2, 3]):
        add_routing(parts, {"a": Routing(part, part)})
    add_routing(parts, {})
    for name in ("mean_gates", "mean_entropy", "shares_of_maximum", "peak", "trough"):
        torch.testing.assert_close(getattr(parts["a"], name), getattr(whole["a"], name))
    assert parts["a"].samples == 6


def test_networks_without_routers_have_no_gates():
    assert mean_gates(models.create_model("resnet20"), batches(2)) == {}


def test_table_has_a_row_for_each_path():
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(gates_table({"a_router": torch.tensor([[0.25, 0.75]]), "b_router": torch.eye(2)}))
    text = console.export_text()
    assert "a_router" in text and "0.250" in text and "0.750" in text and text.count("1.000") == 2


def test_share_is_that_of_the_routing_operators():
    batch = batches(16)[0]
    model = cifar_resnet(8, paths=2)
    before = [p.clone() for p in model.parameters()]
    assert 0 < routing_share(model, batch, steps=2) < 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert routing_share(cifar_resnet(8), batch, steps=2) == 0
    assert routing_share(OnlyRouting(), batch, steps=2) > 0.2


def test_gates_that_are_nan_are_not_counted():
    gates = torch.full((3, 1, 2), float("nan"))
    with pytest.raises(ValueError, match="the gates of a are NaN; the network has diverged"):
        skewed_gates({"a": RouterStatistics.of(Routing(gates, gates)).cpu()})
