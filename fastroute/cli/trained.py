"""What commands take from a checkpoint of `fastroute train`: its network, and the images that it is validated on."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from torch import nn

from fastroute._defaults import CROP_PCT
from fastroute.cli.images import chosen_images

if TYPE_CHECKING:
    from fastroute.data.loaders import EpochLoader


OwnModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="module:function that builds the network, where the checkpoint is of one of your own; it is imported.",
    ),
]
"""A checkpoint's own word is not enough to import code."""


@dataclass(frozen=True)
class Trained:
    """A trained network with its validation images, on the GPU where there is one.

    loader: of `validation_loader`, with the names of its `classes`. images: which they are, in a line.
    """

    network: nn.Module
    dataset: str
    data_dir: Path | None
    loader: "EpochLoader"
    classes: list[str]
    img_size: int
    crop_pct: float
    images: str


def trained_network(
    path: Path, name: str = "checkpoint", checkpoint: dict | None = None, model: str | None = None
) -> nn.Module:
    """The network of a checkpoint, which is read unless it is given, with its averaged weights where the run kept them.

    Args:
        path, name: the file, and the argument that it was given as.
        checkpoint: what it holds, where it was read already.
        model: an own function that builds the network; see `OwnModelOption`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of `fastroute train`, or its weights are of another network.
    """
    from fastroute.inference.predictor import network_of
    from fastroute.training.checkpoints import check_command, load_network_weights, read_checkpoint

    checkpoint = checkpoint or read_checkpoint(path, name)
    check_command(checkpoint, "train", path, name)
    network = network_of(checkpoint["hyper_parameters"], f"{name} is {path}", model)
    load_network_weights(network, checkpoint, path, name=name)
    return network.to(this_device())


def trained(
    path: Path,
    checkpoint: dict,
    *,
    dataset: str | None = None,
    data_dir: Path | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    model: str | None = None,
) -> Trained:
    """The network of a checkpoint that was read, and its validation images, by default of the data of its training.

    Raises:
        FileNotFoundError: there are no such images.
        ValueError: it is no checkpoint of `fastroute train`, or the images do not fit the network.
    """
    from fastroute.training.evaluation import validation_loader

    network = trained_network(path, checkpoint=checkpoint, model=model)
    run, data = checkpoint["hyper_parameters"], checkpoint.get("ImageDataModule", {})
    images = chosen_images(data, dataset, data_dir)
    img_size, crop_pct = data.get("img_size", run["img_size"]), data.get("crop_pct", CROP_PCT)
    loader, classes, channels = validation_loader(
        images.dataset,
        images.data_dir,
        batch_size=batch_size,
        img_size=img_size,
        crop_pct=crop_pct,
        num_workers=workers or os.cpu_count() or 1,
        first_classes=data.get("first_classes"),
        mean=data.get("mean"),
        std=data.get("std"),
        device=this_device(),
        **images.options,
    )
    check_channels(images.data_dir, channels, run)
    return Trained(network, images.dataset, images.data_dir, loader, classes, img_size, crop_pct, images.line)


def check_channels(data_dir: Path | None, channels: int, run: dict) -> None:
    """Raise unless images of so many channels are what the network of a run was trained on."""
    if channels != run["in_chans"]:
        raise ValueError(
            f"data_dir is {data_dir}; its images have {channels} channels, but {run['model']} was trained on images "
            f"of {run['in_chans']}"
        )


def check_finite(network: nn.Module, path: Path, name: str = "checkpoint") -> None:
    """Raise where weights of a checkpoint are NaN or infinite: there is nothing to show of such a network.

    Raises:
        ValueError: as said.
    """
    tensors = {key: value for key, value in network.state_dict().items() if isinstance(value, torch.Tensor)}
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{name} is {path}; {len(bad)} of its {len(tensors)} tensors, such as {bad[0]}, are NaN or infinite, so "
            "there is nothing to show: name a checkpoint from before the run diverged"
        )


def this_device() -> torch.device:
    """The GPU of this process where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
