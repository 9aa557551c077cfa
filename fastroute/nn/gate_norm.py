"""Gates as posteriors: relevance scores normalised over the batch before the softmax (Eq. 4.11, 4.18 to 4.20)."""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fastroute.nn._spread import SpreadPaths
from fastroute.nn.mixture_em import (
    RelevanceNorm,
    _inverse,
    _std_mean,
    _std_mean_of_processes,
    break_checkpoints,
    recomputing,
    sums_and_count,
)
from fastroute.ops._snapshot import snapshot

GATE_NORMS = (None, "center", "standardize")
PRIORS = (None, "learned")


class GateNorm(RelevanceNorm):
    """Normalise the relevance scores of m gating vectors, and keep the priors of their clusters.

    A gate is then the posterior of a cluster given the sample, with the density e^(a*) (Eq. 4.20) and the prior π_j
    (Eq. 4.18): g_ij = π_ij e^(a*_ij / T) / Σ_k π_ik e^(a*_ik / T). Training mode normalises by the statistics of the
    batch, those of all processes together where `torch.distributed` runs (of a router with a process group, those of
    the group), and the gradient goes through them. Evaluation normalises by the running statistics, which `fold` moves
    into the gate's last layer.

    Activation checkpointing computes a batch again in the backward pass, with the priors of the first pass and without
    updating anything. With `torch.utils.checkpoint`, that must happen before the router's next batch; with the
    trainer's `checkpoint_gradients`, it may happen later. Compile the whole checkpointed block. A router that is
    compiled alone, inside a checkpoint that is not, counts the recomputed batch twice and takes the later priors. With
    learned priors the graph breaks at the checkpoint, so fullgraph=True raises there.

    Args:
        kind: "center": a* = a − μ; "standardize": a* = (a − μ) / σ (Eq. 4.11). A score with σ = 0 becomes 0.
        in_paths, out_paths: m and n; in_paths is None for scores (N, n).
        prior: "learned": π is the running mean of the gates of earlier steps. None: even priors.
        momentum: the weight of a batch in the running statistics and priors; None for a cumulative average.

    Shape:
        scores: (N, m, n), or (N, n).
        output: the same, float32 or better.

    Raises:
        ValueError: an argument is unknown, scores have another shape, or a batch of one sample comes in training mode.
    """

    def __init__(
        self,
        kind: Literal["center", "standardize"],
        in_paths: int | None,
        out_paths: int,
        prior: Literal["learned"] | None = None,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
    ):
        _check("kind", kind, GATE_NORMS[1:])
        _check("prior", prior, PRIORS)
        super().__init__(out_paths, momentum, num_gates=in_paths, device=device, dtype=torch.float32)
        self.kind = kind
        even = torch.full_like(self.running_mean, 1 / out_paths) if prior == "learned" else None
        self.register_buffer("prior", even)
        self.earlier_prior = even  # that of the last batch, before its update
        self.spread: SpreadPaths | None = None

    def reset_running_stats(self) -> None:
        """Reset the running statistics, and make the priors even."""
        super().reset_running_stats()
        if self.prior is not None:
            self.prior.fill_(1 / self.num_clusters)

    def forward(self, scores: Tensor) -> Tensor:
        if scores.shape[1:] != self.running_mean.shape:
            expected = ", ".join(map(str, self.running_mean.shape))
            raise ValueError(f"scores have shape {tuple(scores.shape)}; they must be (N, {expected})")
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.training:
            mean, std = self._batch(scores)
            if not recomputing():
                self._count(mean, std)
            scale = _inverse(std)
        else:
            mean, scale = self._running(scores.dtype)
        return (scores - mean) * scale if self.kind == "standardize" else scores - mean

    def logits(self, scores: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the logits of the gates and the normalised scores.

        In training mode the softmax of the logits becomes part of the priors of the next step.

        Args:
            scores: (N, m, n) or (N, n), the output of the gate's last layer.
            temperature: T > 0.
        """
        normalized = self(scores)
        logits = normalized / temperature
        if self.prior is not None:
            logits = logits + self._log_prior(logits.dtype, temperature)
            if self.training and not recomputing():
                self._learn_prior(logits.detach().softmax(-1))
        return logits, normalized

    def fold(self, w2: Tensor, b2: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
        """Fold the running statistics into the gate's last layer, so that its scores are the gates' logits.

        Args:
            w2: (m, n, G).
            b2: (m, n), or None.
            temperature: T > 0.

        Returns:
            w2 and b2 of the folded layer, float32 or better.
        """
        dtype = torch.promote_types(w2.dtype, torch.float32)
        mean, scale = self._running(dtype)
        scale = scale / temperature if self.kind == "standardize" else torch.full_like(scale, 1 / temperature)
        b2 = (-mean if b2 is None else b2.to(dtype) - mean) * scale
        if self.prior is not None:
            b2 = b2 + self._log_prior(dtype, temperature)
        return w2.to(dtype) * scale.unsqueeze(-1), b2

    def unfold(self, logits: Tensor, temperature: float) -> Tensor:
        """Return the normalised scores for the logits of a folded layer and the temperature T."""
        return (logits if self.prior is None else logits - self._log_prior(logits.dtype, temperature)) * temperature

    def current_prior(self) -> Tensor | None:
        """Return the prior of the batch that is being computed: the earlier one where the batch is computed again."""
        if not self.training:
            return self.prior
        return snapshot(self.earlier_prior if recomputing() else self.prior)

    def _log_prior(self, dtype: torch.dtype, temperature: float) -> Tensor:
        """Return log π, clamped to stay finite, so that `unfold` can subtract it.

        Scores are divided by the temperature T. For π = 0 and T < 1, so is the clamp.
        """
        prior, tiny = self.current_prior().to(dtype), torch.finfo(torch.float32).tiny
        log = prior.clamp(min=tiny).log()
        return torch.where(prior > tiny, log, log * torch.full_like(log, 1 / temperature).clamp(min=1))

    def _batch(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return μ and σ of the batch; of several processes, those of all their batches together."""
        if not self._several_processes():
            if scores.shape[0] < 2:
                raise ValueError(
                    f"scores have {scores.shape[0]} samples; in training mode gate_norm={self.kind!r} needs at least 2"
                )
            std, mean = _std_mean(scores)
            return mean, std
        std, mean = _std_mean_of_processes(scores, self._group)
        return mean, std

    def _learn_prior(self, posterior: Tensor) -> None:
        break_checkpoints(self, "prior")
        # Compiled graphs recompute without this module, and functional calls would leave their tensors in it.
        wrapped = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(self.prior)
        if not wrapped:
            self.earlier_prior = self.prior.clone()
        sums = sums_and_count(posterior)
        if self._several_processes():
            dist.all_reduce(sums, group=self._group)
        self._move((self.prior, (sums[:-1] / sums[-1]).reshape(self.prior.shape)))

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return None if self.spread is None else self.spread.group

    def extra_repr(self) -> str:
        prior = "" if self.prior is None else ", prior='learned'"
        return f"{self.kind!r}, {tuple(self.running_mean.shape)}, momentum={self.momentum}{prior}"


def check_gate_norm(gate_norm: str | None, prior: str | None) -> None:
    """Raise ValueError if gate_norm or prior is unknown."""
    _check("gate_norm", gate_norm, GATE_NORMS)
    _check("prior", prior, PRIORS)


def _check(name: str, value: str | None, known: tuple[str | None, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, known))}")


def make_gate_norm(
    gate_norm: str | None, prior: str | None, in_paths: int | None, out_paths: int, device=None
) -> GateNorm | None:
    """Return a router's normalisation, or None.

    Raises:
        ValueError: gate_norm or prior is unknown, or there is a prior without gate_norm.
    """
    check_gate_norm(gate_norm, prior)
    if gate_norm is None:
        if prior is not None:
            raise ValueError(f"prior is {prior!r} without gate_norm; give gate_norm='center' or 'standardize' with it")
        return None
    return GateNorm(gate_norm, in_paths, out_paths, prior, device=device)
