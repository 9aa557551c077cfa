"""Supervision of measuring processes: rows are saved at once, and every case and stage has a time limit.

A worker (see `gpu_worker.py`) writes JSON objects to its standard output, one per line: before case k
`{"begin": k, "of": n, "case": name}`, then the rows. All other output goes to its log. If it dies, or a case exceeds
its limit, a row says so, and a new process begins at the next case.
"""

import contextlib
import itertools
import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

NO_DEVICE = "this machine has no CUDA device that torch can use"
BROKEN = 3  # exit status of a worker whose device is broken, after it has written a row about it


@dataclass(frozen=True)
class Job:
    """A command, run as one process at a time with the option `--skip K`, the number of cases already begun.

    folder: working directory.
    case_seconds, start_seconds: time limits of a case, and of the start before the first case.
    quiet: whether to print only rows with an error; all rows are saved.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    case_seconds: float = 30
    start_seconds: float = 60  # on a loaded machine, to import torch alone takes 20
    quiet: bool = False


@dataclass(frozen=True)
class Stage:
    """Jobs that run in parallel, with a common time limit."""

    name: str
    seconds: float
    jobs: Sequence[Job]


class Rows:
    """Rows so far; each new one is printed and appended to a file at once.

    An earlier run's file of that name is kept, as `rows.1.jsonl` and so on.
    """

    def __init__(self, path: Path, say: Callable[[str], None]):
        self.all: list[dict] = []
        self._start, self._say, self._lock = time.monotonic(), say, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size:
            number = next(k for k in itertools.count(1) if not path.with_stem(f"{path.stem}.{k}").exists())
            path.rename(path.with_stem(f"{path.stem}.{number}"))
        self._file = path.open("w")

    def add(self, row: dict, quiet: bool = False) -> None:
        row = {"at": round(time.monotonic() - self._start, 1), **row}
        with self._lock:
            self.all.append(row)
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            if "error" in row or not quiet:
                self._say(line(row))


def line(row: dict) -> str:
    """Format a row as one line of text."""
    words = [f"{row['at']:6.1f}", *(str(row[key]) for key in ("stage", "job", "case") if key in row)]
    rest = {key: value for key, value in row.items() if key not in ("at", "stage", "job", "case")}
    return " ".join([*words, *(f"{key}={_short(value)}" for key, value in rest.items())])


def _short(value) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else f"{text[:200]} …"


class Supervisor:
    """Runs stages one after the other within their time limits, and collects the rows of their processes."""

    def __init__(self, rows: Rows, folder: Path):
        self.rows, self.folder = rows, folder
        self.clock: list[dict] = []  # budget and actual seconds of each stage
        self._end, self._stopped = time.monotonic(), False

    def run(self, stages: Sequence[Stage]) -> None:
        """Run the stages. Unused time goes to later stages; the total is limited by the sum of the budgets."""
        for stage in stages:
            start, self._end = time.monotonic(), self._end + stage.seconds
            with ThreadPoolExecutor(max(1, len(stage.jobs))) as pool:
                for ended in [pool.submit(self._run, stage.name, job) for job in stage.jobs]:
                    ended.result()
            took = round(time.monotonic() - start, 1)
            self.clock.append({"stage": stage.name, "budget_s": stage.seconds, "took_s": took})

    def stop(self, *_) -> None:
        """Stop as if all time limits were reached; usable as a signal handler."""
        self._stopped = True

    def left(self) -> float:
        """Return the seconds until the current stage must end."""
        return 0.0 if self._stopped else max(0.0, self._end - time.monotonic())

    def _run(self, stage: str, job: Job) -> None:
        """Run all cases of a job, with as many processes as needed."""
        labels = {"stage": stage} if job.name == stage else {"stage": stage, "job": job.name}
        done, total, case = 0, None, {}
        with (self.folder / f"{stage}-{job.name}.log").open("ab") as log:
            while True:
                if not self.left():
                    cases = f"{done} of {total} cases were begun" if total else "no case was begun"
                    self.rows.add({**labels, **case, "error": f"the stage's time is over; {cases}"})
                    return
                begun, case = done, {}
                with _Process(job, done, log) as process:
                    for value in process.values(self.left):
                        if "begin" in value:
                            done, total, case = value["begin"] + 1, value["of"], {"case": value["case"]}
                        else:
                            self.rows.add({**labels, **value}, job.quiet)
                    reason = process.reason(self.left)
                if reason is None:
                    return
                if reason:
                    self.rows.add({**labels, **case, "error": reason})
                # The next process would have no cases, or die before its first case again.
                if self.left() and done in (begun, total):
                    return


class _Process:
    """A worker in its own session, by which all its children can be found."""

    def __init__(self, job: Job, skip: int, log):
        self._job, self._log, self._late, self._begun = job, log, False, False
        self._popen = subprocess.Popen(
            [*job.command, "--skip", str(skip)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=job.folder,
            env={**os.environ, **job.environment, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Kill the worker and all processes of its session."""
        while members := _session(self._popen.pid):
            for member in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL)
        self._popen.wait()
        self._popen.stdout.close()

    def values(self, left: Callable[[], float]) -> Iterator[dict]:
        """Yield the worker's objects until it ends, a case reaches its limit, or no time is left."""
        limit, buffer, stdout = time.monotonic() + self._job.start_seconds, b"", self._popen.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(min(left(), 0.2)):
                    if self._popen.poll() is not None:  # its children may still hold the pipe
                        return
                    if not left() or time.monotonic() > limit:
                        self._late = True
                        return
                    continue
                if not (chunk := os.read(stdout.fileno(), 1 << 16)):
                    return
                *lines, buffer = (buffer + chunk).split(b"\n")
                for text in lines:
                    value = _value(text)
                    if value is None:
                        self._log.write(text + b"\n")
                        self._log.flush()
                        continue
                    if "begin" in value:
                        limit, self._begun = time.monotonic() + self._job.case_seconds, True
                    yield value

    def reason(self, left: Callable[[], float]) -> str | None:
        """Return why cases are missing: None if all are done, "" if a row says so or the stage's time is over."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if not self._late:
                code = self._popen.wait(min(left(), 10))
                if code in (0, BROKEN):
                    return None if code == 0 else ""
                how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                return f"the process died: {how}; its log ends: {self._last_line()}"
        if not left():
            return ""
        if not self._begun:
            return f"killed: its start took over {self._job.start_seconds:g} s"
        return f"killed: it took over {self._job.case_seconds:g} s"

    def _last_line(self) -> str:
        lines = Path(self._log.name).read_text(errors="replace").split("\n")
        return next((text.strip()[:200] for text in reversed(lines) if text.strip()), "(nothing)")


def _session(leader: int) -> list[int]:
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(session) == leader and state != "Z":
            members.append(int(stat.parent.name))
    return members


def _value(text: bytes) -> dict | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
