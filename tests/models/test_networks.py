"""Every registered network: its parameters, its two call forms, and its exports."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastroute import models
from fastroute.models._cost import _cross_predict
from fastroute.models.blockdrop import BlockDrop
from fastroute.models.capsules import CapsNet
from fastroute.models.cifar_resnet import blocks_per_stack, cifar_resnet, pre_activation_resnet
from fastroute.models.cnn import base_cnn_cc, cnn
from fastroute.models.convnet_aig import ConvNetAIG, GatedBlock
from fastroute.models.ensemble import Ensemble
from fastroute.models.highway import HighwayConv
from fastroute.models.hypernetwork import GeneratedConv2d, HyperWideResNet, KernelGenerator
from fastroute.models.layers import SqueezeExcite
from fastroute.models.skipnet import SkipNet
from fastroute.models.skippable_resnet import SkippableBlock
from fastroute.models.sparse_resnet import sparse_resnet
from fastroute.nn import CrossConnection, CrossPrediction2d, CrossPredictionLinear, CrossStitch, Router, SparseRouter

# Name → the thesis's count, and ours with the settings that fit all its other counts.
CONTRADICTIONS = {
    "base_cnn_x3": ("1.5", "1.7"),  # three of its own BaseCNNs of 0.55
    "base_cnn_ensemble": ("1.66", "1.65"),
    "cross_stitch_base_cnn2": ("1.11", "1.10"),  # two BaseCNNs and 18 coefficients
    "se_base_cnn": ("0.58", "0.56"),  # no one reduction fits both SENets
    "se_deep_cnn": ("2.06", "2.08"),
    "base_cnn_cp3": ("2.23", "2.22"),
    "capsnet": ("8.2", "11.7"),  # 8.2 for grey images of 28×28
    "blockdrop110": ("1.7", "1.8"),  # with the policy
    "resnet164": ("2.5", "1.7"),  # 1.7 in the literature
    "resnet20_cp4": ("1.29", "1.28"),
    "resnet32_cc4": ("1.88", "1.87"),  # 1.8747
    "wide_resnet50_2": ("62.0", "67.0"),
    "resnext50_2x64d": ("47.5", "44.4"),
}

SMALL = {
    "plain": lambda: cnn(((4,), (8,)), img_size=8),
    "se": lambda: pre_activation_resnet(10, 1, 4),
    "carry": lambda: models.create_model("highway", img_size=8),
    "hyper": lambda: HyperWideResNet(10, 1),
    "aig": lambda: ConvNetAIG(8),
    "blockdrop": lambda: BlockDrop(8),
    "skipnet": lambda: SkipNet(8),
    "capsules": lambda: CapsNet(4, 2, 3, img_size=8),
    "ensemble": lambda: Ensemble([cifar_resnet(8), cifar_resnet(8, 2)]),
    "cc": lambda: base_cnn_cc(2, img_size=8),
    "stitch": lambda: base_cnn_cc(2, "stitch", img_size=8),
    "cp": lambda: models.create_model("base_cnn_cp2", img_size=8),
    "resnet_cp": lambda: cifar_resnet(8, 2, "cp"),
    "imagenet": lambda: models.create_model("resnet18_cc2", num_classes=10),
    "sparse": lambda: sparse_resnet(8, 3, 2),
}
SIZES = {"imagenet": 32}
OWN_LOSS = ["blockdrop", "skipnet", "capsules"]


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def every(names, leave_out=""):
    """Return small networks of all kinds, and with -m slow all networks but those whose names contain `leave_out`."""
    found = [name for name in models.list_models() if not leave_out or leave_out not in name]
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in found)]


def network(name):
    """Return the network in evaluation mode, with gates that differ between samples, and images for it."""
    torch.manual_seed(0)
    if name in SMALL:
        model, size = SMALL[name](), SIZES.get(name, 8)
    else:
        info = models.model_info(name)
        model, size = models.create_model(name), 64 if info.table == "3.4" else info.img_size
    for module in model.modules():
        if isinstance(module, Router | SparseRouter):
            nn.init.normal_(module.w2)
    return model.eval(), torch.randn(3, 3, size, size)


def loss_of(model, x):
    """Return the cross-entropy of three images, or the network's own loss at the end of a run."""
    labels = torch.arange(3)
    if hasattr(model, "training_loss"):
        return model.training_loss(x, F.one_hot(labels, model.num_classes).float(), 0.99)[0]
    return F.cross_entropy(model(x), labels)


@pytest.mark.parametrize("name", [name for name in models.list_models() if models.model_info(name).params])
def test_parameters_are_those_of_the_thesis(name):
    printed = models.model_info(name).params
    with torch.device("meta"):
        millions = count(models.create_model(name)) / 1e6
    there, here = CONTRADICTIONS.get(name, (printed, printed))
    assert there == printed
    assert f"{millions:.{len(printed.partition('.')[2])}f}" == here


def test_every_row_of_the_tables_is_registered():
    rows = "base_cnn wide_cnn deep_cnn base_cnn_x3 base_cnn_cc2 base_cnn_cc3 base_cnn_cc4 base_cnn_cp2 base_cnn_cp3 "
    rows += "base_cnn_cp4 se_base_cnn se_deep_cnn cross_stitch_base_cnn2 base_cnn_ensemble all_ensemble vgg16 highway "
    rows += "resnet20 resnet110 resnet164 wrn_40_2 se_resnet110 convnet_aig110 hyper_wrn_40_2 resnet20_cp2 "
    rows += "capsnet blockdrop110 "
    rows += "resnet20_cp3 resnet20_cp4 resnet20_cc2 resnet20_cc3 resnet20_cc4 resnet32_cc2 resnet32_cc3 resnet32_cc4 "
    rows += "resnet18 resnet34 resnet50 resnet101 wrn_18_1_5 wide_resnet50_2 resnext50_2x64d resnet18_cc2 resnet50_cc2"
    assert {name for name in models.list_models() if models.model_info(name).params} == set(rows.split())
    assert {"resnet32", "vgg13_cc2", "resnet20_x2"} <= set(models.list_models())


def test_exact_parameters():
    with torch.device("meta"):
        counts = {name: count(models.create_model(name)) for name in ("base_cnn", "wide_cnn", "deep_cnn", "resnet110")}
        assert counts == {"base_cnn": 551_466, "wide_cnn": 1_672_906, "deep_cnn": 2_045_098, "resnet110": 1_730_714}


def test_macs():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
    assert models.count_macs(linear, (3, 4, 4)) == 3 * 4 * 4 * 5
    assert models.count_macs(linear.bfloat16(), (3, 4, 4)) == 3 * 4 * 4 * 5
    with torch.device("meta"):
        alone, routed = (models.create_model(name) for name in ("resnet20_x2", "resnet20_cc2"))
        routing = models.count_macs(routed, (3, 32, 32)) - models.count_macs(alone, (3, 32, 32))
    pooled = mixed = gates = 0
    for channels, size, m in ((16, 32, 1), (16, 32, 2), (32, 16, 2), (64, 8, 2)):
        pooled += m * channels * size**2
        mixed += 2 * m * channels * size**2
        gates += m * 16 * (channels + 2)
    assert routing == pooled // 2 + mixed + gates
    assert routed.training
    alone.stack1[0].eval()
    with pytest.raises(RuntimeError):
        models.count_macs(alone, (1, 32, 32))
    assert alone.training and alone.stack2.training and not any(m.training for m in alone.stack1[0].modules())

    predictions, outputs = [(2, 3, 8, 8)] * 2, [(2, 5, 6, 6)] * 4
    flops = _cross_predict(predictions, (2, 4, 5, 3, 3, 3), None, (2, 2, 4), out_shape=outputs)
    assert flops // 2 == 2 * 4 * (3 * 9 + 1) * 2 * 5 * 6 * 6


@pytest.mark.parametrize("name", every(SMALL))
def test_both_call_forms_agree(name):
    model, x = network(name)
    with torch.no_grad():
        logits, routing = model(x, return_routing=True)
        assert torch.equal(model(x), logits)
    routers = [module for module in model.modules() if isinstance(module, (Router, SparseRouter, SkippableBlock))]
    assert len(routing) == len(routers) and len(logits) == len(x)
    for gates, scores, *_ in routing.values():
        assert gates.shape == scores.shape and gates.shape[0] == len(x)
        torch.testing.assert_close(gates.sum(-1), torch.ones(gates.shape[:-1]))


@pytest.mark.parametrize("name", every(SMALL))
def test_trains(name):
    model, x = network(name)
    loss_of(model.train(), x).backward()
    for key, parameter in model.named_parameters():
        idle = ".paths." in key and parameter.grad is None  # a path of a sparse router that got no image
        assert idle or parameter.grad.isfinite().all(), key


@pytest.fixture
def compile_anew():
    """All networks of parallel paths share one forward, of which torch compiles no more than eight kinds."""
    torch._dynamo.reset()


@pytest.mark.usefixtures("compile_anew")
@pytest.mark.parametrize(
    "name", every(["plain", "hyper", "aig", *OWN_LOSS, "ensemble", "cc", "stitch", "cp"], "sparse")
)
def test_compiles_whole(name):
    model, x = network(name)
    with torch.no_grad():
        expected = model(x, return_routing=True)
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x, return_routing=True)
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("compile_anew")
@pytest.mark.parametrize("name", every(["cc", "aig", *OWN_LOSS], "sparse"))
def test_trains_compiled_whole(name):
    model, x = network(name)
    model.train().compile(fullgraph=True, backend="aot_eager")
    loss_of(model, x).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("compile_anew")
@pytest.mark.parametrize("name", ["cc", "stitch", "cp", "aig", "imagenet"])
def test_compiles_with_inductor(name):
    model, x = network(name)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", every(["hyper", "aig", *OWN_LOSS, "ensemble", "cc", "stitch", "cp", "sparse"]))
def test_exports_with_any_batch(name):
    model, x = network(name)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    y = torch.cat([x, x.flip(0), x[:1]])
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(y), model(y), rtol=1e-4, atol=1e-4)


def test_export_keeps_routing_whole_until_it_is_asked_to_decompose():
    model, x = network("cc")
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert namespaces(exported) == {"aten", "fastroute"}
    operators = [torch.ops.fastroute.cross_connect.default]
    table = {operator: torch._decomp.decomposition_table[operator] for operator in operators}
    exported = exported.run_decompositions(table)
    assert namespaces(exported) == {"aten"}
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), model(x))


def namespaces(exported):
    return {node.target.namespace for node in exported.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}


@pytest.mark.parametrize("name", every(SMALL))
def test_round_trip_through_safetensors(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, x = network(name)
    safetensors.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.manual_seed(1)
    other = SMALL[name]() if name in SMALL else models.create_model(name)
    other.load_state_dict(safetensors.load_file(tmp_path / "weights.safetensors"), strict=True)
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model(x))


@pytest.mark.parametrize("name", every(["cc", "cp", "sparse", *OWN_LOSS]))
def test_onnx_runs_as_eager_does(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = network(name)
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    assert {node.domain for node in program.model.graph} == {""}  # only standard operators
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    y = torch.cat([x, x.flip(0), x[:1]])
    (logits,) = session.run(None, {session.get_inputs()[0].name: y.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(y), rtol=1e-3, atol=1e-3)


def test_base_cnn_has_its_routers_and_pools_where_the_thesis_has_them():
    model = models.create_model("base_cnn_cc2")
    routers = {name: (r.channels, r.in_paths) for name, r in model.named_modules() if isinstance(r, CrossConnection)}
    assert routers == {
        "input_router": (3, 1),
        "conv2_router": (32, 2),
        "conv4_router": (64, 2),
        "conv6_router": (128, 2),
        "dense1_router": (32, 2),
    }
    network = models.create_model("base_cnn")
    order = "conv1 conv2 pool1 conv3 conv4 pool2 conv5 conv6 flatten dense1 dense2 logits"
    assert [name for name, _ in network.named_children()] == order.split()
    assert len([m for m in models.create_model("deep_cnn").modules() if isinstance(m, nn.MaxPool2d)]) == 3


def test_base_cnn_cp_has_predictions_in_place_of_layers():
    model = models.create_model("base_cnn_cp2")
    kinds = {n: type(m) for n, m in model.named_children() if isinstance(m, Router)}
    assert kinds == dict.fromkeys(("conv1", "conv3", "conv5"), CrossPrediction2d) | {"dense2": CrossPredictionLinear}
    assert [len(getattr(model, name).norms) for name in ("conv1", "conv3", "conv5")] == [2, 2, 2]
    first, second = (model.conv2[i][0].weight for i in range(2))
    assert not torch.equal(first, second)


def test_vgg13_has_seven_routers():
    with torch.device("meta"):
        model = models.create_model("vgg13_cc2")
    routers = [name for name, module in model.named_children() if isinstance(module, CrossConnection)]
    assert routers == ["input_router", *(f"pool{i}_router" for i in range(1, 6)), "dense1_router"]


def test_cross_stitch_units_stand_in_place_of_routers():
    model = models.create_model("cross_stitch_base_cnn2")
    units = [tuple(m.gates.shape) for m in model.modules() if isinstance(m, CrossStitch)]
    assert units == [(1, 2), (2, 2), (2, 2), (2, 2), (2, 2)]


def test_squeeze_excite():
    layer, x = SqueezeExcite(32, 16), torch.randn(2, 32, 4, 4)
    hidden = torch.relu(F.linear(x.mean((2, 3)), layer.gate[1].weight.flatten(1), layer.gate[1].bias))
    gate = torch.sigmoid(F.linear(hidden, layer.gate[3].weight.flatten(1), layer.gate[3].bias))
    torch.testing.assert_close(layer(x), x * gate[:, :, None, None])
    assert layer.gate[1].out_channels == 2 and SqueezeExcite(4, 16).gate[1].out_channels == 1


def test_highway_layers_carry_through_what_they_do_not_transform():
    layer, x = HighwayConv(3), torch.randn(2, 3, 5, 5)
    gate = torch.sigmoid(layer.gate(x))
    torch.testing.assert_close(layer(x), gate * torch.relu(layer.transform(x)) + (1 - gate) * x)
    nn.init.constant_(layer.gate.bias, -100.0)
    torch.testing.assert_close(layer(x), x)


def test_generated_kernels_are_assembled_from_pieces():
    torch.manual_seed(0)
    generate, layer = KernelGenerator(), GeneratedConv2d(32, 48, 1)
    assert layer.embedding.shape == (3, 2, 64)
    kernel = generate(layer.embedding)
    assert kernel.shape == (48, 32, 3, 3)
    inner = torch.einsum("z,zcd->cd", layer.embedding[2, 1], generate.inner)
    torch.testing.assert_close(kernel[32:, 16:], torch.einsum("cd,dekl->eckl", inner, generate.outer))
    assert kernel.std().item() == pytest.approx(1, rel=0.1)
    assert layer(torch.randn(1, 32, 5, 5), generate).shape == (1, 48, 5, 5)


@pytest.mark.parametrize("size, stride", [((1, 1), 1), ((2, 2), 2), ((16, 2), 2)])
def test_generated_kernels_are_right_for_small_maps_in_bfloat16(size, stride):
    """For which PyTorch's convolutions on a CPU have it wrong."""
    torch.manual_seed(0)
    generate, layer = KernelGenerator().bfloat16(), GeneratedConv2d(32, 48, stride).bfloat16()
    x = torch.randn(4, 32, *size).bfloat16()
    kernel = (generate(layer.embedding) * layer.scale).detach()
    exact = kernel.double().requires_grad_()
    expected = nn.functional.conv2d(x.double(), exact, stride=stride, padding=1)
    expected.sum().backward()
    found = kernel.requires_grad_()
    layer.scale = 1
    y = layer(x, lambda _: found)
    y.sum().backward()
    for ours, true in ((y, expected), (found.grad, exact.grad)):
        torch.testing.assert_close(ours.double(), true, rtol=0.02, atol=0.02 * true.abs().max().item())


def test_gated_blocks_compute_or_skip():
    torch.manual_seed(0)
    block, x = GatedBlock(4, 4, 1).eval(), torch.randn(6, 4, 5, 5) + 3 * torch.randn(6, 4, 1, 1)
    nn.init.normal_(block.gate[-1].weight)
    nn.init.zeros_(block.gate[-1].bias)
    y, (gates, scores) = block(x)
    used = scores[:, 0].argmax(-1) == 1
    assert torch.equal(gates[:, 0, 1], used.float()) and 0 < used.sum() < 6
    expected = torch.relu(block.residual(x) + x)
    torch.testing.assert_close(y[used], expected[used])
    torch.testing.assert_close(y[~used], torch.relu(x)[~used])

    gates = torch.cat([GatedBlock(4, 4, 1)(x)[1].gates for _ in range(200)])
    assert set(gates.unique().tolist()) == {0.0, 1.0}  # hard in training as well
    assert gates[..., 1].mean().item() == pytest.approx(0.87, abs=0.05)


def test_gates_of_blocks_learn():
    block, x = GatedBlock(4, 4, 1), torch.randn(6, 4, 5, 5)
    block(x)[0].square().sum().backward()
    assert block.gate[-1].weight.grad.abs().max() > 0


def test_torchvision_weights_load():
    resnet18 = pytest.importorskip("torchvision").models.resnet18()
    model, x = models.create_model("resnet18").eval(), torch.randn(2, 3, 64, 64)
    model.load_state_dict(resnet18.state_dict())
    assert torch.equal(model(x), resnet18.eval()(x))
    gray = models.create_model("wrn_18_1_5", num_classes=3, in_chans=1)
    assert gray(torch.randn(2, 1, 32, 32)).shape == (2, 3) and gray.layer4[1].conv2.out_channels == 768


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: models.create_model("base_cnn", img_size=3), "img_size is 3; it must be at least 4 for 2 pools"),
        (lambda: models.create_model("vgg16", img_size=16), "img_size is 16; it must be at least 32 for 5 pools"),
        (lambda: pre_activation_resnet(41), r"depth is 41; it must be 6k \+ 2"),
        (lambda: blocks_per_stack(163, 3), r"depth is 163; it must be 9k \+ 2, such as 29 or 47"),
        (lambda: HyperWideResNet(42, 1), r"depth is 42; it must be 6k \+ 4"),
    ],
)
def test_wrong_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", ["base_cnn", "base_cnn_cc2", "base_cnn_cp2", "vgg13_cc2"])
def test_images_of_another_size_are_refused_by_name(name):
    network = models.create_model(name, img_size=32).eval()
    assert network(torch.randn(2, 3, 32, 32)).shape[0] == 2
    with pytest.raises(ValueError, match=r"network are of images of 32×32, .*build the network with their img_size"):
        network(torch.randn(2, 3, 48, 64))


def test_a_highway_of_32_channels_computes_in_bfloat16():
    with torch.autocast("cpu", torch.bfloat16):
        assert models.create_model("highway", in_chans=32)(torch.randn(2, 32, 8, 8)).shape == (2, 10)


def test_macs_need_the_size_of_an_image():
    with pytest.raises(TypeError, match="input_size is 32; it must be a tuple"):
        models.count_macs(nn.ReLU(), 32)


def test_networks_of_other_channels_have_maps_of_the_same_sizes():
    pytest.importorskip("torchvision")
    maps = [
        models.create_model("resnet18", 5, channels).forward_features(torch.randn(1, channels, 64, 64))
        for channels in (1, 3)
    ]
    assert maps[0].shape == maps[1].shape == (1, 512, 2, 2)
