"""`fastroute report`: show a checkpoint on one page of figures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastroute.cli.common import (
    ARGUMENTS,
    COUNT,
    DataDirOption,
    DatasetOption,
    WorkersOption,
    plain_errors,
    read_options,
)
from fastroute.cli.errors import escaped, standard_output
from fastroute.cli.trained import OwnModelOption, check_finite, load_trained, load_trained_network

if TYPE_CHECKING:
    import torch
    from torch import nn


def report(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of `fastroute train` or `fastroute cluster`.")],
    more_images: Annotated[list[Path] | None, typer.Argument(metavar="[IMAGE]...", hidden=True)] = None,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    model: OwnModelOption = None,
    images: Annotated[
        list[Path] | None, typer.Option(help="Image files for the routing flow. (default: twelve of the data)")
    ] = None,
    before: Annotated[
        Path | None, typer.Option(help="A checkpoint to compare gates with, such as one without regularisation.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Classes of the histograms, such as cat,dog. (default: the most distinct)")
    ] = None,
    gates: Annotated[int, typer.Option(min=1, max=32, help="Most gates for which an image is synthesised.")] = 8,
    runs: Annotated[
        Path | None,
        typer.Option(help="A folder of runs, for accuracy by parameters, or for learning curves of clusterings."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, max=COUNT, help="Number of images of a clustering to use. (default: the run's)"),
    ] = None,
    batch_size: Annotated[int, typer.Option("-b", "--batch-size", min=1, max=COUNT)] = 128,
    workers: WorkersOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write into. (default: report, beside the checkpoint)")
    ] = None,
) -> None:
    """Show what a network's routers or clusters do: one page, and its figures as PNG and SVG.

    --images takes several files, separated by spaces.
    """
    with plain_errors():
        if more := [path for path in more_images or [] if path.suffix == ".ckpt"]:
            raise ValueError(
                f"checkpoint is {checkpoint}, and {more[0]} follows; a report takes one: run the command for each"
            )
        path = write_report(
            checkpoint,
            output or checkpoint.parent / "report",
            dataset=dataset,
            data_dir=data_dir,
            pictures=[*(images or []), *(more_images or [])],
            before=before,
            classes=classes.split(",") if classes else None,
            gates=gates,
            runs=runs,
            limit=limit,
            batch_size=batch_size,
            workers=workers,
            progress=_say,
            model=model,
        )
    standard_output().print(f"report: {escaped(path.resolve())}", soft_wrap=True)


def write_report(
    checkpoint: Path,
    folder: Path,
    *,
    dataset: str | None = None,
    data_dir: Path | None = None,
    pictures: Sequence[Path] = (),
    before: Path | None = None,
    classes: Sequence[str] | None = None,
    gates: int = 8,
    runs: Path | None = None,
    limit: int | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    progress: Callable[[str], None] = lambda title: None,
    model: str | None = None,
) -> Path:
    """Write the report of a checkpoint into a folder.

    Args:
        checkpoint: of `fastroute train` or `fastroute cluster`.
        folder: to write into; made if it is missing.
        dataset, data_dir, batch_size, workers, model: see `load_trained`.
        pictures: image files for the routing flow; without any, images of the data.
        before: a checkpoint to compare gates with.
        classes: for the histograms; None takes the most distinct.
        gates: the largest number of gates to maximise.
        runs: a folder of runs to compare with.
        limit: of a clustering, the number of images; None is the run's.
        progress: called with the title of each figure.

    Returns:
        the path of the page.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: an argument is wrong, or there is nothing to show of the checkpoint.
    """
    from fastroute.models.specification import specification_in
    from fastroute.training.checkpoints import is_of, read_checkpoint
    from fastroute.visualize import Images, Report, routing_report

    saved = read_checkpoint(checkpoint, "checkpoint")
    run = saved["hyper_parameters"]
    if is_of("cluster", saved):
        network_options = {"dataset": dataset, "images": pictures, "before": before, "classes": classes}
        network_options |= {"model": model, "workers": workers}
        for name, value in network_options.items():
            if value:
                raise ValueError(
                    f"{name} is given, but {checkpoint} is a clustering, which has no use for it: leave it out"
                )
        return _clustering(checkpoint, saved, folder, data_dir, runs, limit, batch_size, progress)
    if limit is not None:
        raise ValueError(f"limit is {limit}, but {checkpoint} is no clustering, whose images it limits: leave it out")
    given = load_trained(
        checkpoint, saved, dataset=dataset, data_dir=data_dir, batch_size=batch_size, workers=workers, model=model
    )
    check_finite(given.network, checkpoint)
    standard_output().print(escaped(given.images), soft_wrap=True, highlight=False)
    earlier = None if before is None else load_trained_network(before, "before", model=model)
    if earlier is not None:
        check_finite(earlier, before, "before")
    loader = given.loader
    images = Images(lambda: loader, loader.pixels, given.classes, loader.mean / 255, loader.std / 255)
    chosen = None
    if pictures:
        interpolation = saved.get("ImageDataModule", {}).get("interpolation", "bilinear")
        cut = _read(pictures, given.img_size, given.crop_pct, run["in_chans"], interpolation)
        chosen = cut, [path.name for path in pictures]
    facts = {
        "network": str(specification_in(run, "checkpoint") if run.get("specification") else run["model"]),
        "parameters": f"{sum(parameter.numel() for parameter in given.network.parameters()):,}",
        "checkpoint": _short(checkpoint),
        "images": f"{loader.count:,} of {given.data_dir.absolute().name if given.data_dir else given.dataset}, "
        f"{len(given.classes)} classes",
    }
    if before is not None:
        facts["before"] = _short(before)
    return routing_report(
        Report(folder, f"Routing of {run['model']}", facts, progress),
        given.network,
        images,
        chosen=chosen,
        before=earlier,
        classes=classes,
        gates=gates,
        summaries=_summaries(checkpoint),
        runs=None if runs is None else _sizes(runs),
    )


def _short(checkpoint: Path) -> str:
    """Return the folder and the name of a checkpoint."""
    return "/".join(checkpoint.absolute().parts[-2:])


def _say(title: str) -> None:
    standard_output().print(f"{title} …", style="dim", highlight=False, markup=False)


def _read(paths: Sequence[Path], img_size: int, crop_pct: float, channels: int, interpolation: str) -> "torch.Tensor":
    """Read images and crop them as in validation: (k, C, H, W), values from 0 to 1; grey if `channels` is 1."""
    import torch
    from torchvision.transforms.v2.functional import pil_to_tensor

    from fastroute.data.decode import decode_image
    from fastroute.data.transforms import eval_transform

    cut = eval_transform(img_size, crop_pct, interpolation=interpolation)
    decoded = [cut(decode_image(path, str(path), channels)) for path in paths]
    return torch.stack([pil_to_tensor(image) for image in decoded]).float() / 255


def _summaries(checkpoint: Path) -> dict[str, Path]:
    path = checkpoint.absolute().parent / "summary.csv"
    return {path.parent.name: path} if path.is_file() else {}


def _sizes(folder: Path) -> dict[str, tuple[int, float]]:
    """Return the parameters and the best accuracy, in percent, of each run in a folder, by the name of its folder."""
    import torch

    from fastroute.models.specification import specification_in
    from fastroute.training.checkpoints import read_checkpoint
    from fastroute.visualize.curves import read_summary

    sizes = {}
    for path in sorted(folder.glob("*/best.ckpt")):
        run = read_checkpoint(path, "runs")["hyper_parameters"]
        with torch.device("meta"):
            model = specification_in(run, f"runs is {path}").build()
        rows = read_summary(path.parent / "summary.csv")
        error = min((float(row["val_error"]) for row in rows if row.get("val_error")), default=None)
        if error is None:
            raise ValueError(f"runs is {folder}; {path.parent / 'summary.csv'} has no val_error")
        sizes[path.parent.name] = sum(parameter.numel() for parameter in model.parameters()), 100 - error
    if not sizes:
        raise FileNotFoundError(f"runs is {folder}; there are no folders with best.ckpt and summary.csv in it")
    return sizes


def _clustering(
    checkpoint: Path,
    saved: dict,
    folder: Path,
    data_dir: Path | None,
    runs: Path | None,
    limit: int | None,
    batch_size: int,
    progress: Callable[[str], None],
) -> Path:
    import torch

    from fastroute.clustering.build import ClusteringRun, build
    from fastroute.clustering.images import load_images
    from fastroute.clustering.run import Batches
    from fastroute.models.weights import load_state
    from fastroute.visualize import Images, Report, clustering_report
    from fastroute.visualize.curves import read_summary

    run = ClusteringRun.of(saved["hyper_parameters"])
    summaries = _summaries(checkpoint)
    if runs is not None:
        summaries = {}
        for path in sorted(runs.glob("*/summary.csv")):
            try:
                read_summary(path)
            except ValueError as error:  # such as of k-means without labels, which has no curve
                standard_output().print(escaped(f"left out: {error}"), soft_wrap=True, highlight=False)
            else:
                summaries[path.parent.name] = path
        if not summaries:
            raise FileNotFoundError(f"runs is {runs}; there are no folders with learning curves in summary.csv in it")
    kept = _run_images(checkpoint)
    if data_dir is not None and run.dataset == "digits":
        raise ValueError(f"data_dir is {data_dir}; the clustering is of scikit-learn's digits: leave it out")
    data_dir, limit = data_dir or kept["data_dir"], limit or kept["limit"]
    loaded = load_images(run.dataset, data_dir, limit, run.img_size, on_bad_image=kept["on_bad_image"])
    pixels, labels = loaded.images, loaded.labels
    where = f" in {data_dir}" if data_dir else ""
    standard_output().print(
        escaped(f"images: {len(labels):,} of {run.dataset}{where}"), soft_wrap=True, highlight=False
    )
    trained, untrained = (build(run, pixels.shape[1:]) for _ in range(2))
    load_state(trained, saved, f"checkpoint is {checkpoint}")
    check_finite(trained, checkpoint)
    images = Images(
        lambda: Batches(pixels, labels, batch_size),
        lambda indices: (pixels[indices].permute(0, 2, 3, 1) * 255).round().byte(),
        loaded.classes,
        torch.zeros(1),
        torch.ones(1),
    )
    facts = {
        "network": trained.NETWORK or run.architecture,
        "checkpoint": _short(checkpoint),
        "images": f"{len(labels):,} of {data_dir.absolute().name if data_dir else run.dataset}",
        "clusters": f"{run.clusters}, by {run.method}",
    }
    page = Report(folder, f"Clusters of {run.dataset}", facts, progress)
    earlier = _responses(untrained) if trained.UNTRAINED_CLUSTERS else None
    return clustering_report(page, _responses(trained), images, untrained=earlier, summaries=summaries)


def _run_images(checkpoint: Path) -> dict:
    """Return the images of a clustering by the args.yaml beside its checkpoint; the defaults without one."""
    kept, path = {"data_dir": None, "limit": None, "on_bad_image": "stop"}, checkpoint.parent / ARGUMENTS
    if not path.is_file():
        return kept
    kept |= {name: value for name, value in read_options(path).items() if name in kept and value is not None}
    if not isinstance(kept["limit"], int | None) or kept["on_bad_image"] not in ("stop", "skip"):
        raise ValueError(f"{path} is no file of options: its limit is {kept['limit']!r}; remove the file")
    return kept | {"data_dir": None if kept["data_dir"] is None else Path(str(kept["data_dir"]))}


def _responses(network: "nn.Module") -> "nn.Module":
    """Return a clustering network whose outputs are its responses, before the softmax."""
    from torch import nn

    class Responses(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images: "torch.Tensor") -> "torch.Tensor":
            return self.network.responses(images)

    return Responses()
