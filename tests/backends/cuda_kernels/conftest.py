"""The kernels of csrc/cuda, run on the CPU by an emulator, and with `-m gpu` on a card."""

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastroute.backends import native
from tests.artefacts import artefact
from tests.backends.cuda_kernels.cases import CSRC, OPERATORS, PASSES, PLAN, TORCH, cuda_sources

EMULATOR = Path(__file__).with_name("emulator.h")
C10_HEADERS = ("Exception", "Guard", "Stream")

# The emulator's own switches, and what csrc/cuda/plan.h says, without an operator of its own.
ENTRIES = """
extern "C" void emulator_order(int order) { emulator::order = order; }
extern "C" int emulator_shared_bytes() { return emulator::blocks.back().bytes; }
namespace fastroute::cuda {
extern "C" int64_t emulator_cluster(bool forward, const int64_t (&sizes)[9], const int64_t (&device)[4]) {
  const auto& [samples, channels, space, channels_last, m, n, hidden, bytes, relu] = sizes;
  const Shape shape{samples, channels, space, channels_last != 0};
  const Device chip{device[0], device[1], device[2], device[3]};
  return forward ? forward_cluster(shape, m, n, hidden, bytes, chip)
                 : backward_cluster(shape, m, n, hidden, bytes, chip, relu);
}
extern "C" bool emulator_holds_gate(int64_t bytes, int64_t gate, const int64_t (&device)[4]) {
  return holds_gate(bytes, gate, {device[0], device[1], device[2], device[3]});
}
}
"""


def compile_emulated(folder: Path) -> None:
    """Compile csrc/cuda for the CPU with the emulator, its operators in a namespace of their own."""
    (folder / "c10" / "cuda").mkdir(parents=True)
    for header in ("cuda_runtime", "cuda_runtime_api", *(f"c10/cuda/CUDA{name}" for name in C10_HEADERS)):
        (folder / f"{header}.h").touch()
    unity = folder / "unity.cpp"
    sources = [path for suffix in ("cpp", "cu") for path in sorted((CSRC / "cuda").glob(f"*.{suffix}"))]
    unity.write_text("".join(f'#include "{source}"\n#undef INSTANTIATE\n' for source in sources) + ENTRIES)
    includes = (folder, CSRC, TORCH / "include", TORCH / "include/torch/csrc/api/include")
    flags = ["-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-include", EMULATOR, *(f"-I{path}" for path in includes)]
    flags += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
    flags += ["-Dfastroute_native=fastroute_emulated", '-DFASTROUTE_BUILD="emulated"', '-DFASTROUTE_TORCH="any"']
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", *flags, unity, "-o", folder / "emulated.so", *libraries], check=True, timeout=1800)


@functools.cache
def load_emulated():
    """The emulated kernels, whose operators a process can define once."""
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    if reason := native.reason_against(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    sources = [Path(__file__), EMULATOR, *cuda_sources("g++")]
    library = artefact("emulated", sources, compile_emulated) / "emulated.so"

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
