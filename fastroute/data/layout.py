"""Recognise the layout of a folder of data, by names alone."""

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from fastroute.data.tar import shown, some

TORCHVISION = {
    "mnist": "MNIST",
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "stl10": "stl10_binary",
}
"""Data set → the folder in which torchvision keeps its files."""
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")
"""Folders that macOS and network disks put beside images; they hold other images."""
SPLITS = frozenset(("train", "val", "test", "valid", "validation"))
MAX_SHARDS = 100_000
MAX_ENTRIES = 10_000
"""The most entries of a folder and its subfolders that are searched for a first image."""
EXPECTED = (
    "train/ and val/ with a folder of images for each class, folders of images for each class, tar shards, or the "
    "files of MNIST, CIFAR-10, CIFAR-100 or STL-10 as torchvision keeps them"
)


class Layout(NamedTuple):
    """A layout that a folder was recognised as.

    dataset: the data set of that layout, such as "imagefolder".
    root: the folder to give to its reader.
    what: a description in words.
    validated: whether it has validation images.
    """

    dataset: str
    root: Path
    what: str
    validated: bool = True


def hidden(name: str) -> bool:
    """Return whether a file or folder is hidden or the system's, such as `.ipynb_checkpoints` or `._x.jpg`."""
    return (name.startswith(".") and name not in (".", "..")) or name in SYSTEM_FOLDERS


def layouts(data_dir: Path) -> list[Layout]:
    """Return all layouts as which a folder, a tar file or a pattern of tar files can be read.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the pattern is wrong.
    """
    if (shards := expanded(data_dir)) is not None:
        named = all(shards_of(data_dir, split) for split in ("train", "val"))
        return [Layout("webdataset", data_dir, f"{len(shards):,} tar shards", named)]
    if not data_dir.exists():
        raise FileNotFoundError(f"data_dir is {shown(data_dir)}; there is no such file or folder")
    if not data_dir.is_dir():
        return [Layout("webdataset", data_dir, "a tar file", False)] if data_dir.suffix == ".tar" else []
    found = []
    for dataset, name in TORCHVISION.items():
        root = data_dir.parent if data_dir.name == name and not (data_dir / name).is_dir() else data_dir
        if (root / name).is_dir():
            found.append(Layout(dataset, root, f"{name}/"))
    has_val = (data_dir / "val").is_dir()
    shards = {split: shards_of(data_dir, split) for split in ("train", "val")}
    if split_folders(data_dir):
        what = "class folders under train/ and val/" if has_val else "class folders under train/"
        found.append(Layout("imagefolder", data_dir, what, has_val))
    elif any(shards.values()):
        what = f"tar shards for {' and '.join(split for split, paths in shards.items() if paths)}"
        found.append(Layout("webdataset", data_dir, what, bool(shards["val"])))
    elif shards_in(data_dir):
        found.append(Layout("webdataset", data_dir, "tar shards", False))
    if not found and has_val and class_folders(data_dir / "val"):
        found.append(Layout("imagefolder", data_dir, "class folders under val/"))
    if not found and len(folders := class_folders(data_dir)) > 1:
        found.append(Layout("imagefolder", data_dir, f"{len(folders)} folders of images", False))
    return found


def choose(data_dir: Path, dataset: str | None = None, *, any_split: bool = False) -> Layout:
    """Choose the layout of a folder.

    Args:
        data_dir: the folder, a tar file, or a pattern such as `train-{0000..0127}.tar`.
        dataset: the data set that it must hold; None takes the one that it holds.
        any_split: whether data without validation images are allowed.

    Raises:
        FileNotFoundError: there is no such folder, or it has none of the layouts.
        ValueError: the folder holds another data set, several, or no validation images.
    """
    found = layouts(data_dir)
    shown_dir = shown(data_dir)
    if dataset is not None:
        own = [layout for layout in found if layout.dataset == dataset]
        if found and not own:
            raise ValueError(
                f"data_dir is {shown_dir}; it holds {found[0].what}, for the dataset {found[0].dataset!r}, not "
                f"{dataset!r}"
            )
        found = own or [Layout(dataset, data_dir, "")]  # the reader's message says what is missing
    if not found:
        raise FileNotFoundError(f"data_dir is {shown_dir}; it holds {_contents(data_dir)}, and must hold {EXPECTED}")
    if len(found) > 1:
        names = [layout.dataset for layout in found]
        raise ValueError(f"data_dir is {shown_dir}; it holds {' and '.join(names)}: choose one by dataset")
    layout = found[0]
    if not layout.validated and not any_split:
        raise ValueError(
            f"data_dir is {shown_dir}; it holds {layout.what}, and no images for val: add them, or set a share of the "
            "images of each class aside by val_split, such as 0.1"
        )
    return layout


def split_folders(data_dir: Path) -> bool:
    """Return whether `train/` holds class folders, not shards, and is no class itself.

    It may be a class if it also holds images itself, unless there is another split beside it that holds class folders.
    """
    train, others = data_dir / "train", [data_dir / name for name in SPLITS - {"train"}]
    if not train.is_dir() or not _holds_folders_of_images(train):
        return False
    return not _holds_images(train) or any(other.is_dir() and _holds_folders_of_images(other) for other in others)


def _holds_folders_of_images(folder: Path) -> bool:
    return any(has_images(folder / name) for name in folders(folder))


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the class folders: those with images in or below them.

    A folder that also holds images itself, or only folders named as splits, has no class folders.
    """
    if _holds_images(folder) or SPLITS.issuperset(names := folders(folder)):
        return []
    return [name for name in names if has_images(folder / name)]


def folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in a folder, without the hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not hidden(entry.name) and _is_dir(entry))


def _holds_images(folder: Path) -> bool:
    """Return whether a folder holds images itself."""
    with os.scandir(folder) as entries:
        return any(
            entry.name.lower().endswith(IMG_EXTENSIONS) and not hidden(entry.name) and not _is_dir(entry)
            for entry in entries
        )


def _is_dir(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or through a folder that cannot be read
        return False


def has_images(folder: Path) -> bool:
    """Return whether there is an image among the first `MAX_ENTRIES` entries in or below a folder, also by links."""
    waiting, left, seen = [str(folder)], MAX_ENTRIES, set()
    while waiting and left > 0:
        place = waiting.pop()
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above
            continue
        seen.add(real)
        with os.scandir(place) as entries:
            for entry in itertools.islice(entries, left):
                left -= 1
                if hidden(entry.name):
                    continue
                if _is_dir(entry):
                    waiting.append(entry.path)
                elif entry.name.lower().endswith(IMG_EXTENSIONS):
                    return True
    return False


def shards_in(folder: Path) -> list[Path]:
    """Return the sorted tar files in a folder."""
    return sorted(path for path in folder.glob("*.tar") if not hidden(path.name))


def shards_of(data_dir: Path, split: str) -> list[Path]:
    """Return the tar files of "train" or "val": those in the folder of that name, or with it in their own name."""
    if (shards := expanded(data_dir)) is not None:
        return [path for path in shards if path.parent.name == split or split in path.name]
    return shards_in(data_dir / split) or [path for path in shards_in(data_dir) if split in path.name]


def all_shards(data_dir: Path) -> list[Path]:
    """Return the tar files of a folder or a pattern, or the one at the path."""
    if (shards := expanded(data_dir)) is not None:
        return shards
    return shards_in(data_dir) if data_dir.is_dir() else [data_dir]


def expanded(pattern: Path) -> list[Path] | None:
    """Expand a pattern as WebDataset does, `a-{000..127}.tar` or `{a,b}.tar`, and `*`, `?` and `[ ]`.

    None stands for a plain path.

    Raises:
        ValueError: the pattern is wrong, or stands for more than `MAX_SHARDS` files.
    """
    text = str(pattern)
    if pattern.exists():
        return None
    if not re.search(r"\{.*(\.\.|,).*\}", text):
        return _matches(pattern) or None
    parts = re.split(r"\{([^{}]*)\}", text)
    if any("{" in part or "}" in part for part in parts):
        raise ValueError(f"data_dir is {shown(text)}; its braces do not match")
    choices = [_choices(part, text) if i % 2 else [part] for i, part in enumerate(parts)]
    count = 1
    for items in choices:
        count *= len(items)
    if count > MAX_SHARDS:
        raise ValueError(f"data_dir is {shown(text)}; it stands for {count:,} files, and at most {MAX_SHARDS:,} may be")
    paths = [Path("".join(items)) for items in itertools.product(*choices)]
    return [found for path in paths for found in _matches(path) or [path]]


def _matches(pattern: Path) -> list[Path]:
    """Return the sorted tar files that match a pattern of `*`, `?` and `[ ]` below the folders that exist."""
    if pattern.suffix != ".tar" or not re.search(r"[*?[]", str(pattern)):
        return []
    above = next((parent for parent in pattern.parents if parent.exists()), Path())
    below = str(pattern.relative_to(above))
    found = glob.glob(os.path.join(glob.escape(str(above)), below))
    return [path for path in map(Path, sorted(found)) if not hidden(path.name)]


def _choices(text: str, pattern: str) -> Sequence[str]:
    if match := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", text, re.ASCII):
        first, last = int(match[1]), int(match[2])
        if 0 <= last - first < MAX_SHARDS:
            return [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    elif "," in text:
        return text.split(",")
    raise ValueError(
        f"data_dir is {shown(pattern)}; {{{shown(text)}}} must be two numbers, the smaller first, such as "
        f"{{0000..0127}}, of at most {MAX_SHARDS:,} files, or names, such as {{a,b}}"
    )


def _contents(folder: Path) -> str:
    """Describe what is in a folder of no known layout, and name a likely folder in it."""
    if not folder.is_dir():
        if folder.suffix.lower() in (".csv", ".tsv"):
            return "a table, which is not read: link its images into a folder for each class"
        return "no folder and no .tar file (compressed archives are not read: unpack it)"
    names = sorted(_visible(folder))
    if not names:
        return "nothing"
    inner = next((name for name in names[:100] if name.endswith("/") and _readable(folder / name)), None)
    return some(names) + (f" (did you mean {shown(folder / inner)}?)" if inner else "")


def _visible(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in itertools.islice(entries, MAX_ENTRIES):
            if not hidden(entry.name):
                yield entry.name + ("/" if entry.is_dir() else "")


def _readable(folder: Path) -> bool:
    try:
        return bool(layouts(folder))
    except (OSError, ValueError):
        return False
