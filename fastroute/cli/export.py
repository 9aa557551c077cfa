"""`fastroute export`: write the network of a checkpoint to a file for other programs."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from fastroute.cli.common import PIXELS, plain_errors
from fastroute.cli.errors import escaped
from fastroute.cli.trained import OwnModelOption


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Of `fastroute train`.")],
    to: Annotated[
        Literal["onnx", "torch-export", "safetensors"],
        typer.Option(help="ONNX, a program of torch.export.load, or the weights alone."),
    ],
    output: Annotated[Path | None, typer.Option(help="The file. (default: beside the checkpoint)")] = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Take any number of images at once, instead of one.")
    ] = False,
    model: OwnModelOption = None,
    use_ema: Annotated[
        bool, typer.Option("--use-ema/--no-use-ema", help="Use the moving average, if the run kept one.")
    ] = True,
    img_size: Annotated[
        int | None, typer.Option(min=1, max=PIXELS, help="Size of the images. (default: as in training)")
    ] = None,
) -> None:
    """Write a network into a file, with its classes and preprocessing, and check it against the network itself.

    The network maps normalised images to logits; the metadata of the file has the preprocessing as JSON.
    """
    with plain_errors():
        from fastroute import inference
        from fastroute._files import check_writable
        from fastroute.inference.export import SUFFIXES
        from fastroute.inference.export import export as write

        path = output or checkpoint.with_suffix(SUFFIXES[to])
        check_writable(path, "output")
        if path.exists() and checkpoint.exists() and path.samefile(checkpoint):
            raise ValueError(f"output is {path}; it is the checkpoint itself: choose another file")
        predictor = inference.load(checkpoint, model=model, ema=use_ema, img_size=img_size, device="cpu")
        console = Console()
        with console.status(f"exporting to {to}"):
            found = write(predictor, to, path, dynamic_batch=dynamic_batch)
    console.print(
        f"{escaped(path)}: {found['bytes'] / 1e6:,.1f} MB; its logits of {found['images']} random images differ from "
        f"eager PyTorch's by at most {found['difference']:.1e}",
        soft_wrap=True,
        highlight=False,
    )
