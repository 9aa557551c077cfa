import csv
import dataclasses
import inspect
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from rich.table import Table
from typer.main import get_command
from typer.testing import CliRunner

import fastroute
from fastroute import _files
from fastroute.cli import COMMANDS, app
from fastroute.cli.errors import standard_output
from fastroute.cli.train_options import TrainOptions
from fastroute.cli.trained import default_device
from fastroute.training import ImageDataModule, RoutingClassifier, fit
from fastroute.training.optim import parameter_groups, scheduler
from fastroute.training.recipes import recipes

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)


def test_trains_on_digits_and_resumes_from_a_checkpoint(tmp_path):
    common = ("train", "resnet20_cc2", "-b", 256, "--decay-milestones", "1,2", "--output", tmp_path)
    result = run(*common, "--epochs", 1, "--experiment", "run")
    assert result.exit_code == 0, result.output
    assert "epoch 1/1" in result.output and "stack3_router" in result.output and str(tmp_path / "run") in result.output
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events")}
    assert names == {"args.yaml", "hparams.yaml", "best.ckpt", "last.ckpt", "summary.csv", "routers.csv"}

    result = run(*common, "--epochs", 2, "--resume", folder / "last.ckpt")
    assert result.exit_code == 0, result.output
    assert "epoch 1/2" not in result.output and "epoch 2/2" in result.output
    with (folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], float(row["lr"])) for row in rows] == [("1", 0.1), ("2", pytest.approx(0.01))]

    ensemble = fastroute.models.Ensemble.from_checkpoints([folder / "best.ckpt", folder / "last.ckpt"])
    assert ensemble(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_trains_a_routed_network_in_a_new_process(tmp_path):
    """A command imports less than `import fastroute`, and must register the kernels all the same."""
    arguments = ("train", "resnet20_cc2", "-b", "1437", "--epochs", "1", "--output", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "fastroute", *arguments], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0 and "epoch 1/1" in done.stdout, done.stdout + done.stderr


def test_reads_defaults_from_a_file_which_flags_override(tmp_path):
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
    config.write_text("zzzzzz: 1")
    result = run("train", "resnet20", "-c", config)
    assert result.exit_code == 2 and "there is no option 'zzzzzz'" in result.output, result.output
    config.write_text("lr: true")
    result = run("train", "resnet20", "-c", config)
    assert result.exit_code == 2 and "lr is True; expected a value, got a boolean" in result.output
    config.write_text("- 1")
    assert "expected a `name: value` pair for each option" in run("train", "resnet20", "-c", config).output
    assert "there is no such file" in run("train", "resnet20", "-c", tmp_path / "none.yaml").output
    config.write_text("a: [1")
    assert "it is not a YAML file" in run("train", "resnet20", "-c", config).output
    assert "did you mean cifar10_resnet20" in run("train", "-c", "cifar_resnet20").output


def test_accepts_args_yaml_of_a_run_as_config(tmp_path):
    first = ("train", "resnet20", "-b", 512, "--epochs", 1, "--sched", "step", "--decay-epochs", 3, "--smoothing", 0.1)
    assert run(*first, "--output", tmp_path, "--experiment", "first").exit_code == 0
    again = run("train", "-c", tmp_path / "first" / "args.yaml", "--experiment", "second")
    assert again.exit_code == 0, again.output
    arguments = [yaml.safe_load((tmp_path / name / "args.yaml").read_text()) for name in ("first", "second")]
    assert arguments[0] == arguments[1] | {"experiment": "first"}
    weights = [torch.load(tmp_path / name / "last.ckpt")["state_dict"] for name in ("first", "second")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_reads_a_recipe_which_flags_override(tmp_path):
    result = run(
        *("train", "-c", "cifar10_resnet20_cc2_short", "--dataset", "digits", "--epochs", 1, "-b", 512),
        *("--no-amp", "--first-classes", 3, "--output", tmp_path, "--experiment", "run"),
    )
    assert result.exit_code == 0, result.output
    arguments = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    expected = {"model": "resnet20_cc2", "dataset": "digits", "epochs": 1, "sched": "onecycle", "amp": False}
    assert expected.items() <= arguments.items()
    assert torch.load(tmp_path / "run" / "last.ckpt")["hyper_parameters"]["num_classes"] == 3
    result = run("validate", tmp_path / "run" / "last.ckpt")  # on images of the three classes, by default
    assert result.exit_code == 0 and "107" in result.output, result.output


@pytest.mark.parametrize(
    ("function", "others"),
    [
        (RoutingClassifier, {"model"}),
        (ImageDataModule, {"seed"}),
        (fit, {"amp_dtype", "model_ema_decay", "output", "seed"}),  # None turns them off, or names a new folder
        (parameter_groups, set()),
        (scheduler, set()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_train_has_the_defaults_of_the_functions_it_calls(function, others):
    parameters = inspect.signature(function).parameters.values()
    required = {parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty}
    defaults = {parameter.name: parameter.default for parameter in parameters}
    options = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    shared = (defaults.keys() & options.keys()) - others - required - {"num_classes", "in_chans", "img_size"}
    assert len(shared) > 4
    assert {name: options[name] for name in shared} == {name: defaults[name] for name in shared}


def test_every_recipe_holds_options_of_its_command():
    for command in ("train", "cluster"):
        options = {option.name for option in get_command(app).commands[command].params}
        for recipe in recipes(command).values():
            assert recipe.options.keys() <= options, recipe.name


def test_recipes_are_listed_with_what_the_thesis_reports():
    result = run("recipes", "ilsvrc2012*")
    assert result.exit_code == 0 and "ilsvrc2012_resnet18_cc2" in result.output and "cifar10" not in result.output
    assert all(number in result.output for number in ("26.48", "8.60", "24.50", "7.34"))
    result = run("recipes", "cluster_*")
    assert "cluster_stl10_two-fold" in result.output and "63.84" in result.output and "ilsvrc" not in result.output
    result = run("recipes", "resnet*")
    assert result.exit_code == 2 and "pattern is 'resnet*'; there is no such recipe" in result.output


def test_resume_auto_starts_resumes_and_finishes(tmp_path):
    common = ("train", "resnet20", "-b", 512, "--sched", "step", "--output", tmp_path, "--resume", "auto")
    assert "resume is 'auto'; name the run by --experiment" in run(*common, "--epochs", 1).output
    for epochs, shown in ((1, "epoch 1/1"), (2, "epoch 2/2"), (2, "all 2 epochs are done")):
        result = run(*common, "--epochs", epochs, "--experiment", "run")
        assert result.exit_code == 0 and shown in result.output, result.output


def test_starts_from_weights(tmp_path):
    path = tmp_path / "weights.pt"
    torch.manual_seed(1)
    network = fastroute.models.create_model("resnet20", in_chans=1)
    torch.save(network.state_dict(), path)
    arguments = (
        "train",
        "resnet20",
        "-b",
        2000,
        "--epochs",
        1,
        "--lr",
        1e-9,
        "--output",
        tmp_path,
        "--experiment",
        "run",
    )
    assert run(*arguments, "--initial-checkpoint", path).exit_code == 0
    trained = torch.load(tmp_path / "run" / "last.ckpt")["state_dict"]
    for name, value in network.named_parameters():
        torch.testing.assert_close(trained[f"model.{name}"], value)


def test_reports_a_diverging_run_in_one_line(tmp_path):
    result = run(
        "train", "resnet20", "-b", 512, "--lr", 1e30, "--epochs", 3, "--output", tmp_path, "--experiment", "run"
    )
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert re.search(r"error: the loss is (nan|inf) at epoch \d, step \d, with learning rate 1e\+30", result.output)


def test_reports_a_full_disk_in_one_line_and_resumes_later(tmp_path, monkeypatch):
    common = ("train", "resnet20", "-b", 512, "--sched", "step", "--output", tmp_path, "--experiment", "run")
    assert run(*common, "--epochs", 1).exit_code == 0
    (tmp_path / "run" / "full").symlink_to("/dev/full")
    with monkeypatch.context() as patch:
        patch.setattr(_files, "_temporary", lambda path: path.with_name("full" if path.suffix == ".ckpt" else "other"))
        result = run(*common, "--epochs", 2, "--resume", "auto")
    assert result.exit_code == 1 and "last.ckpt cannot be written, the previous checkpoint is intact" in result.output
    assert "No space left on device" in result.output and "Traceback" not in result.output
    result = run(*common, "--epochs", 2, "--resume", "auto")
    assert result.exit_code == 0 and "epoch 2/2" in result.output


def test_saves_at_ctrl_c_and_prints_how_to_resume(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    common = ("train", "resnet20", "-b", "64", "--first-classes", "4", "--sched", "step", "--output", tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = (
        sys.executable,
        "-m",
        "fastroute",
        *common,
        "--experiment",
        "run",
        "--epochs",
        "50",
        "--log-interval",
        "1",
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment) as process:
        for line in process.stdout:
            if line.startswith("epoch 1/50"):
                break
        process.send_signal(signal.SIGINT)
        output = process.stdout.read()
    assert process.returncode == 130 and "stopped by Ctrl-C at epoch 1, step" in output and "saved to" in output
    started, *arguments = shlex.split(output.splitlines()[-1])
    assert started == "fastroute" and arguments[0] == "train"
    result = run(*arguments, "--epochs", 3)
    assert result.exit_code == 0 and "epoch 3/3" in result.output, result.output


def test_overwrites_a_finished_run_only_on_request(tmp_path):
    common = ("-b", 2000, "--first-classes", 2, "--sched", "step", "--output", tmp_path, "--experiment", "lr0.1[bn]")
    train = ("train", "resnet20", *common)
    first = run(*train, "--epochs", 1)
    assert first.exit_code == 0 and str(tmp_path / "lr0.1[bn]") in first.output
    again = run(*train, "--epochs", 1)
    assert again.exit_code == 2 and "it has a finished run of 1 epoch:" in again.output
    assert "lr0.1[bn]" in again.output and "--overwrite" in again.output
    assert run(*train, "--epochs", 1, "--overwrite").exit_code == 0
    assert run(*train, "--epochs", 2, "--resume", "auto").exit_code == 0
    last = torch.load(tmp_path / "lr0.1[bn]" / "last.ckpt")
    last["epochs"] = 3  # as of a run that was stopped
    torch.save(last, tmp_path / "lr0.1[bn]" / "last.ckpt")
    assert run(*train, "--epochs", 1).exit_code == 0


def test_the_version_and_a_recipe_are_printed():
    result = run("--version")
    assert result.exit_code == 0 and result.output == f"fastroute {fastroute.__version__}\n"
    result = run("recipes", "cifar10_base_cnn_cc2")
    assert result.exit_code == 0 and yaml.safe_load(result.output)["decay_milestones"] == [80, 150]
    assert "7.03 %" in result.output
    assert "did you mean cifar10_base_cnn_cc" in run("recipes", "cifar10_base_cnn_cc").output


def test_piped_tables_keep_their_width(monkeypatch):
    names = "a" * 60, "b" * 60
    for columns, whole in ((None, True), ("80", False)):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns:
            monkeypatch.setenv("COLUMNS", columns)
        file = io.StringIO()
        standard_output(file=file).print(Table(*names))
        assert any(all(name in line for name in names) for line in file.getvalue().splitlines()) == whole


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
    assert "never above 0.5" in result.output and counted["error"] == pytest.approx(float(row["val_error"]))
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


def test_refuses_impossible_compile_modes_and_recordings_before_reading_images(tmp_path, monkeypatch):
    arguments = ("train", "resnet20", "--dataset", "imagefolder", "--data-dir", tmp_path / "none")
    result = run(*arguments, "--compile-mode", "max-autotune")
    assert result.exit_code == 2 and "compile_mode is 'max-autotune', but compile is False" in result.output
    if not torch.cuda.is_available():
        result = run(*arguments, "--cuda-graphs")
        assert result.exit_code == 2, result.output
        assert "cuda_graphs is True; it needs a CUDA device, and there is none" in result.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for more, message in (
        (("--amp", "--amp-dtype", "float16"), "use amp_dtype 'bfloat16'"),
        (("--grad-accum-steps", 2), "grad_accum_steps must be 1, not 2"),
        (("--compile", "--compile-mode", "reduce-overhead"), "compile_mode 'reduce-overhead' records CUDA graphs"),
        (("--stream", "--on-bad-image", "skip"), "batches must be of one size"),
    ):
        result = run(*arguments, "--cuda-graphs", *more)
        assert result.exit_code == 2 and "cuda_graphs is True; " in result.output, result.output
        assert message in result.output, result.output


def test_reads_cuda_graphs_and_compile_mode_from_a_file(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("cuda_graphs: true\ncompile: true\ncompile-mode: max-autotune\n")
    result = run("train", "resnet20", "-c", config)
    assert result.exit_code == 2 and "cuda_graphs is True; " in result.output, result.output
    config.write_text("compile-mode: default\n")
    assert "compile_mode is 'default', but compile is False" in run("train", "resnet20", "-c", config).output
    result = run("train", "resnet20", "-b", 512, "--epochs", 1, "--output", tmp_path, "--experiment", "run")
    assert result.exit_code == 0
    arguments = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert arguments["cuda_graphs"] is False and arguments["compile_mode"] is None


def test_reports_missing_gpus_in_one_line(monkeypatch):
    for device, message in (
        ("nonsense", "device is 'nonsense'; it must be cpu, cuda, or such as cuda:1"),
        ("mps", "device is 'mps'; it must be cpu, cuda, or such as cuda:1"),
        ("cuda:31", "device is 'cuda:31'; this machine has "),
    ):
        result = run("bench", "--list", "--device", device)
        assert result.exit_code == 2 and message in result.output, result.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    result = run("train", "resnet20")
    assert result.exit_code == 2 and "torchrun started 4 processes on a machine with 1 GPU; start one" in result.output


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
    assert result.exit_code == 2 and "its 2 classes (x, …) are not the 10 of the training (0, …)" in result.output
    for digit in range(10):
        (tmp_path / "rgb" / str(digit)).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "rgb" / str(digit) / "0.png")
    arguments = ("--dataset", "imagefolder", "--data-dir", tmp_path / "rgb")
    result = run("validate", tmp_path / "run" / "last.ckpt", *arguments)
    assert (
        result.exit_code == 2 and "its images have 3 channels, but resnet20 was trained on images of 1" in result.output
    )


def test_demo_compares_both_networks_and_shows_one(tmp_path):
    result = run("demo", "--epochs", 1, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "272,186" in result.output and "548,386" in result.output and "stem_router" in result.output
    assert (tmp_path / "resnet20" / "summary.csv").is_file() and (tmp_path / "resnet20_cc2" / "best.ckpt").is_file()
    page = tmp_path / "report" / "report.html"
    assert page.is_file() and str(page) in result.output


def test_gates_are_clustered_beside_the_task(tmp_path):
    arguments = ("resnet20_cc2", "--epochs", 1, "--output", tmp_path, "--experiment", "run", "-b", 256)
    result = run("train", *arguments, "--gate-reg-weight", 0.01)
    assert result.exit_code == 0, result.output
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    priors = state["aux_loss._extra_state"]
    assert set(priors) == {"stem_router", "stack1_router", "stack2_router", "stack3_router"}
    assert priors["stack1_router"].shape == (2, 2)
    arguments = (*arguments[:-4], "--experiment", "joined", "-b", 256, "--gate-reg-scope", "router")
    assert run("train", *arguments, "--gate-reg-weight", 0.01).exit_code == 0
    joined = torch.load(tmp_path / "joined" / "last.ckpt", weights_only=True)["state_dict"]["aux_loss._extra_state"]
    assert joined["stack1_router"].shape == (2,)
    from fastroute.training import RoutingClassifier

    RoutingClassifier.load_from_checkpoint(tmp_path / "run" / "last.ckpt")


def test_trains_a_sparse_network_by_its_recipe(tmp_path):
    recipe = "cifar10_resnet20_sparse4_top1_short"
    arguments = ("train", "-c", recipe, "--dataset", "digits", "--epochs", 1, "-b", 512, "--output", tmp_path)
    result = run(*arguments, "--experiment", "run", "--no-amp")
    assert result.exit_code == 0, result.output
    with (tmp_path / "run" / "routers.csv").open() as file:
        loads = [float(row["load"]) for row in csv.DictReader(file)]
    assert len(loads) == 12 and [sum(loads[i : i + 4]) for i in (0, 4, 8)] == pytest.approx([1, 1, 1])
    model = fastroute.load(tmp_path / "run" / "best.ckpt").model
    assert model.stack1.routing == "cluster" and model.specification.kwargs == {"routing": "cluster"}


def test_info_names_every_backend():
    result = run("info")
    assert result.exit_code == 0, result.output
    assert fastroute.__version__ in result.output and torch.__version__ in result.output
    for names in fastroute.backends.ORDER.values():
        assert all(name in result.output for name in names)


def test_models_lists_parameters_and_macs_beside_the_thesis():
    result = run("models", "resnet20_c?2")
    rows = {row[0]: row[1:] for line in result.output.splitlines() if (row := line.replace("│", " ").split())}
    assert rows["resnet20_cc2"] == ["548,674", "0.55", "81.4", "3.3"]
    assert rows["resnet20_cp2"][:2] == ["593,054", "0.59"] and "resnet20_x2" not in result.output
    result = run("models", "resnet_20*")
    assert result.exit_code == 2 and "pattern is 'resnet_20*'; there is no such network" in result.output


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
            "data_dir is /nowhere; there is no such file or folder",
        ),
        (("resnet20", "--resume", "/nowhere.ckpt"), "resume is /nowhere.ckpt; there is no such file"),
        ((), "model is missing; name a network, or a recipe with --config"),
        (("resnet20", "--gate-reg-weight", 0.01), "gate_reg_weight is 0.01, but resnet20 has no gates"),
        (("resnet20", "--first-classes", 11), "first_classes is 11; it must be 1 to 10"),
        (("resnet20", "--aa", "fast"), "aa is 'fast'; it must be one of"),
        (("resnet20", "--reprob", 2), "reprob is 2.0; it must be between 0 and 1"),
        (("resnet20", "--scale", "0.5"), "scale is 0.5; expected two numbers above 0"),
        (("resnet20", "--sync-bn"), "sync_bn is True; PyTorch's synchronised batch norm needs GPUs"),
        (("resnet20", "--clip-grad", 0), "--clip-grad"),
        (("resnet20", "--model-ema-decay", 1), "--model-ema-decay"),
        (("resnet20", "--stream"), "in_memory is False; it can be chosen for the dataset 'imagefolder' alone"),
        (("resnet20", "--initial-checkpoint", "/nowhere.pt"), "initial_checkpoint is /nowhere.pt; there is no such"),
        (("resnet20", "--dataset", "cifar10", "--data-dir", "/nowhere"), "data_dir is /nowhere; CIFAR10 is not whole"),
        (("resnet20", "--dataset", "webdataset", "--data-dir", "/tmp"), "there are no shards train/*.tar"),
        (("resnet20", "--data-dir", "{folder}/empty"), "/empty; it"),
        (("--config", "{folder}/list.yaml"), "list.yaml; model is ['a', 'b']; expected one value, got a list"),
        (("resnet20", "--initial-checkpoint", "{folder}/list.yaml"), "torch.save did not write this file"),
        (("resnet20", "--resume", "{folder}/weights.pth"), "training run: it has no 'hyper_parameters'"),
        (("resnet20", "--device", "cuda:99"), "device is 'cuda:99'; this machine has"),
        (("resnet20", "--device", "cpu", "--amp", "--amp-dtype", "float16"), "amp_dtype is 'float16'; on a CPU it"),
        (("resnet20", "--epochs", 1, "--warmup-epochs", 2), "warmup_epochs is 2; it must be at most epochs, 1"),
        (("resnet20", "--log", "csv,board"), "log is 'board'; expected names out of csv, tensorboard, wandb, mlflow"),
        (("resnet20", "--min-lr", 1), "min_lr is 1.0; it must be from 0 to lr, 0.1"),
    ],
)
def test_reports_wrong_arguments_in_one_line(arguments, message, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    (folder / "empty").mkdir(parents=True)
    output.mkdir()
    (folder / "list.yaml").write_text("model: [a, b]")
    torch.save({"weight": torch.zeros(1)}, folder / "weights.pth")
    result = run("train", *(str(item).format(folder=folder) for item in arguments), "--output", output)
    assert result.exit_code == 2 and message in result.output, result.output
    assert "Traceback" not in result.output and not list(output.iterdir())


def test_validate_names_the_flag_of_a_folder_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    result = run("validate", "--model", "resnet20", "--dataset", "imagefolder", "--data-dir", tmp_path / "empty")
    assert result.exit_code == 2 and f"error: data_dir is {tmp_path / 'empty'}; " in result.output, result.output


def test_dropout_and_stochastic_depth_are_arguments_of_networks_that_take_them(tmp_path):
    pytest.importorskip("timm")
    common = ("train", "timm:test_resnet", "--multipath", 2, "--epochs", 1, "-b", 1437, "--output", tmp_path)
    result = run(*common, "--drop", 0.25, "--drop-path", 0.1, "--experiment", "run")
    assert result.exit_code == 0, result.output
    network = fastroute.load(tmp_path / "run/last.ckpt").model
    kinds = {type(m).__name__: getattr(m, "p", getattr(m, "drop_prob", None)) for m in network.modules()}
    assert network.specification.kwargs == {"drop_rate": 0.25, "drop_path_rate": 0.1}
    assert kinds["Dropout"] == 0.25 and 0 < kinds["DropPath"] < 0.11
    arguments = yaml.safe_load((tmp_path / "run/args.yaml").read_text())
    assert arguments["model_kwargs"] == ["drop_rate=0.25", "drop_path_rate=0.1"] and arguments["drop"] is None


@pytest.mark.parametrize("model", ["resnet20", "torchvision:resnet18"])
def test_a_sentence_where_the_network_takes_no_dropout(model, tmp_path):
    for flag, option in (("--drop", "drop"), ("--drop-path", "drop_path")):
        result = run("train", model, flag, 0.1, "--output", tmp_path)
        assert f"error: {option} is 0.1; {model} takes no {option}_rate: leave the flag out" in result.output
        assert result.exit_code == 2 and not list(tmp_path.iterdir())


def test_runs_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "fastroute", "--help"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert result.returncode == 0 and "train" in result.stdout


def test_help_needs_no_torch_and_says_what_commands_do():
    code = "import sys; sys.argv[0] = 'fastroute'; import fastroute.cli; print('torch' in sys.modules)"
    assert python(code).stdout.strip() == "False"
    done = run("--help")
    assert done.exit_code == 0
    for name, line in COMMANDS.items():
        assert name in done.output and line.split(";")[0] in " ".join(done.output.replace("│", " ").split())
        command = get_command(app).commands[name]
        assert name == "bench" or command.help.partition("\n\n")[0] == line, name
    code = (
        "import sys; sys.argv[0] = 'fastroute'\n"
        "from fastroute.cli import COMMANDS, app\n"
        "from typer.testing import CliRunner\n"
        "for name in COMMANDS:\n"
        "    result = CliRunner().invoke(app, [name, '--help'])\n"
        "    assert result.exit_code == 0 and name in result.output, result.output\n"
        "    assert not {'torch', 'numpy'} & set(sys.modules), name"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    code = "import sys; sys.argv[0] = 'fastroute'; import fastroute; print(fastroute.nn.Router, fastroute.multipath)"
    assert "Router" in python(code).stdout
    code = "import fastroute, torch; print(torch.ops.fastroute.mix)"
    assert "fastroute.mix" in python(code).stdout


def test_import_needs_torch_alone():
    unwanted = {"pytorch_lightning", "torchvision", "torchmetrics", "sklearn", "typer", "rich", "yaml", "PIL"}
    unwanted |= {"timm", "onnx", "safetensors"}
    result = python(f"import sys, fastroute; print(sorted({unwanted} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_lists_networks_where_torchvision_is_not_installed():
    code = (
        "import sys; sys.modules['torchvision'] = None; sys.argv = ['fastroute', 'models', 'resnet[12][80]']\n"
        "from fastroute.cli import main; main()"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in done.stdout.splitlines() if "│" in line}
    assert rows["resnet20"] == "272,474" and rows["resnet18"] == ""
    assert "1 network is not counted: this network needs the package torchvision" in done.stdout


@pytest.mark.parametrize(
    "package, module, extra",
    [
        ("typer", "fastroute.cli", "train"),
        ("pytorch_lightning", "fastroute.training", "train"),
        ("matplotlib", "fastroute.bench.plots", "bench"),
    ],
)
def test_a_missing_package_names_the_extra(package, module, extra):
    result = python(f"import sys; sys.modules[{package!r}] = None; import {module}")
    assert result.returncode == 1
    sentence = f"needs the package {package}, which is not installed: pip install 'fastroute[{extra}]'"
    assert sentence in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "error, sentence",
    [
        (MemoryError("Unable to allocate 9 TiB"), "the machine's memory is exhausted: Unable to allocate 9 TiB; lower"),
        (RuntimeError("[enforce fail] not enough memory: you tried to allocate 9 bytes"), "memory is exhausted"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB"),
            "the GPU's memory is exhausted: CUDA out of memory",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            "a process that decodes images is gone",
        ),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OverflowError("int too big to convert"), "a number or size is too large to compute with: int too big"),
    ],
)
def test_reports_external_errors_in_one_line_and_tracebacks_with_debug(error, sentence, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("fastroute.cli.recipes.fnmatchcase", fail)
    result = run("recipes")
    assert result.exit_code == 1 and "error: " in result.output and sentence in result.output
    assert "Traceback" not in result.output
    for arguments in (("--debug", "recipes"), ("recipes", "--debug")):
        result = run(*arguments)
        assert result.exit_code == 1 and "Traceback" in result.output and sentence.split(":")[0] in result.output


def test_reports_ctrl_c_by_its_status_and_a_bug_by_its_traceback(monkeypatch):
    def fail(error):
        monkeypatch.setattr("fastroute.cli.recipes.fnmatchcase", lambda *_: (_ for _ in ()).throw(error))
        return run("recipes")

    result = fail(KeyboardInterrupt())
    assert result.exit_code == 130 and "stopped by Ctrl-C" in result.output and "Traceback" not in result.output
    result = fail(KeyError("x"))
    assert result.exit_code == 1 and "Traceback" in result.output and "please report it" in result.output


@pytest.mark.parametrize("as_module", [True, False], ids=["python -m fastroute", "fastroute"])
@pytest.mark.parametrize("imported", ["typer", "torch"])
def test_reports_ctrl_c_during_imports_in_one_line(tmp_path, imported, as_module):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {imported!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    (tmp_path / "fastroute").write_text("from fastroute.cli import main\nmain()\n")  # as pip writes it
    done = subprocess.run(
        [sys.executable, *(("-m", "fastroute") if as_module else (tmp_path / "fastroute",)), "info"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(REPOSITORY)))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr.startswith("error: stopped by Ctrl-C") and done.stderr.count("\n") == 1


def test_checks_sizes_before_allocating_memory(tmp_path):
    common = ("train", "resnet20", "--output", tmp_path)
    result = run(*common, "--img-size", 100_000)
    assert result.exit_code == 2 and "img_size is 100000" in result.output and "at most 9,459" in result.output
    result = run(*common, "--img-size", 8_000)
    assert result.exit_code == 2 and "img_size is 8000; the 1,797 images of digits would take" in result.output
    result = run(*common, "--num-classes", 10**9)
    assert result.exit_code == 2 and "its weights would take at least" in result.output
    result = run(*common, "--img-size", 300, "-b", 1437)
    assert result.exit_code == 2 and "a training step of resnet20 would take at least" in result.output


@pytest.mark.parametrize("option", ["lr", "mixup", "weight-decay", "gate-wd", "scale", "crop-pct"])
@pytest.mark.parametrize("value", ["nan", "inf", "1e308"])
def test_refuses_non_finite_numbers(option, value):
    value = f"{value},{value}" if option == "scale" else value
    result = run("train", "resnet20", f"--{option}", value)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: &a [x]\nb: [*a, *a]", "line 1, column 4: anchors and aliases are not supported"),
        ("lr: " + "[" * 900 + "]" * 900, "there are more than 16 levels"),
        ("# " + "x" * 2**19, "it is larger than 262,144 bytes"),
        ("".join(f"a{i}: 1\n" for i in range(6000)), "there are more than 10,000 values"),
        ("lr: 0.1\nlr: 0.2", "'lr' is given twice: keep one"),
        ("batch-size: 1\nbatch_size: 2", "it has batch_size twice"),
        ("lr: {a: 1}", "lr is a dict, expected a single value"),
        ("lr: abc", "lr is 'abc': 'abc' is not a valid float"),
        ("epochs: 1.5", "epochs is '1.5': "),
        ("lr: 2024-99-99", "it is not a YAML file of options"),
        ("mixup: .nan", "mixup is 'nan': nan is not a finite number"),
    ],
)
def test_bounds_what_yaml_may_hold(tmp_path, text, message):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    result = run("train", "resnet20", "-c", config)
    assert result.exit_code == 2 and f"config is {config}; " in result.output and message in result.output


def test_refuses_a_config_that_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "c.yaml")
    for path in (tmp_path / "c.yaml", "/dev/zero"):
        result = run("train", "resnet20", "-c", path)
        assert result.exit_code == 2 and "it is not a regular file" in result.output, result.output


@pytest.mark.parametrize("name", ["[/x]", "a[b]c", "\x1b[31m", "\udcff", "a\nb"])
def test_names_are_printed_as_they_are(name):
    result = run("train", name)
    assert result.exit_code == 2 and "there is no such network" in result.output
    assert repr(name)[1:-1] in result.output.replace("\\\\", "\\") and "\x1b" not in result.output


def test_paths_that_look_like_urls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ("train", "resnet20", "-b", 2000, "--first-classes", 2, "--sched", "step", "--experiment", "file:[/x]")
    assert run(*common, "--epochs", 1, "--output", "http_runs").exit_code == 0
    result = run(*common, "--epochs", 2, "--output", "http_runs", "--resume", "http_runs/file:[/x]/last.ckpt")
    assert result.exit_code == 0 and str(tmp_path / "http_runs" / "file:[/x]") in result.output, result.output
    result = run(*common, "--epochs", 1, "--output", "a::b")
    assert result.exit_code == 2 and "a path that contains '::' is taken for a URL" in result.output
    result = run(*common, "--epochs", 1, "--output", "\udcff")
    assert result.exit_code == 2 and "TensorBoard needs a path in UTF-8" in result.output
