"""Random inputs of the CUDA kernels, and their results held to the reference."""

import contextlib
import itertools
import subprocess
from pathlib import Path

import pytest
import torch

from fastroute.backends.reference import kernels as reference
from fastroute.ops._paths import accumulate_dtype
from tests.ops.cases import moved

CSRC = Path(__file__).parents[3] / "csrc"
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
LAYOUTS = ("contiguous", "channels_last", "stacked")

# Architecture, multiprocessors, and shared memory of a block and a multiprocessor.
H100, A100 = (90, 132, 227 * 1024, 228 * 1024), (80, 108, 163 * 1024, 164 * 1024)

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


def cuda_sources(compiler: str) -> list[object]:
    """What a library compiled from csrc/cuda depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    files = sorted([*CSRC.glob("*.h"), *(path for path in (CSRC / "cuda").iterdir() if path.suffix != ".md")])
    return [*files, str(CSRC), str(TORCH), torch.__version__, version]


def label(value) -> str:
    """What a failure calls it: sizes as 2to3,3x33x5x7,hidden16,biases."""
    if not isinstance(value, tuple):
        return str(value).removeprefix("torch.")
    m, n, shape, hidden, biases = value
    gate = f"hidden{hidden}" if hidden else "linear"
    return f"{m}to{n},{'x'.join(map(str, shape))},{gate}{',biases' if biases else ''}"


def grid(**axes):
    """Return all combinations of the axes, six of seven of them marked slow. Seven divides the length of no axis."""
    combinations = [
        pytest.param(*values, id="-".join(map(label, values)), marks=pytest.mark.slow if k % 7 else ())
        for k, values in enumerate(itertools.product(*axes.values()))
    ]
    return pytest.mark.parametrize(tuple(axes), combinations)


def force(kernels, cluster):
    if cluster > 0 and not kernels.clusters:
        pytest.skip("this card has no clusters")
    kernels.namespace.cuda_force_cluster(cluster)


@contextlib.contextmanager
def poisoned_allocations():
    """Fill every new tensor with NaN, so that elements that are not written are noticed."""
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

    The reference sums in float32 where eager PyTorch rounds every step, so this bound is stricter than twice eager's
    error.
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
            # In float64 the reference is exact by definition, and allows for no rounding of large scores.
            roundings = 256 if got.dtype is torch.float64 else 64
            tiny = roundings * torch.finfo(accumulate_dtype(got.dtype)).eps * max(1, right.abs().max())
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
