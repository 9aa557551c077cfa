import pytest
import torch
from torch import nn

from fastroute.models import create_model, multipath
from fastroute.models.specification import Specification
from fastroute.models.weights import load_pretrained, misfit, read_weights
from fastroute.nn import CrossConnection
from fastroute.training import load_weights


def saved(network, path):
    torch.save(network.state_dict(), path)
    return path


def single():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 9))


def test_one_path_s_weights_start_all_paths_of_a_named_network(tmp_path):
    messages = []
    weights = create_model("resnet20", 10).state_dict()
    network = create_model("resnet20_cc2", 10)
    before = network.stack2_router.w1.clone()
    load_pretrained(network, weights, "pretrained_path is resnet20.pth", say=messages.append)
    for name in ("stack1", "stack3"):
        first, second = (getattr(network, name)[i][1].residual[0].weight for i in range(2))
        given = weights[f"{name}.1.residual.0.weight"]
        assert torch.equal(first, given) and not torch.equal(second, given)
        assert 0.005 < (second - given).std() / given.std() < 0.02
    assert torch.equal(network.head[0][2].weight, weights["head.2.weight"])
    assert torch.equal(network.head[1][2].bias, weights["head.2.bias"])
    assert torch.equal(network.stack2_router.w1, before)
    assert messages == [
        "pretrained_path is resnet20.pth; it starts all paths, with noise of 1% on all but the first; "
        "routers start fresh"
    ]


def test_parts_of_one_module_find_their_weights_under_any_name():
    network = multipath(single(), 2, ["0", "2"], input_size=(3, 8, 8))
    weights = {
        name: torch.randn(value.shape) if value.dim() else value for name, value in single().state_dict().items()
    }
    load_pretrained(network, weights, "x", noise=0, say=lambda sentence: None)
    assert torch.equal(network.stem[0].weight, weights["0.weight"])
    assert torch.equal(network.state_dict()["head.1.4.weight"], weights["4.weight"])


def test_a_classifier_of_other_classes_is_left_out(tmp_path):
    messages = []
    weights = create_model("resnet20_cc2", 1000).state_dict()
    network = create_model("resnet20_cc2", 7)
    before = network.head[1][2].weight.clone()
    load_pretrained(network, weights, "pretrained_path is w.pth", say=messages.append)
    assert torch.equal(network.head[1][2].weight, before)
    assert torch.equal(network.stack2[1][0].residual[0].weight, weights["stack2.1.0.residual.0.weight"])
    assert len(messages) == 1 and "its classifier is of 1,000 classes and is left out: head.0.2.weight" in messages[0]
    assert "for 7 classes start fresh" in messages[0]


@pytest.mark.parametrize(
    "name, of", [("resnet20", "resnet20"), ("resnet20_cc2", "resnet20"), ("base_cnn_ensemble",) * 2]
)
def test_a_classifier_is_not_missed_by_a_network_without_one(name, of, tmp_path):
    whole, x = create_model(of, 7).eval(), torch.randn(2, 3, 32, 32)
    path = saved(whole, tmp_path / "whole.pth")
    features = create_model(name, 0, pretrained_path=path).eval()
    if name == of:
        assert torch.equal(features(x), whole.forward_head(whole.forward_features(x), pre_logits=True))
    else:
        assert torch.equal(features.stem[0][0].weight, whole.stem[0].weight)
    weights = whole.state_dict() | {"other.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"1 unexpected \(other.weight\)"):
        load_pretrained(features, weights, "pretrained_path is whole.pth")


@pytest.mark.parametrize("prior", [None, "learned"])
def test_weights_of_normalised_gates_come_with_their_statistics(prior, tmp_path):
    options = {"gate_norm": "standardize", "prior": prior}
    network = create_model("resnet20_cc2", 7, **options)
    network(torch.randn(4, 3, 16, 16))  # moves the statistics
    path, x = saved(network.eval(), tmp_path / "w.pth"), torch.randn(2, 3, 16, 16)
    assert torch.equal(create_model("resnet20_cc2", 7, pretrained_path=path, **options).eval()(x), network(x))
    plain = saved(create_model("resnet20_cc2", 7), tmp_path / "plain.pth")
    fresh = create_model("resnet20_cc2", 7, pretrained_path=plain, **options)
    assert fresh.stack1_router.gate_norm.num_batches_tracked == 0
    with pytest.raises(ValueError, match=r"unexpected \(stack1_router\.gate_norm\."):
        create_model("resnet20_cc2", 7, pretrained_path=path)


@pytest.mark.parametrize("init", ["fresh", "copy"])
def test_weights_of_parallel_paths_start_paths_of_either_kind(init, tmp_path):
    pytest.importorskip("torchvision")

    def build(init, path=None):
        given = Specification("torchvision", "resnet18", 7, img_size=32, paths=2, init=init)
        return given.build(pretrained_path=path).eval()

    network, x = build(init), torch.randn(2, 3, 32, 32)
    path = saved(network, tmp_path / "w.pth")
    assert torch.equal(build("copy", path)(x), network(x))
    if init == "copy":
        with pytest.raises(ValueError, match="its paths were started with init='copy': build the network with"):
            build("fresh", path)


def test_weights_fit_images_of_other_channels():
    messages, weights = [], create_model("resnet20", 10).state_dict()
    for channels, expected in ((1, weights["stem.0.weight"].sum(1, keepdim=True)), (4, None)):
        network = create_model("resnet20", 10, channels)
        load_pretrained(network, weights, "x", say=messages.append)
        first = network.stem[0].weight
        if expected is None:
            expected = torch.cat([weights["stem.0.weight"], weights["stem.0.weight"][:, :1]], 1) * 0.75
        torch.testing.assert_close(first, expected)
    assert messages[0] == "x; stem.0.weight is adapted to images of 1 channels"


@pytest.mark.parametrize(
    "weights, message",
    [
        (lambda: create_model("resnet32").state_dict(), "its weights are of another network: .*unexpected"),
        (lambda: create_model("resnet20_cc2").state_dict(), "another network: none of its tensors|missing"),
        (lambda: {}, "another network"),
        (
            lambda: create_model("resnet20").state_dict() | {"stack1.0.residual.0.weight": torch.ones(16, 15, 3, 3)},
            "shape",
        ),
        (lambda: create_model("resnet20").state_dict() | {"stem.0.weight": torch.ones(8, 3, 3, 3)}, "left out|shape"),
    ],
)
def test_weights_of_another_network_are_refused(weights, message):
    network = create_model("resnet20")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=rf"w\.pth; .*({message})"):
        load_pretrained(network, weights(), "w.pth", say=lambda sentence: None)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_files_of_all_kinds_are_read(tmp_path):
    network = create_model("resnet20")
    state = network.state_dict()
    for i, content in enumerate(({"state_dict": state}, {"model": state}, {"state_dict": {}, "state_dict_ema": state})):
        torch.save(content, tmp_path / f"{i}.pth")
        assert read_weights(tmp_path / f"{i}.pth").keys() == state.keys()
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "w.safetensors")
    other = create_model("resnet20", pretrained_path=tmp_path / "w.safetensors")
    assert torch.equal(other.stem[0].weight, network.stem[0].weight)
    (tmp_path / "bad.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"pretrained_path is .*bad\.pth; it holds no weights"):
        read_weights(tmp_path / "bad.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="it holds a list, and must hold a state_dict"):
        read_weights(tmp_path / "list.pth")


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fixed, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)
        self.fixed.weight.requires_grad_(False)
        self.register_buffer("mask", torch.eye(4))
        self.register_buffer("index", torch.arange(16).view(4, 4) % 4)

    def forward(self, x):
        x = self.fixed(torch.relu(self.conv(x))).mean((2, 3))
        return self.head((x @ self.mask)[:, self.index].mean(2))


def test_only_learned_weights_have_noise():
    network = Masked()
    paths = multipath(network, 2, ["conv"], input_size=(3, 8, 8))
    load_pretrained(paths, network.state_dict(), "weights is given", say=lambda sentence: None)
    for name, value in paths.state_dict().items():
        original = name.split(".", 2)[-1]
        if original in ("mask", "index", "fixed.weight"):
            assert torch.equal(value, network.state_dict()[original]), name
    weights = [layer.head.weight for layer in paths.head]
    assert torch.equal(weights[0], network.head.weight) and not torch.equal(weights[1], weights[0])


def test_a_temperature_of_the_network_s_own_is_a_weight():
    class Cosine(nn.Module):
        def __init__(self, temperature):
            super().__init__()
            self.conv, self.temperature = nn.Conv2d(3, 4, 3), nn.Parameter(torch.tensor(temperature))
            self.fc = nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(self.conv(x).mean((2, 3))) / self.temperature

    weights, network = Cosine(5.0).state_dict(), Cosine(2.0)
    assert misfit(network, weights) is None
    assert "1 missing (temperature)" in misfit(network, {k: v for k, v in weights.items() if k != "temperature"})
    load_pretrained(network, weights, "x")
    assert network.temperature == 5 and isinstance(network.temperature, nn.Parameter)
    paths = multipath(Cosine(2.0), 2, ["conv"], input_size=(3, 8, 8))
    load_pretrained(paths, weights, "x", say=lambda sentence: None)
    assert [path.temperature.item() for path in paths.head] == [5, 5]


@pytest.mark.parametrize("routing", ["stitch", None, lambda channels, m, n: CrossConnection(channels, m, n)])
def test_one_path_s_weights_start_paths_with_any_routers(routing):
    weights = single().state_dict()
    network = multipath(single(), 2, ["0", "2"], routing, input_size=(3, 8, 8))
    load_pretrained(network, weights, "x", noise=0, say=lambda sentence: None)
    assert all(torch.equal(network.state_dict()[f"head.{i}.4.weight"], weights["4.weight"]) for i in range(2))


def test_weights_may_come_from_a_wrapped_network(tmp_path):
    network, module = single(), single()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        weights = {f"{prefix}{name}": torch.randn(v.shape).to(v.dtype) for name, v in module.state_dict().items()}
        torch.save(weights, tmp_path / "w.pth")
        load_weights(network, tmp_path / "w.pth")
        assert torch.equal(network[4].weight, weights[f"{prefix}4.weight"])
        load_pretrained(network, weights, "x")
    wrapper = nn.ModuleDict({"module": single()})  # has this name itself
    load_pretrained(wrapper, {name: torch.ones_like(v) for name, v in wrapper.state_dict().items()}, "x")
    assert (wrapper.module[4].weight == 1).all()


def test_wrapped_weights_start_fresh_paths_as_others_do(tmp_path):
    weights = create_model("torchvision:resnet18", 5).state_dict()
    specification = Specification.parse("torchvision:resnet18", num_classes=5, paths=2)
    for prefix in ("", "module."):
        torch.save({f"{prefix}{name}": value for name, value in weights.items()}, tmp_path / "w.pth")
        network = specification.build(pretrained_path=tmp_path / "w.pth", say=lambda sentence: None)
        first, second = (path.fc.weight for path in network.head)
        assert torch.equal(first, weights["fc.weight"])
        assert torch.equal(second.flatten().sort()[0], first.flatten().sort()[0])  # in another order, without noise


def test_layers_of_older_densenets_have_a_dot_in_their_names():
    network = nn.ModuleDict({"denselayer1": nn.ModuleDict({"norm1": nn.BatchNorm2d(3), "conv2": nn.Conv2d(3, 3, 1)})})
    weights = {name: torch.ones_like(value) for name, value in network.state_dict().items()}
    older = {name.replace("norm1", "norm.1").replace("conv2", "conv.2"): value for name, value in weights.items()}
    load_pretrained(network, older, "x")
    layer = network["denselayer1"]
    assert (layer["conv2"].weight == 1).all() and (layer["norm1"].running_mean == 1).all()
