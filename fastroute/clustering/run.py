"""A clustering run on images: data in memory, training with checkpoints and a table, or a classical method."""

import csv
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from rich.console import Console
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.nn import functional as F

from fastroute._files import replacing
from fastroute.clustering.metrics import label_metrics
from fastroute.clustering.module import ClusteringModule
from fastroute.data.in_memory import DATASETS, Options, decode
from fastroute.data.layout import all_shards, choose, class_folders, shards_of, split_folders
from fastroute.data.loaders import EpochLoader
from fastroute.data.module import STREAMED
from fastroute.data.seeding import generator
from fastroute.data.sources import FolderSource, TarSource
from fastroute.training.checkpoints import AtomicCheckpointIO, LastCheckpoint, RecoveryCheckpoint, read_resumable
from fastroute.training.run_folder import run_folder
from fastroute.training.saved_fields import check_training_state
from fastroute.training.steps import EpochMeans, FiniteWeights, StepSeed
from fastroute.training.trainer import quiet

HARD = "kmeans", "spectral"
"""Classical methods without posteriors."""
CLASSICAL = {
    "kmeans": lambda clusters, seed: KMeans(clusters, n_init=10, random_state=seed),
    "gmm": lambda clusters, seed: GaussianMixture(clusters, reg_covar=1e-3, random_state=seed),
    "spectral": lambda clusters, seed: SpectralClustering(
        clusters, affinity="nearest_neighbors", assign_labels="cluster_qr", random_state=seed
    ),
}


# CIFAR-100's superclass of each class, in the order of the names (§4.5.2 clusters these 20).
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

    images: float32 (N, C, H, W), from 0 to 1.
    labels: int64 (N,), of which −1 is none.
    classes: the names of the labels; none where the images have no classes.
    paths: a file's path, a tar file's and the member's, or the set's name and the place in it, for each image.
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
    """The first `limit` images of a data set; see `fastroute.data.in_memory`.

    "digits" and "stl10" are all images with labels; torchvision's other sets their training images. An "imagefolder" is
    its `train/`, or else the folder itself, whose folders are classes, unless images lie beside them or there is one
    alone; then it is all images below. A "webdataset" is its shards for training, or else all of them. CIFAR-100's
    labels are its 20 superclasses.

    Raises:
        ValueError: limit is not positive, or a folder is needed and not given.
        FileNotFoundError: the images are not there.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    if dataset in STREAMED and data_dir is None:
        raise ValueError(f"data_dir is None; the dataset {dataset!r} needs one")
    both = dataset in ("digits", "stl10")
    options = Options(data_dir, img_size, os.cpu_count() or 1, download, None, on_bad_image, train_only=not both)
    if dataset in STREAMED:
        source = _folder(data_dir) if dataset == "imagefolder" else _shards(data_dir, options.num_workers)
        if limit is not None:
            source = source.subset(torch.arange(min(limit, len(source))))
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


class Batches(EpochLoader):
    """Images that lie in memory, on the training device, by the batch: shuffled by a seed in batches of equal size, or
    in order without one."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
    ):
        super().__init__(len(labels), batch_size, seed, epoch, rank=0, world_size=1, finish=None)
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return super().__len__() if self.seed is None else max(1, self.count // self.batch_size)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(self.count)
        if self.seed is not None:
            order = torch.randperm(self.count, generator=generator(self.seed, epoch))
        for index in order.tensor_split(len(self))[start:]:
            index = index.to(self.images.device)
            yield self.images[index], self.labels[index]


class Table(pl.Callback):
    """One row for each epoch, on the console and in a CSV file; rows are part of the checkpoint."""

    def __init__(self, path: Path, console: Console):
        self.path, self.console, self.rows = path, console, []

    def state_dict(self) -> dict:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict) -> None:
        self.rows = list(state_dict["rows"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()  # of an epoch that is gone on with, too, which does not start again

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values = {name: value.item() for name, value in sorted(trainer.callback_metrics.items())}
        row = {"epoch": trainer.current_epoch + 1, **values, "seconds": time.perf_counter() - self._start}
        row["sizes"] = " ".join(map(str, pl_module.sizes))
        self.rows.append(row)
        write_rows(self.path, self.rows)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        self.console.print(
            f"epoch {row['epoch']}/{trainer.max_epochs}  {shown}  {row['seconds']:.1f} s", soft_wrap=True
        )


def write_rows(path: Path, rows: list[dict]) -> None:
    with replacing(path, newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


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


@torch.no_grad()
def posteriors(module: ClusteringModule, images: Tensor) -> Tensor:
    """(N, K), on the CPU: what the trained module says of images (N, C, H, W)."""
    module.eval()
    return torch.cat([module(part.to(module.device)).float().cpu() for part in images.split(1000)])


def check_resume(path: Path, module: ClusteringModule, epochs: int) -> dict:
    """Read a checkpoint; raise unless a run of the module can go on from it; see `fit`."""
    checkpoint = read_resumable(path, "cluster", dict(module.hparams), epochs)
    check_training_state(checkpoint, module, path)
    return checkpoint


def fit(
    module: ClusteringModule,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int,
    output: Path,
    console: Console,
    seed: int = 0,
    amp: bool = False,
    resume: Path | None = None,
) -> list[dict]:
    """Train on all images, and write `last.ckpt`, `previous.ckpt` (the one before it) and `summary.csv` into `output`;
    returns the rows of the summary.

    A run that goes on from `resume` ends as one that was never stopped.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is no checkpoint, is damaged, or of another run, or leaves no epoch to train.
        FolderInUse: another run writes into `output`.
        FloatingPointError: weights are NaN or infinite; the checkpoints from before stay.
        OSError: a file cannot be written; the last whole checkpoint stays.
        Terminated: SIGTERM or Ctrl-C came, and `last.ckpt` is written.
    """
    checkpoints = AtomicCheckpointIO(resume, None if resume is None else check_resume(resume, module, epochs))
    table = Table(output / "summary.csv", console)
    with run_folder(output), quiet():
        trainer = pl.Trainer(
            max_epochs=epochs,
            devices=1,
            precision="bf16-mixed" if amp else "32-true",
            logger=False,
            callbacks=[
                StepSeed(seed),
                FiniteWeights(output / "last.ckpt", advice="lower it"),
                EpochMeans(),
                table,
                RecoveryCheckpoint(output / "last.ckpt"),
                LastCheckpoint(dirpath=output, enable_version_counter=False, save_on_train_epoch_end=True),
            ],
            plugins=[checkpoints],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        images, labels = (t.to(trainer.strategy.root_device) for t in (images, labels))
        training = Batches(images, labels, batch_size, seed, lambda: trainer.current_epoch)
        trainer.fit(module, training, Batches(images, labels, 1000), ckpt_path=resume)
    return table.rows


def fit_classical(
    method: str, images: Tensor, labels: Tensor, clusters: int, seed: int, output: Path, console: Console
) -> Tensor:
    """Cluster the pixels by a method of scikit-learn, and write `summary.csv` as `fit` does.

    Returns:
        posteriors (N, K), of ones and zeros for methods that have none.
    """
    start, pixels = time.perf_counter(), images.flatten(1).numpy()
    model = CLASSICAL[method](clusters, seed)
    found = model.fit_predict(pixels)
    row = {
        **label_metrics(labels, found),
        "seconds": time.perf_counter() - start,
        "sizes": " ".join(map(str, np.bincount(found, minlength=clusters))),
    }
    with run_folder(output):
        write_rows(output / "summary.csv", [row])
    console.print("  ".join(f"{name} {value:.3f}" for name, value in row.items() if name != "sizes"))
    if method in HARD:
        return F.one_hot(torch.as_tensor(found).long(), clusters).float()
    return torch.from_numpy(model.predict_proba(pixels)).float()
