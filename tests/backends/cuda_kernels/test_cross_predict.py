import pytest
import torch

from fastroute import ops, use_backend
from fastroute.backends._cross_predict import Passes
from fastroute.backends.reference import kernels as reference
from tests.backends.cuda_kernels.cases import (
    ALIGNED,
    DTYPES,
    LAYOUTS,
    ODD,
    check,
    converted,
    grid,
    make_case,
    make_paths,
    poisoned_allocations,
)
from tests.ops.cases import check_against_eager, eager_cross_predict, moved


def joined(parts):
    """[i][j] as tensors i with all j side by side in their channels, in float64."""
    return [torch.cat([part.double() for part in row], 1) for row in parts]


@grid(sizes=ALIGNED + ODD, dtype=DTYPES, layout=LAYOUTS)
def test_passes_of_cross_prediction(kernels, sizes, dtype, layout):
    m, n, shape, *_ = sizes
    batch, channels, *space = shape
    xs, _, grad_outputs, (gates, _) = make_case(*sizes, dtype, layout)
    generator = torch.Generator().manual_seed(3)
    predictions, masks = (
        make_paths(count, (batch, width, *space), dtype, layout, generator)
        for count, width in ((m, n * channels), (n, channels))
    )
    terms = make_paths(n, (batch, m * channels, *space), dtype, layout, generator)
    offsets = torch.randn(batch, n, channels, generator=generator).to(gates.dtype)
    g = gates.double().reshape(*gates.shape, *[1] * (len(space) + 1))
    u = [p.double().split(channels, 1) for p in predictions]
    t = [p.double().split(channels, 1) for p in terms]
    unshifted = [sum(g[:, i, j] * u[i][j] for i in range(m)) for j in range(n)]
    sums = [y + offsets[:, j].double().reshape(batch, channels, *[1] * len(space)) for j, y in enumerate(unshifted)]
    masked = [torch.where(y <= 0, 0, dy.double()) for y, dy in zip(masks, grad_outputs, strict=True)]
    scaled = joined([[g[:, i, j] * masked[j] for j in range(n)] for i in range(m)])
    rows = [torch.stack([(t[j][i] * x).flatten(1).sum(1) for j in range(n)], 1) for i, x in enumerate(xs)]
    products = torch.stack(rows, 1)
    grad_xs = [sum(g[:, i, j] * t[j][i] for j in range(n)) for i in range(m)]
    totals = torch.stack([y.flatten(2).sum(2) if space else y for y in masked], 1)

    def unwritten(values):
        paths = [make_paths(2, v.shape, dtype, layout, generator)[1] for v in values]
        return [moved(path, kernels.device).fill_(torch.nan) for path in paths]

    xs_, predictions, masks, terms, grad_outputs, gates, offsets = converted(
        [xs, predictions, masks, terms, grad_outputs, gates, offsets], device=kernels.device
    )
    results = []
    for order in (0, 1, 2):
        kernels.order(order)
        with poisoned_allocations():
            ys, plain, dps, dus, dxs = map(unwritten, (sums, sums, masked, scaled, grad_xs))
            kernels.sum_predictions(predictions, gates, offsets, True, ys)
            kernels.sum_predictions(predictions, gates, None, False, plain)
            sums_over_space = kernels.scale_paths(grad_outputs, masks, gates.mT, True, dps, dus)
            dots = kernels.sum_gradients(terms, xs_, gates, dxs)
            again = kernels.sum_gradients(terms, xs_, gates, [])
        results.append([*ys, *plain, *dps, *dus, *dxs, sums_over_space, dots, again])
    exact = [*(y.relu() for y in sums), *unshifted, *masked, *scaled, *grad_xs, totals, products, products]
    for k, (first, second, third, right) in enumerate(zip(*results, exact, strict=True)):
        assert torch.equal(first, second) and torch.equal(first, third), k
        if right.numel():
            # One rounding to the paths' type, and some of the sums.
            largest = max(1, right.abs().max())
            allowed = (torch.finfo(first.dtype).eps + 64 * torch.finfo(gates.dtype).eps) * largest
            assert (first.cpu() - right).abs().max() <= allowed, k


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("form", "bias", "relu", "width"),
    [
        ("predict", True, True, 5),
        ("gate", False, True, 5),
        ("predict", False, False, 5),
        ("predict", True, True, 1),
        ("gate", True, False, 1),
    ],
)
def test_cross_predict(kernels, monkeypatch, form, bias, relu, width, layout):
    """With convolutions in the paths' format, as on a card. An output of one channel has both formats."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, 3, width, 4, 3, 3, generator=generator)
    offset = torch.randn(2, 3, width, generator=generator)
    gates, xs = torch.rand(2, 2, 3, generator=generator), make_paths(2, (2, 4, 4, 3), torch.float32, layout, generator)
    grad_outputs = make_paths(3, (2, width, 2, 3), torch.float32, layout, generator)
    passes = Passes(kernels, chunk_bytes=200)
    monkeypatch.setattr(kernels, "cross_predict", passes.forward, raising=False)
    monkeypatch.setattr(kernels, "cross_predict_backward", passes.backward, raising=False)
    arguments = (xs, weight, offset if bias else None, gates, [2, 1], [1, 1], [1, 1])
    check(kernels, "cross_predict", (*arguments, relu, form))
    outputs = reference.cross_predict(*arguments, True, form) if relu else []
    for grad_inputs in (True, False):
        check(kernels, "cross_predict_backward", (grad_outputs, outputs, *arguments, grad_inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("form", "width"), [("predict", 5), ("predict", 1), ("gate", 1)])
def test_compiled_layer(card, form, width, layout):
    """The operator itself, whose convolutions are called by the compiled library."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    xs = make_paths(2, (2, 4, 7, 5), torch.float32, layout, generator)
    inputs = [draw(2, 3, width, 4, 3, 3), draw(2, 3, width), draw(2, 2, 3), *xs]
    inputs, incoming = converted([inputs, [draw(2, width, 5, 3) for _ in range(3)]], device=card.device)

    def layer(weight, bias, gates, *xs):
        with use_backend("native"):
            return ops.cross_predict(list(xs), weight, bias, gates, activation=None, form=form)

    check_against_eager(layer, eager_cross_predict(None), inputs, incoming)
