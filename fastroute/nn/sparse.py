"""Sparse multi-path layers, which compute only a few of the paths for each sample (§5.3)."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastroute.nn.gate_norm import make_gate_norm
from fastroute.nn.router import Tempered
from fastroute.ops import mix
from fastroute.ops._paths import DTYPES, MAX_PATHS, accumulate_dtype, channels_last, path_list

GATES = ("straight_through", "renormalized", "softmax")


class SparseRouting(NamedTuple):
    """Decisions of a sparse router for each sample, with n paths of which k run.

    gates: (N, n), the weight of each path in a sample's output; 0 for paths that were not chosen.
    scores: (N, n), the relevance scores A of every path, before the temperature and softmax.
    chosen: (N, k) int64, the paths chosen for each sample, the best first.
    load: (n,) int64, the number of samples of each path; they sum to N·k.
    """

    gates: Tensor
    scores: Tensor
    chosen: Tensor
    load: Tensor


class SparseRouter(Tempered, nn.Module):
    """Divide samples among n paths, compute each path on its samples only, and accumulate the results (§5.3).

    The layer has a single gate, where `CrossConnection` has one per incoming path:

        A = W2 ReLU(W1 mean(X) + b1) + b2               (Eq. 3.3, 3.4)
        K = the k paths with the highest A
        Y = Σ_{j ∈ K} g_j path_j(X)

    The argument `gates` selects the weights g and their gradient:

    - "straight_through": g = softmax of the chosen scores, which sums to 1. The gradient is that of the softmax over
      all n paths, so that the gate learns even if k = 1, where g is always 1.
    - "renormalized": the same g with its own gradient. It is 0 for k = 1: the gate then learns only from losses on the
      scores.
    - "softmax": g = the chosen entries of the softmax over all n paths, with its own gradient. They sum to less than 1.

    For k = n all three are the softmax over all paths. The temperature changes the weights but not the choice. The
    layer does not balance the load: that takes a loss on the scores, such as a clustering objective (§5.3).

    A path without samples does not run. Its parameters get no gradient in that step, for which
    `DistributedDataParallel` needs `find_unused_parameters=True`. Batch normalisation in a path sees only the path's
    samples; in training it raises on a single sample of spatial size 1, as it always does. A batch of 0 samples passes
    through the first path, to get the shape of the output.

    The load of the paths is read on the host: this costs one synchronisation per call on a GPU and a graph break under
    `torch.compile`, so `fullgraph=True` and `torch.export` do not support this layer.

    Args:
        channels: C, the channels of the input.
        paths: n modules, each from (M, C, *S) for any M ≥ 1 to outputs of one shape, apart from M; or their number n,
            for a router without modules: call `divide` and `accumulate` around the paths' computation.
        top_k: k, the number of paths for each sample, 1 to n and at most 8.
        gate_channels: G, the width of the gate's hidden layer; None or 0 omits it, as in `CrossConnection`.
        bias: whether the gate's layers have biases.
        gates: "straight_through", "renormalized" or "softmax".
        temperature: T > 0, an attribute that may be changed at any time: the weights are the softmax of A / T.
        gate_norm, prior: as in `CrossConnection`; the paths are then chosen by the posteriors.
        device, dtype: of the gate's parameters.

    Parameters: w1 (G, C), b1 (G,), w2 (n, G), b2 (n,), as in `CrossConnection`, and those of `paths`.

    Shape:
        x: (N, C, *S), with up to three spatial sizes; the paths get it in its own memory format.
        output: (N, …), of the shape of the paths' outputs. With `return_routing=True` also a `SparseRouting`.

    Example:
        >>> router = SparseRouter(16, [nn.Conv2d(16, 32, 3, padding=1) for _ in range(4)], top_k=1)
        >>> y, routing = router(torch.randn(8, 16, 10, 10), return_routing=True)
        >>> y.shape, routing.gates.shape, int(routing.load.sum())
        (torch.Size([8, 32, 10, 10]), torch.Size([8, 4]), 8)

    Raises:
        TypeError: paths are not modules, or x is not a floating-point tensor.
        ValueError: an argument is out of range, x has another shape, or the paths return another number of samples.
        RuntimeError: the router is called but has no modules for its paths.
    """

    def __init__(
        self,
        channels: int,
        paths: Iterable[nn.Module] | int,
        top_k: int = 1,
        gate_channels: int | None = 16,
        bias: bool = True,
        *,
        gates: str = "straight_through",
        temperature: float = 1.0,
        gate_norm: str | None = None,
        prior: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels is {channels}; it must be at least 1")
        if isinstance(paths, int):
            self.paths, n = None, paths
        elif isinstance(paths, Iterable):
            paths = list(paths)
            for i, path in enumerate(paths):
                if not isinstance(path, nn.Module):
                    raise TypeError(f"paths[{i}] is a {type(path).__name__}; it must be a module")
            self.paths, n = nn.ModuleList(paths), len(paths)
        else:
            raise TypeError(f"paths is a {type(paths).__name__}; it must be a list of modules, or their number")
        if n < 1:
            raise ValueError(f"paths has {n} paths; it must have at least 1")
        if not 1 <= top_k <= min(n, MAX_PATHS):
            raise ValueError(f"top_k is {top_k}; it must be 1 to {min(n, MAX_PATHS)} for {n} paths")
        if gate_channels is not None and gate_channels < 0:
            raise ValueError(f"gate_channels is {gate_channels}; it must be at least 1, or None for a linear gate")
        if gates not in GATES:
            raise ValueError(f"gates is {gates!r}; it must be one of {', '.join(map(repr, GATES))}")
        self.channels, self.num_paths, self.top_k, self.gates = channels, n, top_k, gates
        self.gate_channels = gate_channels or None
        self.temperature = temperature

        def parameter(*shape):
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        hidden = self.gate_channels is not None
        self.w1 = parameter(gate_channels, channels) if hidden else None
        self.b1 = parameter(gate_channels) if hidden and bias else None
        self.w2 = parameter(n, gate_channels if hidden else channels)
        self.b2 = parameter(n) if bias else None
        self.gate_norm = make_gate_norm(gate_norm, prior, None, n, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the gate as in `CrossConnection`: the first layer as `nn.Linear`, the second near zero."""
        bound = 1 / math.sqrt(self.channels)
        for parameter in (self.w1, self.b1):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)
        nn.init.normal_(self.w2, std=0.001)
        if self.gate_norm is not None:
            self.gate_norm.reset_running_stats()
        if self.b2 is not None:
            nn.init.zeros_(self.b2)

    def forward(self, x: Tensor, return_routing: bool = False) -> Tensor | tuple[Tensor, SparseRouting]:
        if self.paths is None:
            raise RuntimeError(
                f"this router was built for paths={self.num_paths} without their modules; "
                "give it the modules, or call divide and accumulate"
            )
        parts, routing = self.divide(x)
        running = [j for j, part in enumerate(parts) if part.shape[0]] or [0]
        y = self.accumulate([self.paths[j](parts[j]) for j in running], routing)
        return (y, routing) if return_routing else y

    def divide(self, x: Tensor) -> tuple[list[Tensor], SparseRouting]:
        """Divide a batch among the paths.

        Args:
            x: (N, C, *S).

        Returns:
            parts: n tensors (load[j], C, *S), the samples of each path in the order of the batch.
            routing: the decisions of the gate.
        """
        self._check(x)
        routing = self._route(x)
        copies = x if self.top_k == 1 else torch.cat([x] * self.top_k)
        parts = _index_select(copies, _samples_by_path(routing.chosen)).split(routing.load.tolist())
        return list(parts), routing

    def accumulate(self, ys: Sequence[Tensor], routing: SparseRouting) -> Tensor:
        """Return the weighted sum (N, …) of the paths' outputs for the samples from `divide`.

        Args:
            ys: (load[j], …) for each path j, in order; paths without samples may be left out.
            routing: from `divide`. Gradients reach the gate through `routing.gates`.

        Raises:
            ValueError: the number of samples differs from that of `divide`.
        """
        batch, k = routing.chosen.shape
        ys = path_list("ys", ys)
        samples = sum(y.shape[0] for y in ys)
        if not ys or samples != batch * k:
            raise ValueError(f"ys have {samples} samples in all; they must have the {batch * k} that were divided")
        y = torch.cat(ys)
        # A permutation, as in divide: without sums, so that the backward is deterministic.
        y = _index_select(y, _samples_by_path(routing.chosen).argsort())
        weights = routing.gates.gather(1, routing.chosen).to(accumulate_dtype(y.dtype))
        shape = y.shape[1:]
        if not 1 <= len(shape) <= 4:  # the operator supports no such layout
            y = y.reshape(len(y), -1)
        return mix(y.chunk(k), weights.unsqueeze(-1))[0].reshape(batch, *shape)

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}; it must be a tensor (N, C, *S)")
        if x.dtype not in DTYPES:
            raise TypeError(f"x has dtype {x.dtype}; it must be a floating-point type")
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (N, C, *S) with channels={self.channels}")

    def _route(self, x: Tensor) -> SparseRouting:
        dtype = accumulate_dtype(x.dtype)
        w1, b1, w2, b2 = (None if p is None else p.to(dtype) for p in (self.w1, self.b1, self.w2, self.b2))
        hidden = x.mean(tuple(range(2, x.dim())), dtype=dtype) if x.dim() > 2 else x.to(dtype)
        with torch.autocast(x.device.type, enabled=False):  # keep scores in float32 or float64
            if w1 is not None:
                hidden = F.relu(F.linear(hidden, w1, b1))
            scores = F.linear(hidden, w2, b2)
            if self.gate_norm is not None:
                logits, scores = self.gate_norm.logits(scores, self.temperature)
            else:
                logits = scores / self.temperature
        chosen = (scores if self.gate_norm is None else logits).topk(self.top_k, dim=1).indices
        if self.gates == "softmax":
            weights = logits.softmax(1).gather(1, chosen)
        else:
            weights = logits.gather(1, chosen).softmax(1)
            if self.gates == "straight_through":
                soft = logits.softmax(1).gather(1, chosen)
                weights = weights.detach() + (soft - soft.detach())
        gates = torch.zeros_like(scores).scatter(1, chosen, weights)
        load = torch.bincount(chosen.flatten(), minlength=self.num_paths)
        return SparseRouting(gates, scores, chosen, load)

    def extra_repr(self) -> str:
        paths = "" if self.paths is not None else f"paths={self.num_paths}, "
        bias = "" if self.b2 is not None else ", bias=False"
        temperature = "" if self.temperature == 1 else f", temperature={self.temperature}"
        return (
            f"{self.channels}, {paths}top_k={self.top_k}, gate_channels={self.gate_channels}{bias}, "
            f"gates={self.gates!r}{temperature}"
        )


def _samples_by_path(chosen: Tensor) -> Tensor:
    """Return the samples of path 0, then of path 1, and so on, as indices into k concatenated copies of the batch.

    Copy c of the batch holds the c-th choice of each sample.
    """
    batch, k = chosen.shape
    order = chosen.flatten().argsort(stable=True)
    return order if k == 1 else order % k * batch + order // k


def _index_select(x: Tensor, index: Tensor) -> Tensor:
    """Return x[index] in x's memory format; `Tensor.index_select` always returns NCHW."""
    if x.is_contiguous() or not channels_last(x):
        return x.index_select(0, index)
    return x.movedim(1, -1).index_select(0, index).movedim(-1, 1)
