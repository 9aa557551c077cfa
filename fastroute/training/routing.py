"""What the routers of a network do, and what they cost."""

import copy
from collections.abc import Iterable, Iterator

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler import profile, record_function
from torch.autograd.profiler_util import FunctionEvent
from torch.nn import functional as F


@torch.no_grad()
def mean_gates(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The mean gate (m, n) of each router by name, over all images of the batches, with the network in evaluation."""
    sums, count, training = {}, 0, model.training
    model.eval()
    for images, _ in batches:
        _, routing = model(images, return_routing=True)
        count += len(images)
        for name, (gates, _) in routing.items():
            sums[name] = sums.get(name, 0) + gates.double().sum(0)
    model.train(training)
    return {name: total / count for name, total in sums.items()}


def gates_table(gates: dict[str, Tensor], title: str = "mean gates") -> Table:
    """Mean gates as a table: a row for each router and incoming path i, a column for each outgoing path j."""
    table = Table("router", "from", title=title, title_justify="left")
    for j in range(max((g.shape[1] for g in gates.values()), default=0)):
        table.add_column(f"to {j + 1}", justify="right")
    for name, matrix in gates.items():
        for i, row in enumerate(matrix.tolist()):
            table.add_row("" if i else name, str(i + 1), *(f"{gate:.3f}" for gate in row))
        table.add_section()
    return table


def routing_share(model: nn.Module, batch: tuple[Tensor, Tensor], steps: int = 5) -> float:
    """The share of a training step's time that the routing operators take, forward and backward, from 0 to 1.

    A profiler records `steps` steps of forward, backward and SGD in float32, on a copy of the network. The share is the
    time inside the outermost `fastroute::` operators over the time of the whole steps; on CUDA both are times of the
    device.
    """
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images, labels = batch

    def step():
        with record_function("step"):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    step()  # what the first step sets up is not part of a step
    cuda = images.is_cuda
    # Kineto can time CUDA, but prints its own remarks where there is none.
    with profile(use_kineto=cuda, use_device="cuda" if cuda else None) as profiler:
        for _ in range(steps):
            step()

    def elapsed(events) -> float:
        return sum(event.device_time_total if cuda else event.cpu_time_total for event in events)

    # On the CPU these are the steps; with CUDA, also the operators of autograd's own thread.
    outermost = [e for e in profiler.function_events if e.cpu_parent is None and e.device_type == DeviceType.CPU]
    return elapsed(_routing_in(outermost)) / elapsed(outermost)


def _routing_in(events: Iterable[FunctionEvent]) -> Iterator[FunctionEvent]:
    for event in events:
        if event.name.startswith("fastroute::"):
            yield event  # without its children, which would count twice
        else:
            yield from _routing_in(event.cpu_children)
