"""Sums over large maps of few channels: errors do not grow with the number of terms."""

import pytest
import torch

from fastroute import ops, use_backend
from fastroute.testing import assert_as_good_as_eager

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def of_three(function, inputs):
    """Return the results of a function: of the default backend, of plain PyTorch, and of plain PyTorch in float64."""
    results = function(*inputs)
    with use_backend("reference"):
        return results, function(*inputs), function(*(x.double() for x in inputs))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(1, 16, 224, 224), (1, 3, 512, 512), (2, 4, 96, 96), (1, 4, 1024, 1024)])
@pytest.mark.parametrize("value", [0.7, 0.3])
def test_pools_of_constant_maps(shape, value, layout):
    torch.manual_seed(0)
    w2 = torch.randn(1, 3, shape[1])
    x = torch.full(shape, value).to(memory_format=FORMATS[layout])

    def pooled(x, w2):
        return list(ops.gate([x], None, None, w2, None)) + list(ops.cross_connect([x], None, None, w2, None)[1:])

    assert_as_good_as_eager(*of_three(pooled, (x, w2)))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("channels", "out"), [(8, 1), (8, 4), (16, 16), (1, 1), (1, 16), (40, 24)])
def test_gradients_of_predictions_with_constant_gradients(channels, out, layout):
    torch.manual_seed(0)
    given = [torch.full((2, channels, 64, 64), value).to(memory_format=FORMATS[layout]) for value in (0.3, 0.7)]
    given += [torch.randn(2, 2, out, channels, 1, 1), torch.randn(2, 2, out), torch.rand(2, 2, 2)]

    def gradients(*given):
        given = [t.detach().requires_grad_() for t in given]
        outputs = ops.cross_predict(given[:2], *given[2:])
        return list(torch.autograd.grad(outputs, given, [torch.full_like(y, 0.1) for y in outputs]))

    assert_as_good_as_eager(*of_three(gradients, given))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("channels", [1, 4, 64])
def test_gradients_of_gates_with_constant_gradients(channels, layout):
    torch.manual_seed(0)
    xs = [torch.full((2, channels, 96, 96), value).to(memory_format=FORMATS[layout]) for value in (0.3, 0.7)]

    def gradient(first, second, gates):
        gates = gates.detach().requires_grad_()
        outputs = ops.mix([first, second], gates)
        return list(torch.autograd.grad(outputs, [gates], [torch.full_like(y, 0.1) for y in outputs]))

    assert_as_good_as_eager(*of_three(gradient, (*xs, torch.rand(2, 2, 2))))
