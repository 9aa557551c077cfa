"""`fastroute cluster` by the methods without a network, and with few images."""

import pytest
import torch

from tests.cli.commands import run
from tests.clustering.test_command import assignments, rows


@pytest.mark.parametrize("method", ["kmeans", "gmm", "spectral"])
def test_classical_methods(tmp_path, method):
    done = run("cluster", "--method", method, "--limit", 600, "--output", tmp_path, "--experiment", "run")
    assert done.exit_code == 0, done.output
    (row,) = rows(tmp_path / "run")
    assert float(row["acc"]) > 0.5 and sum(map(int, row["sizes"].split())) == 600


def test_a_method_without_a_network_resumes_by_itself(tmp_path):
    common = ["cluster", "--limit", 30, "-k", 3, "--architecture", "C4 F8", "--output", tmp_path, "--experiment", "run"]
    assert run(*common, "--epochs", 1, "-b", 10).exit_code == 0
    saved = torch.load(tmp_path / "run" / "last.ckpt")
    torch.save(saved | {"epochs": 9}, tmp_path / "run" / "last.ckpt")  # as of a run that has stopped
    refused = run(*common, "--method", "kmeans")
    assert refused.exit_code == 2 and "it has an unfinished run, 1 of 9 epochs done" in refused.output
    refused = run(*common, "--method", "kmeans", "--resume", "auto")
    assert refused.exit_code == 2 and "the method 'kmeans' is done in one step" in refused.output
    refused = run(*common, "--method", "kmeans", "--resume", tmp_path / "run" / "last.ckpt")
    assert refused.exit_code == 2 and "the method 'kmeans' is done in one step" in refused.output
    done = run(*common, "--method", "kmeans", "--overwrite")
    assert done.exit_code == 0, done.output
    assert not list((tmp_path / "run").glob("*.ckpt")), "of the run that was overwritten"
    before = (tmp_path / "run" / "summary.csv").read_text()
    done = run(*common, "--method", "kmeans", "--resume", "auto")
    assert done.exit_code == 0 and "the run is done" in done.output
    assert (tmp_path / "run" / "summary.csv").read_text() == before
    refused = run(*common, "--method", "kmeans", "--resume", "auto", "-k", 4)
    assert refused.exit_code == 2 and "clusters is 4; the run in" in refused.output
    refused = run(*common, "--method", "kmeans", "--resume", "auto", "--dataset", "digits", "--data-dir", tmp_path)
    assert refused.exit_code == 2, refused.output
    refused = run(*common, "--method", "kmeans", "--resume", "auto", "--by-cluster", tmp_path / "links")
    assert refused.exit_code == 2 and "by_cluster is given, but the run is done" in refused.output
    done = run(*common, "--method", "kmeans", "--resume", "auto", "--overwrite", "--seed", 1)
    assert done.exit_code == 0 and "acc" in done.output
    (tmp_path / "run" / "assignments.csv").unlink()
    done = run(*common, "--method", "kmeans", "--resume", "auto", "--overwrite")
    assert done.exit_code == 0 and "acc" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", 1, "-k", 1], "there is 1 image; a clustering needs at least 2"),
        (["--limit", 1, "-k", 1, "--method", "kmeans"], "there is 1 image; a clustering needs at least 2"),
        (["--limit", 6, "-k", 6, "--method", "spectral"], "of 6 images, the method 'spectral' finds fewer"),
    ],
)
def test_too_few_images(tmp_path, arguments, message):
    done = run("cluster", *arguments, "--output", tmp_path)
    assert done.exit_code == 2 and message in " ".join(done.output.split())


def test_spectral_clustering_of_few_images(tmp_path):
    done = run("cluster", "--limit", 8, "-k", 2, "--method", "spectral", "--output", tmp_path, "--experiment", "run")
    assert done.exit_code == 0 and len(assignments(tmp_path / "run")) == 8, done.output
