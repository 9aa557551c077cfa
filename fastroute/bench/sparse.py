"""Benchmarks of a sparse layer, top-1 of four paths, against one path on all samples, masks, and a dense sum."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from fastroute.bench.cases import LAYOUTS, Case, draw
from fastroute.bench.contest import Contest
from fastroute.bench.operators import FORWARD, FORWARD_BACKWARD
from fastroute.bench.results import OURS
from fastroute.models.cifar_resnet import BasicBlock
from fastroute.nn import SparseRouter

PATHS = 4
BLOCKS = 3  # residual blocks in a path, as in a stack of ResNet20

# The first two stages of the CIFAR ResNets at batch 128.
SHAPES = [(128, 16, 32, 32), (128, 32, 16, 16)]


def masked(router: SparseRouter, x: Tensor) -> Tensor:
    """Compute top-1 routing with boolean masks."""
    chosen = router.divide(x)[1].chosen[:, 0]
    y = torch.empty_like(x)
    for j, path in enumerate(router.paths):
        y[chosen == j] = path(x[chosen == j])
    return y


def dense(router: SparseRouter, x: Tensor) -> Tensor:
    """Compute all paths on all samples, and their weighted sum."""
    gates = router.divide(x)[1].scores.softmax(1)
    return sum(g[:, None, None, None] * path(x) for g, path in zip(gates.unbind(1), router.paths, strict=True))


@torch.no_grad()
def spread(router: SparseRouter, x: Tensor) -> None:
    """Give a router scores that differ between samples and prefer no path on average over the input x (N, C, *S)."""
    nn.init.normal_(router.w2)
    router.b2 -= router.divide(x)[1].scores.mean(0)


def contest(labels: dict, device: torch.device) -> Contest:
    """Build a contest of a sparse layer against one path, masks, and a dense sum."""
    shape, trained = labels["shape"], labels["direction"] == FORWARD_BACKWARD
    torch.manual_seed(0)
    x = draw(shape, torch.float32, labels["layout"], device)
    paths = [nn.Sequential(*(BasicBlock(shape[1], shape[1], 1) for _ in range(BLOCKS))) for _ in range(PATHS)]
    router = SparseRouter(shape[1], paths).to(device).to(memory_format=LAYOUTS[labels["layout"]]).eval()
    spread(router, x)
    load = router.divide(x)[1].load.tolist()
    x.requires_grad_(trained)

    def job(function):
        with torch.set_grad_enabled(trained):
            y = function(x)
        if trained:
            y.backward(y.detach())
            router.zero_grad()
            x.grad = None
        return y

    def check():
        # In evaluation mode until timing starts: equal results need equal batch statistics.
        with torch.no_grad():
            torch.testing.assert_close(router(x), masked(router, x), rtol=1e-4, atol=1e-4)
            router.top_k = PATHS
            torch.testing.assert_close(router(x), dense(router, x), rtol=1e-4, atol=1e-4)
        router.top_k = 1
        router.train(trained)

    contenders = {
        OURS: lambda: job(router),
        "one path": lambda: job(router.paths[0]),
        "masked": lambda: job(partial(masked, router)),
        "dense": lambda: job(partial(dense, router)),
    }
    return Contest(contenders, check, device, facts={"load": load})


def cases(device: torch.device) -> Iterator[Case]:
    """Yield direction × layout × shape."""
    for direction in (FORWARD, FORWARD_BACKWARD):
        for layout in ("channels_last", "contiguous"):
            for shape in SHAPES:
                labels = {"layer": f"top-1 of {PATHS}", "direction": direction, "layout": layout, "shape": shape}
                quick = layout == "channels_last" and shape == SHAPES[0]
                yield Case("sparse", labels, partial(contest, labels, device), quick)
