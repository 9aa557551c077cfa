"""Compiled layers take batches of any size: a second size makes one graph more, and others none."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastroute
from fastroute.nn import (
    CrossConnection,
    CrossPrediction2d,
    CrossPredictionLinear,
    CrossStitch,
    FusedSequential,
    MixtureEMLoss,
    blocks,
)


def maps(batch, paths=2):
    return [torch.randn(batch, 6, 5, 4) for _ in range(paths)]


def vectors(batch):
    return [torch.randn(batch, 6) for _ in range(2)]


def block():
    return FusedSequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


LAYERS = {
    "CrossConnection": (lambda: CrossConnection(6, 2, 3), maps),
    "CrossConnection, centred": (lambda: CrossConnection(6, 2, 3, gate_norm="center"), maps),
    "CrossConnection, priors": (lambda: CrossConnection(6, 2, 3, gate_norm="standardize", prior="learned"), maps),
    "CrossPrediction2d": (lambda: CrossPrediction2d(6, 4, 3, 2, 2), maps),
    "CrossPredictionLinear": (lambda: CrossPredictionLinear(6, 4, 2, 2), vectors),
    "CrossStitch": (lambda: CrossStitch(2, 2), maps),
    "block end": (block, lambda batch: maps(batch)[0]),
    "MixtureEMLoss": (MixtureEMLoss, lambda batch: torch.randn(batch, 7)),
}


def gradients(layer, x):
    xs = x if isinstance(x, list) else [x]
    xs = [x.clone().requires_grad_() for x in xs]
    ys = layer(xs if isinstance(x, list) else xs[0])
    ys = ys[0] if isinstance(ys, tuple) else ys  # a loss, with posteriors that are constants
    loss = sum(y.square().sum() for y in (ys if isinstance(ys, list) else [ys]))
    return torch.autograd.grad(loss, [*xs, *layer.parameters()])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("form", ["operator", "fused"])
def test_training_compiles_twice(form, name, monkeypatch):
    monkeypatch.setattr(blocks, "_is_faster", lambda norm, x: True)  # or small maps would get PyTorch's layers
    torch.manual_seed(0)
    make, sample = LAYERS[name]
    layer = make()
    plain = copy.deepcopy(layer)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with fastroute.compile_form(form):
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for batch in range(4, 8):
            x = sample(batch)
            torch.testing.assert_close(gradients(compiled, x), gradients(plain, x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2
