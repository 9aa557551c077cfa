"""The numbers of a block's end: against PyTorch's modules in float64."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad as fw

from fastroute.backends import native_serves_cpu
from fastroute.nn import block_end
from tests.nn.blocks.conftest import DTYPES, FORMATS, SHAPES, X, check, modules, norm_of, results

pytestmark = pytest.mark.skipif(not native_serves_cpu(), reason="needs the compiled CPU kernels")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_outputs_gradients_and_statistics(dtype, layout, training, calls):
    torch.manual_seed(0)
    kinds = itertools.cycle(itertools.product([True, False], [nn.ReLU(), None, nn.Identity()]))
    for shape, (added, end) in zip(SHAPES * 2, kinds, strict=False):
        x, shortcut = (torch.randn(shape).to(dtype).contiguous(memory_format=FORMATS[layout]) for _ in range(2))
        norm = norm_of(shape[1]).train(training)
        norm = norm.double() if dtype == torch.float64 else norm
        check(norm, 3 * x + 1, shortcut if added else None, end)
    assert len(calls) == 2 * len(SHAPES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_parameters_in_the_dtype_of_the_maps(dtype):
    x = torch.randn(4, 24, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    check(norm_of(24).to(dtype), x, None, nn.ReLU())


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 1.0}, {"eps": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_options(options, training):
    x = torch.randn(4, 24, 8, 8).contiguous(memory_format=torch.channels_last)
    check(norm_of(24, **options).train(training), x, torch.randn_like(x), nn.ReLU())


@pytest.mark.parametrize("layout", FORMATS)
def test_a_mean_that_is_large_beside_the_deviation(layout):
    """A variance from sums of squares would have no correct digit."""
    x = (torch.randn(16, 32, 24, 24) + 1e4 * torch.randn(32, 1, 1)).contiguous(memory_format=FORMATS[layout])
    check(norm_of(32), x, None, None)


def test_many_samples_of_one_outlier():
    x = torch.randn(64, 16, 16, 16)
    x[0, :, 0, 0] = 1e5
    check(norm_of(16), x.contiguous(memory_format=torch.channels_last), None, None)


@pytest.mark.parametrize("layout", FORMATS)
def test_results_do_not_depend_on_the_number_of_threads(layout):
    x = torch.randn(16, 40, 20, 20).contiguous(memory_format=FORMATS[layout])
    norm, incoming = norm_of(40), torch.randn_like(x)
    found, threads = [], torch.get_num_threads()
    for number in (1, 3):
        torch.set_num_threads(number)
        try:
            found.append(results(block_end, norm, x, x, nn.ReLU(), incoming)[0])
        finally:
            torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


def test_samples_may_have_any_stride_between_them():
    stacked = torch.randn(8, 2, 16, 12, 12)
    norm = norm_of(16)
    torch.testing.assert_close(
        torch.ops.fastroute_native.batch_norm(stacked[:, 1], None, norm.weight, norm.bias, None, None, norm.eps, True)[
            0
        ],
        torch.relu(norm(stacked[:, 1])),
    )


@pytest.mark.parametrize("layout", FORMATS)
def test_numbers_are_non_finite_where_those_of_pytorch_are(layout):
    x = torch.randn(4, 16, 12, 12)
    x[0, 3, 1, 1], x[1, 5, 2, 2] = float("nan"), float("inf")
    x = x.contiguous(memory_format=FORMATS[layout])
    incoming = torch.randn_like(x)
    norm = norm_of(16)
    for train in (True, False):
        ours, eager = (results(f, norm.train(train), x, None, nn.ReLU(), incoming)[0] for f in (block_end, modules))
        for got, expected in zip(ours, eager, strict=True):
            assert torch.equal(got.isfinite(), expected.isfinite())
            finite = expected.isfinite()
            torch.testing.assert_close(got[finite], expected[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("end", [nn.ReLU(), None], ids=["relu", "none"])
def test_second_derivatives(training, end):
    torch.manual_seed(1)
    norm = norm_of(3).double().train(training)
    x, shortcut = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()

    def function(x, shortcut, weight, bias):
        moments = (None, None) if training else (norm.running_mean, norm.running_var)
        return torch.ops.fastroute_native.batch_norm(x, shortcut, weight, bias, *moments, norm.eps, end is not None)[0]

    inputs = [t.detach().requires_grad_() for t in (x, shortcut, norm.weight, norm.bias)]
    torch.autograd.gradcheck(function, inputs)
    torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of_maps", [True, False], ids=["parameters of the maps", "float32 parameters"])
def test_second_derivatives_in_half_precision(dtype, of_maps):
    found = []
    for function in (block_end, modules):
        torch.manual_seed(0)
        norm = norm_of(16).to(dtype if of_maps else torch.float32)
        x = torch.randn(4, 16, 6, 6).to(dtype).requires_grad_()
        y = function(norm, x, None, nn.ReLU())
        [grad] = torch.autograd.grad((y * torch.randn_like(y)).sum(), [x], create_graph=True)
        found.append(torch.autograd.grad(grad.float().square().sum(), [x])[0])
    torch.testing.assert_close(*found, rtol=0.1, atol=0.1)


def test_a_tangent_of_the_gradient():
    norm, x = norm_of(16).eval(), X.detach().requires_grad_()
    found = []
    for function in (block_end, modules):
        y = function(norm, x, None, nn.ReLU())
        with fw.dual_level():
            [grad] = torch.autograd.grad(y, [x], fw.make_dual(torch.ones_like(y), torch.ones_like(y)))
            found.append(fw.unpack_dual(grad).tangent)
    torch.testing.assert_close(*found)


def test_a_norm_that_is_called_several_times_before_the_backward(monkeypatch):
    """As for images of two sizes, of which only one is served, or for evaluation and training."""
    monkeypatch.undo()

    def gradients(function):
        torch.manual_seed(0)
        norm, w = norm_of(16), torch.randn(16, 1, 1, requires_grad=True)
        small, large = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 24, 24)
        weights = {x: torch.randn_like(x) for x in (small, large)}
        loss = sum((weights[x] * function(norm, w * x, None, nn.ReLU())).sum() for x in (small, large, small, large))
        return torch.autograd.grad(loss, [w, *norm.parameters()])

    for ours, expected in zip(gradients(block_end), gradients(modules), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)

    norm, x = norm_of(16), X.detach().requires_grad_()
    weights, scale = torch.randn_like(X), norm.weight / (norm.running_var + norm.eps).sqrt()
    y = block_end(norm.eval(), x)
    block_end(norm.train(), X)
    [grad] = torch.autograd.grad((weights * y).sum(), [x])
    torch.testing.assert_close(grad, weights * scale.detach().view(-1, 1, 1))


def test_gradients_that_are_not_wanted():
    x = torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    norm = norm_of(16).requires_grad_(False)
    shortcut = torch.randn_like(x).requires_grad_()
    [grad] = torch.autograd.grad(block_end(norm, x, shortcut, nn.ReLU()).sum(), [shortcut])
    [expected] = torch.autograd.grad(modules(norm, x, shortcut, nn.ReLU()).sum(), [shortcut])
    assert torch.equal(grad, expected)
    assert not block_end(norm, x).requires_grad


def test_statistics_made_in_inference_mode():
    with torch.inference_mode():
        norm = nn.BatchNorm2d(8).train()
        x = torch.randn(4, 8, 6, 6)
        expected = torch.relu(copy.deepcopy(norm)(x))
        torch.testing.assert_close(block_end(norm, x, None, nn.ReLU()), expected)
        assert norm.running_mean.abs().sum() > 0
