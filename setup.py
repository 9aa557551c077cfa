"""Build csrc: one CPU library per instruction set, and a CUDA library if nvcc and a CUDA torch are found.

FASTROUTE_BUILD_CUDA=0 skips the CUDA library, and 1 requires it. FASTROUTE_BUILD_CPU=avx2,avx512 builds only those CPU
libraries, "native" being this processor's, and FASTROUTE_BUILD_CPU=0 none. FASTROUTE_OPTIMIZE=0 builds the operators
and CPU libraries in less time, for tests. FASTROUTE_SANITIZE=address or undefined builds them with that sanitizer,
which the process must preload. MAX_JOBS and TORCH_CUDA_ARCH_LIST are torch's.
"""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
PACKAGE = "fastroute.backends.native"


def marks(library: str) -> list[str]:
    """Return the defines with which OPERATORS, CPU or CUDA record their sources and torch version for the loader."""
    loader = runpy.run_path(str(ROOT / "fastroute/ops/_source_hash.py"))
    built_from = loader["source_hash"](ROOT, *loader[library])
    return [f'-DFASTROUTE_BUILD="{built_from}"', f'-DFASTROUTE_TORCH="{torch.__version__}"']


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def say(message: str) -> None:
    print(f"fastroute: {message}", file=sys.stderr)


def cpu_extensions() -> list:
    flags = [f"-O{os.environ.get('FASTROUTE_OPTIMIZE', '3')}", "-g0"]
    sanitizers = []
    if wish := os.environ.get("FASTROUTE_SANITIZE"):
        sanitizers = [f"-fsanitize={wish}"]
        # Optimised, the checks of one file of kernels compile for minutes; without, for one.
        flags = ["-O0", "-g1", "-fno-omit-frame-pointer", *sanitizers]
    flags += ["-std=c++20", "-fopenmp", "-fvisibility=hidden", "-Wall"]
    instruction_sets = {"default": []}
    if platform.machine() in {"x86_64", "AMD64"}:
        avx512 = [
            "-DCPU_CAPABILITY=AVX512",
            "-DCPU_CAPABILITY_AVX512",
            *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"),
            *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 warns about its own intrinsics
        ]
        instruction_sets = {
            "avx2": ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"],
            "avx512": avx512,
            "avx512_bf16": [*avx512, "-mavx512bf16"],
        }
    if wish := os.environ.get("FASTROUTE_BUILD_CPU"):
        own = runpy.run_path(str(ROOT / "fastroute/ops/_instruction_set.py"))["own_instruction_set"]()
        names = [] if wish == "0" else [own if name == "native" else name for name in wish.split(",")]
        if not set(names) <= instruction_sets.keys():
            sys.exit(
                f"fastroute: FASTROUTE_BUILD_CPU is {wish!r}; it must be 0, or names from native, "
                f"{', '.join(instruction_sets)}"
            )
        instruction_sets = {name: instruction_sets[name] for name in names}
    operators = cpp_extension.CppExtension(
        f"{PACKAGE}._C",
        ["csrc/operators.cpp", *sources("ops", ".cpp"), *sources("triton", ".cpp")],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=[*flags, *marks("OPERATORS")],
        extra_link_args=sanitizers,
    )
    kernels = [
        cpp_extension.CppExtension(
            f"{PACKAGE}._C_{name}",
            sources("cpu", ".cpp"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args=[*flags, *target_flags, *marks("CPU")],
            extra_link_args=["-fopenmp", *sanitizers],
        )
        for name, target_flags in instruction_sets.items()
    ]
    return [operators, *kernels]


def nvcc() -> str | None:
    """Return the nvcc of a toolkit with headers: from CUDA_HOME, from the nvcc on PATH, or from /usr/local/cuda."""
    homes = [cpp_extension.CUDA_HOME, "/usr/local/cuda"]
    if wrapper := shutil.which("nvcc"):
        dryrun = subprocess.run([wrapper, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        homes[1:1] = re.findall(r"^#\$ TOP=(.+)", dryrun.stderr, re.MULTILINE)
    for home in map(os.path.realpath, filter(None, homes)):
        if os.path.exists(f"{home}/bin/nvcc") and os.path.exists(f"{home}/include/cuda_runtime.h"):
            return f"{home}/bin/nvcc"
    return None


def reason_against_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if nvcc() is None:
        return "no CUDA toolkit was found (CUDA_HOME, nvcc)"
    version = toolkit_version()
    if version[0] != int(torch.version.cuda.partition(".")[0]):
        return f"torch is built for CUDA {torch.version.cuda} and nvcc is {version[0]}.{version[1]}"
    return None


def toolkit_version() -> tuple[int, int]:
    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", said).groups()
    return int(major), int(minor)


@cache
def architecture_list() -> str:
    """Return the architectures to compile for: those of TORCH_CUDA_ARCH_LIST that can run the kernels, or the default.

    The default holds where the list is empty, or is "native" and there is no GPU, as in a container's build: torch
    would then build for the GPUs of this machine, or fail without one.
    """
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not wish or (wish == "native" and not torch.cuda.is_available()):
        return "8.0;9.0;10.0+PTX" if toolkit_version() >= (12, 8) else "8.0;9.0+PTX"  # CUDA 12.8 added Blackwell
    served, left_out = {}, set()
    for flag in cpp_extension._get_cuda_arch_flags():  # machine code, or PTX, for one architecture
        major, rest, kind = re.search(r"arch=compute_(\d+)(\d\w?),code=(sm|compute)", flag).groups()
        name = f"{major}.{rest}"
        if int(major) < 8:
            left_out.add(name)
        else:
            served[name] = "+PTX" if kind == "compute" else served.get(name, "")
    if left_out:
        say(f"compiling no CUDA kernels for {', '.join(sorted(left_out))}: they need compute capability 8.0")
    return ";".join(name + ptx for name, ptx in served.items())


def cuda_extensions() -> list:
    wish = os.environ.get("FASTROUTE_BUILD_CUDA")
    if wish == "0":
        return []
    if reason := reason_against_cuda() or (not architecture_list() and "TORCH_CUDA_ARCH_LIST has none from 8.0 on"):
        if wish == "1":
            sys.exit(f"fastroute: FASTROUTE_BUILD_CUDA=1, but {reason}")
        say(f"installing without compiled CUDA kernels: {reason}")
        return []
    cpp_extension.CUDA_HOME = os.path.dirname(os.path.dirname(nvcc()))
    os.environ["TORCH_CUDA_ARCH_LIST"] = architecture_list()
    codes = (re.search(",code=(.+)", flag)[1] for flag in cpp_extension._get_cuda_arch_flags())
    architectures = f'-DFASTROUTE_ARCHITECTURES="{",".join(codes)}"'
    return [
        cpp_extension.CUDAExtension(
            f"{PACKAGE}._C_cuda",
            sources("cuda", ".cpp") + sources("cuda", ".cu"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={
                "cxx": ["-O3", "-g0", "-std=c++20", "-Wall", *marks("CUDA"), architectures],
                "nvcc": ["-O3", "-std=c++20"],
            },
        )
    ]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++").split()[0])


def extensions() -> list:
    if not os.environ.get("CXX", "c++"):
        del os.environ["CXX"]  # torch would run an empty command
    if compiler() is None:
        say(
            "no C++ compiler was found (CXX, c++): installing without compiled kernels, on the slower reference backend"
        )
        return []
    return cpu_extensions() + cuda_extensions()


def mark_only_where_used(ninja: Path) -> None:
    """Leave FASTROUTE_BUILD, which any change of csrc changes, out of the commands that do not need it."""
    users = [path for path in ROOT.glob("csrc/**/*.cpp") if '#include "build.h"' in path.read_text()]
    users = tuple(str(path.relative_to(ROOT)) for path in users)
    text = ninja.read_text()
    mark = re.search(r"'-DFASTROUTE_BUILD=[^']*'", text)[0]
    lines = text.replace(mark, "").splitlines()
    for position, line in enumerate(lines):
        if line.startswith("build ") and line.endswith(users):
            lines[position] += f"\n  post_cflags = $post_cflags {mark}"
    ninja.write_text("\n".join(lines) + "\n")


class BuildExtension(cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)):
    """Compiles the sources of all libraries in one ninja build, then links each library.

    Every library has its own folder of objects, since several libraries compile the same sources. torch would run one
    ninja per library, each of which waits for its slowest source. Without ninja the libraries are compiled one by one.
    """

    def build_extensions(self):
        self.parallel = None  # ninja compiles all libraries at once; setuptools would start threads
        folders, links = [], []
        run_ninja, compiler = cpp_extension._run_ninja_build, self.compiler
        link = compiler.link_shared_object
        cpp_extension._run_ninja_build = lambda folder, *_, **__: folders.append(folder)
        compiler.link_shared_object = lambda *args, **options: links.append((args, options))
        try:
            super().build_extensions()
        finally:
            cpp_extension._run_ninja_build, compiler.link_shared_object = run_ninja, link
        for folder in folders:
            mark_only_where_used(Path(folder) / "build.ninja")
        if folders:
            paths = (re.sub(r"([$ :])", r"$\1", str(Path(f).resolve())) for f in folders)
            lines = ["ninja_required_version = 1.3", *(f"subninja {path}/build.ninja" for path in paths)]
            (Path(self.build_temp) / "build.ninja").write_text("\n".join(lines) + "\n")
            run_ninja(self.build_temp, verbose=True, error_prefix="fastroute: compiling csrc failed")
        for args, options in links:
            link(*args, **options)

    def build_extension(self, extension):
        shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, extension.name)
        super().build_extension(extension)
        self.build_temp = shared


if __name__ == "__main__":  # tests read the functions
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
