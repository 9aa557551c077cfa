import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastroute import _files
from fastroute.models import create_model
from fastroute.models.ensemble import Ensemble
from fastroute.models.weights import network_weights
from fastroute.training import RoutingClassifier, check_resume, epochs_done, load_weights, save_weights
from fastroute.training.checkpoints import check_unused, read_checkpoint
from fastroute.training.optim import OPTIMIZERS, parameter_groups
from fastroute.training.saving import AtomicCheckpointIO, BestCheckpoint

REPOSITORY = Path(__file__).resolve().parents[2]

SAVES_FOREVER = """
import itertools, sys, torch
from fastroute.training.saving import AtomicCheckpointIO
io = AtomicCheckpointIO()
for i in itertools.count():
    io.save_checkpoint({"number": i, "weights": torch.full((1_000_000,), float(i))}, sys.argv[1])
    if i == 0:
        print("saved", flush=True)
"""


GROUPED = ("lr", "weight_decay", "norm_weight_decay", "gate_lr_mult", "gate_wd")


def checkpoint(epochs=4, done=1, averaged=False, **hyper_parameters):
    module = RoutingClassifier("resnet20_cc2", **hyper_parameters)
    state = {f"model.{name}": value.clone() for name, value in module.model.state_dict().items()}
    progress = {"epoch_progress": {"current": {"processed": done}}}
    found = {"state_dict": state, "hyper_parameters": dict(module.hparams), "epochs": epochs}
    if averaged:
        found["current_model_state"] = {name: value + 1 for name, value in state.items()}
    groups = parameter_groups(module, **{name: module.hparams[name] for name in GROUPED})
    optimizer = OPTIMIZERS[module.hparams.opt](groups, module.hparams.momentum)
    training = {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [{"last_epoch": 0}], "callbacks": {}}
    return module, found | training | {"loops": {"fit_loop": progress}}


def test_leaves_an_intact_checkpoint_if_killed_at_any_moment(tmp_path):
    path = tmp_path / "last.ckpt"
    for i in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVES_FOREVER, path], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        assert process.stdout.readline() == "saved\n"
        time.sleep(0.05 + 0.037 * i)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        saved = torch.load(path)
        assert (saved["weights"] == saved["number"]).all() and len(saved["weights"]) == 1_000_000


def test_reports_a_full_disk_and_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    monkeypatch.setattr(_files, "_temporary", lambda path: path.with_name("full"))
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(
        OSError, match=r"last\.ckpt cannot be written, there is no previous checkpoint: .*No space left"
    ):
        io.save_checkpoint({"weights": torch.ones(1000)}, path)
    io.save_checkpoint({"epoch": 1}, path)
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(
        OSError, match=r"last\.ckpt cannot be written, the previous checkpoint is intact: .*No space left"
    ):
        io.save_checkpoint({"epoch": 2, "weights": torch.ones(1_000_000)}, path)
    assert torch.load(path) == {"epoch": 1} and os.listdir(tmp_path) == ["last.ckpt"]


def test_reads_a_checkpoint_only_once(tmp_path):
    path, saved = tmp_path / "last.ckpt", {"epoch": 1}
    io = AtomicCheckpointIO(path, saved)
    assert io.load_checkpoint(path) is saved
    with pytest.raises(FileNotFoundError):  # and is not kept in memory
        io.load_checkpoint(path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    module, saved = checkpoint(epochs=4, sched="onecycle")
    torch.save(saved, path)
    assert epochs_done(path) == 1
    check_resume(path, module, 4)
    for options, epochs, message in (
        ({"model": "resnet20_cc3"}, 4, "trained with model='resnet20_cc2', but this run has model='resnet20_cc3'"),
        ({"num_classes": 5}, 4, "trained with num_classes=10, but this run has num_classes=5"),
        ({"opt": "adam"}, 4, "trained with opt='sgd', but this run has opt='adam'"),
        ({"sched": "step"}, 4, "trained with sched='onecycle', but this run has sched='step'"),
        ({"lr": 0.01}, 4, "trained with lr=0.1, but this run has lr=0.01"),
        ({"gate_lr_mult": 2.0}, 4, "trained with gate_lr_mult=1.0, but this run has gate_lr_mult=2.0"),
        ({}, 5, "its schedule is of 4 epochs, but this run has epochs=5"),
        ({}, 1, "it has completed 1 epoch, so epochs=1 leaves none to train"),
    ):
        other = RoutingClassifier(**{"model": "resnet20_cc2", "sched": "onecycle"} | options)
        with pytest.raises(ValueError, match=message):
            check_resume(path, other, epochs)


def test_only_schedules_that_do_not_depend_on_the_epochs_can_be_lengthened(tmp_path):
    path = tmp_path / "last.ckpt"
    for options in ({"sched": "step"}, {"sched": "multistep", "decay_milestones": [2, 3]}):
        module, saved = checkpoint(epochs=4, **options)
        torch.save(saved, path)
        check_resume(path, module, 8)
    for options in ({"sched": "multistep"}, {"sched": "cosine"}):
        module, saved = checkpoint(epochs=4, **options)
        torch.save(saved, path)
        with pytest.raises(ValueError, match="its schedule is of 4 epochs, but this run has epochs=8"):
            check_resume(path, module, 8)


def test_refuses_files_that_are_no_checkpoints(tmp_path):
    _, saved = checkpoint()
    torch.save(saved, tmp_path / "whole.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:10000])
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    (tmp_path / "empty.ckpt").touch()
    for name in ("cut.ckpt", "other.ckpt", "empty.ckpt"):
        with pytest.raises(ValueError, match=f"resume is .*{name}; it is no checkpoint of a training run"):
            read_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"resume is .*none\.ckpt; there is no such file"):
        read_checkpoint(tmp_path / "none.ckpt")


def test_loads_weights_of_a_checkpoint_or_of_a_state_dict(tmp_path):
    path, model = tmp_path / "weights.ckpt", create_model("resnet20_cc2")
    module, saved = checkpoint(averaged=True)
    torch.save(saved, path)
    load_weights(model, path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), module.model.parameters(), strict=True))
    load_weights(model, path, averaged=False)
    assert all(torch.equal(a, b + 1) for a, b in zip(model.parameters(), module.model.parameters(), strict=True))
    torch.save(module.model.state_dict(), path)
    load_weights(model, path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), module.model.parameters(), strict=True))


def test_weights_of_another_network_are_refused(tmp_path):
    path, model = tmp_path / "weights.pt", create_model("resnet20")
    torch.save(checkpoint()[1], path)
    with pytest.raises(
        ValueError, match=r"initial_checkpoint is .*weights\.pt; its weights are of another network"
    ) as told:
        load_weights(model, path)
    assert " missing (" in str(told.value) and " unexpected (" in str(told.value) and len(str(told.value)) < 600
    torch.save(create_model("resnet20", num_classes=7).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"its classifier is of 7 classes: .* as pretrained_path \(--pretrained-path\)$"
    ):
        load_weights(model, path)
    torch.save(create_model("resnet20", in_chans=1).state_dict(), path)
    with pytest.raises(ValueError, match=r"network: 1 of another shape \(\S+ \(16, 1, 3, 3\) for \(16, 3, 3, 3\)\)$"):
        load_weights(model, path)
    torch.save(create_model("resnet20").state_dict() | {"stem.0.weight": 1.0}, path)
    with pytest.raises(ValueError, match="its weights are of another network"):
        load_weights(model, path)
    for nothing in ({"state_dict": [1]}, {1: torch.ones(1)}):
        torch.save(nothing, path)
        with pytest.raises(ValueError, match="and must hold a state_dict"):
            load_weights(model, path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"weights\.pt; it holds a list, and must hold a state_dict"):
        load_weights(model, path)
    for damaged in (b"no weights", b"", b"epochs: 1\n", bytes(range(256))):
        for file in (path, path.with_suffix(".safetensors")):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"initial_checkpoint is .*(no weights|cannot be read): .+") as told:
                load_weights(model, file)
            assert len(str(told.value).splitlines()) == 1
            with pytest.raises(ValueError, match="it is no checkpoint of a training run"):
                read_checkpoint(file)
    with pytest.raises(FileNotFoundError, match="checkpoint is none; there is no such file"):
        load_weights(model, "none", name="checkpoint")


def test_verifies_a_digest_beside_weights(tmp_path):
    given, model = create_model("base_cnn"), create_model("base_cnn")
    for name in ("weights.safetensors", "weights.pth"):
        path = tmp_path / name
        save_weights(given, path)
        load_weights(model, path)
        assert all(torch.equal(value, given.state_dict()[name]) for name, value in model.state_dict().items())
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 4
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=rf"{name}; its weights cannot be read: the file is damaged: .*copy it"):
            load_weights(model, path)
    path = tmp_path / "weights.safetensors"
    assert path.with_suffix(".safetensors.sha256").read_text().endswith("  weights.safetensors\n")  # as of sha256sum
    (tmp_path / "weights.safetensors.sha256").unlink()  # as of a file from elsewhere
    load_weights(model, path)


def test_every_reader_refuses_damaged_checkpoints(tmp_path):
    path, module = tmp_path / "last.ckpt", RoutingClassifier("base_cnn")
    saved = {f"model.{name}": value for name, value in module.model.state_dict().items()}
    progress = {"fit_loop": {"epoch_progress": {"current": {"processed": 1}}}}
    torch.save({"state_dict": saved, "hyper_parameters": dict(module.hparams), "loops": progress}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for read in (
        read_checkpoint,
        epochs_done,
        AtomicCheckpointIO().load_checkpoint,
        RoutingClassifier.load_from_checkpoint,
        lambda path: load_weights(module.model, path),
        lambda path: Ensemble.from_checkpoints([path]),
    ):
        with pytest.raises(ValueError, match=rf"is {path}; .*the file is damaged: BadZipFile: Bad CRC-32 for file"):
            read(path)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_other_trainers_checkpoints(tmp_path, prefix):
    given, model = create_model("resnet20"), create_model("resnet20")
    weights = {prefix + name: value for name, value in given.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "model.pth.tar")
    load_weights(model, tmp_path / "model.pth.tar")
    assert all(torch.equal(value, given.state_dict()[name]) for name, value in model.state_dict().items())


def test_loads_weights_with_and_without_temperatures(tmp_path):
    hot, cold = (create_model("resnet20_cc2") for _ in range(2))
    older = tmp_path / "older.pt"
    torch.save(cold.state_dict(), older)
    hot.stem_router.temperature = 3.0
    save_weights(hot, tmp_path / "hot.pt")
    load_weights(cold, tmp_path / "hot.pt")
    assert cold.stem_router.temperature == 3 and cold.stack1_router.temperature == 1
    load_weights(cold, older)


def test_a_new_run_does_not_remove_kept_epochs(tmp_path):
    (tmp_path / "epoch12.ckpt").write_bytes(b"kept")
    with pytest.raises(FileExistsError, match=r"it has epoch12\.ckpt of another run: choose another folder, or over"):
        check_unused(tmp_path, "--overwrite")
    check_unused(tmp_path, "--overwrite", resume=tmp_path / "epoch12.ckpt")


def foreign(path):
    torch.save({"state_dict": {"net.weight": torch.ones(3)}, "epoch": 7, "pytorch-lightning_version": "2.1"}, path)


@pytest.mark.parametrize("name", ["last.ckpt", "previous.ckpt", "best.ckpt"])
@pytest.mark.parametrize("write", [foreign, lambda path: path.write_text("of another program")])
def test_checkpoints_of_other_programs_are_not_overwritten(tmp_path, name, write):
    write(tmp_path / name)
    message = rf"it has a {name} that is no checkpoint of a run, .*: choose another folder, or overwrite .* --overwrite"
    with pytest.raises(FileExistsError, match=message):
        check_unused(tmp_path, "--overwrite")
    foreign(tmp_path / name)
    os.truncate(tmp_path / name, 300)  # which nobody can read
    check_unused(tmp_path, "--overwrite")


def test_weights_that_cannot_be_written_leave_the_earlier_ones_with_their_digest(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_weights(create_model("base_cnn"), path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(_files, "_temporary", lambda path: path.with_name("full"))
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        save_weights(create_model("base_cnn"), path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_moving_average_of_timm_s_is_preferred():
    trained, averaged = {"weight": torch.zeros(1)}, {"weight": torch.ones(1)}
    checkpoint = {"state_dict": trained, "state_dict_ema": averaged}
    assert network_weights(checkpoint)["weight"] == 1
    assert network_weights(checkpoint, averaged=False)["weight"] == 0


@pytest.mark.parametrize("resumed", [None, "last.ckpt", "previous.ckpt"])
def test_the_previous_checkpoint_is_one_of_the_same_run(tmp_path, resumed):
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for epoch, path in ((1, previous), (2, last)):
        torch.save({"epoch": epoch}, path)
    io = AtomicCheckpointIO(resumed and tmp_path / resumed)
    io.save_checkpoint({"epoch": 3}, last)
    epochs = [torch.load(path)["epoch"] for path in (previous, last) if path.exists()]
    assert epochs == {None: [3], "last.ckpt": [2, 3], "previous.ckpt": [1, 3]}[resumed]
    io.save_checkpoint({"epoch": 4}, last)
    assert [torch.load(path)["epoch"] for path in (previous, last)] == [3, 4]


def test_the_best_epoch_has_its_own_score_by_another_metric(monkeypatch):
    rows = [{"val_loss": 1.0}, {"val_loss": 2.0}]
    monkeypatch.setattr("fastroute.training.saving.summary_rows", lambda path: rows)
    state = {"monitor": "val_error", "best_k_models": {"best.ckpt": torch.tensor(40.0)}}
    for metric, score in (("val_error", 40), ("val_loss", 2), ("val_error5", None)):
        assert BestCheckpoint(None, monitor=metric)._score(state, "best.ckpt") == score
