"""Load batches of images from memory, or from workers that decode them.

Order and augmentation depend only on the seed, the epoch and the place in it. A loader therefore resumes within an
epoch by starting at a batch, and N processes together see what one process with N times the batch size would see. Only
what is drawn for a batch as a whole, as for mixup, or image by image in memory, differs between processes.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastroute._timeout import timeout
from fastroute.data.augment import normalize, shift_and_flip
from fastroute.data.decode import WAYS_ON, UnreadableImage
from fastroute.data.seeding import generator, seeded
from fastroute.data.sources import Source, read_image
from fastroute.data.transforms import pixels

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule

Finish = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Draws(NamedTuple):
    """Random draws for a training batch of images in memory; `MemoryLoader.batch` makes the batch.

    indices: int64 (N,), of the images.
    offsets, flips: see `shift_and_flip`.
    """

    indices: Tensor
    offsets: Tensor
    flips: Tensor


class PlaceMismatch(ValueError):
    """Raised when a run cannot resume within an epoch because its batches have changed."""


def shares(
    order: Tensor, batch_size: int, rank: int = 0, world_size: int = 1, *, training: bool = False
) -> tuple[Tensor, ...]:
    """Return one process's share of each global batch of world_size · batch_size samples.

    Shares are contiguous and of equal size. In the last batch they may differ by one sample or be empty, so that every
    process has the same number of batches and no sample occurs twice. In training, a last batch that would leave a
    process a single sample is merged with the one before: batch norm has no statistics of one sample.

    Args:
        order: (N,), int64, the samples of an epoch.
        batch_size: of one process.
        rank, world_size: this process, and the number of processes.
        training: whether to merge a last batch of single samples.

    Returns:
        a tensor of indices for each batch.
    """
    sizes = batch_sizes(len(order), batch_size, world_size, training=training)
    return tuple(batch.tensor_split(world_size)[rank] for batch in order.split(sizes))


def batch_sizes(count: int, batch_size: int, world_size: int = 1, *, training: bool = False) -> list[int]:
    """Return the number of samples in each global batch of an epoch; see `shares`."""
    whole, rest = divmod(count, batch_size * world_size)
    sizes = [batch_size * world_size] * whole + [rest] * (rest > 0)
    if training and 0 < rest <= world_size and whole and batch_size > 1:
        sizes[-2:] = [sum(sizes[-2:])]
    return sizes


class Epochs:
    """Number the epochs of training: as the trainer does while it runs, or in another loop by the passes so far.

    Args:
        module: its attribute `trainer` is Lightning's, or None.
    """

    def __init__(self, module: "LightningDataModule"):
        self.module, self.next = module, 0

    def __call__(self) -> int:
        """Return the number of the epoch that starts."""
        trainer = self.module.trainer
        epoch = trainer.current_epoch if trainer and trainer.state.status == "running" else self.next
        self.next = epoch + 1
        return epoch


class EpochLoader:
    """Base of loaders: the order of an epoch, this process's share of it, and the place to resume.

    Args:
        count: the number of images in an epoch.
        batch_size: of one process.
        seed: of shuffling and augmentation; None evaluates every image once, in order.
        epoch: returns the number of the epoch that starts.
        rank, world_size: this process, and the number of processes. In training, the last images of an epoch are left
            out if `count` is not a multiple of `world_size`, so that all processes have equally many.
        finish: the last transform of a training batch (images, labels), with its own seed of PyTorch's generator.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int | None,
        epoch: Callable[[], int],
        rank: int,
        world_size: int,
        finish: Finish | None,
    ):
        if seed is not None and count < world_size:
            raise ValueError(
                f"there are {count} images to train on; there must be one for each of {world_size} processes"
            )
        self.given = count
        self.count = count if seed is None else count - count % world_size
        self.batch_size, self.seed, self.epoch, self.finish = batch_size, seed, epoch, finish
        self.rank, self.world_size = rank, world_size
        self._start = self._done = self._epoch = 0
        self._resumed: dict | None = None  # the place of the next epoch, until it begins

    def __len__(self) -> int:
        return len(batch_sizes(self.count, self.batch_size, self.world_size, training=self.seed is not None))

    def shares(self, order: Tensor) -> tuple[Tensor, ...]:
        """Return this process's share of each batch of an epoch; see the function of the same name."""
        training = self.seed is not None
        return shares(order[: self.count], self.batch_size, self.rank, self.world_size, training=training)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch = self._epoch = self.epoch()
        self._resumed = None
        self._done, self._start = self._start, 0
        for batch in self.batches(epoch, self._done):
            if self.finish is not None:
                with seeded(self.seed, epoch, self._done, self.rank):
                    batch = self.finish(*batch)
            self._done += 1
            yield batch

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        """Iterate over normalised images and labels of an epoch, from batch `start` on."""
        raise NotImplementedError

    def pixels(self, indices: Tensor) -> Tensor:
        """Return unnormalised images by their place among those of an evaluation: uint8 (k, H, W, C), on the CPU."""
        raise NotImplementedError

    def state_dict(self) -> dict:
        """Return the place in the epoch, "done" of "batches" of "epoch", and what its order depends on."""
        place = {"done": self._done, "batches": len(self), "epoch": self._epoch}
        return self._resumed or place | self._order()

    def _order(self) -> dict:
        return {"count": self.given, "batch_size": self.batch_size * self.world_size, "seed": self.seed}

    def load_state_dict(self, state: dict) -> None:
        """Start the next epoch at a saved place.

        Raises:
            PlaceMismatch: the place is within an epoch of another number of batches or images, or another batch size or
                seed.
        """
        done, batches = state["done"], state["batches"]
        if done < batches and batches != len(self):
            raise PlaceMismatch(
                f"the run stopped at batch {done} of {batches} of an epoch, but now an epoch has {len(self)}: "
                "go on with the same data, batch_size and number of processes"
            )
        names = {"count": "number of images", "batch_size": "batch size of all processes", "seed": "seed"}
        for name, now in self._order().items() if 0 < done < batches else ():
            before = state.get(name, now)  # files of early versions have none
            if before != now:
                raise PlaceMismatch(
                    f"the run stopped within an epoch where the {names[name]} was {before}, but now it is {now}: some "
                    "images would come twice, and others never: go on with the same data, batch_size and seed"
                )
        self._start, self._resumed = done % batches, state
        if isinstance(self.epoch, Epochs) and done:
            self.epoch.next = state.get("epoch", 0) + (done == batches)


class MemoryLoader(EpochLoader):
    """Load batches of images in memory, on the device of the network.

    Args:
        images: uint8 (N, H, W, C).
        labels: int64 (N,).
        mean, std: (C,), in units of the uint8 values.
        loader_arguments: of `EpochLoader`, without count.
        pad, flip: in training, the largest shift in pixels and whether images are mirrored; see `shift_and_flip`.
        augment: in training, a further transform of each image, uint8 (C, H, W).
        deferred: in training without `augment` and `finish`, yield the `Draws` for `batch` instead of batches.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Tensor,
        std: Tensor,
        *loader_arguments,
        pad: int = 0,
        flip: bool = False,
        augment: Callable[[Tensor], Tensor] | None = None,
        deferred: bool = False,
    ):
        super().__init__(len(labels), *loader_arguments)
        self.images, self.labels, self.mean, self.std = images, labels, mean, std
        self.pad, self.flip, self.augment = pad, flip, augment
        self.deferred = deferred and augment is None and self.finish is None

    def pixels(self, indices: Tensor) -> Tensor:
        return self.images[indices.to(self.images.device)].cpu()

    def batch(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Make normalised images and labels on the device, without synchronising with it."""
        return normalize(self._shifted(draws), self.mean, self.std), self.labels[draws.indices]

    def _shifted(self, draws: Draws) -> Tensor:
        return shift_and_flip(self.images[draws.indices], draws.offsets, draws.flips, self.pad)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        if self.seed is None:
            for indices in self.shares(torch.arange(self.count))[start:]:
                first, last = (int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, 0)
                yield normalize(self.images[first:last], self.mean, self.std), self.labels[first:last]
            return
        # Draw all random numbers of an epoch at once, so that a step on a GPU does not wait for the host.
        count, draw = len(self.labels), generator(self.seed, epoch)
        order = torch.randperm(count, generator=draw)
        offsets = torch.randint(0, 2 * self.pad + 1, (count, 2), generator=draw)
        flips = (torch.rand(count, generator=draw) < 0.5) & self.flip
        shares = [self.shares(values.to(self.images.device))[start:] for values in (order, offsets, flips)]
        for i, draws in enumerate(itertools.starmap(Draws, zip(*shares, strict=True)), start):
            if self.deferred:
                yield draws
            elif self.augment is None:
                yield self.batch(draws)
            else:
                images = self._shifted(draws)
                with seeded(self.seed, epoch, i, self.rank, 1):
                    images = torch.stack([self.augment(image.movedim(-1, 0)) for image in images]).movedim(1, -1)
                yield normalize(images, self.mean, self.std), self.labels[draws.indices]


class StreamLoader(EpochLoader):
    """Load batches of images that workers read, decode and crop, and normalise them on the device.

    Args:
        source: the encoded images.
        transform: PIL image → PIL image, or a tuple of crops, all of one size.
        mean, std: (C,), in units of the uint8 values, on the device of the network.
        loader_arguments: of `EpochLoader`, without count.
        num_workers: the number of processes that decode; 0 decodes in this one.
        channels: 3 for colour, 1 for grey.
        on_bad_image: "stop" raises at an image that cannot be read; "skip" leaves it out of its batch, warns, and
            counts it in `skipped`.

    Raises:
        UnreadableImage: with "stop", an image cannot be read; with "skip", no image of a training batch can, or none of
            this process's share in an evaluation.
        RuntimeError: a worker does not answer within the seconds in `FASTROUTE_TIMEOUT`, by default half an hour.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable,
        mean: Tensor,
        std: Tensor,
        *loader_arguments,
        num_workers: int = 0,
        channels: int = 3,
        on_bad_image: str = "stop",
    ):
        super().__init__(len(source), *loader_arguments)
        self.source, self.transform, self.mean, self.std = source, transform, mean, std
        self.on_bad_image, self.skipped, self.channels = on_bad_image, 0, channels
        self._sampler = _Sampler()
        self._read: list[int] | None = None  # the indices of the images that an evaluation has read
        self.loader = DataLoader(
            _Decoded(source, transform, self.seed, channels),
            batch_sampler=self._sampler,
            num_workers=num_workers,
            collate_fn=_collate,
            pin_memory=mean.device.type == "cuda",
            persistent_workers=num_workers > 0 and self.seed is not None,
            prefetch_factor=4 if num_workers else None,
            timeout=timeout().total_seconds() if num_workers else 0,
        )

    def pixels(self, indices: Tensor) -> Tensor:
        places = [i if self._read is None else self._read[i] for i in indices.tolist()]
        images = [pixels(read_image(self.source, i, self.transform, self.channels)) for i in places]
        return torch.from_numpy(np.stack(images))

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        training = self.seed is not None
        order = self.source.order(generator(self.seed, epoch)) if training else torch.arange(self.count)
        self._sampler.batches = [[(epoch, int(i)) for i in indices] for indices in self.shares(order)[start:]]
        read, first, places = 0, None, []
        if not training:
            self._read = places
        for (images, labels, unreadable, kept), batch in zip(self.loader, self._sampler.batches, strict=True):
            read, first = read + len(labels), first or next(iter(unreadable), None)
            if unreadable and self.on_bad_image == "stop":
                raise UnreadableImage(f"{unreadable[0]}; {WAYS_ON}")
            for message in unreadable:
                self.skipped += 1
                warnings.warn(f"{message}; it is skipped", stacklevel=2)
            if not training:
                places += [batch[i][1] for i in kept]
            if unreadable and not len(labels):
                if not training:
                    continue
                raise UnreadableImage(f"none of the {len(unreadable)} images of a batch can be read: {unreadable[0]}")
            images, labels = (t.to(self.mean.device, non_blocking=True) for t in (images, labels))
            yield self._normalize(images), labels
        if first and not read and not start and self.world_size == 1:
            raise UnreadableImage(f"none of the {self.count:,} images can be read: {first}")

    def _normalize(self, images: Tensor) -> Tensor:
        if images.dim() == 4:
            return normalize(images, self.mean, self.std)
        return normalize(images.flatten(0, 1), self.mean, self.std).unflatten(0, images.shape[:2])


class _Sampler:
    """The batches of the next epoch, as lists of (epoch, index), from which persistent workers learn the epoch."""

    def __init__(self):
        self.batches: list[list[tuple[int, int]]] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)


class _Decoded(Dataset):
    """Map (epoch, index) to (uint8 (H, W, C) or (crops, H, W, C), label), or the message of an `UnreadableImage`."""

    def __init__(self, source: Source, transform: Callable, seed: int | None, channels: int):
        self.source, self.transform, self.seed, self.channels = source, transform, seed, channels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: tuple[int, int]) -> tuple[np.ndarray, int] | str:
        epoch, index = place
        try:
            with seeded(self.seed or 0, epoch, index):
                image = read_image(self.source, index, self.transform, self.channels)
            return pixels(image), int(self.source.labels[index])
        except UnreadableImage as error:
            return str(error)


def _collate(items: list[tuple[np.ndarray, int] | str]) -> tuple[Tensor, Tensor, list[str], list[int]]:
    """Return images, labels, the messages of what could not be read, and the places of the images in the batch."""
    unreadable = [item for item in items if isinstance(item, str)]
    read = {i: item for i, item in enumerate(items) if not isinstance(item, str)}
    images = np.stack([image for image, _ in read.values()]) if read else np.zeros((0, 1, 1, 3), np.uint8)
    labels = torch.tensor([label for _, label in read.values()], dtype=torch.long)
    return torch.from_numpy(images), labels, unreadable, list(read)
