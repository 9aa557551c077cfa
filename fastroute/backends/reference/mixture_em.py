"""The mixture-EM loss (Eq. 4.11 to 4.23) and its gradient with the posteriors held constant, equation by equation."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastroute.ops._paths import accumulate_dtype


def _statistics(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return μ and σ of each column, from distances to the first sample, so that a constant column has σ = 0 exactly.

    Distances are divided by the largest, so that no square over- or underflows.
    """
    if a.shape[0] == 0:
        return a.new_zeros(a.shape[1:]), a.new_zeros(a.shape[1:])
    distance = a - a[0]
    unit = distance.detach().abs().amax(0)
    unit = torch.where(unit > 0, unit, 1)
    distance = distance / unit
    shift = distance.mean(0)
    variance = (distance - shift).square().mean(0)
    std = torch.where(variance == 0, 0, torch.where(variance == 0, 1, variance).sqrt())  # sqrt has no derivative at 0
    return a[0] + shift * unit, std * unit  # Eq. 4.11


def _inverse(std: Tensor) -> Tensor:
    """Return 1/σ, or 0 if σ is 0 or so small that its inverse overflows."""
    vanishes = (1 / std.detach()).isinf()
    return torch.where(vanishes, 0, 1 / torch.where(vanishes, 1, std))


def mixture_em_loss(scores, scores_aug, prior, mean, std, gamma):
    views = [a.to(accumulate_dtype(scores.dtype)) for a in (scores, scores_aug) if a is not None]
    prior, mean, std = (None if t is None else t.detach() for t in (prior, mean, std))
    statistics = [_statistics(a) if mean is None else (mean, std) for a in views]
    means = torch.stack([mean for mean, _ in statistics])
    scales = torch.stack([_inverse(std) for _, std in statistics])
    normalized = [(a - mean) * scale for a, mean, scale in zip(views, means, scales, strict=True)]  # Eq. 4.11

    log_prior, logits = 0, normalized[0]
    if prior is not None:
        log_prior = prior.clamp(min=torch.finfo(prior.dtype).tiny).log()  # so that 0 · log 0 is 0
        logits = torch.where(prior > 0, logits + log_prior, -torch.inf)
    posterior = torch.softmax(logits, dim=-1).detach()  # Eq. 4.18, 4.20
    log_joint = sum(log_prior + logsigmoid(a / gamma) for a in normalized)  # Eq. 4.21, 4.23
    loss = -(posterior * log_joint).sum((0, -1)) / max(scores.shape[0], 1)  # Eq. 4.22
    return loss, posterior, means, scales


def mixture_em_loss_backward(scores, scores_aug, posterior, means, scales, grad_loss, gamma, batch_statistics):
    grads = []
    for view, mean, scale in zip((scores, scores_aug), means, scales, strict=False):
        a = (view.to(posterior.dtype) - mean) * scale
        # d/dx of log sigmoid(x) is sigmoid(−x); p is a constant.
        grad = -(grad_loss.unsqueeze(-1) / (gamma * max(view.shape[0], 1))) * posterior * torch.sigmoid(-a / gamma)
        if batch_statistics:  # through μ and σ: remove the components along 1 and along a* from each column
            grad = grad - grad.mean(0) - a * (grad * a).mean(0)
        grads.append((grad * scale).to(view.dtype))
    return grads[0], grads[1] if scores_aug is not None else scores.new_empty(0)
