"""Loading of the libraries compiled from csrc.

A library is not used if it is missing, was built for another torch version or, in a checkout, was built from other
sources than those in csrc. That is never an error at import. FASTROUTE_COMPILED=0 disables all compiled libraries;
FASTROUTE_CPU=avx2 selects the kernels of an older instruction set than the processor supports.
"""

import mmap
import os
from functools import cache
from pathlib import Path

import torch

from fastroute.ops._instruction_set import INSTRUCTION_SETS, own_instruction_set
from fastroute.ops._source_hash import CPU, CUDA, OPERATORS, source_hash

FOLDER = Path(__file__).parents[1] / "backends" / "native"
ROOT = Path(__file__).parents[2]
REBUILD = "rebuild it with `python setup.py build_ext --inplace` or `pip install`"


def cpu_library() -> str:
    """Return the name of the CPU library for the instruction set of FASTROUTE_CPU, or the newest one that was built.

    Instruction sets that torch does not find on this processor do not count. If none was built, the name is this
    processor's.
    """
    if named := os.environ.get("FASTROUTE_CPU"):
        return f"_C_{named}"
    own = own_instruction_set()
    served = INSTRUCTION_SETS[INSTRUCTION_SETS.index(own) :: -1]
    return f"_C_{next((name for name in served if (FOLDER / f'_C_{name}.so').exists()), own)}"


def _reason_against_instruction_set() -> str | None:
    """Return why the instruction set in FASTROUTE_CPU cannot be used, or None."""
    named, own = os.environ.get("FASTROUTE_CPU"), own_instruction_set()
    if not named or named == own:
        return None
    served = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(own) + 1]
    return None if named in served else f"FASTROUTE_CPU is {named!r}; this processor serves {', '.join(served)}"


def _mark(path: Path) -> tuple[str, str, str]:
    """Return the mark of csrc/build.h: hash of the sources, torch, CUDA architectures; or empty strings."""
    if not path.stat().st_size:  # of a build that was stopped
        return "", "", ""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(b"fastroute_build ")
        words = content[start : content.find(b";", start)].decode(errors="replace").split() if start >= 0 else []
    if len(words) not in (4, 6):
        return "", "", ""
    return words[1], words[3], words[5] if len(words) == 6 else ""


@cache
def cuda_architectures() -> tuple[str, ...]:
    """Return what the CUDA library is compiled for, as nvcc names it: sm_90 for machine code, compute_90 for PTX."""
    return tuple(_mark(FOLDER / "_C_cuda.so")[2].split(","))


def reason_against(path: Path, folders: tuple[str, ...]) -> str | None:
    """Return why the library at `path` must not be loaded, or None."""
    if not path.exists():
        return f"the compiled library {path.name} is missing; {REBUILD}"
    built_from, built_for, _ = _mark(path)
    if not built_for:
        return f"the compiled library {path.name} is not one of fastroute's; {REBUILD}"
    if built_for != torch.__version__:
        torches = f"torch {built_for}, and this is {torch.__version__}"
        return f"the compiled library {path.name} was built for {torches}; {REBUILD}"
    if (ROOT / "csrc").is_dir() and built_from != source_hash(ROOT, *folders):
        return f"the compiled library {path.name} is older than the sources in csrc; {REBUILD}"
    return None


@cache
def load(name: str, folders: tuple[str, ...]) -> str | None:
    """Load a library; return why it cannot be loaded, or None."""
    if os.environ.get("FASTROUTE_COMPILED") == "0":
        return "FASTROUTE_COMPILED=0 leaves the compiled libraries out"
    path = FOLDER / f"{name}.so"
    if reason := reason_against(path, folders):
        return reason
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the compiled library {path.name} does not load ({error}); {REBUILD}"
    return None


def load_operators() -> str | None:
    """Load the operators; return why they cannot be loaded, or None."""
    return load("_C", OPERATORS)


def load_cpu() -> str | None:
    """Load the kernels for this processor; return why they cannot be loaded, or None."""
    return load_operators() or _reason_against_instruction_set() or load(cpu_library(), CPU)


def load_cuda() -> str | None:
    """Load the CUDA kernels; return why they cannot be loaded, or None.

    Called at the first question about CUDA tensors, while the other libraries are loaded at import. This one is linked
    with CUDA's runtime, which a process on a CPU does not need and may not have.
    """
    return load_operators() or load("_C_cuda", CUDA)
