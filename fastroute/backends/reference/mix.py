"""The cross-path weighted sum (Eq. 3.7) and its backward."""

import torch
from torch import Tensor

from fastroute.ops._library import differentiate, under_transform
from fastroute.ops._paths import accumulate_dtype, empty_path


def weighted_sums(xs: list[Tensor], gates: Tensor) -> list[Tensor]:
    """Return Y_j = Σ_i g_ij X_i for every j, in the gates' dtype (Eq. 3.7)."""
    shape = (-1, *[1] * (xs[0].dim() - 1))
    xs = [x.to(gates.dtype) for x in xs]
    return [sum(gates[..., i, j].reshape(shape) * x for i, x in enumerate(xs)) for j in range(gates.shape[-1])]


def inner_products(xs: list[Tensor], grad_outputs: list[Tensor], gates: Tensor) -> Tensor:
    """Return dL/dg_ij = <dY_j, X_i> (Eq. 3.10): per sample for gates (N, m, n), over all samples for (m, n)."""
    dims = tuple(range(gates.dim() - 2, xs[0].dim()))
    grad_outputs = [grad.to(gates.dtype) for grad in grad_outputs]
    rows = [torch.stack([(x.to(gates.dtype) * grad).sum(dims) for grad in grad_outputs], dim=-1) for x in xs]
    return torch.stack(rows, dim=-2)


def dense_like(value: Tensor, x: Tensor) -> Tensor:
    """Return value in x's dtype and, unless it is to be differentiated, with the strides of every backend's outputs."""
    if under_transform() or (value.requires_grad and torch.is_grad_enabled()):
        return value.to(x.dtype)
    out, value = empty_path(x), value.to(x.dtype)
    # Out of place, as Inductor has to have decompositions.
    return value if value.stride() == out.stride() else torch.ops.aten.copy(out, value)


def mix(xs, gates):
    gates = gates.to(accumulate_dtype(xs[0].dtype))
    return [dense_like(y, xs[0]) for y in weighted_sums(xs, gates)]


def mix_backward(grad_outputs, xs, gates, grad_inputs):
    gates = gates.to(accumulate_dtype(xs[0].dtype))
    grad_gates = inner_products(xs, grad_outputs, gates)
    grad_xs = weighted_sums(grad_outputs, gates.mT) if grad_inputs else []  # the first term of Eq. 3.15
    return [dense_like(grad, xs[0]) for grad in grad_xs], grad_gates


def _setup(ctx, inputs, output):
    grad_outputs, xs, gates, _ = inputs
    ctx.n = len(grad_outputs)
    ctx.save_for_backward(gates, *grad_outputs, *xs)


def _second_order(ctx, grad_xs, grad_gates):
    """Return the derivative of the backward, computed in plain PyTorch."""
    gates, *paths = (t.detach().requires_grad_() for t in ctx.saved_tensors)
    with torch.enable_grad():
        first = mix_backward(paths[: ctx.n], paths[ctx.n :], gates, bool(grad_xs))
        objective = sum((f * g).sum() for f, g in zip([*first[0], first[1]], [*grad_xs, grad_gates], strict=True))
    # allow_unused: without gradients of the paths, the first derivative by the gates does not depend on the gates.
    d_gates, *d_paths = torch.autograd.grad(objective, [gates, *paths], allow_unused=True)
    return d_paths[: ctx.n], d_paths[ctx.n :], d_gates, None


differentiate("mix_backward", _second_order, _setup)
