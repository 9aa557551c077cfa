"""Random calls of every operator and routing layer against float64: `python -m tests.attack.operators`.

An error may be at most a few roundings of the same result computed from the absolute values of all terms.
"""

import random
from typing import NamedTuple

import torch
from torch import Tensor

from fastroute import nn as routing
from fastroute import ops, use_backend
from tests.attack import forked

EPS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 1e-13}
LAYOUTS = ("contiguous", "channels_last", "stacked", "sliced", "transposed", "expanded")


class Case(NamedTuple):
    operator: str
    dtype: str
    layout: str
    threads: int
    autocast: bool
    m: int
    n: int
    batch: int
    channels: int
    size: list[int]
    hidden: int | None
    bias: bool
    relu: bool
    seed: int


def draw(r: random.Random) -> Case:
    return Case(
        operator=r.choice([*OPERATORS]),
        dtype=r.choice(["float32", "bfloat16", "float16", "float64"]),
        layout=r.choice(LAYOUTS),
        threads=r.choice([1, 1, 2]),
        autocast=r.random() < 0.2,
        m=r.randint(1, 8),
        n=r.randint(1, 8),
        batch=r.choice([0, 1, 2, 3, 7]),
        channels=r.choice([1, 2, 3, 7, 8, 16, 17, 33]),
        size=[r.choice([1, 1, 2, 3, 5, 8, 13]) for _ in range(r.choice([0, 1, 2, 2, 2, 3]))],
        hidden=r.choice([None, 1, 4, 16, 17]),
        bias=r.random() < 0.7,
        relu=r.random() < 0.3,
        seed=r.randrange(1 << 30),
    )


class Inputs:
    """Random tensors of a case; each call of `tensor` draws the next."""

    def __init__(self, case: Case):
        self.case, self.generator = case, torch.Generator().manual_seed(case.seed)
        self.dtype = getattr(torch, case.dtype)

    def tensor(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)

    def path(self) -> Tensor:
        case = self.case
        shape = case.batch, case.channels, *case.size
        if case.layout == "channels_last":
            return self.tensor(case.batch, *case.size, case.channels).movedim(-1, 1)
        if case.layout == "stacked":
            return self.tensor(case.batch, 3, *shape[1:])[:, 1]
        if case.layout == "sliced":
            return self.tensor(2 * case.batch + 1, *shape[1:])[1::2][: case.batch]
        if case.layout == "transposed":
            return self.tensor(*reversed(shape)).permute(*reversed(range(len(shape))))
        if case.layout == "expanded":
            return self.tensor(1, *shape[1:]).expand(shape)
        return self.tensor(*shape)

    def paths(self) -> list[Tensor]:
        return [self.path() for _ in range(self.case.m)]

    def gate(self) -> list[Tensor | None]:
        m, n, channels, hidden = self.case.m, self.case.n, self.case.channels, self.case.hidden
        w1 = None if hidden is None else self.tensor(m, hidden, channels, scale=0.5)
        b1 = self.tensor(m, hidden) if hidden is not None and self.case.bias else None
        w2 = self.tensor(m, n, hidden or channels, scale=0.5)
        return [w1, b1, w2, self.tensor(m, n) if self.case.bias else None]


def cross_connect(inputs: Inputs):
    case = inputs.case

    def call(w1, b1, w2, b2, *xs):
        routed = ops.cross_connect(list(xs), w1, b1, w2, b2, activation="relu" if case.relu else None)
        return [*routed.outputs, routed.gates, routed.scores]

    return call, [*inputs.gate(), *inputs.paths()]


def gate(inputs: Inputs):
    return lambda *args: list(ops.gate(list(args[4:]), *args[:4])), [*inputs.gate(), *inputs.paths()]


def mix(inputs: Inputs):
    case = inputs.case
    shape = (case.m, case.n) if case.bias else (case.batch, case.m, case.n)
    return lambda gates, *xs: ops.mix(list(xs), gates), [inputs.tensor(*shape), *inputs.paths()]


def cross_predict(inputs: Inputs):
    case = inputs.case
    kernel = [min(3, size) for size in case.size]
    weight = inputs.tensor(case.m, case.n, 5, case.channels, *kernel, scale=0.5)
    bias = inputs.tensor(case.m, case.n, 5) if case.bias else None

    def call(weight, bias, gates, *xs):
        return ops.cross_predict(list(xs), weight, bias, gates, padding=1, activation=None)

    return call, [weight, bias, inputs.tensor(case.batch, case.m, case.n), *inputs.paths()]


def mixture_em_loss(inputs: Inputs):
    case = inputs.case
    shape = (case.batch + 4, case.m, case.channels) if case.bias else (case.batch + 4, case.channels)
    prior = torch.rand(shape[1:], generator=inputs.generator).softmax(-1) if case.relu else None
    if prior is not None and inputs.dtype == torch.float64:
        prior = prior.double()

    def call(scores, scores_aug):
        return [ops.mixture_em_loss(scores, 5.0, prior if prior is None else prior.to(sums(scores.dtype)),
                                    scores_aug=scores_aug).loss]  # fmt: skip

    return call, [inputs.tensor(*shape), inputs.tensor(*shape) if case.hidden else None]


def layer_of(build, lists: bool = True):
    def make(inputs: Inputs):
        layer = build(inputs.case)
        for parameter in layer.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=inputs.generator) * 0.3)
        names, values = zip(*layer.named_parameters(), strict=True)
        count = len(names)

        def call(*args):
            xs = list(args[count:]) if lists else args[count]
            outputs = torch.func.functional_call(layer, dict(zip(names, args[:count], strict=True)), (xs,))
            return outputs if isinstance(outputs, list) else [outputs]

        paths = inputs.paths() if lists else [inputs.path()]
        return call, [*(value.detach().to(inputs.dtype) for value in values), *paths]

    return make


OPERATORS = {
    "cross_connect": cross_connect,
    "gate": gate,
    "mix": mix,
    "cross_predict": cross_predict,
    "mixture_em_loss": mixture_em_loss,
    "CrossConnection": layer_of(lambda c: routing.CrossConnection(c.channels, c.m, c.n, c.hidden, bias=c.bias)),
    "CrossStitch": layer_of(lambda c: routing.CrossStitch(c.m, c.n)),
}


def sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def differentiate(call, inputs, grads=None):
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    outputs = call(*leaves)
    if grads is None:
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    present = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(
        outputs, present, [grad.to(y.dtype) for grad, y in zip(grads, outputs, strict=True)], allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    return [y.detach() for y in outputs], found, grads


def run(case: Case) -> None:
    torch.set_num_threads(case.threads)
    inputs = Inputs(case)
    call, tensors = OPERATORS[case.operator](inputs)
    autocast = case.autocast and case.dtype == "float32"
    kept = [None if t is None else t.clone() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs, found, grads = differentiate(call, tensors)
    for tensor, before in zip(tensors, kept, strict=True):
        assert tensor is None or torch.equal(tensor, before), "an input was written"
    with use_backend("reference"):
        exact = differentiate(call, [None if t is None else t.double() for t in tensors], grads)
    eps = EPS[torch.bfloat16 if autocast else inputs.dtype]
    for ours, theirs in ((outputs, exact[0]), (found, exact[1])):
        for i, (value, true) in enumerate(zip(ours, theirs, strict=True)):
            assert value.shape == true.shape and value.isfinite().all(), f"result {i} is not finite"
            if not value.numel():
                continue
            # Gates of wide layers depend on sums of many terms, so errors are compared with the largest value of a
            # result.
            error, allowed = (value.double() - true).abs().max(), 16 * eps * (1 + true.abs().max())
            assert error <= allowed, f"result {i} is off by {error / allowed:.3g} times what is allowed"


SIMPLE = Case("cross_connect", "float32", "contiguous", 1, False, 2, 2, 2, 3, [4, 4], 4, True, False, 0)

if __name__ == "__main__":
    forked.main(draw, run, SIMPLE)
