"""Callbacks that report on a run: tables, loggers, progress, early stopping."""

import datetime
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import distributed as dist

from fastroute.diagnostics.routing import across_processes
from fastroute.diagnostics.statistics import RouterStatistics, add_routing
from fastroute.training.loggers import StepTable
from fastroute.training.optim import learning_rate
from fastroute.training.tables import RowTable, out_of_patience

METRICS = ("train_loss", "train_error", "train_aux", "val_loss", "val_error", "val_error5")


class FirstBatch(pl.Callback):
    """Call a function on rank 0 after the first batch, which shows that options and data are right.

    Args:
        function: takes nothing.
    """

    def __init__(self, function: Callable[[], None]):
        self._function: Callable[[], None] | None = function

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        function, self._function = self._function, None
        if function is not None and trainer.is_global_zero:
            function()


class EpochSummary(RowTable):
    """Write a row for each epoch: losses, errors in percent, learning rate and speed.

    The columns: `lr` is the learning rate of the epoch's last step; `images_per_s` counts training alone, over all
    processes; `data_wait` is the share of that time, in percent, for which rank 0 waited for batches; `skipped` counts
    the images that could not be read since the run was started or resumed; and `seconds` is the time of the epoch with
    its validation. Times of an interrupted epoch start where it was resumed.

    Args:
        path: the CSV file.

    Raises:
        RuntimeError: an epoch has ended before its last batch was trained on.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()  # on_train_epoch_start is not called in a run resumed within an epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()

    def _begin(self) -> None:
        self._start = self._ready = time.perf_counter()
        self._images, self.waited = 0, 0.0
        self._speed = self._waiting = None  # until the last batch

    @property
    def images_per_s(self) -> float:
        """Images per second of this process, in the epoch so far."""
        return self._images / (time.perf_counter() - self._start)

    @property
    def data_wait(self) -> float:
        """The share of the epoch's time so far spent waiting for batches, in percent."""
        return 100 * self.waited / (time.perf_counter() - self._start)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.waited += time.perf_counter() - self._ready
        self.lr = learning_rate(trainer.optimizers[0])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._images += len(batch[1])
        if trainer.is_last_batch:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            self._speed, self._waiting = self.images_per_s, self.data_wait
        self._ready = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._speed is None or not trainer.is_last_batch:  # a row would be of a part of the epoch
            raise RuntimeError(
                "the epoch has ended before its last batch: the data gave fewer batches than their length, "
                f"{trainer.num_training_batches}, on_train_batch_start has returned -1, or the module's own "
                "on_train_batch_end, which runs after all callbacks, has set trainer.should_stop; set that in "
                "on_train_batch_end of a callback, so that the run is saved there"
            )
        sums = torch.tensor([self._speed, getattr(trainer.datamodule, "skipped", 0)], device=pl_module.device)
        if trainer.world_size > 1:
            dist.all_reduce(sums)
        speed, skipped = sums.tolist()
        metrics = trainer.callback_metrics
        self.rows.append(
            {
                "epoch": trainer.current_epoch + 1,
                **{name: metrics[name].item() for name in METRICS if name in metrics},
                "lr": self.lr,
                "images_per_s": speed,
                "data_wait": self._waiting,
                "skipped": int(skipped),
                "seconds": time.perf_counter() - self._start,
            }
        )
        if trainer.is_global_zero:
            self.write()


def _step_loss(trainer: pl.Trainer, outputs: dict) -> float:
    """Return the loss of a batch, which Lightning has divided for gradient accumulation."""
    return outputs["loss"].item() * trainer.accumulate_grad_batches


class StepLog(pl.Callback):
    """Send hyperparameters to each logger once, and loss, learning rate and images/s every `interval` steps.

    Args:
        summary: the run's, which counts images.
        interval: steps between readings of the loss, each of which makes the host wait for a GPU.
        options: the run's, logged together with those of the module.
    """

    def __init__(self, summary: EpochSummary, interval: int, options: dict):
        self.summary, self.interval, self.options = summary, interval, options

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batch_size = getattr(trainer.datamodule, "batch_size", None)
        options = {**pl_module.hparams, **({"batch_size": batch_size} if batch_size else {}), **self.options}
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        for logger in trainer.loggers:
            logger.log_hyperparams(options)
            if isinstance(logger, StepTable):
                logger.restore(trainer.global_step)
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                rows = "\n".join(f"|{name}|{value}|" for name, value in sorted(options.items()))
                logger.experiment.add_text("hyperparameters", f"|name|value|\n|-|-|\n{rows}")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % self.interval and not trainer.is_last_batch:
            return
        figures = {
            "step/loss": _step_loss(trainer, outputs),
            "step/lr": self.summary.lr,
            "step/images_per_s": self.summary.images_per_s * trainer.world_size,
        }
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)


class Patience(pl.Callback):
    """Stop the run after `patience` epochs that are not better than the best one before them.

    It compares the rows of the summary, which are part of a checkpoint, so a resumed run stops where an uninterrupted
    one does.

    Args:
        summary: the run's.
        metric: a column of it; lower is better.
        patience: the number of epochs.
        console: to print on.
    """

    def __init__(self, summary: EpochSummary, metric: str, patience: int, console: Console):
        self.summary, self.metric, self.patience, self.console = summary, metric, patience, console

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        best = out_of_patience(self.summary.rows, self.metric, self.patience)
        if best is None:
            return
        trainer.should_stop = True
        count = f"{self.patience} epoch{'s' * (self.patience != 1)}"
        self.console.print(
            f"stopped after epoch {self.summary.rows[-1]['epoch']}: in {count}, {self.metric} has not been lower than "
            f"in epoch {best['epoch']}, {best[self.metric]:.4g}",
            highlight=False,
            soft_wrap=True,
        )


class RouterDiagnostics(RowTable):
    """Measure each router on the validation images of each epoch, for a CSV file and the loggers.

    The file has a row for each gate of each router, from path i to path j: the mean gate, the share of images for which
    it is the largest of path i (`largest`) and for which it is not 0 (`load`; below 1 in sparse routers), its highest
    value (`peak`), and the mean entropy of path i's gates as a share of ln n. The loggers also get the fraction of dead
    gates of each router; see `RouterStatistics`.

    Args:
        path: the CSV file.

    Attributes:
        statistics: of each router by name, at the last validation.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.statistics: dict[str, RouterStatistics] = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._totals = {}

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        add_routing(self._totals, outputs or {})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.statistics = across_processes(self._totals)
        if not self.statistics or not trainer.is_global_zero:
            return
        scalars = {}
        for name, router in self.statistics.items():
            scalars[f"router/{name}/dead"] = router.dead_fraction
            scalars[f"router/{name}/entropy"] = router.mean_entropy.mean().item()
            columns = (router.mean_gates, router.shares_of_maximum, router.shares_of_samples, router.peak)
            for i, rows in enumerate(zip(*(c.tolist() for c in columns), strict=True), start=1):
                entropy = router.mean_entropy[i - 1].item()
                for j, (gate, largest, load, peak) in enumerate(zip(*rows, strict=True), start=1):
                    place = {"epoch": trainer.current_epoch + 1, "router": name, "from": i, "to": j}
                    values = {"gate": gate, "largest": largest, "load": load, "peak": peak, "entropy": entropy}
                    self.rows.append(place | values)
                    scalars |= {f"router/{name}/gate_{i}{j}": gate, f"router/{name}/largest_{i}{j}": largest}
        self.write()
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)


class EpochProgress(pl.callbacks.ProgressBar):
    """Show a progress line for the current epoch, and print a line for each completed one.

    The progress line has the step, loss, learning rate, images/s over all processes, the share of the time spent
    waiting for data, and an estimate of the time left in the whole run. On a console that is neither a terminal nor a
    notebook with ipywidgets, it is printed at every reading of the loss instead; Lightning's RichProgressBar prints
    nothing there.

    Args:
        summary: the run's.
        console: to print on.
        log_interval: steps between readings of the loss.
    """

    def __init__(self, summary: EpochSummary, console: Console, log_interval: int):
        super().__init__()
        self.summary, self.console, self.log_interval = summary, console, log_interval
        self._enabled = True
        self._live = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            transient=True,
            disable=not self._live,
        )

    def disable(self) -> None:
        self.console.quiet = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self._steps = time.perf_counter(), 0
        self._begin(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)

    def _begin(self, trainer: pl.Trainer) -> None:
        self._stop()
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._task = self.progress.add_task(epoch, total=trainer.num_training_batches, status="")
        self.progress.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._steps += 1
        done = batch_idx + 1
        if done % self.log_interval == 0 or self._steps == 1:  # reading the loss makes the host wait for a GPU
            status = self._status(trainer, _step_loss(trainer, outputs), done)
            self.progress.update(self._task, status=status)
            if not self._live and not trainer.is_last_batch:
                place = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {done}/{trainer.num_training_batches}"
                self.console.print(f"{place}  {status}", highlight=False, soft_wrap=True)
        self.progress.update(self._task, completed=done)

    def _status(self, trainer: pl.Trainer, loss: float, done: int) -> str:
        left = (trainer.max_epochs - trainer.current_epoch) * trainer.num_training_batches - done
        seconds = left * (time.perf_counter() - self._start) / self._steps  # includes validation's share
        speed = self.summary.images_per_s * trainer.world_size
        return (
            f"loss {loss:.3f}  lr {self.summary.lr:.3g}  "
            f"{speed:,.0f} images/s  data wait {self.summary.data_wait:.1f} %  "
            f"eta {datetime.timedelta(seconds=round(seconds))}"
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()
        row = self.summary.rows[-1]
        validated = ""
        if "val_loss" in row:
            top5 = f" top-5 {row['val_error5']:5.2f} %" if pl_module.hparams.get("num_classes", 0) > 10 else ""
            validated = f"  val loss {row['val_loss']:.3f} error {row['val_error']:5.2f} %{top5}"
        skipped = f"  skipped {row['skipped']}" if row["skipped"] else ""
        self.console.print(
            f"epoch {row['epoch']:>{len(str(trainer.max_epochs))}}/{trainer.max_epochs}"
            f"  train loss {row['train_loss']:.3f} error {row['train_error']:5.2f} %"
            f"{validated}  lr {row['lr']:.3g}  {row['images_per_s']:,.0f} images/s"
            f"  data wait {row['data_wait']:.1f} %{skipped}  {row['seconds']:.1f} s",
            highlight=False,
            soft_wrap=True,
        )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        self.progress.stop()
        for task in self.progress.task_ids:
            self.progress.remove_task(task)
