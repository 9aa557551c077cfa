"""Loggers of a run: CSV, TensorBoard, Weights & Biases and MLflow."""

import contextlib
import csv
import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment

from fastroute._files import naming
from fastroute.training.distributed import is_main
from fastroute.training.tables import write_csv

LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")
PROJECT = "fastroute"


class _Rows(ExperimentWriter):
    """Lightning's writer of `metrics.csv`, which keeps the rows that are there, and replaces the file atomically.

    Lightning's own deletes the file as it begins, and empties it to add a column: on a full disk, the rows are lost.

    Args:
        log_dir: the folder.
        anew: whether the first rows take the place of those of another run.
    """

    def __init__(self, log_dir: str, anew: bool):
        super().__init__(log_dir)
        self.path, self.anew = Path(self.metrics_file_path), anew

    def save(self) -> None:
        if self.metrics and self.anew:
            self.anew = False
            self.path.unlink(missing_ok=True)
        with naming(self.path):
            super().save()

    def replace(self, rows: Sequence[dict]) -> None:
        """Replace the rows of the file."""
        self.metrics_keys = sorted({name for row in rows for name in row}.union(self.metrics_keys))
        write_csv(self.path, rows, self.metrics_keys)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.replace(rows)

    def _check_log_dir_exists(self) -> None:
        pass  # where Lightning deletes the file


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
                rows = [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(file)]
            self._before = [row for row in rows if row.get("step", "").isdecimal()]  # the last may be cut off

    @property
    @rank_zero_experiment
    def experiment(self):
        """The writer. Making it replaces the file by the earlier rows, if there are any."""
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir, anew=not self._before)
            if self._before:
                self._experiment.replace(self._before)
        return self._experiment

    def restore(self, step: int) -> None:
        """Remove the rows of steps beyond `step`, as of a checkpoint, from the file."""
        rows = [row for row in self._before if int(row["step"]) <= step]
        if len(rows) < len(self._before):
            self.experiment.replace(rows)
        self._before = []


@contextlib.contextmanager
def event_errors() -> Iterator[None]:
    """Suppress the traceback that TensorBoard's thread prints, and add the name of the file to its error.

    The run ends with that error, or goes on with a warning if the thread had been given all figures.
    """
    before, errors = threading.excepthook, []

    def note(found: threading.ExceptHookArgs) -> None:
        error = found.exc_value
        if type(found.thread).__name__ != "_AsyncWriterThread" or not isinstance(error, OSError):
            return before(found)
        if error.filename is None:
            error.filename = "TensorBoard's events"
        errors.append(error)

    threading.excepthook = note
    try:
        yield
    finally:
        if threading.excepthook is note:  # and not one that a callback has set since
            threading.excepthook = before
    for error in errors:
        warnings.warn(f"figures are missing: {error}", stacklevel=1)


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
