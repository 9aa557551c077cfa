"""Small image sets in memory, as a Lightning data module."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from fastroute.training.augment import channel_statistics, normalize, shift_and_flip
from fastroute.training.datasets import DATASETS, Split


class ImageDataModule(pl.LightningDataModule):
    """A small image set, held in memory on the training device and augmented a batch at a time.

    Training images are shifted (padded with black, then cut at random) and, where that makes sense, mirrored; all are
    normalised by the mean and standard deviation of the training images. Batches are pairs of images, float32
    (N, C, H, W) in channels_last strides, and labels, int64 (N,). Every image is seen once an epoch, the last batch
    being smaller. Order and augmentation are a function of `seed` and the epoch alone, so a resumed run sees what an
    uninterrupted one would have seen.

    Args:
        dataset: "digits", scikit-learn's handwritten digits (8×8, grey; shifted by at most a pixel, not mirrored), or
            "imagefolder", any tree with `train/<class>/*` and `val/<class>/*` (RGB, 32×32 by default; shifted by at
            most an eighth of the size, and mirrored).
        data_dir: the folder of an "imagefolder".
        batch_size: images in a batch.
        img_size: the height and width that images are scaled and cut to; by default the data set's own.
        num_workers: threads that decode the images; by default one for each core.
        seed: of order and augmentation.

    After `setup()`: `classes`, `num_classes`, `in_chans` and `img_size`.

    Raises:
        FileNotFoundError: at `setup()`, a folder is missing or has no images.
        ValueError: an argument is out of range or unknown; at `setup()`, the folders' classes differ, or an image
            cannot be read.
    """

    def __init__(
        self,
        dataset: str = "digits",
        data_dir: str | Path | None = None,
        batch_size: int = 128,
        img_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if dataset not in DATASETS:
            raise ValueError(f"dataset is {dataset!r}; it must be one of {', '.join(map(repr, DATASETS))}")
        for name, value in (("batch_size", batch_size), ("img_size", img_size), ("num_workers", num_workers)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.dataset, self.data_dir = dataset, None if data_dir is None else Path(data_dir)
        self.batch_size, self.img_size, self.seed = batch_size, img_size, seed
        self.num_workers = num_workers or os.cpu_count()
        self.images = None

    def setup(self, stage: str | None = None) -> None:
        if self.images is not None:
            return
        self.images = DATASETS[self.dataset](self.data_dir, self.img_size, self.num_workers)
        self.mean, self.std = channel_statistics(self.images.train.images)
        self.classes = self.images.classes
        self.num_classes = len(self.classes)
        _, self.img_size, _, self.in_chans = self.images.train.images.shape

    def train_dataloader(self) -> "MemoryLoader":
        return self._loader(self.images.train, self._epoch_generator, self.images.pad, self.images.flip)

    def val_dataloader(self) -> "MemoryLoader":
        return self._loader(self.images.val)

    def _loader(self, split: Split, *augmentation) -> "MemoryLoader":
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        tensors = (tensor.to(device) for tensor in (*split, self.mean, self.std))
        return MemoryLoader(*tensors, self.batch_size, *augmentation)

    def _epoch_generator(self) -> torch.Generator:
        epoch = self.trainer.current_epoch if self.trainer else 0
        # A sum of seed and epoch would give run 0's second epoch to run 1 as its first.
        state = np.random.SeedSequence((self.seed, epoch)).generate_state(1)
        return torch.Generator().manual_seed(int(state[0]))


class MemoryLoader:
    """Batches of images that lie in memory: in order as they are, or, given a generator, shuffled and augmented."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Tensor,
        std: Tensor,
        batch_size: int,
        generator: Callable[[], torch.Generator] | None = None,
        pad: int = 0,
        flip: bool = False,
    ):
        self.images, self.labels, self.mean, self.std = images, labels, mean, std
        self.batch_size, self.generator, self.pad, self.flip = batch_size, generator, pad, flip

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.generator is None:
            for images, labels in zip(*(t.split(self.batch_size) for t in (self.images, self.labels)), strict=True):
                yield normalize(images, self.mean, self.std), labels
            return
        # An epoch's random numbers are drawn at once, so that a step on a GPU waits for nothing from the host.
        count, generator = len(self.labels), self.generator()
        order = torch.randperm(count, generator=generator)
        offsets = torch.randint(0, 2 * self.pad + 1, (count, 2), generator=generator)
        flips = (torch.rand(count, generator=generator) < 0.5) & self.flip
        draws = (draw.to(self.images.device).split(self.batch_size) for draw in (order, offsets, flips))
        for indices, shifts, mirrored in zip(*draws, strict=True):
            images = shift_and_flip(self.images[indices], shifts, mirrored, self.pad)
            yield normalize(images, self.mean, self.std), self.labels[indices]
