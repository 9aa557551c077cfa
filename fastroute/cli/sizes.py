"""Check that sizes fit in memory before it is allocated: the system kills a process without a message."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from fastroute._memory import check_memory

if TYPE_CHECKING:
    import torch

    from fastroute.models.specification import Specification

# Images, of training and validation together, and channels of the sets held in memory.
_IN_MEMORY = {
    "digits": (1797, 1),
    "mnist": (70_000, 1),
    "cifar10": (60_000, 3),
    "cifar100": (60_000, 3),
    "stl10": (13_000, 3),
}
_BYTES = {"digits": 4}  # bytes of a value while images are scaled, if it is no uint8
SMALL = 2**30
"""Bytes of a batch below which training steps are not estimated, since the estimate takes time."""


def check_images(dataset: str, img_size: int | None) -> None:
    """Check that the images of a dataset fit in memory; a single one, if their number is unknown.

    Args:
        dataset: its name.
        img_size: height and width; None skips the check.

    Raises:
        ValueError: they do not fit.
    """
    if img_size is None:
        return
    count, channels = _IN_MEMORY.get(dataset, (1, 3))
    check_memory(
        count * channels * img_size**2 * _BYTES.get(dataset, 1),
        f"img_size is {img_size}; {f'the {count:,} images' if count > 1 else 'an image'} of {dataset} would take",
        "lower --img-size",
    )


def check_batch(
    model: "Specification | str",
    batch_size: int,
    in_chans: int,
    img_size: int,
    *,
    training: bool = True,
    half: bool = False,
    device: "torch.device | None" = None,
) -> None:
    """Check that a batch, and what a training step keeps of it, fits in the memory of the device.

    The estimate is a lower bound: the images, and in training the outputs of convolutions, which the backward pass
    needs.

    Args:
        model: of the network; in training a specification, otherwise only its name is used.
        batch_size: images.
        in_chans: their channels.
        img_size: their height and width.
        training: whether to estimate a training step.
        half: whether it computes in a 16-bit type.
        device: the device that computes; None is the CPU.

    Raises:
        ValueError: it does not fit.
    """
    import torch

    images = 4 * batch_size * in_chans * img_size**2
    there = None
    if device is not None and device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    says, advice = f"batch_size is {batch_size} and img_size {img_size};", "lower --batch-size or --img-size"
    check_memory(images, f"{says} a batch would take", advice, there)
    if training and images * 64 > SMALL:  # a network keeps about 64 numbers for each value of an image
        kept = batch_size * _convolved(model, in_chans, img_size) * (2 if half else 4)
        check_memory(kept, f"{says} a training step of {model} would take", advice, there)


def _convolved(model: "Specification", in_chans: int, img_size: int) -> int:
    """Return the size of all outputs of convolutions for one image, on the meta device; 0 if that fails."""
    import torch
    from torch import nn

    count = 0

    def add(module, args, output):
        nonlocal count
        count += math.prod(output.shape)

    try:
        with torch.device("meta"), torch.no_grad():
            network = replace(model, paths=1).build(in_chans=in_chans, img_size=img_size, imports=True).eval()
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_hook(add)
            network(torch.empty(1, in_chans, img_size, img_size))
    except RuntimeError:  # an operator does not support the meta device
        return 0
    return count
