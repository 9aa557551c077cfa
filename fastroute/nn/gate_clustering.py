"""The mixture-EM loss as a regulariser of gates (§5.1)."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastroute.nn.mixture_em import AllReduce, normalized_over_processes, recomputing, several_processes, sums_and_count
from fastroute.nn.router import Routing
from fastroute.nn.sparse import SparseRouting
from fastroute.ops import MixtureEM, mixture_em_loss
from fastroute.ops._library import under_transform
from fastroute.ops._paths import check_numbers
from fastroute.ops._snapshot import snapshot


class GateClusteringLoss(nn.Module):
    """Regularise gates to cluster their inputs (§5.1).

    The mixture-EM loss (Eq. 4.22) is applied to the relevance scores of each gating vector, normalised by the batch's
    statistics (Eq. 4.11), and summed over all gating vectors. There is one gating vector per incoming path of each
    router; those with a single outgoing path are left out. The thesis adds the sum to the loss of the task with weight
    0.01, and less with more paths; `fastroute train --gate-reg-weight` takes 2/n of it if a router has up to
    n outgoing paths.

    Since scores are normalised, this loss does not depend on their mean or scale: it shapes which samples are grouped,
    and has no gradient to the last layer's bias.

    With scope "local", each gating vector clusters on its own. With scope "router", each router as a whole clusters by
    the scores Σ_i a_ij of its outgoing paths j. Scope "network" adds a balance term to "local", so that the paths of
    the network carry the same load: Σ_j ḡ_j log(n ḡ_j) for each n, with ḡ_j the mean gate to path j over the samples
    and all gating vectors with n outgoing paths. It is 0 if all paths get the same, and log n if one gets everything.
    It depends on the gates themselves, and so on the scores' means.

    In several processes, training normalises by the statistics of all processes' samples, and balances the load of all.

    Gates cluster unevenly, so the prior of each cluster is its share of the posteriors in previous steps. Priors are
    updated over all processes, in training mode only and not under `torch.inference_mode`, and are saved with the
    module. A `SparseRouter` with clustered routing has priors of its own, which are used instead. Activation
    checkpointing computes a batch again: it uses the priors of the first pass and does not update them again, provided
    that it runs before the next batch.

    Args:
        gamma: γ of Eq. 4.12.
        prior_momentum: weight of the last step's posteriors in the priors, above 0 and up to 1; 1 uses the last step
            only. None keeps the even prior.
        scope: "local", "router" or "network".

    Shape:
        routing: {router name: Routing}, as networks return it, with scores (N, m, n), or (N, n) in a `SparseRouting`.
        output: (), float32 or float64.

    Example:
        >>> from fastroute.nn import CrossConnection
        >>> router = CrossConnection(16, in_paths=2, out_paths=3)
        >>> ys, routing = router([torch.randn(32, 16, 8, 8) for _ in range(2)], return_routing=True)
        >>> gate_clustering = GateClusteringLoss()
        >>> loss = 0.01 * gate_clustering({"router": routing})  # added to the loss of the task
        >>> loss.shape
        torch.Size([])

    Raises:
        TypeError: gamma or prior_momentum is no number, or routing no dict.
        ValueError: an argument is out of range, or there is no gating vector to cluster.
    """

    def __init__(
        self,
        gamma: float = 5.0,
        prior_momentum: float | None = 0.1,
        scope: Literal["local", "router", "network"] = "local",
    ):
        super().__init__()
        check_numbers(gamma=gamma, prior_momentum=1 if prior_momentum is None else prior_momentum)
        if not 0 < gamma < float("inf"):
            raise ValueError(f"gamma is {gamma}; it must be greater than 0")
        if prior_momentum is not None and not 0 < prior_momentum <= 1:
            raise ValueError(f"prior_momentum is {prior_momentum}; it must be above 0 and up to 1, or None")
        if scope not in ("local", "router", "network"):
            raise ValueError(f"scope is {scope!r}; it must be 'local', 'router' or 'network'")
        self.gamma, self.prior_momentum, self.scope = gamma, prior_momentum, scope
        self.priors: dict[str, Tensor] = {}
        self.earlier_priors: dict[str, Tensor] = {}  # of the last batch, before its update

    def forward(self, routing: Mapping[str, Routing | SparseRouting]) -> Tensor:
        if not isinstance(routing, Mapping):
            raise TypeError(f"routing is a {type(routing).__name__}; it must be a dict, such as {{'router': routing}}")
        losses = []
        for name, router in routing.items():
            scores = router.scores
            if scores.shape[-1] == 1:
                continue
            if self.scope == "router" and scores.dim() == 3:
                scores = scores.sum(1)
            prior, theirs = None, getattr(router, "prior", None)  # the router updates its own
            if self.prior_momentum is not None:
                prior = self._prior(name, scores) if theirs is None else theirs
            learns = prior is not None and theirs is None and self._keeps()
            loss, posterior = self._loss(scores, snapshot(prior) if learns else prior)
            losses.append(loss.sum())
            if learns:
                self._update_prior(name, prior, posterior)
        if not losses:
            raise ValueError(
                f"routing has {len(routing)} routers; it must have at least one with two outgoing paths or more"
            )
        if self.scope == "network":
            losses += _balance(routing, self._joint())
        return torch.stack(losses).sum()

    def _joint(self) -> bool:
        """Return whether other processes share the batch; in evaluation they may have other numbers of batches."""
        return self.training and several_processes()

    def _keeps(self) -> bool:
        """Return whether this forward may keep priors. Tensors of transforms and inference mode must not stay here."""
        if not self.training or recomputing():
            return False
        return torch.compiler.is_compiling() or not (under_transform() or torch.is_inference_mode_enabled())

    def _loss(self, scores: Tensor, prior: Tensor | None) -> MixtureEM:
        if not self._joint():
            return mixture_em_loss(scores, self.gamma, prior)
        scores = normalized_over_processes(scores.to(torch.promote_types(scores.dtype, torch.float32)))
        zero = scores.new_zeros(scores.shape[1:])
        return mixture_em_loss(scores, self.gamma, prior, zero, zero + 1)

    def _prior(self, name: str, scores: Tensor) -> Tensor:
        shape, dtype = scores.shape[1:], torch.promote_types(scores.dtype, torch.float32)
        priors = self.earlier_priors if self.training and recomputing() else self.priors
        prior = priors.get(name)
        if prior is None or prior.shape != shape:
            prior = scores.new_full(shape, 1 / shape[-1], dtype=dtype)
        prior = prior.to(scores.device, dtype)
        if self._keeps():
            self.priors[name] = prior
        return prior

    @torch.no_grad()
    def _update_prior(self, name: str, prior: Tensor, posterior: Tensor) -> None:
        if not torch.compiler.is_compiling():  # compiled graphs recompute without this module
            self.earlier_priors[name] = prior.clone()
        totals = sums_and_count(posterior)
        if several_processes():
            dist.all_reduce(totals)
        sums, count = totals[:-1].reshape(prior.shape), totals[-1]
        # Without samples, or with NaN, the prior stays as it is; a branch would synchronise.
        counts = (count > 0) & sums.isfinite().all(-1, keepdim=True)
        prior.lerp_(torch.where(counts, sums / count.clamp(min=1), prior), self.prior_momentum)

    def get_extra_state(self) -> dict[str, Tensor]:
        return dict(self.priors)

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self.priors = {name: prior.clone() for name, prior in state.items()}

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, prior_momentum={self.prior_momentum}, scope={self.scope!r}"


def _balance(routing: Mapping[str, Routing | SparseRouting], joint: bool) -> list[Tensor]:
    """Return Σ_j ḡ_j log(n ḡ_j) over the gating vectors with n > 1 outgoing paths, for each n.

    With `joint`, the mean gates ḡ are those of all processes.
    """
    loads: dict[int, list[Tensor]] = {}
    for router in routing.values():
        gates = router.gates
        if joint:
            sums = AllReduce.apply(sums_and_count(gates), None)
            mean = (sums[:-1] / sums[-1].clamp(min=1)).reshape(gates.shape[1:])
        else:
            mean = gates.sum(0) / torch.sym_max(gates.shape[0], 1)
        loads.setdefault(gates.shape[-1], []).extend(mean.reshape(-1, gates.shape[-1]))
    means = {n: torch.stack(rows).mean(0) for n, rows in loads.items() if n > 1}
    # The clamp keeps gradients finite for paths that get nothing, as in sparse routers.
    return [(mean * (n * mean).clamp(min=torch.finfo(mean.dtype).tiny).log()).sum() for n, mean in means.items()]
