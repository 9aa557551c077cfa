"""Devices as users name them."""

import torch


def resolve_device(device: str | torch.device | None, others: bool = False) -> torch.device:
    """Return a device by its name.

    Args:
        device: "cpu", "cuda", or one GPU, such as "cuda:1"; None is a GPU if there is one, or else the CPU.
        others: whether other types of PyTorch's devices pass, such as "mps".

    Raises:
        ValueError: there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type == "meta" or (found.type not in ("cpu", "cuda") and not others):
        raise ValueError(f"device is {str(device)!r}; it must be cpu, cuda, or one GPU, such as cuda:1")
    check_gpu(found)
    return found


def check_gpu(device: torch.device) -> None:
    """Check that a GPU is there; other devices pass.

    Raises:
        ValueError: there is no such GPU.
    """
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            there = f"has {count} GPUs" if count else "has no GPU that PyTorch can use"
            raise ValueError(f"device is {str(device)!r}; this machine {there}")


def indexed(device: torch.device) -> torch.device:
    """Return a device with its index: "cuda" is the current GPU of the thread and of `torch.cuda.device`."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def is_there(device: torch.device) -> bool:
    """Return whether PyTorch can use a device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, ImportError, AssertionError):  # not built, no module of it, no device
        return False
    return True
