"""The cross-path weighted sum (Eq. 3.7, 3.8) with given gates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastroute.ops._library import below_autograd, call, define, implement_autograd
from fastroute.ops._paths import (
    MAX_PATHS,
    accumulate_dtype,
    align_like,
    align_paths,
    align_saved,
    check_paths,
    check_tensors,
    check_weight,
    empty_path,
    path_list,
)


def mix(xs: Sequence[Tensor], gates: Tensor) -> list[Tensor]:
    """Mix m parallel tensors into n by given weights: Y_j = Σ_i gates[…, i, j] X_i (Eq. 3.7; in matrix form Eq. 3.8).

    Args:
        xs: m tensors (N, C, *S), 1 ≤ m ≤ 8, of one shape, dtype, device and memory format, as for `cross_connect`.
        gates: (N, m, n), one matrix per sample, or (m, n), one for all samples, as in a cross-stitch unit; 1 ≤ n ≤ 8;
            in the paths' dtype or float32, so that bfloat16 paths under autocast can have float32 gates.

    Returns:
        n tensors (N, C, *S) of the paths' dtype and layout. Differentiable in xs and gates.

    Raises:
        TypeError: xs is not a list of floating-point tensors of one dtype, or gates have another dtype.
        ValueError: shapes, devices or memory formats do not match, or there are more than 8 paths.
        RuntimeError: the selected backend does not support these tensors.

    Example:
        >>> xs = [torch.full((4, 8), 1.0), torch.full((4, 8), 3.0)]
        >>> [mean] = mix(xs, torch.tensor([[0.5], [0.5]]))
        >>> mean.shape, mean[0, 0].item()
        (torch.Size([4, 8]), 2.0)
    """
    check_tensors(gates=gates)
    return call(_FORWARD, path_list("xs", xs), gates)


def _prepare_forward(xs, gates):
    check_paths("xs", xs)
    batch, m = xs[0].shape[0], len(xs)
    n = gates.shape[-1] if gates.dim() else 0
    if gates.dim() not in (2, 3) or not 1 <= n <= MAX_PATHS:
        raise ValueError(
            f"gates have shape {tuple(gates.shape)}; "
            f"they must be (N, m, n) = ({batch}, {m}, n) or (m, n) with n from 1 to {MAX_PATHS}"
        )
    check_weight("gates", gates, (m, n) if gates.dim() == 2 else (batch, m, n), xs[0])
    return align_paths("xs", xs), gates


def _fake_forward(xs, gates):
    return [empty_path(xs[0]) for _ in range(gates.shape[-1])]


def _prepare_backward(grad_outputs, xs, gates, grad_inputs):
    xs = align_saved(xs)
    return align_like(grad_outputs, xs[0]), xs, gates, grad_inputs


def _fake_backward(grad_outputs, xs, gates, grad_inputs):
    grad_xs = [empty_path(x) for x in xs] if grad_inputs else []
    return grad_xs, gates.new_empty(gates.shape, dtype=accumulate_dtype(xs[0].dtype))


_FORWARD = define("mix", _prepare_forward, _fake_forward)

define("mix_backward", _prepare_backward, _fake_backward)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operators, gates, *xs):
        outputs = below_autograd(operators[0], gates, list(xs), gates)
        ctx.backward_operator = operators[1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gates, *xs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grad_outputs):
        gates, *xs = ctx.saved_tensors
        grad_inputs = any(ctx.needs_input_grad[2:])
        grad_outputs = [torch.zeros_like(xs[0]) if grad is None else grad for grad in grad_outputs]
        grad_xs, grad_gates = below_autograd(ctx.backward_operator, gates, grad_outputs, xs, gates, grad_inputs)
        return None, grad_gates.to(gates.dtype), *(grad_xs if grad_inputs else [None] * len(xs))


implement_autograd("mix", lambda operators, xs, gates: list(_Mix.apply(operators, gates, *xs)))
