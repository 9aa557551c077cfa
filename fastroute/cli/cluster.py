"""`fastroute cluster`: images to clusters, without labels."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastroute.cli.common import (
    COUNT,
    PIXELS,
    SEED,
    OverwriteOption,
    config_option,
    endings,
    local_path,
    plain_errors,
    real,
    write_arguments,
)
from fastroute.cli.outside import shown, standard_output
from fastroute.cli.sizes import check_images

if TYPE_CHECKING:
    import torch

    from fastroute.clustering.module import ClusteringModule

ARCHITECTURE = {"digits": "mnist", "mnist": "mnist", "stl10": "stl10"}


def cluster(
    context: typer.Context,
    config: Annotated[str | None, config_option("cluster")] = None,
    dataset: Annotated[
        Literal["digits", "mnist", "cifar10", "cifar100", "stl10", "imagefolder"],
        typer.Option(help="Where the images come from."),
    ] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the data; of an imagefolder, with train/ and val/. (default: data)")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Download torchvision's sets.")] = False,
    img_size: Annotated[
        int | None, typer.Option(min=1, max=PIXELS, help="Scale images to it. (default: as they are)")
    ] = None,
    limit: Annotated[int | None, typer.Option(max=COUNT, help="Only so many images. (default: all)")] = None,
    method: Annotated[
        Literal["two-fold", "em", "consistency", "iic", "dec", "kmeans", "gmm", "spectral"],
        typer.Option(help="How to cluster. (dec: the first half of the epochs trains its autoencoder)"),
    ] = "two-fold",
    two_dimensional: Annotated[
        bool,
        typer.Option(
            "--two-dimensional", help="Instead: points in a plane, with and without normalised scores (§4.5.1)."
        ),
    ] = False,
    clusters: Annotated[
        int, typer.Option("-k", "--clusters", min=1, max=COUNT, help="How many; may exceed the classes.")
    ] = 10,
    heads: Annotated[
        int,
        typer.Option(
            min=1, max=1000, help="Clusterings at once, of which the one that augmentation changes least is kept."
        ),
    ] = 1,
    n_init: Annotated[
        int, typer.Option(min=1, max=1000, help="Networks at once, each from its own weights; one is kept as of heads.")
    ] = 1,
    architecture: Annotated[
        str | None, typer.Option(help="mnist, cifar or stl10 of Table 4.2, or its layers. (default: the data's)")
    ] = None,
    batch_norm: Annotated[bool, typer.Option("--batch-norm/--no-batch-norm", help="After convolutions.")] = True,
    statistics: Annotated[
        Literal["running", "batch"], typer.Option(help="What normalises relevance scores in training.")
    ] = "running",
    epochs: Annotated[int, typer.Option(min=1, max=COUNT)] = 250,
    batch_size: Annotated[int, typer.Option("-b", "--batch-size", min=2, max=COUNT)] = 128,
    lr_em: Annotated[float, typer.Option(parser=real(), help="Of the mixture-EM loss.")] = 5e-5,
    lr_consistency: Annotated[float, typer.Option(parser=real(), help="Of the consistency loss, and of iic.")] = 1e-4,
    gamma: Annotated[float, typer.Option(parser=real(), help="γ of Eq. 4.12.")] = 5.0,
    amp: Annotated[bool, typer.Option("--amp/--no-amp", help="bfloat16 mixed precision.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last/--no-channels-last")] = False,
    seed: Annotated[int, typer.Option(min=0, max=SEED)] = 42,
    output: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    experiment: Annotated[
        str | None,
        typer.Option(help="Folder of this run; two-dimensional is that of §4.5.1. (default: time, method, data)"),
    ] = None,
    overwrite: OverwriteOption = False,
    resume: Annotated[Path | None, typer.Option(help="Checkpoint to go on from.")] = None,
) -> None:
    """Cluster images without their labels; write summary.csv, and last.ckpt of a network."""
    options, console = SimpleNamespace(**context.params), standard_output()
    with plain_errors():
        from fastroute.clustering import run
        from fastroute.training.checkpoints import check_not_finished, read_resumable
        from fastroute.training.run_folder import new_folder, run_folder
        from fastroute.training.saved_fields import check_training_state

        for name in ("heads", "n_init"):
            if getattr(options, name) > 1 and method not in ("two-fold", "em", "consistency"):
                raise ValueError(f"{name} is {getattr(options, name)}; the method {method!r} has one")
        output = local_path(output, "output")
        if resume is not None:
            resume = local_path(resume, "resume")
        check_images(dataset, img_size)
        images, labels = run.load_images(dataset, data_dir, limit, img_size, download)
        if len(images) < clusters:
            raise ValueError(f"clusters is {clusters}; it must be at most the number of images, {len(images)}")
        if experiment:
            folder = local_path(output / experiment, "output")
        elif resume is not None:
            folder = resume.parent
        else:
            folder = new_folder(output / f"{time.strftime('%Y%m%d-%H%M%S')}-{method}-{dataset}")
        context.with_resource(run_folder(folder))
        if resume is None and not overwrite:
            check_not_finished(folder, "--overwrite")
        if two_dimensional or experiment == "two-dimensional":
            from fastroute.clustering import two_dimensional as plane

            plane.run(images, labels, clusters, seed, folder, console)
            return
        if method in run.CLASSICAL:
            run.fit_classical(method, images, labels, clusters, seed, folder, console)
            module = None
        else:
            module = _module(options, images)
            if resume is not None:
                check_training_state(read_resumable(resume, "cluster", module.hparams, epochs), module, resume)
    if module is not None:
        write_arguments(context, folder)
        with endings(console, "cluster"):
            run.fit(
                module,
                images,
                labels,
                epochs=epochs,
                batch_size=batch_size,
                output=folder,
                console=console,
                seed=seed,
                amp=amp,
                resume=resume,
            )
    console.print(f"summary.csv: {shown(folder.resolve())}", soft_wrap=True)


def _module(options: SimpleNamespace, images: "torch.Tensor") -> "ClusteringModule":
    """What is trained, by the arguments of the command; its hyperparameters are those that a run goes on with."""
    import pytorch_lightning as pl
    import torch

    from fastroute.clustering.augment import Augmentation
    from fastroute.clustering.dec import DEC
    from fastroute.clustering.iic import IIC
    from fastroute.clustering.networks import clustering_network
    from fastroute.clustering.two_fold import TwoFoldClustering

    pl.seed_everything(options.seed, verbose=False)
    clusters, method = options.clusters, options.method
    outputs = options.heads * clusters
    augmentation = Augmentation(flip=options.dataset not in ("digits", "mnist"))  # a mirrored digit is no digit
    architecture = options.architecture or ARCHITECTURE.get(options.dataset, "cifar")
    if method == "dec":
        module = DEC(images[0].numel(), clusters, pretrain_epochs=(options.epochs + 1) // 2, seed=options.seed)
    else:
        network = clustering_network(architecture, outputs, images.shape[-1], options.batch_norm, options.n_init)
        if options.channels_last:
            network = network.to(memory_format=torch.channels_last)
        if method == "iic":
            module = IIC(network, clusters, augmentation=augmentation, lr=options.lr_consistency)
        else:
            module = TwoFoldClustering(
                network,
                clusters,
                heads=options.heads * options.n_init,
                method=method,
                augmentation=augmentation,
                lr_em=options.lr_em,
                lr_consistency=options.lr_consistency,
                gamma=options.gamma,
                training_statistics=options.statistics,
            )
    kept = (
        "dataset",
        "img_size",
        "limit",
        "method",
        "clusters",
        "heads",
        "n_init",
        "batch_norm",
        "lr_em",
        "lr_consistency",
    )
    settings = {name: getattr(options, name) for name in kept}
    module.save_hyperparameters({"architecture": architecture, **settings}, logger=False)
    return module
