"""The end of a block in one pass: against PyTorch's modules in float64, and where the modules themselves are called."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad as fw
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper as wrap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastroute
from fastroute.backends import native_serves_cpu, use_backend
from fastroute.nn import FusedSequential, block_end, blocks, residual_sum
from fastroute.testing import assert_as_good_as_eager

pytestmark = pytest.mark.skipif(not native_serves_cpu(), reason="needs the compiled CPU kernels")

# Channels that are fewer, as many as, and more than the elements of a register and of the columns summed together, and
# pixels that fill no block, one block and several; and samples of few pixels, which are joined.
SHAPES = [
    (8, 16, 32, 32),
    (3, 5, 7, 9),
    (2, 64, 24, 24),
    (5, 136, 4, 4),
    (64, 33, 1, 1),
    (2, 1, 40, 40),
    (1, 520, 20, 3),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@pytest.fixture(autouse=True)
def wherever_it_can(monkeypatch):
    """Use the kernel also where it is slower, and fill what it leaves out with NaN."""
    monkeypatch.setattr(blocks, "_is_faster", lambda norm, x: True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of the kernel."""
    counted = []
    kernel = blocks._fused
    monkeypatch.setattr(blocks, "_fused", lambda *args: counted.append(args) or kernel(*args))
    return counted


def norm_of(channels, **options):
    norm = nn.BatchNorm2d(channels, **options)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(1, 0.5)
        if norm.track_running_stats:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return norm


def results(function, norm, x, shortcut, end, incoming):
    """Return outputs, gradients and statistics of function(norm, x, shortcut, end), computed in a copy of norm."""
    norm = copy.deepcopy(norm)
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, shortcut) if t is not None
    ]
    y = function(norm, leaves[0], leaves[1] if shortcut is not None else None, end)
    gradients = torch.autograd.grad(y, [*leaves, *norm.parameters()], incoming.to(y.dtype))
    return [y.detach(), *gradients, *(b for b in norm.buffers() if b.is_floating_point())], norm


def modules(norm, x, shortcut=None, end=None):
    y = norm(x)
    y = y if shortcut is None else y + shortcut
    return y if end is None else end(y)


def check(norm, x, shortcut, end):
    double = copy.deepcopy(norm).double()
    wide = [None if t is None else t.double() for t in (x, shortcut)]
    with torch.no_grad():
        y = modules(copy.deepcopy(double), *wide, end)
        before = modules(copy.deepcopy(double), *wide)
    incoming = torch.randn_like(y).to(x.dtype).double()
    # Where the ReLU's input is near 0, its rounding decides, by chance, whether there is a gradient.
    incoming *= before.abs() > 16 * torch.finfo(x.dtype).eps * (1 + before.abs().max())
    exact, _ = results(modules, double, *wide, end, incoming)
    eager, plain = results(modules, norm, x, shortcut, end, incoming)
    ours, fused = results(block_end, norm, x, shortcut, end, incoming)
    assert_as_good_as_eager(ours, eager, exact)
    for got, expected in zip(ours, eager, strict=True):
        assert got.dtype == expected.dtype and got.stride() == expected.stride()
    if norm.track_running_stats:
        assert fused.num_batches_tracked == plain.num_batches_tracked


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


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Traced(torch.Tensor):
    pass


X = torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last)


def hooked(module):
    module.register_forward_hook(lambda module, args, output: 2 * output)
    return module


@pytest.mark.parametrize(
    ("norm", "x", "shortcut", "end"),
    [
        (hooked(norm_of(16)), X, None, nn.ReLU()),
        (norm_of(16), X, None, hooked(nn.ReLU())),
        (Doubled(16), X, None, nn.ReLU()),
        (norm_of(16), X, None, nn.GELU()),
        (norm_of(16), X.as_subclass(Traced), None, nn.ReLU()),
        (norm_of(16), X, torch.randn(1, 16, 1, 1), nn.ReLU()),
        (norm_of(16), X, X.double(), nn.ReLU()),
        (norm_of(16), X, X.contiguous(), nn.ReLU()),
        (nn.GroupNorm(4, 16), X, X, nn.ReLU()),
        (norm_of(16).to("meta"), X.to("meta"), None, nn.ReLU()),
        (norm_of(16).eval(), X[:0], None, nn.ReLU()),
    ],
    ids=[
        "a hook of the norm",
        "a hook of the ReLU",
        "a subclass of the norm",
        "another activation",
        "a subclass of the tensor",
        "a shortcut that is broadcast",
        "a shortcut of another dtype",
        "a shortcut of another layout",
        "another norm",
        "another device",
        "no samples",
    ],
)
def test_everything_else_is_left_to_the_modules(norm, x, shortcut, end, calls):
    ours, expected = block_end(norm, x, shortcut, end), modules(norm, x, shortcut, end)
    assert not calls and type(ours) is type(expected) and ours.dtype == expected.dtype
    if not ours.is_meta:
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("size", "layout", "dtype", "training", "served"),
    [
        (6, "contiguous", torch.float32, True, True),
        (6, "contiguous", torch.float32, False, True),
        (5, "contiguous", torch.float32, True, False),
        (7, "contiguous", torch.bfloat16, False, False),
        (8, "contiguous", torch.bfloat16, True, True),
        (4, "channels_last", torch.float32, True, True),
        (4, "channels_last", torch.bfloat16, False, True),
    ],
)
def test_where_it_is_faster(size, layout, dtype, training, served, monkeypatch):
    monkeypatch.undo()
    served_with = []
    monkeypatch.setattr(blocks, "_fused", lambda *args: served_with.append(args) or args[1])
    x = torch.randn(2, 16, size, size).to(dtype).contiguous(memory_format=FORMATS[layout])
    block_end(norm_of(16).train(training), x)
    assert bool(served_with) == served


@pytest.mark.parametrize(
    ("dtype", "training", "nodes"),
    [(torch.float32, True, 1), (torch.float32, False, 0), (torch.bfloat16, False, 1), (torch.float64, False, 0)],
)
def test_where_it_is_faster_in_a_compiled_graph(dtype, training, nodes, monkeypatch):
    monkeypatch.undo()
    graphs = []

    def compiler(graph, example):
        graphs.append(graph)
        return graph.forward

    norm, x = norm_of(16).train(training), torch.randn(2, 16, 4, 4).to(dtype)
    norm = norm.double() if dtype == torch.float64 else norm
    torch.compile(lambda x: block_end(norm, x), backend=compiler, fullgraph=True)(x)
    operator = torch.ops.fastroute_native.batch_norm.default
    assert sum(node.target is operator for node in graphs[0].graph.nodes) == nodes


def test_other_backends_transforms_modes_and_traces_are_left_to_the_modules(calls):
    norm = norm_of(16).eval()
    with use_backend("reference"):
        block_end(norm, X)
    torch.func.vmap(lambda x: block_end(norm, x[None]))(X)
    torch.func.jvp(lambda x: block_end(norm, x), (X,), (X,))
    with FlopCounterMode(display=False):
        block_end(norm, X)
    torch.jit.trace(lambda x: block_end(norm.requires_grad_(False), x), X, check_trace=False)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    block_end(norm, X)
    handle.remove()
    assert not calls
    with use_backend("native"):
        block_end(norm, X)
    assert calls


def test_bad_input_is_refused_by_the_modules():
    with pytest.raises(ValueError, match="expected 4D"):
        block_end(norm_of(16), torch.randn(4, 16))
    with pytest.raises(ValueError, match="more than 1 value"):
        block_end(norm_of(16), torch.randn(1, 16, 1, 1))
    with pytest.raises(RuntimeError):
        block_end(norm_of(8), X)


def test_float64_maps_of_float32_parameters_are_refused_by_the_modules():
    with pytest.raises(RuntimeError, match="dtype"):
        block_end(norm_of(16), X.double())


def test_private_calls_are_checked():
    with pytest.raises(RuntimeError, match="only the batch may be empty"):
        empty = torch.zeros(0).as_strided((2, 3, 0, 4), (0, 0, 4, 1))
        torch.ops.fastroute_native.batch_norm(empty, None, None, None, None, None, 1e-5, True)
    call = torch.ops.fastroute_native.batch_norm
    ones = torch.ones(16)
    with pytest.raises(RuntimeError, match="together"):
        call(X, None, ones, ones, ones, None, 1e-5, True)
    with pytest.raises(RuntimeError, match="shape"):
        call(X, None, torch.ones(8), ones, None, None, 1e-5, True)
    with pytest.raises(RuntimeError, match="differ"):
        call(X, X.double(), ones, ones, None, None, 1e-5, True)


def sequence():
    return [
        nn.Conv2d(3, 16, 3, padding=1),
        norm_of(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, padding=1),
        norm_of(16),
    ]


def test_a_sequence_is_that_of_pytorch(calls):
    torch.manual_seed(0)
    fused, x = FusedSequential(*sequence(), nn.Dropout(0.0), nn.ReLU()), torch.randn(4, 3, 12, 12)
    plain = nn.Sequential(*copy.deepcopy(list(fused)))
    assert fused.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(fused(x), plain(x))
    assert len(calls) == 2
    torch.testing.assert_close(dict(fused.named_buffers()), dict(plain.named_buffers()))
    assert isinstance(fused[:3], FusedSequential) and FusedSequential()(x) is x


@pytest.mark.parametrize("observed", [False, True])
def test_a_residual_block(observed, calls):
    torch.manual_seed(0)
    residual, shortcut, x = nn.Sequential(*sequence()), nn.Conv2d(3, 16, 1), torch.randn(4, 3, 12, 12)
    expected = torch.relu(copy.deepcopy(residual)(x) + shortcut(x))
    seen = []
    if observed:
        residual.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(residual_sum(residual, x, shortcut, nn.ReLU()), expected)
    assert (len(seen), len(calls)) == ((1, 0) if observed else (0, 2))


class Scaled(nn.Sequential):
    def forward(self, x):
        return 0.1 * super().forward(x)


@pytest.mark.parametrize(
    "residual",
    [
        Scaled(*sequence()),
        nn.Sequential(nn.ReLU(inplace=True), *sequence()),
        nn.Sequential(nn.Dropout(0.5), *sequence()),
        nn.Sequential(*sequence(), nn.ReLU()),
        nn.Conv2d(3, 16, 1),
        wrap(nn.Sequential(*sequence())),
    ],
    ids=["another forward", "in-place", "random", "a ReLU at the end", "no sequence", "checkpointed"],
)
def test_residuals_of_any_kind(residual):
    shortcut = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 16, 1))
    found = []
    for function in (residual_sum, lambda residual, x, shortcut, end: end(residual(x) + shortcut(x))):
        torch.manual_seed(0)
        layers, x = copy.deepcopy(residual), torch.randn(4, 3, 12, 12, requires_grad=True)
        y = function(layers, x.clone(), shortcut, nn.ReLU())
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layers.parameters()])])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-2)


def test_compiled_autograd():
    network, x = FusedSequential(*sequence(), nn.ReLU()), torch.randn(4, 3, 12, 12)
    loss = network(x).square().sum()
    expected = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda loss: loss.backward(), backend="eager")(loss)
    for parameter, grad in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize(("form", "nodes"), [("auto", 2), ("fused", 0)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_graphs(form, nodes, dynamic):
    torch.manual_seed(0)
    network, graphs = FusedSequential(*sequence()), []
    network.append(nn.ReLU())
    plain = nn.Sequential(*copy.deepcopy(list(network)))

    def compiler(graph, example):
        graphs.append(graph)
        return graph.forward

    with fastroute.compile_form(form):
        compiled = torch.compile(network, backend=compiler, fullgraph=True, dynamic=dynamic)
        for batch in (4, 6):
            x = torch.randn(batch, 3, 12, 12)
            torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(dict(network.named_buffers()), dict(plain.named_buffers()))
    operator = torch.ops.fastroute_native.batch_norm.default
    assert all(sum(node.target is operator for node in graph.graph.nodes) == nodes for graph in graphs)


def test_compiled_by_inductor():
    """Inductor may give the operator its maps in channels_last, whatever the layout of the eager network."""
    torch.manual_seed(0)
    network = FusedSequential(*sequence(), nn.ReLU())
    plain, x = nn.Sequential(*copy.deepcopy(list(network))), torch.randn(4, 3, 12, 12)
    compiled, expected = torch.compile(network)(x), plain(x)
    torch.testing.assert_close(compiled, expected)
    incoming = torch.randn_like(expected)
    for y in (compiled, expected):
        y.backward(incoming)
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_layers_that_inductor_folds_are_left_to_it(calls):
    network, x = FusedSequential(*sequence(), nn.ReLU()).eval(), torch.randn(4, 3, 12, 12)
    expected = network(x)
    calls.clear()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        torch.testing.assert_close(torch.compile(network)(x), expected, rtol=1e-4, atol=1e-4)
    assert not calls


def test_checkpointing_recomputes_the_same():
    torch.manual_seed(0)
    network, x = FusedSequential(*sequence(), nn.ReLU()), torch.randn(4, 3, 12, 12, requires_grad=True)
    [plain] = torch.autograd.grad(network(x).square().sum(), [x])
    [again] = torch.autograd.grad(checkpoint(network, x, use_reentrant=False).square().sum(), [x])
    assert torch.equal(plain, again)


def test_synchronised_normalisation_is_left_to_the_modules(calls):
    network = nn.SyncBatchNorm.convert_sync_batchnorm(FusedSequential(*sequence()))
    assert isinstance(network, FusedSequential) and isinstance(network[1], nn.SyncBatchNorm)
    network.eval()(torch.randn(4, 3, 12, 12))
    assert not calls


def test_exported_graphs_have_the_modules():
    program = torch.export.export(FusedSequential(*sequence()).eval(), (torch.randn(4, 3, 12, 12),))
    assert not [node for node in program.graph.nodes if "fastroute" in str(node.target)]


def test_opcheck():
    x = torch.randn(4, 16, 8, 8, requires_grad=True)
    ones = torch.ones(16, requires_grad=True)
    for residual, moments in ((x, (None, None)), (None, (torch.zeros(16), torch.ones(16)))):
        torch.library.opcheck(
            torch.ops.fastroute_native.batch_norm.default, (x, residual, ones, ones, *moments, 1e-5, True)
        )
