"""A training run from start to end, or from a checkpoint to the end."""

import contextlib
import logging
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytorch_lightning as pl
import torch
from rich.console import Console

from fastroute.training.callbacks import AtomicCheckpointIO, EpochProgress, EpochSummary
from fastroute.training.classifier import RoutingClassifier

PRECISIONS = {None: "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}


def fit(
    module: RoutingClassifier,
    data: pl.LightningDataModule,
    *,
    epochs: int,
    output: str | Path,
    amp_dtype: str | None = None,
    resume: str | Path | None = None,
    log_interval: int = 50,
    accelerator: str = "auto",
    console: Console | None = None,
) -> list[dict]:
    """Train, and write `last.ckpt`, `best.ckpt` (of the lowest validation error) and `summary.csv` into `output`.

    Args:
        module: what to train; its weights change, and it stays on the device.
        data: its images, such as an `ImageDataModule`.
        epochs: how many in all, with those before a checkpoint.
        output: the folder to write into, made if it is missing. A run there before is overwritten.
        amp_dtype: autocast to "bfloat16" or "float16"; None computes in float32.
        resume: the checkpoint to go on from, with its optimiser, schedule (milestones too) and epoch.
        log_interval: steps between readings of the loss.
        accelerator: "auto", "cpu" or "gpu", as Lightning has it. One device is used.
        console: where progress is shown.

    Returns:
        one dict for each epoch, as in `summary.csv`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: an argument is out of range, or the checkpoint is of another network or finished already.
    """
    for name, value in (("epochs", epochs), ("log_interval", log_interval)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if amp_dtype not in PRECISIONS:
        raise ValueError(f"amp_dtype is {amp_dtype!r}; it must be 'bfloat16', 'float16' or None")
    if resume is not None:
        check_resume(resume, module, epochs)

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    summary = EpochSummary(output / "summary.csv")
    checkpoint = {"dirpath": output, "enable_version_counter": False, "save_on_train_epoch_end": True}
    with _quiet():
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=PRECISIONS[amp_dtype],
            max_epochs=epochs,
            logger=False,
            callbacks=[
                summary,
                EpochProgress(summary, console or Console(), log_interval),
                pl.callbacks.ModelCheckpoint(filename="best", monitor="val_error", **checkpoint),
                pl.callbacks.ModelCheckpoint(filename="last", **checkpoint),
            ],
            plugins=[AtomicCheckpointIO()],
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, data, ckpt_path=resume)
    module.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
    return summary.rows


def check_resume(path: str | Path, module: RoutingClassifier, epochs: int) -> None:
    """Raise unless the checkpoint is of the same network as the module and has epochs left to train; see `fit`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"resume is {path}; there is no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved, done = checkpoint["hyper_parameters"], checkpoint["epoch"] + 1
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"resume is {path}; it is no checkpoint of a training run: {error!r}") from error
    for name in ("model", "num_classes", "in_chans", "sched"):
        if saved.get(name) != module.hparams[name]:
            raise ValueError(
                f"resume is {path}; it was trained with {name}={saved.get(name)!r}, "
                f"but this run has {name}={module.hparams[name]!r}"
            )
    if done >= epochs:
        raise ValueError(f"resume is {path}; it has {done} epochs behind it, so epochs={epochs} leaves none to train")
    if module.hparams.sched == "onecycle":
        planned = checkpoint["lr_schedulers"][0]["total_steps"] * done // checkpoint["global_step"]
        if planned != epochs:
            raise ValueError(f"resume is {path}; its cycle is of {planned} epochs, but this run has epochs={epochs}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back Lightning's remarks on devices, workers and products."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
