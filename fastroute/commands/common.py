"""What commands share: errors in one sentence."""

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.markup import escape


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
