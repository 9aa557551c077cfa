"""Contenders for one job: checked, then timed in turns."""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import cuda

from fastroute._errors import in_a_line
from fastroute.bench.results import Row

OURS = "fastroute"


@dataclass
class Contest:
    """What one case races: contenders for the same job on the same tensors.

    Rounds of all, in random order, are interleaved, so that ratios of their medians hold when the machine's speed
    drifts. A turn on the CPU is one call with the caches and the heap as the others left them, whose time is kept apart
    as that of a cold call, and then calls in a row, as in a loop. On a GPU the caches are emptied before every timing,
    and the replay of a CUDA graph is timed, with no time of the host in it. `facts` says what could not be captured.

    contenders: name → a call that does the job once. `OURS` is among them.
    check: raises AssertionError unless all contenders have the same result.
    device: where they compute.
    floor_bytes: the bytes that must move at least, or None where no copy is a bound.
    host: whether the time of the host is meant, with work on a GPU going on beside it.
    repeats: calls in a row, of which the mean is taken for one time.
    facts: what else a row should say.
    seconds, cold_seconds: what was measured, by contender.
    """

    contenders: dict[str, Callable[[], object]]
    check: Callable[[], None]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    floor_bytes: int | None = None
    host: bool = False
    repeats: int = 1
    facts: dict = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(init=False)
    cold_seconds: dict[str, list[float]] = field(init=False)

    def __post_init__(self):
        if self.floor_bytes is not None:
            # A copy moves every byte twice: it reads one half and writes the other.
            source = torch.ones(self.floor_bytes // 2, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            self.contenders = {**self.contenders, "copy": lambda: target.copy_(source)}
        self.seconds = {name: [] for name in self.contenders}
        self.cold_seconds = {name: [] for name in self.contenders}
        self._clock = HostClock(self.device) if self.host else clock(self.device)
        self._timed = dict(self.contenders)

    def warm_up(self, calls: int = 2) -> None:
        """Check the results, call everybody in turn, unmeasured, and make what is to be timed of each."""
        self.check()
        for name in self.turns(calls):
            self.contenders[name]()
        prepared = {name: self._clock.prepared(function) for name, function in self.contenders.items()}
        self._timed = {name: function for name, (function, _, _) in prepared.items()}
        if reasons := [f"{name}: {reason}" for name, (_, _, reason) in prepared.items() if reason]:
            self.facts["not in a CUDA graph"] = "; ".join(reasons)

    def turns(self, rounds: int) -> Iterator[str]:
        """The names in the order in which they are to be timed: each once a round, at random."""
        for _ in range(rounds):
            yield from random.sample(sorted(self.contenders), len(self.contenders))

    def prepare(self, name: str) -> None:
        """Begin a turn: bring the device to rest and, unless that has emptied the caches, time the cold call."""
        self._clock.prepare()
        if not self._clock.empties_caches:
            self.cold_seconds[name].append(self._clock.time(self._timed[name], 1))

    def call(self, name: str) -> None:
        """Time a contender's calls in a row, after `prepare`."""
        self.seconds[name].append(self._clock.time(self._timed[name], self.repeats) / self.repeats)

    def turn(self, name: str) -> None:
        self.prepare(name)
        self.call(name)

    def run(self, rounds: int) -> None:
        for name in self.turns(rounds):
            self.turn(name)

    def row(self, suite: str, labels: dict) -> Row:
        """The medians so far, with the memory of each contender, which is measured now."""
        peers = [name for name in self.contenders if name != "copy"]
        return Row(
            suite=suite,
            labels=labels,
            ms=_medians(self.seconds),
            cold_ms=_medians(self.cold_seconds),
            floor_bytes=self.floor_bytes,
            saved_bytes={name: saved_bytes(self.contenders[name]) for name in peers},
            peak_bytes={name: peak_bytes(self.contenders[name], self.device) for name in peers}
            if self.device.type == "cuda"
            else {},
            facts=self.facts,
        )


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items() if times}


def clock(device: torch.device) -> "HostClock | DeviceClock":
    """What times work on a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock(device)


class Prepared(NamedTuple):
    """What to time in a function's place, the results that it writes, and why it is no graph where it could not be."""

    call: Callable[[], object]
    results: object = None
    reason: str | None = None


class HostClock:
    empties_caches = False

    def __init__(self, device: torch.device):
        self.device = device

    def prepared(self, function: Callable[[], object]) -> Prepared:
        return Prepared(function)

    def prepare(self) -> None:
        if self.device.type == "cuda":
            cuda.synchronize(self.device)

    def time(self, function: Callable[[], object], repeats: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return time.perf_counter() - start


class DeviceClock:
    """Time between two events on the stream, with nothing of the inputs left in L2.

    Writing 256 MiB keeps the device busy for 90 µs at 3 TB/s, and the host may need 200 to queue an operator and its
    backward, which would then be in the time. The replay of a graph is one call.
    """

    empties_caches = True

    def __init__(self, device: torch.device):
        self.device, self.flush = device, torch.empty(256 << 20, dtype=torch.uint8, device=device)
        # One pool: no two graphs are replayed at once, so they may use the same memory for what nobody keeps.
        self._pool = cuda.graph_pool_handle()

    def prepared(self, function: Callable[[], object]) -> Prepared:
        """The replay of a call as captured in a CUDA graph; where that fails, the function itself."""
        stream = cuda.Stream(self.device)
        stream.wait_stream(cuda.current_stream(self.device))
        with cuda.stream(stream):  # what a capture does not allow, such as compiling, is done before it
            for _ in range(3):
                function()
        cuda.current_stream(self.device).wait_stream(stream)
        graph = cuda.CUDAGraph()
        try:
            with cuda.graph(graph, pool=self._pool):
                results = function()
        except RuntimeError as error:
            cuda.synchronize(self.device)
            return Prepared(function, reason=in_a_line(error))
        return Prepared(graph.replay, results)

    def prepare(self) -> None:
        cuda.synchronize(self.device)
        self.flush.zero_()

    def time(self, function: Callable[[], object], repeats: int = 1) -> float:
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def saved_bytes(function: Callable[[], object]) -> int:
    """The bytes of all storages that autograd saves for backward while `function` runs, each counted once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storages.values())


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most memory that `function` has at once on a GPU, beyond what was allocated before."""
    cuda.synchronize(device)
    before = cuda.memory_allocated(device)
    cuda.reset_peak_memory_stats(device)
    function()
    cuda.synchronize(device)
    return cuda.max_memory_allocated(device) - before
