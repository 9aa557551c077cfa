import csv
import warnings

import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console

from fastroute.training import ImageDataModule, RoutingClassifier, check_resume, fit
from fastroute.training.checkpoints import AtomicCheckpointIO


@pytest.fixture
def data(image_folder):
    data = ImageDataModule("imagefolder", image_folder, batch_size=10, img_size=8)
    data.setup()
    return data


def classifier(cls=RoutingClassifier, model="resnet20_cc2", **options):
    pl.seed_everything(0, verbose=False)
    return cls(model, num_classes=3, img_size=8, **{"decay_milestones": (2, 3), **options})


def run(module, data, output, epochs=4, **options):
    return fit(module, data, epochs=epochs, output=output, accelerator="cpu", console=Console(quiet=True), **options)


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
def test_a_resumed_run_ends_as_the_uninterrupted_one(data, tmp_path, sched):
    whole = classifier(sched=sched)
    rows = run(whole, data, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(classifier(Killed, sched=sched), data, tmp_path / "halves")
    resumed = classifier(sched=sched)
    torch.nn.init.zeros_(resumed.model.stem_router.w1)  # whatever it starts from must not matter
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
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["best.ckpt", "last.ckpt", "summary.csv"]
    with (tmp_path / "run" / "summary.csv").open() as file:
        written = list(csv.DictReader(file))
    assert list(written[0]) == [
        "epoch",
        "train_loss",
        "train_error",
        "val_loss",
        "val_error",
        "lr",
        "images_per_s",
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


def test_val_error_is_over_exactly_the_validation_images(data, tmp_path):
    module = classifier()
    rows = run(module, data, tmp_path, epochs=1)
    module.eval()
    with torch.no_grad():
        wrong = sum((module(images).argmax(1) != labels).sum().item() for images, labels in data.val_dataloader())
    assert rows[-1]["val_error"] == pytest.approx(100 * wrong / 12, abs=1e-4)


def test_bfloat16_in_channels_last_trains(data, tmp_path):
    rows = run(classifier(channels_last=True), data, tmp_path, epochs=1, amp_dtype="bfloat16")
    assert 0 < rows[0]["train_loss"] < 5


def test_says_nothing_but_its_own(data, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", message="fastroute computes")
        run(classifier(), data, tmp_path, epochs=1)
        run(classifier(), data, tmp_path, epochs=2, resume=tmp_path / "last.ckpt")
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_a_checkpoint_cut_off_while_writing_leaves_the_one_before(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"epoch": 1}, path)

    def fail(checkpoint, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"epoch": 2}, path)
    assert torch.load(path) == {"epoch": 1}


def test_wrong_arguments(data, tmp_path):
    for options, message in (
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"epochs": -3}, "epochs is -3"),
        ({"log_interval": 0}, "log_interval is 0; it must be at least 1"),
        ({"amp_dtype": "int8"}, "amp_dtype is 'int8'; it must be 'bfloat16', 'float16' or None"),
    ):
        with pytest.raises(ValueError, match=message):
            run(classifier(), data, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_does_not_fit_is_refused(data, tmp_path):
    run(classifier(sched="onecycle"), data, tmp_path, epochs=1)
    last = tmp_path / "last.ckpt"
    with pytest.raises(FileNotFoundError, match=r"resume is .*none\.ckpt; there is no such file"):
        check_resume(tmp_path / "none.ckpt", classifier(), 4)
    for module, epochs, message in (
        (
            classifier(model="resnet20_cc3"),
            4,
            "trained with model='resnet20_cc2', but .* model='resnet20_cc3'",
        ),
        (RoutingClassifier("resnet20_cc2", 5), 4, "trained with num_classes=3, but this run has num_classes=5"),
        (classifier(), 4, "trained with sched='onecycle', but this run has sched='multistep'"),
        (classifier(sched="onecycle"), 4, "its schedule is of 1 epochs, but this run has epochs=4"),
        (classifier(sched="onecycle"), 1, "it has 1 epochs behind it, so epochs=1 leaves none to train"),
    ):
        with pytest.raises(ValueError, match=message):
            check_resume(last, module, epochs)
    (tmp_path / "cut.ckpt").write_bytes(last.read_bytes()[:10000])
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    (tmp_path / "empty.ckpt").touch()
    for name in ("cut.ckpt", "other.ckpt", "empty.ckpt"):
        with pytest.raises(ValueError, match=f"resume is .*{name}; it is no checkpoint of a training run"):
            check_resume(tmp_path / name, classifier(), 4)
