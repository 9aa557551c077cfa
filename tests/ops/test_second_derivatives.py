"""Second derivatives of the operators, of tensors in any memory layout."""

import pytest
import torch
from torch.autograd import gradgradcheck

from fastroute import ops
from tests.ops.cases import parameters

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "batch_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda x: x[:, :1].expand_as(x),
}


def weight(x):
    return torch.randn(2, 2, 3, 4, *[2] * (x.dim() - 2), dtype=x.dtype)


OPERATORS = {
    "cross_connect": lambda x: (lambda xs, *ps: [*(r := ops.cross_connect(xs, *ps))[0], *r[1:]], gate_parameters()),
    "relu": lambda x: (lambda xs, *ps: ops.cross_connect(xs, *ps, activation="relu")[0], gate_parameters()),
    "gate": lambda x: (ops.gate, gate_parameters()),
    "mix": lambda x: (ops.mix, [torch.rand(len(x), 2, 3, dtype=x.dtype)]),
    "cross_predict": lambda x: (ops.cross_predict, [weight(x), None, torch.rand(len(x), 2, 2, dtype=x.dtype)]),
}


def gate_parameters():
    return parameters(2, 3, 4, 3, dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (3, 4, 3, 2), (1, 4, 3, 2)], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_second_derivatives(backend, operator, shape, layout):
    torch.manual_seed(0)
    xs = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    function, ps = OPERATORS[operator](xs[0])
    inputs = [None if t is None else t.requires_grad_() for t in (*xs, *ps)]

    def results(left, right, *ps):
        return tuple(function([LAYOUTS[layout](left), LAYOUTS[layout](right)], *ps))

    # Of maps in every layout, and of incoming gradients that are contiguous.
    assert gradgradcheck(results, inputs, fast_mode=True)
