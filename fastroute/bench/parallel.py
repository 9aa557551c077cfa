"""Benchmarks of parallel convolutions: separate, batched over stacked weights, and as one grouped convolution."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from fastroute.bench.cases import DTYPES, LAYOUTS, Case, draw
from fastroute.bench.contest import Contest
from fastroute.bench.operators import FORWARD, FORWARD_BACKWARD, STATED
from fastroute.bench.results import OURS
from fastroute.nn import ParallelPaths

PATHS = (2, 3)


def layer(channels: int, groups: int = 1) -> nn.Sequential:
    """Return a 3 × 3 convolution that keeps the map size, with batch normalisation and ReLU."""
    convolution = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())


def contest(labels: dict, device: torch.device) -> Contest:
    """Build a contest between the forms of a layer of parallel paths.

    "grouped" takes and returns joined maps and has joined weights, as in a network that never separates the paths.
    """
    shape, count, trained = labels["shape"], labels["paths"], labels["direction"] == FORWARD_BACKWARD
    dtype, memory_format = DTYPES[labels["dtype"]], LAYOUTS[labels["layout"]]
    torch.manual_seed(0)
    xs = [draw(shape, dtype, labels["layout"], device) for _ in range(count)]
    joined = torch.cat(xs, 1).contiguous(memory_format=memory_format)
    options = {"device": device, "dtype": dtype, "memory_format": memory_format}
    paths = ParallelPaths(layer(shape[1]) for _ in range(count)).to(**options)
    batched = ParallelPaths(paths, execution="batched")  # shares the modules
    grouped = ParallelPaths([layer(count * shape[1], groups=count)]).to(**options)
    with torch.no_grad():
        grouped[0][0].weight.copy_(torch.cat([path[0].weight for path in paths]))
    for x in (*xs, joined):
        x.requires_grad_(trained)

    def job(module: ParallelPaths, inputs: list[Tensor]) -> list[Tensor]:
        with torch.set_grad_enabled(trained):
            ys = module(inputs)
        if not trained:
            return ys
        return [*ys, *torch.autograd.grad(ys, [*inputs, *module.parameters()], [y.detach() for y in ys])]

    contenders = {
        OURS: lambda: job(paths, xs),
        "batched": lambda: job(batched, xs),
        "grouped": lambda: job(grouped, [joined]),
    }

    def check():
        results = {name: call() for name, call in contenders.items()}
        # The gradients of convolutions cancel in the normalisation, so only the gradients of the maps are compared.
        near = {"rtol": 2e-2, "atol": 0.5} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
        for position in (0, count) if trained else (0,):
            ours = results[OURS][position : position + count]
            torch.testing.assert_close(results["batched"][position : position + count], ours, **near)
            theirs = results["grouped"][1 if position else 0]
            torch.testing.assert_close(list(theirs.chunk(count, 1)), ours, **near)

    return Contest(contenders, check, device)


def cases(device: torch.device) -> Iterator[Case]:
    """Yield direction × dtype and layout × shape × number of paths."""
    for dtype, layout in (("float32", "contiguous"), ("float32", "channels_last"), ("bfloat16", "channels_last")):
        for shape in STATED:
            for count in PATHS:
                for direction in (FORWARD_BACKWARD, FORWARD):
                    labels = {
                        "layer": "parallel",
                        "direction": direction,
                        "dtype": dtype,
                        "layout": layout,
                        "shape": shape,
                        "paths": count,
                    }
                    quick = dtype == "bfloat16" and (shape, count, direction) == (STATED[0], 2, FORWARD_BACKWARD)
                    yield Case("parallel", labels, partial(contest, labels, device), quick)
