"""Benchmarks of the host time of an operator call on a tiny input, against a direct call of the kernel."""

from collections.abc import Iterator
from functools import partial

import torch

from fastroute import ops
from fastroute.backends import BACKENDS, ORDER
from fastroute.bench import plain
from fastroute.bench.cases import Case
from fastroute.bench.contest import Contest
from fastroute.bench.operators import FORWARD, FORWARD_BACKWARD
from fastroute.bench.results import OURS
from fastroute.testing import assert_as_good_as_eager

SHAPE, PATHS, REPEATS = (1, 16, 4, 4), 2, 100


def contest(labels: dict, device: torch.device) -> Contest:
    """Build a contest of `ops.cross_connect` against its kernel, without checks, dispatch and autograd."""
    torch.manual_seed(0)
    xs = [torch.randn(SHAPE, device=device) for _ in range(PATHS)]
    sizes = (PATHS, 16, SHAPE[1]), (PATHS, 16), (PATHS, PATHS, 16), (PATHS, PATHS)
    w1, b1, w2, b2 = parameters = [torch.randn(size, device=device) for size in sizes]
    incoming = [torch.randn_like(x) for x in xs]
    kernels = BACKENDS[labels["backend"]].kernels()
    leaves = [*xs, *parameters]
    trained = labels["direction"] == FORWARD_BACKWARD

    def routed(xs, *parameters):
        return ops.cross_connect(xs, *parameters).outputs

    def job(function, leaves=leaves, incoming=incoming):
        outputs = function(leaves[:PATHS], *leaves[PATHS:])
        return [*outputs, *torch.autograd.grad(outputs, leaves, incoming)] if trained else outputs

    def kernel():
        with torch.no_grad():
            outputs, gates, _, pooled, hidden = kernels.cross_connect(xs, w1, b1, w2, b2, False)
            if not trained:
                return outputs
            grads = kernels.cross_connect_backward(
                incoming, None, None, xs, w1, b1, w2, b2, gates, pooled, hidden, False, True
            )
        return [*outputs, *grads[0], *grads[1:]]

    for leaf in leaves:
        leaf.requires_grad_(trained)
    contenders = {OURS: lambda: job(routed), "kernel": kernel, "eager": lambda: job(plain.cross_connect)}

    def check():
        doubles = [leaf.detach().double().requires_grad_(trained) for leaf in leaves]
        exact = job(plain.cross_connect, doubles, [grad.double() for grad in incoming])
        for name in (OURS, "kernel"):
            assert_as_good_as_eager(contenders[name](), contenders["eager"](), exact)

    return Contest(contenders, check, device, host=True, repeats=REPEATS)


def cases(device: torch.device) -> Iterator[Case]:
    """Yield forward, and forward plus backward, on the backend of first choice."""
    backend = next(n for n in ORDER[device.type] if BACKENDS[n].reason_against(device, torch.float32) is None)
    for direction in (FORWARD, FORWARD_BACKWARD):
        labels = {
            "operator": "cross_connect",
            "direction": direction,
            "backend": backend,
            "shape": SHAPE,
            "paths": (PATHS, PATHS),
        }
        yield Case("overhead", labels, partial(contest, labels, device), quick=True)
