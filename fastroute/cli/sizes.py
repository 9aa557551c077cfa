"""What sizes take of the memory, before it is taken: the system ends a process that takes too much without a word."""

import math
from dataclasses import replace

import torch
from torch import nn

from fastroute._memory import check_memory
from fastroute.models.specification import Specification

# Images and channels of the sets that are held in memory, training and validation together.
_IN_MEMORY = {
    "digits": (1797, 1),
    "mnist": (70_000, 1),
    "cifar10": (60_000, 3),
    "cifar100": (60_000, 3),
    "stl10": (13_000, 3),
}
_BYTES = {"digits": 4}  # of a value while they are scaled, where that is not in uint8
SMALL = 2**30
"""Batches below this are not looked at, for the time that a look takes."""


def check_images(dataset: str, img_size: int | None) -> None:
    """Raise where images held in memory would not fit into it at this size; one where their number is not known.

    Raises:
        ValueError: as said.
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
    model: Specification | str,
    batch_size: int,
    in_chans: int,
    img_size: int,
    *,
    training: bool = True,
    half: bool = False,
) -> None:
    """Raise where a batch, or what a training step keeps of it, would not fit into the memory that it is computed in.

    It is a lower bound: the images, and in training the outputs of convolutions, which their backward needs. Only then
    must `model` be a specification.

    Raises:
        ValueError: as said.
    """
    images = 4 * batch_size * in_chans * img_size**2
    there = None
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    says, advice = f"batch_size is {batch_size} and img_size {img_size};", "lower --batch-size or --img-size"
    check_memory(images, f"{says} a batch would take", advice, there)
    if training and images * 64 > SMALL:  # a network keeps about that many numbers for each of an image
        kept = batch_size * _convolved(model, in_chans, img_size) * (2 if half else 4)
        check_memory(kept, f"{says} a training step of {model} would take", advice, there)


def _convolved(model: Specification, in_chans: int, img_size: int) -> int:
    """Numbers that convolutions give for one image, counted without computing anything; 0 where they cannot be."""
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
    except RuntimeError:  # an operator without an answer on the meta device
        return 0
    return count
