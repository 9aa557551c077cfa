"""Benchmark cases, and helpers to build them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastroute.bench.contest import Contest
from fastroute.bench.results import case_id

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """A case to measure.

    suite, labels: as in `Row`.
    build: makes the contest. It also allocates the tensors, so that a case costs nothing before.
    quick: whether the case is in the default selection, which takes minutes on 2 cores.
    stated: whether the case is part of the documentation's table of speed.
    step: whether the case compares a whole step, or a forward pass, with that of plain PyTorch, both also compiled.
    """

    suite: str
    labels: dict
    build: Callable[[], Contest]
    quick: bool = False
    stated: bool = False
    step: bool = False

    @property
    def id(self) -> str:
        return case_id(self.labels)


def draw(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device) -> Tensor:
    """Draw a random tensor from PyTorch's global generator.

    Args:
        shape: of the tensor; channels_last needs (N, C, H, W).
        dtype, device: of the tensor.
        layout: a key of `LAYOUTS`.
    """
    return torch.randn(shape).to(device, dtype).contiguous(memory_format=LAYOUTS[layout])


# Device type → mode of torch.compile. On a GPU without CUDA graphs, whose input copies would slow a peer down.
COMPILE_MODES = {"cuda": "max-autotune-no-cudagraphs"}


def compiled(function: Callable, device: torch.device) -> Callable:
    """Return `torch.compile` of a peer's function, in the mode for the device."""
    return torch.compile(function, dynamic=False, mode=COMPILE_MODES.get(device.type, "default"))
