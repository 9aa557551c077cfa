"""Time forward plus backward of the mixture-EM loss, against eager PyTorch and `torch.compile` of it.

    python -m benchmarks.mixture_em

Medians, in one process, in random order. The results are compared first.
"""

import argparse
import random
import statistics
import time

import torch
from torch.nn.functional import logsigmoid

from fastroute import ops

SHAPES = [(128, 10), (128, 4, 4), (128, 2, 2), (1024, 20), (128, 100)]


def plain(scores, gamma=5.0):
    """Compute Eq. 4.11, 4.20 and 4.22 as a user of PyTorch would write them."""
    normalized = (scores - scores.mean(0)) / scores.std(0, correction=0)
    posterior = torch.softmax(normalized, -1).detach()
    return -(posterior * logsigmoid(normalized / gamma)).sum(-1).mean(0)


def measure(shape, rounds, repeats=20):
    """Measure the median microseconds of each contender."""
    torch.manual_seed(0)
    scores = torch.randn(shape).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(plain, dynamic=False)

    def step(function):
        loss = function(scores)
        loss.backward(torch.ones_like(loss))
        grad, scores.grad = scores.grad, None
        return loss, grad

    contenders = {
        "fastroute": lambda: step(lambda scores: ops.mixture_em_loss(scores).loss),
        "eager": lambda: step(plain),
        "compile": lambda: step(compiled),
    }
    for ours, theirs in zip(contenders["fastroute"](), contenders["eager"](), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    times = {name: [] for name in contenders}
    for round_ in range(rounds + 2):
        for name in random.sample(sorted(contenders), len(contenders)):
            start = time.perf_counter()
            for _ in range(repeats):
                contenders[name]()
            if round_ >= 2:
                times[name].append((time.perf_counter() - start) / repeats)
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="timed rounds of each shape")
    rounds = parser.parse_args().rounds
    print("shape                 µs   × eager  × compile")
    for shape in SHAPES:
        us = measure(shape, rounds)
        ours = us["fastroute"]
        print(f"{shape!s:16} {ours:8.1f} {us['eager'] / ours:9.2f} {us['compile'] / ours:10.2f}", flush=True)


if __name__ == "__main__":
    main()
