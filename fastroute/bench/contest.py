"""Contests between implementations of one task: checked, then timed in interleaved rounds."""

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


@dataclass
class Contest:
    """Contenders for the same task on the same tensors.

    Rounds over all contenders, in random order, are interleaved, so that ratios of their medians are valid even if the
    machine's speed drifts. A turn on the CPU is one cold call, with caches and heap as the others left them and timed
    separately, followed by consecutive calls, as in a loop. On a GPU the caches are flushed before every timing, and
    the replay of a CUDA graph is timed, without host time. `facts` names the contenders that could not be captured,
    and those that were left out.

    contenders: name → function that does the task once. `OURS` is among them.
    check: raises AssertionError unless all contenders have the same result; it may `refuse` a wrong one instead.
    device: of the tensors.
    floor_bytes: minimal number of bytes moved, or None if memory is not the bound.
    host: whether to time the host, with work on a GPU running asynchronously.
    repeats: consecutive calls, whose mean is one time.
    facts: further entries of the row.
    seconds, cold_seconds: measured times by contender.
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
        """Check the results, call all contenders without timing, and capture CUDA graphs."""
        self.check()
        for name in self.turns(calls):
            self.contenders[name]()
        prepared = {name: self._clock.prepared(function) for name, function in self.contenders.items()}
        self._timed = {name: function for name, (function, _, _) in prepared.items()}
        if reasons := [f"{name}: {reason}" for name, (_, _, reason) in prepared.items() if reason]:
            self.facts["not in a CUDA graph"] = "; ".join(reasons)

    def refuse(self, name: str, error: AssertionError) -> None:
        """Leave out the compiled peer, whose wrong result is not our code's fault; `facts` keep the reason.

        Raises:
            AssertionError: another contender is wrong.
        """
        reason = f"{name}: {error}"
        if name != "compile":
            raise AssertionError(reason) from None
        for contenders in (self.contenders, self.seconds, self.cold_seconds):
            del contenders[name]
        self.facts["left out"] = reason

    def turns(self, rounds: int) -> Iterator[str]:
        """Yield the contenders' names in the order of timing: each once per round, in random order."""
        for _ in range(rounds):
            yield from random.sample(sorted(self.contenders), len(self.contenders))

    def prepare(self, name: str) -> None:
        """Begin a turn: synchronise the device and, unless that flushes the caches, time the cold call."""
        self._clock.prepare()
        if not self._clock.flushes_caches:
            self.cold_seconds[name].append(self._clock.time(self._timed[name], 1))

    def call(self, name: str) -> None:
        """Time a contender's consecutive calls, after `prepare`."""
        self.seconds[name].append(self._clock.time(self._timed[name], self.repeats) / self.repeats)

    def turn(self, name: str) -> None:
        """Run one turn of a contender."""
        self.prepare(name)
        self.call(name)

    def run(self, rounds: int) -> None:
        """Run a number of rounds."""
        for name in self.turns(rounds):
            self.turn(name)

    def row(self, suite: str, labels: dict) -> Row:
        """Return the median times so far and the memory of each contender, which is measured now."""
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
    """Return the clock for a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock(device)


class Prepared(NamedTuple):
    """A function to time in place of another, the results it writes, and the reason if it is not a CUDA graph."""

    call: Callable[[], object]
    results: object = None
    reason: str | None = None


class HostClock:
    """Wall-clock time on the host."""

    flushes_caches = False

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
    """Time between two CUDA events, with L2 flushed before.

    A graph is replayed by one call. Without it, host time would be included: the flush, a write of 256 MiB, keeps the
    device busy for 90 µs at 3 TB/s, but the host may need 200 µs to queue an operator and its backward.
    """

    flushes_caches = True

    def __init__(self, device: torch.device):
        self.device, self.flush = device, torch.empty(256 << 20, dtype=torch.uint8, device=device)
        # Graphs are never replayed concurrently, so they can share one pool for temporary memory.
        self._pool = cuda.graph_pool_handle()

    def prepared(self, function: Callable[[], object]) -> Prepared:
        """Capture a call in a CUDA graph and return its replay; if that fails, return the function itself."""
        stream = cuda.Stream(self.device)
        stream.wait_stream(cuda.current_stream(self.device))
        with cuda.stream(stream):  # warm-up: a capture does not allow, for example, compilation
            for _ in range(3):
                function()
        cuda.current_stream(self.device).wait_stream(stream)
        graph = cuda.CUDAGraph()
        try:
            with cuda.graph(graph, pool=self._pool, stream=stream):
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
        stream = cuda.current_stream(self.device)  # that of the current device may be another
        start.record(stream)
        for _ in range(repeats):
            function()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def saved_bytes(function: Callable[[], object]) -> int:
    """Return the bytes of all storages that autograd saves for backward while `function` runs."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storages.values())


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Return the peak of the GPU memory that `function` allocates, in bytes."""
    cuda.synchronize(device)
    before = cuda.memory_allocated(device)
    cuda.reset_peak_memory_stats(device)
    function()
    cuda.synchronize(device)
    return cuda.max_memory_allocated(device) - before
