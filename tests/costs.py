"""Costs of tests, by which they are divided into tiers, and a plugin of pytest that records them.

`costs.txt` has the CPU seconds of each test that takes a fifth of a second or more; others are cheap. A test's cost is
its own time, and its share of the fixtures that it has in common with others.
"""

import importlib
import os
from collections import Counter
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("costs.txt")
RECORDED = 0.2  # CPU seconds from which a test has an entry

# Imported before the first test, whose cost would include them otherwise.
IMPORTED = (
    "fastroute.cli",
    "pytorch_lightning",
    "sklearn.cluster",
    "torch._inductor.compile_fx",
    "torchvision",
    "triton",
)


def read() -> dict[str, float]:
    """Return the CPU seconds of tests by their ids."""
    lines = (line.split(" ", 1) for line in FILE.read_text().splitlines())
    return {name: float(seconds) for seconds, name in lines}


def write(costs: dict[str, float]) -> None:
    """Write the costs of the tests that are not cheap, in the order of their ids."""
    lines = [f"{seconds:.1f} {name}\n" for name, seconds in sorted(costs.items()) if seconds >= RECORDED]
    FILE.write_text("".join(lines))


class Recorder:
    """Measure the tests of this process, or collect what the processes of pytest-xdist measured, and write all.

    Attributes:
        own: CPU seconds of each test, without fixtures that it shares.
        shared: CPU seconds of each shared fixture, by its folder or file, and its name.
        users: each test's shared fixtures.
    """

    def __init__(self):
        self.own, self.shared, self.users = Counter(), Counter(), {}
        self._within = 0.0  # of the current test, spent on fixtures that it shares

    def pytest_collection_finish(self, session):
        if session.config.getoption("dist", "no") == "no":
            for name in IMPORTED:
                importlib.import_module(name)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item):
        self.users[item.nodeid], self._within = [], 0.0
        begin = _cpu_seconds()
        result = yield
        self.own[item.nodeid] += _cpu_seconds() - begin - self._within
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            return (yield)
        begin = _cpu_seconds()
        result = yield
        seconds = _cpu_seconds() - begin
        self.shared[_key(fixturedef)] += seconds
        self._within += seconds
        return result

    def pytest_runtest_call(self, item):
        for name in item.fixturenames:
            for definition in item._fixtureinfo.name2fixturedefs.get(name, ())[-1:]:
                if definition.scope != "function":
                    self.users[item.nodeid].append(_key(definition))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        own, shared, users = node.workeroutput["costs"]
        self.own.update(own)
        self.shared.update({tuple(key): seconds for key, seconds in shared})
        self.users |= {name: [tuple(key) for key in keys] for name, keys in users.items()}

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["costs"] = (dict(self.own), list(self.shared.items()), self.users)
            return
        sharing = Counter(key for keys in self.users.values() for key in set(keys))
        shares = {key: self.shared[key] / count for key, count in sharing.items()}
        costs = {name: self.own[name] + sum(shares[key] for key in set(keys)) for name, keys in self.users.items()}
        write(read() | costs)


def _key(fixturedef) -> tuple[str, str]:
    return fixturedef.baseid, fixturedef.argname


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
