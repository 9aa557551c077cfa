"""`fastroute cluster`: images to clusters, without labels."""

import time
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from fastroute.commands.common import config_option, plain_errors

ARCHITECTURE = {"digits": "mnist", "mnist": "mnist", "stl10": "stl10"}


def cluster(
    config: Annotated[str | None, config_option("cluster")] = None,
    dataset: Annotated[
        Literal["digits", "mnist", "cifar10", "cifar100", "stl10", "imagefolder"],
        typer.Option(help="Where the images come from."),
    ] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the data; of an imagefolder, with train/ and val/. (default: data)")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Download torchvision's sets.")] = False,
    img_size: Annotated[int | None, typer.Option(min=1, help="Scale images to it. (default: as they are)")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many images. (default: all)")] = None,
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
    clusters: Annotated[int, typer.Option("-k", "--clusters", min=1, help="How many; may exceed the classes.")] = 10,
    heads: Annotated[
        int, typer.Option(min=1, help="Clusterings at once, of which the lowest mixture-EM loss chooses one.")
    ] = 1,
    n_init: Annotated[
        int, typer.Option(min=1, help="Networks at once, each from its own weights; the same loss chooses.")
    ] = 1,
    architecture: Annotated[
        str | None, typer.Option(help="mnist, cifar or stl10 of Table 4.2, or its layers. (default: the data's)")
    ] = None,
    batch_norm: Annotated[bool, typer.Option("--batch-norm/--no-batch-norm", help="After convolutions.")] = True,
    statistics: Annotated[
        Literal["running", "batch"], typer.Option(help="What normalises relevance scores in training.")
    ] = "running",
    epochs: Annotated[int, typer.Option(min=1)] = 250,
    batch_size: Annotated[int, typer.Option("-b", "--batch-size", min=2)] = 128,
    lr_em: Annotated[float, typer.Option(help="Of the mixture-EM loss.")] = 5e-5,
    lr_consistency: Annotated[float, typer.Option(help="Of the consistency loss, and of iic.")] = 1e-4,
    gamma: Annotated[float, typer.Option(help="γ of Eq. 4.12.")] = 5.0,
    amp: Annotated[bool, typer.Option("--amp/--no-amp", help="bfloat16 mixed precision.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last/--no-channels-last")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 42,
    output: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    experiment: Annotated[str | None, typer.Option(help="Folder of this run. (default: time, method, data)")] = None,
    resume: Annotated[Path | None, typer.Option(help="Checkpoint to go on from.")] = None,
) -> None:
    """Cluster images without their labels; write summary.csv, and last.ckpt of a network."""
    console = Console()
    with plain_errors():
        import pytorch_lightning as pl
        import torch

        from fastroute.clustering import run
        from fastroute.clustering.augment import Augmentation
        from fastroute.clustering.dec import DEC
        from fastroute.clustering.iic import IIC
        from fastroute.clustering.networks import clustering_network
        from fastroute.clustering.two_fold import TwoFoldClustering

        for name, count in (("heads", heads), ("n_init", n_init)):
            if count > 1 and method not in ("two-fold", "em", "consistency"):
                raise ValueError(f"{name} is {count}; the method {method!r} has one")
        images, labels = run.load_images(dataset, data_dir, limit, img_size, download)
        folder = (
            resume.parent
            if resume and not experiment
            else output / (experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{method}-{dataset}")
        )
        if two_dimensional:
            from fastroute.clustering import two_dimensional as plane

            plane.run(images, labels, clusters, seed, folder, console)
            return
        if method in run.CLASSICAL:
            run.fit_classical(method, images, labels, clusters, seed, folder, console)
        else:
            pl.seed_everything(seed, verbose=False)
            augmentation = Augmentation(flip=dataset not in ("digits", "mnist"))  # a mirrored digit is no digit
            layers = architecture or ARCHITECTURE.get(dataset, "cifar")
            if method == "dec":
                module = DEC(images[0].numel(), clusters, pretrain_epochs=(epochs + 1) // 2, seed=seed)
            else:
                network = clustering_network(layers, heads * clusters, images.shape[-1], batch_norm, n_init)
                if channels_last:
                    network = network.to(memory_format=torch.channels_last)
                if method == "iic":
                    module = IIC(network, clusters, augmentation=augmentation, lr=lr_consistency)
                else:
                    module = TwoFoldClustering(
                        network,
                        clusters,
                        heads=heads * n_init,
                        method=method,
                        augmentation=augmentation,
                        lr_em=lr_em,
                        lr_consistency=lr_consistency,
                        gamma=gamma,
                        training_statistics=statistics,
                    )
            data = {"dataset": dataset, "img_size": img_size, "method": method}
            shape = {"architecture": layers, "clusters": clusters, "heads": heads, "batch_norm": batch_norm}
            module.save_hyperparameters(data | shape | {"n_init": n_init}, logger=False)  # what `fastroute report` makes it from
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric")
                run.fit(
                    module,
                    images,
                    labels,
                    epochs=epochs,
                    batch_size=batch_size,
                    output=folder,
                    console=console,
                    amp=amp,
                    resume=resume,
                )
    console.print(f"summary.csv: {folder.resolve()}", soft_wrap=True)
