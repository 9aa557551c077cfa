"""`fastroute train`: options, resumed runs, and what it says where it cannot go on."""

import contextlib
import csv
import dataclasses
import inspect
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed.run
import yaml
from typer.main import get_command

import fastroute
from fastroute import _files
from fastroute.cli import app
from fastroute.cli.train_options import TrainOptions
from fastroute.training import ImageDataModule, RoutingClassifier, fit
from fastroute.training.optim import parameter_groups, scheduler
from fastroute.training.recipes import recipes
from tests.cli.commands import REPOSITORY, run


def test_trains_on_digits_and_resumes_from_a_checkpoint(tmp_path):
    common = ("train", "resnet20_cc2", "-b", 256, "--decay-milestones", "1,2", "--output", tmp_path)
    result = run(*common, "--epochs", 1, "--experiment", "run")
    assert result.exit_code == 0, result.output
    assert "epoch 1/1" in result.output and "stack3_router" in result.output and str(tmp_path / "run") in result.output
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events")}
    assert names == {"args.yaml", "hparams.yaml", "best.ckpt", "last.ckpt", "summary.csv", "routers.csv"}
    on_a_cpu = not torch.cuda.is_available()
    assert yaml.safe_load((folder / "args.yaml").read_text())["channels_last"] is on_a_cpu

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
    config.write_text("epochs: 1\nlr: 0.05\nbatch-size: 512\nsched: onecycle\nchannels_last: false\n")
    result = run("train", "resnet20", "-c", config, "--lr", 0.02, "--output", tmp_path, "--experiment", "run", "--amp")
    assert result.exit_code == 0, result.output
    arguments = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    expected = {"lr": 0.02, "batch_size": 512, "sched": "onecycle", "channels_last": False, "amp": True}
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
        (RoutingClassifier, {"model", "channels_last"}),  # None is by device
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


def test_resume_auto_starts_resumes_and_finishes(tmp_path):
    common = ("train", "resnet20", "-b", 512, "--sched", "step", "--output", tmp_path, "--resume", "auto")
    assert "resume is 'auto'; name the run by --experiment" in run(*common, "--epochs", 1).output
    for epochs, shown in ((1, "epoch 1/1"), (2, "epoch 2/2"), (2, "all 2 epochs are done")):
        result = run(*common, "--epochs", epochs, "--experiment", "run")
        assert result.exit_code == 0 and shown in result.output, result.output


def test_resume_auto_counts_the_patience_anew(tmp_path):
    common = ("train", "resnet20", "-b", 2000, "--lr", 1e-9, "--sched", "step", "--epochs", 9)
    common += ("--output", tmp_path, "--experiment", "run", "--resume", "auto")
    result = run(*common, "--patience", 1)
    assert "stopped after epoch 2: in 1 epoch," in result.output, result.output
    assert "stopped by --patience after epoch 2" in run(*common, "--patience", 1).output
    result = run(*common, "--patience", 2)
    assert "epoch 3/9" in result.output and "stopped after epoch 3: in 2 epochs" in result.output
    assert "stopped by --patience after epoch 3" in run(*common, "--patience", 1).output


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
        ("nonsense", "device is 'nonsense'; it must be cpu, cuda, or one GPU, such as cuda:1"),
        ("mps", "device is 'mps'; it must be cpu, cuda, or one GPU, such as cuda:1"),
        ("cuda:31", "device is 'cuda:31'; this machine has "),
    ):
        result = run("bench", "--list", "--device", device)
        assert result.exit_code == 2 and message in result.output, result.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    result = run("train", "resnet20")
    assert result.exit_code == 2 and "torchrun started 4 processes on a machine with 1 GPU; start one" in result.output


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

    module = RoutingClassifier.load_from_checkpoint(tmp_path / "run" / "last.ckpt")
    assert module.hparams.aux_weight == 0.01


def test_trains_a_sparse_network_by_its_recipe(tmp_path):
    recipe = "cifar10_resnet20_sparse4_top1_short"
    arguments = ("train", "-c", recipe, "--dataset", "digits", "--epochs", 1, "-b", 512, "--output", tmp_path)
    result = run(*arguments, "--experiment", "run", "--no-amp")
    assert result.exit_code == 0, result.output
    with (tmp_path / "run" / "routers.csv").open() as file:
        loads = [float(row["load"]) for row in csv.DictReader(file)]
    assert len(loads) == 12 and [sum(loads[i : i + 4]) for i in (0, 4, 8)] == pytest.approx([1, 1, 1])
    model = fastroute.load(tmp_path / "run" / "best.ckpt").model
    state = torch.load(tmp_path / "run" / "best.ckpt", weights_only=True)
    assert state["hyper_parameters"]["aux_weight"] == 0.01  # 0.02 of the recipe is for two paths; four have half of it
    assert model.stack1.routing == "cluster" and model.specification.kwargs == {"routing": "cluster"}


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


def test_block_is_an_argument_of_the_resnets_for_small_images(tmp_path):
    pytest.importorskip("timm")
    common = ("train", "resnet20_cc2", "-b", 1437, "--output", tmp_path, "--experiment", "run", "--sched", "step")
    result = run(*common, "--block", "selective_kernel", "--epochs", 1)
    assert result.exit_code == 0, result.output
    model = fastroute.load(tmp_path / "run/last.ckpt").model
    assert model.specification.kwargs == {"block": "selective_kernel"}
    arguments = yaml.safe_load((tmp_path / "run/args.yaml").read_text())
    assert arguments["model_kwargs"] == ["block=selective_kernel"] and arguments["block"] is None
    result = run(*common, "--block", "basic", "--epochs", 2, "--resume", "auto")
    assert result.exit_code == 2 and "its network was built with" in result.output, result.output


def test_a_resumed_run_cannot_change_its_gates(tmp_path):
    common = ("train", "resnet20_cc2", "-b", 1437, "--output", tmp_path, "--experiment", "run", "--sched", "step")
    result = run(*common, "--gate-norm", "center", "--epochs", 1)
    assert result.exit_code == 0, result.output
    refusals = {(): "prior is 'learned' without gate_norm", ("--gate-norm", "center"): "prior=None, not 'learned'"}
    for norm, refusal in refusals.items():
        result = run(*common, *norm, "--gate-prior", "learned", "--epochs", 2, "--resume", "auto")
        assert result.exit_code == 2 and refusal in result.output, result.output
    result = run("train", "resnet20", "--gate-prior", "learned", "--output", tmp_path)
    assert result.exit_code == 2 and "prior is 'learned'; the network has no router" in result.output, result.output


def test_a_sentence_where_the_network_takes_no_block(tmp_path):
    result = run("train", "wrn_40_2", "--block", "split_attention", "--output", tmp_path)
    assert "error: block is split_attention; wrn_40_2 takes no block: leave the flag out" in result.output
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    result = run("train", "resnet20", "--block", "resnest")
    assert result.exit_code == 2 and "'basic', 'split_attention', 'selective_kernel'" in result.output


def test_a_sentence_where_images_are_too_small_for_capsules(tmp_path):
    result = run("train", "capsnet", "--output", tmp_path)
    assert result.exit_code == 2 and "img_size is 8; it must be at least 17 for two convolutions" in result.output


OWN = """
from torch import nn

class Viewed(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 6, num_classes)
    def forward(self, x):
        x = self.conv(x)
        return self.head(x.view(x.shape[0], -1))

class Grey(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
        self.head = nn.Linear(4 * 4 * 4, num_classes)
    def forward(self, x):
        return self.head(self[1](self[0](x)).view(x.shape[0], -1))

class Trained(Viewed):
    def forward(self, x):
        x = self.conv(x)
        return self.head(x.view(x.shape[0], -1) if self.training else x.flatten(1))

class Two(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(8, num_classes)
    def forward(self, x, y):
        return self.head(x)
"""


def test_an_own_network_that_cannot_compute_in_channels_last(image_folder, tmp_path, monkeypatch, capfd):
    (tmp_path / "viewing_nets.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    images = ("--data-dir", image_folder)
    train = ("train", "viewing_nets:Viewed", "--img-size", 8, "-j", 1, "-b", 8, "--epochs", 1, "--device", "cpu")
    result = run(*train, *images, "--output", tmp_path, "--experiment", "run")
    assert result.exit_code == 0, result.output
    assert "viewing_nets:Viewed cannot compute in channels_last, so it computes in NCHW" in result.output
    assert "Traceback" not in result.output + capfd.readouterr().err
    assert yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())["channels_last"] is False
    result = run("validate", tmp_path / "run" / "last.ckpt", "--model", "viewing_nets:Viewed", *images, "-j", 1)
    assert result.exit_code == 0, result.output
    result = run(*train, *images, "--channels-last", "--output", tmp_path, "--experiment", "asked")
    assert result.exit_code == 2 and "use --no-channels-last, or reshape or flatten" in result.output, result.output
    result = run("train", "viewing_nets:Two", *train[2:], *images, "--output", tmp_path, "--experiment", "two")
    assert result.exit_code == 2, result.output
    assert "viewing_nets:Two cannot take images of 3 × 8 × 8" in result.output and "missing 1 required" in result.output
    for name, data in (("Grey", ("--lr", 0.001)), ("Trained", images)):
        result = run("train", f"viewing_nets:{name}", *train[2:], *data, "--output", tmp_path, "--experiment", name)
        assert result.exit_code == 0 and "so it computes in NCHW" in result.output, result.output
    size = ("--img-size", 9, "-j", 1)
    result = run("validate", tmp_path / "run" / "last.ckpt", "--model", "viewing_nets:Viewed", *images, *size)
    assert result.exit_code == 2 and "cannot take images of 3 × 9 × 9" in result.output, result.output


def test_paths_that_started_as_copies_go_on_from_their_run(image_folder, tmp_path, own):
    torch.save(fastroute.create_model(own, 3).state_dict(), tmp_path / "plain.pth")
    train = (
        "train",
        own,
        "--multipath",
        2,
        "--data-dir",
        image_folder,
        "--img-size",
        8,
        "-j",
        1,
        "-b",
        8,
        "--epochs",
        1,
    )
    train += ("--device", "cpu", "--output", tmp_path)
    result = run(*train, "--pretrained-path", tmp_path / "plain.pth", "--experiment", "first")
    assert result.exit_code == 0, result.output
    start = ("--initial-checkpoint", tmp_path / "first" / "last.ckpt")
    result = run(*train, *start, "--experiment", "second")
    assert result.exit_code == 0, result.output
    assert yaml.safe_load((tmp_path / "second" / "args.yaml").read_text())["init"] == "copy"
    result = run(*train, *start, "--init", "fresh", "--experiment", "third")
    assert result.exit_code == 2 and "build the network with init='copy' (--init copy) too" in result.output
    shutil.rmtree(image_folder / "train" / "ant")
    shutil.rmtree(image_folder / "val" / "ant")
    result = run(*train, *start, "--experiment", "fourth")
    assert result.exit_code == 2 and "its classifier is of 3 classes: to start another one" in result.output
    result = run(*train, "--pretrained-path", start[1], "--experiment", "fifth")
    assert result.exit_code == 0 and "its classifier is of 3 classes and is left out" in result.output, result.output


def test_torchrun_passes_every_option_on():
    def passes(name: str) -> bool:
        with contextlib.suppress(SystemExit):
            return parser.parse_args(["-m", "fastroute", "train", name]).training_script_args == ["train", name]
        return False

    parser = torch.distributed.run.get_args_parser()
    options = get_command(app).commands["train"].params
    assert [option.opts for option in options if not any(map(passes, option.opts))] == []


def test_wrong_values_in_a_file_are_named_without_the_words_of_a_library(tmp_path):
    (tmp_path / "own.yaml").write_text("epochs: three\n")
    result = run("train", "-c", tmp_path / "own.yaml")
    assert result.exit_code == 2 and "epochs is 'three'; it must be a valid integer" in result.output, result.output
