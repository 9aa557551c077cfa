"""Fused Triton kernels for CUDA tensors."""

import torch


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    return "not built yet"
