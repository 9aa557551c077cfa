from collections import OrderedDict

import pytest
import torch
from torch import nn

from fastroute.models import create_model, multipath, register_model, registry
from fastroute.models.layers import Network, pool_and_classify
from fastroute.training import ImageDataModule, RoutingClassifier, fit
from tests.image_folders import write_tree


def trained(network: nn.Module, data: ImageDataModule, folder):
    fit(RoutingClassifier(network, lr=0.01), data, epochs=1, output=folder, accelerator="cpu", model_ema_decay=0.5)
    return folder / "last.ckpt"


@pytest.fixture(scope="package")
def images(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("data") / "images", sizes=((12, 8), (8, 8)))


def tiny_cc2(*, num_classes=10, in_chans=3, img_size=32):
    layers = OrderedDict(
        stem=nn.Sequential(nn.Conv2d(in_chans, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()),
        stack1=nn.Sequential(nn.Conv2d(4, 6, 3, 1, 1), nn.ReLU()),
        head=pool_and_classify(6, num_classes),
    )
    return multipath(Network(layers), 2, ["stem", "stack1"], input_size=(in_chans, img_size, img_size))


@pytest.fixture(scope="package")
def registered():
    """Register a network whose export takes seconds, while these tests run."""
    register_model(tiny_cc2)
    yield "tiny_cc2"
    del registry._MODELS["tiny_cc2"]


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory, images, registered):
    """Train a network with two paths for an epoch on three classes of images of 8×8, with averaged weights."""
    data = ImageDataModule("imagefolder", images, batch_size=12, img_size=8, num_workers=1)
    torch.manual_seed(0)
    return trained(create_model(registered, 3, img_size=8), data, tmp_path_factory.mktemp("run"))
