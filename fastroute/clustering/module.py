"""The base of Lightning modules for clustering: posteriors and metrics."""

import math
import warnings
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from fastroute.clustering.metrics import label_metrics
from fastroute.clustering.self_label import SelfLabelling, restart, self_label_loss
from fastroute.training.checkpoints import planned_epochs


def check_positive(**values: float) -> None:
    """Check arguments of a method.

    Raises:
        ValueError: one of the values is not above 0; the message has its name.
    """
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be greater than 0")


class ClusteringModule(pl.LightningModule):
    """A module whose `forward` returns posteriors (N, K): the softmax of its `responses`, by default.

    A method defines `responses` and `step`, which a training step calls. Batches are images (N, C, H, W), values from 0
    to 1, labels (N,), which are used for metrics alone, and in training the images' places (N,) among all. Each
    validation logs `entropy` (of the posteriors, as a share of log K: 1 is no clustering) and `empty` (the number of
    clusters without a sample), and unless a label is −1, `acc`, `acc_many` (many clusters to a label), `nmi` and `ari`,
    over exactly the images seen. It warns if the clustering has collapsed.

    Args:
        num_clusters: K.

    Attributes:
        sizes: the number of samples of each cluster at the last validation.
        self_labelling: the last step of the run; None is none.
        kept: tensors of a method that a checkpoint holds besides the weights, such as the labels of an epoch, by name.
    """

    EVEN = 0.98
    """The entropy above which posteriors count as even."""
    NETWORK: str | None = None
    """The network for a report, where it is not the run's architecture."""
    UNTRAINED_CLUSTERS = True
    """Whether an untrained module has clusters; centres that training places do not exist before."""
    SCHEDULE: tuple[str, ...] = ()
    """Attributes that divide the epochs. A resumed run keeps those of its checkpoint: more epochs extend its end."""

    def __init__(self, num_clusters: int):
        super().__init__()
        self.num_clusters = num_clusters
        self.sizes, self._seen = [], []
        self.self_labelling: SelfLabelling | None = None
        self.kept: dict[str, Tensor] = {}
        self.images: str | None = None  # the checksum of those of the run
        self.shape: list[int] | None = None  # (C, H, W) of one

    def _apply(self, fn, *args, **options):
        # A resumed run loads the checkpoint before it moves the module to the device.
        self.kept = {name: fn(value) for name, value in self.kept.items()}
        return super()._apply(fn, *args, **options)

    def forward(self, images: Tensor) -> Tensor:
        """Return posteriors (N, K) of images (N, C, H, W)."""
        return torch.softmax(self.responses(images).float(), -1)  # scores of autocast are in bfloat16

    def step(self, images: Tensor, index: Tensor | None) -> Tensor | None:
        """Return the loss of a batch; a method that steps its own optimisers returns None.

        Args:
            images: (N, C, H, W).
            index: (N,), their places among all images.
        """
        raise NotImplementedError

    @property
    def labels_itself(self) -> bool:
        """Whether the epoch is of the last step."""
        return self.self_labelling is not None and self.current_epoch >= self.self_labelling.start

    @property
    def has_clusters(self) -> bool:
        """Whether the epoch trains clusters, or what comes before them."""
        return True

    def on_train_epoch_start(self) -> None:
        if self.self_labelling is not None and self.current_epoch == self.self_labelling.start:
            restart(self.trainer.optimizers[-1])

    def label_responses(self, images: Tensor) -> Tensor:
        """Return the responses (N, K) that self-labelling takes for labels, without gradients."""
        return self.responses(images)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor | None:
        images, _, *index = batch
        if not self.labels_itself:
            loss = self.step(images, *(index or [None]))
        else:
            with torch.no_grad():
                responses = self.label_responses(images)
            loss = self_label_loss(responses, self.responses(self.self_labelling.strong(images)))
            if not self.automatic_optimization:
                self.descend(self.optimizers()[-1], loss)
        if loss is not None:
            self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def descend(self, optimizer: pl.core.optimizer.LightningOptimizer, loss: Tensor) -> None:
        """Step an optimiser, where a method steps its own."""
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def over_images(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a function's float32 values for all images in their order, in evaluation mode, without gradients.

        Raises:
            FloatingPointError: values are NaN or infinite, which no k-means or neighbour graph takes.
        """
        training = self.training
        self.eval()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            parts = [function(images.to(self.device)).float() for images, *_ in self.trainer.val_dataloaders]
        self.train(training)
        values = torch.cat(parts)
        if not values.isfinite().all():
            raise FloatingPointError(
                f"features are NaN or infinite at epoch {self.current_epoch + 1}: the weights have diverged: lower the "
                "learning rate; checkpoints of earlier epochs, if there are any, are intact"
            )
        return values

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint |= {"epochs": planned_epochs(self.trainer), "images": self.images, "shape": self.shape}
        checkpoint["kept"] = {name: value.cpu() for name, value in self.kept.items()}
        checkpoint |= {name: getattr(self, name) for name in self.SCHEDULE}
        if self.self_labelling is not None:
            checkpoint["self_label_start"] = self.self_labelling.start

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.kept = {name: value.to(self.device) for name, value in checkpoint.get("kept", {}).items()}
        for name in self.SCHEDULE:
            setattr(self, name, checkpoint[name])
        if self.self_labelling is not None:  # a longer run only lengthens the last step
            self.self_labelling.start = checkpoint["self_label_start"]

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        images, labels, *_ = batch
        self._seen.append((self(images).float().cpu(), labels.cpu()))

    def on_validation_epoch_end(self) -> None:
        posterior, labels = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        clusters = posterior.argmax(1)
        sizes = torch.bincount(clusters, minlength=self.num_clusters)
        self.sizes = sizes.tolist()
        entropy = torch.special.entr(posterior).sum(1).mean() / (math.log(self.num_clusters) or 1)
        empty = int((sizes == 0).sum())
        metrics = {
            **label_metrics(labels, clusters),
            "entropy": entropy.item(),
            "empty": float(empty),
        }
        self.log_dict(metrics)
        if self.has_clusters and (empty >= self.num_clusters / 2 or metrics["entropy"] > self.EVEN):
            warnings.warn(
                f"the clustering has collapsed: {empty} of {self.num_clusters} clusters are empty, and the posteriors' "
                f"entropy is {metrics['entropy']:.0%} of that of even ones",
                stacklevel=1,
            )


class LogPosteriors(nn.Module):
    """Wrap a clustering as a classifier whose logits are the logarithms of the posteriors.

    Args:
        module: the clustering.

    Shape:
        images: (N, C, H, W), values from 0 to 1.
        output: (N, K).
    """

    IS_CLUSTERING = True

    def __init__(self, module: ClusteringModule):
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images).clamp_min(torch.finfo(torch.float32).tiny).log()
