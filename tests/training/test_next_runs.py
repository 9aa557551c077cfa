"""What a run, finished or not, leaves to the next one."""

import csv
import functools
import os
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fastroute.data.loaders import PlaceMismatch
from fastroute.nn import CrossConnection, GateClusteringLoss
from fastroute.training import ImageDataModule, RoutingClassifier, fit
from fastroute.training.checkpoints import check_unused, latest_checkpoint, read_checkpoint
from fastroute.training.saving import Terminated


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
        self.router, self.head = CrossConnection(8, 1, 2), nn.Linear(8, 10)

    def forward(self, x, return_routing=False):
        (left, right), routing = self.router([self.stem(x)], return_routing=True)
        logits = self.head((left.relu() + right.tanh()).mean((2, 3)))
        return (logits, {"router": routing}) if return_routing else logits


def digits(batch_size=512):
    return ImageDataModule("digits", batch_size=batch_size, num_workers=1)


def classifier(**options):
    pl.seed_everything(0, verbose=False)
    return RoutingClassifier(Net(), 10, 1, 8, **{"lr": 0.1, "sched": "step"} | options)


def run(module, data, output, epochs=1, **options):
    options = {"accelerator": "cpu", "console": Console(quiet=True), "logger": None} | options
    return fit(module, data, epochs=epochs, output=output, **options)


class At(pl.Callback):
    """Run an action before the batch of a number, counted over all epochs."""

    def __init__(self, batch, action):
        self.left, self.action = batch, action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.left == 0:
            self.action(pl_module)
        self.left -= 1


def stop(_):
    raise RuntimeError("stopped")


def weights(module):
    return {name: value.clone() for name, value in module.model.state_dict().items()}


def test_loaded_modules_train_with_other_batches(tmp_path):
    run(classifier(), digits(), tmp_path / "first")
    module = RoutingClassifier.load_from_checkpoint(tmp_path / "first" / "last.ckpt", model=Net())
    assert len(run(module, digits(256), tmp_path / "second")) == 1
    with pytest.raises(PlaceMismatch, match="the run took 3 steps in an epoch, but now an epoch has 6"):
        run(classifier(), digits(256), tmp_path / "third", 2, resume=tmp_path / "first" / "last.ckpt")


def test_metrics_of_an_interrupted_run_do_not_reach_the_next_one(tmp_path):
    module = classifier()
    with pytest.raises(RuntimeError, match="stopped"):
        run(module, digits(), tmp_path / "stopped", callbacks=At(2, stop))
    start = weights(module)
    (row,) = run(module, digits(), tmp_path / "next")
    fresh = classifier()
    fresh.model.load_state_dict(start)
    (expected,) = run(fresh, digits(), tmp_path / "fresh")
    assert row["train_loss"] == expected["train_loss"] and row["train_error"] == expected["train_error"]


def test_a_run_with_an_average_goes_on_without_it_from_the_trained_weights(tmp_path):
    run(classifier(), digits(), tmp_path / "first", model_ema_decay=0.9)
    saved, found = torch.load(tmp_path / "first" / "last.ckpt"), []
    look = At(0, lambda module: found.append(weights(module)))
    run(classifier(), digits(), tmp_path / "second", 2, resume=tmp_path / "first" / "last.ckpt", callbacks=[look])
    for name, value in found[0].items():
        assert torch.equal(value, saved["current_model_state"][f"model.{name}"]), name
    assert not torch.equal(saved["state_dict"]["model.head.weight"], saved["current_model_state"]["model.head.weight"])
    averaged = RoutingClassifier.load_from_checkpoint(tmp_path / "first" / "last.ckpt", model=Net())
    assert torch.equal(averaged.model.head.weight, saved["state_dict"]["model.head.weight"])


@pytest.mark.parametrize("before", [True, False])
def test_the_gates_loss_comes_and_goes_at_a_resume_with_an_average(tmp_path, before):
    def module(clusters):
        return classifier(aux_loss=GateClusteringLoss() if clusters else None, aux_weight=0.01)

    run(module(before), digits(), tmp_path / "first", model_ema_decay=0.9)
    last = tmp_path / "first" / "last.ckpt"
    rows = run(module(not before), digits(), tmp_path / "second", 2, model_ema_decay=0.9, resume=last)
    assert ("train_aux" in rows[-1]) == (not before)


@pytest.mark.parametrize("rank", [0, 1])
def test_buffers_of_a_loss_that_is_left_out_are_left_out_in_every_process(rank):
    module = classifier()
    module._trainer = SimpleNamespace(world_size=2, global_rank=rank, state=SimpleNamespace(fn=None))
    weights = module.state_dict()
    name = next(name for name in weights if name.endswith("running_mean"))
    other = {name: weights[name] + 1, "aux_loss.mean": torch.ones(1)}
    ranks = [{"train_totals": {}, "state_dict": own} for own in ({}, other)]
    checkpoint = {"state_dict": weights | {"aux_loss.mean": torch.zeros(1)}, "ranks": ranks}
    module.on_load_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == weights.keys()
    assert torch.equal(checkpoint["state_dict"][name], weights[name] + rank)


def test_networks_in_evaluation_mode_are_trained_in_training_mode(tmp_path):
    module = classifier()
    module.model.eval()
    run(module, digits(), tmp_path / "whole")
    assert module.model.stem[1].num_batches_tracked == 3
    module = classifier()
    module.model.stem.eval()  # frozen, in a network in training mode
    run(module, digits(), tmp_path / "part")
    assert module.model.stem[1].num_batches_tracked == 0 and module.model.training


def test_averages_weights_in_bfloat16(tmp_path):
    pl.seed_everything(0, verbose=False)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    module = RoutingClassifier(network, 10, 1, 8, lr=0.1, sched="step")
    run(module, digits(), tmp_path, precision="bf16-true", model_ema_decay=0.5)
    saved = torch.load(tmp_path / "last.ckpt")
    average, trained = saved["state_dict"], saved["current_model_state"]
    distance = (average["model.1.weight"].float() - trained["model.1.weight"].float()).abs().max()
    assert 0 < distance < 0.5
    # Validation computes with the average in bfloat16, and does not round what is kept of it.
    assert not torch.equal(average["model.1.weight"], average["model.1.weight"].bfloat16().float())


def test_a_refused_resume_leaves_no_place_in_the_data(tmp_path):
    with pytest.raises(RuntimeError, match="stopped"):
        run(classifier(), digits(), tmp_path / "first", 2, recovery_interval=1, callbacks=[At(2, stop)])
    data = digits(256)
    with pytest.raises(PlaceMismatch):
        run(classifier(), data, tmp_path / "second", 2, resume=tmp_path / "first" / "last.ckpt")
    rows = run(classifier(), data, tmp_path / "second", 2)
    assert [row["epoch"] for row in rows] == [1, 2]


class Stream(IterableDataset):
    def __iter__(self):
        for label in range(64):
            yield torch.randn(1, 8, 8), label % 10


@pytest.mark.parametrize("options", [{"max_epochs": 2}, {"max_steps": 5}])
def test_data_without_a_length_are_refused(options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    for sched in ("step", "cosine", "onecycle"):
        with pytest.raises(ValueError, match="the data have no length"):
            pl.Trainer(**options, **quiet, accelerator="cpu").fit(classifier(sched=sched), DataLoader(Stream(), 16))
    trainer = pl.Trainer(**options, **quiet, accelerator="cpu", limit_train_batches=3)
    trainer.fit(classifier(sched="cosine"), DataLoader(Stream(), 16))
    assert trainer.global_step == min(6, options.get("max_steps", 6))


def test_fit_refuses_data_without_a_length(tmp_path):
    with pytest.raises(ValueError, match="the data have no length"):
        run(classifier(), DataLoader(Stream(), 16), tmp_path)


@pytest.mark.parametrize("callbacks", [None, (), At(9, stop), [At(9, stop)]])
def test_batches_in_a_list(tmp_path, callbacks):
    images, labels = torch.randn(48, 1, 8, 8), torch.arange(48) % 10
    batches = list(zip(images.split(16), labels.split(16), strict=True))
    (row,) = run(classifier(), batches, tmp_path / "list", val_data=batches[:1], callbacks=callbacks)
    loader = DataLoader(TensorDataset(images, labels), 16)
    validation = DataLoader(TensorDataset(images[:16], labels[:16]), 16)
    (expected,) = run(classifier(), loader, tmp_path / "loader", val_data=validation)
    for name in ("train_loss", "val_loss", "val_error"):
        assert row[name] == expected[name]


@pytest.mark.parametrize("name", ["data", "val_data"])
def test_lists_of_no_batches_are_refused(tmp_path, name):
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    for given, message in (
        ([], f"{name} is empty; it must have at least one batch"),
        ((images, labels), f"{name} is a tuple of tensors; it must have batches of images and labels: give DataLoader"),
    ):
        data = {"data": [(images, labels)], name: given}
        with pytest.raises(ValueError, match=message):
            run(classifier(), data["data"], tmp_path, val_data=data.get("val_data"))


def test_an_interrupted_validation_does_not_reach_the_next_one(tmp_path):
    class Stop(pl.Callback):
        def on_validation_batch_end(self, *_):
            raise RuntimeError("stopped")

    module = classifier()
    with pytest.raises(RuntimeError, match="stopped"):
        run(module, digits(128), tmp_path, callbacks=Stop())
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (found,), (again,) = (trainer.validate(module, digits(128), verbose=False) for _ in range(2))
    assert found == again


def test_a_validated_checkpoint_leaves_no_place_in_the_data(tmp_path):
    with pytest.raises(RuntimeError, match="stopped"):
        run(classifier(), digits(), tmp_path / "first", 2, recovery_interval=1, callbacks=At(2, stop))
    data, trainer = digits(), pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.validate(classifier(), data, ckpt_path=tmp_path / "first" / "last.ckpt", verbose=False, weights_only=False)
    module = classifier()
    run(module, data, tmp_path / "second")
    assert module.trainer.global_step == 3


def test_modules_in_evaluation_mode_learn_priors(tmp_path):
    module = classifier(aux_loss=GateClusteringLoss(), aux_weight=0.01)
    module.eval()
    run(module, digits(), tmp_path)
    assert "router" in module.aux_loss.priors


@pytest.mark.parametrize("options", [{"max_epochs": -1}, {"max_time": "00:00:01:00"}])
def test_runs_without_an_end_are_refused(options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with pytest.raises(ValueError, match=r"the run has no end, .*: give max_epochs or max_steps"):
        pl.Trainer(**options, **quiet, accelerator="cpu").fit(classifier(), digits())


def test_too_few_images_for_a_batch_are_refused_with_max_steps():
    loader = DataLoader(TensorDataset(torch.randn(48, 1, 8, 8), torch.arange(48) % 10), 64, drop_last=True)
    trainer = pl.Trainer(max_steps=5, logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(ValueError, match="the data have no batch to train on"):
        trainer.fit(classifier(), loader)


QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


def batches(count=4):
    labels = torch.arange(16 * count) % 10
    images = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(0)) + labels.view(-1, 1, 1, 1)
    return list(zip(images.split(16), labels.split(16), strict=True))


def test_the_checkpoint_of_a_run_that_max_steps_ends_can_be_read(tmp_path):
    trainer = pl.Trainer(max_steps=3, **QUIET)
    trainer.fit(classifier(sched="cosine"), DataLoader(batches(), batch_size=None))
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    assert torch.load(path)["epochs"] is None and read_checkpoint(path)["epochs"] is None
    torch.save(torch.load(path) | {"epochs": -1}, path)  # as earlier versions wrote it
    assert read_checkpoint(path)["epochs"] is None
    with pytest.raises(FileExistsError, match="it has an unfinished run, 1 epoch done"):
        check_unused(tmp_path, "--overwrite")
    with pytest.raises(ValueError, match="its schedule is of no number of epochs, but this run has epochs=2"):
        run(classifier(sched="cosine"), batches(), tmp_path, 2, resume=path)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_new_run_leaves_nothing_of_an_overwritten_one_that_it_could_be_taken_for(tmp_path, elsewhere):
    folder, options = tmp_path / "run", {"val_data": batches(1)}
    run(classifier(), batches(), folder, 2, **options)
    if elsewhere:  # resumed from another run's checkpoint
        run(classifier(), batches(), tmp_path / "other", **options)
        options["resume"] = tmp_path / "other" / "last.ckpt"
    (folder / "assignments.csv").touch()
    with pytest.raises(RuntimeError, match="stopped"):
        run(classifier(), batches(), folder, 2, callbacks=At(1, stop), **options)
    assert not folder.exists()  # as it is empty


@pytest.mark.parametrize("images, label", [(torch.nan, 0), (1.0, 11)])
def test_a_run_that_fails_in_its_first_step_leaves_the_earlier_one(tmp_path, images, label):
    options = {"logger": "csv", "log_interval": 1, "checkpoint_hist": 2}
    run(classifier(), batches(), tmp_path, 1, **options)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "hparams.yaml"}
    assert {"epoch1.ckpt", "metrics.csv", "last.ckpt", "best.ckpt", "summary.csv"} <= before.keys()
    wrong = [(torch.full((4, 1, 8, 8), images), torch.full((4,), label))]
    with pytest.raises((FloatingPointError, ValueError)):
        run(classifier(), wrong, tmp_path, **options)
    (tmp_path / "hparams.yaml").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_path_that_is_not_utf_8_needs_no_logger(tmp_path):
    assert len(run(classifier(), batches(), tmp_path / "x\udcff")) == 1
    with pytest.raises(ValueError, match="TensorBoard needs a path in UTF-8"):
        run(classifier(), batches(), tmp_path / "x\udcff", logger="csv")


def test_a_run_goes_on_from_a_checkpoint_in_a_folder_of_its_own(tmp_path):
    steps = pl.callbacks.ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"logger": "csv", "log_interval": 1}
    run(classifier(), batches(), tmp_path, 2, callbacks=steps, **options)
    with (tmp_path / "metrics.csv").open() as file:
        expected = [row["step"] for row in csv.DictReader(file)]
    count = len(batches())
    run(classifier(), batches(), tmp_path, 2, resume=tmp_path / "steps" / f"step={count}.ckpt", **options)
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == expected


def test_a_table_of_steps_is_of_one_run(tmp_path):
    run(classifier(), batches(), tmp_path / "a", 2, logger="csv", log_interval=1)
    run(classifier(), batches(), tmp_path / "b", 1, logger="csv", log_interval=1)
    run(classifier(), batches(), tmp_path / "a", 2, logger="csv", log_interval=1, resume=tmp_path / "b" / "last.ckpt")
    with (tmp_path / "a" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    count = len(batches())
    assert min(steps) >= count, steps


class AtEpoch(pl.Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == self.epoch


def test_a_stop_as_an_epoch_starts_is_told(tmp_path):
    with pytest.raises(Terminated, match=r"stopped by trainer.should_stop after epoch 1; .* is complete") as stopped:
        run(classifier(), batches(), tmp_path, 3, callbacks=AtEpoch(1))
    rows = run(classifier(), batches(), tmp_path, 3, resume=stopped.value.path)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    with pytest.raises(Terminated, match=r"before the first step"):
        run(classifier(), batches(), tmp_path / "none", 3, callbacks=AtEpoch(0))
    timer = pl.callbacks.Timer(duration={"seconds": 0})
    with pytest.raises(Terminated, match=r"before the first step"):
        run(classifier(), batches(), tmp_path / "none", 3, callbacks=timer)


def test_a_module_that_skips_an_epoch_is_refused(tmp_path):
    class Skips(RoutingClassifier):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            return -1 if batch_idx == 1 else None

    with pytest.raises(RuntimeError, match=r"on_train_batch_start has returned -1"):
        run(Skips(Net(), 10, 1, 8, sched="step"), batches(), tmp_path)


def test_a_resumed_run_keeps_the_checkpoints_of_its_folder(tmp_path):
    run(classifier(), batches(), tmp_path / "run", 2)
    (tmp_path / "link").symlink_to(tmp_path / "run" / "last.ckpt")
    for resume in (tmp_path / "run" / "last.ckpt", tmp_path / "link"):
        before = sorted(os.listdir(tmp_path / "run"))
        with pytest.raises(RuntimeError, match="stopped"):
            run(classifier(), batches(), tmp_path / "run", 3, resume=resume, callbacks=At(1, stop))
        assert sorted(os.listdir(tmp_path / "run")) == before


class Shifted(pl.Callback):
    """Make validation worse from an epoch on."""

    def __init__(self, first):
        self.first = first

    def on_validation_start(self, trainer, pl_module):
        if trainer.current_epoch >= self.first:
            with torch.no_grad():
                pl_module.model.head.bias[0] += 100


@pytest.mark.parametrize("change", ["metric", "older file"])
def test_another_metric_keeps_a_better_epoch(tmp_path, change):
    data = {"data": batches(), "val_data": batches(1)}
    run(classifier(), output=tmp_path, epochs=2, **data)
    best = torch.load(tmp_path / "best.ckpt")
    assert best["callbacks"]["EpochSummary"]["rows"]
    metric = "loss" if change == "metric" else "top1"
    run(
        classifier(),
        output=tmp_path,
        epochs=3,
        resume=tmp_path / "last.ckpt",
        eval_metric=metric,
        callbacks=Shifted(2),
        **data,
    )
    assert torch.load(tmp_path / "best.ckpt")["epoch"] == best["epoch"]
    (tmp_path / "best.ckpt").write_bytes(b"PK\x03\x04")  # a damaged one is the best of none
    run(classifier(), output=tmp_path, epochs=4, resume=tmp_path / "last.ckpt", eval_metric="top5", **data)
    assert torch.load(tmp_path / "best.ckpt")["epoch"] == 3


@pytest.mark.parametrize("name", ["http_runs", "s3:", "file:"])
def test_a_folder_like_a_url_is_one_of_this_machine(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    run(classifier(), batches(), name)
    assert latest_checkpoint(name).name == "last.ckpt"
    run(classifier(), batches(), name, 2, resume=f"{name}/last.ckpt")


def test_a_folder_that_lightning_takes_for_a_url_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"output is .*a::b; a path that contains '::' is taken for a URL"):
        run(classifier(), batches(), tmp_path / "a::b")
    assert not os.listdir(tmp_path)


def test_a_run_that_any_callback_ends_after_an_epoch_is_finished(tmp_path):
    stopping = pl.callbacks.EarlyStopping("val_loss", patience=1, min_delta=100.0)
    rows = run(classifier(), batches(), tmp_path, 5, val_data=batches(1), callbacks=stopping)
    assert len(rows) == 2
    with pytest.raises(FileExistsError, match="it has a finished run of 2 epochs"):
        check_unused(tmp_path, "--overwrite")


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_a_moving_average_begins_after_the_first_step_and_counts_each_step_once(tmp_path, grad_accum_steps):
    class Steps(pl.Callback):
        def __init__(self):
            self.weights = {}

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.weights[trainer.global_step] = pl_module.model.head.weight.detach().clone()

    seen, options = Steps(), {"model_ema_decay": 0.75, "grad_accum_steps": grad_accum_steps}
    run(classifier(), batches(), tmp_path, callbacks=seen, **options)
    found = [seen.weights[step] for step in range(1, 1 + 4 // grad_accum_steps)]
    expected = functools.reduce(lambda average, weight: 0.75 * average + 0.25 * weight, found)
    torch.testing.assert_close(torch.load(tmp_path / "last.ckpt")["state_dict"]["model.head.weight"], expected)


@pytest.mark.parametrize("batch", [3, 4])
def test_the_auxiliary_loss_of_an_epoch_is_that_of_its_own_batches_in_a_resumed_run(tmp_path, batch):
    def module():
        return classifier(aux_loss=lambda routing: routing["router"].gates.square().mean())

    rows = run(module(), digits(), tmp_path / "whole", 2)
    with pytest.raises(RuntimeError, match="stopped"):
        run(module(), digits(), tmp_path / "halves", 2, recovery_interval=1, callbacks=At(batch, stop))
    again = run(module(), digits(), tmp_path / "halves", 2, resume=tmp_path / "halves" / "last.ckpt")
    assert [row["train_aux"] for row in again] == [row["train_aux"] for row in rows]


def test_a_run_that_goes_on_in_the_folder_of_another_has_no_best_epoch_of_it(tmp_path):
    data = {"data": batches(), "val_data": batches(1)}
    for name in ("other", "run"):
        run(classifier(), output=tmp_path / name, **data)
    options = {"epochs": 2, "resume": tmp_path / "run" / "last.ckpt", "callbacks": Shifted(1)}
    run(classifier(), output=tmp_path / "other", **options, **data)
    assert torch.load(tmp_path / "other" / "best.ckpt")["epoch"] == 1


def test_losses_are_those_of_each_epoch_and_smoothed_in_training_alone(tmp_path):
    class Losses(pl.Callback):
        found = ()

        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            self.found += (outputs["loss"].item(),)

    data, seen, module = batches(), Losses(), classifier(smoothing=0.5)
    rows = run(module, data, tmp_path, 2, val_data=data[:1], callbacks=seen)
    expected = [sum(seen.found[:4]) / 4, sum(seen.found[4:]) / 4]
    assert [row["train_loss"] for row in rows] == pytest.approx(expected, rel=1e-5)
    (images, labels), *_ = data
    with torch.no_grad():
        logits = module.eval()(images)
    assert rows[-1]["val_loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.5)
    torch.testing.assert_close(module.training_step(data[0], 0), expected)


def test_what_a_loss_has_learned_is_restored():
    before, after = (classifier(aux_loss=GateClusteringLoss()) for _ in range(2))
    before.aux_loss.priors["router"] = torch.tensor([[0.25, 0.75]])
    checkpoint = {"state_dict": before.state_dict()}
    after.on_load_checkpoint(checkpoint)
    after.load_state_dict(checkpoint["state_dict"])
    assert after.aux_loss.priors["router"].tolist() == [[0.25, 0.75]]
