"""Errors of the outside world, such as a full disk or exhausted memory, as sentences.

`Commands` is the one place where an error that a command lets through ends: a sentence and a status where the cause is
outside the program, a traceback where it is a fault of the program.
"""

import contextlib
import multiprocessing
import os
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
"""The status that a shell gives to a command that Ctrl-C ended."""

DEBUG: ContextVar[bool] = ContextVar("debug", default=False)
"""Whether the traceback is shown above the sentence."""

# How PyTorch says in a RuntimeError that there is no memory left, or that a size is beyond every memory.
_MEMORY = ("not enough memory", "out of memory", "bad_alloc", "Cannot allocate memory", "can't start new thread")
_OVERFLOW = ("overflow", "Invalid buffer size", "exceeds the range", "too large to convert", "Out of range")
_LOWER = "lower --batch-size, --img-size or --workers"


def standard_output(**options) -> Console:
    """Where commands print. Of tables that go to a file or pipe, nothing is cut off, unless COLUMNS is set."""
    console = Console(**options)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000
    return console


def end(message: object, code: int) -> NoReturn:
    """End the command with a sentence; with `--debug`, below the traceback of the error that is being handled."""
    if DEBUG.get() and sys.exc_info()[0] is not None:
        traceback.print_exc()
    Console(stderr=True).print(f"[red]error:[/] {shown(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(code) from None


def shown(text: object) -> str:
    """Text for a console: names in it are printable, and are no markup."""
    return escape(printable(" ".join(str(text).split("\n"))))


def sentence(error: BaseException) -> str | None:
    """What an error of the outside says to the user; None for a fault of the program."""
    text = _message(error)
    if type(error).__name__ == "ProcessLost":  # by its name: its module would be imported for nothing else
        return text
    torch = sys.modules.get("torch")  # without it, no error is its own
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is exhausted: {_first(text)}; lower --batch-size or --img-size, or use --amp"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(mark in text for mark in _MEMORY)):
        return f"the machine's memory is exhausted{f': {_first(text)}' if text else ''}; {_LOWER}"
    if isinstance(error, OverflowError) or (
        isinstance(error, RuntimeError) and any(mark in text for mark in _OVERFLOW)
    ):
        return f"a number or size is too large to compute with: {_first(text)}; lower it"
    if "DataLoader timed out" in text:
        return f"{_first(text)}: {_silent_workers()}; the last checkpoint is whole, and --resume goes on from it"
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return (
            f"a process that decodes images is gone: {_first(text)} The system ends processes where memory is "
            f"exhausted: {_LOWER}. The last checkpoint is whole, and --resume goes on from it"
        )
    if isinstance(error, OSError):
        return text
    if _restoring(error):
        return f"resume names a checkpoint that does not fit this run: {type(error).__name__}: {_first(text)}"
    return None


def _message(error: BaseException) -> str:
    """The message; that of an error in a DataLoader's worker, which PyTorch raises anew with its traceback as text."""
    text = str(error).strip()
    if text.startswith("Caught ") and "Original Traceback" in text:
        return text.splitlines()[-1]
    return text


def _first(text: str) -> str:
    return next(iter(text.splitlines()), "")


def _restoring(error: BaseException) -> bool:
    """Whether Lightning was putting back what a checkpoint holds."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(
        frame.name.startswith(("restore", "_restore", "resume_start"))
        for frame in frames
        if Path(frame.filename).name == "checkpoint_connector.py"
    )


def _silent_workers() -> str:
    """Which of this process's workers are stopped, as by SIGSTOP."""
    stopped = []
    for worker in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in ("T", "t"):
                stopped.append(str(worker.pid))
    return f"process {', '.join(stopped)} is stopped (SIGCONT lets it go on)" if stopped else "no worker answers"


class Lazy(dict):
    """Commands by name, each of which is made when it is looked up; their number and names are there at once."""

    def __init__(self, load: Callable[[str], "click.Command"], names: Iterable[str]):
        super().__init__(dict.fromkeys(names))
        self._load = load

    def __getitem__(self, name: str) -> "click.Command":
        if super().__getitem__(name) is None:
            self[name] = self._load(name)
        return super().__getitem__(name)

    def get(self, name: str, default: object = None) -> object:
        return self[name] if name in self else default  # noqa: SIM401 (dict's own would not load it)


class Commands(TyperGroup):
    """The commands, which are imported when they are called. `--debug` may come before or after the command's name."""

    _load: ClassVar[Callable[[str], "click.Command"]]
    _helps: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def loaded_by(cls, load: Callable[[str], "click.Command"], helps: Mapping[str, str]) -> None:
        """Say which commands there are, in their order, and the first line of each one's help."""
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
                stream.reconfigure(errors="backslashreplace")  # names of files may be no text
        token = DEBUG.set(bool(ctx.params.get("debug")))
        try:
            with _told():
                return super().invoke(ctx)
        finally:
            DEBUG.reset(token)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        end(_INTERRUPTED, INTERRUPTED)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning turns into this
            end(_INTERRUPTED, INTERRUPTED)
        raise
    except Exception as error:  # the one place where what a command lets through is told
        if hasattr(error, "exit_code"):  # of the command line's parser
            raise
        if message := sentence(error):
            end(message, 1)
        traceback.print_exc()
        Console(stderr=True).print(
            "[red]error:[/] this is a fault of fastroute; please report it with the lines above and the command",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(1) from None


_INTERRUPTED = "stopped by Ctrl-C; the last checkpoint, if there is one, is whole, and --resume goes on from it"
