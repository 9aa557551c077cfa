import pytest

from fastroute.bench import Result, Row, networks, operators


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile takes seconds, and is not what is tested here."""
    for module in (operators, networks):
        monkeypatch.setattr(module, "compiled", lambda function, device: function)


@pytest.fixture
def make_result():
    """Results with two operators' rows, and one of a network; times are ours, the eager peer's and the copy's."""

    def make(ours=1.0, eager=6.0, copy=0.5):
        rows = []
        for size in (8, 16):
            labels = {"operator": "cross_connect", "direction": "forward+backward", "backend": "native"}
            labels |= {"dtype": "float32", "layout": "contiguous", "shape": (2, 4, size, size), "paths": (2, 2)}
            ms = {"fastroute": ours, "eager": eager, "compile": 2.0, "copy": copy}
            rows.append(Row("operators", labels, ms, 1_000_000 * size, {"fastroute": 2**20, "eager": 2**21}))
        labels = {"network": "resnet20_cc2", "direction": "forward+backward+optimiser", "dtype": "float32"}
        labels |= {"layout": "contiguous", "batch": 2, "paths": 2}
        rows.append(Row("networks", labels, {"fastroute": 30.0, "eager": 45.0}, facts={"routing_share": 0.25}))
        machine = {"device": "cpu", "processor": "A Processor", "capability": "AVX2", "threads": 2}
        return Result(machine, {"torch": "2.11"}, "0123abc", {"rounds": 3}, rows)

    return make
