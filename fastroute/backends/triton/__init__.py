"""Fused Triton kernels for CUDA tensors. On CPU tensors they run in Triton's interpreter, for tests only."""

import functools
import importlib.util
import os

import torch

from fastroute._errors import in_a_line
from fastroute.backends._cuda import reason_against_device

MINIMUM_TRITON = (3, 6)


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why this backend does not support such tensors, or None."""
    if device.type not in ("cuda", "cpu"):
        return f"the kernels are for CUDA, not for {device.type}"
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
        if device.type != "cpu":
            return "TRITON_INTERPRET=1 interprets the kernels, which is for tests on the CPU: unset it"
        if isinstance(triton.language.sum, triton.JITFunction):
            return "TRITON_INTERPRET=1 was set after Triton was imported, which is too late"
        return None
    reason = reason_against_device(device, (8, 0) if dtype == torch.bfloat16 else (7, 5))
    return reason or _reason_against_launcher()


@functools.cache
def _reason_against_launcher() -> str | None:
    """Return why Triton cannot build or load its launcher, or None; it compiles a part of it on each machine."""
    from triton.runtime import driver

    try:
        driver.active  # noqa: B018 (this builds and loads it)
    except Exception as error:  # of the compiler, the linker, the file system or the driver
        why = "for which it needs a C compiler and Python's headers"
        return f"Triton cannot build its launcher, {why} ({in_a_line(error)})"
    return None
