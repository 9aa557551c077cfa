import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastroute
from fastroute.models import multipath
from fastroute.nn import CrossConnection, CrossStitch, MultiPathNetwork
from tests.models.toys import SIZE, routers, toy_paths


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


def test_parts_and_routers_in_turn():
    assert fastroute.multipath is multipath
    joined = toy_paths(Toy(), 3, "stage2,stem,dense,stage1")
    assert joined.state_dict().keys() == toy_paths(Toy(), 3, CUTS).state_dict().keys()
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


def test_the_factor_of_copies_is_in_the_state_dict():
    copies, fresh = (toy_paths(Toy(), 2, CUTS, init=init) for init in ("copy", "fresh"))
    assert copies.state_dict()["stem.0.path_scale"] == 2
    with pytest.raises(RuntimeError, match=r"Unexpected.*stem\.0\.path_scale"):
        fresh.load_state_dict(copies.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing.*stem\.0\.path_scale"):
        copies.load_state_dict(fresh.state_dict())


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


def test_keeps_the_mode_the_device_and_the_type():
    assert not any(module.training for module in toy_paths(Toy().eval(), 2, CUTS).modules())
    assert all(module.training for module in toy_paths(Toy(), 2, CUTS).modules())
    with torch.device("meta"):
        network = Toy()
    assert {p.device.type for p in toy_paths(network, 2, CUTS).parameters()} == {"meta"}
    model = toy_paths(Toy().bfloat16(), 2, CUTS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(2, *SIZE, dtype=torch.bfloat16)).dtype == torch.bfloat16
    mixed = Toy().bfloat16()
    mixed.unused.float()
    assert toy_paths(mixed, 2, ["stem"]).stem_router.w2.dtype == torch.float32


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


@pytest.mark.parametrize("text, names", [("stem,", ["stem"]), ("stem, stage1", ["stem", "stage1"]), (" auto", "auto")])
def test_names_may_be_text(text, names):
    assert list(multipath(Toy(), 2, text).state_dict()) == list(multipath(Toy(), 2, names).state_dict())


@pytest.mark.parametrize(
    "network, arguments, message",
    [
        (Toy, {"paths": 1}, "paths is 1; it must be 2 to 8"),
        (Toy, {"paths": 9}, "paths is 9; it must be 2 to 8"),
        (Toy, {"route_after": ["stage3"]}, "names 'stage3'; there is no such module: did you mean stage"),
        (
            Toy,
            {"route_after": ["???"]},
            "those of the network itself are stem, pool, stage1, relu",
        ),
        (Toy, {"route_after": []}, "route_after is empty"),
        (Toy, {"route_after": "Auto"}, "names 'Auto'; there is no such module"),
        (Toy, {"route_after": [""]}, "names ''; there is no such module: those of the network itself"),
        (Toy, {"route_after": " , "}, "route_after is empty"),
        (Toy, {"route_after": ["stem", "stem"]}, "names 'stem' 2 times"),
        (Toy, {"route_after": ["stage1", "stage1.1"]}, "'stage1' and 'stage1.1', which return the same tensor"),
        (Toy, {"route_after": ["wide"]}, "names 'wide', but the rest of the network needs more .* 'relu' as well"),
        (Toy, {"route_after": ["unused"]}, "names 'unused', which is called 0 times"),
        (Toy, {"routing": "cp"}, "routing is 'cp'; it must be 'cc', 'stitch', None or a function"),
        (Toy, {"init": "zeros"}, "init is 'zeros'; it must be 'fresh' or 'copy'"),
        (Toy, {"noise": -1}, "noise is -1; it must be at least 0"),
        (Toy, {"input_size": (4, 16, 16)}, r"input_size is \(4, 16, 16\); model cannot take such images"),
        (Twice, {"route_after": ["conv"]}, "names 'conv', which is called 2 times; it must be called once"),
        (
            Twice,
            {"route_after": "auto"},
            "found no module behind which the resolution changes",
        ),
        (Pair, {"route_after": ["conv"]}, r"model is a Pair that returns \(.*; it must return one tensor"),
        (Inner, {"route_after": ["conv"]}, "model is a Inner that returns pair; it must return one tensor"),
        (
            Untraceable,
            {"route_after": ["conv"]},
            r"which torch.fx cannot trace: TraceError: .* \(\S+\.py:\d+\); move",
        ),
        (Moody, {"route_after": ["conv"]}, "forward differs between training and evaluation"),
        (Tokens, {"route_after": ["pair"]}, "'pair', which returns no tensor; routing takes"),
        (lambda: nn.Linear(3, 3), {"input_size": None}, "input_size is None; it must be given"),
    ],
)
def test_wrong_arguments(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        multipath(network(), **{"paths": 2, "route_after": ["stem"], "input_size": SIZE, **arguments})


def test_an_error_without_text_is_named_by_its_type():
    class Silent(Toy):
        def forward(self, x):
            x = super().forward(x)
            return self.check(x)

    class Check(nn.Module):
        def forward(self, x):
            raise AssertionError

    network = Silent()
    network.check = Check()
    with pytest.raises(ValueError, match="model cannot take such images: AssertionError; give input_size"):
        multipath(network, 2, ["stem"], input_size=SIZE)


def test_a_model_must_be_a_module():
    with pytest.raises(TypeError, match="model is a function; it must be a module"):
        multipath(lambda x: x, 2, ["stem"])
    with pytest.raises(TypeError, match="model is the class Toy; it must be a module"):
        multipath(Toy, 2, ["stem"])


def test_names_and_routers_of_other_types_are_refused():
    with pytest.raises(TypeError, match="route_after is 3; it must be 'auto' or the names of modules"):
        multipath(Toy(), 2, 3)
    with pytest.raises(TypeError, match="routing is a CrossConnection; it must be a function from"):
        multipath(Toy(), 2, ["stem"], CrossConnection(8, 1, 2))


def test_auto_names_where_a_wrapped_network_can_be_cut():
    torchvision = pytest.importorskip("torchvision")

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torchvision.models.resnet18(num_classes=3)

        def forward(self, x):
            return self.body(x)

    with pytest.raises(ValueError, match=r"such as body\.layer1,body\.layer2,body\.layer3,body\.layer4$"):
        multipath(Wrapped(), 2, input_size=(3, 64, 64))


@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.Sequential])
def test_a_model_must_have_one_path(wrap):
    model = wrap(fastroute.models.create_model("resnet20_cc2", num_classes=3))
    with pytest.raises(ValueError, match="with parallel paths; give a network of one, or leave multipath out"):
        multipath(model, 2)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"paths": 2.0}, TypeError, "paths is 2.0; it must be an integer"),
        ({"paths": "2"}, TypeError, "paths is '2'; it must be an integer"),
        ({"noise": "a"}, TypeError, "noise is 'a'; it must be a number"),
        ({"init": "copy", "noise": float("nan")}, ValueError, "noise is nan; it must be at least 0, and finite"),
    ],
)
def test_numbers_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        multipath(fastroute.create_model("resnet20"), **{"paths": 2} | options)


def test_networks_with_routers_of_a_local_function_are_pickled():
    network = multipath(Toy(), 2, ["stem"], lambda c, m, n: CrossConnection(c, m, n), input_size=SIZE)
    again = pickle.loads(pickle.dumps(network))
    images = torch.randn(2, *SIZE)
    assert torch.equal(again.eval()(images), network.eval()(images))
