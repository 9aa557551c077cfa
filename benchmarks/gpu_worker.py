"""Measuring processes of `gpu_check.py`: each runs the cases of one kind and writes their rows.

    python -m benchmarks.gpu_worker measure --backend native --device cuda

Standard output has one JSON object per line, for `supervise.py`, and nothing else.
"""

import argparse
import gc
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_measure import (
    MAPS,
    PATHS,
    brief,
    by_kernel,
    contender,
    device_time,
    draw,
    host_time,
    job,
    step_time,
)
from benchmarks.supervise import BROKEN, NO_DEVICE

ROOT = Path(__file__).resolve().parents[1]
Measurement = tuple[str, Callable[[], Iterable[dict]]]  # name of a case, and a function that yields its rows

# Most important first: a stage that runs out of time loses the last.
SHAPES = {
    "cuda": [
        (256, 64, 56, 56),
        (128, 16, 32, 32),
        (128, 32, 16, 16),
        (128, 64, 8, 8),
        (256, 256, 14, 14),
        (256, 512, 7, 7),
        (1024, 16, 32, 32),
    ],
    "cpu": [(2, 3, 4, 4)],
}
PEERS = {"cuda": [SHAPES["cuda"][k] for k in (0, 1, 3, 4)], "cpu": SHAPES["cpu"][:1]}
STEPS = {  # network, batch, classes, image size
    "cuda": [
        ("resnet20_cc2", 128, 10, 32),
        ("resnet20_cc2", 1024, 10, 32),
        ("resnet18_cc2", 256, 1000, 224),
        ("resnet50_cc2", 256, 1000, 224),
    ],
    "cpu": [("resnet20_cc2", 2, 10, 8)],
}
COMPILED = ("compile", "fastroute compiled")  # contenders of `fastroute.bench.networks` that are compiled
FORMATS = [(torch.bfloat16, "contiguous"), (torch.bfloat16, "channels_last"), (torch.float32, "contiguous")]


class Speaker:
    """Writes one JSON object per line to the original standard output, and redirects all other output to the log."""

    def __init__(self):
        sys.stdout.flush()
        self._stream = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **values) -> None:
        self._stream.write(json.dumps(values) + "\n")
        self._stream.flush()


def serve(cases: Sequence[Measurement], skip: int, say: Callable[..., None], device: str) -> None:
    """Measure the cases after the first `skip`. Errors are rows; an error that breaks the device ends the process."""
    for position, (name, measure) in enumerate(cases):
        if position < skip:
            continue
        say(begin=position, of=len(cases), case=name)
        try:
            for row in measure():
                say(case=name, **row)
        except Exception as error:
            traceback.print_exc()
            say(case=name, error=brief(error))
            del error
            if broken(device):
                say(case=name, note="the device is broken for this process, which ends here")
                os._exit(BROKEN)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def broken(device: str) -> bool:
    """Return whether the device is unusable: after an illegal access, every CUDA call of the process fails."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device=device).item()
    except Exception:
        return True
    return False


def end_with_parent() -> None:
    """End this process when the supervisor has ended."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def machine(options) -> list[Measurement]:
    from fastroute.bench import Result

    device = torch.device(options.device)

    def here():
        if options.device == "cuda" and not torch.cuda.is_available():
            yield {"kind": "machine", "error": NO_DEVICE}
            return
        triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
        yield {"kind": "machine", "triton": triton, "processors": os.cpu_count(), "result": asdict(Result.here(device))}

    return [("machine", here)]


def does_not_serve(backend: str, device: str) -> str | None:
    """Return why a backend cannot be measured on the device, or None."""
    from fastroute.backends import BACKENDS

    return BACKENDS[backend].reason_against(torch.device(device), torch.float32) if backend in BACKENDS else None


def case_name(shape, dtype, layout, direction) -> str:
    return f"{'x'.join(map(str, shape))} {str(dtype)[6:]} {layout} {direction}"


def measured_cases(options) -> list[Measurement]:
    """Return the cases of host time, then of device time at every shape, then of time by kernel."""
    if reason := does_not_serve(options.backend, options.device):
        return [("serves", lambda: [{"error": reason}])]
    host = [(f"host {way}", partial(host_time, options.backend, way, options.device)) for way in MAPS]
    if options.backend in ("default", "eager"):
        return host
    shapes = SHAPES[options.device]
    profiled = [(shapes[0], *FORMATS[0]), (shapes[0], *FORMATS[1]), *((shape, *FORMATS[1]) for shape in shapes[1:2])]
    if options.device == "cpu":
        profiled = profiled[:1]
    return [
        *host,
        *speed_cases(options.backend, shapes, FORMATS, options.device),
        *((case_name(*one, "by kernel"), partial(by_kernel, options.backend, one, options.device)) for one in profiled),
    ]


def speed_cases(backend: str, shapes, formats, device: str) -> list[Measurement]:
    return [
        (case_name(*one), partial(device_time, backend, one, device))
        for one in (
            (shape, *kind, way) for shape in shapes for kind in formats for way in ("forward+backward", "forward")
        )
    ]


def compiled_cases(options) -> list[Measurement]:
    """Return one call for each case of this process, so that kernels are in Triton's cache when timed."""

    def call(case):
        shape, dtype, layout, direction = case
        function, context = contender(options.backend)
        start = time.monotonic()
        with context:
            job(function, direction, *draw(shape, dtype, layout, options.device))()
            if options.device == "cuda":
                torch.cuda.synchronize()
        yield {"kind": "compile", "backend": options.backend, "seconds": time.monotonic() - start}

    cases = [(shape, *kind, "forward+backward") for shape in SHAPES[options.device] for kind in FORMATS]
    return [(case_name(*case), partial(call, case)) for case in cases[options.part :: options.parts]]


class Reporter:
    """pytest plugin that runs a share of the tests, and writes a begin and a row for each."""

    def __init__(self, options, say):
        self.options, self.say, self.positions, self.failed = options, say, {}, False

    def pytest_collection_modifyitems(self, items):
        share = items[self.options.part :: self.options.parts]
        random.Random(0).shuffle(share)  # if time runs out, a sample of all tests has run
        self.positions = {item.nodeid: k for k, item in enumerate(share)}
        items[:] = share[self.options.skip :]

    def pytest_runtest_logstart(self, nodeid):
        self.say(begin=self.positions[nodeid], of=len(self.positions), case=nodeid)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            row = {"kind": "test", "outcome": report.outcome, "seconds": round(report.duration, 2)}
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                row["error"] = (crash.message if crash else str(report.longrepr)).strip()[:400].replace("\n", " / ")
                print(report.longreprtext, file=sys.stderr, flush=True)
            self.say(case=report.nodeid, **row)
            self.failed |= report.failed

    def pytest_runtest_logfinish(self, nodeid):
        if self.failed and broken(self.options.device):
            self.say(case=nodeid, note="the device is broken for this process, which ends here")
            os._exit(BROKEN)
        self.failed = False

    def pytest_collectreport(self, report):
        if report.failed:
            self.say(case=report.nodeid, kind="test", error=str(report.longrepr).strip().splitlines()[-1][:400])


def tests(options, say) -> None:
    """Run a share of the tests that need the device."""
    import pytest

    marks = "gpu" if options.device == "cuda" else "not gpu and not slow and not thorough and not attack"
    flags = ["-q", "-m", marks, "-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors"]
    pytest.main([*flags, *options.files], plugins=[Reporter(options, say)])


SANITIZED = [
    *("tests/backends/cuda_kernels/test_cross_connect.py", "-m", "gpu"),
    *("-k", "optional_gradients or float32_parameters or extreme_scores or refills_its_memory"),
]


def sanitized_cases(options) -> list[Measurement]:
    """Return a case that runs compute-sanitizer on some tests of the native CUDA kernels."""

    def check():
        command = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if command is None:
            what = "error" if options.device == "cuda" else "summary"
            yield {"kind": "sanitizer", what: "not run: compute-sanitizer is not on PATH"}
            return
        program = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SANITIZED]
        kernels = ["--kernel-name", "kns=fastroute", "--target-processes", "all"]
        ended = subprocess.run(
            [command, "--tool", options.tool, *kernels, "--error-exitcode", "9", "--print-limit", "20", *program],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        print(ended.stdout, file=sys.stderr, flush=True)
        yield {"kind": "sanitizer", "exit_status": ended.returncode, **sanitizer_row(ended.stdout, ended.returncode)}

    return [(options.tool, check)]


def sanitizer_row(output: str, status: int) -> dict:
    """Return the summary of a sanitizer; with "error" if it found errors or no test ran."""
    said = re.findall(r"^=+ (.*(?:SUMMARY|Error:|Internal).*)$", output, re.MULTILINE)
    tested = re.search(r"\d+ (?:passed|failed|skipped|error).*", output)
    row = {"summary": " / ".join(said[-2:]), "tests": tested[0] if tested else None}
    if status or " passed" not in (row["tests"] or ""):
        row["error"] = row["summary"] if status and said else f"no test passed (exit status {status})"
    return row


def peers(options) -> list[Measurement]:
    """Return cases of torch.compile of plain routing, and of training steps: eager, compiled, and in CUDA graphs."""
    from fastroute.bench import cases, networks

    cases.COMPILE_MODES.clear()  # the default mode: max-autotune takes minutes
    labels = {"direction": networks.STEP, "dtype": "bfloat16", "layout": "channels_last", "paths": PATHS}

    def contest_of(network, batch, classes, img_size, compile):
        device = torch.device(options.device)
        return networks.contest(
            {**labels, "network": network, "batch": batch}, classes, img_size, compile, device, fused=False
        )

    def warm(*sizes):
        """Fill the compiler's cache."""
        contest = contest_of(*sizes, True)
        for name in COMPILED:
            start = time.monotonic()
            contest.contenders[name]()
            yield {"kind": "compile", "backend": name, "seconds": time.monotonic() - start}

    def steps(compile, network, batch, *sizes):
        row = {"kind": "step", "network": network, "batch": batch}
        contest = contest_of(network, batch, *sizes, compile)
        try:
            contest.check()  # as long as all have taken the same steps
        except Exception as error:
            if broken(options.device):
                raise
            yield {**row, "error": brief(error)}
        for name, step in contest.contenders.items():
            if compile != (name in COMPILED):
                continue
            try:
                yield {**row, "contender": name, **step_time(step, options.device)}
            except Exception as error:  # out of memory or of shared memory, or compilation failed; others may run
                if broken(options.device):
                    raise
                yield {**row, "contender": name, "error": brief(error)}

    networks_ = STEPS[options.device]
    if options.warm:
        # The last, ResNet50, takes half of the device's memory, which the checks beside may need.
        share = networks_[:3][options.part :: options.parts]
        return [(f"{name}, batch {batch}", partial(warm, name, batch, *more)) for name, batch, *more in share]
    names = [f"{name}, batch {batch}: " for name, batch, *_ in networks_]
    shapes = PEERS[options.device]
    return [
        *((f"{name}steps", partial(steps, False, *one)) for name, one in zip(names, networks_, strict=True)),
        *speed_cases("compile", shapes, FORMATS[1:2], options.device),
        *((f"{name}compiled steps", partial(steps, True, *one)) for name, one in zip(names, networks_, strict=True)),
        *speed_cases("compile", shapes, FORMATS[2:], options.device),
    ]


def all_cases(options) -> list[Measurement]:
    """Return all cases of `fastroute bench`, in the order of `ordered`."""
    from fastroute import bench
    from fastroute.bench import cases

    cases.COMPILE_MODES.clear()  # the default mode: max-autotune takes minutes per case

    def measure(case):
        yield {"kind": "row", "row": asdict(bench.measure(case, options.rounds))}

    every = bench.all_cases(torch.device(options.device))
    if options.suite:
        every = [case for case in every if case.suite == options.suite]
    return [(case.id, partial(measure, case)) for case in ordered(every)]


def ordered(cases: list) -> list:
    """Sort cases: the default selection, then those of README, then the rest in random order, to spread it evenly."""
    shuffled = random.Random(0).sample(cases, len(cases))
    return sorted(shuffled, key=lambda case: (not case.quick, not case.stated))


KINDS = {
    "machine": machine,
    "compile": compiled_cases,
    "measure": measured_cases,
    "sanitize": sanitized_cases,
    "peers": peers,
    "full": all_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*KINDS, "tests"])
    parser.add_argument("files", nargs="*", help="test files")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--backend", help="triton, native, reference, default, eager or compile")
    parser.add_argument("--warm", action="store_true", help="for `peers`: only compile")
    parser.add_argument("--tool", default="memcheck", help="tool of compute-sanitizer")
    parser.add_argument("--part", type=int, default=0, help="index of this share of the cases")
    parser.add_argument("--parts", type=int, default=1, help="number of shares")
    parser.add_argument("--rounds", type=int, help="timed rounds of each case of `full`")
    parser.add_argument("--suite", help="for `full`: only the cases of this suite")
    parser.add_argument("--skip", type=int, default=0, help="number of cases to skip")
    options = parser.parse_args()
    speaker = Speaker()
    end_with_parent()
    if options.kind == "tests":
        tests(options, speaker.say)
    else:
        from fastroute.bench import without_tf32

        without_tf32()
        serve(KINDS[options.kind](options), options.skip, speaker.say, options.device)
    sys.stderr.flush()
    os._exit(0)  # skip the teardown of the device


if __name__ == "__main__":
    main()
