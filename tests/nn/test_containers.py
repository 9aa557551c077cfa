import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fastroute.models import create_model
from fastroute.models.layers import Network
from fastroute.nn import CrossConnection, MultiPathNetwork, ParallelPaths, containers


def test_each_path_has_its_own_module():
    double, negate = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(double.weight, 2.0)
    nn.init.constant_(negate.weight, -1.0)
    parallel = ParallelPaths([double, negate])
    one, three = torch.ones(1, 1), torch.full((1, 1), 3.0)
    assert [y.item() for y in parallel([one, three])] == [2.0, -3.0]
    assert [y.item() for y in parallel([three])] == [6.0, -3.0]
    with pytest.raises(ValueError, match="xs has 3 tensors; it must have one for each of the 2 paths, or one"):
        parallel([one, one, one])
    # A tensor of two images is no list of one image for each path.
    for wrong, given in ((torch.ones(2, 1), "Tensor"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"xs is a {given}; it must be a list of tensors, one for each path"):
            parallel(wrong)
    with pytest.raises(ValueError, match="there are no paths; give at least one module"):
        ParallelPaths([])([one])


def block(channels):
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(100, 3)
    )


@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_batched_paths_are_the_separate_ones(inputs, training):
    torch.manual_seed(0)
    separate = ParallelPaths([block(2).double() for _ in range(3)], execution="separate").train(training)
    batched = copy.deepcopy(separate)
    batched.execution = "batched"
    xs = [torch.randn(5, 2, 5, 5, dtype=torch.float64, requires_grad=True) for _ in range(inputs)]
    results = []
    for paths in (separate, batched):
        for _ in range(2):
            ys = paths(xs)
        loss = sum((i + 1) * y.square().sum() for i, y in enumerate(ys))
        results.append([*ys, *torch.autograd.grad(loss, [*xs, *paths.parameters()])])
    torch.testing.assert_close(results[1], results[0])
    for name, value in separate.state_dict().items():  # running statistics among them
        torch.testing.assert_close(batched.state_dict()[name], value, msg=name)
    assert (separate[0][1].num_batches_tracked == 2) == training


def test_batched_paths_write_nothing_in_evaluation():
    paths = ParallelPaths((nn.BatchNorm1d(2) for _ in range(2)), execution="batched").eval()
    y = paths[0](torch.randn(3, 2))
    paths([torch.randn(3, 2)])
    y.sum().backward()  # would raise if the statistics it saved had been written


def test_auto_execution_is_the_faster_one_as_measured(monkeypatch):
    paths, xs = ParallelPaths([nn.Linear(2, 2), nn.Linear(2, 2)]), [torch.randn(3, 2)]
    calls = []
    paths[1].register_forward_hook(lambda *_: calls.append("separate"))
    paths(xs)
    assert calls == ["separate"]
    monkeypatch.setitem(containers.EXECUTION, "cpu", "batched")
    paths(xs)
    assert calls == ["separate"]
    paths.execution = "separate"
    paths(xs)
    assert calls == ["separate"] * 2


def test_paths_without_weights_have_nothing_to_batch():
    xs = [torch.randn(2, 3, 4), torch.randn(2, 3, 4)]
    assert [y.shape for y in ParallelPaths([nn.Flatten(), nn.Flatten()], "batched")(xs)] == [(2, 12)] * 2


@pytest.mark.parametrize("strict", [True, False])
def test_batched_paths_are_exported_as_separate_ones(strict):
    paths = ParallelPaths((nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2)), "batched").eval()
    first, xs = ([torch.randn(n, 3, 8, 8) for _ in range(2)] for n in (2, 5))
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(paths, (first,), dynamic_shapes=([batch, batch],), strict=strict)
    torch.testing.assert_close(program.module()(xs), paths(xs))
    torch.testing.assert_close(torch.jit.trace(paths, (first,), strict=False)(xs), paths(xs))


def test_batched_paths_differ_in_weights_alone():
    with pytest.raises(ValueError, match="execution is 'grouped'; it must be 'auto', 'separate' or 'batched'"):
        ParallelPaths([nn.Linear(2, 2)], "grouped")
    with pytest.raises(ValueError, match="execution is 'batched'; the paths must differ only in their weights"):
        ParallelPaths([nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, padding=1)], "batched")
    paths = ParallelPaths([nn.Linear(2, 2), nn.Linear(2, 2)], "batched")
    paths[1].eval()
    with pytest.raises(ValueError, match="all in training mode or all in evaluation mode"):
        paths([torch.randn(3, 2)])


def test_network_averages_its_paths_and_names_its_routers():
    heads = [nn.Linear(4, 3), nn.Linear(4, 3)]
    network = MultiPathNetwork({"fork": CrossConnection(4, 1, 2), "head": ParallelPaths(heads)})
    x = torch.randn(5, 4)
    logits, routing = network(x, return_routing=True)
    assert list(routing) == ["fork"] and routing["fork"].gates.shape == (5, 1, 2)
    xs = network.fork([x])
    torch.testing.assert_close(logits, (heads[0](xs[0]) + heads[1](xs[1])) / 2)
    assert torch.equal(network(x), logits)


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, lambda router: torch.compile(router, backend="eager")])
def test_routers_in_wrappers_are_routers(wrap):
    network, x = create_model("resnet20_cc2").eval(), torch.randn(2, 3, 8, 8)
    expected, routing = network(x, return_routing=True)
    network.stack1_router = wrap(network.stack1_router)
    output, wrapped = network(x, return_routing=True)
    torch.testing.assert_close(output, expected)
    assert list(wrapped) == list(routing)
    torch.testing.assert_close(network.forward_head(network.forward_features(x)), expected)


def test_a_layer_at_two_places_is_computed_twice():
    pool = ParallelPaths(nn.MaxPool2d(2) for _ in range(2))
    router = CrossConnection(3, 2, 2)
    layers = {"split": ParallelPaths(nn.Identity() for _ in range(2)), "pool1": pool, "router1": router}
    layers |= {"pool2": pool, "router2": router, "head": ParallelPaths(nn.Flatten() for _ in range(2))}
    x, routing = MultiPathNetwork(layers)(torch.randn(2, 3, 16, 16), return_routing=True)
    assert x.shape == (2, 3 * 4 * 4) and list(routing) == ["router1", "router2"]
    plain = Network(OrderedDict(pool1=pool[0], conv=nn.Conv2d(3, 3, 1), pool2=pool[0], head=nn.Flatten()))
    assert plain(torch.randn(2, 3, 16, 16)).shape == (2, 3 * 4 * 4)


def test_batched_paths_follow_autocast_on_a_cpu():
    paths = ParallelPaths([nn.Conv2d(3, 4, 3) for _ in range(2)], execution="batched")
    xs = list(torch.randn(2, 2, 3, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        ys = paths([x.bfloat16() for x in xs])
        expected = [path(x) for path, x in zip(paths, xs, strict=True)]
        assert all(torch.equal(*pair) for pair in zip(ys, expected, strict=True))


def test_batched_paths_draw_their_own_dropout():
    path = nn.Sequential(nn.Linear(4, 200), nn.Dropout())
    first, second = ParallelPaths([path, copy.deepcopy(path)], execution="batched")([torch.ones(1, 4)])
    assert not torch.equal(first == 0, second == 0)


def test_layers_and_paths_of_other_types_are_refused():
    with pytest.raises(TypeError, match="layers is a list; it must be a dict from names to modules"):
        MultiPathNetwork([nn.Identity()])
    with pytest.raises(ValueError, match=r"layers\['a'\] is a Conv2d, which takes no list of tensors"):
        MultiPathNetwork({"a": nn.Conv2d(3, 3, 1)})
    with pytest.raises(TypeError, match="paths is a Identity; it must be a list of modules"):
        ParallelPaths(nn.Identity(), nn.Identity())


class PathConv(nn.Conv2d):
    """One convolution of all paths."""

    def forward(self, xs):
        return [super(PathConv, self).forward(x) for x in xs]


def test_layers_of_one_s_own_may_take_lists():
    layers = nn.ModuleDict({"conv": PathConv(3, 4, 1), "head": ParallelPaths([nn.Flatten(), nn.Flatten()])})
    assert MultiPathNetwork(layers)(torch.randn(2, 3, 4, 4)).shape == (2, 64)
