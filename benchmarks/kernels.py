"""Time the parts of `cross_connect` on the CPU, each in its own loop, by shape and number of paths.

    python -m benchmarks.kernels

Median microseconds of the forward kernel, the backward kernel, the part of it that computes the gates' gradients, and
forward plus backward through autograd.
"""

import argparse
import statistics
import time

import torch

from fastroute import ops
from fastroute.backends import BACKENDS
from fastroute.bench.cases import DTYPES, LAYOUTS, draw
from fastroute.bench.operators import FORWARD_BACKWARD, OPERATORS, STATED, Problem

CPU = torch.device("cpu")
SHAPE = (128, 32, 16, 16)  # for the cases with different numbers of paths


def measure(shape, paths, dtype, layout, rounds):
    """Measure the median microseconds of each part, for `paths` to `paths`."""
    problem = Problem("cross_connect", FORWARD_BACKWARD, "native", dtype, layout, shape, (paths, paths))
    xs = [draw(shape, DTYPES[dtype], layout, CPU) for _ in range(paths)]
    parameters = OPERATORS["cross_connect"].parameters(problem)
    grads = [torch.randn_like(x) for x in xs]
    kernels = BACKENDS["native"].kernels()
    _, gates, _, pooled, hidden = kernels.cross_connect(xs, *parameters, False)
    leaves = [leaf.detach().requires_grad_() for leaf in (*xs, *parameters)]

    def backward(grad_inputs):
        kernels.cross_connect_backward(grads, None, None, xs, *parameters, gates, pooled, hidden, False, grad_inputs)

    def call():
        outputs = ops.cross_connect(leaves[:paths], *leaves[paths:]).outputs
        torch.autograd.grad(outputs, leaves, grads)

    parts = {
        "forward": lambda: kernels.cross_connect(xs, *parameters, False),
        "backward": lambda: backward(True),
        "gates": lambda: backward(False),
        "call": call,
    }
    return {name: _median(part, rounds) for name, part in parts.items()}


def _median(function, rounds):
    times = []
    for _ in range(rounds + 5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[5:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each part")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default="contiguous")
    options = parser.parse_args()
    if reason := BACKENDS["native"].reason_against(CPU, torch.float32):
        parser.error(f"this measures the compiled kernels: {reason}")
    print("maps                 paths  dtype     forward  backward     gates      call  elements/s over float32")
    for shape, paths in [*((shape, 2) for shape in STATED), *((SHAPE, paths) for paths in range(1, 9))]:
        calls = {}
        for dtype in ("float32", "bfloat16"):
            us = measure(shape, paths, dtype, options.layout, options.rounds)
            calls[dtype] = us["call"]
            numbers = " ".join(f"{us[name]:9.1f}" for name in ("forward", "backward", "gates", "call"))
            print(f"{shape!s:20} {paths:5}  {dtype:8} {numbers} {calls['float32'] / us['call']:8.2f}", flush=True)


if __name__ == "__main__":
    main()
