"""Small image sets, decoded once into memory."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as TF


class Split(NamedTuple):
    """images: uint8 (N, H, W, C); labels: int64 (N,)."""

    images: Tensor
    labels: Tensor


class ImageSet(NamedTuple):
    """A data set in memory. `pad` and `flip` say how its training images may be shifted and mirrored."""

    train: Split
    val: Split
    classes: list[str]
    pad: int
    flip: bool


def digits(data_dir: Path | None, img_size: int | None, num_workers: int) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, 8×8 and grey, in a fixed stratified split of 1,437 and 360.

    They stay 8×8 unless `img_size` asks for more; a network's cost grows with the square of that. Shifts are of at
    most one pixel, an eighth of the image as CIFAR's four pixels of 32 are. A mirrored digit is no digit, so none is.
    """
    source = load_digits()
    images = torch.from_numpy(source.images * (255 / 16)).to(torch.float32)[:, None]
    size = img_size or images.shape[-1]
    if size != images.shape[-1]:
        images = F.interpolate(images, size=(size, size), mode="bilinear")
    images = images.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    labels = torch.from_numpy(source.target).long()
    train, val = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=source.target, random_state=0)
    return ImageSet(
        Split(images[train], labels[train]),
        Split(images[val], labels[val]),
        [str(name) for name in source.target_names],
        pad=max(1, size // 8),
        flip=False,
    )


def imagefolder(data_dir: Path | None, img_size: int | None, num_workers: int) -> ImageSet:
    """Any tree `train/<class>/*` and `val/<class>/*` of images, as RGB, 32×32 unless `img_size` says otherwise.

    Images of another size are scaled on their shorter side and cut to the centre square. Shifts are of at most an
    eighth of the image, four pixels of 32, with random mirroring.

    Raises:
        FileNotFoundError: the folder, its `train/` or `val/`, or the images in a class are missing.
        ValueError: `train/` and `val/` hold different classes, an image cannot be read, or memory does not suffice.
    """
    if data_dir is None:
        raise ValueError("data_dir is None; the dataset 'imagefolder' needs a folder with train/ and val/ in it")
    size = img_size or 32
    folders = {split: _image_folder(data_dir, split) for split in ("train", "val")}
    classes = {split: set(folder.classes) for split, folder in folders.items()}
    if classes["train"] != classes["val"]:
        only = {s: sorted(classes[s] - classes[o]) for s, o in (("train", "val"), ("val", "train"))}
        raise ValueError(
            f"data_dir is {data_dir}; train/ and val/ must hold the same classes, "
            f"but only train/ has {only['train']} and only val/ has {only['val']}"
        )
    _check_memory(data_dir, sum(len(folder) for folder in folders.values()), size)
    splits = {split: _decode(folder, size, num_workers) for split, folder in folders.items()}
    return ImageSet(splits["train"], splits["val"], folders["train"].classes, pad=max(1, size // 8), flip=True)


DATASETS: dict[str, Callable[[Path | None, int | None, int], ImageSet]] = {
    "digits": digits,
    "imagefolder": imagefolder,
}


def _image_folder(data_dir: Path, split: str) -> ImageFolder:
    for folder in (data_dir, data_dir / split):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"data_dir is {data_dir}; it must be a folder with train/ and val/ in it, but {folder} is missing"
            )
    try:
        return ImageFolder(data_dir / split)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data_dir is {data_dir}; {data_dir / split} must hold one folder of images for each class: {error}"
        ) from None


def _check_memory(data_dir: Path, count: int, size: int) -> None:
    needed, physical = count * size * size * 3, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > physical / 2:
        raise ValueError(
            f"data_dir is {data_dir}; its {count:,} images take {needed / 1e9:.0f} GB of memory at img_size={size}, "
            f"and at most half of this machine's {physical / 1e9:.0f} GB may be used: choose a smaller img_size"
        )


def _decode(folder: ImageFolder, size: int, num_workers: int) -> Split:
    images = np.empty((len(folder.samples), size, size, 3), np.uint8)

    def decode(start: int) -> None:
        for i in range(start, min(start + 256, len(images))):
            images[i] = _read(folder.samples[i][0], size)

    with ThreadPoolExecutor(num_workers) as threads:
        for _ in threads.map(decode, range(0, len(images), 256)):
            pass  # taking each result raises what its thread raised
    return Split(torch.from_numpy(images), torch.tensor(folder.targets))


def _read(path: str, size: int) -> np.ndarray:
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's own for a PNG cut short is a SyntaxError
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if image.size != (size, size):
        image = TF.center_crop(TF.resize(image, size), size)
    return np.asarray(image)
