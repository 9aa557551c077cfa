import itertools

import pytest
import torch

from fastroute import ops
from tests.ops.cases import check_against_eager, differentiate, eager_cross_connect, named, parameters, paths

LAYOUTS = ["contiguous", "channels_last", "stacked", "sliced"]


def gated(w1, b1, w2, b2, *xs):
    return list(ops.gate(list(xs), w1, b1, w2, b2))


def eager(w1, b1, w2, b2, *xs):
    return eager_cross_connect(xs, w1, b1, w2, b2)[-2:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gates_and_every_gradient(backend, layout, dtype):
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [(3, 16, 8, 8), (17, 3, 7, 5), (4, 6), (3, 130, 9), (2, 5, 3, 4, 7), (0, 4, 3, 3)]
    cases = itertools.cycle([(2, 2, 16, True), (3, 1, 5, False), (1, 8, None, True)])
    for shape, (m, n, hidden, bias) in zip(shapes, cases, strict=False):
        with named(shape=shape, paths=(m, n)):
            ps = parameters(m, n, shape[1], hidden, bias, dtype=precise, scale=0.3)
            check_against_eager(gated, eager, [*ps, *paths(m, shape, dtype, layout)])


def test_is_what_cross_connect_has(backend):
    xs, ps = paths(2, (3, 16, 8, 8)), parameters(2, 3, 16)
    routed = ops.cross_connect(xs, *ps)
    assert torch.equal(ops.gate(xs, *ps).gates, routed.gates)
    assert torch.equal(ops.gate(xs, *ps).scores, routed.scores)


@pytest.mark.parametrize("hidden", [None, 3])
def test_gradcheck_and_opcheck(backend, hidden):
    ps = parameters(2, 3, 4, hidden, dtype=torch.float64)
    inputs = tuple(None if t is None else t.requires_grad_() for t in [*ps, *paths(2, (2, 4, 3, 2), torch.float64)])
    assert torch.autograd.gradcheck(lambda *a: tuple(gated(*a)), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: tuple(gated(*a)), inputs, fast_mode=True)
    torch.library.opcheck(torch.ops.fastroute.gate.default, (list(inputs[4:]), *inputs[:4]))
    plain = [None if t is None else t.detach() for t in inputs]
    with torch.no_grad():
        gates, _, pooled, hidden = torch.ops.fastroute.gate(plain[4:], *plain[:4])
    arguments = (gates, None, plain[4:], *plain[:4], gates, pooled, hidden)
    torch.library.opcheck(torch.ops.fastroute.gate_backward.default, arguments)


@pytest.mark.parametrize("used", [0, 1])
def test_absent_incoming_gradients(backend, used):
    inputs = [*parameters(2, 2, 5), *paths(2, (3, 5, 4, 4))]
    ours = differentiate(lambda *a: gated(*a)[used : used + 1], inputs)
    theirs = differentiate(lambda *a: eager(*a)[used : used + 1], inputs)
    for actual, expected in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("error", "message", "xs"),
    [
        (ValueError, "xs has 0 paths; it must have 1 to 8", []),
        (ValueError, r"w1 has shape \(2, 16, 5\); it must have shape \(2, 16, 4\)", [torch.zeros(3, 4, 2, 2)] * 2),
        (TypeError, "xs is a Tensor", torch.zeros(3, 5, 2, 2)),
    ],
)
def test_bad_input(refused, error, message, xs):
    refused(error, message, ops.gate, xs, *parameters(2, 2, 5))
