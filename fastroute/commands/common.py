"""What commands share: errors in one sentence, and files of defaults."""

import contextlib
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
import yaml
from rich.console import Console
from rich.markup import escape

# What images a trained network is given: options of the commands that take a checkpoint.
DatasetOption = Annotated[
    Literal["digits", "cifar10", "cifar100", "mnist", "stl10", "imagefolder", "webdataset"] | None,
    typer.Option(help="Where the images come from. (default: as in training)"),
]
DataDirOption = Annotated[
    Path | None, typer.Option(help="Folder with val/, folder of classes, folder of tar shards, or a tar file.")
]
WorkersOption = Annotated[
    int | None, typer.Option("-j", "--workers", min=1, help="Processes that decode images. (default: all cores)")
]


@contextlib.contextmanager
def plain_errors(*also: type[BaseException]) -> Iterator[None]:
    """End the command with one sentence where an argument is wrong; errors of the training itself keep their trace.

    Args:
        also: errors that are sentences too, besides those of wrong arguments and missing files.
    """
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError, *also) as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


@contextlib.contextmanager
def endings(console: Console) -> Iterator[None]:
    """How a run can end before its time, each in one sentence, with a status that is not 0; a bug keeps its trace."""
    from fastroute.training import Terminated
    from fastroute.training.distributed import ProcessLost
    from fastroute.training.graphs import NotRecordable
    from fastroute.training.loaders import PlaceMismatch
    from fastroute.training.sources import UnreadableImage

    try:
        yield
    except Terminated as terminated:
        console.print(f"{terminated}; --resume goes on from it", soft_wrap=True, highlight=False)
        raise typer.Exit(terminated.code) from None
    except (FloatingPointError, OSError, UnreadableImage, PlaceMismatch, ProcessLost, NotRecordable) as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def device_named(name: str | None) -> torch.device:
    """The device of a `--device` option; by default the GPU where there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; it must be cpu, cuda, or such as cuda:1")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            there = f"has {count} GPUs" if count else "has no GPU that PyTorch can use"
            raise ValueError(f"device is {name!r}; this machine {there}")
    return device


def read_options(path: Path) -> dict:
    """The `name: value` pairs of a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML file of such pairs.
    """
    if not path.is_file():
        raise FileNotFoundError(f"config is {path}; there is no such file")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config is {path}; it is no YAML file: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config is {path}; it must hold one `name: value` for each option")
    return values


def config_option(command: str):
    """The `--config` option of a command: a YAML file, or a packaged recipe of the command by its name.

    What it holds become defaults, which the command line overrides.
    """

    def callback(context: typer.Context, config: str | None) -> str | None:
        if config is None:
            return None
        with plain_errors():
            values = {str(name).replace("-", "_"): value for name, value in _recipe_or_file(config, command).items()}
            options = {option.name: option for option in context.command.params if option.name != "config"}
            for name in values.keys() - options:
                near = "".join(f"; did you mean {option!r}?" for option in get_close_matches(name, options, n=1))
                raise ValueError(f"config is {config}; there is no option {name!r}{near}")
            for name, value in values.items():
                if isinstance(value, bool) and not options[name].is_flag:
                    raise ValueError(f"config is {config}; {name} is {value}, and it must be no yes or no")
        context.default_map = {n: str(v) if isinstance(v, list) else v for n, v in values.items() if v is not None}
        return config

    return typer.Option(
        "-c",
        "--config",
        is_eager=True,
        callback=callback,
        help="YAML file of defaults for all this, or the name of a recipe; `fastroute recipes` lists them.",
    )


def _recipe_or_file(config: str, command: str) -> dict:
    from fastroute.training.recipes import recipe

    path = Path(config)
    is_file = path.suffix in (".yaml", ".yml") or path.exists()
    return read_options(path) if is_file else recipe(config, command).options


def numbers(value: str | None, kind: type = int, what: str = "epochs, such as 80,150") -> list | None:
    """A list of numbers from text such as "80,150", "80 150" or "[80, 150]"."""
    if value is None:
        return None
    items = [item for item in re.split(r"[\s,\[\]]+", value) if item]
    try:
        parsed = [kind(item) for item in items]
    except ValueError:
        parsed = []
    if not parsed or min(parsed) < 0:
        raise typer.BadParameter(f"{value!r} is not a list of {what}")
    return parsed
