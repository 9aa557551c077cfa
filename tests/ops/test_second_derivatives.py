"""Second derivatives of the operators, of tensors in any memory layout."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
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


@pytest.mark.parametrize("operator", OPERATORS)
def test_third_derivatives_are_refused(backend, operator):
    torch.manual_seed(0)
    xs = [torch.randn(3, 4, 3, 2, dtype=torch.float64).requires_grad_() for _ in range(2)]
    function, ps = OPERATORS[operator](xs[0])
    ps = [None if p is None else p.detach().requires_grad_() for p in ps]
    leaves = [t for t in (*xs, *ps) if t is not None]

    def squares(results):
        return sum(t.square().sum() for each in results for t in (each if isinstance(each, list) else [each]))

    first = torch.autograd.grad(squares(function(xs, *ps)), leaves, create_graph=True)
    second = torch.autograd.grad(squares(first), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="fastroute's operators have first and second derivatives only"):
        squares(second).backward()


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_tangent_of_the_gradient_alone_is_not_dropped(operator):
    torch.manual_seed(0)
    xs = [torch.randn(3, 4, 3, 2).requires_grad_() for _ in range(2)]
    function, ps = OPERATORS[operator](xs[0])
    ps = [None if p is None else p.float() for p in ps]
    y = function(xs, *ps)[0]
    y = y[0] if isinstance(y, list) else y
    with fwAD.dual_level():
        incoming = fwAD.make_dual(torch.randn_like(y), torch.ones_like(y))
        with pytest.raises(RuntimeError, match="called without forward AD: call it inside of torch"):
            torch.autograd.grad(y, xs, incoming)
