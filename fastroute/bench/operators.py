"""Benchmarks of operators on the thesis's shapes, against plain PyTorch, `torch.compile` of it, and a copy."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastroute import ops
from fastroute.backends import BACKENDS, ORDER, use_backend
from fastroute.bench import plain
from fastroute.bench.cases import DTYPES, Case, compiled, draw
from fastroute.bench.contest import Contest
from fastroute.bench.results import OURS
from fastroute.testing import assert_as_good_as_eager

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"

CIFAR_RESNET = [(16, 32), (32, 16), (64, 8)]
BASE_CNN = [(32, 32), (64, 16), (128, 8)]
RESNET18 = [(64, 56), (128, 28), (256, 14), (512, 7)]
RESNET50 = [(256, 56), (512, 28), (1024, 14), (2048, 7)]


def _maps(batch: int, stages: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    return [(batch, channels, size, size) for channels, size in stages]


def stages(device: str) -> list[tuple[int, ...]]:
    """Return (N, C, H, W) after each stage of the thesis's networks, at its batch sizes; 32 for ImageNet on a CPU."""
    imagenet = 256 if device == "cuda" else 32
    small = _maps(64, CIFAR_RESNET) + _maps(128, CIFAR_RESNET + BASE_CNN)
    return small + _maps(imagenet, RESNET18 + RESNET50)


# Allowed error of torch.compile's result, as a multiple of eager's: its order of summation gives the gradients of a
# gate's few parameters 1.5 to 8 times the error of eager (rms over draws), and single draws vary.
COMPILE_TIMES = 32

# Consecutive calls of memory-bound cases. With convolutions, caches matter little and a call takes long.
REPEATS = 5

# Shapes in the documentation: stages of the CIFAR ResNets at batch 128, and the first three of ResNet18 at batch 32.
STATED = _maps(128, CIFAR_RESNET) + _maps(32, RESNET18[:3])


@dataclass(frozen=True)
class Problem:
    """A call to time: m paths of a shape, routed to n."""

    operator: str
    direction: str
    backend: str
    dtype: str
    layout: str
    shape: tuple[int, ...]
    paths: tuple[int, int]


@dataclass(frozen=True)
class Operator:
    """An operator to benchmark.

    fused, plain: from (list of m paths, *parameters) to a list of tensors; ours, and the same in plain PyTorch.
    parameters: draws the float32 parameters of a problem.
    maps: (m, n) → minimal number of maps read and written by (forward, backward); None if the operator is not bound by
        memory.
    shapes: device type → the shapes of a path.
    quick: shapes of the default selection, for the first of `paths`; the first shape in both directions.
    paths: (m, n); backends other than the first choice are measured with the first only.
    rectified: whether the outputs come from a ReLU. Near its kink, where rounding decides whether a gradient passes,
        the incoming gradient is set to 0.
    """

    fused: Callable[..., Sequence[Tensor]]
    plain: Callable[..., Sequence[Tensor]]
    parameters: Callable[[Problem], list[Tensor]]
    maps: Callable[[int, int], tuple[int, int]] | None
    shapes: Callable[[str], list[tuple[int, ...]]] = stages
    quick: Sequence[tuple[int, ...]] = (*_maps(128, CIFAR_RESNET), *_maps(256, RESNET18[:1]))
    paths: Sequence[tuple[int, int]] = ((2, 2), (3, 3), (1, 2), (4, 4))
    dtypes: Sequence[str] = ("float32", "bfloat16")
    layouts: Sequence[str] = ("contiguous", "channels_last")
    rectified: bool = False


def _gate_parameters(problem: Problem) -> list[Tensor]:
    (m, n), channels = problem.paths, problem.shape[1]
    return [0.1 * torch.randn(size) for size in ((m, 16, channels), (m, 16), (m, n, 16), (m, n))]


def _cross_predict(xs: list[Tensor], weight: Tensor, bias: Tensor, *gate: Tensor) -> list[Tensor]:
    return ops.cross_predict(xs, weight, bias, ops.gate(xs, *gate).gates, padding=1)


def _prediction_parameters(problem: Problem) -> list[Tensor]:
    paths, channels = problem.paths, problem.shape[1]
    sizes = (*paths, channels, channels, 3, 3), (*paths, channels)
    return [*(0.1 * torch.randn(size) for size in sizes), *_gate_parameters(problem)]


def _gates(problem: Problem) -> list[Tensor]:
    return [torch.randn(problem.shape[0], *problem.paths).softmax(-1)]


def _routed_maps(m: int, n: int) -> tuple[int, int]:
    """Return the maps moved: forward reads m and writes n; backward reads these m and n gradients, and writes m."""
    return m + n, 2 * m + n


OPERATORS = {
    "cross_connect": Operator(
        fused=lambda xs, *parameters: ops.cross_connect(xs, *parameters).outputs,
        plain=plain.cross_connect,
        parameters=_gate_parameters,
        maps=_routed_maps,
    ),
    "mix": Operator(
        fused=ops.mix, plain=plain.mix, parameters=_gates, maps=_routed_maps, quick=_maps(128, CIFAR_RESNET[:1])
    ),
    "cross_predict": Operator(
        fused=_cross_predict,
        plain=plain.cross_predict,
        parameters=_prediction_parameters,
        maps=None,
        shapes=lambda device: _maps(128, CIFAR_RESNET[:2]),
        quick=_maps(128, CIFAR_RESNET[:1]),
        paths=((2, 2), (3, 3)),
        dtypes=(
            "float32",
        ),  # in bfloat16 the gradients of the few gates and biases differ by chance, also those of torch.compile
        rectified=True,
    ),
}


def contest(problem: Problem, device: torch.device) -> Contest:
    """Build a contest of an operator on one backend against its peers, on the same tensors."""
    operator, dtype = OPERATORS[problem.operator], DTYPES[problem.dtype]
    m, n = problem.paths
    torch.manual_seed(0)
    xs = [draw(problem.shape, dtype, problem.layout, device) for _ in range(m)]
    parameters = [p.to(device) for p in operator.parameters(problem)]
    with torch.no_grad():
        outputs = operator.plain(xs, *parameters)
        incoming = [torch.randn_like(y) for y in outputs]
        if operator.rectified:
            near = 4 * torch.finfo(dtype).eps
            incoming = [grad * (y > near * (1 + y.max())) for grad, y in zip(incoming, outputs, strict=True)]

    def job(function, xs=xs, parameters=parameters, incoming=incoming):
        if problem.direction == FORWARD:
            with torch.no_grad():
                return function(xs, *parameters)
        outputs = function(xs, *parameters)
        return [*outputs, *torch.autograd.grad(outputs, [*xs, *parameters], incoming)]

    def fused():
        # Do not name the backend of first choice: naming takes a different code path from the user's.
        first = _serving(device, dtype)[0] == problem.backend
        with contextlib.nullcontext() if first else use_backend(problem.backend):
            return job(operator.fused)

    torch._dynamo.reset()
    plain_compiled = compiled(operator.plain, device)
    contenders = {OURS: fused, "eager": lambda: job(operator.plain), "compile": lambda: job(plain_compiled)}
    leaves = [*xs, *parameters]
    for leaf in leaves:
        leaf.requires_grad_(problem.direction == FORWARD_BACKWARD)

    def check():
        doubles = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
        exact = job(operator.plain, doubles[:m], doubles[m:], [grad.double() for grad in incoming])
        eager = contenders["eager"]()
        for name, times in ((OURS, 2), ("compile", COMPILE_TIMES)):
            try:
                assert_as_good_as_eager(contenders[name](), eager, exact, times)
            except AssertionError as error:
                timed.refuse(name, error)

    floor = None
    if operator.maps is not None:
        forward, backward = operator.maps(m, n)
        maps = forward if problem.direction == FORWARD else forward + backward
        floor = maps * xs[0].numel() * xs[0].element_size()
    # On a GPU the caches are flushed before each call.
    repeats = 1 if floor is None or device.type == "cuda" else REPEATS
    timed = Contest(contenders, check, device, floor, repeats=repeats)
    return timed


def _serving(device: torch.device, dtype: torch.dtype) -> list[str]:
    return [name for name in ORDER[device.type] if BACKENDS[name].reason_against(device, dtype) is None]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield operator × direction × backend × dtype × layout × shape × number of paths.

    Raises:
        ValueError: FASTROUTE_BACKEND is set, which would override the backends of the cases.
    """
    if override := os.environ.get("FASTROUTE_BACKEND"):
        raise ValueError(f"FASTROUTE_BACKEND is {override!r}; it must not be set, since the cases name the backends")
    for name, operator in OPERATORS.items():
        for dtype in operator.dtypes:
            for rank, backend in enumerate(_serving(device, DTYPES[dtype])):
                paths = operator.paths if rank == 0 else operator.paths[:1]
                for problem in _problems(name, operator, backend, dtype, paths, device.type):
                    yield Case(
                        "operators",
                        vars(problem),
                        partial(contest, problem, device),
                        quick=rank == 0 and _quick(problem),
                        stated=rank == 0 and _stated(problem),
                    )


def _problems(name, operator, backend, dtype, paths, device) -> Iterator[Problem]:
    for layout in operator.layouts:
        for shape in operator.shapes(device):
            for direction in (FORWARD_BACKWARD, FORWARD):
                for m, n in paths:
                    yield Problem(name, direction, backend, dtype, layout, shape, (m, n))
        if operator.shapes is stages:  # inference, one image at a time
            for shape in _maps(1, RESNET50):
                yield Problem(name, FORWARD, backend, dtype, layout, shape, paths[0])


def _quick(problem: Problem) -> bool:
    operator = OPERATORS[problem.operator]
    shapes = operator.quick if problem.direction == FORWARD_BACKWARD else operator.quick[:1]
    usual = (problem.dtype, problem.layout) in (("float32", "contiguous"), ("bfloat16", "channels_last"))
    return usual and problem.paths == operator.paths[0] and problem.shape in shapes


def _stated(problem: Problem) -> bool:
    return (
        problem.operator == "cross_connect"
        and problem.direction == FORWARD_BACKWARD
        and problem.paths in ((2, 2), (3, 3))
        and problem.shape in STATED
    )
