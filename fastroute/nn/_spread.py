"""Paths spread over processes: samples travel to the processes that hold their paths, and back."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastroute.ops._paths import channels_last


class SpreadPaths:
    """Compute n paths that are divided among the processes of a group in consecutive runs of equal length.

    Args:
        group: the processes.
        paths: n.

    Attributes:
        own: the numbers of the paths that this process holds.

    Raises:
        ValueError: this process is not in the group, or the processes do not divide the paths evenly.
    """

    def __init__(self, group: dist.ProcessGroup, paths: int):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("process_group does not have this process; build the router in its processes only")
        if paths % self.size:
            raise ValueError(
                f"process_group has {self.size} processes for {paths} paths; their number must divide that of the paths"
            )
        each = paths // self.size
        self.own = range(each * self.rank, each * (self.rank + 1))

    def __deepcopy__(self, memo: dict) -> "SpreadPaths":
        return self  # a copy of the router, such as an average of weights, is spread over the same processes

    def __call__(self, samples: Tensor, load: list[int], paths: Sequence[nn.Module]) -> Tensor:
        """Return the outputs for this process's samples, in their order.

        Args:
            samples: (sum(load), C, *S), those of path 0 first, then of path 1, and so on.
            load: the number of samples of each of the n paths.
            paths: those of `own`.
        """
        each = len(self.own)
        # All processes must exchange rows in one layout, which an empty tensor, or the output of a path, may not have.
        other = [int(len(samples) > 0 and (samples.is_contiguous() or not channels_last(samples)))]
        counts = [load[first : first + each] + other for first in range(0, len(load), each)]
        counts = torch.tensor(counts, device=samples.device)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        *mine, others = theirs.t().tolist()
        mine, last = list(zip(*mine, strict=True)), not any(others)  # [sender][own path]
        sent = [sum(load[first : first + each]) for first in range(0, len(load), each)]
        received = [sum(row) for row in mine]

        arrived = _exchange(samples, sent, received, self.group, last)
        # Not `split`, whose views a path could not change in place.
        pieces = torch.unsafe_split_with_sizes(arrived, [count for row in mine for count in row])
        outputs = {}
        for k, path in enumerate(paths):
            if any(row[k] for row in mine):
                outputs[k] = self._run(path, torch.cat(pieces[k::each]))
        if not outputs:  # for the shape; and the other processes' exchanges wait for this one, backward too
            outputs[0] = self._run(paths[0], pieces[0])
        back = {k: y.split([row[k] for row in mine]) for k, y in outputs.items()}
        y = torch.cat([back[k][r] for r in range(self.size) for k in back])
        return _exchange(y, received, sent, self.group, last)

    def _run(self, path: nn.Module, x: Tensor) -> Tensor:
        """Run a path; its parameters get 1/W of the gradient of the sum of W losses, and x the whole of it."""
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * self.size)
        y = path(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient / self.size)
        return y

    def __repr__(self) -> str:
        return f"paths {self.own.start} to {self.own.stop - 1} in process {self.rank} of {self.size}"


def _exchange(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, last: bool) -> Tensor:
    """Send `sent[r]` consecutive rows to each process r, and return those received; with `last`, in channels_last."""
    if not last or x.dim() < 3:
        return _AllToAll.apply(x.contiguous(), sent, received, group)
    return _AllToAll.apply(x.movedim(1, -1).contiguous(), sent, received, group).movedim(-1, 1)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes = received, sent, group
        y = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(y, x, received, sent, group=group)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _AllToAll.apply(gradient.contiguous(), *ctx.sizes), None, None, None
