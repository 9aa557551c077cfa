import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from fastroute import ops, use_backend
from fastroute.backends import BACKENDS
from tests.ops.cases import check_against_eager, differentiate, eager_cross_connect, named, parameters, paths

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ["contiguous", "channels_last", "stacked", "sliced"]


ACTIVATIONS = [None, "relu"]


def routed(m, activation=None):
    def run(w1, b1, w2, b2, *xs):
        result = ops.cross_connect(list(xs[:m]), w1, b1, w2, b2, activation)
        return [*result.outputs, result.gates, result.scores]

    return run


def eager(w1, b1, w2, b2, *xs):
    return eager_cross_connect(xs, w1, b1, w2, b2)


def eager_after_relu(*inputs):
    return eager(*inputs[:4], *map(torch.relu, inputs[4:]))


def check(xs, ps, activation=None):
    plain = eager_after_relu if activation else eager
    return check_against_eager(routed(len(xs), activation), plain, [*ps, *xs])


# Every H, W, C, N and path count that is asked for, in few cases: odd sizes beside even ones, rows shorter and longer
# than a register, more channels than a block.
SHAPES = [
    (3, 16, 8, 8),
    (3, 3, 32, 32),
    (1, 1, 1, 1),
    (3, 33, 7, 5),
    (1, 64, 13, 32),
    (3, 130, 5, 1),
    (17, 16, 7, 7),
    (0, 16, 8, 8),
]
COUNTS = [(1, 2), (2, 2), (3, 1), (5, 4), (8, 8)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_every_gradient(backend, layout, dtype, activation):
    for (shape, (m, n)), bias in zip(itertools.product(SHAPES, COUNTS), itertools.cycle([True, True, False])):
        with named(shape=shape, paths=(m, n)):
            precise = torch.float64 if dtype == torch.float64 else torch.float32
            ps = parameters(m, n, shape[1], bias=bias, dtype=precise, scale=0.3)
            check(paths(m, shape, dtype, layout), ps, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 9), (2, 5, 3, 4, 7)], ids=str)
@pytest.mark.parametrize("hidden", [None, 1, 7])
def test_other_ranks_and_gates(backend, shape, hidden, activation):
    for layout in ("contiguous", "channels_last"):
        with named(layout=layout):
            check(paths(3, shape, layout=layout), parameters(3, 2, shape[1], hidden), activation)


def test_parameters_of_the_paths_dtype(backend):
    check(paths(2, (3, 8, 5, 5), torch.bfloat16), parameters(2, 2, 8, dtype=torch.bfloat16))


def test_extreme_scores(backend):
    xs, ps = paths(2, (3, 4, 5, 5)), parameters(2, 3, 4)
    ps[3] = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    (*_, gates, _), _ = check(xs, ps)
    assert torch.equal(gates[:, 0], torch.tensor([1.0, 0.0, 0.0]).expand(3, 3))
    assert torch.allclose(gates.sum(-1), torch.ones(3, 2))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_maps_are_streamed(backend, activation):
    """Outputs past the caches go through other stores than small ones."""
    check(paths(2, (5, 64, 64, 64)), parameters(2, 2, 64, scale=0.2), activation)


def test_relu_at_zero_and_beyond_numbers(backend):
    """Zeros of either sign have no gradient, infinities count as they are, and a NaN does not vanish."""
    xs, ps = paths(2, (2, 3, 4, 5)), parameters(2, 2, 3)
    xs[0][0, :, 0] = torch.tensor([0.0, -0.0, 1.0])[:, None]
    xs[1][0, 1] = float("-inf")
    _, gradients = check(xs, ps, "relu")
    assert not gradients[4][0, :2, 0].any() and not gradients[5][0, 1].any()
    xs[0][1, 2, 3, 4] = float("nan")
    *outputs, gates, _ = routed(2, "relu")(*ps, *xs)
    assert all(y[1].isnan().all() and y[0].isfinite().all() for y in outputs)
    assert gates[1, 0].isnan().all() and gates[1, 1].isfinite().all()


def test_relu_saves_nothing_but_what_is_given(backend):
    xs = [x.requires_grad_() for x in paths(2, (4, 5, 8, 8))]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.cross_connect(xs, *parameters(2, 2, 5), activation="relu")
    assert {t.data_ptr() for t in saved if t.numel() >= xs[0].numel()} == {x.data_ptr() for x in xs}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 8),
    n=st.integers(1, 8),
    batch=st.integers(0, 5),
    channels=st.integers(1, 70),
    space=st.lists(st.integers(1, 20), max_size=2),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    hidden=st.sampled_from([None, 1, 16, 19]),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_random_shapes(backend, m, n, batch, channels, space, layout, dtype, hidden, activation):
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    ps = parameters(m, n, channels, hidden, dtype=precise, scale=0.3)
    check(paths(m, (batch, channels, *space), dtype, layout), ps, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [None, 3])
def test_gradcheck(backend, hidden, activation):
    ps = parameters(2, 3, 4, hidden, dtype=torch.float64)
    inputs = [*ps, *paths(2, (2, 4, 3, 2), torch.float64)]
    inputs = tuple(None if t is None else t.requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(lambda *a: tuple(routed(2, activation)(*a)), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: tuple(routed(2, activation)(*a)), inputs, fast_mode=True)


@pytest.mark.parametrize("use", [["outputs"], ["gates"], ["scores"], ["outputs", "scores"], ["one output"]])
def test_absent_incoming_gradients(backend, use):
    def pick(results):
        *outputs, gates, scores = results
        chosen = {"outputs": outputs, "gates": [gates], "scores": [scores], "one output": outputs[:1]}
        return [t for name in use for t in chosen[name]]

    inputs = [*parameters(2, 2, 5), *paths(2, (3, 5, 4, 4))]
    ours = differentiate(lambda *a: pick(routed(2)(*a)), inputs)
    theirs = differentiate(lambda *a: pick(eager(*a)), inputs)
    for actual, expected in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
        torch.testing.assert_close(actual, expected)


def test_only_parameters_need_gradients(backend):
    xs, ps = paths(2, (3, 5, 4, 4)), [p.requires_grad_() for p in parameters(2, 2, 5)]
    sum(y.square().sum() for y in ops.cross_connect(xs, *ps).outputs).backward()
    expected = torch.autograd.grad(sum(y.square().sum() for y in eager(*ps, *xs)[:2]), ps)
    for parameter, gradient in zip(ps, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_take_the_layout_of_the_inputs(backend, layout):
    xs = paths(2, (3, 6, 5, 4), layout=layout)
    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert all(y.is_contiguous(memory_format=wanted) for y in ops.cross_connect(xs, *parameters(2, 2, 6)).outputs)


def test_other_layouts_are_made_contiguous(backend):
    xs = [x.transpose(2, 3) for x in paths(2, (3, 6, 5, 4))]
    ps = parameters(2, 2, 6)
    for ours, theirs in zip(routed(2)(*ps, *xs), eager(*ps, *xs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bitwise_repeatable(backend):
    inputs = [*parameters(3, 3, 33), *paths(3, (17, 33, 7, 7))]
    first, second = (differentiate(routed(3), inputs) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


def test_every_element_is_written(backend):
    """Fresh memory is full of NaN, so that elements that are not written are noticed."""
    inputs = [*parameters(2, 3, 33), *paths(2, (3, 33, 7, 5))]
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with it, torch.utils.deterministic.fill_uninitialized_memory holds
    try:
        results = differentiate(routed(2), inputs)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert all(torch.isfinite(t).all() for part in results for t in part)


@pytest.mark.parametrize("backend", ["default", "reference"], indirect=True)  # the operator itself: no call by Python
@pytest.mark.parametrize("relu", [False, True])
def test_nothing_is_mutated_and_nothing_aliased(backend, relu):
    xs, ps = paths(2, (3, 5, 4, 4)), parameters(2, 2, 5)
    for hidden in (ps, parameters(2, 2, 5, None)):
        torch.library.opcheck(torch.ops.fastroute.cross_connect.default, (xs, *hidden, relu))
        needed = [x.clone().requires_grad_() for x in xs], *(None if p is None else p.requires_grad_() for p in hidden)
        torch.library.opcheck(torch.ops.fastroute.cross_connect.default, (*needed, relu))
    with torch.no_grad():
        outputs, gates, _, pooled, hidden = torch.ops.fastroute.cross_connect(xs, *ps, relu)
    arguments = (outputs, gates, None, xs, *ps, gates, pooled, hidden, relu, True)
    arguments = [[t.detach() for t in a] if isinstance(a, list) else a for a in arguments]
    arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(torch.ops.fastroute.cross_connect_backward.default, arguments)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_whole_with_a_changing_batch(backend, layout, activation):
    torch._dynamo.reset()
    ps = parameters(2, 2, 5)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(xs):
        result = ops.cross_connect([x.relu() if activation is None else x + 0 for x in xs], *ps, activation)
        return sum(y.sum() for y in result.outputs) + result.scores.square().sum(), result.outputs

    for batch in (2, 3, 5, 8):
        xs = [x.requires_grad_() for x in paths(2, (batch, 5, 4, 4), layout=layout)]
        loss, outputs = step(xs)
        loss.backward()
        expected = eager(*ps, *(x.detach().relu() for x in xs))
        torch.testing.assert_close(outputs[0], expected[0])
        assert outputs[0].stride() == xs[0].stride()
        assert all(x.grad is not None for x in xs)


@pytest.mark.parametrize("bias", [False, True])
def test_autocast_with_float32_parameters(backend, bias):
    """Gates are computed as without autocast, in the forward and in a backward that runs under it too."""
    xs, ps = paths(2, (3, 5, 4, 4), torch.bfloat16), parameters(2, 2, 5, bias=bias)
    leaves = [p.requires_grad_() for p in ps if p is not None]

    def run():
        result = ops.cross_connect(xs, *ps)
        return result, torch.autograd.grad(result.outputs[0].float().sum() + result.scores.sum(), leaves)

    with torch.autocast("cpu", torch.bfloat16):
        result, grads = run()
    assert result.outputs[0].dtype == torch.bfloat16
    plain, expected = run()
    assert torch.equal(result.scores, plain.scores) and torch.equal(result.gates, plain.gates)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, expected, strict=True))


def test_samples_more_than_two_gigabytes_apart(backend):
    """Offsets of samples need 64 bits; the memory between them is reserved and never touched."""
    stride = 2**31 + 64
    x = torch.empty(stride + 64, dtype=torch.float32).as_strided((2, 4, 4, 4), (stride, 16, 4, 1))
    values = paths(1, (2, 4, 4, 4))[0]
    x.copy_(values)
    ps = parameters(1, 2, 4)
    for ours, theirs in zip(routed(1)(*ps, x), eager(*ps, values), strict=True):
        torch.testing.assert_close(ours, theirs)


x = torch.zeros(2, 3, 4, 4)
w1, b1, w2, b2 = torch.zeros(2, 5, 3), torch.zeros(2, 5), torch.zeros(2, 2, 5), torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "xs has 0 paths", ([], w1, b1, w2, b2)),
        (ValueError, "xs has 9 paths", ([x] * 9, w1, b1, w2, b2)),
        (TypeError, "xs is a Tensor", (x, w1, b1, w2, b2)),
        (TypeError, r"xs\[1\] is a int", ([x, 3], w1, b1, w2, b2)),
        (ValueError, r"xs\[1\] has shape \(2, 3, 4, 5\)", ([x, torch.zeros(2, 3, 4, 5)], w1, b1, w2, b2)),
        (TypeError, r"xs\[1\] has dtype torch.float64", ([x, x.double()], w1, b1, w2, b2)),
        (TypeError, r"xs\[0\] has dtype torch.int64", ([x.long()] * 2, w1, b1, w2, b2)),
        (ValueError, r"xs\[1\] is on meta", ([x, x.to("meta")], w1, b1, w2, b2)),
        (ValueError, "same memory format", ([x, x.to(memory_format=torch.channels_last)], w1, b1, w2, b2)),
        (ValueError, "layout torch.sparse_coo", ([x, x.to_sparse()], w1, b1, w2, b2)),
        (ValueError, r"xs\[0\] has shape \(4,\)", ([torch.zeros(4)] * 2, w1, b1, w2, b2)),
        (ValueError, "only the batch size may be 0", ([x[:, :, :0]] * 2, w1, b1, w2, b2)),
        (
            ValueError,
            r"w1 has shape \(2, 5, 4\); it must have shape \(2, 5, 3\)",
            ([x] * 2, w1.new_zeros(2, 5, 4), b1, w2, b2),
        ),
        (ValueError, r"b1 has shape \(5,\)", ([x] * 2, w1, b1[0], w2, b2)),
        (ValueError, r"w2 has shape \(2, 2, 4\)", ([x] * 2, w1, b1, w2[..., :4], b2)),
        (ValueError, r"w2 has shape \(2, 9, 5\)", ([x] * 2, w1, b1, w2.new_zeros(2, 9, 5), b2)),
        (ValueError, r"b2 has shape \(2, 3\)", ([x] * 2, w1, b1, w2, b2.new_zeros(2, 3))),
        (ValueError, "b1 is given without w1", ([x] * 2, None, b1, w2.new_zeros(2, 2, 3), b2)),
        (TypeError, "w1 has dtype torch.float64", ([x] * 2, w1.double(), b1, w2, b2)),
        (TypeError, "b1 is a list; it must be a tensor or None", ([x] * 2, w1, [0.0], w2, b2)),
        (ValueError, "activation is 'gelu'; it must be 'relu' or None", ([x] * 2, w1, b1, w2, b2, "gelu")),
    ],
)
def test_bad_input(refused, error, message, arguments):
    refused(error, message, ops.cross_connect, *arguments)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 5, 1, 1), (1, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_backends_agree_on_strides(layout, shape):
    xs, ps = paths(2, shape, layout=layout), parameters(2, 2, shape[1])
    strides = []
    for name in ("reference", "native"):
        with use_backend(name):
            strides.append([y.stride() for y in ops.cross_connect(xs, *ps).outputs])
    assert strides[0] == strides[1]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_large_sample(two_threads, layout, dtype, activation):
    """Which all threads take together."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    check(paths(2, (1, 24, 56, 57), dtype, layout), parameters(2, 3, 24, dtype=precise), activation)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_sample_beyond_the_caches(two_threads, layout):
    check(paths(2, (1, 64, 256, 160), layout=layout), parameters(2, 2, 64))


def test_plan_of_the_native_passes(two_threads, native_library):
    """Which passes the cases of this file go through, so that each of them is known to have run."""
    plan = torch.ops.fastroute_native.cpu_plan
    for shape, layout, expected in [
        ((3, 16, 8, 8), "contiguous", (False, True, True, False)),
        ((3, 16, 8, 8), "channels_last", (False, False, True, False)),
        ((3, 33, 1, 5), "contiguous", (False, False, True, False)),
        ((1, 16, 8, 8), "contiguous", (False, True, False, False)),  # there is no next sample
        ((5, 64, 64, 64), "contiguous", (True, True, False, False)),  # two samples do not fit in the cache
        ((1, 24, 56, 57), "contiguous", (False, True, False, True)),
        ((1, 24, 56, 57), "channels_last", (False, False, False, True)),
        ((1, 64, 128, 128), "contiguous", (False, True, False, True)),  # the next layer finds it in the caches
        ((1, 64, 256, 160), "contiguous", (True, True, False, True)),
    ]:
        x = paths(1, shape, layout=layout)[0]
        assert plan(x, 2, 2) == expected, (shape, layout)

    x = paths(1, (5, 64, 64, 64))[0]
    with torch.no_grad():  # no backward follows: 24 MiB in all stay in the caches
        assert [plan(x, m, n)[0] for m, n in ((2, 2), (1, 3), (2, 3))] == [False, False, True]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inference_writes_what_training_does(layout):
    """Inference writes through the caches, and training past them."""
    xs, ps = paths(2, (5, 64, 64, 64), layout=layout), parameters(2, 2, 64)
    with torch.no_grad():
        expected = ops.cross_connect(xs, *ps)
    leaves = [x.requires_grad_() for x in xs]
    found = ops.cross_connect(leaves, *ps)
    assert all(torch.equal(y, z) for y, z in zip(found.outputs, expected.outputs, strict=True))
    assert torch.equal(found.gates, expected.gates) and torch.equal(found.scores, expected.scores)


def test_kernels_are_told_whether_a_backward_follows(native_library, monkeypatch):
    """Outside compiled graphs, by the gradient mode, which autograd turns off in a forward of its own."""
    xs, ps, gates = paths(2, (3, 4, 5, 5)), parameters(2, 2, 4), torch.rand(3, 2, 2)
    kernels, modes = BACKENDS["reference"].kernels(), []

    def spied(kernel):
        def run(*args):
            modes.append(torch.is_grad_enabled())
            return kernel(*args)

        return run

    for name in ("cross_connect", "mix"):
        monkeypatch.setattr(kernels, name, spied(getattr(kernels, name)))

    def told():
        modes.clear()
        outputs = ops.cross_connect(xs, *ps).outputs[0], ops.mix(xs, gates)[0]
        assert modes == [y.requires_grad for y in outputs]
        return tuple(modes)

    with use_backend("reference"):
        assert told() == (False, False)
        for leaf, expected in ((xs[1], (True, True)), (ps[0], (True, False)), (gates, (False, True))):
            leaf.requires_grad_()
            assert told() == expected
            with torch.no_grad():
                assert told() == (False, False)
            with torch.inference_mode():
                assert told() == (False, False)
            leaf.requires_grad_(False)


def test_compiled_operators_refuse_tangents(native_library):
    """Forward-mode differentiation has no formula there, and must not lose its tangents in silence."""
    xs, ps, gates = paths(2, (3, 4, 5, 5)), parameters(2, 2, 4), torch.rand(3, 2, 2)
    compiled = torch.ops.fastroute
    with forward_ad.dual_level(), torch.no_grad():
        xs[0] = forward_ad.make_dual(xs[0], torch.ones_like(xs[0]))
        for call in (lambda: compiled.cross_connect(xs, *ps), lambda: compiled.mix(xs, gates)):
            with pytest.raises(RuntimeError, match="jvp is not implemented"):
                call()


def test_compiled_operators_refuse_transforms(native_library):
    """An inner torch.func.grad has nothing to record of what an outer one differentiates, which must not be lost."""
    xs, ps, gates = paths(2, (3, 4, 5, 5)), parameters(2, 2, 4), torch.rand(3, 2, 2)
    compiled = torch.ops.fastroute
    for route in (lambda x: compiled.cross_connect([x, xs[1]], *ps)[0], lambda x: compiled.mix([x, xs[1]], gates)):

        def outer(x, route=route):
            return torch.func.grad(lambda scale: scale * route(x)[0].sum())(torch.tensor(2.0))

        for call in (outer, torch.func.grad(outer)):
            with pytest.raises(RuntimeError, match="torch::autograd::Function"):
                call(xs[0])
