"""Benchmarks of the host time of one call, with a budget."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastroute import bench as measuring
from fastroute.bench.operators import FORWARD, FORWARD_BACKWARD
from fastroute.ops import _library

SUITE = "overhead"

# Microseconds of one call of cross_connect: 2 paths to 2, 16 channels, 4 × 4 positions.
BUDGET = {
    "native": {FORWARD: 12, FORWARD_BACKWARD: 50},
    "triton": {FORWARD: 40, FORWARD_BACKWARD: 130},
    "reference": {FORWARD: 300, FORWARD_BACKWARD: 900},
}

# Those of plain PyTorch on the machine for which the budget was set; budgets scale with it on slower machines.
EAGER = {FORWARD: 73, FORWARD_BACKWARD: 273}


def check(backend: str, direction: str, ours: float, eager: float) -> None:
    allowed = BUDGET[backend][direction] * max(1, eager / EAGER[direction])
    assert ours <= allowed, f"{backend}, {direction}: {ours:.1f} µs, and {allowed:.1f} are allowed (eager {eager:.1f})"


def test_overhead(case, race, request):
    row = race(case)
    ours, eager = (1e3 * row.ms[name] for name in (measuring.OURS, "eager"))
    if not request.config.getoption("--no-budget"):
        check(case.labels["backend"], case.labels["direction"], ours, eager)


def test_overhead_of_triton(request):
    """Time the real launches on a stub driver, whose kernels never run."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if _library.NOT_COMPILED:
        pytest.skip(_library.NOT_COMPILED)
    command = [sys.executable, "-m", "benchmarks.stub_driver"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print("".join(f"\n{direction}: {times}" for direction, times in found.items()))
    for direction, times in found.items():
        if not request.config.getoption("--no-budget"):
            check("triton", direction, times[measuring.OURS], times["eager"])
