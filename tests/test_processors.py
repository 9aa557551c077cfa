import os

import pytest

from fastroute._processors import processors


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity of processes")
def test_follows_the_affinity_of_the_process():
    own = os.sched_getaffinity(0)
    assert processors() == len(own)
    try:
        os.sched_setaffinity(0, {min(own)})
        assert processors() == 1
    finally:
        os.sched_setaffinity(0, own)


def test_falls_back_to_those_of_the_machine(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert processors() == 1
