"""The plugin that records the tests' costs."""

from types import SimpleNamespace

import pytest

from tests import costs


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "FILE", tmp_path / "costs.txt")
    costs.write({"a.py::kept[1 2]": 3.0, "a.py::now_cheap": 2.0})
    return costs.Recorder()


def test_a_test_pays_its_own_time_and_a_share_of_fixtures(recorded):
    network, data = ("a.py", "network"), ("", "data")
    recorded.own.update({"a.py::first": 1.0, "a.py::second": 0.1, "a.py::now_cheap": 0.1})
    recorded.shared.update({network: 4.0, data: 0.6})
    recorded.users = {"a.py::first": [network, data], "a.py::second": [network], "a.py::now_cheap": []}
    recorded.pytest_sessionfinish(SimpleNamespace(config=object()))
    assert costs.read() == {"a.py::first": 3.6, "a.py::second": 2.1, "a.py::kept[1 2]": 3.0}


def test_processes_are_added_up(recorded):
    key = ("a.py", "network")
    for seconds, name in ((1.0, "a.py::first"), (2.0, "a.py::second")):
        worker = costs.Recorder()
        worker.own[name], worker.shared[key], worker.users[name] = seconds, 4.0, [key]
        config = SimpleNamespace(workeroutput={})
        worker.pytest_sessionfinish(SimpleNamespace(config=config))
        recorded.pytest_testnodedown(config)
    recorded.pytest_sessionfinish(SimpleNamespace(config=object()))
    assert costs.read()["a.py::first"] == 5.0 and costs.read()["a.py::second"] == 6.0
