"""Fused Triton kernels for CUDA tensors. On CPU tensors they run in Triton's interpreter, for tests only."""

import importlib.util
import os

import torch

MINIMUM_TRITON = (3, 6)


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type not in ("cuda", "cpu"):
        return f"the kernels are for CUDA, not for {device.type}"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs; this is a ROCm build of PyTorch"
    if dtype == torch.float64:
        return "the kernels compute in float32, which float64 tensors would lose precision in"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and not interpreted:
        return "the tensors are on the CPU, where Triton needs its interpreter (TRITON_INTERPRET=1)"

    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < MINIMUM_TRITON:
        return f"Triton is {triton.__version__}; it must be {'.'.join(map(str, MINIMUM_TRITON))} or newer"
    if interpreted:
        if isinstance(triton.language.sum, triton.JITFunction):
            return "TRITON_INTERPRET=1 was set after Triton was imported, which is too late"
        return None
    if not torch.cuda.is_available():
        return "this machine has no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 5):
        return f"Triton needs compute capability 7.5; this device has {capability[0]}.{capability[1]}"
    if dtype == torch.bfloat16 and capability < (8, 0):
        return f"bfloat16 needs compute capability 8.0; this device has {capability[0]}.{capability[1]}"
    return None
