"""Runs of `fastroute train` that are stopped, and commands that resume or would overwrite them."""

import os
import shlex
import signal

import pytest
import torch
import yaml

from fastroute.cli import network
from fastroute.models import create_model
from fastroute.models.specification import Specification
from fastroute.training import save_weights
from fastroute.training.callbacks import EpochProgress
from tests.cli.commands import run

COMMON = ("train", "resnet20", "-b", 128, "--first-classes", 2, "--epochs", 2, "--sched", "cosine")


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """Return the folder of a run that was stopped within its second epoch, and the command that resumes it."""

    def stop(self, trainer, module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(EpochProgress, "on_train_batch_start", stop)
        result = run(*COMMON, "--output", tmp_path, "--experiment", "run")
    assert result.exit_code == 143 and "stopped by SIGTERM at epoch 2, step 2" in result.output, result.output
    return tmp_path / "run", shlex.split(result.output.splitlines()[-1])[1:]


def test_a_refused_command_leaves_the_options_of_the_run(stopped):
    folder, resume = stopped
    arguments = (folder / "args.yaml").read_bytes()
    for changed, message in (
        (("-b", 64), "the run stopped at batch 2 of 3 of an epoch, but now an epoch has 5"),
        (("--val-split", 0.2), "val_split is 0.2"),
        (("--seed", 7), "in the order of seed 42, but now seed is 7: some images would come twice"),
        (("--lr", 0.2), "trained with lr=0.1, but this run has lr=0.2"),
    ):
        refused = run(*resume, *changed)
        assert refused.exit_code == 2 and message in refused.output, refused.output
        assert (folder / "args.yaml").read_bytes() == arguments
    done = run(*resume)
    assert done.exit_code == 0 and "epoch 2/2" in done.output and "options that differ" not in done.output, done.output


def test_changed_options_are_said_and_kept(stopped):
    folder, resume = stopped
    done = run(*resume, "--smoothing", 0.1, "--mixup", 0.4, "--log-interval", 1)
    assert done.exit_code == 0, done.output
    assert "options that differ from the run's: mixup 0.4 (was 0.0), smoothing 0.1 (was 0.0)\n" in done.output
    assert yaml.safe_load((folder / "args.yaml").read_text())["mixup"] == 0.4


def test_a_run_is_overwritten_on_request_alone(stopped):
    folder, resume = stopped
    again = (*COMMON, "--output", folder.parent, "--experiment", "run")
    content = (folder / "last.ckpt").read_bytes()
    refused = run(*again)
    assert refused.exit_code == 2 and (folder / "last.ckpt").read_bytes() == content
    assert "it has an unfinished run, 1 of 2 epochs done: continue it by --resume auto, choose" in refused.output
    other = ("--output", folder.parent, "--experiment", "other")
    assert run(*COMMON, *other).exit_code == 0
    refused = run(*resume, *other)  # from one run's checkpoint into another run's folder
    assert refused.exit_code == 2 and "other; it has a finished run" in refused.output, refused.output
    assert run(*resume).exit_code == 0
    refused = run(*again)
    assert refused.exit_code == 2
    assert "a finished run of 2 epochs: choose another folder, or overwrite it with --overwrite" in refused.output
    assert "--initial-checkpoint trains on from its weights, in another folder" in refused.output
    refused = run(*again, "--overwrite", "--initial-checkpoint", folder / "best.ckpt")
    assert refused.exit_code == 2 and "the run that overwrite removes: copy it elsewhere first" in refused.output
    assert (folder / "best.ckpt").exists()
    assert run(*again, "--epochs", 1, "--overwrite").exit_code == 0


def test_advice_about_damaged_checkpoints_names_a_file_that_can_be_read(stopped):
    folder, resume = stopped
    for name in ("last.ckpt", "previous.ckpt"):
        os.truncate(folder / name, 1000)
    for start in (resume, (*COMMON, "--output", folder.parent, "--experiment", "run", "--resume", "auto")):
        refused = run(*start)
        assert refused.exit_code == 2 and f"use {folder / 'best.ckpt'} instead" in refused.output, refused.output
    refused = run(*COMMON, "--output", folder.parent, "--experiment", "run")
    assert refused.exit_code == 2 and f"continue it by --resume {folder / 'best.ckpt'}" in refused.output
    (folder / "last.ckpt").write_bytes(b"")
    refused = run(*resume)
    assert "the file is empty; use" in refused.output, refused.output
    assert torch.load(folder / "best.ckpt")["epochs"] == 2
    refused = run("train", "--config", folder / "args.yaml", "--resume", folder)
    assert refused.exit_code == 2 and f"it is a folder: name {folder / 'last.ckpt'}" in refused.output
    done = run("train", "--config", folder / "args.yaml", "--resume", folder / "best.ckpt")
    assert done.exit_code == 0 and "epoch 2/2" in done.output


def test_initial_weights_are_not_needed_again(tmp_path):
    weights = tmp_path / "init.pt"
    save_weights(create_model("resnet20", 2, 1, 8), weights)
    common = (*COMMON[:-2], "--sched", "step", "--output", tmp_path, "--experiment", "run")
    result = run(*common, "--initial-checkpoint", weights)
    assert result.exit_code == 0, result.output
    weights.unlink()
    folder = tmp_path / "run"
    result = run("train", "-c", folder / "args.yaml", "--resume", folder / "last.ckpt", "--epochs", 3)
    assert result.exit_code == 0 and "epoch 3/3" in result.output, result.output


def test_pretrained_weights_bring_their_normalisation():
    timm = pytest.importorskip("timm")
    assert timm.is_model("vit_tiny_patch16_224")
    levels = network.pretrained_levels(Specification.parse("timm:vit_tiny_patch16_224"))
    assert levels == ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    mean, std = network.pretrained_levels(Specification.parse("torchvision:resnet18"))
    assert mean == pytest.approx([0.485, 0.456, 0.406]) and std == pytest.approx([0.229, 0.224, 0.225])
    assert network.pretrained_levels(Specification.parse("resnet20")) is None
    assert network.pretrained_levels(Specification.parse("timm:resnet18.unknown_tag")) is None
