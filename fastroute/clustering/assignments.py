"""Write the cluster of each image, to a table and as links."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastroute._files import replacing
from fastroute.clustering.images import Loaded

LONGEST_NAME = 255  # bytes


def write_assignments(path: Path, paths: Sequence[str], posterior: Tensor) -> None:
    """Write a CSV row for each image: its path, its cluster, from 0, and its posterior of each cluster.

    Args:
        path: the file.
        paths: of N images.
        posterior: (N, K).

    Raises:
        OSError: the file cannot be written; it is then unchanged.
    """
    columns = [f"posterior_{cluster}" for cluster in range(posterior.shape[1])]
    with replacing(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "cluster", *columns])
        for name, cluster, row in zip(paths, posterior.argmax(1).tolist(), posterior.tolist(), strict=True):
            writer.writerow([name, cluster, *(f"{value:.6g}" for value in row)])


def link_by_cluster(folder: Path, paths: Sequence[str], posterior: Tensor) -> None:
    """Link to images in a folder for each cluster, by descending posterior: `3/0001-cat.jpg` is the clearest of 3.

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
            prefix = f"{place:0{len(str(len(members)))}}-"
            name = os.fsencode(os.path.basename(target))[len(prefix) - LONGEST_NAME :]
            (own / f"{prefix}{os.fsdecode(name)}").symlink_to(target)


def check_by_cluster(folder: Path, data_dir: Path | None, loaded: Loaded) -> None:
    """Check that `link_by_cluster` can write into a folder.

    Args:
        folder: for the links.
        data_dir: the folder of the images.
        loaded: the images.

    Raises:
        ValueError: the images are no files, the folder is not empty, or it lies in `data_dir`.
    """
    says = f"by_cluster is {folder};"
    if not loaded.files:
        raise ValueError(f"{says} it links to image files, but these images are not files of their own")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{says} it must be a new or an empty folder")
    if data_dir is not None and folder.resolve().is_relative_to(data_dir.resolve()):
        raise ValueError(
            f"{says} it lies in data_dir, {data_dir}, so that the next run would read the links: choose another folder"
        )
