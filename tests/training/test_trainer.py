import csv
import io
import itertools
import math
import re
import shutil
import warnings
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import yaml
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from fastroute.models import create_model
from fastroute.training import ImageDataModule, RoutingClassifier, fit, router_statistics
from fastroute.training.callbacks import Patience
from fastroute.training.checkpoints import check_unused
from fastroute.training.loggers import make_loggers
from fastroute.training.saving import CheckpointHistory
from fastroute.training.steps import MovingAverage, StepSeed
from fastroute.training.tables import best_first, out_of_patience


@pytest.fixture
def data(image_folder):
    data = ImageDataModule("imagefolder", image_folder, batch_size=10, img_size=8)
    data.setup()
    return data


def classifier(cls=RoutingClassifier, model="resnet20_cc2", **options):
    pl.seed_everything(0, verbose=False)
    return cls(model, num_classes=3, img_size=8, **{"decay_milestones": (2, 3), **options})


def run(module, data, output, epochs=4, **options):
    options = {"console": Console(quiet=True), "accelerator": "cpu"} | options
    return fit(module, data, epochs=epochs, output=output, **options)


def assert_equal(actual, expected):
    """Bit for bit, through dicts and lists."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        actual, expected = actual.values(), expected.values()
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, (str, int, float, bool, type(None))):
        assert actual == expected
    else:
        for a, b in zip(actual, expected, strict=True):
            assert_equal(a, b)


class Killed(RoutingClassifier):
    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            raise RuntimeError("killed")


@pytest.mark.parametrize("sched", ["multistep", "onecycle"])
def test_a_resumed_run_matches_the_uninterrupted_one(data, tmp_path, sched):
    whole = classifier(sched=sched)
    rows = run(whole, data, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(classifier(Killed, sched=sched), data, tmp_path / "halves")
    resumed = classifier(sched=sched)
    torch.nn.init.zeros_(resumed.model.stem_router.w1)  # the initial weights must not matter
    resumed_rows = run(resumed, data, tmp_path / "halves", resume=tmp_path / "halves" / "last.ckpt")

    assert [row["epoch"] for row in resumed_rows] == [1, 2, 3, 4]
    for row, other in zip(rows, resumed_rows, strict=True):
        assert {
            k: v for k, v in row.items() if k not in ("seconds", "images_per_s", "data_wait")
        }.items() <= other.items()
    for (name, expected), actual in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(actual, expected), name
    whole, halves = (torch.load(tmp_path / run / "last.ckpt") for run in ("whole", "halves"))
    assert_equal(halves["optimizer_states"], whole["optimizer_states"])


def test_a_run_writes_its_summary_and_the_last_and_best_checkpoints(data, tmp_path):
    module = classifier()
    rows = run(module, data, tmp_path / "run", epochs=3)
    names = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith("events")}
    assert names == {"best.ckpt", "last.ckpt", "previous.ckpt", "summary.csv", "routers.csv", "hparams.yaml"}
    with (tmp_path / "run" / "summary.csv").open() as file:
        written = list(csv.DictReader(file))
    assert list(written[0]) == [
        "epoch",
        "train_loss",
        "train_error",
        "val_loss",
        "val_error",
        "val_error5",
        "lr",
        "images_per_s",
        "data_wait",
        "skipped",
        "seconds",
    ]
    assert [{name: float(value) for name, value in row.items()} for row in written] == rows
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.1, 0.01])

    loaded = RoutingClassifier.load_from_checkpoint(tmp_path / "run" / "last.ckpt")
    assert loaded.hparams.model == "resnet20_cc2"
    for expected, actual in zip(module.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(actual, expected)
    best = torch.load(tmp_path / "run" / "best.ckpt")
    assert best["epoch"] == min(range(3), key=lambda epoch: rows[epoch]["val_error"])


class Worsening(Killed):
    """A classifier whose error grows with each epoch."""

    def log_dict(self, metrics, **options):
        worse = {"val_error": torch.tensor(float(self.current_epoch))} if "val_error" in metrics else {}
        super().log_dict(metrics | worse, **options)

    def on_train_epoch_start(self):
        if self.trainer.ckpt_path is None:
            super().on_train_epoch_start()


def test_keeps_the_best_epoch_if_the_folder_has_moved(data, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        run(classifier(Worsening), data, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    run(classifier(Worsening), data, tmp_path / "elsewhere", resume=tmp_path / "moved" / "last.ckpt")
    run(classifier(Worsening), data, tmp_path / "moved", resume=tmp_path / "moved" / "last.ckpt")
    epochs = {name: torch.load(tmp_path / name / "best.ckpt")["epoch"] for name in ("moved", "elsewhere")}
    assert epochs == {"moved": 0, "elsewhere": 2}  # the first epoch trained there


def test_resuming_from_a_copy_leaves_the_original(data, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        run(classifier(Worsening), data, tmp_path / "run")
    original = (tmp_path / "run" / "last.ckpt").read_bytes()
    shutil.copy(tmp_path / "run" / "last.ckpt", tmp_path / "copy.ckpt")
    run(classifier(Worsening), data, tmp_path, resume=tmp_path / "copy.ckpt")
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == original


def test_val_error_is_over_exactly_the_validation_images(data, tmp_path):
    module = classifier()
    rows = run(module, data, tmp_path, epochs=1)
    module.eval()
    with torch.no_grad():
        wrong = sum((module(images).argmax(1) != labels).sum().item() for images, labels in data.val_dataloader())
    assert rows[-1]["val_error"] == pytest.approx(100 * wrong / 12, abs=1e-4)


def test_routers_are_described_each_epoch(data, tmp_path):
    module = classifier()
    run(module, data, tmp_path, epochs=2)
    with (tmp_path / "routers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (2 + 3 * 4) and [row["epoch"] for row in rows] == ["1"] * 14 + ["2"] * 14
    expected = router_statistics(module.model, data.val_dataloader())
    for row in rows[14:]:
        router, i, j = expected[row["router"]], int(row["from"]) - 1, int(row["to"]) - 1
        found = [float(row[name]) for name in ("gate", "largest", "load", "peak", "entropy")]
        matrices = (router.mean_gates, router.shares_of_maximum, router.shares_of_samples, router.peak)
        assert found == pytest.approx([m[i, j].item() for m in matrices] + [router.mean_entropy[i].item()], abs=1e-5)
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"val_error", "train_loss", "router/stack1_router/dead", "router/stem_router/gate_12"} <= tags


def test_validates_and_keeps_the_moving_average(data, tmp_path):
    module = classifier(lr=0.02)
    rows = run(module, data, tmp_path, epochs=2, model_ema_decay=0.5)
    saved = torch.load(tmp_path / "last.ckpt")
    trained, averaged = saved["current_model_state"], saved["state_dict"]
    name = "model.stem.0.0.weight"
    assert not torch.equal(trained[name], averaged[name]) and torch.equal(module.state_dict()[name], averaged[name])
    module.eval()
    with torch.no_grad():
        wrong = sum((module(images).argmax(1) != labels).sum().item() for images, labels in data.val_dataloader())
    assert rows[-1]["val_error"] == pytest.approx(100 * wrong / 12, abs=1e-4)


class Masked(torch.nn.Module):
    """A classifier with an index and a mask, as networks with windows of attention have."""

    def __init__(self):
        super().__init__()
        self.norm, self.dense = torch.nn.BatchNorm1d(192), torch.nn.Linear(192, 3)
        self.register_buffer("index", torch.arange(3000))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.phase = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))

    def forward(self, images):
        return self.dense(self.norm(images.flatten(1))) * self.phase.abs()


def test_the_moving_average_keeps_integers_and_infinities(data, tmp_path):
    decay = 0.9999  # by which 11 becomes less than 11
    network = Masked()
    run(RoutingClassifier(network, 3), data, tmp_path, epochs=2, model_ema_decay=decay)
    saved = torch.load(tmp_path / "last.ckpt")
    trained, averaged = saved["current_model_state"], saved["state_dict"]
    assert torch.equal(averaged["model.index"], torch.arange(3000))
    assert averaged["model.mask"].tolist() == [0, float("-inf")]
    assert torch.equal(averaged["model.norm.num_batches_tracked"], trained["model.norm.num_batches_tracked"])
    for name in ("norm.running_mean", "dense.weight", "phase"):
        assert not torch.equal(averaged[f"model.{name}"], trained[f"model.{name}"]), name


def test_a_moving_average_is_kept_on_the_run_s_device():
    average, module = MovingAverage(0.9), classifier()  # which Lightning moves to the device later
    average.setup(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta"))), module, "fit")
    assert {p.device.type for p in average._average_model.parameters()} == {"meta"}
    assert average._average_model.n_averaged.device.type == "meta"


def test_accumulated_batches_are_one_step_of_the_mean_gradient(image_folder, tmp_path):
    def trained(batch_size, **options):
        data = ImageDataModule("imagefolder", image_folder, batch_size, 8, seed=1)
        pl.seed_everything(0, verbose=False)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
        run(RoutingClassifier(network, 3, decay_milestones=(9,)), data, tmp_path, epochs=1, **options)
        return network[1].weight

    torch.testing.assert_close(trained(4, grad_accum_steps=3), trained(12))
    assert not torch.allclose(trained(4), trained(12))
    assert not torch.allclose(trained(12, clip_grad=0.01), trained(12))


def test_the_last_accumulated_batches_of_an_epoch_are_averaged_too(loader, tmp_path):
    class Gradients(pl.Callback):
        found = ()

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.found += (next(pl_module.model.parameters()).grad.clone(),)

    image = loader.dataset[0]
    same = torch.utils.data.DataLoader([image] * 5, batch_size=1)
    seen = Gradients()
    options = {"callbacks": [seen], "logger": "csv", "log_interval": 1, "grad_accum_steps": 4}
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(image[0].numel(), 10))
    run(RoutingClassifier(network, 10, lr=1e-9), same, tmp_path, epochs=1, **options)
    assert len(seen.found) == 2 and seen.found[0].abs().max() > 0
    torch.testing.assert_close(*seen.found)
    with (tmp_path / "metrics.csv").open() as file:
        losses = [float(row["step/loss"]) for row in csv.DictReader(file) if row["step/loss"]]
    expected = torch.nn.functional.cross_entropy(network(image[0][None]), torch.tensor([image[1]])).item()
    assert losses == pytest.approx([expected] * 5, rel=1e-4)


def test_prints_progress_on_the_console(data, tmp_path):
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    run(classifier(), data, tmp_path, epochs=2, log_interval=2, console=console)
    lines = console.file.getvalue().splitlines()
    step = r"epoch 1/2  2/3  loss \d\.\d+  lr 0\.1  [\d,]+ images/s  data wait \d+\.\d %  eta \d:\d\d:\d\d"
    assert re.fullmatch(step, lines[1]) and len(lines) == 5
    assert re.fullmatch(step.replace("2/3", "1/3"), lines[0])  # from the first step on
    epoch = r"epoch 2/2  train loss .* error .* %  val loss .* error .* %  lr .* images/s  data wait .* %  [\d.]+ s"
    assert re.fullmatch(epoch, lines[4])


@pytest.fixture
def loader():
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(20, 3, 8, 8), torch.arange(20) % 3), 10)


def test_data_loaders_callbacks_and_a_csv_logger(loader, tmp_path):
    class Seen(pl.Callback):
        steps = 0

        def on_train_batch_end(self, *_):
            self.steps += 1

    seen = Seen()
    options = {"callbacks": [seen], "logger": "csv", "log_interval": 1}
    rows = run(classifier(), loader, tmp_path, epochs=1, **options)
    assert seen.steps == 2 and "val_error" not in rows[0] and (tmp_path / "best.ckpt").is_file()
    hparams = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert (hparams["lr"], hparams["epochs"], hparams["precision"]) == (0.1, 1, "32-true")

    rows = run(classifier(), loader, tmp_path, 2, val_data=loader, resume=tmp_path / "last.ckpt", **options)
    assert "val_error" not in rows[0] and "val_error" in rows[1]
    with (tmp_path / "metrics.csv").open() as file:
        steps = [row for row in csv.DictReader(file) if row["step/loss"]]
    assert [row["step"] for row in steps] == ["1", "2", "3", "4"]
    assert all(float(row["step/lr"]) == 0.1 and float(row["step/images_per_s"]) > 0 for row in steps)
    with pytest.raises(ValueError, match="val_data is given, and data is a ImageDataModule"):
        run(classifier(), ImageDataModule("digits"), tmp_path, val_data=loader)


def test_a_plain_trainer_and_a_fast_dev_run(loader, tmp_path):
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    pl.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, **quiet).fit(classifier(), loader)
    module = classifier(sched="onecycle", warmup_epochs=5)
    pl.Trainer(fast_dev_run=True, **quiet).fit(module, loader, loader)
    console = Console(file=io.StringIO(), width=200)
    assert run(module, loader, tmp_path / "run", 9, val_data=loader, fast_dev_run=True, console=console) == []
    assert "val_error" in console.file.getvalue() and not (tmp_path / "run").exists()


def test_patience_stops_and_checkpoint_history_keeps_the_best(tmp_path):
    summary, trainer = SimpleNamespace(rows=[]), SimpleNamespace(should_stop=False, is_global_zero=True)
    console = Console(file=io.StringIO(), width=200)
    patience = Patience(summary, "val_error", 2, console)
    last = tmp_path / "last.ckpt"
    history = CheckpointHistory(last, lambda: summary.rows, "val_error", 2)
    (tmp_path / "epoch7.ckpt").write_text("of another run")
    (tmp_path / "epoch=4-step=9.ckpt").write_text("of another callback")
    history.on_train_start(trainer, None)
    assert (tmp_path / "epoch7.ckpt").exists()  # until a batch has succeeded
    history.on_train_batch_end(trainer, None, None, None, 0)
    assert [path.name for path in tmp_path.glob("epoch*")] == ["epoch=4-step=9.ckpt"]
    (tmp_path / "epoch=4-step=9.ckpt").unlink()
    for epoch, error in enumerate((5.0, 3.0, 4.0, 3.0), start=1):
        assert not trainer.should_stop
        summary.rows.append({"epoch": epoch, "val_error": error})
        last.unlink(missing_ok=True)  # a new file of the same name, as a checkpoint is
        last.write_text(str(epoch))
        patience.on_train_epoch_end(trainer, None)
        history.on_train_epoch_end(trainer, None)
    assert (
        trainer.should_stop
        and "in 2 epochs, val_error has not been lower than in epoch 2, 3" in console.file.getvalue()
    )
    assert {p.name: p.read_text() for p in tmp_path.glob("epoch*")} == {"epoch2.ckpt": "2", "epoch4.ckpt": "4"}


def test_rows_of_nan_are_the_worst():
    rows = [{"epoch": i, "val_loss": loss} for i, loss in enumerate((math.nan, 2.0, math.nan, 1.0, 1.0, 3.0), 1)]
    assert [row["epoch"] for row in best_first([{"epoch": 0}, *rows], "val_loss")] == [4, 5, 2, 6, 1, 3]
    assert out_of_patience(rows, "val_loss", 3) is None and out_of_patience(rows, "val_loss", 2) is rows[3]
    assert out_of_patience(rows[:1], "val_loss", 1) is None and out_of_patience([], "val_loss", 1) is None


def test_a_run_stops_early_and_keeps_its_best_epochs(loader, tmp_path):
    rows = run(classifier(lr=1e-9), loader, tmp_path, 9, val_data=loader, patience=1, checkpoint_hist=1, logger=None)
    assert len(rows) < 9 and torch.load(tmp_path / "last.ckpt")["stopped_early"]
    assert len(list(tmp_path.glob("epoch*.ckpt"))) == 1
    with pytest.raises(FileExistsError, match=f"it has a finished run of {len(rows)} epoch"):
        check_unused(tmp_path, "--overwrite")


@pytest.mark.parametrize("keep", [1, 3])
def test_an_epoch_is_kept_though_the_run_was_killed_before(loader, tmp_path, keep):
    options = {"val_data": loader, "checkpoint_hist": keep, "logger": None}
    run(classifier(lr=1e-9), loader, tmp_path, 3, **options)
    kept = sorted(tmp_path.glob("epoch*.ckpt"))
    (tmp_path / "epoch3.ckpt").unlink(missing_ok=True)  # as if killed before it was written

    class Seen(pl.Callback):
        def on_train_batch_start(self, *_):
            raise KeyError(*sorted(tmp_path.glob("epoch*.ckpt")))

    with pytest.raises(KeyError) as caught:
        run(classifier(lr=1e-9), loader, tmp_path, 4, resume=tmp_path / "last.ckpt", callbacks=Seen(), **options)
    assert list(caught.value.args) == kept


def test_skipped_images_are_counted(image_folder, tmp_path):
    (image_folder / "train" / "bee" / "3.png").write_bytes(b"")
    options = {"in_memory": False, "on_bad_image": "skip", "num_workers": 1}
    data = ImageDataModule("imagefolder", image_folder, 10, 8, **options)
    with pytest.warns(UserWarning, match="it is skipped"):
        rows = run(classifier(), data, tmp_path, epochs=2)
    assert [row["skipped"] for row in rows] == [1, 2]


def test_bfloat16_in_channels_last_trains(data, tmp_path):
    rows = run(classifier(channels_last=True), data, tmp_path, epochs=1, amp_dtype="bfloat16")
    assert 0 < rows[0]["train_loss"] < 5


def test_warns_of_emulated_mixed_precision(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"})
    with pytest.warns(UserWarning, match="no bfloat16 instructions"):
        run(classifier(), data, tmp_path, epochs=1, amp_dtype="bfloat16")


def test_prints_no_warnings_of_lightning(data, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", message="fastroute computes")
        run(classifier(), data, tmp_path, epochs=1)
        run(classifier(), data, tmp_path, epochs=2, resume=tmp_path / "last.ckpt")
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_wrong_arguments(data, tmp_path):
    for options, message in (
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"epochs": -3}, "epochs is -3"),
        ({"amp_dtype": "float16"}, "amp_dtype is 'float16'; on a CPU it must be 'bfloat16'"),
        ({"amp_dtype": "bfloat16", "precision": "bf16-true"}, "precision is 'bf16-true', and amp_dtype is 'bfloat16'"),
        ({"devices": 2}, "devices is 2; a process uses one"),
        ({"eval_metric": "f1"}, "eval_metric is 'f1'; it must be one of 'top1'"),
        ({"patience": 0}, "patience is 0; it must be at least 1"),
        ({"logger": "csv,board"}, "log is 'board'; expected names out of csv"),
        ({"log_interval": 0}, "log_interval is 0; it must be at least 1"),
        ({"grad_accum_steps": 0}, "grad_accum_steps is 0; it must be at least 1"),
        ({"recovery_interval": 0}, "recovery_interval is 0; it must be at least 1"),
        ({"clip_grad": 0}, "clip_grad is 0; it must be above 0"),
        ({"model_ema_decay": 1.0}, r"model_ema_decay is 1\.0; it must be at least 0 and below 1"),
        ({"dist_bn": "mean"}, "dist_bn is 'mean'; it must be one of 'reduce', 'broadcast', ''"),
        ({"sync_bn": True}, "sync_bn is True; PyTorch's synchronised batch norm needs GPUs"),
        *(
            []
            if torch.cuda.is_available()
            else [({"accelerator": "gpu"}, "accelerator is 'gpu'; PyTorch finds no GPU")]
        ),
        ({"amp_dtype": "int8"}, "amp_dtype is 'int8'; it must be 'bfloat16', 'float16' or None"),
    ):
        with pytest.raises(ValueError, match=message):
            run(classifier(), data, tmp_path / "run", **options)
    normalised = RoutingClassifier(create_model("resnet20_cc2", gate_norm="center"), num_classes=10)
    with pytest.raises(
        ValueError, match="batch_size is 1; routers that normalise gates over the batch need at least 2"
    ):
        run(normalised, ImageDataModule("digits", batch_size=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_says_how_to_install_the_package_of_a_logger(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        with pytest.raises(ModuleNotFoundError, match=f"log is '{name}'; .*: pip install {name}"):
            make_loggers(f"csv, {name}", tmp_path)
    assert make_loggers(None, tmp_path) == make_loggers("", tmp_path) == []


def test_other_default_types_and_devices(data, tmp_path):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        rows = run(classifier(), data, tmp_path / "float64", epochs=1, logger=None)
    finally:
        torch.set_default_dtype(before)
    assert rows[0]["val_error"] <= 100
    module = classifier()
    try:
        torch.set_default_device("meta")
        rows = run(module, data, tmp_path / "meta", epochs=1, logger=None)
    finally:
        torch.set_default_device(None)
    assert rows[0]["val_error"] <= 100


class Cooled(RoutingClassifier):
    def on_train_epoch_start(self):
        self.model.stem_router.temperature = 3.0


def test_the_moving_average_is_saved_with_the_last_temperature(data, tmp_path):
    run(classifier(Cooled, lr=0.02), data, tmp_path, epochs=1, model_ema_decay=0.5)
    saved = torch.load(tmp_path / "last.ckpt")
    for weights in (saved["state_dict"], saved["current_model_state"]):
        assert [v for name, v in weights.items() if "temperature" in name and "stem_router" in name] == [3.0]


def test_other_modules_and_data_without_a_loader_are_refused(tmp_path):
    network, dataset = create_model("resnet20", 3), TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4).long())
    with pytest.raises(TypeError, match="module is a Network; it must be a RoutingClassifier"):
        fit(network, dataset, output=tmp_path)
    with pytest.raises(TypeError, match=r"data is a TensorDataset; it must have batches: give DataLoader"):
        fit(RoutingClassifier(network, 3), dataset, output=tmp_path)


def test_each_step_of_each_process_draws_numbers_of_its_own():
    drawn = set()
    for rank, epoch, batch in itertools.product(range(2), repeat=3):
        trainer = SimpleNamespace(global_rank=rank, current_epoch=epoch)
        StepSeed(0).on_train_batch_start(trainer, None, None, batch)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 8


def test_datasets_of_batches_and_compiled_modules_are_taken(tmp_path):
    class Batches(TensorDataset):
        def __getitem__(self, index):
            return tuple(tensor[index : index + 2] for tensor in self.tensors)

    batches = Batches(torch.zeros(4, 3, 32, 32), torch.zeros(4).long())
    module = torch.compile(RoutingClassifier(create_model("resnet20", 3), 3), backend="eager")
    fit(module, batches, epochs=1, output=tmp_path, fast_dev_run=True)


def test_the_rate_of_a_step_is_the_one_it_was_taken_with(loader, tmp_path):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    module = RoutingClassifier(network, 3, lr=0.1, sched="cosine")
    rows = run(module, loader, tmp_path, 2, logger="csv", log_interval=1)
    with (tmp_path / "metrics.csv").open() as file:
        found = [float(row["step/lr"]) for row in csv.DictReader(file) if row["step/lr"]]
    assert found == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])
    assert [row["lr"] for row in rows] == pytest.approx(found[1::2])
