import itertools

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fastroute import ops, use_backend
from fastroute.ops._convolution import correct_geometry, kernel_fits
from tests.ops.cases import check_against_eager, differentiate, named, paths
from tests.ops.cases import eager_cross_predict as eager

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ["contiguous", "channels_last", "stacked", "sliced"]
FORMS = ["predict", "gate"]


def draw(*shape, dtype=torch.float32, scale=1.0, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def parameters(m, n, width, channels, kernel, batch, dtype=torch.float32, bias=True):
    """weight, bias and gates."""
    weight = draw(m, n, width, channels, *kernel, dtype=dtype, scale=0.3)
    gates = torch.softmax(draw(batch, m, n, dtype=dtype, seed=5), -1)
    return [weight, draw(m, n, width, dtype=dtype, seed=6) if bias else None, gates]


def predicted(form="predict", activation="relu", **geometry):
    def run(weight, bias, gates, *xs):
        return ops.cross_predict(list(xs), weight, bias, gates, **geometry, activation=activation, form=form)

    return run


def check(xs, ps, form="predict", activation="relu", **geometry):
    inputs = [*ps, *xs]
    incoming = None
    if activation == "relu":
        # Beside the kink rounding alone decides whether a gradient passes, so that none is sent there.
        sums = eager(None, **geometry)(*(None if t is None else t.double() for t in inputs))
        near = [4 * torch.finfo(xs[0].dtype).eps * (1 + y.abs().amax()) if y.numel() else 0 for y in sums]
        incoming = [draw(*y.shape, seed=7 + j) * (y.abs() > near[j]) for j, y in enumerate(sums)]
        incoming = [grad.to(xs[0].dtype) for grad in incoming]
    return check_against_eager(predicted(form, activation, **geometry), eager(activation, **geometry), inputs, incoming)


# m, n, C_out, kernel, (N, C_in, *S), geometry: whole and broken registers, rows and tiles, strides, no space at all.
CASES = [
    (2, 2, 16, (3, 3), (3, 16, 8, 8), {"padding": 1}),
    (3, 2, 5, (3, 2), (2, 7, 9, 6), {"stride": (2, 1), "padding": (1, 0)}),
    (1, 3, 33, (1, 1), (3, 3, 13, 5), {}),
    (2, 3, 32, (3, 3), (2, 48, 17, 16), {"padding": 2, "dilation": 2}),
    (2, 2, 7, (), (5, 9), {}),
    (2, 1, 4, (3,), (2, 6, 11), {"stride": 2}),
    (1, 2, 3, (2, 2, 2), (2, 4, 3, 4, 5), {}),
    (8, 8, 2, (1, 1), (2, 3, 4, 4), {}),
    (2, 2, 4, (3, 3), (0, 6, 5, 5), {"padding": 1}),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_every_gradient(backend, layout, dtype, form):
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    choices = itertools.cycle(itertools.product([True, False], ["relu", None]))
    for (m, n, width, kernel, shape, geometry), (bias, activation) in zip(CASES, choices, strict=False):
        with named(shape=shape, paths=(m, n), kernel=kernel):
            ps = parameters(m, n, width, shape[1], kernel, shape[0], precise, bias)
            check(paths(m, shape, dtype, layout), ps, form, activation, **geometry)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 4),
    n=st.integers(1, 4),
    batch=st.integers(0, 4),
    channels=st.integers(1, 40),
    width=st.integers(1, 40),
    space=st.lists(st.integers(3, 20), min_size=2, max_size=2),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float64]),  # in half precision eager is exact by luck on few elements
    form=st.sampled_from(FORMS),
    activation=st.sampled_from(["relu", None]),
)
def test_random_shapes(backend, m, n, batch, channels, width, space, layout, dtype, form, activation):
    assume(batch == 0 or batch * m * n >= 4)  # a gate's gradient is a sum that may cancel, and one may be exact by luck
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    ps = parameters(m, n, width, channels, (3, 3), batch, precise)
    check(paths(m, (batch, channels, *space), dtype, layout), ps, form, activation, padding=1)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_maps_and_chunks(backend, layout, native_library):
    """Outputs past the caches go through other stores than small ones, and few predictions at a time give the same."""
    xs, ps = paths(2, (5, 16, 64, 64), layout=layout), parameters(2, 2, 32, 16, (3, 3), 5)
    whole = check(xs, ps, padding=1)
    force_chunk = torch.ops.fastroute_native.cross_predict_force_chunk
    for form in FORMS:
        force_chunk(2**20)
        try:
            parts = check(xs, ps, form, padding=1)
        finally:
            force_chunk(0)
        for a, b in zip((*whole[0], *whole[1]), (*parts[0], *parts[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(backend, form, activation):
    inputs = [*parameters(2, 2, 3, 2, (2, 2), 2, torch.float64), *paths(2, (2, 2, 3, 3), torch.float64)]
    inputs = tuple(t.requires_grad_() for t in inputs)
    function = predicted(form, activation, padding=1, stride=2)
    assert torch.autograd.gradcheck(lambda *a: tuple(function(*a)), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: tuple(function(*a)), inputs, fast_mode=True)


def test_only_some_need_gradients(backend):
    xs, ps = paths(2, (3, 5, 4, 4)), parameters(2, 2, 6, 5, (3, 3), 3)
    expected = differentiate(eager(padding=1), [*ps, *xs])
    for wanted in ([0], [1], [2], [3, 4]):
        with named(wanted=wanted):
            leaves = [t.detach().requires_grad_(k in wanted) for k, t in enumerate([*ps, *xs])]
            outputs = predicted(padding=1)(*leaves)
            gradients = torch.autograd.grad(outputs, [leaves[k] for k in wanted], expected[2])
            for k, gradient in zip(wanted, gradients, strict=True):
                torch.testing.assert_close(gradient, expected[1][k], rtol=1e-4, atol=1e-4)


def test_absent_incoming_gradients(backend):
    inputs = [*parameters(2, 3, 6, 5, (3, 3), 3), *paths(2, (3, 5, 4, 4))]
    ours = differentiate(lambda *a: predicted(padding=1)(*a)[1:2], inputs)
    theirs = differentiate(lambda *a: eager(padding=1)(*a)[1:2], inputs)
    for actual, expected in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_take_the_layout_of_the_inputs(backend, layout, form):
    xs, ps = paths(2, (3, 6, 5, 4), layout=layout), parameters(2, 2, 7, 6, (3, 3), 3)
    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert all(y.is_contiguous(memory_format=wanted) for y in predicted(form)(*ps, *xs))


def test_nan_is_not_hidden(backend):
    xs, ps = paths(2, (2, 6, 5, 4)), parameters(2, 2, 7, 6, (3, 3), 2)
    xs[0][1, 2, 3, 1] = float("nan")
    y = predicted(padding=1)(*ps, *xs)[0]
    assert y[1].isnan().any() and not y[0].isnan().any()


@pytest.mark.parametrize("form", FORMS)
def test_bitwise_repeatable(backend, form):
    inputs = [*parameters(3, 3, 16, 33, (3, 3), 7), *paths(3, (7, 33, 7, 7))]
    first, second = (differentiate(predicted(form, padding=1), inputs) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_every_element_is_written(backend, form):
    """Fresh memory is full of NaN, so that elements that are not written are noticed."""
    inputs = [*parameters(2, 3, 17, 33, (3, 3), 3), *paths(2, (3, 33, 7, 5))]
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        results = differentiate(predicted(form), inputs)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert all(torch.isfinite(t).all() for part in results for t in part)


@pytest.mark.parametrize("backend", ["default", "reference"], indirect=True)  # the operator itself: no call by Python
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nothing_is_mutated_and_nothing_aliased(backend, layout):
    xs, (weight, bias, gates) = paths(2, (3, 5, 4, 6), layout=layout), parameters(2, 2, 6, 5, (3, 3), 3)
    geometry = ([2, 1], [1, 1], [1, 1])
    for form in FORMS:
        arguments = (
            [x.clone().requires_grad_() for x in xs],
            weight.requires_grad_(),
            None,
            gates,
            *geometry,
            True,
            form,
        )
        torch.library.opcheck(torch.ops.fastroute.cross_predict.default, arguments)
    with torch.no_grad():
        outputs = torch.ops.fastroute.cross_predict(xs, weight, bias, gates, *geometry, True, "predict")
    for masks in (outputs, []):
        arguments = (outputs, masks, xs, weight.detach(), bias, gates, *geometry, True)
        torch.library.opcheck(torch.ops.fastroute.cross_predict_backward.default, arguments)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_whole_with_a_changing_batch(backend, layout):
    torch._dynamo.reset()
    weight, bias, _ = parameters(2, 2, 6, 5, (3, 3), 1)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(xs, gates):
        outputs = ops.cross_predict([x.relu() for x in xs], weight, bias, gates, padding=1)
        return sum(y.sum() for y in outputs), outputs

    for batch in (2, 3, 5, 8):
        xs = [x.requires_grad_() for x in paths(2, (batch, 5, 4, 4), layout=layout)]
        gates = torch.softmax(draw(batch, 2, 2), -1)
        loss, outputs = step(xs, gates)
        loss.backward()
        expected = eager(padding=1)(weight, bias, gates, *(x.detach().relu() for x in xs))
        torch.testing.assert_close(outputs[0], expected[0])
        assert outputs[0].is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
        assert all(x.grad is not None for x in xs)


def test_autocast_casts_as_for_a_convolution(backend):
    xs, ps = paths(2, (3, 5, 4, 4)), [p.requires_grad_() for p in parameters(2, 2, 6, 5, (3, 3), 3)]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = ops.cross_predict(xs, *ps)
        half = ops.cross_predict([x.bfloat16() for x in xs], *ps)
    assert all(y.dtype == torch.bfloat16 for y in (*outputs, *half))
    assert all(map(torch.equal, outputs, half))
    outputs[0].float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ps)


def saved_bytes(function, *inputs):
    """Bytes of the distinct memory that autograd keeps for the backward."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    return sum(kept.values())


def test_keeps_no_predictions_for_the_backward(backend):
    inputs = [t.requires_grad_() for t in (*parameters(3, 3, 16, 16, (3, 3), 8), *paths(3, (8, 16, 16, 16)))]
    ours, theirs = saved_bytes(predicted(padding=1), *inputs), saved_bytes(eager(padding=1), *inputs)
    path, others = inputs[-1].nbytes, sum(t.nbytes for t in inputs[:3])
    assert ours == 6 * path + others  # X and Y
    assert theirs >= 15 * path  # U too


def test_the_plan_of_the_native_passes(native_library):
    """Check that the cases of this file run the passes that they are meant to test."""
    plan = torch.ops.fastroute_native.cross_predict_plan
    small = torch.zeros(2, 2, 8, 8, 3, 3)
    dtypes = torch.float32, torch.bfloat16, torch.float16
    plans = [plan(torch.zeros(1, 1, dtype=dtype), small) for dtype in dtypes]
    assert [(last, converted) for last, converted, _, _ in plans] == [(True, False), (True, False), (True, True)]
    # Chunks grow with the weight, which each of them converts, and have a sample for each thread.
    weights = small, torch.zeros(2, 2, 128, 128, 3, 3), torch.zeros(2, 2, 512, 512, 3, 3)
    assert [plan(torch.zeros(1, 1), weight)[2] for weight in weights] == [1 << 20, weights[1].nbytes, 8 << 20]
    threads = torch.get_num_threads()
    large = torch.zeros(4 * threads, 1).expand(-1, 1 << 20)  # 4 MiB a sample
    assert plan(large, small)[3] == threads


# Kernels some of whose positions meet padding alone, or that are larger than the map, dilations of kernels of one, one
# channel in channels_last, and strides along a size with a single output: where PyTorch's convolutions on a CPU crash,
# or give wrong results or gradients.
LOOSE = [
    ((4, 16, 3, 9, 9), (8, (5, 3, 7)), {"stride": (2, 1, 3), "padding": (3, 0, 0)}),
    ((4, 1, 9, 3), (2, (3, 3)), {"stride": (1, 2)}),
    ((4, 1, 4, 3), (8, (1, 5)), {"stride": (1, 3), "padding": (0, 1)}),
    ((1, 2, 9, 1), (5, (2, 1)), {"stride": (3, 2), "padding": (0, 1), "dilation": (1, 2)}),
    ((4, 3, 7, 1), (2, (1, 3)), {"stride": 2, "padding": (0, 1)}),
    ((1, 16, 3, 1), (16, (1, 5)), {"stride": (1, 3), "padding": (0, 3)}),
    ((4, 8, 1, 1), (8, (3, 3)), {"padding": 1}),
    ((2, 8, 2), (5, (2,)), {"stride": 3, "padding": 1}),
    ((1, 3, 6, 5, 14), (5, (7, 1, 1)), {"padding": (1, 0, 0), "dilation": (1, 1, 2)}),
    ((2, 16, 4, 8, 2), (5, (5, 5, 3)), {"padding": (1, 0, 2)}),
    ((1, 8, 8, 3), (8, (3, 3)), {"stride": (1, 2)}),
    ((2, 8, 16, 2), (8, (3, 3)), {"stride": 2, "padding": 1}),
    ((4, 16, 4, 1), (2, (1, 5)), {"stride": (1, 3), "padding": 2}),
    ((1, 8, 2, 3, 2), (2, (1, 2, 3)), {"stride": (1, 1, 2), "padding": (0, 2, 1)}),
]


@pytest.mark.parametrize("case", LOOSE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", FORMS)
def test_geometries_that_pytorch_has_wrong(backend, dtype, layout, form, case):
    shape, (width, kernel), geometry = case
    ps, xs = parameters(1, 1, width, shape[1], kernel, shape[0], dtype), paths(1, shape, dtype, layout)
    outputs, gradients, incoming = differentiate(predicted(form, None, **geometry), [*ps, *xs])
    exact = differentiate(eager(None, **geometry), [t.double() for t in (*ps, *xs)], incoming)
    rtol = 1e-4 if dtype == torch.float32 else 0.02
    for ours, theirs in zip((*outputs, *gradients), (*exact[0], *exact[1]), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=rtol * theirs.abs().max().item())


def test_which_kernels_fit_the_map():
    """Every position meets the map in some output, and the kernel is no larger than the map."""
    for size, k, s, p, d in itertools.product(range(1, 7), range(1, 6), range(1, 4), range(4), range(1, 4)):
        outputs = (size + 2 * p - d * (k - 1) - 1) // s + 1
        if outputs < 1:
            continue
        met = all(any(0 <= o * s + i * d - p < size for o in range(outputs)) for i in range(k))
        fits = kernel_fits((1, 1, size), (1, 1, k), [s], [p], [d])
        assert fits == (met and d * (k - 1) < size), (size, k, s, p, d)


def test_the_correct_geometry_computes_the_same():
    """Also where the convolution at hand is right: the values do not depend on the processor."""
    for size, k, s, p, d in itertools.product(range(1, 7), range(1, 4), range(1, 4), range(4), range(1, 3)):
        outputs = (size + 2 * p - d * (k - 1) - 1) // s + 1
        if outputs < 1:
            continue
        x = torch.randn(2, 2, 5, size, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(3, 2, 3, k, dtype=torch.float64)
        given = {"stride": (1, s), "padding": (1, p), "dilation": (1, d)}
        geometry = correct_geometry(x, weight, *given.values())
        assert outputs > 1 or (geometry.stride[1] == 1 and (s == 1 or geometry.padding[1] == 0)), given
        prepared, weight = geometry.prepare(x, weight)
        y = torch.nn.functional.conv2d(prepared, weight, None, geometry.stride, geometry.padding, geometry.dilation)
        torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight, **given))
        grad, whole = torch.autograd.grad(y.square().sum(), [prepared, x])
        assert torch.equal(geometry.restore(grad, x.shape[2:]), whole)


def test_second_derivatives_where_the_kernel_does_not_fit(backend):
    xs, ps = paths(1, (2, 3, 1, 1), torch.bfloat16), parameters(1, 1, 4, 3, (3, 3), 2, torch.bfloat16)

    def penalty(weight, bias, gates, x):
        [y] = ops.cross_predict([x], weight, bias, gates, padding=1, activation=None)
        [grad] = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        return grad.float().square().sum()

    def second(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (*ps, *xs)]
        return [grad.float() for grad in torch.autograd.grad(penalty(*leaves), leaves)]

    for ours, theirs in zip(second(torch.bfloat16), second(torch.float32), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())


x = torch.zeros(4, 3, 6, 6)
weight, bias, gates = torch.zeros(2, 2, 5, 3, 3, 3), torch.zeros(2, 2, 5), torch.zeros(4, 2, 2)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "xs is a Tensor", {"xs": x}),
        (ValueError, "xs has 0 paths", {"xs": []}),
        (
            ValueError,
            r"weight has shape \(2, 2, 5, 3, 3, 3\); it must have shape \(3, 2, 5, 3, 3, 3\)",
            {"xs": [x] * 3},
        ),
        (ValueError, r"weight has shape \(2, 2, 5, 3\).*2 kernel sizes", {"weight": weight[..., 0, 0]}),
        (ValueError, r"weight has shape \(2, 9", {"weight": weight[:, :1].repeat(1, 9, 1, 1, 1, 1)}),
        (ValueError, r"bias has shape \(2, 2\); it must have shape \(2, 2, 5\)", {"bias": bias[..., 0]}),
        (ValueError, r"gates has shape \(2, 2\); it must have shape \(4, 2, 2\)", {"gates": gates[0]}),
        (TypeError, "weight has dtype torch.float64", {"weight": weight.double()}),
        (TypeError, "weight is None; it must be a tensor", {"weight": None}),
        (TypeError, "gates is a list; it must be a tensor", {"gates": [1.0]}),
        (TypeError, "bias is a list; it must be a tensor or None", {"bias": [0.0]}),
        (TypeError, "stride is 1.5; it must be an integer, or one for each of 2 spatial sizes", {"stride": 1.5}),
        (TypeError, "padding is None; it must be an integer", {"padding": None}),
        (TypeError, r"stride is \[1.5, 1\]; it must be an integer", {"stride": [1.5, 1]}),
        (ValueError, "stride is 0; it must be at least 1", {"stride": 0}),
        (ValueError, "dilation is 4611686018427387904; it must be .* at most 1073741824", {"dilation": 1 << 62}),
        (ValueError, r"padding is \(1,\); it must be one number, or one for each of 2", {"padding": (1,)}),
        (ValueError, "dilation is -1", {"dilation": -1}),
        (ValueError, "smaller than a kernel of", {"dilation": 4}),
        (ValueError, "activation is 'gelu'; it must be 'relu' or None", {"activation": "gelu"}),
        (ValueError, "form is 'both'; it must be 'predict' or 'gate'", {"form": "both"}),
    ],
)
def test_bad_input(refused, error, message, changes):
    arguments = {"xs": [x] * 2, "weight": weight, "bias": bias, "gates": gates, **changes}
    refused(error, message, ops.cross_predict, **arguments)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 5, 1, 1), (1, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_backends_agree_on_strides(layout, shape):
    xs, ps = paths(2, shape, layout=layout), parameters(2, 2, 4, shape[1], (3, 3), shape[0])
    strides = []
    for name in ("reference", "native"):
        with use_backend(name):
            strides.append([y.stride() for y in predicted(padding=1)(*ps, *xs)])
    assert strides[0] == strides[1]
