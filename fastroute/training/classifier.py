"""Image classification as a Lightning module."""

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from fastroute.models import create_model

SCHEDULES = ("step", "onecycle")


class ErrorPercent(MulticlassAccuracy):
    """The share of wrong labels, in percent, from whole counts: exact however the batches are cut."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes, average="micro", validate_args=False)

    def compute(self) -> Tensor:
        return 100 * (1 - super().compute())


class RoutingClassifier(pl.LightningModule):
    """Any network from images to logits, trained by cross-entropy with the thesis's SGD (§3.4).

    The optimiser has momentum, no Nesterov, and one weight decay for all parameters. It logs `train_loss`,
    `train_error`, `val_loss` and `val_error` once an epoch; errors are in percent, over exactly the images seen.

    Args:
        model: a name from `fastroute.models.list_models()`, or a module. A checkpoint of a named network can be loaded
            by `RoutingClassifier.load_from_checkpoint(path)` alone.
        num_classes: the number of classes; like in_chans and img_size, for `create_model`.
        in_chans: the channels of the images.
        img_size: their height and width.
        lr: the learning rate at the start, or at the top of the cycle.
        momentum: of SGD.
        weight_decay: of SGD.
        sched: "step" multiplies the rate by `decay_rate` after each of `decay_milestones`; "onecycle" raises it over
            the first 30% of the steps and lowers it to nearly zero over the rest.
        decay_milestones: epochs; by default 2/5 and 3/4 of all, the thesis's 80 and 150 of 200.
        decay_rate: the factor of a step.
        channels_last: whether the network computes in channels_last, which is the faster on a CPU in bfloat16 and on
            tensor cores.

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    def __init__(
        self,
        model: str | nn.Module,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int = 32,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        sched: str = "step",
        decay_milestones: Sequence[int] | None = None,
        decay_rate: float = 0.1,
        channels_last: bool = False,
    ):
        super().__init__()
        if lr <= 0:
            raise ValueError(f"lr is {lr}; it must be above 0")
        if sched not in SCHEDULES:
            raise ValueError(f"sched is {sched!r}; it must be one of {', '.join(map(repr, SCHEDULES))}")
        self.save_hyperparameters(ignore="model")
        self.save_hyperparameters({"model": model if isinstance(model, str) else type(model).__name__})
        if isinstance(model, str):
            model = create_model(model, num_classes, in_chans, img_size)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(memory_format=self.memory_format)
        self.train_error, self.val_error = ErrorPercent(num_classes), ErrorPercent(num_classes)

    def forward(self, images: Tensor, **options):
        return self.model(images.contiguous(memory_format=self.memory_format), **options)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train", self.train_error)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "val", self.val_error)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str, error: "ErrorPercent") -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        error.update(logits, labels)
        metrics = {f"{stage}_loss": loss, f"{stage}_error": error}
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def configure_optimizers(self):
        options = self.hparams
        optimizer = torch.optim.SGD(
            self.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
        if options.sched == "onecycle":
            steps = self.trainer.estimated_stepping_batches
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]
        epochs = self.trainer.max_epochs
        milestones = options.decay_milestones or (epochs * 2 // 5, epochs * 3 // 4)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=options.decay_rate)
        return [optimizer], [{"scheduler": scheduler, "interval": "epoch"}]
