"""What a forward around the cuts of `multipath` may do."""

import random
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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


def convolutions():
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)).eval()


def on_the_instance(network):
    network.forward = types.MethodType(lambda self, x: nn.Sequential.forward(self, x).tanh(), network)


CHANGES = {
    "a forward set on the instance": on_the_instance,
    "forward hooks": lambda network: network.register_forward_hook(lambda module, args, result: 3 * result),
    "forward hooks before": lambda network: network.register_forward_pre_hook(lambda module, args: (10 * args[0] + 1,)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_refuses_what_changes_the_forward_of_the_network_itself(what):
    network, x = convolutions(), torch.randn(2, *SIZE)
    CHANGES[what](network)
    with pytest.raises(ValueError, match=f"with {what.removesuffix(' before')}, which torch.fx does not follow"):
        multipath(network, 2, ["1"], input_size=SIZE)
    model = multipath(nn.Sequential(network).eval(), 2, ["0.1"], input_size=SIZE, init="copy", noise=0)
    for router in routers(model).values():
        router.w2.data.zero_()
    torch.testing.assert_close(model(x), network(x))


def test_refuses_a_forward_that_asks_for_the_type_of_its_input():
    asking = does(lambda net, x: net.fc((2 * x + 1 if isinstance(x, torch.Tensor) else x).mean((2, 3))))
    with pytest.raises(ValueError, match="computes something else than its forward"):
        multipath(asking(), 2, ["conv"], input_size=SIZE)


class Draws(nn.Module):
    def forward(self, x):
        return x * (1 + (torch.rand(()) < 0.5).float()) + torch.randn_like(x)


class First(nn.Module):
    """Returns its first images as they are."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return x if self.seen == 1 else 3 * x


class Decides(nn.Module):
    def forward(self, x):
        return x > 0


@pytest.mark.parametrize("layer", [Draws, First, Decides])
def test_networks_that_cannot_be_compared_are_converted(layer):
    layers = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2), layer()
    for seed in range(5):
        torch.manual_seed(seed)
        assert len(routers(multipath(nn.Sequential(*layers), 2, ["0"], input_size=SIZE))) == 1


def test_modes_of_modules_that_a_copy_shares_are_kept():
    class Shared(nn.Conv2d):
        def __deepcopy__(self, memo):
            return self

    network = nn.Sequential(Shared(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    multipath(network, 2, ["0"], input_size=SIZE)
    assert all(module.training for module in network.modules())


def test_layers_that_initialise_by_their_first_images_do_not_see_those_of_the_conversion():
    class ActNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.zeros(()))
            self.seen = 0

        def forward(self, x):
            if not self.seen:
                self.shift = -x.detach().mean()
            self.seen += 1
            return x + self.shift

    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), ActNorm(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    for cuts, size in (["1"], SIZE), ("auto", SIZE), (["1"], None):
        model = multipath(network, 2, cuts, input_size=size)
        norms = [module for module in model.modules() if isinstance(module, ActNorm)]
        assert norms and all(norm.seen == 0 and norm.shift == 0 for norm in norms)


@pytest.mark.parametrize("behind", ["nested", "flattened"])
def test_paths_drop_from_tensors_of_their_own(behind):
    dropout = nn.Dropout(0.5, inplace=True)
    rest = [nn.Sequential(dropout, nn.Flatten())] if behind == "nested" else [nn.Flatten(), dropout]
    network = nn.Sequential(nn.Conv2d(3, 8, 3), *rest, nn.Linear(8 * 14 * 14, 2))
    model = multipath(network, 2, ["0"], routing=None, input_size=SIZE, init="copy").train()
    zeros = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda layer, args: zeros.append((args[0] == 0).float().mean().item()))
    model(torch.randn(8, *SIZE)).sum().backward()
    assert zeros == pytest.approx([0.5, 0.5], abs=0.02)


def test_functional_dropout_in_place():
    def drop(network, x):
        F.dropout(x, 0.5, network.training, True)
        return network.fc(x.mean((2, 3)))

    model = multipath(does(drop)(), 2, ["conv"], input_size=SIZE)
    x = torch.randn(2, *SIZE)
    assert not torch.equal(model(x), model(x)) and torch.equal(model.eval()(x), model(x))


def test_refuses_to_lose_a_method_train():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"the network itself has a method train\(\) of its own"):
        multipath(Frozen(*layers), 2, ["1"], input_size=SIZE)
    whole = nn.Sequential(Frozen(*layers[:2]), *layers[2:])
    model = multipath(whole, 2, ["0"], input_size=SIZE).train()
    assert not model.stem[0][1].training and model.stem[0][0].training


def test_parametrised_modules_at_a_cut_and_as_a_whole():
    network, x = convolutions(), torch.randn(2, *SIZE)
    nn.utils.parametrizations.spectral_norm(network[2])
    block = nn.Sequential(network[:4], *network[4:]).eval()
    nn.utils.parametrize.register_parametrization(block[0][0], "weight", nn.Tanh())
    for cuts in (["0.0"], ["0.2"], ["0"]):
        model = multipath(block, 2, cuts, input_size=SIZE, init="copy", noise=0)
        for router in routers(model).values():
            router.w2.data.zero_()
        torch.testing.assert_close(model(x), block(x))


def test_dropout_in_place_elsewhere_changes_no_names():
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.Sequential(nn.Conv2d(4, 4, 3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    network = nn.Sequential(*layers, nn.Dropout(0.5, inplace=True))
    model = multipath(network, 2, ["0", "1"], routing=None, input_size=SIZE)
    assert "1.1.0.weight" in model.state_dict()
