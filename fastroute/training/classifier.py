"""Image classification as a Lightning module."""

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute._errors import kind
from fastroute._files import DamagedFile, checked
from fastroute._plain import plain
from fastroute.data.decode import UnreadableImage
from fastroute.data.loaders import Draws, PlaceMismatch
from fastroute.data.module import ImageDataModule
from fastroute.models.specification import Specification, conversion_of, side, specification_of
from fastroute.nn import Routing, exact_convolutions
from fastroute.nn.routed import takes_routing
from fastroute.ops._paths import check_integers, check_numbers
from fastroute.training.capturable import CAPTURABLE
from fastroute.training.checkpoints import planned_epochs
from fastroute.training.distributed import gather_to_rank_zero
from fastroute.training.graphs import CUDAGraph, Graph, RecordedStep, check_compile_mode, check_recording, settings
from fastroute.training.metrics import Totals
from fastroute.training.optim import GROUP_OPTIONS, OPTIMIZERS, SCHEDULES, check_length, parameter_groups, scheduler
from fastroute.training.recomputation import checkpoint_gradients
from fastroute.training.saved_fields import CHANNELS
from fastroute.training.steps import MovingAverage
from fastroute.training.targets import check_classes, check_logits, check_values, checked_batch, class_shares

STATES = ("state_dict", "current_model_state")
"""The keys of a network's weights in a checkpoint: with a moving average, the average and the trained weights."""

RoutingLoss = Callable[[dict[str, Routing]], Tensor]


class RoutingClassifier(pl.LightningModule):
    """Train any network from images to logits; the defaults are the thesis's SGD (§3.4).

    The loss is cross-entropy, or the network's own if it has a method `training_loss(images, targets, progress)` that
    returns a loss and logits (N, num_classes), as `capsnet` has. `targets` (N, num_classes) are the shares of the
    classes in each image, mixed and smoothed if the run does so. `progress` is the share of the run that is done, by
    which a loss may have phases. Validation is by the cross-entropy of logits in any case.

    It logs, once an epoch, `train_loss`, `train_error`, `val_loss`, `val_error` and `val_error5`, and `train_aux` with
    an auxiliary loss. Errors are in percent, over exactly the images seen, in any number of processes.
    With a plain `DataLoader` to validate on, Lightning repeats up to one image for each process but the first, so that
    all have equally many.

    Args:
        model: a network's name as `fastroute.models.create_model` takes it, except your own functions, or a module. A
            checkpoint keeps how the network is built if that is known: from a name, or a module that `create_model`,
            `multipath`, timm or torchvision built. `RoutingClassifier.load_from_checkpoint(path)` and
            `fastroute.load(path)` then need nothing else.
        num_classes: the number of classes. Like in_chans and img_size, it is passed to `create_model`; a module that
            knows its own sizes has precedence.
        in_chans: the channels of the images.
        img_size: their height and width.
        opt: "sgd", "nesterov", "rmsprop", "adam" or "adamw"; see `OPTIMIZERS`.
        lr: the learning rate at the start, or at the top of the cycle.
        momentum: of SGD and RMSprop.
        weight_decay, norm_weight_decay, gate_lr_mult, gate_wd, filter_bias_and_bn, layer_decay: see `parameter_groups`.
        sched: "step", "multistep", "cosine" or "onecycle"; like warmup_epochs, decay_epochs, decay_milestones,
            decay_rate, min_lr and warmup_lr, see `scheduler`.
        smoothing: label smoothing, at least 0 and below 1.
        channels_last: whether the network computes in channels_last, which is faster on a CPU and on tensor cores.
        grad_checkpointing: whether to recompute activations in the backward pass instead of keeping them; see
            `checkpoint_gradients`.
        compile: whether to compile the network by `torch.compile`.
        compile_mode: its mode, one of `graphs.COMPILE_MODES`; None is its default.
        cuda_graphs: whether to record a step in a CUDA graph and replay it: forward, loss, backward, clipping,
            optimiser, moving average, and the augmentation of images in memory. The optimiser then reads learning rates
            and momentums from the device; see `CAPTURABLE`, and `check_recording` for the conditions.
        aux_loss: a function from the routing, {router name: Routing}, to a scalar, which is added to the training loss
            times `aux_weight`. Its gradient reaches the gates through `scores` and `gates`. A module is trained, moved
            and saved with the network. The network's forward must take `return_routing`.
        aux_weight: the weight of `aux_loss`.
        specification: of the network, as in a checkpoint; `model` is then only its name.

    Raises:
        ValueError: an argument is out of range or unknown, or `model` returns no routing for `aux_loss`, or has a loss
            of its own, to which none can be added.
    """

    graph: Callable[[], Graph] = CUDAGraph
    """Makes the recording of steps."""

    def __init__(
        self,
        model: str | nn.Module,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int = 32,
        *,
        opt: str = "sgd",
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        norm_weight_decay: float | None = None,
        gate_lr_mult: float = 1.0,
        gate_wd: float | None = None,
        sched: str = "multistep",
        warmup_epochs: int = 0,
        decay_epochs: int = 30,
        decay_milestones: Sequence[int] | None = None,
        decay_rate: float = 0.1,
        min_lr: float = 0.0,
        warmup_lr: float = 0.0,
        filter_bias_and_bn: bool = False,
        layer_decay: float | None = None,
        smoothing: float = 0.0,
        channels_last: bool = False,
        grad_checkpointing: bool = False,
        compile: bool = False,
        compile_mode: str | None = None,
        cuda_graphs: bool = False,
        aux_loss: RoutingLoss | None = None,
        aux_weight: float = 1.0,
        specification: dict | None = None,
    ):
        super().__init__()
        if not isinstance(model, nn.Module | str):
            raise TypeError(
                f"model is {kind(model)}; it must be a network, such as create_model('resnet20_cc2'), or its name"
            )
        numbers = {"lr": lr, "gate_lr_mult": gate_lr_mult, "momentum": momentum, "weight_decay": weight_decay}
        numbers |= {"decay_rate": decay_rate, "min_lr": min_lr, "warmup_lr": warmup_lr, "smoothing": smoothing}
        check_numbers(**{name: plain(value) for name, value in numbers.items()})
        for name, value in (("lr", lr), ("decay_epochs", decay_epochs), ("gate_lr_mult", gate_lr_mult)):
            if value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        for name, value in (("min_lr", min_lr), ("warmup_lr", warmup_lr)):
            if not 0 <= value <= lr:
                raise ValueError(f"{name} is {value}; it must be from 0 to lr, {lr}")
        if layer_decay is not None and not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay is {layer_decay}; it must be above 0 and at most 1")
        decays = {"weight_decay": weight_decay, "norm_weight_decay": norm_weight_decay, "gate_wd": gate_wd}
        for name, value in ({"momentum": momentum, "warmup_epochs": warmup_epochs} | decays).items():
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")
        if not 0 < decay_rate <= 1:
            raise ValueError(f"decay_rate is {decay_rate}; it must be above 0 and at most 1")
        if opt == "nesterov" and momentum == 0:
            raise ValueError("momentum is 0; with opt='nesterov' it must be above 0")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing is {smoothing}; it must be at least 0 and below 1")
        for name, value, allowed in (("opt", opt, OPTIMIZERS), ("sched", sched, SCHEDULES)):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
        check_compile_mode(compile, compile_mode)
        self.save_hyperparameters(ignore=["model", "aux_loss", "specification"], logger=False)
        for name in GIVEN & self.hparams.keys():  # and not those of a subclass
            value = self.hparams[name]
            self.hparams[name] = value.tolist() if isinstance(value, Tensor) else plain(value)
        self.hparams.img_size = side(self.hparams.img_size)
        sizes = {name: self.hparams[name] for name in ("num_classes", "in_chans", "img_size")}
        check_integers(**{name: size for name, size in sizes.items() if size is not None})
        if isinstance(model, str):
            given = None if specification is None else Specification.from_dict(specification)
            if given is None and Specification.parse(model).source == "function":
                raise ValueError(f"model is {model!r}; own code is not imported here: give create_model({model!r}, …)")
            model = (given or Specification.parse(model, **sizes)).build()
        built = specification_of(model)
        self.named = built is not None
        name = type(model).__name__ if built is None else built.text
        # Lightning's `save_hyperparameters` compares values, of which an array has several.
        self.hparams.update(model=name, specification=None if built is None else built.to_dict())
        if built is not None:
            own = {"num_classes": built.num_classes, "in_chans": built.in_chans, "img_size": built.img_size}
            self.hparams.update({k: size for k, size in own.items() if size})
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = exact_convolutions(model)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 4:  # the formats are those of maps (N, C, H, W)
                tensor.data = tensor.data.contiguous(memory_format=self.memory_format)
        if grad_checkpointing:
            for name, value in (("compile", compile), ("cuda_graphs", cuda_graphs)):
                if value:
                    raise ValueError(f"{name} is True, and grad_checkpointing too; they do not go together: choose one")
            checkpoint_gradients(self.model)
        if compile:
            self.model.compile(mode=compile_mode)
        self.routed = takes_routing(model)
        if aux_loss is not None and not self.routed:
            raise ValueError(
                f"model is {self.hparams.model}; its forward takes no return_routing, which aux_loss needs"
            )
        self.own_loss = callable(getattr(model, "training_loss", None))
        if aux_loss is not None and self.own_loss:
            raise ValueError(f"aux_loss is given, but {self.hparams.model} has a loss of its own: leave aux_loss out")
        self.aux_loss = aux_loss
        self.train_totals, self.val_totals = Totals(), Totals()
        self._checked: set[bool] = set()  # has True after the first batch of training, False after that of validation
        self.recorded: RecordedStep | None = None
        self._settings: list | None = None  # of the recorded step, and the parts of the network that they are of
        self._parts: tuple[list[nn.Module], list[nn.Parameter]] = [], []
        self.replayed: tuple[Tensor, Tensor | None] | None = None
        """During a training batch that was replayed: its loss and auxiliary loss."""
        self._batch: tuple[Tensor, ...] | None = None
        self._steps_before: int | None = None  # of an epoch of the run that is resumed

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path | IO, *arguments, **options) -> "RoutingClassifier":
        """Load a module as Lightning does, after verifying the checksums of a local file.

        Args:
            checkpoint_path: a path, URL or open file.
            arguments, options: of Lightning's method.

        Returns:
            the module.

        Raises:
            DamagedFile: a checksum does not match.
        """
        if not isinstance(checkpoint_path, str | Path) or str(checkpoint_path).startswith("http"):
            return super().load_from_checkpoint(checkpoint_path, *arguments, **options)
        with contextlib.ExitStack() as opened:
            try:
                file = opened.enter_context(checked(checkpoint_path))
            except DamagedFile as error:
                raise DamagedFile(f"checkpoint_path is {checkpoint_path}; {error}") from error
            return super().load_from_checkpoint(file, *arguments, **options)

    def setup(self, stage: str) -> None:
        if stage == "fit":  # a checkpoint to resume is loaded after this; nothing else of an earlier run remains
            self._steps_before = None
            self.train_totals.reset()
        self.val_totals.reset()
        if self.hparams.cuda_graphs and stage == "fit":
            trainer = self.trainer
            check_recording(
                device_type=trainer.strategy.root_device.type,
                needed=self.graph.device_type,
                processes=trainer.world_size,
                grad_accum_steps=trainer.accumulate_grad_batches,
                amp_dtype="float16" if trainer.precision == "16-mixed" else None,
                compile_mode=self.hparams.compile_mode,
                varying=getattr(trainer.datamodule, "varying", False),
                model=self.model,
            )
        data = self.trainer.datamodule
        if hasattr(data, "deferred"):
            data.deferred = self.hparams.cuda_graphs and stage == "fit"
        if isinstance(data, ImageDataModule) and not self.named:
            self.hparams.update(in_chans=data.in_chans, img_size=data.img_size)
        self._checked.clear()  # the data may be others now
        classes = getattr(data, "num_classes", None) or 0  # other data modules may lack it
        if self.named and classes > self.hparams.num_classes:
            raise ValueError(f"num_classes is {self.hparams.num_classes}; the data have {classes} classes")

    def teardown(self, stage: str) -> None:
        if hasattr(self.trainer.datamodule, "deferred"):
            self.trainer.datamodule.deferred = False  # other loops take batches

    def forward(self, images: Tensor, **options):
        """Return what the network returns for images (N, C, H, W): logits (N, num_classes), by default.

        Args:
            images: cast to the type of the weights, and to the memory format of the network.
            options: of the network, such as `return_routing`.
        """
        return self.model(self._prepared(images), **options)

    def _prepared(self, images: Tensor) -> Tensor:
        weights = next(self.model.parameters(), images)
        if images.is_floating_point() and weights.is_floating_point():  # the weights may be float64
            images = images.to(weights.dtype)
        return images.contiguous(memory_format=self.memory_format if images.dim() == 4 else torch.contiguous_format)

    @property
    def progress(self) -> float:
        """The share of the run's optimiser steps that are done."""
        return self.trainer.global_step / self.trainer.estimated_stepping_batches

    def on_train_start(self) -> None:
        if self.hparams.cuda_graphs:
            needed = self.graph.device_type
            check_recording(device_type=needed, needed=needed, anomaly=torch.is_anomaly_enabled())
            self.replayed, self._settings = None, None
            self._parts = list(self.model.modules()), list(self.model.parameters())

    def on_train_end(self) -> None:
        self.recorded, self._parts = None, ([], [])  # frees the memory of the recorded step

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        if self.hparams.cuda_graphs:
            now = settings(*self._parts, self.optimizers(use_pl_optimizer=False).param_groups)
            if now != self._settings:
                self.recorded, self._settings = RecordedStep(self._whole_step, self.graph), now
        self._batch = batch if self.recorded is not None and self.recorded.takes(batch) else None

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer, optimizer_closure: Callable | None = None) -> None:
        """Take the step as Lightning does, or replay it and run Lightning's own closure for its hooks alone."""
        if self.recorded is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        elif self._batch is None:
            with self.recorded.plainly():
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            self.optimizers(use_pl_optimizer=False).refresh()
            self.replayed = self.recorded(self._batch)
            optimizer_closure()

    def _whole_step(self, *batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the whole step on the device, in Lightning's and the callbacks' order; return loss and auxiliary loss."""
        trainer, optimizer = self.trainer, self.optimizers(use_pl_optimizer=False)
        with torch.enable_grad():
            with trainer.precision_plugin.train_step_context():
                loss, aux = self._losses(type(self._batch)(*batch) if isinstance(self._batch, Draws) else batch)
            optimizer.zero_grad()
            loss.backward()
        clipping = (trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        self.configure_gradient_clipping(optimizer, *clipping)
        optimizer.update()
        for callback in trainer.callbacks:
            if isinstance(callback, MovingAverage):
                callback.average(self)
        return loss.detach(), aux

    def _losses(self, batch: tuple[Tensor, Tensor] | Draws) -> tuple[Tensor, Tensor | None]:
        """Return the loss of a batch and its auxiliary loss before weighting, and add the batch to the totals."""
        images, labels = checked_batch(self.trainer.datamodule.batch(batch) if isinstance(batch, Draws) else batch)
        if self.own_loss:
            classes = getattr(self.model, "num_classes", None) or self.hparams.num_classes
            targets = class_shares(labels, classes, self.hparams.smoothing)
            loss, logits = self.model.training_loss(self._prepared(images), targets, self.progress)
            self._check_first(images, labels, logits)
            self.train_totals.update(loss, logits, labels)
            return loss, None
        if self.aux_loss is None:
            logits = self(images)
        else:
            logits, routing = self(images, return_routing=True)
        self._check_first(images, labels, logits)
        if labels.dim() == 2:  # of mixed images; the data may have fewer classes than the network
            check_classes(labels.shape[1], logits.shape[1])
            labels = F.pad(labels, (0, logits.shape[1] - labels.shape[1]))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.hparams.smoothing)
        self.train_totals.update(loss, logits, labels)
        if self.aux_loss is None:
            return loss, None
        aux = self.aux_loss(routing)
        return loss + self.hparams.aux_weight * aux, aux.detach()

    def _check_first(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Check logits and labels of the first batch of training and of validation, and keep the size of its images."""
        if self.training in self._checked:
            return
        self._checked.add(self.training)
        check_logits(logits, self.hparams.model)
        data = getattr(self._trainer, "datamodule", None)
        known = isinstance(data, ImageDataModule)  # another module's num_classes may count other labels
        if not (known or self.own_loss):  # which may take other values
            check_values(labels)
        if labels.dim() == 1 and len(labels):
            check_classes(data.num_classes if known else int(labels.max()) + 1, logits.shape[1])
        if known or (self.training and False in self._checked):
            return
        if images.dim() == 4 and images.shape[1] <= CHANNELS:  # a predictor crops to this size
            height, width = images.shape[2:]
            self.hparams.update(in_chans=images.shape[1])
            if height == width:
                self.hparams.update(img_size=height)
            else:
                warnings.warn(
                    f"images are {height}×{width}, and predictors of fastroute.load crop squares of img_size, "
                    f"{self.hparams.img_size}: to predict, load this module by RoutingClassifier.load_from_checkpoint",
                    stacklevel=2,
                )

    def training_step(self, batch: tuple[Tensor, Tensor] | Draws, batch_idx: int) -> Tensor:
        if self.replayed is None:
            loss, aux = self._losses(batch)
        else:
            loss, aux = self.replayed
            self.train_totals.update()  # the recorded step has added the batch
        if aux is not None:
            self.log("train_aux", aux, on_step=False, on_epoch=True, batch_size=len(batch[0]), sync_dist=True)
        return loss

    def backward(self, loss: Tensor, *arguments, **options) -> None:
        if self.replayed is not None:
            return
        batches, accumulated = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        rest = batches % accumulated if math.isfinite(batches) else 0
        if rest and self.trainer.fit_loop.batch_idx >= batches - rest:
            # Lightning divides every loss by `accumulated`, but the last step of the epoch has only `rest` batches.
            loss = loss * (accumulated / rest)
        super().backward(loss, *arguments, **options)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer) -> None:
        if self.replayed is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        self.replayed = None
        if self.trainer.is_last_batch:
            totals = self.train_totals.compute()
            self.train_totals.reset()
            metrics = {"train_loss": totals["loss"], "train_error": totals["error"]}
            self.log_dict(metrics, on_step=False, on_epoch=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Routing] | None:
        images, labels = checked_batch(batch)
        if len(labels) == 0:  # this process has no part of the last batch
            return None
        logits, routing = self(images, return_routing=True) if self.routed else (self(images), {})
        self._check_first(images, labels, logits)
        self.val_totals.update(F.cross_entropy(logits, labels), logits, labels)
        return routing

    def on_validation_epoch_end(self) -> None:
        totals = self.val_totals.compute()
        if totals["error"].isnan():  # 0 of 0 images
            raise UnreadableImage("none of the images to validate on can be read")
        self.log_dict({f"val_{name}": value for name, value in totals.items()})
        self.val_totals.reset()

    def configure_optimizers(self):
        options = self.hparams
        groups = parameter_groups(self, **{name: options[name] for name in GROUP_OPTIONS})
        optimizer = (CAPTURABLE if options.cuda_graphs else OPTIMIZERS)[options.opt](groups, options.momentum)
        names = ("warmup_epochs", "decay_epochs", "decay_milestones", "decay_rate", "min_lr", "warmup_lr")
        self.trainer.fit_loop.setup_data()  # without max_epochs, the number of batches is not known yet
        steps, epochs = self.trainer.estimated_stepping_batches, self.trainer.max_epochs
        check_length(self.trainer.num_training_batches, steps)
        before, now = self._steps_before, self._steps_in_an_epoch()
        if self.trainer.max_steps != -1:  # the run ends by its steps, perhaps within an epoch
            epochs = steps / now
        if before is not None and before != now:
            raise PlaceMismatch(
                f"the run took {before} steps in an epoch, but now an epoch has {now}, and learning rates follow "
                "steps: go on with the same data, batch_size, grad_accum_steps and number of processes"
            )
        given = {name: options[name] for name in names}
        if self.trainer.fast_dev_run:  # too short for a warm-up
            given["warmup_epochs"] = 0
        schedule = scheduler(optimizer, options.sched, epochs=epochs, steps=steps, **given)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _steps_in_an_epoch(self) -> int | None:
        """Return the number of optimiser steps in an epoch, None if it is not known."""
        steps = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        return math.ceil(steps) if math.isfinite(steps) else None

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Save what bit-exact resuming needs beyond Lightning's state.

        These are the totals of the epoch so far, and the number of epochs of the schedule. With several processes,
        `ranks` has each one's totals, and its buffers that differ from rank 0's.
        """
        totals = {name: getattr(self.train_totals, name).cpu() for name in Totals.SUMS}
        buffers = {name for name, _ in self.named_buffers()}
        states = {key: checkpoint[key] for key in STATES if key in checkpoint}
        own = {key: {n: value.cpu() for n, value in state.items() if n in buffers} for key, state in states.items()}
        ranks = gather_to_rank_zero((totals, own))
        if ranks:  # in rank 0, which writes
            checkpoint["train_totals"] = {name: sum(sums[name] for sums, _ in ranks) for name in totals}
        if len(ranks) > 1:
            first = ranks[0][1]
            checkpoint["ranks"] = [
                {"train_totals": sums}
                | {key: {n: v for n, v in own[key].items() if not torch.equal(v, first[key][n])} for key in states}
                for sums, own in ranks
            ]
        if isinstance(data := self.trainer.datamodule, ImageDataModule):  # Lightning names its state by its class
            checkpoint.setdefault("ImageDataModule", ImageDataModule.state_dict(data))
        if (conversion := conversion_of(self.model)) is not None:
            checkpoint["conversion"] = conversion
        checkpoint["epochs"] = planned_epochs(self.trainer)
        checkpoint["steps_in_an_epoch"] = self._steps_in_an_epoch()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        # A run with an auxiliary loss can be loaded without it, and a run without one can be resumed with it.
        own = {} if self.aux_loss is None else self.state_dict()
        own = {name: value for name, value in own.items() if name.startswith("aux_loss.")}
        ranks, here = checkpoint.get("ranks", []), {}
        if self._trainer is not None and len(ranks) == self.trainer.world_size:
            here = ranks[self.global_rank]
        for key in checkpoint.keys() & STATES:
            state = checkpoint[key] | here.get(key, {})
            if self.aux_loss is None:
                state = {name: value for name, value in state.items() if not name.startswith("aux_loss.")}
            checkpoint[key] = own | state
        self._steps_before = checkpoint.get("steps_in_an_epoch")
        totals = checkpoint.get("train_totals", {}) if self.global_rank == 0 else {}  # rank 0 continues all sums
        totals = here.get("train_totals", totals)
        for name, total in totals.items():
            setattr(self.train_totals, name, total.to(self.device))
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING and STATES[1] in checkpoint:
            averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
            if not averages:  # go on from the weights that the optimiser's state belongs to
                checkpoint["state_dict"] = checkpoint[STATES[1]]


GIVEN = inspect.signature(RoutingClassifier).parameters.keys() - {"model", "aux_loss", "specification"}
"""The arguments of `RoutingClassifier` that are hyper-parameters as they are given."""
