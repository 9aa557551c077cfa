import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from fastroute.models import Specification, create_model, multipath, specification_of
from fastroute.models.sources import layout
from fastroute.models.specification import specification_in
from fastroute.training.recomputation import checkpoint_gradients


def same_outputs(network, x):
    """Return whether the network rebuilt from the specification's plain values computes the same."""
    specification = Specification.from_dict(network.specification.to_dict())
    rebuilt = specification.build(imports=True)
    rebuilt.load_state_dict(network.state_dict())
    with torch.no_grad():
        return torch.equal(rebuilt.eval()(x), network.eval()(x))


def test_own_networks_keep_how_they_were_built():
    network = create_model("resnet20_cc2", 7, 1, routing=None)
    specification = network.specification
    assert (specification.source, specification.num_classes, specification.in_chans) == ("fastroute", 7, 1)
    assert specification.kwargs == {"routing": None} and specification.paths == 1
    assert same_outputs(network, torch.randn(2, 1, 8, 8))
    assert create_model("resnet20").specification.num_classes == 10


def test_networks_of_timm_and_torchvision_are_built_by_name():
    pytest.importorskip("timm")
    network = create_model("timm:resnet18.a1_in1k", 5, 1, drop_rate=0.25)
    assert network.conv1.in_channels == 1 and network.fc.out_features == 5 and network.drop_rate == 0.25
    assert network.specification.text == "timm:resnet18.a1_in1k"
    network = create_model("torchvision:squeezenet1_1", 5, 1)
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 5) and same_outputs(network, torch.randn(2, 1, 32, 32))


def test_multi_path_networks_keep_the_cuts_that_auto_found(own):
    network = multipath(create_model(own, 5), 3, "auto", None, init="copy", input_size=(3, 8, 8))
    specification = network.specification
    assert (specification.name, specification.paths, specification.routing) == (own, 3, None)
    assert specification.route_after == ("1",) and specification.input_size == (3, 8, 8)
    assert same_outputs(network, torch.randn(2, 3, 8, 8))
    assert str(specification) == "own_nets:build (3 paths)"
    assert multipath(create_model(own, 5), 2, ["1"], lambda *_: nn.Identity()).specification is None  # a function


def test_modules_of_timm_and_torchvision_are_recognised():
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    network = timm.create_model("resnet18", num_classes=5, in_chans=1)
    assert specification_of(network).text == "timm:resnet18.a1_in1k" and specification_of(network).in_chans == 1
    network.act1 = nn.SiLU()
    assert specification_of(network) is None
    network = torchvision.models.resnet34(num_classes=5)
    assert specification_of(network) == Specification("torchvision", "resnet34", 5)
    assert specification_of(nn.Linear(2, 2)) is None


def test_a_changed_network_has_no_specification():
    network = create_model("resnet20")
    assert specification_of(network) is network.specification is not None
    network.head[2] = nn.Linear(64, 3)
    assert specification_of(network) is None


def test_own_functions_are_imported_only_if_the_user_names_them(own):
    network = create_model(own, 5, width=6)
    assert network[0].out_channels == 6 and same_outputs(network, torch.randn(2, 3, 8, 8))
    del sys.modules["own_nets"]
    with pytest.raises(ValueError, match="own code is imported only where you name it: add --model own_nets:build"):
        Specification.from_dict(network.specification.to_dict()).build()
    assert "own_nets" not in sys.modules


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("resnet21", {}, "there is no such network: did you mean .*resnet20"),
        ("qqqq", {}, r"it must be an own network's name .*timm:NAME, torchvision:NAME or package.module:function"),
        ("tim:resnet18", {}, "there is no module 'tim' here, and a network must be an own network's name"),
        ("own_nets:built", {}, "own_nets has no 'built'"),
        ("own_nets:number", {}, "number is a int, and must be a function"),
        ("own_nets:layer", {}, "layer is a Linear, and must be a function that returns a network"),
        ("own_nets.py:number", {}, r"name the module without \.py: own_nets:number"),
        ("own_nets:build", {"depth": 3}, "does not take these arguments: .*depth"),
        ("a b:c", {}, "model is 'a b:c'; it must be an own network's name"),
        ("torchvision:resnet19", {}, "torchvision has no such classifier: did you mean resnet1"),
        ("torchvision:resnet18", {"num_classes": 0}, "num_classes is 0; .*it must be at least 1"),
        ("torchvision:../x", {}, "takes the name of a network"),
        ("timm:resnet19", {}, "timm has no such network: did you mean"),
        ("timm:resnet18.no_tag", {}, "Invalid pretrained tag"),
        ("timm:resnet18", {"no_such": 1}, "does not take these arguments: .*no_such"),
        ("resnet20", {"pretrained": True}, "there are no weights of resnet20 to download"),
        ("resnet20", {"weights": ["x"]}, "model_kwargs has 'weights'"),
        ("resnet20", {"prior": "learned"}, "prior is 'learned'; the network has no router to normalise the gates of"),
        ("resnet20", {"gate_norm": "x"}, "gate_norm is 'x'; it must be one of None, 'center', 'standardize'"),
        ("resnet20", {"pretrained_path": "none.pth"}, "pretrained_path is none.pth; there is no such file"),
        ("timm:resnet18", {"pretrained": True, "pretrained_path": "x"}, "give one of them"),
    ],
)
def test_errors_in_building_are_one_sentence(name, options, message, own):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        create_model(name, **({"num_classes": 5} | options))


def test_a_download_that_fails_names_the_way_around_it(monkeypatch):
    pytest.importorskip("timm")
    import timm.models._builder as builder

    def unreachable(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(builder, "load_state_dict_from_hf", unreachable)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    for name in ("timm:resnet18", "torchvision:resnet18"):
        with pytest.raises(ValueError, match=f"{name} cannot be downloaded .ConnectionError: no route to host"):
            create_model(name, 5, pretrained=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"source": "pickle"}, r"\['source'\] is 'pickle', expected one of fastroute, timm"),
        ({"name": 3}, r"\['name'\] is 3, expected a text"),
        ({"name": "../../etc"}, "expected the name of a network"),
        ({"name": "hf-hub:x/y", "source": "timm"}, "expected the name of a network"),
        ({"paths": 10**6}, r"\['paths'\] is 1000000, expected an int from 1 to 8"),
        ({"paths": True}, r"\['paths'\] is True"),
        ({"num_classes": torch.ones(2)}, r"\['num_classes'\] is a Tensor"),
        ({"in_chans": -1}, r"\['in_chans'\] is -1"),
        ({"kwargs": {"checkpoint_path": "/tmp/x"}}, "has 'checkpoint_path', which no specification keeps"),
        ({"kwargs": {"widths": [[[[[1]]]]]}}, r"\['kwargs'\] is a dict, expected a dict of plain values"),
        ({"kwargs": {"width": 10**30}}, r"\['kwargs'\] is a dict"),
        ({"route_after": [1]}, r"\['route_after'\] is a list, expected 'auto' or"),
        ({"routing": "code"}, r"\['routing'\] is 'code'"),
        ({"code": "import os"}, "has 'code', which this version does not know"),
    ],
)
def test_values_out_of_a_file_are_checked(change, message):
    values = create_model("resnet20").specification.to_dict()
    assert Specification.from_dict(values) == create_model("resnet20").specification
    with pytest.raises(ValueError, match=message):
        Specification.from_dict(values | change)
    with pytest.raises(ValueError, match=f"checkpoint is x; .*{message}"):
        specification_in({"specification": values | change}, "checkpoint is x")


def test_older_checkpoints_name_a_registered_network():
    run = {"model": "resnet20_cc2", "num_classes": 7, "in_chans": 1, "img_size": 8}
    assert specification_in(run, "checkpoint is x") == Specification("fastroute", "resnet20_cc2", 7, 1, 8)
    with pytest.raises(ValueError, match=r"checkpoint is x; .*a Sequential, is built: .*load\(path, model=network\)"):
        specification_in(run | {"model": "Sequential", "specification": None}, "checkpoint is x")


def test_differences_are_named():
    one = Specification("timm", "resnet18", 5, paths=2, route_after=("layer1",))
    assert one.differences(replace(one, versions={"timm": "2"}, img_size=64)) == ""
    assert one.differences(replace(one, paths=3, init="copy")) == "paths=2, not 3, init='fresh', not 'copy'"


def test_says_that_fresh_paths_are_not_the_pretrained_ones(tmp_path):
    path, said = tmp_path / "weights.pt", []
    torch.save(create_model("resnet20").state_dict(), path)
    specification = Specification.parse("resnet20", paths=2)
    specification.build(pretrained_path=path, say=said.append)
    assert "init is 'fresh': only the first path starts from these weights" in said[0]
    replace(specification, init="copy").build(pretrained_path=path, say=(rest := []).append)
    assert not any("fresh" in sentence for sentence in rest)


def test_numbers_of_numpy_are_kept_as_python_s():
    seven = np.int64(7)
    expected = create_model("resnet20_cc2", 7, 1, 24).specification
    for network in (
        create_model("resnet20_cc2", seven, np.int32(1), np.int64(24)),
        create_model("resnet20_cc2", 7, 1, (24, 24)),
    ):
        assert network.specification == expected and type(network.specification.num_classes) is int
    single = create_model("resnet20", 7)
    by_numpy = multipath(single, np.int64(2), input_size=np.array([3, 32, 32]))
    assert specification_of(by_numpy) == specification_of(multipath(single, 2, input_size=(3, 32, 32)))
    by_numpy.reset_classifier(np.int64(4))
    assert specification_of(by_numpy).num_classes == 4
    assert Specification.from_dict(specification_of(by_numpy).to_dict()) == specification_of(by_numpy)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("resnet20", 7.0), r"num_classes is 7.0; it must be an integer"),
        (("resnet20", 7, True), "in_chans is True; it must be an integer"),
        (("resnet20", 7, 3, (8, 9)), r"img_size is \(8, 9\); it must be an integer"),
        ((Path("resnet20"),), "model is .*Path.*; it must be a text"),
    ],
)
def test_sizes_are_integers(arguments, message):
    with pytest.raises(TypeError, match=message):
        create_model(*arguments)


def rectangles(num_classes=10, img_size=(8, 8), anchors=None):
    assert anchors.shape == (1, 2) and img_size == (4, 8)
    return nn.Sequential(nn.Flatten(), nn.Linear(96, num_classes))


def test_own_builders_take_what_they_are_given():
    name = f"{__name__}:rectangles"
    network = create_model(name, 5, img_size=(4, 8), anchors=np.ones((1, 2)))
    assert network(torch.ones(2, 3, 4, 8)).shape == (2, 5)
    assert network.specification is None  # which has square images alone


@pytest.mark.parametrize(("channels", "normalises"), [(3, True), (1, False)])
def test_pretrained_inceptions_renormalise_only_colours(channels, normalises, monkeypatch):
    monkeypatch.setattr("fastroute.models.sources.load_pretrained", lambda *arguments, **options: None)
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda name: MagicMock())
    network = create_model("torchvision:googlenet", 5, channels, pretrained=True, init_weights=False)
    assert network.transform_input == normalises and network.eval()(torch.zeros(1, channels, 64, 64)).shape == (1, 5)


def hooked(network):
    network.register_forward_pre_hook(lambda module, args: (args[0] * 3 + 1,))


def on_the_instance(network):
    network.forward = lambda x: type(network).forward(network, x.tanh())


def strided(network):
    next(module for module in network.modules() if isinstance(module, nn.Conv2d)).stride = (1, 1)


@pytest.mark.parametrize("change", [hooked, on_the_instance, strided])
@pytest.mark.parametrize("kind", ["inferred", "named", "converted"])
def test_another_computation_of_the_same_layers_has_no_specification(change, kind):
    network = torchvision.models.resnet18(num_classes=3)
    if kind == "named":
        network = create_model("torchvision:resnet18", 3)
    elif kind == "converted":
        network = multipath(network, 2, ["layer1"], input_size=(3, 32, 32))
    assert specification_of(network).name == "resnet18"
    change(network)
    assert specification_of(network) is None


@pytest.mark.parametrize(
    "options", [{"num_heads": 12}, {"global_pool": "avg", "fc_norm": False}, {"dynamic_img_size": True}, {}]
)
def test_arguments_of_timm_that_no_layer_shows(options):
    network = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=12, drop_rate=0.0, **options)
    assert (specification_of(network) is None) == bool(options)


def test_what_only_matters_in_training_keeps_the_specification():
    network = create_model("torchvision:mobilenet_v2", 3)
    network.classifier[0].p = 0.5
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.01
    assert specification_of(network) is not None
    network = create_model("resnet20_cc2")
    checkpoint_gradients(network)
    assert specification_of(network) is not None
    network = nn.Sequential(nn.LeakyReLU(0.1), nn.Hardtanh())
    before = layout(network)
    network[0].inplace = network[1].inplace = True
    assert layout(network) == before


def head_of(network, layer):
    for name, module in network.named_modules():
        if isinstance(module, layer):
            last = name
    network.set_submodule(last, layer(network.get_submodule(last).weight.shape[1], 7, *[1] * (layer is nn.Conv2d)))


@pytest.mark.parametrize("name", ["squeezenet1_1", "mnasnet0_5"])
def test_a_replaced_classifier_shows_in_the_layout(name):
    network = torchvision.models.get_model(name)
    head_of(network, nn.Conv2d if name == "squeezenet1_1" else nn.Linear)
    assert specification_of(network).num_classes == 7


def test_replaced_first_layers_and_kernels_of_attention_keep_the_specification():
    network = timm.create_model("resnet18", num_classes=3)
    network.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    assert specification_of(network).in_chans == 1
    network = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    network.blocks[0].attn.fused_attn = False
    assert specification_of(network) is not None
