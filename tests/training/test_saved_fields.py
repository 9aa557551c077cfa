import math

import pytest
import torch

from fastroute.training import ImageDataModule, RoutingClassifier, fit
from fastroute.training.checkpoints import check_resume, read_checkpoint

OPTIONS = {"opt": "adam", "sched": "step"}


def network():
    return RoutingClassifier("resnet20_cc2", 2, 1, 8, **OPTIONS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = ImageDataModule("digits", batch_size=2000, first_classes=2)
    fit(network(), data, epochs=1, output=folder, accelerator="cpu")
    return folder / "last.ckpt"


def changed(saved, path, keys, value):
    """Save the checkpoint with one field changed, or removed with KeyError."""
    checkpoint = place = torch.load(saved, weights_only=True)
    for key in keys[:-1]:
        place = place[key]
    if value is KeyError:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize(
    "keys, value, message",
    [
        (["hyper_parameters", "img_size"], "abc", "hyper_parameters['img_size'] is 'abc', expected an int above 0"),
        (["hyper_parameters", "num_classes"], 10**9, "expected an int above 0 and at most 1,048,576"),
        (["hyper_parameters", "num_classes"], KeyError, "hyper_parameters['num_classes'] is missing"),
        (["hyper_parameters", "lr"], math.nan, "hyper_parameters['lr'] is nan, expected a finite number"),
        (["hyper_parameters", "compile"], 1, "expected True or False"),
        (["state_dict", "model.stem.0.0.weight"], "x", "is 'x', expected a dense tensor"),
        (["ImageDataModule"], [1], "ImageDataModule is a list, expected a dict"),
        (["ImageDataModule", "std"], torch.zeros(1), "numbers of 0 or below"),
        (["ImageDataModule", "classes"], [1, 2], "expected a list of strings"),
        (["ImageDataModule", "place", "done"], -1, "ImageDataModule['place']['done'] is -1, expected an int"),
        (["callbacks", "EpochSummary", "rows"], [1], "expected a list of dicts"),
        (["callbacks", "EpochSummary", "rows"], [{"epoch": [1]}], "in column 'epoch' is a list"),
        (["loops", "fit_loop", "epoch_loop.batch_progress"], 3, "['epoch_loop.batch_progress'] is 3, expected a dict"),
        (["train_totals"], {"reset": torch.zeros(())}, "'reset', expected one of loss, samples"),
        (["lr_schedulers"], {}, "lr_schedulers is a dict, expected a list of dicts"),
    ],
)
def test_names_a_field_of_another_type(saved, tmp_path, keys, value, message):
    path = changed(saved, tmp_path / "c.ckpt", keys, value)
    with pytest.raises(ValueError) as error:
        read_checkpoint(path, "checkpoint")
    assert str(error.value).startswith(f"checkpoint is {path}; its ") and message in str(error.value)


@pytest.mark.parametrize(
    "keys, value, message",
    [
        (["optimizer_states"], KeyError, "its optimizer_states is missing"),
        (["optimizer_states"], [], "has 0 items, expected 1"),
        (["optimizer_states", 0, "param_groups", 0, "lr"], "x", "['lr'] is 'x', expected a finite number"),
        (["optimizer_states", 0, "param_groups", 0, "betas"], (0.9,), "expected 2 numbers"),
        (
            ["optimizer_states", 0, "param_groups", 0, "params"],
            [5],
            "has 1 parameters, numbered otherwise than the 45 expected",
        ),
        (["optimizer_states", 0, "state", 0, "exp_avg"], torch.zeros(2), "has the shape (2,), expected (16, 1, 3, 3)"),
        (["optimizer_states", 0, "state", 0, "exp_avg"], None, "['exp_avg'] is None, expected a dense tensor"),
        (["optimizer_states", 0, "state", 0, "exp_avg"], KeyError, "['exp_avg'] is missing"),
        (["optimizer_states", 0, "state", 10**6], {}, "there is no such parameter"),
        (["lr_schedulers", 0, "step"], 1, "which no schedule of fastroute has"),
        (["lr_schedulers", 0, "base_lrs"], [0.1], "expected a list of 3 items"),
        (["state_dict", "model.stem.0.0.weight"], torch.zeros(3), "has the shape (3,), expected (16, 1, 3, 3)"),
        (["state_dict", "model.stem.0.0.weight"], KeyError, "lacks 1 tensors, such as 'model.stem.0.0.weight'"),
    ],
)
def test_names_the_field_that_prevents_a_run_from_being_resumed(saved, tmp_path, keys, value, message):
    path = changed(saved, tmp_path / "c.ckpt", keys, value)
    with pytest.raises(ValueError) as error:
        check_resume(path, network(), 2)
    assert str(error.value).startswith(f"resume is {path}; its ") and message in str(error.value)


def test_refuses_a_url_as_a_path_to_delete(saved, tmp_path):
    checkpoint = torch.load(saved, weights_only=True)
    name = next(key for key in checkpoint["callbacks"] if "val_error" in key)
    keys = ["callbacks", name, "best_k_models"]
    path = changed(saved, tmp_path / "c.ckpt", keys, {"local:///home/x": torch.zeros(())})
    with pytest.raises(ValueError, match="expected a local path"):
        read_checkpoint(path)


def test_accepts_what_was_saved(saved):
    check_resume(saved, network(), 2)
