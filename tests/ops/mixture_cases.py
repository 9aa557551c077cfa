"""Scores, statistics and priors of the mixture-EM loss, and the loss written plainly."""

import torch
from torch.nn.functional import logsigmoid

from fastroute import ops
from tests.ops.cases import assert_as_good_as_eager


def eager_loss(scores, gamma, prior, mean, std, scores_aug, posterior=None):
    """Eq. 4.11 to 4.23 as a user of PyTorch would write them; a given posterior is the constant of the gradient."""
    views = [a if a.dtype == torch.float64 else a.float() for a in (scores, scores_aug) if a is not None]

    def normalize(a):
        if mean is not None:
            return (a - mean) / std
        return (a - a.mean(0)) / a.std(0, correction=0)

    normalized = [normalize(a) for a in views]
    log_prior = torch.zeros(()) if prior is None else prior.log()
    if posterior is None:
        posterior = torch.softmax(normalized[0] + log_prior, -1).detach()
    joint = sum(log_prior + logsigmoid(a / gamma) for a in normalized)
    return -(posterior * joint).sum(-1).mean(0), posterior


def draw(*shape, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def make_case(shape, dtype=torch.float32, priors=False, statistics=False, augmented=False, seed=0):
    """scores, gamma, prior, mean, std, scores_aug; each column has a mean and a spread of its own."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    spread, shift = draw(*shape[1:], seed=seed + 1).exp(), draw(*shape[1:], seed=seed + 2)
    scores, scores_aug = (
        (draw(*shape, seed=s) * spread + shift).to(dtype) if s is not None else None
        for s in (seed + 3, seed + 4 if augmented else None)
    )
    prior = draw(*shape[1:], seed=seed + 5).softmax(-1).to(precise) if priors else None
    mean, std = (shift.to(precise), spread.to(precise)) if statistics else (None, None)
    return scores, 5.0, prior, mean, std, scores_aug


def differentiate(function, case, dtype=None):
    scores, gamma, *rest, scores_aug = [t.to(dtype) if dtype and isinstance(t, torch.Tensor) else t for t in case]
    leaves = [None if t is None else t.clone().requires_grad_() for t in (scores, scores_aug)]
    loss, posterior = function(leaves[0], gamma, *rest, leaves[1])
    incoming = torch.arange(1.0, 1 + loss.numel(), device=loss.device).reshape(loss.shape)
    grads = torch.autograd.grad(loss, [t for t in leaves if t is not None], incoming.to(loss.dtype))
    return [loss.detach(), posterior, *grads]


def check(case):
    """Loss, posterior and gradients of the operator, held to the rule."""
    results = differentiate(ops.mixture_em_loss, case)
    assert_as_good_as_eager(results, differentiate(eager_loss, case), differentiate(eager_loss, case, torch.float64))
    return results
