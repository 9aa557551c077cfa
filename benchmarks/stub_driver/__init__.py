"""Triton on a stub CUDA driver: kernels are compiled to real code for sm_90, and never run.

`environment()` is for a separate process, in which `install()` makes Triton serve CPU tensors through the stub. Outputs
are not written: only host times and the launches themselves are meaningful.
"""

import ctypes
import os
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = "libcuda.so.1"


class Launch(ctypes.Structure):
    """One launch requested from the driver."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("attributes", ctypes.c_uint),
        ("arguments", ctypes.c_uint64 * 128),
    )


def without_choices(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables without those that select a backend or Triton's interpreter."""
    return {key: value for key, value in environment.items() if key not in ("TRITON_INTERPRET", "FASTROUTE_BACKEND")}


def environment(folder: Path) -> dict[str, str]:
    """Build the stub in `folder`, and return the environment of a process that uses it.

    Raises:
        FileNotFoundError: there is no C compiler.
        subprocess.CalledProcessError: the compiler fails.
    """
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    flags = ["-O2", "-w", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}"]
    subprocess.run([compiler, *flags, HERE / "libcuda.c", "-o", folder / LIBRARY], check=True)
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return without_choices(os.environ) | {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH")))),
        "TRITON_LIBCUDA_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join(paths),
    }


def install() -> ctypes.CDLL:
    """Make Triton compile for sm_90, launch through the stub, and serve CPU tensors; return the stub."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver

    from fastroute.backends import BACKENDS, Backend

    class Driver(driver.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    stub = ctypes.CDLL(LIBRARY)
    stub.stub_launch.restype = ctypes.POINTER(Launch)
    stub.stub_set_argument_count.argtypes = (ctypes.c_void_p, ctypes.c_int)
    triton.runtime.driver.set_active(Driver())
    kernels = BACKENDS["triton"].kernels
    BACKENDS["triton"] = Backend("triton", lambda device, dtype: None, kernels)
    return stub
