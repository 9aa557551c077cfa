"""`pytest benchmarks/`: one test per case, timed by pytest-benchmark, with the peers interleaved between its rounds."""

import pytest
import torch

from fastroute import bench as measuring
from fastroute.bench import report


def pytest_addoption(parser):
    group = parser.getgroup("fastroute")
    group.addoption(
        "--full", action="store_true", help="all cases (hours); the default selection takes under 5 minutes"
    )
    group.addoption("--rounds", type=int, help="timed rounds of each case; by default those of its suite")
    group.addoption("--no-budget", action="store_true", help="do not check the budget, on a busy machine")
    group.addoption("--device", help="cpu or cuda; by default cuda if available")


ROWS = pytest.StashKey[list]()


def pytest_configure(config):
    measuring.without_tf32()
    config.stash[ROWS] = []


def device_of(config: pytest.Config) -> torch.device:
    return torch.device(config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture
def device(request):
    return device_of(request.config)


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    option, device = metafunc.config.getoption, device_of(metafunc.config)
    suite = metafunc.module.SUITE
    cases = [case for case in measuring.SUITES[suite](device) if case.quick or option("--full")]
    metafunc.parametrize("case", cases, ids=lambda case: case.id)


@pytest.fixture
def race(benchmark, request):
    """Measure a case and return its row: pytest-benchmark has our time, its `extra_info` those of the peers."""

    def run(case):
        rounds = request.config.getoption("--rounds") or measuring.ROUNDS[case.suite]
        contest = case.build()
        contest.warm_up()
        turns = contest.turns(rounds)

        def peers_before_us():
            for name in turns:
                if name == measuring.OURS:
                    break
                contest.turn(name)
            contest.prepare(measuring.OURS)

        benchmark.group = case.suite
        benchmark.pedantic(contest.call, args=(measuring.OURS,), setup=peers_before_us, rounds=rounds)
        for name in turns:
            contest.turn(name)
        row = contest.row(case.suite, case.labels)
        benchmark.extra_info.update(vars(row), calls_in_a_round=contest.repeats)
        request.config.stash[ROWS].append(row)
        return row

    return run


def pytest_terminal_summary(terminalreporter, config):
    if rows := config.stash[ROWS]:
        terminalreporter.write_line("\n" + report.tables(rows))
