"""The thesis's equations in plain PyTorch: what every other backend is tested against, and the last resort."""

import torch


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    return None
