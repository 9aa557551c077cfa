"""Read encoded images one at a time from a tree of folders or from tar shards.

Files may be damaged or hostile. So only regular files are opened, only formats of the usual suffixes are decoded, and
the memory of an index and of an image is bounded.
"""

import copy
import errno
import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from fastroute.data.class_names import check_classes, first_of, numbers_of, warn_of_empty, warn_of_sorted
from fastroute.data.decode import UnreadableImage, check_size, decode_image, named
from fastroute.data.folders import LeftOut, images_below, is_folder, warn_of
from fastroute.data.layout import SPLITS, all_shards, expanded, folders, hidden, shards_of, split_folders
from fastroute.data.seeding import generator
from fastroute.data.shards import BY_FOLDER, input_keys, shard_images
from fastroute.data.tar import open_regular, shown, some


class _Names:
    """A compact list of names of any bytes; in an array of strings, each would take the memory of the longest."""

    def __init__(self, names: Iterable[bytes]):
        names = list(names)
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.text = b"".join(names)

    def __getitem__(self, index: int) -> bytes:
        return self.text[self.ends[index - 1] if index else 0 : self.ends[index]]

    def chosen(self, indices: Tensor) -> "_Names":
        return _Names(self[index] for index in indices.tolist())


AnySource = TypeVar("AnySource", bound="_Source")


class _Source:
    """Base of sources: `labels`, int64 (N,), where −1 is no class, and the names of the `classes`."""

    labels: Tensor
    classes: list[str]
    names: _Names

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self: AnySource, indices: Tensor) -> AnySource:
        """Return a source of the images of these indices, in rising order, with the same classes."""
        chosen = copy.copy(self)
        chosen.names, chosen.labels = self.names.chosen(indices), self.labels[indices]
        return chosen


class FolderSource(_Source):
    """Read a tree `<class>/*` of image files, as torchvision's `ImageFolder`; hidden files are left out.

    Args:
        folder: the folder that holds the class folders.
        first_classes: the number of classes to read, the first by name.
        class_map: the names of the classes in another order; folders that it does not name are left out.
        labelled: whether folders are classes; otherwise all images below the folder are read, without classes.

    Raises:
        FileNotFoundError: there is no such folder, no class folder in it, or no image of a class.
        OSError: a folder in it cannot be read.
        ValueError: there are fewer classes than `first_classes`.
    """

    def __init__(
        self,
        folder: Path,
        first_classes: int | None = None,
        class_map: Sequence[str] | None = None,
        *,
        labelled: bool = True,
    ):
        needed = f"{shown(folder)} must hold {'one folder of images for each class' if labelled else 'images'}"
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{needed}: there is no such folder")
        left_out = defaultdict(list)
        classes = self._classes(folder, class_map, left_out) if labelled else []
        if labelled and not classes:
            raise FileNotFoundError(f"{needed}: Couldn't find any class folder in it")
        if labelled:
            classes = first_of(classes, first_classes, folder)
        folders = [os.path.join(folder, name) for name in classes] if labelled else [str(folder)]
        found = [images_below(below, left_out) if os.path.isdir(below) else [] for below in folders]
        warn_of(folder, left_out)
        if empty := [name for name, paths in zip(classes or [""], found, strict=True) if not paths]:
            of = f" for the classes {some(empty)}" if labelled else ""
            mend = "remove such a folder, or name the classes by a class map; " if labelled else ""
            raise FileNotFoundError(f"{needed}: Found no valid file{of}: {mend}images are {', '.join(IMG_EXTENSIONS)}")
        # Not a list: reference counts would make every worker copy its memory.
        self.names = _Names(os.fsencode(path) for paths in found for path in paths)
        numbers = torch.arange(len(found)) if labelled else torch.tensor([-1])
        self.labels = numbers.repeat_interleave(torch.tensor([len(paths) for paths in found]))
        self.classes = classes

    @staticmethod
    def _classes(folder: Path, class_map: Sequence[str] | None, left_out: LeftOut) -> list[str]:
        with os.scandir(folder) as entries:
            folders = sorted(e.name for e in entries if not hidden(e.name) and is_folder(e, left_out))
        if class_map is None:
            return folders
        if wrong := [name for name in class_map if hidden(name) or os.path.basename(name) != name]:
            raise ValueError(f"the class map has the line {shown(wrong[0])!r}; each line must be the name of one class")
        mapped = set(class_map)
        if others := [os.path.join(folder, name) for name in folders if name not in mapped]:
            left_out["folders that the class map does not name"] = others
        return list(class_map)

    def name(self, index: int) -> str:
        return shown(self.names[index])

    def open(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def order(self, generator: torch.Generator) -> Tensor:
        """Return all indices, shuffled."""
        return torch.randperm(len(self), generator=generator)


class TarSource(_Source):
    """Read images in tar files without unpacking these.

    There are two layouts. In WebDataset's, an image is `<key>.jpg`. In the same shard, its class is in `<key>.cls`, as
    a number from 0 to 999,999 or a name; in `<key>.json`, under one of `fastroute.data.shards.LABEL_KEYS`; or, for
    images in no folder, as a name in `<key>.txt`. The other is a packed tree `…/<class>/<name>.jpg`. The headers are
    read once, by seeking from one to the next, and kept in `index`.

    Args:
        shards: the files.
        first_classes: the number of classes to read, the first ones.
        num_workers: the number of threads that read headers; 0 is as 1.
        input_key: the image to take if a key has several, by what follows the first dot of its name, such as "png" or
            "left.jpg"; of several, such as "jpg;png", the first that exists.
        class_map: the names of the classes, in the order of their numbers.

    Raises:
        FileNotFoundError: there are no shards, or they hold no images.
        OSError: a shard cannot be opened.
        ValueError: a file is not a tar file or is damaged, or has a name twice; an image is no plain file, has no class
            or shares its label with another; or there are fewer classes than `first_classes` or others than in
            `class_map`.
    """

    SHARDS_AT_ONCE = 16
    """The number of shards that are shuffled together, so that reads stay local for caches and network disks."""

    def __init__(
        self,
        shards: Sequence[Path],
        first_classes: int | None = None,
        num_workers: int = 1,
        input_key: str | None = None,
        class_map: Sequence[str] | None = None,
    ):
        self.shards = [str(path) for path in shards]
        keys = input_keys(input_key)
        with ThreadPoolExecutor(max(1, min(num_workers, 32))) as threads:  # each opens a file
            found = list(threads.map(lambda path: shard_images(path, keys), self.shards))
        images = [(shard, *image) for shard, images in enumerate(found) for image in images]
        where = some(self.shards)
        if not images:
            of_key = f" of input_key {input_key!r}" if keys else ""
            raise FileNotFoundError(f"there are no images{of_key} in {where or 'no tar files'}")
        shard, names, offset, size, labels, ways = zip(*images, strict=True)
        if len(set(ways)) > 1:
            raise ValueError(f"{where}: {' and '.join(f'some images have {way}' for way in sorted(set(ways)))}")
        _check_unsplit(names, where, ways[0] == BY_FOLDER)
        classes, labels = numbers_of(labels, class_map, where, first_classes)
        self.classes = first_of(classes, first_classes, self.shards[0])
        kept = ((labels >= 0) & (labels < len(self.classes))).nonzero().flatten()
        if not len(kept):
            of = f" of the first {first_classes} classes" if first_classes else " of the classes of the class map"
            raise FileNotFoundError(f"there are no images{of} in {where}")
        self.index = torch.tensor([shard, offset, size]).T[kept].contiguous()
        self.names = _Names(names[i] for i in kept.tolist())
        self.labels = labels[kept]
        self._files: dict[int, int] = {}

    def subset(self: AnySource, indices: Tensor) -> AnySource:
        chosen = super().subset(indices)
        chosen.index, chosen._files = self.index[indices], {}
        return chosen

    def name(self, index: int) -> str:
        return f"{shown(self.shards[self.index[index, 0]])}:{shown(self.names[index])}"

    def open(self, index: int) -> io.BytesIO:
        shard, offset, size = self.index[index].tolist()
        check_size(size)
        if shard not in self._files:
            self._files[shard] = self._opened(shard)
        return io.BytesIO(os.pread(self._files[shard], size, offset))  # pread, since forked workers share the position

    def _opened(self, shard: int) -> int:
        """Return the descriptor of a shard; close the oldest ones if the process has too many."""
        if len(self._files) == 2 * self.SHARDS_AT_ONCE:
            self._close_oldest()
        while True:
            try:
                return open_regular(self.shards[shard])
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._files:
                    raise
                self._close_oldest()

    def _close_oldest(self) -> None:
        os.close(self._files.pop(next(iter(self._files))))

    def order(self, generator: torch.Generator) -> Tensor:
        """Return all indices: shards in random order, the images of `SHARDS_AT_ONCE` of them shuffled together."""
        by_shard = [torch.empty(0, dtype=torch.long)] * len(self.shards)
        shards, counts = self.index[:, 0].unique_consecutive(return_counts=True)
        for shard, indices in zip(shards.tolist(), torch.arange(len(self)).split(counts.tolist()), strict=True):
            by_shard[shard] = indices
        shuffled = torch.randperm(len(self.shards), generator=generator).tolist()
        groups = [shuffled[i : i + self.SHARDS_AT_ONCE] for i in range(0, len(shuffled), self.SHARDS_AT_ONCE)]
        pools = [torch.cat([by_shard[shard] for shard in group]) for group in groups]
        return torch.cat([pool[torch.randperm(len(pool), generator=generator)] for pool in pools])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": {}}  # descriptors mean nothing in another process


Source = FolderSource | TarSource


def read_image(source: Source, index: int, transform: Callable | None = None, channels: int = 3):
    """Decode one image to RGB or grey, and transform it.

    Args:
        source: the images.
        index: of the image.
        transform: of the Pillow image; None returns it as it is.
        channels: 3 for RGB, 1 for grey.

    Raises:
        UnreadableImage: the image cannot be decoded or transformed; the message names it.
    """
    name = source.name(index)
    with named(name):
        file = source.open(index)
    image = decode_image(file, name, channels)
    if transform is None:
        return image
    try:
        return transform(image)
    except UnreadableImage as error:
        raise UnreadableImage(f"{name}: {error}") from None


class Reading(NamedTuple):
    """Options of sources; see `ImageDataModule`, and `TarSource` for `input_key`."""

    first_classes: int | None = None
    num_workers: int = 1
    val_split: float = 0.0
    seed: int = 0
    class_map: Sequence[str] | None = None
    input_key: str | None = None


def folder_sources(data_dir: Path, reading: Reading | None = None) -> dict[str, FolderSource]:
    """Return the sources of `train/` and `val/` of a folder, or its images split by `val_split`.

    Raises:
        FileNotFoundError: a folder is missing or has no images.
        ValueError: the classes of the two differ, or have too few images to split.
    """
    reading = reading or Reading()
    options = reading.first_classes, reading.class_map
    splits = ("train", "val")
    needed = [data_dir] if reading.val_split else [data_dir, *(data_dir / split for split in splits)]
    for folder in needed:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"data_dir is {data_dir}; it must be a folder with train/ and val/ in it, but {folder} is missing"
            )
    try:
        if reading.val_split:
            return _split(FolderSource(_to_split(data_dir), *options), data_dir, reading)
        sources = {split: FolderSource(data_dir / split, *options) for split in splits}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data_dir is {data_dir}; {error}") from None
    check_classes(data_dir, sources)
    return sources


def _to_split(data_dir: Path) -> Path:
    """Return the folder whose images `val_split` splits: `train/`, or all.

    Raises:
        FileNotFoundError: there is no `train/` with class folders, and the folders are those of other splits.
    """
    if split_folders(data_dir):
        return data_dir / "train"
    names = folders(data_dir)
    if names and SPLITS.issuperset(names):
        raise FileNotFoundError(
            f"it holds {some([f'{name}/' for name in names])}, which are no classes, and no train/ with a folder of "
            f"images for each class, which val_split would split: name the folder to split, such as "
            f"{shown(data_dir / names[-1])}"
        )
    return data_dir


def tar_sources(data_dir: Path, reading: Reading | None = None) -> dict[str, TarSource]:
    """Return the sources of `train/*.tar` and `val/*.tar`, or `*train*.tar` and `*val*.tar`, of a folder or a pattern.

    `val_split` splits the training shards, or all shards if none is named so.

    Raises:
        FileNotFoundError: a split has no shards or no images.
        ValueError: a file is not a tar file, the name of a shard fits both splits, or the classes differ.
    """
    reading = reading or Reading()
    options = reading.first_classes, reading.num_workers, reading.input_key, reading.class_map
    if reading.val_split:
        shards = shards_of(data_dir, "train") or all_shards(data_dir)
        if not shards:
            raise FileNotFoundError(f"data_dir is {data_dir}; there are no tar shards in it")
        source = TarSource(shards, *options)
        _warn_of_classes(data_dir, source)
        return _split(source, data_dir, reading)
    splits = ("train", "val")
    shards = {split: shards_of(data_dir, split) for split in splits}
    for split, found in shards.items():
        if not found:
            raise FileNotFoundError(
                f"data_dir is {data_dir}; there are no shards {split}/*.tar or *{split}*.tar in it for '{split}'"
            )
    if both := sorted(set.intersection(*map(set, shards.values()))):
        raise ValueError(
            f"data_dir is {data_dir}; {some(both)} would be for {' and '.join(splits)} at once: put shards into "
            f"{' and '.join(f'{split}/' for split in splits)}"
        )
    sources = {split: TarSource(found, *options) for split, found in shards.items()}
    _warn_of_classes(data_dir, sources["train"])
    check_classes(data_dir, sources)
    return sources


def _warn_of_classes(data_dir: Path, source: TarSource) -> None:
    """Warn of shards to train on whose classes are empty, or sorted."""
    warn_of_empty(data_dir, source)
    warn_of_sorted(data_dir, source.labels, source.index[:, 0], TarSource.SHARDS_AT_ONCE)


def val_source(dataset: str, data_dir: Path, reading: Reading | None = None) -> Source:
    """Return the source of the validation images; training images may be missing.

    Args:
        dataset: "imagefolder" reads `val/` of the folder, or else its class folders; "webdataset" reads its shards for
            `val`, or else all `*.tar` in it, one tar file, or those of a pattern.
        data_dir: the folder.
        reading: with `val_split`, the images are those that training with the same `val_split` and `seed` set aside.

    Raises:
        FileNotFoundError: there are no such images.
        ValueError: a file is not a tar file.
    """
    reading = reading or Reading()
    if expanded(data_dir) is None and not data_dir.exists():
        raise FileNotFoundError(f"data_dir is {data_dir}; there is no such file or folder")
    if reading.val_split:
        read = folder_sources if dataset == "imagefolder" else tar_sources
        return read(data_dir, reading)["val"]
    if dataset == "imagefolder":
        folder = data_dir / "val" if (data_dir / "val").is_dir() else data_dir
        try:
            return FolderSource(folder, reading.first_classes, reading.class_map)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"data_dir is {data_dir}; {error}") from None
    shards = shards_of(data_dir, "val") or all_shards(data_dir)
    if not shards:
        raise FileNotFoundError(f"data_dir is {data_dir}; there are no tar shards in it")
    return TarSource(shards, reading.first_classes, reading.num_workers, reading.input_key, reading.class_map)


def stratified(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split images into training and validation, with about the same `share` of each class in validation.

    Each class has at least one image on either side; a class of a single image has it in training.

    Args:
        labels: int64 (N,), at least 0.
        share: above 0 and below 1.
        seed: of the choice.

    Returns:
        the indices to train on and to validate on, both in rising order.
    """
    order = torch.randperm(len(labels), generator=generator(seed))
    order = order[labels[order].argsort(stable=True)]  # by class, within each at random
    counts = torch.bincount(labels)
    places = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    chosen = (counts * share).round().clamp(min=1).minimum(counts - 1)
    aside = places < chosen[labels[order]]
    return order[~aside].sort().values, order[aside].sort().values


def _split(source: Source, data_dir: Path, reading: Reading) -> dict[str, Source]:
    train, val = stratified(source.labels, reading.val_split, reading.seed)
    if not len(val):
        raise ValueError(
            f"data_dir is {data_dir}; val_split is {reading.val_split}, but no class has two images to split"
        )
    return {"train": source.subset(train), "val": source.subset(val)}


def _check_unsplit(names: Iterable[bytes], where: str, by_folder: bool) -> None:
    """Check that tar files read as one source do not hold the folders of several splits."""
    splits = defaultdict(set)  # by the folder that holds them
    for folder in {os.path.dirname(name) for name in names}:
        parts = os.fsdecode(folder).split("/")
        for i, part in enumerate(parts[:-1] if by_folder else parts):  # the last one may be a class
            if part in SPLITS:
                splits[tuple(parts[:i])].add(part)
    if found := next((sorted(kinds) for kinds in splits.values() if len(kinds) > 1), None):
        raise ValueError(
            f"{where}: it holds {' and '.join(f'{name}/' for name in found)}, whose images would be mixed: unpack it, "
            "or pack each into tar files of its own, such as train.tar and val.tar"
        )
