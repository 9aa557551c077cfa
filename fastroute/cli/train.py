"""`fastroute train`: flags to a data module, a Lightning module and a run."""

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from torch import nn

from fastroute.cli import network
from fastroute.cli.common import (
    COUNT,
    PIXELS,
    SEED,
    WORKERS,
    config_option,
    dataset_named,
    device_named,
    endings,
    numbers,
    place_of_run,
    plain_errors,
    real,
    write_arguments,
)
from fastroute.cli.outside import shown, standard_output
from fastroute.cli.sizes import check_batch, check_images
from fastroute.nn import GateClusteringLoss, Router


def option(*flags: str, help: str | None = None, panel: str | None = None, **settings):
    return typer.Option(*flags, help=help, rich_help_panel=panel, **settings)


def real_option(*bounds: float, **settings):
    return option(parser=real(*bounds), **settings)


DATA, OPTIMISER, SCHEDULE, GATES = "Data", "Optimiser", "Learning rate", "Gates"
AUGMENTATION, COMPUTE, RUN = "Augmentation", "Computation", "The run and its files"


def train(
    context: typer.Context,
    model: network.ModelArgument = None,
    more_kwargs: network.MoreArgument = None,
    pretrained: network.PretrainedOption = False,
    pretrained_path: network.PretrainedPathOption = None,
    model_kwargs: network.ModelKwargsOption = None,
    multipath: network.MultipathOption = None,
    route_after: network.RouteAfterOption = "auto",
    routing: network.RoutingOption = "cc",
    init: network.InitOption = None,
    gate_norm: network.GateNormOption = None,
    gate_prior: network.GatePriorOption = None,
    config: Annotated[str | None, config_option("train")] = None,
    dataset: Annotated[
        Literal["digits", "cifar10", "cifar100", "mnist", "stl10", "imagefolder", "webdataset"] | None,
        option(help="Where the images come from. (default: what --data-dir holds, or digits)", panel=DATA),
    ] = None,
    data_dir: Annotated[
        Path | None,
        option(help="Folder of the data, a tar file, or a pattern of them. (default: data)", panel=DATA),
    ] = None,
    val_split: Annotated[
        float,
        real_option(
            0, 0.999, help="Share of each class's training images to validate on; 0: the data's own val.", panel=DATA
        ),
    ] = 0.0,
    class_map: Annotated[
        Path | None, option(help="Text file with a class on each line, in the order of their numbers.", panel=DATA)
    ] = None,
    input_key: Annotated[
        str | None, option(help="Of shards with several images a key: such as jpg;png or left.jpg.", panel=DATA)
    ] = None,
    in_chans: Annotated[
        int | None, option(min=1, max=3, help="1: grey images, 3: colour. (default: the data's)", panel=DATA)
    ] = None,
    mean: Annotated[
        str | None, option(help="Of each channel, as 0.5 or 0.485,0.456,0.406. (default: the data's)", panel=DATA)
    ] = None,
    std: Annotated[str | None, option(help="Of each channel, as --mean.", panel=DATA)] = None,
    interpolation: Annotated[
        Literal["bilinear", "bicubic", "nearest"], option(help="How images are scaled.", panel=DATA)
    ] = "bilinear",
    download: Annotated[bool, option("--download", help="Download torchvision's sets.", panel=DATA)] = False,
    num_classes: Annotated[
        int | None, option(min=1, max=COUNT, help="Logits. (default: the data's classes)", panel=DATA)
    ] = None,
    first_classes: Annotated[
        int | None, option(min=1, max=COUNT, help="Use only the first so many classes of the data.", panel=DATA)
    ] = None,
    img_size: Annotated[
        int | None,
        option(min=1, max=PIXELS, help="Size of the images. (default: the data's own, 32 or 224)", panel=DATA),
    ] = None,
    in_memory: Annotated[
        bool | None,
        option(
            "--in-memory/--stream",
            help="Hold an imagefolder decoded in memory, or have workers decode it. (default: up to size 64)",
            panel=DATA,
        ),
    ] = None,
    batch_size: Annotated[
        int, option("-b", "--batch-size", min=1, max=COUNT, help="Images in a step of one process.", panel=DATA)
    ] = 128,
    workers: Annotated[
        int | None,
        option(
            "-j",
            "--workers",
            min=1,
            max=WORKERS,
            help="Threads or processes that decode images. (default: all cores)",
            panel=DATA,
        ),
    ] = None,
    on_bad_image: Annotated[
        Literal["stop", "skip"], option(help="What an image that cannot be read does.", panel=DATA)
    ] = "stop",
    train_crop_mode: Annotated[
        Literal["rrc", "rkrc", "rkrr", "random"],
        option(
            help="Streamed: a random area, resized; timm's rkrc and rkrr; or resize to 1/crop-pct, random crop.",
            panel=AUGMENTATION,
        ),
    ] = "rrc",
    scale: Annotated[
        str | None, option(help="Share of the image's area. (default: 0.08,1; rkrc 0.8,1)", panel=AUGMENTATION)
    ] = None,
    ratio: Annotated[
        str | None, option(help="Aspect ratio. (default: 0.75,1.3333; rkrc 0.9,1.1111)", panel=AUGMENTATION)
    ] = None,
    crop_pct: Annotated[
        float, real_option(help="Streamed: the crop's side by the resized image's.", panel=AUGMENTATION)
    ] = 0.875,
    aa: Annotated[
        str | None,
        option(help="imagenet, cifar10, svhn, trivial, augmix, or such as rand-m9-n2.", panel=AUGMENTATION),
    ] = None,
    hflip: Annotated[
        float | None,
        real_option(0, 1, help="Probability of mirroring. (default: 0.5, and 0 for digits)", panel=AUGMENTATION),
    ] = None,
    vflip: Annotated[float, real_option(0, 1, help="Probability of turning upside down.", panel=AUGMENTATION)] = 0.0,
    color_jitter: Annotated[
        float, real_option(0, 1, help="Of brightness, contrast and saturation.", panel=AUGMENTATION)
    ] = 0.0,
    no_aug: Annotated[
        bool, option("--no-aug", help="No augmentation at all, whatever else is asked for.", panel=AUGMENTATION)
    ] = False,
    reprob: Annotated[float, real_option(help="Probability of random erasing.", panel=AUGMENTATION)] = 0.0,
    mixup: Annotated[float, real_option(0, help="α of mixup; 0 is off.", panel=AUGMENTATION)] = 0.0,
    cutmix: Annotated[float, real_option(0, help="α of CutMix; 0 is off.", panel=AUGMENTATION)] = 0.0,
    drop: Annotated[
        float | None, real_option(0, 1, help="Dropout, where the network takes drop_rate.", panel=AUGMENTATION)
    ] = None,
    drop_path: Annotated[
        float | None,
        real_option(0, 1, help="Stochastic depth, where the network takes drop_path_rate.", panel=AUGMENTATION),
    ] = None,
    smoothing: Annotated[float, real_option(help="Of the labels.", panel=AUGMENTATION)] = 0.0,
    epochs: Annotated[int, option(min=1, max=COUNT, panel=SCHEDULE)] = 200,
    opt: Annotated[
        Literal["sgd", "nesterov", "rmsprop", "adam", "adamw"],
        option(help="sgd has plain momentum, nesterov Nesterov's.", panel=OPTIMISER),
    ] = "sgd",
    momentum: Annotated[float, real_option(panel=OPTIMISER)] = 0.9,
    weight_decay: Annotated[float, real_option(panel=OPTIMISER)] = 5e-4,
    norm_weight_decay: Annotated[
        float | None, real_option(help="Of normalisation layers. (default: as all)", panel=OPTIMISER)
    ] = None,
    filter_bias_and_bn: Annotated[
        bool,
        option(
            "--filter-bias-and-bn/--no-filter-bias-and-bn",
            help="No weight decay of biases and normalisation layers, as timm has it.",
            panel=OPTIMISER,
        ),
    ] = False,
    layer_decay: Annotated[
        float | None,
        real_option(1e-6, 1, help="Learning rate of a layer, as a share of the next one's.", panel=OPTIMISER),
    ] = None,
    clip_grad: Annotated[float | None, real_option(1e-9, help="Largest norm of the gradient.", panel=OPTIMISER)] = None,
    grad_accum_steps: Annotated[int, option(min=1, max=COUNT, help="Batches for each step.", panel=OPTIMISER)] = 1,
    model_ema: Annotated[
        bool, option("--model-ema/--no-model-ema", help="Keep and validate a moving average.", panel=OPTIMISER)
    ] = False,
    model_ema_decay: Annotated[float, real_option(0, 0.9999999, panel=OPTIMISER)] = 0.9998,
    lr: Annotated[
        float,
        real_option(-1e30, 1e30, help="Learning rate before it decays, or at the top of the cycle.", panel=SCHEDULE),
    ] = 0.1,
    sched: Annotated[Literal["step", "multistep", "cosine", "onecycle"], option(panel=SCHEDULE)] = "multistep",
    warmup_epochs: Annotated[
        int, option(min=0, max=COUNT, help="Epochs over which the rate rises.", panel=SCHEDULE)
    ] = 0,
    decay_epochs: Annotated[
        int, option(min=1, max=COUNT, help="For step: epochs between decays.", panel=SCHEDULE)
    ] = 30,
    decay_milestones: Annotated[
        str | None,
        option(help="For multistep: epochs, such as 80,150. (default: 2/5 and 3/4 of all)", panel=SCHEDULE),
    ] = None,
    decay_rate: Annotated[float, real_option(help="For step and multistep: the factor.", panel=SCHEDULE)] = 0.1,
    min_lr: Annotated[
        float, real_option(0, help="The least rate: where cosine and onecycle end.", panel=SCHEDULE)
    ] = 0.0,
    warmup_lr: Annotated[float, real_option(0, help="Where the warm-up begins.", panel=SCHEDULE)] = 0.0,
    gate_lr_mult: Annotated[float, real_option(help="The gates' learning rate, as a multiple.", panel=GATES)] = 1.0,
    gate_wd: Annotated[
        float | None, real_option(help="The gates' weight decay. (default: as all)", panel=GATES)
    ] = None,
    gate_reg_weight: Annotated[
        float, real_option(0, help="Of the gates' clustering loss (§5.1: 0.01); 0 is off.", panel=GATES)
    ] = 0.0,
    gate_reg_prior: Annotated[
        bool,
        option(
            "--gate-reg-prior/--no-gate-reg-prior", help="Clusters as large as they were, or even ones.", panel=GATES
        ),
    ] = True,
    gate_reg_scope: Annotated[
        Literal["local", "router", "network"],
        option(help="A clustering per gating vector, per router, or per vector with even load overall.", panel=GATES),
    ] = "local",
    amp: Annotated[bool, option("--amp/--no-amp", help="Mixed precision.", panel=COMPUTE)] = False,
    amp_dtype: Annotated[Literal["bfloat16", "float16"], option(panel=COMPUTE)] = "bfloat16",
    channels_last: Annotated[bool, option("--channels-last/--no-channels-last", panel=COMPUTE)] = False,
    grad_checkpointing: Annotated[
        bool,
        option(
            "--grad-checkpointing/--no-grad-checkpointing",
            help="Keep fewer activations, and compute them again in the backward pass.",
            panel=COMPUTE,
        ),
    ] = False,
    compile: Annotated[bool, option("--compile/--no-compile", help="torch.compile.", panel=COMPUTE)] = False,
    compile_mode: Annotated[
        Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None,
        option(help="With --compile: the mode of torch.compile. (default: default)", panel=COMPUTE),
    ] = None,
    cuda_graphs: Annotated[
        bool,
        option(
            "--cuda-graphs/--no-cuda-graphs", help="On a GPU: record a step once and replay it whole.", panel=COMPUTE
        ),
    ] = False,
    sync_bn: Annotated[bool, option("--sync-bn/--no-sync-bn", help="On GPUs.", panel=COMPUTE)] = False,
    dist_bn: Annotated[
        Literal["reduce", "broadcast", ""],
        option(help="Batch norm's statistics between processes before validation.", panel=COMPUTE),
    ] = "reduce",
    device: Annotated[
        str | None, option(help="cpu, cuda, or such as cuda:1. (default: a GPU where there is one)", panel=COMPUTE)
    ] = None,
    seed: Annotated[int, option(min=0, max=SEED, help="Of weights, order and augmentation.", panel=COMPUTE)] = 42,
    deterministic: Annotated[
        bool, option("--deterministic/--no-deterministic", help="Deterministic algorithms alone.", panel=COMPUTE)
    ] = False,
    output: Annotated[Path, option(help="Folder of all runs.", panel=RUN)] = Path("runs"),
    experiment: Annotated[
        str | None, option(help="Folder of this run. (default: time, model, data)", panel=RUN)
    ] = None,
    overwrite: Annotated[
        bool, option("--overwrite", help="Take the folder of a finished run for this one.", panel=RUN)
    ] = False,
    resume: Annotated[
        str | None,
        option(help="Checkpoint to go on from; auto: the experiment's own, if there is one.", panel=RUN),
    ] = None,
    initial_checkpoint: Annotated[Path | None, option(help="Weights to start from.", panel=RUN)] = None,
    recovery_interval: Annotated[
        int | None, option(min=1, max=COUNT, help="Steps between checkpoints within an epoch.", panel=RUN)
    ] = None,
    log_interval: Annotated[int, option(min=1, max=COUNT, help="Steps between readings of the loss.", panel=RUN)] = 50,
    log: Annotated[
        str, option(help="What gets the figures: csv, tensorboard, wandb, mlflow, with commas between.", panel=RUN)
    ] = "tensorboard",
    eval_metric: Annotated[
        Literal["top1", "top5", "loss"], option(help="What best.ckpt is the best by.", panel=RUN)
    ] = "top1",
    checkpoint_hist: Annotated[
        int | None, option(min=1, max=COUNT, help="So many of the best epochs stay, too, as epoch12.ckpt.", panel=RUN)
    ] = None,
    patience: Annotated[
        int | None, option(min=1, max=COUNT, help="Stop after so many epochs without a better one.", panel=RUN)
    ] = None,
) -> None:
    """Train a network; write checkpoints, summary.csv, routers.csv, figures of loggers and args.yaml.

    Started by `torchrun`, all its processes train together.
    """
    with plain_errors():
        from fastroute import training
        from fastroute.training.distributed import check_gpus, is_main, process_group

        check_gpus()
        network.merge_arguments(context)
    options, console = SimpleNamespace(**context.params), standard_output(quiet=not is_main())
    with endings(console, "train"), process_group():
        with plain_errors():
            data, module, resume, folder = _prepare(context, options, console)
            if is_main():
                write_arguments(context, folder)
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
            dist_bn=options.dist_bn,
            deterministic=options.deterministic,
            resume=resume,
            recovery_interval=options.recovery_interval,
            log_interval=options.log_interval,
            logger=options.log,
            eval_metric=options.eval_metric,
            checkpoint_hist=options.checkpoint_hist,
            patience=options.patience,
            accelerator="gpu" if options.device.type == "cuda" else "cpu",
            devices=1 if options.device.index is None else [options.device.index],
            console=console,
        )
    routers = next(c for c in module.trainer.callbacks if isinstance(c, training.RouterDiagnostics)).statistics
    if gates := {name: router.mean_gates for name, router in routers.items()}:
        console.print(training.gates_table(gates, title="mean gates over the validation images"))
    console.print(f"last.ckpt, best.ckpt, summary.csv, args.yaml: {shown(folder.resolve())}", soft_wrap=True)


def _prepare(context: typer.Context, options: SimpleNamespace, console: Console) -> tuple:
    """The data module, the module to train, the checkpoint to go on from if there is one, and the folder of the run."""
    import pytorch_lightning as pl

    from fastroute import training
    from fastroute.training.checkpoints import check_not_finished, stopped_early
    from fastroute.training.classifier import check_compile_mode
    from fastroute.training.distributed import agreed, first_on_each_node, is_main
    from fastroute.training.loggers import check_loggers
    from fastroute.training.optim import check_warmup
    from fastroute.training.run_folder import new_folder, run_folder
    from fastroute.training.trainer import check_amp

    if options.sync_bn and not torch.cuda.is_available():
        raise ValueError("sync_bn is True; PyTorch's synchronised batch norm needs GPUs")
    check_compile_mode(options.compile, options.compile_mode)
    options.device = _device(options)
    check_amp(options.amp_dtype if options.amp else None, options.device.type)
    check_loggers(options.log.replace(" ", "").split(",") if options.log else [])
    options.dataset = dataset_named(options.dataset, options.data_dir, options.val_split > 0)
    context.params["dataset"] = options.dataset  # as args.yaml keeps it
    model = re.sub(r"[^\w.-]+", "-", options.model or "")
    folder, resume = agreed(place_of_run(options, f"{model}-{options.dataset}", console))
    unnamed = options.experiment is None and resume is None
    _drop(options, context.params)
    specification = network.specification(options, resume)
    network.write_flags(specification, context.params)
    options.model = specification.text
    if resume is not None and options.resume == "auto":
        done = training.epochs_done(resume)
        early = done < options.epochs and options.patience is not None and stopped_early(resume)
        if done >= options.epochs or early:
            why = f"stopped by its patience after epoch {done}" if early else f"all {options.epochs} epochs are done"
            console.print(f"{why}: {shown(resume)}", soft_wrap=True)
            raise typer.Exit(0)
    if unnamed:
        folder = agreed(new_folder(folder) if is_main() else None)
    context.with_resource(run_folder(folder))
    if resume is None and not options.overwrite:
        check_not_finished(folder, "--overwrite")

    data = training.ImageDataModule(
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
    if options.cuda_graphs:  # before the images are read
        _check_recording(options, data)
    if data.in_memory:
        check_images(options.dataset, options.img_size)
    one_by_one = first_on_each_node() if options.download else contextlib.nullcontext()
    with one_by_one, console.status("reading the images"):
        data.setup()
    console.print(shown(data.description), soft_wrap=True, highlight=False)
    if options.num_classes is not None and options.num_classes < data.num_classes:
        raise ValueError(f"num_classes is {options.num_classes}; the data has {data.num_classes} classes")
    count = data.train_count
    batch_size = min(options.batch_size, count)
    check_batch(specification, batch_size, data.in_chans, data.img_size, half=options.amp)
    check_warmup(options.sched, options.warmup_epochs, options.epochs)
    pl.seed_everything(options.seed, verbose=False)
    module = training.RoutingClassifier(
        _network(specification, options, data, resume, console),
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
        aux_weight=options.gate_reg_weight,
    )
    if options.cuda_graphs:
        _check_recording(options, data, module.model)
    if options.gate_reg_weight and not any(isinstance(layer, Router) for layer in module.model.modules()):
        raise ValueError(f"gate_reg_weight is {options.gate_reg_weight}, but {options.model} has no gates")
    if options.initial_checkpoint is not None:
        training.load_weights(module.model, options.initial_checkpoint)
    if resume is not None:
        training.check_resume(resume, module, options.epochs)
    return data, module, resume, folder


DROP = {"drop": "drop_rate", "drop_path": "drop_path_rate"}
"""What the networks call the rates of --drop and --drop-path."""


def _network(specification, options: SimpleNamespace, *others) -> nn.Module:
    try:
        return network.network(specification, options, *others)
    except ValueError as error:
        for option, name in DROP.items():
            if getattr(options, option) is not None and f"'{name}'" in str(error):
                raise ValueError(
                    f"{option} is {getattr(options, option)}; {specification} takes no {name}: leave the flag out, "
                    "or name a network that takes it, as many of timm's do"
                ) from error
        raise


def _drop(options: SimpleNamespace, params: dict[str, Any]) -> None:
    """Have --drop and --drop-path be arguments of the network, where a checkpoint and args.yaml keep them."""
    for option, name in DROP.items():
        if (rate := getattr(options, option)) is not None:
            options.model_kwargs = [*(options.model_kwargs or []), f"{name}={rate}"]
            params[option] = None


def _device(options: SimpleNamespace) -> torch.device:
    """Where to train. `torchrun` gives each process its GPU."""
    from fastroute.training.distributed import world_size

    device = device_named(options.device)
    if world_size() > 1 and options.device is not None and device != device_named(None):
        raise ValueError(
            f"device is {options.device!r}; torchrun gives each process its GPU: choose them by CUDA_VISIBLE_DEVICES, "
            "with nothing in it for the CPU"
        )
    return device


def _check_recording(options: SimpleNamespace, data, model: nn.Module | None = None) -> None:
    """Raise where `fit` would refuse to record steps."""
    from fastroute.training.distributed import world_size
    from fastroute.training.graphs import check_recording

    check_recording(
        device_type=options.device.type,
        processes=world_size(),
        grad_accum_steps=options.grad_accum_steps,
        amp_dtype=options.amp_dtype if options.amp else None,
        compile_mode=options.compile_mode,
        varying=data.varying,
        model=model,
    )


def _gate_clustering(options: SimpleNamespace) -> GateClusteringLoss | None:
    if not options.gate_reg_weight:
        return None
    momentum = 0.1 if options.gate_reg_prior else None
    return GateClusteringLoss(prior_momentum=momentum, scope=options.gate_reg_scope)


def _pair(name: str, value: str | None) -> tuple[float, float] | None:
    if value is None:
        return None
    pair = numbers(value, float, "numbers, such as 0.08,1")
    if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
        raise ValueError(f"{name} is {value}; it must be two numbers above 0, the smaller first")
    return pair[0], pair[1]
