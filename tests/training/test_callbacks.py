"""The values that callbacks write, log and print."""

import io
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from fastroute.nn import Routing
from fastroute.training.callbacks import EpochProgress, EpochSummary, RouterDiagnostics


class Recorder:
    def __init__(self):
        self.found = {}

    def log_metrics(self, metrics, step):
        self.found |= metrics


@pytest.fixture
def clock(monkeypatch):
    """Return a list with the time that callbacks read."""
    now = [0.0]
    monkeypatch.setattr("fastroute.training.callbacks.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_the_summary_counts_images_and_the_time_spent_waiting_for_them(clock, tmp_path):
    summary, module = EpochSummary(tmp_path / "summary.csv"), SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(
        optimizers=[torch.optim.SGD([torch.zeros(1)], lr=0.1)],
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        datamodule=SimpleNamespace(skipped=3),
        callback_metrics={"train_loss": torch.tensor(2.0)},
        **{"world_size": 1, "current_epoch": 4, "is_global_zero": True},
    )
    summary.on_train_epoch_start(trainer, module)
    for trainer.is_last_batch in (False, True):
        clock[0] += 1
        summary.on_train_batch_start(trainer, module, None, 0)
        clock[0] += 3
        summary.on_train_batch_end(trainer, module, None, (torch.zeros(6, 3), torch.zeros(6)), 0)
    clock[0] += 12  # of the validation
    summary.on_train_epoch_end(trainer, module)
    times = {"images_per_s": 1.5, "data_wait": 25.0, "seconds": 20.0}
    assert summary.rows == [{"epoch": 5, "train_loss": 2.0, "lr": 0.1, "skipped": 3, **times}]


def test_loggers_get_the_gates_of_routers_by_their_paths(tmp_path):
    gates = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.9, 0.1], [0.97, 0.03]]])  # 2 samples, 2 paths in, 2 out
    diagnostics, logger = RouterDiagnostics(tmp_path / "routers.csv"), Recorder()
    trainer = SimpleNamespace(is_global_zero=True, loggers=[logger], current_epoch=0, global_step=1)
    diagnostics.on_validation_start(trainer, None)
    diagnostics.on_validation_batch_end(trainer, None, {"a": Routing(gates, gates)}, None, 0)
    diagnostics.on_validation_end(trainer, None)
    entropy = sum(torch.special.entr(gates).sum(2).flatten().tolist()) / 4 / math.log(2)
    means = {"gate_11": 0.7, "gate_12": 0.3, "gate_21": 0.985, "gate_22": 0.015}
    largest = {"largest_11": 1, "largest_12": 0, "largest_21": 1, "largest_22": 0}
    expected = {"dead": 0.25, "entropy": entropy, **means, **largest}
    assert logger.found == pytest.approx({f"router/a/{name}": value for name, value in expected.items()})


def test_the_time_left_is_that_of_the_steps_that_are_left(clock):
    summary = SimpleNamespace(lr=0.1, images_per_s=1200.0, data_wait=5.0)
    progress = EpochProgress(summary, Console(file=io.StringIO()), 1)
    trainer = SimpleNamespace(max_epochs=3, current_epoch=1, num_training_batches=10, world_size=2)
    progress.on_train_start(trainer, None)
    clock[0], progress._steps = 50.0, 5
    expected = "loss 1.500  lr 0.1  2,400 images/s  data wait 5.0 %  eta 0:02:30"
    assert progress._status(trainer, 1.5, 5) == expected


@pytest.mark.parametrize(("classes", "top5"), [(10, ""), (11, " top-5  4.50 %")])
def test_the_line_of_an_epoch_has_the_values_of_its_row(classes, top5):
    losses = {"train_loss": 1.25, "train_error": 30.5, "val_loss": 2.125, "val_error": 40.25, "val_error5": 4.5}
    times = {"lr": 0.1, "images_per_s": 1234.0, "data_wait": 2.5, "skipped": 0, "seconds": 6.0}
    console = Console(file=io.StringIO(), width=300)
    progress = EpochProgress(SimpleNamespace(rows=[{"epoch": 2, **losses, **times}]), console, 1)
    module = SimpleNamespace(hparams={"num_classes": classes})
    progress.on_train_epoch_end(SimpleNamespace(max_epochs=30), module)
    assert console.file.getvalue() == (
        f"epoch  2/30  train loss 1.250 error 30.50 %  val loss 2.125 error 40.25 %{top5}  lr 0.1  1,234 images/s"
        "  data wait 2.5 %  6.0 s\n"
    )
