import contextlib
import time
from types import SimpleNamespace

import pytest
import torch

from fastroute.bench import Case, Contest, Result, measure, run
from fastroute.bench import contest as contest_module
from fastroute.bench.contest import saved_bytes


def contest(check=lambda: None, **contenders):
    return Contest({"fastroute": lambda: None, **contenders}, check)


def test_every_contender_has_its_turn_in_each_round_and_in_any_order():
    turns = list(contest(eager=lambda: None, compile=lambda: None).turns(50))
    rounds = [turns[i : i + 3] for i in range(0, 150, 3)]
    assert all(sorted(names) == ["compile", "eager", "fastroute"] for names in rounds)
    assert len({tuple(names) for names in rounds}) == 6


def test_times_are_medians():
    # Two calls to warm up; then in each turn a cold one and one that is timed, the last of which is an outlier.
    pauses = iter([0, 0, 0.1, 0.001, 0.2, 0.002, 1, 0.5])
    measured = contest(eager=lambda: time.sleep(next(pauses, 0)))
    measured.warm_up()
    measured.run(3)
    row = measured.row("suite", {})
    assert 2 <= row.ms["eager"] < 100 and 200 <= row.cold_ms["eager"] < 400
    assert row.times_as_fast_as("eager", cold=True) == row.cold_ms["eager"] / row.cold_ms["fastroute"]


def test_calls_in_a_row_follow_a_cold_one_and_are_timed_together():
    calls = []
    repeated = Contest({"fastroute": lambda: calls.append(time.sleep(0.001))}, lambda: None, repeats=5)
    repeated.run(2)
    assert len(calls) == 12 and len(repeated.seconds["fastroute"]) == len(repeated.cold_seconds["fastroute"]) == 2
    assert 0.001 <= repeated.seconds["fastroute"][0] < 0.005


def test_a_copy_of_the_floor_is_a_contender():
    measured = Contest({"fastroute": lambda: None}, lambda: None, floor_bytes=1 << 20)
    assert measured.contenders["copy"]().nbytes == 1 << 19
    measured.run(1)
    row = measured.row("suite", {"shape": (2, 3), "kind": "x"})
    assert row.id == "2x3-x" and row.floor_bytes == 1 << 20 and row.ms.keys() == {"fastroute", "copy"}
    assert row.times_as_fast_as("copy") == row.ms["copy"] / row.ms["fastroute"] and row.times_as_fast_as("none") is None


def test_nothing_is_timed_after_a_wrong_result():
    def check():
        raise AssertionError("fastroute: result 0 is off")

    called = []
    wrong = Case("sparse", {"kind": "wrong"}, lambda: contest(check, eager=lambda: called.append(1)))
    right = Case("sparse", {"kind": "right"}, contest)
    with pytest.raises(AssertionError, match="result 0 is off"):
        measure(wrong, 1)
    assert not called
    result, said = Result({}, {}, None, {}), []
    run(result, [wrong, right], 1, say=said.append)
    assert result.settings["failures"] == ["wrong: AssertionError: fastroute: result 0 is off"]
    assert [row.id for row in result.rows] == ["right"] and said[1].startswith("2/2 right: ")
    run(result, [right, right], 1, seconds=-1, say=said.append)
    assert len(result.rows) == 1 and said[-1] == "skipped 2 cases: time limit reached"


def test_saved_bytes_count_each_storage_once():
    a, b = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)
    assert saved_bytes(lambda: a * b) == 80
    assert saved_bytes(lambda: a * a) == 40
    assert saved_bytes(lambda: a + b) == 0
    assert saved_bytes(lambda: a[:5] * a[5:]) == 40


class FakeCuda:
    """What of torch.cuda a clock needs: a device whose time is what its kernels take, and graphs of them."""

    def __init__(self):
        self.now, self.capturing, self.log = 0.0, None, []

    def kernel(self, seconds, name="kernel"):
        def launch():
            if self.capturing is not None:
                self.capturing.append((name, seconds))
            else:
                self.log.append(name)
                self.now += seconds
            return name

        return launch

    def Event(self, enable_timing):
        event = SimpleNamespace(at=None, synchronize=lambda: None)
        event.record = lambda stream: setattr(event, "at", stream.device and self.now)
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    def Stream(self, device):
        return SimpleNamespace(device=device, wait_stream=lambda other: None)

    def stream(self, stream):
        return contextlib.nullcontext()

    def current_stream(self, device):
        return self.Stream(device)

    def graph_pool_handle(self):
        return "pool"

    def synchronize(self, device=None):
        self.log.append("synchronize")

    def CUDAGraph(self):
        graph = SimpleNamespace(kernels=[])
        graph.replay = lambda: [self.kernel(seconds, f"replayed {name}")() for name, seconds in graph.kernels]
        return graph

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        assert pool == "pool" and stream.device == torch.device("cpu")  # not the current one, which may be another
        self.capturing = graph.kernels
        try:
            yield
        finally:
            self.capturing = None


@pytest.fixture
def fake_cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(contest_module, "cuda", fake)
    return fake


def test_a_gpu_is_timed_by_replays_of_a_graph(fake_cuda):
    clock = contest_module.DeviceClock(torch.device("cpu"))
    prepared = clock.prepared(fake_cuda.kernel(0.25))
    assert fake_cuda.log.count("kernel") == 3 and prepared.results == "kernel" and prepared.reason is None
    fake_cuda.log.clear()
    clock.prepare()
    assert clock.time(prepared.call, 2) == 0.5
    assert fake_cuda.log == ["synchronize", "replayed kernel", "replayed kernel"]


def test_what_cannot_be_captured_is_timed_as_it_is_and_said(fake_cuda):
    launch = fake_cuda.kernel(0.25, "eager")

    def reads_on_the_host():
        launch()
        if fake_cuda.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    measured = contest(eager=reads_on_the_host, other=fake_cuda.kernel(0.5, "other"))
    measured._clock = contest_module.DeviceClock(torch.device("cpu"))
    measured.contenders["fastroute"] = fake_cuda.kernel(0.125, "ours")
    measured.warm_up()
    fake_cuda.log.clear()
    measured.run(2)
    launched = [name for name in fake_cuda.log if name != "synchronize"]
    assert sorted(launched) == ["eager"] * 2 + ["replayed other"] * 2 + ["replayed ours"] * 2
    row = measured.row("suite", {})
    assert row.ms == {"fastroute": 125, "eager": 250, "other": 500} and not row.cold_ms
    reason = "eager: RuntimeError: operation not permitted when stream is capturing"
    assert row.facts == {"not in a CUDA graph": reason}


def test_work_that_does_not_run_fails_before_it_is_captured(fake_cuda):
    def fails():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        contest_module.DeviceClock(torch.device("cpu")).prepared(fails)


def test_contenders_compute_float32_in_float32():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    measure(Case("sparse", {}, contest), 1)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
