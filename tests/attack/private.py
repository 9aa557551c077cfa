"""Hostile arguments of the compiled operators, which users do not call: `python -m tests.attack.private`.

Each call may succeed or raise; it must not crash.
"""

import random
from typing import NamedTuple

import torch

import fastroute  # noqa: F401 (it loads the operators)
from tests.attack import forked

M, N, BATCH, CHANNELS, HIDDEN, WIDTH = 2, 3, 2, 3, 4, 5
SCORES = 6, 4

# Code of recorded launches is the library's own; the others only set how tests are run.
LEFT_OUT = {"record", "forget_recordings", "recording_is_offered", "name_backend"}


class Case(NamedTuple):
    operator: str
    seed: int


def operators() -> list[str]:
    names = {name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("fastroute_native::")}  # fmt: skip
    return sorted(name for name in names - LEFT_OUT if not name.startswith("cuda_"))


def draw(r: random.Random) -> Case:
    return Case(r.choice(operators()), r.randrange(1 << 30))


def _maps(count: int, parts: int = 1, channels: int = CHANNELS) -> list[torch.Tensor]:
    return [torch.randn(BATCH, 4, 4, parts * channels).movedim(-1, 1) for _ in range(count)]


def valid(operator: str) -> dict[str, object]:
    """Return an argument for each name that passes the checks, alone or with the others of its operator."""
    passes = operator in ("sum_predictions", "scale_paths", "sum_gradients")
    predicts = operator.startswith("cross_predict")
    per_channel = {"weight": torch.ones(CHANNELS), "bias": torch.zeros(CHANNELS), "mean": torch.zeros(CHANNELS)}
    return {
        "xs": _maps(M),
        "grad_outputs": _maps(N, channels=WIDTH if predicts else CHANNELS),
        "outputs": _maps(N, channels=WIDTH if predicts else CHANNELS),
        "predictions": _maps(M, N),
        "paths": _maps(M),
        "masks": _maps(M),
        "masked": _maps(M),
        "scaled": _maps(N, M),
        "terms": _maps(N, M),
        "grad_xs": _maps(M),
        "gates": torch.rand(BATCH, M, N),
        "weights": torch.rand(BATCH, M, N),
        "grad_gates": torch.rand(BATCH, M, N),
        "grad_scores": torch.rand(BATCH, M, N),
        "offsets": torch.rand(BATCH, N, CHANNELS),
        "w1": torch.randn(M, HIDDEN, CHANNELS),
        "b1": torch.randn(M, HIDDEN),
        "w2": torch.randn(M, N, HIDDEN),
        "b2": torch.randn(M, N),
        "pooled": torch.randn(BATCH, M, CHANNELS),
        "hidden": torch.randn(BATCH, M, HIDDEN),
        "weight": torch.randn(M, N, WIDTH, CHANNELS, 3, 3),
        "bias": torch.randn(M, N, WIDTH),
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "form": "predict",
        "scores": torch.randn(SCORES),
        "scores_aug": torch.randn(SCORES),
        "prior": torch.full(SCORES[1:], 1 / SCORES[1]),
        "mean": torch.zeros(SCORES[1:]),
        "std": torch.ones(SCORES[1:]),
        "posterior": torch.rand(SCORES),
        "means": torch.zeros(2, *SCORES[1:]),
        "scales": torch.ones(2, *SCORES[1:]),
        "grad_loss": torch.ones(()),
        "gamma": 5.0,
        "x": _maps(1)[0],
        "size": [2, 8, 64, 64],
        "m": M,
        "n": N,
        "relu": passes,
        "residual": _maps(1)[0] if operator == "batch_norm" else True,
        "grad": _maps(1)[0],
        "y": _maps(1)[0],
        "variance": torch.ones(CHANNELS),
        "eps": 1e-5,
        **(per_channel if operator.startswith("batch_norm") else {}),
    }


NUMBERS = [-(1 << 62), -7, -1, 0, 1, 2, 3, 9, 100, 1 << 20, 1 << 40, 1 << 62]
TYPES = [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]


def _hostile_tensor(r: random.Random, value: torch.Tensor | None) -> torch.Tensor | None:
    if value is None or r.random() < 0.1:
        return r.choice([None, torch.zeros(0), torch.zeros(()), torch.zeros(1 << 16, device="meta")])
    change = r.randrange(8)
    if change == 0:
        return value.to(r.choice(TYPES))
    if change == 1 and value.dim():
        return value.select(r.randrange(value.dim()), 0)
    if change == 2:
        return value.unsqueeze(r.randint(0, value.dim()))
    if change == 3 and value.dim():
        dim = r.randrange(value.dim())
        return value.narrow(dim, 0, r.randrange(value.shape[dim]))
    if change == 4:
        return value.repeat([r.choice([1, 1, 2, 9]) for _ in value.shape])
    if change == 5:
        return value.to("meta")
    if change == 6:
        return value.flatten()
    return value.permute(r.sample(range(value.dim()), value.dim()))


def _hostile(r: random.Random, value: object) -> object:
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        change = r.randrange(4)
        if change == 0:
            return []
        if change == 1:
            return value * r.choice([2, 9, 100])
        if change == 2:
            return value[:-1]
        at = r.randrange(len(value))
        return [_hostile_tensor(r, t) if i == at else t for i, t in enumerate(value)]
    if isinstance(value, list):
        return [r.choice(NUMBERS) for _ in range(r.choice([0, 1, 2, 2, 2, 5]))]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return r.choice(NUMBERS)
    if isinstance(value, float):
        return r.choice([0.0, -1.0, float("nan"), float("inf"), 1e-320])
    if isinstance(value, str):
        return r.choice(["", "gate", "x" * 1000])
    return _hostile_tensor(r, value)


def run(case: Case) -> None:
    torch.set_num_threads(1)
    r = random.Random(case.seed)
    operator = getattr(torch.ops.fastroute_native, case.operator).default
    given = valid(case.operator)
    arguments = []
    for argument in operator._schema.arguments:
        value = given.get(argument.name, r.random() < 0.5)
        if isinstance(argument.type, torch.ListType) and isinstance(value, torch.Tensor):
            value = [value]
        if argument.name == "stride" and case.operator == "new_empty_strided":
            value = [8 * 64 * 64, 1, 8 * 64, 8]
        arguments.append(value)
    for _ in range(r.choice([0, 1, 1, 1, 2, 3])):
        at = r.randrange(len(arguments))
        arguments[at] = _hostile(r, arguments[at])
    try:
        results = operator(*arguments)
    except Exception:  # any error is a right answer to hostile arguments; a crash is not
        return
    # All memory of the results must be readable.
    for result in results if isinstance(results, (list, tuple)) else [results]:
        for tensor in result if isinstance(result, list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.numel() < 1 << 24:
                tensor.double().sum() if not tensor.is_complex() else None


if __name__ == "__main__":
    forked.main(draw, run, Case("mix", 0))
