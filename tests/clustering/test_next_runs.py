"""What a run of `fastroute cluster`, finished or not, leaves to the next one."""

import os
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from fastroute.clustering import run as clustering_run
from fastroute.clustering.build import ClusteringRun, build
from tests.clustering.test_command import QUICK, assignments, run


def test_an_overwriting_run_that_is_killed_leaves_nothing_of_the_other(tmp_path, monkeypatch):
    common = (*QUICK, "--limit", 60, "-b", 20, "--epochs", 1, "--output", tmp_path, "--experiment", "run")
    assert run(*common).exit_code == 0

    class Kill(clustering_run.Table):
        def on_train_batch_end(self, *_):
            raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(clustering_run, "Table", Kill)
        assert "killed" in run(*common, "--seed", 2, "--overwrite").output
    assert os.listdir(tmp_path / "run") == ["args.yaml"]
    result = run(*common, "--seed", 2, "--resume", "auto")
    assert result.exit_code == 0 and "epoch 1/1" in result.output, result.output


def test_a_classical_run_whose_clusters_could_not_be_written_is_not_done(tmp_path, monkeypatch):
    common = ("cluster", "--limit", 60, "--method", "kmeans", "--output", tmp_path, "--experiment", "run")
    assert run(*common, "-k", 3).exit_code == 0

    def full(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("fastroute.clustering.assignments.write_assignments", full)
        assert "the disk is full" in run(*common, "-k", 2, "--overwrite").output
    assert not (tmp_path / "run" / "assignments.csv").exists()
    result = run(*common, "-k", 2, "--resume", "auto")
    assert result.exit_code == 0 and "the run is done" not in result.output, result.output
    assert list(assignments(tmp_path / "run")[0]) == ["path", "cluster", "posterior_0", "posterior_1"]
    assert "the run is done" in run(*common, "-k", 2, "--resume", "auto").output


def test_a_trainer_of_its_own_saves_no_number_of_epochs():
    options = {"dataset": "digits", "method": "iic", "clusters": 3, "heads": 1, "batch_norm": True}
    module = build(ClusteringRun(**options, architecture="C4 F8"), (1, 8, 8), epochs=1)
    module._trainer = SimpleNamespace(max_epochs=-1)  # as Lightning's Trainer(max_steps=1) has in training
    module.on_save_checkpoint(checkpoint := {})
    assert checkpoint["epochs"] is None


def test_a_folder_that_lightning_takes_for_a_url_is_refused(tmp_path):
    options = {"epochs": 1, "batch_size": 2, "output": tmp_path / "a::b", "console": None}
    with pytest.raises(ValueError, match=r"output is .*a::b; a path that contains '::' is taken for a URL"):
        clustering_run.fit(pl.LightningModule(), torch.zeros(4, 1, 8, 8), torch.zeros(4), **options)


def test_a_classical_run_of_other_options_is_not_repeated(tmp_path):
    common = ("cluster", "--limit", 60, "--method", "kmeans", "--output", tmp_path, "--experiment", "run")
    assert run(*common, "-k", 3).exit_code == 0
    (tmp_path / "run" / "assignments.csv").unlink()
    result = run(*common, "-k", 2, "--resume", "auto")
    assert result.exit_code == 2 and "clusters is 2" in result.output
    assert (tmp_path / "run" / "summary.csv").exists()
