"""The kernels compiled by nvcc: registers, spills and accesses; and the library that holds them."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from fastroute.ops import _compiled
from tests.artefacts import artefact
from tests.backends.cuda_kernels.cases import A100, CSRC, OPERATORS, PASSES, TORCH, TWO_PASSES, cuda_sources

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def compiled(source, architecture):
    """Return the kernels of one file as (name, registers, shared bytes, spills, stack), and its PTX."""

    def build(folder):
        command = [NVCC, "-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
        with tempfile.TemporaryDirectory() as kept:
            command += ["--keep", "--keep-dir", kept, f"-I{CSRC}", f"-I{TORCH / 'include'}"]
            command += ["-c", CSRC / "cuda" / source, "-o", f"{kept}/out.o"]
            with (folder / "log").open("w") as log:
                subprocess.run(command, check=True, stderr=log, timeout=1800)
            shutil.copy(next(Path(kept).glob("*.ptx")), folder / "ptx")

    folder = artefact(f"{source}-sm_{architecture}", [Path(__file__), *cuda_sources(NVCC)], build)
    pattern = (
        r"entry function '(\S+)' for.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(.*?)$"
    )
    reports = []
    for name, stack, stores, loads, registers, rest in re.findall(
        pattern, (folder / "log").read_text(), re.DOTALL | re.MULTILINE
    ):
        shared = re.search(r"(\d+) bytes smem", rest)
        reports.append((name, int(registers), int(shared[1]) if shared else 0, int(stores) + int(loads), int(stack)))
    return reports, (folder / "ptx").read_text()


SOURCES = sorted(path.name for path in (CSRC / "cuda").glob("*.cu"))


def compilations():
    for architecture in (80, 90, 100):
        for source in SOURCES:
            quick = (source, architecture) in {("cluster.cu", 90), ("weighted_sums.cu", 80)}
            yield pytest.param(source, architecture, marks=() if quick else pytest.mark.slow)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize(("source", "architecture"), list(compilations()))
def test_compiles_without_spills(source, architecture):
    reports, ptx = compiled(source, architecture)
    assert reports
    for name, registers, shared, spills, stack in reports:
        short = re.sub(r"^_ZN9fastroute4cuda\d+_GLOBAL__N__\w+?_\d+_\w+_cu_[0-9a-f]{8}_?\d*", "", name)
        print(f"sm_{architecture} {registers:4} registers {shared:6} bytes shared  {short}")
        assert spills == 0 and stack == 0, name
        assert registers <= 255 and shared <= 48 * 1024, name
    if source == "cluster.cu" and architecture >= 90:
        check_cluster_loads(ptx)
    if (source, architecture) == ("cluster.cu", 90) and "release 13.0" in nvcc_version():
        check_page(reports)
    for name, body in re.findall(r"\.entry (\w*weighted_sums_kernel\w*)\((.*?)\n}", ptx, re.DOTALL):
        if "Li1E" not in name.partition("weighted_sums_kernel")[2][:24]:  # one element at a time
            assert set(re.findall(r"st\.global\.(v4)?", body)) == {"v4"}, name
            assert "ld.global.v4" in body or "ld.v4" in body, name


def check_cluster_loads(ptx):
    """Generic loads are of remote sums alone, paths come in bulk, and a thread asks for its first X before it waits."""
    kernels = [part for part in ptx.split(".entry ")[1:] if "cluster_" in part.partition("(")[0]]
    assert len(kernels) == 18  # 3 types, 3 tiles of forward and backward
    for kernel in kernels:
        name, _, body = kernel.partition("(")
        assert set(re.findall(r"\bld\.(?!shared|global|param|const|local)(\S+)", body)) <= {"f32", "b32"}, name
        assert "cp.async.bulk" in body, name
        if "cluster_backward" in name:
            vectors = 4 if "Li4E" in name else 8  # of X: of four steps with 2 paths, of one with 4 or 8
            assert len(re.findall(r"ld\.global\S*\.v4", body.partition("mbarrier.try_wait")[0])) >= vectors, name


def nvcc_version():
    return subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout


def check_page(reports):
    """csrc/cuda/EXPECTED.md has the registers and spills of today, and no more blocks than they allow."""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (CSRC / "cuda/EXPECTED.md").read_text().splitlines()
        if line.startswith("|")
    ]
    today = {cells[0]: [int(cell.split()[-1]) for cell in cells[1:]] for cells in rows[2:4]}
    kernels = ("forward_kernelIfLi2E", "forward_kernelIN3c108BFloat16ELi2E")
    kernels += tuple(name.replace("forward", "backward") for name in kernels)
    found = [next(report for report in reports if f"cluster_{kernel}" in report[0]) for kernel in kernels]
    assert today == {"registers": [report[1] for report in found], "spills, bytes": [report[3] for report in found]}
    predicted = rows[next(k for k, cells in enumerate(rows) if cells[0] == "paths") + 2 :]
    assert max(int(cells[4]) for cells in predicted) == 65536 // (256 * max(today["registers"]))


def test_library_loads_without_a_card():
    if reason := _compiled.load_cuda():
        pytest.skip(reason)
    for name in (*OPERATORS, *PASSES):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastroute_native::{name}", "CUDA")
    assert torch.ops.fastroute_native.cuda_plan(2, 1 << 16, 4096, 128, *A100) == TWO_PASSES
