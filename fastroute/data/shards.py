"""Read the index of a tar shard: where its images lie, and of which class each is."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from fastroute.data.folders import NOT_READ, OTHER_IMAGES, LeftOut, warn_of
from fastroute.data.layout import hidden
from fastroute.data.tar import FILE, FOLDER, Member, NotRegular, members, open_regular, shown

MAX_CLASSES = 1_000_000
"""Class numbers must be below this: a network has a logit for each class up to the largest number."""

LABEL_KEYS = ("label", "cls", "class", "class_name", "target")
"""The keys of a `.json` that may hold the class of an image; the first one found counts."""
MAX_JSON = 2**20
MAX_CLASS_NAME = 1000
"""The most bytes of a `.json`, and of a `.cls` or `.txt`."""


class Labelled(NamedTuple):
    """An image of a shard.

    name: its bytes.
    offset, size: of its data, in bytes.
    label: its class, a number or a name.
    way: how the shard gives the class, in words.
    """

    name: bytes
    offset: int
    size: int
    label: int | str
    way: str


BY_NUMBER, BY_NAME, BY_FOLDER = "a number as class", "a name as class", "the name of their folder as class"


def shard_images(path: str, keys: Sequence[str] = ()) -> list[Labelled]:
    """Return the images of a shard, in its order.

    Args:
        path: the shard.
        keys: which image to take of samples that have several, from `input_keys`; none takes all.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a tar file of images with a class each.
    """
    cannot = f"{shown(path)} cannot be read as a tar file of images"
    try:
        file = open_regular(path)
    except NotRegular as error:
        raise ValueError(f"{cannot}: {error}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{cannot}: there is no such file") from None
    try:
        found, left_out = _classified(file, keys)
    except ValueError as error:
        raise ValueError(f"{cannot}: {error}") from error
    finally:
        os.close(file)
    warn_of(path, left_out)
    return found


def _classified(file: int, keys: Sequence[str]) -> tuple[list[Labelled], LeftOut]:
    """Return the images of an open shard, and what is left out."""
    images, labels, left_out = {}, {}, defaultdict(list)
    for member in members(file):
        path = PurePosixPath(os.fsdecode(member.name))
        name, suffix = str(path), path.suffix.lower()
        key = name[: len(name) - len(suffix)]
        if any(map(hidden, path.parts)) or (suffix in (".json", ".txt") and member.kind != FILE):
            continue
        is_label = suffix in (".cls", ".json", ".txt")
        if not is_label and (suffix not in IMG_EXTENSIONS or member.kind == FOLDER):
            if suffix in NOT_READ:
                left_out[OTHER_IMAGES].append(name)
            continue
        if member.kind != FILE:
            raise ValueError(f"{shown(name)} is a {member.kind}, and must be a plain file")
        if name in images or (key, suffix) in labels:
            raise ValueError(f"{shown(name)} is in it twice")
        if is_label:
            labels[key, suffix] = member
        else:
            images[name] = member
    if keys:
        images = _of_keys(images, keys)
    found, used, read = [], {}, {}
    numbered = any(suffix == ".cls" for _, suffix in labels)
    for name, member in images.items():
        place, label = _label_of(name, labels, numbered, file, read)
        if label == "":
            key = shown(os.path.splitext(name)[0])
            raise ValueError(f"{shown(name)} has no class: there must be a {key}.cls, or a folder for each class")
        if place is not None and used.setdefault(place, name) != name:
            raise ValueError(
                f"{shown(used[place])} and {shown(name)} have one {shown(''.join(place))} for both, and it can be of "
                f"one alone: choose one by input_key, such as {_keyed(name)[1]!r}"
            )
        way = BY_FOLDER if place is None else BY_NUMBER if isinstance(label, int) else BY_NAME
        found.append(Labelled(member.name, member.offset, member.size, label, way))
    if lone := sorted({key for key, suffix in labels if suffix == ".cls"} - {key for key, _ in used}):
        left_out[".cls without an image"] = [f"{key}.cls" for key in lone]
    return found, left_out


Labels = dict[tuple[str, str], Member]
"""(name without suffix, suffix) → the member that gives a class."""


def _label_of(
    name: str, labels: Labels, numbered: bool, file: int, read: dict[tuple[str, str], int | str | None]
) -> tuple[tuple[str, str] | None, int | str]:
    """Return the place that gives the class of an image, None for its folder, and the class, "" if there is none.

    `a.left.jpg` takes `a.left.cls`, or else WebDataset's `a.cls`. If one image has a `.cls`, all must have one. In a
    folder, a `.txt` gives no class: there it is often a caption.
    """
    folder = PurePosixPath(name).parent.name
    suffixes = (".cls",) if numbered else (".json",) if folder else (".json", ".txt")
    for suffix in suffixes:
        for key in dict.fromkeys((os.path.splitext(name)[0], _keyed(name)[0])):
            if (place := (key, suffix)) not in labels:
                continue
            if place not in read:
                read[place] = _label_in(file, labels[place], suffix)
            if read[place] is not None:
                return place, read[place]
    return None, "" if numbered else folder


def _label_in(file: int, member: Member, suffix: str) -> int | str | None:
    """Return the class in a `.cls`, a `.txt` or a `.json`; None if a `.json` has none."""
    name, most = shown(member.name), MAX_JSON if suffix == ".json" else MAX_CLASS_NAME
    if member.size > most:
        raise ValueError(f"{name} has {member.size:,} bytes; a {suffix} with a class has at most {most:,}")
    text = os.pread(file, member.size, member.offset)
    if suffix != ".json":
        return _class(text.strip().decode("utf-8", "backslashreplace"), name)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is no JSON") from None
    labels = [fields[key] for key in LABEL_KEYS if fields.get(key) is not None] if isinstance(fields, dict) else []
    if not labels:
        return None
    if isinstance(labels[0], bool) or not isinstance(labels[0], str | int | float):
        raise ValueError(f"{name} says class {shown(json.dumps(labels[0])[:50])}; it must be a number or a name")
    return _class(str(labels[0]), name)


def _class(text: str, name: str) -> int | str:
    number = re.fullmatch(r"[+-]?[\d.]+", text, re.ASCII)
    whole = re.fullmatch(r"\d{1,20}", text, re.ASCII)
    if not text or len(text) > MAX_CLASS_NAME or not text.isprintable() or (number and not whole):
        text = text[:50]
    elif not whole or int(text) < MAX_CLASSES:
        return int(text) if whole else text
    raise ValueError(
        f"{name} says class {shown(text)}; classes are numbered from 0 to {MAX_CLASSES - 1:,}, or have names of one "
        "line"
    )


def _keyed(name: str) -> tuple[str, str]:
    """Split a name into WebDataset's key and the rest: "a/0.left.jpg" into "a/0" and "left.jpg"."""
    folder, slash, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    return f"{folder}{slash}{stem}", rest.lower()


def input_keys(input_key: str | None) -> list[str]:
    """Return the keys of an `input_key` such as "left.jpg;jpg".

    Raises:
        ValueError: a key does not end as an image does.
    """
    keys = [key.strip().strip(".").lower() for key in (input_key or "").split(";") if key.strip()]
    if wrong := [key for key in keys if not f".{key}".endswith(IMG_EXTENSIONS)]:
        raise ValueError(
            f"input_key is {input_key!r}; {wrong[0]!r} must end as an image does: {', '.join(IMG_EXTENSIONS)}"
        )
    return keys


def _of_keys(images: dict[str, Member], keys: Sequence[str]) -> dict[str, Member]:
    """Keep for each WebDataset key the image whose rest comes first in `keys`."""
    best: dict[str, str] = {}
    for name in images:
        key, rest = _keyed(name)
        if rest in keys and (key not in best or keys.index(rest) < keys.index(_keyed(best[key])[1])):
            best[key] = name
    return {name: images[name] for name in images if best.get(_keyed(name)[0]) == name}
