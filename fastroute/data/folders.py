"""Find the images below a folder, and warn of what is left out."""

import errno
import os
import stat
import warnings
from heapq import heappop, heappush
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from fastroute.data.layout import hidden
from fastroute.data.tar import shown

NOT_READ = (".gif", ".avif", ".jxl", ".jp2", ".heic", ".heif", ".jfif", ".jpe", ".pbm", ".pnm", ".tga", ".svg")
"""Suffixes of images that are not read, which is worth a warning."""
OTHER_IMAGES = f"images of other names than {', '.join(IMG_EXTENSIONS)}"

LeftOut = dict[str, list[str]]
"""Kind → names of the files that are left out."""


def images_below(folder: str, left_out: LeftOut) -> list[str]:
    """Return the paths of all images below a folder, in `ImageFolder`'s order.

    Links are followed, but each folder is read once, under its own name if it has one there: looping links would give
    it endless names.
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
                if hidden(entry.name):
                    continue
                if is_folder(entry, left_out):
                    heappush(waiting, (entry.is_symlink(), entry.path))
                elif name.endswith(IMG_EXTENSIONS):
                    found.append((root, entry.name))
                elif name.endswith(NOT_READ):
                    left_out[OTHER_IMAGES].append(entry.path)
    return [os.path.join(*place) for place in sorted(found)]


def is_folder(entry: os.DirEntry, left_out: LeftOut) -> bool:
    """Return whether an entry is a folder or a link to one; note links to nothing, except those named as images."""
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


def warn_of(where: str | Path, left_out: LeftOut) -> None:
    """Warn of each kind of file that is left out of a folder or a shard."""
    for what, names in left_out.items():
        warnings.warn(f"{shown(where)}: {what} are left out, {len(names):,} such as {shown(names[0])}", stacklevel=3)
