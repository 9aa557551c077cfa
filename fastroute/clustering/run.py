"""A clustering run on images: data in memory, training with checkpoints and a table, or a classical method."""

import csv
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from rich.console import Console
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from torch import Tensor

from fastroute._files import replacing
from fastroute.clustering.metrics import cluster_accuracy, many_to_one_accuracy
from fastroute.clustering.module import ClusteringModule
from fastroute.data.in_memory import DATASETS, Options
from fastroute.data.loaders import EpochLoader
from fastroute.data.seeding import generator
from fastroute.training.checkpoints import AtomicCheckpointIO, LastCheckpoint, RecoveryCheckpoint, read_resumable
from fastroute.training.run_folder import run_folder
from fastroute.training.saved_fields import check_training_state
from fastroute.training.steps import EpochMeans, FiniteWeights, StepSeed
from fastroute.training.trainer import quiet

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


def load_images(
    dataset: str,
    data_dir: Path | None = None,
    limit: int | None = None,
    img_size: int | None = None,
    download: bool = False,
) -> tuple[Tensor, Tensor]:
    """Images float32 (N, C, H, W) from 0 to 1, and labels (N,): the first `limit`.

    "digits" and "stl10" are all images with labels; others the training images of `fastroute.data.in_memory`.
    CIFAR-100's labels are its 20 superclasses.

    Raises:
        ValueError: limit is not positive, or imagefolder comes without data_dir.
        FileNotFoundError: the images are not there.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    if dataset == "imagefolder" and data_dir is None:
        raise ValueError("data_dir is None; the dataset 'imagefolder' needs one")
    both = dataset in ("digits", "stl10")
    found = DATASETS[dataset](Options(data_dir, img_size, os.cpu_count() or 1, download, train_only=not both))
    splits = [found.train, found.val] if both else [found.train]
    images, labels = (torch.cat(parts)[:limit] for parts in zip(*splits, strict=True))
    if dataset == "cifar100":
        labels = torch.tensor(CIFAR100_SUPERCLASSES)[labels]
    return images.permute(0, 3, 1, 2).float() / 255, labels


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
    if resume is not None:
        check_training_state(read_resumable(resume, "cluster", dict(module.hparams), epochs), module, resume)
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
            plugins=[AtomicCheckpointIO(resume)],
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
) -> list[dict]:
    """Cluster the pixels by a method of scikit-learn, and write `summary.csv` as `fit` does."""
    start = time.perf_counter()
    found = CLASSICAL[method](clusters, seed).fit_predict(images.flatten(1).numpy())
    row = {
        "acc": cluster_accuracy(labels, found),
        "acc_many": many_to_one_accuracy(labels, found),
        "nmi": normalized_mutual_info_score(labels, found),
        "ari": adjusted_rand_score(labels, found),
        "seconds": time.perf_counter() - start,
        "sizes": " ".join(map(str, np.bincount(found, minlength=clusters))),
    }
    with run_folder(output):
        write_rows(output / "summary.csv", [row])
    console.print("  ".join(f"{name} {row[name]:.3f}" for name in ("acc", "acc_many", "nmi", "ari", "seconds")))
    return [row]
