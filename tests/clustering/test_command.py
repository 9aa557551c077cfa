import csv

import pytest
import torch
from typer.testing import CliRunner

from fastroute.cli import app

QUICK = ["cluster", "--limit", "400", "--architecture", "C8 M F16", "--lr-em", "1e-3", "--lr-consistency", "1e-3"]


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def rows(folder):
    with (folder / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def test_trains_resumes_and_writes_a_table(tmp_path):
    done = run(*QUICK, "--epochs", 3, "--output", tmp_path, "--experiment", "one")
    assert done.exit_code == 0, done.output
    table = rows(tmp_path / "one")
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    assert {"acc", "nmi", "ari", "em_loss", "consistency_loss", "entropy", "sizes"} <= table[0].keys()
    assert all(sum(map(int, row["sizes"].split())) == 400 for row in table)
    assert float(table[-1]["em_loss"]) < float(table[0]["em_loss"])
    first = run(*QUICK, "--epochs", 2, "--output", tmp_path, "--experiment", "two")
    assert first.exit_code == 0, first.output
    again = run(*QUICK, "--epochs", 3, "--resume", tmp_path / "two" / "last.ckpt")
    assert again.exit_code == 0, again.output
    resumed = rows(tmp_path / "two")
    assert [row["epoch"] for row in resumed] == ["1", "2", "3"]
    assert resumed[:2] and resumed[0]["em_loss"] == table[0]["em_loss"]


@pytest.mark.parametrize("method", ["kmeans", "gmm", "spectral"])
def test_classical_methods(tmp_path, method):
    done = run("cluster", "--method", method, "--limit", 600, "--output", tmp_path, "--experiment", "run")
    assert done.exit_code == 0, done.output
    (row,) = rows(tmp_path / "run")
    assert float(row["acc"]) > 0.5 and sum(map(int, row["sizes"].split())) == 600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnist"], "data_dir is None"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "data_dir is nowhere; it must hold MNIST/raw"),
        (["--limit", "0"], "limit is 0"),
        (["--architecture", "resnet"], "architecture is 'resnet'"),
        (["--lr-em", "0"], "lr_em is 0"),
        (["--resume", "nowhere.ckpt"], "there is no such file"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    done = run("cluster", *arguments, "--output", tmp_path)
    assert done.exit_code == 2 and message in done.output


def test_reads_mnist(tmp_path):
    from fastroute.clustering.run import load_images

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, header, size in (("images-idx3", [0x803, 4, 28, 28], 4 * 784), ("labels-idx1", [0x801, 4], 4)):
        for part in ("train", "t10k"):
            numbers = b"".join(value.to_bytes(4, "big") for value in header)
            (raw / f"{part}-{name}-ubyte").write_bytes(numbers + bytes(i % 256 for i in range(size)))
    images, labels = load_images("mnist", tmp_path, limit=3)
    assert images.shape == (3, 1, 28, 28) and images.max() == 1 and images.dtype == torch.float32
    assert labels.tolist() == [0, 1, 2]
