"""A Lightning data module of images: small sets in memory, large ones decoded by workers."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch import distributed as dist
from torchvision.transforms import v2

from fastroute._defaults import CROP_PCT
from fastroute._plain import takes_plain_values
from fastroute._processors import processors
from fastroute.data.augment import channel_statistics, erase
from fastroute.data.class_names import read_class_map
from fastroute.data.decode import ON_BAD_IMAGE
from fastroute.data.in_memory import DATASETS, ImageSet, Options
from fastroute.data.layout import TORCHVISION, choose
from fastroute.data.loaders import Draws, EpochLoader, Epochs, Finish, MemoryLoader, PlaceMismatch, StreamLoader
from fastroute.data.sources import Reading, Source, folder_sources, tar_sources
from fastroute.data.tar import shown, some
from fastroute.data.transforms import (
    CROP_MODES,
    INTERPOLATIONS,
    check_crop,
    eval_transform,
    policy,
    resize_size,
    train_transform,
    variation,
)

STREAMED = ("imagefolder", "webdataset")
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
IN_MEMORY_SIZE = 64
"""The largest `img_size` at which an "imagefolder" is held in memory by default."""


class ImageDataModule(pl.LightningDataModule):
    """Load training and validation images, augmented as a function of the seed and the epoch.

    Small sets are held in memory on the training device and augmented a batch at a time: shifted by at most an eighth
    of their size (padded with black, then cropped at random) and, unless they are digits, mirrored. They are normalised
    by the mean and standard deviation of the training images. Large sets are decoded and cropped by workers, and
    normalised on the device by ImageNet's mean and standard deviation.

    Batches are pairs of images, float32 (N, C, H, W) in channels_last strides, and labels, int64 (N,), or float32
    (N, classes) with `mixup` or `cutmix`. An epoch has every image once; its last batch may be smaller. The last images
    of the order are left out if the number of images is not a multiple of the number of processes. Order and
    augmentation depend only on `seed` and the epoch, so a resumed run sees the same batches as an uninterrupted one.
    With several processes, each takes its share of every global batch of processes · batch_size; in validation each
    image is in exactly one share.

    Args:
        dataset: None or "auto" takes what `data_dir` holds, and without `data_dir` "digits", scikit-learn's handwritten
            digits (8×8, grey). "cifar10", "cifar100", "mnist" and "stl10" are torchvision's. "imagefolder" is a tree
            `train/<class>/*` and `val/<class>/*`, or with `val_split` just `<class>/*`. "webdataset" is tar shards
            `train/*.tar` and `val/*.tar`, or `*train*.tar` and `*val*.tar`; see `TarSource`.
        data_dir: the folder of the data, a tar file, or a pattern of tar files such as `train-{0000..0127}.tar`; "data"
            by default for torchvision's sets.
        batch_size: the number of images in a batch of one process.
        img_size: the height and width to which images are scaled and cropped, in pixels; by default the data set's own,
            32 for an "imagefolder" in memory, and 224 for streamed images.
        num_workers: the number of threads or processes that decode images, by default one for each available core,
            shared by the processes of a machine; 0 decodes in the process that trains, as in PyTorch's `DataLoader`.
        seed: of order and augmentation.
        in_memory: whether an "imagefolder" is held in memory, by default up to img_size 64.
        download: whether torchvision's sets may be downloaded.
        first_classes: the number of classes to use, the first ones, such as ILSVRC2012's first 100 (§3.4.3).
        on_bad_image: "stop" raises at an image that cannot be read; "skip" leaves it out and warns.
        train_crop_mode, scale, ratio, crop_pct: of images decoded by workers; see `train_transform`.
        aa: an automatic augmentation of single images; see `policy`.
        hflip, vflip: the probabilities of mirroring an image left to right and upside down. By default hflip is 0.5,
            and 0 for digits.
        color_jitter: the largest relative change of brightness, contrast and saturation.
        no_aug: do not augment training images, whatever the other arguments say; workers crop them as for validation.
        reprob: the probability of erasing a rectangle of an image.
        mixup, cutmix: α of the Beta distributions by which batches are mixed, 0.001 to 1,000,000; 0 mixes none. With
            both, each mixes half of the batches.
        val_split: the share of the training images of each class to set aside, by the seed, as validation images; the
            data's own are then not used. 0 sets none aside.
        class_map: for folders and shards, a text file with the names of the classes, one a line, in the order of their
            numbers; folders that it does not name are left out.
        input_key: for shards with several images of one label; see `TarSource`.
        mean, std: of each channel, or one number for all, for images from 0 to 1.
        interpolation: of scaling: "bilinear", "bicubic" or "nearest".
        in_chans: 3 for colour, 1 for grey; by default the data's own, and 3 for folders and shards.

    With the attribute `deferred`, training batches that are augmented only on the device are yielded as `Draws`, from
    which `batch` makes the images, so that a captured training step can include this.

    Order and augmentation are functions of the seed and the epoch. While a trainer runs, it is the trainer's; in
    another loop, each pass over training batches is one.

    After `setup()`, the attributes `classes`, `num_classes`, `in_chans` and `img_size` are those of the data, `mean`
    and `std` are in units of the uint8 values, and `description` is a line about the data.

    Raises:
        FileNotFoundError: a folder is missing or has no images: at `setup()`, or at once if the folder must tell the
            `dataset`.
        ValueError: an argument is out of range or unknown; at `setup()`, the folders' classes differ, or an image
            cannot be read.

    Example:
        >>> data = ImageDataModule("digits", batch_size=64)
        >>> data.setup()
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, data.num_classes
        (torch.Size([64, 1, 8, 8]), 10)
    """

    @takes_plain_values
    def __init__(
        self,
        dataset: str | None = None,
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
        scale: tuple[float, float] | None = None,
        ratio: tuple[float, float] | None = None,
        crop_pct: float = CROP_PCT,
        aa: str | None = None,
        reprob: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        hflip: float | None = None,
        vflip: float = 0.0,
        color_jitter: float = 0.0,
        no_aug: bool = False,
        val_split: float = 0.0,
        class_map: str | Path | None = None,
        input_key: str | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        interpolation: str = "bilinear",
        in_chans: int | None = None,
    ):
        super().__init__()
        if dataset in (None, "auto"):
            dataset = "digits" if data_dir is None else choose(Path(data_dir), any_split=val_split > 0).dataset
        choices = {
            "dataset": (dataset, (*DATASETS, "webdataset")),
            "on_bad_image": (on_bad_image, ON_BAD_IMAGE),
            "train_crop_mode": (train_crop_mode, CROP_MODES),
            "interpolation": (interpolation, INTERPOLATIONS),
            "in_chans": (in_chans, (None, 1, 3)),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("img_size", img_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
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
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; it must be from 0 to 2⁶⁴ − 1")
        if not 0 <= val_split < 1:
            raise ValueError(f"val_split is {val_split}; it must be at least 0 and below 1")
        if dataset == "digits" and data_dir is not None:
            raise ValueError(f"data_dir is {data_dir}; the dataset 'digits' is scikit-learn's own and reads no folder")
        if class_map is not None and dataset not in STREAMED:
            raise ValueError(f"class_map is {class_map}; the classes of {dataset!r} have names of their own")
        if input_key is not None and dataset != "webdataset":
            raise ValueError(f"input_key is {input_key!r}; it is for tar shards, not {dataset!r}")
        given = {"mean": _levels("mean", mean, -100, 100), "std": _levels("std", std, 1e-6, 100)}
        check_crop(scale, ratio)
        resize_size(img_size or 224, crop_pct)
        if dataset in STREAMED and data_dir is None:
            what = "train/ and val/" if dataset == "imagefolder" else "tar shards"
            raise ValueError(f"data_dir is None; the dataset {dataset!r} needs a folder with {what} in it")
        if aa is not None:
            policy(aa)
        self.dataset, self.data_dir = dataset, None if data_dir is None else Path(data_dir)
        self.batch_size, self.img_size, self.seed = batch_size, img_size, seed
        if num_workers is None:
            num_workers = max(1, processors() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.num_workers = num_workers
        if in_memory is None:
            in_memory = dataset != "webdataset" and (dataset != "imagefolder" or (img_size or 32) <= IN_MEMORY_SIZE)
        if in_memory != (dataset != "webdataset") and dataset != "imagefolder":
            raise ValueError(f"in_memory is {in_memory}; it can be chosen for the dataset 'imagefolder' alone")
        self.in_memory, self.download, self.first_classes = in_memory, download, first_classes
        self.on_bad_image, self.crop_pct = on_bad_image, crop_pct
        self.crop, self.aa = (train_crop_mode, scale, ratio, crop_pct), aa
        self.reprob, self.mixup, self.cutmix = reprob, mixup, cutmix
        self.hflip, self.vflip, self.color_jitter, self.no_aug = hflip, vflip, color_jitter, no_aug
        self.val_split, self.interpolation, self._chosen_chans, self._given = val_split, interpolation, in_chans, given
        self.class_map, self.input_key = class_map, input_key
        self.deferred = False
        self.images: ImageSet | None = None
        self.sources: dict[str, Source] | None = None
        self._loaders: list[EpochLoader] = []
        self._train_loader: EpochLoader | None = None
        self._epochs = Epochs(self)
        self._place: dict | None = None

    def setup(self, stage: str | None = None) -> None:
        if self.images is not None or self.sources is not None:
            return
        root = self.data_dir
        if root is not None and (self.dataset in STREAMED or root.exists()):
            root = choose(root, self.dataset, any_split=self.val_split > 0 or self.dataset not in STREAMED).root
        class_map = None if self.class_map is None else read_class_map(Path(self.class_map))
        if self.in_memory:
            options = Options(
                root,
                self.img_size,
                self.num_workers,
                self.download,
                self.first_classes,
                self.on_bad_image,
                val_split=self.val_split,
                seed=self.seed,
                class_map=class_map,
                interpolation=self.interpolation,
                in_chans=self._chosen_chans,
            )
            self.images = DATASETS[self.dataset](options)
            mean, std = channel_statistics(self.images.train.images)
            self.classes = self.images.classes
            _, self.img_size, _, self.in_chans = self.images.train.images.shape
        else:
            reading = Reading(
                self.first_classes, self.num_workers, self.val_split, self.seed, class_map, self.input_key
            )
            read = folder_sources if self.dataset == "imagefolder" else tar_sources
            self.sources = read(root, reading)
            self.classes = self.sources["train"].classes
            self.img_size, self.in_chans = self.img_size or 224, self._chosen_chans or 3
            mean, std = imagenet_statistics(self.in_chans)
        self.mean = channels_of("mean", self._given["mean"], mean)
        self.std = channels_of("std", self._given["std"], std)
        self.num_classes = len(self.classes)

    @property
    def description(self) -> str:
        """The data, in a line; after `setup()`."""
        train, val = self.train_count, len(self._labels("val"))
        where = f" in {shown(self.data_dir)}" if self.data_dir is not None else ""
        aside = f", {self.val_split:.0%} of each class set aside by seed {self.seed}" if self.val_split else ""
        colour = "grey" if self.in_chans == 1 else "colour"
        held = "in memory" if self.in_memory else "decoded by workers"
        return (
            f"{self.dataset}{where}: {train:,} images to train and {val:,} to validate on{aside}; {self.num_classes:,} "
            f"classes, {colour}, {self.img_size}×{self.img_size}, {held}"
        )

    @property
    def train_count(self) -> int:
        """The number of images in an epoch; after `setup()`."""
        return len(self._labels("train"))

    def _labels(self, split: str) -> Tensor:
        return (getattr(self.images, split) if self.images is not None else self.sources[split]).labels

    @property
    def skipped(self) -> int:
        """The number of unreadable images that this process has met so far; an image counts each time it is read.

        For images in memory, which every process reads, rank 0 has the number and the others have 0.
        """
        if self.images is not None:  # every process has read all images
            return self.images.skipped if not dist.is_initialized() or dist.get_rank() == 0 else 0
        return sum(loader.skipped for loader in self._loaders if isinstance(loader, StreamLoader))

    @property
    def varying(self) -> bool:
        """Whether training batches may lack images that cannot be read."""
        return not self.in_memory and self.on_bad_image == "skip"

    def batch(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Make a training batch from its draws: normalised images (N, C, H, W) in float32, and their labels."""
        return self._train_loader.batch(draws)

    def state_dict(self) -> dict:
        """Return what validating the network needs to know of its data, and the place in the epoch."""
        return {
            "place": self._train_loader.state_dict() if self._train_loader else self._place,
            "dataset": self.dataset,
            "classes": self.classes,
            "first_classes": self.first_classes,
            "img_size": self.img_size,
            "in_chans": self.in_chans,
            "crop_pct": 1.0 if self.in_memory else self.crop_pct,
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
            "data_dir": self._absolute_dir(),
            "val_split": self.val_split,
            "split_seed": self.seed,
            "train_count": self.train_count,
            "val_count": len(self._labels("val")),
            "input_key": self.input_key,
            "class_map": self.class_map is not None,
            "on_bad_image": self.on_bad_image,
        }

    def _absolute_dir(self) -> str | None:
        folder = self.data_dir or (Path("data") if self.dataset in TORCHVISION else None)
        return None if folder is None else os.path.abspath(folder)

    def load_state_dict(self, state: dict) -> None:
        """Start the training loader at the place in `state`, from `state_dict`; all else stays as this run has it.

        Raises:
            PlaceMismatch: the saved run had other classes or another normalisation, or set other images aside for
                validation, which would now be trained on; or it stopped within an epoch of another order.
        """
        share, seed = state.get("val_split", 0.0), state.get("split_seed", self.seed)
        if share != self.val_split or (share and seed != self.seed):
            raise PlaceMismatch(
                f"the run set val_split={share} aside by seed {seed}, but now val_split is {self.val_split} and seed "
                f"{self.seed}, which would train on validation images of the run: resume with the same val_split and "
                "seed"
            )
        self.setup()
        if (classes := state.get("classes", self.classes)) != self.classes:
            raise PlaceMismatch(
                f"the run had the classes {_counted(classes)}, but now they are {_counted(self.classes)}: resume with "
                "the data of the run"
            )
        counts = self.train_count, len(self._labels("val"))
        before = state.get("train_count", counts[0]), state.get("val_count", counts[1])
        if share and before != counts:
            raise PlaceMismatch(
                f"the run trained on {before[0]:,} images and set {before[1]:,} aside, but now these are {counts[0]:,} "
                f"and {counts[1]:,}: with files added or removed, others are set aside, and validation images of the "
                "run would be trained on: resume with the same files"
            )
        for name, now in (("mean", self.mean), ("std", self.std)):
            before = state.get(name, now)
            if before.shape != now.shape or ((before - now).abs() > 0.01 * self.std).any():
                raise PlaceMismatch(
                    f"the run normalised images by {name} {_values(before)}, but now {name} is {_values(now)}, where "
                    "images are 0 to 1: resume with the data, mean and std of the run"
                )
        place = state["place"]
        if place is not None and 0 < place["done"] < place["batches"] and seed != self.seed:
            raise PlaceMismatch(
                f"the run stopped within an epoch in the order of seed {seed}, but now seed is {self.seed}: some "
                f"images would come twice, and others never: resume with seed {seed}"
            )
        self._place = place

    def on_exception(self, exception: BaseException) -> None:
        self.deferred, self._place = False, None  # other loops take batches

    def teardown(self, stage: str | None = None) -> None:
        if stage != "fit":  # Lightning restores it for validation too, and the next training must not begin there
            self._place = None

    def train_dataloader(self) -> EpochLoader:
        """Return the loader of training batches, at the saved place if there is one."""
        self._check_set_up()
        self._train_loader = self._training_images()
        place, self._place = self._place, None
        if place is not None:
            # Lightning also loads a loader's state, but not if the schedule has asked for the number of steps.
            self._train_loader.load_state_dict(place)
        return self._train_loader

    def _training_images(self) -> EpochLoader:
        if self.no_aug:
            return self._training_images_as_they_are()
        if self.images is not None:
            # Mirroring half of the images is done for the whole batch; all else is done image by image.
            flip = self.images.flip if self.hflip in (None, 0.5) else False
            own = variation(0 if flip or self.hflip is None else self.hflip, self.vflip, self.color_jitter)
            own += [policy(self.aa)] if self.aa else []
            augmentation = {"pad": self.images.pad, "flip": flip, "augment": v2.Compose(own) if own else None}
            augmentation["deferred"] = self.deferred
            return self._memory_loader(self.images.train, self.seed, self._finish(), **augmentation)
        own = variation(0.5 if self.hflip is None else self.hflip, self.vflip, self.color_jitter)
        transform = train_transform(self.img_size, *self.crop, self.aa, self.interpolation, own)
        return self._stream_loader(self.sources["train"], transform, self.seed, self._finish())

    def _training_images_as_they_are(self) -> EpochLoader:
        if self.images is not None:
            return self._memory_loader(self.images.train, self.seed, deferred=self.deferred)
        return self._stream_loader(self.sources["train"], self._eval_transform(), self.seed)

    def val_dataloader(self) -> EpochLoader:
        """Return the loader of validation batches."""
        self._check_set_up()
        if self.images is not None:
            return self._memory_loader(self.images.val)
        return self._stream_loader(self.sources["val"], self._eval_transform())

    def _check_set_up(self) -> None:
        if self.images is None and self.sources is None:
            raise RuntimeError("the images are not read yet: call setup() first")

    def _eval_transform(self) -> Callable:
        return eval_transform(self.img_size, self.crop_pct, interpolation=self.interpolation)

    def _memory_loader(self, split, seed: int | None = None, finish: Finish | None = None, **augmentation):
        tensors = (tensor.to(self._device) for tensor in (*split, self.mean, self.std))
        loader = MemoryLoader(*tensors, *self._loader_arguments(seed, finish), **augmentation)
        return self._kept(loader)

    def _stream_loader(self, source: Source, transform, seed: int | None = None, finish: Finish | None = None):
        mean, std = self.mean.to(self._device), self.std.to(self._device)
        workers = {
            "num_workers": self.num_workers,
            "channels": self.in_chans,
            "on_bad_image": self.on_bad_image,
        }
        loader = StreamLoader(source, transform, mean, std, *self._loader_arguments(seed, finish), **workers)
        return self._kept(loader)

    def _kept(self, loader: EpochLoader) -> EpochLoader:
        self._loaders.append(loader)
        return loader

    def _loader_arguments(self, seed: int | None, finish: Finish | None) -> tuple:
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        epoch = int if seed is None else self._epochs  # int() is 0
        return self.batch_size, seed, epoch, rank, world_size, finish

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _finish(self) -> Finish | None:
        """Return the function that erases and mixes a normalised batch, or None."""
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


def imagenet_statistics(channels: int) -> tuple[Tensor, Tensor]:
    """Return ImageNet's mean and standard deviation of each channel, averaged over channels for grey images."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (mean, std) if channels == 3 else (mean.mean(0, keepdim=True), std.mean(0, keepdim=True))


def _levels(name: str, value: float | Sequence[float] | None, low: float, high: float) -> Tensor | None:
    """Convert values given for images from 0 to 1 to units of the uint8 values."""
    if value is None:
        return None
    numbers = [value] if isinstance(value, int | float) else list(value)
    if len(numbers) not in (1, 3) or not all(isinstance(v, int | float) and low <= v <= high for v in numbers):
        raise ValueError(
            f"{name} is {value}; it must be one number, or three, from {low:g} to {high:g}, where images are 0 to 1"
        )
    return 255 * torch.tensor(numbers, dtype=torch.float32)


def _counted(classes: list[str]) -> str:
    return f"{some(classes)} ({len(classes):,})"


def _values(levels: Tensor) -> str:
    return ", ".join(f"{value / 255:.3f}" for value in levels.tolist())


def channels_of(name: str, given: Tensor | None, found: Tensor) -> Tensor:
    """Return the given levels, or else those found in the data, as a number for each channel."""
    if given is None:
        return found
    if len(given) not in (1, len(found)):
        raise ValueError(f"{name} has {len(given)} numbers; the images have {len(found)} channels")
    return given.expand(len(found)).clone()
