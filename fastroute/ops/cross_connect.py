"""Cross-connection routing (§3.2, Alg. 2)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastroute.ops._library import below_autograd, call, define, implement_autograd
from fastroute.ops._paths import (
    accumulate_dtype,
    align_like,
    align_paths,
    align_saved,
    check_activation,
    check_gate,
    check_paths,
    check_tensors,
    empty_path,
    path_list,
)
from fastroute.ops._results import exportable


@exportable
class Routed(NamedTuple):
    """Result of `cross_connect`, which documents the shapes."""

    outputs: list[Tensor]
    gates: Tensor
    scores: Tensor


def cross_connect(
    xs: Sequence[Tensor],
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None = None,
) -> Routed:
    """Route m parallel tensors to n by gates computed from the tensors themselves (Alg. 2).

    For each input path i:

        Z_i = mean of X_i over space                    (Eq. 3.3)
        A_i = W2_i ReLU(W1_i Z_i + b1_i) + b2_i         (Eq. 3.4)
        G_i = softmax(A_i)                              (Eq. 3.5)
        Y_j = Σ_i g_ij X_i                              (Eq. 3.7)

    The backward implements Eq. 3.10 to 3.15. Second derivatives go through the reference backend in plain PyTorch.

    | argument | shape | type |
    |---|---|---|
    | xs | m tensors (N, C, *S), 1 ≤ m ≤ 8, up to three spatial sizes | float32, bfloat16, float16, float64 |
    | w1 | (m, G, C), or None for the linear gate of Eq. 3.9 | the paths' or float32 |
    | b1 | (m, G) or None | the paths' or float32 |
    | w2 | (m, n, G), or (m, n, C) where w1 is None; 1 ≤ n ≤ 8 | the paths' or float32 |
    | b2 | (m, n) or None | the paths' or float32 |

    Each sample of a path may be dense in memory as [C, *S] or as [*S, C] (channels_last), with any batch stride. The
    outputs have the layout of the inputs. Any other layout costs one `.contiguous()`.

    Args:
        activation: "relu" routes X_i = max(xs[i], 0). The kernels apply it while reading and never store it, in the
            forward and the backward; dX_i is 0 unless xs[i] > 0. None routes the paths as they are.

    Returns:
        outputs: n tensors (N, C, *S) of the paths' dtype.
        gates: (N, m, n), `gates[s, i, j]` is the weight of input i in output j; each row i sums to 1.
        scores: (N, m, n), the scores before softmax. Gates and scores are float32 for half-precision paths.
        All three are differentiable.

    Raises:
        TypeError: xs is not a list of floating-point tensors of one dtype, or a parameter has another dtype.
        ValueError: shapes, devices or memory formats do not match, there are more than 8 paths, or the activation is
            unknown.
        RuntimeError: the selected backend does not support these tensors.

    Example:
        >>> xs = [torch.randn(8, 64, 16, 16) for _ in range(2)]
        >>> w1, b1 = torch.randn(2, 16, 64), torch.zeros(2, 16)
        >>> w2, b2 = torch.randn(2, 3, 16), torch.zeros(2, 3)
        >>> outputs, gates, scores = cross_connect(xs, w1, b1, w2, b2)
        >>> len(outputs), outputs[0].shape, gates.shape
        (3, torch.Size([8, 64, 16, 16]), torch.Size([8, 2, 3]))
    """
    check_activation(activation)
    check_tensors(w2=w2)
    outputs, gates, scores, _, _ = call(_FORWARD, path_list("xs", xs), w1, b1, w2, b2, activation == "relu")
    return Routed(outputs, gates, scores)


def _prepare_forward(xs, w1, b1, w2, b2, relu=False):
    check_paths("xs", xs)
    check_gate(xs, w1, b1, w2, b2)
    return align_paths("xs", xs), w1, b1, w2, b2, relu


def _fake_forward(xs, w1, b1, w2, b2, relu):
    x, (m, n, _) = xs[0], w2.shape
    batch, channels, hidden = x.shape[0], x.shape[1], 0 if w1 is None else w1.shape[1]

    def empty(*shape):
        return x.new_empty(shape, dtype=accumulate_dtype(x.dtype))

    outputs = [empty_path(x) for _ in range(n)]
    return outputs, empty(batch, m, n), empty(batch, m, n), empty(batch, m, channels), empty(batch, m, hidden)


def _prepare_backward(grad_outputs, grad_gates, grad_scores, xs, *rest):
    xs = align_saved(xs)
    return align_like(grad_outputs, xs[0]), grad_gates, grad_scores, xs, *rest


def _fake_backward(grad_outputs, grad_gates, grad_scores, xs, w1, b1, w2, b2, gates, pooled, hidden, relu, grad_inputs):
    m, n, _ = w2.shape

    def empty(*shape):
        return gates.new_empty(shape)

    grad_xs = [empty_path(xs[0]) for _ in range(m)] if grad_inputs else []
    no_hidden = w1 is None
    grad_w1 = empty(0) if no_hidden else empty(*w1.shape)
    grad_b1 = empty(0) if no_hidden else empty(m, w1.shape[1])
    return grad_xs, grad_w1, grad_b1, empty(*w2.shape), empty(m, n)


_FORWARD = define("cross_connect", _prepare_forward, _fake_forward)

define("cross_connect_backward", _prepare_backward, _fake_backward)


class _CrossConnect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operators, relu, w1, b1, w2, b2, *xs):
        given = xs[0] if xs else w2  # without paths the operator says so
        outputs, gates, scores, pooled, hidden = below_autograd(operators[0], given, list(xs), w1, b1, w2, b2, relu)
        ctx.relu, ctx.backward_operator = relu, operators[1]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(pooled, hidden)
        ctx.save_for_backward(w1, b1, w2, b2, gates, pooled, hidden, *xs)
        return *outputs, gates, scores, pooled, hidden

    @staticmethod
    def backward(ctx, *grads):
        *grad_outputs, grad_gates, grad_scores, _, _ = grads
        w1, b1, w2, b2, gates, pooled, hidden, *xs = ctx.saved_tensors
        grad_inputs = any(ctx.needs_input_grad[6:])
        grad_outputs = [torch.zeros_like(xs[0]) if grad is None else grad for grad in grad_outputs]
        saved = (xs, w1, b1, w2, b2, gates, pooled, hidden)
        grad_xs, *grad_parameters = below_autograd(
            ctx.backward_operator, xs[0], grad_outputs, grad_gates, grad_scores, *saved, ctx.relu, grad_inputs
        )
        grad_parameters = [
            None if parameter is None else grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype)
            for parameter, grad in zip((w1, b1, w2, b2), grad_parameters, strict=True)
        ]
        return None, None, *grad_parameters, *(grad_xs if grad_inputs else [None] * len(xs))


def _autograd(operators, xs, w1, b1, w2, b2, relu=False):
    *outputs, gates, scores, pooled, hidden = _CrossConnect.apply(operators, relu, w1, b1, w2, b2, *xs)
    return outputs, gates, scores, pooled, hidden


implement_autograd("cross_connect", _autograd)
