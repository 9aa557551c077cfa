import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import fastroute
from fastroute.cli import app

REPOSITORY = Path(__file__).resolve().parents[1]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)


def test_trains_on_digits_and_goes_on_from_a_checkpoint(tmp_path):
    common = ("train", "resnet20_cc2", "-b", 256, "--decay-milestones", "1,2", "--output", tmp_path)
    result = run(*common, "--epochs", 1, "--experiment", "run")
    assert result.exit_code == 0, result.output
    assert "epoch 1/1" in result.output and "stack3_router" in result.output and str(tmp_path / "run") in result.output
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {"args.yaml", "best.ckpt", "last.ckpt", "summary.csv"}

    result = run(*common, "--epochs", 2, "--resume", folder / "last.ckpt")
    assert result.exit_code == 0, result.output
    assert "epoch 1/2" not in result.output and "epoch 2/2" in result.output
    with (folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], float(row["lr"])) for row in rows] == [("1", 0.1), ("2", pytest.approx(0.01))]


def test_config_file_sets_defaults_and_flags_win(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("epochs: 1\nlr: 0.05\nbatch-size: 512\nsched: onecycle\nchannels_last: true\n")
    result = run("train", "resnet20", "-c", config, "--lr", 0.02, "--output", tmp_path, "--experiment", "run", "--amp")
    assert result.exit_code == 0, result.output
    arguments = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    expected = {"lr": 0.02, "batch_size": 512, "sched": "onecycle", "channels_last": True, "amp": True}
    assert expected.items() <= arguments.items()
    assert torch.load(tmp_path / "run" / "last.ckpt")["hyper_parameters"]["lr"] == 0.02

    config.write_text("epoch: 1")
    result = run("train", "resnet20", "-c", config)
    assert result.exit_code == 2 and "there is no option 'epoch'; did you mean 'epochs'?" in result.output
    config.write_text("- 1")
    assert "it must hold one `name: value` for each option" in run("train", "resnet20", "-c", config).output
    assert "there is no such file" in run("train", "resnet20", "-c", tmp_path / "none.yaml").output


def test_demo_compares_both_networks(tmp_path):
    result = run("demo", "--epochs", 1, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "272,186" in result.output and "548,386" in result.output and "stem_router" in result.output
    assert (tmp_path / "resnet20" / "summary.csv").is_file() and (tmp_path / "resnet20_cc2" / "best.ckpt").is_file()


def test_info_names_every_backend():
    result = run("info")
    assert result.exit_code == 0, result.output
    assert fastroute.__version__ in result.output and torch.__version__ in result.output
    for names in fastroute.backends.ORDER.values():
        assert all(name in result.output for name in names)


def test_models_lists_parameters():
    result = run("models", "*_cc2")
    assert "resnet20_cc2" in result.output and "548,674" in result.output and "resnet20_x2" not in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("resnet2",), "name is 'resnet2'; there is no such network: did you mean"),
        (("resnet20", "--dataset", "cifar"), "--dataset"),
        (("resnet20", "--epochs", 0), "--epochs"),
        (("resnet20", "-b", -1), "--batch-size"),
        (("resnet20", "--lr", 0), "lr is 0.0; it must be above 0"),
        (("resnet20", "--num-classes", 5), "num_classes is 5; the data has 10 classes"),
        (("resnet20", "--decay-milestones", "1,x"), "is not a list of epochs"),
        (("resnet20", "--dataset", "imagefolder"), "data_dir is None; the dataset 'imagefolder' needs a folder"),
        (
            ("resnet20", "--dataset", "imagefolder", "--data-dir", "/nowhere"),
            "data_dir is /nowhere; it must be a folder",
        ),
        (("resnet20", "--resume", "/nowhere.ckpt"), "resume is /nowhere.ckpt; there is no such file"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(arguments, message, tmp_path):
    result = run("train", *arguments, "--output", tmp_path)
    assert result.exit_code == 2 and message in result.output, result.output
    assert "Traceback" not in result.output and not list(tmp_path.iterdir())


def test_runs_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "fastroute", "--help"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert result.returncode == 0 and "train" in result.stdout


def test_import_needs_torch_alone():
    unwanted = "{'pytorch_lightning', 'torchvision', 'torchmetrics', 'sklearn', 'typer', 'rich', 'yaml', 'PIL'}"
    result = python(f"import sys, fastroute; print(sorted({unwanted} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize(
    "package, module, extra",
    [
        ("typer", "fastroute.cli", "train"),
        ("pytorch_lightning", "fastroute.training", "train"),
        ("matplotlib", "fastroute.benchmark.plots", "bench"),
    ],
)
def test_a_missing_package_names_the_extra(package, module, extra):
    result = python(f"import sys; sys.modules[{package!r}] = None; import {module}")
    assert result.returncode == 1
    sentence = f"needs the package {package}, which is not installed: pip install 'fastroute[{extra}]'"
    assert sentence in result.stderr.strip().splitlines()[-1]
