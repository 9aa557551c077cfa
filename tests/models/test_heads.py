"""The classifier of networks of any form, and what is left without it."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fastroute.models import create_model, multipath
from fastroute.models.specification import specification_of
from fastroute.nn import FusedSequential, MultiPathNetwork, ParallelPaths
from fastroute.nn._last_layer import final_linear


class Reversed(nn.Module):
    """Registers its layers in another order than that of their computation."""

    def __init__(self):
        super().__init__()
        self.out, self.hidden = nn.Linear(6, 10), nn.Linear(4, 6)

    def forward(self, x, pre_logits: bool = False):
        x = torch.relu(self.hidden(x.mean((2, 3))))
        return x if pre_logits else torch.flatten(self.out(x), 1)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = x.mean((2, 3))
        return x + self.fc(x)


class Branching(nn.Module):
    """Depends on its input, so that only a single dense layer is sure to be the last."""

    def __init__(self, hidden=None):
        super().__init__()
        self.out, self.hidden = nn.Linear(4, 10), hidden

    def forward(self, x):
        assert x.shape[1] == 4
        x = x.mean((2, 3)) if x.dim() == 4 else x
        return self.out(x if self.hidden is None else self.hidden(x))


class Listed(nn.Module):
    """Reads sizes, and calls what is in lists and dicts; its result is scaled and reshaped."""

    def __init__(self, way):
        super().__init__()
        self.way, self.scale = way, nn.Parameter(torch.ones(()))
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 10)])
        self.named = nn.ModuleDict({"out": nn.Linear(4, 10), "aux": nn.Linear(4, 2)})
        self.drop = nn.Dropout()

    def forward(self, x):
        n, c, _, _ = x.shape
        x = x.mean((2, 3)).view(n, c)
        if self.way == "iterated":
            for layer in self.layers:
                x = layer(x)
        else:
            x = self.layers[1](self.layers[0](x)) if self.way == "indexed" else self.named["out"](x)
        with torch.no_grad():
            self.scale.mul_(1.0 if self.training else 0.5)
        return (self.drop(input=x) / 2).reshape(x.size(0), -1) * self.scale


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.seen, self.calls = nn.Linear(4, 10), [], 0
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.calls, self.feature = self.calls + 1, x
        self.total += 1
        self.seen.append(x)
        return self.fc(x.mean((2, 3))).float().squeeze(-1)


def converted(head):
    return multipath(nn.Sequential(nn.Conv2d(3, 4, 3), head), 2, ["0"], input_size=(3, 8, 8)).eval()


def test_the_classifier_is_the_last_layer_that_computes():
    network, x = converted(Reversed()), torch.randn(2, 3, 8, 8)
    assert network.num_classes == 10 and network.num_features == 12
    torch.testing.assert_close(network.forward_head(network.forward_features(x)), network(x))
    network.reset_classifier(5)
    assert network(x).shape == (2, 5)
    network.reset_classifier(0)
    assert network(x).shape == (2, 12)


def test_forwards_that_depend_on_values_have_their_only_dense_layer():
    network = converted(Branching())
    network.reset_classifier(7)
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 7)
    assert converted(Branching(nn.Linear(4, 4))).num_classes is None


@pytest.mark.parametrize(("way", "name"), [("iterated", "layers.1"), ("indexed", "layers.1"), ("named", "named.out")])
def test_the_classifier_may_lie_in_a_list_or_dict(way, name):
    head = Listed(way).eval()
    assert final_linear(head, "head") == f"head.{name}" and head.scale == 1


def test_to_find_the_classifier_changes_nothing():
    network = converted(Counting())
    head = network.head[0]
    head.calls, head.seen[:], head.total = 0, [], torch.zeros(())
    vars(head).pop("feature", None)
    assert network.num_classes == network.num_classes == 10
    assert (head.calls, head.seen, head.total) == (0, [], 0) and not hasattr(head, "feature")
    pickle.dumps(network)


def test_other_threads_may_call_modules_meanwhile():
    network, other, x = converted(Reversed()), nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(lambda: network.num_classes) for _ in range(200)]
        assert all(other(x).shape == (2, 3) for _ in range(200)) and all(task.result() == 10 for task in asked)


def test_what_does_not_end_in_a_dense_layer_has_no_classifier():
    network, x = converted(Residual()), torch.randn(2, 3, 8, 8)
    before = network(x)
    assert network.num_classes is None
    with pytest.raises(ValueError, match="whose paths do not end in a dense layer"):
        network.reset_classifier(0)
    assert torch.equal(network(x), before)


def test_sequences_and_compiled_modules_end_as_they_do():
    dense = nn.Linear(4, 3)
    assert final_linear(nn.Sequential(nn.Flatten(), dense, nn.Identity()), "head") == "head.1"
    assert final_linear(FusedSequential(nn.Sequential(dense, nn.Dropout())), "head") == "head.0.0"
    assert final_linear(torch.compile(nn.Sequential(dense), backend="eager"), "head") == "head._orig_mod.0"
    assert final_linear(nn.Sequential(dense, nn.ReLU()), "head") is None
    assert final_linear(nn.ReLU(), "head") is None


@pytest.mark.parametrize("name", ["resnet20", "resnet20_cc2", "capsnet"])
def test_without_the_head_the_features_remain(name):
    network = create_model(name, 5, img_size=32 if name != "capsnet" else 17).eval()
    network.reset_classifier(0, "")
    x = torch.randn(2, 3, *2 * (32 if name != "capsnet" else 17,))
    features = network.forward_features(x)
    assert network(x).dim() == 4
    for pre_logits in (False, True):
        torch.testing.assert_close(network.forward_head(features, pre_logits), network(x))


def test_paths_may_have_features_of_different_widths():
    widths = (3, 5)
    head = ParallelPaths(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w, 4)) for w in widths)
    network = MultiPathNetwork({"stem": ParallelPaths(nn.Conv2d(3, w, 3) for w in widths), "head": head})
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(network.forward_head(network.forward_features(x)), network(x))


def test_a_fresh_classifier_has_the_type_of_the_network():
    network = create_model("resnet20_cc2", 5).double()
    network.reset_classifier(3)
    assert network(torch.randn(2, 3, 32, 32).double()).shape == (2, 3)


def test_a_specification_is_of_a_network_with_its_head():
    for name in ("resnet20", "resnet20_cc2"):
        network = create_model(name, 7)
        network.reset_classifier(0)
        assert specification_of(network).num_classes == 0
        network.reset_classifier(0, "")
        assert specification_of(network) is None
