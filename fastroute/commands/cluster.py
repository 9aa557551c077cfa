"""`fastroute cluster`: images to clusters, without labels."""

import time
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from fastroute.commands.common import plain_errors


def cluster(
    dataset: Annotated[Literal["digits", "mnist"], typer.Option(help="Where the images come from.")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="For mnist: the folder that holds MNIST/raw.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many images. (default: all)")] = None,
    method: Annotated[
        Literal["two-fold", "em", "consistency", "kmeans", "gmm", "spectral"], typer.Option(help="How to cluster.")
    ] = "two-fold",
    clusters: Annotated[int, typer.Option("-k", "--clusters", min=1, help="How many clusters.")] = 10,
    architecture: Annotated[str, typer.Option(help="mnist, cifar or stl10 of Table 4.2, or its layers.")] = "mnist",
    batch_norm: Annotated[bool, typer.Option("--batch-norm/--no-batch-norm", help="After convolutions.")] = True,
    statistics: Annotated[
        Literal["running", "batch"], typer.Option(help="What normalises relevance scores in training.")
    ] = "running",
    epochs: Annotated[int, typer.Option(min=1)] = 250,
    batch_size: Annotated[int, typer.Option("-b", "--batch-size", min=2)] = 128,
    lr_em: Annotated[float, typer.Option(help="Of the mixture-EM loss.")] = 5e-5,
    lr_consistency: Annotated[float, typer.Option(help="Of the consistency loss.")] = 1e-4,
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
        from fastroute.clustering.networks import clustering_network
        from fastroute.clustering.two_fold import TwoFoldClustering

        images, labels = run.load_images(dataset, data_dir, limit)
        folder = (
            resume.parent
            if resume and not experiment
            else output / (experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{method}-{dataset}")
        )
        if method in run.CLASSICAL:
            run.fit_classical(method, images, labels, clusters, seed, folder, console)
        else:
            pl.seed_everything(seed, verbose=False)
            network = clustering_network(architecture, clusters, images.shape[-1], batch_norm)
            if channels_last:
                network = network.to(memory_format=torch.channels_last)
            module = TwoFoldClustering(
                network,
                clusters,
                method=method,
                lr_em=lr_em,
                lr_consistency=lr_consistency,
                gamma=gamma,
                training_statistics=statistics,
            )
            network_of = {"architecture": architecture, "clusters": clusters, "batch_norm": batch_norm}
            module.save_hyperparameters({"dataset": dataset, **network_of}, logger=False)
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
