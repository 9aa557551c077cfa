"""The gates of a router, without routing (Eq. 3.3 to 3.5)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastroute.ops._library import below_autograd, call, define, implement_autograd
from fastroute.ops._paths import (
    accumulate_dtype,
    align_paths,
    align_saved,
    check_gate,
    check_paths,
    check_tensors,
    path_list,
)
from fastroute.ops._results import exportable


@exportable
class Gates(NamedTuple):
    """Result of `gate`, which documents the shapes."""

    gates: Tensor
    scores: Tensor


def gate(xs: Sequence[Tensor], w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Gates:
    """Compute the gates of m parallel tensors for n outputs: `cross_connect` without the weighted sum (Eq. 3.3 to 3.5).

    Args:
        xs, w1, b1, w2, b2: as for `cross_connect`.

    Returns:
        gates: (N, m, n), `gates[s, i, j]` is the weight of input i in output j; each row i sums to 1.
        scores: (N, m, n), the scores before softmax. Both are float32 for half-precision paths, and differentiable.

    Raises:
        TypeError, ValueError, RuntimeError: as for `cross_connect`.

    Example:
        >>> xs = [torch.randn(8, 64, 16, 16) for _ in range(2)]
        >>> gates, scores = gate(xs, None, None, torch.randn(2, 3, 64), torch.zeros(2, 3))
        >>> gates.shape, torch.allclose(gates.sum(-1), torch.ones(8, 2))
        (torch.Size([8, 2, 3]), True)
    """
    check_tensors(w2=w2)
    gates, scores, _, _ = call(_FORWARD, path_list("xs", xs), w1, b1, w2, b2)
    return Gates(gates, scores)


def _prepare_forward(xs, w1, b1, w2, b2):
    check_paths("xs", xs)
    check_gate(xs, w1, b1, w2, b2)
    return align_paths("xs", xs), w1, b1, w2, b2


def _fake_forward(xs, w1, b1, w2, b2):
    x, (m, n, _) = xs[0], w2.shape
    widths = (n, n, x.shape[1], 0 if w1 is None else w1.shape[1])
    return tuple(x.new_empty((x.shape[0], m, width), dtype=accumulate_dtype(x.dtype)) for width in widths)


def _prepare_backward(grad_gates, grad_scores, xs, *rest):
    return grad_gates, grad_scores, align_saved(xs), *rest


def _fake_backward(grad_gates, grad_scores, xs, w1, b1, w2, b2, gates, pooled, hidden):
    m, n, _ = w2.shape
    shapes = ((0,), (0,)) if w1 is None else (w1.shape, w1.shape[:2])
    return tuple(gates.new_empty(shape) for shape in (pooled.shape, *shapes, w2.shape, (m, n)))


_FORWARD = define("gate", _prepare_forward, _fake_forward)

define("gate_backward", _prepare_backward, _fake_backward)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operators, w1, b1, w2, b2, *xs):
        given = xs[0] if xs else w2  # without paths the operator says so
        gates, scores, pooled, hidden = below_autograd(operators[0], given, list(xs), w1, b1, w2, b2)
        ctx.backward_operator = operators[1]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(pooled, hidden)
        ctx.save_for_backward(w1, b1, w2, b2, gates, pooled, hidden, *xs)
        return gates, scores, pooled, hidden

    @staticmethod
    def backward(ctx, grad_gates, grad_scores, *_):
        w1, b1, w2, b2, gates, pooled, hidden, *xs = ctx.saved_tensors
        saved = (xs, w1, b1, w2, b2, gates, pooled, hidden)
        shares, *grads = below_autograd(ctx.backward_operator, xs[0], grad_gates, grad_scores, *saved)
        grads = [
            None if parameter is None else grad.to(parameter.dtype)
            for parameter, grad in zip((w1, b1, w2, b2), grads, strict=True)
        ]
        shares = shares.to(xs[0].dtype)
        shares = shares.reshape(*shares.shape, *[1] * (xs[0].dim() - 2)).unbind(1)
        # Expanded, not copied: it is broadcast over space when it is added to the other gradients of X.
        return None, *grads, *(share.expand_as(x) for share, x in zip(shares, xs, strict=True))


implement_autograd("gate", lambda operators, xs, w1, b1, w2, b2: _Gate.apply(operators, w1, b1, w2, b2, *xs))
