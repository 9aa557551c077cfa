import dataclasses

import pytest
import torch

from fastroute import ops
from fastroute.backends import native_serves_cpu
from fastroute.bench import SUITES, all_cases, networks, operators, overhead, parallel, sparse
from fastroute.bench.operators import OPERATORS, Problem
from fastroute.nn import blocks

CPU = torch.device("cpu")
BACKEND = operators._serving(CPU, torch.float32)[0]


def problem(operator="mix", direction="forward+backward", **changes):
    tiny = Problem(operator, direction, BACKEND, "float32", "contiguous", (3, 5, 4, 4), (2, 3))
    return dataclasses.replace(tiny, **changes)


def measured(contest):
    contest.warm_up(1)
    contest.run(1)
    return contest.row("suite", {})


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    "direction, changes, maps",
    [
        ("forward", {}, 5),
        ("forward+backward", {}, 12),
        ("forward+backward", {"dtype": "bfloat16", "layout": "channels_last"}, 12),
        ("forward+backward", {"backend": "reference"}, 12),
    ],
)
def test_operators_are_checked_and_timed(name, direction, changes, maps, uncompiled):
    row = measured(operators.contest(problem(name, direction, **changes), CPU))
    peers = {"fastroute", "eager", "compile"} | ({"copy"} if OPERATORS[name].maps else set())
    assert row.ms.keys() == peers and all(ms > 0 for ms in row.ms.values())
    size = 3 * 5 * 16 * (2 if changes.get("dtype") == "bfloat16" else 4)
    if OPERATORS[name].maps is not None:
        assert row.floor_bytes == maps * size
    assert (row.saved_bytes["fastroute"] > 0) == (direction == "forward+backward")


def _wrong_value(xs, gates):
    return [1.0001 * y for y in ops.mix(xs, gates)]


def _wrong_gradient(xs, gates):
    return [y + 1e-4 * (gates.sum() - gates.sum().detach()) for y in ops.mix(xs, gates)]


@pytest.mark.parametrize("wrong, position", [(_wrong_value, 0), (_wrong_gradient, 5)])
def test_a_wrong_operator_fails_the_check(wrong, position, uncompiled, monkeypatch):
    monkeypatch.setitem(OPERATORS, "mix", dataclasses.replace(OPERATORS["mix"], fused=wrong))
    with pytest.raises(AssertionError, match=f"fastroute: result {position} is off"):
        operators.contest(problem(), CPU).warm_up()


def test_a_peer_that_the_compiler_makes_wrong_is_left_out(monkeypatch):
    monkeypatch.setattr(operators, "compiled", lambda function, device: _wrong_value)
    row = measured(operators.contest(problem(), CPU))
    assert row.ms.keys() == {"fastroute", "eager", "copy"}
    assert row.facts["left out"].startswith("compile: result 0 is off")


def test_the_backend_that_a_case_names_computes_it(uncompiled, monkeypatch):
    from fastroute.backends.reference import kernels

    monkeypatch.setattr(kernels, "mix", lambda xs, gates: [torch.zeros_like(xs[0])] * 3)
    with pytest.raises(AssertionError, match="fastroute: result 0 is off"):
        operators.contest(problem(backend="reference"), CPU).warm_up()


LABELS = {"network": "resnet20_cc2", "dtype": "float32", "layout": "contiguous", "batch": 2, "paths": 2}


def test_networks_are_checked_and_timed(uncompiled):
    row = measured(networks.contest({**LABELS, "direction": networks.STEP}, 10, 8, True, CPU))
    assert row.ms.keys() == {"fastroute", "no routing", "eager", "compile", "fastroute compiled", "fastroute fused"}
    assert 0 < row.facts["routing_share"] < 1 and row.saved_bytes["fastroute"] > 0
    alone = networks.contest({**LABELS, "network": "resnet20", "direction": networks.FORWARD}, 10, 8, False, CPU)
    assert measured(alone).ms.keys() == {"fastroute"}


@pytest.mark.skipif(not native_serves_cpu(), reason="needs the compiled CPU kernels")
def test_plain_networks_have_the_layers_of_pytorch_alone(monkeypatch):
    calls, kernel = [], blocks._fused
    monkeypatch.setattr(blocks, "_fused", lambda *args: calls.append(1) or kernel(*args))
    labels = {**LABELS, "direction": networks.FORWARD, "layout": "channels_last"}
    contest = networks.contest(labels, 10, 32, False, CPU)
    calls.clear()  # a network is built with two images
    contest.contenders["eager"]()
    assert not calls
    contest.contenders["fastroute"]()
    assert calls


def test_networks_with_dense_routers_and_cross_predictions_have_plain_peers():
    """Building a contest is not enough: the first round holds logits and gradients to the plain network's."""
    for network, size, others in (("base_cnn_cc2", 32, {"no routing"}), ("resnet20_cp2", 8, set())):
        contest = networks.contest({**LABELS, "network": network, "direction": networks.STEP}, 10, size, False, CPU)
        assert measured(contest).ms.keys() == {"fastroute", "eager"} | others, network


@pytest.mark.parametrize("direction", [networks.FORWARD, networks.STEP])
def test_sparse_networks_are_timed_with_their_images_on_all_paths(direction):
    labels = {**LABELS, "network": "resnet20_sparse4_top2", "direction": direction, "batch": 32}
    row = measured(networks.contest(labels, 10, 16, False, CPU))
    assert row.ms.keys() == {"fastroute", "resnet20", "resnet20_cc2", "resnet20_cc4"}
    assert len(row.facts["loads"]) == 3
    assert all(sum(load) == 64 and len(load) == 4 and min(load) > 0 for load in row.facts["loads"])


def test_steps_have_every_dtype_and_layout():
    steps = [case for case in networks.cases(CPU) if case.step]
    assert {case.labels["network"] for case in steps} == set(networks.STEPS) and len(steps) == 8 * len(networks.STEPS)
    assert len({(case.labels["dtype"], case.labels["layout"]) for case in steps}) == 4


def _other_logits(network):
    with torch.no_grad():
        network.stack1_router.b2[0, 0] += 1


def _other_gradients(network):
    network.stack1_router.w1.register_hook(lambda grad: 9 * grad)


@pytest.mark.parametrize("wrong, what", [(_other_logits, "logits"), (_other_gradients, "gradients")])
def test_a_wrong_network_fails_the_check(wrong, what, monkeypatch):
    right = networks.without_kernels

    def without_kernels(model):
        model = right(model)
        wrong(model)
        return model

    monkeypatch.setattr(networks, "without_kernels", without_kernels)
    monkeypatch.setattr(networks, "_routing_share", lambda *_: 0.0)
    with pytest.raises(AssertionError, match=f"fastroute: {what} are off by"):
        networks.contest({**LABELS, "direction": networks.STEP}, 10, 8, False, CPU).warm_up()


@pytest.mark.parametrize("ours", [False, True])
def test_of_networks_that_the_compiler_makes_wrong_only_the_peer_is_left_out(ours, monkeypatch):
    def compiled(network, device):
        plain = isinstance(network.stem_router, networks.PlainCrossConnection)
        return network if plain is ours else lambda images: float("nan") * network(images)

    monkeypatch.setattr(networks, "compiled", compiled)
    contest = networks.contest({**LABELS, "direction": networks.FORWARD}, 10, 8, True, CPU)
    if ours:
        with pytest.raises(AssertionError, match=r"fastroute (compiled|fused): logits are off by nan"):
            contest.warm_up()
    else:
        row = measured(contest)
        assert row.ms.keys() == {"fastroute", "no routing", "eager", "fastroute compiled", "fastroute fused"}
        assert row.facts["left out"].startswith("compile: logits are off by nan")


@pytest.mark.parametrize("direction", [overhead.FORWARD, overhead.FORWARD_BACKWARD])
def test_overhead_is_checked_and_timed(direction, monkeypatch):
    monkeypatch.setattr(overhead, "REPEATS", 2)
    labels = {"direction": direction, "backend": BACKEND}
    assert measured(overhead.contest(labels, CPU)).ms.keys() == {"fastroute", "kernel", "eager"}
    monkeypatch.setattr(
        overhead.plain, "cross_connect", lambda xs, *parameters: [x + 0 * parameters[0].sum() for x in xs]
    )
    with pytest.raises(AssertionError):
        overhead.contest({**labels, "direction": overhead.FORWARD}, CPU).warm_up()


@pytest.mark.parametrize("direction", [sparse.FORWARD, sparse.FORWARD_BACKWARD])
def test_sparse_layers_are_checked_and_timed(direction, monkeypatch):
    labels = {"direction": direction, "layout": "contiguous", "shape": (16, 4, 5, 5)}
    row = measured(sparse.contest(labels, CPU))
    assert row.ms.keys() == {"fastroute", "one path", "masked", "dense"} and sum(row.facts["load"]) == 16
    monkeypatch.setattr(sparse, "masked", lambda router, x: 1.01 * router(x))
    with pytest.raises(AssertionError):
        sparse.contest(labels, CPU).warm_up()


@pytest.mark.parametrize("direction", [parallel.FORWARD, parallel.FORWARD_BACKWARD])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parallel_convolutions_are_checked_and_timed(direction, dtype, monkeypatch):
    labels = {"direction": direction, "dtype": dtype, "layout": "channels_last", "shape": (4, 4, 5, 5), "paths": 2}
    assert measured(parallel.contest(labels, CPU)).ms.keys() == {"fastroute", "batched", "grouped"}
    monkeypatch.setattr(
        parallel.ParallelPaths, "_batched", lambda paths, xs: [1.5 * path(x) for path, x in zip(paths, xs, strict=True)]
    )
    with pytest.raises(AssertionError):
        parallel.contest(labels, CPU).warm_up()


def test_cases_have_ids_of_their_own_and_a_short_selection():
    cases = all_cases(CPU)
    assert len({case.id for case in cases}) == len(cases)
    quick = [case for case in cases if case.quick]
    assert {case.suite for case in quick} == set(SUITES) and len(quick) <= 28
    assert {case.labels["operator"] for case in quick if case.suite == "operators"} == set(OPERATORS)
    assert sum(case.stated for case in cases) == 48


def test_a_named_backend_would_mislead(monkeypatch):
    monkeypatch.setenv("FASTROUTE_BACKEND", "reference")
    with pytest.raises(ValueError, match="FASTROUTE_BACKEND is 'reference'; it must not be set"):
        all_cases(CPU)
