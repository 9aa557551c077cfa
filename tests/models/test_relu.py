import copy
import pickle
import random
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastroute.models import conversion, multipath
from fastroute.nn import CrossConnection, CrossStitch
from tests.models.toys import SIZE, routers, toy_paths


class Ends(nn.Module):
    """A block that ends in a ReLU in one way or another."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), way
        self.relu, self.act = nn.ReLU(inplace=True), nn.ReLU()
        if way == "counts":
            self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        y = self.norm(self.conv(self.relu(x + 0)))
        if self.way == "module":
            return self.act(y + x)
        if self.way == "module called twice":
            y += x
            return self.relu(y)
        if self.way == "function":
            return F.relu(y, inplace=True)
        if self.way == "method":  # of the same name as the module before
            return (y + x).relu()
        if self.way == "counts":
            self.calls += 1
        if self.way == "moody" and self.training:
            y = y * 2
        if self.way == "scaled":
            return F.relu(y) * 2
        return self.act(y) if self.way != "silu" else F.silu(y)


def lower(module, inputs, output):
    return output - 0.1


def on_stage(block):
    """A stem that ends in ReLU and max-pool, and a stage that ends in the block."""
    stage = nn.Sequential(nn.Conv2d(4, 4, 1), block)
    stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3, padding=1), relu=nn.ReLU(inplace=True)))
    head = OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(4, 7))
    return nn.Sequential(OrderedDict(stem=stem, max=nn.MaxPool2d(3, 2, 1), stage=stage, **head))


def check_fused(network, cuts, monkeypatch, x, init="fresh"):
    """Return the routers' activations, after comparing with the network in which no router applies a ReLU."""
    results, models = [], []
    for fuse in (True, False):
        if not fuse:
            monkeypatch.setattr(conversion, "take_relu", lambda *arguments: False)
        torch.manual_seed(0)
        model = multipath(network, 2, cuts, init=init, input_size=x.shape[1:]).train()
        torch.manual_seed(1)
        logits = model(x)
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        models.append(model)
        results.append([logits, *gradients, *model.state_dict().values(), model.eval()(x)])
    monkeypatch.undo()
    fused, plain = models
    assert list(fused.state_dict()) == list(plain.state_dict()) and fused.origins == plain.origins
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert not any(router.activation for router in routers(plain).values())
    return [router.activation for router in routers(fused).values()]


FUSED = ["module", "module called twice", "function", "method"]


@pytest.mark.parametrize("way", [*FUSED, "counts", "moody", "scaled", "silu", "hooked"])
def test_routers_take_the_relu_that_stands_before_them(way, monkeypatch):
    block = Ends("module" if way == "hooked" else way)
    if way == "hooked":
        block.register_forward_hook(lower)
    network, x = on_stage(block).double(), torch.randn(3, *SIZE, dtype=torch.float64)
    before, init = str(network), "copy" if way == "module" else "fresh"
    expected = ["relu", "relu" if way in FUSED else None]
    assert check_fused(network, ["max", "stage"], monkeypatch, x, init) == expected
    assert str(network) == before
    model = toy_paths(network, 2, ["max", "stage"]).eval()
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), copy.deepcopy(model)(x))


def test_a_relu_that_others_take_as_well_stays(monkeypatch):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.max = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
            self.fc, self.next = nn.Linear(4, 7), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.relu(self.conv(x))
            x = self.relu(self.next(self.max(x) + x.mean()))
            return self.fc(x.mean((2, 3)))

    assert check_fused(Shared(), ["next"], monkeypatch, torch.randn(2, *SIZE)) == [None]
    stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    twice = nn.Sequential(OrderedDict(a=stem, b=nn.Conv2d(4, 3, 1), c=nn.Sequential(stem, nn.Conv2d(4, 4, 1))))
    network = nn.Sequential(OrderedDict(body=twice, flat=nn.Flatten(), fc=nn.Linear(4 * 256, 7)))
    assert check_fused(network, ["body.a"], monkeypatch, torch.randn(2, *SIZE)) == ["relu"]


class Linear4(nn.Module):
    """A convolution, with a ReLU only by default."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x, linear=False):
        return self.conv(x) if linear else self.act(self.conv(x))


class NoGraph(nn.Module):
    """A block that ends in a ReLU, or seems to, and whose forward has to run as it is."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.relu, self.way = nn.Conv2d(4, 4, 1), nn.ReLU(), way
        self.inner = Linear4() if way in ("argument", "keyword") else None
        if way == "leaky":
            self.relu = nn.LeakyReLU(0.2)
        if way == "hooked":
            self.relu.register_forward_hook(lower)
        if way == "own forward":
            self.forward = lambda x: self.conv(x) - 0.1

    def forward(self, x):
        y = self.relu(self.conv(x))
        if self.way == "argument":
            return self.inner(y, True)
        if self.way == "keyword":
            return self.inner(y, linear=True)
        if self.way == "draws" and random.random() < 0:
            return x
        if self.way == "no_grad":
            with torch.no_grad():
                y = self.conv(y)
        if self.way == "no autocast":
            with torch.autocast("cuda", enabled=False):
                y = self.conv(y)
        return self.relu(y + x)


@pytest.mark.parametrize(
    "way", ["leaky", "hooked", "own forward", "argument", "keyword", "draws", "no_grad", "no autocast"]
)
def test_a_relu_stays_where_no_graph_computes_the_same(way, monkeypatch):
    """The forward of the block runs as it is."""
    modes = torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
    network, x = on_stage(NoGraph(way)).double(), torch.randn(3, *SIZE, dtype=torch.float64)
    model = toy_paths(network, 2, ["max", "stage"], init="copy", noise=0)
    assert [router.activation for router in routers(model).values()] == ["relu", None]
    assert isinstance(model.stage[0][1], NoGraph)
    assert modes == (torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())
    if way != "own forward":  # which deepcopy binds to the original
        for router in routers(model).values():
            nn.init.zeros_(router.w2)
        torch.testing.assert_close(model.eval()(x), network.eval()(x))


def test_a_relu_before_the_last_router_stays():
    """A router that takes no ReLU stands between it and the max-pool; a hook on a max-pool sees the ReLU's output."""

    def router(channels, m, n):
        return CrossStitch(m, n) if m == 1 else CrossConnection(channels, m, n)

    network = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), relu=nn.ReLU(), max=nn.MaxPool2d(2)))
    network.append(nn.Flatten()).append(nn.Linear(256, 7))
    assert toy_paths(network, 2, ["relu", "max"], router).max_router.activation is None
    assert toy_paths(network, 2, ["max"]).max_router.activation == "relu"
    network.max.register_forward_hook(lower)
    assert toy_paths(network, 2, ["max"]).max_router.activation is None


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_resnet_blocks_end_in_a_relu(source, block, monkeypatch):
    library = pytest.importorskip(f"{source}.models.resnet")
    kind = getattr(library, block)
    down = nn.Sequential(nn.Conv2d(4, 4 * kind.expansion, 1), nn.BatchNorm2d(4 * kind.expansion))
    stem = OrderedDict(conv=nn.Conv2d(3, 4, 3, 2, 1), bn=nn.BatchNorm2d(4), act=nn.ReLU(inplace=True))
    stages = OrderedDict(stage1=nn.Sequential(kind(4, 4, 1, down), kind(4 * kind.expansion, 4)), pool=nn.MaxPool2d(2))
    head = OrderedDict(mean=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(4 * kind.expansion, 7))
    network = nn.Sequential(OrderedDict(**stem, **stages, **head))
    assert check_fused(network.double(), ["act", "stage1"], monkeypatch, torch.randn(2, *SIZE).double()) == ["relu"] * 2


def test_all_routers_of_a_resnet_take_a_relu(monkeypatch):
    timm = pytest.importorskip("timm")
    network, x = timm.create_model("resnet18", num_classes=7).eval(), torch.randn(2, 3, 64, 64)
    fused = multipath(network, 2, init="copy", noise=0)
    assert [router.activation for router in routers(fused).values()] == ["relu"] * 5
    monkeypatch.setattr(conversion, "take_relu", lambda *arguments: False)
    plain = multipath(network, 2, init="copy", noise=0)
    assert list(fused.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fused(x), plain(x))
