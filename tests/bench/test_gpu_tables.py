"""The result file of a run on a card, and the tables made of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_variants, write_gpu_tables
from benchmarks.gpu_rows import Speeds, load, read, result_of, save
from fastroute.bench import report

REPOSITORY = Path(__file__).parents[2]
CASE = "256x64x56x56 bfloat16"
TESTS = "tests/backends/cuda_kernels/test_mix.py::test_mix"


def speed(case, us, copy_us, backend="native", **more):
    row = {"kind": "speed", "case": case, "backend": backend, "us": us, "copy_us": copy_us, "share_of_copy": 0.0}
    return {**row, "off": 1e-3, "eager_off": 2e-3, **more}


def step(contender, **more):
    return {"kind": "step", "case": "steps", "network": "resnet20_cc2", "contender": contender, "batch": 128, **more}


@pytest.fixture
def rows():
    machine = {"processor": "A Card", "capability": "sm_90"}
    versions = {"fastroute": "0.1.0", "torch": "2.11", "python": "3.12", "cuda": "13.0"}
    here = {"machine": machine, "versions": versions, "commit": "0123abcdef", "settings": {}, "rows": []}
    every = [
        {"case": "machine", "kind": "machine", "triton": "3.6.0", "result": here},
        {"kind": "test", "case": f"{TESTS}[a]", "outcome": "failed", "error": "once"},
        *({"kind": "test", "case": f"{TESTS}[{name}]", "outcome": "passed"} for name in "ab"),
        {"kind": "test", "case": "tests/ops/test_gate.py::test_gate", "outcome": "skipped"},
        {"kind": "test", "case": f"{TESTS.replace('cuda', 'triton')}[a]", "outcome": "failed", "error": "off"},
        {"kind": "sanitizer", "case": "memcheck", "summary": "ERROR SUMMARY: 0 errors", "tests": "10 passed, 3 more"},
        {"job": "other-tests-0", "error": "killed"},
        {"kind": "host", "case": "host forward", "backend": "native", "direction": "forward", "us": 38.25},
        speed(f"{CASE} contiguous forward", 200.0, 170.0),
        speed(f"{CASE} contiguous forward+backward", 500.0, 330.0),
        speed(f"{CASE} channels_last forward", 190.0, 150.0, "triton"),
        speed(f"{CASE} channels_last forward", 600.0, 151.0, "compile"),
        step("eager", ms=30.0, graph_ms=20.0),
        step("compile", ms=15.0, not_in_a_graph="no"),
        step("fastroute", ms=24.0, graph_ms=10.0),
        step("fastroute compiled", ms=12.0, graph_ms=8.0),
        step("no routing", error="out of memory"),
        {"kind": "profile", "case": "by kernel", "backend": "native", "kernel": "a", "calls": 1.0, "us": 0.0},
        {"kind": "profile", "case": "by kernel", "backend": "native", "kernel": "b", "calls": 1.0, "us": 1.5},
    ]
    return [{"at": 1.0, "stage": "stage", **row} for row in every]


@pytest.fixture
def result(rows):
    return result_of(rows, date="2026-11-27", driver="580", command="gpu_check.py")


def cells(text, start):
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_result_keeps_what_matters(result, tmp_path):
    path = tmp_path / "new" / "a.json"
    save(result, path)
    kept = load(path)
    assert list(path.parent.iterdir()) == [path]
    assert kept == result and kept["commit"] == "0123abcdef" and kept["versions"]["triton"] == "3.6.0"
    mix = {"file": "tests/backends/cuda_kernels/test_mix.py", "passed": 2}  # the last run of a test counts
    assert mix in kept["tests"] and kept["errors"] == [{"where": "other-tests-0", "error": "killed"}]
    assert [row["kernel"] for row in kept["profile"]] == ["b"] and not {"at", "share_of_copy"} & kept["speed"][0].keys()


def test_other_files_are_no_results(tmp_path):
    for reads in (load, read):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            reads(tmp_path / "a.json")
        (tmp_path / "b.json").write_text("{")
        with pytest.raises(ValueError, match=r"b.json; it must be a"):
            reads(tmp_path / "b.json")
    with pytest.raises(ValueError, match="no row describes the machine"):
        result_of([])


def test_shares_are_of_the_least_copy(rows):
    speeds = Speeds(row for row in rows if row.get("kind") == "speed")
    case = f"{CASE} contiguous"
    assert speeds.copy_us(case, "forward") == 150.0 and speeds.share(case, "forward", "native") == 0.75
    assert speeds.disturbed(case, "forward", "native") and not speeds.disturbed(case, "forward+backward", "native")
    assert speeds.us(case, "backward", "native") == 300.0
    assert speeds.copy_us(case, "backward") == 210.0  # 6 maps, between 150 for 4 and 330 for 10
    assert speeds.share(case, "backward", "triton") is speeds.us(case, "forward", "triton") is None
    line = next(text for text in gpu_check.summary(rows, []).splitlines() if text.startswith(f"{case} forward "))
    assert line.split()[-3:] == ["150.0", "200.0", "0.75"]


def test_tables(rows, result):
    text = write_gpu_tables.status(result)
    assert text.startswith(
        "A Card (sm_90): torch 2.11, Triton 3.6.0, CUDA 13.0, driver 580, Python 3.12, commit 0123abc"
    )
    assert cells(text, "`mix`") == ["`mix`", "native", "yes", "2", ""]
    assert "1 failed" in text and "- `memcheck`: ERROR SUMMARY: 0 errors (10 passed)" in text and "killed" in text
    text = write_gpu_tables.device(result)
    assert cells(text, "256×64×56×56 bfloat16 NCHW")[1:] == ["150", "200† (0.75)", "", "210", "300† (0.70)", ""]
    assert cells(text.split("\n\n")[1], "256×64×56×56 bfloat16 channels_last")[1:] == ["forward", "600", "190", "3.16"]
    assert cells(write_gpu_tables.host(result), "native") == ["native", "38.2", "12", "", "50"]
    host = next(line for line in gpu_check.summary(rows, []).splitlines() if line.startswith("native "))
    assert host.split()[1:] == ["38.2", "budget", "12"]
    text = write_gpu_tables.steps(result)
    assert cells(text, "`resnet20_cc2`, batch 128 | fastroute ")[2:] == ["24.00", "0.80", "10.00", "0.50"]
    assert cells(text, "`resnet20_cc2`, batch 128 | fastroute, compiled")[2:] == ["12.00", "0.80", "8.00", ""]
    assert cells(text, "`resnet20_cc2`, batch 128 | plain, compiled")[2:] == ["15.00", "1.00", "not captured", ""]
    assert cells(text, "`resnet20_cc2`, batch 128 | no routing")[2:] == ["failed", "", "failed", ""]
    assert "Not measured yet" in write_gpu_tables.steps({"step": []})


def test_steps_of_one_network_differ_by_batch(result):
    larger = [{**row, "batch": 1024, "ms": 2 * row["ms"]} for row in result["step"] if "ms" in row]
    unequal = {"case": "steps", "network": "resnet20_cc2", "batch": 1024, "error": "they differ"}
    text = write_gpu_tables.steps({"step": [*result["step"], unequal, *larger]})
    assert cells(text, "`resnet20_cc2`, batch 128  | fastroute ")[2:] == ["24.00", "0.80", "10.00", "0.50"]
    assert cells(text, "`resnet20_cc2`, batch 1024 | fastroute ")[2:4] == ["48.00", "0.80"]
    assert text.endswith("Not compared with plain PyTorch: `resnet20_cc2`, batch 1024: they differ.")


def test_predictions_are_read_from_their_pages(result):
    pages = [(REPOSITORY / name).read_text() for name in write_gpu_tables.EXPECTED]
    native, triton = write_gpu_tables.predictions_native(pages[0]), write_gpu_tables.predictions_triton(pages[1])
    assert len(native) == 2 * 19 and len(triton) == 2 * 44
    assert native["256x512x7x7 bfloat16 contiguous", "backward"] == 36
    assert {"128x16x32x32 float32 channels_last", "256x64x56x56 bfloat16 contiguous"} <= {case for case, _ in triton}
    text = write_gpu_tables.predicted(result, *pages)
    assert cells(text, "256×64×56×56 bfloat16 NCHW")[1:3] == ["**154 → 200†, +30 %**", "**229 → 300†, +31 %**"]
    assert "(bold): 2 of 3, 2 of native and 0 of Triton" in text


def test_builds_are_compared_by_their_least_times():
    def row(build, us, copy_us, direction="forward"):
        return {"build": build, "case": f"{CASE} contiguous relu", "direction": direction, "us": us, "copy_us": copy_us}

    rows = [row("old", 250.0, 150.0), row("old", 240.0, 180.0), row("new", 200.0, 160.0), row("new", 300.0, 160.0)]
    text = write_gpu_tables.tuning({"rows": [*rows, row("new", 400.0, 200.0, "backward")]})
    assert cells(text, "256×64×56×56 bfloat16 NCHW relu")[1:] == ["240 (0.62)", "200 (0.75)", "", "400 (0.50)"]


def test_builds_are_not_timed_without_a_card(tmp_path):
    def ended(*arguments):
        command = [sys.executable, REPOSITORY / "benchmarks/gpu_variants.py", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    missing = ended(f"new={tmp_path}")
    assert missing.returncode == 2 and "there is no _C.so and no _C_cuda.so; build with" in missing.stderr
    for name in ("_C.so", "_C_cuda.so"):
        (tmp_path / name).touch()
    if not torch.cuda.is_available():
        assert (ended(f"new={tmp_path}").returncode, "no CUDA device" in ended(f"new={tmp_path}").stderr) == (2, True)


def test_a_build_that_fails_loses_only_its_rows(tmp_path, monkeypatch, capsys):
    row = {"case": CASE, "direction": "forward", "us": 2.0, "copy_us": 1.0}
    for name in ("_C.so", "_C_cuda.so"):
        (tmp_path / name).touch()

    def run(command, **_):
        good = len(runs) != 1
        runs.append(command)
        return subprocess.CompletedProcess(
            command, 0 if good else -6, f"{json.dumps(row)}\n{'' if good else '{'}".encode()
        )

    runs, output = [], tmp_path / "a.json"
    monkeypatch.setattr(gpu_variants.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Card")
    builds = [f"{name}={tmp_path}" for name in ("old", "new")]
    monkeypatch.setattr(sys, "argv", ["gpu_variants", *builds, "--output", str(output)])
    assert gpu_variants.main() == 1
    kept = json.loads(output.read_text())["rows"]
    assert [(row["build"], row["turn"]) for row in kept] == [("old", 0), ("new", 0), ("old", 1), ("new", 1)]
    assert "new: turn 0 ended early: exit status -6" in capsys.readouterr().err


def test_all_is_written_by_one_command(rows, tmp_path, monkeypatch, capsys):
    lines, page, written = tmp_path / "rows.jsonl", tmp_path / "page.md", tmp_path / "a.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.write_text(write_gpu_tables.PAGE.read_text())
    where = ["--result", str(written), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["write_gpu_tables", str(lines), "--date", "2026-11-27", *where])
    write_gpu_tables.main()
    assert "A Card" in page.read_text() and "<!-- status: a.json -->" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["write_gpu_tables", *where])
    text = page.read_text()
    write_gpu_tables.main()
    assert page.read_text() == text
    monkeypatch.setattr(sys, "argv", ["write_gpu_tables", str(lines), *where])
    with pytest.raises(SystemExit):
        write_gpu_tables.main()
    assert "--date is missing" in capsys.readouterr().err
    page.write_text("")
    monkeypatch.setattr(sys, "argv", ["write_gpu_tables", *where])
    with pytest.raises(SystemExit, match="it must have <!-- status: RESULT -->"):
        write_gpu_tables.main()


def test_the_page_has_the_tables_of_the_committed_result():
    """If not, run `python -m benchmarks.write_gpu_tables`."""
    page, result = write_gpu_tables.PAGE, write_gpu_tables.RESULT
    variants = json.loads(write_gpu_tables.VARIANTS.read_text())
    for topic, text in write_gpu_tables.sections(load(result), variants).items():
        assert report.with_section(page, topic, result, text) == page.read_text(), topic
