"""The lock of a run's folder, and falling back to the previous checkpoint."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
from typer.testing import CliRunner

from fastroute.cli import app
from fastroute.training.run_folder import FolderInUse, new_folder, run_folder

TRAIN = ("train", "base_cnn", "-b", 512, "--first-classes", 3, "--sched", "step")


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def hold(folder, connection):
    with run_folder(folder):
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        connection.send(worker)
        time.sleep(60)


@contextlib.contextmanager
def another_run(folder):
    """Start a process that holds the folder and has a worker; both end with the block at the latest."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(folder, theirs))
    process.start()
    worker = ours.recv()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        os.kill(worker, signal.SIGKILL)


def test_locks_a_folder_until_its_process_ends_even_if_its_worker_lives(tmp_path):
    with another_run(tmp_path / "run") as other:
        (tmp_path / "run" / "last.ckpt.0123abcd.tmp").write_bytes(b"half")
        message = (
            f"output is .*run; another run writes into it, process {other.pid} on .*: wait until it ends, or choose"
        )
        for _ in range(2):
            with pytest.raises(FolderInUse, match=message), run_folder(tmp_path / "run"):
                pass
        assert (tmp_path / "run" / "last.ckpt.0123abcd.tmp").exists()
        other.kill()
        other.join()
        with run_folder(tmp_path / "run"):
            assert os.listdir(tmp_path / "run") == [".lock"]
    assert not (tmp_path / "run").exists()  # nothing was written to it


def test_is_reentrant_within_a_thread_only(tmp_path):
    refused = []

    def enter():
        with contextlib.suppress(FolderInUse), run_folder(tmp_path):
            return
        refused.append(True)

    with run_folder(tmp_path):
        with run_folder(tmp_path):
            pass
        (tmp_path / ".lock").read_bytes()  # as in a copy of the folder, which must not release the lock
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        with another_process_is_refused(tmp_path):
            pass
    assert refused == [True]


@contextlib.contextmanager
def another_process_is_refused(folder):
    child = os.fork()
    if child == 0:
        try:
            with run_folder(folder):
                os._exit(1)
        except FolderInUse:
            os._exit(0)
    yield
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_warns_on_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / "last.ckpt.0123abcd.tmp").touch()  # perhaps of another run
    message = r"its file system has no locks \(No locks available\): do not start another run there"
    with pytest.warns(UserWarning, match=message), run_folder(tmp_path):
        assert (tmp_path / "last.ckpt.0123abcd.tmp").exists()


def test_refuses_a_second_run_before_it_writes(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("args.yaml", "summary.csv", "last.ckpt"):
        (tmp_path / "run" / name).write_text("of the first run")
    with another_run(tmp_path / "run"):
        for command in (TRAIN, ("cluster", "--limit", 400), ("cluster", "--limit", 400, "--method", "kmeans")):
            result = run(*command, "--epochs", 1, "--output", tmp_path, "--experiment", "run")
            assert result.exit_code == 2 and "another run writes into it, process" in result.output, result.output
            assert "Traceback" not in result.output
        names = {path.name: path.read_text() for path in (tmp_path / "run").iterdir() if path.name != ".lock"}
    assert names == dict.fromkeys(("args.yaml", "summary.csv", "last.ckpt"), "of the first run")


def test_refuses_a_damaged_checkpoint_and_auto_resumes_from_the_previous_one(tmp_path):
    common = (*TRAIN, "--output", tmp_path, "--experiment")
    assert run(*common, "whole", "--epochs", 3).exit_code == 0
    assert run(*common, "run", "--epochs", 2).exit_code == 0
    last, previous = (tmp_path / "run" / name for name in ("last.ckpt", "previous.ckpt"))
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    for damaged in (bytes(data), bytes(data[:-100])):
        last.write_bytes(damaged)
        result = run(*common, "run", "--epochs", 3, "--resume", last)
        assert result.exit_code == 2 and "Traceback" not in result.output
        assert f"resume is {last}; it is no checkpoint of a training run: the file is damaged" in result.output
        assert f"use {previous} instead" in result.output
    result = run("validate", last)
    assert result.exit_code == 2 and "the file is damaged" in result.output
    assert torch.load(previous)["epoch"] == 0
    result = run(*common, "run", "--epochs", 3, "--resume", "auto")
    assert result.exit_code == 0, result.output
    assert f"{last} cannot be read (the file is damaged: " in result.output
    assert f"resuming from the previous checkpoint, {previous}" in result.output
    first, second = (torch.load(tmp_path / name / "last.ckpt")["state_dict"] for name in ("whole", "run"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.load(previous)["epoch"] == 1  # and the damaged one was not kept as the previous one


def test_refuses_auto_without_an_intact_checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / "run" / name).write_bytes(b"PK\x03\x04")
        result = run(*TRAIN, "--epochs", 1, "--output", tmp_path, "--experiment", "run", "--resume", "auto")
        assert result.exit_code == 2 and f"{name}; it is no checkpoint of a training run" in result.output


def test_makes_a_new_folder_for_each_run(tmp_path):
    folders = [new_folder(tmp_path / "runs" / "now") for _ in range(3)]
    assert [folder.name for folder in folders] == ["now", "now-2", "now-3"] and all(
        folder.is_dir() for folder in folders
    )
