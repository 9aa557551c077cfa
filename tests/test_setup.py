"""Choices of setup.py."""

import os
import runpy
from pathlib import Path

import pytest
import torch

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.fixture
def build(monkeypatch):
    functions = runpy.run_path(str(SETUP))
    monkeypatch.setitem(functions["architecture_list"].__wrapped__.__globals__, "toolkit_version", lambda: (13, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return functions


@pytest.mark.parametrize(
    ("listed", "compiled"),
    [
        (None, "8.0;9.0;10.0+PTX"),
        ("", "8.0;9.0;10.0+PTX"),
        ("native", "8.0;9.0;10.0+PTX"),  # in a container's build, without a GPU
        ("9.0", "9.0"),
        ("9.0a;10.0+PTX", "9.0a;10.0+PTX"),
        ("7.5 8.0 8.6 9.0+PTX", "8.0;8.6;9.0+PTX"),  # the kernels need 8.0
        ("Turing;Ampere", "8.0;8.6+PTX"),
        ("7.0;7.5", ""),
    ],
)
def test_cuda_kernels_are_compiled_for_what_can_run_them(build, monkeypatch, capsys, listed, compiled):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if listed is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert sorted(build["architecture_list"]().split(";")) == sorted(compiled.split(";"))
    assert ("compiling no CUDA kernels for 7" in capsys.readouterr().err) == (
        "7" in (listed or "") or "Tur" in str(listed)
    )


def test_an_empty_compiler_is_none_named(build, monkeypatch):
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("FASTROUTE_BUILD_CUDA", "0")
    build["extensions"]()
    assert "CXX" not in os.environ
