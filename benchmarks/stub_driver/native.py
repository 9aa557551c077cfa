"""Serve CPU tensors with the compiled CUDA kernels: launches are counted, and no kernel runs.

`environment()` is for a separate process, which then calls `install()`. The time of a call there is that of the host
without CUDA's runtime and driver.
"""

import ctypes
import os
from pathlib import Path

import torch

from benchmarks import stub_driver
from tests.artefacts import artefact
from tests.backends.cuda_kernels.emulation import compile_for_cpu, emulated_sources

LIBRARY = "FASTROUTE_STUB_LIBRARY"


def environment() -> dict[str, str]:
    """Compile the library, or find it as compiled before, and return the environment of a process that uses it.

    It is optimised unless FASTROUTE_OPTIMIZE is another level, as in setup.py.

    Raises:
        subprocess.SubprocessError: the compiler fails.
    """
    flags = (f"-O{os.environ.get('FASTROUTE_OPTIMIZE', '2')}", "-DNDEBUG")

    def compile_library(folder: Path) -> None:
        compile_for_cpu(folder / "host.so", flags, cpu_tensors=True)

    library = artefact("host_of_cuda", [Path(__file__), *flags, *emulated_sources()], compile_library) / "host.so"
    # No instruction set has this name, so the kernels of the CPU are not loaded.
    return stub_driver.without_choices(os.environ) | {"FASTROUTE_CPU": "stub", LIBRARY: str(library)}


def install() -> ctypes.CDLL:
    """Make the CUDA kernels serve CPU tensors, without running; return the library, with `emulator_launches()`."""
    library = os.environ[LIBRARY]
    torch.ops.load_library(library)
    entries = ctypes.CDLL(library)
    entries.emulator_idle.argtypes, entries.emulator_launches.restype = (ctypes.c_bool,), ctypes.c_int64
    entries.emulator_idle(True)
    return entries
