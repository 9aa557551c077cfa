"""Write checkpoints atomically: at the end of each epoch, within epochs, and when the run is stopped."""

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

from fastroute._files import copy_over, replacing
from fastroute.training.checkpoints import LAST, PREVIOUS, read_checkpoint
from fastroute.training.distributed import agreed


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


def _cause(error: BaseException) -> BaseException:
    """The system's own error, where PyTorch's writer has wrapped it."""
    while not isinstance(error, OSError) and (error.__context__ or error.__cause__):
        error = error.__cause__ or error.__context__
    return error
