"""`fastroute train`: train a network."""

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from fastroute.cli import network
from fastroute.cli.common import (
    handle_run_errors,
    numbers,
    plain_errors,
    resolve_dataset,
    run_location,
    say_changes,
    takes_options,
    write_arguments,
)
from fastroute.cli.errors import escaped, standard_output
from fastroute.cli.sizes import check_batch, check_images
from fastroute.cli.train_options import TrainOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastroute.models.specification import Specification
    from fastroute.nn import GateClusteringLoss
    from fastroute.training import ImageDataModule, RoutingClassifier


NETWORK_ARGUMENTS = {"drop": "drop_rate", "drop_path": "drop_path_rate", "block": "block"}
"""Flags that some networks take as arguments of these names."""


@takes_options(TrainOptions)
def train(context: typer.Context, options: TrainOptions) -> None:
    """Train a network; write checkpoints, summary.csv, routers.csv, logger output and args.yaml.

    Started by `torchrun`, all its processes train together.
    """
    with plain_errors():
        from fastroute import training
        from fastroute.training.callbacks import FirstBatch
        from fastroute.training.distributed import check_gpus, is_main, process_group

        check_gpus()
        network.merge_arguments(options)
    console = standard_output(quiet=not is_main())
    with handle_run_errors(console, "train"), process_group():
        with plain_errors():
            device = _device(options)
            data, module, resume, folder = _prepare(context, options, device, console)
            if resume is not None:
                say_changes(options, resume.parent, console)
        training.fit(
            module,
            data,
            epochs=options.epochs,
            output=folder,
            seed=options.seed,
            amp_dtype=options.amp_dtype if options.amp else None,
            grad_accum_steps=options.grad_accum_steps,
            clip_grad=options.clip_grad,
            model_ema_decay=options.model_ema_decay if options.model_ema else None,
            sync_bn=options.sync_bn,
            find_unused_parameters=options.find_unused_parameters,
            dist_bn=options.dist_bn,
            deterministic=options.deterministic,
            resume=resume,
            recovery_interval=options.recovery_interval,
            log_interval=options.log_interval,
            logger=options.log,
            eval_metric=options.eval_metric,
            checkpoint_hist=options.checkpoint_hist,
            patience=options.patience,
            callbacks=[FirstBatch(lambda: write_arguments(options, folder))],
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1 if device.index is None else [device.index],
            console=console,
        )
    routers = next(c for c in module.trainer.callbacks if isinstance(c, training.RouterDiagnostics)).statistics
    if gates := {name: router.mean_gates for name, router in routers.items()}:
        console.print(training.gates_table(gates, title="mean gates over the validation images"))
    console.print(f"last.ckpt, best.ckpt, summary.csv, args.yaml: {escaped(folder.resolve())}", soft_wrap=True)


def _prepare(
    context: typer.Context, options: TrainOptions, device: "torch.device", console: Console
) -> tuple["ImageDataModule", "RoutingClassifier", Path | None, Path]:
    """Return the data module, the module to train, the checkpoint to resume if there is one, and the run's folder.

    The dataset and the network are written into the options as they were resolved, for args.yaml.
    """
    import pytorch_lightning as pl

    from fastroute import training
    from fastroute.nn.routed import routers_in
    from fastroute.training.checkpoints import check_unused, is_within
    from fastroute.training.classifier import check_compile_mode
    from fastroute.training.distributed import broadcast_from_rank_zero, is_main, local_rank_zero_first
    from fastroute.training.loggers import check_loggers
    from fastroute.training.optim import check_warmup
    from fastroute.training.run_folder import new_folder, run_folder
    from fastroute.training.trainer import check_amp

    if options.sync_bn and device.type != "cuda":
        raise ValueError("sync_bn is True; PyTorch's synchronised batch norm needs GPUs")
    check_compile_mode(options.compile, options.compile_mode)
    check_amp(options.amp_dtype if options.amp else None, device.type)
    check_loggers(options.log.replace(" ", "").split(",") if options.log else [])
    options.dataset = resolve_dataset(options.dataset, options.data_dir, options.val_split > 0)
    model = re.sub(r"[^\w.-]+", "-", options.model or "")
    folder, resume = broadcast_from_rank_zero(run_location(options, f"{model}-{options.dataset}", console))
    if options.overwrite and is_within(options.initial_checkpoint, folder):
        raise ValueError(
            f"initial_checkpoint is {options.initial_checkpoint}, in the folder of the run that overwrite removes: "
            "copy it elsewhere first, or choose another experiment"
        )
    unnamed = options.experiment is None and resume is None
    flags = _network_arguments(options)
    specification = network.specification(options, resume)
    network.write_flags(specification, options)
    colour = options.dataset not in ("digits", "mnist") and options.in_chans != 1
    chosen = options.mean is not None or options.std is not None
    if options.pretrained and colour and not chosen and (levels := network.pretrained_levels(specification)):
        options.mean, options.std = (",".join(f"{value:g}" for value in values) for values in levels)
        console.print(f"normalised as for the pretrained weights: mean {options.mean}, std {options.std}")
    if resume is not None and options.resume == "auto" and (why := _finished(options, resume)):
        console.print(f"{why}: {escaped(resume)}", soft_wrap=True)
        raise typer.Exit(0)
    if unnamed:
        folder = broadcast_from_rank_zero(new_folder(folder) if is_main() else None)
    context.with_resource(run_folder(folder))
    if not options.overwrite:
        check_unused(folder, "--overwrite", resume)

    data = _data(options)
    if options.cuda_graphs:  # before the images are read
        _check_recording(options, device, data)
    if data.in_memory:
        check_images(options.dataset, options.img_size)
    one_by_one = local_rank_zero_first() if options.download else contextlib.nullcontext()
    with one_by_one, console.status("reading the images"):
        data.setup()
    console.print(escaped(data.description), soft_wrap=True, highlight=False)
    if data.num_classes < 2:
        raise ValueError(
            f"the data has one class, {data.classes[0]!r}; training needs two or more: data_dir must hold train/ and "
            "val/, or with --val-split nothing else, with a folder for each class"
        )
    if options.num_classes is not None and options.num_classes < data.num_classes:
        raise ValueError(f"num_classes is {options.num_classes}; the data has {data.num_classes} classes")
    check_batch(
        specification,
        min(options.batch_size, data.train_count),
        data.in_chans,
        data.img_size,
        training=not options.grad_checkpointing,  # which keeps less than the estimate
        half=options.amp,
        device=device,
    )
    check_warmup(options.sched, options.warmup_epochs, options.epochs)
    pl.seed_everything(options.seed, verbose=False)
    built = _network(flags, specification, options, data, options.num_classes, resume, console)
    options.channels_last = network.usable_channels_last(  # as args.yaml keeps it
        built,
        str(specification),
        options.channels_last,
        device,
        data.in_chans,
        data.img_size,
        console,
    )
    module = _classifier(options, built, data)
    if options.cuda_graphs:
        _check_recording(options, device, data, module.model)
    if options.gate_reg_weight and not routers_in(module.model):
        raise ValueError(f"gate_reg_weight is {options.gate_reg_weight}, but {options.model} has no gates")
    if options.initial_checkpoint is not None and resume is None:
        training.load_weights(module.model, options.initial_checkpoint)
    if resume is not None:
        training.check_resume(resume, module, options.epochs)
    return data, module, resume, folder


def _finished(options: TrainOptions, resume: Path) -> str | None:
    """Say why the run of a checkpoint is finished; None if it is not."""
    from fastroute import training
    from fastroute.training.checkpoints import summary_rows
    from fastroute.training.tables import out_of_patience
    from fastroute.training.trainer import EVAL_METRICS

    done = training.epochs_done(resume)
    if done >= options.epochs:
        return f"all {options.epochs} epochs are done"
    metric = f"val_{EVAL_METRICS[options.eval_metric]}"
    if options.patience is not None and out_of_patience(summary_rows(resume), metric, options.patience):
        return f"stopped by --patience after epoch {done}"
    return None


def _data(options: TrainOptions) -> "ImageDataModule":
    from fastroute import training

    return training.ImageDataModule(
        options.dataset,
        options.data_dir,
        options.batch_size,
        options.img_size,
        options.workers,
        options.seed,
        in_memory=options.in_memory,
        download=options.download,
        first_classes=options.first_classes,
        on_bad_image=options.on_bad_image,
        train_crop_mode=options.train_crop_mode,
        scale=_pair("scale", options.scale),
        ratio=_pair("ratio", options.ratio),
        crop_pct=options.crop_pct,
        aa=options.aa,
        reprob=options.reprob,
        mixup=options.mixup,
        cutmix=options.cutmix,
        hflip=options.hflip,
        vflip=options.vflip,
        color_jitter=options.color_jitter,
        no_aug=options.no_aug,
        val_split=options.val_split,
        class_map=options.class_map,
        input_key=options.input_key,
        mean=numbers(options.mean, float, "numbers, such as 0.485,0.456,0.406"),
        std=numbers(options.std, float, "numbers, such as 0.229,0.224,0.225"),
        interpolation=options.interpolation,
        in_chans=options.in_chans,
    )


def _classifier(options: TrainOptions, built: "nn.Module", data: "ImageDataModule") -> "RoutingClassifier":
    from fastroute import training

    return training.RoutingClassifier(
        built,
        options.num_classes or data.num_classes,
        data.in_chans,
        data.img_size,
        opt=options.opt,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        norm_weight_decay=options.norm_weight_decay,
        gate_lr_mult=options.gate_lr_mult,
        gate_wd=options.gate_wd,
        sched=options.sched,
        warmup_epochs=options.warmup_epochs,
        decay_epochs=options.decay_epochs,
        decay_milestones=numbers(options.decay_milestones),
        decay_rate=options.decay_rate,
        min_lr=options.min_lr,
        warmup_lr=options.warmup_lr,
        filter_bias_and_bn=options.filter_bias_and_bn,
        layer_decay=options.layer_decay,
        smoothing=options.smoothing,
        channels_last=options.channels_last,
        grad_checkpointing=options.grad_checkpointing,
        compile=options.compile,
        compile_mode=options.compile_mode,
        cuda_graphs=options.cuda_graphs,
        aux_loss=_gate_clustering(options),
        aux_weight=_gate_clustering_weight(options, built),
    )


def _network_arguments(options: TrainOptions) -> dict[str, str]:
    """Turn flags that are arguments of some networks into those, as which a checkpoint and args.yaml keep them.

    Returns:
        "drop is 0.1" and the like, by the name of the argument.
    """
    given = {}
    for option, name in NETWORK_ARGUMENTS.items():
        if (value := getattr(options, option)) is not None:
            options.model_kwargs = [*(options.model_kwargs or []), f"{name}={value}"]
            setattr(options, option, None)
            given[name] = f"{option} is {value}"
    return given


def _network(flags: dict[str, str], specification: "Specification", *arguments) -> "nn.Module":
    """Build the network; if it does not take the argument of a flag, name the flag."""
    try:
        return network.network(specification, *arguments)
    except ValueError as error:
        for name, given in flags.items():
            if f"'{name}'" in str(error):
                others = "resnet20, resnet32, resnet110" if name == "block" else "many of timm's"
                raise ValueError(
                    f"{given}; {specification} takes no {name}: leave the flag out, or choose a network that takes it, "
                    f"as {others} do"
                ) from error
        raise


def _device(options: TrainOptions) -> "torch.device":
    """Return the device to train on; `torchrun` assigns each process its GPU."""
    from fastroute._devices import resolve_device
    from fastroute.training.distributed import world_size

    device = resolve_device(options.device)
    if world_size() > 1 and options.device is not None and device != resolve_device(None):
        raise ValueError(
            f"device is {options.device!r}; torchrun assigns each process its GPU: choose them by "
            "CUDA_VISIBLE_DEVICES, which is empty for the CPU"
        )
    return device


def _check_recording(
    options: TrainOptions, device: "torch.device", data: "ImageDataModule", model: "nn.Module | None" = None
) -> None:
    """Check what `fit` would check before it records steps."""
    from fastroute.training.distributed import world_size
    from fastroute.training.graphs import check_recording

    check_recording(
        device_type=device.type,
        processes=world_size(),
        grad_accum_steps=options.grad_accum_steps,
        amp_dtype=options.amp_dtype if options.amp else None,
        compile_mode=options.compile_mode,
        varying=data.varying,
        model=model,
    )


def _gate_clustering(options: TrainOptions) -> "GateClusteringLoss | None":
    from fastroute.nn import GateClusteringLoss

    if not options.gate_reg_weight:
        return None
    momentum = 0.1 if options.gate_reg_prior else None
    return GateClusteringLoss(prior_momentum=momentum, scope=options.gate_reg_scope)


def _gate_clustering_weight(options: TrainOptions, built: "nn.Module") -> float:
    """Return the weight of the gates' loss: the given one is that of two paths, and more paths have less (§5.1)."""
    from fastroute.nn.routed import routers_in

    paths = (router.w2.shape[-2] for router in routers_in(built).values())
    return options.gate_reg_weight * 2 / max([2, *paths])


def _pair(name: str, value: str | None) -> tuple[float, float] | None:
    if value is None:
        return None
    pair = numbers(value, float, "numbers, such as 0.08,1")
    if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
        raise ValueError(f"{name} is {value}; expected two numbers above 0, the smaller first")
    return pair[0], pair[1]
