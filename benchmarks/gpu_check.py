"""On a machine with an NVIDIA card: correctness, then benchmarks, in under 8 minutes, into one result file.

    python benchmarks/gpu_check.py --output benchmarks/results --name h100

Needs torch and the built kernels; pytest for the first part, which is `pytest -m gpu`. Every benchmark checks its
results before it times them, with or without pytest. The default selection comes first, then what README states, then
all other cases in random order until the time is over.
"""

import argparse
import importlib.util
import random
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda"
sys.path.insert(0, str(ROOT))  # from a checkout, nothing need be installed

from fastroute import benchmark  # noqa: E402
from fastroute.benchmark import report  # noqa: E402


def test_suite(seconds: float) -> str:
    """Run the tests that need a card; returns how they ended."""
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests")]
    try:
        ended = subprocess.run(command, cwd=ROOT, timeout=seconds, stdout=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        return f"not finished in {seconds:.0f} s"
    print(ended.stdout)
    return "passed" if ended.returncode == 0 else f"failed (pytest ended with {ended.returncode})"


def ordered(cases: list) -> list:
    """The default selection, then what README states, then the rest in random order, so that it is spread evenly."""
    shuffled = random.Random(0).sample(cases, len(cases))
    return sorted(shuffled, key=lambda case: (not case.quick, not case.stated))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of the result")
    parser.add_argument("--name", default="gpu_check", help="stem of the result's file")
    parser.add_argument("--minutes", type=float, default=8, help="for all of it")
    parser.add_argument("--rounds", type=int, help="timed rounds of each case, by default those of its suite")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "gpu_check: this machine has no CUDA device that torch can use\n")
    # The last case to be begun may take a minute, with its compilation.
    end = time.monotonic() + 60 * arguments.minutes - 60
    device = torch.device(DEVICE)
    tests = test_suite(60 * arguments.minutes / 2)
    cases = ordered(benchmark.all_cases(device))
    result = benchmark.Result.here(device, rounds=arguments.rounds or benchmark.ROUNDS, tests=tests)
    path = arguments.output / f"{arguments.name}.json"
    benchmark.run(result, cases, arguments.rounds, end - time.monotonic())
    result.save(path)
    print(f"\n{report.tables(result.rows)}\n\ntests: {tests}")
    print(f"wrote {path}")
    return int(bool(result.settings["failures"]) or tests.startswith(("failed", "not finished")))


if __name__ == "__main__":
    sys.exit(main())
