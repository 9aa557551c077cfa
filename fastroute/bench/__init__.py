"""Measures the operators and networks on this machine: what `fastroute bench` and `pytest benchmarks/` share."""

import math
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from fastroute._errors import in_a_line
from fastroute.bench import networks, operators, overhead, parallel, sparse
from fastroute.bench.cases import Case
from fastroute.bench.contest import OURS, Contest
from fastroute.bench.results import Result, Row

__all__ = [
    "OURS",
    "ROUNDS",
    "SUITES",
    "Case",
    "Contest",
    "Result",
    "Row",
    "all_cases",
    "measure",
    "run",
    "without_tf32",
]

# Suite → its cases on a device.
SUITES: dict[str, Callable[[torch.device], Iterable[Case]]] = {
    "operators": operators.cases,
    "networks": networks.cases,
    "overhead": overhead.cases,
    "sparse": sparse.cases,
    "parallel": parallel.cases,
}

ROUNDS = {"operators": 15, "networks": 5, "overhead": 50, "sparse": 15, "parallel": 7}


def all_cases(device: torch.device) -> list[Case]:
    """Every case of every suite that can be measured on a device."""
    return [case for cases in SUITES.values() for case in cases(device)]


def without_tf32() -> None:
    """Have float32 computed in float32 by the rest of this process: contenders for one job must do the same work."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def measure(case: Case, rounds: int | None = None) -> Row:
    """Check a case's results, then time it for a number of rounds, that of its suite by default.

    Raises:
        AssertionError: a contender's result is wrong.
    """
    without_tf32()
    contest = case.build()
    contest.warm_up()
    contest.run(rounds or ROUNDS[case.suite])
    return contest.row(case.suite, case.labels)


def run(
    result: Result,
    cases: Sequence[Case],
    rounds: int | None = None,
    seconds: float | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Measure case after case into a result, and say each.

    A case whose results are wrong, or that does not run, has no row: `result.settings["failures"]` says why.

    Args:
        rounds: timed rounds of each case; by default those of its suite.
        seconds: when these are over, no further case is begun.
    """
    failures = result.settings["failures"] = []
    end = math.inf if seconds is None else time.monotonic() + seconds
    for position, case in enumerate(cases, 1):
        if time.monotonic() > end:
            say(f"{len(cases) - position + 1} cases are left for want of time")
            return
        try:
            row = measure(case, rounds)
        except (AssertionError, RuntimeError) as error:  # wrong; out of memory, or not to be compiled
            failures.append(f"{case.id}: {in_a_line(error)}")
            say(f"{position}/{len(cases)} {failures[-1]}")
        else:
            result.rows.append(row)
            ratios = "".join(f", × {name} {row.times_as_fast_as(name):.2f}" for name in row.ms if name != OURS)
            say(f"{position}/{len(cases)} {case.id}: {row.ms[OURS]:.3f} ms{ratios}")
