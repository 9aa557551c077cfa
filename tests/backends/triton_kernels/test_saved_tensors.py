"""What one backend's forward of cross_connect saves, in the other's backward: each direction chooses anew."""

import functools

import pytest
import torch

from fastroute.backends.reference import kernels as reference
from fastroute.testing import assert_as_good_as_eager
from tests.backends.cuda_kernels.conftest import load_emulated
from tests.backends.triton_kernels.cases import cc
from tests.backends.triton_kernels.devices import on_host
from tests.ops.cases import parameters, paths

CASES = [  # m, n, shape, dtype, layout, hidden, bias
    (3, 2, (2, 8, 4, 4), torch.float32, "contiguous", 5, True),
    (2, 3, (2, 8, 4, 2), torch.bfloat16, "channels_last", 16, False),
    (1, 2, (2, 5, 3), torch.float32, "contiguous", None, True),
]


def tensors(value):
    return [value] if isinstance(value, torch.Tensor) else [t for part in value for t in tensors(part)]


@pytest.fixture(scope="session")
def native():
    return load_emulated()


@on_host
@pytest.mark.parametrize("first", ["native", "triton"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_either_backward_takes_what_the_other_forward_saved(native, case, relu, first):
    m, n, shape, dtype, layout, hidden, bias = case
    xs, gate = paths(m, shape, dtype, layout), parameters(m, n, shape[1], hidden, bias, scale=0.3)
    dys = paths(n, shape, dtype, layout, seed=5)
    generator = torch.Generator().manual_seed(6)
    grads = [torch.randn(shape[0], m, n, generator=generator) for _ in range(2)]

    def routed(forward, backward, to=lambda t: t):
        """Outputs and gradients; the backward's arguments are what the forward returned."""
        convert = functools.partial(map, lambda t: None if t is None else to(t))
        inputs, weights, incoming, more = (list(convert(ts)) for ts in (xs, gate, dys, grads))
        outputs, gates, scores, *saved = forward(inputs, *weights, relu)
        back = backward(incoming, *more, inputs, *weights, gates, *saved, relu, True)
        return tensors([outputs, gates, scores, *saved]), tensors(back)

    plain = routed(reference.cross_connect, reference.cross_connect_backward)
    exact = routed(reference.cross_connect, reference.cross_connect_backward, torch.Tensor.double)
    one, other = (native, cc) if first == "native" else (cc, native)
    for found, *expected in zip(routed(one.cross_connect, other.cross_connect_backward), plain, exact, strict=True):
        assert_as_good_as_eager(found, *expected)
