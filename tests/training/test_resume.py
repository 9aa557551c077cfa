"""Runs that are stopped anywhere and resumed end as uninterrupted ones."""

import csv
import os
import resource
import signal
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import nn

from fastroute.data.loaders import EpochLoader, PlaceMismatch
from fastroute.training import ImageDataModule, RoutingClassifier, Terminated, fit
from fastroute.training.loggers import StepTable
from fastroute.training.saving import RecoveryCheckpoint
from tests.training.networks import Noisy


class StopAt(pl.Callback):
    """Run an action before a batch of an epoch."""

    def __init__(self, epoch, batch, action):
        self.place, self.action = (epoch, batch), action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.place:
            self.action()


def kill():
    raise RuntimeError("killed")


def classifier(callback=None, **options):
    class Classifier(RoutingClassifier):
        def configure_callbacks(self):
            return [callback] if callback else []

    pl.seed_everything(0, verbose=False)
    return Classifier(Noisy(), num_classes=3, **{"sched": "cosine", "smoothing": 0.1} | options)


def run(module, folder, output, epochs=3, data_options=None, **options):
    data = ImageDataModule(
        data_dir=folder, seed=3, **{"dataset": "imagefolder", "batch_size": 4} | (data_options or {})
    )
    options = {"accelerator": "cpu", "console": Console(quiet=True), "log_interval": 1} | options
    return fit(module, data, epochs=epochs, output=output, **options)


SETTINGS = {
    "plain": {},
    "everything": {
        "model_ema_decay": 0.9,
        "clip_grad": 1.0,
        "data_options": {"mixup": 0.4, "cutmix": 1.0, "reprob": 0.5, "aa": "rand-m5-n1", "img_size": 16},
    },
    "accumulated": {"grad_accum_steps": 2, "data_options": {"img_size": 16}},
    "streamed": {
        "data_options": {"in_memory": False, "img_size": 16, "num_workers": 2, "aa": "trivial"},
    },
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_resumes_within_an_epoch_bit_for_bit(large_folder, tmp_path, setting):
    options = {"recovery_interval": 1} | SETTINGS[setting]
    whole = classifier()
    rows = run(whole, large_folder, tmp_path / "whole", **options)

    with pytest.raises(RuntimeError, match="killed"):
        run(classifier(StopAt(1, 4, kill)), large_folder, tmp_path / "halves", **options)
    last = tmp_path / "halves" / "last.ckpt"
    steps = torch.load(last)["global_step"]
    assert steps == (5 if setting == "accumulated" else 10)  # of 6 batches an epoch
    resumed = classifier()
    nn.init.zeros_(resumed.model.network.stem_router.w1)  # the initial weights must not matter
    resumed_rows = run(resumed, large_folder, tmp_path / "halves", resume=last, **options)

    for expected, actual in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert expected[0] == actual[0] and torch.equal(actual[1], expected[1]), expected[0]
    clocks = {"seconds", "images_per_s", "data_wait"}
    for expected, actual in zip(rows, resumed_rows, strict=True):
        assert {k: v for k, v in expected.items() if k not in clocks} == {
            k: v for k, v in actual.items() if k not in clocks
        }
    ends = [torch.load(tmp_path / name / "last.ckpt") for name in ("whole", "halves")]
    for state in zip(*(end["optimizer_states"][0]["state"].values() for end in ends), strict=True):
        assert torch.equal(state[0]["momentum_buffer"], state[1]["momentum_buffer"])
    assert ends[0]["lr_schedulers"] == ends[1]["lr_schedulers"]
    if "model_ema_decay" in options:
        for name, value in ends[0]["current_model_state"].items():
            assert torch.equal(value, ends[1]["current_model_state"][name]), name


def test_saves_at_sigterm_and_resumes(image_folder, tmp_path):
    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    whole = classifier()
    run(whole, image_folder, tmp_path / "whole")
    with pytest.raises(Terminated, match=r"stopped by SIGTERM at epoch 2, step 4; saved to .*last\.ckpt") as caught:
        run(classifier(StopAt(1, 3, terminate)), image_folder, tmp_path / "run", callbacks=Ask())
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    resumed, seen = classifier(), Ask()
    run(resumed, image_folder, tmp_path / "run", resume=tmp_path / "run" / "last.ckpt", callbacks=seen)
    assert seen.count == 18  # its state was saved after it had seen the step
    for expected, actual in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, actual)


def test_stops_at_once_at_a_second_ctrl_c(tmp_path):
    recovery, trainer = RecoveryCheckpoint(tmp_path / "last.ckpt"), SimpleNamespace(world_size=1)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
        recovery.on_train_start(trainer, None)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Terminated, match=r"stopped by Ctrl-C before the first step$") as caught:
            recovery.on_train_epoch_start(SimpleNamespace(world_size=1, current_epoch=4, should_stop=False), None)
        assert caught.value.code == 130 and caught.value.path is None
        strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
        ended = SimpleNamespace(is_last_batch=True, should_stop=False, strategy=strategy)
        recovery.on_train_batch_end(ended, None, None, None, 0)
        with pytest.raises(Terminated, match="stopped by Ctrl-C after epoch 4") as caught:
            recovery.on_train_epoch_start(SimpleNamespace(world_size=1, current_epoch=4, should_stop=False), None)
        assert caught.value.code == 130
    finally:
        for signum, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(signum, handler)


def test_sigterm_at_the_end_of_an_epoch_waits_for_its_checkpoint(image_folder, tmp_path):
    stop = StopAt(1, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Terminated, match="stopped by SIGTERM after epoch 2"):
        run(classifier(stop), image_folder, tmp_path)
    whole, resumed = classifier(), classifier()
    run(whole, image_folder, tmp_path / "whole")
    run(resumed, image_folder, tmp_path, resume=tmp_path / "last.ckpt")
    for expected, actual in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, actual)


def test_resuming_within_an_epoch_needs_the_same_batches(image_folder, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        run(classifier(StopAt(1, 4, kill)), image_folder, tmp_path, recovery_interval=1)
    with pytest.raises(
        ValueError, match="stopped at batch 4 of 6 of an epoch, but now an epoch has 3: go on with the same"
    ):
        run(classifier(), image_folder, tmp_path, resume=tmp_path / "last.ckpt", data_options={"batch_size": 8})


class Spoil(StopAt):
    """Make a step with a finite loss end in non-finite weights."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pass

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if (trainer.current_epoch, trainer.fit_loop.batch_idx) == self.place:
            next(pl_module.parameters()).grad.view(-1)[-1] = self.action


@pytest.mark.parametrize("options, step", [({"recovery_interval": 1}, 3), ({"model_ema_decay": 0.5}, 6)])
def test_does_not_save_non_finite_weights(image_folder, tmp_path, options, step):
    callback = Spoil(1, 2 if step == 3 else 5, float("inf" if step == 3 else "nan"))
    before = "2, step 2" if step == 3 else "1, step 6"
    message = rf"weights are NaN or infinite at epoch 2, step {step}, with learning rate 0\.0\d+, and are not saved: .*"
    with pytest.raises(
        FloatingPointError, match=message + rf"previous checkpoint, .*last\.ckpt, is of epoch {before}$"
    ):
        run(classifier(callback, gate_lr_mult=100), image_folder, tmp_path, **options)
    for name in ("last.ckpt", "best.ckpt", "previous.ckpt"):
        if (tmp_path / name).exists():
            weights = torch.load(tmp_path / name)["state_dict"]
            assert all(value.isfinite().all() for value in weights.values())
    rows = run(classifier(gate_lr_mult=100), image_folder, tmp_path, resume=tmp_path / "last.ckpt", **options)
    assert len(rows) == 3


def test_stops_at_a_nan_loss_with_step_and_learning_rate(image_folder, tmp_path):
    class Broken(StopAt):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == self.place:
                batch[0].fill_(float("nan"))

    message = r"the loss is nan at epoch 2, step 3, with learning rate 0\.0\d+: lower it"
    with pytest.raises(FloatingPointError, match=message):
        run(classifier(Broken(1, 2, None)), image_folder, tmp_path, recovery_interval=1)
    weights = torch.load(tmp_path / "last.ckpt")["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())


def test_a_resumed_run_takes_as_many_steps_in_an_epoch(image_folder, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        run(classifier(StopAt(1, 0, kill)), image_folder, tmp_path)
    resumed = {"resume": tmp_path / "last.ckpt", "output": tmp_path / "resumed"}
    message = "the run took 6 steps in an epoch, but now an epoch has 3, and learning rates follow steps: go on with"
    for options in ({"data_options": {"batch_size": 8}}, {"grad_accum_steps": 2}):
        with pytest.raises(PlaceMismatch, match=message):
            run(classifier(), image_folder, **resumed, **options)
    rows = run(classifier(), image_folder, **resumed, data_options={"batch_size": 2}, grad_accum_steps=2)
    assert rows[-1]["epoch"] == 3 and rows[-1]["lr"] < 0.01


def test_the_table_of_steps_is_there_while_a_resumed_run_begins(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("loss,step\n3.0,1\n2.0,2\n1.0,3\n")
    table = StepTable(tmp_path, resumed=True)
    assert table.experiment is not None and path.read_text().splitlines() == ["loss,step", "3.0,1", "2.0,2", "1.0,3"]
    table.restore(2)
    table.log_metrics({"loss": 0.5, "error": 7.0}, step=3)
    assert [row.split(",") for row in path.read_text().splitlines()] == [
        ["error", "loss", "step"],
        ["", "3.0", "1"],
        ["", "2.0", "2"],
        ["7.0", "0.5", "3"],
    ]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def little_space():
    """Limit the size of files that this process writes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_leaves_the_steps_before_a_resumed_run(tmp_path, little_space):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"loss,step\r\n" + b"".join(b"3.0,%d\r\n" % step for step in range(1, 200)) + b"2.")
    before = rows_of(path)[:-1]
    table = StepTable(tmp_path, resumed=True)
    little_space(path.stat().st_size // 2)
    with pytest.raises(OSError, match=r"File too large: .*metrics\.csv'"):
        table.log_metrics({"loss": 0.5}, step=200)
    assert rows_of(path)[: len(before)] == before
    little_space(path.stat().st_size)
    table = StepTable(tmp_path, resumed=True)
    table.restore(198)
    with pytest.raises(OSError, match=r"File too large: .*metrics\.csv'"):
        table.log_metrics({"loss": 0.5, "error": 7.0}, step=200)
    assert rows_of(path) == before[:-1]
    assert os.listdir(tmp_path) == ["metrics.csv"]


@pytest.mark.parametrize("log", ["tensorboard", "csv"])
def test_a_full_disk_is_named_without_a_traceback(image_folder, tmp_path, little_space, capfd, log):
    little_space(1000)
    with pytest.raises(
        OSError, match=r"File too large: .*(TensorBoard's events|run/.*\.(csv|yaml|ckpt))|written"
    ) as caught:
        run(classifier(), image_folder, tmp_path / "run", logger=log)
    assert "Traceback" not in capfd.readouterr().err
    assert log == "csv" or "TensorBoard's events" in str(caught.value)


class Ask(pl.Callback):
    """Ask Lightning to stop after a step, and count steps as a callback of the user's may."""

    def __init__(self, step=None):
        self.step, self.count = step, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count += 1
        if self.count == self.step:
            trainer.should_stop = True

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


def small(cls=RoutingClassifier):
    pl.seed_everything(0, verbose=False)
    return cls(nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 10)), 10, 1, 8, lr=0.1, sched="cosine")


def train(module, output, epochs=2, **options):
    options |= {"accelerator": "cpu", "console": Console(quiet=True), "logger": None}
    return fit(module, ImageDataModule("digits", batch_size=256), epochs=epochs, output=output, **options)


@pytest.mark.parametrize(
    "step, place, options",
    [(2, "epoch 1, step 2", {}), (9, "epoch 2, step 3", {}), (7, "epoch 2, step 2", {"grad_accum_steps": 2})],
)
def test_a_stop_within_an_epoch_saves_there_and_resumes(tmp_path, step, place, options):
    whole, resumed, seen, last = small(), small(), Ask(), tmp_path / "run" / "last.ckpt"
    rows = train(whole, tmp_path / "whole", **options)
    message = rf"stopped by trainer\.should_stop at {place}; saved to .*last\.ckpt$"
    with pytest.raises(Terminated, match=message) as caught:
        train(small(), tmp_path / "run", callbacks=Ask(step), **options)
    assert caught.value.path == last and caught.value.code == str(caught.value)  # which Python prints, with status 1
    assert not torch.load(last)["stopped_early"]
    after = train(resumed, tmp_path / "run", resume=last, callbacks=seen, **options)
    assert [row["train_loss"] for row in after] == [row["train_loss"] for row in rows]
    for expected, actual in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, actual)
    assert seen.count == 12


def test_a_stop_at_the_last_step_of_an_epoch_ends_the_run_there(tmp_path):
    (row,) = train(small(), tmp_path, callbacks=Ask(6))
    saved = torch.load(tmp_path / "last.ckpt")
    assert row["epoch"] == 1 and saved["stopped_early"] and saved["global_step"] == 6


def test_a_module_that_ends_an_epoch_early_leaves_no_false_row(tmp_path):
    class Ending(RoutingClassifier):
        def on_train_batch_end(self, *arguments):
            super().on_train_batch_end(*arguments)
            self.trainer.should_stop = True

    with pytest.raises(RuntimeError, match=r"has ended before its last batch: .* in on_train_batch_end of a callback"):
        train(small(Ending), tmp_path)
    assert not (tmp_path / "last.ckpt").exists() and not (tmp_path / "summary.csv").exists()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"count": 27}, "the number of images was 26, but now it is 27: some images would come twice"),
        ({"batch_size": 12}, "the batch size of all processes was 10, but now it is 12"),
        ({"seed": 4}, "the seed was 3, but now it is 4"),
    ],
)
def test_another_order_within_an_epoch_is_refused(changed, message):
    def loader(count=26, batch_size=10, seed=3):
        return EpochLoader(count, batch_size, seed, lambda: 0, 0, 1, None)

    place = loader().state_dict() | {"done": 2}
    loader().load_state_dict(place)
    with pytest.raises(PlaceMismatch, match=message):
        loader(**changed).load_state_dict(place)
    loader(**changed).load_state_dict(place | {"done": 3})  # at the end of an epoch
    loader(**changed).load_state_dict({name: place[name] for name in ("done", "batches", "epoch")})  # of early versions


def test_workers_leave_a_signal_to_the_process_that_trains(tmp_path, capfd):
    recovery = RecoveryCheckpoint(tmp_path / "last.ckpt")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
        recovery.on_train_start(SimpleNamespace(world_size=1), None)
        if (worker := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(recovery._signal)
        assert os.waitpid(worker, 0)[1] == 0 and capfd.readouterr().err == ""
    finally:
        for signum, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(signum, handler)
