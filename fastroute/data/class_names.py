"""The classes of image folders and tar shards: their names, their numbers, and checks of both."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastroute.data.folders import warn_of
from fastroute.data.tar import NotRegular, open_regular, shown, some

if TYPE_CHECKING:
    from fastroute.data.sources import Source

MAX_CLASS_MAP = 2**26
"""The most bytes of a file of class names."""


def read_class_map(path: Path) -> list[str]:
    """Read the names of classes from a text file, one a line, in the order of their numbers.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no text, or has no names or a name twice.
    """
    says = f"class_map is {shown(path)};"
    try:
        file = open_regular(path)
    except NotRegular as error:
        raise ValueError(f"{says} {error}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{says} there is no such file") from None
    with os.fdopen(file, "rb") as stream:
        data = stream.read(MAX_CLASS_MAP + 1)
    if len(data) > MAX_CLASS_MAP:
        raise ValueError(f"{says} it has more than {MAX_CLASS_MAP:,} bytes")
    try:
        names = [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{says} it must be a text in UTF-8, with the name of a class on each line") from None
    if not names or len(set(names)) < len(names):
        repeated = next((name for i, name in enumerate(names) if name in names[:i]), None)
        raise ValueError(f"{says} {f'it names {shown(repeated)} twice' if repeated else 'it names no class'}")
    return names


def check_classes(data_dir: Path, sources: dict[str, "Source"]) -> None:
    """Check that `train` and `val` hold images of the same classes.

    Raises:
        ValueError: they do not; the message names the missing classes.
    """
    present = {split: {source.classes[i] for i in source.labels.unique()} for split, source in sources.items()}
    only = {s: sorted(present[s] - present[o]) for s, o in (("train", "val"), ("val", "train"))}
    if not any(only.values()):
        return
    has = " and ".join(
        f"only {split}/ has {names[:10]}{f' and {len(names) - 10:,} more' * (len(names) > 10)}"
        for split, names in only.items()
        if names
    )
    lacks = "" if all(only.values()) else f", which {'val/' if only['train'] else 'train/'} lacks"
    raise ValueError(f"data_dir is {data_dir}; train/ and val/ must hold the same classes, but {has}{lacks}")


def warn_of_empty(data_dir: Path, source: "Source") -> None:
    """Warn of classes without an image, as of numbers that start at 1."""
    counts = torch.bincount(source.labels, minlength=len(source.classes))
    if empty := [name for name, count in zip(source.classes, counts.tolist(), strict=True) if not count]:
        start = " (numbers start at 0)" if empty[0] == "0" else ""
        warnings.warn(
            f"data_dir is {data_dir}; no training image is of the classes {some(empty)}{start}",
            stacklevel=3,
        )


def warn_of_sorted(data_dir: Path, labels: Tensor, shard: Tensor, together: int) -> None:
    """Warn if each shard holds few of the classes, so that each batch does too.

    Args:
        data_dir: of the shards, for the message.
        labels, shard: (N,), int64, the class and the shard of each image.
        together: the number of shards that are shuffled together.
    """
    shards, classes = shard.unique().numel(), labels.unique().numel()
    held = (shard * (labels.max() + 1) + labels).unique().numel() / shards
    if together * held < classes / 2 and shards > together:
        warnings.warn(
            f"data_dir is {data_dir}; its {shards} shards hold {held:.3g} of {classes} classes each, and {together} "
            "are shuffled together, so batches hold few classes: shuffle the images before packing them",
            stacklevel=3,
        )


def first_of(classes: list[str], count: int | None, where: Path | str) -> list[str]:
    """Return the first `count` classes, all if it is None; raise `ValueError` if there are fewer."""
    if count is not None and not 1 <= count <= len(classes):
        raise ValueError(f"first_classes is {count}; it must be 1 to {len(classes)}, the classes of {where}")
    return classes[:count]


def numbers_of(
    labels: Sequence[int | str], class_map: Sequence[str] | None, where: str, first_classes: int | None = None
) -> tuple[list[str], Tensor]:
    """Return the names of the classes, and the number of each label; −1 for a name that is not in the class map.

    A class map of `first_classes` names need not name the others.
    """
    if isinstance(labels[0], int):
        if class_map is not None and max(labels) >= len(class_map) != first_classes:
            raise ValueError(
                f"{where}: there are images of class {max(labels)}, but the class map names {len(class_map)} classes, "
                f"0 to {len(class_map) - 1}"
            )
        classes = [str(number) for number in range(max(labels) + 1)] if class_map is None else list(class_map)
        return classes, torch.tensor(labels)
    classes = sorted(set(labels)) if class_map is None else list(class_map)
    number = {name: i for i, name in enumerate(classes)}
    if others := sorted(set(labels) - number.keys()):
        warn_of(where, {"classes that the class map does not name": others})
    return classes, torch.tensor([number.get(label, -1) for label in labels])
