import csv
import math
import os
import shlex
import signal
import tarfile

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from typer.testing import CliRunner

from fastroute import visualize
from fastroute._methods import METHODS
from fastroute.cli import app
from fastroute.clustering import run as clustering_run
from fastroute.clustering.assignments import link_by_cluster
from fastroute.clustering.build import ClusteringRun, build
from fastroute.clustering.images import load_images
from fastroute.training import checkpoints
from fastroute.visualize.collect import collect_responses

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
    checkpoint = tmp_path / "two" / "last.ckpt"
    again = run(*QUICK, "--epochs", 3, "--resume", checkpoint)
    assert again.exit_code == 0, again.output
    resumed = rows(tmp_path / "two")
    for row in (*resumed, *table):
        del row["seconds"]
    assert resumed == table
    ends = (torch.load(path)["state_dict"] for path in (tmp_path / "one" / "last.ckpt", checkpoint))
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    assert not any(word in again.output for word in ("Tip", "GPU", "TPU"))  # Lightning's remarks


def test_does_not_save_non_finite_weights(tmp_path):
    class Poison(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            next(module.parameters()).data[0] = torch.nan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clustering_run, "Table", type("Table", (Poison, clustering_run.Table), {}))
        result = run(*QUICK, "--epochs", 2, "--output", tmp_path, "--experiment", "run")
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "error: weights are NaN or infinite at epoch 1, step 3, with learning rate" in result.output
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_resumes_within_an_epoch(tmp_path):
    """SIGTERM in the second epoch saves, and the resumed run ends as an uninterrupted one."""
    arguments = [*map(str, (*QUICK, "--epochs", 2, "--output", tmp_path))]

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 0):
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clustering_run, "Table", type("Table", (Stop, clustering_run.Table), {}))
        stopped = run(*arguments, "--experiment", "stopped")
    assert stopped.exit_code == 143 and "stopped by SIGTERM at epoch 2, step" in stopped.output
    assert "fastroute cluster --config" in stopped.output
    resume = shlex.split(stopped.output.splitlines()[-1])[1:]
    refused = run(*resume, "--seed", 7)
    assert refused.exit_code == 2 and "the seed was 42, but now it is 7: some images would" in refused.output
    done = run(*resume)
    assert done.exit_code == 0, done.output
    again = run(*arguments, "--experiment", "stopped")
    assert again.exit_code == 2 and "it has a finished run of 2 epochs:" in again.output
    assert run(*arguments, "--experiment", "whole").exit_code == 0
    ends = (torch.load(tmp_path / name / "last.ckpt")["state_dict"] for name in ("stopped", "whole"))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_resume_auto_starts_resumes_finishes_and_falls_back(tmp_path, monkeypatch):
    """A run that was killed before its last file writes only that."""
    common = (*QUICK, "--limit", 60, "--output", tmp_path, "--resume", "auto")
    assert "resume is 'auto'; name the run by --experiment" in run(*common, "--epochs", 1).output
    common += ("--experiment", "run")
    read, reads = checkpoints.read_tensors, []
    monkeypatch.setattr(checkpoints, "read_tensors", lambda path: reads.append(path) or read(path))
    for epochs, times in ((1, 0), (2, 4)):  # found, its epochs read, checked against the options, resumed
        result = run(*common, "--epochs", epochs)
        assert result.exit_code == 0 and f"epoch {epochs}/{epochs}" in result.output, result.output
        assert len(reads) == times
    assert result.output.count("\nepoch ") == 1
    last, assigned = tmp_path / "run" / "last.ckpt", tmp_path / "run" / "assignments.csv"
    whole, content = torch.load(last)["state_dict"], assigned.read_bytes()
    assigned.unlink()
    result = run(*common, "--epochs", 2)
    assert result.exit_code == 0 and "all 2 epochs are done" in result.output and "epoch 2/2" not in result.output
    assert assigned.read_bytes() == content
    arguments = (tmp_path / "run" / "args.yaml").read_bytes()
    assert run(*common, "--epochs", 1).exit_code == 0  # of a finished run the options stay
    assert (tmp_path / "run" / "args.yaml").read_bytes() == arguments
    last.write_bytes(b"junk")
    result = run(*common, "--epochs", 2)
    assert result.exit_code == 0 and "epoch 2/2" in result.output, result.output
    assert f"{last} cannot be read" in result.output and "resuming from the previous checkpoint" in result.output
    torch.testing.assert_close(torch.load(last)["state_dict"], whole, rtol=0, atol=0)


def test_refuses_to_resume_from_other_runs(tmp_path):
    assert run(*QUICK, "--epochs", 1, "--output", tmp_path, "--experiment", "run").exit_code == 0
    checkpoint = tmp_path / "run" / "last.ckpt"
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    torch.save({**torch.load(checkpoint), "hyper_parameters": {"model": "resnet20"}}, tmp_path / "trained.ckpt")
    torch.save({**torch.load(checkpoint), "kept": {"labels": 3}}, tmp_path / "kept.ckpt")
    torch.save({**torch.load(checkpoint), "schedule_epochs": "3"}, tmp_path / "schedule.ckpt")
    torch.save({**torch.load(checkpoint), "images": "(400, 1, 8, 8) 00000000"}, tmp_path / "other.ckpt")
    for arguments, message in (
        (["--epochs", 1, "--resume", checkpoint], "it has completed 1 epoch, so epochs=1 leaves none to train"),
        (["-k", 9, "--resume", checkpoint], "it was trained with clusters=10, but this run has clusters=9"),
        (["--method", "em", "--resume", checkpoint], "it was trained with method='two-fold'"),
        (["--lr-em", 1e-4, "--resume", checkpoint], "it was trained with lr_em=0.001"),
        (["--resume", tmp_path / "other.ckpt"], "its run has other images than these 400"),
        (["--resume", tmp_path / "kept.ckpt"], "its kept['labels'] is 3, expected a dense tensor"),
        (["--resume", tmp_path / "schedule.ckpt"], "its schedule_epochs is '3', expected an int of at least 0"),
        (["--resume", tmp_path / "junk.ckpt"], "it is no checkpoint of a training run"),
        (["--resume", tmp_path / "trained.ckpt"], "it is no checkpoint of `fastroute cluster`"),
    ):
        refused = run(*QUICK, *arguments)
        assert refused.exit_code == 2 and message in refused.output, refused.output
    refused = run("validate", checkpoint)
    assert refused.exit_code == 2 and "it is no checkpoint of `fastroute train`" in refused.output


def test_starts_side_by_side(tmp_path):
    done = run(*QUICK, "--n-init", 2, "--heads", 2, "--epochs", 1, "--output", tmp_path, "--experiment", "run")
    assert done.exit_code == 0, done.output
    weights = torch.load(tmp_path / "run" / "last.ckpt")["state_dict"]
    first, second = (weights[f"network.networks.{start}.1.weight"] for start in range(2))
    assert first.shape == second.shape and not torch.equal(first, second)
    assert weights["normalize.running_mean"].shape == (4, 10)  # two heads of either network


def test_heads_and_more_clusters_than_classes(tmp_path):
    done = run(*QUICK, "--heads", 3, "-k", 20, "--epochs", 2, "--output", tmp_path, "--experiment", "run")
    assert done.exit_code == 0, done.output
    row = rows(tmp_path / "run")[-1]
    assert len(row["sizes"].split()) == 20 and float(row["acc_many"]) > float(row["acc"])


def test_reads_a_recipe_which_flags_override(tmp_path):
    arguments = ["--dataset", "digits", "--limit", 300, "-k", 9, "--output", tmp_path, "--experiment", "run"]
    done = run("cluster", "-c", "cluster_mnist_kmeans", *arguments)
    assert done.exit_code == 0, done.output
    assert len(rows(tmp_path / "run")) == 1 and len(rows(tmp_path / "run")[0]["sizes"].split()) == 9
    done = run("cluster", "-c", "cluster_mnist_kmean")
    assert done.exit_code == 2 and "did you mean cluster_mnist_kmeans" in done.output


def test_iic(tmp_path):
    done = run(*QUICK, "--method", "iic", "--epochs", 4, "--output", tmp_path, "--experiment", "run")
    assert done.exit_code == 0, done.output
    table = rows(tmp_path / "run")
    assert float(table[-1]["loss"]) < float(table[0]["loss"]) < 0


def test_dec_trains_its_autoencoder_first_and_resumes(tmp_path):
    common = ["cluster", "--method", "dec", "--limit", 400, "-b", 32, "--output", tmp_path, "--experiment", "run"]
    done = run(*common, "--epochs", 6)
    assert done.exit_code == 0, done.output
    table = rows(tmp_path / "run")
    loss = [float(row["loss"]) for row in table]
    assert loss[2] < loss[0] and len(loss) == 6
    assert all(float(row["acc"]) > 0.4 for row in table[2:])  # k-means of the codes, then DEC's own clusters
    again = run(*common, "--epochs", 14, "--resume", tmp_path / "run" / "last.ckpt")
    assert again.exit_code == 0 and len(rows(tmp_path / "run")) == 14, again.output
    assert torch.load(tmp_path / "run" / "last.ckpt")["pretrain_epochs"] == 3


@pytest.mark.parametrize(
    "method",
    [
        "iic-own",
        "idec",
        "dcn",
        "dac",
        "deepcluster",
        "ae",
        "sparse-ae",
        "denoising-ae",
        "vae",
        "adc",
        "triplet",
        "gan",
        "swwae",
        "kmeansnet",
        "jule",
    ],
)
def test_every_method_resumes_and_opens_in_a_report(tmp_path, method, monkeypatch):
    """Also within an epoch of what it keeps beside its weights, such as labels."""

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (2, 0):
                os.kill(os.getpid(), signal.SIGTERM)

    common = ["cluster", "--method", method, "--limit", 120, "-b", 40, "-k", 3, "--architecture", "C4 M F8"]
    common += ["--epochs", 4, "--output", tmp_path]
    assert run(*common, "--experiment", "whole").exit_code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clustering_run, "Table", type("Table", (Stop, clustering_run.Table), {}))
        assert run(*common, "--experiment", "stopped").exit_code == 143
    done = run(*common, "--experiment", "stopped", "--resume", "auto")
    assert done.exit_code == 0, done.output
    whole, resumed = (torch.load(tmp_path / name / "last.ckpt") for name in ("whole", "stopped"))
    for name in ("state_dict", "kept"):
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=0)
    opened = {}
    monkeypatch.setattr(
        visualize,
        "clustering_report",
        lambda page, model, images, **kwargs: opened.update(model=model, images=images) or tmp_path,
    )
    done = run("report", tmp_path / "whole" / "last.ckpt")
    assert done.exit_code == 0, done.output
    found = collect_responses(opened["model"], opened["images"].batches())[0].argmax(1)
    assert " ".join(map(str, torch.bincount(found, minlength=3).tolist())) == rows(tmp_path / "whole")[-1]["sizes"]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.builder is not None])
def test_every_method_trains_in_mixed_precision(tmp_path, method):
    """Posteriors, pairs and distances are compared in float32."""
    common = ["cluster", "--method", method, "--limit", 120, "-b", 40, "-k", 3, "--architecture", "C4 M F8"]
    done = run(*common, "--amp", "--epochs", 2, "--output", tmp_path, "--experiment", "run")
    assert done.exit_code == 0, done.output
    assert all(math.isfinite(float(row["loss"])) for row in rows(tmp_path / "run") if row.get("loss"))
    hyperparameters = torch.load(tmp_path / "run" / "last.ckpt")["hyper_parameters"]
    module = build(ClusteringRun.of(hyperparameters), (1, 8, 8)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.rand(4, 1, 8, 8)).dtype == torch.float32


def test_warns_of_emulated_mixed_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"})
    common = ["cluster", "--limit", 120, "-b", 40, "-k", 3, "--architecture", "C4 M F8"]
    with pytest.warns(UserWarning, match="no bfloat16 instructions"):
        run(*common, "--amp", "--epochs", 1, "--output", tmp_path)


@pytest.mark.parametrize(("method", "expected"), [("vae", 32), ("ae", 128)])
def test_a_method_has_its_own_batch_size(tmp_path, method, expected):
    common = ["cluster", "--method", method, "--limit", 120, "-k", 3, "--architecture", "C4 M F8", "--epochs", 1]
    for options, size in (((), expected), (("-b", 40), 40)):
        done = run(*common, *options, "--output", tmp_path, "--experiment", f"run{size}")
        assert done.exit_code == 0, done.output
        assert f"batch_size: {size}\n" in (tmp_path / f"run{size}" / "args.yaml").read_text()
        assert torch.load(tmp_path / f"run{size}" / "last.ckpt")["global_step"] == max(1, 120 // size)


def test_a_checkpoint_without_its_schedule_is_refused(tmp_path):
    common = ["cluster", "--method", "vae", "--limit", 120, "-k", 3, "--architecture", "C4 M F8"]
    common += ["--output", tmp_path, "--experiment", "run"]
    assert run(*common, "--epochs", 1).exit_code == 0
    last = tmp_path / "run" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=False)
    for change, message in (({}, "warm_up is missing"), ({"warm_up": "2"}, "warm_up is")):
        torch.save({key: value for key, value in checkpoint.items() if key != "warm_up"} | change, last)
        refused = run(*common, "--epochs", 2, "--resume", last)
        assert refused.exit_code == 2 and message in " ".join(refused.output.split()), refused.output


def test_jule_refuses_more_images_than_its_graph_takes(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "jule", METHODS["jule"]._replace(most=100))
    common = ["cluster", "--method", "jule", "--limit", 120, "--output", tmp_path, "--experiment", "run"]
    refused = run(*common)
    assert refused.exit_code == 2 and not (tmp_path / "run").exists()
    message = "images are 120; the method 'jule' takes at most 100: choose another, or add --limit 100"
    assert message in " ".join(refused.output.split()), refused.output


def test_self_labels_in_the_last_epochs(tmp_path):
    common = (*QUICK, "--self-label", 1, "--output", tmp_path, "--experiment", "run")
    done = run(*common, "--epochs", 2)
    assert done.exit_code == 0, done.output
    assert [row["loss"] != "" for row in rows(tmp_path / "run")] == [False, True]
    assert [row["em_loss"] != "" for row in rows(tmp_path / "run")] == [True, False]  # nothing of the epoch before
    done = run(*common, "--epochs", 3, "--resume", "auto")
    assert done.exit_code == 0, done.output  # a longer run labels in two epochs
    assert [row["loss"] != "" for row in rows(tmp_path / "run")] == [False, True, True]


def test_images_of_a_folder(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, shade in (("dark", 60), ("light", 190)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(generator.integers(shade, shade + 60, (9, 9, 3), np.uint8)).save(folder / f"{i}.png")
    images, labels, classes, paths, files = load_images("imagefolder", tmp_path / "data", img_size=8)
    assert classes == ["dark", "light"] and files and paths[4].endswith("train/light/0.png")
    assert images.shape == (8, 3, 8, 8) and labels.tolist() == [0] * 4 + [1] * 4
    some = load_images("imagefolder", tmp_path / "data", limit=4, img_size=8)  # of both classes
    assert torch.equal(some.images, images[::2]) and some.labels.tolist() == [0, 0, 1, 1] and some.paths == paths[::2]
    assert torch.equal(load_images("imagefolder", tmp_path / "data", limit=9, img_size=8).images, images)
    arguments = ["--dataset", "imagefolder", "--data-dir", tmp_path / "data", "--img-size", 8, "-k", 2, "-b", 8]
    done = run("cluster", *arguments, "--method", "kmeans", "--output", tmp_path, "--experiment", "kmeans")
    assert done.exit_code == 0 and rows(tmp_path / "kmeans")[0]["acc"] == "1.0", done.output
    done = run("cluster", *arguments, "--epochs", 1, "--output", tmp_path, "--experiment", "two-fold")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(("method", "told"), [("dec", True), ("gan", True), ("dac", False)])
def test_says_that_an_architecture_is_not_used(tmp_path, method, told):
    options = ["--limit", 40, "-b", 20, "-k", 2, "--epochs", 1, "--architecture", "C4 F8", "--method", method]
    done = run("cluster", *options, "--output", tmp_path)
    assert done.exit_code == 0, done.output
    assert (f"architecture is not used: the method '{method}' has a network of its own" in done.output) == told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imagefolder"], "data_dir is None"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "data_dir is nowhere; MNIST is incomplete in it"),
        (["--data-dir", "nowhere"], "data_dir is nowhere; there is no such file or folder"),
        (["--by-cluster", "links"], "by_cluster is links; it links to image files, but these images are not"),
        (["--limit", "0"], "limit is 0"),
        (["--limit", "9"], "clusters is 10; it must be at most the number of images, 9"),
        (["--architecture", "resnet"], "architecture is 'resnet'"),
        (["--lr-em", "0"], "lr_em is 0"),
        (["--heads", "2", "--method", "iic"], "heads is 2; with the method 'iic' it must be 1"),
        (["--n-init", "2", "--method", "kmeans"], "n_init is 2; with the method 'kmeans' it must be 1"),
        (["--resume", "nowhere.ckpt"], "there is no such file"),
        (["--method", "kmean"], "'kmean' is not one of 'two-fold'"),
        (
            ["--method", "vae", "--self-label", "3"],
            "the method 'vae' has no scores to label by: choose one of two-fold",
        ),
        (["--self-label", "3", "--epochs", "3"], "self_label is 3; it must be less than epochs, 3"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    done = run("cluster", *arguments, "--output", tmp_path)
    assert done.exit_code == 2 and message in done.output


def test_reads_mnist_by_its_training_files_alone(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, header, size in (("images-idx3", [0x803, 4, 28, 28], 4 * 784), ("labels-idx1", [0x801, 4], 4)):
        numbers = b"".join(value.to_bytes(4, "big") for value in header)
        (raw / f"train-{name}-ubyte").write_bytes(numbers + bytes(i % 256 for i in range(size)))
    images, labels, _, paths, files = load_images("mnist", tmp_path, limit=3)
    assert paths == ["mnist:0", "mnist:1", "mnist:2"] and not files
    assert images.shape == (3, 1, 28, 28) and images.max() == 1 and images.dtype == torch.float32
    assert labels.tolist() == [0, 1, 2]


def assignments(folder):
    with (folder / "assignments.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", ["two-fold", "kmeans", "gmm"])
def test_a_flat_folder_without_classes(tmp_path, method):
    """Dark and light images side by side, and a hidden file: no labels, no ACC, a row and a link for each."""
    generator, folder = np.random.default_rng(0), tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for i in range(24):
        pixels = generator.integers(0, 40, (9, 9, 3), np.uint8) + (200 if i % 2 else 0)
        Image.fromarray(pixels.astype(np.uint8)).save((folder / "deep" if i < 4 else folder) / f"{i:02}.png")
    (folder / "._00.png").write_bytes(b"no image")
    arguments = ["cluster", "--data-dir", folder, "--img-size", 8, "-k", 2, "-b", 8, "--method", method, "--epochs", 2]
    arguments += ["--architecture", "C4 F8", "--output", tmp_path, "--by-cluster", tmp_path / "links"]
    done = run(*arguments, "--experiment", "run")
    assert done.exit_code == 0, done.output
    assert "imagefolder in" in done.output and "24 images, 8×8, colour, no classes" in done.output.replace("\n", "")
    assert not {"acc", "nmi"} & rows(tmp_path / "run")[-1].keys()
    found = assignments(tmp_path / "run")
    assert list(found[0]) == ["path", "cluster", "posterior_0", "posterior_1"]
    assert sorted(row["path"] for row in found) == sorted(map(str, folder.glob("**/[0-9]*.png"))) and len(found) == 24
    for row in found:
        posterior = [float(row["posterior_0"]), float(row["posterior_1"])]
        assert sum(posterior) == pytest.approx(1, abs=1e-4) and posterior[int(row["cluster"])] == max(posterior)
        (link,) = (tmp_path / "links").glob(f"*/*-{os.path.basename(row['path'])}")
        assert link.parent.name == row["cluster"] and str(link.resolve()) == os.path.realpath(row["path"])
    assert (tmp_path / "run" / "args.yaml").is_file()
    if method != "two-fold":  # two epochs do not train it
        assert len({(row["cluster"], int(row["path"][-6:-4]) % 2) for row in found}) == 2
    refused = run(*arguments, "--experiment", "again")
    assert refused.exit_code == 2 and "it must be a new or an empty folder" in refused.output
    refused = run(*arguments[:-1], folder / "links")
    assert refused.exit_code == 2 and "it lies in data_dir" in refused.output


def test_clusters_and_reports_a_flat_folder_of_classes(tmp_path, image_folder):
    (image_folder / "train" / ".ipynb_checkpoints").mkdir()
    arguments = ["--data-dir", image_folder / "train", "--img-size", 8, "-k", 3, "-b", 8, "--architecture", "C4 F8"]
    done = run("cluster", *arguments, "--epochs", 1, "--limit", 20, "--output", tmp_path, "--experiment", "run")
    assert done.exit_code == 0, done.output
    assert "acc" in rows(tmp_path / "run")[0] and len(assignments(tmp_path / "run")) == 20
    done = run("report", tmp_path / "run" / "last.ckpt")  # of the run's folder and limit
    assert done.exit_code == 0 and "images: 20 of imagefolder in" in done.output, done.output
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert "mostly ant" in page or "mostly bee" in page


def test_tar_shards_are_clustered(tmp_path, image_folder):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(image_folder / "train", ".")
    arguments = ["--data-dir", tmp_path / "{0..0}.tar", "--img-size", 8, "-k", 3, "--method", "kmeans"]
    done = run("cluster", *arguments, "--output", tmp_path, "--experiment", "run")
    assert done.exit_code == 0 and rows(tmp_path / "run")[0]["acc"] == "1.0", done.output
    assert assignments(tmp_path / "run")[0]["path"].startswith(f"{tmp_path / '0.tar'}:./")


def test_skips_a_broken_image_on_request(tmp_path, image_folder):
    broken = image_folder / "train" / "ant" / "0.png"
    broken.write_bytes(b"no image")
    arguments = [
        "cluster",
        "--data-dir",
        image_folder,
        "--img-size",
        8,
        "-k",
        3,
        "--method",
        "kmeans",
        "--output",
        tmp_path,
    ]
    refused = run(*arguments)
    assert refused.exit_code == 2 and "ant/0.png cannot be read as an image" in refused.output.replace("\n", "")
    with pytest.warns(UserWarning, match="it is skipped"):
        done = run(*arguments, "--on-bad-image", "skip", "--experiment", "run")
    assert done.exit_code == 0 and str(broken) not in {row["path"] for row in assignments(tmp_path / "run")}
    assert len(assignments(tmp_path / "run")) == 23


def test_links_have_names_that_a_file_may_have(tmp_path):
    long = "\u56fe" * 83 + ".png"  # 253 bytes
    paths = [tmp_path / folder / long for folder in "ab"] + [tmp_path / "a" / "c.png"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    link_by_cluster(tmp_path / "links", [str(path) for path in paths], torch.tensor([[0.9], [0.8], [0.7]]))
    links = sorted((tmp_path / "links" / "0").iterdir())
    assert [link.resolve() for link in links] == paths and links[2].name == "3-c.png"
    assert [os.fsencode(link.name)[:2] for link in links] == [b"1-", b"2-", b"3-"]
