"""`fastroute cluster`: images to clusters, without labels."""

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
    dataset_named,
    endings,
    place_of_run,
    plain_errors,
    real,
    write_arguments,
)
from fastroute.cli.outside import shown, standard_output
from fastroute.cli.sizes import check_images

if TYPE_CHECKING:
    import torch

    from fastroute.clustering.module import ClusteringModule
    from fastroute.clustering.run import Loaded

ARCHITECTURE = {"digits": "mnist", "mnist": "mnist", "stl10": "stl10"}


def cluster(
    context: typer.Context,
    config: Annotated[str | None, config_option("cluster")] = None,
    dataset: Annotated[
        Literal["digits", "mnist", "cifar10", "cifar100", "stl10", "imagefolder", "webdataset"] | None,
        typer.Option(help="Where the images come from. (default: what --data-dir holds, or digits)"),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Any folder of images, with classes or without, or of tar shards. (default: data)"),
    ] = None,
    on_bad_image: Annotated[
        Literal["stop", "skip"], typer.Option(help="What an image that cannot be read does.")
    ] = "stop",
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
    resume: Annotated[
        str | None, typer.Option(help="Checkpoint to go on from; auto: the experiment's own, if there is one.")
    ] = None,
    by_cluster: Annotated[
        Path | None, typer.Option(help="New folder for links to the images, in a folder for each cluster.")
    ] = None,
) -> None:
    """Cluster images without their labels; write assignments.csv, summary.csv, args.yaml, and last.ckpt of a network.

    assignments.csv has each image's path, its cluster, counted from 0, and its posterior of each cluster.
    """
    options, console = SimpleNamespace(**context.params), standard_output()
    with plain_errors():
        from fastroute.clustering import run
        from fastroute.training.checkpoints import check_not_finished, epochs_done
        from fastroute.training.run_folder import new_folder, run_folder

        for name in ("heads", "n_init"):
            if getattr(options, name) > 1 and method not in ("two-fold", "em", "consistency"):
                raise ValueError(f"{name} is {getattr(options, name)}; the method {method!r} has one")
        dataset = options.dataset = _dataset(dataset, data_dir)
        context.params["dataset"] = dataset  # as args.yaml keeps it
        folder, resume = place_of_run(options, f"{method}-{dataset}", console)
        check_images(dataset, img_size)
        with console.status("reading the images"):
            loaded = run.load_images(dataset, data_dir, limit, img_size, download, on_bad_image)
        images, labels = loaded.images, loaded.labels
        console.print(shown(_description(dataset, data_dir, loaded)), soft_wrap=True, highlight=False)
        if by_cluster is not None:
            run.check_by_cluster(by_cluster, data_dir, loaded)
        if (labels < 0).any() and (two_dimensional or experiment == "two-dimensional"):
            raise ValueError("two_dimensional is True; it needs images with classes")
        if len(images) < clusters:
            raise ValueError(f"clusters is {clusters}; it must be at most the number of images, {len(images)}")
        if experiment is None and resume is None:
            folder = new_folder(folder)
        context.with_resource(run_folder(folder))
        if resume is None and not overwrite:
            check_not_finished(folder, "--overwrite")
        if two_dimensional or experiment == "two-dimensional":
            from fastroute.clustering import two_dimensional as plane

            plane.run(images, labels, clusters, seed, folder, console)
            return
        finished = False  # where only assignments.csv may be missing
        if method in run.CLASSICAL:
            posterior = run.fit_classical(method, images, labels, clusters, seed, folder, console)
            module = None
        else:
            module = _module(options, images)
            if resume is not None:
                done = epochs_done(resume) if options.resume == "auto" else 0
                finished = done >= epochs
                checkpoint = run.check_resume(resume, module, max(epochs, done + 1))
                if finished:
                    module.load_state_dict(checkpoint["state_dict"])
                    console.print(f"all {epochs} epochs are done: {shown(resume)}", soft_wrap=True)
    write_arguments(context, folder)
    if module is not None:
        with endings(console, "cluster"):
            if not finished:
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
            posterior = run.posteriors(module, images)
    with plain_errors():
        run.write_assignments(folder / "assignments.csv", loaded.paths, posterior)
        if by_cluster is not None:
            run.link_by_cluster(by_cluster, loaded.paths, posterior)
            console.print(f"links by cluster: {shown(by_cluster.resolve())}", soft_wrap=True)
    console.print(f"assignments.csv, summary.csv, args.yaml: {shown(folder.resolve())}", soft_wrap=True)


def _dataset(dataset: str | None, data_dir: Path | None) -> str:
    """The dataset that is named, or else what the folder holds, where images without classes are an imagefolder."""
    from fastroute.data.layout import layouts

    if dataset is None and data_dir is not None and not layouts(data_dir):
        return "imagefolder"
    return dataset_named(dataset, data_dir, any_split=True)


def _description(dataset: str, data_dir: Path | None, loaded: "Loaded") -> str:
    count, channels, size, _ = loaded.images.shape
    where = f" in {data_dir}" if data_dir is not None else ""
    classes = f"{len(loaded.classes):,} classes, which are not used" if loaded.classes else "no classes"
    return f"{dataset}{where}: {count:,} images, {size}×{size}, {'grey' if channels == 1 else 'colour'}, {classes}"


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
