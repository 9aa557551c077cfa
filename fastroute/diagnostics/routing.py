"""Statistics of a network's routers over a dataset, and their share of a training step."""

import copy
import statistics
import time
from collections.abc import Iterable, Mapping

import torch
from rich.table import Table
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastroute.diagnostics.statistics import RouterStatistics, add_routing
from fastroute.models._modes import modes_kept
from fastroute.nn import forward_with_routing


def across_processes(totals: dict[str, RouterStatistics]) -> dict[str, RouterStatistics]:
    """Add up the statistics of all processes, if `torch.distributed` is initialised.

    Args:
        totals: router name → statistics of this process.

    Returns:
        Router name → statistics of all processes, on the CPU.
    """
    totals = {name: total.cpu() for name, total in totals.items()}
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return totals
    parts: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, totals)
    together: dict[str, RouterStatistics] = {}
    for part in parts:
        add_routing(together, part)
    return together


@torch.no_grad()
def router_statistics(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, RouterStatistics]:
    """Compute the statistics of each router over all images of the batches, in evaluation mode.

    Args:
        model: a network with routers; its modes are restored.
        batches: (images, labels); the labels are not used.

    Returns:
        Router name → statistics, on the CPU.
    """
    totals: dict[str, RouterStatistics] = {}
    with modes_kept(model):
        model.eval()
        for images, _ in batches:
            add_routing(totals, forward_with_routing(model, images)[1])
    return {name: total.cpu() for name, total in totals.items()}


def skewed_gates(routers: Mapping[str, RouterStatistics]) -> dict[str, int]:
    """Count the skewed gates, which stay on one side of 1/n for every sample, as the upper one of Figure 5.1.

    Args:
        routers: router name → statistics.

    Returns:
        "gates": the number of gates of all routers with more than one outgoing path. "never_above": those that exceed
        1/n for no sample, with n outgoing paths. "never_below": those that fall below it for no sample. With two
        outgoing paths, the two kinds come in pairs.

    Raises:
        ValueError: gates are NaN.
    """
    for name, router in routers.items():
        if router.peak.isnan().any():
            raise ValueError(f"the gates of {name} are NaN; the network has diverged: take a checkpoint from before")
    several = [router for router in routers.values() if router.peak.shape[1] > 1]
    return {
        "gates": sum(router.peak.numel() for router in several),
        "never_above": sum(int(router.never_above.sum()) for router in several),
        "never_below": sum(int(router.never_below.sum()) for router in several),
    }


def mean_gates(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Compute the mean gates of each router over all images of the batches, in evaluation mode.

    Args:
        model, batches: as for `router_statistics`.

    Returns:
        Router name → mean gates (m, n).
    """
    return {name: statistics.mean_gates for name, statistics in router_statistics(model, batches).items()}


def gates_table(gates: dict[str, Tensor], title: str = "mean gates") -> Table:
    """Format mean gates as a table with a row per router and incoming path i, and a column per outgoing path j.

    Args:
        gates: router name → mean gates (m, n), from `mean_gates`.
        title: of the table.
    """
    table = Table("router", "from", title=title, title_justify="left")
    for j in range(max((g.shape[1] for g in gates.values()), default=0)):
        table.add_column(f"to {j + 1}", justify="right")
    for name, matrix in gates.items():
        for i, row in enumerate(matrix.tolist()):
            table.add_row("" if i else name, str(i + 1), *(f"{gate:.3f}" for gate in row))
        table.add_section()
    return table


def routing_share(model: nn.Module, batch: tuple[Tensor, Tensor], steps: int = 5) -> float:
    """Measure the share of a training step's time spent in routing operators, forward and backward.

    Steps of forward, backward and SGD in float32 run on a copy of the network: alternately plain steps, and steps with
    a timer around every `fastroute::` operator. The share is the ratio of the two medians.

    Args:
        model: the network, on the device to measure.
        batch: (images, labels) on that device.
        steps: number of steps of each kind.

    Returns:
        The share, 0 to 1.
    """
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images, labels = batch

    def step() -> float:
        start = _now(images.device)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return _now(images.device) - start

    step()  # warm-up
    whole, routing = [], []
    for _ in range(steps):
        whole.append(step())
        with _RoutingClock(images.device) as clock:
            step()
        routing.append(clock.seconds)
    return statistics.median(routing) / statistics.median(whole)


class _RoutingClock(TorchDispatchMode):
    """Accumulates the time inside `fastroute::` operators; unlike the profiler, it prints nothing to stderr."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.seconds = device, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "fastroute":
            return function(*args, **(kwargs or {}))
        start = _now(self.device)
        result = function(*args, **(kwargs or {}))
        self.seconds += _now(self.device) - start
        return result


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
