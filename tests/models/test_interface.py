import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fastroute import models
from fastroute.models import Specification, create_model, multipath, register_model, registry, specification_of
from fastroute.models.features import FeatureMaps
from fastroute.nn import CrossConnection, MultiPathNetwork, ParallelPaths
from fastroute.nn.gate_norm import GateNorm

SLOW = ("resnet101", "resnet110", "resnet164", "se_resnet110", "convnet_aig110", "wide_resnet50_2", "vgg13_cc2")
SIZES = dict.fromkeys(("resnet18", "resnet18_cc2", "wrn_18_1_5", "resnet34", "resnet50", "resnext50_2x64d"), 32) | {
    "capsnet": 17
}
FEW = ["resnet20_cc2", "resnet20_x2", "resnet20_cp2", "resnet20", "base_cnn_cc2", "base_cnn_ensemble", "resnet18"]
FEW += ["resnet20_sparse4_top2", "convnet_aig110", "hyper_wrn_40_2", "cross_stitch_base_cnn2", "capsnet"]


def names():
    every = [name for name in models.list_models() if name not in FEW]
    return [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in every)]


@pytest.mark.parametrize("name", names())
def test_has_timm_s_interface(name):
    size = SIZES.get(name, models.model_info(name).img_size)
    model, x = create_model(name, 5, img_size=size).eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        logits, features = model(x), model.forward_features(x)
        assert model.num_classes == logits.shape[1] == 5
        torch.testing.assert_close(model.forward_head(features), logits)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.num_features)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled)
        assert model.num_classes == 0 and model(x, return_routing=True)[0].shape == pooled.shape
        fresh = create_model(name, 0, img_size=size)
        assert fresh.eval()(x).shape == pooled.shape
        model.reset_classifier(0, "")
        if name != "base_cnn_ensemble":
            torch.testing.assert_close(model(x), features)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7) and model.num_classes == 7
    assert specification_of(model).num_classes == 7
    layers = model.get_classifier()
    assert all(layer.out_features == 7 for layer in (layers if isinstance(layers, nn.ModuleList) else [layers]))
    rebuilt = Specification.from_dict(model.specification.to_dict()).build()
    rebuilt.load_state_dict(model.state_dict())


def test_converted_networks_have_timm_s_interface():
    timm = pytest.importorskip("timm")
    small = {"img_size": 32, "depth": 3, "embed_dim": 24}
    for base, options, cuts in (
        ("test_resnet", {}, ["layer1", "layer2"]),
        ("vit_tiny_patch16_224", small, ["blocks.1"]),
    ):
        base = timm.create_model(base, num_classes=5, **options)
        model, x = multipath(base, 2, cuts, input_size=(3, 32, 32)).eval(), torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
            assert model.num_classes == 5 and len(model.get_classifier()) == 2
            model.reset_classifier(0)
            assert model(x).shape == (2, model.num_features)


def test_networks_without_a_dense_layer_at_the_end_have_no_classifier():
    layers = {"fork": CrossConnection(3, 1, 2), "head": ParallelPaths(nn.AdaptiveAvgPool2d(1) for _ in range(2))}
    network = MultiPathNetwork(layers)
    assert network.num_classes is None
    with pytest.raises(
        ValueError, match="a MultiPathNetwork whose paths do not end in a dense layer has no classifier"
    ):
        network.reset_classifier(3)
    with pytest.raises(ValueError, match="num_classes is -1"):
        create_model("resnet20").reset_classifier(-1)
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        create_model("resnet20").reset_classifier(0, "max")


def test_feature_maps_are_those_of_each_resolution_averaged_over_paths():
    timm = pytest.importorskip("timm")
    models.register_timm()
    model = timm.create_model("resnet20_cc2", features_only=True).eval()
    assert model.feature_info.channels() == [16, 32, 64] and model.feature_info.reduction() == [1, 2, 4]
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        maps = model(x)
        network = model.network
        xs, _ = network._body(x)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 16, 16), (2, 32, 8, 8), (2, 64, 4, 4)]
    torch.testing.assert_close(maps[2], (xs[0] + xs[1]) / 2)
    some = timm.create_model("resnet20_cc2", features_only=True, out_indices=(2,))
    assert [m.shape[1] for m in some(x)] == [64]
    with pytest.raises(ValueError, match=r"out_indices is \(5,\); the network has maps of 3 resolutions"):
        timm.create_model("resnet20_cc2", features_only=True, out_indices=(5,))


def test_timm_finds_the_classifier_and_the_first_convolution():
    timm = pytest.importorskip("timm")
    models.register_timm()
    for name in ("resnet20_cc2", "fastroute_resnet18", "resnet20_cp2", "base_cnn_cc2"):
        model = timm.create_model(name, num_classes=5)
        config, state = model.default_cfg, model.state_dict()
        for layer in (*config["classifier"], *config["first_conv"]):
            assert f"{layer}.weight" in state
        assert all(len(state[f"{layer}.weight"]) == 5 for layer in config["classifier"])


@pytest.mark.parametrize("name", ["resnet20", "base_cnn_ensemble"])
def test_a_specification_builds_the_network_or_is_none(name):
    model, x = create_model(name), torch.randn(2, 3, 32, 32)
    model.reset_classifier(0)
    assert specification_of(model).build()(x).shape == model(x).shape
    model.reset_classifier(0, "")
    assert specification_of(model) is None
    model.reset_classifier(7)
    assert specification_of(model).num_classes == 7
    model = create_model(name)
    first = model if name == "resnet20" else model.members[0]
    setattr(first, next(iter(first._modules)), nn.Conv2d(3, 5, 1))
    model.reset_classifier(7)
    assert specification_of(model) is None


def test_timm_builds_networks_without_its_interface(monkeypatch):
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(registry, "_MODELS", {})

    @models.register_model
    def plain_net(num_classes, in_chans, img_size):
        return nn.Sequential(nn.Conv2d(in_chans, 4, 1), nn.Flatten(), nn.Linear(4 * img_size**2, num_classes))

    @models.register_model
    def pooled_net(num_classes, in_chans, img_size):
        head = ParallelPaths([nn.Sequential(nn.Conv2d(in_chans, num_classes, 1), Mean())])
        return MultiPathNetwork({"head": head})

    from timm.models import _registry

    assert models.register_timm() == ["plain_net", "pooled_net"]
    try:
        model = timm.create_model("plain_net", num_classes=5)
        assert model.num_classes == 5 and model.pretrained_cfg["classifier"] == ()
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
        assert timm.create_model("pooled_net")(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    finally:
        for name in ("plain_net", "pooled_net"):
            del _registry._model_entrypoints[name]


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_a_head_that_was_replaced_by_hand_is_the_classifier():
    network = create_model("resnet20")
    assert network.num_classes == 10
    network.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(64, 5))
    assert network.num_classes == 5
    network.reset_classifier(7)
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 7) and network.num_classes == 7
    network.reset_classifier(0)
    assert network.num_classes == 0 and network(torch.randn(2, 3, 8, 8)).shape == (2, 64)
    network.reset_classifier(3)
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "size", "reductions"), [("resnet18", 200, [4, 8, 16, 32]), ("resnet20", 50, [1, 2, 4])]
)
def test_reductions_of_maps_whose_sizes_were_rounded_up(name, size, reductions):
    maps = FeatureMaps(create_model(name), (3, size, size))
    assert [level["reduction"] for level in maps.info][-len(reductions) :] == reductions


def test_feature_maps_by_create_model():
    timm = pytest.importorskip("timm")
    models.register_timm()
    maps = create_model("resnet20_cc2", features_only=True, out_indices=(0, -1)).eval()
    theirs = timm.create_model("resnet20_cc2", features_only=True, out_indices=(0, -1)).eval()
    theirs.load_state_dict(maps.state_dict())
    x = torch.randn(2, 3, 32, 32)
    for a, b in zip(maps(x), theirs(x), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"its builder does not take these arguments: .*out_indices"):
        create_model("resnet20_cc2", out_indices=(0,))
    with pytest.raises(ValueError, match=r"features_only is True; 'timm:resnet18' .*: use timm\.create_model"):
        create_model("timm:resnet18", features_only=True)


@pytest.mark.parametrize("name", [n for n in models.list_models() if "110" not in n and "164" not in n])
def test_all_modules_can_be_initialised_after_they_were_built_without_memory(name):
    with torch.device("meta"):
        network = create_model(name, gate_norm="center" if "_cc" in name else None)
    for path, module in network.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        assert not own or hasattr(module, "reset_parameters"), (name, path, type(module))


def test_initialising_anew_forgets_the_statistics():
    norm = GateNorm("center", 2, 3, prior="learned")
    norm(torch.randn(8, 2, 3) + 1)
    norm.prior.fill_(0)
    norm.reset_parameters()
    assert norm.running_mean.eq(0).all() and norm.num_batches_tracked == 0 and norm.prior.eq(1 / 3).all()


def only_grey(*, num_classes=10, in_chans=1, img_size=32):
    if in_chans != 1:
        raise ValueError("only_grey takes grey images")
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


def test_the_first_convolutions_are_those_of_the_images(monkeypatch):
    timm = pytest.importorskip("timm")
    models.register_timm()
    for name, expected in (
        ("resnet20_cc2", ("stem.0.0",)),
        ("base_cnn_x3", tuple(f"conv2.{i}.conv1.0" for i in range(3))),
    ):
        network = timm.create_model(name, in_chans=16)
        assert network.default_cfg["first_conv"] == expected
    register_model(only_grey)
    try:
        models.register_timm()
        assert timm.create_model("only_grey", in_chans=1).default_cfg["first_conv"] == ("0",)
    finally:
        del registry._MODELS["only_grey"]


def test_features_are_those_of_the_calling_thread():
    model, (x, other) = create_model("resnet20_cc2", 5).eval(), torch.randn(2, 2, 3, 32, 32)
    features = model.forward_features(x)
    expected = model.forward_head(features, pre_logits=True)
    caller = threading.get_ident()

    def meanwhile(*_):
        if threading.get_ident() == caller:
            with ThreadPoolExecutor(1) as threads:
                threads.submit(model, other).result()

    model.get_classifier()[0].register_forward_hook(meanwhile)
    assert torch.equal(model.forward_head(features, pre_logits=True), expected)
