"""Measures the operators and networks on this machine: what `fastroute bench` and `pytest benchmarks/` share."""

import time
from collections.abc import Callable, Iterable, Iterator

import torch

from fastroute.benchmark import networks, operators, overhead, sparse
from fastroute.benchmark.cases import Case
from fastroute.benchmark.contest import OURS, Contest
from fastroute.benchmark.results import Result, Row

__all__ = ["OURS", "ROUNDS", "SUITES", "Case", "Contest", "Result", "Row", "all_cases", "measure", "run"]

# Suite → its cases on a device.
SUITES: dict[str, Callable[[torch.device], Iterable[Case]]] = {
    "operators": operators.cases,
    "networks": networks.cases,
    "overhead": overhead.cases,
    "sparse": sparse.cases,
}

ROUNDS = {"operators": 15, "networks": 5, "overhead": 50, "sparse": 15}


def all_cases(device: torch.device) -> list[Case]:
    """Every case of every suite that can be measured on a device."""
    return [case for cases in SUITES.values() for case in cases(device)]


def measure(case: Case, rounds: int | None = None) -> Row:
    """Check a case's results, then time it for a number of rounds, that of its suite by default.

    Raises:
        AssertionError: a contender's result is wrong.
    """
    contest = case.build()
    contest.warm_up()
    contest.run(rounds or ROUNDS[case.suite])
    return contest.row(case.suite, case.labels)


def run(
    cases: Iterable[Case], rounds: int | None = None, seconds: float | None = None
) -> Iterator[tuple[Case, Row | str]]:
    """Measure case after case, each with its row or the reason why there is none.

    Args:
        rounds: timed rounds of each case; by default those of its suite.
        seconds: when these are over, no further case is begun.
    """
    end = None if seconds is None else time.monotonic() + seconds
    for case in cases:
        if end is not None and time.monotonic() > end:
            return
        try:
            yield case, measure(case, rounds)
        except (AssertionError, torch.OutOfMemoryError) as error:
            yield case, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
