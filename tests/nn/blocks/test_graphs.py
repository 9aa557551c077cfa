"""Block ends in compiled, exported, checkpointed and traced graphs."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastroute
from fastroute.backends import native_serves_cpu
from fastroute.nn import FusedSequential
from tests.nn.blocks.conftest import sequence

pytestmark = pytest.mark.skipif(not native_serves_cpu(), reason="needs the compiled CPU kernels")


def test_compiled_autograd():
    network, x = FusedSequential(*sequence(), nn.ReLU()), torch.randn(4, 3, 12, 12)
    loss = network(x).square().sum()
    expected = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda loss: loss.backward(), backend="eager")(loss)
    for parameter, grad in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize(("form", "nodes"), [("auto", 2), ("fused", 0)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_graphs(form, nodes, dynamic):
    torch.manual_seed(0)
    network, graphs = FusedSequential(*sequence()), []
    network.append(nn.ReLU())
    plain = nn.Sequential(*copy.deepcopy(list(network)))

    def compiler(graph, example):
        graphs.append(graph)
        return graph.forward

    with fastroute.compile_form(form):
        compiled = torch.compile(network, backend=compiler, fullgraph=True, dynamic=dynamic)
        for batch in (4, 6):
            x = torch.randn(batch, 3, 12, 12)
            torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(dict(network.named_buffers()), dict(plain.named_buffers()))
    operator = torch.ops.fastroute_native.batch_norm.default
    assert all(sum(node.target is operator for node in graph.graph.nodes) == nodes for graph in graphs)


def test_compiled_by_inductor():
    """Inductor may give the operator its maps in channels_last, whatever the layout of the eager network."""
    torch.manual_seed(0)
    network = FusedSequential(*sequence(), nn.ReLU())
    plain, x = nn.Sequential(*copy.deepcopy(list(network))), torch.randn(4, 3, 12, 12)
    compiled, expected = torch.compile(network)(x), plain(x)
    torch.testing.assert_close(compiled, expected)
    incoming = torch.randn_like(expected)
    for y in (compiled, expected):
        y.backward(incoming)
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_layers_that_inductor_folds_are_left_to_it(calls):
    network, x = FusedSequential(*sequence(), nn.ReLU()).eval(), torch.randn(4, 3, 12, 12)
    expected = network(x)
    calls.clear()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        torch.testing.assert_close(torch.compile(network)(x), expected, rtol=1e-4, atol=1e-4)
    assert not calls


def test_checkpointing_recomputes_the_same():
    torch.manual_seed(0)
    network, x = FusedSequential(*sequence(), nn.ReLU()), torch.randn(4, 3, 12, 12, requires_grad=True)
    [plain] = torch.autograd.grad(network(x).square().sum(), [x])
    [again] = torch.autograd.grad(checkpoint(network, x, use_reentrant=False).square().sum(), [x])
    assert torch.equal(plain, again)


def test_exported_graphs_have_the_modules():
    program = torch.export.export(FusedSequential(*sequence()).eval(), (torch.randn(4, 3, 12, 12),))
    assert not [node for node in program.graph.nodes if "fastroute" in str(node.target)]


def test_opcheck():
    x = torch.randn(4, 16, 8, 8, requires_grad=True)
    ones = torch.ones(16, requires_grad=True)
    for residual, moments in ((x, (None, None)), (None, (torch.zeros(16), torch.ones(16)))):
        torch.library.opcheck(
            torch.ops.fastroute_native.batch_norm.default, (x, residual, ones, ones, *moments, 1e-5, True)
        )
