import torch


def own_instruction_set() -> str:
    """Return the newest instruction set of CPU libraries that torch finds this processor to have."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    newer = capability == "avx512" and torch.cpu.get_capabilities().get("avx512_bf16")
    return "avx512_bf16" if newer else capability
