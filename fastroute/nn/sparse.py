"""Sparse multi-path layers, which compute only a few of the paths for each sample (§5.3)."""

import math
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from numbers import Integral
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributed._composable_state import _module_state_mapping

from fastroute.nn._rows import TakeRows
from fastroute.nn._spread import SpreadPaths
from fastroute.nn.gate_norm import GateNorm
from fastroute.nn.mixture_em import several_processes
from fastroute.nn.router import Tempered
from fastroute.ops import mix
from fastroute.ops._compile_form import is_exporting
from fastroute.ops._library import under_vmap, without_autocast
from fastroute.ops._paths import DTYPES, MAX_PATHS, accumulate_dtype, check_integers, check_numbers, path_list
from fastroute.ops._results import exportable

GATES = ("straight_through", "renormalized", "softmax")
ROUTINGS = ("topk", "cluster")


@exportable
class SparseRouting(NamedTuple):
    """Decisions of a sparse router for each sample, with n paths of which k run.

    gates: (N, n), the weight of each path in a sample's output; 0 for paths that were not chosen, or had no room.
    scores: (N, n), the relevance scores A of every path, before the temperature and softmax; normalised if the router
        has a `gate_norm`.
    chosen: (N, k) int64, the paths chosen for each sample, the best first.
    load: (n,) int64, the number of samples that each path computes; they sum to N·k, less those dropped.
    kept: (N, k) bool, whether the path chosen had room for the sample; None without a capacity.
    prior: (n,), the priors of the clusters, by which the gates are posteriors; None unless the routing is "cluster".
    """

    gates: Tensor
    scores: Tensor
    chosen: Tensor
    load: Tensor
    kept: Tensor | None = None
    prior: Tensor | None = None

    @property
    def dropped(self) -> Tensor:
        """(n,) int64, the number of samples that chose each path and found no room."""
        return torch.bincount(self.chosen.flatten(), minlength=self.load.shape[0]) - self.load


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

    For k = n all three are the softmax over all paths. The temperature changes the weights but, without priors, not the
    choice.

    The argument `routing` selects how paths are chosen:

    - "topk": by the scores, as above. Nothing balances the load, and training may send all samples to the same paths.
    - "cluster": by the clusters that a sample falls under. The scores are normalised over the batch (Eq. 4.11), and the
      paths are those with the highest posteriors of Eq. 4.18 and 4.20, with learned priors. Add the mixture-EM loss of
      the scores (Eq. 4.22) to the task's, `0.01 * GateClusteringLoss()({"router": routing})`: it takes its priors from
      the routing. Normalisation starts all paths with even shares; training mode needs batches of 2 samples or more. A
      path whose prior is 0 gets only samples that no other path could take.

    With a capacity factor c, a path takes at most ⌈c·k·N/n⌉ samples of a batch in training mode, as in V-MoE (Riquelme
    et al., 2021): first choices go before second ones, and then higher probabilities before lower ones. Samples beyond
    it are dropped: their gate to the path is 0, and so is the output of a sample that no path has room for. Evaluation
    drops nothing, so a prediction does not depend on the other samples of its batch.

    A path without samples does not run. Its parameters get no gradient in that step, for which
    `DistributedDataParallel` needs `find_unused_parameters=True`; a path that `fully_shard` shards, by itself or in a
    larger module, runs on an empty batch instead, so that all processes have gradients of the same parameters. Batch
    normalisation in a path sees only the path's samples; in training it raises on a single sample of spatial size 1, as
    it always does. A batch of 0 samples passes through the first path, to get the shape of the output.

    The load of the paths is read on the host: this costs one synchronisation per call on a GPU and a graph break under
    `torch.compile`, so `fullgraph=True` does not support this layer. `torch.export` and `torch.jit.trace` in
    evaluation mode compute every path on every sample, with the same result, for up to 8 paths.

    With a process group of W processes, each of them holds n/W consecutive paths, which compute their samples from
    all processes: two exchanges (all-to-all) carry samples to their paths and back. All results are those of one
    process with the joint batch, batch normalisation in paths included; a capacity is of each process's own batch. The
    gradients of paths are averaged over processes, as `DistributedDataParallel` averages all others; call
    `leave_spread_paths` before wrapping the network in it, over the same processes. A process whose paths get nothing
    passes an empty batch through its first path.

    Args:
        channels: C, the channels of the input.
        paths: n modules, each from (M, C, *S) for any M ≥ 1 to outputs of one shape, apart from M; or their number n,
            for a router without modules: call `divide` and `accumulate` around the paths' computation.
        top_k: k, the number of paths for each sample, 1 to n and at most 8.
        gate_channels: G, the width of the gate's hidden layer; None or 0 omits it, as in `CrossConnection`.
        bias: whether the gate's layers have biases.
        gates: "straight_through", "renormalized" or "softmax".
        temperature: T > 0, an attribute that may be changed at any time: the weights are the softmax of A / T.
        gate_norm, prior: as in `CrossConnection`; the paths are then chosen by the posteriors. Clustered routing has
            gate_norm="standardize" by default, and always prior="learned".
        routing: "topk" or "cluster".
        capacity_factor: c > 0, an attribute that may be changed at any time; None does not limit the load.
        process_group: the processes over which the paths are spread, such as `torch.distributed.group.WORLD`, whose
            number divides n. Each is given all n modules and keeps its own. None: all paths are here.
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
        routing: str = "topk",
        capacity_factor: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_integers(channels=channels, top_k=top_k, gate_channels=gate_channels or 0)
        if channels < 1:
            raise ValueError(f"channels is {channels}; it must be at least 1")
        if isinstance(paths, Integral):
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
            raise ValueError(f"gate_channels is {gate_channels}; it must be at least 0; 0 or None makes a linear gate")
        if gates not in GATES:
            raise ValueError(f"gates is {gates!r}; it must be one of {', '.join(map(repr, GATES))}")
        if routing not in ROUTINGS:
            raise ValueError(f"routing is {routing!r}; it must be one of {', '.join(map(repr, ROUTINGS))}")
        self.channels, self.num_paths, self.top_k, self.gates, self.routing = channels, n, top_k, gates, routing
        self.capacity_factor = capacity_factor
        self.gate_channels = gate_channels or None
        self.temperature = temperature

        def parameter(*shape):
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        hidden = self.gate_channels is not None
        self.w1 = parameter(gate_channels, channels) if hidden else None
        self.b1 = parameter(gate_channels) if hidden and bias else None
        self.w2 = parameter(n, gate_channels if hidden else channels)
        self.b2 = parameter(n) if bias else None
        self.spread = None
        if process_group is not None:
            if self.paths is None:
                raise ValueError(f"process_group is given with paths={n}; give the modules of the paths with it")
            self.spread = SpreadPaths(process_group, n)
            self.paths = nn.ModuleDict({str(j): self.paths[j] for j in self.spread.own})
        self.gate_norm = self._make_gate_norm(gate_norm, prior)
        self.reset_parameters()

    @property
    def capacity_factor(self) -> float | None:
        return self._capacity_factor

    @capacity_factor.setter
    def capacity_factor(self, value: float | None) -> None:
        check_numbers(capacity_factor=1 if value is None else value)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"capacity_factor is {value}; it must be greater than 0 and finite, or None")
        self._capacity_factor = value

    def _make_gate_norm(self, gate_norm: str | None, prior: str | None) -> GateNorm | None:
        if self.routing == "cluster":
            gate_norm, prior = gate_norm or "standardize", prior or "learned"
        norm = super()._make_gate_norm(gate_norm, prior)
        if norm is not None:
            norm.spread = self.spread
        return norm

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
        dense = is_exporting() or torch.jit.is_tracing() or under_vmap()  # these cannot read the load on the host
        if dense and not self.training and self.spread is None:
            self._check(x)
            routing = self._route(x)
            ys = [path(x) for path in self.paths]
            if any((y.dtype, y.stride()) != (ys[0].dtype, ys[0].stride()) for y in ys):
                # One type and memory format, as `accumulate` makes them; not by `chunk`, which fixes N in an export.
                ys = torch.cat(ys).unflatten(0, (len(ys), x.shape[0])).unbind()
            y = self._weighted(ys, routing.gates)
        elif self.spread is None:
            parts, routing = self.divide(x)
            sharded = _sharded_paths(self) if several_processes() else ()
            running = [j for j, part in enumerate(parts) if part.shape[0] or j in sharded] or [0]
            y = self.accumulate([self.paths[j](parts[j]) for j in running], routing)
        else:
            samples, load, routing = self._divided(x)
            y = self.accumulate([self.spread(samples, load, list(self.paths.values()))], routing)
        return (y, routing) if return_routing else y

    def divide(self, x: Tensor) -> tuple[list[Tensor], SparseRouting]:
        """Divide a batch among the paths.

        Args:
            x: (N, C, *S).

        Returns:
            parts: n tensors (load[j], C, *S), the samples of each path in the order of the batch.
            routing: the decisions of the gate.
        """
        samples, load, routing = self._divided(x)
        # Not `split`, whose views a path could not change in place.
        return list(torch.unsafe_split_with_sizes(samples, load)), routing

    def _divided(self, x: Tensor) -> tuple[Tensor, list[int], SparseRouting]:
        """Return the samples of all paths in one tensor, their numbers, and the routing."""
        self._check(x)
        routing = self._route(x)
        copies = x if self.top_k == 1 else torch.cat([x] * self.top_k)
        # On the meta device, which has no scores, all samples take the first paths, and none is dropped.
        load = [len(x)] * self.top_k + [0] * (self.num_paths - self.top_k) if x.is_meta else _on_host(routing.load)
        order = _samples_by_path(routing)
        return TakeRows.apply(copies, order[: sum(load)], order.argsort()), load, routing

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
        samples, divided = sum(y.shape[0] for y in ys), batch * k if routing.kept is None else int(routing.load.sum())
        if not ys or samples != divided:
            raise ValueError(f"ys have {samples} samples in all; they must have the {divided} that were divided")
        order = _samples_by_path(routing)
        index = order.argsort()
        if samples < batch * k:  # one output of zeros for all samples that were dropped
            one = next(y for y in ys if y.shape[0])[:1]
            ys, index = [*ys, torch.zeros_like(one)], index.clamp(max=samples)
        rows = torch.cat(ys)
        y = TakeRows.apply(rows, index, order[: len(rows)])
        return self._weighted(y.chunk(k), routing.gates.gather(1, routing.chosen))

    def _weighted(self, ys: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return Σ_c weights[:, c] ys[c] for tensors (N, …)."""
        batch, shape = weights.shape[0], ys[0].shape[1:]
        if not 1 <= len(shape) <= 4:  # the operator supports no such layout
            ys = [y.reshape(batch, math.prod(shape)) for y in ys]
        weights = weights.to(accumulate_dtype(ys[0].dtype))
        return mix(ys, weights.unsqueeze(-1))[0].reshape(batch, *shape)

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
        with without_autocast(x.device.type):  # keep scores in float32 or float64
            if w1 is not None:
                hidden = F.relu(F.linear(hidden, w1, b1))
            scores = F.linear(hidden, w2, b2)
            prior = None
            if self.routing == "cluster":
                prior = self.gate_norm.current_prior().to(scores.dtype, copy=True)  # before this step's
                if self.gate_norm.prior.dtype != scores.dtype:  # rounded, as in a router in bfloat16
                    prior = prior / prior.sum()
            if self.gate_norm is not None:
                logits, scores = self.gate_norm.logits(scores, self.temperature)
            else:
                logits = scores / self.temperature
        chosen = (scores if self.gate_norm is None else logits).topk(self.top_k, dim=1).indices
        soft = logits.softmax(1).gather(1, chosen)
        if self.gates == "softmax":
            weights = soft
        else:
            weights = logits.gather(1, chosen).softmax(1)
            if self.gates == "straight_through":
                weights = weights.detach() + (soft - soft.detach())
        # `one_hot` would read the choices on the host, which vmap does not allow.
        load = torch.zeros_like(scores, dtype=torch.int64).scatter(1, chosen, 1).sum(0)
        kept = None
        if self.training and self.capacity_factor is not None and not x.is_meta:
            capacity = math.ceil(Fraction(repr(float(self.capacity_factor))) * chosen.numel() / self.num_paths)
            kept, load = self._with_room(chosen, soft.detach(), capacity), load.clamp(max=capacity)
            weights = weights * kept
        gates = torch.zeros_like(scores).scatter(1, chosen, weights)
        return SparseRouting(gates, scores, chosen, load, kept, prior)

    def _with_room(self, chosen: Tensor, probabilities: Tensor, capacity: int) -> Tensor:
        """Return whether each choice is among the first of its path, up to the capacity: (N, k) bool."""
        batch, k = chosen.shape
        best_first = probabilities.t().argsort(dim=1, descending=True, stable=True)
        first_choices_first = (best_first + batch * torch.arange(k, device=chosen.device).unsqueeze(1)).flatten()
        by_priority = chosen.t().flatten()[first_choices_first]
        place = F.one_hot(by_priority, self.num_paths).cumsum(0).gather(1, by_priority.unsqueeze(1)).squeeze(1)
        kept = torch.empty_like(by_priority, dtype=torch.bool)
        return kept.scatter(0, first_choices_first, place <= capacity).reshape(k, batch).t()

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        if self.spread is not None:  # take the own paths out of those of all processes
            for name in [name for name in state_dict if name.startswith(f"{prefix}paths.")]:
                if name.removeprefix(f"{prefix}paths.").partition(".")[0] not in self.paths:
                    del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        paths = "" if self.paths is not None else f"paths={self.num_paths}, "
        bias = "" if self.b2 is not None else ", bias=False"
        temperature = "" if self.temperature == 1 else f", temperature={self.temperature}"
        routing = "" if self.routing == "topk" else f", routing={self.routing!r}"
        capacity = "" if self.capacity_factor is None else f", capacity_factor={self.capacity_factor}"
        spread = "" if self.spread is None else f", {self.spread}"
        return (
            f"{self.channels}, {paths}top_k={self.top_k}, gate_channels={self.gate_channels}{bias}, "
            f"gates={self.gates!r}{temperature}{routing}{capacity}{spread}"
        )


def leave_spread_paths(network: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Tell `DistributedDataParallel` to leave out the paths that are spread over processes, and return the network.

    Args:
        network: the module that is going to be wrapped.
        process_group: that of `DistributedDataParallel`; None is all processes.

    Raises:
        ValueError: paths are spread over fewer processes than those of `process_group`: nothing would average the
            gradients of their copies.

    Example:
        >>> network = nn.Sequential(SparseRouter(16, [nn.Identity() for _ in range(4)]))
        >>> network = leave_spread_paths(network)  # DistributedDataParallel(network) comes next
    """
    names = []
    for name, router in network.named_modules():
        if not isinstance(router, SparseRouter) or router.spread is None:
            continue
        processes = dist.get_world_size(process_group)
        if router.spread.size != processes:
            raise ValueError(
                f"network has paths spread over {router.spread.size} of {processes} processes, whose other copies "
                "nothing would average; spread them over all, or give the group of DistributedDataParallel as "
                "process_group"
            )
        prefix = f"{name}." if name else ""
        names += [f"{prefix}{own}" for own in router.state_dict() if own.startswith("paths.")]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, names)
    return network


def _on_host(load: Tensor) -> list[int]:
    """Read the number of samples of each path; raise RuntimeError if vmap has batched them."""
    if under_vmap() and torch._C._functorch.is_batchedtensor(load):
        raise RuntimeError(
            "a SparseRouter in training mode, or with paths in several processes, reads on the host how many samples "
            "each path gets, which vmap over its input does not allow; call eval(), with all paths in this process"
        )
    return load.tolist()


def _samples_by_path(routing: SparseRouting) -> Tensor:
    """Return the samples of path 0, then of path 1, and so on, as indices into k concatenated copies of the batch.

    Copy c of the batch holds the c-th choice of each sample. Choices that found no room come last.
    """
    batch, k = routing.chosen.shape
    paths = routing.chosen if routing.kept is None else routing.chosen.masked_fill(~routing.kept, len(routing.load))
    order = paths.flatten().argsort(stable=True)
    return order if k == 1 else order % k * batch + order // k


@_disable_dynamo  # unlike torch.compiler.disable, it does not import the compiler at once
def _sharded_paths(router: SparseRouter) -> set[int]:
    """Return the paths whose weights FSDP shards, which must run in every process.

    FSDP gathers the weights of a path that is a unit of its own as the path runs. It reduces the gradients of all paths
    of a larger unit together, and would mix them up if processes had gradients of different paths.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # only users of FSDP have imported it
    if fsdp is None:
        return set()
    units = [module for module in list(_module_state_mapping) if isinstance(module, fsdp.FSDPModule)]
    if any(module is router for unit in units for module in unit.modules()):
        return set(range(router.num_paths))
    kinds = fsdp.FSDPModule, fsdp.FullyShardedDataParallel
    return {j for j, path in enumerate(router.paths) if any(isinstance(layer, kinds) for layer in path.modules())}
