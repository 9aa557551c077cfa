"""A clustering run on images: data in memory, training with checkpoints and a table, or a classical method."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from rich.console import Console
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.nn import functional as F

from fastroute.clustering.metrics import label_metrics
from fastroute.clustering.module import ClusteringModule
from fastroute.data.loaders import EpochLoader
from fastroute.data.seeding import generator
from fastroute.training.checkpoints import read_resumable
from fastroute.training.run_folder import run_folder
from fastroute.training.saved_state import check_training_state
from fastroute.training.saving import AtomicCheckpointIO, LastCheckpoint, RecoveryCheckpoint
from fastroute.training.steps import EpochMeans, FiniteWeights, StepSeed
from fastroute.training.tables import RowTable, write_csv
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


class Table(RowTable):
    """Print a row for each epoch, and write them to a CSV file.

    Args:
        path: the file.
        console: to print on.
    """

    def __init__(self, path: Path, console: Console):
        super().__init__(path)
        self.console = console

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()  # of an epoch that is gone on with, too, which does not start again

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values = {name: value.item() for name, value in sorted(trainer.callback_metrics.items())}
        row = {"epoch": trainer.current_epoch + 1, **values, "seconds": time.perf_counter() - self._start}
        row["sizes"] = " ".join(map(str, pl_module.sizes))
        self.rows.append(row)
        self.write()
        shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        self.console.print(
            f"epoch {row['epoch']}/{trainer.max_epochs}  {shown}  {row['seconds']:.1f} s", soft_wrap=True
        )


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
        write_csv(output / "summary.csv", [row])
    console.print("  ".join(f"{name} {value:.3f}" for name, value in row.items() if name != "sizes"))
    if method in HARD:
        return F.one_hot(torch.as_tensor(found).long(), clusters).float()
    return torch.from_numpy(model.predict_proba(pixels)).float()
