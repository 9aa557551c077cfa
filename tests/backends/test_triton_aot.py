"""The Triton kernels compiled ahead of time, without a card: registers, spills, shared memory, accesses and barriers.

Run as a program with an architecture and a set of cases, this file calls the operators on tensors without memory, has
every launch compile for that architecture in place of running, and prints what the compiler says of it. That takes a
process of its own: the other tests may have told Triton to interpret.
"""

import importlib.metadata
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

ROOT = Path(__file__).parents[2]

CASES = {  # tier or None for the plan's choice, m, n, (N, C, H, W), dtype, channels_last
    "ResNet 32 × 32": (None, 2, 2, (128, 16, 32, 32), "float32", False),
    "ResNet 8 × 8": (None, 2, 2, (128, 64, 8, 8), "bfloat16", True),
    "three paths": ("fused", 3, 3, (256, 32, 16, 16), "float32", False),
    "one program a multiprocessor": ("fused", 2, 2, (100, 32, 16, 16), "bfloat16", True),
    "ImageNet, NCHW": (None, 2, 2, (32, 64, 56, 56), "float32", False),
    "ImageNet, channels_last": (None, 2, 2, (32, 64, 56, 56), "bfloat16", True),
    "full registers": (None, 3, 2, (128, 16, 32, 16), "float32", True),
    "half of the warps": (None, 3, 3, (128, 16, 32, 16), "bfloat16", True),
    "too many for registers": (None, 4, 2, (128, 16, 32, 16), "float32", True),
    "eight paths": ("split", 8, 8, (32, 64, 56, 56), "float32", False),
}

# The stages of the ResNets of CIFAR and ImageNet between which paths are routed: batch, and (channels, side).
STAGES = {
    "ResNet20": (128, ((16, 32), (32, 16), (64, 8))),
    "ResNet18": (256, ((64, 56), (128, 28), (256, 14), (512, 7))),
    "ResNet50": (256, ((256, 56), (512, 28), (1024, 14), (2048, 7))),
}


def stage_cases() -> dict[str, tuple]:
    return {
        f"{network} {channels}×{side}×{side} {dtype} {'channels_last' if last else 'NCHW'}": (
            None,
            2,
            2,
            (STAGES[network][0], channels, side, side),
            dtype,
            last,
        )
        for network in STAGES
        for channels, side in STAGES[network][1]
        for dtype in ("bfloat16", "float32")
        for last in (False, True)
    }


MIXTURES = [((128, 10), "float32", False), ((128, 4, 4), "bfloat16", True), ((64, 1024), "float32", False)]

# Every kernel is in one of these. They are compiled again after a ReLU.
AFTER_RELU = {"ResNet 32 × 32", "ResNet 8 × 8", "ImageNet, NCHW"}

SETS = {
    "kernels": {name: CASES[name] for name in ("three paths", *sorted(AFTER_RELU))},
    "cases": CASES,
    "stages": stage_cases(),
}

# Kernel -> paths loaded and stored in one step of each of its loops, as multiples of a tile and of a block.
ACCESSES = {
    "cross_connect_resident_fwd_kernel": lambda m, n: {"tile": (m, n)},
    "cross_connect_fused_fwd_kernel": lambda m, n: {"tile": (m, 0), "block": (m, n)},
    "cross_connect_pool_fwd_kernel": lambda m, n: {"tile": (m, 0)},
    "cross_connect_resident_bwd_kernel": lambda m, n: {"tile": (m + n, m)},
    "cross_connect_fused_bwd_kernel": lambda m, n: {"block": (m + n, 0), "tile": (n, m)},
    "cross_connect_inputs_bwd_kernel": lambda m, n: {"tile": (n, m)},
    "mix_fwd_kernel": lambda m, n: {"block": (m, n)},
    "mix_bwd_kernel": lambda m, n: {"block": (m + n, 0)},
    "sum_predictions_kernel": lambda m, n: {"tile": (m * n, n)},
    "scale_paths_kernel": lambda m, n: {"tile": (2 * n, n + m * n)},
    "sum_gradients_kernel": lambda m, n: {"tile": (m + m * n, m)},
}
# Kernel and layout -> barriers before paths are stored, 2 paths to 2. A sum over warps has two, as has a change of
# layout.
MOST_BARRIERS = {
    "cross_connect_resident_fwd_kernel": {"first": 13, "last": 19},
    "cross_connect_resident_bwd_kernel": {"first": 11, "last": 11},
    "cross_connect_fused_fwd_kernel": {"flat": 40, "last": 24},
    "cross_connect_fused_bwd_kernel": {"first": 13, "flat": 13, "last": 13},
    "cross_connect_inputs_bwd_kernel": {"first": 0, "flat": 0, "last": 0},
    "mix_fwd_kernel": {None: 0},
}
OTHERS = {
    "cross_connect_weights_bwd_kernel",
    "cross_connect_gate_fwd_kernel",
    "cross_connect_gate_bwd_kernel",
    "sum_parts_kernel",
    "mixture_em_fwd_kernel",
    "mixture_em_bwd_kernel",
}


# Bytes per thread that Triton 3.6 keeps on the stack where all registers are in use, and 3.8 does not: their assemblers
# differ. By architecture, case and kernel; the float32 stage of ResNet20 is the first case under another name.
SPILLED_BY_OLDER = {
    (80, "ResNet 32 × 32", "cross_connect_resident_fwd_kernel"): 16,
    (90, "ResNet 32 × 32", "cross_connect_resident_fwd_kernel"): 16,
    (90, "ResNet20 16×32×32 float32 NCHW", "cross_connect_resident_fwd_kernel"): 16,
    (90, "ResNet20 16×32×32 bfloat16 channels_last", "cross_connect_resident_fwd_kernel"): 16,
    (80, "eight paths", "cross_connect_gate_bwd_kernel"): 40,
    (90, "eight paths", "cross_connect_gate_bwd_kernel"): 24,
}


def resources(cubin: bytes) -> dict[str, int]:
    """Of the one kernel in a cubin: registers, stack, shared memory, barriers, and those before its first wide store.

    Spilled registers are on the stack. What is stored after the paths, such as the gates, delays no path.
    """
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    stores = [match.start() for match in re.finditer(r"\bSTG\S*\.(?:64|128|256)\b", code)] or [len(code)]
    barriers = [match.start() for match in re.finditer(r"\bBAR\.SYNC", code)]
    return counts | {"barriers": len(barriers), "barriers_before_paths": sum(at < stores[0] for at in barriers)}


def accesses(ptx: str, kind: str) -> dict[int, int]:
    """Bytes of an access to global memory -> how many there are."""
    counts = {}
    for vector, bits in re.findall(rf"\b{kind}\.global\S*?(?:\.v(\d))?\.[busf](\d+)\b", ptx):
        width = int(vector or 1) * int(bits) // 8
        counts[width] = counts.get(width, 0) + 1
    return counts


def compile_all(architecture: int, cases: dict[str, tuple]) -> list[dict]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from fastroute.backends.triton import cross_connect as cc
    from fastroute.backends.triton import cross_predict as cp
    from fastroute.backends.triton import gate as gt
    from fastroute.backends.triton import mix as mx
    from fastroute.backends.triton import mixture_em as em
    from fastroute.backends.triton import planning as tables

    class Driver:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", architecture, 32)

    reports = []
    changes = {}
    known = {}
    older = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
    constants = {"architecture": architecture, "programs": tables.PROGRAMS_PER_SM, "older_triton": older}

    def describe(compiled) -> dict:
        cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
        if cubin not in known:
            known[cubin] = resources(cubin) | {"loads": accesses(ptx, "ld"), "stores": accesses(ptx, "st")}
            known[cubin]["waits"] = ptx.count("griddepcontrol.wait")
        return known[cubin] | {"dynamic_shared": compiled.metadata.shared}

    def compile_only(kernel, grid):
        def launch(*args, **settings):
            compiled = kernel.run(*args, grid=grid, warmup=True, **settings | changes)
            compiled = compiled.result() if hasattr(compiled, "result") else compiled
            reports.append({"kernel": kernel.fn.__name__, "grid": grid, **settings, **describe(compiled), **constants})

        return launch

    triton.runtime.driver.set_active(Driver())
    JITFunction.__getitem__ = compile_only
    cc._chip = lambda device: {80: tables.A100, 90: tables.H100, 100: tables.B200}[architecture]

    def run(case):
        tier, m, n, shape, dtype, last = cases[case]
        cc._plan = getattr(tables, tier or "plan")
        channels = shape[1]
        reports.clear()
        memory_format = torch.channels_last if last else torch.contiguous_format
        with torch.device("meta"):
            xs = [torch.empty(shape, dtype=getattr(torch, dtype)).to(memory_format=memory_format) for _ in range(m)]
            gate = [torch.empty(size) for size in ((m, 16, channels), (m, 16), (m, n, 16), (m, n))]
            for relu in {False, case in AFTER_RELU}:
                outputs, gates, scores, pooled, hidden = cc.cross_connect(xs, *gate, relu)
                forward = len(reports)
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
        sizes = {"m": m, "n": n, "itemsize": xs[0].itemsize, "forward_launches": forward}
        return [report | {"case": case} | sizes for report in reports]

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

    every = [report for case in cases for report in run(case)]
    if cases is SETS["stages"]:
        return every
    for mixture in MIXTURES:
        every += run_mixtures(*mixture)
    changes["maxnreg"] = 32
    return [*every, run("three paths")[1]]  # the last one has to spill


def reports_of(architecture: int, name: str) -> list[dict]:
    """Return what the compiler says of a set of cases; kept until the kernels, Triton or this file change."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from tests.artefacts import artefact

    def build(folder: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
        command = [sys.executable, __file__, str(architecture), name]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
        assert result.returncode == 0, result.stderr
        (folder / "reports.json").write_text(result.stdout.splitlines()[-1])

    sources = [Path(__file__), *sorted((ROOT / "fastroute" / "backends" / "triton").glob("*.py"))]
    versions = [torch.__version__, importlib.metadata.version("triton")]
    folder = artefact(f"triton-sm_{architecture}-{name.replace(' ', '-')}", [*sources, *versions], build)
    reports = json.loads((folder / "reports.json").read_text())
    for report in reports:
        for kind in ("loads", "stores"):
            report[kind] = {int(width): count for width, count in report[kind].items()}
    return reports


def sets(*compiled: tuple) -> dict:
    """Parameters of a fixture: architecture, set, and the marks of the tests that use it."""
    return {
        "params": [
            pytest.param((architecture, name), marks=[getattr(pytest.mark, mark) for mark in marks])
            for architecture, name, *marks in compiled
        ],
        "ids": lambda pair: f"sm_{pair[0]}, {pair[1]}",
    }


@pytest.fixture(
    scope="module",
    **sets(
        (80, "kernels", "thorough"),
        (80, "cases", "slow"),
        (90, "cases", "thorough", "oldest"),
        (100, "kernels", "thorough"),
        (100, "cases", "slow"),
    ),
)
def reports(request):
    return reports_of(*request.param)


@pytest.fixture(
    scope="module",
    **sets(
        (80, "stages", "slow"),
        (90, "stages", "thorough"),
        (100, "stages", "slow"),
    ),
)
def stages(request):
    return reports_of(*request.param)


def test_every_kernel_is_compiled(reports):
    assert {report["kernel"] for report in reports} == ACCESSES.keys() | OTHERS


def check_resources(report):
    launch = report["architecture"], report["case"], report["kernel"]
    spilled = SPILLED_BY_OLDER.get(launch, 0) if report["older_triton"] else 0
    assert report["STACK"] <= spilled and report["LOCAL"] == 0, report
    assert report["REG"] * 32 * report["num_warps"] <= 65536, report
    if report["m"] == report["n"] == 2:
        assert report["REG"] <= 128, report  # two programs of 8 warps, or one of 16, on a multiprocessor
    assert report["SHARED"] + report["dynamic_shared"] <= 48 * 2**10, report  # what needs no opting in


def check_widths(report):
    """Paths are loaded and stored in 16 bytes, but for rows that only a smaller number divides."""
    if report["kernel"] not in ACCESSES:
        return
    factor = report.get("UNIT", 16) if report.get("LAYOUT") == "first" else 16
    widths = {"tile": min(16, factor * report["itemsize"]), "block": 16}
    assert widths["tile"] >= 8, report
    values = {"tile": report.get("BC", 0) * report.get("BS", 0), "block": report.get("BLOCK", 0)}

    def steps(kind):
        each = values[kind] * report["itemsize"] // (widths[kind] * 32 * report["num_warps"])
        assert each > 0, report
        return each

    loads, stores = ({8: 0, 16: 0} for _ in range(2))
    for kind, (loaded, stored) in ACCESSES[report["kernel"]](report["m"], report["n"]).items():
        loads[widths[kind]] += loaded * steps(kind)
        stores[widths[kind]] += stored * steps(kind)
    if report.get("GRAD_INPUTS") and report["kernel"] == "mix_bwd_kernel":
        stores[16] += report["m"] * steps("block")
    writes_inputs = report.get("GRAD_INPUTS") or report["kernel"] == "cross_connect_inputs_bwd_kernel"
    if report.get("RELU") and writes_inputs:  # X once more, for the signs
        loads[widths["tile"]] += report["m"] * steps("tile")
    for kind, expected in (("loads", loads), ("stores", stores)):
        for width, count in expected.items():
            at_least = sum(n * (wide // width) for wide, n in report[kind].items() if wide >= width)
            assert at_least >= count, (report, kind, expected)
        if report["itemsize"] == 2:
            assert 2 not in report[kind], report


def test_no_spills(reports):
    assert reports[-1]["STACK"] > 0, "the report does not show spills"


def test_resources_and_widths(reports):
    for report in reports[:-1]:
        check_resources(report)
        if report["case"] != "eight paths":  # 64 accumulators leave one element
            check_widths(report)


def test_chains(reports):
    """Launches that hand on to each other wait for the one before; on older chips nothing is chained."""
    chained = [report for report in reports if report.get("CHAINED")]
    assert {report["waits"] > 0 for report in chained} <= {True}
    assert not any(report["waits"] for report in reports if not report.get("CHAINED"))
    kernels = {"pool_fwd", "gate_fwd", "gate_bwd", "inputs_bwd"}
    expected = {"mix_fwd_kernel", "mix_bwd_kernel"} | {f"cross_connect_{name}_kernel" for name in kernels}
    first = {report["kernel"] for report in chained if not report["launch_pdl"]}
    assert not chained or first == {"cross_connect_pool_fwd_kernel", "mix_bwd_kernel"}
    assert {report["kernel"] for report in chained} == (expected if chained else set())
    assert bool(chained) == (reports[0]["architecture"] >= 90)


def test_programs_that_share_a_multiprocessor(stages):
    """The launch tables count on so many."""
    names = {"pool_fwd": "pool", "mix_fwd": "mix", "mix_bwd": "products", "inputs_bwd": "inputs"}
    seen = set()
    for report in stages:
        name = names.get(report["kernel"].removeprefix("cross_connect_").removesuffix("_kernel"))
        if name:
            granted = 8 * -(-report["REG"] // 8)  # a thread is given registers in eights
            seen.add(name)
            assert report["programs"][name] * granted * 32 * report["num_warps"] <= 65536, report
    assert seen == set(names.values())


def test_stages(stages):
    assert {report["case"] for report in stages} in [cases.keys() for cases in SETS.values()]
    for report in stages:
        check_resources(report)
        check_widths(report)


def test_barriers(stages):
    """Threads wait for each other where they compute sums, and never in the two kernels that only weight and add."""
    for report in stages:
        if most := MOST_BARRIERS.get(report["kernel"]):
            assert report["barriers_before_paths"] <= most[report.get("LAYOUT")], report


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), SETS[sys.argv[2]])))
