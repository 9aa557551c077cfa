"""The thesis's equations in plain PyTorch: the reference for tests, and the fallback for every device and dtype."""

import torch


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None: this backend supports all tensors."""
    return None
