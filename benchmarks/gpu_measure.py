"""What `gpu_worker.py` measures: the time and the accuracy of one call, of one case, on the host and on the device."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.gpu_rows import MAPS

PATHS, HIDDEN = 2, 16
HOST_SHAPE = (1, 16, 4, 4)
ROUNDS = {"cuda": 15, "cpu": 1}
HOST_CALLS = {"cuda": (9, 40), "cpu": (1, 2)}  # batches, and calls per batch


def brief(error: BaseException) -> str:
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return f"{type(error).__name__}: {' / '.join(lines[:3])[:400]}"


def draw(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str):
    """Draw paths, gate and incoming gradients for 2 → 2 paths of a shape."""
    from fastroute.bench.cases import LAYOUTS

    torch.manual_seed(0)
    xs = [torch.randn(shape, device=device).to(dtype, memory_format=LAYOUTS[layout]) for _ in range(PATHS)]
    xs = [x.requires_grad_() for x in xs]
    sizes = (PATHS, HIDDEN, shape[1]), (PATHS, HIDDEN), (PATHS, PATHS, HIDDEN), (PATHS, PATHS)
    gate = [(0.1 * torch.randn(size)).to(device).requires_grad_() for size in sizes]
    return xs, gate, [torch.randn_like(x) for x in xs]


def job(function: Callable, direction: str, xs, gate, grads) -> Callable[[], list[torch.Tensor]]:
    def forward():
        with torch.no_grad():
            return list(function(xs, *gate))

    def both():
        ys = function(xs, *gate)
        return [*ys, *torch.autograd.grad(ys, [*xs, *gate], grads)]

    return forward if direction == "forward" else both


def contender(name: str) -> tuple[Callable, contextlib.AbstractContextManager]:
    """Return the function for a backend, "default", "eager" or "compile", and the context in which to call it."""
    from fastroute import ops, use_backend
    from fastroute.bench import plain

    if name == "eager":
        return plain.cross_connect, contextlib.nullcontext()
    if name == "compile":
        return torch.compile(plain.cross_connect, dynamic=False), contextlib.nullcontext()
    context = contextlib.nullcontext() if name == "default" else use_backend(name)
    return (lambda xs, *gate: ops.cross_connect(xs, *gate).outputs), context


def host_time(backend: str, direction: str, device: str) -> Iterator[dict]:
    """Measure the host's microseconds for a call on tiny maps, without waiting for the device."""
    function, context = contender(backend)
    call = job(function, direction, *draw(HOST_SHAPE, torch.float32, "contiguous", device))
    (batches, calls), times = HOST_CALLS[device], []
    with context:
        for _ in range(calls):
            call()
        for _ in range(batches):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            times.append((time.perf_counter() - start) / calls)
    yield {"kind": "host", "backend": backend, "direction": direction, "us": 1e6 * statistics.median(times)}


def device_time(backend: str, case: tuple, device: str) -> Iterator[dict]:
    """Measure the device's microseconds for a call with flushed caches and for a copy, and the error of the result."""
    from fastroute.bench import contest, plain

    shape, dtype, layout, direction = case
    tensors = draw(shape, dtype, layout, device)
    function, context = contender(backend)
    clock, rounds = contest.clock(torch.device(device)), ROUNDS[device]
    source = torch.randn(MAPS[direction] * tensors[0][0].numel() // 2, device=device).to(dtype)
    target = torch.empty_like(source)
    row = {"kind": "speed", "backend": backend}
    with context:
        routed = clock.prepared(job(function, direction, *tensors))
        copied = clock.prepared(lambda: target.copy_(source))
        times = {"us": [], "copy_us": []}
        for _ in range(rounds):
            for name, call in (("us", routed.call), ("copy_us", copied.call)):
                clock.prepare()
                times[name].append(1e6 * clock.time(call))
        row |= {name: statistics.median(values) for name, values in times.items()}
        row["share_of_copy"] = row["copy_us"] / row["us"]
        if routed.reason:
            row["not_in_a_graph"] = routed.reason
        results = routed.results
        if results is None:
            results = routed.call()
        else:
            for result in results:
                result.detach().fill_(torch.nan)  # shows what the replay does not write
            routed.call()
    if (backend, device) == ("native", "cuda") and hasattr(torch.ops.fastroute_native, "cuda_last_cluster"):
        row["cluster"] = torch.ops.fastroute_native.cuda_last_cluster()
    try:
        row |= accuracy(results, partial(job, plain.cross_connect, direction), tensors)
    except RuntimeError as error:  # for example out of memory; the time is valid
        row["error"] = f"not checked: {brief(error)}"
    yield row


def accuracy(results, plain_job: Callable, tensors) -> dict:
    """Return the largest relative error against float64, and eager's; "error" if `assert_as_good_as_eager` fails."""
    from fastroute.testing import assert_as_good_as_eager

    exact = plain_job(*([t.detach().double().requires_grad_() for t in group] for group in tensors))()
    eager = plain_job(*tensors)()
    row = {"off": relative(results, exact), "eager_off": relative(eager, exact)}
    try:
        assert_as_good_as_eager(results, eager, exact)
    except AssertionError as error:
        row["error"] = f"wrong: {error}"
    return row


@torch.no_grad()
def relative(results, exact) -> float:
    return max(float((a.double() - b).norm() / (b.norm() + 1e-30)) for a, b in zip(results, exact, strict=True))


def by_kernel(backend: str, case: tuple, device: str) -> Iterator[dict]:
    """Measure microseconds by kernel of a forward and backward."""
    from torch.profiler import ProfilerActivity, profile

    from fastroute.bench import contest

    function, context = contender(backend)
    call, clock = job(function, "forward+backward", *draw(*case, device)), contest.clock(torch.device(device))
    on_card = device == "cuda"
    calls = 5 if on_card else 1
    with context:
        call()
        with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as record:
            for _ in range(calls):
                clock.prepare()
                call()
            clock.prepare()
    spent = {e: e.device_time_total if on_card else e.self_cpu_time_total for e in record.key_averages()}
    for event in sorted(spent, key=spent.get, reverse=True)[:8]:
        row = {"kernel": event.key[:70], "calls": event.count / calls, "us": spent[event] / event.count}
        yield {"kind": "profile", "backend": backend, **row}


def step_time(step: Callable, device: str) -> dict:
    """Measure milliseconds of a step in a loop and of its replay from a CUDA graph, and the memory it needs in MiB."""
    from fastroute.bench import contest

    clock, on_card = contest.clock(torch.device(device)), device == "cuda"

    def wait():
        if on_card:
            torch.cuda.synchronize()

    def seconds(call, calls):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        return (time.perf_counter() - start) / calls

    def loop(call):
        """Take the median of three loops of 0.3 s, or of two steps."""
        calls = max(2, min(30, round(0.3 / seconds(call, 2)))) if on_card else 1
        return 1e3 * statistics.median(seconds(call, calls) for _ in range(3))

    for _ in range(3):
        step()
    row = {"ms": loop(step)}
    if on_card:
        wait()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    prepared = clock.prepared(step)
    return row | ({"not_in_a_graph": prepared.reason} if prepared.reason else {"graph_ms": loop(prepared.call)})
