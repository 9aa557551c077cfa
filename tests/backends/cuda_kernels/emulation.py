"""csrc/cuda compiled for the CPU, with the emulator in place of CUDA's headers."""

import shutil
import subprocess
from pathlib import Path

from tests.backends.cuda_kernels.cases import CSRC, TORCH, cuda_sources

EMULATOR = Path(__file__).with_name("emulator.h")
C10_HEADERS = ("Exception", "Guard", "Stream")

# The emulator's own switches, and what csrc/cuda/plan.h says, without an operator of its own.
ENTRIES = """
extern "C" void emulator_order(int order) { emulator::order = order; }
extern "C" void emulator_idle(bool idle) { emulator::idle = idle; }
extern "C" int64_t emulator_launches() { return emulator::launches; }
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


# Registers the kernels of CUDA tensors for those of the CPU.
FOR_CPU_TENSORS = """
#include <torch/library.h>
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(space, key, m) _TORCH_LIBRARY_IMPL(space, CPU, m, C10_UID)
"""

# Kernels that tests run, in a namespace of their own: misaligned accesses and those past an array's end trap.
CHECKED = ("-O1", "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error")
CHECKED += ("-Dfastroute_native=fastroute_emulated",)


def compile_for_cpu(library: Path, flags: tuple[str, ...], cpu_tensors: bool = False) -> None:
    """Compile csrc/cuda with the emulator to `library`.

    The operators serve the dispatch key of CUDA, or that of the CPU, for which no other kernels may then be loaded.

    Raises:
        subprocess.SubprocessError: the compiler fails, or takes half an hour.
    """
    folder = library.parent
    (folder / "c10" / "cuda").mkdir(parents=True)
    for header in ("cuda_runtime", "cuda_runtime_api", *(f"c10/cuda/CUDA{name}" for name in C10_HEADERS)):
        (folder / f"{header}.h").touch()
    unity = folder / "unity.cpp"
    sources = [path for suffix in ("cpp", "cu") for path in sorted((CSRC / "cuda").glob(f"*.{suffix}"))]
    included = "".join(f'#include "{source}"\n#undef INSTANTIATE\n' for source in sources)
    unity.write_text((FOR_CPU_TENSORS if cpu_tensors else "") + included + ENTRIES)
    includes = (folder, CSRC, TORCH / "include", TORCH / "include/torch/csrc/api/include")
    common = ["-std=c++20", "-w", "-fPIC", "-shared", "-include", EMULATOR, *(f"-I{path}" for path in includes)]
    common += ['-DFASTROUTE_BUILD="emulated"', '-DFASTROUTE_TORCH="any"']
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", *common, *flags, unity, "-o", library, *libraries], check=True, timeout=1800)


def reason_against_compiling() -> str | None:
    return None if shutil.which("g++") else "the emulator needs g++"


def emulated_sources() -> list[object]:
    """What the compiled emulator depends on."""
    return [Path(__file__), EMULATOR, *cuda_sources("g++")]
