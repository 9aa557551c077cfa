"""`fastroute predict`: predict the classes of images."""

import csv
import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastroute._extras import extra
from fastroute._processors import processors
from fastroute.cli.common import COUNT, PIXELS, WORKERS, plain_errors, real
from fastroute.cli.errors import escaped, exit_with_error
from fastroute.cli.trained import OwnModelOption, check_finite

if TYPE_CHECKING:
    from fastroute.inference import Prediction, Predictor


def predict(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Checkpoint of `fastroute train` or `cluster`, or a .safetensors of `fastroute export`."),
    ],
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Images, folders of images, patterns, or - for a list.")
    ],
    top_k: Annotated[int, typer.Option(min=1, max=COUNT, help="Number of classes for each image.")] = 5,
    format: Annotated[
        Literal["table", "csv", "json"] | None,
        typer.Option(help="Format of the output. (default: by the suffix of --output; else table)"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write into instead of printing.")] = None,
    gates: Annotated[bool, typer.Option("--gates", help="Add the gates of each image.")] = False,
    model: OwnModelOption = None,
    use_ema: Annotated[
        bool, typer.Option("--use-ema/--no-use-ema", help="Use the moving average, if the run kept one.")
    ] = True,
    img_size: Annotated[
        int | None, typer.Option(min=1, max=PIXELS, help="Size of the crops. (default: as in training)")
    ] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(
            parser=real(), help="Side of the crop, as a share of the resized image's. (default: as in training)"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("-b", "--batch-size", min=1, max=COUNT)] = 64,
    workers: Annotated[
        int | None,
        typer.Option(
            "-j", "--workers", min=0, max=WORKERS, help="Threads that decode images; 0 is as 1. (default: all cores)"
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, or cuda. (default: a GPU if there is one)")] = None,
) -> None:
    """Predict the classes of images, or their clusters, with the probabilities.

    Folders are searched recursively; "-" reads paths from standard input, one a line. Images that cannot be read are
    reported and left out; the exit status is 1 if none can be read.
    """
    with plain_errors():
        from fastroute import inference
        from fastroute._files import check_writable, text_output

        swapped = next((name for name in paths if name.endswith((".ckpt", ".safetensors"))), None)
        if swapped is not None and checkpoint.suffix not in (".ckpt", ".safetensors"):
            raise ValueError(f"checkpoint is {checkpoint}, and {swapped} follows; name the checkpoint first")
        if format is None:
            suffix = "" if output is None else output.suffix.removeprefix(".").lower()
            if suffix not in ("", "txt", *_WRITERS):
                raise ValueError(f"output is {output}; it must end in .csv, .json or .txt, or give --format")
            format = suffix if suffix in _WRITERS else "table"
        if output is not None:
            check_writable(output, "output")
        elif sys.stdout is None:
            raise ValueError("output is None, and standard output is closed: name a file with --output")
        names = list(image_paths(paths))
        options = {"img_size": img_size, "crop_pct": crop_pct}
        predictor = inference.load(checkpoint, model=model, ema=use_ema, device=device, **options)
        if gates and not predictor.routed:
            raise ValueError("gates is True, but the network has no routers")
        predictor.transform.check()
        check_finite(predictor.model, checkpoint)
        rows, unread = _rows(
            predictor, names, top_k, gates, batch_size, processors() if workers is None else max(1, workers)
        )
    if rows:
        if output is None:  # a reader that closes the pipe early is no wrong argument
            _WRITERS[format](rows, sys.stdout)
        else:
            with plain_errors(), text_output(output) as file:
                _WRITERS[format](rows, file)
    said = Console(stderr=True)
    if unread:
        said.print(f"{unread:,} of {len(names):,} images cannot be read and are left out", highlight=False)
    if not rows:
        exit_with_error("none of the images can be read" if names else "the paths have no images", 1)


def image_paths(given: Iterable[str]) -> Iterator[str]:
    """Yield the images that the arguments name: files in the given order, those of folders and patterns sorted.

    Args:
        given: files, folders, shell patterns, or "-" for paths on standard input.

    Raises:
        FileNotFoundError: a pattern or a folder has no images.
    """
    with extra("train", "fastroute predict"):
        from torchvision.datasets.folder import IMG_EXTENSIONS

    def inside(folder: str) -> Iterator[str]:
        for root, folders, files in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."):
                    yield os.path.join(root, name)

    for word in given:
        if word == "-":
            lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)  # names may be no valid text
            yield from (line for line in lines if line)
        elif os.path.isdir(word):
            found = list(inside(word))
            if not found:
                raise FileNotFoundError(f"paths has {word}; there are no images in this folder")
            yield from found
        elif not os.path.lexists(word) and glob.has_magic(word):
            found = sorted(glob.glob(word, recursive=True))
            if not found:
                raise FileNotFoundError(f"paths has {word}; no file matches it")
            for name in found:
                yield from inside(name) if os.path.isdir(name) else [name]
        else:
            yield word


def _rows(
    predictor: "Predictor", names: list[str], top_k: int, gates: bool, batch_size: int, workers: int
) -> tuple[list[dict], int]:
    """Return the prediction of each image that can be read, and the number of those that cannot."""
    from fastroute.data.decode import UnreadableImage

    def read(name: str):
        try:
            return predictor.transform(name)
        except UnreadableImage as error:
            return error

    rows, unread, said = [], 0, Console(stderr=True)
    # In a file or pipe, rich's progress would leave an empty line.
    progress = Progress(console=said, transient=True, disable=not said.is_terminal)
    with ThreadPoolExecutor(workers) as threads, progress:
        task, waiting = progress.add_task("predicting", total=len(names)), iter(names)
        while batch := list(islice(waiting, batch_size)):
            inputs = list(threads.map(read, batch))
            for error in (value for value in inputs if isinstance(value, UnreadableImage)):
                said.print(f"left out: {escaped(error)}", soft_wrap=True, highlight=False)
            kept = [i for i, value in enumerate(inputs) if not isinstance(value, UnreadableImage)]
            unread += len(batch) - len(kept)
            found = predictor([inputs[i] for i in kept], gates=gates, batch_size=batch_size)
            rows += [_row(batch[i], prediction, top_k) for i, prediction in zip(kept, found, strict=True)]
            progress.advance(task, len(batch))
    return rows, unread


def _row(name: str, prediction: "Prediction", top_k: int) -> dict:
    row = {"path": name, "top": prediction.top(top_k)[0]}
    if prediction.gates is not None:
        # A sparse router, whose gates are (1, n), has one row of gates, as a router with one incoming path.
        row["gates"] = {router: gates.flatten(end_dim=-2).tolist() for router, gates in prediction.gates.items()}
    return row


def _write_table(rows: list[dict], file: IO[str]) -> None:
    k = len(rows[0]["top"])
    table = Table("image")
    for i in range(k):
        table.add_column("class" if i == 0 else f"{i + 1}.")
        table.add_column("p", justify="right")
    routers = rows[0].get("gates", {})
    for router in routers:
        table.add_column(escaped(router))
    for row in rows:
        cells = [text for name, p in row["top"] for text in (escaped(name), f"{p:.3f}")]
        gates = [_gate_rows(value) for value in row.get("gates", {}).values()]
        table.add_row(escaped(row["path"]), *cells, *gates)
    console = Console(file=file)
    if not console.is_terminal:  # do not cut the table in a file or pipe
        console.width = console.measure(table, options=console.options.update(width=100_000)).maximum
    console.print(table)


def _gate_rows(gates: list[list[float]]) -> str:
    return "\n".join(" ".join(f"{value:.2f}" for value in row) for row in gates)


def _write_csv(rows: list[dict], file: IO[str]) -> None:
    """Write a line for each image: path, class_1, probability_1, …, and `<router>_g<i><j>`, the gate from i to j.

    A router with ten paths or more has `<router>_g<i>_<j>`.
    """
    writer = csv.writer(file, lineterminator="\n")
    ranks = range(1, len(rows[0]["top"]) + 1)
    header = ["path", *(name for i in ranks for name in (f"class_{i}", f"probability_{i}"))]
    for router, gates in rows[0].get("gates", {}).items():
        between = "_" if max(len(gates), len(gates[0])) > 9 else ""
        header += [f"{router}_g{i}{between}{j}" for i, row in enumerate(gates, 1) for j, _ in enumerate(row, 1)]
    writer.writerow(header)
    for row in rows:
        gates = [value for gates in row.get("gates", {}).values() for line in gates for value in line]
        cells = [cell for name, p in row["top"] for cell in (name, f"{p:.6f}")]
        writer.writerow([row["path"], *cells, *(f"{value:.6f}" for value in gates)])


def _write_json(rows: list[dict], file: IO[str]) -> None:
    """Write a list with an object for each image: path, top (class and probability), and gates by router."""
    listed = [row | {"top": [{"class": name, "probability": p} for name, p in row["top"]]} for row in rows]
    json.dump(listed, file, indent=1)
    file.write("\n")


_WRITERS = {"table": _write_table, "csv": _write_csv, "json": _write_json}
