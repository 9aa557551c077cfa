"""The run on a card: its supervisor with workers of ours, and all of it rehearsed on the CPU."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check, gpu_measure, gpu_worker
from benchmarks.supervise import BROKEN, Job, Rows, Stage, Supervisor
from fastroute import bench
from fastroute.bench import Result

REPOSITORY = Path(__file__).parents[2]

# Each case is a line of Python. It begins and says rows as `gpu_worker` does, without the seconds to import torch.
WORKER = """
import json, os, signal, subprocess, sys, time
cases = json.loads(sys.argv[1])
def say(**values):
    print(json.dumps(values), flush=True)
for k in range(int(sys.argv[3]), len(cases)):
    say(begin=k, of=len(cases), case=f"case {k}")
    exec(cases[k])
"""
ROW = "say(case=f'case {k}', us=1.5)"


def job(*cases, name="job", **limits):
    return Job(name, [sys.executable, "-c", WORKER, json.dumps(cases)], **{"case_seconds": 20, **limits})


class Run:
    def __init__(self, folder):
        self.folder, self.said = folder, []
        self.rows = Rows(folder / "rows.jsonl", self.said.append)
        self.supervisor = Supervisor(self.rows, folder)

    def stage(self, *jobs, seconds=20.0, name="stage"):
        self.supervisor.run([Stage(name, seconds, jobs)])
        return [(row.get("case"), row.get("error")) for row in self.rows.all]

    def kept(self):
        return [json.loads(text) for text in (self.folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_rows_are_kept_and_printed_as_they_come(run, tmp_path):
    wait = f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)"
    thread = threading.Thread(target=run.stage, args=(job(ROW, wait, ROW),))
    thread.start()
    end = time.monotonic() + 60
    while not (run.kept() and run.said) and time.monotonic() < end:
        time.sleep(0.01)
    assert [row["case"] for row in run.kept()] == ["case 0"] and thread.is_alive()
    assert run.said[0].endswith("stage job case 0 us=1.5")
    (tmp_path / "go").touch()
    thread.join()
    assert [row["case"] for row in run.kept()] == ["case 0", "case 2"] and len(run.said) == 2


@pytest.mark.parametrize(
    "dies, how",
    [("os._exit(7)", "exit status 7"), ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"), ("1 / 0", "exit status 1")],
)
def test_a_process_that_dies_is_a_row_and_the_next_case_is_measured(run, dies, how):
    ended = run.stage(job(ROW, f"print('last words', file=sys.stderr); {dies}", ROW))
    assert [case for case, _ in ended] == ["case 0", "case 1", "case 2"]
    assert f"the process died: {how}" in ended[1][1] and ended[0][1] is ended[2][1] is None
    assert ("ZeroDivisionError" if how == "exit status 1" else "last words") in ended[1][1]


def test_a_process_whose_device_is_broken_has_said_so(run):
    ended = run.stage(job(f"say(case='case 0', error='illegal memory access'); os._exit({BROKEN})", ROW))
    assert ended == [("case 0", "illegal memory access"), ("case 1", None)]


def test_a_worker_that_cannot_begin_is_not_begun_forever(run):
    ended = run.stage(Job("job", [sys.executable, "-c", "raise SystemExit('no such thing')"]), seconds=60)
    assert len(ended) == 1 and "exit status 1; its log ends: no such thing" in ended[0][1]
    assert run.supervisor.clock[0]["took_s"] < 30


def test_a_case_that_hangs_costs_itself_alone(run):
    ended = run.stage(job(ROW, "time.sleep(1000)", ROW, case_seconds=4))
    assert ended == [("case 0", None), ("case 1", "killed: it took over 4 s"), ("case 2", None)]


def test_a_start_that_hangs_says_so(run):
    starts = [sys.executable, "-c", f"import sys, time; time.sleep(1000 * (sys.argv[3] != '0')){WORKER}"]
    dies = json.dumps([ROW, "os._exit(7)", ROW])
    ended = run.stage(Job("job", [*starts, dies], start_seconds=3))
    assert [case for case, _ in ended] == ["case 0", "case 1", None]
    assert ended[2][1] == "killed: its start took over 3 s"


def test_a_stage_is_killed_at_its_budget_with_all_its_children(run, tmp_path):
    alive = tmp_path / "alive"
    child = f"import os, time\nwhile True: open({str(alive)!r}, 'w').write(str(time.time())); time.sleep(0.05)"
    hang = f"subprocess.Popen([sys.executable, '-c', {child!r}], process_group=0) if k == 1 else 0; time.sleep(1000)"
    hang = hang.replace(", process_group=0", ", preexec_fn=os.setpgrp")
    ended = run.stage(job(ROW, hang, ROW, name="hangs"), job(ROW, name="ends"), seconds=3)
    assert sorted(ended, key=str)[-1] == ("case 1", "the stage's time is over; 2 of 3 cases were begun")
    assert len(ended) == 3 and 3 <= run.supervisor.clock[0]["took_s"] < 60
    assert alive.exists()
    last = alive.read_text()
    time.sleep(0.3)
    assert alive.read_text() == last


def test_all_stages_keep_to_the_sum_of_their_budgets(run):
    hangs = [Stage(f"stage {k}", seconds, [job("time.sleep(1000)")]) for k, seconds in enumerate((1, 1.5))]
    start = time.monotonic()
    run.supervisor.run([Stage("short", 4.0, [job(ROW)]), *hangs])
    assert 6.4 <= time.monotonic() - start < 60
    assert [part["budget_s"] for part in run.supervisor.clock] == [4.0, 1, 1.5]
    assert run.supervisor.clock[1]["took_s"] > 1.2  # what the short one left


def test_a_run_that_is_stopped_ends_at_once(run):
    threading.Timer(1, run.supervisor.stop).start()
    run.supervisor.run([Stage("a", 100, [job("time.sleep(1000)")]), Stage("b", 100, [job(ROW)])])
    assert [row["error"] for row in run.rows.all] == [
        "the stage's time is over; 1 of 1 cases were begun",
        "the stage's time is over; no case was begun",
    ]


def test_rows_of_an_earlier_run_are_kept(tmp_path):
    for number in range(3):
        Rows(tmp_path / "rows.jsonl", str).add({"number": number})
    files = {path.name: json.loads(path.read_text())["number"] for path in tmp_path.iterdir()}
    assert files == {"rows.1.jsonl": 0, "rows.2.jsonl": 1, "rows.jsonl": 2}


def test_rows_without_an_error_may_be_kept_silently(run):
    run.stage(job(ROW, "say(case='case 1', error='wrong')", quiet=True))
    assert len(run.kept()) == 2 and len(run.said) == 1 and "wrong" in run.said[0]


def test_an_exception_is_a_row():
    said = []

    def fails():
        yield {"us": 1}
        raise RuntimeError("out of resources:\n\n shared memory")

    cases = [("fails", fails), ("does", lambda: [{"us": 2}])]
    gpu_worker.serve(cases, 0, lambda **row: said.append(row), "cpu")
    rows = [row for row in said if "begin" not in row]
    error = "RuntimeError: out of resources: / shared memory"
    assert rows == [{"case": "fails", "us": 1}, {"case": "fails", "error": error}, {"case": "does", "us": 2}]
    said.clear()
    gpu_worker.serve(cases, 1, lambda **row: said.append(row), "cpu")
    assert said == [{"begin": 1, "of": 2, "case": "does"}, {"case": "does", "us": 2}]


def test_a_step_that_fails_is_a_row_and_the_others_are_timed(monkeypatch):
    def fails():
        raise ValueError("out of resources")

    contest = SimpleNamespace(contenders={"eager": fails, "fastroute": lambda: None}, check=fails)
    monkeypatch.setattr(bench.networks, "contest", lambda *_, **__: contest)
    monkeypatch.setattr(bench.cases, "COMPILE_MODES", {})
    (_, measure), *_ = gpu_worker.peers(SimpleNamespace(device="cpu", warm=False))
    differ, failed, timed = measure()
    assert differ["error"] == failed["error"] == "ValueError: out of resources"
    assert failed["contender"] == "eager" and timed["contender"] == "fastroute" and timed["ms"] >= 0


def test_wrong_results_are_rows():
    tensors = gpu_measure.draw((2, 3, 4, 4), torch.float32, "contiguous", "cpu")

    def plain_job(*tensors):
        return gpu_measure.job(bench.operators.plain.cross_connect, "forward+backward", *tensors)

    right = plain_job(*tensors)()
    row = gpu_measure.accuracy(right, plain_job, tensors)
    assert row.keys() == {"off", "eager_off"} and 0 < row["off"] < 1e-5
    wrong = [result.detach().clone() for result in right]
    wrong[3].view(-1)[5] += 1
    row = gpu_measure.accuracy(wrong, plain_job, tensors)
    assert row["error"].startswith("wrong: result 3 is off by") and row["off"] > 1e-2
    wrong[3].view(-1)[5] = torch.nan
    assert "error" in gpu_measure.accuracy(wrong, plain_job, tensors)


@pytest.mark.parametrize(
    "output, status, error",
    [
        ("12 passed in 3 s\n========= ERROR SUMMARY: 0 errors\n", 0, None),
        ("1 failed\n========= ERROR SUMMARY: 3 errors\n", 9, "ERROR SUMMARY: 3 errors"),
        ("========= RACECHECK SUMMARY: 1 hazard displayed\n12 passed\n", 9, "RACECHECK SUMMARY: 1 hazard displayed"),
        ("========= Error: Device not supported\n", 1, "Error: Device not supported"),
        ("12 deselected\n", 0, "no test passed (exit status 0)"),
        ("", -9, "no test passed (exit status -9)"),
    ],
)
def test_what_a_sanitizer_says_is_understood(output, status, error):
    assert gpu_worker.sanitizer_row(output, status).get("error") == error


@pytest.mark.thorough
def test_sanitizers_meet_clusters_that_take_several_samples():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *gpu_worker.SANITIZED]
    collected = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY).stdout.splitlines()
    refills = [line for line in collected if "::test_a_cluster_refills_its_memory[" in line]
    assert len(refills) == 4 and all("[card-" in line for line in refills)


def test_the_quick_plan_is_short_and_one_process_measures_at_a_time():
    stages = [(plan := gpu_check.Plan("cuda", None, 16)).machine(), *plan.quick()]
    assert sum(stage.seconds for stage in stages) <= 270
    assert [len(stage.jobs) for stage in stages if stage.name not in ("machine", "checks")] == [1] * 4
    names = [job.name for stage in stages for job in stage.jobs]
    assert len(set(names)) == len(names) and {"memcheck", "racecheck", "triton-tests-5", "native-tests-3"} <= set(names)


@pytest.mark.thorough
def test_no_test_for_a_card_is_left_out():
    ignored = [f"--ignore={folder}" for folder in (gpu_check.TRITON_TESTS, gpu_check.NATIVE_TESTS)]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    collected = subprocess.run([*command, *ignored], capture_output=True, text=True, cwd=REPOSITORY).stdout
    files = {line.partition("::")[0] for line in collected.splitlines() if "::" in line}
    assert files and files <= set(gpu_check.other_tests())


def test_full_begins_with_what_matters():
    cases = bench.all_cases(torch.device("cpu"))
    ordered = gpu_worker.ordered(cases)
    quick = sum(case.quick for case in cases)
    assert all(case.quick for case in ordered[:quick]) and ordered[quick].stated
    assert sorted(case.id for case in ordered) == sorted(case.id for case in cases)


def gpu_check_run(*arguments):
    command = [sys.executable, "benchmarks/gpu_check.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so where there is no card")
def test_it_needs_a_card(tmp_path):
    ended = gpu_check_run("--output", tmp_path)
    assert ended.returncode == 2 and "gpu_check: this machine has no CUDA device that torch can use" in ended.stderr


def test_unknown_stages_are_said(tmp_path):
    ended = gpu_check_run("--output", tmp_path, "--stages", "native", "nothing")
    assert ended.returncode == 2 and "--stages names nothing; the stages of this run are checks, native" in ended.stderr


def rows_of(folder, **labels):
    rows = map(json.loads, (folder / "rows.jsonl").read_text().splitlines())
    return [row for row in rows if labels.items() <= row.items()]


def test_it_is_rehearsed_on_the_cpu(tmp_path):
    ended = gpu_check_run("--device", "cpu", "--output", tmp_path, "--tests", "tests/ops/test_cases.py")
    assert ended.stdout.startswith("budgets, s: machine 20, checks 105, ")
    assert {row["outcome"] for row in rows_of(tmp_path, kind="test")} == {"passed"}
    serving = [name for name in ("native", "triton") if not rows_of(tmp_path, stage=name, case="serves")]
    for name in serving:
        assert len(rows_of(tmp_path, kind="speed", backend=name)) == 6
        assert rows_of(tmp_path, kind="profile", backend=name)
    for name in (*serving, "default", "eager"):
        assert len(rows_of(tmp_path, kind="host", backend=name)) == 2
    errors = [row for row in rows_of(tmp_path) if "error" in row]
    assert all(row["case"] == "serves" for row in errors), errors
    assert json.loads((tmp_path / "summary.json").read_text())["errors"] == errors
    summary = (tmp_path / "summary.txt").read_text()
    assert ended.stdout.endswith(summary) and ended.returncode == bool(errors)
    assert "tests: 5 passed" in summary and "host, µs a call" in summary and len(summary.splitlines()) < 60


def test_the_full_run_writes_a_result(tmp_path):
    ended = gpu_check_run("--device", "cpu", "--full", "--suite", "overhead", "--rounds", 1, "--output", tmp_path)
    assert ended.returncode == 0, ended.stdout
    written = Result.load(tmp_path / "full.json")
    assert len(written.rows) == 2 and written.settings["failures"] == [] and written.settings["rounds"] == 1


@pytest.mark.slow
def test_peers_are_rehearsed_on_the_cpu(tmp_path):
    ended = gpu_check_run("--device", "cpu", "--peers", "--output", tmp_path)
    assert ended.returncode == 0, ended.stdout
    assert len(rows_of(tmp_path, kind="speed", backend="compile")) == 4
    contenders = [row["contender"] for row in rows_of(tmp_path, kind="step")]
    assert contenders == ["fastroute", "no routing", "eager", "compile", "fastroute compiled"]


def test_rows_are_kept_if_the_machine_is_unknown(tmp_path):
    for first in ([], [{"kind": "machine", "stage": "machine", "at": 1.0, "error": "killed at its budget"}]):
        rows = [*first, {"kind": "row", "row": {"suite": "operators", "labels": {"a": 1}, "ms": {"fastroute": 1.0}}}]
        gpu_check.save(tmp_path, rows, [], {})
        assert Result.load(tmp_path / "full.json").rows[0].ms == {"fastroute": 1.0}
