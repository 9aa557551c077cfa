"""One function per operator: the compiled kernels, dispatched by PyTorch on the device."""

import torch

from fastroute.ops._library import OPERATORS

__all__ = list(OPERATORS)
globals().update({name: getattr(torch.ops.fastroute_native, name).default for name in OPERATORS})
