import pytest
import torch

from fastroute.nn import CrossStitch


def paths(m, *shape, **options):
    return [torch.randn(shape, **options) for _ in range(m)]


@pytest.mark.parametrize("in_paths, out_paths", [(1, 3), (2, 2), (3, 1), (2, 5)])
def test_is_equation_3_8_with_one_matrix(in_paths, out_paths):
    stitch = CrossStitch(in_paths, out_paths, dtype=torch.float64)
    torch.nn.init.normal_(stitch.gates)
    xs = paths(in_paths, 3, 6, 4, 5, dtype=torch.float64)
    expected = torch.einsum("ij,i...->j...", stitch.gates, torch.stack(xs))
    torch.testing.assert_close(torch.stack(stitch(xs)), expected)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((2,), [[0.9, 0.1], [0.1, 0.9]]),
        ((3, 3, 0.8), [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]),
        ((1, 3), [[1.0, 1.0, 1.0]]),
        ((1,), [[1.0]]),
        ((4, 1), [[0.25]] * 4),
        ((2, 3), [[0.5, 0.5, 0.5]] * 2),
    ],
    ids=str,
)
def test_starts_near_the_identity_or_from_means(arguments, expected):
    torch.testing.assert_close(CrossStitch(*arguments).gates.detach(), torch.tensor(expected))


def test_one_coefficient_for_each_pair_of_paths():
    assert {name: p.shape for name, p in CrossStitch(2, 3).named_parameters()} == {"gates": (2, 3)}
    (gates,) = CrossStitch(2, device="meta", dtype=torch.bfloat16).parameters()
    assert (gates.device.type, gates.dtype) == ("meta", torch.bfloat16)


def test_gradients():
    stitch = CrossStitch(2, 3, dtype=torch.float64)
    xs = paths(2, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(gates, *xs):
        return tuple(torch.func.functional_call(stitch, {"gates": gates}, (list(xs),)))

    assert torch.autograd.gradcheck(function, (stitch.gates, *xs))


def test_a_second_derivative_by_the_coefficients_alone():
    stitch, xs = CrossStitch(2, dtype=torch.float64), paths(2, 3, 4, 2, 2, dtype=torch.float64)
    (first,) = torch.autograd.grad(sum((y**3).sum() for y in stitch(xs)), stitch.gates, create_graph=True)
    first.square().sum().backward()
    gates, x = stitch.gates.detach().requires_grad_(), torch.stack(xs)
    cubes = (torch.einsum("ij,i...->j...", gates, x) ** 3).sum()
    torch.autograd.grad(cubes, gates, create_graph=True)[0].square().sum().backward()
    torch.testing.assert_close(stitch.gates.grad, gates.grad)


def test_keeps_channels_last_and_takes_half_precision_under_autocast():
    xs = [x.to(torch.bfloat16, memory_format=torch.channels_last) for x in paths(2, 4, 6, 5, 5)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = CrossStitch(2)(xs)
    assert all(y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last) for y in outputs)


def test_compiles_without_a_break():
    stitch, xs = CrossStitch(2, 3), paths(2, 4, 6, 5, 5)
    compiled = torch.compile(stitch, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(xs), stitch(xs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_repr_is_its_arguments():
    assert repr(CrossStitch(2)) == "CrossStitch(in_paths=2, out_paths=2, same=0.9)"
    assert repr(CrossStitch(1, 3)) == "CrossStitch(in_paths=1, out_paths=3)"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0,), "in_paths is 0; it must be 1 to 8"),
        ((2, 9), "out_paths is 9; it must be 1 to 8"),
        ((2, 2, 1.5), "same is 1.5; it must be 0 to 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossStitch(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((2.0,), "in_paths is 2.0; it must be an integer"),
        ((True,), "in_paths is True; it must be an integer"),
        ((2, "2"), "out_paths is '2'; it must be an integer"),
        ((2, 2, "0.9"), "same is '0.9'; it must be a number"),
    ],
)
def test_wrong_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        CrossStitch(*arguments)


@pytest.mark.parametrize(
    "xs, error, message",
    [
        (torch.zeros(2, 6, 4, 4), TypeError, "xs is a Tensor; it must be a list of tensors"),
        ([torch.zeros(2, 6, 4, 4)], ValueError, "xs has 1 paths; this unit takes in_paths=2"),
        ([torch.zeros(2, 6, 4, 4), torch.zeros(2, 6, 4, 5)], ValueError, r"xs\[1\] has shape"),
    ],
)
def test_wrong_inputs(xs, error, message):
    with pytest.raises(error, match=message):
        CrossStitch(2)(xs)
