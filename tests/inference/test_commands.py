import csv
import errno
import io
import json
import os
import re
import shutil
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import fastroute
from fastroute.cli import app
from fastroute.cli.predict import _WRITERS, _write_csv
from fastroute.cli.trained import check_finite
from fastroute.data import ImageDataModule
from fastroute.models import create_model, register_model, registry
from fastroute.models.layers import Network, pool_and_classify
from fastroute.nn import SparseRouter
from tests.image_folders import write_tree
from tests.inference.conftest import trained


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"}, **options)


def test_predicts_a_table_of_a_folder(checkpoint, images):
    result = run("predict", checkpoint, images / "val", "--top-k", 2, "-j", 1)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if ".png" in line]
    assert len(lines) == 12 and all(str(images) in line for line in lines)
    assert all(any(name in line for name in ("ant", "bee", "cat")) for line in lines)


def test_predicts_csv_with_gates_of_patterns_and_lists(checkpoint, images, tmp_path):
    arguments = ("predict", checkpoint, images / "val" / "b*" / "*.png", "--format", "csv", "--gates", "-b", 3)
    result = run(*arguments)
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert result.exit_code == 0 and len(rows) == 4 and result.stderr == "", result.output
    assert list(rows[0])[:5] == ["path", "class_1", "probability_1", "class_2", "probability_2"]
    assert sum(float(rows[0][f"probability_{i}"]) for i in (1, 2, 3)) == pytest.approx(1, abs=1e-5)
    gates = [float(rows[0][f"stack1_router_g1{j}"]) for j in (1, 2)]
    assert sum(gates) == pytest.approx(1, abs=1e-5) and "stem_router_g21" not in rows[0]

    listed = "\n".join(row["path"] for row in rows[::-1]) + "\n"
    without = (*arguments[:2], "-", "--gates", "-b", 3)  # the format is that of the suffix
    result = run(*without, "--output", tmp_path / "out.csv", input=listed)
    assert result.exit_code == 0 and result.stdout == "", result.output
    with (tmp_path / "out.csv").open() as file:
        again = list(csv.DictReader(file))
    for row, before in zip(again, rows[::-1], strict=True):
        assert (row["path"], row["class_1"]) == (before["path"], before["class_1"])
        assert float(row["probability_1"]) == pytest.approx(float(before["probability_1"]), abs=2e-6)


def tiny_sparse(*, num_classes=10, in_chans=3, img_size=32):
    paths = [nn.Sequential(nn.Conv2d(4, 6, 3, 1, 1), nn.ReLU()) for _ in range(4)]
    stem = nn.Sequential(nn.Conv2d(in_chans, 4, 3, 2, 1), nn.ReLU())
    return Network(OrderedDict(stem=stem, stack1=SparseRouter(4, paths), head=pool_and_classify(6, num_classes)))


@pytest.fixture(scope="module")
def sparse_checkpoint(images, tmp_path_factory):
    register_model(tiny_sparse)
    data = ImageDataModule("imagefolder", images, batch_size=12, img_size=8, num_workers=1)
    yield trained(create_model("tiny_sparse", 3, img_size=8), data, tmp_path_factory.mktemp("sparse"))
    del registry._MODELS["tiny_sparse"]


@pytest.mark.parametrize("format", ["table", "csv", "json"])
def test_predicts_with_the_gates_of_sparse_routers(sparse_checkpoint, images, format):
    """They have one row of gates, without an index of the incoming path."""
    result = run("predict", sparse_checkpoint, images / "val" / "ant", "--gates", "--format", format)
    assert result.exit_code == 0, result.output
    if format == "table":
        assert re.search(r"stack1 +┃", result.stdout)
    elif format == "csv":
        row = next(csv.DictReader(io.StringIO(result.stdout)))
        assert sorted(float(row[f"stack1_g1{j}"]) for j in range(1, 5)) == [0, 0, 0, 1]
    else:
        assert sorted(json.loads(result.stdout)[0]["gates"]["stack1"][0]) == [0, 0, 0, 1]


def test_unreadable_images_are_named_counted_and_left_out(checkpoint, images, tmp_path):
    (tmp_path / "bad.png").write_text("bad")
    good = images / "val" / "ant" / "0.png"
    result = run("predict", checkpoint, tmp_path / "bad.png", good, "none.png", "--format", "json", "--top-k", 1)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["path"] == str(good) and set(row["top"][0]) == {"class", "probability"} and "gates" not in row
    assert "bad.png cannot be read as an image" in result.stderr and "none.png" in result.stderr
    assert "2 of 3 images cannot be read and are left out" in result.stderr
    result = run("predict", checkpoint, tmp_path / "bad.png")
    assert result.exit_code == 1 and "none of the images can be read" in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["."], "paths has .*; there are no images in this folder"),
        (["*.nothing"], r"paths has \*\.nothing; no file matches it"),
        (["x.png", "--output", "none/x.csv"], "output is none/x.csv; there is no such folder: make it first"),
        (["x.png", "--output", "/"], "output is /; it is a folder: name a file"),
        (["x.png", "--device", "tpu"], "device is 'tpu'"),
        (["x.png", "--model", "a.b:c"], "leave model out"),
    ],
)
def test_errors_of_the_command_are_one_sentence(checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run("predict", checkpoint, *arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert re.search(message, result.output), result.output


def test_exports_and_says_how_far_the_file_is_from_eager(checkpoint, images, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "out.safetensors"
    result = run("export", checkpoint, "--to", "safetensors", "--output", path)
    assert result.exit_code == 0 and "differ from eager PyTorch's by at most 0.0e+00" in result.output, result.output
    first = run("predict", checkpoint, images / "val" / "ant", "--format", "csv")
    assert run("predict", path, images / "val" / "ant", "--format", "csv").stdout == first.stdout != ""
    result = run("export", checkpoint, "--to", "onnx", "--output", checkpoint)
    assert result.exit_code == 2 and "it is the checkpoint itself" in result.output
    result = run("predict", path, images, "--img-size", 6)
    assert result.exit_code == 0, result.output


def test_files_that_are_no_checkpoints_are_told_apart(checkpoint, tmp_path):
    for suffix, runs in ((".onnx", "onnxruntime"), (".pt2", "torch.export.load")):
        (tmp_path / f"x{suffix}").write_bytes(b"program")
        result = run("predict", tmp_path / f"x{suffix}", "x.png")
        assert result.exit_code == 2 and f"run such a program by {runs}" in result.output, result.output
    result = run("predict", checkpoint.parent, "x.png")
    assert result.exit_code == 2 and f"it is a folder: name {checkpoint.parent}" in result.output
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    result = run("validate", tmp_path / "weights.pth")
    assert result.exit_code == 2 and "name the network as well (model, --model)" in result.output


def test_own_network_from_training_to_prediction(own, images, tmp_path):
    torch.save(create_model(own, 9, width=6).state_dict(), "single.pth")
    train = ("train", own, "--model-kwargs", "width=6", "--multipath", 2, "--route-after", "0,1", "--data-dir", images)
    train += ("--dataset", "imagefolder", "--img-size", 8, "-b", 12, "--epochs", 1, "--output", tmp_path, "-j", 1)
    result = run(*train, "--experiment", "run", "--pretrained-path", "single.pth")
    assert result.exit_code == 0, result.output
    assert "its classifier is of 9 classes and is left out: 4.weight, 4.bias for 3 classes start fresh" in result.output
    checkpoint = tmp_path / "run" / "last.ckpt"
    run_of = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    assert run_of["specification"]["init"] == "copy" and run_of["specification"]["kwargs"] == {"width": 6}
    arguments = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert arguments["model"] == own and arguments["multipath"] == 2 and arguments["model_kwargs"] == ["width=6"]

    result = run("train", "-c", tmp_path / "run" / "args.yaml", "--experiment", "again")
    assert result.exit_code == 0, result.output
    result = run(
        "train", own, *train[8:], "--experiment", "more", "--resume", checkpoint, "--epochs", 2, "--sched", "step"
    )
    assert result.exit_code == 2 and "sched" in result.output  # another schedule, but the network is the checkpoint's

    for command in (["validate"], ["paths"]):
        result = run(*command, checkpoint)
        assert result.exit_code == 2 and "own code is imported only where you name it" in result.output, result.output
        result = run(*command, checkpoint, "--model", own)
        assert result.exit_code == 0, result.output
    result = run("predict", checkpoint, images / "val", "--model", own, "--gates", "--format", "csv")
    assert result.exit_code == 0 and "0_router_g12" in result.stdout, result.output


ROUTED_NETWORK = """
from torch import nn
from fastroute.nn import CrossConnection

class Routed(nn.Module):
    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.stem, self.head = nn.Conv2d(in_chans, 4, 3), nn.Linear(4, num_classes)
        self.split, self.cross = CrossConnection(4, 1, 2), CrossConnection(4, 2, 2)

    def forward(self, x):
        xs = self.cross(self.cross(self.split([self.stem(x).relu()])))
        return self.head((xs[0] + xs[1]).mean((2, 3)))

class Plain(Routed):
    def forward(self, x):
        return self.head(self.stem(x).relu().mean((2, 3)))

    def __init__(self, num_classes, in_chans):
        super().__init__(num_classes, in_chans)
        del self.split, self.cross

def routed(num_classes=10, in_chans=3):
    return Routed(num_classes, in_chans)

def plain(num_classes=10, in_chans=3):
    return Plain(num_classes, in_chans)
"""


def test_routers_in_an_own_network(tmp_path, monkeypatch):
    (tmp_path / "routed_nets.py").write_text(ROUTED_NETWORK)
    images = tmp_path / "images"
    for i, pixels in enumerate(torch.randint(256, (48, 8, 8, 3), dtype=torch.uint8)):
        place = images / ("train", "val")[i % 2] / "ab"[i // 24]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(place / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    for name in ("routed", "plain"):
        own = ("--model", f"routed_nets:{name}")
        train = ("train", own[1], "--data-dir", images, "--dataset", "imagefolder", "--img-size", 8, "-b", 12, "-j", 0)
        result = run(*train, "--stream", "--epochs", 1, "--output", tmp_path, "--experiment", name)
        assert result.exit_code == 0, result.output
        checkpoint = tmp_path / name / "last.ckpt"
        commands = [("paths", checkpoint), ("report", checkpoint, "--output", "report.html")]
        commands += [("validate", checkpoint, "--gates"), ("predict", checkpoint, images / "val", "--gates")]
        commands = [(*command, "-j", 0) for command in commands]  # without workers
        for command in commands:
            result = run(*command, *own)
            assert (result.exit_code == 0) == (name == "routed"), result.output
            if name == "routed":
                assert command[0] in ("report", "validate") or "cross_2" in result.output, result.output
            else:
                assert result.exit_code == 2 and "no routers" in result.output, result.output
    sys.modules.pop("routed_nets")


def test_a_resumed_run_has_the_network_of_its_checkpoint(own, images, tmp_path):
    common = (
        "--data-dir",
        images,
        "--dataset",
        "imagefolder",
        "--img-size",
        8,
        "-b",
        12,
        "--output",
        tmp_path,
        "-j",
        1,
    )
    common += ("--sched", "step", "--experiment", "run")
    first = ("train", "torchvision:squeezenet1_1", "--multipath", 2, "--route-after", "features.2", "--routing", "none")
    result = run(*first, *common, "--img-size", 32, "--epochs", 1)
    assert result.exit_code == 0, result.output
    last = tmp_path / "run" / "last.ckpt"
    result = run("train", *common, "--img-size", 32, "--epochs", 2, "--resume", last)
    assert result.exit_code == 0 and "epoch 2/2" in result.output, result.output
    arguments = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert (arguments["multipath"], arguments["route_after"], arguments["routing"]) == (2, "features.2", "none")
    result = run(*first[:2], "--multipath", 3, *common, "--img-size", 32, "--epochs", 3, "--resume", last)
    assert result.exit_code == 2 and "its network was built with paths=2, not 3" in result.output, result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["resnet20", "--route-after", "stack1"], "route_after is 'stack1'; it needs --multipath"),
        (["resnet20", "--init", "copy"], "init is 'copy'; it needs --multipath"),
        (["resnet20", "--multipath", 2, "--route-after", "stack9"], "there is no such module: did you mean stack"),
        (["resnet20", "--model-kwargs", "depth"], "model_kwargs has 'depth'; each must be K=V"),
        (["resnet20", "--model-kwargs", "a=1", "b=2"], "does not take these arguments"),
        (["resnet20", "resnet32"], "model is 'resnet20', and 'resnet32' too; name one network"),
        (["resnet20", "depth=3"], "give arguments of the network by --model-kwargs depth=3"),
        (
            ["resnet20", "--data-dir", "one", "--img-size", 8],
            "the data has one class, 'bee'; training",
        ),
        (["resnet20", "--pretrained"], "there are no weights of resnet20 to download"),
        (["resnet20", "--pretrained-path", "none.pth"], "pretrained_path is none.pth; there is no such file"),
        (["tim:resnet18"], "there is no module 'tim' here"),
        (["torchvision:inception_v3", "--img-size", 8], "img_size is 8; torchvision:inception_v3 cannot take images"),
        ([], "model is missing; name a network"),
    ],
)
def test_wrong_networks_end_in_a_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "one", classes=["bee"])
    result = run("train", *arguments, "--epochs", 1, "--output", tmp_path / "runs")
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert message in result.output, result.output


def test_a_network_that_has_diverged_is_refused(checkpoint, images, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    for name, value in saved["state_dict"].items():
        if value.is_floating_point():
            saved["state_dict"][name] = torch.full_like(value, float("nan"))
    torch.save(saved, tmp_path / "nan.ckpt")
    result = run("predict", tmp_path / "nan.ckpt", images / "val", "--format", "json")
    assert result.exit_code == 2 and "are NaN or infinite" in result.output and result.stdout == ""
    result = run("validate", tmp_path / "nan.ckpt", "--results-file", tmp_path / "nan.json", "-j", 1)
    assert result.exit_code == 0, result.output
    (found,) = json.loads((tmp_path / "nan.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert found["loss"] is None
    result = run("validate", tmp_path / "nan.ckpt", "--gates", "-j", 1)
    assert result.exit_code == 2 and "are NaN; the network has diverged" in result.output


def test_results_before_an_error_are_printed(checkpoint, tmp_path):
    shutil.copy(checkpoint, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(b"no checkpoint")
    (tmp_path / "r.csv").write_text("of an earlier run")
    result = run("validate", tmp_path, "--results-file", tmp_path / "r.csv", "-j", 1)
    assert result.exit_code == 2 and "b.ckpt" in result.output and re.search(r"a\.ckpt.*tiny_cc2", result.output)
    assert (tmp_path / "r.csv").read_text().startswith("checkpoint,model")


def test_output_replaces_a_file_and_goes_into_a_pipe(checkpoint, images, tmp_path):
    image = images / "val" / "ant" / "0.png"
    (tmp_path / "real.csv").write_text("earlier")
    (tmp_path / "link.csv").symlink_to("real.csv")
    assert run("predict", checkpoint, image, "--format", "csv", "--output", tmp_path / "link.csv").exit_code == 0
    assert (tmp_path / "link.csv").is_symlink() and str(image) in (tmp_path / "real.csv").read_text()
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit((tmp_path / "pipe").read_text)
        assert run("predict", checkpoint, image, "--format", "csv", "--output", tmp_path / "pipe").exit_code == 0
        assert read.result(10) == (tmp_path / "real.csv").read_text()


def test_a_reader_that_has_enough_is_told_nothing(checkpoint, images, monkeypatch):
    def closed(rows, file):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setitem(_WRITERS, "csv", closed)
    result = run("predict", checkpoint, images / "val" / "ant", "--format", "csv")
    assert result.exit_code == 1 and "error" not in result.output


def test_masks_may_be_infinite():
    network = nn.BatchNorm1d(2)
    network.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    check_finite(network, "x.ckpt")
    network.running_mean[0] = float("nan")
    with pytest.raises(ValueError, match="1 of its 4 tensors, such as running_mean, are NaN or infinite"):
        check_finite(network, "x.ckpt")


def test_names_of_gates_are_unique(capsys):
    rows = [{"path": "x", "top": [("a", 1.0)], "gates": {"r": [[0.0] * 11] * 11, "s": [[0.5, 0.5]]}}]
    _write_csv(rows, sys.stdout)
    header = capsys.readouterr().out.splitlines()[0].split(",")
    assert len(set(header)) == len(header) and {"r_g1_11", "r_g11_1", "s_g12"} <= set(header)


@pytest.mark.parametrize(
    "words, options",
    [
        (("--no-use-ema",), {"ema": False}),
        (("--img-size", 6), {"img_size": 6}),
        (("--crop-pct", 0.5), {"crop_pct": 0.5}),
    ],
)
def test_predicts_as_a_predictor_of_the_same_options(checkpoint, images, tmp_path, words, options):
    saved, path = torch.load(checkpoint), images / "val" / "ant" / "0.png"
    saved["current_model_state"]["model.head.0.2.bias"][0] += 1  # which the averaged weights lack
    torch.save(saved, tmp_path / "run.ckpt")
    result = run("predict", tmp_path / "run.ckpt", path, "--format", "json", "-j", 1, *words)
    assert result.exit_code == 0, result.output
    found = {row["class"]: row["probability"] for row in json.loads(result.stdout)[0]["top"]}
    expected, other = (
        dict(fastroute.load(tmp_path / "run.ckpt", device="cpu", **given)(path).top(3)[0]) for given in (options, {})
    )
    assert found == pytest.approx(expected, abs=1e-6) and found != pytest.approx(other, abs=1e-5)
