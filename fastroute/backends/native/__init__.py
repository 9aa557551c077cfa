"""The compiled kernels of csrc: C++ for the CPU, CUDA for the GPU.

A library is loaded when a tensor first asks for it. One that is missing, or was built for another torch or, in a
checkout, from other sources than those beside the package, is a reason not to serve, never an error at import.
"""

from functools import cache
from pathlib import Path

import torch

from fastroute.backends.native._hash import source_hash

_FOLDER = Path(__file__).parent
_SOURCES = _FOLDER.parents[2] / "csrc"
_REBUILD = "build it anew with `python setup.py build_ext --inplace` or `pip install`"
_STALE = f"the compiled library is older than the sources in csrc; {_REBUILD}"


def cpu_library() -> str:
    """The name of the CPU library for this processor's instruction set, as torch reports it (ATEN_CPU_CAPABILITY)."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability == "avx512" and torch.cpu.get_capabilities().get("avx512_bf16"):
        capability = "avx512_bf16"
    return f"_C_{capability}"


@cache
def _load(name: str) -> str | None:
    """Load a library of this folder; returns why it cannot be loaded, or None."""
    path = _FOLDER / f"{name}.so"
    if not path.exists():
        return f"the compiled library {path.name} is missing; {_REBUILD}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the compiled library {path.name} does not load ({error}); {_REBUILD}"
    return None


@cache
def _operators() -> str | None:
    if reason := _load("_C"):
        return reason
    sources, built_for = torch.ops.fastroute_native.build()
    if built_for != torch.__version__:
        return f"the compiled library was built for torch {built_for}, and this is {torch.__version__}; {_REBUILD}"
    return _STALE if _SOURCES.is_dir() and sources != source_hash(_SOURCES, "cpu") else None


@cache
def _cuda_operators() -> str | None:
    path = _FOLDER / "_C_cuda.so"
    if _SOURCES.is_dir() and path.exists():
        built_from = f"fastroute_cuda_build {source_hash(_SOURCES, 'cuda')}".encode()
        # Read from the file: loading it beside operators of other schemas would end the process.
        if built_from not in path.read_bytes():
            return _STALE
    return _load("_C_cuda")


_backend_is_named = False


@cache
def _direct() -> str | None:
    """Load the CPU operators' way past Python; why it cannot be loaded, or None."""
    reason = _load("_C_direct")
    if reason is None:
        torch.ops.fastroute_native.name_backend(_backend_is_named)
    return reason


def name_backend(named: bool) -> None:
    """Say whether the user has named a backend: then operators on the CPU come to Python, which makes the choice."""
    global _backend_is_named
    _backend_is_named = named
    if _direct.cache_info().currsize and _direct() is None:
        torch.ops.fastroute_native.name_backend(named)


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu":
        return _operators() or _load(cpu_library()) or _direct()
    if device.type == "cuda":
        absent = None if torch.cuda.is_available() else "this machine has no CUDA device"
        return _operators() or _cuda_operators() or absent
    return f"there are no compiled kernels for {device.type}"
