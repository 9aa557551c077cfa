import itertools

import pytest
import torch
from torch import nn

from fastroute import models
from fastroute.models.cifar_resnet import cifar_resnet
from fastroute.nn import CrossConnection, ParallelPaths, SparseRouter
from fastroute.visualize import (
    Gate,
    RoutingData,
    collect_flows,
    collect_routing,
    parallel_weights,
    path_similarity,
    weight_distance,
)
from fastroute.visualize.collect import _hsic


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    model = cifar_resnet(8, paths=2)
    for module in model.modules():
        if isinstance(module, CrossConnection):
            nn.init.normal_(module.w2, std=5)
    return model


def batches(*sizes):
    return [(torch.randn(size, 3, 8, 8), torch.arange(size) % 3) for size in sizes]


def test_gates_of_every_image_in_order_and_the_network_as_it_was(model):
    data = batches(5, 2)
    model.stack1.eval()
    model.stem[0].requires_grad_(False)
    modes = [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    found = collect_routing(model, iter(data))
    assert modes == [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    images = torch.cat([images for images, _ in data])
    with torch.no_grad():
        routing = model.eval()(images, return_routing=True)[1]
    assert list(found.gates) == list(routing)
    for name, gates in found.gates.items():
        torch.testing.assert_close(gates, routing[name].gates)
        assert not gates.requires_grad
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 0, 1]
    torch.testing.assert_close(found.colours, images.mean((2, 3)))


def test_sparse_routers_are_of_one_incoming_path():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = SparseRouter(3, [nn.Conv2d(3, 4, 1) for _ in range(3)], top_k=2)

        def forward(self, x, return_routing=False):
            y, routing = self.router(x, return_routing=True)
            return (y.mean((2, 3)), {"router": routing}) if return_routing else y.mean((2, 3))

    assert collect_routing(Sparse(), batches(4)).gates["router"].shape == (4, 1, 3)
    (layer,) = collect_flows(Sparse(), torch.randn(1, 3, 8, 8))[0]
    assert layer.gates.shape == (1, 3) and layer.before is None and layer.after is None


def test_extremes_and_widest():
    gates = torch.tensor([0.1, 0.9, 0.4, 0.8])
    wide = torch.stack([gates, 1 - gates], 1)[:, None]
    narrow = 0.5 + (wide - 0.5) / 10
    data = RoutingData({"a_router": wide, "b_router": torch.cat([narrow, wide], 1)}, torch.zeros(4), torch.zeros(4, 3))
    highest, lowest = data.extremes(Gate("a_router", 0, 0), 2)
    assert highest.tolist() == [1, 3] and lowest.tolist() == [0, 2]
    assert [gate[:2] for gate in data.widest(3)] == [("a_router", 0), ("b_router", 0), ("b_router", 1)]
    assert [gate[:2] for gate in data.widest(2)] == [("a_router", 0), ("b_router", 1)]
    assert data.widest(4)[:2] == [Gate("a_router", 0, 0), Gate("a_router", 0, 1)] and len(data.widest(99)) == 6
    assert str(Gate("a_router", 1, 0)) == "a g₂₁"
    with pytest.raises(ValueError, match="count is 5; it must be 1 to 4"):
        data.extremes(Gate("a_router", 0, 0), 5)


def test_flows_are_the_shares_of_the_mean_magnitude(model):
    images = torch.randn(3, 3, 8, 8)
    flows = collect_flows(model, images)
    assert len(flows) == 3 and flows[0][0].name == "stem_router"
    with torch.no_grad():
        stem = model.eval().stem([images])
        after = model.stem_router(stem)
        paths = [x.relu() for x in model.stack1(after)]  # the router applies the ReLU at their end
    means, means_of_paths = (torch.stack([x.mean((1, 2, 3)) for x in xs], 1) for xs in (after, paths))
    for s, flow in enumerate(flows):
        assert flow[0].before.tolist() == [1]
        torch.testing.assert_close(flow[0].after, means[s] / means[s].sum())
        torch.testing.assert_close(flow[1].before, means_of_paths[s] / means_of_paths[s].sum())
    assert not any(module._forward_hooks for module in model.modules())


def test_flows_of_tensors_below_zero():
    class Signed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = CrossConnection(3, 2, 2)

        def forward(self, x, return_routing=False):
            outputs, routing = self.router([x, -3 * x], return_routing=True)
            return (outputs[0].mean((2, 3)), {"router": routing}) if return_routing else outputs[0].mean((2, 3))

    [[layer]] = collect_flows(Signed(), torch.randn(1, 3, 8, 8))
    torch.testing.assert_close(layer.before, torch.tensor([0.25, 0.75]))


@pytest.mark.parametrize(
    "collect", [lambda m: collect_routing(m, batches(2)), lambda m: collect_flows(m, batches(2)[0][0])]
)
def test_networks_without_routers(collect):
    with pytest.raises(ValueError, match="the network has no routers"):
        collect(models.create_model("resnet20"))


def test_no_images(model):
    with pytest.raises(ValueError, match="batches are empty"):
        collect_routing(model, [])


class Features(nn.Module):
    """Return the channels of an image as features of two paths."""

    def __init__(self, first, second):
        super().__init__()
        self.paths = ParallelPaths([nn.Linear(first.shape[1], len(first), bias=False) for _ in range(2)])
        for path, weight in zip(self.paths, (first, second), strict=True):
            path.weight.data.copy_(weight)

    def forward(self, x):
        return self.paths([x.flatten(1)])


def test_cka_is_1_for_rotated_features_and_0_for_independent_ones():
    data = [(torch.randn(32, 16, 1, 1), None) for _ in range(30)]
    eye = torch.eye(16)
    rotated = 3 * torch.linalg.qr(torch.randn(8, 8)).Q @ eye[:8]
    torch.testing.assert_close(path_similarity(Features(eye[:8], rotated), data)["paths"], torch.ones(2, 2))
    independent = path_similarity(Features(eye[:8], eye[8:]), data)["paths"]
    assert abs(independent[0, 1]) < 0.05 and independent[0, 0] == pytest.approx(1)
    small = path_similarity(Features(1e-5 * eye[:8], 1e-5 * rotated), data)["paths"]
    torch.testing.assert_close(small, torch.ones(2, 2))
    assert not path_similarity(Features(0 * eye[:8], eye[:8]), data)["paths"][0].any()


def test_weight_distance_is_that_of_histograms():
    a = torch.randn(1000)
    assert weight_distance(a, a[torch.randperm(1000)]) == 0
    both = torch.cat([a, a + 2]).std(correction=0)
    assert weight_distance(a, a + 2) == pytest.approx(2 / both.item(), rel=1e-4)
    with pytest.raises(ValueError, match="a has 1000 weights and b 5"):
        weight_distance(a, a[:5])


def test_weights_of_parallel_paths(model):
    weights = parallel_weights(model)
    assert len(weights) == 3 * 2 + 2 + 1  # two convolutions a stack, two projections, and the dense layer
    for first, second in weights.values():
        assert weight_distance(first, second) < 1e-6  # fresh paths have the same weights, in another order
    assert parallel_weights(models.create_model("resnet20")) == {}


def test_gates_without_a_choice_are_not_among_the_widest():
    gates = torch.rand(4, 2, 2)
    data = RoutingData({"a": gates, "last": torch.ones(4, 2, 1)}, torch.zeros(4), torch.zeros(4, 3))
    assert {gate.router for gate in data.widest(8)} == {"a"}
    assert len(RoutingData({"last": torch.ones(4, 2, 1)}, torch.zeros(4), torch.zeros(4, 3)).widest(8)) == 2


def test_weights_are_those_that_all_paths_have_alike():
    def path(size, *more):
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, size, padding="same"), *more)

    found = parallel_weights(nn.Sequential(ParallelPaths([path(3, nn.Conv2d(4, 4, 1)), path(5)])))
    assert list(found) == ["0 0"] and len(found["0 0"]) == 2


def test_similarity_does_not_depend_on_the_mean():
    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.paths = ParallelPaths([nn.Conv2d(3, 8, 1) for _ in range(2)])
            for path in self.paths:
                nn.init.constant_(path.bias, 3000.0)

        def forward(self, x):
            return sum(self.paths([x, x]))

    (cka,) = path_similarity(Far(), batches(32)).values()
    torch.testing.assert_close(cka.diagonal(), torch.ones(2), rtol=1e-3, atol=0)
    assert cka[0, 1] > 0.5


def test_hsic_is_the_mean_over_all_four_different_images():
    torch.manual_seed(0)
    a, b = grams = torch.stack([x @ x.T for x in torch.randn(2, 5, 3, dtype=torch.float64)])
    terms = [a[i, j] * (b[i, j] + b[q, r] - 2 * b[i, q]) for i, j, q, r in itertools.permutations(range(5), 4)]
    assert _hsic(grams)[0, 1].item() == pytest.approx(torch.stack(terms).mean().item())


def test_predictions_are_the_classes_of_the_highest_logits(model):
    data = batches(5, 2)
    found = collect_routing(model, data)
    with torch.no_grad():
        logits = model.eval()(torch.cat([images for images, _ in data]))
    assert torch.equal(found.predictions, logits.argmax(1))
