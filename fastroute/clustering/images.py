"""Images to cluster, from a data set or a folder."""

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastroute.data.in_memory import DATASETS, Options, decode
from fastroute.data.layout import all_shards, choose, class_folders, shards_of, split_folders
from fastroute.data.module import STREAMED
from fastroute.data.sources import FolderSource, TarSource

# CIFAR-100's superclass of each class, in the order of the names (§4.5.2 clusters these 20).
CIFAR100_SUPERCLASSES = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1),
    *(10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12),
    *(12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0),
    *(17, 8, 14, 13),
)
CIFAR100_SUPERCLASS_NAMES = (
    *("aquatic mammals", "fish", "flowers", "food containers", "fruit and vegetables", "household electrical devices"),
    *("household furniture", "insects", "large carnivores", "large man-made outdoor things"),
    *("large natural outdoor scenes", "large omnivores and herbivores", "medium-sized mammals"),
    *("non-insect invertebrates", "people", "reptiles", "small mammals", "trees", "vehicles 1", "vehicles 2"),
)


class Loaded(NamedTuple):
    """Images to cluster.

    images: float32 (N, C, H, W), from 0 to 1.
    labels: int64 (N,), of which −1 is none.
    classes: the names of the labels; none where the images have no classes.
    paths: a file's path, a tar file's and the member's, or the set's name and the place in it, for each image.
    files: whether `paths` are files.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]
    paths: list[str]
    files: bool = False


def load_images(
    dataset: str,
    data_dir: Path | None = None,
    limit: int | None = None,
    img_size: int | None = None,
    download: bool = False,
    on_bad_image: str = "stop",
) -> Loaded:
    """The first `limit` images of a data set; see `fastroute.data.in_memory`.

    "digits" and "stl10" are all images with labels; torchvision's other sets their training images. An "imagefolder" is
    its `train/`, or else the folder itself, whose folders are classes, unless images lie beside them or there is one
    alone; then it is all images below. A "webdataset" is its shards for training, or else all of them. CIFAR-100's
    labels are its 20 superclasses.

    Raises:
        ValueError: limit is not positive, or a folder is needed and not given.
        FileNotFoundError: the images are not there.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    if dataset in STREAMED and data_dir is None:
        raise ValueError(f"data_dir is None; the dataset {dataset!r} needs one")
    both = dataset in ("digits", "stl10")
    options = Options(data_dir, img_size, os.cpu_count() or 1, download, None, on_bad_image, train_only=not both)
    if dataset in STREAMED:
        source = _folder(data_dir) if dataset == "imagefolder" else _shards(data_dir, options.num_workers)
        if limit is not None:
            source = source.subset(torch.arange(min(limit, len(source))))
        (images, labels), kept, _ = decode(source, options)
        of_files = dataset == "imagefolder"
        paths = [source.open(index) if of_files else source.name(index) for index in kept.tolist()]
        return Loaded(_unit(images), labels, source.classes, paths, of_files)
    if data_dir is not None and data_dir.exists():
        options = replace(options, data_dir=choose(data_dir, dataset, any_split=True).root)
    found = DATASETS[dataset](options)
    splits = [found.train, found.val] if both else [found.train]
    images, labels = (torch.cat(parts)[:limit] for parts in zip(*splits, strict=True))
    classes = list(found.classes)
    if dataset == "cifar100":
        labels, classes = torch.tensor(CIFAR100_SUPERCLASSES)[labels], list(CIFAR100_SUPERCLASS_NAMES)
    return Loaded(_unit(images), labels, classes, [f"{dataset}:{place}" for place in range(len(labels))])


def _unit(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float() / 255


def _folder(data_dir: Path) -> FolderSource:
    if not data_dir.is_dir():
        raise FileNotFoundError(f"data_dir is {data_dir}; there is no such folder")
    folder = data_dir / "train" if split_folders(data_dir) else data_dir
    labelled = len(class_folders(folder)) > 1
    try:
        return FolderSource(folder, labelled=labelled)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data_dir is {data_dir}; {error}") from None


def _shards(data_dir: Path, num_workers: int) -> TarSource:
    shards = shards_of(data_dir, "train") or all_shards(data_dir)
    return TarSource(shards, num_workers=num_workers)
