import torch


def reason_against_device(device: torch.device, capability: tuple[int, int]) -> str | None:
    """Return why CUDA kernels that need this compute capability cannot run on a device, or None."""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this is a ROCm build of PyTorch"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA; install a CUDA build of it"
    if not torch.cuda.is_available():
        return _reason_for_no_device()
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        return f"{device} is asked for, and this machine has {count} CUDA device{'s' * (count != 1)}"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        needed = ".".join(map(str, capability))
        return f"the kernels need compute capability {needed}, and {device} has {found[0]}.{found[1]}"
    return None


def _reason_for_no_device() -> str:
    try:
        torch.cuda.init()  # raises the reason: no driver, or one that is too old
    except (RuntimeError, AssertionError) as error:
        return f"PyTorch can use no CUDA device: {str(error).partition('. ')[0].rstrip('.')}"
    return "this machine has no CUDA device"
