import copy
import pickle
import random
import tarfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastroute
from fastroute.models import conversion, multipath
from fastroute.nn import CrossConnection, CrossStitch, MultiPathNetwork

PHOTOGRAPHS = Path(__file__).parents[3] / "shared/data/imagenet-sample.tar"
SIZE = (3, 16, 16)


class Block(nn.Module):
    """With control flow that no tracer follows: what is between cuts is never looked into."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        if x.shape[0] < 1:
            return x
        return x + self.norm(self.conv(x))


class Toy(nn.Module):
    """A stem, two stages and a head, with functional operators, a shared module and a skip connection around `wide`."""

    def __init__(self, drop=0.0):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(2)
        self.stage1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)
        self.wide = nn.Conv2d(8, 12, 1)
        self.skip = nn.Conv2d(8, 12, 1)
        self.stage2 = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.Tanh())
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.dense = nn.Linear(12, 10)
        self.fc = nn.Linear(10, 7)
        self.unused = nn.Linear(1, 1)
        self.drop = drop

    def forward(self, x, extra=None):
        assert extra is None
        x = self.pool(self.stem(x) * self.scale)
        x = self.relu(self.stage1(x))
        x = self.pool(self.wide(x) + self.skip(x))
        x = self.stage2(x * self.scale).mean((2, 3))
        x = F.dropout(torch.relu(self.dense(x)), self.drop, self.training) if self.drop else self.dense(x).relu()
        return self.fc(x)


CUTS = ["stem", "stage1", "stage2", "dense"]
toy_paths = partial(multipath, input_size=SIZE)


def routers(model):
    return {name: module for name, module in model.named_children() if isinstance(module, CrossConnection)}


def test_parts_and_routers_in_turn():
    assert fastroute.multipath is multipath
    model = toy_paths(Toy(), 3, ["stage2", "stem", "dense", "stage1"])  # in any order
    assert isinstance(model, MultiPathNetwork)
    names = [name for cut in CUTS for name in (cut, f"{cut}_router")] + ["head"]
    assert [name for name, _ in model.named_children()] == names
    shapes = [(r.channels, r.in_paths, r.out_paths) for r in routers(model).values()]
    assert shapes == [(8, 1, 3), (8, 3, 3), (12, 3, 3), (10, 3, 3)]
    assert [len(module) for module in model.children() if not isinstance(module, CrossConnection)] == [1, 3, 3, 3, 3]
    logits, routing = model(torch.randn(5, *SIZE), return_routing=True)
    assert logits.shape == (5, 7) and list(routing) == [f"{name}_router" for name in CUTS]
    assert routing["stage1_router"].gates.shape == (5, 3, 3)


def test_state_dict_has_the_names_of_the_network():
    keys = set(toy_paths(Toy(), 2, CUTS).state_dict())
    assert {"stem.0.0.weight", "stage1.1.stage1.0.weight", "stage1.1.scale", "head.1.fc.bias"} <= keys
    assert {"stage2.0.wide.weight", "stage2.1.stage2.0.weight", "stem_router.w1", "dense.0.dense.weight"} <= keys
    assert not any("unused" in key for key in keys)


@pytest.mark.parametrize("cuts", [CUTS, ["input", "stage2"], ["stage1"], "auto"])
def test_copies_start_as_the_network_itself(cuts):
    network, x = Toy().eval(), torch.randn(4, *SIZE)
    model = toy_paths(network, 3, cuts, init="copy", noise=0)
    with torch.no_grad():
        for router in routers(model).values():
            router.w2.zero_()  # gates of 1/n exactly
    torch.testing.assert_close(model(x), network(x))
    noisy = toy_paths(network, 3, cuts, init="copy", noise=0.1)
    assert 1e-4 < (noisy(x) - network(x)).abs().max() < 1


def test_fresh_paths_have_the_weights_in_another_order():
    network = Toy()
    before = copy.deepcopy(network.state_dict())
    model = toy_paths(network, 2, CUTS)
    first, second = (model.stage2[i].wide.weight for i in range(2))
    assert torch.equal(first, network.wide.weight) and first.data_ptr() != network.wide.weight.data_ptr()
    assert not torch.equal(first, second)
    assert torch.equal(first.flatten().sort().values, second.flatten().sort().values)
    assert torch.equal(model.stem[0][0].weight, network.stem[0].weight)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_computes_what_its_routers_and_parts_compute():
    model, x = toy_paths(Toy(), 2, CUTS).eval(), torch.randn(3, *SIZE)
    parts = model
    xs = parts.stem_router([parts.stem[0](x)])
    xs = parts.stage1_router([parts.stage1[i](xs[i]) for i in range(2)])
    xs = parts.stage2_router([parts.stage2[i](xs[i]) for i in range(2)])
    xs = parts.dense_router([parts.dense[i](xs[i]) for i in range(2)])
    torch.testing.assert_close(model(x), (parts.head[0](xs[0]) + parts.head[1](xs[1])) / 2)


def test_other_routing():
    stitched = toy_paths(Toy(), 2, CUTS, "stitch")
    assert isinstance(stitched.stem_router, CrossStitch) and stitched.stem_router.gates.shape == (1, 2)
    assert stitched(torch.randn(2, *SIZE), return_routing=True)[1] == {}
    assert toy_paths(Toy(), 2, CUTS, partial(CrossConnection, gate_channels=5)).stage1_router.gate_channels == 5


def test_paths_without_routing_share_the_first_tensor_unharmed():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1), nn.Flatten())
    model = toy_paths(network, 2, ["0", "2"], None, init="copy", noise=0)
    assert [name for name, _ in model.named_children()] == ["stem", "2", "head"]
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(x), network(x))
    model(x).square().sum().backward()  # an in-place ReLU on the shared tensor would have spoilt this
    assert network[1].inplace and all(p.grad is not None for p in model.parameters())


class Transformer(nn.Module):
    """Blocks over tokens (N, L, C), whose number does not change."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Conv2d(3, 6, 4, 4), nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
        self.fc = nn.Linear(6, 7)

    def forward(self, x):
        return self.fc(self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def test_tokens_are_routed_by_their_channels():
    network, x = Transformer().eval(), torch.randn(4, *SIZE)
    with pytest.raises(ValueError, match=r"name modules to cut behind, such as blocks\.1,blocks\.2,blocks\.3"):
        toy_paths(network, 2)
    model = toy_paths(network, 2, ["blocks.1", "blocks.2"], init="copy", noise=0)
    assert [router.channels for router in routers(model).values()] == [6, 6]
    with torch.no_grad():
        for router in routers(model).values():
            router.w2.zero_()
    torch.testing.assert_close(model(x), network(x))


class Branches(nn.Module):
    """A stage that takes a list of maps and writes into it, as HRNet's do."""

    def forward(self, xs):
        xs[0] = F.relu(xs[0])
        return [xs[0], xs[1] + xs[0][:, :1]]


class MultiBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.stage = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 3, 2, 1), Branches()
        self.merge, self.fc = nn.Conv2d(4, 5, 3, 2, 1), nn.Linear(5, 7)

    def forward(self, x):
        low, high = self.stage([self.a(x), self.b(x)])
        return self.fc(self.merge(low + high).mean((2, 3)))


def test_lists_of_tensors_pass_between_modules():
    network, x = MultiBranch().eval(), torch.randn(2, *SIZE)
    model = toy_paths(network, 2, ["merge"], init="copy", noise=0)
    with torch.no_grad():
        model.merge_router.w2.zero_()
    torch.testing.assert_close(model(x), network(x))


def test_auxiliary_heads_are_left_out():
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.googlenet(num_classes=7, init_weights=False).eval()
    model = multipath(network, 2, ["inception3b"], init="copy", noise=0, input_size=(3, 32, 32))
    assert network.aux1 is not None and not any("aux" in name for name, _ in model.named_modules())
    assert model.train()(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert str(model.specification) == "torchvision:googlenet (2 paths)"


class InPlace(nn.Module):
    """Overwrites what the first convolution returns, in one way or another."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.rest, self.way = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), way
        self.block = nn.Sequential(nn.SiLU(inplace=True), nn.Conv2d(4, 4, 1))

    def forward(self, x):
        x = self.conv(x)
        if self.way == "in a block":
            x = self.block(x)
        elif self.way == "function":
            x = F.silu(x, inplace=True)
        elif self.way == "method":
            x = x.mul_(2)
        else:
            x += 1
        return self.rest(x).mean((2, 3))


@pytest.mark.parametrize("way", ["in a block", "function", "method", "operator"])
def test_paths_without_routing_may_write_over_what_they_share(way):
    network, x = InPlace(way), torch.randn(2, 3, 4, 4)
    model = toy_paths(network, 3, ["conv"], None, init="copy", noise=0)
    torch.testing.assert_close(model(x), network(x))
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


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
    """The routers' activations, after a comparison with the network of which no router takes a ReLU."""
    results, models = [], []
    for fuse in (True, False):
        if not fuse:
            monkeypatch.setattr(conversion, "_take_relu", lambda *arguments: False)
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
    monkeypatch.setattr(conversion, "_take_relu", lambda *arguments: False)
    plain = multipath(network, 2, init="copy", noise=0)
    assert list(fused.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fused(x), plain(x))


def test_keeps_the_mode_the_device_and_the_type():
    assert not any(module.training for module in toy_paths(Toy().eval(), 2, CUTS).modules())
    assert all(module.training for module in toy_paths(Toy(), 2, CUTS).modules())
    with torch.device("meta"):
        network = Toy()
    assert {p.device.type for p in toy_paths(network, 2, CUTS).parameters()} == {"meta"}
    model = toy_paths(Toy().bfloat16(), 2, CUTS)
    assert model(torch.randn(2, *SIZE, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_functional_dropout_follows_the_mode():
    model, x = toy_paths(Toy(drop=0.5).eval(), 2, CUTS), torch.randn(8, *SIZE)
    assert not model.head[0].training
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_copies_pickles_compiles_and_trains():
    model, x = toy_paths(Toy(drop=0.1), 2, CUTS).eval(), torch.randn(4, *SIZE)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    F.cross_entropy(model.train()(x), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_auto_cuts_behind_the_last_module_of_each_resolution():
    features = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()),
        nn.MaxPool2d(2),
        Block(4),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
    )
    network = nn.Sequential(features, nn.Flatten(), nn.Linear(6, 3))
    model = toy_paths(network, 2)
    assert list(routers(model)) == ["0_2_router", "0_4_router"]
    assert [r.channels for r in routers(model).values()] == [4, 6]
    assert list(routers(toy_paths(Toy(), 2))) == ["relu_router", "stage2_router"]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(self.conv(self.conv(x)).mean((2, 3)))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.conv(x)
        return x, x


class Untraceable(Twice):
    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3))) if x.sum() > 0 else self.fc(x.mean((2, 3)))


class Moody(Twice):
    def forward(self, x):
        x = self.conv(x) if self.training else 2 * self.conv(x)
        return self.fc(x.mean((2, 3)))


class Inner(Twice):
    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def forward(self, x):
        return self.pair(self.conv(x))


class Tokens(Twice):
    def __init__(self):
        super().__init__()
        self.flat, self.pair = nn.Flatten(2), Pair()

    def forward(self, x):
        return self.fc(self.flat(self.pair(x)[0]).mean(2))


@pytest.mark.parametrize(
    "network, arguments, message",
    [
        (Toy, {"paths": 1}, "paths is 1; it must be 2 to 8"),
        (Toy, {"paths": 9}, "paths is 9; it must be 2 to 8"),
        (Toy, {"route_after": ["stage3"]}, "names 'stage3'; there is no such module: did you mean stage"),
        (Toy, {"route_after": ["???"]}, "model.named_modules"),
        (Toy, {"route_after": []}, "route_after is empty"),
        (Toy, {"route_after": "stem"}, "route_after is 'stem'; it must be a list of names, or 'auto'"),
        (Toy, {"route_after": ["stem", "stem"]}, "names 'stem' 2 times"),
        (Toy, {"route_after": ["stage1", "stage1.1"]}, "'stage1' and 'stage1.1', which return the same tensor"),
        (Toy, {"route_after": ["wide"]}, "names 'wide', but the rest of the network needs more .* 'relu' as well"),
        (Toy, {"route_after": ["unused"]}, "names 'unused', which is called 0 times"),
        (Toy, {"routing": "cp"}, "routing is 'cp'; it must be 'cc', 'stitch', None or a function"),
        (Toy, {"init": "zeros"}, "init is 'zeros'; it must be 'fresh' or 'copy'"),
        (Toy, {"noise": -1}, "noise is -1; it must be at least 0"),
        (Toy, {"input_size": (4, 16, 16)}, r"input_size is \(4, 16, 16\); model cannot take such images"),
        (Twice, {"route_after": ["conv"]}, "names 'conv', which is called 2 times; it must be called once"),
        (Twice, {"route_after": "auto"}, "no module behind which the resolution changes is found"),
        (Pair, {"route_after": ["conv"]}, r"model is a Pair that returns \(.*; it must return one tensor"),
        (Inner, {"route_after": ["conv"]}, "model is a Inner that returns pair; it must return one tensor"),
        (Untraceable, {"route_after": ["conv"]}, "model is a Untraceable, which torch.fx cannot trace: TraceError"),
        (Moody, {"route_after": ["conv"]}, "forward in training is another than in evaluation"),
        (Tokens, {"route_after": ["pair"]}, "'pair', which returns no tensor; routing takes"),
        (lambda: nn.Linear(3, 3), {"input_size": None}, "input_size is None; it must be given"),
    ],
)
def test_wrong_arguments(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        multipath(network(), **{"paths": 2, "route_after": ["stem"], "input_size": SIZE, **arguments})


def test_a_model_must_be_a_module():
    with pytest.raises(TypeError, match="model is a function; it must be a module"):
        multipath(lambda x: x, 2, ["stem"])


TIMM = ["resnet10t", "mobilenetv3_small_050"]
TIMM_SLOW = [
    "resnet18",
    "vgg11_bn",
    "efficientnet_b0",
    "convnext_atto",
    "regnety_002",
    "mobilenetv2_050",
    "densenet121",
]
TORCHVISION = ["resnet18", "vgg11", "efficientnet_b0", "convnext_tiny", "regnet_y_400mf", "mobilenet_v3_small"]


def slow(names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", [*TIMM, *slow(TIMM_SLOW)])
def test_timm_networks(name):
    timm = pytest.importorskip("timm")
    check(timm.create_model(name, num_classes=5))


@pytest.mark.parametrize("name", slow(TORCHVISION))
def test_torchvision_networks(name):
    torchvision = pytest.importorskip("torchvision")
    check(getattr(torchvision.models, name)(num_classes=5))


def check(network):
    """The copy computes as the network does, has routers at several resolutions, and trains."""
    network.eval()
    model, x = multipath(network, 2, init="copy", noise=0), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, (logits, routing) = network(x), model(x, return_routing=True)
    assert len(routing) >= 4
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
    model.train()(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.is_file(), reason=f"there are no photographs at {PHOTOGRAPHS}")
@pytest.mark.parametrize(
    "name", ["resnet18", "efficientnet_b0", "convnext_atto", "regnety_002", "mobilenetv3_small_050"]
)
def test_timm_networks_on_photographs(name, capsys):
    timm = pytest.importorskip("timm")
    images = photographs(8)
    model = multipath(timm.create_model(name), 2)
    logits, routing = model(images, return_routing=True)
    loss = F.cross_entropy(logits, torch.arange(8))
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert logits.shape == (8, 1000) and loss.isfinite() and 0 < norm < float("inf")
    with capsys.disabled():
        parameters = sum(p.numel() for p in model.parameters())
        cuts = ", ".join(router.removesuffix("_router") for router in routing)
        print(f"\n{name}: {parameters:,} parameters, cut at {cuts}; loss {loss:.3f}, gradient norm {norm:.3f}")


def photographs(count):
    from PIL import Image
    from torchvision.transforms import v2

    transform = v2.Compose(
        [v2.ToImage(), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.45] * 3, [0.23] * 3)]
    )
    images = []
    with tarfile.open(PHOTOGRAPHS) as archive:
        for member in archive:
            if member.isfile() and len(images) < count:
                images.append(transform(Image.open(archive.extractfile(member)).convert("RGB")))
    return torch.stack(images)
