"""`fastroute bench`: measure on this machine, compare, and draw."""

import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer

from fastroute.cli.common import plain_errors

app = typer.Typer(
    help="Measure the operators and networks on this machine, or work with results.", add_completion=False
)

ResultFile = Annotated[Path, typer.Argument(help="A file that `fastroute bench` wrote.")]


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    only: Annotated[
        list[str] | None,
        typer.Option("-k", "--only", help="Only the cases that match a shell pattern; repeatable."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="All cases, which take hours. (default: a selection, which takes minutes)")
    ] = False,
    stated: Annotated[bool, typer.Option("--stated", help="The cases of the documentation's table of speed.")] = False,
    steps: Annotated[
        bool,
        typer.Option("--steps", help="Whole steps of networks beside plain PyTorch's, eager and compiled (hours)."),
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. (default: cuda if there is a GPU)")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, max=10**6, help="Timed rounds of each case. (default: by suite)")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the result and its figures.")] = Path("runs/bench"),
    name: Annotated[str | None, typer.Option(help="Stem of the files. (default: device and time)")] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Print the cases, and measure nothing.")] = False,
    keep_freed_memory: Annotated[
        bool, typer.Option("--keep-freed-memory", help="Make glibc keep freed memory, as other commands do.")
    ] = False,
) -> None:
    """Measure the operators and networks on this machine, against plain PyTorch, torch.compile and a copy.

    Write NAME.json and figures, and until then NAME.partial.json after each case. `--full`, `--stated`, `--steps` and
    `-k` choose among the cases. The exit status is 1 if a result was wrong.
    """
    if context.invoked_subcommand is not None:
        return
    from fastroute import bench
    from fastroute._devices import resolve_device
    from fastroute.cli import memory

    with plain_errors(RuntimeError):
        device = resolve_device(device)
        cases = select(bench.all_cases(device), only, full, stated, steps)
    if list_cases:
        typer.echo("\n".join(case.id for case in cases))
        return
    if keep_freed_memory:
        memory.keep_freed_memory()
    result = bench.Result.here(device, rounds=rounds or bench.ROUNDS, keep_freed_memory=keep_freed_memory)
    name = name or f"{device.type}_{time.strftime('%Y%m%d-%H%M%S')}"
    partial = output / f"{name}.partial.json"
    bench.run(result, cases, rounds, say=typer.echo, save=lambda: result.save(partial))
    save(result, output, name)
    partial.unlink(missing_ok=True)
    if result.settings["failures"]:
        raise typer.Exit(1)


@app.command()
def compare(old: ResultFile, new: ResultFile) -> None:
    """Compare two results case by case."""
    from fastroute.bench import Result, report

    with plain_errors():
        typer.echo(report.compare(Result.load(old), Result.load(new)))


@app.command()
def show(result: ResultFile) -> None:
    """Print the tables of a result, and draw its figures beside it."""
    from fastroute.bench import Result, report

    with plain_errors():
        loaded = Result.load(result)
        typer.echo(report.tables(loaded.rows))
        _draw(loaded, result.parent, result.stem)


def select(cases: list, only: list[str] | None, full: bool, stated: bool, steps: bool = False) -> list:
    """Select the cases to measure.

    Args:
        cases: all of them.
        only: shell patterns of ids; None selects by the other options alone.
        full: whether to select all instead of the quick ones.
        stated: whether to select those of the documentation's table.
        steps: whether to select those of whole networks' steps.

    Returns:
        the selected cases, in order.

    Raises:
        ValueError: no case matches.
    """
    if only:
        cases = [case for case in cases if any(fnmatchcase(case.id, pattern) for pattern in only)]
    if stated or steps:
        cases = [case for case in cases if (stated and case.stated) or (steps and case.step)]
    elif not full and not only:
        cases = [case for case in cases if case.quick]
    if not cases:
        raise ValueError(f"no case matches {', '.join(map(repr, only or ()))}: --full --list prints them all")
    return cases


def save(result, folder: Path, stem: str) -> None:
    """Print the tables of a result, write it, and draw its figures if matplotlib is installed.

    Args:
        result: a `fastroute.bench.Result`.
        folder: to write into.
        stem: of the names of the files.
    """
    from fastroute.bench import report

    typer.echo("\n" + report.tables(result.rows) + "\n")
    result.save(folder / f"{stem}.json")
    typer.echo(f"wrote {folder / stem}.json")
    _draw(result, folder, stem)


def _draw(result, folder: Path, stem: str) -> None:
    """Draw the figures of a result, or say that matplotlib is not installed."""
    try:
        from fastroute.bench.plots import draw
    except ModuleNotFoundError as error:
        typer.echo(str(error))
        return
    for path in draw(result, folder, stem):
        typer.echo(f"wrote {path}")
