"""Images to cluster, from a data set or a folder."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastroute._processors import processors
from fastroute.data.in_memory import DATASETS, Options, decode
from fastroute.data.layout import all_shards, choose, class_folders, shards_of, split_folders
from fastroute.data.module import STREAMED
from fastroute.data.sources import FolderSource, TarSource

# The superclass of each class of CIFAR-100, in the order of the classes' names (§4.5.2 clusters the 20 superclasses).
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

    Attributes:
        images: float32 (N, C, H, W), from 0 to 1.
        labels: int64 (N,); −1 is none.
        classes: the names of the labels; empty if the images have no classes.
        paths: for each image, the path of its file, of its tar file and member, or its dataset and index.
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
    """Load images of a data set; see `fastroute.data.in_memory`.

    "digits" and "stl10" load all images with labels, and torchvision's other sets load their training images. An
    "imagefolder" loads its `train/` if there is one, or else the folder itself. Its subfolders are classes, unless
    there is only one or images lie beside them; then all images below it are loaded, without classes. A "webdataset"
    loads its training shards if there are any, or else all of them. CIFAR-100's labels are its 20 superclasses. A limit
    takes the first images; of a folder, whose files are sorted by their classes, it takes images at equal distances.

    Args:
        dataset: such as "digits" or "imagefolder".
        data_dir: the folder of the data, a tar file, or a pattern of tar files.
        limit: the number of images; None is all.
        img_size: height and width to scale images to; None leaves them.
        download: whether to download torchvision's sets.
        on_bad_image: "stop" or "skip", for images that cannot be read.

    Returns:
        the images.

    Raises:
        ValueError: `limit` is not positive, or `data_dir` is missing.
        FileNotFoundError: the images are not there.
        UnreadableImage: an image cannot be read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    if dataset in STREAMED and data_dir is None:
        raise ValueError(f"data_dir is None; the dataset {dataset!r} needs one")
    both = dataset in ("digits", "stl10")
    options = Options(data_dir, img_size, processors(), download, None, on_bad_image, train_only=not both)
    if dataset in STREAMED:
        source = _folder(data_dir) if dataset == "imagefolder" else _shards(data_dir, options.num_workers)
        if limit is not None:
            count = min(limit, len(source))
            places = torch.arange(count)
            source = source.subset(places * len(source) // count if dataset == "imagefolder" else places)
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
