"""Checkpoints can be read back, whatever values a run was given."""

from fractions import Fraction

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

import fastroute
from fastroute.training import ImageDataModule, RoutingClassifier, fit
from fastroute.training.checkpoints import read_checkpoint


class Kept(pl.Callback):
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return {"kept": self.state}


def test_checkpoints_of_numpy_s_numbers_are_read_again(image_folder, tmp_path):
    sizes = {"num_classes": np.int64(3), "img_size": (8, 8)}
    module = RoutingClassifier(
        "base_cnn",
        **sizes,
        lr=np.logspace(-3, -1, 3)[1],
        weight_decay=torch.tensor(0.01, dtype=torch.float64),
        decay_milestones=np.array([1, 2]),
    )
    options = {"batch_size": np.int64(8), "img_size": np.int64(8), "seed": np.int64(3), "crop_pct": np.float64(0.9)}
    data = ImageDataModule("imagefolder", image_folder, **options, mean=np.float64(0.5), std=np.float32(0.25))
    callbacks = [Kept(np.float32(1.5))]
    fit(module, data, epochs=1, output=tmp_path, accelerator="cpu", callbacks=callbacks, console=Console(quiet=True))
    assert fastroute.load(tmp_path / "last.ckpt", device="cpu").model.specification.num_classes == 3
    saved = read_checkpoint(tmp_path / "last.ckpt")
    assert saved["hyper_parameters"]["lr"] == 0.01 and saved["hyper_parameters"]["decay_milestones"] == [1, 2]
    assert saved["hyper_parameters"]["img_size"] == 8 and type(saved["hyper_parameters"]["weight_decay"]) is float
    again = RoutingClassifier("base_cnn", **sizes, lr=0.01, weight_decay=0.01, decay_milestones=[1, 2])
    fit(again, data, epochs=2, output=tmp_path, accelerator="cpu", resume=tmp_path / "last.ckpt", callbacks=callbacks)


def test_what_no_checkpoint_holds_is_refused_before_the_first_step(image_folder, tmp_path):
    class Own(RoutingClassifier):
        def __init__(self, given=None):
            super().__init__("base_cnn", 3, img_size=8)
            self.save_hyperparameters("given")

    options = {"epochs": 1, "output": tmp_path, "accelerator": "cpu", "console": Console(quiet=True)}
    data = ImageDataModule("imagefolder", image_folder, batch_size=8, img_size=8)
    with pytest.raises(
        ValueError, match=r"the hyper-parameter given cannot be read back .*: it holds a .*Fraction, .* or leave it out"
    ):
        fit(Own(Fraction(1, 2)), data, **options)
    with pytest.raises(ValueError, match="the state of Kept cannot be read back from a checkpoint"):
        fit(Own(), data, callbacks=[Kept(Fraction(1, 2))], **options)
    assert not (tmp_path / "last.ckpt").exists()
    fit(Own(tmp_path), data, **options)
    assert read_checkpoint(tmp_path / "last.ckpt")["hyper_parameters"]["given"] == str(tmp_path)


def test_hyper_parameters_of_other_data_modules_may_be_left_out(tmp_path):
    class Data(pl.LightningDataModule):
        def __init__(self, folder, transform, count):
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.randn(self.hparams.count, 3, 8, 8), torch.arange(8) % 3), 4)

    data = Data(tmp_path, torch.nn.ReLU(), 8)
    with pytest.warns(UserWarning, match="transform of Data cannot be read back from checkpoints"):
        fit(RoutingClassifier("base_cnn", 3, img_size=8), data, epochs=1, output=tmp_path, accelerator="cpu")
    saved = read_checkpoint(tmp_path / "last.ckpt")
    assert saved["datamodule_hyper_parameters"] == {"folder": str(tmp_path), "count": 8}


def test_files_of_other_objects_are_told_without_advice_to_trust_them(tmp_path):
    torch.save({"hyper_parameters": {"x": Fraction(1, 2)}, "state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"it holds a fractions\.Fraction, and only plain values and tensors are read"):
        read_checkpoint(tmp_path / "x.ckpt")


class Late(pl.Callback):
    """A callback whose state begins with the training."""

    def on_train_start(self, trainer, pl_module):
        self.count = 1

    def state_dict(self):
        return {"count": self.count}


class Rooted(RoutingClassifier):
    def __init__(self, root):
        super().__init__("base_cnn", 3, img_size=8, decay_milestones=torch.tensor([1, 2]))
        self.place = self.hparams.root / "x"


def test_values_of_subclasses_and_callbacks_are_their_own(image_folder, tmp_path):
    data = ImageDataModule("imagefolder", image_folder, batch_size=8, img_size=8)
    module = Rooted(tmp_path)
    assert module.place == tmp_path / "x" and module.hparams.decay_milestones == [1, 2]
    fit(module, data, epochs=1, output=tmp_path, accelerator="cpu", callbacks=[Late()], console=Console(quiet=True))
    assert read_checkpoint(tmp_path / "last.ckpt")["hyper_parameters"]["root"] == str(tmp_path)
