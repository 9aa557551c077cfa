"""Where a run's figures go besides its own tables."""

import csv
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from fastroute.training.distributed import is_main

LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")
PROJECT = "fastroute"


class StepTable(CSVLogger):
    """Lightning's `metrics.csv`, of which a run that goes on keeps what was logged up to its checkpoint.

    Args:
        output: the folder of the file.
        resumed: whether the run goes on; else a file that is there is replaced.
    """

    def __init__(self, output: Path, resumed: bool):
        super().__init__(output, name="", version="", flush_logs_every_n_steps=1)
        path, self._before = output / "metrics.csv", []
        if resumed and path.is_file() and is_main():
            with path.open(newline="", encoding="utf-8") as file:
                self._before = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]

    def go_on(self, step: int) -> None:
        """Take up the rows of steps up to `step`."""
        before, self._before = self._before, []
        if before:
            self.experiment.metrics[:0] = [row for row in before if int(row["step"]) <= step]
            self.save()


def make_loggers(
    given: str | Logger | Sequence[str | Logger] | bool | None, output: Path, resumed: bool = False
) -> list[Logger]:
    """Loggers from their names, or Lightning's as they are.

    Args:
        given: names of `LOGGERS` with commas between, loggers, or a sequence of both; None, False and "" are none, and
            True is "tensorboard".
        output: the folder of the run. Its name is that of the run where a logger has names.
        resumed: whether the run goes on from a checkpoint.

    "csv" writes `metrics.csv`, "tensorboard" its events. "wandb" goes where `wandb login` and WANDB_MODE say, "mlflow"
    to MLFLOW_TRACKING_URI, or to a folder `mlruns` of the run; both to the project or experiment "fastroute".

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
    """Raise for a name that there is not, or whose package is missing; see `make_loggers`."""
    for name in names:
        if isinstance(name, Logger):
            continue
        if name not in LOGGERS:
            raise ValueError(f"log is {name!r}; it must be of {', '.join(LOGGERS)}, with commas between them")
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
