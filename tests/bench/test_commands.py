import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import write_tables
from benchmarks.test_overhead import check
from fastroute import bench
from fastroute.bench import Result, overhead
from fastroute.bench.operators import FORWARD
from fastroute.cli import app

REPOSITORY = Path(__file__).parents[2]
TINY = "*-1x16x4x4-2x2"


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPOSITORY / "benchmarks").glob("*.py")))
def test_every_script_can_be_imported(name):
    importlib.import_module(f"benchmarks.{name}")


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})


def test_bench_measures_shows_and_compares(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "REPEATS", 1)
    result = run("-k", TINY, "--device", "cpu", "--rounds", 1, "--output", tmp_path, "--name", "a")
    assert result.exit_code == 0, result.output
    assert "1/2 cross_connect-forward-" in result.output and "geometric mean" in result.output
    assert not (tmp_path / "a.partial.json").exists()
    written = Result.load(tmp_path / "a.json")
    assert [row.suite for row in written.rows] == ["overhead"] * 2 and written.settings["rounds"] == 1
    assert written.machine["device"] == "cpu" and written.versions["torch"] == str(torch.__version__)
    result = run("compare", tmp_path / "a.json", tmp_path / "a.json")
    assert result.exit_code == 0 and "1.00" in result.output, result.output
    assert "× kernel" in run("show", tmp_path / "a.json").output


def test_what_was_measured_is_kept_if_the_run_is_stopped(tmp_path, monkeypatch):
    def stop(case, rounds):
        if (tmp_path / "a.partial.json").exists():
            raise KeyboardInterrupt
        return measure(case, rounds)

    monkeypatch.setattr(overhead, "REPEATS", 1)
    measure = bench.measure
    monkeypatch.setattr(bench, "measure", stop)
    run("-k", TINY, "--device", "cpu", "--rounds", 1, "--output", tmp_path, "--name", "a")
    assert len(Result.load(tmp_path / "a.partial.json").rows) == 1


def test_tables_are_written_into_a_page(tmp_path, make_result, monkeypatch, capsys):
    make_result().save(tmp_path / "a.json")
    (tmp_path / "README.md").write_text("<!-- speed: a.json -->\n<!-- end of speed -->\n")
    monkeypatch.setattr(sys, "argv", ["write_tables", str(tmp_path / "a.json"), "--page", str(tmp_path / "README.md")])
    write_tables.main()
    assert "A Processor" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").unlink()
    with pytest.raises(SystemExit, match="there is no such file"):
        write_tables.main()


def test_a_wrong_result_is_said_and_fails(tmp_path, monkeypatch):
    def wrong(xs, *parameters):
        return [2 * x + 0 * sum(p.sum() for p in parameters) for x in xs]

    monkeypatch.setattr(overhead.plain, "cross_connect", wrong)
    result = run("-k", TINY, "--device", "cpu", "--output", tmp_path, "--name", "a")
    assert result.exit_code == 1 and result.output.count("AssertionError: result 0 is off") == 2, result.output
    assert Result.load(tmp_path / "a.json").rows == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("-k", "none*"), "no case matches 'none*': --full --list prints them all"),
        (("--device", "nonsense"), "nonsense"),
        (("--rounds", 0), "--rounds"),
        (("show", "/nowhere.json"), "result is /nowhere.json; there is no such file"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output, result.output


def test_selections_are_listed():
    quick, stated = (run("--list", "--device", "cpu", *more).output.split() for more in ((), ("--stated",)))
    assert 4 < len(quick) <= 28 and len(stated) == 48
    steps = run("--list", "--device", "cpu", "--steps").output.split()
    assert len(steps) == 48 and all("resnet" in case or "base_cnn" in case for case in steps)
    assert set(stated) < set(run("--list", "--device", "cpu", "--full").output.split())


def test_stated_cases_are_those_of_the_committed_result():
    committed = Result.load(REPOSITORY / "benchmarks" / "results" / "cpu_epyc_2core.json")
    assert {row.id for row in committed.rows} == set(run("--list", "--device", "cpu", "--stated").output.split())


def test_pytest_measures_the_same_cases(tmp_path):
    path = tmp_path / "b.json"
    # Other tests run beside this one, so nothing here may depend on how long a call takes.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/test_overhead.py",
        "--rounds=2",
        "--device=cpu",
        "--no-budget",
        f"--benchmark-json={path}",
    ]
    # As a worker of pytest-xdist, pytest-benchmark would measure nothing.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["FASTROUTE_OPTIMIZE"] = "0"  # half the time to compile the CUDA kernels' host code
    ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "| cross_connect" in ended.stdout and "× kernel" in ended.stdout
    measured = json.loads(path.read_text())["benchmarks"]
    assert len(measured) == 2 and measured[0]["stats"]["rounds"] == 2
    info = measured[0]["extra_info"]
    assert info["ms"].keys() == {"fastroute", "kernel", "eager"}
    once = 1e3 * measured[0]["stats"]["max"] / info["calls_in_a_round"]
    assert 0 < info["ms"]["fastroute"] <= once


def test_a_call_over_its_budget_fails():
    check("native", FORWARD, ours=12, eager=73)
    check("native", FORWARD, ours=23, eager=146)  # a machine half as fast has twice the budget
    for ours, eager in ((12.1, 73), (12.1, 10), (24.1, 146)):
        with pytest.raises(AssertionError, match=r"native, forward: .* µs, and .* are allowed"):
            check("native", FORWARD, ours, eager)


def test_on_a_card_a_slow_plain_pytorch_allows_no_more():
    for backend, budget in (("native", 12), ("triton", 40)):
        check(backend, FORWARD, ours=budget, eager=259, device="cuda")
        with pytest.raises(AssertionError, match=f"{backend}, forward: .* µs, and {budget}.0 are allowed"):
            check(backend, FORWARD, ours=budget + 0.1, eager=259, device="cuda")
    check("reference", FORWARD, ours=600, eager=146, device="cuda")
