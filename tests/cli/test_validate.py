"""`fastroute validate`."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastroute.cli.images import Chosen, check_fit, choose_images
from fastroute.cli.trained import default_device
from tests.cli.commands import run
from tests.data.tars import shard
from tests.image_folders import write_tree


def test_validates_a_checkpoint_and_a_folder_of_them(tmp_path):
    common = ("-b", 256, "--epochs", 1, "--output", tmp_path, "--experiment", "run")
    assert run("train", "resnet20_cc2", *common, "--model-ema", "--model-ema-decay", 0.5).exit_code == 0
    with (tmp_path / "run" / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    results = {}
    for file, options in (("ema.csv", ()), ("raw.json", ("--no-use-ema",))):
        result = run("validate", tmp_path / "run", "--results-file", tmp_path / file, *options)
        assert result.exit_code == 0 and "best.ckpt" in result.output and "last.ckpt" in result.output, result.output
        text = (tmp_path / file).read_text()
        results[file] = json.loads(text) if file.endswith("json") else list(csv.DictReader(text.splitlines()))
    best, last = results["ema.csv"]
    assert float(last["loss"]) == pytest.approx(float(row["val_loss"]), rel=1e-5) and int(last["images"]) == 360
    assert float(last["error"]) == pytest.approx(float(row["val_error"])) and best["model"] == "resnet20_cc2"
    assert results["raw.json"][1]["loss"] != pytest.approx(float(row["val_loss"]), rel=1e-5)
    file = tmp_path / "gates.json"
    result = run("validate", tmp_path / "run" / "last.ckpt", "--gates", "--results-file", file)
    (counted,) = json.loads(file.read_text())
    assert "never above 1/n" in result.output and counted["error"] == pytest.approx(float(row["val_error"]))
    # Routers from one path to two and from two to two; a gate and its counterpart are skewed in opposite ways.
    assert counted["gates"] == 14 and 0 <= counted["never_above"] == counted["never_below"] <= 7


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "checkpoint is missing; name one, or a network with --model for fresh weights"),
        (("/nowhere.ckpt",), "checkpoint is /nowhere.ckpt; there is no such file"),
        (("--model", "resnet20"), "dataset is missing, and the checkpoint does not say which one it was trained on"),
        (("--model", "resnet20", "--dataset", "digits", "--ten-crop"), "ten_crop is True; it is for imagefolder"),
        (("--model", "vgg16", "--dataset", "digits", "--img-size", 32, "--gates"), "gates is True, but vgg16 has no"),
        (("--model", "resnet20", "--dataset", "imagefolder"), "data_dir is None; the dataset 'imagefolder' needs one"),
        (
            ("--model", "resnet20", "--dataset", "digits", "--crop-pct", 1.5),
            "crop_pct is 1.5; it must be above 0 and at most 1",
        ),
        (("--model", "resnet20", "--dataset", "digits", "--results-file", "r.txt"), "it must end in .csv or .json"),
        (
            ("--model", "resnet20", "--dataset", "digits", "--results-file", "/nowhere/r.csv"),
            "there is no such folder: make it first",
        ),
    ],
)
def test_validate_with_wrong_arguments(arguments, message):
    result = run("validate", *arguments)
    assert result.exit_code == 2 and message in result.output, result.output


def test_validates_fresh_weights_on_images_in_memory():
    result = run("validate", "--model", "base_cnn", "--dataset", "digits")
    assert result.exit_code == 0 and "360" in result.output, result.output


def test_moves_checkpoints_to_the_gpu_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert default_device() == torch.device("cuda", 1)


def test_refuses_a_folder_without_checkpoints_and_other_data(tmp_path):
    assert "there is no .ckpt in this folder" in run("validate", tmp_path).output
    assert (
        run("train", "resnet20", "-b", 512, "--epochs", 1, "--output", tmp_path, "--experiment", "run").exit_code == 0
    )
    for name in ("x", "y"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "0.png")
    arguments = ("--dataset", "imagefolder", "--data-dir", tmp_path / "images")
    result = run("validate", tmp_path / "run" / "last.ckpt", *arguments)
    assert (
        result.exit_code == 2
        and "its 2 classes are not the 10 of the training; missing: 0, 1, 2, 3, 4 and 5 more; new: x, y"
        in result.output
    )
    for digit in range(10):
        (tmp_path / "rgb" / str(digit)).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "rgb" / str(digit) / "0.png")
    arguments = ("--dataset", "imagefolder", "--data-dir", tmp_path / "rgb")
    result = run("validate", tmp_path / "run" / "last.ckpt", *arguments)
    assert (
        result.exit_code == 2 and "its images have 3 channels, but resnet20 was trained on images of 1" in result.output
    )


def test_validate_names_the_flag_of_a_folder_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    result = run("validate", "--model", "resnet20", "--dataset", "imagefolder", "--data-dir", tmp_path / "empty")
    assert result.exit_code == 2 and f"error: data_dir is {tmp_path / 'empty'}; " in result.output, result.output


def test_commands_leave_out_bad_images_as_the_training_did(tmp_path):
    folder = write_tree(tmp_path / "images", counts=(("train", 8), ("val", 8)))
    bad = next((folder / "val").glob("*/*.png"))
    bad.write_bytes(b"no image")
    common = ("train", "resnet20_cc2", "--data-dir", folder, "--img-size", 8, "-b", 8, "--epochs", 1, "-j", 1)
    common += ("--output", tmp_path, "--experiment", "run")
    advice = f"{bad} cannot be read as an image: .*; repair or remove it, or leave such images out .*on-bad-image skip"
    stopped = run(*common)
    assert stopped.exit_code != 0 and re.search(advice, stopped.output), stopped.output
    with pytest.warns(UserWarning, match="it is skipped"):
        trained = run(*common, "--on-bad-image", "skip", "--overwrite")
        assert trained.exit_code == 0, trained.output
        for command in ("validate", "paths", "report"):
            result = run(command, tmp_path / "run" / "best.ckpt")
            assert result.exit_code == 0, result.output
    stopped = run("validate", tmp_path / "run" / "best.ckpt", "--on-bad-image", "stop")
    assert stopped.exit_code != 0 and re.search(advice, stopped.output), stopped.output


def test_images_of_a_pattern_are_those_of_the_run(tmp_path):
    for name in ("a", "b"):
        shard(tmp_path / f"{name}.tar", range(6))
    pattern = tmp_path / "*.tar"
    data = {"dataset": "webdataset", "data_dir": str(pattern), "val_split": 0.2, "split_seed": 3}
    for given in (None, pattern):
        chosen = choose_images(data, None, given)
        assert chosen.options["val_split"] == 0.2 and chosen.data_dir == pattern, given
    gone = data | {"data_dir": str(tmp_path / "none-*.tar")}
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        choose_images(gone, None, None)


def test_images_must_be_those_of_the_training():
    chosen = Chosen("imagefolder", Path("x"), {"val_split": 0.2, "split_seed": 3}, "")
    data = {"classes": ["a", "b", "c"], "val_count": 8}
    check_fit(data, chosen, ["a", "b", "c"], 8)
    check_fit({}, chosen, ["b", "c"], 9)
    with pytest.raises(ValueError, match=r"its 2 classes are not the 3 of the training; missing: a$"):
        check_fit(data, chosen, ["b", "c"], 8)
    with pytest.raises(ValueError, match=r"its 3 classes are not the 3 of the training; they have another order$"):
        check_fit(data, chosen, ["b", "a", "c"], 8)
    with pytest.raises(ValueError, match="the run set 8 of its images aside, but now that would be 9: files were"):
        check_fit(data, chosen, ["a", "b", "c"], 9)
    check_fit(data, chosen._replace(options={}), ["a", "b", "c"], 9)


def test_a_report_of_other_classes_is_refused(tmp_path):
    folder = write_tree(tmp_path / "images", counts=(("train", 4), ("val", 4)))
    common = ("train", "resnet20_cc2", "--data-dir", folder, "--img-size", 8, "-b", 8, "--epochs", 1, "-j", 1)
    assert run(*common, "--output", tmp_path, "--experiment", "run").exit_code == 0
    classes = sorted((folder / "val").iterdir())
    for path in (folder / "train" / classes[0].name, classes[0]):
        shutil.rmtree(path)
    for command in ("report", "paths", "validate"):
        result = run(command, tmp_path / "run" / "best.ckpt")
        assert result.exit_code == 2 and "are not the 3 of the training" in result.output, result.output


def test_a_crop_of_nothing_is_refused(tmp_path):
    folder = write_tree(tmp_path / "images", counts=(("train", 4), ("val", 4)))
    result = run("validate", "--model", "resnet20", "--data-dir", folder, "--img-size", 8, "--crop-pct", 0)
    assert result.exit_code == 2 and "crop_pct is 0" in result.output, result.output


def test_validates_on_the_classes_of_the_run(tmp_path):
    common = ("-b", 512, "--first-classes", 3, "--epochs", 1, "--output", tmp_path, "--experiment", "run")
    assert run("train", "base_cnn", *common).exit_code == 0
    result = run("validate", tmp_path / "run" / "last.ckpt", "--results-file", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads((tmp_path / "found.json").read_text())
    with (tmp_path / "run" / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert found["loss"] == pytest.approx(float(row["val_loss"]), rel=1e-5) and found["images"] < 120


def test_images_are_read_as_those_of_the_run(tmp_path):
    read = {"interpolation": "bicubic", "in_chans": 1, "on_bad_image": "skip", "classes": ["cat", "ant"]}
    aside = {"val_split": 0.2, "split_seed": 3}
    data = {"dataset": "imagefolder", "data_dir": str(tmp_path), "class_map": True} | read | aside
    assert choose_images(data, None, None).options == read | aside
    assert choose_images(data | {"class_map": False}, None, None).options == read | aside | {"classes": None}
    (tmp_path / "other" / "val" / "ant").mkdir(parents=True)
    assert choose_images(data, "imagefolder", tmp_path / "other").options == read
