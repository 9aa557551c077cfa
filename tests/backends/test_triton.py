"""The Triton kernels against float64: in the interpreter where there is no card, on the card with `-m gpu`."""

import contextlib
import dataclasses
import importlib.util
import mmap
import sys
from pathlib import Path

import pytest
import torch

from fastroute import ops, use_backend
from fastroute.backends import _choice
from fastroute.backends import triton as backend
from fastroute.ops._library import NOT_COMPILED
from fastroute.ops._paths import channels_first, channels_last
from tests.backends.test_triton_aot import stage_cases
from tests.ops import mixture_cases
from tests.ops.cases import eager_cross_connect, eager_cross_predict, moved

CUDA = torch.cuda.is_available()
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
with pytest.MonkeyPatch.context() as environment:
    if not CUDA:  # Triton decides when it is imported whether it interprets
        assert "triton" not in sys.modules, "Triton was imported before it could be told to interpret"
        environment.setenv("TRITON_INTERPRET", "1")
    cc, mx, em, cp, gt, tables = (
        importlib.import_module(f"fastroute.backends.triton.{name}")
        for name in ("cross_connect", "mix", "mixture_em", "cross_predict", "gate", "planning")
    )

on_host = pytest.mark.skipif(CUDA, reason="the interpreter is off where there is a card")
on_card = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]


@pytest.fixture(params=[pytest.param("cpu", marks=on_host), pytest.param("cuda", marks=on_card)])
def device(request):
    return request.param


@contextlib.contextmanager
def without_recordings(monkeypatch):
    """Leave every call to Python, and afterwards no call known as one that cannot be recorded."""
    monkeypatch.setattr(_choice.BACKENDS["triton"].kernels(), "record", lambda function, args: function(*args))
    forget = (lambda: None) if NOT_COMPILED else torch.ops.fastroute_native.forget_recordings
    forget()
    yield
    forget()


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Without a card, serve CPU tensors, and round and add as compiled code does.

    The interpreter by itself cuts off the bits that bfloat16 lacks, which doubles the error, and where an axis is not
    the last it adds one value after the other; compiled code has a sum in every thread, and adds those as a tree.

    On a card, have Python launch every call: tests look at launches and change what is planned. test_recordings.py is
    about those of the compiled library.
    """
    if CUDA:
        with without_recordings(monkeypatch):
            yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

    def pairwise_sum(self, input):
        values = input.handle.data
        rows = values.reshape(-1) if self.axis is None else values.swapaxes(self.axis, -1).copy(order="C")
        total = rows.sum(-1, keepdims=True)
        total = total if self.axis is None else total.swapaxes(self.axis, -1)
        return self.to_tensor(total if self.keep_dims else total.squeeze(self.axis), input.dtype)

    monkeypatch.setattr(ReduceOps, "sum", pairwise_sum)
    cast = InterpreterBuilder.cast_impl

    def rounding_cast(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = torch.from_numpy(src.data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
        return TensorHandle(bits.reshape(src.data.shape), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _choice._choose.cache_clear()
    yield
    _choice._choose.cache_clear()


@pytest.fixture
def poison(monkeypatch):
    """Fill what is allocated with NaN, so that an element nobody wrote shows."""

    def poisoned(allocate):
        def wrapped(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapped

    own = ((torch.Tensor, name) for name in ("new_empty", "new_empty_strided"))
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), *own):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@dataclasses.dataclass
class Launch:
    kernel: str
    grid: tuple[int, ...]
    args: tuple
    settings: dict


@pytest.fixture
def launches(monkeypatch):
    """The launches so far."""
    seen = []

    class Spy:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **settings):
                seen.append(Launch(self.kernel.fn.__name__, grid, args, settings))
                return self.kernel[grid](*args, **settings)

            return launch

    for module in (cc, mx, em, cp, gt):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Spy(getattr(module, name)))
    return seen


def force(monkeypatch, tier, **changes):
    """Have cross_connect take one tier, with some of its settings changed."""

    def plan(problem, chip):
        settings = tables.resident(problem) if tier == "resident" else getattr(tables, tier)(problem, chip)
        applicable = {field.name for field in dataclasses.fields(settings)} & changes.keys()
        return dataclasses.replace(settings, **{name: changes[name] for name in applicable})

    monkeypatch.setattr(cc, "_plan", plan)


KERNELS = {
    "resident": ["cross_connect_resident_fwd_kernel", "cross_connect_resident_bwd_kernel"],
    "fused": ["cross_connect_fused_fwd_kernel", "cross_connect_fused_bwd_kernel"],
    "split": [
        "cross_connect_pool_fwd_kernel",
        "cross_connect_gate_fwd_kernel",
        "mix_fwd_kernel",
        "mix_bwd_kernel",
        "cross_connect_gate_bwd_kernel",
        "cross_connect_inputs_bwd_kernel",
    ],
}


def make_paths(count, shape, dtype, device, layout="first"):
    if layout == "stacked":  # (N, paths, C, *S): the samples of a path are far apart
        return list(torch.randn(shape[0], count, *shape[1:], device=device).to(dtype).unbind(1))
    if layout == "sliced":  # each path with a batch stride of its own
        return [torch.randn(shape[0] * (i + 2), *shape[1:], device=device).to(dtype)[:: i + 2] for i in range(count)]
    paths = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    if layout == "last":
        paths = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in paths]
    return paths


def make_gate(m, n, channels, hidden, device, bias=True, dtype=torch.float32):
    shapes = [(m, hidden, channels), (m, hidden), (m, n, hidden or channels), (m, n)]
    w1, b1, w2, b2 = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    if not hidden:
        w1 = b1 = None
    return (w1, b1, w2, b2) if bias else (w1, None, w2, None)


def route(backend_name, xs, gate, grads, dtype=None, activation=None):
    """Outputs, gates, scores and every gradient of cross_connect, by name; in `dtype` if given."""
    convert = {} if dtype is None else {"dtype": dtype}
    xs = [x.detach().to(**convert).requires_grad_() if convert else x.detach().requires_grad_() for x in xs]
    gate = [None if p is None else p.detach().to(**convert).requires_grad_() for p in gate]
    with use_backend(backend_name):
        outputs, gates, scores = ops.cross_connect(xs, *gate, activation)
        results = [*outputs, gates, scores]
        given = [(r, g.to(r.dtype)) for r, g in zip(results, grads, strict=True) if g is not None]
        torch.autograd.backward([r for r, _ in given], [g for _, g in given])
    named = {f"y{j}": y for j, y in enumerate(outputs)} | {"gates": gates, "scores": scores}
    named |= {f"dx{i}": x.grad for i, x in enumerate(xs)}
    named |= {f"d{k}": p.grad for k, p in zip(("w1", "b1", "w2", "b2"), gate, strict=True) if p is not None}
    return {name: value.detach() for name, value in named.items()}


def assert_as_exact_as_eager(got, eager, exact):
    """The error is at most twice eager's, plus a few roundings of float32."""
    for name, value in got.items():
        reference = exact[name]
        assert value.shape == reference.shape, name
        error, allowed = ((v.double() - reference).abs().max().item() for v in (value, eager[name]))
        floor = 1e-6 * (1 + reference.abs().max().item())
        assert error <= 2 * allowed + floor, f"{name}: error {error:.2e}, eager's {allowed:.2e}"


def check_routing(xs, gate, present=(True, True, True), activation=None):
    """Run forward and backward, compare with float64, and return the result. `present`: dY, dgates, dscores."""
    m, n = len(xs), gate[2].shape[1]
    shapes = [xs[0].shape] * n + [(xs[0].shape[0], m, n)] * 2
    given = [present[0]] * n + list(present[1:])
    grads = [
        torch.randn(shape, device=xs[0].device).to(xs[0].dtype) if g else None
        for shape, g in zip(shapes, given, strict=True)
    ]
    got = route("triton", xs, gate, grads, None, activation)
    exact, eager = (route("reference", xs, gate, grads, dtype, activation) for dtype in (torch.float64, None))
    assert_as_exact_as_eager(got, eager, exact)
    return got


CASES = {  # m, n, (N, C, *S), dtype, layout, hidden, bias
    "odd sizes": (2, 3, (3, 5, 7, 5), torch.float32, "first", 5, True),
    "channels_last": (3, 2, (2, 33, 7, 5), torch.bfloat16, "last", 16, True),
    "dense": (1, 2, (3, 7), torch.float32, "first", 3, True),
    "linear gate": (2, 2, (2, 6, 4, 2, 3), torch.float32, "last", 0, True),
    "stacked": (2, 2, (3, 16, 8, 8), torch.float16, "stacked", 16, True),
    "sliced": (2, 1, (2, 130, 4), torch.float32, "sliced", 4, False),
    "eight paths": (8, 8, (2, 3, 5), torch.float32, "first", 2, True),
    "rows of four": (2, 2, (2, 9, 6, 6), torch.float32, "first", 4, True),
    "flat": (2, 2, (3, 20, 7, 7), torch.bfloat16, "first", 16, True),
    "flat, full rows": (1, 3, (2, 5, 2), torch.float16, "sliced", 0, True),
}


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("tier", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_every_tier(device, tier, case, activation, monkeypatch, poison, launches):
    torch.manual_seed(0)
    m, n, shape, dtype, layout, hidden, bias = CASES[case]
    xs = make_paths(m, shape, dtype, device, layout)
    force(monkeypatch, tier)
    got = check_routing(xs, make_gate(m, n, shape[1], hidden, device, bias), activation=activation)
    assert [launch.kernel for launch in launches] == [*KERNELS[tier], "cross_connect_weights_bwd_kernel"]
    in_layout = channels_last if layout == "last" else channels_first
    assert all(in_layout(got[name]) for name in got if name[0] == "y" or name[:2] == "dx")
    read = launches[0].args[0]  # the kernels read the paths where they lie
    assert [x.data_ptr() for x in read] == [x.data_ptr() for x in xs]


SMALL_STEPS = {"block_c": 4, "block_s": 8, "block": 64, "portion": 192, "span": 16, "chunk": 2, "num_warps": 1}


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", ["first", "last", "flat"])
@pytest.mark.parametrize("tier", ["fused", "split"])
def test_loops_and_chunks(device, tier, layout, activation, monkeypatch, poison, launches):
    """Every loop takes several steps, the last of them partial, and the batch several chunks."""
    torch.manual_seed(1)
    flat = layout == "flat"
    monkeypatch.setattr(tables, "NARROW_BYTES", 8 if flat else 0)
    force(monkeypatch, tier, **SMALL_STEPS | ({"block_s": 64, "span": 64} if flat else {}))
    monkeypatch.setattr(tables, "PARTIAL_VALUES", 8)
    monkeypatch.setattr(tables, "SAMPLES", 2)
    xs = make_paths(2, (5, 10, 7, 5), torch.float32, device, "first" if flat else layout)
    check_routing(xs, make_gate(2, 3, 10, 5, device), activation=activation)
    kernels = [launch.kernel for launch in launches]
    layouts = {launch.settings["LAYOUT"] for launch in launches if "LAYOUT" in launch.settings}
    assert layouts == {layout}
    if tier == "split" and not flat:
        assert kernels == [*KERNELS["split"][:3] * 3, *KERNELS["split"][3:] * 3, kernels[-1]]
        assert [launch.grid for launch in launches[:6]] == [(2, 9, 2), (2,), (2, 2)] * 2


@pytest.mark.parametrize("tier", KERNELS)
@pytest.mark.parametrize("present", [(True, False, False), (False, True, False), (False, False, True)])
def test_absent_gradients(device, tier, present, monkeypatch, poison):
    torch.manual_seed(2)
    force(monkeypatch, tier)
    check_routing(make_paths(2, (2, 4, 3), torch.float32, device), make_gate(2, 2, 4, 3, device), present)


@pytest.mark.parametrize("tier", KERNELS)
def test_inputs_without_gradient(device, tier, monkeypatch, launches):
    torch.manual_seed(3)
    force(monkeypatch, tier)
    xs, gate = make_paths(2, (2, 4, 3), torch.float32, device), make_gate(2, 2, 4, 3, device)
    expected = check_routing(xs, gate, (True, False, False))
    launches.clear()
    gate = [p.clone().requires_grad_() for p in gate]
    torch.manual_seed(3)
    make_paths(2, (2, 4, 3), torch.float32, device), make_gate(2, 2, 4, 3, device)
    with use_backend("triton"):
        outputs = ops.cross_connect(xs, *gate).outputs
        torch.autograd.backward(outputs, [torch.randn(2, 4, 3, device=device) for _ in outputs])
    assert not any(launch.settings.get("GRAD_INPUTS") for launch in launches)
    for name, parameter in zip(("dw1", "db1", "dw2", "db2"), gate, strict=True):
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("tier", KERNELS)
def test_extreme_scores(device, tier, monkeypatch):
    torch.manual_seed(4)
    force(monkeypatch, tier)
    w1, b1, w2, _ = make_gate(2, 3, 4, 3, device)
    b2 = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], device=device)
    got = check_routing(make_paths(2, (2, 4, 3), torch.float32, device), (w1, b1, w2, b2))
    assert got["gates"][:, 0].eq(torch.tensor([1.0, 0.0, 0.0], device=device)).all()


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("tier", KERNELS)
def test_nan_is_not_hidden(device, tier, activation, monkeypatch):
    force(monkeypatch, tier)
    xs, gate = make_paths(1, (2, 4, 3), torch.float32, device), make_gate(1, 2, 4, 3, device)
    xs[0][1, 2, 0] = float("nan")
    with use_backend("triton"):
        outputs, gates, _ = ops.cross_connect(xs, *gate, activation)
    assert gates[1].isnan().all() and outputs[0][1].isnan().all()
    assert not gates[0].isnan().any() and not outputs[0][0].isnan().any()


@pytest.mark.parametrize("tier", KERNELS)
def test_half_precision_parameters(device, tier, monkeypatch):
    torch.manual_seed(5)
    force(monkeypatch, tier)
    gate = make_gate(2, 2, 4, 3, device, dtype=torch.bfloat16)
    got = check_routing(make_paths(2, (2, 4, 3), torch.bfloat16, device), gate)
    assert got["gates"].dtype == torch.float32 and got["dw1"].dtype == torch.bfloat16


@pytest.mark.parametrize("tier", ["fused", "split"])
def test_large_maps_are_summed_in_blocks(device, tier, monkeypatch):
    """One running sum of 2^16 values near 100 would be off by 1e-2."""
    torch.manual_seed(6)
    force(monkeypatch, tier)
    xs = [100 + x for x in make_paths(1, (1, 2, 256, 256), torch.float32, device)]
    check_routing(xs, make_gate(1, 2, 2, 3, device))


@pytest.mark.parametrize("tier", KERNELS)
def test_same_bits_again(device, tier, monkeypatch):
    torch.manual_seed(7)
    force(monkeypatch, tier, chunk=2)
    xs, gate = make_paths(2, (5, 4, 6, 6), torch.float32, device), make_gate(2, 2, 4, 3, device)
    grads = [torch.randn_like(xs[0]) for _ in range(2)] + [torch.randn(5, 2, 2, device=device) for _ in range(2)]
    first, second = (route("triton", xs, gate, grads) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_empty_batch(device, launches):
    xs = make_paths(2, (0, 4, 3, 3), torch.float32, device)
    gate = make_gate(2, 3, 4, 3, device)
    got = route("triton", xs, gate, [xs[0]] * 3 + [torch.empty(0, 2, 3, device=device)] * 2)
    assert got["y0"].shape == (0, 4, 3, 3) and got["gates"].shape == (0, 2, 3)
    assert not got["dw1"].any() and not got["db2"].any()
    static = torch.randn(2, 2, device=device, requires_grad=True)
    with use_backend("triton"):
        ops.mix([x.requires_grad_() for x in xs], static)[0].sum().backward()
    assert not static.grad.any() and not launches


MIX_CASES = {  # m, n, shape, dtype, layout, static
    "per sample": (2, 3, (3, 5, 7, 5), torch.float32, "first", False),
    "static": (3, 2, (3, 33, 2, 5), torch.bfloat16, "last", True),
    "several portions": (2, 2, (2, 9, 31, 33), torch.float32, "stacked", False),
    "several portions, static": (1, 2, (2, 9, 31, 33), torch.float16, "sliced", True),
    "eight paths": (8, 8, (2, 3), torch.float32, "first", False),
}


@pytest.mark.parametrize("case", MIX_CASES)
def test_mix(device, case, poison, launches):
    torch.manual_seed(8)
    m, n, shape, dtype, layout, static = MIX_CASES[case]
    xs = make_paths(m, shape, dtype, device, layout)
    gates = torch.randn(*([] if static else [shape[0]]), m, n, device=device)
    grads = make_paths(n, shape, dtype, device)

    def run(name, dtype=None):
        inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in xs]
        weights = gates.detach().to(dtype or gates.dtype).requires_grad_()
        with use_backend(name):
            outputs = ops.mix(inputs, weights)
            torch.autograd.backward(outputs, [g.to(dtype or g.dtype) for g in grads])
        tensors = [*outputs, weights.grad, *(x.grad for x in inputs)]
        return {str(i): tensor.detach() for i, tensor in enumerate(tensors)}

    got = run("triton")
    assert_as_exact_as_eager(got, run("reference"), run("reference", torch.float64))
    kernels = [launch.kernel for launch in launches]
    partial = ["sum_parts_kernel"] if static or "portions" in case else []
    assert kernels == ["mix_fwd_kernel", "mix_bwd_kernel", *partial]
    assert [x.data_ptr() for x in launches[0].args[0]] == [x.data_ptr() for x in xs]
    if "portions" in case:
        assert launches[0].grid[1] > 1


def small_tiles(monkeypatch):
    """Every loop of the kernels that share a sample takes several steps, the last of them partial."""
    tiles = tables.tiles
    changes = {"block_c": 4, "block_s": 8, "span": 16, "num_warps": 1}
    flat = {"block_c": 4, "num_warps": 1}  # and all positions
    monkeypatch.setattr(
        tables,
        "tiles",
        lambda problem: dataclasses.replace(tiles(problem), **(flat if problem.layout == "flat" else changes)),
    )
    monkeypatch.setattr(tables, "PARTIAL_VALUES", 8)
    monkeypatch.setattr(tables, "WEIGHT_VALUES", 16)


def check_operator(function, eager, inputs, kink=False):
    """Outputs and every gradient of function(*inputs), by the rule; with `kink`, none sent beside a ReLU's."""
    exact = eager(*(None if t is None else t.double() for t in inputs))
    grads = [torch.randn(y.shape, device=y.device) for y in exact]
    if kink:
        near = 4 * torch.finfo(inputs[-1].dtype).eps
        grads = [grad * (y > near * (1 + y.max())) for grad, y in zip(grads, exact, strict=True)]

    def run(function, dtype=None):
        leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        with use_backend("triton"):
            outputs = function(*leaves)
            given = [grad.to(y.dtype) for grad, y in zip(grads, outputs, strict=True)]
            gradients = torch.autograd.grad(outputs, [leaf for leaf in leaves if leaf is not None], given)
        return {str(k): t.detach() for k, t in enumerate((*outputs, *gradients))}

    got = run(function)
    assert_as_exact_as_eager(got, run(eager), run(eager, torch.float64))
    assert all(torch.equal(again, got[name]) for name, again in run(function).items())
    return got


@pytest.mark.parametrize("steps", ["one", "several"])
@pytest.mark.parametrize("case", [name for name in CASES if name != "eight paths"])
def test_gate(device, case, steps, monkeypatch, poison, launches):
    torch.manual_seed(11)
    m, n, shape, dtype, layout, hidden, bias = CASES[case]
    if steps == "several":
        small_tiles(monkeypatch)
    gate = make_gate(m, n, shape[1], hidden, device, bias)
    inputs = [*gate, *make_paths(m, shape, dtype, device, layout)]
    check_operator(
        lambda *a: tuple(ops.gate(list(a[4:]), *a[:4])), lambda *a: eager_cross_connect(a[4:], *a[:4])[-2:], inputs
    )
    kernels = ["pool_fwd", "gate_fwd", "gate_bwd", "weights_bwd"]
    assert [launch.kernel for launch in launches] == [f"cross_connect_{name}_kernel" for name in kernels] * 2


PREDICT_CASES = {  # m, n, C_out, kernel, (N, C_in, *S), dtype, layout, form, bias, activation
    "one to many": (1, 3, 6, (3, 3), (2, 3, 7, 5), torch.float32, "first", "predict", True, "relu"),
    "channels_last": (3, 2, 17, (3, 3), (2, 9, 6, 5), torch.float32, "last", "predict", False, "relu"),
    "gated inputs": (2, 3, 5, (2, 3), (3, 6, 7, 5), torch.float32, "stacked", "gate", True, None),
    "gated channels_last": (2, 2, 16, (1, 1), (2, 16, 5, 7), torch.bfloat16, "last", "gate", True, "relu"),
    "dense": (2, 2, 7, (), (3, 9), torch.float32, "first", "predict", True, "relu"),
    "eight paths": (8, 8, 2, (), (2, 3), torch.float32, "first", "predict", True, None),
}


@pytest.mark.parametrize("steps", ["one", "several"])
@pytest.mark.parametrize("case", PREDICT_CASES)
def test_cross_predict(device, case, steps, monkeypatch, poison, launches):
    torch.manual_seed(12)
    m, n, width, kernel, shape, dtype, layout, form, bias, activation = PREDICT_CASES[case]
    if steps == "several":
        small_tiles(monkeypatch)
    weight, offset = torch.randn(m, n, width, shape[1], *kernel, device=device), torch.randn(m, n, width, device=device)
    gates = torch.rand(shape[0], m, n, device=device)

    def predict(weight, bias, gates, *xs):
        return ops.cross_predict(list(xs), weight, bias, gates, activation=activation, form=form)

    inputs = [weight, offset if bias else None, gates, *make_paths(m, shape, dtype, device, layout)]
    got = check_operator(predict, eager_cross_predict(activation), inputs, kink=activation == "relu")
    assert all((channels_last if layout == "last" else channels_first)(got[str(j)]) for j in range(n))
    kernels = {launch.kernel for launch in launches}
    assert {"sum_predictions_kernel", "scale_paths_kernel", "sum_gradients_kernel"} <= kernels
    if steps == "several" and len(shape) > 2:
        assert all(launch.grid[1] > 1 for launch in launches if launch.kernel == "sum_gradients_kernel")


def test_cross_predict_of_nothing_and_of_nan(device, launches):
    xs = make_paths(2, (0, 4, 3, 3), torch.float32, device)
    weight = torch.randn(2, 3, 5, 4, 1, 1, device=device, requires_grad=True)
    with use_backend("triton"):
        outputs = ops.cross_predict(xs, weight, None, torch.rand(0, 2, 3, device=device))
        sum(y.sum() for y in outputs).backward()
    assert outputs[0].shape == (0, 5, 3, 3) and not weight.grad.any() and not launches
    xs = make_paths(2, (2, 4, 3, 3), torch.float32, device)
    xs[0][1, 2, 0, 0] = float("nan")
    with use_backend("triton"):
        y = ops.cross_predict(xs, weight, None, torch.rand(2, 2, 3, device=device))[0]
    assert y[1, :, 0, 0].isnan().all() and not y[0].isnan().any()


MIXTURE_CASES = {  # shape, dtype, priors, statistics, augmented
    "one mixture": ((128, 10), torch.float32, False, False, False),
    "gates": ((19, 3, 4), torch.bfloat16, True, False, True),
    "given statistics": ((40, 2, 5), torch.float16, True, True, True),
    "one cluster": ((9, 1), torch.float32, False, False, True),
    "many clusters": ((9, 300), torch.float32, True, False, False),
}


@pytest.mark.parametrize("values", [2048, 64])  # one step for most of the cases, and many
@pytest.mark.parametrize("case", MIXTURE_CASES)
def test_mixture_em(device, case, values, monkeypatch, poison, launches):
    monkeypatch.setattr(tables, "MIXTURE_VALUES", values)
    case = mixture_cases.make_case(*MIXTURE_CASES[case])
    case = [moved(t, device) if isinstance(t, torch.Tensor) else t for t in case]
    with use_backend("triton"):
        results = mixture_cases.differentiate(ops.mixture_em_loss, case)
        again = mixture_cases.differentiate(ops.mixture_em_loss, case)
    plain = [mixture_cases.differentiate(mixture_cases.eager_loss, case, dtype) for dtype in (None, torch.float64)]
    assert_as_exact_as_eager(*({str(i): t for i, t in enumerate(values)} for values in (results, *plain)))
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    assert [launch.kernel for launch in launches] == ["mixture_em_fwd_kernel", "mixture_em_bwd_kernel"] * 2


def test_mixture_em_of_a_constant_nothing_and_nan(device, launches):
    scores = torch.full((128, 2, 3), 0.1, device=device)
    scores[5, 1, 1] = torch.nan
    with use_backend("triton"):
        loss, posterior = ops.mixture_em_loss(scores)
        empty = scores[:0].clone().requires_grad_()
        none = ops.mixture_em_loss(empty).loss
        none.sum().backward()
    torch.testing.assert_close(loss[0], torch.full_like(loss[0], 2).log())
    assert loss[1].isnan() and posterior[:, 1].isnan().all() and not posterior[:, 0].isnan().any()
    assert not none.any() and len(launches) == 1
    constants = {"mean": torch.zeros(3, device=device), "std": torch.ones(3, device=device)}
    prior = torch.tensor([0, 0.5, 0.5], device=device)
    with use_backend("triton"):
        loss, posterior = ops.mixture_em_loss(torch.tensor([[100.0, 0, 0]], device=device), 5.0, prior, **constants)
    torch.testing.assert_close(posterior[0], prior)
    torch.testing.assert_close(loss, torch.tensor(4.0, device=device).log())


def test_offsets_beyond_int32(device, monkeypatch):
    """Samples 2^30 + 64 elements apart. In int32 the third would be read 2^31 − 128 before the first, where zeros are.

    On the CPU the memory is only reserved: no page of it exists but those that hold the samples.
    """
    torch.manual_seed(9)
    stride, count = 2**30 + 64, 2**32 + 2**12
    if device == "cpu":
        no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python does not name
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        memory = torch.frombuffer(mmap.mmap(-1, 2 * count, flags=flags), dtype=torch.float16)
    else:
        memory = torch.zeros(count, dtype=torch.float16, device=device)
    far = [memory[2**31 + 512 * k :].as_strided((3, 4, 6), (stride, 6, 1)) for k in range(2)]
    for x in far:
        x.copy_(torch.randn(x.shape))
    near = [x.clone() for x in far]
    gate = make_gate(1, 1, 4, 3, device)
    for tier in KERNELS:
        force(monkeypatch, tier)
        results = []
        for x, dy in (far, near):
            outputs, gates, _, pooled, hidden = cc.cross_connect([x], *gate, True)
            backward = cc.cross_connect_backward([dy], None, None, [x], *gate, gates, pooled, hidden, True, True)
            results.append([*outputs, gates, pooled, hidden, *backward[0], *backward[1:]])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), tier
    gates = torch.ones(3, 1, 1, device=device)
    results = [[*mx.mix([x], gates), mx.mix_backward([dy], [x], gates, False)[1]] for x, dy in (far, near)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@on_host
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("tier", KERNELS)
def test_bytes(tier, relu, monkeypatch):
    """The resident tier reads and writes every path once; the others read once more what is needed twice.

    The backward of a ReLU reads X once more, to see where it is above zero.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    torch.manual_seed(10)
    m, n, shape = 2, 3, (3, 6, 5, 7)
    xs, dys = make_paths(m, shape, torch.float32, "cpu"), make_paths(n, shape, torch.float32, "cpu")
    gate = make_gate(m, n, 6, 4, "cpu")
    force(monkeypatch, tier)
    touched = {"load": [], "store": []}

    def count(kind, name):
        call = getattr(InterpreterBuilder, name)

        def counting(self, ptrs, *args):
            mask = args[0] if kind == "load" else args[1]
            touched[kind].append(ptrs.data[mask.data])
            return call(self, ptrs, *args)

        monkeypatch.setattr(InterpreterBuilder, name, counting)

    count("load", "create_masked_load")
    count("store", "create_masked_store")

    def passes(kind, tensors):
        """How often each of the tensors is gone through, all of it."""
        addresses = torch.cat([torch.from_numpy(a.reshape(-1).astype("int64")) for a in touched[kind]])
        counts = []
        for tensor in tensors:
            begin = tensor.data_ptr()
            inside = addresses[(addresses >= begin) & (addresses < begin + 4 * tensor.numel())]
            times = torch.bincount((inside - begin) // 4, minlength=tensor.numel())
            assert times.min() == times.max()
            counts.append(times.min().item())
        return counts

    again = 1 if tier == "resident" else 2
    outputs, gates, _, pooled, hidden = cc.cross_connect(xs, *gate, relu)
    assert passes("load", xs) == [again] * m and passes("store", outputs) == [1] * n
    for kind in touched.values():
        kind.clear()
    grad_xs, *_ = cc.cross_connect_backward(dys, None, None, xs, *gate, gates, pooled, hidden, relu, True)
    assert passes("load", xs) == [1 + relu] * m and passes("load", dys) == [again] * n
    assert passes("store", grad_xs) == [1] * m


def test_plan():
    def tier(n_samples, channels, space, chip=tables.H100, paths=2, itemsize=4, backward=False, last=False):
        problem = tables.Problem(n_samples, paths, paths, channels, space, 16, itemsize, last, backward)
        return type(tables.plan(problem, chip)).__name__.lower()

    for channels, side in ((16, 32), (32, 16), (64, 8)):  # CIFAR ResNets
        assert tier(128, channels, side**2) == "resident"
        assert tier(4096, channels, side**2) == "resident"
    assert tier(128, 16, 1024, backward=True) == "fused"  # dY and one of X are 192 KiB
    assert tier(128, 16, 1024, itemsize=2, backward=True) == "resident"  # and half of that in half precision
    assert tier(4096, 16, 1024, backward=True) == "split"  # 264 in flight need 33 MiB of L2
    assert tier(4096, 16, 1024, tables.B200, backward=True) == "fused"
    assert tier(256, 16, 1024, tables.B200, backward=True) == "fused"
    assert tier(32, 64, 56**2) == "split"  # 32 samples of 1.5 MiB, and 132 multiprocessors
    assert tier(1, 64, 56**2) == "split"
    assert tier(64, 16, 2048) == "split"  # 256 KiB a sample keep too few multiprocessors busy
    assert tier(128, 16, 2048) == "split" and tier(90, 16, 2048) == "fused"  # 25 MiB of L2
    assert tier(90, 16, 2048, tables.A100) == "split"
    assert tier(16, 2048, 1) == "fused"  # 16 × 2048 gate weights do not fit beside the sample

    for last in (False, True):
        problem = tables.Problem(32, 2, 2, 64, 56**2, 16, 2, last, False)
        settings = tables.plan(problem, tables.H100)
        assert settings.chunk * problem.reread_bytes <= tables.H100.reread_budget
        programs = settings.chunk * 2 * -(-64 // settings.block_c) * -(-(56**2) // settings.span)
        waves = programs / (3 * tables.H100.sms)
        assert waves / -(-programs // (3 * tables.H100.sms)) > 0.8  # the last wave is nearly full


def test_whole_waves():
    assert tables.steps_per_program(98, 32, 264) == 13  # 32 × 8 programs, all at once
    assert tables.steps_per_program(1, 8192, 264) == 1
    assert tables.steps_per_program(10**6, 1, 264) >= 10**6 / tables.MAX_GRID_Y
    assert -(-(10**6) // tables.steps_per_program(10**6, 1, 264)) <= tables.MAX_GRID_Y


def test_batch_at_once(device, monkeypatch, launches):
    torch.manual_seed(13)
    monkeypatch.setattr(tables, "SPLIT_BY", "batch")
    monkeypatch.setattr(cc, "_plan", tables.split)
    check_routing(make_paths(2, (5, 4, 6, 6), torch.float32, device), make_gate(2, 2, 4, 3, device))
    assert [launch.grid[0] for launch in launches[:6]] == [5] * 6


def test_chained_launches():
    """The first launch of a call waits for all that went before, as any launch does."""
    assert cc.chained(tables.H100) == {"CHAINED": True, "launch_pdl": True}
    assert cc.chained(tables.H100, begins=True) == {"CHAINED": True, "launch_pdl": False}
    assert cc.chained(tables.A100) == cc.chained(tables.INTERPRETED) == {"CHAINED": False}


@pytest.mark.parametrize(("parts", "columns"), [(3, 70), (700, 3), (1, 1), (40, 300)])
def test_partial_sums(device, parts, columns, launches):
    values = torch.randn(2, parts, columns, device=device)
    out = torch.empty(2, columns, device=device)
    mx.launch_sum_parts(values, out, 2, parts, columns)
    torch.testing.assert_close(out, values.sum(1), rtol=1e-5, atol=1e-4)
    assert tables.partial_sums(6, 128)["COLUMNS"] == 128  # many rows of few parts: one program for each
    assert tables.partial_sums(4096, 4)["PARTS"] == 512


def test_the_expected_figures_are_of_these_tables():
    """The page shows for every stage the tier, the number of chunks, and the grid that the tables give today."""
    page = (Path(backend.__file__).parent / "EXPECTED.md").read_text()
    sections = page.split("\n## ")[1:]
    assert len(sections) == len(stage_cases())
    for section, (name, (_, m, n, (batch, channels, side, _), dtype, last)) in zip(
        sections, stage_cases().items(), strict=True
    ):
        assert section.startswith(name + "\n")
        rows = [line.split("|") for line in section.splitlines() if line.startswith("| ") and "grid" not in line]
        rows = {cells[3].split(" ×")[0].strip(): [cell.strip() for cell in cells] for cells in rows}
        for backward, walk in ((False, "pool_fwd"), (True, "inputs_bwd")):
            itemsize = getattr(torch, dtype).itemsize
            problem = tables.Problem(batch, m, n, channels, side**2, 16, itemsize, last, backward)
            settings = tables.plan(problem, tables.H100)
            if isinstance(settings, tables.Split):
                cells = rows[walk]
                parts = -(-channels // settings.block_c) * -(-(side**2) // settings.span)
                grid = [settings.chunk, parts] + ([] if backward else [m])
                chunks = -(-batch // settings.chunk)
                assert cells[3] == (f"{walk} ×{chunks}" if chunks > 1 else walk)
                assert cells[4] == " × ".join(map(str, grid)), (name, cells)
            else:
                kind = type(settings).__name__.lower()
                assert rows[f"{kind}_{'bwd' if backward else 'fwd'}"][4] == str(batch)


def test_reasons(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "interpreter" in backend.reason_against(cpu, torch.float32)
    assert "float64" in backend.reason_against(cuda, torch.float64)
    assert "CUDA" in backend.reason_against(torch.device("mps"), torch.float32)
    with pytest.raises(RuntimeError, match="interpreter"), use_backend("triton"):
        ops.mix([torch.ones(1, 1, dtype=torch.float16)], torch.ones(1, 1))

    if not CUDA:
        assert "CUDA device" in backend.reason_against(cuda, torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def capability(*value):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: value)

    capability(7, 0)
    assert "7.5" in backend.reason_against(cuda, torch.float32)
    capability(7, 5)
    assert "8.0" in backend.reason_against(cuda, torch.bfloat16)
    assert backend.reason_against(cuda, torch.float16) is None
    capability(9, 0)
    assert backend.reason_against(cuda, torch.bfloat16) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.0")
        assert "ROCm" in backend.reason_against(cuda, torch.float32)
    monkeypatch.setattr("triton.__version__", "3.5.1")
    assert "3.6" in backend.reason_against(cuda, torch.float32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "not installed" in backend.reason_against(cuda, torch.float32)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_card)])
@pytest.mark.parametrize("tier", KERNELS)
def test_graph_capture(device, tier, monkeypatch):
    """No launch waits for the host: a captured step gives the same result when it is replayed."""
    force(monkeypatch, tier)
    xs, gate = make_paths(2, (4, 16, 8, 8), torch.float32, device), make_gate(2, 2, 16, 4, device)
    expected = cc.cross_connect(xs, *gate, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, gates, *_ = cc.cross_connect(xs, *gate, False)
    graph.replay()
    assert torch.equal(gates, expected[1]) and all(map(torch.equal, outputs, expected[0]))
