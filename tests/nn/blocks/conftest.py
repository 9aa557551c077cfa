"""The kernel wherever it can compute, and what it is compared with."""

import copy

import pytest
import torch
from torch import nn

from fastroute.nn import block_end, blocks
from fastroute.testing import assert_as_good_as_eager

# Channels that are fewer, as many as, and more than the elements of a register and of the columns summed together, and
# pixels that fill no block, one block and several; and samples of few pixels, which are joined.
SHAPES = [
    (8, 16, 32, 32),
    (3, 5, 7, 9),
    (2, 64, 24, 24),
    (5, 136, 4, 4),
    (64, 33, 1, 1),
    (2, 1, 40, 40),
    (1, 520, 20, 3),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
X = torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def wherever_it_can(monkeypatch):
    """Use the kernel also where it is slower, and fill what it leaves out with NaN."""
    monkeypatch.setattr(blocks, "_is_faster", lambda norm, x: True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of the kernel."""
    counted = []
    kernel = blocks._fused
    monkeypatch.setattr(blocks, "_fused", lambda *args: counted.append(args) or kernel(*args))
    return counted


def norm_of(channels, **options):
    norm = nn.BatchNorm2d(channels, **options)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(1, 0.5)
        if norm.track_running_stats:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return norm


def results(function, norm, x, shortcut, end, incoming):
    """Return outputs, gradients and statistics of function(norm, x, shortcut, end), computed in a copy of norm."""
    norm = copy.deepcopy(norm)
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, shortcut) if t is not None
    ]
    y = function(norm, leaves[0], leaves[1] if shortcut is not None else None, end)
    gradients = torch.autograd.grad(y, [*leaves, *norm.parameters()], incoming.to(y.dtype))
    return [y.detach(), *gradients, *(b for b in norm.buffers() if b.is_floating_point())], norm


def modules(norm, x, shortcut=None, end=None):
    y = norm(x)
    y = y if shortcut is None else y + shortcut
    return y if end is None else end(y)


def check(norm, x, shortcut, end):
    double = copy.deepcopy(norm).double()
    wide = [None if t is None else t.double() for t in (x, shortcut)]
    with torch.no_grad():
        y = modules(copy.deepcopy(double), *wide, end)
        before = modules(copy.deepcopy(double), *wide)
    incoming = torch.randn_like(y).to(x.dtype).double()
    # Where the ReLU's input is near 0, its rounding decides, by chance, whether there is a gradient.
    incoming *= before.abs() > 16 * torch.finfo(x.dtype).eps * (1 + before.abs().max())
    exact, _ = results(modules, double, *wide, end, incoming)
    eager, plain = results(modules, norm, x, shortcut, end, incoming)
    ours, fused = results(block_end, norm, x, shortcut, end, incoming)
    assert_as_good_as_eager(ours, eager, exact)
    for got, expected in zip(ours, eager, strict=True):
        assert got.dtype == expected.dtype and got.stride() == expected.stride()
    if norm.track_running_stats:
        assert fused.num_batches_tracked == plain.num_batches_tracked


def sequence():
    return [
        nn.Conv2d(3, 16, 3, padding=1),
        norm_of(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, padding=1),
        norm_of(16),
    ]
