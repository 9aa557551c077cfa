"""Benchmarks of operators and networks, shared by `fastroute bench` and `pytest benchmarks/`."""

import math
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from fastroute._errors import in_a_line
from fastroute.bench import networks, operators, overhead, parallel, sparse
from fastroute.bench.cases import Case
from fastroute.bench.contest import Contest
from fastroute.bench.results import OURS, Result, Row

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

# Suite → function that yields its cases for a device.
SUITES: dict[str, Callable[[torch.device], Iterable[Case]]] = {
    "operators": operators.cases,
    "networks": networks.cases,
    "overhead": overhead.cases,
    "sparse": sparse.cases,
    "parallel": parallel.cases,
}

ROUNDS = {"operators": 15, "networks": 5, "overhead": 50, "sparse": 15, "parallel": 7}


def all_cases(device: torch.device) -> list[Case]:
    """Return the cases of all suites.

    Args:
        device: where they are measured.

    Returns:
        The cases that can be measured on the device.
    """
    return [case for cases in SUITES.values() for case in cases(device)]


def without_tf32() -> None:
    """Disable TF32 for the rest of the process, so that all contenders compute in float32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def measure(case: Case, rounds: int | None = None) -> Row:
    """Check the results of a case, then time it.

    Args:
        case: the case.
        rounds: timed rounds; by default those of its suite.

    Returns:
        The median times of all contenders, in ms.

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
    save: Callable[[], None] | None = None,
) -> None:
    """Measure cases one by one, add their rows to a result, and report each.

    A case that gives wrong results or does not run has no row; the reason is added to `result.settings["failures"]`.
    If only PyTorch's compiler gives wrong results, the row lacks that peer.

    Args:
        result: gets the rows.
        cases: the cases to measure.
        rounds: timed rounds of each case; by default those of its suite.
        seconds: time limit after which no further case is started; None for none.
        say: called with a line for each case.
        save: called after each row, so that a long run that is stopped keeps them.
    """
    failures = result.settings["failures"] = []
    end = math.inf if seconds is None else time.monotonic() + seconds
    for position, case in enumerate(cases, 1):
        if time.monotonic() > end:
            say(f"skipped {len(cases) - position + 1} cases: time limit reached")
            return
        try:
            row = measure(case, rounds)
        except (AssertionError, RuntimeError) as error:  # wrong results; out of memory, or compilation failed
            failures.append(f"{case.id}: {in_a_line(error)}")
            say(f"{position}/{len(cases)} {failures[-1]}")
        else:
            result.rows.append(row)
            if save is not None:
                save()
            ratios = "".join(f", × {name} {row.times_as_fast_as(name):.2f}" for name in row.ms if name != OURS)
            left_out = f"; left out {row.facts['left out']}" if "left out" in row.facts else ""
            say(f"{position}/{len(cases)} {case.id}: {row.ms[OURS]:.3f} ms{ratios}{left_out}")
