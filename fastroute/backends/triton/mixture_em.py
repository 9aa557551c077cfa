"""The mixture-EM loss (Eq. 4.11 to 4.23) and its gradient: one launch each, with one program per mixture.

A batch of scores is small, 5 KB for 128 samples of 10 clusters, and each mixture's statistics need all of it. A program
rereads its columns from cache, and programs do not wait for each other.
"""

import torch
import triton
import triton.language as tl

from fastroute.backends.triton import planning
from fastroute.backends.triton._recording import launch


@triton.jit
def load_samples(values, first, samples, stride, inside, BN: tl.constexpr, BK: tl.constexpr):
    """Return offsets, mask and float32 values [N, K] of BN samples of a mixture, from `first`."""
    n = first + tl.arange(0, BN)
    offsets = n.to(tl.int64)[:, None] * stride + tl.arange(0, BK)[None, :]
    mask = (n < samples)[:, None] & inside[None, :]
    return offsets, mask, tl.load(values + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def inverse(sigma):
    """Return 1/σ, or 0 if σ is 0 or so small that its inverse overflows."""
    scale = 1 / sigma
    return tl.where(scale == float("inf"), 0.0, scale)


@triton.jit
def column_statistics(values, samples, stride, weight, inside, BN: tl.constexpr, BK: tl.constexpr):
    """Return μ and 1/σ of each column, with 1/σ = 0 if σ = 0 (Eq. 4.11).

    The sums are over distances to the first sample, so that a constant column has σ = 0 exactly. Distances are divided
    by a power of two near the largest, so that no square over- or underflows.
    """
    start = tl.load(values + tl.arange(0, BK), mask=inside, other=0.0).to(tl.float32)  # [K]
    far = tl.zeros([BN, BK], tl.float32)
    for first in range(0, samples, BN):
        _, mask, x = load_samples(values, first, samples, stride, inside, BN, BK)
        far = tl.maximum(far, tl.where(mask, tl.abs(x - start[None, :]), 0.0))
    # Exponent bits of a power of two whose inverse is a normal number too. NaN propagates through the sums.
    exponent = tl.max(far, 0).to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 0x00800000), 0x7E800000)
    unit, per_unit = exponent.to(tl.float32, bitcast=True), (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    total = tl.zeros([BN, BK], tl.float32)
    for first in range(0, samples, BN):
        _, mask, x = load_samples(values, first, samples, stride, inside, BN, BK)
        total += tl.where(mask, (x - start[None, :]) * per_unit[None, :], 0.0)
    shift = tl.sum(total, 0) * weight
    total = tl.zeros([BN, BK], tl.float32)
    for first in range(0, samples, BN):
        _, mask, x = load_samples(values, first, samples, stride, inside, BN, BK)
        d = tl.where(mask, (x - start[None, :]) * per_unit[None, :] - shift[None, :], 0.0)
        total += d * d
    variance = tl.sum(total, 0) * weight
    return start + shift * unit, inverse(tl.sqrt(variance) * unit)


@triton.jit
def mixture_em_fwd_kernel(
    views,
    prior,
    mean,
    std,
    loss,
    posterior,
    means,
    scales,
    samples,
    clusters,
    weight,
    over_gamma,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    mixture = tl.program_id(0)
    stride = tl.num_programs(0) * clusters
    own = mixture * clusters
    column = tl.arange(0, BK)
    inside = column < clusters
    mus, rhos = (), ()
    for v in tl.static_range(len(views)):
        if mean is None:
            mu, rho = column_statistics(views[v] + own, samples, stride, weight, inside, BN, BK)
        else:
            mu = tl.load(mean + own + column, mask=inside, other=0.0)
            sigma = tl.load(std + own + column, mask=inside, other=0.0)
            rho = inverse(sigma)
        tl.store(means + v * stride + own + column, mu, mask=inside)
        tl.store(scales + v * stride + own + column, rho, mask=inside)
        mus += (mu,)
        rhos += (rho,)
    log_prior, possible = tl.zeros([BK], tl.float32), inside
    if prior is not None:
        pi = tl.load(prior + own + column, mask=inside, other=0.0)
        possible = pi > 0
        log_prior += tl.log(tl.maximum(pi, 1.1754944e-38))  # so that 0 · log 0 is 0
    total = tl.zeros([BN], tl.float32)
    for first in range(0, samples, BN):
        at, mask, x = load_samples(views[0] + own, first, samples, stride, inside, BN, BK)
        a = (x - mus[0][None, :]) * rhos[0][None, :]  # Eq. 4.11
        logits = tl.where(possible[None, :], a + log_prior[None, :], float("-inf"))
        p = tl.exp(logits - tl.max(logits, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]  # Eq. 4.18, 4.20
        tl.store(posterior + own + at, p, mask=mask)
        joint = tl.zeros([BN, BK], tl.float32)
        for v in tl.static_range(len(views)):
            if v > 0:
                _, _, x = load_samples(views[v] + own, first, samples, stride, inside, BN, BK)
                a = (x - mus[v][None, :]) * rhos[v][None, :]
            z = a * over_gamma
            joint += log_prior[None, :] + tl.minimum(z, 0.0) - tl.log(1 + tl.exp(-tl.abs(z)))  # Eq. 4.21, 4.23
        total += tl.sum(tl.where(mask, p * joint, 0.0), 1)
    tl.store(loss + mixture, -weight * tl.sum(total, 0))  # Eq. 4.22


@triton.jit
def score_gradient(
    values, posterior, mu, rho, factor, over_gamma, first, samples, stride, inside, BN: tl.constexpr, BK: tl.constexpr
):
    """Return offsets, mask, a* and dL/da* = −p sigmoid(−a*/γ) / (N γ) of BN samples, with p constant; 0 if masked."""
    at, mask, x = load_samples(values, first, samples, stride, inside, BN, BK)
    _, _, p = load_samples(posterior, first, samples, stride, inside, BN, BK)
    a = (x - mu[None, :]) * rho[None, :]
    return at, mask, a, factor * p / (1 + tl.exp(a * over_gamma))


@triton.jit
def mixture_em_bwd_kernel(
    views,
    grads,
    posterior,
    means,
    scales,
    grad_loss,
    samples,
    clusters,
    weight,
    over_gamma,
    BATCH_STATISTICS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    mixture = tl.program_id(0)
    stride = tl.num_programs(0) * clusters
    own = mixture * clusters
    column = tl.arange(0, BK)
    inside = column < clusters
    factor = -tl.load(grad_loss + mixture) * weight * over_gamma
    p = posterior + own
    for v in tl.static_range(len(views)):
        x = views[v] + own
        mu = tl.load(means + v * stride + own + column, mask=inside, other=0.0)
        rho = tl.load(scales + v * stride + own + column, mask=inside, other=0.0)
        along_one, along_a = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
        if BATCH_STATISTICS:  # through μ and σ: remove these components from each column
            ones, products = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BK], tl.float32)
            for first in range(0, samples, BN):
                _, _, a, d = score_gradient(x, p, mu, rho, factor, over_gamma, first, samples, stride, inside, BN, BK)
                ones += d
                products += d * a
            along_one, along_a = tl.sum(ones, 0) * weight, tl.sum(products, 0) * weight
        for first in range(0, samples, BN):
            at, mask, a, d = score_gradient(x, p, mu, rho, factor, over_gamma, first, samples, stride, inside, BN, BK)
            tl.store(grads[v] + own + at, (d - along_one[None, :] - a * along_a[None, :]) * rho[None, :], mask=mask)


def _settings(scores: torch.Tensor) -> dict[str, int]:
    return planning.mixture(scores.shape[0], scores.shape[-1])


def mixture_em_loss(scores, scores_aug, prior, mean, std, gamma):
    views = (scores,) if scores_aug is None else (scores, scores_aug)
    columns = scores.shape[1:]
    loss = scores.new_empty(columns[:-1], dtype=torch.float32)
    posterior = scores.new_empty(scores.shape, dtype=torch.float32)
    means, scales = (scores.new_empty((len(views), *columns), dtype=torch.float32) for _ in range(2))
    if scores.shape[0] == 0:
        return loss.zero_(), posterior, means.zero_(), scales.zero_()
    with torch.cuda.device_of(scores):
        launch(mixture_em_fwd_kernel, (loss.numel(),))(
            views,
            prior,
            mean,
            std,
            loss,
            posterior,
            means,
            scales,
            scores.shape[0],
            scores.shape[-1],
            1 / scores.shape[0],
            1 / gamma,
            **_settings(scores),
        )
    return loss, posterior, means, scales


def mixture_em_loss_backward(scores, scores_aug, posterior, means, scales, grad_loss, gamma, batch_statistics):
    views = (scores,) if scores_aug is None else (scores, scores_aug)
    grads = tuple(torch.empty_like(view) for view in views)
    if scores.shape[0] > 0:
        with torch.cuda.device_of(scores):
            launch(mixture_em_bwd_kernel, (grad_loss.numel(),))(
                views,
                grads,
                posterior,
                means,
                scales,
                grad_loss,
                scores.shape[0],
                scores.shape[-1],
                1 / scores.shape[0],
                1 / gamma,
                BATCH_STATISTICS=batch_statistics,
                **_settings(scores),
            )
    return grads[0], grads[1] if scores_aug is not None else scores.new_empty(0)
