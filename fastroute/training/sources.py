"""Encoded images on disk, to be read one at a time: a tree of folders, or tar shards."""

import io
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS


class UnreadableImage(ValueError):
    """An image cannot be decoded; the message names it and says why."""


class FolderSource:
    """A tree `<class>/*` of image files, as torchvision's `ImageFolder` has it.

    Args:
        folder: the folder of the classes' folders.
        first_classes: only the first so many classes, in the order of their names.

    Raises:
        FileNotFoundError: there is no such folder, no class in it, or a class has no images.
        ValueError: there are fewer classes than `first_classes`.
    """

    def __init__(self, folder: Path, first_classes: int | None = None):
        try:
            found = ImageFolder(folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} must hold one folder of images for each class: {error}") from None
        self.classes = _first(found.classes, first_classes, folder)
        samples = [(path, label) for path, label in found.samples if label < len(self.classes)]
        # Arrays, not lists: counting references in a list would copy its memory into every worker.
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.labels = torch.tensor([label for _, label in samples])

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def open(self, index: int) -> str:
        return self.name(index)

    def order(self, generator: torch.Generator) -> Tensor:
        """All indices, shuffled."""
        return torch.randperm(len(self), generator=generator)


class TarSource:
    """Images in tar files, read from where they lie, without unpacking.

    Two layouts: WebDataset's, `<key>.jpg` followed by `<key>.cls` with the number of the class in it; or a packed tree
    `…/<class>/<name>.jpg`. The headers are read once, by seeking from one to the next, and kept in `index`.

    Args:
        shards: the files.
        first_classes: only the first so many classes.
        num_workers: threads that read headers.

    Raises:
        FileNotFoundError: there are no shards, or they hold no images.
        ValueError: a file is no tar file, an image has no class, or there are fewer classes than `first_classes`.
    """

    SHARDS_AT_ONCE = 16
    """How many shards an epoch's order mixes: reads stay within these, which caches and network disks reward."""

    def __init__(self, shards: Sequence[Path], first_classes: int | None = None, num_workers: int = 1):
        self.shards = [str(path) for path in shards]
        with ThreadPoolExecutor(num_workers) as threads:
            members = [member for found in threads.map(_members, range(len(shards)), shards) for member in found]
        if not members:
            raise FileNotFoundError(f"there are no images in {', '.join(self.shards) or 'no tar files'}")
        shard, offset, size, names, labels = zip(*members, strict=True)
        if len({type(label) for label in labels}) > 1:
            raise ValueError(f"{', '.join(self.shards)}: some images have a .cls and some have none")
        numbered = isinstance(labels[0], int)
        classes = list(range(max(labels) + 1)) if numbered else sorted(set(labels))
        number = {name: i for i, name in enumerate(classes)}
        labels = torch.tensor([number[label] for label in labels])
        self.classes = _first([str(name) for name in classes], first_classes, self.shards[0])
        kept = (labels < len(self.classes)).nonzero().flatten()
        self.index = torch.tensor([shard, offset, size]).T[kept].contiguous()
        self.names = np.array(names)[kept.numpy()]
        self.labels = labels[kept]
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.shards[self.index[index, 0]]}:{self.names[index]}"

    def open(self, index: int) -> io.BytesIO:
        shard, offset, size = self.index[index].tolist()
        if shard not in self._files:
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return io.BytesIO(os.pread(self._files[shard], size, offset))  # pread: forked workers share the position

    def order(self, generator: torch.Generator) -> Tensor:
        """All indices: the shards in random order, and the images of `SHARDS_AT_ONCE` of them shuffled together."""
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


def read_image(source: Source, index: int) -> Image.Image:
    """Decode one image, as RGB; it raises as `decode_image` does."""
    return decode_image(source.open(index), source.name(index))


def decode_image(file: str | Path | io.BytesIO, name: str) -> Image.Image:
    """Decode an image, as RGB.

    Raises:
        UnreadableImage: it is damaged, missing, or no image; `name` names it.
    """
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow's own for a PNG cut short is a SyntaxError
        raise UnreadableImage(f"{name} cannot be read as an image: {error}") from error


def folder_sources(
    data_dir: Path, first_classes: int | None = None, splits: Sequence[str] = ("train", "val")
) -> dict[str, FolderSource]:
    """`train/` and `val/` of a folder, which must hold the same classes.

    Raises:
        FileNotFoundError: a folder is missing or has no images.
        ValueError: the classes differ.
    """
    for folder in (data_dir, *(data_dir / split for split in splits)):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"data_dir is {data_dir}; it must be a folder with {' and '.join(f'{s}/' for s in splits)} in it, "
                f"but {folder} is missing"
            )
    try:
        sources = {split: FolderSource(data_dir / split, first_classes) for split in splits}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data_dir is {data_dir}; {error}") from None
    check_classes(data_dir, sources)
    return sources


def tar_sources(
    data_dir: Path,
    first_classes: int | None = None,
    num_workers: int = 1,
    splits: Sequence[str] = ("train", "val"),
) -> dict[str, TarSource]:
    """The shards of a folder: `train/*.tar` and `val/*.tar`, or `*train*.tar` and `*val*.tar`.

    Raises:
        FileNotFoundError: a split has no shards or no images.
        ValueError: a file is no tar file, or the classes differ.
    """
    sources = {}
    for split in splits:
        shards = _shards(data_dir, split)
        if not shards:
            raise FileNotFoundError(
                f"data_dir is {data_dir}; there are no shards {split}/*.tar or *{split}*.tar in it for '{split}'"
            )
        sources[split] = TarSource(shards, first_classes, num_workers)
    check_classes(data_dir, sources)
    return sources


def val_source(
    dataset: str, data_dir: Path, first_classes: int | None = None, num_workers: int = 1
) -> FolderSource | TarSource:
    """The images to validate on, where training images need not be at hand.

    Args:
        dataset: "imagefolder": `val/` of the folder, or else the classes' folders themselves; "webdataset": its shards
            for `val`, or else all `*.tar` in it, or one tar file.
        data_dir, first_classes, num_workers: as in `FolderSource` and `TarSource`.

    Raises:
        FileNotFoundError: there are no such images.
        ValueError: a file is no tar file.
    """
    if not data_dir.exists():
        raise FileNotFoundError(f"data_dir is {data_dir}; there is no such file or folder")
    if dataset == "imagefolder":
        return FolderSource(data_dir / "val" if (data_dir / "val").is_dir() else data_dir, first_classes)
    shards = [data_dir] if data_dir.is_file() else _shards(data_dir, "val") or sorted(data_dir.glob("*.tar"))
    if not shards:
        raise FileNotFoundError(f"data_dir is {data_dir}; there are no tar shards in it")
    return TarSource(shards, first_classes, num_workers)


def _shards(data_dir: Path, split: str) -> list[Path]:
    return sorted((data_dir / split).glob("*.tar")) or sorted(data_dir.glob(f"*{split}*.tar"))


def check_classes(data_dir: Path, sources: dict[str, Source]) -> None:
    """Raise unless `train` and `val`, where both are there, hold the same classes."""
    classes = {split: set(source.classes) for split, source in sources.items()}
    if len(classes) == 2 and classes["train"] != classes["val"]:
        only = {s: sorted(classes[s] - classes[o]) for s, o in (("train", "val"), ("val", "train"))}
        raise ValueError(
            f"data_dir is {data_dir}; train/ and val/ must hold the same classes, "
            f"but only train/ has {only['train']} and only val/ has {only['val']}"
        )


def _first(classes: list[str], count: int | None, where: Path | str) -> list[str]:
    if count is not None and not 1 <= count <= len(classes):
        raise ValueError(f"first_classes is {count}; it must be 1 to {len(classes)}, the classes of {where}")
    return classes[:count]


def _members(shard: int, path: Path) -> list[tuple[int, int, int, str, int | str]]:
    """(shard, offset, size, name, class) of every image of a tar file; the class is a number or a folder's name."""
    images, numbers, end = {}, {}, 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                key = str(name.with_suffix(""))
                if name.suffix.lower() in IMG_EXTENSIONS:
                    images[key] = (member.offset_data, member.size, member.name)
                elif name.suffix == ".cls":
                    numbers[key] = int(tar.extractfile(member).read())
                    if numbers[key] < 0:
                        raise ValueError(f"{name} says class {numbers[key]}; classes are numbered from 0")
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                tar.members.clear()  # tarfile keeps every header it has seen
            tar.fileobj.seek(end)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("it is cut short")  # tarfile takes that for the end of the archive
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a tar file of images: {error}") from error
    members = []
    for key, (offset, size, name) in images.items():
        label = numbers.get(key, PurePosixPath(name).parent.name if not numbers else "")
        if label == "":
            raise ValueError(f"{path}: {name} has no class: there must be a {key}.cls, or a folder for each class")
        members.append((shard, offset, size, name, label))
    return members
