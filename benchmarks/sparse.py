"""A sparse layer that sends each sample to one of four paths, against one path on all samples, in the same process.

Each path is a stack of a CIFAR ResNet. The peers are one such stack, all four with their weighted sum, and top-1
written with boolean masks. Before a time counts, the results are compared. Rounds of all, in random order, are
interleaved and medians taken, so that a ratio holds when the machine's speed drifts.

    python -m benchmarks.sparse --output benchmarks/results/NAME.json
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

import torch

from fastroute.cli import keep_freed_memory
from fastroute.models.cifar_resnet import _stack
from fastroute.nn import SparseRouter

# (N, C, H): the first two stages of the CIFAR ResNets at batch 128.
SHAPES = [(128, 16, 32), (128, 32, 16)]
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
PATHS = 4


def even(router, x):
    """Scores that differ from sample to sample, none of the paths preferred on average."""
    torch.nn.init.normal_(router.w2)
    with torch.no_grad():
        router.b2 -= router.divide(x)[1].scores.mean(0)
    return router


def masked(router, x):
    chosen = router.divide(x)[1].chosen[:, 0]
    y = torch.empty_like(x)
    for j, path in enumerate(router.paths):
        y[chosen == j] = path(x[chosen == j])
    return y


def dense(router, x):
    gates = router.divide(x)[1].scores.softmax(1)
    return sum(g[:, None, None, None] * path(x) for g, path in zip(gates.unbind(1), router.paths, strict=True))


def measure(shape, memory_format, train, blocks, rounds):
    """Median milliseconds of each contender, and how many samples each path had."""
    batch, channels, size = shape
    torch.manual_seed(0)
    x = torch.randn(batch, channels, size, size).contiguous(memory_format=memory_format)
    router = SparseRouter(channels, [_stack(channels, channels, blocks, 1) for _ in range(PATHS)])
    router = even(router.to(memory_format=memory_format).eval(), x)
    # Equal results need equal statistics, so these are the running ones until the clock starts.
    with torch.no_grad():
        y, routing = router(x, return_routing=True)
        torch.testing.assert_close(y, masked(router, x), rtol=1e-4, atol=1e-4)
        router.top_k = PATHS
        torch.testing.assert_close(router(x), dense(router, x), rtol=1e-4, atol=1e-4)
        router.top_k = 1
    router.train(train)
    x.requires_grad_(train)

    contenders = {
        "top1": lambda: router(x),
        "one path": lambda: router.paths[0](x),
        "masked": lambda: masked(router, x),
        "dense": lambda: dense(router, x),
    }
    times = {name: [] for name in contenders}
    for round_ in range(rounds + 2):
        for name in random.sample(sorted(contenders), len(contenders)):
            start = time.perf_counter()
            with torch.set_grad_enabled(train):
                output = contenders[name]()
            if train:
                output.backward(output.detach())
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
            router.zero_grad()
            x.grad = None
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}, routing.load.tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each case")
    parser.add_argument("--blocks", type=int, default=3, help="residual blocks in a path: two convolutions each")
    parser.add_argument(
        "--keep-freed-memory",
        action="store_true",
        help="as `fastroute` commands do; without it, large maps cost page faults, and one path has larger maps",
    )
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    if arguments.keep_freed_memory:
        keep_freed_memory()
    rows = []
    print("mode       format         shape              load              top-1 ms  / one path  / masked  / dense")
    for train in (False, True):
        for memory_format in FORMATS:
            for shape in SHAPES:
                ms, load = measure(shape, FORMATS[memory_format], train, arguments.blocks, arguments.rounds)
                mode = "train" if train else "inference"
                rows.append({"mode": mode, "format": memory_format, "shape": shape, "load": load, "ms": ms})
                ratios = [ms["top1"] / ms[peer] for peer in ("one path", "masked", "dense")]
                print(
                    f"{mode:10} {memory_format:14} {shape!s:18} {load!s:17} {ms['top1']:8.2f}"
                    f" {ratios[0]:11.2f} {ratios[1]:9.2f} {ratios[2]:8.2f}",
                    flush=True,
                )
    if arguments.output:
        machine = {
            "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        settings = {name: getattr(arguments, name) for name in ("rounds", "blocks", "keep_freed_memory")}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"machine": machine, **settings, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
