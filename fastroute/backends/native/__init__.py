"""Compiled kernels from csrc: C++ for the CPU, CUDA for the GPU. `fastroute.ops._compiled` loads them."""

import torch

from fastroute.backends._cuda import reason_against_device
from fastroute.ops import _compiled

MINIMUM_CAPABILITY = (8, 0)  # what the CUDA kernels are compiled for


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why this backend does not support such tensors, or None."""
    if device.type == "cpu":
        return _compiled.load_cpu()
    if device.type == "cuda":
        return _compiled.load_cuda() or reason_against_device(device, MINIMUM_CAPABILITY)
    return f"there are no compiled kernels for {device.type}"
