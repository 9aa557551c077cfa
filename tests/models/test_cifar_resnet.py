import copy
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from fastroute import models
from fastroute.models.cifar_resnet import cifar_resnet
from fastroute.nn import CrossConnection, CrossPrediction2d

ROUTERS = ["stem_router", "stack1_router", "stack2_router", "stack3_router"]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_routers_stand_after_the_stem_and_every_stack():
    model = models.create_model("resnet20_cc3")
    routers = {name: module for name, module in model.named_modules() if isinstance(module, CrossConnection)}
    assert list(routers) == ROUTERS
    assert [(r.channels, r.in_paths, r.out_paths) for r in routers.values()] == [
        (16, 1, 3),
        (16, 3, 3),
        (32, 3, 3),
        (64, 3, 3),
    ]


def test_routers_take_the_relu_of_the_paths_before_them():
    model = cifar_resnet(8, paths=2).double()
    apart = copy.deepcopy(model)
    for paths, router in pairwise(apart.children()):
        if isinstance(router, CrossConnection):
            assert router.activation == "relu"
            router.activation = None
            for path in paths:
                path.append(nn.ReLU())
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    results = []
    for network in (model, apart):
        logits = network(x)
        gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.arange(4)), network.parameters())
        results.append([logits, *gradients])
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain)


def test_cross_predictions_are_the_stem_and_stand_before_the_later_stacks():
    model = models.create_model("resnet20_cp3")
    routers = {name: module for name, module in model.named_modules() if isinstance(module, CrossPrediction2d)}
    shapes = {name: tuple(module.weight.shape) for name, module in routers.items()}
    assert shapes == {
        "stem": (1, 3, 16, 3, 3, 3),
        "stack2_router": (3, 3, 16, 16, 3, 3),
        "stack3_router": (3, 3, 32, 32, 3, 3),
    }
    logits, routing = model(torch.randn(2, 3, 16, 16), return_routing=True)
    assert logits.shape == (2, 10) and list(routing) == list(routers)
    assert [len(module.norms) for module in routers.values()] == [3, 3, 3]


def test_both_call_forms_agree():
    model = models.create_model("resnet20_cc2", num_classes=7, in_chans=1).eval()
    x = torch.randn(3, 1, 16, 16)
    logits, routing = model(x, return_routing=True)
    assert logits.shape == (3, 7) and torch.equal(model(x), logits)
    assert list(routing) == ROUTERS
    assert routing["stem_router"].gates.shape == (3, 1, 2) and routing["stack3_router"].scores.shape == (3, 2, 2)


@pytest.mark.parametrize("name", ["resnet20", "resnet20_x2"])
def test_networks_without_routers_return_none(name):
    logits, routing = models.create_model(name)(torch.randn(2, 3, 8, 8), return_routing=True)
    assert logits.shape == (2, 10) and routing == {}


def test_paths_without_routing_are_the_routed_network_without_its_routers():
    routed, alone = models.create_model("resnet20_cc2"), models.create_model("resnet20_x2")
    same = models.create_model("resnet20_cc2", routing=None)
    assert same.state_dict().keys() == alone.state_dict().keys() <= routed.state_dict().keys()
    routers = sum(parameters(module) for name, module in routed.named_children() if name in ROUTERS)
    assert parameters(routed) - routers == parameters(alone)


def test_even_gates_at_the_start():
    _, routing = models.create_model("resnet20_cc4")(torch.randn(2, 3, 8, 8), return_routing=True)
    for router in routing.values():
        torch.testing.assert_close(router.gates, torch.full_like(router.gates, 0.25), atol=0.01, rtol=0)


def test_gradients_reach_every_parameter():
    model = cifar_resnet(8, paths=2)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_convolutions_start_as_torchvisions_resnets_do():
    weight = models.create_model("resnet20").stack3[1].residual[0].weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("return_routing", [False, True])
def test_compiles_without_a_break(return_routing):
    model = cifar_resnet(8, paths=2).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(compiled(x, return_routing=return_routing), model(x, return_routing=return_routing))


def test_state_dict_round_trip(tmp_path):
    model = models.create_model("resnet20_cc2").eval()
    nn.init.normal_(model.stack1_router.w2)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = models.create_model("resnet20_cc2").eval()
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(other(x), model(x))


def test_bfloat16_channels_last_trains():
    model = cifar_resnet(8, paths=2).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), torch.arange(4))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((21,), r"depth is 21; it must be 6k \+ 2, such as 20 or 32"),
        ((2,), "depth is 2"),
        ((20, 0), "paths is 0; it must be at least 1"),
        ((8, 9), "paths is 9; it must be 2 to 8"),
        ((8, 2, "xx"), "routing is 'xx'; it must be 'cc', 'cp' or None"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        cifar_resnet(*arguments)


@pytest.mark.parametrize("widen", [0, -1.0, 1 / 17, float("nan"), float("inf")])
def test_a_factor_of_widths_without_channels_or_bound_is_refused(widen):
    with pytest.raises(ValueError, match=r"widen is .*; it must be finite and at least 1/16"):
        cifar_resnet(8, widen=widen)


def test_widening_multiplies_all_widths_and_is_part_of_the_specification():
    def describe(name, widen):
        model = models.create_model(name, widen=widen)
        assert model.specification.kwargs == {"widen": widen} and model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        widths = {m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
        return widths, sum(p.numel() for p in model.parameters())

    assert describe("resnet20", 1.42) == ({23, 45, 91}, 547_403)  # ResNet20-2-CC has 548,674
    assert describe("resnet20_x2", 0.5) == ({8, 16, 32}, 137_340)
    assert describe("resnet20_cc2", 0.5) == ({8, 16, 32}, 139_610)
    assert describe("resnet20_cp2", 0.5) == ({8, 16, 32}, 150_254)


@pytest.mark.parametrize("block", ["split_attention", "selective_kernel"])
def test_adaptive_blocks_stand_in_one_path_and_in_several(block):
    layers = pytest.importorskip("timm.layers")
    unit = {"split_attention": layers.SplitAttn, "selective_kernel": layers.SelectiveKernel}[block]
    torch.manual_seed(0)
    single = cifar_resnet(8, block=block, in_chans=1)
    assert [(type(s[0].residual[0]), len(s)) for s in (single.stack1, single.stack2, single.stack3)] == [(unit, 1)] * 3
    logits, x = [], torch.randn(4, 1, 8, 8)
    for routing in ("cc", "cp", None):
        model = cifar_resnet(8, 2, routing, block=block, in_chans=1, img_size=8)
        paths = [path[0].residual[0] for path in model.stack2]
        assert [type(path) for path in paths] == [unit] * 2
        first, second = (next(p for p in path.parameters() if p.dim() == 4) for path in paths)
        assert not torch.equal(first, second)
        logits.append(model(x))
        nn.functional.cross_entropy(logits[-1], torch.arange(4)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(y.shape == (4, 10) for y in logits)


def test_the_block_is_part_of_the_specification():
    pytest.importorskip("timm")
    model = models.create_model("resnet20_cc2", 7, block="split_attention")
    assert model.specification.kwargs == {"block": "split_attention"}
    again = models.Specification.from_dict(model.specification.to_dict()).build()
    again.load_state_dict(model.state_dict())
    basic = models.create_model("resnet20_cc2", 7, block="basic")
    assert basic.state_dict().keys() == models.create_model("resnet20_cc2", 7).state_dict().keys()


def test_unknown_blocks_and_a_missing_timm_get_a_sentence(monkeypatch):
    known = "'basic', 'split_attention', 'selective_kernel'"
    with pytest.raises(ValueError, match=f"block is 'resnest'; it must be one of {known}"):
        models.create_model("resnet20", block="resnest")
    with pytest.raises(ValueError, match=r"its builder does not take these arguments: .*'block'"):
        models.create_model("wrn_40_2", block="basic")
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.layers", None)
    for block in ("split_attention", "selective_kernel"):
        message = f"block '{block}' needs the package timm.*, which is not installed: pip install 'fastroute.timm.'"
        with pytest.raises(ModuleNotFoundError, match=message):
            models.create_model("resnet20", block=block)
    models.create_model("resnet20", block="basic")
