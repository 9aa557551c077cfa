"""Loggers of a run: CSV, TensorBoard, Weights & Biases and MLflow."""

import csv
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment

from fastroute._files import replacing
from fastroute.training.distributed import is_main

LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")
PROJECT = "fastroute"


class StepTable(CSVLogger):
    """Lightning's `metrics.csv`, which a resumed run continues from the step of its checkpoint.

    Args:
        output: the folder of the file.
        resumed: whether the run is resumed; otherwise an existing file is replaced.
    """

    def __init__(self, output: Path, resumed: bool):
        super().__init__(output, name="", version="", flush_logs_every_n_steps=1)
        path, self._before = output / "metrics.csv", []
        if resumed and path.is_file() and is_main():
            with path.open(newline="", encoding="utf-8") as file:
                self._before = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]

    @property
    @rank_zero_experiment
    def experiment(self):
        """The writer. Making it replaces the file, so earlier rows are written back at once."""
        first = self._experiment is None
        writer = CSVLogger.experiment.fget(self)
        if first and self._before:
            writer.metrics[:0] = self._before
            writer.save()
        return writer

    def restore(self, step: int) -> None:
        """Remove the rows of steps beyond `step`, as of a checkpoint, from the file."""
        rows = [row for row in self._before if int(row["step"]) <= step]
        if len(rows) < len(self._before):
            writer = self.experiment
            with replacing(Path(writer.metrics_file_path), "w", newline="") as file:
                table = csv.DictWriter(file, writer.metrics_keys)
                table.writeheader()
                table.writerows(rows)
        self._before = []


def make_loggers(
    given: str | Logger | Sequence[str | Logger] | bool | None, output: Path, resumed: bool = False
) -> list[Logger]:
    """Make loggers from their names; loggers of Lightning pass through.

    "csv" writes `metrics.csv`, and "tensorboard" writes event files. "wandb" follows `wandb login` and WANDB_MODE, and
    "mlflow" writes to MLFLOW_TRACKING_URI, or else to a folder `mlruns` of the run. The project or experiment of both
    is "fastroute", unless WANDB_PROJECT names another project.

    Args:
        given: names of `LOGGERS` separated by commas, loggers, or a sequence of both; None, False and "" are none, and
            True is "tensorboard".
        output: the folder of the run, whose name is the run's name in loggers that have one.
        resumed: whether the run is resumed from a checkpoint.

    Returns:
        the loggers.

    Raises:
        ValueError: there is no such logger.
        ModuleNotFoundError: its package is not installed.
    """
    if given is None or given is False:
        return []
    if given is True:
        given = "tensorboard"
    if isinstance(given, str):
        given = [name for name in given.replace(" ", "").split(",") if name]
    given = [given] if isinstance(given, Logger) else given
    check_loggers(given)
    return [item if isinstance(item, Logger) else _make(item, output, resumed) for item in given]


def check_loggers(names: Sequence[str | Logger]) -> None:
    """Check the names of loggers, and that their packages are installed; see `make_loggers`.

    Args:
        names: names of `LOGGERS`, or loggers, which pass.

    Raises:
        ValueError: there is no such logger.
        ModuleNotFoundError: the package of a logger is not installed.
    """
    for name in names:
        if isinstance(name, Logger):
            continue
        if name not in LOGGERS:
            raise ValueError(f"log is {name!r}; expected names out of {', '.join(LOGGERS)}, separated by commas")
        if name in ("wandb", "mlflow") and importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"log is {name!r}; it needs the package {name}: pip install {name}", name=name)


def _make(name: str, output: Path, resumed: bool) -> Logger:
    if name == "csv":
        return StepTable(output, resumed)
    if name == "tensorboard":
        return TensorBoardLogger(output, name="", version="", default_hp_metric=False)
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return WandbLogger(project=project, name=output.name, save_dir=output)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"file:{output / 'mlruns'}"
    return MLFlowLogger(experiment_name=PROJECT, run_name=output.name, tracking_uri=uri)
