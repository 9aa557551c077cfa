"""Small image sets, decoded once into memory."""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as TF

from fastroute._memory import machine_memory
from fastroute.data.decode import WAYS_ON, UnreadableImage
from fastroute.data.sources import Reading, Source, TarSource, folder_sources, read_image, stratified
from fastroute.data.transforms import check_scaled, pixels


class Split(NamedTuple):
    """Images uint8 (N, H, W, C), and labels int64 (N,)."""

    images: Tensor
    labels: Tensor


class ImageSet(NamedTuple):
    """A data set in memory.

    pad: the largest shift of a training image, in pixels.
    flip: whether training images may be mirrored.
    skipped: the number of files that could not be read.
    """

    train: Split
    val: Split
    classes: list[str]
    pad: int
    flip: bool
    skipped: int = 0


@dataclass(frozen=True)
class Options:
    """Options of reading a data set; see `ImageDataModule`.

    With `train_only` or a `val_split`, torchvision's own validation images are not read, and may be missing. With
    `in_chans=None`, images keep their channels.
    """

    data_dir: Path | None = None
    img_size: int | None = None
    num_workers: int = 1
    download: bool = False
    first_classes: int | None = None
    on_bad_image: str = "stop"
    train_only: bool = False
    val_split: float = 0.0
    seed: int = 0
    class_map: Sequence[str] | None = None
    interpolation: str = "bilinear"
    in_chans: int | None = None

    @property
    def reading(self) -> Reading:
        """The options of sources."""
        return Reading(self.first_classes, self.num_workers, self.val_split, self.seed, self.class_map)


def digits(options: Options) -> ImageSet:
    """Load scikit-learn's 1,797 handwritten digits, 8×8 and grey, in a fixed stratified split of 1,437 and 360.

    They stay 8×8 by default, since a network's cost grows with the square of the size. Shifts are of at most one pixel,
    an eighth of the image, as CIFAR's four of 32. Digits are not mirrored.
    """
    source = load_digits()
    images = torch.from_numpy(source.images * (255 / 16)).to(torch.float32)[:, None]
    size = options.img_size or images.shape[-1]
    if size != images.shape[-1] and options.interpolation == "bilinear":
        images = F.interpolate(images, size=(size, size), mode="bilinear")
    images = _scaled(images.round().to(torch.uint8).permute(0, 2, 3, 1), options)
    labels = torch.from_numpy(source.target).long()
    train, val = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=source.target, random_state=0)
    splits = [Split(images[part], labels[part]) for part in (train, val)]
    return _image_set(splits, [str(name) for name in source.target_names], options, flip=False)


def cifar10(options: Options) -> ImageSet:
    """Load CIFAR-10: 50,000 and 10,000 images, 32×32, to be shifted by at most four pixels and mirrored (§3.4.1)."""
    return _cifar(torchvision.datasets.CIFAR10, options)


def cifar100(options: Options) -> ImageSet:
    """Load CIFAR-100; see `cifar10`."""
    return _cifar(torchvision.datasets.CIFAR100, options)


class MNIST(torchvision.datasets.MNIST):
    """torchvision's MNIST, but it needs only the files of its split, and checks that they are complete."""

    @property
    def _files(self) -> list[Path]:
        half, raw = "train" if self.train else "t10k", Path(self.raw_folder)
        return [raw / f"{half}-{part}-ubyte" for part in ("images-idx3", "labels-idx1")]

    def _check_exists(self) -> bool:
        return all(path.is_file() for path in self._files)

    def _check_legacy_exist(self) -> bool:
        return False  # early versions kept tensors, which are not checked

    def _load_data(self) -> tuple[Tensor, Tensor]:
        images, labels = (_read_idx(path, sizes) for path, sizes in zip(self._files, ((28, 28), ()), strict=True))
        return images, labels.long()


def _read_idx(path: Path, sizes: tuple[int, ...]) -> Tensor:
    """Read a uint8 tensor (N, *sizes) from a file: two zeros, the type, the number of sizes, the sizes, the values."""
    start = 4 * (2 + len(sizes))
    with path.open("rb") as file:
        header = file.read(start)
        shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(4, start, 4))
        whole = os.fstat(file.fileno()).st_size == start + math.prod(shape)
        if header[:4] != bytes((0, 0, 8, len(shape))) or shape[1:] != sizes or not whole:
            of = "×".join(map(str, ("N", *sizes)))
            raise ValueError(f"{path} is damaged or cut short; its header and its size must be of {of} values of uint8")
        return torch.from_numpy(np.fromfile(file, np.uint8)).reshape(shape)


def mnist(options: Options) -> ImageSet:
    """Load MNIST: 60,000 and 10,000 digits, 28×28 and grey, to be shifted by at most three pixels, not mirrored."""
    parts = [_torchvision(MNIST, options, train=train) for train in _halves(options)]
    splits = [Split(_scaled(part.data[..., None], options), part.targets) for part in parts]
    return _image_set(splits, [str(digit) for digit in range(10)], options, flip=False)


def stl10(options: Options) -> ImageSet:
    """Load STL-10: 5,000 labelled training and 8,000 test images, 96×96, to be shifted by at most 12 and mirrored."""
    parts = [_torchvision(torchvision.datasets.STL10, options, split=split) for split in ("train", "test")]
    splits = [
        Split(_scaled(torch.from_numpy(p.data).permute(0, 2, 3, 1), options), torch.from_numpy(p.labels).long())
        for p in parts
    ]
    if not hasattr(parts[0], "classes"):
        raise FileNotFoundError(f"data_dir is {options.data_dir or 'data'}; STL10's class_names.txt is missing in it")
    return _image_set(splits, parts[0].classes, options, flip=True)


def imagefolder(options: Options) -> ImageSet:
    """Load a tree `train/<class>/*` and `val/<class>/*` of images, as RGB of 32×32 by default.

    Images of another size are scaled by their shorter side and cropped to the centre square. They are to be shifted by
    at most an eighth of their size and mirrored.

    Raises:
        FileNotFoundError: the folder, its `train/` or `val/`, or the images of a class are missing.
        ValueError: `train/` and `val/` hold different classes, an image cannot be read, or the images do not fit into
            memory.
    """
    sources = folder_sources(options.data_dir, options.reading)
    count = sum(len(source) for source in sources.values())
    _check_memory(options.data_dir, count, options.img_size or 32, options.in_chans or 3)
    train, val = (decode(sources[split], options) for split in ("train", "val"))
    options = replace(options, first_classes=None, val_split=0, in_chans=None)  # the sources have applied these
    images = _image_set([train.split, val.split], sources["train"].classes, options, flip=True)
    return images._replace(skipped=train.skipped + val.skipped)


RESAMPLING = {"nearest": Image.NEAREST, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}

DATASETS: dict[str, Callable[[Options], ImageSet]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "mnist": mnist,
    "stl10": stl10,
    "imagefolder": imagefolder,
}


def _halves(options: Options) -> list[bool]:
    """Return the values of torchvision's `train` for the splits to read."""
    return [True] if options.train_only or options.val_split else [True, False]


def _image_set(splits: list[Split], classes: list[str], options: Options, *, flip: bool) -> ImageSet:
    """Check and convert the splits of a data set, set `val_split` aside, and keep the first classes if asked to."""
    splits = [Split(_channels(images, options.in_chans), labels) for images, labels in splits]
    if options.val_split:
        images, labels = splits[0]
        splits = [Split(images[part], labels[part]) for part in stratified(labels, options.val_split, options.seed)]
    train = splits[0]
    val = splits[1] if len(splits) > 1 else Split(train.images[:0], train.labels[:0])
    where = "" if options.data_dir is None else f"data_dir is {options.data_dir}; "
    for split in (train, val):
        if len(split.images) != len(split.labels):
            raise ValueError(f"{where}there are {len(split.images):,} images, but {len(split.labels):,} labels")
        if len(split.labels) and not 0 <= split.labels.min() <= split.labels.max() < len(classes):
            low, high = split.labels.min(), split.labels.max()
            raise ValueError(f"{where}its labels are {low} to {high}; they must be 0 to {len(classes) - 1}")
    if (count := options.first_classes) is not None:
        if not 1 <= count <= len(classes):
            raise ValueError(f"first_classes is {count}; it must be 1 to {len(classes)}, the classes of the data")
        classes = classes[:count]
        train, val = (Split(s.images[s.labels < count], s.labels[s.labels < count]) for s in (train, val))
    if not len(train.labels) or (len(splits) > 1 and not len(val.labels)):
        raise ValueError(f"{where}there are no images to {'validate' if len(train.labels) else 'train'} on")
    return ImageSet(train, val, classes, pad=max(1, train.images.shape[1] // 8), flip=flip)


def _cifar(dataset: type, options: Options) -> ImageSet:
    parts = [_torchvision(dataset, options, train=train) for train in _halves(options)]
    splits = [Split(_scaled(torch.from_numpy(p.data), options), torch.tensor(p.targets)) for p in parts]
    return _image_set(splits, parts[0].classes, options, flip=True)


def _torchvision(dataset: type, options: Options, **split):
    root = options.data_dir or Path("data")
    try:
        return dataset(root, download=options.download, **split)
    except RuntimeError as error:
        also = "; its train/ is for --dataset imagefolder" if (root / "train").is_dir() else ""
        raise FileNotFoundError(
            f"data_dir is {root}; {dataset.__name__} is incomplete in it ({error}): --download fetches it{also}"
        ) from None
    except OSError:
        raise
    except Exception as error:  # damaged files: not every set has checksums
        reason = str(error) or type(error).__name__
        raise ValueError(f"data_dir is {root}; {dataset.__name__} in it cannot be read: {reason}") from error


def _channels(images: Tensor, count: int | None) -> Tensor:
    """Convert images (N, H, W, C) to 1 or 3 channels; None keeps theirs."""
    if count is None or count == images.shape[-1]:
        return images
    if count == 3:
        return images.expand(*images.shape[:-1], 3).contiguous()
    luma = torch.tensor([299, 587, 114], dtype=torch.float32) / 1000  # the weights of Pillow's "L"
    return torch.cat([(part.float() @ luma).round().to(torch.uint8)[..., None] for part in images.split(1024)])


def _scaled(images: Tensor, options: Options) -> Tensor:
    """Scale images uint8 (N, H, W, C) to `img_size` by Pillow, whose values a predictor gets too."""
    size = options.img_size
    if size is None or size == images.shape[1]:
        return images.contiguous()
    scaled = np.empty((len(images), size, size, images.shape[-1]), np.uint8)
    for values, image in zip(scaled, images.numpy(), strict=True):
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        values[:] = np.asarray(picture.resize((size, size), RESAMPLING[options.interpolation])).reshape(values.shape)
    return torch.from_numpy(scaled)


def _check_memory(data_dir: Path, count: int, size: int, channels: int) -> None:
    needed, physical = count * size * size * channels, machine_memory()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each holds all images
    if needed * processes > physical / 2:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"data_dir is {data_dir}; its {count:,} images take {needed / 1e9:.0f} GB of memory{each} at "
            f"img_size={size}, and at most half of this machine's {physical / 1e9:.0f} GB may be used: choose a "
            "smaller img_size, or in_memory=False"
        )


class Decoded(NamedTuple):
    """Images in memory, as read from a source.

    split: the images and labels.
    kept: (n,), int64, the indices in the source of the images that could be read.
    skipped: the number of the others.
    """

    split: Split
    kept: Tensor
    skipped: int


def decode(source: Source, options: Options) -> Decoded:
    """Read all images of a source, by default as 32×32.

    Raises:
        UnreadableImage: an image cannot be read; with `on_bad_image="skip"`, no image can.
        ValueError: the images do not fit into memory.
    """
    size, channels = options.img_size or 32, options.in_chans or 3
    _check_memory(options.data_dir, len(source), size, channels)
    images = np.empty((len(source), size, size, channels), np.uint8)
    unreadable: list[tuple[int, str]] = []

    def read(start: int) -> None:
        for i in range(start, min(start + 256, len(images))):
            try:
                images[i] = read_image(source, i, lambda image: _centre(image, size, options.interpolation), channels)
            except UnreadableImage as error:
                if options.on_bad_image == "stop":
                    raise UnreadableImage(f"{error}; {WAYS_ON}") from error
                unreadable.append((i, str(error)))

    with ThreadPoolExecutor(1 if isinstance(source, TarSource) else max(1, options.num_workers)) as threads:
        for _ in threads.map(read, range(0, len(images), 256)):
            pass  # a result raises the error of its thread
    split, kept = Split(torch.from_numpy(images), source.labels), torch.ones(len(images), dtype=torch.bool)
    for _, message in sorted(unreadable):
        warnings.warn(f"{message}; it is skipped", stacklevel=2)
    if unreadable:
        kept[[i for i, _ in unreadable]] = False
        split = Split(split.images[kept], split.labels[kept])
    if not len(split.labels):
        raise UnreadableImage(f"none of the {len(images):,} images can be read: {min(unreadable)[1]}")
    return Decoded(split, kept.nonzero().flatten(), len(unreadable))


def _centre(image: Image.Image, size: int, interpolation: str) -> np.ndarray:
    if image.size != (size, size):
        check_scaled(image, size)
        image = TF.center_crop(TF.resize(image, size, TF.InterpolationMode(interpolation)), size)
    return pixels(image)
