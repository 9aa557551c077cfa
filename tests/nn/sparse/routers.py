"""Sparse routers to test, and what they compute by definition."""

import torch
from torch import nn

from fastroute.nn import SparseRouter

GATES = ["straight_through", "renormalized", "softmax"]


def convs(n, channels=6, out=5, **options):
    return [nn.Conv2d(channels, out, 3, padding=1, **options) for _ in range(n)]


def spread(router):
    """Return a gate whose scores differ enough between samples to use every path."""
    nn.init.normal_(router.w2, std=3.0)
    if router.b2 is not None:
        nn.init.normal_(router.b2, std=0.1)
    return router


def dense(router, x):
    """Compute every path on every sample, weighted by the gates of the definition."""
    hidden = x.flatten(2).mean(-1)
    if router.w1 is not None:
        hidden = torch.relu(hidden @ router.w1.T + (0 if router.b1 is None else router.b1))
    scores = hidden @ router.w2.T + (0 if router.b2 is None else router.b2)
    top = scores >= scores.sort(descending=True).values[:, router.top_k - 1, None]
    gates = (scores / router.temperature).softmax(1) * top
    if router.gates != "softmax":
        gates = gates / gates.sum(1, keepdim=True)
    return weighted(gates, router, x), gates


def weighted(gates, router, x):
    return sum(g[:, None, None, None] * path(x) for g, path in zip(gates.unbind(1), router.paths, strict=True))


def clustered(top_k=1, n=4, **options):
    torch.manual_seed(0)
    return spread(SparseRouter(6, convs(n), top_k, routing="cluster", **options))
