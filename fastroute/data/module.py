"""Images as a Lightning data module: small sets in memory, large ones decoded by workers."""

import os
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch import distributed as dist
from torchvision.transforms import v2

from fastroute.data.augment import channel_statistics, erase
from fastroute.data.in_memory import DATASETS, ImageSet, Options
from fastroute.data.loaders import Draws, EpochLoader, Finish, MemoryLoader, StreamLoader
from fastroute.data.sources import Source, folder_sources, tar_sources
from fastroute.data.transforms import (
    CROP_MODES,
    check_crop,
    eval_transform,
    policy,
    resize_size,
    train_transform,
    variation,
)

STREAMED = ("imagefolder", "webdataset")
ON_BAD_IMAGE = ("stop", "skip")
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
IN_MEMORY_SIZE = 64
"""The largest `img_size` at which an "imagefolder" is held in memory unless told otherwise."""


class ImageDataModule(pl.LightningDataModule):
    """Training and validation images, augmented as functions of the seed and the epoch.

    Small sets are held in memory on the training device and augmented a batch at a time: shifted by at most an eighth
    of their size (padded with black, then cut at random) and, where that makes sense, mirrored; they are normalised by
    the mean and standard deviation of the training images. Large ones are decoded and cropped by workers, and
    normalised on the device by ImageNet's mean and standard deviation.

    Batches are pairs of images, float32 (N, C, H, W) in channels_last strides, and labels, int64 (N,), or float32
    (N, classes) with `mixup` or `cutmix`. Every image is seen once an epoch, the last batch being smaller; where their
    number is no multiple of that of the processes, the last few of the order are left out. Order and
    augmentation are a function of `seed` and the epoch alone, so a resumed run sees what an uninterrupted one would
    have seen, from the batch at which it stopped. With several processes, each takes its share of every global batch of
    processes · batch_size; in validation each image is in exactly one share.

    Args:
        dataset: "digits", scikit-learn's handwritten digits (8×8, grey); "cifar10", "cifar100", "mnist", "stl10",
            torchvision's; "imagefolder", any tree with `train/<class>/*` and `val/<class>/*`; "webdataset", tar shards
            `train/*.tar` and `val/*.tar` or `*train*.tar` and `*val*.tar`, see `TarSource`.
        data_dir: the folder of the data; "data" by default for torchvision's sets.
        batch_size: images in a batch of one process.
        img_size: the height and width that images are scaled and cut to; by default the data set's own, 32 for an
            "imagefolder" and 224 for a "webdataset".
        num_workers: threads or processes that decode images, by default one for each core that this process can use.
        seed: of order and augmentation.
        in_memory: whether an "imagefolder" is held in memory, by default up to img_size 64.
        download: whether torchvision's sets may be downloaded.
        first_classes: only the first so many classes are used, such as ILSVRC2012's first 100 (§3.4.3).
        on_bad_image: an image that cannot be read is named, and then "stop" ends the run and "skip" leaves it out.
        train_crop_mode, scale, ratio, crop_pct: of images decoded by workers; see `train_transform`.
        aa: an automatic augmentation of single images; see `policy`.
        hflip, vflip: the probabilities that an image is mirrored left to right and upside down. By default hflip is
            0.5, and 0 for digits.
        color_jitter: the largest share by which brightness, contrast and saturation vary.
        no_aug: training images are augmented in no way, whatever else is asked for; those that workers decode are cut
            as for validation.
        reprob: the probability that an image has a rectangle erased.
        mixup, cutmix: α of the Beta distributions that batches are mixed with, 0.001 to 1,000,000, or 0 for none; with
            both, each mixes half of them.

    With the attribute `deferred`, training batches that are augmented on the device alone are the `Draws` for them, and
    `batch` makes the images: a training step then can hold that too.

    After `setup()`: `classes`, `num_classes`, `in_chans` and `img_size`; `mean` and `std` in units of the uint8 values.

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
        *,
        in_memory: bool | None = None,
        download: bool = False,
        first_classes: int | None = None,
        on_bad_image: str = "stop",
        train_crop_mode: str = "rrc",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        crop_pct: float = 0.875,
        aa: str | None = None,
        reprob: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        hflip: float | None = None,
        vflip: float = 0.0,
        color_jitter: float = 0.0,
        no_aug: bool = False,
    ):
        super().__init__()
        choices = {
            "dataset": (dataset, (*DATASETS, "webdataset")),
            "on_bad_image": (on_bad_image, ON_BAD_IMAGE),
            "train_crop_mode": (train_crop_mode, CROP_MODES),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
        for name, value in (("batch_size", batch_size), ("img_size", img_size), ("num_workers", num_workers)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name, value in (("reprob", reprob), ("crop_pct", crop_pct)):
            if not 0 <= value <= 1 or (name == "crop_pct" and value == 0):
                raise ValueError(f"{name} is {value}; it must be between 0 and 1")
        for name, value in (("hflip", hflip), ("vflip", vflip), ("color_jitter", color_jitter)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must be between 0 and 1")
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            if value != 0 and not 1e-3 <= value <= 1e6:  # beyond, what PyTorch draws is a constant
                raise ValueError(
                    f"{name} is {value}; it must be at least 0, and from 0.001 to 1,000,000 if it is not 0"
                )
        check_crop(scale, ratio)
        resize_size(img_size or 224, crop_pct)
        if dataset in STREAMED and data_dir is None:
            what = "train/ and val/" if dataset == "imagefolder" else "tar shards"
            raise ValueError(f"data_dir is None; the dataset {dataset!r} needs a folder with {what} in it")
        if aa is not None:
            policy(aa)
        self.dataset, self.data_dir = dataset, None if data_dir is None else Path(data_dir)
        self.batch_size, self.img_size, self.seed = batch_size, img_size, seed
        self.num_workers = num_workers or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if in_memory is None:
            in_memory = dataset != "webdataset" and (dataset != "imagefolder" or (img_size or 32) <= IN_MEMORY_SIZE)
        if in_memory != (dataset != "webdataset") and dataset != "imagefolder":
            raise ValueError(f"in_memory is {in_memory}; it can be chosen for the dataset 'imagefolder' alone")
        self.in_memory, self.download, self.first_classes = in_memory, download, first_classes
        self.on_bad_image, self.crop_pct = on_bad_image, crop_pct
        self.crop, self.aa = (train_crop_mode, scale, ratio, crop_pct), aa
        self.reprob, self.mixup, self.cutmix = reprob, mixup, cutmix
        self.hflip, self.vflip, self.color_jitter, self.no_aug = hflip, vflip, color_jitter, no_aug
        self.deferred = False
        self.images: ImageSet | None = None
        self.sources: dict[str, Source] | None = None
        self._loaders: list[EpochLoader] = []
        self._train_loader: EpochLoader | None = None
        self._place: dict | None = None

    def setup(self, stage: str | None = None) -> None:
        if self.images is not None or self.sources is not None:
            return
        if self.in_memory:
            options = (self.data_dir, self.img_size, self.num_workers, self.download, self.first_classes)
            self.images = DATASETS[self.dataset](Options(*options, self.on_bad_image))
            self.mean, self.std = channel_statistics(self.images.train.images)
            self.classes = self.images.classes
            _, self.img_size, _, self.in_chans = self.images.train.images.shape
        else:
            if self.dataset == "imagefolder":
                self.sources = folder_sources(self.data_dir, self.first_classes)
            else:
                self.sources = tar_sources(self.data_dir, self.first_classes, self.num_workers)
            self.mean, self.std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
            self.classes = self.sources["train"].classes
            self.img_size, self.in_chans = self.img_size or 224, 3
        self.num_classes = len(self.classes)

    @property
    def skipped(self) -> int:
        """How many images could not be read so far in this process, each time counted; in memory, in the first only."""
        if self.images is not None:  # every process has read all of them
            return self.images.skipped if not dist.is_initialized() or dist.get_rank() == 0 else 0
        return sum(loader.skipped for loader in self._loaders if isinstance(loader, StreamLoader))

    @property
    def varying(self) -> bool:
        """Whether training batches may lack images that cannot be read."""
        return not self.in_memory and self.on_bad_image == "skip"

    def batch(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """The training batch of what was drawn for it."""
        return self._train_loader.batch(draws)

    def state_dict(self) -> dict:
        """What a validation of the network needs to know of its data, and the place within the epoch."""
        return {
            "place": self._train_loader.state_dict() if self._train_loader else None,
            "dataset": self.dataset,
            "classes": self.classes,
            "first_classes": self.first_classes,
            "img_size": self.img_size,
            "in_chans": self.in_chans,
            "crop_pct": 1.0 if self.in_memory else self.crop_pct,
            "mean": self.mean,
            "std": self.std,
        }

    def load_state_dict(self, state: dict) -> None:
        """Have the training loader start at the place: what the images are is this run's own."""
        self._place = state["place"]

    def train_dataloader(self) -> EpochLoader:
        self._train_loader = self._training_images()
        if self._place is not None:
            # Lightning hands a loader its state too, but not where the schedule has asked for the number of steps.
            self._train_loader.load_state_dict(self._place)
            self._place = None
        return self._train_loader

    def _training_images(self) -> EpochLoader:
        if self.no_aug:
            return self._training_images_as_they_are()
        if self.images is not None:
            # Mirroring half of the images is part of how a batch is made; all else goes image by image.
            flip = self.images.flip if self.hflip in (None, 0.5) else False
            own = variation(0 if flip or self.hflip is None else self.hflip, self.vflip, self.color_jitter)
            own += [policy(self.aa)] if self.aa else []
            augmentation = {"pad": self.images.pad, "flip": flip, "augment": v2.Compose(own) if own else None}
            augmentation["deferred"] = self.deferred
            return self._memory_loader(self.images.train, self.seed, self._finish(), **augmentation)
        own = variation(0.5 if self.hflip is None else self.hflip, self.vflip, self.color_jitter)
        transform = train_transform(self.img_size, *self.crop, self.aa, variation=own)
        return self._stream_loader(self.sources["train"], transform, self.seed, self._finish())

    def _training_images_as_they_are(self) -> EpochLoader:
        if self.images is not None:
            return self._memory_loader(self.images.train, self.seed, deferred=self.deferred)
        return self._stream_loader(self.sources["train"], eval_transform(self.img_size, self.crop_pct), self.seed)

    def val_dataloader(self) -> EpochLoader:
        if self.images is not None:
            return self._memory_loader(self.images.val)
        return self._stream_loader(self.sources["val"], eval_transform(self.img_size, self.crop_pct))

    def _memory_loader(self, split, seed: int | None = None, finish: Finish | None = None, **augmentation):
        tensors = (tensor.to(self._device) for tensor in (*split, self.mean, self.std))
        loader = MemoryLoader(*tensors, *self._loader_arguments(seed, finish), **augmentation)
        return self._kept(loader)

    def _stream_loader(self, source: Source, transform, seed: int | None = None, finish: Finish | None = None):
        mean, std = self.mean.to(self._device), self.std.to(self._device)
        workers = {"num_workers": self.num_workers, "on_bad_image": self.on_bad_image}
        loader = StreamLoader(source, transform, mean, std, *self._loader_arguments(seed, finish), **workers)
        return self._kept(loader)

    def _kept(self, loader: EpochLoader) -> EpochLoader:
        self._loaders.append(loader)
        return loader

    def _loader_arguments(self, seed: int | None, finish: Finish | None) -> tuple:
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return self.batch_size, seed, self._epoch, rank, world_size, finish

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0

    def _finish(self) -> Finish | None:
        """Erasing and mixing of a normalised batch, or None where neither is asked for."""
        mixers = {v2.MixUp: self.mixup, v2.CutMix: self.cutmix}
        mixers = [mixer(alpha=alpha, num_classes=self.num_classes) for mixer, alpha in mixers.items() if alpha]
        if not mixers and not self.reprob:
            return None
        mix: Callable | None = v2.RandomChoice(mixers) if mixers else None

        def finish(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            if self.reprob:
                images = erase(images, self.reprob)
            return mix(images, labels) if mix else (images, labels)

        return finish
