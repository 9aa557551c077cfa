"""A training run from start to end, or from a checkpoint to the end."""

import contextlib
import functools
import logging
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.model_helpers import is_overridden
from rich.console import Console
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from fastroute.training.callbacks import EpochProgress, EpochSummary, Patience, RouterDiagnostics, StepLog
from fastroute.training.checkpoints import LAST, check_resume
from fastroute.training.classifier import RoutingClassifier
from fastroute.training.distributed import agreed, is_main, world_size
from fastroute.training.graphs import check_recording
from fastroute.training.loggers import make_loggers
from fastroute.training.optim import check_warmup
from fastroute.training.run_folder import new_folder, run_folder
from fastroute.training.saving import (
    AtomicCheckpointIO,
    BestCheckpoint,
    CheckpointHistory,
    LastCheckpoint,
    RecoveryCheckpoint,
)
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
EVAL_METRICS = {"top1": "error", "top5": "error5", "loss": "loss"}
"""As timm names them, and as columns of the summary after `val_`."""


def fit(
    module: RoutingClassifier,
    data: pl.LightningDataModule | Iterable,
    val_data: Iterable | None = None,
    *,
    epochs: int = 200,
    output: str | Path | None = None,
    seed: int = 0,
    amp_dtype: str | None = None,
    precision: str | None = None,
    grad_accum_steps: int = 1,
    clip_grad: float | None = None,
    model_ema_decay: float | None = None,
    sync_bn: bool = False,
    dist_bn: str = "reduce",
    deterministic: bool = False,
    resume: str | Path | None = None,
    recovery_interval: int | None = None,
    log_interval: int = 50,
    callbacks: Sequence[pl.Callback] = (),
    logger: str | Logger | Sequence[str | Logger] | bool | None = "tensorboard",
    eval_metric: str = "top1",
    checkpoint_hist: int | None = None,
    patience: int | None = None,
    accelerator: str = "auto",
    devices: int | Sequence[int] = 1,
    fast_dev_run: bool = False,
    console: Console | None = None,
) -> list[dict]:
    """Train, and write into `output`.

    `last.ckpt`, `previous.ckpt` (the one before it) and `best.ckpt` (of the lowest validation error), `summary.csv`,
    `routers.csv` for a network with routers, and what the loggers write. Started by `torchrun`, the processes train
    together (DistributedDataParallel).

    Args:
        module: what to train; its weights change, and it stays on the device.
        data: its images: an `ImageDataModule` or another data module; or batches of images (N, C, H, W) and labels
            (N,), such as a `DataLoader`, with which a run that goes on within an epoch may see other batches.
        val_data: where `data` is no data module: batches to validate on. Without any, `best.ckpt` is of the lowest
            training error.
        epochs: how many in all, with those before a checkpoint.
        output: the folder to write into, made if it is missing. A run there before is overwritten. None is a new folder
            in "runs", by the time and the network.
        seed: of what the network draws in training; that of the data is the data module's.
        amp_dtype: autocast to "bfloat16" or, on a GPU, "float16"; None computes in float32.
        precision: instead of amp_dtype, as Lightning has it, such as "bf16-true".
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
        callbacks: Lightning's or your own, after those of this function.
        logger: what gets loss, learning rate, images/s, errors, gates and hyperparameters: names of `LOGGERS`, such as
            "csv,tensorboard", or Lightning's loggers; see `make_loggers`.
        eval_metric: by what `best.ckpt` is the best: "top1", "top5" or "loss".
        checkpoint_hist: how many of the best epochs also stay as `epoch12.ckpt`; None keeps none.
        patience: epochs without a better one, by eval_metric, after which the run stops; None goes on to the end.
        accelerator: "auto", "cpu" or "gpu", as Lightning has it. Each process uses one device.
        devices: 1, or a list of the one GPU to use, such as [1]; `torchrun` starts a process for each of several.
        fast_dev_run: whether to run one batch of training and of validation alone, and write nothing, as Lightning's.
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
        ModuleNotFoundError: the package of a logger is not installed.
        Terminated: SIGTERM or Ctrl-C came, and `last.ckpt` is written.
    """
    counts = {
        "epochs": epochs,
        "log_interval": log_interval,
        "grad_accum_steps": grad_accum_steps,
        "recovery_interval": recovery_interval,
        "checkpoint_hist": checkpoint_hist,
        "patience": patience,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if amp_dtype not in PRECISIONS:
        raise ValueError(f"amp_dtype is {amp_dtype!r}; it must be 'bfloat16', 'float16' or None")
    if amp_dtype is not None and precision is not None:
        raise ValueError(f"precision is {precision!r}, and amp_dtype is {amp_dtype!r}; give one of them")
    if eval_metric not in EVAL_METRICS:
        raise ValueError(f"eval_metric is {eval_metric!r}; it must be one of {', '.join(map(repr, EVAL_METRICS))}")
    if world_size() == 1 and devices != 1 and not (isinstance(devices, list | tuple) and len(devices) == 1):
        raise ValueError(
            f"devices is {devices!r}; a process uses one, so it must be 1 or a list of one index; "
            "`torchrun --nproc-per-node N` starts a process for each of N"
        )
    modular = isinstance(data, pl.LightningDataModule)
    if modular and val_data is not None:
        raise ValueError(f"val_data is given, and data is a {type(data).__name__}, which has its own")
    validated = is_overridden("val_dataloader", data) if modular else val_data is not None
    if not validated and eval_metric == "top5":
        raise ValueError("eval_metric is 'top5'; without images to validate on it must be 'top1' or 'loss'")
    if clip_grad is not None and clip_grad <= 0:
        raise ValueError(f"clip_grad is {clip_grad}; it must be above 0")
    if model_ema_decay is not None and not 0 <= model_ema_decay < 1:
        raise ValueError(f"model_ema_decay is {model_ema_decay}; it must be at least 0 and below 1")
    if dist_bn not in DIST_BN:
        raise ValueError(f"dist_bn is {dist_bn!r}; it must be one of {', '.join(map(repr, DIST_BN))}")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(f"accelerator is {accelerator!r}; PyTorch finds no GPU here")
    check_amp(amp_dtype, "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    check_warmup(module.hparams.sched, module.hparams.warmup_epochs, epochs)
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
    checkpoints = AtomicCheckpointIO(resume, None if resume is None else check_resume(resume, module, epochs))

    if output is None:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{module.hparams.model}"
        output = agreed(new_folder(Path("runs", name)) if is_main() and not fast_dev_run else Path("runs", name))
    output, processes = Path(output), world_size()
    metric = f"val_{EVAL_METRICS[eval_metric]}" if validated else f"train_{EVAL_METRICS[eval_metric]}"
    console, summary = console or Console(), EpochSummary(output / "summary.csv")
    options = {
        "epochs": epochs,
        "seed": seed,
        "precision": precision or PRECISIONS[amp_dtype],
        "grad_accum_steps": grad_accum_steps,
        "clip_grad": clip_grad,
        "model_ema_decay": model_ema_decay,
        "processes": processes,
    }
    own = [StepSeed(seed), NonFiniteStop(log_interval), FiniteWeights(output / LAST), EpochMeans()]
    if model_ema_decay is not None:
        own.append(MovingAverage(model_ema_decay))
    if processes > 1 and dist_bn:
        own.append(BatchNormSync(dist_bn))
    checkpoint = {"dirpath": output, "enable_version_counter": False, "save_on_train_epoch_end": True}
    writing = [
        RouterDiagnostics(output / "routers.csv"),
        summary,
        StepLog(summary, log_interval, options),
        EpochProgress(summary, console, log_interval),
        RecoveryCheckpoint(output / LAST, recovery_interval),
        LostProcess(),
        *callbacks,
        *([] if patience is None else [Patience(summary, metric, patience, console)]),
        BestCheckpoint(resume, filename="best", monitor=metric, **checkpoint),
        LastCheckpoint(**checkpoint),
    ]
    if checkpoint_hist is not None:
        writing.append(CheckpointHistory(output / LAST, lambda: summary.rows, metric, checkpoint_hist))
    with contextlib.nullcontext() if fast_dev_run else run_folder(output), quiet(), on_the_cpu_by_default():
        trainer = pl.Trainer(
            accelerator=accelerator,
            **_processes(processes, devices),
            precision=precision or PRECISIONS[amp_dtype],
            max_epochs=epochs,
            accumulate_grad_batches=grad_accum_steps,
            gradient_clip_val=clip_grad,
            sync_batchnorm=sync_bn,
            deterministic=deterministic,
            logger=False if fast_dev_run else make_loggers(logger, output, resume is not None),
            log_every_n_steps=log_interval,
            callbacks=[*own, *(callbacks if fast_dev_run else writing)],
            enable_progress_bar=not fast_dev_run,
            plugins=[checkpoints],
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=not modular,
            fast_dev_run=fast_dev_run,
        )
        if modular:
            trainer.fit(module, data, ckpt_path=resume)
        else:
            trainer.fit(module, data, val_data, ckpt_path=resume)
    if fast_dev_run:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in sorted(trainer.callback_metrics.items()))
        console.print(f"one batch of each: {shown}", highlight=False, soft_wrap=True)
    module.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
    return summary.rows


def check_amp(amp_dtype: str | None, device_type: str) -> None:
    """Raise for a type that steps cannot be computed in on a device."""
    if amp_dtype == "float16" and device_type == "cpu":
        raise ValueError("amp_dtype is 'float16'; on a CPU it must be 'bfloat16', or no --amp at all")


def _processes(count: int, devices: int | Sequence[int] = 1) -> dict:
    """Lightning's arguments for the processes that `torchrun` started, or for this one alone."""
    if count == 1:
        return {"devices": devices}
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


def on_the_cpu_by_default() -> contextlib.AbstractContextManager:
    """Have `torch.set_default_device` be without effect in the block: orders and draws are made on the CPU."""
    # Where it is the default already, the block would only cost time at every call of PyTorch.
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


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
