import pytest
import torch
from torch import nn

from fastroute.models import create_model
from fastroute.training import ImageDataModule, RoutingClassifier, fit
from tests.image_folders import write_tree


def trained(network: nn.Module, data: ImageDataModule, folder):
    fit(RoutingClassifier(network, lr=0.01), data, epochs=1, output=folder, accelerator="cpu", model_ema_decay=0.5)
    return folder / "last.ckpt"


@pytest.fixture(scope="package")
def images(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("data") / "images", sizes=((12, 8), (8, 8)))


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory, images):
    """Of a network with two paths, trained for an epoch on three classes of images of 8×8, with averaged weights."""
    data = ImageDataModule("imagefolder", images, batch_size=12, img_size=8, num_workers=1)
    torch.manual_seed(0)
    return trained(create_model("resnet20_cc2", 3), data, tmp_path_factory.mktemp("run"))
