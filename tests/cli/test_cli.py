"""What all commands have in common: help, imports, errors and bounds of their input; and the short commands."""

import io
import os
import subprocess
import sys

import pytest
import torch
import yaml
from rich.table import Table
from typer.main import get_command

import fastroute
from fastroute.cli import COMMANDS, app
from fastroute.cli.errors import standard_output
from tests.cli.commands import REPOSITORY, python, run


def test_recipes_are_listed_with_what_the_thesis_reports():
    result = run("recipes", "ilsvrc2012*")
    assert result.exit_code == 0 and "ilsvrc2012_resnet18_cc2" in result.output and "cifar10" not in result.output
    assert all(number in result.output for number in ("26.48", "8.60", "24.50", "7.34"))
    result = run("recipes", "cluster_*")
    assert "cluster_stl10_two-fold" in result.output and "63.84" in result.output and "ilsvrc" not in result.output
    result = run("recipes", "resnet*")
    assert result.exit_code == 2 and "pattern is 'resnet*'; there is no such recipe" in result.output


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


def test_demo_compares_both_networks_and_shows_one(tmp_path):
    result = run("demo", "--epochs", 1, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "272,186" in result.output and "548,386" in result.output and "stem_router" in result.output
    assert (tmp_path / "resnet20" / "summary.csv").is_file() and (tmp_path / "resnet20_cc2" / "best.ckpt").is_file()
    page = tmp_path / "report" / "report.html"
    assert page.is_file() and str(page) in result.output


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
        (("--model", "resnet20"), "the network is the first argument"),
        (("resnet20", "--model-ema-decay", 1), "--model-ema-decay"),
        (("resnet20", "--stream"), "in_memory is False; it can be chosen for the dataset 'imagefolder' alone"),
        (("resnet20", "--initial-checkpoint", "/nowhere.pt"), "initial_checkpoint is /nowhere.pt; there is no such"),
        (("resnet20", "--dataset", "cifar10", "--data-dir", "/nowhere"), "data_dir is /nowhere; CIFAR10 is incomplete"),
        (("resnet20", "--dataset", "webdataset", "--data-dir", "{folder}/empty"), "there are no shards train/*.tar"),
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
    names = "print(*[getattr(fastroute, name) for name in fastroute.__all__])"
    assert "function create_model" in python(f"import sys; sys.argv[0] = 'fastroute'; import fastroute; {names}").stdout
    code = "import fastroute, torch; print(torch.ops.fastroute.mix)"
    assert "fastroute.mix" in python(code).stdout


def test_import_does_not_import_compilers():
    """They take seconds, and Triton must be told to interpret before it is imported."""
    code = "import sys, fastroute; print({'torch._dynamo', 'torch._inductor', 'triton', 'sympy'} & set(sys.modules))"
    assert python(code).stdout.strip() == "set()"


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


def test_warnings_of_the_package_are_lines_for_its_user(tmp_path):
    options = ["--limit", "24", "-k", "24", "--epochs", "1", "--method", "iic", "--architecture", "C4 F8"]
    command = [sys.executable, "-m", "fastroute", "cluster", *options, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert any(line.startswith("warning: the clustering has collapsed: ") for line in lines), done.stderr
    assert "module.py" not in done.stderr and "warnings.warn" not in done.stderr


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
        ("epochs: 1.5", "epochs is '1.5'; it must be a valid integer"),
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


@pytest.mark.parametrize("command", [("train", "resnet20"), ("cluster",)])
@pytest.mark.parametrize("name", ["", ".", "..", "a/..", "../.."])
def test_an_experiment_is_a_folder_within_that_of_all_runs(tmp_path, command, name):
    result = run(*command, "--epochs", 1, "--output", tmp_path / "a" / "runs", "--experiment", name)
    assert result.exit_code == 2 and f"experiment is {name!r}; it must be the name of a folder within" in result.output
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--epochs", 0], "'--epochs': '0'; it must be greater than or equal to 1"),
        (["train", "--img-size", "32x32"], "'--img-size': '32x32'; it must be a valid integer"),
        (["train", "--opt", "lamb"], "'--opt': 'lamb' is not one of 'sgd'"),
        (["train", "--learning-rate", 0.1], "No such option: --learning-rate; it is called --lr"),
        (["train", "--gpus", 2], "torchrun starts a process for each GPU"),
        (["train", "resnet20", "."], "and '.' too; name one network, and the folder of images by --data-dir ."),
        (["predict", "x.png", "x.ckpt"], "checkpoint is x.png, and x.ckpt follows; name the checkpoint first"),
        (["predict", "x.ckpt", "x.png", "--output", "x.parquet"], "output is x.parquet; it must end in .csv, .json"),
    ],
)
def test_mistakes_name_what_was_given_and_what_to_do(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split()), result.output


def test_options_of_other_trainers_are_known_in_files(tmp_path):
    (tmp_path / "own.yaml").write_text("learning_rate: 0.1\n")
    assert "there is no option 'learning_rate'; it is called --lr" in run("train", "-c", tmp_path / "own.yaml").output


@pytest.mark.parametrize(
    "package, arguments", [("torchvision", ["predict", "x.ckpt", "x.png"]), ("pytorch_lightning", ["cluster"])]
)
def test_a_command_without_its_packages_names_the_extra(package, arguments):
    code = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['fastroute', *{arguments}]\n"
    result = python(code + "from fastroute.cli import main; main()")
    assert result.returncode == 2
    assert f"needs the package {package}, which is not installed: pip install 'fastroute[train]'" in result.stderr
