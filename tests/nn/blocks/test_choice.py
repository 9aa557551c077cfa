"""Where the kernel computes, and where the modules themselves are called."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper as wrap
from torch.utils.flop_counter import FlopCounterMode

from fastroute.backends import native_serves_cpu, use_backend
from fastroute.nn import FusedSequential, block_end, blocks, residual_sum
from tests.nn.blocks.conftest import FORMATS, X, modules, norm_of, sequence

pytestmark = pytest.mark.skipif(not native_serves_cpu(), reason="needs the compiled CPU kernels")


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Traced(torch.Tensor):
    pass


def hooked(module):
    module.register_forward_hook(lambda module, args, output: 2 * output)
    return module


@pytest.mark.parametrize(
    ("norm", "x", "shortcut", "end"),
    [
        (hooked(norm_of(16)), X, None, nn.ReLU()),
        (norm_of(16), X, None, hooked(nn.ReLU())),
        (Doubled(16), X, None, nn.ReLU()),
        (norm_of(16), X, None, nn.GELU()),
        (norm_of(16), X.as_subclass(Traced), None, nn.ReLU()),
        (norm_of(16), X, torch.randn(1, 16, 1, 1), nn.ReLU()),
        (norm_of(16), X, X.double(), nn.ReLU()),
        (norm_of(16), X, X.contiguous(), nn.ReLU()),
        (nn.GroupNorm(4, 16), X, X, nn.ReLU()),
        (norm_of(16).to("meta"), X.to("meta"), None, nn.ReLU()),
        (norm_of(16).eval(), X[:0], None, nn.ReLU()),
    ],
    ids=[
        "a hook of the norm",
        "a hook of the ReLU",
        "a subclass of the norm",
        "another activation",
        "a subclass of the tensor",
        "a shortcut that is broadcast",
        "a shortcut of another dtype",
        "a shortcut of another layout",
        "another norm",
        "another device",
        "no samples",
    ],
)
def test_everything_else_is_left_to_the_modules(norm, x, shortcut, end, calls):
    ours, expected = block_end(norm, x, shortcut, end), modules(norm, x, shortcut, end)
    assert not calls and type(ours) is type(expected) and ours.dtype == expected.dtype
    if not ours.is_meta:
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("size", "layout", "dtype", "training", "served"),
    [
        (6, "contiguous", torch.float32, True, True),
        (6, "contiguous", torch.float32, False, True),
        (5, "contiguous", torch.float32, True, False),
        (7, "contiguous", torch.bfloat16, False, False),
        (8, "contiguous", torch.bfloat16, True, True),
        (4, "channels_last", torch.float32, True, True),
        (4, "channels_last", torch.bfloat16, False, True),
    ],
)
def test_where_it_is_faster(size, layout, dtype, training, served, monkeypatch):
    monkeypatch.undo()
    served_with = []
    monkeypatch.setattr(blocks, "_fused", lambda *args: served_with.append(args) or args[1])
    x = torch.randn(2, 16, size, size).to(dtype).contiguous(memory_format=FORMATS[layout])
    block_end(norm_of(16).train(training), x)
    assert bool(served_with) == served


@pytest.mark.parametrize(
    ("dtype", "training", "nodes"),
    [(torch.float32, True, 1), (torch.float32, False, 0), (torch.bfloat16, False, 1), (torch.float64, False, 0)],
)
def test_where_it_is_faster_in_a_compiled_graph(dtype, training, nodes, monkeypatch):
    monkeypatch.undo()
    graphs = []

    def compiler(graph, example):
        graphs.append(graph)
        return graph.forward

    norm, x = norm_of(16).train(training), torch.randn(2, 16, 4, 4).to(dtype)
    norm = norm.double() if dtype == torch.float64 else norm
    torch.compile(lambda x: block_end(norm, x), backend=compiler, fullgraph=True)(x)
    operator = torch.ops.fastroute_native.batch_norm.default
    assert sum(node.target is operator for node in graphs[0].graph.nodes) == nodes


def test_other_backends_transforms_modes_and_traces_are_left_to_the_modules(calls):
    norm = norm_of(16).eval()
    with use_backend("reference"):
        block_end(norm, X)
    torch.func.vmap(lambda x: block_end(norm, x[None]))(X)
    torch.func.jvp(lambda x: block_end(norm, x), (X,), (X,))
    with FlopCounterMode(display=False):
        block_end(norm, X)
    torch.jit.trace(lambda x: block_end(norm.requires_grad_(False), x), X, check_trace=False)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    block_end(norm, X)
    handle.remove()
    assert not calls
    with use_backend("native"):
        block_end(norm, X)
    assert calls


def test_bad_input_is_refused_by_the_modules():
    with pytest.raises(ValueError, match="expected 4D"):
        block_end(norm_of(16), torch.randn(4, 16))
    with pytest.raises(ValueError, match="more than 1 value"):
        block_end(norm_of(16), torch.randn(1, 16, 1, 1))
    with pytest.raises(RuntimeError):
        block_end(norm_of(8), X)
    with pytest.raises(ValueError, match="eps must be positive"):
        block_end(nn.BatchNorm2d(16, eps=0.0), X)


def test_float64_maps_of_float32_parameters_are_refused_by_the_modules():
    with pytest.raises(RuntimeError, match="dtype"):
        block_end(norm_of(16), X.double())


def test_private_calls_are_checked():
    with pytest.raises(RuntimeError, match="only the batch may be empty"):
        empty = torch.zeros(0).as_strided((2, 3, 0, 4), (0, 0, 4, 1))
        torch.ops.fastroute_native.batch_norm(empty, None, None, None, None, None, 1e-5, True)
    call = torch.ops.fastroute_native.batch_norm
    ones = torch.ones(16)
    with pytest.raises(RuntimeError, match="together"):
        call(X, None, ones, ones, ones, None, 1e-5, True)
    with pytest.raises(RuntimeError, match="shape"):
        call(X, None, torch.ones(8), ones, None, None, 1e-5, True)
    with pytest.raises(RuntimeError, match="differ"):
        call(X, X.double(), ones, ones, None, None, 1e-5, True)


def test_a_sequence_is_that_of_pytorch(calls):
    torch.manual_seed(0)
    fused, x = FusedSequential(*sequence(), nn.Dropout(0.0), nn.ReLU()), torch.randn(4, 3, 12, 12)
    plain = nn.Sequential(*copy.deepcopy(list(fused)))
    assert fused.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(fused(x), plain(x))
    assert len(calls) == 2
    torch.testing.assert_close(dict(fused.named_buffers()), dict(plain.named_buffers()))
    assert isinstance(fused[:3], FusedSequential) and FusedSequential()(x) is x


@pytest.mark.parametrize("observed", [False, True])
def test_a_residual_block(observed, calls):
    torch.manual_seed(0)
    residual, shortcut, x = nn.Sequential(*sequence()), nn.Conv2d(3, 16, 1), torch.randn(4, 3, 12, 12)
    expected = torch.relu(copy.deepcopy(residual)(x) + shortcut(x))
    seen = []
    if observed:
        residual.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(residual_sum(residual, x, shortcut, nn.ReLU()), expected)
    assert (len(seen), len(calls)) == ((1, 0) if observed else (0, 2))


class Scaled(nn.Sequential):
    def forward(self, x):
        return 0.1 * super().forward(x)


@pytest.mark.parametrize(
    "residual",
    [
        Scaled(*sequence()),
        nn.Sequential(nn.ReLU(inplace=True), *sequence()),
        nn.Sequential(nn.Dropout(0.5), *sequence()),
        nn.Sequential(*sequence(), nn.ReLU()),
        nn.Conv2d(3, 16, 1),
        wrap(nn.Sequential(*sequence())),
    ],
    ids=["another forward", "in-place", "random", "a ReLU at the end", "no sequence", "checkpointed"],
)
def test_residuals_of_any_kind(residual):
    shortcut = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 16, 1))
    found = []
    for function in (residual_sum, lambda residual, x, shortcut, end: end(residual(x) + shortcut(x))):
        torch.manual_seed(0)
        layers, x = copy.deepcopy(residual), torch.randn(4, 3, 12, 12, requires_grad=True)
        y = function(layers, x.clone(), shortcut, nn.ReLU())
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layers.parameters()])])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-2)


def test_synchronised_normalisation_is_left_to_the_modules(calls):
    network = nn.SyncBatchNorm.convert_sync_batchnorm(FusedSequential(*sequence()))
    assert isinstance(network, FusedSequential) and isinstance(network[1], nn.SyncBatchNorm)
    network.eval()(torch.randn(4, 3, 12, 12))
    assert not calls
