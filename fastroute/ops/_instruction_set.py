import warnings

import torch

INSTRUCTION_SETS = ("default", "avx2", "avx512", "avx512_bf16")
"""Instruction sets of CPU libraries; each processor serves those before its own too. "default" is for ARM."""


def own_instruction_set() -> str:
    """Return the newest instruction set of CPU libraries that torch finds on this processor."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability == "avx512" and torch.cpu.get_capabilities().get("avx512_bf16"):
        return "avx512_bf16"
    return capability if capability in INSTRUCTION_SETS else "default"  # torch's own for ARM, such as SVE256


def warn_if_emulated(dtype: torch.dtype | None, device_type: str) -> None:
    """Warn if autocast to bfloat16 is slow: on x86 processors without instructions for it, PyTorch emulates it."""
    if dtype == torch.bfloat16 and device_type == "cpu":
        has = torch.cpu.get_capabilities()
        if has.get("architecture") == "x86_64" and not (has.get("avx512_bf16") or has.get("amx_bf16")):
            warnings.warn(
                "this processor has no bfloat16 instructions, so mixed precision is slower than float32; use --no-amp,"
                " or amp_dtype=None in Python",
                stacklevel=3,
            )
