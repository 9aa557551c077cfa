"""What a run shows and writes."""

import csv
import os
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

METRICS = ("train_loss", "train_error", "val_loss", "val_error")


class EpochSummary(pl.Callback):
    """One row for each epoch, in `rows` and in a CSV file: losses, errors in percent, learning rate and speed.

    `lr` is that of the epoch's last step, `images_per_s` counts training alone, and `seconds` is the whole epoch with
    its validation. Rows are part of the checkpoint, so a resumed run has those of the epochs before it.
    """

    def __init__(self, path: Path):
        self.path, self.rows = path, []

    def state_dict(self) -> dict:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict) -> None:
        self.rows = list(state_dict["rows"])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self._images = time.perf_counter(), 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._images += len(batch[1])
        if trainer.is_last_batch:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            self._training = time.perf_counter() - self._start

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rows.append(
            {
                "epoch": trainer.current_epoch + 1,
                **{name: trainer.callback_metrics[name].item() for name in METRICS},
                "lr": self._lr,
                "images_per_s": self._images / self._training,
                "seconds": time.perf_counter() - self._start,
            }
        )
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(temporary, self.path)


class EpochProgress(pl.callbacks.ProgressBar):
    """A bar for the epoch that runs, with loss, learning rate and images/s, and one line for each that is done."""

    def __init__(self, summary: EpochSummary, console: Console, log_interval: int):
        super().__init__()
        self.summary, self.console, self.log_interval = summary, console, log_interval
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn())
        self.progress = Progress(
            TextColumn("{task.description}"),
            *columns,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def disable(self) -> None:
        self.console.quiet = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self._images = time.perf_counter(), 0
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._task = self.progress.add_task(epoch, total=trainer.num_training_batches, status="")
        self.progress.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._images += len(batch[1])
        if batch_idx % self.log_interval == 0:  # reading the loss makes the host wait for a GPU
            lr, speed = trainer.optimizers[0].param_groups[0]["lr"], self._images / (time.perf_counter() - self._start)
            status = f"loss {outputs['loss'].item():.3f}  lr {lr:.3g}  {speed:,.0f} images/s"
            self.progress.update(self._task, status=status)
        self.progress.update(self._task, completed=batch_idx + 1)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()
        row = self.summary.rows[-1]
        self.console.print(
            f"epoch {row['epoch']:>{len(str(trainer.max_epochs))}}/{trainer.max_epochs}"
            f"  train loss {row['train_loss']:.3f} error {row['train_error']:5.2f} %"
            f"  val loss {row['val_loss']:.3f} error {row['val_error']:5.2f} %"
            f"  lr {row['lr']:.3g}  {row['images_per_s']:,.0f} images/s  {row['seconds']:.1f} s",
            highlight=False,
            soft_wrap=True,
        )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        self.progress.stop()
        for task in self.progress.task_ids:
            self.progress.remove_task(task)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the old checkpoint and rename over it, so that at any moment there is a whole one.

    Lightning's own goes by the system's temporary folder, and moving from there is a copy where that is another disk.
    """

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
