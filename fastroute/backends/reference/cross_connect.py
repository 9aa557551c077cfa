"""Gates, cross-connection routing (Alg. 2), and their backward, equation by equation."""

import math

import torch

from fastroute.backends.reference.mix import dense_like, inner_products, weighted_sums
from fastroute.ops._library import differentiate
from fastroute.ops._paths import accumulate_dtype


def gate(xs, w1, b1, w2, b2):
    dtype = accumulate_dtype(xs[0].dtype)
    w1, b1, w2, b2 = (None if p is None else p.to(dtype) for p in (w1, b1, w2, b2))

    space = tuple(range(2, xs[0].dim()))
    pooled = [x.to(dtype).mean(space) if space else x.to(dtype) for x in xs]  # Eq. 3.3
    if w1 is None:
        hidden = [z[:, :0] for z in pooled]
        scores = [z @ w2[i].T for i, z in enumerate(pooled)]  # Eq. 3.9
    else:
        hidden = [torch.relu(z @ w1[i].T + (0 if b1 is None else b1[i])) for i, z in enumerate(pooled)]  # Eq. 3.4
        scores = [h @ w2[i].T for i, h in enumerate(hidden)]  # Eq. 3.4
    if b2 is not None:
        scores = [a + b2[i] for i, a in enumerate(scores)]
    gates = [torch.softmax(a, dim=-1) for a in scores]  # Eq. 3.5
    return tuple(torch.stack(values, dim=1) for values in (gates, scores, pooled, hidden))


def cross_connect(xs, w1, b1, w2, b2, relu):
    paths = [torch.relu(x) for x in xs] if relu else xs
    gates, scores, pooled, hidden = gate(paths, w1, b1, w2, b2)
    outputs = [dense_like(y, xs[0]) for y in weighted_sums(paths, gates)]  # Eq. 3.7
    return outputs, gates, scores, pooled, hidden


def gate_backward(grad_gates, grad_scores, xs, w1, b1, w2, b2, gates, pooled, hidden):
    """Return shares, grad_w1, grad_b1, grad_w2, grad_b2; each pixel of dX_i gets shares (N, m, C) (Eq. 3.15)."""
    w1, w2 = (None if p is None else p.to(gates.dtype) for p in (w1, w2))

    d_scores = torch.zeros_like(gates)
    if grad_gates is not None:  # Eq. 3.12, with J of 3.13 multiplied out
        d_scores = gates * (grad_gates - (gates * grad_gates).sum(-1, keepdim=True))
    if grad_scores is not None:
        d_scores = d_scores + grad_scores

    grad_b2 = d_scores.sum(0)
    if w1 is None:
        grad_w2 = torch.einsum("smn,smc->mnc", d_scores, pooled)  # Eq. 3.14
        grad_w1, grad_b1 = gates.new_empty(0), gates.new_empty(0)
        d_pooled = torch.einsum("smn,mnc->smc", d_scores, w2)
    else:
        grad_w2 = torch.einsum("smn,smg->mng", d_scores, hidden)
        d_hidden = torch.einsum("smn,mng->smg", d_scores, w2) * (hidden > 0)
        grad_w1 = torch.einsum("smg,smc->mgc", d_hidden, pooled)  # Eq. 3.14
        grad_b1 = d_hidden.sum(0)
        d_pooled = torch.einsum("smg,mgc->smc", d_hidden, w1)
    shares = (d_pooled / math.prod(xs[0].shape[2:])).contiguous()
    return shares, grad_w1, grad_b1, grad_w2, grad_b2


def cross_connect_backward(
    grad_outputs, grad_gates, grad_scores, xs, w1, b1, w2, b2, gates, pooled, hidden, relu, grad_inputs
):
    paths = [torch.relu(x) for x in xs] if relu else xs
    d_gates = inner_products(paths, grad_outputs, gates)  # Eq. 3.10
    if grad_gates is not None:
        d_gates = d_gates + grad_gates
    shares, *grads = gate_backward(d_gates, grad_scores, xs, w1, b1, w2, b2, gates, pooled, hidden)
    grad_xs = []
    if grad_inputs:
        direct = weighted_sums(grad_outputs, gates.mT)
        shares = shares.reshape(*shares.shape, *[1] * (xs[0].dim() - 2)).unbind(1)
        grad_xs = [term + share for term, share in zip(direct, shares, strict=True)]  # Eq. 3.15
        if relu:
            grad_xs = [torch.where(x > 0, grad, 0) for grad, x in zip(grad_xs, xs, strict=True)]
        grad_xs = [dense_like(grad, xs[0]) for grad in grad_xs]
    return grad_xs, *grads


def _setup(ctx, inputs, output):
    grad_outputs, grad_gates, grad_scores, xs, w1, b1, w2, b2, *_, relu, _ = inputs
    ctx.n, ctx.relu = len(grad_outputs), relu
    ctx.save_for_backward(grad_gates, grad_scores, w1, b1, w2, b2, *grad_outputs, *xs)


def _second_order(ctx, grad_xs, *grad_parameters):
    """Return the derivative of the backward: recompute the forward in plain PyTorch and differentiate it twice.

    The saved gates, pooled and hidden are functions of xs and the parameters, so their gradients are included.
    """
    leaves = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
    grad_gates, grad_scores, *parameters = leaves[:6]
    grad_outputs, xs = leaves[6 : 6 + ctx.n], leaves[6 + ctx.n :]
    with torch.enable_grad():
        outputs, gates, scores, _, _ = cross_connect(xs, *parameters, ctx.relu)
        results = zip([*outputs, gates, scores], [*grad_outputs, grad_gates, grad_scores], strict=True)
        objective = sum((result * grad).sum() for result, grad in results if grad is not None)
        wanted = [(x, g) for x, g in zip(xs, grad_xs or [None] * len(xs), strict=True) if g is not None]
        wanted += [(p, g) for p, g in zip(parameters, grad_parameters, strict=True) if p is not None]
        first = torch.autograd.grad(objective, [t for t, _ in wanted], create_graph=True)
        objective = sum((f * g).sum() for f, (_, g) in zip(first, wanted, strict=True))
    present = [t for t in leaves if t is not None]
    second = iter(torch.autograd.grad(objective, present, allow_unused=True))
    d = [None if t is None else next(second) for t in leaves]
    return d[6 : 6 + ctx.n], *d[:2], d[6 + ctx.n :], *d[2:6], None, None, None, None, None


differentiate("cross_connect_backward", _second_order, _setup)


def _gate_setup(ctx, inputs, output):
    grad_gates, grad_scores, xs, w1, b1, w2, b2, *_ = inputs
    ctx.save_for_backward(grad_gates, grad_scores, w1, b1, w2, b2, *xs)


def _gate_second_order(ctx, grad_shares, *grad_parameters):
    """Same as `_second_order`; the first derivative by X_i is the share of its channel at every pixel."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
    grad_gates, grad_scores, *parameters = leaves[:6]
    xs = leaves[6:]
    with torch.enable_grad():
        gates, scores, _, _ = gate(xs, *parameters)
        results = zip((gates, scores), (grad_gates, grad_scores), strict=True)
        objective = sum((result * grad).sum() for result, grad in results if grad is not None)
        wanted = [(p, g) for p, g in zip(parameters, grad_parameters, strict=True) if p is not None and g is not None]
        first = torch.autograd.grad(objective, [*xs, *(p for p, _ in wanted)], create_graph=True)
        shares = torch.stack([f.flatten(2).mean(2) if f.dim() > 2 else f for f in first[: len(xs)]], 1)
        objective = (shares * grad_shares).sum() if grad_shares is not None else 0
        objective = objective + sum((f * g).sum() for f, (_, g) in zip(first[len(xs) :], wanted, strict=True))
    present = [t for t in leaves if t is not None]
    second = iter(torch.autograd.grad(objective, present, allow_unused=True))
    d = [None if t is None else next(second) for t in leaves]
    return *d[:2], d[6:], *d[2:6], None, None, None


differentiate("gate_backward", _gate_second_order, _gate_setup)
