import warnings

import pytest
import torch

from fastroute.ops import _compiled
from fastroute.ops._instruction_set import own_instruction_set, warn_if_emulated


@pytest.fixture
def processor(monkeypatch):
    def has(capability="AVX512", **features):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", **features})

    return has


def test_names_the_library_of_the_processor(processor):
    processor("AVX2", avx512_bf16=False)
    assert own_instruction_set() == "avx2"
    processor("AVX512", avx512_bf16=False)
    assert own_instruction_set() == "avx512"
    processor("AVX512", avx512_bf16=True)
    assert own_instruction_set() == "avx512_bf16"
    processor("SVE256", architecture="aarch64")
    assert own_instruction_set() == "default"


@pytest.mark.parametrize(
    ("built", "named", "library"),
    [
        (("avx2", "avx512", "avx512_bf16"), None, "_C_avx512"),
        (("avx2", "avx512_bf16"), None, "_C_avx2"),
        (("avx512_bf16",), None, "_C_avx512"),  # whose absence is the reason for the reference
        (("avx2", "avx512"), "avx2", "_C_avx2"),
        (("avx2",), "avx512", "_C_avx512"),
    ],
)
def test_the_newest_library_that_was_built_is_used(processor, tmp_path, monkeypatch, built, named, library):
    processor("AVX512", avx512_bf16=False)
    monkeypatch.setattr(_compiled, "FOLDER", tmp_path)
    for name in built:
        (tmp_path / f"_C_{name}.so").touch()
    monkeypatch.delenv("FASTROUTE_CPU", raising=False)
    if named:
        monkeypatch.setenv("FASTROUTE_CPU", named)
    assert _compiled.cpu_library() == library


def test_warns_of_emulated_bfloat16(processor):
    processor(avx512_bf16=False)
    with pytest.warns(UserWarning, match="no bfloat16 instructions"):
        warn_if_emulated(torch.bfloat16, "cpu")


@pytest.mark.parametrize(
    ("dtype", "device", "features"),
    [
        (torch.bfloat16, "cpu", {"avx512_bf16": True}),
        (torch.bfloat16, "cpu", {"amx_bf16": True}),
        (torch.bfloat16, "cpu", {"architecture": "aarch64"}),
        (torch.bfloat16, "cuda", {}),
        (torch.float16, "cpu", {}),
        (None, "cpu", {}),
    ],
)
def test_is_silent_elsewhere(processor, dtype, device, features):
    processor(**features)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_emulated(dtype, device)
