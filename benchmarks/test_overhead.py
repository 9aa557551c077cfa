"""Benchmarks of the host time of one call, with a budget."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_rows import HOST_BUDGET
from fastroute import bench as measuring
from fastroute.bench.operators import FORWARD, FORWARD_BACKWARD
from fastroute.ops import _library
from tests.backends.cuda_kernels.emulation import reason_against_compiling

SUITE = "overhead"

BUDGET = {**HOST_BUDGET, "reference": {FORWARD: 300, FORWARD_BACKWARD: 900}}

# Microseconds of plain PyTorch on a CPU of the machine for which the budget was set; budgets scale with it on slower
# machines. On a GPU plain PyTorch launches many kernels, so its time says nothing about the host: there the budget is
# absolute.
EAGER = {FORWARD: 73, FORWARD_BACKWARD: 273}


def check(backend: str, direction: str, ours: float, eager: float, device: str = "cpu") -> None:
    absolute = device == "cuda" and backend in HOST_BUDGET
    allowed = BUDGET[backend][direction] * (1 if absolute else max(1, eager / EAGER[direction]))
    assert ours <= allowed, f"{backend}, {direction}: {ours:.1f} µs, and {allowed:.1f} are allowed (eager {eager:.1f})"


def test_overhead(case, race, request, device):
    row = race(case)
    ours, eager = (1e3 * row.ms[name] for name in (measuring.OURS, "eager"))
    if not request.config.getoption("--no-budget"):
        check(case.labels["backend"], case.labels["direction"], ours, eager, device.type)


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_overhead_on_a_stub(backend, request):
    """Time the real calls of a GPU backend with launches that run nothing."""
    no_triton = None if importlib.util.find_spec("triton") else "Triton is not installed"
    missing = {"triton": no_triton, "native": reason_against_compiling()}[backend]
    if reason := _library.NOT_COMPILED or missing:
        pytest.skip(reason)
    command = [sys.executable, "-m", "benchmarks.stub_driver", backend]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print("".join(f"\n{direction}: {times}" for direction, times in found.items()))
    for direction, times in found.items():
        if not request.config.getoption("--no-budget"):
            check(backend, direction, times[measuring.OURS], times["eager"])
