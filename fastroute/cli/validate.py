"""`fastroute validate`: measure the errors of checkpoints."""

import csv
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from fastroute._defaults import CROP_PCT
from fastroute._processors import processors
from fastroute.cli.common import (
    COUNT,
    PIXELS,
    DataDirOption,
    DatasetOption,
    WorkersOption,
    plain_errors,
    real,
    takes_options,
)
from fastroute.cli.errors import escaped, standard_output
from fastroute.cli.images import check_fit, choose_images
from fastroute.cli.network import usable_channels_last
from fastroute.cli.sizes import check_batch, check_images
from fastroute.cli.trained import check_channels, default_device


@dataclass
class ValidateOptions:
    """The options of `fastroute validate`."""

    checkpoint: Annotated[
        Path | None, typer.Argument(help="A checkpoint, a file of weights (with --model), or a folder of checkpoints.")
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            help="The network, as for train. (default: the checkpoint's; without a checkpoint, fresh weights) A "
            "network from module:function must be named again."
        ),
    ] = None
    dataset: DatasetOption = None
    data_dir: DataDirOption = None
    num_classes: Annotated[int | None, typer.Option(min=1, max=COUNT, help="Logits. (default: the checkpoint's)")] = (
        None
    )
    first_classes: Annotated[
        int | None, typer.Option(min=1, max=COUNT, help="Number of classes to use, from the first. (default: all)")
    ] = None
    img_size: Annotated[
        int | None, typer.Option(min=1, max=PIXELS, help="Size of the crops. (default: as in training)")
    ] = None
    crop_pct: Annotated[
        float | None,
        typer.Option(
            parser=real(),
            help=f"Side of the crop, as a share of the resized image's. (default: as in training, or {CROP_PCT})",
        ),
    ] = None
    ten_crop: Annotated[
        bool, typer.Option("--ten-crop", help="Crop the corners and the centre, and these five mirrored.")
    ] = False
    use_ema: Annotated[
        bool, typer.Option("--use-ema/--no-use-ema", help="Use the moving average, if the run kept one.")
    ] = True
    batch_size: Annotated[
        int, typer.Option("-b", "--batch-size", min=1, max=COUNT, help="Images in a batch of one process.")
    ] = 128
    workers: WorkersOption = None
    on_bad_image: Annotated[
        Literal["stop", "skip"] | None,
        typer.Option(help="What to do about an image that cannot be read. (default: as in training, or stop)"),
    ] = None
    amp: Annotated[bool, typer.Option("--amp/--no-amp", help="Mixed precision.")] = False
    amp_dtype: Annotated[Literal["bfloat16", "float16"], typer.Option(help="With --amp: the type.")] = "bfloat16"
    channels_last: Annotated[
        bool | None,
        typer.Option("--channels-last/--no-channels-last", help="Compute in channels_last. (default: on a CPU)"),
    ] = None
    gates: Annotated[bool, typer.Option("--gates", help="Count the skewed gates (Figure 5.1).")] = False
    results_file: Annotated[Path | None, typer.Option(help="File for the results, .csv or .json.")] = None


@takes_options(ValidateOptions)
def validate(context: typer.Context, options: ValidateOptions) -> None:
    """Measure single-crop or 10-crop errors of checkpoints.

    Started by `torchrun`, the processes share the images; each image is counted once.
    """
    checkpoint, results_file, results = options.checkpoint, options.results_file, []
    try:
        with plain_errors():
            from fastroute._files import check_writable
            from fastroute.training.distributed import is_main, process_group

            if checkpoint is None and options.model is None:
                raise ValueError("checkpoint is missing; name one, or a network with --model for fresh weights")
            if results_file is not None and results_file.suffix not in (".csv", ".json"):
                raise ValueError(f"results_file is {results_file}; it must end in .csv or .json")
            if results_file is not None:
                check_writable(results_file, "results_file")
            with process_group():
                console = standard_output(quiet=not is_main())
                for path in _checkpoints(checkpoint):
                    results.append(_result(path, options, console))
                    if is_main() and results_file is not None:  # now, as the next one may fail
                        _write(results_file, results)
    finally:
        if results:
            _print(results, options.gates, console)


def _print(results: list[dict], gates: bool, console: Console) -> None:
    table = Table("checkpoint", "network", "crops")
    for column in ("top-1 error %", "top-5 error %", "images", "skipped", "images/s"):
        table.add_column(column, justify="right")
    counts = Table("checkpoint", "network")
    for column in ("gates", "never above 1/n", "never below 1/n"):
        counts.add_column(column, justify="right")
    for r in results:
        numbers = (f"{r['error']:.2f}", f"{r['error5']:.2f}", f"{r['images']:,}", f"{r['skipped']:,}")
        name = escaped(Path(r["checkpoint"]).name) if r["checkpoint"] else "fresh weights"
        if gates:
            counts.add_row(name, escaped(r["model"]), *(str(r[key]) for key in ("gates", "never_above", "never_below")))
        table.add_row(name, escaped(r["model"]), str(r["crops"]), *numbers, f"{r['images_per_s']:,.0f}")
    console.print(table)
    if gates:
        console.print(counts)


def _checkpoints(path: Path | None) -> list[Path | None]:
    if path is None or not path.is_dir():
        return [path]
    found = sorted(file for file in path.glob("*.ckpt") if file.name != "previous.ckpt")
    if not found:
        raise FileNotFoundError(f"checkpoint is {path}; there is no .ckpt in this folder")
    return found


def _result(path: Path | None, options: ValidateOptions, console: Console) -> dict:
    import torch

    from fastroute.data.loaders import MemoryLoader
    from fastroute.data.module import STREAMED
    from fastroute.diagnostics.routing import skewed_gates
    from fastroute.inference.predictor import network_of
    from fastroute.models import create_model
    from fastroute.models._shapes import check_takes
    from fastroute.models.specification import Specification
    from fastroute.nn.routed import routers_in
    from fastroute.training.checkpoints import load_weights, read_checkpoint
    from fastroute.training.evaluation import evaluate, validation_loader

    run, data, conversion = {}, {}, None
    named = options.model if options.model and Specification.parse(options.model).source == "function" else None
    if path is not None and (options.model is None or (named and path.suffix == ".ckpt")):
        checkpoint = read_checkpoint(path, "checkpoint", "train")
        run, data = checkpoint["hyper_parameters"], checkpoint.get("ImageDataModule", {})
        conversion = checkpoint.get("conversion")
    device = default_device()
    images = choose_images(data, options.dataset, options.data_dir)
    dataset, data_dir = images.dataset, images.data_dir
    console.print(escaped(images.line), soft_wrap=True, highlight=False)
    img_size = options.img_size or data.get("img_size")
    if dataset not in STREAMED:
        check_images(dataset, img_size)
    with console.status("reading the images"):
        loader, classes, in_chans = validation_loader(
            dataset,
            data_dir,
            batch_size=options.batch_size,
            img_size=img_size,
            crop_pct=data.get("crop_pct", CROP_PCT) if options.crop_pct is None else options.crop_pct,
            ten_crop=options.ten_crop,
            num_workers=processors() if options.workers is None else options.workers,
            first_classes=options.first_classes or data.get("first_classes"),
            mean=data.get("mean"),
            std=data.get("std"),
            device=device,
            **images.options | ({} if options.on_bad_image is None else {"on_bad_image": options.on_bad_image}),
        )
    check_fit(data, images, classes, loader.count)
    if run:
        check_channels(data_dir, in_chans, run)
    model = options.model or run["model"]  # its name
    size = img_size or (loader.images.shape[1] if isinstance(loader, MemoryLoader) else 224)
    check_batch(model, min(options.batch_size, loader.count), in_chans, size, training=False, device=device)
    if run:
        sizes = {"num_classes": options.num_classes, "img_size": size}
        network = network_of(run, f"checkpoint is {path}", named, conversion, **sizes)
    else:
        network = create_model(model, options.num_classes or len(classes), in_chans, size)
    if options.gates and not routers_in(network):
        raise ValueError(f"gates is True, but {model} has no routers")
    if path is not None:
        load_weights(network, path, averaged=options.use_ema, name="checkpoint")
    check_takes(network, str(model), in_chans, size)
    channels_last = usable_channels_last(
        network,
        str(model),
        options.channels_last,
        device,
        in_chans,
        size,
        console,
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = network.to(device, memory_format=layout)
    routers = {} if options.gates else None
    start = time.perf_counter()
    amp_dtype = getattr(torch, options.amp_dtype) if options.amp else None
    with console.status(f"validating {escaped(path or model)}"):
        result = evaluate(network, loader, device=device, amp_dtype=amp_dtype, memory_format=layout, routers=routers)
    speed = result["images"] / (time.perf_counter() - start)
    crops = 10 if options.ten_crop else 1
    shown = getattr(network, "specification", None) or model  # with the number of paths that multipath made
    place = {"checkpoint": None if path is None else str(path), "model": str(shown), "crops": crops}
    return place | result | {"images_per_s": speed} | (skewed_gates(routers) if options.gates else {})


def _write(path: Path, results: list[dict]) -> None:
    from fastroute._files import text_output

    with text_output(path) as file:
        if path.suffix == ".json":  # which has no NaN, the loss of a network that has diverged
            listed = [
                result | {"loss": result["loss"] if math.isfinite(result["loss"]) else None} for result in results
            ]
            file.write(json.dumps(listed, indent=2) + "\n")
            return
        writer = csv.DictWriter(file, results[0])
        writer.writeheader()
        writer.writerows(results)
