"""Write checkpoints atomically: at the end of each epoch, within epochs, and when the run is stopped."""

import contextlib
import io
import os
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import distributed as dist

from fastroute._files import copy_over, replacing
from fastroute._plain import plain
from fastroute.training.checkpoints import (
    LAST,
    PREVIOUS,
    is_within,
    kept_epochs,
    read_checkpoint,
    summary_rows,
    unreadable,
)
from fastroute.training.distributed import broadcast_from_rank_zero
from fastroute.training.tables import best_first

OF_DATA = pl.LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY
"""Lightning's name for the hyper-parameters of a data module in a checkpoint."""


class Terminated(SystemExit):
    """Raised when a run has saved at SIGTERM, Ctrl-C or a callback's `trainer.should_stop`, and has stopped.

    Its exit status is a shell's for the signal, 143 or 130. After `trainer.should_stop` it is 1, with the message on
    standard error, as the epoch is unfinished.

    Args:
        message: where the run stopped.
        path: the checkpoint to resume from; None if the run had not begun.
        signum: the signal; None is `trainer.should_stop`.
    """

    def __init__(self, message: str, path: Path | None, signum: int | None = signal.SIGTERM):
        super().__init__(message if signum is None else 128 + signum)
        self.message, self.path = message, path

    def __str__(self) -> str:
        return self.message


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replace checkpoints atomically, and check them when they are read.

    A replaced `last.ckpt` is kept as `previous.ckpt`, in case the disk damages the last one. Lightning's own IO writes
    to the system's temporary folder; on another disk, the move from there is a copy, which can be interrupted.

    Args:
        resumed: the checkpoint that the run is resumed from; `last.ckpt` and `previous.ckpt` of another run are not
            kept.
        checkpoint: its content as `read_checkpoint` returned it, so that it is not read again.

    Raises:
        OSError: a checkpoint cannot be written, as on a full disk; the previous one is intact.
    """

    def __init__(self, resumed: str | Path | None = None, checkpoint: dict | None = None):
        super().__init__()
        self._own = set() if resumed is None else {Path(resumed).resolve()}
        self._read = {} if checkpoint is None else {Path(resumed): checkpoint}

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = plain(checkpoint, tensors=False)
        if foreign := checkpoint.get(OF_DATA):
            checkpoint = checkpoint | {OF_DATA: {k: v for k, v in foreign.items() if _reason_against(v) is None}}
        try:
            with replacing(path, "wb", earlier=self._earlier(path)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch's own writer reports a full disk as a RuntimeError
            kept = "the previous checkpoint is intact" if path.is_file() else "there is no previous checkpoint"
            raise OSError(f"checkpoint {path} cannot be written, {kept}: {_cause(error)}") from error
        self._own.add(path.resolve())

    def _earlier(self, path: Path) -> Path | None:
        """Return where to keep the checkpoint that is replaced: None unless it is this run's `last.ckpt`."""
        previous = path.with_name(PREVIOUS)
        if path.name != LAST:
            return None
        if path.resolve() in self._own:
            return previous
        if previous.resolve() not in self._own:  # unless the run is resumed from it, as the last one was damaged
            previous.unlink(missing_ok=True)
        return None

    def load_checkpoint(self, path: str | Path, map_location=None, weights_only: bool | None = None) -> dict:
        checkpoint = self._read.pop(Path(path), None)
        return read_checkpoint(path) if checkpoint is None else checkpoint


class Readable(pl.Callback):
    """Check before the first step that the run's checkpoints can be read back: only plain values and tensors can.

    Hyper-parameters of a data module that cannot be read back are left out of the checkpoints, with a warning; `fit`
    does not need them.

    Raises:
        ValueError: a hyper-parameter of the module, or the state of a callback, cannot be read back.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        leave = ", or leave it out by save_hyperparameters(ignore=[…])"
        own = [(f"the hyper-parameter {name}", value, leave) for name, value in pl_module.hparams.items()]
        states = [(f"the state of {type(call).__name__}", call.state_dict(), "") for call in trainer.callbacks]
        for name, value, advice in own + states:
            if reason := _reason_against(plain(value, tensors=False)):
                raise ValueError(
                    f"{name} cannot be read back from a checkpoint: {reason}. Use numbers, texts, lists, dicts and "
                    f"tensors{advice}"
                )
        data = getattr(trainer.datamodule, "hparams_initial", {})
        if left := [name for name, value in data.items() if _reason_against(plain(value, tensors=False))]:
            warnings.warn(
                f"{', '.join(left)} of {type(trainer.datamodule).__name__} cannot be read back from checkpoints, and "
                "will not be in them",
                stacklevel=1,
            )


def _reason_against(value: object) -> str | None:
    """Return why a value cannot be read back from a checkpoint; None if it can."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # pickle raises errors of many types
        return unreadable(error)
    return None


class BestCheckpoint(ModelCheckpoint):
    """Save the checkpoint of the best epoch; a resumed run keeps the best score, even if its folder was moved.

    Lightning's own drops the score if the folder was renamed or the metric was changed. This one keeps it if the run is
    resumed from a checkpoint beside the best one; for another metric, it takes the score of the best one's epoch. In a
    new folder there is no best epoch yet.

    Args:
        resumed: the checkpoint that the run is resumed from, if any.
        options: of `ModelCheckpoint`.
    """

    def __init__(self, resumed: str | Path | None, **options):
        super().__init__(**options)
        self._resumed = resumed

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        # Not in load_state_dict: Lightning calls it only with the state of the same metric.
        states = checkpoint.get("callbacks", {}).items()
        state = next((state for name, state in states if name.partition("{")[0] == type(self).__name__), None)
        best, score = self.format_checkpoint_name({}), None
        beside = is_within(self._resumed, Path(self.dirpath))
        if trainer.is_global_zero and state is not None and beside and os.path.isfile(best):
            score = self._score(state, best)
        score = broadcast_from_rank_zero(score)
        if score is not None:
            here = {"dirpath": self.dirpath, "best_model_path": best, "kth_best_model_path": best}
            here |= {"best_model_score": score, "kth_value": score, "best_k_models": {best: score}}
            super().load_state_dict(state | here)

    def load_state_dict(self, state_dict: dict) -> None:
        pass

    def _score(self, state: dict, best: str) -> torch.Tensor | None:
        """Return the score of the best epoch by this run's metric; None if it is not known."""
        if state.get("monitor", self.monitor) == self.monitor:
            return next(iter(state["best_k_models"].values()), None)
        with contextlib.suppress(ValueError):  # a damaged file is the best of none
            rows = summary_rows(best)
            if rows and self.monitor in rows[-1]:
                return torch.tensor(rows[-1][self.monitor])
        return None


class CheckpointHistory(Checkpoint):
    """Keep the checkpoints of the best epochs as `epoch12.ckpt`: hard links to `last.ckpt` at the end of the epochs.

    It compares the rows of the run's summary, so a resumed run continues with the files in its folder.

    Args:
        last: the run's last checkpoint, written before this callback runs.
        rows: returns the rows of the summary.
        metric: a column of them; lower is better.
        keep: the number of checkpoints.
    """

    def __init__(self, last: Path, rows: Callable[[], list[dict]], metric: str, keep: int):
        self.last, self.rows, self.metric, self.keep = last, rows, metric, keep
        self._others: set[Path] = set()  # of another run, until the first batch of this one
        self._behind = False  # whether a killed run may have written `last` and not yet the epoch's own file

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        place = checkpoint["loops"]["fit_loop"].get("epoch_loop.batch_progress", {})
        resumed = Path(trainer.ckpt_path).resolve() == self.last.resolve()
        self._behind = resumed and place.get("is_last_batch", False)  # else it is from within an epoch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        rows = self.rows()
        self._others = set(kept_epochs(self.last.parent)) - {self._path(row["epoch"]) for row in rows}
        if self._behind and rows and not self._path(rows[-1]["epoch"]).is_file():
            self._keep()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        while self._others:
            self._others.pop().unlink(missing_ok=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._keep()

    def _keep(self) -> None:
        rows = self.rows()
        copy_over(self.last, self._path(rows[-1]["epoch"]))
        there = [row for row in rows if self._path(row["epoch"]).is_file()]
        for row in best_first(there, self.metric)[self.keep :]:
            self._path(row["epoch"]).unlink()

    def _path(self, epoch: int) -> Path:
        return self.last.with_name(f"epoch{epoch}.ckpt")


class LastCheckpoint(ModelCheckpoint):
    """Save the checkpoint of the last epoch, with `stopped_early` if a callback has ended the run there.

    Lightning's own restores the path of the last checkpoint, and deletes that file when it saves the next one in
    another folder: the original, if the run is resumed from a copy.
    """

    def __init__(self, **options):
        super().__init__(filename=Path(LAST).stem, **options)

    def load_state_dict(self, state_dict: dict) -> None:
        pass

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint["stopped_early"] = bool(trainer.should_stop and trainer.is_last_batch)


class RecoveryCheckpoint(Checkpoint):
    """Save within epochs: every `interval` steps, and at SIGTERM, Ctrl-C or `trainer.should_stop`, which end the run.

    At `trainer.should_stop` within an epoch, as of its Timer, Lightning would validate and leave the rest of the images
    out; a run that is resumed from this checkpoint trains on them. At the end of an epoch, Lightning ends the run. As a
    `Checkpoint`, this one runs after all other callbacks, whose states it saves.

    During validation, the signal takes effect after it, when the checkpoint of the epoch is written. A second Ctrl-C
    stops at once, as without this callback; processes of `torchrun` receive one key press twice, so they wait.

    Lightning's `ModelCheckpoint(every_n_train_steps=…)` handles no signals, and it also saves at the last step of an
    epoch, before the validation that the epoch's own checkpoint includes.

    Args:
        path: the checkpoint to write.
        interval: optimiser steps between checkpoints; None writes one at a stop only.

    Raises:
        Terminated: a signal was received or a callback has set `trainer.should_stop`, and the checkpoint is written.
        KeyboardInterrupt: a second Ctrl-C was received before that.
    """

    NAMES: ClassVar = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
    ASKED = 1
    """Stands for `trainer.should_stop` among the signals, below those of `NAMES`."""

    STEPS_BETWEEN_AGREEMENTS = 10
    """Steps between agreements of several processes on a step to stop at; each agreement makes the host wait."""

    def __init__(self, path: Path, interval: int | None = None):
        self.path, self.interval = path, interval
        self._signal = 0  # the one received, if any
        self._asked = False  # whether a callback has set `trainer.should_stop` within the epoch
        self._trained = False  # whether a step was taken

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Replaces Lightning's handler, which communicates with other processes within the signal. Lightning restores
        # the original handlers at the end of the run.
        self._alone, self._process, self._asked = trainer.world_size == 1, os.getpid(), False
        if threading.current_thread() is threading.main_thread():
            for signum in self.NAMES:
                if signal.getsignal(signum) is not signal.SIG_IGN:  # as SIGINT is for a background job of a script
                    signal.signal(signum, self._request_stop)

    def _request_stop(self, signum: int, frame: object) -> None:
        if os.getpid() != self._process:  # a worker, which inherits the handler, and which Ctrl-C reaches too
            return
        if signum == signal.SIGINT and self._alone:
            if self._signal == signal.SIGINT:
                raise KeyboardInterrupt
            # Not by print: the signal may have interrupted one.
            os.write(2, b"\nsaving after this step or validation; Ctrl-C again stops at once\n")
        self._signal = self._signal or signum

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._asked = self._asked or trainer.should_stop
        trainer.should_stop = False  # else Lightning would end the epoch without a batch
        if request := self._any_request(trainer):
            signum, by = self._reason(request)
            if not self._trained:
                raise Terminated(f"stopped by {by} before the first step", None, signum)
            message = f"stopped by {by} after epoch {trainer.current_epoch}; {self.path} is complete"
            raise Terminated(message, self.path, signum)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self._trained = True
        self._asked = self._asked or trainer.should_stop
        trainer.should_stop = False  # else Lightning would end the epoch
        if trainer.is_last_batch:  # the epoch's own checkpoint follows
            trainer.should_stop = trainer.strategy.reduce_boolean_decision(self._asked, all=False)
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # gradients are being accumulated
        steps = trainer.global_step
        agreeing = trainer.world_size == 1 or steps % self.STEPS_BETWEEN_AGREEMENTS == 0
        if agreeing and (request := self._any_request(trainer)):
            trainer.save_checkpoint(self.path)
            signum, by = self._reason(request)
            place = f"epoch {trainer.current_epoch + 1}, step {batch_idx + 1}"
            raise Terminated(f"stopped by {by} at {place}; saved to {self.path}", self.path, signum)
        if self.interval and steps % self.interval == 0:
            trainer.save_checkpoint(self.path)

    def _reason(self, request: int) -> tuple[int | None, str]:
        """Return the signal of a request, None for `ASKED`, and its name."""
        return (None, "trainer.should_stop") if request == self.ASKED else (request, self.NAMES[request])

    def check_trained(self, trainer: pl.Trainer) -> None:
        """Raise Terminated if a run has ended without a step, as by a Timer whose time an earlier run has used."""
        if not self._trained and trainer.should_stop:
            raise Terminated("stopped by trainer.should_stop before the first step", None, None)

    def _any_request(self, trainer: pl.Trainer) -> int:
        """Return the signal that any of the processes has received, `ASKED` if only a callback asks to stop, or 0."""
        request = int(self._signal or (self.ASKED if self._asked else 0))
        if trainer.world_size == 1:
            return request
        requests = torch.tensor(request, device=trainer.strategy.root_device)
        dist.all_reduce(requests, dist.ReduceOp.MAX)
        return int(requests)


def _cause(error: BaseException) -> BaseException:
    """Return the system's error that PyTorch's writer has wrapped, if there is one."""
    while not isinstance(error, OSError) and (error.__context__ or error.__cause__):
        error = error.__cause__ or error.__context__
    return error
