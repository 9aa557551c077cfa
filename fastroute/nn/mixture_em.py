"""Losses of the neural mixture model, and running statistics of its relevance scores (§4.4)."""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from fastroute.ops import MixtureEM, mixture_em_loss
from fastroute.ops._paths import check_integers, check_numbers
from fastroute.ops._snapshot import snapshot
from fastroute.ops.mixture_em import MAX_CLUSTERS


class RelevanceNorm(nn.Module):
    """Normalise the relevance scores of each cluster: a*_j = (a_j − μ_j) / σ_j (Eq. 4.11).

    In training mode each batch updates running μ and σ, over all processes if `torch.distributed` is initialised. The
    first batches have equal weight, so that nothing of the initial values remains. A batch with NaN or infinity is left
    out. In evaluation mode the running statistics are fixed. A column with σ = 0 becomes 0.

    With running statistics, training and evaluation compute the same function of the scores, but the gradient still
    flows through the batch statistics (as in batch renormalisation, Ioffe 2017). If μ and σ were constants, the
    mixture-EM loss would have a degenerate solution: −log sigmoid decreases as any score grows, so a component common
    to all samples would raise every score of every cluster, always ahead of the running mean. The differences between
    samples would vanish against it: posteriors become even, and the loss goes to log 2, or 2 log 2 with augmented
    samples.

    Activation checkpointing computes a batch again in the backward pass, which does not update the statistics again.

    Args:
        num_clusters: K, 1 to 1024.
        momentum: weight of a new batch in the running statistics, above 0 and up to 1; None for a cumulative average.
        num_gates: m, for scores (N, m, K).
        training_statistics: statistics used in training mode: "running", as in the thesis (§4.5.1), or "batch". Both
            take the gradient through the batch statistics; under DDP these are those of each process's own batch.
        device, dtype: of the running statistics.

    Shape:
        scores: (N, K), or (N, m, K) with num_gates=m.
        output: the same, in float32, or in float64 if the scores or the statistics are.

    Raises:
        ValueError: an argument is out of range, scores have another shape, or a batch in training mode has one sample,
            which has no spread.

    Example:
        >>> norm = RelevanceNorm(10, training_statistics="batch")
        >>> normalized = norm(torch.randn(128, 10))
        >>> normalized.shape, torch.allclose(normalized.mean(0), torch.zeros(10), atol=1e-5)
        (torch.Size([128, 10]), True)
    """

    def __init__(
        self,
        num_clusters: int,
        momentum: float | None = 0.1,
        *,
        num_gates: int | None = None,
        training_statistics: Literal["running", "batch"] = "running",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_integers(num_clusters=num_clusters, num_gates=1 if num_gates is None else num_gates)
        check_numbers(momentum=1 if momentum is None else momentum)
        if not 1 <= num_clusters <= MAX_CLUSTERS:
            raise ValueError(f"num_clusters is {num_clusters}; it must be 1 to {MAX_CLUSTERS}")
        if momentum is not None and not 0 < momentum <= 1:
            raise ValueError(f"momentum is {momentum}; it must be above 0 and up to 1, or None")
        if num_gates is not None and num_gates < 1:
            raise ValueError(f"num_gates is {num_gates}; it must be at least 1, or None")
        if training_statistics not in ("running", "batch"):
            raise ValueError(f"training_statistics is {training_statistics!r}; it must be 'running' or 'batch'")
        self.num_clusters, self.num_gates, self.momentum = num_clusters, num_gates, momentum
        self.training_statistics = training_statistics
        shape = (num_clusters,) if num_gates is None else (num_gates, num_clusters)
        self.register_buffer("running_mean", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("running_std", torch.ones(shape, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))

    def reset_running_stats(self) -> None:
        """Reset the running statistics to those of no batch."""
        self.running_mean.zero_()
        self.running_std.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Same as `reset_running_stats`; PyTorch calls this name to initialise a module from the meta device."""
        self.reset_running_stats()

    def forward(self, scores: Tensor, track: bool = True) -> Tensor:
        """Return the normalised scores; `track=False`, as for augmented scores, keeps the running statistics."""
        if scores.dim() < 2 or scores.shape[1:] != self.running_mean.shape:
            expected = ", ".join(map(str, self.running_mean.shape))
            raise ValueError(f"scores have shape {tuple(scores.shape)}; they must be (N, {expected})")
        dtype = torch.promote_types(torch.promote_types(scores.dtype, self.running_mean.dtype), torch.float32)
        scores = scores.to(dtype)
        if not self.training:
            mean, scale = self._running(dtype)
            return (scores - mean) * scale
        shared = self._several_processes()
        if scores.shape[0] < 2 and not shared:
            raise ValueError(f"scores have {scores.shape[0]} samples; in training mode there must be at least 2")
        std, mean = _std_mean(scores)
        if track and not recomputing():
            self._track(scores.detach(), mean.detach(), std.detach(), shared)
        normalized = (scores - mean) * _inverse(std)
        if self.training_statistics == "batch":
            return normalized
        running_mean, scale = self._running(dtype)
        return torch.addcmul((mean.detach() - running_mean) * scale, normalized, std.detach() * scale)

    _group: dist.ProcessGroup | None = None
    """The processes that share statistics; None is all."""

    def _several_processes(self) -> bool:
        return several_processes(self._group)

    def _running(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the running μ and 1/σ."""
        mean, std = self.running_mean, self.running_std
        if self.training:
            mean, std = snapshot(mean), snapshot(std)
        return mean.to(dtype), _inverse(std.to(dtype))

    @torch.no_grad()
    def _track(self, scores: Tensor, mean: Tensor, std: Tensor, shared: bool) -> None:
        if shared:
            std, mean = _std_mean_of_processes(scores, self._group)
        if self.training_statistics == "running":
            break_checkpoints(self, "running_mean")
        self._count(mean, std)

    @torch.no_grad()
    def _count(self, mean: Tensor, std: Tensor) -> None:
        """Move the running statistics towards those of a batch, unless one of these is not finite."""
        self.num_batches_tracked.add_(mean.isfinite().all() & std.isfinite().all())
        self._move((self.running_mean, mean), (self.running_std, std))

    @torch.no_grad()
    def _move(self, *pairs: tuple[Tensor, Tensor]) -> None:
        """Move running values towards those of a batch, if all of these are finite; the first batches count alike."""
        finite = torch.stack([value.isfinite().all() for _, value in pairs]).all()
        for running, value in pairs:
            weight = 1 / self.num_batches_tracked.clamp(min=1).to(running.dtype)
            if self.momentum is not None:
                weight = weight.clamp(min=self.momentum)
            running.lerp_(torch.where(finite, value.to(running.dtype), running), weight)

    def extra_repr(self) -> str:
        gates = "" if self.num_gates is None else f", num_gates={self.num_gates}"
        batch = "" if self.training_statistics == "running" else ", training_statistics='batch'"
        return f"{self.num_clusters}, momentum={self.momentum}{gates}{batch}"


def recomputing() -> bool:
    """Return whether this forward pass runs in a backward pass: activation checkpointing computes a batch again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def break_checkpoints(module: nn.Module, buffer: str) -> None:
    """Keep Dynamo from tracing an activation checkpoint around a forward that reads and updates a buffer.

    The graph would compute the forward again with the updated buffer. Dynamo refuses to trace assignments there.
    """
    if torch.compiler.is_compiling():
        setattr(module, buffer, getattr(module, buffer))


def _std_mean(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return σ and μ of each column, scaled by a power of two meanwhile, so that no square over- or underflows."""
    if scores.shape[0] == 0:
        return torch.std_mean(scores, dim=0, correction=0)
    largest = scores.detach().abs().amax(0)
    mantissa = torch.frexp(largest).mantissa  # Inductor cannot compute with frexp's exponents in float64
    unit = torch.where(largest > 0, largest / (2 * mantissa), 1)
    std, mean = torch.std_mean(scores / unit, dim=0, correction=0)
    # Compiled, scores that are constant differ from their mean by its rounding.
    std = torch.where(std <= 8 * torch.finfo(std.dtype).eps * mean.abs(), 0, std)
    return std * unit, mean * unit


def _std_mean_of_processes(scores: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return σ and μ of each column over the samples of all processes; the gradient goes through both.

    Sums are in float64 and about the mean: squares about another number, such as 0, may lose the spread to rounding.
    """
    exact = scores.double()
    with torch.no_grad():
        sums = sums_and_count(exact)
        dist.all_reduce(sums, group=group)
        count = sums[-1]
        center = (sums[:-1] / count).reshape(exact.shape[1:])
    distance = exact - center
    shift, square = AllReduce.apply(torch.stack([distance, distance.square()]).sum(1), group) / count
    mean, variance = center + shift, square - shift.square()
    # Scores that are constant differ from their mean by its rounding.
    varies = variance > (1e3 * torch.finfo(exact.dtype).eps * mean).square()
    std = torch.where(varies, variance, 1).sqrt() * varies
    return std.to(scores.dtype), mean.to(scores.dtype)


class AllReduce(torch.autograd.Function):
    """Sum over processes, each of which has its own loss; the gradient is the sum of theirs."""

    @staticmethod
    def forward(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # apart from forward, as torch.func needs it
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return AllReduce.apply(gradient.contiguous(), ctx.group), None


def sums_and_count(values: Tensor) -> Tensor:
    """Return the sums of values (N, …) over the samples, flattened, followed by N, to be added up over processes."""
    return torch.cat([values.sum(0).flatten(), values.new_ones(values.shape[:1]).sum(0, keepdim=True)])


def several_processes(group: dist.ProcessGroup | None = None) -> bool:
    """Return whether a process group, None being all processes, has more than this one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def normalized_over_processes(scores: Tensor) -> Tensor:
    """Return the scores, normalised by their statistics over all processes (Eq. 4.11)."""
    std, mean = _std_mean_of_processes(scores, None)
    return (scores - mean) * _inverse(std)


def _inverse(std: Tensor) -> Tensor:
    return torch.where(std == 0, 0, 1 / std.masked_fill(std == 0, 1))  # the mask keeps 1/0 out of the gradient too


class MixtureEMLoss(nn.Module):
    """Mixture-EM loss of relevance scores, with the posteriors held constant (Eq. 4.22, 4.23).

    Args:
        gamma: γ, which keeps the scores of a batch in the linear part of the sigmoid; 5 suits 128 samples.
        norm: normalises the scores. None normalises every batch by its own statistics.
        norm_aug: normalises the augmented scores. None uses the running statistics of `norm`.

    Shape:
        scores, scores_aug: (N, K), or (N, m, K) for m gates.
        prior: (K,) or (m, K); None for the even prior.
        output: `MixtureEM(loss, posterior)`: loss (), or (m,) for m gates; posterior as scores.

    Example:
        >>> network, x = nn.Linear(8, 10), torch.randn(128, 8)
        >>> criterion = MixtureEMLoss(norm=RelevanceNorm(10))
        >>> loss, posterior = criterion(network(x), network(x + 0.1 * torch.randn(128, 8)))
        >>> loss.backward()
        >>> loss.shape, posterior.shape
        (torch.Size([]), torch.Size([128, 10]))

    Raises:
        TypeError: gamma is no number.
        ValueError: gamma is not positive; norm_aug is given without norm; or `fastroute.ops.mixture_em_loss` raises.
    """

    def __init__(self, gamma: float = 5.0, norm: RelevanceNorm | None = None, norm_aug: RelevanceNorm | None = None):
        super().__init__()
        check_numbers(gamma=gamma)
        if not 0 < gamma < float("inf"):
            raise ValueError(f"gamma is {gamma}; it must be greater than 0")
        if norm is None and norm_aug is not None:
            raise ValueError("norm_aug is given without norm; both are needed, or norm alone, or neither")
        self.gamma, self.norm, self.norm_aug = gamma, norm, norm_aug

    def forward(self, scores: Tensor, scores_aug: Tensor | None = None, prior: Tensor | None = None) -> MixtureEM:
        if self.norm is None:
            return mixture_em_loss(scores, self.gamma, prior, scores_aug=scores_aug)
        scores = self.norm(scores)
        if scores_aug is not None:
            scores_aug = self.norm(scores_aug, track=False) if self.norm_aug is None else self.norm_aug(scores_aug)
        zero = scores.new_zeros(scores.shape[1:])
        return mixture_em_loss(scores, self.gamma, prior, zero, zero + 1, scores_aug)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}"


class ConsistencyLoss(nn.Module):
    """KL divergence KL(p ‖ q) of the posteriors q of augmented samples from the constant p of the originals (Eq. 4.24).

    Shape:
        posterior: p, (N, K) or (N, m, K).
        normalized_aug: normalised relevance scores a* of the augmented samples, shaped as p; q is their softmax.
        output: mean over samples, () or (m,); 0 if N = 0.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> normalized = torch.randn(128, 10)
        >>> loss = ConsistencyLoss()(normalized.softmax(-1), normalized)
        >>> torch.allclose(loss, torch.zeros(()), atol=1e-6)
        True
    """

    def forward(self, posterior: Tensor, normalized_aug: Tensor) -> Tensor:
        if posterior.shape != normalized_aug.shape:
            raise ValueError(
                f"normalized_aug has shape {tuple(normalized_aug.shape)}; "
                f"it must have the shape of posterior, {tuple(posterior.shape)}"
            )
        p = posterior.detach()
        cross = torch.where(p == 0, 0, p * log_softmax(normalized_aug, dim=-1))  # q may be 0 there
        return (torch.xlogy(p, p) - cross).sum((0, -1)) / torch.sym_max(p.shape[0], 1)
