"""The mixture-EM loss as a regulariser of gates (§5.1)."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastroute.nn.router import Routing
from fastroute.nn.sparse import SparseRouting
from fastroute.ops import mixture_em_loss


class GateClusteringLoss(nn.Module):
    """Have every gate cluster what it sees, beside what the task asks of it (§5.1).

    To the relevance scores of each gating vector, one for each incoming path of each router, the mixture-EM loss is
    applied on its own (Eq. 4.22), normalised by the batch's statistics (Eq. 4.11); the losses are added up. The thesis
    weighs the sum by 0.01 beside the loss of the task, and less with more paths. Gating vectors with one way to go are
    left out.

    Being normalised, the loss is the same for scores with another mean or scale: it shapes which samples go together,
    and has no gradient to the last layer's bias.

    That is local: each gating vector sees itself alone. With scope "router" a router's gating vectors are joined, and
    the router as a whole clusters by the scores Σ_i a_ij of its outgoing paths j. With scope "network" the vectors
    cluster each on its own, and a balance term asks of the network what none of them is asked alone: that its paths
    carry the same. It is Σ_j ḡ_j log(n ḡ_j), with ḡ_j the mean of the gates to path j over the samples and all gating
    vectors with n ways to go, for each n: 0 where all paths get the same, log n where one gets everything.

    Gates cluster unevenly, so the prior of each cluster is its share of the posteriors of the steps before. The priors
    move in training mode alone, are saved with the module, and with several processes are those of all together.

    Args:
        gamma: γ of Eq. 4.12.
        prior_momentum: the weight of the last step's posteriors in the priors, up to 1, which is the last step alone;
            None keeps the even prior.
        scope: "local", "router" or "network".

    Shape:
        routing: {router name: Routing}, as networks return it, with scores (N, m, n), or a `SparseRouting`'s (N, n).
        output: (), float32 or better.

    Example:
        >>> logits, routing = model(images, return_routing=True)
        >>> loss = cross_entropy(logits, labels) + 0.01 * gate_clustering(routing)

    Raises:
        ValueError: an argument is out of its range, or there is no gating vector to cluster.
    """

    def __init__(
        self,
        gamma: float = 5.0,
        prior_momentum: float | None = 0.1,
        scope: Literal["local", "router", "network"] = "local",
    ):
        super().__init__()
        if not 0 < gamma < float("inf"):
            raise ValueError(f"gamma is {gamma}; it must be greater than 0")
        if prior_momentum is not None and not 0 < prior_momentum <= 1:
            raise ValueError(f"prior_momentum is {prior_momentum}; it must be above 0 and up to 1, or None")
        if scope not in ("local", "router", "network"):
            raise ValueError(f"scope is {scope!r}; it must be 'local', 'router' or 'network'")
        self.gamma, self.prior_momentum, self.scope = gamma, prior_momentum, scope
        self.priors: dict[str, Tensor] = {}

    def forward(self, routing: Mapping[str, Routing | SparseRouting]) -> Tensor:
        losses = []
        for name, router in routing.items():
            scores = router.scores
            if scores.shape[-1] == 1:
                continue
            if self.scope == "router" and scores.dim() == 3:
                scores = scores.sum(1)
            prior = None if self.prior_momentum is None else self._prior(name, scores)
            loss, posterior = mixture_em_loss(scores, self.gamma, prior)
            losses.append(loss.sum())
            if prior is not None and self.training:
                self._move(prior, posterior)
        if not losses:
            raise ValueError(
                f"routing has {len(routing)} routers; it must have at least one with two outgoing paths or more"
            )
        if self.scope == "network":
            losses += _balance(routing)
        return torch.stack(losses).sum()

    def _prior(self, name: str, scores: Tensor) -> Tensor:
        shape, dtype = scores.shape[1:], torch.promote_types(scores.dtype, torch.float32)
        prior = self.priors.get(name)
        if prior is None or prior.shape != shape:
            prior = scores.new_full(shape, 1 / shape[-1], dtype=dtype)
        self.priors[name] = prior = prior.to(scores.device, dtype)
        return prior

    @torch.no_grad()
    def _move(self, prior: Tensor, posterior: Tensor) -> None:
        sums, count = posterior.sum(0), posterior.new_ones(posterior.shape[:1]).sum()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for total in (sums, count):
                dist.all_reduce(total)
        # Where there are no samples, to itself; a branch would wait for the device.
        prior.lerp_(torch.where(count > 0, sums / count.clamp(min=1), prior), self.prior_momentum)

    def get_extra_state(self) -> dict[str, Tensor]:
        return dict(self.priors)

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self.priors = {name: prior.clone() for name, prior in state.items()}

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, prior_momentum={self.prior_momentum}, scope={self.scope!r}"


def _balance(routing: Mapping[str, Routing | SparseRouting]) -> list[Tensor]:
    """Σ_j ḡ_j log(n ḡ_j) of the gating vectors with n > 1 ways to go, for each n."""
    loads: dict[int, list[Tensor]] = {}
    for router in routing.values():
        gates = router.gates
        loads.setdefault(gates.shape[-1], []).extend((gates.sum(0) / max(len(gates), 1)).reshape(-1, gates.shape[-1]))
    means = {n: torch.stack(rows).mean(0) for n, rows in loads.items() if n > 1}
    # The bound keeps the gradient of a path that gets nothing, as from sparse routers, finite.
    return [(mean * (n * mean).clamp(min=torch.finfo(mean.dtype).tiny).log()).sum() for n, mean in means.items()]
