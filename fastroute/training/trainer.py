"""A training run, from its start or resumed from a checkpoint."""

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
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fastroute.nn import GateNorm, SparseRouter
from fastroute.ops._instruction_set import warn_if_emulated
from fastroute.training.callbacks import (
    EpochProgress,
    EpochSummary,
    FirstBatch,
    Patience,
    RouterDiagnostics,
    StepLog,
)
from fastroute.training.checkpoints import LAST, check_resume, is_within, remove_results
from fastroute.training.classifier import RoutingClassifier
from fastroute.training.distributed import broadcast_from_rank_zero, is_main, world_size
from fastroute.training.graphs import check_recording
from fastroute.training.loggers import event_errors, make_loggers
from fastroute.training.optim import check_warmup
from fastroute.training.run_folder import local_path, new_folder, run_folder
from fastroute.training.saving import (
    AtomicCheckpointIO,
    BestCheckpoint,
    CheckpointHistory,
    LastCheckpoint,
    Readable,
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
"""Metrics by timm's names, and the columns of the summary that follow `val_`."""


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
    find_unused_parameters: bool | None = None,
    dist_bn: str = "reduce",
    deterministic: bool = False,
    resume: str | Path | None = None,
    recovery_interval: int | None = None,
    log_interval: int = 50,
    callbacks: pl.Callback | Sequence[pl.Callback] | None = (),
    logger: str | Logger | Sequence[str | Logger] | bool | None = "tensorboard",
    eval_metric: str = "top1",
    checkpoint_hist: int | None = None,
    patience: int | None = None,
    accelerator: str = "auto",
    devices: int | Sequence[int] = 1,
    fast_dev_run: bool = False,
    console: Console | None = None,
) -> list[dict]:
    """Train a module, and write checkpoints and tables into a folder.

    The files are `last.ckpt`; `previous.ckpt`, the one before it; `best.ckpt`, of the lowest validation error;
    `summary.csv`; `routers.csv` for a network with routers; and those of the loggers. Processes that `torchrun` started
    train together (DistributedDataParallel).

    Args:
        module: the module to train; its weights change, and it stays on the device. A network in evaluation mode is put
            into training mode; parts in evaluation mode of one in training mode stay as they are.
        data: an `ImageDataModule` or another data module; or batches of images (N, C, H, W) and labels (N,), such as a
            `DataLoader` or a list. A run resumed within an epoch of a `DataLoader` may see other batches.
        val_data: batches to validate on, unless `data` is a data module. Without any, `best.ckpt` is of the lowest
            training error.
        epochs: of the whole run, including those of the checkpoint to resume.
        output: the folder to write into, made if it is missing. A run in it is overwritten: its checkpoints and tables
            are removed after the first batch. None is a new folder in "runs", named by the time and the network.
        seed: of the network's random draws in training; the data module has its own seed.
        amp_dtype: the autocast type, "bfloat16" or, on a GPU, "float16"; None computes in float32.
        precision: Lightning's, such as "bf16-true", instead of `amp_dtype`.
        grad_accum_steps: batches of each optimiser step, whose gradients are averaged.
        clip_grad: the largest norm of the gradient; None does not clip.
        model_ema_decay: the decay of a moving average of weights and batch norm's statistics. The average is validated,
            and `module` holds it at the end. None keeps no average.
        sync_bn: whether batch norm takes its statistics over all processes; on GPUs only.
        find_unused_parameters: with several processes, whether to search each step for parameters without a gradient,
            which are an error otherwise. None searches if the network has a `SparseRouter` or a loss of its own.
        dist_bn: how to synchronise running statistics before validation: "reduce" averages them over the processes,
            "broadcast" copies those of rank 0, and "" leaves them.
        deterministic: whether to use deterministic algorithms only.
        resume: the checkpoint to resume from, also within an epoch, with its optimiser and schedule. If it lies in
            `output`, which may have been moved or renamed, `best.ckpt` is kept until an epoch is better. In another
            folder, the best epoch is that of the epochs trained there.
        recovery_interval: optimiser steps between checkpoints within an epoch; None saves at its end only.
        log_interval: steps between readings of the loss.
        callbacks: Lightning's or your own, one or several, which run after those of this function.
        logger: receives loss, learning rate, images/s, errors, gates and hyperparameters: names of `LOGGERS`, such as
            "csv,tensorboard", or Lightning's loggers; see `make_loggers`.
        eval_metric: the metric of the best epoch: "top1", "top5" or "loss".
        checkpoint_hist: the number of best epochs to keep as `epoch12.ckpt`; None keeps none.
        patience: the number of epochs without a better one, by `eval_metric`, after which the run stops; None never
            stops early.
        accelerator: Lightning's "auto", "cpu" or "gpu". Each process uses one device.
        devices: 1, or a list of the one GPU to use, such as [1]; `torchrun` starts a process for each of several.
        fast_dev_run: whether to run only one batch of training and validation, and write nothing, as Lightning does.
        console: to show progress on; None is the standard output.

    Returns:
        a dict for each epoch, as in `summary.csv`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        TypeError: `module` is no `RoutingClassifier`, or data are a dataset without a loader.
        ValueError: an argument is out of range; `output` is taken for a URL, see `local_path`; the checkpoint is
            damaged, of another network or has completed all epochs; there is no such accelerator; or the steps cannot
            be recorded, see `check_recording`.
        NotRecordable: a step cannot be recorded, as it turned out in the recording.
        FolderInUse: another run writes into `output`.
        FloatingPointError: the loss or a weight is NaN or infinite; earlier checkpoints are intact.
        OSError: a file cannot be written; the previous checkpoint is intact.
        ProcessLost: another process of the run is gone.
        ModuleNotFoundError: the package of a logger is not installed.
        Terminated: SIGTERM or Ctrl-C was received, or a callback, such as Lightning's Timer, has set
            `trainer.should_stop` within an epoch; and `last.ckpt` is written.
    """
    if not isinstance(getattr(module, "_orig_mod", module), RoutingClassifier):
        raise TypeError(
            f"module is a {type(module).__name__}; it must be a RoutingClassifier, and data follow: "
            "fit(RoutingClassifier(network, num_classes=…), data)"
        )
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
    callbacks = [callbacks] if isinstance(callbacks, pl.Callback) else list(callbacks or ())
    data, val_data = _loader("data", data), _loader("val_data", val_data)
    modular = isinstance(data, pl.LightningDataModule)
    if modular and val_data is not None:
        raise ValueError(f"val_data is given, and data is a {type(data).__name__}, which has its own")
    validated = is_overridden("val_dataloader", data) if modular else val_data is not None
    if not validated and eval_metric == "top5":
        raise ValueError("eval_metric is 'top5'; without images to validate on it must be 'top1' or 'loss'")
    normalised = any(isinstance(layer, GateNorm) for layer in module.model.modules())
    if normalised and getattr(data, "batch_size", None) == 1 and world_size() == 1:
        raise ValueError("batch_size is 1; routers that normalise gates over the batch need at least 2")
    if clip_grad is not None and clip_grad <= 0:
        raise ValueError(f"clip_grad is {clip_grad}; it must be above 0")
    if model_ema_decay is not None and not 0 <= model_ema_decay < 1:
        raise ValueError(f"model_ema_decay is {model_ema_decay}; it must be at least 0 and below 1")
    if dist_bn not in DIST_BN:
        raise ValueError(f"dist_bn is {dist_bn!r}; it must be one of {', '.join(map(repr, DIST_BN))}")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(f"accelerator is {accelerator!r}; PyTorch finds no GPU here")
    device_type = "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    check_amp(amp_dtype, device_type)
    if is_main() and (amp_dtype == "bfloat16" or precision == "bf16-mixed"):
        warn_if_emulated(torch.bfloat16, device_type)
    check_warmup(module.hparams.sched, module.hparams.warmup_epochs, epochs)
    if module.hparams.cuda_graphs:
        check_recording(
            device_type=device_type,
            needed=module.graph.device_type,
            processes=world_size(),
            grad_accum_steps=grad_accum_steps,
            amp_dtype=amp_dtype,
            compile_mode=module.hparams.compile_mode,
            varying=getattr(data, "varying", False),
            model=module.model,
        )
    if find_unused_parameters is None:
        find_unused_parameters = _may_skip_parameters(module)
    if sync_bn and device_type == "cpu":
        raise ValueError("sync_bn is True; PyTorch's synchronised batch norm needs GPUs")
    checkpoints = AtomicCheckpointIO(resume, None if resume is None else check_resume(resume, module, epochs))

    if output is None:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{module.hparams.model}"
        output = broadcast_from_rank_zero(
            new_folder(Path("runs", name)) if is_main() and not fast_dev_run else Path("runs", name)
        )
    output, processes = local_path(output, "output", utf_8=bool(logger)), world_size()
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
    recovery = RecoveryCheckpoint(output / LAST, recovery_interval)
    writing = [
        RouterDiagnostics(output / "routers.csv"),
        summary,
        FirstBatch(lambda: remove_results(output, resume)),
        StepLog(summary, log_interval, options),
        EpochProgress(summary, console, log_interval),
        LostProcess(),
        *callbacks,
        *([] if patience is None else [Patience(summary, metric, patience, console)]),
        BestCheckpoint(resume, filename="best", monitor=metric, **checkpoint),
        LastCheckpoint(**checkpoint),
        recovery,
    ]
    if checkpoint_hist is not None:
        writing.append(CheckpointHistory(output / LAST, lambda: summary.rows, metric, checkpoint_hist))
    writing.append(Readable())  # last, as the state of others may begin in their own on_train_start
    folder = contextlib.nullcontext() if fast_dev_run else run_folder(output)
    with folder, silence_lightning(), event_errors(), default_device_cpu():
        trainer = pl.Trainer(
            accelerator=accelerator,
            **_processes(processes, devices, find_unused_parameters),
            precision=precision or PRECISIONS[amp_dtype],
            max_epochs=epochs,
            accumulate_grad_batches=grad_accum_steps,
            gradient_clip_val=clip_grad,
            sync_batchnorm=sync_bn,
            deterministic=deterministic,
            logger=False if fast_dev_run else make_loggers(logger, output, is_within(resume, output)),
            log_every_n_steps=log_interval,
            callbacks=[*own, *(callbacks if fast_dev_run else writing)],
            enable_progress_bar=not fast_dev_run,
            plugins=[checkpoints],
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=not modular,
            fast_dev_run=fast_dev_run,
        )
        if not module.training:  # as after `module.eval()`; the network itself comes next
            module.training = True
            if isinstance(module.aux_loss, nn.Module):
                module.aux_loss.train()
        if not module.model.training:  # as `fastroute.load` returns it
            module.model.train()
        with _unused_parameters_explained():
            if modular:
                trainer.fit(module, data, ckpt_path=resume)
            else:
                trainer.fit(module, data, val_data, ckpt_path=resume)
        if not fast_dev_run:
            recovery.check_trained(trainer)
    if fast_dev_run:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in sorted(trainer.callback_metrics.items()))
        console.print(f"one batch of each: {shown}", highlight=False, soft_wrap=True)
    module.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
    return summary.rows


def check_amp(amp_dtype: str | None, device_type: str) -> None:
    """Check that a device type supports an autocast type.

    Args:
        amp_dtype: "bfloat16", "float16" or None.
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: `amp_dtype` is "float16" on a CPU.
    """
    if amp_dtype == "float16" and device_type == "cpu":
        raise ValueError("amp_dtype is 'float16'; on a CPU it must be 'bfloat16', or leave out --amp")


def _is_of_samples(data: object) -> bool:
    """Return whether data are a dataset of single images with their labels."""
    if not isinstance(data, Dataset) or hasattr(data, "__iter__"):
        return False
    with contextlib.suppress(Exception):  # a dataset of the user's may raise anything
        _, label = data[0]
        return not isinstance(label, Tensor) or label.dim() == 0
    return False


def _loader(name: str, data: object) -> object:
    """Return a loader of the batches in a list or tuple, and other data as they are.

    Raises:
        TypeError: the data are a dataset of single images.
        ValueError: there is no batch, or they are images and labels instead of batches of them.
    """
    if _is_of_samples(data):
        raise TypeError(
            f"{name} is a {type(data).__name__}; it must have batches: give DataLoader(dataset, batch_size=…)"
        )
    if not isinstance(data, list | tuple):
        return data
    if len(data) == 0:
        raise ValueError(f"{name} is empty; it must have at least one batch of images and labels")
    if isinstance(data[0], Tensor):
        raise ValueError(
            f"{name} is a {type(data).__name__} of tensors; it must have batches of images and labels: give "
            "DataLoader(TensorDataset(images, labels), batch_size=…), or [(images, labels)] for one batch"
        )
    return DataLoader(data, batch_size=None)


def _processes(count: int, devices: int | Sequence[int] = 1, find_unused_parameters: bool = False) -> dict:
    """Return Lightning's arguments for the processes that `torchrun` started, or for this one alone."""
    if count == 1:
        return {"devices": devices}
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    # Buffers are not broadcast at every step: BatchNormSync synchronises batch norm's, and validation, in which
    # processes may have different numbers of images, then needs no communication.
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    strategy = OrderedDDP(**options, find_unused_parameters=find_unused_parameters)
    return {"devices": here, "num_nodes": count // here, "strategy": strategy}


def _may_skip_parameters(module: RoutingClassifier) -> bool:
    """Return whether a step may leave parameters without a gradient: those of idle sparse paths, or of an own loss."""
    return module.own_loss or any(isinstance(layer, SparseRouter) for layer in module.model.modules())


@contextlib.contextmanager
def _unused_parameters_explained() -> Iterator[None]:
    """Say what to do if DistributedDataParallel refuses parameters without a gradient."""
    try:
        yield
    except RuntimeError as error:
        if "parameters that were not used in producing" not in str(error):
            raise
        raise ValueError(
            "find_unused_parameters is False, and a step of a process left parameters without a gradient; "
            "set it to True (--find-unused-parameters)"
        ) from error


class OrderedDDP(DDPStrategy):
    """Lightning's DistributedDataParallel, with gradients summed in the order of the ranks on CPUs.

    Bit-exact resuming with three or more processes needs this: Gloo's order depends on the position of a gradient in
    its bucket, and DistributedDataParallel forms new buckets after the first step.
    """

    def configure_ddp(self) -> None:
        super().configure_ddp()
        if self.root_device.type == "cpu" and self.world_size > 2:
            self.model.register_comm_hook(None, mean_in_rank_order)


def mean_in_rank_order(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average the gradients of all processes in the order of their ranks, a share in each process.

    It sends as many bytes as `all_reduce`.

    Args:
        _: the state of the hook, unused.
        bucket: of gradients.

    Returns:
        a future of the mean.
    """
    count, gradients = dist.get_world_size(), bucket.buffer()
    given = F.pad(gradients, (0, -len(gradients) % count))
    parts = torch.empty_like(given)
    dist.all_to_all_single(parts, given)
    total = functools.reduce(torch.add, parts.view(count, -1))
    dist.all_gather_into_tensor(given, total / count)
    mean = torch.futures.Future()
    mean.set_result(given[: len(gradients)])
    return mean


def default_device_cpu() -> contextlib.AbstractContextManager:
    """Return a context without a default device other than the CPU: orders and random draws are made there."""
    # If the CPU is the default already, a device context would only slow every call of PyTorch down.
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


@contextlib.contextmanager
def silence_lightning() -> Iterator[None]:
    """Silence Lightning's messages about devices, workers and products in the block."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "torch.utils.tensorboard")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric")
            # The strides of a 1×1 convolution's gradient fit both memory formats; DDP warns about the choice.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
