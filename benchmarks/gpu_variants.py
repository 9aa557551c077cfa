"""Time the native CUDA kernels of several builds in one run on one GPU, to see what a change gains.

    python benchmarks/gpu_variants.py NAME=FOLDER NAME=FOLDER … [--output FILE.json]

Each FOLDER has the _C.so and _C_cuda.so of a build (fastroute/backends/native). The builds take turns, each in a
process of its own. Forward and backward of `cross_connect`, 2 paths to 2, are timed in CUDA graphs with flushed caches,
beside a copy of the fewest bytes that must move, and compared with two passes. The file has one row per build, case
and direction, and is written after each process: one that fails, or takes over `SECONDS`, loses only its own rows, and
the exit status is 1. Without a GPU it is 2.

It does not import fastroute, which would define the operators that the library of a build defines. So it has a clock
and inputs of its own, beside those of `fastroute.bench` and `gpu_measure.py`.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout without installation

from benchmarks.gpu_rows import save

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PATHS, HIDDEN, ROUNDS = 2, 16, 9
SECONDS = 120
CASES = [  # shape, dtype, layout, relu
    *(
        (shape, torch.bfloat16, layout, False)
        for layout in LAYOUTS
        for shape in (
            (256, 64, 56, 56),
            (256, 128, 28, 28),
            (256, 256, 14, 14),
            (256, 512, 7, 7),
            (128, 16, 32, 32),
            (1024, 16, 32, 32),
        )
    ),
    ((256, 64, 56, 56), torch.float32, "contiguous", False),
    ((256, 64, 56, 56), torch.float32, "channels_last", False),
    ((256, 64, 56, 56), torch.bfloat16, "contiguous", True),
    ((256, 256, 14, 14), torch.bfloat16, "channels_last", True),
    ((256, 256, 14, 14), torch.float32, "contiguous", False),
    ((1024, 16, 32, 32), torch.float32, "contiguous", False),
    ((128, 64, 8, 8), torch.bfloat16, "contiguous", False),
    ((256, 512, 28, 28), torch.bfloat16, "channels_last", False),
    ((256, 1024, 14, 14), torch.bfloat16, "channels_last", False),
]


class Clock:
    """Microseconds of a call's replay from a CUDA graph, after L2 was flushed: the median of `ROUNDS`."""

    def __init__(self):
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable[[], object]) -> float:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(ROUNDS):
            torch.cuda.synchronize()
            self._flush.zero_()
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(1e3 * start.elapsed_time(end))
        del results
        return statistics.median(times)


def flat(results) -> list[torch.Tensor]:
    return [tensor for item in results for tensor in (item if isinstance(item, list) else [item])]


def off(results, reference) -> float:
    pairs = zip(flat(results), flat(reference), strict=True)
    return max(float((a.float() - b.float()).norm() / (b.float().norm() + 1e-30)) for a, b in pairs)


def measure(operators, clock: Clock, shape, dtype, layout: str, relu: bool):
    """Yield the rows of one case."""
    torch.manual_seed(0)
    xs = [torch.randn(shape, device="cuda").to(dtype, memory_format=LAYOUTS[layout]) for _ in range(PATHS)]
    sizes = (PATHS, HIDDEN, shape[1]), (PATHS, HIDDEN), (PATHS, PATHS, HIDDEN), (PATHS, PATHS)
    gate = [(0.1 * torch.randn(size)).cuda() for size in sizes]
    grads = [torch.randn_like(x) for x in xs]
    _, gates, _, pooled, hidden = operators.cross_connect.default(xs, *gate, relu)
    saved = (gates, pooled, hidden, relu, True)
    calls = {
        "forward": (4, lambda: operators.cross_connect.default(xs, *gate, relu)),
        "backward": (6, lambda: operators.cross_connect_backward.default(grads, None, None, xs, *gate, *saved)),
    }
    name = f"{'x'.join(map(str, shape))} {str(dtype)[6:]} {layout}{' relu' if relu else ''}"
    for direction, (maps, call) in calls.items():
        source = torch.randn(maps // 2 * xs[0].numel(), device="cuda").to(dtype)
        target = torch.empty_like(source)
        copy_us = clock(lambda source=source, target=target: target.copy_(source))
        operators.cuda_force_cluster(0)
        two_passes = call()
        operators.cuda_force_cluster(-1)
        results = call()
        row = {"case": name, "direction": direction, "cluster": operators.cuda_last_cluster()}
        row |= {"us": round(clock(call), 2), "copy_us": round(copy_us, 2), "off": off(results, two_passes)}
        yield row | {"repeats": all(torch.equal(a, b) for a, b in zip(flat(results), flat(call()), strict=True))}


def one(folder: Path) -> None:
    """Print the rows of one build."""
    for library in ("_C.so", "_C_cuda.so"):
        torch.ops.load_library(folder / library)
    clock = Clock()
    for case in CASES:
        for row in measure(torch.ops.fastroute_native, clock, *case):
            print(json.dumps(row), flush=True)


def rows_of(folder: str) -> tuple[list[str], str | None]:
    """Return the rows that a process of its own printed for a build, whole lines only, and why some are missing."""
    try:
        ended = subprocess.run([sys.executable, __file__, "--one", folder], stdout=subprocess.PIPE, timeout=SECONDS)
        output, reason = ended.stdout, f"exit status {ended.returncode}" if ended.returncode else None
    except subprocess.TimeoutExpired as late:
        output, reason = late.stdout or b"", f"it took over {SECONDS} s"
    return output.decode().split("\n")[:-1], reason


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="+", metavar="NAME=FOLDER", help="builds to compare")
    parser.add_argument("--turns", type=int, default=2, help="of each build")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(Path(options.builds[0]))
        return 0
    builds = dict(build.partition("=")[::2] for build in options.builds)
    for name, folder in builds.items():
        if missing := [library for library in ("_C.so", "_C_cuda.so") if not (Path(folder) / library).is_file()]:
            parser.error(f"{name}={folder}: there is no {' and no '.join(missing)}; build with `setup.py build_ext`")
    if not torch.cuda.is_available():
        print("gpu_variants: this machine has no CUDA device that torch can use", file=sys.stderr)
        return 2
    about = {"processor": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    about["date"] = datetime.date.today().isoformat()
    rows, failed = [], False
    for turn in range(options.turns):
        for name, folder in builds.items():
            texts, reason = rows_of(folder)
            for text in texts:
                rows.append({"build": name, "turn": turn, **json.loads(text)})
                row = rows[-1]
                share = row["copy_us"] / row["us"]
                print(f"{name:12}{row['case']:44}{row['direction']:10}{row['us']:9.1f}{share:6.2f}", flush=True)
            if reason:
                failed = True
                print(f"{name}: turn {turn} ended early: {reason}", file=sys.stderr, flush=True)
            if options.output:
                save({**about, "rows": rows}, options.output)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
