"""`fastroute cluster`: cluster images without their labels."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastroute._defaults import GAMMA, LR_CONSISTENCY, LR_EM
from fastroute._extras import extra
from fastroute._methods import METHODS, check_count, check_self_label, check_starts
from fastroute.cli.common import (
    ARGUMENTS,
    COUNT,
    PIXELS,
    SEED,
    OverwriteOption,
    config_option,
    handle_run_errors,
    plain_errors,
    read_options,
    real,
    resolve_dataset,
    run_location,
    say_changes,
    takes_options,
    write_arguments,
)
from fastroute.cli.errors import escaped, standard_output
from fastroute.cli.sizes import check_images
from fastroute.cli.trained import default_device

if TYPE_CHECKING:
    from fastroute.clustering.images import Loaded


@dataclass
class ClusterOptions:
    """The options of `fastroute cluster`, by their names in args.yaml and --config."""

    config: Annotated[str | None, config_option("cluster")] = None
    dataset: Annotated[
        Literal["digits", "mnist", "cifar10", "cifar100", "stl10", "imagefolder", "webdataset"] | None,
        typer.Option(help="Source of the images. (default: that of --data-dir, or digits)"),
    ] = None
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Any folder of images, with classes or without, or of tar shards. (default: data)"),
    ] = None
    on_bad_image: Annotated[
        Literal["stop", "skip"], typer.Option(help="What to do about an image that cannot be read.")
    ] = "stop"
    download: Annotated[bool, typer.Option("--download", help="Download torchvision's sets.")] = False
    img_size: Annotated[
        int | None,
        typer.Option(min=1, max=PIXELS, help="Scale images to this size. (default: 32 of files; else none)"),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            max=COUNT, help="Number of images to use: the first ones, or spread evenly over a folder. (default: all)"
        ),
    ] = None
    method: Annotated[
        Literal[tuple(METHODS)],
        typer.Option(help="Method of clustering; dec, idec and dcn train their autoencoder in half of the epochs."),
    ] = "two-fold"
    self_label: Annotated[
        int,
        typer.Option(
            min=0, max=COUNT, help="Number of last epochs, in which confident images teach their augmented copies."
        ),
    ] = 0
    two_dimensional: Annotated[
        bool,
        typer.Option(
            "--two-dimensional",
            help="Cluster points in a plane instead, with and without normalised scores (§4.5.1).",
        ),
    ] = False
    clusters: Annotated[
        int, typer.Option("-k", "--clusters", min=1, max=COUNT, help="Number of clusters; may exceed the classes.")
    ] = 10
    heads: Annotated[
        int,
        typer.Option(
            min=1, max=1000, help="Number of clusterings at once; the one that augmentation changes least is kept."
        ),
    ] = 1
    n_init: Annotated[
        int,
        typer.Option(
            min=1, max=1000, help="Number of networks at once, from different weights; one is kept, as for --heads."
        ),
    ] = 1
    architecture: Annotated[
        str | None,
        typer.Option(help="Network: mnist, cifar or stl10 of Table 4.2, or layers as in it. (default: the data's)"),
    ] = None
    batch_norm: Annotated[bool, typer.Option("--batch-norm/--no-batch-norm", help="Batch norm after convolutions.")] = (
        True
    )
    statistics: Annotated[
        Literal["running", "batch"],
        typer.Option(help="Statistics that normalise relevance scores in training, of two-fold, em and consistency."),
    ] = "running"
    epochs: Annotated[int, typer.Option(min=1, max=COUNT, help="Epochs of the whole run.")] = 250
    batch_size: Annotated[
        int | None,
        typer.Option("-b", "--batch-size", min=2, max=COUNT, help="Images in a batch. (default: 128, and 32 of vae)"),
    ] = None
    lr_em: Annotated[float, typer.Option(parser=real(), help="Learning rate of the mixture-EM loss.")] = LR_EM
    lr_consistency: Annotated[
        float, typer.Option(parser=real(), help="Learning rate of the consistency loss, and of iic.")
    ] = LR_CONSISTENCY
    gamma: Annotated[float, typer.Option(parser=real(), help="γ of Eq. 4.12, of two-fold and em.")] = GAMMA
    amp: Annotated[bool, typer.Option("--amp/--no-amp", help="bfloat16 mixed precision.")] = False
    channels_last: Annotated[
        bool, typer.Option("--channels-last/--no-channels-last", help="Compute in channels_last.")
    ] = False
    seed: Annotated[int, typer.Option(min=0, max=SEED, help="Seed of weights, order and augmentation.")] = 42
    output: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs")
    experiment: Annotated[
        str | None,
        typer.Option(
            help="Name of the run's folder; two-dimensional also sets that option. (default: time, method, data)"
        ),
    ] = None
    overwrite: OverwriteOption = False
    resume: Annotated[
        str | None, typer.Option(help="Checkpoint to resume from; auto: that of the experiment, if there is one.")
    ] = None
    by_cluster: Annotated[
        Path | None, typer.Option(help="New folder for links to the images, in a subfolder for each cluster.")
    ] = None


@takes_options(ClusterOptions)
def cluster(context: typer.Context, options: ClusterOptions) -> None:
    """Cluster images without their labels; write assignments.csv, summary.csv, args.yaml, and last.ckpt of a network.

    assignments.csv has the path of each image, its cluster, counted from 0, and its posterior of each cluster.
    """
    console = standard_output()
    with plain_errors():
        with extra("train", "fastroute cluster"):
            import pytorch_lightning as pl

        from fastroute.clustering import run
        from fastroute.clustering.assignments import check_by_cluster, link_by_cluster, write_assignments
        from fastroute.clustering.build import ClusteringRun, build
        from fastroute.clustering.images import load_images
        from fastroute.training.callbacks import FirstBatch
        from fastroute.training.checkpoints import check_unused, epochs_done
        from fastroute.training.run_folder import new_folder, run_folder

        clusters, epochs, method, seed = options.clusters, options.epochs, options.method, options.seed
        known = METHODS[method]
        check_starts(method, heads=options.heads, n_init=options.n_init)
        check_self_label(method, options.self_label)
        if options.self_label >= epochs:
            raise ValueError(
                f"self_label is {options.self_label}; it must be less than epochs, {epochs}: it is the number of the "
                "last epochs, after those of the method"
            )
        dataset = options.dataset = _dataset(options.dataset, options.data_dir)  # as args.yaml keeps it
        options.batch_size = options.batch_size or known.batch_size
        in_plane = options.two_dimensional or options.experiment == "two-dimensional"
        folder, resume = run_location(options, f"{method}-{dataset}", console)
        if known.builder is None and not in_plane and options.resume is not None:
            if resume is not None:
                raise ValueError(
                    f"resume is {options.resume}; the method {method!r} is done in one step, without a checkpoint to "
                    "resume: leave resume out, or give the method of the run"
                )
            if not options.overwrite and _is_done(folder, options):
                if options.by_cluster is not None:
                    raise ValueError("by_cluster is given, but the run is done: run it again with --overwrite")
                console.print(f"the run is done: {escaped(folder.resolve())}", soft_wrap=True)
                return
        check_images(dataset, options.img_size)
        with console.status("reading the images"):
            loaded = load_images(
                dataset, options.data_dir, options.limit, options.img_size, options.download, options.on_bad_image
            )
        images, labels = loaded.images, loaded.labels
        console.print(escaped(_description(dataset, options.data_dir, loaded)), soft_wrap=True, highlight=False)
        check_count(method, len(images))
        if options.by_cluster is not None:
            check_by_cluster(options.by_cluster, options.data_dir, loaded)
        if (labels < 0).any() and in_plane:
            raise ValueError("two_dimensional is True; it needs images with classes")
        if len(images) < 2:
            raise ValueError(f"there is {len(images)} image; a clustering needs at least 2: see data_dir and limit")
        if len(images) < clusters:
            raise ValueError(f"clusters is {clusters}; it must be at most the number of images, {len(images)}")
        if options.experiment is None and resume is None:
            folder = new_folder(folder)
        context.with_resource(run_folder(folder))
        if not options.overwrite:
            # Without assignments.csv, the summary is of this run, which has failed to write them.
            classical = known.builder is None and not in_plane
            unfinished = classical and options.resume == "auto" and (folder / "summary.csv").is_file()
            again = unfinished and _is_same(folder, options)
            check_unused(folder, "--overwrite", resume, finished=not again)
        if in_plane:
            from fastroute.clustering import two_dimensional as plane

            plane.run(images, labels, clusters, seed, folder, console)
            return
        finished = False  # if True, only assignments.csv may be missing
        if known.builder is None:
            posterior = run.fit_classical(method, images, labels, clusters, seed, folder, console)
            module = None
        else:
            pl.seed_everything(seed, verbose=False)
            module = build(
                ClusteringRun.of(vars(options)),
                images.shape[1:],
                epochs=epochs,
                gamma=options.gamma,
                statistics=options.statistics,
                channels_last=options.channels_last,
                seed=seed,
            )
            if options.architecture is not None and module.NETWORK is not None:
                said = f"architecture is not used: the method {method!r} has a network of its own, {module.NETWORK}"
                console.print(escaped(said), soft_wrap=True, highlight=False)
            if resume is not None:
                done = epochs_done(resume) if options.resume == "auto" else 0
                finished = done >= epochs
                if not finished:
                    say_changes(options, resume.parent, console)
                checkpoint = run.check_resume(resume, module, max(epochs, done + 1), images)
                if finished:
                    module.load_state_dict(checkpoint["state_dict"])
                    console.print(f"all {epochs} epochs are done: {escaped(resume)}", soft_wrap=True)
    if module is None:
        write_arguments(options, folder)
    else:
        with handle_run_errors(console, "cluster"):
            if not finished:
                run.fit(
                    module,
                    images,
                    labels,
                    epochs=epochs,
                    batch_size=options.batch_size,
                    output=folder,
                    console=console,
                    seed=seed,
                    amp=options.amp,
                    resume=resume,
                    callbacks=[FirstBatch(lambda: write_arguments(options, folder))],
                )
            posterior = run.posteriors(module.to(default_device()), images)  # fit leaves it on the CPU
    with plain_errors():
        write_assignments(folder / "assignments.csv", loaded.paths, posterior)
        if options.by_cluster is not None:
            link_by_cluster(options.by_cluster, loaded.paths, posterior)
            console.print(f"links by cluster: {escaped(options.by_cluster.resolve())}", soft_wrap=True)
    console.print(f"assignments.csv, summary.csv, args.yaml: {escaped(folder.resolve())}", soft_wrap=True)


def _is_done(folder: Path, options: ClusterOptions) -> bool:
    """Return whether a folder has the finished run of a method without a network.

    Raises:
        ValueError: it has a finished run with other options.
    """
    return (folder / "assignments.csv").is_file() and _is_same(folder, options)


def _is_same(folder: Path, options: ClusterOptions) -> bool:
    """Return whether a folder has a run with these options.

    Raises:
        ValueError: it has a run with other options.
    """
    if not (folder / ARGUMENTS).is_file():
        return False
    kept = read_options(folder / ARGUMENTS)
    if kept.get("data_dir") is not None:
        kept["data_dir"] = Path(str(kept["data_dir"])).resolve()
    given = vars(options) | {"data_dir": None if options.data_dir is None else options.data_dir.resolve()}
    for name in ("dataset", "data_dir", "method", "clusters", "seed", "limit", "img_size"):
        if name in kept and kept[name] != given[name]:
            raise ValueError(
                f"{name} is {given[name]}; the run in {folder} has {kept[name]}: choose "
                "another experiment, or overwrite that run with --overwrite"
            )
    return True


def _dataset(dataset: str | None, data_dir: Path | None) -> str:
    """Return the given dataset, or else that of the folder; a folder of images without classes is an imagefolder."""
    from fastroute.data.layout import layouts

    if dataset is None and data_dir is not None and not layouts(data_dir):
        return "imagefolder"
    return resolve_dataset(dataset, data_dir, any_split=True)


def _description(dataset: str, data_dir: Path | None, loaded: "Loaded") -> str:
    count, channels, size, _ = loaded.images.shape
    where = f" in {data_dir}" if data_dir is not None else ""
    classes = f"{len(loaded.classes):,} classes, not used" if loaded.classes else "no classes"
    images = f"{count:,} image{'s' * (count != 1)}"
    return f"{dataset}{where}: {images}, {size}×{size}, {'grey' if channels == 1 else 'colour'}, {classes}"
