"""Checkpoints: written whole or not at all, on time, and read with care."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import distributed as dist
from torch import nn

from fastroute._errors import in_a_line
from fastroute._files import DamagedFile, copy_over, digest_path, read_tensors, replacing, write_digest
from fastroute.models.specification import specification_in
from fastroute.models.weights import differences, network_weights
from fastroute.training.distributed import agreed
from fastroute.training.optim import GROUP_OPTIONS
from fastroute.training.saved_fields import check_fields, check_training_state


class Terminated(SystemExit):
    """The run got SIGTERM or Ctrl-C, has saved, and ends with the status that a shell gives for it: 143 or 130.

    Attributes:
        message: where it stopped.
        path: the checkpoint to go on from.
    """

    def __init__(self, message: str, path: Path, signum: int = signal.SIGTERM):
        super().__init__(128 + signum)
        self.message, self.path = message, path

    def __str__(self) -> str:
        return self.message


LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the old checkpoint and rename over it, so that at any moment there is a whole one; check what is
    read.

    The `last.ckpt` that is replaced stays as `previous.ckpt`, for the day on which the disk damages the last one.
    Lightning's own goes by the system's temporary folder, and moving from there is a copy where that is another disk.

    Args:
        resumed: the checkpoint that the run goes on from; another run's `last.ckpt` and `previous.ckpt` are not kept.
        checkpoint: what `read_checkpoint` returned for it, which then is not read again.

    Raises:
        OSError: the checkpoint cannot be written, as on a full disk; the one before is as it was.
    """

    def __init__(self, resumed: str | Path | None = None, checkpoint: dict | None = None):
        super().__init__()
        self._own = set() if resumed is None else {Path(resumed).resolve()}
        self._read = {} if checkpoint is None else {Path(resumed): checkpoint}

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(path, "wb", earlier=self._earlier(path)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch's own writer reports a full disk as a RuntimeError
            kept = "the one before is whole" if path.is_file() else "there is none before it"
            raise OSError(f"checkpoint {path} cannot be written, {kept}: {_cause(error)}") from error
        self._own.add(path.resolve())

    def _earlier(self, path: Path) -> Path | None:
        """Where the checkpoint that is about to be replaced stays: nowhere, unless it is this run's `last.ckpt`."""
        previous = path.with_name(PREVIOUS)
        if path.name != LAST:
            return None
        if path.resolve() in self._own:
            return previous
        if previous.resolve() not in self._own:  # or it is what the run goes on from, since the last was damaged
            previous.unlink(missing_ok=True)
        return None

    def load_checkpoint(self, path: str | Path, map_location=None, weights_only: bool | None = None) -> dict:
        checkpoint = self._read.pop(Path(path), None)
        return read_checkpoint(path) if checkpoint is None else checkpoint


class BestCheckpoint(ModelCheckpoint):
    """The checkpoint of the best epoch, whose score a resumed run keeps wherever its folder is by now.

    Lightning drops the score where the folder had another name. Here it counts that the checkpoint which the run goes
    on from lies beside the best one; where it does not, as in a new folder, the best starts anew.

    Args:
        resumed: the checkpoint that the run goes on from, if any.
        options: of Lightning's.
    """

    def __init__(self, resumed: str | Path | None, **options):
        super().__init__(**options)
        self._resumed = resumed

    def load_state_dict(self, state_dict: dict) -> None:
        best, scores = self.format_checkpoint_name({}), list(state_dict["best_k_models"].values())
        beside = Path(self._resumed).parent.resolve() == Path(self.dirpath)
        if agreed(bool(scores) and beside and os.path.isfile(best)):
            here = {"dirpath": self.dirpath, "best_model_path": best, "kth_best_model_path": best}
            super().load_state_dict(state_dict | here | {"best_k_models": {best: scores[0]}})


class CheckpointHistory(Checkpoint):
    """The checkpoints of the best epochs, as `epoch12.ckpt`: second names of what was `last.ckpt` at their end.

    It goes by the rows of the run's summary, so that a resumed run goes on with those that lie in its folder.

    Args:
        last: the run's last checkpoint, written before this callback comes.
        rows: gives the rows of the summary.
        metric: a column of it; lower is better.
        keep: how many.
    """

    def __init__(self, last: Path, rows: Callable[[], list[dict]], metric: str, keep: int):
        self.last, self.rows, self.metric, self.keep = last, rows, metric, keep

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:  # another run's go
            mine = {self._path(row["epoch"]) for row in self.rows()}
            for path in set(self.last.parent.glob("epoch*.ckpt")) - mine:
                path.unlink()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        rows = self.rows()
        copy_over(self.last, self._path(rows[-1]["epoch"]))
        there = [row for row in rows if self._path(row["epoch"]).is_file()]
        for row in sorted(there, key=lambda row: row[self.metric])[self.keep :]:
            self._path(row["epoch"]).unlink()

    def _path(self, epoch: int) -> Path:
        return self.last.with_name(f"epoch{epoch}.ckpt")


class LastCheckpoint(ModelCheckpoint):
    """The checkpoint of the last epoch.

    Lightning's own takes from a resumed checkpoint where the last one lay, and deletes that when it saves the next in
    another folder: the original, where the run goes on from a copy.
    """

    def __init__(self, **options):
        super().__init__(filename=Path(LAST).stem, **options)

    def load_state_dict(self, state_dict: dict) -> None:
        pass


class RecoveryCheckpoint(pl.Callback):
    """Save within epochs: every so many steps, and at SIGTERM or Ctrl-C, after which the run ends.

    During a validation, the signal waits for its end and the checkpoint that is written then. A second Ctrl-C stops at
    once, as without this callback; processes of `torchrun` get it twice from one key, and wait.

    Args:
        path: the checkpoint to write.
        interval: optimiser steps between checkpoints; None writes none but at a signal.

    Raises:
        Terminated: a signal came, and the checkpoint is written.
        KeyboardInterrupt: a second Ctrl-C came before that.
    """

    NAMES: ClassVar = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}

    STEPS_BETWEEN_AGREEMENTS = 10
    """With several processes, all must stop at one step; agreeing on it makes the host wait, so not every step."""

    def __init__(self, path: Path, interval: int | None = None):
        self.path, self.interval = path, interval
        self._signal = 0  # the one that came, if any

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # This replaces Lightning's handler, which talks to the other processes from within the signal; Lightning puts
        # back at the end of the run whatever was there before it.
        self._alone = trainer.world_size == 1
        if threading.current_thread() is threading.main_thread():
            for signum in self.NAMES:
                if signal.getsignal(signum) is not signal.SIG_IGN:  # as SIGINT is in a script's background
                    signal.signal(signum, self._ask)

    def _ask(self, signum: int, frame: object) -> None:
        if signum == signal.SIGINT and self._alone:
            if self._signal == signal.SIGINT:
                raise KeyboardInterrupt
            # Not by print, which the signal may have come within.
            os.write(2, b"\nsaving after this step or validation; Ctrl-C again stops at once\n")
        self._signal = self._signal or signum

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if signum := self._agreed(trainer):
            message = f"stopped by {self.NAMES[signum]} after epoch {trainer.current_epoch}; {self.path} is whole"
            raise Terminated(message, self.path, signum)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # the epoch's own checkpoint comes, or a step is half done
        steps = trainer.global_step
        agreeing = trainer.world_size == 1 or steps % self.STEPS_BETWEEN_AGREEMENTS == 0
        if agreeing and (signum := self._agreed(trainer)):
            trainer.save_checkpoint(self.path)
            place = f"epoch {trainer.current_epoch + 1}, step {batch_idx + 1}"
            raise Terminated(f"stopped by {self.NAMES[signum]} at {place}; saved to {self.path}", self.path, signum)
        if self.interval and steps % self.interval == 0:
            trainer.save_checkpoint(self.path)

    def _agreed(self, trainer: pl.Trainer) -> int:
        """The signal that any of the processes got; 0 without one."""
        if trainer.world_size == 1:
            return self._signal
        signum = torch.tensor(int(self._signal), device=trainer.strategy.root_device)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum)


# The option that tells which command's run a checkpoint is of.
_OPTION_OF = {"train": "model", "cluster": "architecture"}


def read_checkpoint(path: str | Path, name: str = "resume", command: str | None = None) -> dict:
    """A checkpoint of a training run, on the CPU.

    Args:
        path: the file.
        name: the argument that it was given as, for messages.
        command: whose run it must be of, "train" or "cluster"; None is either.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of a training run, or of another command's.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name} is {path}; there is no such file")
    try:
        checkpoint = read_tensors(path)
        checkpoint["hyper_parameters"], checkpoint["state_dict"], _epochs_done(checkpoint)
    except DamagedFile as error:
        raise DamagedFile(
            f"{name} is {path}; it is no checkpoint of a training run any more: {error}; {_instead_of(path)}"
        ) from error
    except Exception as error:  # whatever a reader does with bytes that are not its own
        raise ValueError(f"{name} is {path}; it is no checkpoint of a training run: {in_a_line(error)}") from error
    if command is not None and isinstance(checkpoint["hyper_parameters"], dict):
        check_command(checkpoint, command, path, name)
    check_fields(checkpoint, path, name)
    return checkpoint


def latest_checkpoint(folder: str | Path, say: Callable[[str], None] = print) -> Path | None:
    """The checkpoint with which the run in a folder goes on: `last.ckpt`, or the one before where that is damaged.

    Args:
        folder: of the run.
        say: gets a sentence where it is the one before.

    Returns:
        its path, or None where the folder has no checkpoint.

    Raises:
        ValueError: there is none that can be read.
    """
    last, previous = Path(folder) / LAST, Path(folder) / PREVIOUS
    try:
        if last.is_file():
            read_checkpoint(last)
            return last
        reason = f"{last} is missing"
    except ValueError as error:
        if not previous.is_file():
            raise
        reason = str(error.__cause__ or error)
        reason = f"{last} cannot be read ({reason})"
    if not previous.is_file():
        return None
    read_checkpoint(previous)
    say(f"{reason}; going on from the checkpoint before it, {previous}")
    return previous


def _instead_of(path: str | Path) -> str:
    """What to do about a damaged file."""
    others = [Path(path).with_name(name) for name in (LAST, PREVIOUS) if name != Path(path).name]
    there = [str(other) for other in others if other.is_file()]
    return f"use {there[0]} instead" if there else "copy it again from where it came, or use another"


def check_command(checkpoint: dict, command: str, path: str | Path, name: str) -> None:
    """Raise unless a checkpoint that was read is of a run of `fastroute {command}`, "train" or "cluster"."""
    if _OPTION_OF[command] not in checkpoint["hyper_parameters"]:
        raise ValueError(f"{name} is {path}; it is no checkpoint of `fastroute {command}`")


def read_resumable(path: str | Path, command: str, options: dict, epochs: int) -> dict:
    """A checkpoint that a run of these options can go on from.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of the command, was saved with other options, or leaves no epoch to train.
    """
    checkpoint = read_checkpoint(path, command=command)
    saved = checkpoint["hyper_parameters"]
    for name, value in options.items():
        if saved.get(name, value) != value:
            raise ValueError(
                f"resume is {path}; it was trained with {name}={saved[name]!r}, but this run has {name}={value!r}"
            )
    done = _epochs_done(checkpoint)
    if done >= epochs:
        raise ValueError(f"resume is {path}; it has {done} epochs behind it, so epochs={epochs} leaves none to train")
    return checkpoint


def check_resume(path: str | Path, module: pl.LightningModule, epochs: int) -> dict:
    """Read a checkpoint; raise unless it is of the same network as the module and has epochs left to train; see `fit`.

    The optimiser comes back with the rates and decays that it was saved with, so that others would be without effect.
    """
    fixed = ("model", "num_classes", "in_chans", "opt", "sched", "momentum", *GROUP_OPTIONS)
    checkpoint = read_resumable(path, "train", {name: module.hparams[name] for name in fixed}, epochs)
    if module.hparams.specification is not None:
        own, other = (
            specification_in(run, f"resume is {path}") for run in (module.hparams, checkpoint["hyper_parameters"])
        )
        if reason := other.differences(own):
            raise ValueError(f"resume is {path}; its network was built with {reason}")
    check_training_state(checkpoint, module, path)
    saved, planned = checkpoint["hyper_parameters"], checkpoint.get("epochs")
    endless = saved["sched"] == "step" or (saved["sched"] == "multistep" and module.hparams.decay_milestones)
    if planned != epochs and not endless:
        raise ValueError(f"resume is {path}; its schedule is of {planned} epochs, but this run has epochs={epochs}")
    return checkpoint


def stopped_early(path: str | Path) -> bool:
    """Whether a checkpoint is of a run that has stopped by its patience; it raises as `read_checkpoint` does."""
    return read_checkpoint(path).get("stopped_early", False)


def epochs_done(path: str | Path) -> int:
    """How many whole epochs a checkpoint has behind it; it raises as `read_checkpoint` does."""
    return _epochs_done(read_checkpoint(path))


def _epochs_done(checkpoint: dict) -> int:
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


def check_not_finished(folder: str | Path, option: str) -> None:
    """Raise where a folder has a run that a new one would overwrite, and whose last checkpoint is of its last epoch.

    A run without epochs, as of k-means, is finished once its summary is there.

    Args:
        folder: of a run.
        option: how to overwrite it nevertheless, for the message.

    Raises:
        FileExistsError: as said.
    """
    last, summary = Path(folder) / LAST, Path(folder) / "summary.csv"
    if last.is_file():
        with contextlib.suppress(ValueError):  # a damaged one is of no run that anyone could go on with
            checkpoint = read_checkpoint(last)
            done, planned = _epochs_done(checkpoint), checkpoint.get("epochs")
            if planned is not None and (done >= planned or checkpoint.get("stopped_early")):
                raise FileExistsError(
                    f"output is {folder}; a finished run of {done} epochs is there: name another folder, go on with "
                    f"--resume and more epochs, or overwrite it with {option}"
                )
    elif summary.is_file() and not summary.read_text(encoding="utf-8", errors="replace").startswith("epoch"):
        raise FileExistsError(
            f"output is {folder}; a finished run is there: name another folder, or overwrite it with {option}"
        )


def load_weights(model: nn.Module, path: str | Path, averaged: bool = True, name: str = "initial_checkpoint") -> None:
    """Load a network's weights from a checkpoint of a training run, or from a file of its `state_dict`.

    Args:
        model: gets them.
        path: a `.ckpt` of a run; any file of a state_dict; a `.safetensors`. A digest beside it, as `save_weights` or
            `sha256sum` writes one to `<name>.sha256`, is checked.
        averaged: whether the moving average is taken where the run kept one; else the weights as trained.
        name: the argument that the file was given as, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no weights, or those of another network, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{name} is {path}; there is no such file")
    try:
        weights = read_tensors(path)
    except DamagedFile as error:
        raise DamagedFile(f"{name} is {path}; it holds no weights any more: {error}; {_instead_of(path)}") from error
    except Exception as error:  # whatever a reader does with bytes that are not its own
        raise ValueError(f"{name} is {path}; it holds no weights: {in_a_line(error)}") from error
    load_network_weights(model, weights, path, averaged, name)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a network's weights whole or not at all, for `load_weights` or any other reader.

    Args:
        model: whose `state_dict` is written.
        path: a `.safetensors`, which has no checksum and gets its SHA-256 beside it, as `<name>.sha256`; any other is
            written by `torch.save`.

    Raises:
        OSError: the file cannot be written; the one before is as it was.
    """
    path, weights = Path(path), {name: value.detach().cpu() for name, value in model.state_dict().items()}
    digest_path(path).unlink(missing_ok=True)  # of what was there before
    with replacing(path, "wb") as file:
        if path.suffix == ".safetensors":
            from safetensors.torch import save

            file.write(
                save({name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()})
            )
        else:
            torch.save(weights, file)
    if path.suffix == ".safetensors":
        write_digest(path)


def load_network_weights(
    model: nn.Module, checkpoint: dict, path: Path, averaged: bool = True, name: str = "checkpoint"
) -> None:
    """As `load_weights`, from what the file at `path` holds."""
    weights = network_weights(checkpoint, averaged) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise ValueError(f"{name} is {path}; it holds a {type(weights).__name__}, and must hold a state_dict")
    if reason := differences(model.state_dict(), weights):
        raise ValueError(f"{name} is {path}; its weights are of another network: {reason}")
    model.load_state_dict(weights)


def _cause(error: BaseException) -> BaseException:
    """The system's own error, where PyTorch's writer has wrapped it."""
    while not isinstance(error, OSError) and (error.__context__ or error.__cause__):
        error = error.__cause__ or error.__context__
    return error
