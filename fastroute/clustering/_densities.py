"""Distributions of clusters as functions of their relevance scores, and the EM loss with them (Eq. 4.12, 4.22)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fastroute.nn import MixtureEMLoss, RelevanceNorm
from fastroute.ops import MixtureEM

DENSITIES = ("sigmoid", "gaussian")


def log_density(normalized: Tensor, density: str, gamma: float) -> Tensor:
    """Return log h for normalised scores a*."""
    z = normalized / gamma
    return logsigmoid(z) if density == "sigmoid" else -(z - 2).square() / 2


class DensityEMLoss(nn.Module):
    """The loss of `MixtureEMLoss` with another density than the sigmoid, for scores (N, K).

    Args:
        density: one of `DENSITIES`.
        gamma: γ of Eq. 4.12.
    """

    def __init__(self, density: str, gamma: float):
        super().__init__()
        self.density, self.gamma = density, gamma

    def forward(self, scores: Tensor, scores_aug: Tensor | None = None, prior: Tensor | None = None) -> MixtureEM:
        norm = RelevanceNorm(scores.shape[1], training_statistics="batch", device=scores.device, dtype=scores.dtype)
        log_prior = 0 if prior is None else prior.clamp(min=torch.finfo(prior.dtype).tiny).log()
        normalized = norm(scores)
        posterior = torch.softmax(normalized.detach() + log_prior, 1)
        parts = [normalized] if scores_aug is None else [normalized, norm(scores_aug)]
        joint = sum(log_prior + log_density(part, self.density, self.gamma) for part in parts)
        return MixtureEM(-(posterior * joint).sum(1).mean(), posterior)


def em_loss(density: str, gamma: float) -> nn.Module:
    """Return the criterion with a density: for the sigmoid, the fused operator."""
    return MixtureEMLoss(gamma) if density == "sigmoid" else DensityEMLoss(density, gamma)
