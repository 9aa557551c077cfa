"""Clustering of images in memory: training with checkpoints and a table, or a classical method."""

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
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
from fastroute.ops._instruction_set import warn_if_emulated
from fastroute.training.callbacks import FirstBatch
from fastroute.training.checkpoints import read_resumable, remove_results
from fastroute.training.run_folder import local_path, run_folder
from fastroute.training.saved_state import check_training_state
from fastroute.training.saving import AtomicCheckpointIO, LastCheckpoint, RecoveryCheckpoint
from fastroute.training.steps import EpochMeans, FiniteWeights, StepSeed
from fastroute.training.tables import RowTable, write_csv
from fastroute.training.trainer import silence_lightning

HARD = "kmeans", "spectral"
"""Classical methods without posteriors."""
CLASSICAL = {
    "kmeans": lambda images, clusters, seed: KMeans(clusters, n_init=10, random_state=seed),
    "gmm": lambda images, clusters, seed: GaussianMixture(clusters, reg_covar=1e-3, random_state=seed),
    "spectral": lambda images, clusters, seed: SpectralClustering(
        clusters,
        affinity="nearest_neighbors",
        n_neighbors=min(10, images),  # an image is among its own
        assign_labels="cluster_qr",
        random_state=seed,
    ),
}


class Batches(EpochLoader):
    """Batches of images in the memory of the training device: in order, or shuffled, in about equal sizes.

    Shuffled batches also have the images' places (N,), int64.

    Args:
        images: (N, C, H, W).
        labels: (N,).
        batch_size: images of a batch.
        seed: of the order; None keeps the order.
        epoch: returns the epoch, which also determines the order.
    """

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

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        order = torch.arange(self.count)
        if self.seed is not None:
            order = torch.randperm(self.count, generator=generator(self.seed, epoch))
        for index in order.tensor_split(len(self))[start:]:
            index = index.to(self.images.device)
            batch = self.images[index], self.labels[index]
            yield batch if self.seed is None else (*batch, index)


class Table(RowTable):
    """Print a row for each epoch, and write them to a CSV file.

    Args:
        path: the file.
        console: to print on.
    """

    def __init__(self, path: Path, console: Console):
        super().__init__(path)
        self.console = console
        self._before: dict[str, Tensor] = {}  # metrics, which Lightning keeps until they are logged anew

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()  # on_train_epoch_start is not called in a run resumed within an epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()
        self._before = dict(trainer.callback_metrics)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = sorted(trainer.callback_metrics.items())
        values = {name: value.item() for name, value in metrics if value is not self._before.get(name)}
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
    """Return the posteriors (N, K) of a trained module, on the CPU, computed in the type of its weights.

    Args:
        module: set to evaluation mode.
        images: (N, C, H, W).
    """
    module.eval()
    return torch.cat([module(part.to(module.device)).float().cpu() for part in images.split(1000)])


def checksum(images: Tensor) -> str:
    """Return the shape of images and the CRC-32 of their values."""
    return f"{tuple(images.shape)} {zlib.crc32(images.cpu().contiguous().numpy()):08x}"


def check_resume(path: Path, module: ClusteringModule, epochs: int, images: Tensor) -> dict:
    """Read a checkpoint, and check that a run of the module can be resumed from it; see `fit`.

    Args:
        path: the file.
        module: with the hyperparameters of the run.
        epochs: of the whole run.
        images: of the run.

    Returns:
        the checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another run or of other images, or has completed all epochs.
    """
    checkpoint = read_resumable(path, "cluster", dict(module.hparams), epochs)
    for name in module.SCHEDULE:
        if name not in checkpoint:
            raise ValueError(f"resume is {path}; its {name} is missing, so a run cannot be resumed from it: start anew")
    if checkpoint.get("images") not in (None, checksum(images)):  # files of early versions have none
        raise ValueError(
            f"resume is {path}; its run has other images than these {len(images):,}: give its data_dir and limit, with "
            "the files that were there, or start anew"
        )
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
    callbacks: Sequence[pl.Callback] = (),
) -> list[dict]:
    """Train on all images; write `last.ckpt`, `previous.ckpt` (the one before it) and `summary.csv`.

    On a CPU, a resumed run ends bit for bit as an uninterrupted one.

    Args:
        module: what to train.
        images: (N, C, H, W), values from 0 to 1.
        labels: (N,), int64, for metrics alone; −1 is none.
        epochs: of the whole run, including those of the checkpoint to resume.
        batch_size: images of a batch.
        output: the folder to write into; made if it is missing. What a run in it has saved is removed after the
            first batch.
        console: to print the rows of the summary on.
        seed: of order, augmentation and the network's random draws.
        amp: whether to autocast to bfloat16.
        resume: the checkpoint to resume from.
        callbacks: further callbacks of Lightning.

    Returns:
        the rows of the summary.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, of another run or of other images, or has completed all epochs; or `output` is taken
            for a URL, see `local_path`.
        PlaceMismatch: it is from within an epoch of another batch size or seed.
        FolderInUse: another run writes into `output`.
        FloatingPointError: weights are NaN or infinite; earlier checkpoints are intact.
        OSError: a file cannot be written; the previous checkpoint is intact.
        Terminated: SIGTERM or Ctrl-C was received, or a callback has set `trainer.should_stop` within an epoch; and
            `last.ckpt` is written.
    """
    output = local_path(output, "output", utf_8=False)
    checkpoints = AtomicCheckpointIO(resume, None if resume is None else check_resume(resume, module, epochs, images))
    if amp:
        warn_if_emulated(torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu")
    module.images, module.shape = checksum(images), list(images.shape[1:])
    table = Table(output / "summary.csv", console)
    with run_folder(output), silence_lightning():
        recovery = RecoveryCheckpoint(output / "last.ckpt")
        trainer = pl.Trainer(
            max_epochs=epochs,
            devices=1,
            precision="bf16-mixed" if amp else "32-true",
            logger=False,
            callbacks=[
                StepSeed(seed),
                FiniteWeights(output / "last.ckpt", advice="lower it"),
                EpochMeans(),
                FirstBatch(lambda: remove_results(output, resume)),
                *callbacks,
                table,
                LastCheckpoint(dirpath=output, enable_version_counter=False, save_on_train_epoch_end=True),
                recovery,
            ],
            plugins=[checkpoints],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        images, labels = (t.to(trainer.strategy.root_device) for t in (images, labels))
        training = Batches(images, labels, batch_size, seed, lambda: trainer.current_epoch)
        trainer.fit(module, training, Batches(images, labels, 1000), ckpt_path=resume)
        recovery.check_trained(trainer)
    return table.rows


def fit_classical(
    method: str, images: Tensor, labels: Tensor, clusters: int, seed: int, output: Path, console: Console
) -> Tensor:
    """Cluster pixels by a method of scikit-learn, and write `summary.csv` as `fit` does.

    Args:
        method: a key of `CLASSICAL`.
        images: (N, C, H, W).
        labels: (N,), int64, for metrics alone; −1 is none.
        clusters: K.
        seed: of the method.
        output: the folder to write into; made if it is missing. What another run in it has saved is removed.
        console: to print the metrics on.

    Returns:
        posteriors (N, K), one-hot for methods without posteriors.

    Raises:
        ValueError: there are too few images for the clusters.
        FolderInUse: another run writes into `output`.
        OSError: the file cannot be written.
    """
    start, pixels = time.perf_counter(), images.flatten(1).numpy()
    if method == "spectral" and clusters >= len(images):
        raise ValueError(f"clusters is {clusters}; of {len(images)} images, the method 'spectral' finds fewer")
    model = CLASSICAL[method](len(images), clusters, seed)
    found = model.fit_predict(pixels)
    row = {
        **label_metrics(labels, found),
        "seconds": time.perf_counter() - start,
        "sizes": " ".join(map(str, np.bincount(found, minlength=clusters))),
    }
    with run_folder(output):
        remove_results(output)
        write_csv(output / "summary.csv", [row])
    console.print("  ".join(f"{name} {value:.3f}" for name, value in row.items() if name != "sizes"))
    if method in HARD:
        return F.one_hot(torch.as_tensor(found).long(), clusters).float()
    return torch.from_numpy(model.predict_proba(pixels)).float()
