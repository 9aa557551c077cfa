"""Compiled kernels from csrc: C++ for the CPU, CUDA for the GPU. `fastroute.ops._compiled` loads them."""

import re

import torch

from fastroute.backends._cuda import reason_against_device
from fastroute.ops import _compiled

MINIMUM_CAPABILITY = (8, 0)  # what the CUDA kernels are compiled for
CLUSTERS = (9, 0)  # from which kernels have thread-block clusters


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why this backend does not support such tensors, or None."""
    if device.type == "cpu":
        return _compiled.load_cpu()
    if device.type == "cuda":
        return (
            _compiled.load_cuda()
            or reason_against_device(device, MINIMUM_CAPABILITY)
            or _reason_against_architectures(device, _compiled.cuda_architectures())
        )
    return f"there are no compiled kernels for {device.type}"


def _reason_against_architectures(device: torch.device, architectures: tuple[str, ...]) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if any(_runs(architecture, capability) for architecture in architectures):
        return None
    major, minor = capability
    return (
        f"the CUDA kernels are compiled for {', '.join(architectures)}, and {device} is sm_{major}{minor}; rebuild "
        f"them with `TORCH_CUDA_ARCH_LIST={major}.{minor} python setup.py build_ext --inplace`"
    )


def has_clusters(device: torch.device) -> bool:
    """Return whether a GPU that the kernels serve runs those that read once.

    They need thread-block clusters, code that was compiled for them, and as much shared memory for a block as an H100
    has.
    """
    capability = torch.cuda.get_device_capability(device)
    compiled = (a for a in _compiled.cuda_architectures() if _runs(a, capability))
    if not any(_version(architecture) >= CLUSTERS for architecture in compiled):
        return False
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 227 << 10


def _version(architecture: str) -> tuple[int, int]:
    major, minor = re.fullmatch(r"(?:sm|compute)_(\d+)(\d)[a-z]?", architecture).groups()
    return int(major), int(minor)


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Return whether a device runs such code: that of its major version up to its minor one, and any older PTX."""
    kind, own, of = architecture.split("_")[0], architecture[-1].isalpha(), _version(architecture)
    if own:  # with features of this one version
        return of == capability
    return of <= capability and (kind == "compute" or of[0] == capability[0])
