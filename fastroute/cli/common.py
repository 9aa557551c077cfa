"""What commands share: errors in one sentence, and files of defaults."""

import contextlib
import inspect
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from difflib import get_close_matches
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import torch
import typer
import yaml
from rich.console import Console

from fastroute import _yaml
from fastroute._files import replacing
from fastroute.cli.outside import end, shown

COUNT, PIXELS, WORKERS, SEED = 2**31 - 1, 2**20, 1024, 2**32 - 1
"""The largest whole numbers that options take: counts, sizes of images, processes, seeds."""

ARGUMENTS = "args.yaml"
"""Where a run's folder has the options that it was started with."""

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Take the folder of a finished run.")]

# What images a trained network is given: options of the commands that take a checkpoint.
DatasetOption = Annotated[
    Literal["digits", "cifar10", "cifar100", "mnist", "stl10", "imagefolder", "webdataset"] | None,
    typer.Option(help="Where the images come from. (default: as in training)"),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(help="Folder with val/, of classes or of tar shards, a tar file, or a pattern. (default: the run's)"),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("-j", "--workers", min=1, max=WORKERS, help="Processes that decode images. (default: all cores)"),
]


Options = TypeVar("Options")


class RunOptions(Protocol):
    """Options of a command that names a run."""

    output: Path
    experiment: str | None
    resume: str | None


def takes_options(cls: type[Options]) -> Callable[[Callable[[typer.Context, Options], None]], Callable[..., None]]:
    """Give a command the fields of a dataclass as its options: their types, help and defaults are written there alone.

    Args:
        cls: the dataclass. Each field is annotated as a parameter of a typer command is.

    Returns:
        a decorator of functions of the context and an instance of `cls`.
    """
    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    parameters += [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(cls)
    ]

    def decorate(command: Callable[[typer.Context, Options], None]) -> Callable[..., None]:
        @wraps(command)
        def wrapper(context: typer.Context, **values: Any) -> None:
            command(context, cls(**values))

        wrapper.__signature__ = inspect.Signature(parameters)  # which typer reads
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapper

    return decorate


def dataset_named(dataset: str | None, data_dir: Path | None, any_split: bool = False) -> str:
    """The dataset that is named, or else what the folder holds, or the digits where there is no folder.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no images in a layout that is read.
        ValueError: it holds several datasets, or no images to validate on, unless with `any_split`.
    """
    if dataset is not None or data_dir is None:
        return dataset or "digits"
    from fastroute.data.layout import choose

    return choose(data_dir, any_split=any_split).dataset


@contextlib.contextmanager
def plain_errors(*also: type[BaseException]) -> Iterator[None]:
    """End the command with one sentence where an argument is wrong; errors of the training itself keep their trace.

    Args:
        also: errors that are sentences too, besides those of wrong arguments and missing files.
    """
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError, *also) as error:
        end(error, 2)


@contextlib.contextmanager
def endings(console: Console, command: str) -> Iterator[None]:
    """How a run can end before its time, each in one sentence, with a status that is not 0; a bug keeps its trace.

    Args:
        console: where the end is told.
        command: "train" or "cluster".
    """
    from fastroute.data.decode import UnreadableImage
    from fastroute.data.loaders import PlaceMismatch
    from fastroute.training import Terminated
    from fastroute.training.distributed import ProcessLost
    from fastroute.training.graphs import NotRecordable

    try:
        yield
    except Terminated as terminated:
        going_on = f"{shown(terminated)}; go on with:\n{shown(command_to_go_on(command, terminated.path))}"
        console.print(going_on, soft_wrap=True, highlight=False)
        raise typer.Exit(terminated.code) from None
    except (FloatingPointError, OSError, UnreadableImage, PlaceMismatch, ProcessLost, NotRecordable) as error:
        end(error, 1)


def write_arguments(options: RunOptions, folder: Path) -> None:
    """Write all options of a run into its folder, as a file for --config.

    Args:
        options: an instance of the command's dataclass.
        folder: of the run; made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    if arguments.get("data_dir") is not None:  # for commands that read it here, wherever they are started
        arguments["data_dir"] = os.path.abspath(arguments["data_dir"])
    for name in ("config", "overwrite", "by_cluster", "more_kwargs"):
        arguments.pop(name, None)
    with replacing(folder / ARGUMENTS) as file:
        yaml.safe_dump(arguments, file)


def command_to_go_on(command: str, checkpoint: Path) -> str:
    """What to type for a run to go on from its checkpoint, with the options that it had."""
    with contextlib.suppress(ValueError):
        checkpoint = checkpoint.relative_to(Path.cwd())
    processes, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    started = ["fastroute"]
    if processes > 1:
        several = [] if processes == here else ["--nnodes", str(processes // here)]
        started = ["torchrun", *several, "--nproc-per-node", str(here), "-m", "fastroute"]
    options = ["--config", str(checkpoint.parent / ARGUMENTS), "--resume", str(checkpoint)]
    return shlex.join([*started, command, *options])


def local_path(path: Path, name: str) -> Path:
    """A path, made absolute: what PyTorch Lightning is given as `http_runs` or `file:` is a URL to it.

    Raises:
        ValueError: it would still be one, or is not UTF-8.
    """
    path = path.absolute()
    if "::" in str(path):
        raise ValueError(f"{name} is {path}; a path with '::' in it is taken for a URL: choose another name")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {path}; TensorBoard writes to no path that is not UTF-8: rename it") from None
    return path


def place_of_run(options: RunOptions, kind: str, console: Console) -> tuple[Path, Path | None]:
    """The folder of a run, and the checkpoint to go on from if there is one.

    Args:
        options: of the command.
        kind: follows the time in the folder's name where neither an experiment nor a checkpoint names the folder.
        console: says so where `previous.ckpt` takes the place of a damaged `last.ckpt`.

    Raises:
        ValueError: resume is "auto" without an experiment, or neither checkpoint there can be read, or a path cannot be
            used; see `local_path`.
    """
    from fastroute.training.checkpoints import latest_checkpoint

    resume = None if options.resume in (None, "auto") else local_path(Path(options.resume), "resume")
    if options.experiment is not None:
        folder = local_path(options.output / options.experiment, "output")
    elif options.resume == "auto":
        raise ValueError("resume is 'auto'; it needs the run's name as --experiment")
    elif resume is not None:
        folder = resume.parent
    else:
        folder = local_path(options.output, "output") / f"{time.strftime('%Y%m%d-%H%M%S')}-{kind}"
    if options.resume == "auto":
        resume = latest_checkpoint(folder, partial(console.print, soft_wrap=True, highlight=False, markup=False))
    return folder, resume


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


def read_options(path: Path) -> dict[str, Any]:
    """The `name: value` pairs of a YAML file; a value is a number, a text, yes or no, null, or a list of these.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML file of such pairs; see `fastroute._yaml.load`.
    """
    if not path.exists():
        raise FileNotFoundError(f"config is {path}; there is no such file")
    try:
        values = _yaml.read(path)
    except ValueError as error:
        raise ValueError(f"config is {path}; {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"config is {path}; it must hold one `name: value` for each option")
    options = {}
    for name, value in values.items():
        option = str(name).replace("-", "_")
        if option in options:
            raise ValueError(f"config is {path}; it names {option} twice: keep one")
        for item in value if isinstance(value, list) else [value]:
            if item is not None and not isinstance(item, bool | int | float | str):
                raise ValueError(f"config is {path}; {option} holds a {type(item).__name__}, and must be one value")
        options[option] = value
    return options


def config_option(command: str):
    """The `--config` option of a command: a YAML file, or a packaged recipe of the command by its name.

    What it holds become defaults, which the command line overrides.
    """

    def callback(context: typer.Context, config: str | None) -> str | None:
        if config is None:
            return None
        with plain_errors():
            values = _recipe_or_file(config, command)
            options = {option.name: option for option in context.command.params if option.name != "config"}
            for name in values.keys() - options:
                near = "".join(f"; did you mean {option!r}?" for option in get_close_matches(name, options, n=1))
                raise ValueError(f"config is {config}; there is no option {name!r}{near}")
            values = {name: _as_typed(value, options[name]) for name, value in values.items() if value is not None}
            for name, value in values.items():
                if isinstance(value, bool) and not options[name].is_flag:
                    raise ValueError(f"config is {config}; {name} is {value}, and it must be no yes or no")
                try:
                    options[name].process_value(context, value)
                except typer.BadParameter as error:
                    raise ValueError(f"config is {config}; {name} is {value!r}: {error.message}") from None
        context.default_map = values
        return config

    return typer.Option(
        "-c",
        "--config",
        is_eager=True,
        callback=callback,
        help="YAML file of defaults for all this, or the name of a recipe; `fastroute recipes` lists them.",
    )


def _as_typed(value: Any, option: Any) -> bool | str | list[str]:
    """A value as it would be typed, so that 1.5 is no whole number here either."""
    if option.multiple:
        return [str(item) for item in (value if isinstance(value, list) else [value])]
    return value if isinstance(value, bool) else str(value)


def _recipe_or_file(config: str, command: str) -> dict:
    from fastroute.training.recipes import recipe

    path = Path(config)
    is_file = path.suffix in (".yaml", ".yml") or path.exists()
    if is_file:
        return read_options(path)
    return {name.replace("-", "_"): value for name, value in recipe(config, command).options.items()}


LARGEST = 1e6
"""The largest number that an option takes unless it says otherwise: a float32 of its square is still finite."""


def real(least: float = -LARGEST, most: float = LARGEST) -> Callable[[Any], float]:
    """The `parser` of an option that is a finite number, from `least` to `most`."""

    def parse(value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise typer.BadParameter(f"{value!r} is not a valid float.") from None
        if not math.isfinite(number):
            raise typer.BadParameter(f"it is {number}; it must be a finite number.")
        if not least <= number <= most:
            raise typer.BadParameter(f"it is {number:g}; it must be from {least:g} to {most:g}.")
        return number

    parse.__name__ = "float"  # what --help shows
    return parse


def numbers(value: str | None, kind: type = int, what: str = "epochs, such as 80,150") -> list | None:
    """A list of numbers from text such as "80,150", "80 150" or "[80, 150]"."""
    if value is None:
        return None
    items = [item for item in re.split(r"[\s,\[\]]+", value) if item]
    try:
        parsed = [kind(item) for item in items]
    except ValueError:
        parsed = []
    if not parsed or not all(0 <= number <= LARGEST for number in parsed):
        raise typer.BadParameter(f"{value!r} is not a list of {what}")
    return parsed
