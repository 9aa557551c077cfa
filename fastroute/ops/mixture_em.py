"""The mixture-EM loss of a neural mixture model, which clusters by a network's relevance scores (§4.4)."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastroute.ops._library import below_autograd, call, define, differentiate, implement_autograd, under_transform
from fastroute.ops._paths import DTYPES, accumulate_dtype, check_tensors
from fastroute.ops._results import exportable

MAX_CLUSTERS = 1024


@exportable
class MixtureEM(NamedTuple):
    """Result of `mixture_em_loss`, which documents the shapes."""

    loss: Tensor
    posterior: Tensor


def mixture_em_loss(
    scores: Tensor,
    gamma: float = 5.0,
    prior: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    scores_aug: Tensor | None = None,
) -> MixtureEM:
    """Compute the loss of one EM step for the relevance scores a of N samples to K clusters, and the posteriors p.

        a*_ij = (a_ij − μ_j) / σ_j                                   (Eq. 4.11)
        p_ij  = softmax_j(a*_ij + log π_j)                           (Eq. 4.18, 4.20)
        loss  = −1/N Σ_i Σ_j p_ij (log π_j + log sigmoid(a*_ij / γ))   (Eq. 4.22)

    Without a prior, the terms in log π are left out. With augmented scores, the loss is the sum of two such terms, both
    with the posteriors of the original scores (Eq. 4.23). Scores (N, m, K) belong to m gates: each is a separate
    mixture with its own loss.

    | argument | shape | type |
    |---|---|---|
    | scores | (N, K) or (N, m, K), 1 ≤ K ≤ 1024 | float32, bfloat16, float16, float64 |
    | gamma | number, greater than 0 | |
    | prior | π: (K,) or (m, K), each ≥ 0, with sum 1 over K; None is the even prior | the scores' or float32 |
    | mean, std | μ, σ ≥ 0: (K,) or (m, K); None is the batch's own | the scores' or float32 |
    | scores_aug | scores of the augmented samples, shaped as scores | the scores' |

    Batch statistics follow Eq. 4.11, σ with 1/N; the augmented scores have their own. Given statistics are used for
    both. A column with σ = 0 carries no information: its a* and its gradient are 0.

    The gradient flows to scores and scores_aug, with p held constant (§4.4.2). It also flows through batch statistics,
    and then sums to 0 over each column. Given statistics and the prior are constants.

    Returns:
        loss: () for scores (N, K), (m,) for (N, m, K); 0 if N = 0. The order of summation is fixed, so the loss is
            bitwise reproducible.
        posterior: p, in the shape of scores; not differentiable. Both are float32 for half-precision scores.

    Raises:
        TypeError: a tensor has an unsupported dtype.
        ValueError: shapes or devices do not match, gamma is not positive, mean is given without std, or, for tensors on
            the CPU, the prior is not a distribution or std is negative. On a GPU that check would synchronise.
        RuntimeError: a second derivative is requested, or the selected backend does not support these tensors.

    Example:
        >>> scores = torch.randn(128, 10, requires_grad=True)
        >>> loss, posterior = mixture_em_loss(scores)
        >>> loss.backward()
        >>> loss.shape, posterior.shape
        (torch.Size([]), torch.Size([128, 10]))
    """
    check_tensors(scores=scores)
    loss, posterior, _, _ = call(_FORWARD, scores, scores_aug, prior, mean, std, gamma)
    return MixtureEM(loss, posterior)


def _check_scores(name: str, scores: Tensor) -> None:
    if scores.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} has dtype {scores.dtype}; it must be one of {names}")
    shape = scores.shape
    if len(shape) not in (2, 3) or not 1 <= shape[-1] <= MAX_CLUSTERS or shape[1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(shape)}; "
            f"it must be (N, K), or (N, m, K) for m gates, with K from 1 to {MAX_CLUSTERS}"
        )


def _per_column(name: str, value: Tensor, scores: Tensor) -> Tensor:
    """Return one number per cluster in the form that all backends take: contiguous, in the accumulation dtype."""
    shape = scores.shape[1:]
    if value.shape != shape and value.shape != shape[-1:]:
        allowed = " or ".join(dict.fromkeys((str(tuple(shape[-1:])), str(tuple(shape)))))
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must have shape {allowed}")
    if value.device != scores.device:
        raise ValueError(f"{name} is on {value.device}; it must be on the device of the scores, {scores.device}")
    if value.dtype != torch.float32 and value.dtype != scores.dtype:
        allowed = " or ".join(dict.fromkeys((str(scores.dtype), "torch.float32")))
        raise TypeError(f"{name} has dtype {value.dtype}; it must be {allowed} for scores of {scores.dtype}")
    return value.to(accumulate_dtype(scores.dtype)).expand(shape).contiguous()


def _is_readable(value: Tensor) -> bool:
    """Return whether values can be read without synchronising: not on a GPU, in a compiler or under a transform."""
    return value.device.type == "cpu" and type(value) is Tensor and not under_transform()


def _check_prior(prior: Tensor, dtype: torch.dtype) -> None:
    """Check a prior, whose sum may be off by the rounding of the scores' type, in which it may have been given."""
    tolerance = max(1e-3, torch.finfo(dtype).eps)
    for row in prior.reshape(-1, prior.shape[-1]).tolist():
        if not (min(row) >= 0 and abs(sum(row) - 1) <= tolerance):
            raise ValueError(f"prior is {row}; it must be numbers from 0 on with sum 1")


def _prepare_forward(scores, scores_aug, prior, mean, std, gamma):
    _check_scores("scores", scores)
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma is {gamma}; it must be greater than 0")
    if scores_aug is not None:
        for what in ("shape", "dtype", "device"):
            ours, theirs = getattr(scores_aug, what), getattr(scores, what)
            if ours != theirs:
                error = TypeError if what == "dtype" else ValueError
                ours, theirs = (tuple(value) if what == "shape" else value for value in (ours, theirs))
                raise error(f"scores_aug has {what} {ours}; it must have the {what} of scores, {theirs}")
        scores_aug = scores_aug.contiguous()
    if (mean is None) != (std is None):
        given, absent = ("mean", "std") if std is None else ("std", "mean")
        raise ValueError(f"{given} is given without {absent}; both are needed, or neither")
    if mean is not None:
        mean, std = _per_column("mean", mean, scores), _per_column("std", std, scores)
        if _is_readable(std) and std.min() < 0:
            raise ValueError(f"std is {std.tolist()}; it must be 0 or greater")
    if prior is not None:
        prior = _per_column("prior", prior, scores)
        if _is_readable(prior):
            _check_prior(prior, scores.dtype)
    return scores.contiguous(), scores_aug, prior, mean, std, gamma


def _fake_forward(scores, scores_aug, prior, mean, std, gamma):
    def empty(*shape):
        return scores.new_empty(shape, dtype=accumulate_dtype(scores.dtype))

    statistics = 1 if scores_aug is None else 2, *scores.shape[1:]
    return empty(*scores.shape[1:-1]), empty(*scores.shape), empty(*statistics), empty(*statistics)


def _prepare_backward(scores, scores_aug, posterior, means, scales, grad_loss, *rest):
    scores_aug = None if scores_aug is None else scores_aug.contiguous()
    return scores.contiguous(), scores_aug, posterior.contiguous(), means, scales, grad_loss.contiguous(), *rest


def _fake_backward(scores, scores_aug, *rest):
    def empty_like(t):
        return scores.new_empty(0) if t is None else scores.new_empty(t.shape)

    return empty_like(scores), empty_like(scores_aug)


_FORWARD = define("mixture_em_loss", _prepare_forward, _fake_forward)

define("mixture_em_loss_backward", _prepare_backward, _fake_backward)


class _MixtureEMLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operators, scores, scores_aug, prior, mean, std, gamma):
        loss, posterior, means, scales = below_autograd(
            operators[0], scores, scores, scores_aug, prior, mean, std, gamma
        )
        ctx.backward_operator = operators[1]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(posterior, means, scales)
        ctx.save_for_backward(scores, scores_aug, posterior, means, scales)
        ctx.gamma, ctx.batch_statistics = gamma, mean is None
        return loss, posterior, means, scales

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * 7
        scores, *saved = ctx.saved_tensors
        grad_scores, grad_aug = below_autograd(
            ctx.backward_operator, scores, scores, *saved, grad_loss, ctx.gamma, ctx.batch_statistics
        )
        return None, grad_scores, grad_aug if ctx.needs_input_grad[2] else None, None, None, None, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "mixture_em_loss has no second derivative: its gradient holds the posteriors constant, and they are not"
    )


implement_autograd("mixture_em_loss", lambda *args: _MixtureEMLoss.apply(*args))
differentiate("mixture_em_loss_backward", _no_second_derivative)
