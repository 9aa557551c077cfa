import importlib
from pathlib import Path

import pytest
import torch

from fastroute import ops, use_backend
from fastroute.backends import triton as backend
from tests.backends.test_triton_aot import stage_cases
from tests.backends.triton_kernels.cases import cc, tables
from tests.backends.triton_kernels.devices import CUDA


def test_plan():
    def tier(n_samples, channels, space, chip=tables.H100, paths=2, itemsize=4, backward=False, last=False):
        problem = tables.Problem(n_samples, paths, paths, channels, space, 16, itemsize, last, backward)
        return type(tables.plan(problem, chip)).__name__.lower()

    for channels, side in ((16, 32), (32, 16), (64, 8)):  # CIFAR ResNets
        assert tier(128, channels, side**2) == "resident"
        assert tier(4096, channels, side**2) == "resident"
    assert tier(128, 16, 1024, backward=True) == "fused"  # dY and one of X are 192 KiB
    assert tier(128, 16, 1024, itemsize=2, backward=True) == "resident"  # and half of that in half precision
    assert tier(4096, 16, 1024, backward=True) == "split"  # 264 in flight need 33 MiB of L2
    assert tier(4096, 16, 1024, tables.B200, backward=True) == "fused"
    assert tier(256, 16, 1024, tables.B200, backward=True) == "fused"
    assert tier(32, 64, 56**2) == "split"  # 32 samples of 1.5 MiB, and 132 multiprocessors
    assert tier(1, 64, 56**2) == "split"
    assert tier(64, 16, 2048) == "split"  # 256 KiB a sample keep too few multiprocessors busy
    assert tier(128, 16, 2048) == "split" and tier(90, 16, 2048) == "fused"  # 25 MiB of L2
    assert tier(90, 16, 2048, tables.A100) == "split"
    assert tier(16, 2048, 1) == "fused"  # 16 × 2048 gate weights do not fit beside the sample

    for last in (False, True):
        problem = tables.Problem(32, 2, 2, 64, 56**2, 16, 2, last, False)
        settings = tables.plan(problem, tables.H100)
        assert settings.chunk * problem.reread_bytes <= tables.H100.reread_budget
        programs = settings.chunk * 2 * -(-64 // settings.block_c) * -(-(56**2) // settings.span)
        waves = programs / (3 * tables.H100.sms)
        assert waves / -(-programs // (3 * tables.H100.sms)) > 0.8  # the last wave is nearly full


def test_whole_waves():
    assert tables.steps_per_program(98, 32, 264) == 13  # 32 × 8 programs, all at once
    assert tables.steps_per_program(1, 8192, 264) == 1
    assert tables.steps_per_program(10**6, 1, 264) >= 10**6 / tables.MAX_GRID_Y
    assert -(-(10**6) // tables.steps_per_program(10**6, 1, 264)) <= tables.MAX_GRID_Y


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [16, 65, 512])
def test_grids_and_offsets_of_huge_samples_stay_within_limits(channels, last):
    """A grid's second axis has 65,535 programs at most, and offsets in a tile are int32."""
    for backward in (False, True):
        for space in (2048**2, 2**23, 524**3, 2**31 - 1):
            problem = tables.Problem(1, 2, 2, channels, space, 16, 2, last, backward)
            settings = {"plan": tables.plan(problem, tables.H100), "tiles": tables.tiles(problem)}
            for name, chosen in settings.items():
                blocks = -(-channels // chosen.block_c)
                assert blocks * -(-space // chosen.span) <= 65535, (name, space)
                if not last:
                    assert (chosen.block_c - 1) * space + chosen.block_s < 2**31, (name, space)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "m, channels, space, hidden", [(8, 70_000, 1, 1024), (2, 2**22 + 64, 1, 16), (2, 262_144, 4, 1024)]
)
def test_grids_of_many_channels_stay_within_limits(m, channels, space, hidden, last):
    for backward in (False, True):
        problem = tables.Problem(32, m, m, channels, space, hidden, 4, last, backward)
        for chosen in (tables.split(problem, tables.H100), tables.tiles(problem)):
            assert -(-channels // chosen.block_c) * -(-space // chosen.span) <= 65535


def test_without_a_compiler_triton_does_not_serve(monkeypatch):
    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler.")

    from triton import runtime

    monkeypatch.setattr(runtime, "driver", Driver())
    monkeypatch.setattr(backend, "reason_against_device", lambda device, capability: None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backend._reason_against_launcher.cache_clear()
    reason = backend.reason_against(torch.device("cuda", 0), torch.float16)
    backend._reason_against_launcher.cache_clear()
    assert "needs a C compiler and Python's headers (RuntimeError: Failed to find C compiler.)" in reason


def test_chained_launches():
    """The first launch of a call waits for all that went before, as any launch does."""
    assert cc.chained(tables.H100) == {"CHAINED": True, "launch_pdl": True}
    assert cc.chained(tables.H100, begins=True) == {"CHAINED": True, "launch_pdl": False}
    assert cc.chained(tables.A100) == cc.chained(tables.INTERPRETED) == {"CHAINED": False}


def test_the_expected_figures_are_of_these_tables():
    """The page shows for every stage the tier, the number of chunks, and the grid that the tables give today."""
    page = (Path(backend.__file__).parent / "EXPECTED.md").read_text()
    sections = page.split("\n## ")[1:]
    assert len(sections) == len(stage_cases())
    for section, (name, (_, m, n, (batch, channels, side, _), dtype, last)) in zip(
        sections, stage_cases().items(), strict=True
    ):
        assert section.startswith(name + "\n")
        rows = [line.split("|") for line in section.splitlines() if line.startswith("| ") and "grid" not in line]
        rows = {cells[3].split(" ×")[0].strip(): [cell.strip() for cell in cells] for cells in rows}
        for backward, walk in ((False, "pool_fwd"), (True, "inputs_bwd")):
            itemsize = getattr(torch, dtype).itemsize
            problem = tables.Problem(batch, m, n, channels, side**2, 16, itemsize, last, backward)
            settings = tables.plan(problem, tables.H100)
            if isinstance(settings, tables.Split):
                cells = rows[walk]
                parts = -(-channels // settings.block_c) * -(-(side**2) // settings.span)
                grid = [settings.chunk, parts] + ([] if backward else [m])
                chunks = -(-batch // settings.chunk)
                assert cells[3] == (f"{walk} ×{chunks}" if chunks > 1 else walk)
                assert cells[4] == " × ".join(map(str, grid)), (name, cells)
            else:
                kind = type(settings).__name__.lower()
                assert rows[f"{kind}_{'bwd' if backward else 'fwd'}"][4] == str(batch)


def test_reasons(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "interpreter" in backend.reason_against(cpu, torch.float32)
    assert "float64" in backend.reason_against(cuda, torch.float64)
    assert "CUDA" in backend.reason_against(torch.device("mps"), torch.float32)
    with pytest.raises(RuntimeError, match="interpreter"), use_backend("triton"):
        ops.mix([torch.ones(1, 1, dtype=torch.float16)], torch.ones(1, 1))

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "tests on the CPU" in backend.reason_against(cuda, torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not CUDA:
        assert "CUDA device" in backend.reason_against(cuda, torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(backend, "_reason_against_launcher", lambda: None)

    def capability(*value):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: value)

    capability(7, 0)
    assert "7.5" in backend.reason_against(cuda, torch.float32)
    capability(7, 5)
    assert "8.0" in backend.reason_against(cuda, torch.bfloat16)
    assert backend.reason_against(cuda, torch.float16) is None
    capability(9, 0)
    assert backend.reason_against(cuda, torch.bfloat16) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.0")
        assert "ROCm" in backend.reason_against(cuda, torch.float32)
    monkeypatch.setattr("triton.__version__", "3.5.1")
    assert "3.6" in backend.reason_against(cuda, torch.float32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "not installed" in backend.reason_against(cuda, torch.float32)
