"""The compiled kernels of csrc."""

import torch


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    return "not built yet"
