"""The command line: `fastroute <command>`, or `python -m fastroute <command>`."""

import importlib
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastroute._extras import extra
from fastroute._version import __version__

try:
    with extra("train", "the command line"):
        import typer

        from fastroute.cli import memory
        from fastroute.cli.errors import Commands
except ModuleNotFoundError as error:
    raise SystemExit(str(error)) from None
except KeyboardInterrupt:  # `Commands` handles Ctrl-C during all later imports
    print("error: stopped by Ctrl-C", file=sys.stderr)
    raise SystemExit(130) from None

if TYPE_CHECKING:
    import click

COMMANDS = {
    "train": "Train a network; write checkpoints, summary.csv, routers.csv, logger output and args.yaml.",
    "validate": "Measure single-crop or 10-crop errors of checkpoints.",
    "predict": "Predict the classes of images, or their clusters, with the probabilities.",
    "export": "Write a network into a file, with its classes and preprocessing, "
    "and check it against the network itself.",
    "paths": "Estimate how many paths each router of a network needs, from its gates over the validation images.",
    "recipes": "List the recipes for `fastroute train|cluster -c NAME`, with the percentages that the thesis reports.",
    "cluster": "Cluster images without their labels; write assignments.csv, summary.csv, args.yaml, and last.ckpt of a "
    "network.",
    "report": "Show what a network's routers or clusters do: one page, and its figures as PNG and SVG.",
    "demo": "Train one path and two routed paths on real handwritten digits, and compare them; "
    "show what the routers do.",
    "models": "List the networks, with parameters and multiply-accumulates for one image as the thesis has them.",
    "info": "Print versions, and which backend serves which tensors, or why it cannot.",
    "bench": "Measure the operators and networks on this machine, or work with results.",
}
"""The module of each command, and the first line of its help, so that `--help` imports no module."""

app = typer.Typer(
    cls=Commands,
    help="Data-dependent routing for multi-path neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fastroute {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="FASTROUTE_DEBUG", help="Show the traceback of an error too.")
    ] = False,
) -> None:
    """Data-dependent routing for multi-path neural networks."""


def _load(name: str) -> "click.Command":
    """Return the command of a module: its `app` if it has subcommands, or else its function of the same name."""
    module = importlib.import_module(f"fastroute.cli.{name}")
    command = getattr(module, "app", None)
    if command is None:
        command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        command.command(name)(getattr(module, name))
    return typer.main.get_command(command)


Commands.loaded_by(_load, COMMANDS)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Print a warning of this package as a line for its user, without the place in the code."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        print(f"warning: {message}", file=file or sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)


def main() -> None:
    """Run the command line."""
    warnings.showwarning = _show_warning
    if sys.argv[1:2] != ["bench"]:  # by default, it measures what a user's own program sees
        memory.keep_freed_memory()
    app(prog_name="fastroute")
