"""A training run from start to end, or from a checkpoint to the end."""

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy
from rich.console import Console
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from fastroute.training.callbacks import EpochProgress, EpochSummary, RouterDiagnostics
from fastroute.training.checkpoints import (
    LAST,
    AtomicCheckpointIO,
    BestCheckpoint,
    LastCheckpoint,
    RecoveryCheckpoint,
    check_resume,
)
from fastroute.training.classifier import RoutingClassifier
from fastroute.training.distributed import world_size
from fastroute.training.graphs import check_recording
from fastroute.training.run_folder import run_folder
from fastroute.training.steps import (
    BatchNormSync,
    EpochMeans,
    FiniteWeights,
    LostProcess,
    MovingAverage,
    NonFiniteStop,
    StepSeed,
)

PRECISIONS = {None: "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
DIST_BN = ("reduce", "broadcast", "")


def fit(
    module: RoutingClassifier,
    data: pl.LightningDataModule,
    *,
    epochs: int,
    output: str | Path,
    seed: int = 0,
    amp_dtype: str | None = None,
    grad_accum_steps: int = 1,
    clip_grad: float | None = None,
    model_ema_decay: float | None = None,
    sync_bn: bool = False,
    dist_bn: str = "reduce",
    deterministic: bool = False,
    resume: str | Path | None = None,
    recovery_interval: int | None = None,
    log_interval: int = 50,
    accelerator: str = "auto",
    console: Console | None = None,
) -> list[dict]:
    """Train, and write into `output`.

    `last.ckpt`, `previous.ckpt` (the one before it) and `best.ckpt` (of the lowest validation error), `summary.csv`,
    `routers.csv` for a network with routers, and TensorBoard's events. Started by `torchrun`, the processes train
    together (DistributedDataParallel).

    Args:
        module: what to train; its weights change, and it stays on the device.
        data: its images, such as an `ImageDataModule`.
        epochs: how many in all, with those before a checkpoint.
        output: the folder to write into, made if it is missing. A run there before is overwritten.
        seed: of what the network draws in training; that of the data is the data module's.
        amp_dtype: autocast to "bfloat16" or "float16"; None computes in float32.
        grad_accum_steps: batches for each step of the optimiser, whose gradients are averaged.
        clip_grad: the largest norm of the gradient; None does not clip.
        model_ema_decay: of a moving average of the weights and of batch norm's statistics, which is then what is
            validated and what `module` holds in the end; None keeps no average.
        sync_bn: whether batch norm takes its statistics over all processes; on GPUs alone.
        dist_bn: before validation, the running statistics are averaged over the processes ("reduce"), taken from the
            first ("broadcast"), or left as they are ("").
        deterministic: whether to use deterministic algorithms alone.
        resume: the checkpoint to go on from, with its optimiser, schedule and place, within an epoch too. Where it lies
            in `output`, moved or renamed as that may be, `best.ckpt` stays until an epoch is better. Another folder has
            no `best.ckpt` of this run yet: the best of it is that of the epochs trained there.
        recovery_interval: optimiser steps between checkpoints within an epoch; None writes one at its end alone.
        log_interval: steps between readings of the loss.
        accelerator: "auto", "cpu" or "gpu", as Lightning has it. Each process uses one device.
        console: where progress is shown.

    Returns:
        one dict for each epoch, as in `summary.csv`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: an argument is out of range, the checkpoint is damaged, of another network or finished already,
            there is no such accelerator, or `module` is to record its steps where they cannot be; see
            `check_recording`.
        NotRecordable: a step turned out to be such.
        FolderInUse: another run writes into `output`.
        FloatingPointError: the loss or a weight is NaN or infinite; the checkpoints from before stay.
        OSError: a file cannot be written; the last whole checkpoint stays.
        ProcessLost: another process of the run is gone.
        Terminated: SIGTERM or Ctrl-C came, and `last.ckpt` is written.
    """
    counts = {
        "epochs": epochs,
        "log_interval": log_interval,
        "grad_accum_steps": grad_accum_steps,
        "recovery_interval": recovery_interval,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if amp_dtype not in PRECISIONS:
        raise ValueError(f"amp_dtype is {amp_dtype!r}; it must be 'bfloat16', 'float16' or None")
    if clip_grad is not None and clip_grad <= 0:
        raise ValueError(f"clip_grad is {clip_grad}; it must be above 0")
    if model_ema_decay is not None and not 0 <= model_ema_decay < 1:
        raise ValueError(f"model_ema_decay is {model_ema_decay}; it must be at least 0 and below 1")
    if dist_bn not in DIST_BN:
        raise ValueError(f"dist_bn is {dist_bn!r}; it must be one of {', '.join(map(repr, DIST_BN))}")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(f"accelerator is {accelerator!r}; PyTorch finds no GPU here")
    if module.hparams.cuda_graphs:
        check_recording(
            device_type="cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu",
            needed=module.graph.device_type,
            processes=world_size(),
            grad_accum_steps=grad_accum_steps,
            amp_dtype=amp_dtype,
            compile_mode=module.hparams.compile_mode,
            varying=getattr(data, "varying", False),
            model=module.model,
        )
    if sync_bn and not (torch.cuda.is_available() and accelerator != "cpu"):
        raise ValueError("sync_bn is True; PyTorch's synchronised batch norm needs GPUs")
    if resume is not None:
        check_resume(resume, module, epochs)

    output, processes = Path(output), world_size()
    summary = EpochSummary(output / "summary.csv")
    callbacks = [StepSeed(seed), NonFiniteStop(log_interval), FiniteWeights(output / LAST), EpochMeans()]
    if model_ema_decay is not None:
        callbacks.append(MovingAverage(model_ema_decay))
    if processes > 1 and dist_bn:
        callbacks.append(BatchNormSync(dist_bn))
    checkpoint = {"dirpath": output, "enable_version_counter": False, "save_on_train_epoch_end": True}
    callbacks += [
        RouterDiagnostics(output / "routers.csv"),
        summary,
        EpochProgress(summary, console or Console(), log_interval),
        RecoveryCheckpoint(output / LAST, recovery_interval),
        LostProcess(),
        BestCheckpoint(resume, filename="best", monitor="val_error", **checkpoint),
        LastCheckpoint(**checkpoint),
    ]
    with run_folder(output), quiet():
        trainer = pl.Trainer(
            accelerator=accelerator,
            **_processes(processes),
            precision=PRECISIONS[amp_dtype],
            max_epochs=epochs,
            accumulate_grad_batches=grad_accum_steps,
            gradient_clip_val=clip_grad,
            sync_batchnorm=sync_bn,
            deterministic=deterministic,
            logger=TensorBoardLogger(output, name="", version="", default_hp_metric=False),
            log_every_n_steps=log_interval,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO(resume)],
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        trainer.fit(module, data, ckpt_path=resume)
    module.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
    return summary.rows


def _processes(count: int) -> dict:
    """Lightning's arguments for the processes that `torchrun` started."""
    if count == 1:
        return {"devices": 1}
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    # Buffers are not broadcast at every step: batch norm's are what BatchNormSync says, and validation, in which
    # processes may have different numbers of images, then needs no talk between them.
    strategy = OrderedDDP(broadcast_buffers=False, gradient_as_bucket_view=True)
    return {"devices": here, "num_nodes": count // here, "strategy": strategy}


class OrderedDDP(DDPStrategy):
    """Lightning's DistributedDataParallel; on CPUs, processes add each gradient in the order of their ranks.

    Gloo's order depends on where a gradient lies among the others, which DistributedDataParallel changes after the
    first step: with three processes or more, a resumed run would not end bit for bit as one that was never stopped.
    """

    def configure_ddp(self) -> None:
        super().configure_ddp()
        if self.root_device.type == "cpu" and self.world_size > 2:
            self.model.register_comm_hook(None, mean_in_rank_order)


def mean_in_rank_order(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Each process adds its share of the gradients, as many bytes as `all_reduce` sends."""
    count, gradients = dist.get_world_size(), bucket.buffer()
    given = F.pad(gradients, (0, -len(gradients) % count))
    parts = torch.empty_like(given)
    dist.all_to_all_single(parts, given)
    total = functools.reduce(torch.add, parts.view(count, -1))
    dist.all_gather_into_tensor(given, total / count)
    mean = torch.futures.Future()
    mean.set_result(given[: len(gradients)])
    return mean


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back Lightning's remarks on devices, workers and products."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "torch.utils.tensorboard")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric")
            # A 1×1 convolution's gradient has strides of either memory format; DDP remarks on the choice.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
