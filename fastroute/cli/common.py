"""Shared parts of commands: options, errors, files of options, and run folders."""

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

import typer
import yaml
from rich.console import Console

from fastroute import _yaml
from fastroute.cli.errors import TIMM, escaped, exit_with_error, expected

COUNT, PIXELS, WORKERS, SEED = 2**31 - 1, 2**20, 1024, 2**32 - 1
"""The largest integers that options accept: counts, image sizes, processes, seeds."""

ARGUMENTS = "args.yaml"
"""The file in a run's folder with the options of the run."""

# Options that do not change what a resumed run computes, or that are checked against its checkpoint.
OF_NO_EFFECT = {
    *("checkpoint_hist", "device", "download", "epochs", "experiment", "in_memory", "initial_checkpoint", "log"),
    *("log_interval", "output", "patience", "pretrained", "pretrained_path", "recovery_interval", "resume", "workers"),
}

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Overwrite a run in the folder.")]

# The images of a trained network, for commands that take a checkpoint.
DatasetOption = Annotated[
    Literal["digits", "cifar10", "cifar100", "mnist", "stl10", "imagefolder", "webdataset"] | None,
    typer.Option(help="Source of the images. (default: as in training)"),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(help="Folder with val/, of classes or of tar shards, a tar file, or a pattern. (default: the run's)"),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "-j", "--workers", min=0, max=WORKERS, help="Processes that decode images; 0: this one. (default: all cores)"
    ),
]


Options = TypeVar("Options")


class RunOptions(Protocol):
    """The options of a command that has a run folder."""

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


def resolve_dataset(dataset: str | None, data_dir: Path | None, any_split: bool = False) -> str:
    """Return the given dataset, or else that of the folder, or "digits" without a folder.

    Args:
        dataset, data_dir: as on the command line.
        any_split: whether a folder may lack images to validate on.

    Raises:
        FileNotFoundError: there is no such folder, or it has no images in a known layout.
        ValueError: it has several datasets, or no images to validate on.
    """
    if dataset is not None or data_dir is None:
        return dataset or "digits"
    from fastroute.data.layout import choose

    return choose(data_dir, any_split=any_split).dataset


@contextlib.contextmanager
def plain_errors(*also: type[BaseException]) -> Iterator[None]:
    """End the command with a one-line message if an argument is wrong; use it around checks, not around training.

    Args:
        also: errors to treat so, besides those of wrong arguments and missing files or packages.

    Raises:
        typer.Exit: with status 2, after such an error.
    """
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError, *also) as error:
        exit_with_error(error, 2)


@contextlib.contextmanager
def handle_run_errors(console: Console, command: str) -> Iterator[None]:
    """End the command with a one-line message if a run ends early; a bug keeps its traceback.

    Args:
        console: to print on how to resume a stopped run.
        command: "train" or "cluster".

    Raises:
        typer.Exit: with status 1, 2 if options do not fit the run to resume, or that of the signal that stopped it.
    """
    from fastroute.data.decode import UnreadableImage
    from fastroute.data.loaders import PlaceMismatch
    from fastroute.training import Terminated
    from fastroute.training.distributed import ProcessLost
    from fastroute.training.graphs import NotRecordable

    try:
        yield
    except Terminated as terminated:
        message = escaped(terminated)
        if terminated.path is not None:
            message += f"; resume with:\n{escaped(resume_command(command, terminated.path))}"
        console.print(message, soft_wrap=True, highlight=False)
        raise typer.Exit(terminated.code if isinstance(terminated.code, int) else 1) from None
    except PlaceMismatch as error:
        exit_with_error(error, 2)
    except (FloatingPointError, OSError, UnreadableImage, ProcessLost, NotRecordable) as error:
        exit_with_error(error, 1)


def write_arguments(options: RunOptions, folder: Path) -> None:
    """Write all options of a run into its folder, as a file for --config.

    Args:
        options: an instance of the command's dataclass.
        folder: of the run; made if it is missing.
    """
    from fastroute._files import replacing

    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / ARGUMENTS) as file:
        yaml.safe_dump(_arguments(options), file)


def say_changes(options: RunOptions, folder: Path, console: Console) -> None:
    """Print which options differ from those in the folder of the run that is resumed."""
    try:
        before = read_options(folder / ARGUMENTS)
    except (FileNotFoundError, ValueError):  # a folder of Lightning's own, or a damaged file
        return
    changed = [
        f"{name} {value} (was {before[name]})"
        for name, value in _arguments(options).items()
        if before.get(name, value) != value and name not in OF_NO_EFFECT
    ]
    if changed:
        console.print(f"options that differ from the run's: {', '.join(changed)}", markup=False, soft_wrap=True)


def _arguments(options: RunOptions) -> dict[str, Any]:
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    if arguments.get("data_dir") is not None:  # for commands started in another folder
        arguments["data_dir"] = os.path.abspath(arguments["data_dir"])
    for name in ("config", "overwrite", "by_cluster", "more_kwargs"):
        arguments.pop(name, None)
    return arguments


def resume_command(command: str, checkpoint: Path) -> str:
    """Return the command line that resumes a run with its options.

    Args:
        command: "train" or "cluster".
        checkpoint: to resume from.
    """
    with contextlib.suppress(ValueError):
        checkpoint = checkpoint.relative_to(Path.cwd())
    processes, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    started = ["fastroute"]
    if processes > 1:
        several = [] if processes == here else ["--nnodes", str(processes // here)]
        started = ["torchrun", *several, "--nproc-per-node", str(here), "-m", "fastroute"]
    options = ["--config", str(checkpoint.parent / ARGUMENTS), "--resume", str(checkpoint)]
    return shlex.join([*started, command, *options])


def run_location(options: RunOptions, kind: str, console: Console) -> tuple[Path, Path | None]:
    """Return the folder of a run, and the checkpoint to resume from if there is one.

    Args:
        options: of the command.
        kind: follows the time in the folder's name, unless an experiment or a checkpoint determines the folder.
        console: to print on if `previous.ckpt` takes the place of a damaged `last.ckpt`.

    Raises:
        ValueError: resume is "auto" without an experiment, no checkpoint there can be read, the experiment's folder is
            that of all runs or above it, or a path cannot be used; see `local_path`.
    """
    from fastroute.training.checkpoints import latest_checkpoint
    from fastroute.training.run_folder import local_path

    resume = None if options.resume in (None, "auto") else local_path(Path(options.resume), "resume")
    if options.experiment is not None:
        runs, own = (Path(os.path.abspath(path)) for path in (options.output, options.output / options.experiment))
        if runs.is_relative_to(own):
            raise ValueError(
                f"experiment is {options.experiment!r}; it must be the name of a folder within {options.output}, which "
                "has all runs"
            )
        folder = local_path(options.output / options.experiment, "output")
    elif options.resume == "auto":
        raise ValueError("resume is 'auto'; name the run by --experiment")
    elif resume is not None:
        folder = resume.parent
    else:
        folder = local_path(options.output, "output") / f"{time.strftime('%Y%m%d-%H%M%S')}-{kind}"
    if options.resume == "auto":
        resume = latest_checkpoint(folder, partial(console.print, soft_wrap=True, highlight=False, markup=False))
    return folder, resume


def read_options(path: Path) -> dict[str, Any]:
    """Read the `name: value` pairs of a YAML file; a value is a number, string, boolean, null, or a list of these.

    Args:
        path: the file.

    Returns:
        the values by the names of options, with underscores.

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
        raise ValueError(f"config is {path}; expected a `name: value` pair for each option")
    options = {}
    for name, value in values.items():
        option = str(name).replace("-", "_")
        if option in options:
            raise ValueError(f"config is {path}; it has {option} twice: keep one")
        for item in value if isinstance(value, list) else [value]:
            if item is not None and not isinstance(item, bool | int | float | str):
                raise ValueError(f"config is {path}; {option} is a {type(item).__name__}, expected a single value")
        options[option] = value
    return options


def config_option(command: str):
    """Return the `--config` option of a command: a YAML file, or the name of a packaged recipe.

    Its values become defaults, which the command line overrides.

    Args:
        command: "train" or "cluster".
    """

    def callback(context: typer.Context, config: str | None) -> str | None:
        if config is None:
            return None
        with plain_errors():
            values = _recipe_or_file(config, command)
            options = {option.name: option for option in context.command.params if option.name != "config"}
            for name in values.keys() - options:
                near = "".join(f"; did you mean {option!r}?" for option in get_close_matches(name, options, n=1))
                if command == "train" and (other := TIMM.get(f"--{name.replace('_', '-')}")):
                    near = f"; {other}"
                raise ValueError(f"config is {config}; there is no option {name!r}{near}")
            values = {name: _as_typed(value, options[name]) for name, value in values.items() if value is not None}
            for name, value in values.items():
                if isinstance(value, list) and not options[name].multiple:
                    raise ValueError(f"config is {config}; {name} is {value}; expected one value, got a list")
                if isinstance(value, bool) and not options[name].is_flag:
                    raise ValueError(f"config is {config}; {name} is {value}; expected a value, got a boolean")
                try:
                    options[name].process_value(context, value)
                except typer.BadParameter as error:
                    reason = expected(error.message)
                    between = ";" if reason.startswith("it must") else ":"
                    raise ValueError(f"config is {config}; {name} is {value!r}{between} {reason}") from None
        context.default_map = values
        return config

    return typer.Option(
        "-c",
        "--config",
        is_eager=True,
        callback=callback,
        help="YAML file with defaults of these options, or the name of a recipe of `fastroute recipes`.",
    )


def _as_typed(value: Any, option: Any) -> bool | str | list[str]:
    """Return a value as it would be typed, so that typer checks it: 1.5 is no integer."""
    if option.multiple:
        return [str(item) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list) and not all(isinstance(item, int | float) for item in value):
        return [str(item) for item in value]
    return value if isinstance(value, bool) else str(value)


def _recipe_or_file(config: str, command: str) -> dict:
    from fastroute.training.recipes import recipe

    path = Path(config)
    is_file = path.suffix in (".yaml", ".yml") or path.exists()
    if is_file:
        return read_options(path)
    return {name.replace("-", "_"): value for name, value in recipe(config, command).options.items()}


LARGEST = 1e6
"""The largest number that an option accepts by default; its square is finite in float32."""


def real(least: float = -LARGEST, most: float = LARGEST) -> Callable[[Any], float]:
    """Return the `parser` of an option that is a finite number from `least` to `most`.

    Raises:
        typer.BadParameter: by the parser, for anything else.
    """

    def parse(value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise typer.BadParameter(f"{value!r} is not a valid float.") from None
        if not math.isfinite(number):
            raise typer.BadParameter(f"{number} is not a finite number.")
        if not least <= number <= most:
            raise typer.BadParameter(f"{number:g} is not in the range from {least:g} to {most:g}.")
        return number

    parse.__name__ = "float"  # for --help
    return parse


def numbers(value: str | None, kind: type = int, what: str = "epochs, such as 80,150") -> list | None:
    """Parse a list of numbers, such as "80,150", "80 150" or "[80, 150]".

    Args:
        value: the text; None passes through.
        kind: int or float.
        what: the description of a valid list, for the message.

    Returns:
        the numbers.

    Raises:
        typer.BadParameter: it is no list of numbers from 0 to `LARGEST`.
    """
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
