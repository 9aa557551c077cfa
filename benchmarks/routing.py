"""Forward plus backward of cross-connection routing on this machine, against three peers in the same process.

The peers are the routing written plainly in PyTorch, `torch.compile` of that, and a copy of as many bytes as routing
must move at least. Before a time counts, the results are compared. Rounds of all four, in random order, are
interleaved and medians taken, so that a ratio holds when the machine's speed drifts.

    python -m benchmarks.routing --output benchmarks/results/NAME.json
"""

import argparse
import json
import math
import platform
import random
import statistics
import time
from pathlib import Path

import torch

from benchmarks import plain
from fastroute import ops

# (N, C, H): the stages of the CIFAR ResNets at batch 128, and of ResNet18 at batch 32.
SHAPES = [(128, 16, 32), (128, 32, 16), (128, 64, 8), (32, 64, 56), (32, 128, 28), (32, 256, 14)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def routed(xs, w1, b1, w2, b2):
    return ops.cross_connect(xs, w1, b1, w2, b2).outputs


def measure(shape, paths, dtype, memory_format, rounds):
    """Median milliseconds of each contender for m = n = `paths` tensors (N, C, H, H)."""
    batch, channels, size = shape
    torch.manual_seed(0)

    def draw():
        return torch.randn(batch, channels, size, size).to(dtype).contiguous(memory_format=memory_format)

    xs, incoming = [draw().requires_grad_() for _ in range(paths)], [draw() for _ in range(paths)]
    sizes = (paths, 16, channels), (paths, 16), (paths, paths, 16), (paths, paths)
    parameters = [(torch.randn(size) * 0.1).requires_grad_() for size in sizes]
    torch._dynamo.reset()
    compiled = torch.compile(plain.cross_connect, dynamic=False)

    def step(function):
        outputs = function(xs, *parameters)
        return outputs, torch.autograd.grad(outputs, [*xs, *parameters], incoming)

    # Routing reads m and writes n maps forward, and reads m + n and writes m backward; a copy moves every byte twice.
    moved = xs[0].numel() * xs[0].element_size() * 5 * paths
    source = torch.ones(moved // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    contenders = {
        "fastroute": lambda: step(routed),
        "eager": lambda: step(plain.cross_connect),
        "compile": lambda: step(compiled),
        "copy": lambda: target.copy_(source),
    }
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for ours, theirs in zip(step(routed), step(plain.cross_connect), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.detach().abs().max()))
    times = {name: [] for name in contenders}
    for round_ in range(rounds + 2):
        # Each leaves the caches and the heap as it used them, so everybody comes after everybody else in turn.
        for name in random.sample(sorted(contenders), len(contenders)):
            start = time.perf_counter()
            contenders[name]()
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each case")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    rows = []
    print("dtype     format         paths  shape             ms  share of copy   × eager  × compile")
    for dtype in DTYPES:
        for memory_format in FORMATS:
            part = []
            for paths in (2, 3):
                for shape in SHAPES:
                    ms = measure(shape, paths, DTYPES[dtype], FORMATS[memory_format], arguments.rounds)
                    row = {"dtype": dtype, "format": memory_format, "paths": paths, "shape": shape, "ms": ms}
                    part.append(row)
                    ours = ms["fastroute"]
                    ratios = f"{ms['copy'] / ours:14.2f} {ms['eager'] / ours:9.2f} {ms['compile'] / ours:10.2f}"
                    print(f"{dtype:9} {memory_format:14} {paths:5}  {shape!s:14} {ours:7.2f} {ratios}", flush=True)
            means = [
                math.exp(statistics.fmean(math.log(row["ms"][peer] / row["ms"]["fastroute"]) for row in part))
                for peer in ("copy", "eager", "compile")
            ]
            print(
                f"{dtype:9} {memory_format:14} {'geometric mean':>30} {means[0]:14.2f} {means[1]:9.2f} {means[2]:10.2f}"
            )
            rows += part
    if arguments.output:
        machine = {
            "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(
            json.dumps({"machine": machine, "rounds": arguments.rounds, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
