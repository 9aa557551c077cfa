"""The network of a clustering run, built from what a checkpoint keeps of it."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from fastroute._defaults import GAMMA, LR_CONSISTENCY, LR_EM
from fastroute._methods import METHODS, check_self_label, check_starts
from fastroute.clustering.augment import Augmentation
from fastroute.clustering.module import ClusteringModule
from fastroute.clustering.networks import clustering_network
from fastroute.clustering.self_label import SelfLabelling

ARCHITECTURE_OF = {"digits": "mnist", "mnist": "mnist", "stl10": "stl10"}
"""The architecture of Table 4.2 for each dataset; "cifar" for all others."""
DIGITS = ("digits", "mnist")
"""Datasets whose images are not mirrored: a mirrored digit is no digit."""


@dataclass(frozen=True, kw_only=True)
class ClusteringRun:
    """What determines the network of a run; a checkpoint keeps it as its hyperparameters.

    Attributes:
        dataset: the images, such as "digits".
        method: a key of `METHODS`.
        clusters: K.
        heads: clusterings at once, by one network.
        batch_norm: whether batch norm follows each convolution.
        architecture: as `clustering_network` takes it; None is that of the dataset.
        n_init: networks at once, each from its own weights.
        img_size: height and width to which images are scaled; None leaves them.
        limit: the number of images; None is all.
        lr_em, lr_consistency: learning rates of the two losses; IIC takes the second, and other methods their papers'.
        self_label: the last epochs, which self-label; see `SelfLabelling`.
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
    self_label: int = 0

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


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Inputs of a method's builder; all but the run and the shape have an effect in training only.

    Attributes:
        run: network, method and learning rates.
        shape: (C, H, W) of an image.
        epochs: of the whole run.
        gamma: γ of the mixture-EM loss.
        statistics: of `RelevanceNorm` in training.
        channels_last: whether the network computes in channels_last.
        seed: of k-means, and of draws between epochs.
    """

    run: ClusteringRun
    shape: torch.Size
    epochs: int = 1
    gamma: float = GAMMA
    statistics: str = "running"
    channels_last: bool = False
    seed: int = 0

    @property
    def method_epochs(self) -> int:
        """The epochs of the method itself, before those that self-label; at least 1."""
        return max(1, self.epochs - self.run.self_label)

    @property
    def augmentation(self) -> Augmentation:
        """The transform T for the images of the run."""
        return Augmentation(flip=self.run.dataset not in DIGITS)

    def network(self, outputs: int) -> nn.Module:
        """Build the run's network of Table 4.2 with a last layer of `outputs` nodes.

        Raises:
            ValueError: images are not square.
        """
        run = self.run
        if self.shape[-2] != self.shape[-1]:
            raise ValueError(f"images have {self.shape[-2]}×{self.shape[-1]} pixels; they must be square: crop them")
        network = clustering_network(run.architecture, outputs, self.shape[-1], run.batch_norm, run.n_init)
        return self.laid_out(network)

    def laid_out(self, network: nn.Module) -> nn.Module:
        """Return a network in the memory format of the run."""
        return network.to(memory_format=torch.channels_last) if self.channels_last else network


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

    The options after `shape` have an effect in training only.

    Args:
        run: its network, method and learning rates.
        shape: (C, H, W) of an image.
        epochs: of the whole run; autoencoders that are followed by a second part train in the first half of them.
        gamma: γ of the mixture-EM loss.
        statistics: of `RelevanceNorm` in training, "running" or "batch".
        channels_last: whether the network computes in channels_last.
        seed: of k-means, and of draws between epochs.

    Returns:
        the module; its hyperparameters are the fields of `run`.

    Raises:
        ValueError: a field is out of range or unknown, or the images are too small for the architecture.
    """
    method = METHODS.get(run.method)
    if method is None or method.builder is None:
        names = ", ".join(name for name, known in METHODS.items() if known.builder is not None)
        raise ValueError(f"method is {run.method!r}; it must be one of {names}")
    check_starts(run.method, heads=run.heads, n_init=run.n_init)
    check_self_label(run.method, run.self_label)
    module, _, function = method.builder.partition(":")
    builder = getattr(importlib.import_module(f"fastroute.clustering.{module}"), function)
    setting = Setting(
        run=run,
        shape=torch.Size(shape),
        epochs=epochs,
        gamma=gamma,
        statistics=statistics,
        channels_last=channels_last,
        seed=seed,
    )
    built = builder(setting)
    if run.self_label:
        built.self_labelling = SelfLabelling.after(max(0, epochs - run.self_label), setting.augmentation)
    built.save_hyperparameters(asdict(run), logger=False)
    return built
