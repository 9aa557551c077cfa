import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastroute.nn import CrossConnection, CrossStitch, ParallelPaths, Routing


def paths(m, *shape, **options):
    return [torch.randn(shape, **options) for _ in range(m)]


def drawn(router):
    """Return a router with a large second layer; a fresh one would hardly show in the outputs."""
    for parameter in (router.w2, router.b2):
        if parameter is not None:
            nn.init.normal_(parameter)
    return router


def plain(router, xs):
    """Compute Alg. 2 for one router in plain PyTorch."""
    gates = []
    if router.activation:
        xs = [torch.relu(x) for x in xs]
    for i, x in enumerate(xs):
        hidden = x.flatten(2).mean(-1)
        if router.w1 is not None:
            hidden = torch.relu(hidden @ router.w1[i].T + (0 if router.b1 is None else router.b1[i]))
        scores = hidden @ router.w2[i].T + (0 if router.b2 is None else router.b2[i])
        gates.append(torch.softmax(scores / router.temperature, -1))
    return [sum(gates[i][:, j, None, None, None] * x for i, x in enumerate(xs)) for j in range(router.out_paths)]


@pytest.mark.parametrize("in_paths, out_paths", [(1, 2), (2, 2), (3, 1), (2, 5)])
@pytest.mark.parametrize(
    "options",
    [{}, {"gate_channels": None}, {"gate_channels": 5, "bias": False}, {"temperature": 0.3}, {"activation": "relu"}],
    ids=str,
)
def test_is_algorithm_2(in_paths, out_paths, options):
    router = drawn(CrossConnection(6, in_paths, out_paths, **options, dtype=torch.float64))
    xs = paths(in_paths, 3, 6, 4, 5, dtype=torch.float64)
    for actual, expected in zip(router(xs), plain(router, xs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_both_call_forms_agree():
    router, xs = CrossConnection(6, 2, 3), paths(2, 4, 6, 5, 5)
    outputs, routing = router(xs, return_routing=True)
    assert isinstance(routing, Routing)
    assert routing.gates.shape == routing.scores.shape == (4, 2, 3)
    torch.testing.assert_close(routing.gates, routing.scores.softmax(-1))
    for y, again in zip(outputs, router(xs), strict=True):
        assert torch.equal(y, again)


@pytest.mark.parametrize("options", [{}, {"gate_channels": None}], ids=str)
def test_starts_from_even_gates(options):
    _, routing = CrossConnection(64, 2, 4, **options)(paths(2, 16, 64, 8, 8), return_routing=True)
    torch.testing.assert_close(routing.gates, torch.full((16, 2, 4), 0.25), atol=0.005, rtol=0)
    assert routing.scores.any()


def test_first_layer_starts_as_linear_does():
    torch.manual_seed(0)
    router, linear = CrossConnection(50, 8, 2, gate_channels=200), nn.Linear(50, 1600)
    for ours, theirs in ((router.w1, linear.weight), (router.b1, linear.bias)):
        assert ours.abs().max() <= 1 / math.sqrt(50)
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)


def test_gradients_reach_every_parameter_and_input():
    router = CrossConnection(6, 2, 3)
    xs = paths(2, 4, 6, 5, 5, requires_grad=True)
    outputs, routing = router(xs, return_routing=True)
    loss = sum(y.square().sum() for y in outputs) + routing.gates.square().sum() + routing.scores.square().sum()
    loss.backward()
    for tensor in (*router.parameters(), *xs):
        assert tensor.grad is not None and tensor.grad.abs().max() > 0


@pytest.mark.parametrize("bias", [True, False])
def test_temperature_divides_the_scores(bias):
    router = drawn(CrossConnection(6, 2, 3, bias=bias, dtype=torch.float64))
    xs = paths(2, 4, 6, 5, 5, dtype=torch.float64)
    _, expected = router(xs, return_routing=True)
    for temperature in (3, 0.25):
        router.temperature = temperature
        _, routing = router(xs, return_routing=True)
        torch.testing.assert_close(routing.scores, expected.scores)
        torch.testing.assert_close(routing.gates, (expected.scores / temperature).softmax(-1))
    router.temperature = 1
    assert torch.equal(router(xs, return_routing=True)[1].gates, expected.gates)
    assert "temperature" in router.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_temperature_near_zero_chooses_in_half_precision(dtype):
    router, xs = drawn(CrossConnection(6, 2, 3, dtype=dtype)), paths(2, 4, 6, 5, 5, dtype=dtype)
    router.temperature = 1e-6
    outputs, (gates, scores) = router(xs, return_routing=True)
    torch.testing.assert_close(gates.amax(-1), torch.ones(4, 2))
    assert torch.equal(gates.argmax(-1), scores.argmax(-1)) and all(y.isfinite().all() for y in outputs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_at_a_temperature(temperature):
    router = drawn(CrossConnection(3, 2, 2, 4, temperature=temperature, dtype=torch.float64))
    names, parameters = zip(*router.named_parameters(), strict=True)
    xs = paths(2, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(*tensors):
        state, xs = dict(zip(names, tensors, strict=False)), list(tensors[len(names) :])
        outputs, routing = torch.func.functional_call(router, state, (xs, True))
        return *outputs, *routing

    assert torch.autograd.gradcheck(function, (*parameters, *xs))


def test_annealing_compiles_once_more():
    router, xs = drawn(CrossConnection(6, 2, 3)), paths(2, 4, 6, 5, 5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(router, fullgraph=True, backend=counter)
    for temperature in (1, 4, 2, 0.5):
        router.temperature = temperature
        for actual, expected in zip(compiled(xs), router(xs), strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 2


def test_parameters_are_optional_and_take_factory_arguments():
    assert {name for name, _ in CrossConnection(6, 2, 3, gate_channels=0).named_parameters()} == {"w2", "b2"}
    assert {name for name, _ in CrossConnection(6, 2, 3, bias=False).named_parameters()} == {"w1", "w2"}
    router = CrossConnection(6, 2, 3, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in router.parameters()} == {("meta", torch.bfloat16)}


def test_keeps_channels_last_and_takes_half_precision_under_autocast():
    router = CrossConnection(6, 2, 2)
    xs = [x.to(torch.bfloat16, memory_format=torch.channels_last) for x in paths(2, 4, 6, 5, 5)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, routing = router(xs, return_routing=True)
    assert all(y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last) for y in outputs)
    assert routing.gates.dtype == torch.float32


def test_compiles_without_a_break():
    router, xs = CrossConnection(6, 2, 3), paths(2, 4, 6, 5, 5)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(xs), router(xs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_decomposes_with_its_activation():
    router, xs = drawn(CrossConnection(6, 2, 3, activation="relu")), paths(2, 4, 6, 5, 5)
    operator = torch.ops.fastroute.cross_connect.default
    program = torch.export.export(router, (xs,))
    program = program.run_decompositions({operator: torch._decomp.decomposition_table[operator]})
    assert not any(node.target == operator for node in program.graph.nodes)
    with torch.no_grad():
        for ours, expected in zip(program.module()(xs), plain(router, xs), strict=True):
            torch.testing.assert_close(ours, expected)


def test_repr_is_its_arguments():
    assert repr(CrossConnection(6, 2, 3)) == "CrossConnection(6, in_paths=2, out_paths=3, gate_channels=16)"
    assert "gate_channels=None, bias=False" in repr(CrossConnection(6, 2, 3, gate_channels=0, bias=False))
    assert repr(CrossConnection(6, 2, 3, activation="relu")).endswith("gate_channels=16, activation='relu')")
    assert repr(CrossConnection(6, 2, 3, temperature=2)).endswith("gate_channels=16, temperature=2.0)")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"channels": 0}, "channels is 0; it must be at least 1"),
        ({"in_paths": 0}, "in_paths is 0; it must be 1 to 8"),
        ({"out_paths": 9}, "out_paths is 9; it must be 1 to 8"),
        ({"gate_channels": -1}, "gate_channels is -1"),
        ({"activation": "gelu"}, "activation is 'gelu'; it must be 'relu' or None"),
        ({"temperature": 0}, "temperature is 0; it must be positive and finite"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossConnection(**{"channels": 6, "in_paths": 2, "out_paths": 2, **arguments})


@pytest.mark.parametrize("name", ["channels", "in_paths", "out_paths", "gate_channels"])
@pytest.mark.parametrize("value", ["4", 4.0])
def test_numbers_are_integers(name, value):
    with pytest.raises(TypeError, match=f"{name} is {value!r}; it must be an integer"):
        CrossConnection(**{"channels": 6, "in_paths": 2, "out_paths": 2, name: value})


def test_a_temperature_is_a_number():
    with pytest.raises(TypeError, match="temperature is '1'; it must be a number"):
        CrossConnection(6, 2, 2, temperature="1")


def test_a_wrong_temperature_is_refused_later_too():
    router = CrossConnection(6, 2, 2)
    with pytest.raises(ValueError, match="temperature is 0"):
        router.temperature = 0
    assert router.temperature == 1


@pytest.mark.parametrize(
    "xs, error, message",
    [
        (torch.zeros(2, 6, 4, 4), TypeError, "xs is a Tensor; it must be a list of tensors"),
        ([], ValueError, "xs has 0 paths; this router takes in_paths=2"),
        ([torch.zeros(2, 6, 4, 4)], ValueError, "xs has 1 paths; this router takes in_paths=2"),
        ([torch.zeros(2, 5, 4, 4)] * 2, ValueError, r"xs\[0\] has shape \(2, 5, 4, 4\).*channels=6"),
        ([torch.zeros(2, 6, 4, 4), torch.zeros(2, 6, 4, 5)], ValueError, r"xs\[1\] has shape"),
    ],
)
def test_wrong_inputs(xs, error, message):
    with pytest.raises(error, match=message):
        CrossConnection(6, 2, 2)(xs)


def test_full_backward_hooks_say_that_they_will_not_run():
    """PyTorch looks for tensors among a layer's arguments, but not inside lists."""
    for layer in (CrossConnection(4, 2, 2), CrossStitch(2), ParallelPaths([torch.nn.Identity()])):
        for name in ("register_full_backward_hook", "register_full_backward_pre_hook"):
            with pytest.warns(UserWarning, match=f"{name}: the hook will not run.*lists.*call register_hook"):
                getattr(layer, name)(lambda *_: None)


def test_a_temperature_is_saved_once_it_is_another_than_1():
    router = CrossConnection(4, 2, 2)
    older = router.state_dict()
    assert not [name for name in older if "temperature" in name]
    router.temperature = 0.5
    state = router.state_dict()
    assert state["temperature"] == 0.5 and isinstance(state["temperature"], torch.Tensor)
    router.temperature = 1.0
    assert router.state_dict()["temperature"] == 1
    network = nn.ModuleList([CrossConnection(4, 2, 2)])
    network.load_state_dict({f"0.{name}": value for name, value in state.items()}, strict=True)
    assert network[0].temperature == 0.5
    network.load_state_dict({f"0.{name}": value for name, value in older.items()}, strict=True)
    assert network[0].temperature == 0.5
