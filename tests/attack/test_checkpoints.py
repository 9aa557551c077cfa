"""Damaged files of weights: each is refused in a sentence, or loads exactly what was written."""

import random
import re
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastroute.cli import app
from fastroute.models import create_model
from fastroute.training import load_weights, save_weights
from fastroute.training.checkpoints import read_checkpoint

TRIES = 130  # of each of three files
COMMANDS = 5  # tries through commands
TRAIN = ("train", "base_cnn", "-b", 512, "--first-classes", 3, "--sched", "step")


def mutations(data: bytes, count: int):
    """Ways in which a disk, a copy or an editor damages a file, by name; half of them near what describes the file."""
    draw = random.Random(0)
    marks = [match.start() for match in re.finditer(rb"PK\x01\x02|PK\x03\x04|PK\x05\x06|PK\x06[\x06\x07]", data)] or [0]
    for i in range(count):
        kind = ("zeros", "bit", "bit", "byte", "cut", "inserted", "removed", "swapped")[i % 8]
        place = draw.randrange(len(data)) if i // 8 % 2 else min(draw.choice(marks) + draw.randrange(60), len(data) - 1)
        size, changed = min(draw.choice((1, 7, 512, 4096)), len(data) - place), bytearray(data)
        if kind == "zeros":
            changed[place : place + 4096] = bytes(len(changed[place : place + 4096]))
        elif kind == "bit":
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == "byte":
            changed[place] = draw.randrange(256)
        elif kind == "cut":
            del changed[place:]
        elif kind == "inserted":
            changed[place:place] = draw.randbytes(size)
        elif kind == "removed":
            del changed[place : place + size]
        else:
            other = draw.randrange(len(data) - size + 1)
            changed[place : place + size], changed[other : other + size] = (
                data[other : other + size],
                data[place : place + size],
            )
        yield f"{i}: {kind} at {place}", bytes(changed)


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    result = run(*TRAIN, "--epochs", 2, "--output", folder, "--experiment", "run")
    assert result.exit_code == 0, result.output
    return folder / "run"


def same(first, second):
    """Bit for bit, through dicts and lists."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[name]) for name, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


def attack(path: Path, read):
    """Count the mutations of a file that are refused and that load the same; none may load anything else."""
    whole = path.read_bytes()
    expected, found = read(path), {"refused": 0, "same": 0}
    for name, damaged in mutations(whole, TRIES):
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                actual = read(path)
            except ValueError as error:
                assert str(path) in str(error) and len(str(error).splitlines()) == 1, name
                found["refused"] += 1
                continue
        assert same(expected, actual), name
        found["same"] += 1
    path.write_bytes(whole)
    assert same(read(path), expected)
    assert found["refused"] > found["same"]


def weights_of(path):
    network = create_model("base_cnn", num_classes=3, in_chans=1)
    load_weights(network, path)
    return network.state_dict()


def test_a_run_s_checkpoint(folder):
    attack(folder / "last.ckpt", read_checkpoint)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_network_s_weights(tmp_path, name):
    save_weights(create_model("base_cnn", num_classes=3, in_chans=1), tmp_path / name)
    attack(tmp_path / name, weights_of)


def test_through_the_commands(folder):
    """Each command either reports the damaged file in a sentence, or does the same as with the intact file."""
    last = folder / "last.ckpt"
    whole = last.read_bytes()
    resume = (*TRAIN, "--epochs", 3, "--output", folder.parent, "--experiment")
    assert run(*resume, "expected", "--resume", last).exit_code == 0
    expected = read_checkpoint(folder.parent / "expected" / "last.ckpt")["state_dict"]
    for i, (name, damaged) in enumerate(mutations(whole, COMMANDS)):
        last.write_bytes(damaged)
        for arguments in (
            (*resume, f"resumed{i}", "--resume", last),
            (*resume, f"started{i}", "--initial-checkpoint", last),
            ("validate", last),
        ):
            result = run(*arguments)
            assert result.exit_code in (0, 2), (name, arguments, result.output)
            if result.exit_code == 2:
                assert "error: " in result.output and "Traceback" not in result.output, (name, result.output)
                assert str(last) in result.output
            elif arguments[0] == "train" and "--resume" in arguments:
                assert same(read_checkpoint(folder.parent / f"resumed{i}" / "last.ckpt")["state_dict"], expected), name
    last.write_bytes(whole)
