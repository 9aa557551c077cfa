"""Transforms of torch.func and forward-mode differentiation, which go through plain PyTorch."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

from fastroute import ops
from fastroute.nn import CrossConnection
from tests.ops.cases import parameters, paths


def draw(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, GATES, PRIOR = draw(2, 2, 4, 5, 3, 3), torch.rand(3, 2, 2), torch.tensor([0.2, 0.3, 0.5])
PARAMETERS = parameters(2, 2, 5)

# Name -> a function of one path x (3, 5, 6, 6) to a tensor.
OPERATORS = {
    "cross_connect": lambda x: ops.cross_connect([x, x.flip(0)], *PARAMETERS).outputs[1],
    "cross_connect with relu": lambda x: ops.cross_connect([x, x.flip(0)], *PARAMETERS, activation="relu").outputs[0],
    "gate": lambda x: ops.gate([x, x.flip(0)], *PARAMETERS).gates,
    "mix": lambda x: ops.mix([x, x.flip(0)], GATES)[0],
    "cross_predict": lambda x: ops.cross_predict([x, x.flip(0)], WEIGHT, None, GATES, padding=1)[1],
    "mixture_em_loss": lambda x: ops.mixture_em_loss(x[:, :3].flatten(2).mean(2), prior=PRIOR).loss,
}


@pytest.fixture(params=OPERATORS)
def operator(request):
    return OPERATORS[request.param]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_vmap(operator, layout):
    xs = torch.stack([*paths(4, (3, 5, 6, 6), layout=layout)])
    assert_close(vmap(operator)(xs), torch.stack([operator(x) for x in xs]), rtol=1e-4, atol=1e-5)


def test_gradients(operator):
    """Those of torch.func are those of backward, which are derived by hand."""
    x = draw(3, 5, 6, 6)
    weights = draw(*operator(x).shape, seed=4)
    leaf = x.clone().requires_grad_()
    (operator(leaf) * weights).sum().backward()
    assert_close(grad(lambda x: (operator(x) * weights).sum())(x), leaf.grad, rtol=1e-4, atol=1e-5)


def test_forward_and_reverse_mode_agree(operator):
    x, direction = draw(3, 5, 6, 6), draw(3, 5, 6, 6, seed=5)
    value, tangent = jvp(operator, (x,), (direction,))
    assert_close(value, operator(x), rtol=1e-4, atol=1e-5)
    leaf = x.clone().requires_grad_()
    weights = draw(*value.shape, seed=4)
    (operator(leaf) * weights).sum().backward()
    assert_close((tangent * weights).sum(), (leaf.grad * direction).sum(), rtol=1e-3, atol=1e-4)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(operator(forward_ad.make_dual(x, direction)))
    assert_close(dual.tangent, tangent)


def test_an_outer_transform_sees_through_an_inner_one():
    x = draw(3, 5, 6, 6)

    def outer(x):
        return grad(lambda scale: scale * ops.mix([x, x.flip(0)], GATES)[0].sum())(torch.tensor(2.0))

    assert_close(grad(outer)(x), GATES[:, 0, 0].view(3, 1, 1, 1) + GATES[:, 1, 0].flip(0).view(3, 1, 1, 1) + 0 * x)


def test_hessians_and_gradients_of_each_sample():
    scores, ps = draw(6, 4), parameters(2, 2, 4)

    def gates(scores):
        return ops.gate([scores, scores], *ps).gates

    assert_close(jacfwd(gates)(scores), jacrev(gates)(scores))
    layer = CrossConnection(4, 2, 2)
    torch.nn.init.normal_(layer.w2)
    state = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(state, x):
        return sum(y.square().sum() for y in torch.func.functional_call(layer, state, ([x[None], x[None] + 1],)))

    each = vmap(grad(loss), (None, 0))(state, scores)
    for i, x in enumerate(scores):
        assert_close({name: g[i] for name, g in each.items()}, grad(loss)(state, x), rtol=1e-4, atol=1e-5)
