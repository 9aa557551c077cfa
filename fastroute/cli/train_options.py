"""The options of `fastroute train`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from fastroute._defaults import CROP_PCT
from fastroute.cli.common import COUNT, PIXELS, SEED, WORKERS, config_option, real
from fastroute.cli.network import NetworkOptions


def option(*flags: str, help: str | None = None, panel: str | None = None, **settings):
    """Return an option of typer's in a panel of `--help`."""
    return typer.Option(*flags, help=help, rich_help_panel=panel, **settings)


def real_option(*bounds: float, **settings):
    """Return an option that is a finite number within bounds; see `real`."""
    return option(parser=real(*bounds), **settings)


DATA, OPTIMISER, SCHEDULE, GATES = "Data", "Optimiser", "Learning rate", "Gates"
AUGMENTATION, COMPUTE, RUN = "Augmentation", "Computation", "The run and its files"


@dataclass
class TrainOptions(NetworkOptions):
    """The options of `fastroute train`, by their names in args.yaml and --config."""

    config: Annotated[str | None, config_option("train")] = None
    dataset: Annotated[
        Literal["digits", "cifar10", "cifar100", "mnist", "stl10", "imagefolder", "webdataset"] | None,
        option(help="Source of the images. (default: that of --data-dir, or digits)", panel=DATA),
    ] = None
    data_dir: Annotated[
        Path | None,
        option(help="Folder of the data, a tar file, or a pattern of them. (default: data)", panel=DATA),
    ] = None
    val_split: Annotated[
        float,
        real_option(
            0, 0.999, help="Share of each class's training images to validate on; 0: the data's own val.", panel=DATA
        ),
    ] = 0.0
    class_map: Annotated[
        Path | None, option(help="Text file with a class on each line, in the order of their indices.", panel=DATA)
    ] = None
    input_key: Annotated[
        str | None,
        option(
            help="Extensions of the images in shards with several for a key, such as jpg;png or left.jpg.", panel=DATA
        ),
    ] = None
    in_chans: Annotated[
        int | None, option(min=1, max=3, help="1: grey images, 3: colour. (default: the data's)", panel=DATA)
    ] = None
    mean: Annotated[
        str | None, option(help="Mean of each channel, as 0.5 or 0.485,0.456,0.406. (default: the data's)", panel=DATA)
    ] = None
    std: Annotated[str | None, option(help="Standard deviation of each channel, as --mean.", panel=DATA)] = None
    interpolation: Annotated[
        Literal["bilinear", "bicubic", "nearest"], option(help="Interpolation of scaled images.", panel=DATA)
    ] = "bilinear"
    download: Annotated[bool, option("--download", help="Download torchvision's sets.", panel=DATA)] = False
    num_classes: Annotated[
        int | None, option(min=1, max=COUNT, help="Number of logits. (default: the data's classes)", panel=DATA)
    ] = None
    first_classes: Annotated[
        int | None,
        option(min=1, max=COUNT, help="Number of classes to use, from the first. (default: all)", panel=DATA),
    ] = None
    img_size: Annotated[
        int | None,
        option(min=1, max=PIXELS, help="Size of the images. (default: the data's own, 32 or 224)", panel=DATA),
    ] = None
    in_memory: Annotated[
        bool | None,
        option(
            "--in-memory/--stream",
            help="Hold an imagefolder decoded in memory, or decode it in workers. (default: in memory up to size 64)",
            panel=DATA,
        ),
    ] = None
    batch_size: Annotated[
        int, option("-b", "--batch-size", min=1, max=COUNT, help="Images in a batch of one process.", panel=DATA)
    ] = 128
    workers: Annotated[
        int | None,
        option(
            "-j",
            "--workers",
            min=0,
            max=WORKERS,
            help="Threads or processes that decode images; 0: the one that trains. (default: all cores)",
            panel=DATA,
        ),
    ] = None
    on_bad_image: Annotated[
        Literal["stop", "skip"], option(help="What to do about an image that cannot be read.", panel=DATA)
    ] = "stop"
    train_crop_mode: Annotated[
        Literal["rrc", "rkrc", "rkrr", "random"],
        option(
            help="Streamed: rrc, a random area, resized; rkrc, rkrr: timm's; random: resized to 1/crop-pct, cropped.",
            panel=AUGMENTATION,
        ),
    ] = "rrc"
    scale: Annotated[
        str | None,
        option(help="Range of the crop's share of the image. (default: 0.08,1; rkrc 0.8,1)", panel=AUGMENTATION),
    ] = None
    ratio: Annotated[
        str | None,
        option(help="Range of the crop's aspect ratio. (default: 0.75,1.3333; rkrc 0.9,1.1111)", panel=AUGMENTATION),
    ] = None
    crop_pct: Annotated[
        float, real_option(help="Streamed: side of the crop, as a share of the resized image's.", panel=AUGMENTATION)
    ] = CROP_PCT
    aa: Annotated[
        str | None,
        option(
            help="Automatic augmentation: imagenet, cifar10, svhn, trivial, augmix, or such as rand-m9-n2.",
            panel=AUGMENTATION,
        ),
    ] = None
    hflip: Annotated[
        float | None,
        real_option(
            0, 1, help="Probability of a horizontal flip. (default: 0.5, and 0 for digits)", panel=AUGMENTATION
        ),
    ] = None
    vflip: Annotated[float, real_option(0, 1, help="Probability of a vertical flip.", panel=AUGMENTATION)] = 0.0
    color_jitter: Annotated[
        float, real_option(0, 1, help="Strength of random brightness, contrast and saturation.", panel=AUGMENTATION)
    ] = 0.0
    no_aug: Annotated[
        bool, option("--no-aug", help="Disable all augmentation, whatever the other options say.", panel=AUGMENTATION)
    ] = False
    reprob: Annotated[float, real_option(help="Probability of random erasing.", panel=AUGMENTATION)] = 0.0
    mixup: Annotated[float, real_option(0, help="α of mixup; 0 is off.", panel=AUGMENTATION)] = 0.0
    cutmix: Annotated[float, real_option(0, help="α of CutMix; 0 is off.", panel=AUGMENTATION)] = 0.0
    drop: Annotated[
        float | None, real_option(0, 1, help="Dropout, if the network takes drop_rate.", panel=AUGMENTATION)
    ] = None
    drop_path: Annotated[
        float | None,
        real_option(0, 1, help="Stochastic depth, if the network takes drop_path_rate.", panel=AUGMENTATION),
    ] = None
    smoothing: Annotated[float, real_option(help="Label smoothing.", panel=AUGMENTATION)] = 0.0
    epochs: Annotated[int, option(min=1, max=COUNT, help="Epochs of the whole run.", panel=SCHEDULE)] = 200
    opt: Annotated[
        Literal["sgd", "nesterov", "rmsprop", "adam", "adamw"],
        option(help="Optimiser; sgd has plain momentum, nesterov Nesterov's.", panel=OPTIMISER),
    ] = "sgd"
    momentum: Annotated[
        float, real_option(help="Momentum of sgd, nesterov and rmsprop; onecycle sets its own.", panel=OPTIMISER)
    ] = 0.9
    weight_decay: Annotated[float, real_option(help="Weight decay.", panel=OPTIMISER)] = 5e-4
    norm_weight_decay: Annotated[
        float | None,
        real_option(help="Weight decay of normalisation layers. (default: --weight-decay)", panel=OPTIMISER),
    ] = None
    filter_bias_and_bn: Annotated[
        bool,
        option(
            "--filter-bias-and-bn/--no-filter-bias-and-bn",
            help="No weight decay of biases, normalisation layers and timm's no_weight_decay().",
            panel=OPTIMISER,
        ),
    ] = False
    layer_decay: Annotated[
        float | None,
        real_option(1e-6, 1, help="Layer-wise decay of the learning rate, as in timm.", panel=OPTIMISER),
    ] = None
    clip_grad: Annotated[float | None, real_option(1e-9, help="Clip the gradient to this norm.", panel=OPTIMISER)] = (
        None
    )
    grad_accum_steps: Annotated[
        int, option(min=1, max=COUNT, help="Batches of each optimiser step.", panel=OPTIMISER)
    ] = 1
    model_ema: Annotated[
        bool,
        option(
            "--model-ema/--no-model-ema", help="Keep and validate a moving average of the weights.", panel=OPTIMISER
        ),
    ] = False
    model_ema_decay: Annotated[
        float, real_option(0, 0.9999999, help="Decay of the moving average.", panel=OPTIMISER)
    ] = 0.9998
    lr: Annotated[
        float,
        real_option(-1e30, 1e30, help="Learning rate before it decays, or at the top of the cycle.", panel=SCHEDULE),
    ] = 0.1
    sched: Annotated[
        Literal["step", "multistep", "cosine", "onecycle"], option(help="Learning-rate schedule.", panel=SCHEDULE)
    ] = "multistep"
    warmup_epochs: Annotated[
        int, option(min=0, max=COUNT, help="Epochs over which the learning rate rises.", panel=SCHEDULE)
    ] = 0
    decay_epochs: Annotated[int, option(min=1, max=COUNT, help="For step: epochs between decays.", panel=SCHEDULE)] = 30
    decay_milestones: Annotated[
        str | None,
        option(help="For multistep: epochs, such as 80,150. (default: 2/5 and 3/4 of all)", panel=SCHEDULE),
    ] = None
    decay_rate: Annotated[float, real_option(help="For step and multistep: the factor of a decay.", panel=SCHEDULE)] = (
        0.1
    )
    min_lr: Annotated[
        float, real_option(0, help="Lowest learning rate, at which cosine and onecycle end.", panel=SCHEDULE)
    ] = 0.0
    warmup_lr: Annotated[float, real_option(0, help="Learning rate at the start of the warm-up.", panel=SCHEDULE)] = 0.0
    gate_lr_mult: Annotated[
        float, real_option(help="The gates' learning rate, as a multiple of --lr.", panel=GATES)
    ] = 1.0
    gate_wd: Annotated[
        float | None, real_option(help="The gates' weight decay. (default: --weight-decay)", panel=GATES)
    ] = None
    gate_reg_weight: Annotated[
        float,
        real_option(
            0,
            help="Weight of the gates' clustering loss for two paths (§5.1: 0.01), 2/n of it for up to n; 0 is off.",
            panel=GATES,
        ),
    ] = 0.0
    gate_reg_prior: Annotated[
        bool,
        option(
            "--gate-reg-prior/--no-gate-reg-prior",
            help="Use the cluster sizes found so far, or equal ones.",
            panel=GATES,
        ),
    ] = True
    gate_reg_scope: Annotated[
        Literal["local", "router", "network"],
        option(
            help="Cluster each gating vector; each router as a whole; or each vector, with paths loaded evenly.",
            panel=GATES,
        ),
    ] = "local"
    amp: Annotated[bool, option("--amp/--no-amp", help="Mixed precision.", panel=COMPUTE)] = False
    amp_dtype: Annotated[Literal["bfloat16", "float16"], option(help="With --amp: the type.", panel=COMPUTE)] = (
        "bfloat16"
    )
    channels_last: Annotated[
        bool | None,
        option(
            "--channels-last/--no-channels-last", help="Compute in channels_last. (default: on a CPU)", panel=COMPUTE
        ),
    ] = None
    grad_checkpointing: Annotated[
        bool,
        option(
            "--grad-checkpointing/--no-grad-checkpointing",
            help="Keep fewer activations, and recompute them in the backward pass.",
            panel=COMPUTE,
        ),
    ] = False
    compile: Annotated[
        bool, option("--compile/--no-compile", help="Compile the network by torch.compile.", panel=COMPUTE)
    ] = False
    compile_mode: Annotated[
        Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None,
        option(help="With --compile: the mode of torch.compile. (default: default)", panel=COMPUTE),
    ] = None
    cuda_graphs: Annotated[
        bool,
        option(
            "--cuda-graphs/--no-cuda-graphs", help="On a GPU: record a whole step once, and replay it.", panel=COMPUTE
        ),
    ] = False
    sync_bn: Annotated[
        bool,
        option("--sync-bn/--no-sync-bn", help="On GPUs: batch norm's statistics over all processes.", panel=COMPUTE),
    ] = False
    find_unused_parameters: Annotated[
        bool | None,
        option(
            "--find-unused-parameters/--no-find-unused-parameters",
            help="In several processes: allow parameters without a gradient, which costs a search in each step. "
            "(default: for networks with sparse routers or a loss of their own)",
            panel=COMPUTE,
        ),
    ] = None
    dist_bn: Annotated[
        Literal["reduce", "broadcast", ""],
        option(help="Synchronisation of batch norm's statistics across processes before validation.", panel=COMPUTE),
    ] = "reduce"
    device: Annotated[
        str | None,
        option(help="cpu, cuda, or one GPU, such as cuda:1. (default: a GPU if there is one)", panel=COMPUTE),
    ] = None
    seed: Annotated[int, option(min=0, max=SEED, help="Seed of weights, order and augmentation.", panel=COMPUTE)] = 42
    deterministic: Annotated[
        bool, option("--deterministic/--no-deterministic", help="Use deterministic algorithms only.", panel=COMPUTE)
    ] = False
    output: Annotated[Path, option(help="Folder of all runs.", panel=RUN)] = Path("runs")
    experiment: Annotated[str | None, option(help="Folder of this run. (default: time, model, data)", panel=RUN)] = None
    overwrite: Annotated[bool, option("--overwrite", help="Overwrite a run in the folder.", panel=RUN)] = False
    resume: Annotated[
        str | None,
        option(help="Checkpoint to resume from; auto: that of the experiment, if there is one.", panel=RUN),
    ] = None
    initial_checkpoint: Annotated[
        Path | None, option(help="Checkpoint or file of weights of the same network to start from.", panel=RUN)
    ] = None
    recovery_interval: Annotated[
        int | None, option(min=1, max=COUNT, help="Steps between checkpoints within an epoch.", panel=RUN)
    ] = None
    log_interval: Annotated[int, option(min=1, max=COUNT, help="Log the loss every so many steps.", panel=RUN)] = 50
    log: Annotated[
        str,  # torchrun, which has several options --log-…, does not pass on --log
        option("--log", "--loggers", help="Loggers, separated by commas: csv, tensorboard, wandb, mlflow.", panel=RUN),
    ] = "tensorboard"
    eval_metric: Annotated[Literal["top1", "top5", "loss"], option(help="Metric of best.ckpt.", panel=RUN)] = "top1"
    checkpoint_hist: Annotated[
        int | None, option(min=1, max=COUNT, help="Number of best epochs to keep as epoch12.ckpt.", panel=RUN)
    ] = None
    patience: Annotated[
        int | None, option(min=1, max=COUNT, help="Stop after this number of epochs without a better one.", panel=RUN)
    ] = None
