"""Two processes on the CPU, through Gloo."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=300)


def run(*launcher, **arguments):
    module = ("-m", "tests.training.distributed_run", json.dumps(arguments, default=str))
    return start((*map(str, launcher or (sys.executable,)), *module))


def rows(path):
    with path.open() as file:
        return [{name: float(value) for name, value in row.items() if name != "router"} for row in csv.DictReader(file)]


def test_two_processes_match_one_with_twice_the_batch(image_folder, tmp_path):
    """Also if layers are left without gradients, by the network's own loss ("Phased") or in every step ("Idle").

    They share a launch, since each process imports for five seconds.
    """
    networks = {"Network": {}, "Sparse": {}, "Clustered": {}, "Phased": {}, "Idle": {"find_unused_parameters": True}}
    one = run(folder=image_folder, output=tmp_path / "one", batch_size=8, networks=networks)
    two = run(*TORCHRUN, folder=image_folder, output=tmp_path / "two", batch_size=4, networks=networks, save_ranks=True)
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    assert "unused" not in two.stderr and "Grad strides" not in two.stderr
    clocks = {"images_per_s", "data_wait", "seconds"}
    for network in networks:
        expected, actual = tmp_path / "one" / network, tmp_path / "two" / network
        own_loss = network == "Phased"
        for name in ("summary.csv",) if own_loss else ("summary.csv", "routers.csv"):
            lines, others = rows(expected / name), rows(actual / name)
            assert len(lines) == len(others) > 0 and lines[0].keys() >= {"epoch"}
            for row, other in zip(lines, others, strict=True):
                assert {k: v for k, v in other.items() if k not in clocks} == pytest.approx(
                    {k: v for k, v in row.items() if k not in clocks}, rel=1e-4, abs=1e-5
                ), (network, name)
        assert own_loss or "train_aux" in rows(actual / "summary.csv")[0]
        first, second = (torch.load(actual / f"rank{rank}.pt") for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first), network
        for name, value in torch.load(expected / "last.ckpt")["state_dict"].items():
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)


def test_says_what_to_do_about_layers_without_gradients(image_folder, tmp_path):
    refused = run(*TORCHRUN, folder=image_folder, output=tmp_path, batch_size=4, network="Idle")
    assert refused.returncode != 0
    assert "set it to True (--find-unused-parameters)" in refused.stderr


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_resumes_within_an_epoch_bit_for_bit_in_every_process(image_folder, tmp_path, processes):
    """Batch norm, its moving average, and the sums of the epoch stay those of each process."""
    options = {"network": "Normed", "model_ema_decay": 0.5, "dist_bn": "", "save_ranks": True, "recovery_interval": 1}
    stop = (1, 2 if processes == 2 else 1)  # three have two batches of the 24 images
    result = run(*TORCHRUN[:-1], processes, folder=image_folder, output=tmp_path, batch_size=4, stop=stop, **options)
    assert result.returncode == 0, result.stderr
    whole, halves = (
        [torch.load(tmp_path / name / f"rank{rank}.pt") for rank in range(processes)] for name in ("whole", "halves")
    )
    assert not torch.equal(whole[0]["model.stem.1.running_mean"], whole[1]["model.stem.1.running_mean"])
    for expected, actual in zip(whole, halves, strict=True):
        assert all(
            torch.equal(value, actual[name]) for name, value in expected.items() if isinstance(value, torch.Tensor)
        )
    clocks = {"images_per_s", "data_wait", "seconds"}
    summaries = [rows(tmp_path / name / "summary.csv") for name in ("whole", "halves")]
    for expected, actual in zip(*summaries, strict=True):
        assert {k: v for k, v in expected.items() if k not in clocks} == {
            k: v for k, v in actual.items() if k not in clocks
        }
    saved = [torch.load(tmp_path / name / "last.ckpt") for name in ("whole", "halves")]
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, saved[1][key][name]) for name, value in saved[0][key].items())
        assert saved[0]["ranks"][1][key].keys() >= {"model.stem.1.running_mean", "model.stem.1.running_var"}


@pytest.mark.slow
@pytest.mark.parametrize("how, same", [("reduce", True), ("broadcast", True), ("", False)])
def test_synchronises_batch_norm_on_request(image_folder, tmp_path, how, same):
    options = {"network": "Normed", "model_ema_decay": 0.5, "dist_bn": how, "save_ranks": True}
    result = run(*TORCHRUN, folder=image_folder, output=tmp_path, batch_size=4, **options)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert torch.equal(first["model.stem.1.running_mean"], second["model.stem.1.running_mean"]) == same


def test_reports_a_lost_process_and_resumes_from_the_checkpoint(image_folder, tmp_path):
    arguments = ("train", "resnet20_cc2", "--dataset", "imagefolder", "--data-dir", image_folder, "--img-size", "8")
    arguments += ("-b", "4", "-j", "1", "--epochs", "2", "--output", tmp_path, "--experiment", "run")
    arguments = tuple(map(str, arguments))
    lost = start((*TORCHRUN, "-m", "tests.training.distributed_cli", "kill", *arguments))
    assert lost.returncode != 0
    assert "another process of this run is gone, so process 0 cannot go on" in " ".join(lost.stderr.split()), (
        lost.stderr
    )
    result = start((*TORCHRUN, "-m", "fastroute", *arguments, "--resume", "auto"))
    assert result.returncode == 0, result.stderr
    assert [row["epoch"] for row in rows(tmp_path / "run" / "summary.csv")] == [1, 2]


def test_validation_counts_each_image_once(image_folder, tmp_path):
    (image_folder / "val" / "ant" / "0.png").unlink()  # 11 images in batches of 2 · 4
    results = {}
    for name, launcher in (("one", (sys.executable,)), ("two", TORCHRUN)):
        arguments = ("validate", "--model", "resnet20_x2", "--dataset", "imagefolder", "--data-dir", image_folder)
        file = tmp_path / f"{name}.json"
        arguments += ("--img-size", "8", "-b", "4", "-j", "1", "--num-classes", "10", "--results-file", file)
        result = start((*launcher, "-m", "tests.training.distributed_cli", *map(str, arguments)))
        assert result.returncode == 0, result.stderr
        results[name] = json.loads(file.read_text())[0]
    assert results["one"]["images"] == results["two"]["images"] == 11
    for measure in ("loss", "error", "error5"):
        assert results["one"][measure] == pytest.approx(results["two"][measure], rel=1e-5)
