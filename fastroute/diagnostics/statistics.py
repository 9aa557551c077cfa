"""What the routers of a network do, summed up over samples."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute.nn.router import Routing
from fastroute.nn.sparse import SparseRouting

DEAD = 0.05
"""A gate that exceeds this for no image is dead: its path gets nothing from there."""


@dataclass
class RouterStatistics:
    """Sums over samples of what one router decided, on its device, to be read at the end.

    samples: how many; gates (m, n): sums of g_ij; entropy (m,): sums of the entropy of row i, as a share of ln n, which
    even gates have; wins (m, n): how often g_ij is the largest of row i; peak and trough (m, n): the largest and the
    smallest g_ij.
    """

    samples: int
    gates: Tensor
    entropy: Tensor
    wins: Tensor
    peak: Tensor
    trough: Tensor

    @classmethod
    def of(cls, routing: Routing | SparseRouting) -> "RouterStatistics":
        gates = routing.gates.detach().float()
        if gates.dim() == 2:  # a sparse router has one incoming path
            gates = gates[:, None]
        shape, n = gates.shape[1:], gates.shape[2]
        entropy = -torch.xlogy(gates, gates).sum(2) / math.log(n) if n > 1 else torch.ones_like(gates[..., 0])
        wins = F.one_hot(gates.argmax(2), n).sum(0)
        # Of no samples, what leaves those of others as they are.
        peak, trough = (gates.amax(0), gates.amin(0)) if len(gates) else (gates.new_zeros(shape), gates.new_ones(shape))
        return cls(len(gates), gates.sum(0), entropy.sum(0), wins, peak, trough)

    def __add__(self, other: "RouterStatistics") -> "RouterStatistics":
        sums = (getattr(self, name) + getattr(other, name) for name in ("samples", "gates", "entropy", "wins"))
        return RouterStatistics(*sums, torch.maximum(self.peak, other.peak), torch.minimum(self.trough, other.trough))

    def cpu(self) -> "RouterStatistics":
        tensors = (t.double().cpu() for t in (self.gates, self.entropy, self.wins, self.peak, self.trough))
        return RouterStatistics(self.samples, *tensors)

    @property
    def mean_gates(self) -> Tensor:
        return self.gates / self.samples

    @property
    def mean_entropy(self) -> Tensor:
        return self.entropy / self.samples

    @property
    def shares_of_maximum(self) -> Tensor:
        """(m, n): for which share of the samples path j gets the most of path i."""
        return self.wins / self.samples

    @property
    def used_paths(self) -> Tensor:
        """(m,): exp H(E g_i), among how many outgoing paths all that comes from path i is spread: 1 to n."""
        return torch.special.entr(self.mean_gates).sum(1).exp()

    @property
    def effective_clusters(self) -> Tensor:
        """(m,): exp(H(E g_i) - E H(g_i)), how many clusters of samples the gates of path i tell apart: 1 to n.

        The exponent is the mutual information of the sample and the outgoing path. Gates that are the same for every
        sample make one cluster, however even they are, and one-hot gates as many as the paths that they use.
        """
        return self.used_paths / (self.mean_entropy * math.log(self.gates.shape[1])).exp()

    @property
    def never_above(self) -> Tensor:
        """(m, n): whether a gate exceeds 0.5 for no sample (Figure 5.1). A single way to go is never skewed."""
        return (self.peak <= 0.5) & (self.peak.shape[1] > 1)

    @property
    def never_below(self) -> Tensor:
        """(m, n): whether a gate falls below 0.5 for no sample (Figure 5.1). A single way to go is never skewed."""
        return (self.trough >= 0.5) & (self.peak.shape[1] > 1)

    @property
    def dead_fraction(self) -> float:
        """The share of the m·n gates that are dead; see `DEAD`."""
        return (self.peak < DEAD).double().mean().item()


def needed_paths(gates: Tensor) -> Tensor:
    """How many paths the gates of a router have a use for, by the ways in which they differ from sample to sample.

    K clusters of samples, each with gates of its own, span K - 1 directions. So this is one more than the effective
    rank of the gates' covariance over the samples, the exponential of its eigenvalues' entropy (Roy & Vetterli 2007),
    whatever the size of the differences. Gates that are the same for every sample need one path.

    Args:
        gates: (N, m, n).

    Returns:
        (m,), from 1 to n, float64: for each incoming path.
    """
    gates = gates.double()
    centred = gates - gates.mean(0)
    variances = torch.linalg.eigvalsh(torch.einsum("sij,sik->ijk", centred, centred) / max(len(gates), 1)).clamp_min(0)
    total = variances.sum(1, keepdim=True)
    rank = torch.special.entr(variances / total).sum(1).exp()
    # Float32 gates that do not differ still round differently.
    return torch.where(total[:, 0] > torch.finfo(torch.float32).eps ** 2, 1 + rank, 1.0)


def add_routing(totals: dict[str, RouterStatistics], routing: dict[str, Routing] | dict[str, RouterStatistics]) -> None:
    """Add a batch, or the statistics of others, to the statistics of each router by name."""
    for name, value in routing.items():
        value = value if isinstance(value, RouterStatistics) else RouterStatistics.of(value)
        totals[name] = totals[name] + value if name in totals else value
