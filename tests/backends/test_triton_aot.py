"""The Triton kernels compiled ahead of time, without a card: registers, spills, shared memory and width of accesses.

Run as a program with an architecture, this file calls the operators on tensors without memory, has every launch compile
for that architecture in place of running, and prints what the compiler says of it. That takes a process of its own: the
other tests may have told Triton to interpret.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

CASES = {  # tier or None for the plan's choice, m, n, (N, C, H, W), dtype, channels_last
    "ResNet 32 × 32": (None, 2, 2, (128, 16, 32, 32), "float32", False),
    "ResNet 8 × 8": (None, 2, 2, (128, 64, 8, 8), "bfloat16", True),
    "three paths": ("fused", 3, 3, (256, 32, 16, 16), "float32", False),
    "one program a multiprocessor": ("fused", 2, 2, (100, 32, 16, 16), "bfloat16", True),
    "ImageNet, NCHW": (None, 2, 2, (32, 64, 56, 56), "float32", False),
    "ImageNet, channels_last": (None, 2, 2, (32, 64, 56, 56), "bfloat16", True),
    "full registers": (None, 3, 3, (128, 16, 32, 16), "bfloat16", True),
    "too many for registers": (None, 4, 2, (128, 16, 32, 16), "float32", True),
    "eight paths": ("split", 8, 8, (32, 64, 56, 56), "float32", False),
}

# Those that are compiled again after a ReLU: every kernel is in one of them.
AFTER_RELU = {"ResNet 32 × 32", "ResNet 8 × 8", "ImageNet, NCHW"}

# Kernel -> paths loaded and stored in one step of each of its loops, as multiples of a tile and of a block.
ACCESSES = {
    "cross_connect_resident_fwd_kernel": lambda m, n: {"tile": (m, n)},
    "cross_connect_fused_fwd_kernel": lambda m, n: {"tile": (m, 0), "block": (m, n)},
    "cross_connect_pool_fwd_kernel": lambda m, n: {"tile": (m, 0)},
    "cross_connect_mix_fwd_kernel": lambda m, n: {"block": (m, n)},
    "cross_connect_resident_bwd_kernel": lambda m, n: {"tile": (m + n, m)},
    "cross_connect_fused_bwd_kernel": lambda m, n: {"block": (m + n, 0), "tile": (n, m)},
    "cross_connect_inputs_bwd_kernel": lambda m, n: {"tile": (n, m)},
    "mix_fwd_kernel": lambda m, n: {"block": (m, n)},
    "mix_bwd_kernel": lambda m, n: {"block": (m + n, 0)},
    "sum_predictions_kernel": lambda m, n: {"tile": (m * n, n)},
    "scale_paths_kernel": lambda m, n: {"tile": (2 * n, n + m * n)},
    "sum_gradients_kernel": lambda m, n: {"tile": (m + m * n, m)},
}
OTHERS = {
    "cross_connect_weights_bwd_kernel",
    "sum_parts_kernel",
    "gate_shares_kernel",
    "mixture_em_fwd_kernel",
    "mixture_em_bwd_kernel",
}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and shared memory of the one kernel in a cubin. Registers that spill go to the stack."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}


def compile_all(architecture: int) -> list[dict]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from fastroute.backends.triton import cross_connect as cc
    from fastroute.backends.triton import cross_predict as cp
    from fastroute.backends.triton import gate as gt
    from fastroute.backends.triton import launch_tables as tables
    from fastroute.backends.triton import mix as mx
    from fastroute.backends.triton import mixture_em as em

    class Driver:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", architecture, 32)

    reports = []
    changes = {}

    def compile_only(kernel, grid):
        def launch(*args, **settings):
            compiled = kernel.run(*args, grid=grid, warmup=True, **settings | changes)
            compiled = compiled.result() if hasattr(compiled, "result") else compiled
            report = {"kernel": kernel.fn.__name__, **settings, **resources(compiled.asm["cubin"])}
            report["dynamic_shared"] = compiled.metadata.shared
            for kind, name in (("ld", "wide_loads"), ("st", "wide_stores")):
                report[name] = len(
                    re.findall(rf"{kind}\.global\S*\.v4\.b32|{kind}\.global\S*\.v2\.b64", compiled.asm["ptx"])
                )
            reports.append(report)

        return launch

    triton.runtime.driver.set_active(Driver())
    JITFunction.__getitem__ = compile_only
    cc._chip = lambda device: {80: tables.A100, 90: tables.H100, 100: tables.B200}[architecture]

    def run(case):
        tier, m, n, shape, dtype, last = CASES[case]
        cc._plan = getattr(tables, tier or "plan")
        channels = shape[1]
        reports.clear()
        memory_format = torch.channels_last if last else torch.contiguous_format
        with torch.device("meta"):
            xs = [torch.empty(shape, dtype=getattr(torch, dtype)).to(memory_format=memory_format) for _ in range(m)]
            gate = [torch.empty(size) for size in ((m, 16, channels), (m, 16), (m, n, 16), (m, n))]
            for relu in {False, case in AFTER_RELU}:
                outputs, gates, scores, pooled, hidden = cc.cross_connect(xs, *gate, relu)
                cc.cross_connect_backward(outputs, gates, scores, xs, *gate, gates, pooled, hidden, relu, True)
            if case == "ImageNet, NCHW":
                mx.mix(xs, gates)
                mx.mix_backward(outputs, xs, gates[0], True)
            if case in ("ResNet 8 × 8", "ImageNet, NCHW", "eight paths"):
                gt.gate(xs, *gate)
                gt.gate_backward(gates, scores, xs, *gate, gates, pooled, hidden)
                us, ts = (
                    [torch.cat([x] * b, 1).to(memory_format=memory_format) for x in xs[:1] * a]
                    for a, b in [(m, n), (n, m)]
                )
                cp.sum_predictions(us, gates, pooled.new_empty(shape[0], n, channels), True, outputs)
                cp.scale_paths(outputs, outputs, gates.mT, True, [torch.empty_like(y) for y in outputs], us)
                cp.sum_gradients(ts, xs, gates, [torch.empty_like(x) for x in xs])
        return [report | {"case": case, "m": m, "n": n, "itemsize": xs[0].itemsize} for report in reports]

    def run_mixtures(shape, dtype, given):
        reports.clear()
        with torch.device("meta"):
            scores = torch.empty(shape, dtype=getattr(torch, dtype))
            rows = [torch.empty(shape[1:])] * 3 if given else [None] * 3
            _, posterior, means, scales = em.mixture_em_loss(scores, scores if given else None, *rows, 5.0)
            grad = torch.empty(shape[1:-1])
            em.mixture_em_loss_backward(
                scores, scores if given else None, posterior, means, scales, grad, 5.0, not given
            )
        return [report | {"case": str(shape), "m": 2, "n": 2, "itemsize": scores.itemsize} for report in reports]

    every = [report for case in CASES for report in run(case)]
    for shape, dtype, given in [
        ((128, 10), "float32", False),
        ((128, 4, 4), "bfloat16", True),
        ((64, 1024), "float32", False),
    ]:
        every += run_mixtures(shape, dtype, given)
    changes["maxnreg"] = 32
    return [*every, run("three paths")[1]]  # the last one has to spill


@pytest.fixture(scope="module", params=[80, 90, 100], ids="sm_{}".format)
def reports(request):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    command = [sys.executable, __file__, str(request.param)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_every_kernel_is_compiled(reports):
    assert {report["kernel"] for report in reports} == ACCESSES.keys() | OTHERS


def test_no_spills(reports):
    *reports, squeezed = reports
    assert squeezed["STACK"] > 0, "the report does not show spills"
    for report in reports:
        assert report["STACK"] == report["LOCAL"] == 0, report


def test_registers_and_shared_memory(reports):
    for report in reports[:-1]:
        assert report["REG"] * 32 * report["num_warps"] <= 65536, report
        if report["m"] == report["n"] == 2:
            assert report["REG"] <= 128, report  # two programs of 8 warps, or one of 16, on a multiprocessor
        assert report["SHARED"] + report["dynamic_shared"] <= 48 * 2**10, report  # what needs no opting in


def test_paths_move_in_16_bytes(reports):
    for report in reports[:-1]:
        if report["kernel"] not in ACCESSES or report["case"] == "eight paths":  # 64 accumulators leave one element
            continue
        if report["kernel"] == "cross_connect_inputs_bwd_kernel" and not report["GRAD_INPUTS"]:  # the gates alone
            continue
        values = {"tile": report.get("BC", 0) * report.get("BS", 0), "block": report.get("BLOCK", 0)}
        loads = stores = 0
        for kind, (loaded, stored) in ACCESSES[report["kernel"]](report["m"], report["n"]).items():
            accesses = values[kind] * report["itemsize"] // (16 * 32 * report["num_warps"])
            assert accesses > 0, report
            loads, stores = loads + loaded * accesses, stores + stored * accesses
        if report.get("GRAD_INPUTS") and report["kernel"] == "mix_bwd_kernel":
            stores += report["m"] * accesses
        if report.get("RELU") and report.get("GRAD_INPUTS"):  # X once more, for the signs
            loads += report["m"] * values["tile"] * report["itemsize"] // (16 * 32 * report["num_warps"])
        assert report["wide_loads"] >= loads and report["wide_stores"] == stores, (report, loads, stores)


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
