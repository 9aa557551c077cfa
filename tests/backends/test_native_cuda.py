"""The CUDA kernels: compiled for every architecture, run on the CPU by an emulator, and with `-m gpu` on a card."""

import contextlib
import ctypes
import functools
import itertools
import math
import random
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastroute.backends import native
from fastroute.backends._cross_predict import Passes
from fastroute.backends.reference import kernels as reference
from fastroute.ops import _compiled
from fastroute.ops._paths import accumulate_dtype
from tests.ops.cases import moved
from tests.ops.mixture_cases import make_case as mixture_case

CSRC = Path(__file__).parents[2] / "csrc"
TORCH = Path(torch.__file__).parent
OPERATORS = (
    "cross_connect",
    "cross_connect_backward",
    "mix",
    "mix_backward",
    "mixture_em_loss",
    "mixture_em_loss_backward",
    "gate",
    "gate_backward",
)
PASSES = ("sum_predictions", "scale_paths", "sum_gradients")
PLAN, TWO_PASSES = -1, 0
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# m, n, shape, hidden width (0: the linear gate), biases
ALIGNED = [
    (2, 2, (3, 16, 8, 8), 5, True),
    (3, 2, (1, 64, 7, 7), 16, False),
    (5, 8, (2, 16, 4, 4), 0, True),
    (1, 3, (2, 64), 1, True),
    (8, 1, (1, 8, 2, 4, 4), 0, False),
]
ODD = [
    (2, 3, (3, 33, 5, 7), 16, True),
    (1, 2, (2, 1, 13, 13), 3, False),
    (4, 4, (1, 130, 1), 0, False),
    (7, 5, (2, 3, 5), 5, True),
    (2, 2, (0, 16, 8, 8), 5, True),
]


# The emulator's own switches, and what csrc/cuda/plan.h says, without an operator of its own.
EMULATOR = """
extern "C" void emulator_order(int order) { emulator::order = order; }
extern "C" int emulator_shared_bytes() { return emulator::blocks.back().shared.size() * sizeof(uint4); }
namespace fastroute::cuda {
extern "C" int64_t emulator_cluster(bool forward, const int64_t (&sizes)[8], const int64_t (&device)[4]) {
  const auto& [samples, channels, space, channels_last, m, n, hidden, bytes] = sizes;
  const auto plan = forward ? forward_cluster : backward_cluster;
  return plan({samples, channels, space, channels_last != 0}, m, n, hidden, bytes,
              {device[0], device[1], device[2], device[3]});
}
extern "C" bool emulator_holds_gate(int64_t bytes, int64_t gate, const int64_t (&device)[4]) {
  return holds_gate(bytes, gate, {device[0], device[1], device[2], device[3]});
}
}
"""

# Architecture, multiprocessors, and shared memory of a block and a multiprocessor.
H100, A100 = (90, 132, 227 * 1024, 228 * 1024), (80, 108, 163 * 1024, 164 * 1024)

LAYOUTS = ("contiguous", "channels_last", "stacked")


def grid(**axes):
    """Every combination of the axes; of seven, six are left to `-m slow` and `-m gpu`. Seven divides no axis evenly."""
    combinations = [
        pytest.param(*values, marks=pytest.mark.slow if k % 7 else ())
        for k, values in enumerate(itertools.product(*axes.values()))
    ]
    return pytest.mark.parametrize(tuple(axes), combinations)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """csrc/cuda compiled for the CPU with the emulator, its operators in a namespace of their own."""
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    (folder / "c10" / "cuda").mkdir(parents=True)
    for header in ("cuda_runtime", "cuda_runtime_api", "c10/cuda/CUDAException", "c10/cuda/CUDAGuard"):
        (folder / f"{header}.h").touch()
    (folder / "c10/cuda/CUDAStream.h").touch()
    unity, library = folder / "unity.cpp", folder / "emulated.so"
    sources = [path for suffix in ("cpp", "cu") for path in sorted((CSRC / "cuda").glob(f"*.{suffix}"))]
    unity.write_text("".join(f'#include "{source}"\n#undef INSTANTIATE\n' for source in sources) + EMULATOR)
    includes = (folder, CSRC, TORCH / "include", TORCH / "include/torch/csrc/api/include")
    emulator = Path(__file__).with_name("cuda_on_cpu.h")
    flags = ["-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-include", emulator, *(f"-I{path}" for path in includes)]
    flags += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
    flags += ["-Dfastroute_native=fastroute_emulated", '-DFASTROUTE_BUILD="emulated"', '-DFASTROUTE_TORCH="any"']
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", *flags, unity, "-o", library, *libraries], check=True, timeout=600)

    schemas = torch.library.Library("fastroute_emulated", "DEF")
    for name in OPERATORS:
        schemas.define(str(getattr(torch.ops.fastroute, name).default._schema).removeprefix("fastroute::"))
    if reason := native.reason_against(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    for name in PASSES:
        schemas.define(str(getattr(torch.ops.fastroute_native, name).default._schema).partition("::")[2])
    torch.ops.load_library(library)
    namespace, key = torch.ops.fastroute_emulated, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    operators = {
        name: functools.partial(getattr(namespace, name).default.redispatch, key) for name in (*OPERATORS, *PASSES)
    }
    entries = ctypes.CDLL(str(library))
    entries.emulator_cluster.restype, entries.emulator_holds_gate.restype = ctypes.c_int64, ctypes.c_bool
    entries.emulator_holds_gate.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    yield SimpleNamespace(
        **operators,
        namespace=namespace,
        device="cpu",
        clusters=True,
        order=entries.emulator_order,
        entries=entries,
        keep=schemas,
    )


@pytest.fixture(scope="session")
def card():
    if reason := native.reason_against(torch.device("cuda"), torch.float32):
        pytest.skip(reason)
    namespace = torch.ops.fastroute_native
    operators = {name: getattr(namespace, name).default for name in (*OPERATORS, *PASSES)}
    clusters = torch.cuda.get_device_capability() >= (9, 0)
    return SimpleNamespace(**operators, namespace=namespace, device="cuda", clusters=clusters, order=lambda order: None)


@pytest.fixture(params=["emulated", pytest.param("card", marks=pytest.mark.gpu)])
def kernels(request):
    kernels = request.getfixturevalue(request.param)
    yield kernels
    kernels.namespace.cuda_force_cluster(PLAN)
    kernels.order(0)


def force(kernels, cluster):
    if cluster > 0 and not kernels.clusters:
        pytest.skip("this card has no clusters")
    kernels.namespace.cuda_force_cluster(cluster)


@contextlib.contextmanager
def poisoned_allocations():
    """Has every tensor begin as NaN, so that an element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def tensors(value):
    """The tensors among results or arguments, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def converted(value, device=None, dtype=None):
    if isinstance(value, torch.Tensor):
        return moved(value, device) if device else value.to(dtype)
    if isinstance(value, (list, tuple)):
        return [converted(item, device, dtype) for item in value]
    return value


def make_paths(count, shape, dtype, layout, generator):
    batch, channels, *space = shape
    if layout == "stacked":
        return list(torch.randn(batch, count, channels, *space, generator=generator).to(dtype).unbind(1))
    if layout == "channels_last":
        xs = [torch.randn(batch, *space, channels, generator=generator).to(dtype) for _ in range(count)]
        return [x.movedim(-1, 1) for x in xs]
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moving_keeps_strides(layout):
    """Shown without a card, on tensors of no memory."""
    for x in make_paths(3, (2, 3, 4, 5), torch.float32, layout, torch.Generator()):
        there = moved(x, "meta")
        assert (there.shape, there.stride(), there.storage_offset()) == (x.shape, x.stride(), x.storage_offset())
        assert moved(x, "cpu").data_ptr() == x.data_ptr()


def make_case(m, n, shape, hidden, biases, dtype, layout, seed=0, parameter_dtype=None):
    """xs, parameters and gradients of the outputs, gates and scores."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator).to(parameter_dtype or dtype)

    channels = shape[1]
    w1 = randn(m, hidden, channels) if hidden else None
    b1 = randn(m, hidden) if hidden and biases else None
    parameters = (w1, b1, randn(m, n, hidden or channels), randn(m, n) if biases else None)
    grads = [torch.randn(shape[0], m, n, generator=generator).to(accumulate_dtype(dtype)) for _ in range(2)]
    xs, grad_outputs = (make_paths(count, shape, dtype, layout, generator) for count in (m, n))
    return xs, parameters, grad_outputs, grads


def check(kernels, name, args):
    """Errors at most twice those of the reference in the paths' dtype, and one result whatever the order of threads.

    The reference sums in float32 where eager PyTorch rounds every step, so this asks more than twice eager's error.
    """
    on_device, results = converted(args, device=kernels.device), []
    for order in (0, 1, 2):
        kernels.order(order)
        with poisoned_allocations():
            results.append(tensors(getattr(kernels, name)(*on_device)))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
    exact = tensors(getattr(reference, name)(*converted(args, dtype=torch.float64)))
    rough = tensors(getattr(reference, name)(*args))
    for i, (got, right, near) in enumerate(zip(converted(results[0], device="cpu"), exact, rough, strict=True)):
        assert (got.shape, got.dtype) == (right.shape, near.dtype), (name, i)
        if isinstance(args[0], list) and got.shape == args[0][0].shape:
            assert got.stride() == near.stride(), (name, i)
        if got.numel():
            error, allowed = (got - right).abs().max(), 2 * (near - right).abs().max()
            tiny = 64 * torch.finfo(accumulate_dtype(got.dtype)).eps * max(1, right.abs().max())
            assert error <= allowed + tiny, (name, i, error, allowed)


def check_cross_connect(kernels, case, absent_grads=False, grad_inputs=True, relu=False):
    xs, parameters, grad_outputs, grads = case
    check(kernels, "cross_connect", (xs, *parameters, relu))
    _, gates, _, pooled, hidden = reference.cross_connect(xs, *parameters, relu)
    grads = [None, None] if absent_grads else grads
    check(
        kernels,
        "cross_connect_backward",
        (grad_outputs, *grads, xs, *parameters, gates, pooled, hidden, relu, grad_inputs),
    )


@grid(sizes=ALIGNED + ODD, dtype=DTYPES, layout=LAYOUTS, relu=(False, True))
def test_two_passes(kernels, sizes, dtype, layout, relu):
    force(kernels, TWO_PASSES)
    check_cross_connect(kernels, make_case(*sizes, dtype, layout), relu=relu)
    assert kernels.namespace.cuda_last_cluster() == TWO_PASSES


@grid(sizes=ALIGNED, cluster=(1, 2, 4, 8), dtype=DTYPES[:3], layout=LAYOUTS, relu=(False, True))
def test_clusters(kernels, sizes, cluster, dtype, layout, relu):
    force(kernels, cluster)
    check_cross_connect(kernels, make_case(*sizes, dtype, layout), relu=relu)
    assert kernels.namespace.cuda_last_cluster() == cluster


@pytest.mark.parametrize("cluster", [TWO_PASSES, 2])
@pytest.mark.parametrize(("absent_grads", "grad_inputs"), [(True, True), (False, False), (True, False)])
def test_optional_gradients(kernels, cluster, absent_grads, grad_inputs):
    force(kernels, cluster)
    check_cross_connect(kernels, make_case(*ALIGNED[0], torch.float32, "contiguous"), absent_grads, grad_inputs)


@pytest.mark.parametrize("cluster", [TWO_PASSES, 2])
def test_float32_parameters_beside_bfloat16_paths(kernels, cluster):
    force(kernels, cluster)
    case = make_case(*ALIGNED[0], torch.bfloat16, "channels_last", parameter_dtype=torch.float32)
    check_cross_connect(kernels, case)


@pytest.mark.parametrize("cluster", [TWO_PASSES, 2])
def test_extreme_scores(kernels, cluster):
    force(kernels, cluster)
    xs, (w1, b1, w2, _), grad_outputs, grads = make_case(*ALIGNED[0], torch.float32, "contiguous")
    b2 = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    check_cross_connect(kernels, (xs, (w1, b1, w2, b2), grad_outputs, grads))


@grid(
    sizes=[ALIGNED[0], ALIGNED[2], ODD[0], ODD[3], ODD[4]],
    dtype=DTYPES,
    shared=(True, False),
    grad_inputs=(True, False),
)
def test_mix(kernels, sizes, dtype, shared, grad_inputs):
    m, n, _shape, *_ = sizes
    xs, _, grad_outputs, (gates, _) = make_case(*sizes, dtype, "channels_last")
    gates = torch.randn(m, n, dtype=gates.dtype) if shared else gates
    check(kernels, "mix", (xs, gates))
    check(kernels, "mix_backward", (grad_outputs, xs, gates, grad_inputs))


@grid(sizes=ALIGNED + ODD, dtype=DTYPES, layout=LAYOUTS)
def test_gate(kernels, sizes, dtype, layout):
    xs, parameters, _, grads = make_case(*sizes, dtype, layout)
    check(kernels, "gate", (xs, *parameters))
    gates, _, pooled, hidden = reference.gate(xs, *parameters)
    for given in (grads, [grads[0], None], [None, grads[1]]):
        check(kernels, "gate_backward", (*given, xs, *parameters, gates, pooled, hidden))


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
    ("form", "bias", "relu"), [("predict", True, True), ("gate", False, True), ("predict", False, False)]
)
def test_cross_predict(kernels, monkeypatch, form, bias, relu, layout):
    """With convolutions in the paths' format, as on a card."""
    generator = torch.Generator().manual_seed(1)
    weight, offset = torch.randn(2, 3, 5, 4, 3, 3, generator=generator), torch.randn(2, 3, 5, generator=generator)
    gates, xs = torch.rand(2, 2, 3, generator=generator), make_paths(2, (2, 4, 4, 3), torch.float32, layout, generator)
    grad_outputs = make_paths(3, (2, 5, 2, 3), torch.float32, layout, generator)
    passes = Passes(kernels, chunk_bytes=200)
    monkeypatch.setattr(kernels, "cross_predict", passes.forward, raising=False)
    monkeypatch.setattr(kernels, "cross_predict_backward", passes.backward, raising=False)
    arguments = (xs, weight, offset if bias else None, gates, [2, 1], [1, 1], [1, 1])
    check(kernels, "cross_predict", (*arguments, relu, form))
    outputs = reference.cross_predict(*arguments, True, form) if relu else []
    for grad_inputs in (True, False):
        check(kernels, "cross_predict_backward", (grad_outputs, outputs, *arguments, grad_inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("priors", "statistics", "augmented"), [(False, False, False), (True, True, True), (True, False, True)]
)
def test_mixture_em(kernels, dtype, priors, statistics, augmented):
    for shape in [(70, 10), (19, 2, 4), (5, 300), (0, 2, 3), (20, 1)]:
        scores, gamma, prior, mean, std, scores_aug = mixture_case(shape, dtype, priors, statistics, augmented)
        arguments = (scores, scores_aug, prior, mean, std, gamma)
        check(kernels, "mixture_em_loss", arguments)
        loss, posterior, means, scales = reference.mixture_em_loss(*arguments)
        grad_loss = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        saved = (scores, scores_aug, posterior, means, scales, grad_loss, gamma, mean is None)
        check(kernels, "mixture_em_loss_backward", saved)


def test_mixture_em_of_a_constant_and_of_nan(kernels):
    scores = torch.full((128, 2, 3), 0.1, device=kernels.device)
    scores[5, 1, 1] = torch.nan
    loss, posterior, _, scales = kernels.mixture_em_loss(scores, None, None, None, None, 5.0)
    assert loss[0].item() == pytest.approx(math.log(2)) and not scales[:, 0].any()
    assert loss[1].isnan() and posterior[:, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mixture_em_of_a_prior_of_zero(kernels, dtype):
    device = kernels.device
    scores = torch.tensor([[100.0, 0, 0], [0, 1, 2]], dtype=dtype, device=device)
    prior, zero = torch.tensor([0, 0.5, 0.5], dtype=dtype, device=device), torch.zeros(3, dtype=dtype, device=device)
    check(kernels, "mixture_em_loss", (scores, None, prior, zero, zero + 1, 5.0))
    loss, posterior, *_ = kernels.mixture_em_loss(scores, None, prior, zero, zero + 1, 5.0)
    assert loss.isfinite().all() and not posterior[:, 0].any()


def random_check(kernels, seed):
    draw = random.Random(seed)
    m, n = draw.randint(1, 8), draw.randint(1, 8)
    space = draw.choice([(), (1,), (64,), (1, 1), (5, 7), (7, 7), (8, 8), (13, 13), (32, 32), (2, 3, 4), (4, 4, 4)])
    shape = (draw.choice([0, 1, 3, 17]), draw.choice([1, 3, 16, 33, 64, 130]), *space)
    layout, dtype = draw.choice(LAYOUTS), draw.choice(DTYPES)
    case = make_case(m, n, shape, draw.choice([0, 1, 5, 16, 40]), draw.random() < 0.5, dtype, layout, seed)
    force(kernels, PLAN)
    check_cross_connect(kernels, case, draw.random() < 0.3, draw.random() < 0.8, draw.random() < 0.5)


@pytest.mark.parametrize("seed", range(6))
def test_random_sizes(kernels, seed):
    random_check(kernels, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 100))
def test_more_random_sizes(emulated, seed):
    random_check(emulated, seed)


def test_samples_more_than_two_gigabytes_apart(emulated):
    """Batch strides past 2³¹ elements, on memory that is reserved and, but for the samples, never touched."""
    stride, (channels, space) = 2**31 + 64, (16, 64)

    def far(x):
        y = torch.empty(stride + channels * space, dtype=x.dtype).as_strided(x.shape, (stride, space, 1))
        return y.copy_(x)

    sizes = (2, 2, (2, channels, space), 5, True)
    xs, parameters, grad_outputs, grads = make_case(*sizes, torch.bfloat16, "contiguous")
    case = [far(x) for x in xs], parameters, [far(x) for x in grad_outputs], grads
    for cluster in (TWO_PASSES, 2):
        force(emulated, cluster)
        check_cross_connect(emulated, case)
    force(emulated, PLAN)


def test_plan_of_large_maps(emulated):
    """The one-read kernel runs for two float32 paths of 64 × 56 × 56; three do not fit, nor a misaligned sample."""
    expected = {(2, torch.float32): 8, (3, torch.float32): TWO_PASSES, (2, torch.bfloat16): 8, (3, torch.bfloat16): 8}
    for (m, dtype), cluster in expected.items():
        xs, parameters, _, _ = make_case(m, 2, (1, 64, 56, 56), 16, True, dtype, "contiguous")
        emulated.cross_connect(xs, *parameters, False)
        assert emulated.namespace.cuda_last_cluster() == cluster, (m, dtype)
    xs, parameters, _, _ = make_case(2, 2, (1, 3, 5, 7), 16, True, torch.float32, "contiguous")
    emulated.cross_connect(xs, *parameters, False)
    assert emulated.namespace.cuda_last_cluster() == TWO_PASSES
    emulated.namespace.cuda_force_cluster(2)
    with pytest.raises(RuntimeError, match="cannot hold these paths"):
        emulated.cross_connect(xs, *parameters, False)
    emulated.namespace.cuda_force_cluster(PLAN)


def test_plan(emulated):
    """By count: H100 has 132 multiprocessors of 228 KB, a block may have 227 KB; two blocks fit in 113 KB each."""

    def plan(paths, elements, samples, extra=4096, device=H100):
        return emulated.namespace.cuda_plan(paths, 4 * elements, extra, samples, *device)

    assert plan(2, 16 * 32 * 32, 128) == 2  # 128 KB do not go twice into a multiprocessor
    assert plan(2, 32 * 16 * 16, 128) == 1  # 64 KB do
    assert plan(2, 128 * 28 * 28, 32) == 8
    assert plan(2, 256 * 14 * 14, 32) == 4
    assert plan(2, 64 * 56 * 56, 32) == 8  # 196 KB: one block to a multiprocessor
    assert plan(3, 64 * 56 * 56, 32) == TWO_PASSES  # 294 KB
    assert plan(2, 32 * 16 * 16, 4) == 8  # few samples are spread, to 4 KB of each path for a block
    assert plan(2, 16 * 16 * 16, 4) == 4  # of 16 KB
    assert plan(2, 32 * 16 * 16, 32) == 4  # and to no more blocks than multiprocessors
    assert plan(2, 32 * 16 * 16, 128, extra=240 * 1024) == TWO_PASSES
    assert plan(2, 32 * 16 * 16, 128, device=A100) == TWO_PASSES


def integers(*values):
    return (ctypes.c_int64 * len(values))(*values)


def test_where_one_read_serves(emulated):
    """As choosing between kernels asks it, by sizes alone."""

    def clusters(m, n, samples, channels, space, channels_last=False, hidden=16, bytes=2, device=H100):
        sizes = integers(samples, channels, space, channels_last, m, n, hidden, bytes)
        return [emulated.entries.emulator_cluster(forward, sizes, integers(*device)) for forward in (True, False)]

    assert clusters(2, 2, 256, 64, 56 * 56) == [8, 8]
    assert clusters(2, 2, 256, 64, 56 * 56, bytes=4) == [8, 8]
    assert clusters(2, 3, 256, 64, 56 * 56, bytes=4) == [8, TWO_PASSES]  # the forward holds X, the backward dY
    assert clusters(3, 2, 256, 64, 56 * 56, bytes=4) == [TWO_PASSES, 8]
    assert clusters(2, 2, 128, 32, 16 * 16) == [1, 1]
    assert clusters(2, 2, 128, 32, 16 * 16, device=A100) == [TWO_PASSES, TWO_PASSES]
    assert clusters(2, 2, 128, 32, 16 * 16, bytes=8) == [TWO_PASSES, TWO_PASSES]
    assert clusters(2, 2, 128, 3, 5 * 7) == [TWO_PASSES, TWO_PASSES]  # 210 bytes
    assert clusters(2, 2, 128, 512, 7 * 7) == [1, 1]
    assert clusters(8, 8, 256, 13, 32 * 16) == [1, 1]  # 106 KB of a half of 113
    assert clusters(8, 8, 256, 13, 32 * 16, channels_last=True) == [2, 1]  # and 8 in which columns are added up


def test_where_the_gate_is_held(emulated):
    """Beside the paths, unless it took the place of one of two blocks of a multiprocessor, or there is no such room."""

    def holds(kilobytes, gate, device=H100):
        return emulated.entries.emulator_holds_gate(1024 * kilobytes, 1024 * gate, integers(*device))

    assert holds(60, 50) and holds(100, 12) and holds(200, 27) and holds(115, 64)
    assert not holds(100, 14) and not holds(200, 28) and not holds(60, 50, (90, 132, 99 * 1024, 228 * 1024))


@pytest.mark.parametrize("hidden", [8, 64])
def test_gates_too_large_to_hold(kernels, hidden):
    """100 KB of paths to a block, beside 4 KB of a gate that are held, and 32 KB that are not."""
    force(kernels, 1)
    case = make_case(2, 2, (1, 64, 14, 14), hidden, True, torch.float32, "contiguous")
    check_cross_connect(kernels, case)
    if kernels.device == "cpu":
        xs, parameters, *_ = case
        kernels.cross_connect(xs, *parameters, False)
        assert (kernels.entries.emulator_shared_bytes() > 102 * 1024) == (hidden == 8)


NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def compiled(source, architecture, folder):
    """Compile one file; returns its kernels as (name, registers, shared bytes, spills, stack), and its PTX."""
    subprocess.run(
        [
            *(NVCC, "-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-arch=sm_{architecture}", "-Xptxas", "-v"),
            *("--keep", "--keep-dir", folder, f"-I{CSRC}", f"-I{TORCH / 'include'}"),
            *("-c", CSRC / "cuda" / source, "-o", folder / "out.o"),
        ],
        check=True,
        stderr=(folder / "log").open("w"),
        timeout=600,
    )
    pattern = (
        r"entry function '(\S+)' for.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(.*?)$"
    )
    reports = []
    for name, stack, stores, loads, registers, rest in re.findall(
        pattern, (folder / "log").read_text(), re.DOTALL | re.MULTILINE
    ):
        shared = re.search(r"(\d+) bytes smem", rest)
        reports.append((name, int(registers), int(shared[1]) if shared else 0, int(stores) + int(loads), int(stack)))
    return reports, next(folder.glob("*.ptx")).read_text()


SOURCES = sorted(path.name for path in (CSRC / "cuda").glob("*.cu"))


def compilations():
    for architecture in (80, 90, 100):
        for source in SOURCES:
            quick = (source, architecture) in {("cluster.cu", 90), ("weighted_sums.cu", 80)}
            yield pytest.param(source, architecture, marks=() if quick else pytest.mark.slow)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize(("source", "architecture"), list(compilations()))
def test_compiles_without_spills(source, architecture, tmp_path):
    reports, ptx = compiled(source, architecture, tmp_path)
    assert reports
    for name, registers, shared, spills, stack in reports:
        short = re.sub(r"^_ZN9fastroute4cuda\d+_GLOBAL__N__\w+?_\d+_\w+_cu_[0-9a-f]{8}_?\d*", "", name)
        print(f"sm_{architecture} {registers:4} registers {shared:6} bytes shared  {short}")
        assert spills == 0 and stack == 0, name
        assert registers <= 255 and shared <= 48 * 1024, name
    if source == "cluster.cu" and architecture >= 90:
        check_cluster_loads(ptx)
    for name, body in re.findall(r"\.entry (\w*weighted_sums_kernel\w*)\((.*?)\n}", ptx, re.DOTALL):
        if "Li1E" not in name.partition("weighted_sums_kernel")[2][:24]:  # one element at a time
            assert set(re.findall(r"st\.global\.(v4)?", body)) == {"v4"}, name
            assert "ld.global.v4" in body or "ld.v4" in body, name


def check_cluster_loads(ptx):
    """Generic loads are of remote sums alone, paths come in bulk, and a thread asks for its first X before it waits."""
    kernels = [part for part in ptx.split(".entry ")[1:] if "cluster_" in part.partition("(")[0]]
    assert len(kernels) == 12  # 3 types, forward and 3 tiles of backward
    for kernel in kernels:
        name, _, body = kernel.partition("(")
        assert set(re.findall(r"\bld\.(?!shared|global|param|const|local)(\S+)", body)) <= {"f32", "b32"}, name
        assert "cp.async.bulk" in body, name
        if "cluster_backward" in name:
            assert len(re.findall(r"ld\.global\S*\.v4", body.partition("mbarrier.try_wait")[0])) == 8, name


def test_library_loads_without_a_card():
    if reason := _compiled.load_cuda():
        pytest.skip(reason)
    for name in (*OPERATORS, *PASSES):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastroute_native::{name}", "CUDA")
    assert torch.ops.fastroute_native.cuda_plan(2, 1 << 16, 4096, 128, *A100) == TWO_PASSES


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [TWO_PASSES, 2])
def test_graph_capture(card, cluster):
    force(card, cluster)
    xs, parameters, grad_outputs, grads = converted(make_case(*ALIGNED[0], torch.float32, "contiguous"), device="cuda")

    def step():
        outputs, gates, _scores, pooled, hidden = card.cross_connect(xs, *parameters, False)
        return outputs, card.cross_connect_backward(
            grad_outputs, *grads, xs, *parameters, gates, pooled, hidden, False, True
        )

    expected = tensors(step())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = tensors(step())
    for result in results:
        result.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))
    force(card, PLAN)
