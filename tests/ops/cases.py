"""Random inputs of the routing operators, and their results held to the rule."""

import contextlib

import torch
from torch.nn import functional

from fastroute.testing import assert_as_good_as_eager


@contextlib.contextmanager
def named(**case):
    """Have a failure name the case of the loop that it is in."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{case}: {error}") from error


def paths(count, shape, dtype=torch.float32, layout="contiguous", seed=0):
    """Parallel tensors of a shape; "stacked" and "sliced" ones lie in a larger tensor, with free batch strides."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    batch, *sample = shape
    if layout == "stacked":
        return list(draw(batch, count, *sample).unbind(1))
    if layout == "sliced":
        return [draw(2 * batch, *sample)[::2] for _ in range(count)]
    xs = [draw(*shape) for _ in range(count)]
    if layout == "channels_last":
        xs = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in xs]
    return xs


def moved(tensor, device):
    """The tensor on a device, as it lies in its storage. `.to` would close the gaps between the samples of a path."""
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    return whole.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def parameters(m, n, channels, hidden=16, bias=True, dtype=torch.float32, scale=1.0, seed=1):
    """The gate's (w1, b1, w2, b2); hidden None is the linear gate."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes):
        return (torch.randn(sizes, generator=generator, dtype=torch.float64) * scale).to(dtype)

    if hidden is None:
        return [None, None, draw(m, n, channels), draw(m, n) if bias else None]
    w1, b1, w2, b2 = draw(m, hidden, channels), draw(m, hidden), draw(m, n, hidden), draw(m, n)
    return [w1, b1 if bias else None, w2, b2 if bias else None]


def differentiate(function, inputs, incoming=None):
    """Outputs of function(*inputs), gradients of every present input, and the incoming gradients that they are for.

    To be compared, two runs must be given the same incoming gradients: by default they are drawn in the outputs' types.
    """
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    if incoming is None:
        generator = torch.Generator().manual_seed(2)
        incoming = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs]
    present = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(
        outputs,
        present,
        [grad.to(out.dtype) for grad, out in zip(incoming, outputs, strict=True)],
        allow_unused=True,
        materialize_grads=True,
    )
    return [out.detach() for out in outputs], list(gradients), incoming


def check_against_eager(function, eager, inputs, incoming=None):
    """Run both, and eager in float64, and hold all outputs and gradients to the rule; returns function's."""
    outputs, gradients, incoming = differentiate(function, inputs, incoming)
    plain = differentiate(eager, inputs, incoming)
    exact = differentiate(eager, [None if t is None else t.double() for t in inputs], incoming)
    assert_as_good_as_eager(outputs, plain[0], exact[0])
    assert_as_good_as_eager(gradients, plain[1], exact[1])
    return outputs, gradients


def eager_cross_connect(xs, w1, b1, w2, b2):
    """Alg. 2 as a user of PyTorch would write it, in the dtype of xs throughout but for the gates."""
    dtype = torch.float64 if xs[0].dtype == torch.float64 else torch.float32
    cast = [None if p is None else p.to(dtype) for p in (w1, b1, w2, b2)]
    gates, scores = [], []
    for i, x in enumerate(xs):
        z = x.to(dtype).flatten(2).mean(2) if x.dim() > 2 else x.to(dtype)
        w1_, b1_, w2_, b2_ = (None if p is None else p[i] for p in cast)
        h = z if w1_ is None else torch.relu(torch.nn.functional.linear(z, w1_, b1_))
        scores.append(torch.nn.functional.linear(h, w2_, b2_))
        gates.append(torch.softmax(scores[-1], -1))
    shape = (-1, *[1] * (xs[0].dim() - 1))
    outputs = [
        sum(g[:, j].reshape(shape).to(x.dtype) * x for g, x in zip(gates, xs, strict=True)) for j in range(w2.shape[1])
    ]
    return [*outputs, torch.stack(gates, 1), torch.stack(scores, 1)]


def eager_cross_predict(activation="relu", **geometry):
    """Alg. 1 as a user of PyTorch would write it, in the dtype of xs: a function of weight, bias, gates and paths."""

    def run(weight, bias, gates, *xs):
        layer = (functional.linear, functional.conv1d, functional.conv2d, functional.conv3d)[xs[0].dim() - 2]
        options = geometry if xs[0].dim() > 2 else {}
        dtype, shape = xs[0].dtype, (-1, *[1] * (xs[0].dim() - 1))
        outputs = []
        for j in range(weight.shape[1]):
            y = 0
            for i, x in enumerate(xs):
                u = layer(x, weight[i, j].to(dtype), None if bias is None else bias[i, j].to(dtype), **options)
                y = y + gates[:, i, j].reshape(shape).to(dtype) * u
            outputs.append(torch.relu(y) if activation == "relu" else y)
        return outputs

    return run
