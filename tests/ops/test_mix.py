import pytest
import torch

from fastroute import ops
from fastroute.backends.reference.mix import mix_backward
from tests.ops.cases import check_against_eager, named, paths


def mixed(gates, *xs):
    return ops.mix(list(xs), gates)


def eager(gates, *xs):
    shape = (-1, *[1] * (xs[0].dim() - 1))
    return [
        sum(gates[..., i, j].reshape(shape).to(x.dtype) * x for i, x in enumerate(xs)) for j in range(gates.shape[-1])
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stacked", "sliced"])
@pytest.mark.parametrize("static", [False, True])
def test_outputs_and_every_gradient(backend, static, layout, dtype):
    for m, n, shape in [
        (2, 2, (3, 16, 8, 8)),
        (3, 5, (4, 33, 7, 5)),
        (8, 1, (2, 5)),
        (1, 8, (0, 4, 3)),
        (4, 4, (2, 130, 13)),
        (2, 3, (1, 24, 56, 57)),  # which all threads take together
    ]:
        with named(shape=shape, paths=(m, n)):
            size = (m, n) if static else (shape[0], m, n)
            precise = torch.float64 if dtype == torch.float64 else torch.float32
            inputs = [
                torch.rand(size, generator=torch.Generator().manual_seed(3)).to(precise),
                *paths(m, shape, dtype, layout),
            ]
            check_against_eager(mixed, eager, inputs)


@pytest.mark.parametrize("size", [(2, 3), (4, 2, 3)], ids=str)
def test_gradcheck_and_opcheck(backend, size):
    gates = torch.rand(size, dtype=torch.float64, requires_grad=True)
    xs = [x.requires_grad_() for x in paths(2, (4, 3, 2, 2), torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: tuple(mixed(*a)), (gates, *xs))
    assert torch.autograd.gradgradcheck(lambda *a: tuple(mixed(*a)), (gates, *xs), fast_mode=True)
    torch.library.opcheck(torch.ops.fastroute.mix.default, (xs, gates))
    plain = [x.detach() for x in xs]
    torch.library.opcheck(torch.ops.fastroute.mix_backward.default, ([*plain, plain[0]], plain, gates.detach(), True))


@pytest.mark.parametrize(
    ("error", "message", "size", "dtype"),
    [
        (ValueError, r"gates has shape \(3, 2\); it must have shape \(2, 2\)", (3, 2), torch.float32),
        (ValueError, r"gates has shape \(5, 2, 2\)", (5, 2, 2), torch.float32),
        (ValueError, r"gates have shape \(2,\)", (2,), torch.float32),
        (ValueError, r"gates have shape \(2, 9\)", (2, 9), torch.float32),
        (TypeError, "gates has dtype torch.float64", (2, 2), torch.float64),
    ],
)
def test_bad_input(refused, error, message, size, dtype):
    refused(error, message, ops.mix, paths(2, (4, 3, 2, 2)), torch.zeros(size, dtype=dtype))


def test_no_paths_and_no_list(refused):
    refused(ValueError, "xs has 0 paths", ops.mix, [], torch.zeros(2, 2))
    refused(TypeError, "xs is a Tensor", ops.mix, torch.zeros(4, 3), torch.zeros(2, 2))


def test_the_reference_sums_gradients_of_rounded_gates_in_float32():
    x, grad = (torch.rand(2, 3, 40, 40).bfloat16() for _ in range(2))
    gates = torch.full((2, 1, 1), 0.3, dtype=torch.bfloat16)
    [grad_x], grad_gates = mix_backward([grad], [x], gates, True)
    expected = (x.double() * grad.double()).sum((1, 2, 3)).float()
    torch.testing.assert_close(grad_gates.flatten(), expected)
    assert torch.equal(grad_x, (gates[0, 0, 0].float() * grad.float()).bfloat16())
