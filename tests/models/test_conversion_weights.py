"""The parameters of the paths that `multipath` makes, and what it keeps of the network's own routers."""

import copy

import pytest
import torch
from torch import nn

from fastroute.models import create_model, multipath
from fastroute.training.optim import parameter_groups
from tests.models.test_conversion import CUTS, Toy
from tests.models.toys import SIZE, toy_paths


def test_names_what_the_network_exempts_from_weight_decay():
    class Exempting(Toy):
        def no_weight_decay(self):
            return {"scale", "stage2.0.weight", "not there"}

    network = multipath(Exempting(), 2, ["stem", "stage1"], input_size=SIZE)
    found = {
        name
        for name, _ in network.named_parameters(remove_duplicate=False)
        if name.endswith(("scale", "stage2.0.weight"))
    }
    assert network.no_weight_decay() == copy.deepcopy(network).no_weight_decay() == found and len(found) == 6
    assert toy_paths(Toy(), 2, CUTS).no_weight_decay() == set()
    exempt = parameter_groups(network, lr=0.1, weight_decay=0.5, filter_bias_and_bn=True)
    without = {id(p) for group in exempt if not group["weight_decay"] for p in group["params"]}
    assert {id(network.get_parameter(name)) for name in found} <= without


@pytest.mark.parametrize("init", ["fresh", "copy"])
def test_frozen_parameters_stay_as_they_are(init):
    network = Toy()
    network.wide.weight.requires_grad_(False)
    model = toy_paths(network, 2, CUTS, init=init)
    assert torch.equal(model.stage2[1].wide.weight, network.wide.weight)
    assert not torch.equal(model.dense[1].dense.weight, network.dense.weight)
    assert not model.stage2[1].wide.weight.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_paths_do_not_share_parameters_with_the_stem(tied):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)
            self.scale = nn.Parameter(torch.ones(3, 1, 1))
            if tied:
                self.b.weight = self.a.weight

        def forward(self, x):
            x = self.a(x) if tied else self.a(x * self.scale)
            x = self.b(x) if tied else self.b(x) * self.scale
            return self.fc(x.mean((2, 3)))

    network = multipath(Scaled(), 2, "a", input_size=SIZE)
    stem, first, second = (set(part.parameters()) for part in (network.stem[0], *network.head))
    assert not stem & first and not stem & second and not first & second


def test_fresh_paths_keep_what_has_an_order():
    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.theta = nn.Conv2d(3, 4, 3), nn.Linear(4, 6)
            nn.init.zeros_(self.theta.weight)
            self.theta.bias = nn.Parameter(torch.tensor([1.0, 0, 0, 0, 1, 0]))

        def forward(self, x):
            return self.theta(self.conv(x).mean((2, 3)))

    network = multipath(Transformer(), 3, ["conv"], input_size=SIZE)
    assert all(path.theta.bias.tolist() == [1, 0, 0, 0, 1, 0] for path in network.head)


def test_routers_of_the_network_itself_are_described_too():
    network = multipath(create_model("resnet20_sparse4_top1"), 2, ["stem"]).eval()
    x = torch.randn(2, 3, 32, 32)
    logits, routing = network(x, return_routing=True)
    assert torch.equal(logits, network(x)) and next(iter(routing)) == "stem_router" and len(routing) == 7
    assert all(value.gates.shape[0] == 2 for value in routing.values())
    network.head.execution = "batched"
    with pytest.raises(ValueError, match="is asked for, but the execution of head is 'batched'"):
        network(x, return_routing=True)
    network.head = nn.Identity()
    assert list(network._inner_routers()) == []


@pytest.mark.parametrize("init", ["fresh", "copy"])
def test_paths_keep_padding_rows_and_spectral_norms(init):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.embedding = nn.Embedding(9, 4, padding_idx=2)
            self.last = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3), n_power_iterations=30)

        def forward(self, x):
            tokens = self.conv(x).mean((1, 2)).mul(9).long().clamp(0, 8)
            return self.last(self.embedding(tokens).mean(1))

    model = multipath(Tokens(), 3, ["conv"], input_size=SIZE, init=init, noise=0.1).eval()
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    assert len(embeddings) == 3 and all(not embedding.weight[2].any() for embedding in embeddings)
    lasts = [module for module in model.modules() if hasattr(module, "parametrizations")]
    tolerance = 1e-5 if init == "fresh" else 0.2
    assert [last.weight.svd().S[0].item() for last in lasts] == pytest.approx([1] * 3, abs=tolerance)


def test_paths_do_not_share_statistics_with_the_stem():
    norm = nn.BatchNorm2d(4, affine=False)
    layers = nn.Conv2d(3, 4, 1), norm, nn.ReLU(), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    model = multipath(nn.Sequential(*layers), 2, ["2"], input_size=SIZE).train()
    model(torch.randn(4, *SIZE))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [int(module.num_batches_tracked) for module in norms] == [1, 1, 1]
