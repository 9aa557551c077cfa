"""The CPU libraries that this processor would not choose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastroute.backends import BACKENDS
from fastroute.ops import _compiled

SOME = "default and relu and not (float64 or stacked or sliced) and (at_zero or outputs_and_every_gradient)"


def test_the_library_of_older_processors_is_as_exact():
    if reason := BACKENDS["native"].reason_against(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("only a processor with AVX-512 has another library to choose from")
    # CI builds them for the oldest torch alone, whose tests all run on them.
    if not (_compiled.FOLDER / "_C_avx2.so").exists():
        pytest.skip("the kernels for AVX2 are not built: build them by `make` without FASTROUTE_BUILD_CPU")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/ops/test_cross_connect.py", "-k", SOME],
        cwd=Path(__file__).parents[2],
        # Named, so that a missing library is an error and not the reference.
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "FASTROUTE_BACKEND": "native"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
