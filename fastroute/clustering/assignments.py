"""Files that say which cluster each image is in."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastroute._files import replacing
from fastroute.clustering.images import Loaded


def write_assignments(path: Path, paths: Sequence[str], posterior: Tensor) -> None:
    """A CSV row for each image: its path, its cluster, from 0, and its posterior of each cluster.

    Args:
        path: the file.
        paths: of N images.
        posterior: (N, K).
    """
    columns = [f"posterior_{cluster}" for cluster in range(posterior.shape[1])]
    with replacing(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "cluster", *columns])
        for name, cluster, row in zip(paths, posterior.argmax(1).tolist(), posterior.tolist(), strict=True):
            writer.writerow([name, cluster, *(f"{value:.6g}" for value in row)])


def link_by_cluster(folder: Path, paths: Sequence[str], posterior: Tensor) -> None:
    """Links to images, in a folder for each cluster, by falling posterior: `3/0001-cat.jpg` is its clearest image.

    Args:
        folder: made if it is missing.
        paths: of N image files.
        posterior: (N, K).

    Raises:
        OSError: a link cannot be made.
    """
    width = len(str(posterior.shape[1] - 1))
    certainty, found = posterior.max(1)
    for cluster in range(posterior.shape[1]):
        own = folder / f"{cluster:0{width}}"
        own.mkdir(parents=True, exist_ok=True)
        members = (found == cluster).nonzero().flatten()
        members = members[certainty[members].argsort(descending=True, stable=True)]
        for place, index in enumerate(members.tolist(), 1):
            target = os.path.abspath(paths[index])
            (own / f"{place:0{len(str(len(members)))}}-{os.path.basename(target)}"[-255:]).symlink_to(target)


def check_by_cluster(folder: Path, data_dir: Path | None, loaded: Loaded) -> None:
    """Raise where `link_by_cluster` could not, or should not, write into a folder.

    Raises:
        ValueError: the images are no files, the folder is not empty, or it lies among the images.
    """
    says = f"by_cluster is {folder};"
    if not loaded.files:
        raise ValueError(f"{says} it links to image files, which a folder of images has, and these images are none")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{says} it must be a new or an empty folder")
    if data_dir is not None and folder.resolve().is_relative_to(data_dir.resolve()):
        raise ValueError(f"{says} it lies in data_dir, {data_dir}, whose images a next run reads: choose another place")
