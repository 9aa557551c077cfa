"""The command line: `fastroute <command>`, or `python -m fastroute <command>`."""

import sys
from typing import Annotated

from fastroute._extras import extra

try:
    with extra("train", "the command line"):
        import typer

        from fastroute.cli import bench, cluster, demo, info, memory, models, paths, recipes, report, train, validate
        from fastroute.cli.outside import Commands
except ModuleNotFoundError as error:
    raise SystemExit(str(error)) from None

app = typer.Typer(
    cls=Commands,
    help="Data-dependent routing for multi-path neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="FASTROUTE_DEBUG", help="Show the traceback of an error, too.")
    ] = False,
) -> None:
    """Data-dependent routing for multi-path neural networks."""


app.command()(train.train)
app.command()(validate.validate)
app.command()(paths.paths)
app.command()(recipes.recipes)
app.command()(cluster.cluster)
app.command()(report.report)
app.command()(demo.demo)
app.command()(models.models)
app.command()(info.info)
app.add_typer(bench.app, name="bench")


def main() -> None:
    if sys.argv[1:2] != ["bench"]:  # which measures what a user's own program would see, unless told otherwise
        memory.keep_freed_memory()
    app(prog_name="fastroute")
