"""Load the network of a checkpoint of `fastroute train`, and its validation images."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastroute._defaults import CROP_PCT
from fastroute._processors import processors
from fastroute.cli.images import check_fit, choose_images

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastroute.data.loaders import EpochLoader


OwnModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="module:function that builds the network, if it is one of your own; it is imported.",
    ),
]
"""Code is imported only if the user names it: a checkpoint alone cannot cause an import."""


@dataclass(frozen=True)
class Trained:
    """A trained network with its validation images, on the GPU if there is one.

    Attributes:
        network: with its averaged weights, if the run kept them.
        dataset, data_dir: of the images.
        loader: from `validation_loader`.
        classes: the names of the classes.
        img_size: height and width of the crops.
        crop_pct: the side of a crop, as a share of the resized image's shorter side.
        images: a line that says which images they are.
    """

    network: "nn.Module"
    dataset: str
    data_dir: Path | None
    loader: "EpochLoader"
    classes: list[str]
    img_size: int
    crop_pct: float
    images: str


def load_trained_network(
    path: Path, name: str = "checkpoint", checkpoint: dict | None = None, model: str | None = None
) -> "nn.Module":
    """Load the network of a checkpoint, with its averaged weights if the run kept them.

    Args:
        path: the file.
        name: the argument that the file was given as, for messages.
        checkpoint: its content, if it was read already.
        model: your own function that builds the network; see `OwnModelOption`.

    Returns:
        the network, on the GPU if there is one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of `fastroute train`, or its weights are of another network.
    """
    from fastroute.inference.predictor import network_of
    from fastroute.models.weights import load_state
    from fastroute.training.checkpoints import check_command, read_checkpoint

    checkpoint = checkpoint or read_checkpoint(path, name)
    check_command(checkpoint, "train", path, name)
    run, conversion = checkpoint["hyper_parameters"], checkpoint.get("conversion")
    network = network_of(run, f"{name} is {path}", model, conversion)
    load_state(network, checkpoint, f"{name} is {path}")
    return network.to(default_device())


def load_trained(
    path: Path,
    checkpoint: dict,
    *,
    dataset: str | None = None,
    data_dir: Path | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    model: str | None = None,
) -> Trained:
    """Load the network of a checkpoint and its validation images.

    Args:
        path: of the checkpoint, for messages.
        checkpoint: as `read_checkpoint` returns it.
        dataset, data_dir: see `choose_images`; the default is the data of the training.
        batch_size: of the loader.
        workers: threads or processes that decode images; None uses all cores.
        model: your own function that builds the network; see `OwnModelOption`.

    Returns:
        both.

    Raises:
        FileNotFoundError: there are no such images.
        ValueError: it is no checkpoint of `fastroute train`, or the images do not fit the network.
    """
    from fastroute.training.evaluation import validation_loader

    network = load_trained_network(path, checkpoint=checkpoint, model=model)
    run, data = checkpoint["hyper_parameters"], checkpoint.get("ImageDataModule", {})
    images = choose_images(data, dataset, data_dir)
    img_size, crop_pct = data.get("img_size", run["img_size"]), data.get("crop_pct", CROP_PCT)
    loader, classes, channels = validation_loader(
        images.dataset,
        images.data_dir,
        batch_size=batch_size,
        img_size=img_size,
        crop_pct=crop_pct,
        num_workers=processors() if workers is None else workers,
        first_classes=data.get("first_classes"),
        mean=data.get("mean"),
        std=data.get("std"),
        device=default_device(),
        **images.options,
    )
    check_channels(images.data_dir, channels, run)
    check_fit(data, images, classes, loader.count)
    return Trained(network, images.dataset, images.data_dir, loader, classes, img_size, crop_pct, images.line)


def check_channels(data_dir: Path | None, channels: int, run: dict) -> None:
    """Check that images have the channels that a network was trained on.

    Args:
        data_dir: of the images, for the message.
        channels: of the images.
        run: the hyperparameters of the network's checkpoint.

    Raises:
        ValueError: the network was trained on images of other channels.
    """
    if channels != run["in_chans"]:
        raise ValueError(
            f"data_dir is {data_dir}; its images have {channels} channels, but {run['model']} was trained on images "
            f"of {run['in_chans']}"
        )


def check_finite(network: "nn.Module", path: Path, name: str = "checkpoint") -> None:
    """Check that all weights of a network are finite: the outputs of one that has diverged mean nothing.

    Args:
        network: the network.
        path: of its checkpoint, for the message.
        name: the argument that the checkpoint was given as, for the message.

    Raises:
        ValueError: weights are NaN or infinite.
    """
    from fastroute.training.steps import named_weights

    tensors = named_weights(network)
    bad = [key for key, value in tensors.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{name} is {path}; {len(bad)} of its {len(tensors)} tensors, such as {bad[0]}, are NaN or infinite, so "
            "its outputs mean nothing: choose a checkpoint from before the run diverged"
        )


def default_device() -> "torch.device":
    """Return the GPU of this process if there is one, or else the CPU."""
    from fastroute._devices import indexed, resolve_device

    return indexed(resolve_device(None))
