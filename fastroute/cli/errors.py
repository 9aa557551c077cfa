"""Report errors on the command line, and print on the console.

`Commands` handles every error that a command does not. An error with a cause outside the program, such as a full disk
or exhausted memory, ends in a one-line message and an exit status. A bug ends in a traceback.
"""

import contextlib
import multiprocessing
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from fastroute._errors import printable

if TYPE_CHECKING:
    import click  # not installed beside every typer: newer ones bring their own

INTERRUPTED = 130
"""The exit status of a shell for a command ended by Ctrl-C."""

DEBUG: ContextVar[bool] = ContextVar("debug", default=False)
"""Whether to print the traceback above the message."""

# Parts of PyTorch's RuntimeErrors about exhausted memory, and about sizes beyond any memory.
_MEMORY = ("not enough memory", "out of memory", "bad_alloc", "Cannot allocate memory", "can't start new thread")
_OVERFLOW = ("overflow", "Invalid buffer size", "exceeds the range", "too large to convert", "Out of range")
_LOWER = "lower --batch-size, --img-size or --workers"

TIMM = {
    "--model": "the network is the first argument: fastroute train resnet20",
    "--input-size": "--in-chans and --img-size say the same",
    "--torchcompile": "it is called --compile",
    "--dataset-download": "it is called --download",
    "--clip-mode": "--clip-grad limits the norm",
    "--validation-batch-size": "validation takes batches of --batch-size",
    "--learning-rate": "it is called --lr",
    "--optimizer": "it is called --opt",
    "--wd": "it is called --weight-decay",
    "--arch": "the network is the first argument: fastroute train resnet20",
    "--network": "the network is the first argument: fastroute train resnet20",
    "--gpus": "torchrun starts a process for each GPU: torchrun --nproc-per-node 2 -m fastroute train resnet20",
}
"""What to do in place of options of timm's `train.py`, and of other trainers, that go by another name here."""


def standard_output(**options) -> Console:
    """Return the console that commands print on; tables in a file or pipe are not cut, unless COLUMNS is set.

    Args:
        options: of `rich.console.Console`.
    """
    console = Console(**options)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000
    return console


def exit_with_error(message: object, code: int) -> NoReturn:
    """End the command with a one-line message; with `--debug`, below the traceback of the current error.

    Args:
        message: printed on standard error.
        code: the exit status.

    Raises:
        typer.Exit: always.
    """
    if DEBUG.get() and sys.exc_info()[0] is not None:
        traceback.print_exc()
    Console(stderr=True).print(f"[red]error:[/] {escaped(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(code) from None


def escaped(text: object) -> str:
    """Return text as one line for a console, with unprintable characters and rich's markup escaped."""
    return escape(printable(" ".join(str(text).split("\n"))))


def describe_error(error: BaseException) -> str | None:
    """Describe an error with a cause outside the program to the user.

    Args:
        error: any error.

    Returns:
        a one-line message; None for a bug.
    """
    text = _message(error)
    if type(error).__name__ == "ProcessLost":  # by its name: importing its module is slow
        return text
    torch = sys.modules.get("torch")  # otherwise no error is PyTorch's
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is exhausted: {_first(text)}; lower --batch-size or --img-size, or use --amp"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(mark in text for mark in _MEMORY)):
        return f"the machine's memory is exhausted{f': {_first(text)}' if text else ''}; {_LOWER}"
    if isinstance(error, OverflowError) or (
        isinstance(error, RuntimeError) and any(mark in text for mark in _OVERFLOW)
    ):
        return f"a number or size is too large to compute with: {_first(text)}; lower it"
    if "DataLoader timed out" in text:
        intact = "the last checkpoint, if there is one, is intact: continue from it by --resume"
        return f"{_first(text)}: {_silent_workers()}; {intact}"
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return (
            f"a process that decodes images is gone: {_first(text)} The system kills processes if memory is "
            f"exhausted: {_LOWER}. The last checkpoint, if there is one, is intact: continue from it by --resume"
        )
    if isinstance(error, OSError):
        return text
    if _restoring(error):
        return f"resume names a checkpoint that does not fit this run: {type(error).__name__}: {_first(text)}"
    return None


def _message(error: BaseException) -> str:
    """Return the message of an error, without the traceback that PyTorch adds to one of a DataLoader's worker."""
    text = str(error).strip()
    if text.startswith("Caught ") and "Original Traceback" in text:
        return text.splitlines()[-1]
    return text


def _first(text: str) -> str:
    return next(iter(text.splitlines()), "")


def _restoring(error: BaseException) -> bool:
    """Return whether Lightning was restoring a checkpoint when the error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(
        frame.name.startswith(("restore", "_restore", "resume_start"))
        for frame in frames
        if Path(frame.filename).name == "checkpoint_connector.py"
    )


def expected(message: str) -> str:
    """Return the message of a parameter's error without pydantic's own words, such as "it must be a valid integer"."""
    text = message.partition(", unable to parse")[0].removeprefix("Value error, ")
    return re.sub("^Input should be", "it must be", text)


def _silent_workers() -> str:
    """Say which workers of this process are stopped, as by SIGSTOP."""
    stopped = []
    for worker in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in ("T", "t"):
                stopped.append(str(worker.pid))
    return f"process {', '.join(stopped)} is stopped (SIGCONT continues it)" if stopped else "no worker answers"


class Lazy(dict):
    """A dict of commands that loads each when it is first looked up; the names are known at once.

    Args:
        load: returns a command by its name.
        names: of the commands.
    """

    def __init__(self, load: Callable[[str], "click.Command"], names: Iterable[str]):
        super().__init__(dict.fromkeys(names))
        self._load = load

    def __getitem__(self, name: str) -> "click.Command":
        if super().__getitem__(name) is None:
            self[name] = self._load(name)
        return super().__getitem__(name)

    def get(self, name: str, default: object = None) -> object:
        return self[name] if name in self else default  # noqa: SIM401 (dict.get would not load it)


class Commands(TyperGroup):
    """Commands that are imported when they are called; `--debug` may stand before or after the command's name."""

    _load: ClassVar[Callable[[str], "click.Command"]]
    _helps: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def loaded_by(cls, load: Callable[[str], "click.Command"], helps: Mapping[str, str]) -> None:
        """Set the commands.

        Args:
            load: imports and returns a command by its name.
            helps: the first line of each command's help by its name, in order.
        """
        cls._load, cls._helps = staticmethod(load), helps

    def __init__(self, **options):
        super().__init__(**options)
        self.commands = Lazy(type(self)._load, self._helps)
        self._listing = False

    def list_commands(self, ctx) -> list[str]:
        return list(self.commands)

    def get_command(self, ctx, name: str) -> "click.Command | None":
        if self._listing:
            return TyperCommand(name, help=self._helps[name])
        return super().get_command(ctx, name)

    def format_help(self, ctx, formatter) -> None:
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        own = args[: args.index("--")] if "--" in args else args
        if "--debug" in own:
            args = ["--debug", *(argument for argument in own if argument != "--debug"), *args[len(own) :]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # file names may be no valid text
        token = DEBUG.set(bool(ctx.params.get("debug")))
        try:
            with _report_errors(resumes=ctx.invoked_subcommand in ("train", "cluster")):
                return super().invoke(ctx)
        finally:
            DEBUG.reset(token)


@contextlib.contextmanager
def _report_errors(resumes: bool) -> Iterator[None]:
    stopped = "stopped by Ctrl-C"
    if resumes:
        stopped += "; the last checkpoint, if there is one, is intact: continue from it by --resume"
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        exit_with_error(stopped, INTERRUPTED)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns it into SystemExit
            exit_with_error(stopped, INTERRUPTED)
        raise
    except Exception as error:  # whatever a command does not handle
        if hasattr(error, "exit_code"):  # raised by the command line's parser
            command = getattr(getattr(error, "ctx", None), "info_name", None)
            if command == "train" and type(error).__name__ == "NoSuchOption" and error.option_name in TIMM:
                error.message, error.possibilities = f"{error.message}; {TIMM[error.option_name]}", None
            if type(error.__cause__).__name__ == "ValidationError":  # of pydantic, by which typer checks values
                reason = expected(error.message)
                given = error.__cause__.errors()[0]["input"]
                error.message = f"{given!r}; {reason}" if reason.startswith("it must") else reason
            raise
        if message := describe_error(error):
            exit_with_error(message, 1)
        traceback.print_exc()
        Console(stderr=True).print(
            "[red]error:[/] this is a bug of fastroute; please report it with the lines above and the command",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(1) from None
