"""Statistics of router decisions, accumulated over samples."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute.nn.router import Routing
from fastroute.nn.sparse import SparseRouting

DEAD = 0.05
"""A gate is dead if it exceeds this value for no image."""

ROUNDING = 1e-6
"""Relative difference from an even share that is rounding: a third in float32 is above a third."""


@dataclass
class RouterStatistics:
    """Sums of one router's decisions over samples, on the router's device.

    samples: the number of samples.
    gates: (m, n), sums of g_ij.
    shares: (m, n), sums of g_ij over the sum of row i, which is not 1 in sparse routers with `gates="softmax"`; 0 where
        the row is.
    entropy: (m,), sums of the entropy of these shares of row i, as a share of ln n, the entropy of even gates.
    wins: (m, n), how often g_ij is the largest of row i.
    load: (m, n), how often g_ij is not 0: the samples that path j computes, if the router is sparse.
    peak, trough: (m, n), the largest and the smallest g_ij.
    """

    samples: int
    gates: Tensor
    shares: Tensor
    entropy: Tensor
    wins: Tensor
    load: Tensor
    peak: Tensor
    trough: Tensor

    def __repr__(self) -> str:
        m, n = self.gates.shape
        return f"RouterStatistics({self.samples:,} samples, {m}×{n} gates, mean {self.mean_gates.tolist()})"

    @classmethod
    def of(cls, routing: Routing | SparseRouting) -> "RouterStatistics":
        """Return the statistics of the routing of a batch.

        Example:
            >>> gates = torch.tensor([[[0.9, 0.1]], [[0.7, 0.3]]])
            >>> RouterStatistics.of(Routing(gates, gates)).mean_gates
            tensor([[0.8000, 0.2000]])
        """
        gates = routing.gates.detach().float()
        if gates.dim() == 2:  # a sparse router has one incoming path
            gates = gates[:, None]
        shape, n = gates.shape[1:], gates.shape[2]
        shares = gates / gates.sum(2, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
        entropy = torch.special.entr(shares).sum(2) / math.log(n) if n > 1 else torch.ones_like(gates[..., 0])
        kept = gates.amax(2, keepdim=True) > 0  # a sparse router may drop samples, whose gates are 0
        wins = (F.one_hot(gates.argmax(2), n) * kept).sum(0)
        # For no samples, the neutral elements of maximum and minimum.
        peak, trough = (gates.amax(0), gates.amin(0)) if len(gates) else (gates.new_zeros(shape), gates.new_ones(shape))
        load = (gates > 0).sum(0)
        return cls(len(gates), gates.sum(0), shares.sum(0), entropy.sum(0), wins, load, peak, trough)

    def __add__(self, other: "RouterStatistics") -> "RouterStatistics":
        summed = ("samples", "gates", "shares", "entropy", "wins", "load")
        sums = (getattr(self, name) + getattr(other, name) for name in summed)
        return RouterStatistics(*sums, torch.maximum(self.peak, other.peak), torch.minimum(self.trough, other.trough))

    def cpu(self) -> "RouterStatistics":
        """Return the statistics in float64 on the CPU."""
        tensors = (self.gates, self.shares, self.entropy, self.wins, self.load, self.peak, self.trough)
        return RouterStatistics(self.samples, *(t.double().cpu() for t in tensors))

    @property
    def mean_gates(self) -> Tensor:
        """(m, n): the mean of each gate over the samples."""
        return self.gates / self.samples

    @property
    def mean_entropy(self) -> Tensor:
        """(m,): the mean entropy of each gating vector, 0 to 1, the entropy of even gates."""
        return self.entropy / self.samples

    @property
    def shares_of_maximum(self) -> Tensor:
        """(m, n): the share of samples for which g_ij is the largest gate of path i."""
        return self.wins / self.samples

    @property
    def shares_of_samples(self) -> Tensor:
        """(m, n): the share of samples that path j computes: 1 for soft routers, on average k / n for sparse ones."""
        return self.load / self.samples

    @property
    def used_paths(self) -> Tensor:
        """(m,): exp H(E g_i), the effective number of outgoing paths that path i feeds: 1 to n.

        Gates that do not sum to 1 count by their shares of the sum.
        """
        return torch.special.entr(self.shares / self._routed[:, None]).sum(1).exp()

    @property
    def effective_clusters(self) -> Tensor:
        """(m,): exp(H(E g_i) - E H(g_i)), the effective number of clusters that the gates of path i separate: 1 to n.

        The exponent is the mutual information of the sample and the outgoing path. Gates that are the same for every
        sample give one cluster, however even they are; one-hot gates give as many as the paths they use.
        """
        return self.used_paths / (self.entropy / self._routed * math.log(self.gates.shape[1])).exp()

    @property
    def _routed(self) -> Tensor:
        """(m,): the number of samples with a gate above 0, which a sparse router with a capacity may drop."""
        return self.shares.sum(1).clamp_min(torch.finfo(self.shares.dtype).tiny)

    @property
    def never_above(self) -> Tensor:
        """(m, n): whether a gate exceeds its even share, 1/n, for no sample (Figure 5.1); False if n = 1."""
        n = self.peak.shape[1]
        return (self.peak <= (1 + ROUNDING) / n) & (n > 1)

    @property
    def never_below(self) -> Tensor:
        """(m, n): whether a gate falls below its even share, 1/n, for no sample (Figure 5.1); False if n = 1."""
        n = self.trough.shape[1]
        return (self.trough >= (1 - ROUNDING) / n) & (n > 1)

    @property
    def dead_fraction(self) -> float:
        """Share of the m·n gates that are dead; see `DEAD`."""
        return (self.peak < DEAD).double().mean().item()


def needed_paths(gates: Tensor) -> Tensor:
    """Compute the number of paths that a router's gates need, from how they vary between samples.

    K clusters of samples, each with its own gates, span K - 1 directions. The number of paths is therefore one more
    than the effective rank of the gates' covariance over the samples, the exponential of its eigenvalues' entropy (Roy
    & Vetterli 2007). It does not depend on the size of the differences. Gates that are the same for every sample need
    one path.

    Args:
        gates: (N, m, n).

    Returns:
        (m,) float64, for each incoming path a number from 1 to n.

    Example:
        >>> needed_paths(torch.full((8, 1, 3), 1 / 3))
        tensor([1.], dtype=torch.float64)
    """
    gates = gates.double()
    centred = gates - gates.mean(0)
    variances = torch.linalg.eigvalsh(torch.einsum("sij,sik->ijk", centred, centred) / max(len(gates), 1)).clamp_min(0)
    total = variances.sum(1, keepdim=True)
    rank = torch.special.entr(variances / total).sum(1).exp()
    # Equal gates may still differ by float32 rounding.
    return torch.where(total[:, 0] > torch.finfo(torch.float32).eps ** 2, 1 + rank, 1.0)


def add_routing(totals: dict[str, RouterStatistics], routing: dict[str, Routing] | dict[str, RouterStatistics]) -> None:
    """Add the routing of a batch, or other statistics, to the statistics of each router, in-place.

    Args:
        totals: router name → statistics, to be updated.
        routing: router name → `Routing` of a batch, or statistics to add.
    """
    for name, value in routing.items():
        value = value if isinstance(value, RouterStatistics) else RouterStatistics.of(value)
        totals[name] = totals[name] + value if name in totals else value
