"""The kernels of csrc/cuda, run on the CPU by an emulator, and with `-m gpu` on a card."""

import ctypes
import functools
from types import SimpleNamespace

import pytest
import torch

from fastroute.backends import native
from tests.artefacts import artefact
from tests.backends.cuda_kernels.cases import OPERATORS, PASSES, PLAN
from tests.backends.cuda_kernels.emulation import CHECKED, compile_for_cpu, emulated_sources, reason_against_compiling


def compile_checked(folder):
    compile_for_cpu(folder / "emulated.so", CHECKED)


@functools.cache
def load_emulated():
    """The emulated kernels, whose operators a process can define once."""
    if reason := reason_against_compiling():
        pytest.skip(reason)
    if reason := native.reason_against(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    library = artefact("emulated", emulated_sources(), compile_checked) / "emulated.so"

    schemas = torch.library.Library("fastroute_emulated", "DEF")
    for name in OPERATORS:
        schemas.define(str(getattr(torch.ops.fastroute, name).default._schema).removeprefix("fastroute::"))
    for name in PASSES:
        schemas.define(str(getattr(torch.ops.fastroute_native, name).default._schema).partition("::")[2])
    torch.ops.load_library(library)
    namespace, key = torch.ops.fastroute_emulated, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    operators = {
        name: functools.partial(getattr(namespace, name).default.redispatch, key) for name in (*OPERATORS, *PASSES)
    }
    entries = ctypes.CDLL(str(library))
    entries.emulator_cluster.restype, entries.emulator_holds_gate.restype = ctypes.c_int64, ctypes.c_bool
    entries.emulator_holds_gate.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    return SimpleNamespace(
        **operators,
        namespace=namespace,
        device="cpu",
        clusters=True,
        order=entries.emulator_order,
        entries=entries,
        keep=schemas,
    )


@pytest.fixture(scope="session")
def emulated():
    return load_emulated()


@pytest.fixture(scope="session")
def card():
    if reason := native.reason_against(torch.device("cuda"), torch.float32):
        pytest.skip(reason)
    namespace = torch.ops.fastroute_native
    operators = {name: getattr(namespace, name).default for name in (*OPERATORS, *PASSES)}
    clusters = torch.cuda.get_device_capability() >= (9, 0)
    return SimpleNamespace(**operators, namespace=namespace, device="cuda", clusters=clusters, order=lambda order: None)


@pytest.fixture(params=["emulated", pytest.param("card", marks=pytest.mark.gpu)])
def kernels(request):
    kernels = request.getfixturevalue(request.param)
    yield kernels
    kernels.namespace.cuda_force_cluster(PLAN)
    kernels.order(0)
