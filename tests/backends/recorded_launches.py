"""Separate program for test_recordings.py: call operators through Triton on the stub driver, recorded and replayed.

Prints, for each case, what was launched when Python recorded the call and when the compiled library replayed it. The
last line says which calls of a sequence came to Python.
"""

import contextlib
import functools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import stub_driver
from fastroute import ops, use_backend
from tests.ops.cases import moved, parameters, paths

SIZES = {"i32": 4, "u32": 4, "fp32": 4, "i1": 1, "u1": 1, "i8": 1, "i16": 2}

CASES = {  # m, n, shape, dtype, layout, hidden, activation
    "resident": (2, 2, (4, 16, 8, 8), torch.float32, "contiguous", 16, None),
    "fused": (2, 3, (140, 32, 24, 24), torch.bfloat16, "channels_last", 16, "relu"),
    "split": (2, 2, (3, 64, 56, 56), torch.float32, "stacked", 16, None),
    "linear gate": (3, 2, (4, 6, 7, 7), torch.float16, "contiguous", None, None),
    "no space": (2, 2, (8, 12), torch.float32, "contiguous", 16, None),
}


def calls(m, n, shape, dtype, layout, hidden, activation, device="cpu"):
    """Return the forward and the backward of each operator by name, and the tensors that they are given."""
    xs = [moved(x, device).requires_grad_() for x in paths(m, shape, dtype, layout)]
    ps = [None if p is None else p.to(device).requires_grad_() for p in parameters(m, n, shape[1], hidden)]
    leaves = [*xs, *(p for p in ps if p is not None)]
    gates = torch.rand(shape[0], m, n, device=device)
    scores, prior = torch.randn(shape[0], 5, device=device, requires_grad=True), torch.full((5,), 0.2, device=device)

    def with_gradients(forward, leaves):
        """Return two calls: the operator, and its backward for the operator's results."""

        def backward(results):
            results = [t for t in results if t.requires_grad]
            return list(torch.autograd.grad(results, leaves, [torch.ones_like(t) for t in results]))

        return forward, backward

    def cross_connect():
        routed = ops.cross_connect(xs, *ps, activation)
        return [*routed.outputs, routed.gates, routed.scores]

    def mixture():
        return list(ops.mixture_em_loss(scores, 2.5, prior))

    given = {"xs": xs, "parameters": [p for p in ps if p is not None], "others": [gates, scores, prior]}
    return {
        "cross_connect": with_gradients(cross_connect, leaves),
        "gate": with_gradients(lambda: list(ops.gate(xs, *ps)), leaves),
        "mix": with_gradients(lambda: ops.mix(xs, gates), xs),
        "mixture": with_gradients(mixture, [scores]),
    }, given


class Kept:
    """The launches of a call, each argument as a number, or as a name where it is an address of a known tensor."""

    def __init__(self, stub, kernels):
        self.stub, self.types = stub, {}
        for kernel in kernels:
            kinds = []

            def flatten(kind, kinds=kinds):
                if isinstance(kind, tuple):
                    for part in kind:
                        flatten(part)
                elif kind != "constexpr":
                    kinds.append(kind)

            for kind in kernel.src.signature.values():
                flatten(kind)
            self.types[kernel.function] = kinds
            stub.stub_set_argument_count(kernel.function, len(kinds))

    def during(self, call, given):
        self.stub.stub_keep(1)
        results = call()
        launches = []
        known = {t.data_ptr(): f"{name} {i}" for name, ts in given.items() for i, t in enumerate(ts)}
        # A result in half precision may have been converted, and lie where a temporary was before.
        precise = [(i, t) for i, t in enumerate(results) if t.dtype == torch.float32 and t.numel()]
        known |= {t.data_ptr(): f"result {i}" for i, t in precise}
        others = {}  # allocations that are no results, by order of appearance
        for index in range(self.stub.stub_launch_count()):
            launch = self.stub.stub_launch(index).contents
            arguments = []
            for kind, value in zip(self.types[launch.function], launch.arguments, strict=False):
                if kind.startswith("*"):
                    arguments.append(known.get(value) or others.setdefault(value, f"temporary {len(others)}"))
                else:
                    arguments.append(value & ((1 << 8 * SIZES.get(kind, 8)) - 1))
            shape = [list(launch.grid), list(launch.block), launch.shared, launch.attributes]
            launches.append([launch.function, shape, arguments])
        self.stub.stub_keep(0)
        layout = [[list(t.shape), list(t.stride()), str(t.dtype)] for t in results]
        return {"launches": launches, "results": layout}, results


def main() -> None:
    stub = stub_driver.install()
    from fastroute.backends import BACKENDS
    from fastroute.backends.triton import _recording

    python = []  # the calls that came to Python
    triton = BACKENDS["triton"].kernels()
    record = triton.record
    triton.record = lambda function, args: python.append(function.__name__) or record(function, args)
    with use_backend("triton"):
        for case, settings in CASES.items():
            by_name, given = calls(*settings)
            for name, (forward, backward) in by_name.items():
                backward(forward())  # compiles
                torch.ops.fastroute_native.forget_recordings()
                kept = Kept(stub, _recording._kernels)
                turns = []
                for _ in range(2):
                    python.clear()
                    launched, results = kept.during(forward, given)
                    again, _ = kept.during(functools.partial(backward, results), given)
                    turns.append([[launched, again], list(python)])
                print(json.dumps([case, name, *turns]), flush=True)
        print(json.dumps(sequences(triton, python)), flush=True)


def sequences(triton, python: list) -> dict[str, list[bool]]:
    """Return which calls came to Python, where the first one's arguments are one tensor, and where it fails."""
    x, y = torch.randn(2, 4, 6, 5, 5).unbind()
    gates = torch.rand(4, 2, 2)

    def came(*xs):
        python.clear()
        ops.mix(list(xs), gates)
        return bool(python)

    def fail(function, args):
        raise MemoryError

    torch.ops.fastroute_native.forget_recordings()
    aliased = [came(x, x), came(x, y), came(y, y), came(y, x)]
    torch.ops.fastroute_native.forget_recordings()
    record, triton.record = triton.record, fail
    with contextlib.suppress(MemoryError):
        came(x, y)
        raise AssertionError("the call was replayed")
    triton.record = record
    return {"aliased first": aliased, "failed first": [came(x, y), came(x, y)]}


if __name__ == "__main__":
    main()
