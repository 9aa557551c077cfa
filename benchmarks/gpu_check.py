"""Check a machine with an NVIDIA GPU: tests, host time, device time, profile and sanitizer, each with a time limit.

    python benchmarks/gpu_check.py                    # --quick, at most 4½ minutes
    python benchmarks/gpu_check.py --peers            # torch.compile and whole training steps, at most 4½ minutes
    python benchmarks/gpu_check.py --quick --peers    # both, at most 7 minutes: compiles beside the tests
    python benchmarks/gpu_check.py --full --minutes 6 # all cases of `fastroute bench`, most important first

Each row is appended to OUTPUT/rows.jsonl at once, and printed; of tests and compilations, which have thousands, only
errors are. The same folder gets logs and, at the end, a summary (summary.txt, summary.json; with --full also full.json,
for `fastroute bench show`). Errors are rows, and a case that hangs or kills its process loses only that case. The exit
status is 1 if a row is an error, 2 without a GPU.

First build the CUDA libraries on that machine; one ninja builds all sources, and MAX_JOBS limits it:

    FASTROUTE_BUILD_CPU=0 TORCH_CUDA_ARCH_LIST=9.0 python setup.py build_ext --inplace

Alternatively, build on a machine with the same torch and Python, and copy _C.so and _C_cuda.so into
fastroute/backends/native.

`--device cpu` is a dry run without a GPU, on tiny shapes: wall clock instead of CUDA graphs, Triton's interpreter,
other tests. Its times are meaningless.
"""

import argparse
import json
import math
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works in a checkout without installation

from benchmarks.gpu_rows import HOST_BUDGET, Speeds, of_kind, outcomes  # noqa: E402
from benchmarks.supervise import NO_DEVICE, Job, Rows, Stage, Supervisor, line  # noqa: E402

TRITON_TESTS, NATIVE_TESTS = "tests/backends/triton_kernels", "tests/backends/cuda_kernels"


def other_tests() -> list[str]:
    """Return the test files outside of the kernels' folders that have tests for a card.

    Search their text for the mark: importing all files takes half a minute on a loaded machine.
    """
    files = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(ROOT.glob("tests/**/test_*.py"))}
    kernels = (f"{TRITON_TESTS}/", f"{NATIVE_TESTS}/")
    return [name for name, text in files.items() if "pytest.mark.gpu" in text and not name.startswith(kernels)]


class Plan:
    """Stages of a run on a device, and their jobs."""

    def __init__(self, device: str, tests: list[str] | None, processors: int):
        self.device, self.tests, self.processors = device, tests, processors

    def machine(self) -> Stage:
        return Stage("machine", 20, [self._job("machine", "machine")])

    def quick(self, peers: bool = False) -> list[Stage]:
        """Return the stages of --quick, and with `peers` also its: untimed jobs run in parallel, timed ones alone."""
        checks = [*self._tests(), *self._compilers(), *self._sanitizers()]
        return [
            Stage("checks", 105, [*checks, *(self._peers_compilers() if peers else [])]),
            Stage("native", 50, [self._measure("native")]),
            Stage("triton", 58, [self._measure("triton")]),
            Stage("default", 18, [self._measure("default")]),
            Stage("eager", 18, [self._measure("eager")]),
            *([self._peers()] if peers else []),
        ]

    def peers(self) -> list[Stage]:
        return [Stage("compile-peers", 110, self._peers_compilers()), self._peers()]

    def _peers(self) -> Stage:
        return Stage("peers", 130, [self._job("peers", "peers", case_seconds=110)])

    def _peers_compilers(self) -> list[Job]:
        """Return jobs that put into the compiler's cache what the stage of the peers compiles."""
        return self._shares("compile-peers", 3, "peers", "--warm", case_seconds=110)

    def full(self, minutes: float, *arguments: object) -> list[Stage]:
        return [Stage("full", 60 * minutes, [self._job("full", "full", *arguments, case_seconds=90)])]

    def _job(self, name: str, kind: str, *arguments: object, threads: int | None = None, **limits) -> Job:
        command = [sys.executable, "-m", "benchmarks.gpu_worker", kind, *map(str, arguments), "--device", self.device]
        environment = {"TRITON_INTERPRET": "1"} if self.device == "cpu" else {}
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        return Job(name, command, environment, ROOT, **limits)

    def _shares(self, name: str, of_16: int, kind: str, *arguments: object, case_seconds: float = 40) -> list[Job]:
        """Return jobs that divide the cases among them: `of_16` jobs on 16 processors."""
        parts = max(1, self.processors * of_16 // 16)
        shares = [("--part", k, "--parts", parts) for k in range(parts)]
        return [
            self._job(f"{name}-{k}", kind, *arguments, *share, threads=1, case_seconds=case_seconds, quiet=True)
            for k, share in enumerate(shares)
        ]

    def _tests(self) -> list[Job]:
        if self.tests:
            return self._shares("tests", 1, "tests", *self.tests)
        return [
            *self._shares("triton-tests", 6, "tests", TRITON_TESTS),
            *self._shares("native-tests", 4, "tests", NATIVE_TESTS),
            *self._shares("other-tests", 1, "tests", *other_tests()),
        ]

    def _compilers(self) -> list[Job]:
        return self._shares("compile", 4, "compile", "--backend", "triton")

    def _sanitizers(self) -> list[Job]:
        tools = ("memcheck", "racecheck", "synccheck")
        return [self._job(tool, "sanitize", "--tool", tool, threads=1, case_seconds=100) for tool in tools]

    def _measure(self, backend: str) -> Job:
        return self._job(backend, "measure", "--backend", backend, case_seconds=20)


def summary(rows: list[dict], clock: list[dict]) -> str:
    """Return a summary of about 50 lines."""
    return "\n\n".join(
        filter(
            None, [_machine(rows), _tests(rows), _host(rows), _speed(rows), _steps(rows), _errors(rows), _clock(clock)]
        )
    )


def _machine(rows: list[dict]) -> str:
    lines = []
    for row in of_kind(rows, "machine"):
        if "result" in row:
            here = row["result"]
            versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
            lines.append(f"{here['machine']['processor']}: {versions}, triton {row['triton']}; commit {here['commit']}")
    return "\n".join(lines)


def _tests(rows: list[dict]) -> str:
    counts = outcomes(rows)
    lines = [f"tests: {', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))}"] if counts else []
    for row in of_kind(rows, "sanitizer"):
        lines.append(f"{row['case']}: {row.get('error') or row['summary']} ({row.get('tests') or 'no tests'})")
    return "\n".join(lines)


def _host(rows: list[dict]) -> str:
    host = {(row["backend"], row["direction"]): row["us"] for row in of_kind(rows, "host")}
    ways = list(dict.fromkeys(way for _, way in host))
    lines = [
        f"{backend:24}"
        + "".join(f"{host.get((backend, way), math.nan):18.1f}" for way in ways)
        + (f"   budget {', '.join(str(HOST_BUDGET[backend][way]) for way in ways)}" if backend in HOST_BUDGET else "")
        for backend in dict.fromkeys(backend for backend, _ in host)
    ]
    return "\n".join([f"{'host, µs a call':24}" + "".join(f"{way:>18}" for way in ways), *lines]) if host else ""


def _speed(rows: list[dict]) -> str:
    """Format microseconds and the share of the copy's speed, by case and backend; the copy is the least of its size."""
    speeds = Speeds(of_kind(rows, "speed"))
    lines = []
    for case in speeds.cases:
        for way in ("forward+backward", "forward"):
            times = [speeds.us(case, way, backend) for backend in speeds.backends]
            if any(us is not None for us in times):
                copy_us = speeds.copy_us(case, way)
                cells = [" " * 17 if us is None else f"{us:11.1f} {copy_us / us:5.2f}" for us in times]
                lines.append(f"{f'{case} {way}':52}{copy_us:8.1f}" + "".join(cells))
    heading = f"{'device, µs and share of the copy':52}{'copy':>8}" + "".join(f"{n:>17}" for n in speeds.backends)
    return "\n".join([heading, *lines]) if lines else ""


def _steps(rows: list[dict]) -> str:
    lines = []
    for row in of_kind(rows, "step"):
        if "ms" in row:
            graph = f"{row['graph_ms']:10.2f}" if "graph_ms" in row else f"  {row['not_in_a_graph'][:60]}"
            name = f"{row['network']}, {row['batch']}"
            peak = f"{row['peak_mib']:12.0f}" if "peak_mib" in row else ""
            lines.append(f"{name:20}{row['contender']:20}{row['ms']:10.2f}{graph}{peak}")
    return "\n".join([f"{'whole steps, ms':40}{'loop':>10}{'graph':>10}{'peak, MiB':>12}", *lines]) if lines else ""


def _errors(rows: list[dict], most: int = 15) -> str:
    errors = [row for row in rows if "error" in row]
    if not errors:
        return "no errors"
    lines = [line({**row, "error": row["error"][:120]}) for row in errors[:most]]
    more = [f"… and {len(errors) - most} more: see rows.jsonl"] if len(errors) > most else []
    return "\n".join([f"{len(errors)} errors", *lines, *more])


def _clock(clock: list[dict]) -> str:
    stages = ", ".join(f"{part['stage']} {part['took_s']:.0f} of {part['budget_s']:.0f}" for part in clock)
    took, budget = (sum(part[name] for part in clock) for name in ("took_s", "budget_s"))
    return f"clock, s: {stages}; in all {took:.0f} of {budget:.0f}"


def save(folder: Path, rows: list[dict], clock: list[dict], arguments: dict) -> None:
    """Write summary.json and, for --full, the result in the format of `fastroute bench`."""
    errors = [row for row in rows if "error" in row]
    values = {"arguments": arguments, "clock": clock, "rows": len(rows), "errors": errors}
    (folder / "summary.json").write_text(json.dumps(values, indent=1) + "\n")
    measured = [row["row"] for row in of_kind(rows, "row")]
    if measured:
        nothing = {"machine": {}, "versions": {}, "commit": None}  # that stage may have failed
        result = next((row["result"] for row in of_kind(rows, "machine") if "result" in row), nothing)
        result |= {"settings": {**arguments, "failures": [line(row) for row in errors]}, "rows": measured}
        (folder / "full.json").write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="tests, host and device time, profile, sanitizer (default)"
    )
    parser.add_argument("--peers", action="store_true", help="torch.compile, and whole training steps")
    parser.add_argument("--full", action="store_true", help="all cases of `fastroute bench`, within --minutes")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="run only these of the chosen stages")
    parser.add_argument("--minutes", type=float, default=6, help="for --full")
    parser.add_argument("--rounds", type=int, help="timed rounds of each case of --full; by default those of its suite")
    parser.add_argument("--suite", help="for --full: only the cases of this suite")
    parser.add_argument(
        "--tests", nargs="+", metavar="PATH", help="run these tests instead of all that need the device"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu for a dry run")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"), help="folder of rows, logs and summary")
    options = parser.parse_args()
    tests = options.tests or (["tests/ops/test_gate.py"] if options.device == "cpu" else None)
    plan = Plan(options.device, tests, os.cpu_count() or 1)
    quick = options.quick or not (options.peers or options.full)
    stages = plan.quick(options.peers) if quick else plan.peers() if options.peers else []
    more = [f"--{name}={value}" for name in ("rounds", "suite") if (value := getattr(options, name)) is not None]
    stages += plan.full(options.minutes, *more) if options.full else []
    if options.stages:
        names = [stage.name for stage in stages]
        if unknown := set(options.stages) - set(names):
            parser.error(f"--stages names {', '.join(sorted(unknown))}; the stages of this run are {', '.join(names)}")
        stages = [stage for stage in stages if stage.name in options.stages]
    stages = [plan.machine(), *stages]
    options.output.mkdir(parents=True, exist_ok=True)
    budgets = ", ".join(f"{stage.name} {stage.seconds:g}" for stage in stages)
    print(f"budgets, s: {budgets}; in all {sum(stage.seconds for stage in stages):g}", flush=True)

    rows = Rows(options.output / "rows.jsonl", lambda text: print(text, flush=True))
    supervisor = Supervisor(rows, options.output)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, supervisor.stop)
    supervisor.run(stages[:1])
    if any(row.get("error") == NO_DEVICE for row in rows.all):
        parser.exit(2, f"gpu_check: {NO_DEVICE}; use `--device cpu` for a dry run\n")
    supervisor.run(stages[1:])
    save(options.output, rows.all, supervisor.clock, {**vars(options), "output": str(options.output)})
    text = summary(rows.all, supervisor.clock)
    (options.output / "summary.txt").write_text(text + "\n")
    print(f"\n{text}", flush=True)
    return int(any("error" in row for row in rows.all))


if __name__ == "__main__":
    sys.exit(main())
