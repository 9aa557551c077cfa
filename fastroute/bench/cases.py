"""What a case is, and what its builders share."""

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
    """One thing to measure.

    suite, labels: as in `Row`.
    build: makes the contest; this draws the tensors, so a case costs nothing until then.
    quick: whether it belongs to the default selection, which takes under 5 minutes on 2 cores.
    stated: whether the documentation's table of speed is made of it.
    """

    suite: str
    labels: dict
    build: Callable[[], Contest]
    quick: bool = False
    stated: bool = False

    @property
    def id(self) -> str:
        return case_id(self.labels)


def draw(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device) -> Tensor:
    """A random tensor; `torch.manual_seed` decides which. Only maps (N, C, H, W) have the layout channels_last."""
    return torch.randn(shape).to(device, dtype).contiguous(memory_format=LAYOUTS[layout])


# torch.compile's mode by type of device. On a GPU without CUDA graphs, whose copies of the inputs would slow a peer.
COMPILE_MODES = {"cuda": "max-autotune-no-cudagraphs"}


def compiled(function: Callable, device: torch.device) -> Callable:
    """`torch.compile` of a peer."""
    return torch.compile(function, dynamic=False, mode=COMPILE_MODES.get(device.type, "default"))
