"""Networks that are trained by a loss of their own."""

import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from fastroute.models.blockdrop import BlockDrop
from fastroute.models.capsules import CapsNet
from fastroute.models.skipnet import SkipNet
from fastroute.training import ImageDataModule, RoutingClassifier, fit
from fastroute.training.graphs import check_recording
from fastroute.training.targets import class_shares

SIZES = {"num_classes": 3, "in_chans": 1, "img_size": 8}
NETWORKS = {
    "capsnet": lambda: CapsNet(8, 2, 3, **SIZES),
    "blockdrop": lambda: BlockDrop(8, pretrain=0.3, curriculum=0.4, **SIZES),
    "skipnet": lambda: SkipNet(8, reinforce=0.5, **SIZES),
}


class Recorded(nn.Module):
    """Record what a loss gets."""

    def __init__(self):
        super().__init__()
        self.dense, self.calls = nn.Linear(64, 4), []

    def forward(self, x):
        return self.dense(x.flatten(1))

    def training_loss(self, images, targets, progress):
        self.calls.append((targets, progress))
        logits = self(images)
        return 2 * F.cross_entropy(logits, targets), logits


class StopAt(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            raise RuntimeError("killed")


def train(network, output, callbacks=(), resume=None, epochs=3, **options):
    pl.seed_everything(0, verbose=False)
    module = RoutingClassifier(network(), **SIZES | {"lr": 0.05, "sched": "cosine"} | options)
    data = ImageDataModule("digits", batch_size=144, first_classes=3, seed=1)  # three batches
    options = {"accelerator": "cpu", "console": Console(quiet=True), "logger": False, "recovery_interval": 1}
    return module, fit(module, data, epochs=epochs, output=output, callbacks=callbacks, resume=resume, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_resumes_within_an_epoch_bit_for_bit(name, tmp_path):
    whole, rows = train(NETWORKS[name], tmp_path / "whole")
    assert rows[-1]["val_error"] < 70 and whole.own_loss
    with pytest.raises(RuntimeError, match="killed"):
        train(NETWORKS[name], tmp_path / "halves", [StopAt()])
    halves, again = train(NETWORKS[name], tmp_path / "halves", resume=tmp_path / "halves" / "last.ckpt")
    for (key, expected), actual in zip(whole.state_dict().items(), halves.state_dict().values(), strict=True):
        assert torch.equal(actual, expected), key
    assert [row["train_loss"] for row in again] == [row["train_loss"] for row in rows]


def test_the_loss_gets_shares_of_the_classes_and_of_the_run(tmp_path):
    module, rows = train(Recorded, tmp_path, num_classes=4, smoothing=0.2)
    targets, progress = zip(*module.model.calls, strict=True)
    assert progress == pytest.approx([step / 9 for step in range(9)])
    assert targets[0].shape[1] == 4 and targets[0].unique().tolist() == pytest.approx([0.05, 0.85])
    assert rows[0]["train_loss"] > 1.3 * rows[0]["val_loss"]  # twice the cross-entropy


def test_a_longer_run_would_have_other_phases(tmp_path):
    train(Recorded, tmp_path, epochs=1, num_classes=4, sched="step")
    with pytest.raises(ValueError, match="its schedule is of 1 epoch, but this run has epochs=2"):
        train(Recorded, tmp_path, epochs=2, num_classes=4, sched="step", resume=tmp_path / "last.ckpt")


def test_shares_of_mixed_images_are_padded():
    shares = torch.tensor([[0.3, 0.7]])
    torch.testing.assert_close(class_shares(shares, 4, 0.4), torch.tensor([[0.28, 0.52, 0.1, 0.1]]))
    with pytest.raises(ValueError, match="the images have 2 classes; the network has 1 logits, and must have as many"):
        class_shares(shares, 1)


def test_images_of_more_classes_than_logits_are_refused_when_mixed(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    data = ImageDataModule("digits", batch_size=512, mixup=0.2)
    with pytest.raises(ValueError, match="the images have 10 classes; the network has 5 logits, and must have as many"):
        fit(RoutingClassifier(network, 5, 1, 8), data, epochs=1, output=tmp_path, accelerator="cpu")


def test_no_other_loss_is_added_and_no_step_recorded():
    with pytest.raises(ValueError, match="aux_loss is given, but CapsNet has a loss of its own: leave aux_loss out"):
        RoutingClassifier(NETWORKS["capsnet"](), aux_loss=len)
    with pytest.raises(ValueError, match="cuda_graphs is True; BlockDrop has its own loss, which may change"):
        check_recording(device_type="cuda", model=NETWORKS["blockdrop"]())
