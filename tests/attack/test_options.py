"""Give the commands odd and hostile options, names, YAML files and fields of checkpoints.

Each try is a command in a process of its own, with bounds of memory and time. It passes where the command does its work
(status 0) or ends in a sentence (status 1 or 2), and fails at a traceback, a hang, or a death by a signal.
"""

import contextlib
import math
import os
import pickle
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastroute.clustering.run
import fastroute.training
import fastroute.visualize  # noqa: F401  what the processes need is imported once, before they fork
from fastroute.cli import app

MEMORY = 4 * 2**30
SECONDS = 90
MISSING = object()
SMALL = ("--first-classes", 2, "-b", 2000)
QUICK = ("train", "resnet20_cc2", *SMALL, "--sched", "step")


def attempt(*arguments, cwd=None) -> tuple[int, str, str | None]:
    """Return the status of a command, what it printed, and the error that it did not handle, if any."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with contextlib.suppress(BaseException):
            os.setpgrp()
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            torch.set_num_threads(1)
            if cwd is not None:
                os.chdir(cwd)
            sys.setrecursionlimit(1000)
            result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300"})
            let_through = result.exception
            through = (
                None if isinstance(let_through, SystemExit | None) else f"{type(let_through).__name__}: {let_through}"
            )
            with open(writer, "wb") as pipe:
                pickle.dump((result.exit_code, result.output[-4000:], through and through[:500]), pipe)
        os._exit(0)
    os.close(writer)
    return _answer(reader, child)


def _answer(reader: int, child: int) -> tuple[int, str, str | None]:
    os.set_blocking(reader, False)
    content, end = b"", time.monotonic() + SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            part = os.read(reader, 2**16)
            if not part:
                break
            content += part
            continue
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if content:
        return pickle.loads(content)
    late = time.monotonic() >= end
    return -9, "", f"no answer in {SECONDS} s" if late else f"died with {os.waitstatus_to_exitcode(status)}"


def check(answer, *statuses) -> None:
    status, output, through = answer
    assert through is None and status in (statuses or (0, 1, 2)), (status, through, output)
    assert "Traceback" not in output and "bug of fastroute" not in output, output
    assert status == 0 or "rror" in output, output


def trained(folder: Path, name: str, *options) -> Path:
    answer = attempt(*options, "--epochs", 1, "--output", folder, "--experiment", name)
    assert answer[0] == 0, answer
    return folder / name / "last.ckpt"


RUNS = {
    "plain": QUICK,
    "averaged": (
        *("train", "resnet20_cc2", *SMALL, "--sched", "step", "--opt", "adam", "--model-ema"),
        *("--gate-reg-weight", 0.01),
    ),
    "cluster": ("cluster", "--limit", 60, "-k", 3, "--architecture", "C4 M F8", "--method", "two-fold"),
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: trained(folder, name, *command) for name, command in RUNS.items()}


# --- fields of checkpoints

VALUES = {
    "missing": MISSING,
    "none": None,
    "text": "abc",
    "nan": math.nan,
    "negative": -1,
    "huge": 10**12,
    "fraction": 0.5,
    "list": [1, "a"],
    "dict": {"a": 1},
    "tensor": torch.zeros(3),
}
HYPER = ("model", "num_classes", "in_chans", "img_size", "opt", "sched", "lr", "momentum", "smoothing", "channels_last")
IMAGES = (
    *("dataset", "classes", "first_classes", "img_size", "crop_pct", "mean", "std", "place", "place/done"),
    *("interpolation", "data_dir", "val_split", "split_seed", "input_key", "class_map"),
)
FIT = "loops/fit_loop"
FIELDS = (
    "hyper_parameters",
    *(f"hyper_parameters/{name}" for name in HYPER),
    "ImageDataModule",
    *(f"ImageDataModule/{name}" for name in IMAGES),
    "state_dict",
    "state_dict/model.stem.0.0.weight",
    "callbacks",
    "callbacks/EpochSummary",
    "callbacks/EpochSummary/rows",
    "callbacks/EpochSummary/rows/0",
    "callbacks/0Best/best_model_path",
    "callbacks/0Best/best_model_score",
    "callbacks/0Best/best_k_models",
    "optimizer_states",
    "optimizer_states/0",
    "optimizer_states/0/state",
    "optimizer_states/0/state/0",
    "optimizer_states/0/param_groups",
    "optimizer_states/0/param_groups/0/lr",
    "optimizer_states/0/param_groups/0/params",
    "lr_schedulers/0",
    "lr_schedulers/0/last_epoch",
    "lr_schedulers/0/base_lrs",
    "loops",
    FIT,
    f"{FIT}/epoch_progress/current/processed",
    f"{FIT}/epoch_loop.batch_progress",
    f"{FIT}/epoch_loop.batch_progress/current",
    f"{FIT}/epoch_loop.batch_progress/is_last_batch",
    f"{FIT}/epoch_loop.scheduler_progress/total/ready",
    "train_totals",
    "train_totals/loss",
    "epochs",
    "global_step",
    "pytorch-lightning_version",
)
CLUSTER = (
    *(f"hyper_parameters/{name}" for name in ("architecture", "dataset", "method", "clusters", "heads", "batch_norm")),
    "state_dict",
    "state_dict/network.1.weight",
    "callbacks/Table/rows",
    "optimizer_states/1",
)
AVERAGED = (
    "current_model_state",
    "current_model_state/model.stem.0.0.weight",
    "averaging_state",
    "averaging_state/n_averaged",
    "state_dict/aux_loss._extra_state",
    "optimizer_states/0/state/0/exp_avg",
    "optimizer_states/0/state/0/step",
    "optimizer_states/0/param_groups/0/betas",
    "callbacks/MovingAverage",
)


def mutated(checkpoint: dict, field: str, value) -> dict:
    """With one field changed, by its path; `0Best` is the callback that keeps the best checkpoint."""
    *parents, last = field.split("/")
    place = checkpoint
    for name in parents:
        if name == "0Best":
            name = next(key for key in place if "Checkpoint" in key and "val_error" in key)
        place = place[int(name) if isinstance(place, list) or name == "0" else name]
    last = int(last) if isinstance(place, list) or last == "0" else last
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    return checkpoint


def cases():
    """Every field with a quarter of the values; which ones they are changes from field to field."""
    values = list(VALUES)
    for i, field in enumerate(FIELDS):
        for value in values[i % 4 :: 4]:
            yield "resume", "plain", field, value
        if field.startswith(("hyper", "Image", "state_dict")):
            for k, command in enumerate(("validate", "validate", "paths", "report")):
                yield command, "plain", field, values[(i + 3 * k) % len(values)]
    for i, field in enumerate(AVERAGED):
        for value in values[i % 4 :: 4]:
            yield "resume", "averaged", field, value
    for i, field in enumerate(CLUSTER):
        for value in values[i % 4 :: 4]:
            yield "resume", "cluster", field, value
        yield "report", "cluster", field, values[(i + 3) % len(values)]


COMMANDS = {
    "validate": ("validate",),
    "paths": ("paths",),
    "report": ("report", "--gates", 1),
}


@pytest.mark.parametrize("command, run, field, value", list(cases()))
def test_a_field_of_a_checkpoint_is_another(runs, tmp_path, command, run, field, value):
    checkpoint = mutated(torch.load(runs[run], weights_only=True), field, VALUES[value])
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint, path)
    if command == "resume":
        check(attempt(*RUNS[run], "--epochs", 2, "--resume", path))
    else:
        more = ("--limit", 60) if run == "cluster" else ()
        check(attempt(*COMMANDS[command], path, *more))


# --- YAML

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
DOCUMENTS = {
    "aliases": BOMB,
    "alias of itself": "a: &a [*a]",
    "merge": "x: &x {lr: 1}\n<<: *x",
    "900 lists": "lr: " + "[" * 900 + "]" * 900,
    "100000 lists": "lr: " + "[" * 100_000,
    "900 mappings": "{a: " * 900 + "1" + "}" * 900,
    "900 dashes": "- " * 900 + "1",
    "900 indents": "".join(f"{' ' * i}a:\n" for i in range(900)),
    "large": "# " + "x" * 2**21,
    "many": "".join(f"a{i}: 1\n" for i in range(20_000)),
    "twice": "lr: 0.1\nlr: 0.2",
    "twice by another name": "batch-size: 1\nbatch_size: 2",
    "a list for a number": "lr: [1, 2]",
    "a mapping for a number": "lr: {a: 1}",
    "a date": "lr: 2024-01-01",
    "no date": "lr: 2024-99-99",
    "a set": "lr: !!set {a, b}",
    "binary": "lr: !!binary aGVsbG8=",
    "no binary": "lr: !!binary é",
    "an object": "lr: !!python/object/apply:os.system ['true']",
    "a tag": "lr: !x 1",
    "an int that is none": "lr: !!int abc",
    "an int of nothing": "lr: !!int ''",
    "a float of a list": "lr: !!float [1]",
    "digits": "epochs: " + "9" * 100_000,
    "sixties": "epochs: " + "1:" + "59:" * 5000 + "59",
    "fraction": "epochs: 1.5",
    "nan": "lr: .nan",
    "infinite": "mixup: .inf",
    "no": "lr: no",
    "a flag that is none": "amp: 3.5",
    "null": "lr: null",
    "no key": "null: 1",
    "a list as key": "? [a]\n: 1",
    "a mapping as key": "? {a: 1}\n: 1",
    "two documents": "lr: 1\n---\nlr: 2",
    "empty": "",
    "text": "hello",
    "number": "1",
    "markup": "'[/x]': 1",
    "markup as value": "opt: '[/red]'",
    "control": 'experiment: "\\e[31m\\0"',
    "surrogate": 'experiment: "\\uDCFF"',
    "tab": "\tlr: 1",
    "colon": "lr:: 1",
    "bytes": b"\xff\xfe\x00",
    "not UTF-8": b"lr: \xff",
    "NUL": b"lr: 1\x00",
    "bomb in UTF-16": BOMB.encode("utf-16"),
}
PLAIN = """\
model: resnet20_cc2
batch_size: 64
epochs: 3
lr: 0.05
sched: multistep
decay_milestones: [1, 2]
amp: false
scale: 0.08,1.0
aa: null
seed: 42
"""


def mutations(count: int):
    draw = random.Random(0)
    for _ in range(count):
        text = list(PLAIN)
        for _ in range(draw.randint(1, 6)):
            place = draw.randrange(len(text))
            text[place : place + draw.choice((0, 1, 1, 8))] = draw.choice(
                (
                    "",
                    ":",
                    "- ",
                    "[",
                    "{",
                    "&a ",
                    "*a",
                    "!!int ",
                    "\n",
                    "\t",
                    "'",
                    '"',
                    "%",
                    "|",
                    ">",
                    "?",
                    "~",
                    "\x00",
                    "9" * 40,
                )
            )
        yield "".join(text)


DAMAGED = {f"mutation {i}": text for i, text in enumerate(mutations(40))}
NOWHERE = ("--dataset", "imagefolder", "--data-dir", "/nowhere")


@pytest.mark.parametrize("command", ["train", "cluster"])
@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_hostile_document(tmp_path, document, command):
    content = DOCUMENTS[document]
    (tmp_path / "c.yaml").write_bytes(
        content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    )
    check(attempt(command, "-c", tmp_path / "c.yaml", *NOWHERE), 2)


@pytest.mark.parametrize("mutation", DAMAGED)
def test_a_damaged_document(tmp_path, mutation):
    (tmp_path / "c.yaml").write_text(DAMAGED[mutation])
    check(attempt("train", "-c", tmp_path / "c.yaml", *NOWHERE), 2)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to itself", "secret"])
def test_a_config_that_is_no_regular_file(tmp_path, kind):
    path = tmp_path / "c.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = "/dev/zero"
    elif kind == "link to itself":
        path.symlink_to(path)
    else:
        path.write_text("lr: 1")
        path.chmod(0)
    check(attempt("train", "-c", path, *NOWHERE), 2)


# --- values of options

FLOATS = (
    *("crop-pct", "reprob", "mixup", "cutmix", "smoothing", "momentum", "weight-decay", "norm-weight-decay"),
    *("clip-grad", "model-ema-decay", "lr", "decay-rate", "gate-lr-mult", "gate-wd", "gate-reg-weight"),
)
INTS = (
    *("num-classes", "first-classes", "img-size", "batch-size", "workers", "epochs", "grad-accum-steps"),
    *("warmup-epochs", "decay-epochs", "seed", "recovery-interval", "log-interval"),
)
PAIRS = ("scale", "ratio", "decay-milestones")


@pytest.mark.parametrize("value", ["nan", "inf", "1e308", "-1", "x[/y]"])
@pytest.mark.parametrize("option", FLOATS)
def test_a_number(tmp_path, option, value):
    check(attempt(*QUICK, "--epochs", 1, "--output", tmp_path, f"--{option}={value}"))


@pytest.mark.parametrize("value", ["-1", "1.5", "1" + "0" * 30, "", "[/x]"])
@pytest.mark.parametrize("option", INTS)
def test_a_whole_number(tmp_path, option, value):
    check(attempt(*QUICK, "--epochs", 1, "--output", tmp_path, f"--{option}={value}"), 2)


@pytest.mark.parametrize("value", ["nan,nan", "0,inf", "1e400,1e400", "", ",", "[/x]", "1e308,1e308"])
@pytest.mark.parametrize("option", PAIRS)
def test_a_list_of_numbers(tmp_path, option, value):
    check(attempt(*QUICK, "--epochs", 1, "--output", tmp_path, f"--{option}={value}"), 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--img-size", 100_000),
        ("--img-size", 2000),
        ("--num-classes", 10**9),
        ("--num-classes", 10**8),
        ("--dataset", "imagefolder", "--data-dir", ".", "--img-size", 100_000),
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_a_size_beyond_the_memory(tmp_path, arguments):
    check(attempt(*QUICK, "--epochs", 1, "--output", tmp_path, *arguments), 1, 2)


def test_a_learning_rate_that_overflows(tmp_path):
    """The first step may leave weights that are finite; the loss of the second is not."""
    huge = ("--lr", 1e30, "--gate-lr-mult", 1e6)
    check(attempt(*QUICK, "--epochs", 2, "--output", tmp_path, *huge), 1)


NAMES = [
    "[/x]",
    "a[b]c",
    "[bold]x",
    "http_runs",
    "https:x",
    "file:",
    "a::b",
    "a b",
    "-x",
    "\udcff",
    "é",
    "x" * 200,
    "\x1b[31m",
    "a\nb",
    "$\\frac{$",
    "%s",
    "{0}",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_of_a_folder(tmp_path, name):
    answer = attempt(*QUICK, "--epochs", 1, f"--output={name}", f"--experiment={name}", cwd=tmp_path)
    check(answer)
    if answer[0] == 0:
        path = Path(name) / name / "last.ckpt"
        check(attempt(*QUICK, "--epochs", 2, f"--resume={path}", cwd=tmp_path), 0)
        check(attempt("validate", "--results-file", "r.csv", "--", path, cwd=tmp_path), 0)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("command", ["train", "-c", "--resume", "validate"])
def test_a_name_of_nothing(tmp_path, command, name):
    if command.startswith("-"):
        check(
            attempt(
                *QUICK,
                "--epochs",
                1,
                "--output",
                tmp_path,
                *((command, name) if command == "-c" else (f"{command}={name}",)),
            ),
            2,
        )
    else:
        check(attempt(command, "--", name), 2)
