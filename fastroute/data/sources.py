"""Encoded images on disk, to be read one at a time: a tree of folders, or tar shards.

What lies there may be damaged or hostile: only regular files are opened, only as the formats that their names can stand
for, and neither an index nor an image takes more memory than a stated bound.
"""

import contextlib
import errno
import io
import os
import re
import stat
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from heapq import heappop, heappush
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from fastroute.data.tar import FILE, FOLDER, Member, NotRegular, members, open_regular, shown

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
"""Pillow's names of what `IMG_EXTENSIONS` stand for. Others are not tried: EPS, for one, starts Ghostscript."""
NOT_READ = (".gif", ".avif", ".jxl", ".jp2", ".heic", ".heif", ".jfif", ".jpe", ".pbm", ".pnm", ".tga", ".svg")
"""Names of images all the same, so that leaving them out is worth a word."""
OTHER_IMAGES = f"images of other names than {', '.join(IMG_EXTENSIONS)}"
MAX_CLASSES = 1_000_000
"""Numbers of classes are below this; a network has a logit for each class up to the largest number."""

MAX_SCANS = 100
"""Of a JPEG, as in libtiff: photographs have about 10, and each passes over all pixels with a few bytes of the file."""

SCAN, END = b"\xff\xda", b"\xff\xd9"
MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
"""Of JPEG, where what follows has a length, or the end; the others are within a scan."""

LeftOut = dict[str, list[str]]
"""Names of what is left out, by what they are."""


def limit_pixels(number: str) -> None:
    """Set the most pixels that an image may have, which is Pillow's own limit, to a number in digits.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"[1-9]\d{0,11}", number, re.ASCII):
        raise ValueError(f"FASTROUTE_MAX_IMAGE_PIXELS is {number!r}; it must be a number of pixels, at least 1")
    Image.MAX_IMAGE_PIXELS = int(number)


if "FASTROUTE_MAX_IMAGE_PIXELS" in os.environ:
    limit_pixels(os.environ["FASTROUTE_MAX_IMAGE_PIXELS"])


class UnreadableImage(ValueError):
    """An image cannot be decoded; the message names it and says why."""


def check_pixels(width: int, height: int, what: str) -> None:
    """Raise for an image of more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, 89,478,485 unless that is changed.

    Raises:
        UnreadableImage: it has more; the message starts with `what`.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise UnreadableImage(f"{what} {width:,} × {height:,} pixels, {_at_most()}")


def _at_most() -> str:
    return (
        f"and at most {Image.MAX_IMAGE_PIXELS:,} are allowed; set the environment variable FASTROUTE_MAX_IMAGE_PIXELS, "
        "or PIL.Image.MAX_IMAGE_PIXELS, to allow more"
    )


class _Names:
    """Names of any bytes: in an array of strings each would take as much memory as the longest."""

    def __init__(self, names: Iterable[bytes]):
        names = list(names)
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.text = b"".join(names)

    def __getitem__(self, index: int) -> bytes:
        return self.text[self.ends[index - 1] if index else 0 : self.ends[index]]


class FolderSource:
    """A tree `<class>/*` of image files, as torchvision's `ImageFolder` has it.

    Args:
        folder: the folder of the classes' folders.
        first_classes: only the first so many classes, in the order of their names.

    Raises:
        FileNotFoundError: there is no such folder, no class in it, or a class has no images.
        OSError: a folder in it cannot be read.
        ValueError: there are fewer classes than `first_classes`.
    """

    def __init__(self, folder: Path, first_classes: int | None = None):
        needed = f"{shown(folder)} must hold one folder of images for each class"
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{needed}: there is no such folder")
        left_out = defaultdict(list)
        with os.scandir(folder) as entries:
            classes = sorted(entry.name for entry in entries if _is_folder(entry, left_out))
        if not classes:
            raise FileNotFoundError(f"{needed}: Couldn't find any class folder in it")
        found = [_images_below(os.path.join(folder, name), left_out) for name in classes]
        _warn(folder, left_out)
        if empty := [name for name, paths in zip(classes, found, strict=True) if not paths]:
            raise FileNotFoundError(
                f"{needed}: Found no valid file for the classes {_some(empty)}; images are {', '.join(IMG_EXTENSIONS)}"
            )
        self.classes = _first(classes, first_classes, folder)
        found = found[: len(self.classes)]
        # One text, not a list: counting references in a list would copy its memory into every worker.
        self.paths = _Names(os.fsencode(path) for paths in found for path in paths)
        self.labels = torch.arange(len(found)).repeat_interleave(torch.tensor([len(paths) for paths in found]))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return shown(self.paths[index])

    def open(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def order(self, generator: torch.Generator) -> Tensor:
        """All indices, shuffled."""
        return torch.randperm(len(self), generator=generator)


class TarSource:
    """Images in tar files, read from where they lie, without unpacking.

    Two layouts: WebDataset's, `<key>.jpg` and, in the same shard, `<key>.cls` with the number of the class in it, 0 to
    999,999; or a packed tree `…/<class>/<name>.jpg`. The headers are read once, by seeking from one to the next, and
    kept in `index`.

    Args:
        shards: the files.
        first_classes: only the first so many classes.
        num_workers: threads that read headers.

    Raises:
        FileNotFoundError: there are no shards, or they hold no images.
        OSError: a shard cannot be opened.
        ValueError: a file is no tar file or damaged, a name is in it twice, an image is no plain file, has no class or
            shares a `.cls` with another, or there are fewer classes than `first_classes`.
    """

    SHARDS_AT_ONCE = 16
    """How many shards an epoch's order mixes: reads stay within these, which caches and network disks reward."""

    def __init__(self, shards: Sequence[Path], first_classes: int | None = None, num_workers: int = 1):
        self.shards = [str(path) for path in shards]
        with ThreadPoolExecutor(num_workers) as threads:
            found = list(threads.map(_shard_images, self.shards))
        images = [(shard, *image) for shard, images in enumerate(found) for image in images]
        where = _some(self.shards)
        if not images:
            raise FileNotFoundError(f"there are no images in {where or 'no tar files'}")
        shard, names, offset, size, labels = zip(*images, strict=True)
        if len({type(label) for label in labels}) > 1:
            raise ValueError(f"{where}: some images have a .cls and some have none")
        if isinstance(labels[0], int):
            classes, labels = [str(number) for number in range(max(labels) + 1)], torch.tensor(labels)
        else:
            classes = sorted(set(labels))
            number = {name: i for i, name in enumerate(classes)}
            labels = torch.tensor([number[label] for label in labels])
        self.classes = _first(classes, first_classes, self.shards[0])
        kept = (labels < len(self.classes)).nonzero().flatten()
        if not len(kept):
            raise FileNotFoundError(f"there are no images of the first {first_classes} classes in {where}")
        self.index = torch.tensor([shard, offset, size]).T[kept].contiguous()
        self.names = _Names(names[i] for i in kept.tolist())
        self.labels = labels[kept]
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{shown(self.shards[self.index[index, 0]])}:{shown(self.names[index])}"

    def open(self, index: int) -> io.BytesIO:
        shard, offset, size = self.index[index].tolist()
        _check_size(size)
        if shard not in self._files:
            if len(self._files) == 2 * self.SHARDS_AT_ONCE:  # a process may hold some thousand at most
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = open_regular(self.shards[shard])
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


def read_image(source: Source, index: int, transform: Callable | None = None):
    """Decode one image, as RGB, and transform it.

    Raises:
        UnreadableImage: as `decode_image` does, or `transform` does; the message names the image.
    """
    name = source.name(index)
    with _named(name):
        file = source.open(index)
    image = decode_image(file, name)
    if transform is None:
        return image
    try:
        return transform(image)
    except UnreadableImage as error:
        raise UnreadableImage(f"{name}: {error}") from None


def decode_image(file: str | Path | io.BytesIO, name: str) -> Image.Image:
    """Decode an image, as RGB; of several in one file, the first.

    Raises:
        UnreadableImage: it is damaged, missing, no regular file, of none of `FORMATS`, or of too many pixels (see
            `check_pixels`) or scans; `name` names it.
    """
    with _named(name), _opened(file) as stream, Image.open(stream, formats=FORMATS) as image:
        check_pixels(*image.size, "it has")
        _check_work(image, stream)
        if 0 in image.size:
            raise ValueError("it has no pixels")
        return image.convert("RGB")


def _check_work(image: Image.Image, stream: io.BufferedIOBase) -> None:
    """Raise where decoding takes more work than the pixels tell."""
    if image.format == "TIFF" and (tile := [image.tag_v2.get(tag) for tag in (322, 323)]) != [None, None]:
        whole = [-(-size // int(side)) * int(side) for size, side in zip(image.size, tile, strict=True)]
        check_pixels(*whole, "its tiles have")
    if image.format in ("JPEG", "MPO"):
        place = stream.tell()
        stream.seek(0)
        data = stream.read()
        stream.seek(place)
        if data.count(SCAN) > MAX_SCANS and (scans := _scans(data)) > MAX_SCANS:
            raise ValueError(f"it has {scans:,} scans, and at most {MAX_SCANS} are allowed")


def _scans(jpeg: bytes) -> int:
    """How many scans are before the end of the first image; a video may follow it."""
    count, at = 0, 2
    while (marker := MARKER.search(jpeg, at)) and marker[0] != END:
        count += marker[0] == SCAN
        at = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
    return count


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Whatever goes wrong in reading an image is an `UnreadableImage`, except that a process has too many files open.

    Decoders raise errors of all kinds for damaged files: Pillow's own for a PNG cut short is a SyntaxError.
    """
    try:
        yield
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            f"{name} cannot be read as an image: it is none of {', '.join(FORMATS)}, or damaged"
        ) from error
    except Image.DecompressionBombError as error:  # Pillow's, at twice the limit
        raise UnreadableImage(f"{name} cannot be read as an image: it has too many pixels, {_at_most()}") from error
    except Exception as error:  # decoders raise errors of many types for damaged files
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise UnreadableImage(f"{name} cannot be read as an image: {str(error) or type(error).__name__}") from error


@contextlib.contextmanager
def _opened(file: str | Path | io.BytesIO) -> Iterator[io.BufferedIOBase]:
    if isinstance(file, io.BytesIO):
        yield file
        return
    with os.fdopen(open_regular(file), "rb") as stream:
        _check_size(os.fstat(stream.fileno()).st_size)
        yield stream


def _check_size(size: int) -> None:
    """Raise for a file larger than an image of as many pixels as allowed, of 16 bits in 4 channels, with 1 MiB more."""
    if Image.MAX_IMAGE_PIXELS is not None and size > (limit := 8 * Image.MAX_IMAGE_PIXELS + 2**20):
        raise ValueError(f"it has {size:,} bytes, and at most {limit:,} are allowed")


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
        ValueError: a file is no tar file, a shard is of both splits by its name, or the classes differ.
    """
    shards = {split: _shards(data_dir, split) for split in splits}
    for split, found in shards.items():
        if not found:
            raise FileNotFoundError(
                f"data_dir is {data_dir}; there are no shards {split}/*.tar or *{split}*.tar in it for '{split}'"
            )
    if both := sorted(set.intersection(*map(set, shards.values()))) if len(shards) > 1 else []:
        raise ValueError(
            f"data_dir is {data_dir}; {_some(both)} would be for {' and '.join(splits)} at once: put shards into "
            f"{' and '.join(f'{split}/' for split in splits)}"
        )
    sources = {split: TarSource(found, first_classes, num_workers) for split, found in shards.items()}
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
    shards = [data_dir] if not data_dir.is_dir() else _shards(data_dir, "val") or sorted(data_dir.glob("*.tar"))
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
        only = {s: f"{names[:10]}{f' and {len(names) - 10:,} more' * (len(names) > 10)}" for s, names in only.items()}
        raise ValueError(
            f"data_dir is {data_dir}; train/ and val/ must hold the same classes, "
            f"but only train/ has {only['train']} and only val/ has {only['val']}"
        )


def _first(classes: list[str], count: int | None, where: Path | str) -> list[str]:
    if count is not None and not 1 <= count <= len(classes):
        raise ValueError(f"first_classes is {count}; it must be 1 to {len(classes)}, the classes of {where}")
    return classes[:count]


def _shard_images(path: str) -> list[tuple[bytes, int, int, int | str]]:
    """(name, offset, size, class) of every image of a tar file; the class is a number or a folder's name."""
    cannot = f"{shown(path)} cannot be read as a tar file of images"
    try:
        file = open_regular(path)
    except NotRegular as error:
        raise ValueError(f"{cannot}: {error}") from None
    try:
        found, left_out = _classified(file)
    except ValueError as error:
        raise ValueError(f"{cannot}: {error}") from error
    finally:
        os.close(file)
    _warn(path, left_out)
    return found


def _classified(file: int) -> tuple[list[tuple[bytes, int, int, int | str]], LeftOut]:
    """The images of an open shard, and what is left out."""
    images, numbers, left_out = {}, {}, defaultdict(list)
    for member in members(file):
        name = str(PurePosixPath(os.fsdecode(member.name)))
        key, suffix = os.path.splitext(name)
        is_class = suffix.lower() == ".cls"
        if not is_class and (suffix.lower() not in IMG_EXTENSIONS or member.kind == FOLDER):
            if suffix.lower() in NOT_READ:
                left_out[OTHER_IMAGES].append(name)
            continue
        if member.kind != FILE:
            raise ValueError(f"{shown(name)} is a {member.kind}, and must be a plain file")
        if name in images or (is_class and key in numbers):
            raise ValueError(f"{shown(name)} is in it twice")
        if is_class:
            numbers[key] = _class_number(file, member)
        else:
            images[name] = member
    found, named = [], {}
    for name, member in images.items():
        key = os.path.splitext(name)[0]
        label = numbers.get(key, "") if numbers else PurePosixPath(name).parent.name
        if label == "":
            key = shown(key)
            raise ValueError(f"{shown(name)} has no class: there must be a {key}.cls, or a folder for each class")
        if numbers and named.setdefault(key, name) != name:
            raise ValueError(
                f"{shown(named[key])} and {shown(name)} have one {shown(key)}.cls for both, and it can be of one alone"
            )
        found.append((member.name, member.offset, member.size, label))
    if lone := sorted(numbers.keys() - named.keys()):
        left_out[".cls without an image"] = [f"{key}.cls" for key in lone]
    return found, left_out


def _class_number(file: int, member: Member) -> int:
    if member.size > 20:
        raise ValueError(f"{shown(member.name)} has {member.size:,} bytes; a .cls holds the number of a class alone")
    text = os.pread(file, member.size, member.offset).strip()
    if not re.fullmatch(rb"\d+", text) or int(text) >= MAX_CLASSES:
        raise ValueError(
            f"{shown(member.name)} says class {shown(text)}; classes are numbered from 0 to {MAX_CLASSES - 1:,}"
        )
    return int(text)


def _images_below(folder: str, left_out: LeftOut) -> list[str]:
    """The paths of all images below a folder, in `ImageFolder`'s order.

    Links are followed, but each folder is read once, by its own name where it has one: links that form a loop, or that
    lead to each other, can give it more names than there is time for.
    """
    found, waiting, seen = [], [(False, folder)], set()
    while waiting:
        _, root = heappop(waiting)
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            left_out["links to a folder that is read already"].append(root)
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(root) as entries:
            for entry in entries:
                name = entry.name.lower()
                if _is_folder(entry, left_out):
                    heappush(waiting, (entry.is_symlink(), entry.path))
                elif name.endswith(IMG_EXTENSIONS):
                    found.append((root, entry.name))
                elif name.endswith(NOT_READ):
                    left_out[OTHER_IMAGES].append(entry.path)
    return [os.path.join(*place) for place in sorted(found)]


def _is_folder(entry: os.DirEntry, left_out: LeftOut) -> bool:
    """Whether it is a folder, or a link to one; a link to nothing may have been one, unless it is named as an image."""
    if not entry.is_symlink():
        return entry.is_dir()
    try:
        return stat.S_ISDIR(entry.stat().st_mode)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        if not entry.name.lower().endswith(IMG_EXTENSIONS):
            left_out["links to nothing"].append(entry.path)
        return False


def _warn(where: str | Path, left_out: LeftOut) -> None:
    for what, names in left_out.items():
        warnings.warn(f"{shown(where)}: {what} are left out, {len(names):,} such as {shown(names[0])}", stacklevel=3)


def _some(names: Sequence[str]) -> str:
    """The first of many names, for a message."""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(map(shown, names[:5])) + more
