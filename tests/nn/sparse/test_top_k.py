import copy

import pytest
import torch
from torch import nn

from fastroute.nn import SparseRouter, SparseRouting
from tests.nn.sparse.routers import GATES, convs, dense, spread


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"gate_channels": None, "bias": False}, {"temperature": 0.4}], ids=str)
def test_equals_the_dense_sum(options, top_k, gates):
    torch.manual_seed(0)
    router = SparseRouter(6, convs(4, dtype=torch.float64), top_k, gates=gates, **options, dtype=torch.float64)
    x = torch.randn(40, 6, 4, 5, dtype=torch.float64)
    y, routing = spread(router)(x, return_routing=True)
    expected, expected_gates = dense(router, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(routing.gates, expected_gates)
    assert torch.equal(routing.load, (routing.gates > 0).sum(0))
    assert (routing.load > 0).sum() > 1, "the case must exercise more than one path"
    assert torch.equal(y, router(x))


def test_all_paths_is_the_softmax_weighted_sum():
    router = spread(SparseRouter(6, convs(3), top_k=3))
    x = torch.randn(8, 6, 4, 4)
    y, routing = router(x, return_routing=True)
    gates = routing.scores.softmax(1)
    expected = sum(gates[:, j, None, None, None] * path(x) for j, path in enumerate(router.paths))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(routing.gates, gates)


def test_each_path_sees_its_samples_alone():
    torch.manual_seed(0)
    router, seen = spread(SparseRouter(6, convs(4), top_k=2)), {}
    for j, path in enumerate(router.paths):
        path.register_forward_pre_hook(lambda _, args, j=j: seen.update({j: args[0]}))
    x = torch.randn(32, 6, 4, 4) + 2 * torch.randn(32, 6, 1, 1)  # means far apart, so that every path gets samples
    _, routing = router(x, return_routing=True)
    assert isinstance(routing, SparseRouting)
    assert routing.gates.shape == routing.scores.shape == (32, 4)
    assert routing.chosen.shape == (32, 2) and torch.equal(routing.chosen, routing.scores.topk(2).indices)
    assert routing.load.sum() == 64
    for j in range(4):
        sent = (routing.chosen == j).any(1)
        assert routing.load[j] == sent.sum() > 0
        assert torch.equal(seen[j], x[sent])


@pytest.mark.parametrize("gates, top_k", [("renormalized", 2), ("softmax", 1), ("softmax", 2), ("straight_through", 3)])
@pytest.mark.parametrize("capacity", [None, 0.6])
def test_gradients(gates, top_k, capacity):
    torch.manual_seed(0)
    paths = [nn.Conv2d(2, 2, 1, dtype=torch.float64) for _ in range(3)]
    options = {"gates": gates, "temperature": 0.7, "capacity_factor": capacity, "dtype": torch.float64}
    router = spread(SparseRouter(2, paths, top_k, 3, **options))
    nn.init.normal_(router.b2)  # no ties, even where every hidden unit is 0: a difference must not change the choice
    names, parameters = zip(*router.named_parameters(), strict=True)
    x = torch.randn(5, 2, 1, 2, dtype=torch.float64, requires_grad=True)

    def function(x, *parameters):
        state = dict(zip(names, parameters, strict=True))
        y, routing = torch.func.functional_call(router, state, (x, True))
        return y, routing.gates, routing.scores

    # With dropped samples, the straight-through gradient is not that of the values.
    if capacity is None or gates != "straight_through":
        assert torch.autograd.gradcheck(function, (x, *parameters))
    dropped = router(x, return_routing=True)[1].dropped.sum()
    assert (dropped > 0) == (capacity is not None)
    if gates == "softmax":
        assert torch.autograd.gradgradcheck(lambda x: router(x), (x,))


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_gradients_of_maps_keep_channels_last(capacity):
    torch.manual_seed(0)
    router = spread(SparseRouter(6, [nn.Identity() for _ in range(4)], 2, gates="softmax", capacity_factor=capacity))
    x = torch.randn(16, 6, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    y, routing = router(x, return_routing=True)
    assert (routing.dropped.sum() > 0) == (capacity is not None)
    y.backward(torch.ones_like(y))
    assert x.grad.is_contiguous(memory_format=torch.channels_last) and not x.grad.is_contiguous()


def test_straight_through_weighs_by_one_and_learns_as_softmax():
    """y = path(x) for the path chosen, and the gate's gradient is that of y = g · path(x), g the softmax's entry."""
    router = spread(SparseRouter(6, convs(4, dtype=torch.float64), dtype=torch.float64))
    x = torch.randn(16, 6, 4, 4, dtype=torch.float64)
    y, routing = router(x, return_routing=True)
    assert torch.equal(routing.gates.amax(1), torch.ones(16, dtype=torch.float64))
    gate = [router.w1, router.b1, router.w2, router.b2]
    incoming = torch.randn_like(y)
    actual = torch.autograd.grad(y, gate, incoming)
    router.gates = "softmax"
    expected = torch.autograd.grad(router(x), gate, incoming)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
        assert a.any()


def test_renormalized_top_1_learns_from_scores_alone():
    router = spread(SparseRouter(6, convs(4), gates="renormalized"))
    y, routing = router(torch.randn(16, 6, 4, 4), return_routing=True)
    (from_output,) = torch.autograd.grad(y.sum(), router.w2, retain_graph=True)
    (from_scores,) = torch.autograd.grad(routing.scores.sum(), router.w2)
    assert not from_output.any() and from_scores.any()


def only(path, n=3, **options):
    """Return a router that sends everything to one path."""
    router = SparseRouter(6, [nn.Sequential(*convs(1), nn.BatchNorm2d(5)) for _ in range(n)], **options)
    with torch.no_grad():
        router.b2[path] = 100
    return router


def test_a_path_without_samples_does_not_run():
    router = only(1)
    y, routing = router(torch.randn(4, 6, 4, 4), return_routing=True)
    y.sum().backward()
    assert routing.load.tolist() == [0, 4, 0]
    assert [path[0].weight.grad is not None for path in router.paths] == [False, True, False]
    assert [int(path[1].num_batches_tracked) for path in router.paths] == [0, 1, 0]


@pytest.mark.parametrize("top_k", [1, 2])
def test_no_samples(top_k):
    router = only(1, top_k=top_k)
    x = torch.randn(0, 6, 4, 4, requires_grad=True)
    y, routing = router(x, return_routing=True)
    assert y.shape == (0, 5, 4, 4) and routing.load.tolist() == [0, 0, 0] and routing.chosen.shape == (0, top_k)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(path[1].running_mean.isfinite().all() for path in router.paths)


def test_no_samples_to_paths_with_one_number_for_each():
    number = [nn.Sequential(nn.Flatten(), nn.Linear(6, 1), nn.Flatten(0)) for _ in range(2)]
    assert SparseRouter(6, number)(torch.randn(0, 6, 1, 1)).shape == (0,)


def test_one_sample_is_enough_for_batch_normalisation_over_space():
    assert only(2)(torch.randn(1, 6, 4, 4)).isfinite().all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_divide_and_accumulate_without_modules(top_k):
    torch.manual_seed(0)
    whole = spread(SparseRouter(6, convs(4), top_k))
    bare = SparseRouter(6, 4, top_k)
    bare.load_state_dict({name: p for name, p in whole.state_dict().items() if not name.startswith("paths")})
    x = torch.randn(32, 6, 4, 4)
    parts, routing = bare.divide(x)
    assert [part.shape[0] for part in parts] == routing.load.tolist()
    y = bare.accumulate([path(part) for path, part in zip(whole.paths, parts, strict=True)], routing)
    torch.testing.assert_close(y, whole(x))
    with pytest.raises(RuntimeError, match="built for paths=4 without their modules"):
        bare(x)


@pytest.mark.parametrize("top_k", [1, 2])
def test_keeps_channels_last_and_takes_half_precision_under_autocast(top_k):
    torch.manual_seed(0)
    formats = []
    router = spread(SparseRouter(6, convs(4), top_k)).to(memory_format=torch.channels_last)
    for path in router.paths:
        path.register_forward_pre_hook(
            lambda _, args: formats.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
    x = torch.randn(32, 6, 5, 5).to(torch.bfloat16, memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = router(x, return_routing=True)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    assert formats and all(formats)
    assert routing.gates.dtype == routing.scores.dtype == torch.float32
    expected = x.float().mean((2, 3)) @ router.w1.T + router.b1
    torch.testing.assert_close(routing.scores, torch.relu(expected) @ router.w2.T + router.b2)


def test_paths_may_change_the_shape_and_inputs_may_be_vectors():
    torch.manual_seed(0)
    x = torch.randn(8, 6, 4, 4)
    assert SparseRouter(6, convs(2, stride=2))(x).shape == (8, 5, 2, 2)
    assert SparseRouter(6, [nn.Sequential(nn.Flatten(), nn.Linear(96, 3)) for _ in range(2)])(x).shape == (8, 3)
    assert SparseRouter(6, [nn.Linear(6, 3) for _ in range(12)], top_k=8)(x[..., 0, 0]).shape == (8, 3)


@pytest.mark.parametrize("width, reshape", [(1, nn.Flatten(0)), (16, nn.Unflatten(1, (1, 2, 2, 2, 2)))], ids=str)
def test_paths_may_return_a_number_or_more_sizes_than_feature_maps(width, reshape):
    torch.manual_seed(0)
    x, layers = torch.randn(8, 6), [nn.Linear(6, width) for _ in range(3)]
    flat, router = (SparseRouter(6, paths, 2) for paths in (layers, [nn.Sequential(p, reshape) for p in layers]))
    nn.init.normal_(flat.w2)
    router.load_state_dict({name: value for name, value in flat.state_dict().items() if "paths" not in name}, False)
    assert torch.equal(router(x), reshape(flat(x)))


@pytest.mark.parametrize("top_k", [1, 2])
def test_vmap_in_evaluation(top_k):
    torch.manual_seed(0)
    router, x = spread(SparseRouter(6, convs(3), top_k)).eval(), torch.randn(4, 5, 6, 3, 3)
    each = torch.stack([router(part) for part in x])
    torch.testing.assert_close(torch.vmap(router)(x), each)
    parameters = dict(router.named_parameters())

    def loss(parameters, part):
        return torch.func.functional_call(router, parameters, (part,)).square().sum()

    batched = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, part in enumerate(x):
        for name, gradient in torch.func.grad(loss)(parameters, part).items():
            torch.testing.assert_close(batched[name][i], gradient, atol=1e-4, rtol=1e-4)
    router.train()
    scales = torch.tensor([1.0, 2.0])  # nothing of the router is batched
    torch.testing.assert_close(torch.vmap(lambda scale: router(x[0]) * scale)(scales)[1], 2 * router(x[0]))
    with pytest.raises(RuntimeError, match=r"a SparseRouter in training mode, .* call eval\(\)"):
        torch.vmap(router)(x)


def test_strict_export_and_traces_that_return_the_load():
    router, x = spread(SparseRouter(6, convs(3), 2)).eval().requires_grad_(False), torch.randn(5, 6, 3, 3)
    program = torch.export.export(router, (x,), strict=True)
    torch.testing.assert_close(program.module()(x), router(x))
    traced = torch.jit.trace(lambda x: router(x, return_routing=True)[1].load, (x,))
    assert torch.equal(traced(x), router(x, return_routing=True)[1].load) and int(traced(x).sum()) == 10
    assert "aten::arange" not in str(traced.graph)  # which would be bound to the device of the trace


@pytest.mark.parametrize("half", [False, True])
def test_exports_paths_whose_results_differ_in_layout_or_type(half):
    """As a path that only passes its input on beside one whose convolution has another layout, or autocast's type."""
    torch.manual_seed(0)
    router = spread(SparseRouter(6, [nn.Identity(), nn.Conv2d(6, 6, 3, padding=1)])).eval().requires_grad_(False)
    router.to(memory_format=torch.contiguous_format if half else torch.channels_last)
    x = torch.randn(5, 6, 3, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        expected = router(x)
        program = torch.export.export(router, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        runs = [program, torch.vmap(lambda part: router(part[None])[0])]
        if not half:  # TorchScript keeps no change of autocast
            runs.append(torch.jit.trace(router, (x,)))
        near = {"rtol": 0, "atol": 0.03} if half else {}  # convolutions of bfloat16 round by the batch
        for run in runs:
            torch.testing.assert_close(run(x), expected, **near)


def test_other_loads_under_compile():
    torch.manual_seed(0)
    router = spread(SparseRouter(6, convs(4), top_k=2))
    compiled = torch.compile(router, backend="aot_eager")
    for batch in (32, 7):
        x = torch.randn(batch, 6, 4, 4)
        y, routing = compiled(x, return_routing=True)
        expected, expected_routing = router(x, return_routing=True)
        torch.testing.assert_close(y, expected)
        assert torch.equal(routing.load, expected_routing.load)


def test_temperature_changes_weights_and_not_the_choice():
    router, x = spread(SparseRouter(6, convs(4), top_k=2)), torch.randn(16, 6, 4, 4)
    _, before = router(x, return_routing=True)
    router.temperature = 5
    _, after = router(x, return_routing=True)
    assert torch.equal(before.scores, after.scores) and torch.equal(before.chosen, after.chosen)
    torch.testing.assert_close(after.gates.gather(1, after.chosen), (after.scores.topk(2).values / 5).softmax(1))


def test_gate_starts_even_and_takes_factory_arguments():
    router = SparseRouter(64, 4, 4)
    _, routing = router.divide(torch.randn(16, 64, 8, 8))
    torch.testing.assert_close(routing.gates, torch.full((16, 4), 0.25), atol=0.005, rtol=0)
    assert routing.scores.any()
    router = SparseRouter(6, 4, gate_channels=5, device="meta", dtype=torch.bfloat16)
    shapes = {"w1": (5, 6), "b1": (5,), "w2": (4, 5), "b2": (4,)}
    assert {name: tuple(p.shape) for name, p in router.named_parameters()} == shapes
    assert {(p.device.type, p.dtype) for p in router.parameters()} == {("meta", torch.bfloat16)}


def test_repr_is_its_arguments():
    assert repr(SparseRouter(6, 4, 2)) == (
        "SparseRouter(6, paths=4, top_k=2, gate_channels=16, gates='straight_through')"
    )
    assert "gate_channels=None, bias=False, gates='softmax', temperature=2.0" in repr(
        SparseRouter(6, convs(2), gate_channels=0, bias=False, gates="softmax", temperature=2)
    )
    assert "gates='straight_through', routing='cluster', capacity_factor=1.5" in repr(
        SparseRouter(6, 4, routing="cluster", capacity_factor=1.5)
    )


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"channels": 0}, ValueError, "channels is 0; it must be at least 1"),
        ({"paths": 0}, ValueError, "paths has 0 paths; it must have at least 1"),
        ({"paths": []}, ValueError, "paths has 0 paths"),
        ({"paths": [torch.relu]}, TypeError, r"paths\[0\] is a builtin_function_or_method; it must be a module"),
        ({"paths": nn.Identity()}, TypeError, "paths is a Identity; it must be a list of modules, or their number"),
        ({"top_k": 0}, ValueError, "top_k is 0; it must be 1 to 4 for 4 paths"),
        ({"top_k": 5}, ValueError, "top_k is 5; it must be 1 to 4 for 4 paths"),
        ({"paths": 12, "top_k": 9}, ValueError, "top_k is 9; it must be 1 to 8 for 12 paths"),
        ({"gate_channels": -1}, ValueError, "gate_channels is -1"),
        ({"gates": "hard"}, ValueError, "gates is 'hard'; it must be one of 'straight_through'"),
        ({"temperature": 0}, ValueError, "temperature is 0; it must be positive and finite"),
        ({"routing": "hash"}, ValueError, "routing is 'hash'; it must be one of 'topk', 'cluster'"),
        ({"capacity_factor": "2"}, TypeError, "capacity_factor is '2'; it must be a number"),
        ({"capacity_factor": 0}, ValueError, "capacity_factor is 0; it must be greater than 0 and finite, or None"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        SparseRouter(**{"channels": 6, "paths": 4, **arguments})


@pytest.mark.parametrize(
    "x, error, message",
    [
        ([torch.zeros(2, 6, 4, 4)], TypeError, "x is a list; it must be a tensor"),
        (torch.zeros(2, 6, 4, 4, dtype=torch.int64), TypeError, "x has dtype torch.int64"),
        (torch.zeros(6), ValueError, r"x has shape \(6,\)"),
        (torch.zeros(2, 5, 4, 4), ValueError, r"x has shape \(2, 5, 4, 4\); it must be \(N, C, \*S\) with channels=6"),
    ],
)
def test_wrong_inputs(x, error, message):
    with pytest.raises(error, match=message):
        SparseRouter(6, convs(2))(x)


def test_wrong_outputs_of_paths():
    router = SparseRouter(6, 2)
    parts, routing = router.divide(torch.randn(4, 6, 4, 4))
    with pytest.raises(ValueError, match="ys have 3 samples in all; they must have the 4 that were divided"):
        router.accumulate([torch.cat(parts)[1:]], routing)
    with pytest.raises(ValueError, match="ys have 0 samples in all"):
        router.accumulate([], routing)
    with pytest.raises(TypeError, match="ys is a Tensor"):
        router.accumulate(torch.cat(parts), routing)


def test_shapes_without_data():
    with torch.device("meta"):
        router = SparseRouter(6, convs(4, stride=2), top_k=2)
        assert router(torch.empty(8, 6, 4, 4)).shape == (8, 5, 2, 2)


def test_paths_may_change_their_samples_in_place():
    torch.manual_seed(0)
    paths = [nn.Sequential(nn.ReLU(inplace=True), conv) for conv in convs(3)]
    router = spread(SparseRouter(6, paths, top_k=2))
    plain = copy.deepcopy(router)
    for path in plain.paths:
        path[0].inplace = False
    x = torch.randn(12, 6, 4, 4, requires_grad=True)
    y, wanted = router(x), plain(x)
    torch.testing.assert_close(y, wanted)
    gradients = (torch.autograd.grad(out.square().sum(), x) for out in (y, wanted))
    torch.testing.assert_close(*gradients)
