"""Random networks made multi-path: `python -m tests.attack.conversions`.

Their layers share modules, work in-place and skip. Paths that start as equal copies compute what the network does.
"""

import collections
import random
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fastroute import multipath
from tests.attack import forked

LAYERS = (
    "conv",
    "conv",
    "bn",
    "relu",
    "gelu",
    "pool",
    "dropout",
    "block",
    "F.relu",
    "skip",
    "gain",
    "F.pool",
    "product",
)


class Case(NamedTuple):
    layers: list[tuple[str, int]]  # and which of several modules
    in_place: bool
    paths: int
    cuts: int
    routing: str | None
    seed: int


def draw(r: random.Random) -> Case:
    return Case(
        layers=[(r.choice(LAYERS), r.randrange(4)) for _ in range(r.randint(4, 14))],
        in_place=r.random() < 0.5,
        paths=r.choice([2, 3]),
        cuts=r.randint(1, 3),
        routing=r.choice([None, "cc", "stitch"]),
        seed=r.randrange(1 << 30),
    )


class Network(nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.case = case
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.relu, self.gelu, self.dropout = nn.ReLU(case.in_place), nn.GELU(), nn.Dropout(0.3)
        self.pool = nn.MaxPool2d(2, 1)
        relu = nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), relu, nn.Conv2d(8, 8, 1), relu)
        self.gain = nn.Parameter(torch.rand(8, 1, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = kept = self.stem(x)
        for layer, k in self.case.layers:
            if layer == "conv":
                x = self.convs[k](x)
            elif layer == "bn":
                x = self.bns[k % 2](x)
            elif layer in ("relu", "gelu", "dropout", "block"):
                x = getattr(self, layer)(x)
            elif layer == "pool":
                x = kept = self.pool(x)
            elif layer == "F.pool":
                x = kept = F.avg_pool2d(x, 2, 1)
            elif layer == "F.relu":
                x = F.relu(x)
            elif layer == "skip":
                x = kept = x + kept
            elif layer == "gain":
                x = x * self.gain
            else:
                x = torch.sigmoid(x) * x
        return self.head(x.mean((2, 3)))


def run(case: Case) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(case.seed)
    network, x = Network(case), torch.randn(2, 3, 20, 20)
    calls = collections.Counter()
    for name, module in network.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    try:
        network(x).sum().backward()
    except RuntimeError:  # a value that its backward needs was overwritten: of the network itself
        return
    for module in network.modules():
        module._forward_hooks.clear()
    network.eval()
    expected = network(x)
    once = [name for name, count in calls.items() if name and count == 1 and name != "head" and "block." not in name]
    cuts = random.Random(case.seed).sample(once, min(case.cuts, len(once)))
    try:
        paths = multipath(network, case.paths, cuts, case.routing, init="copy", noise=0.0, input_size=(3, 20, 20))
    except ValueError as error:
        assert "route_after names" in str(error), error
        return
    torch.testing.assert_close(paths.eval()(x), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(network(x), expected, rtol=0, atol=0)
    paths.train()(x).square().mean().backward()


SIMPLE = Case([("relu", 0), ("conv", 1), ("relu", 0)], False, 2, 1, "cc", 0)

if __name__ == "__main__":
    forked.main(draw, run, SIMPLE)
