"""Kill runs at random moments and resume them: they end with the weights of a run that was never killed."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastroute.training.run_folder import LOCK, FolderInUse, run_folder
from tests.attack.test_checkpoints import same

REPOSITORY = Path(__file__).resolve().parents[2]
NETWORK = ("base_cnn", "--first-classes", 4, "--sched", "onecycle", "--epochs", 3, "--recovery-interval", 2)
TRAIN = ("train", *NETWORK, "-b", 64, "--model-ema", "--model-ema-decay", 0.9)
TOGETHER = ("train", *NETWORK, "-b", 32, "--dist-bn", "", "--model-ema", "--model-ema-decay", 0.9)
CLUSTER = ("cluster", "--limit", 300, "--architecture", "C8 M F16", "--epochs", 8)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "fastroute")
SECONDS = 180  # after which a run hangs


def command(arguments, log):
    """Run `fastroute` in this process, which was forked from one that has imported all that it needs."""
    from fastroute.cli import main

    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = ["fastroute", *arguments]
    main()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastroute.cli", "fastroute.training", "fastroute.clustering.run", __name__])
    log = tmp_path_factory.mktemp("log") / "log"

    def start(*arguments):
        process = context.Process(target=command, args=([*map(str, arguments)], log))
        process.start()
        return process

    start.log = log
    start("recipes").join()  # by then, what is imported is
    return start


def weights(folder):
    saved = torch.load(folder / "last.ckpt")
    return {name: saved[name] for name in ("state_dict", "optimizer_states", "epoch", "global_step")}


def check(folder, expected):
    assert same(weights(folder), expected)
    assert not [*folder.glob("*.tmp"), *folder.glob(LOCK)]


@pytest.mark.parametrize("name, kills", [("train", 16), ("cluster", 10)])
def test_one_process(start, tmp_path, name, kills):
    arguments = (*{"train": TRAIN, "cluster": CLUSTER}[name], "--output", tmp_path)
    before = time.perf_counter()
    whole = start(*arguments, "--experiment", "whole")
    whole.join(SECONDS)
    assert whole.exitcode == 0, start.log.read_text()
    seconds, expected = time.perf_counter() - before, weights(tmp_path / "whole")
    draw, killed, run = random.Random(name), 0, 0
    while killed < kills:
        run += 1
        folder, done = tmp_path / f"run{run}", False
        while not done:
            process = start(*arguments, "--experiment", folder.name, "--resume", "auto")
            process.join(draw.uniform(0.2, 1) * seconds if killed < kills else SECONDS)
            done = process.exitcode is not None
            if not done:
                assert killed < kills, "the run hangs"
                process.kill()
                process.join()
                killed += 1
        assert process.exitcode == 0, start.log.read_text()
        check(folder, expected)
        if name == "cluster":
            assigned = (f / "assignments.csv" for f in (folder, tmp_path / "whole"))
            assert next(assigned).read_bytes() == next(assigned).read_bytes()


def launch(folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    arguments = (*TORCHRUN, *TOGETHER, "--output", folder.parent, "--experiment", folder.name, "--resume", "auto")
    with (folder.parent / "log").open("a") as log:
        return subprocess.Popen([*map(str, arguments)], stdout=log, stderr=log, cwd=REPOSITORY, env=environment)


def ranks_of(agent):
    return [*map(int, Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split())]


def has_begun(folder, agent):
    """Wait until a process of the agent has locked the folder; return whether that happens before the run ends."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and agent.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            owner = (folder / LOCK).read_text()
            if any(f"process {rank} on " in owner for rank in ranks_of(agent)):
                return True
        time.sleep(0.02)
    return False


def is_held(folder):
    try:
        with run_folder(folder):
            return False
    except FolderInUse:
        return True


def kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_two_processes(tmp_path):
    log = tmp_path / "log"
    assert launch(tmp_path / "whole").wait(SECONDS) == 0, log.read_text()
    expected, folder = weights(tmp_path / "whole"), tmp_path / "run"
    draw, victims = random.Random(0), ["all", "the agent", "rank 0", "rank 1", "all", "the agent"]
    while victims:
        agent = launch(folder)
        begun = has_begun(folder, agent)
        time.sleep(draw.uniform(0, 1.5))
        if not begun or agent.poll() is not None:
            assert agent.wait(SECONDS) == 0, log.read_text()
            check(folder, expected)
            folder = folder.with_name(folder.name + "again")
            continue
        ranks, victim = ranks_of(agent), victims.pop()
        if victim == "the agent":
            kill([agent.pid])
            agent.wait()
            assert is_held(folder) or not (folder / LOCK).exists()  # the run lives on, unless it has just ended
            kill(ranks)
        elif victim == "all":
            kill([agent.pid, *ranks])
            agent.wait()
        else:
            kill(ranks[int(victim[-1]) :][:1])
            assert agent.wait(SECONDS) != 0
    assert launch(folder).wait(SECONDS) == 0, log.read_text()
    check(folder, expected)
