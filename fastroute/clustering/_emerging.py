"""Clusters that emerge in a stream of samples, and those that run dry."""

import math

import torch
from torch import Tensor

# A sample fits a cluster if its squared distance from the centre is at most this many standard deviations above the
# mean of the squared distances of the cluster's samples. In a plane, 0.7 % of a Gaussian's samples are farther away.
REACH = 4.0
MOST_COMPARED = 4096  # the most samples between all of which distances are computed
# Samples that fit no cluster and lie together form a new one if they are at least this share of a part, and this many.
LEAST_SHARE, LEAST_NUMBER = 0.02, 10
# The places of clusters are moving averages over some 10 parts. Later, only samples that fit a cluster move it.
PLACE_MOMENTUM, SETTLED = 0.1, 10
# A cluster has run dry after this many parts in a row without a sample that fits it.
PATIENCE = 3


class Places:
    """Where the samples of each of K clusters lie: their centres, and mean and variance of the squared distances.

    Attributes:
        seen: (K,), the number of parts in which a cluster had samples.
        center: (K, D).
        mean, variance: (K,), of the squared distances from the centre.
        missed: (K,), the number of last parts in a row in which no sample fitted a cluster.
    """

    def __init__(self, clusters: int, features: int, like: Tensor):
        self.seen, self.missed = torch.zeros(2, clusters, dtype=torch.long)
        self.center = like.new_zeros(clusters, features)
        self.mean, self.variance = like.new_zeros(clusters), like.new_zeros(clusters)

    def add(self, k: int) -> None:
        """Make room for a fresh cluster of number k, at most K."""
        if k == len(self.seen):
            for name, value in vars(self).items():
                setattr(self, name, torch.cat([value, value.new_zeros(1, *value.shape[1:])]))
        self.seen[k] = self.missed[k] = 0

    def follow(self, x: Tensor, labels: Tensor, weight: Tensor) -> None:
        """Move the places towards samples (N, D) with the numbers of their clusters (N,) and weights (N,)."""
        nearest, weight = self._nearest(x), weight.to(x.dtype)
        for k in labels.unique().tolist():
            # A cluster whose group is gone is given samples of others: they must not move it.
            chosen = (labels == k) & ((nearest == k) | (self.seen[k] < SETTLED))
            if not chosen.any():
                continue
            mine, share = x[chosen], weight[chosen] / weight[chosen].sum()
            self.seen[k] += 1
            rate = max(1 / self.seen[k].item(), PLACE_MOMENTUM)
            self.center[k].lerp_(share @ mine, rate)
            distance = (mine - self.center[k]).square().sum(1)
            self.mean[k].lerp_(share @ distance, rate)
            self.variance[k].lerp_(share @ (distance - self.mean[k]).square(), rate)

    def _reach(self) -> Tensor:
        return self.mean + REACH * self.variance.sqrt()

    def _nearest(self, x: Tensor) -> Tensor:
        """Return the nearest cluster of each sample, by its reach; -1 where none reaches it."""
        distance = torch.cdist(x, self.center).square() / self._reach()
        nearest = distance.masked_fill(self.seen == 0, torch.inf).nan_to_num(torch.inf).min(1)
        return torch.where(nearest.values <= 1, nearest.indices, -1)

    def dry(self, x: Tensor) -> list[int]:
        """Return the clusters that have run dry with the samples (N, D) of a part, and forget them."""
        nearest = self._nearest(x)
        fitted = torch.bincount(nearest[nearest >= 0], minlength=len(self.seen)) > 0
        self.missed = torch.where(fitted | (self.seen == 0), 0, self.missed + 1)
        gone = self.missed >= PATIENCE
        self.seen[gone] = self.missed[gone] = 0
        return gone.nonzero().flatten().tolist()

    def strangers(self, x: Tensor, weight: Tensor) -> list[Tensor]:
        """Return the indices of the samples of each group that fits no cluster, the largest first.

        Args:
            x: (N, D).
            weight: (N,), the number of samples that each one counts as.
        """
        outside, weight = (self._nearest(x) < 0).nonzero().flatten(), weight.to(x.dtype)
        reach = self._reach()[self.seen > 0].median()  # of the cluster of median size
        groups: list[Tensor] = []

        def enough(samples: Tensor) -> bool:  # a single one has no spread, whatever its weight
            return len(samples) >= LEAST_NUMBER and bool(weight[samples].sum() >= LEAST_SHARE * weight.sum())

        while enough(outside):
            # The samples within reach of the mean of a group: the sample with the most others within its reach, and
            # these.
            some = outside[:: math.ceil(len(outside) / MOST_COMPARED)]
            distance = torch.cdist(x[some], x[some]).square()
            near = (distance <= reach).to(x.dtype) * weight[some]
            best = near[near.sum(1).argmax()]
            center = best @ x[some] / best.sum()
            together = (x[outside] - center).square().sum(1) <= reach
            if not enough(outside[together]):
                break
            groups.append(outside[together])
            outside = outside[~together]
        return groups
