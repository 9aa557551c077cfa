"""The network of a clustering run, built from what a checkpoint keeps of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from fastroute._defaults import GAMMA, LR_CONSISTENCY, LR_EM
from fastroute.clustering.augment import Augmentation
from fastroute.clustering.dec import DEC
from fastroute.clustering.iic import IIC
from fastroute.clustering.module import ClusteringModule
from fastroute.clustering.networks import clustering_network
from fastroute.clustering.two_fold import TwoFoldClustering

ARCHITECTURE_OF = {"digits": "mnist", "mnist": "mnist", "stl10": "stl10"}
"""The architecture of Table 4.2 for each dataset; "cifar" for all others."""
DIGITS = ("digits", "mnist")
"""Datasets whose images are not mirrored: a mirrored digit is no digit."""


@dataclass(frozen=True, kw_only=True)
class ClusteringRun:
    """What determines the network of a run; a checkpoint keeps it as its hyperparameters.

    Attributes:
        dataset: the images, such as "digits".
        method: "two-fold", "em", "consistency", "iic" or "dec".
        clusters: K.
        heads: clusterings at once, by one network.
        batch_norm: whether batch norm follows each convolution.
        architecture: as `clustering_network` takes it; None is that of the dataset.
        n_init: networks at once, each from its own weights.
        img_size: height and width to which images are scaled; None leaves them.
        limit: the number of images; None is all.
        lr_em, lr_consistency: learning rates of the two losses; IIC takes the second.
    """

    dataset: str
    method: str
    clusters: int
    heads: int
    batch_norm: bool
    architecture: str | None = None
    n_init: int = 1
    img_size: int | None = None
    limit: int | None = None
    lr_em: float = LR_EM
    lr_consistency: float = LR_CONSISTENCY

    def __post_init__(self):
        if self.architecture is None:
            object.__setattr__(self, "architecture", ARCHITECTURE_OF.get(self.dataset, "cifar"))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "ClusteringRun":
        """Return the run that a mapping describes, such as the hyperparameters of a checkpoint or a command's options.

        Args:
            values: the fields by their names; others are ignored.
        """
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


def build(
    run: ClusteringRun,
    shape: Sequence[int],
    *,
    epochs: int = 1,
    gamma: float = GAMMA,
    statistics: str = "running",
    channels_last: bool = False,
    seed: int = 0,
) -> ClusteringModule:
    """Build the module of a run, with fresh weights from PyTorch's generator.

    The options after `shape` count in training alone.

    Args:
        run: its network, method and learning rates.
        shape: (C, H, W) of an image.
        epochs: of the whole run; DEC trains its autoencoder in the first half of them.
        gamma: γ of the mixture-EM loss.
        statistics: of `RelevanceNorm` in training, "running" or "batch".
        channels_last: whether the network computes in channels_last.
        seed: of DEC's k-means.

    Returns:
        the module; its hyperparameters are the fields of `run`.

    Raises:
        ValueError: a field is out of range or unknown, or the images are too small for the architecture.
    """
    if run.method == "dec":
        features = torch.Size(shape).numel()
        module = DEC(features, run.clusters, pretrain_epochs=(epochs + 1) // 2, seed=seed)
    else:
        outputs, size = run.heads * run.clusters, shape[-1]
        network = clustering_network(run.architecture, outputs, size, run.batch_norm, run.n_init)
        if channels_last:
            network = network.to(memory_format=torch.channels_last)
        augmentation = Augmentation(flip=run.dataset not in DIGITS)
        if run.method == "iic":
            module = IIC(network, run.clusters, augmentation=augmentation, lr=run.lr_consistency)
        else:
            module = TwoFoldClustering(
                network,
                run.clusters,
                heads=run.heads * run.n_init,
                method=run.method,
                augmentation=augmentation,
                lr_em=run.lr_em,
                lr_consistency=run.lr_consistency,
                gamma=gamma,
                training_statistics=statistics,
            )
    module.save_hyperparameters(asdict(run), logger=False)
    return module
