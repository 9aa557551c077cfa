"""The data options of `train`, `validate`, `paths` and `report`, on tiny folders."""

import csv
import json
import shutil
import tarfile
import warnings

import pytest
import torch
import yaml
from typer.testing import CliRunner

from fastroute.cli import app
from fastroute.cli.images import choose_images
from fastroute.cli.trained import load_trained
from fastroute.training.checkpoints import read_checkpoint


def run(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def train(folder, output, *arguments, epochs=1):
    options = ("--data-dir", folder, "--img-size", 8, "-b", 12, "--epochs", epochs, "--output", output)
    return run("train", "resnet20", *options, "--sched", "step", "--experiment", "run", *arguments)


@pytest.fixture(scope="module")
def flat_run(tmp_path_factory):
    """Train on a flat folder with a quarter set aside; return the folder of the data and that of the run."""
    from tests.image_folders import write_tree

    folder = tmp_path_factory.mktemp("flat")
    write_tree(folder / "tree")
    data = (folder / "tree" / "train").rename(folder / "animals")
    code, output = train(data, folder, "--val-split", 0.25, "--seed", 3, "-j", 1)
    assert code == 0, output
    return data, folder / "run", output


def test_the_folder_decides_the_dataset_and_the_split_is_said(flat_run):
    data, folder, output = flat_run
    assert f"imagefolder in {data}: 18 images to train and 6 to validate on, 25% of each class set aside by" in output
    arguments = yaml.safe_load((folder / "args.yaml").read_text())
    assert (arguments["dataset"], arguments["val_split"], arguments["seed"]) == ("imagefolder", 0.25, 3)
    state = torch.load(folder / "last.ckpt")["ImageDataModule"]
    assert (state["data_dir"], state["val_split"], state["split_seed"]) == (str(data), 0.25, 3)


def test_resuming_keeps_the_split(flat_run, tmp_path):
    data, folder, _ = flat_run
    resume = ("--resume", folder / "last.ckpt", "-j", 1)
    for other in (("--val-split", 0.5, "--seed", 3), ("--val-split", 0.25, "--seed", 4)):
        code, output = train(data, tmp_path, *resume, *other, epochs=2)
        assert code == 2 and "the run set val_split=0.25 aside by seed 3, but now val_split is" in output
    code, output = train(data, tmp_path, *resume, "--val-split", 0.25, "--seed", 3, epochs=2)
    assert code == 0 and "epoch 2/2" in output, output


def test_commands_take_the_images_of_the_run(flat_run):
    data, folder, _ = flat_run
    line = f"images: imagefolder in {data}, the 25% that seed 3 sets aside, as in training"
    code, output = run("validate", folder / "last.ckpt", "-j", 1)
    assert code == 0 and line in output and "│      6 │" in output, output
    code, output = run("validate", folder / "last.ckpt", "-j", 1, "--data-dir", data)
    assert code == 0 and line in output, output
    state = torch.load(folder / "last.ckpt")["ImageDataModule"]
    elsewhere = choose_images(state, None, data.parent / "tree")
    assert "val_split" not in elsewhere.options and elsewhere.line == f"images: imagefolder in {data.parent / 'tree'}"
    code, output = run("validate", folder / "last.ckpt", "-j", 1, "--data-dir", data.parent / "tree")
    assert code == 0 and "│     12 │" in output, output
    with pytest.raises(
        FileNotFoundError, match=r"data_dir is /gone, as in training; there is no such folder: give --data-dir"
    ):
        choose_images(state | {"data_dir": "/gone"}, None, None)
    with pytest.raises(ValueError, match="the dataset 'digits' is scikit-learn's own and reads no folder"):
        choose_images(state, "digits", data)
    assert choose_images({}, None, data).dataset == "imagefolder"
    with pytest.raises(
        ValueError, match="dataset is missing, and the checkpoint does not say which one it was trained on"
    ):
        choose_images({}, None, None)


def test_paths_and_report_take_the_images_of_the_run(image_folder, tmp_path):
    arguments = ("--data-dir", image_folder, "--img-size", 8, "-b", 12, "--epochs", 1, "--output", tmp_path)
    code, output = run("train", "resnet20_cc2", *arguments, "--experiment", "run")
    assert code == 0, output
    code, output = run("paths", tmp_path / "run" / "last.ckpt")
    assert code == 0 and f"images: imagefolder in {image_folder}, as in training" in output, output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "it holds nothing, and must hold train/ and val/ with a folder of images for each class"),
        (("--dataset", "digits"), "the dataset 'digits' is scikit-learn's own and reads no folder"),
        (("--dataset", "cifar10"), "CIFAR10 is incomplete in it"),
        (("--dataset", "imagefolder"), "it must be a folder with train/ and val/ in it"),
    ],
)
def test_a_missing_folder_does_not_fall_back_to_digits(tmp_path, arguments, message):
    (tmp_path / "data").mkdir()
    code, output = train(tmp_path / "data", tmp_path, *arguments)
    assert code == 2 and message in output.replace("\n", ""), output


def test_a_folder_of_another_kind(image_folder, tmp_path):
    code, output = train(image_folder, tmp_path, "--dataset", "mnist")
    assert code == 2 and "class folders under train/ and val/, for the dataset 'imagefolder', not 'mnist'" in output
    code, output = train(image_folder / "train", tmp_path)
    assert code == 2 and "it holds 3 folders of images, and no images for val" in output, output
    code, output = train(tmp_path / "none", tmp_path)
    assert code == 2 and "there is no such file or folder" in output, output


def test_shards_with_all_data_options(image_folder, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(image_folder / "train", ".")
    (tmp_path / "map.txt").write_text("cat\nant\n")
    levels = ("--mean", "0.5", "--std", "0.25", "--interpolation", "bicubic", "--in-chans", 1)
    options = ("--class-map", tmp_path / "map.txt", "--val-split", 0.5, "--input-key", "png", "-j", 1)
    code, output = train(tmp_path / "{0..0}.tar", tmp_path, *options, *levels, "--train-crop-mode", "rkrc")
    assert code == 0 and "webdataset in" in output and "2 classes, grey, 8×8" in output, output
    state = torch.load(tmp_path / "run" / "last.ckpt")["ImageDataModule"]
    assert (state["classes"], state["interpolation"], state["in_chans"]) == (["cat", "ant"], "bicubic", 1)
    assert state["mean"].tolist() == [127.5] and state["std"].tolist() == [63.75] and state["input_key"] == "png"
    code, output = run("validate", tmp_path / "run" / "last.ckpt", "-j", 1)
    assert code == 0 and "the 50% that seed 42 sets aside, as in training" in output and "│      8 │" in output, output


def test_a_last_batch_of_one_image_is_trained_on(image_folder, tmp_path):
    shutil.rmtree(image_folder / "train" / "cat")
    shutil.rmtree(image_folder / "val" / "cat")
    code, output = train(image_folder, tmp_path, "-b", 15)  # of 16 images
    assert code == 0, output


def test_validate_measures_the_error_of_the_training(flat_run, tmp_path):
    _, folder, _ = flat_run
    code, output = run("validate", folder / "last.ckpt", "-j", 1, "--results-file", tmp_path / "found.json")
    assert code == 0, output
    (found,) = json.loads((tmp_path / "found.json").read_text())
    with (folder / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert found["loss"] == pytest.approx(float(row["val_loss"]), rel=1e-4)


def test_reports_prepare_images_as_the_run_did(flat_run):
    _, folder, _ = flat_run
    checkpoint = read_checkpoint(folder / "last.ckpt")
    trained, state = load_trained(folder / "last.ckpt", checkpoint, workers=1), checkpoint["ImageDataModule"]
    found = trained.loader.mean.flatten(), trained.loader.std.flatten()
    torch.testing.assert_close(found, (state["mean"], state["std"]))
    assert (trained.classes, trained.img_size, trained.crop_pct) == (state["classes"], 8, 1.0)
