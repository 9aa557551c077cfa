"""Random geometries of cross-prediction, tiny maps above all: `python -m tests.attack.geometries`."""

import random
from typing import NamedTuple

import torch

from fastroute import ops, use_backend
from fastroute.nn import exact_convolutions
from tests.attack import forked
from tests.ops.cases import differentiate, eager_cross_predict


class Case(NamedTuple):
    dtype: str
    backend: str
    channels_last: bool
    form: str
    bias: bool
    m: int
    n: int
    batch: int
    channels: int
    width: int
    size: list[int]
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    seed: int


def draw(r: random.Random) -> Case:
    spatial = range(r.choice([1, 2, 2, 2, 3]))
    kernel = [r.choice([1, 1, 2, 3, 3, 5, 7]) for _ in spatial]
    dilation, padding = [r.choice([1, 1, 1, 2, 3]) for _ in spatial], [r.choice([0, 0, 1, 2, 3]) for _ in spatial]
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    return Case(
        dtype=r.choice(["bfloat16", "bfloat16", "float32", "float16"]),
        backend=r.choice(["native", "native", "native", "reference"]),
        channels_last=r.random() < 0.5,
        form=r.choice(["predict", "gate"]),
        bias=r.random() < 0.5,
        m=r.choice([1, 1, 2, 3]),
        n=r.choice([1, 1, 2]),
        batch=r.choice([1, 2, 4]),
        channels=r.choice([1, 2, 3, 5, 8, 16, 17]),
        width=r.choice([1, 2, 3, 5, 8, 16, 20]),
        size=[s + r.choice([0, 0, 1, 2, 3, 6]) for s in least],
        kernel=kernel,
        stride=[r.choice([1, 1, 2, 3]) for _ in spatial],
        padding=padding,
        dilation=dilation,
        seed=r.randrange(1 << 30),
    )


def run(case: Case) -> None:
    """Hold outputs and all gradients to what rounding each term once can do."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    xs = [tensor(case.batch, case.channels, *case.size) for _ in range(case.m)]
    if case.channels_last:
        # With the strides of the format in one channel too.
        xs = [
            torch.empty_like(x.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1).copy_(x)
            for x in xs
        ]
    weight = tensor(case.m, case.n, case.width, case.channels, *case.kernel)
    bias = tensor(case.m, case.n, case.width) if case.bias else None
    gates = torch.rand(case.batch, case.m, case.n, generator=generator)
    geometry = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
    inputs = [weight, bias, gates, *xs]

    def routed(weight, bias, gates, *xs):
        return ops.cross_predict(list(xs), weight, bias, gates, **geometry, activation=None, form=case.form)

    eager = eager_cross_predict(None, **geometry)
    with use_backend(case.backend):
        outputs, gradients, incoming = differentiate(routed, inputs)
    exact = differentiate(eager, [None if t is None else t.double() for t in inputs], incoming)
    sizes = [None if t is None else t.double().abs() for t in inputs]
    largest = differentiate(eager, sizes, [grad.abs() for grad in incoming])
    for name, ours, theirs, bounds in zip(("output", "gradient"), (outputs, gradients), exact, largest, strict=False):
        for i, (value, true, bound) in enumerate(zip(ours, theirs, bounds, strict=True)):
            error, allowed = (value.double() - true).abs(), 4 * torch.finfo(dtype).eps * bound.abs() + 1e-6
            assert value.isfinite().all() and (error <= allowed).all(), (
                f"{name} {i} is off by {(error / allowed).max():.3g} times what is allowed"
            )
    _check_layer(case, xs[0], weight[0, 0])


def _check_layer(case: Case, x: torch.Tensor, weight: torch.Tensor) -> None:
    """The same of a plain convolution that `exact_convolutions` has passed."""
    layer = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[len(case.size) - 1](
        case.channels, case.width, case.kernel, case.stride, case.padding, case.dilation, bias=False
    )
    if case.dtype == "float16":  # in which PyTorch's convolutions on a CPU are another matter
        return
    exact_convolutions(layer.to(x.dtype))
    layer.weight.data.copy_(weight)
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    ours = [y, *torch.autograd.grad(y, [leaf, layer.weight], grad)]
    convolution = torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d

    def gradients(x, w, grad):
        x, w = x.double().requires_grad_(), w.double().requires_grad_()
        y = convolution[len(case.size) - 1](x, w, None, case.stride, case.padding, case.dilation)
        return [y, *torch.autograd.grad(y, [x, w], grad.double())]

    bounds = gradients(x.abs(), weight.abs(), grad.abs())
    for value, true, bound in zip(ours, gradients(x, weight, grad), bounds, strict=True):
        allowed = 4 * torch.finfo(x.dtype).eps * bound + 1e-5
        assert ((value.double() - true).abs() <= allowed).all(), "plain layer"


SIMPLE = Case("bfloat16", "native", False, "predict", True, 1, 1, 1, 1, 1, [3], [1], [1], [0], [1], 0)

if __name__ == "__main__":
    forked.main(draw, run, SIMPLE)
