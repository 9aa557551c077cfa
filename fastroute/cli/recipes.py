"""`fastroute recipes`."""

from fnmatch import fnmatchcase
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fastroute.cli.common import plain_errors
from fastroute.cli.outside import shown


def recipes(pattern: Annotated[str, typer.Argument(help="A shell pattern, such as 'ilsvrc*'.")] = "*") -> None:
    """List the recipes for `fastroute train|cluster -c NAME`, with the percentages that the thesis reports."""
    with plain_errors():
        from fastroute.training.recipes import VARIANTS, recipes

    console, experiments = Console(), {}
    for command in VARIANTS:
        for name, recipe in recipes(command).items():
            if fnmatchcase(name, pattern):
                experiments.setdefault(recipe.about, []).append(recipe)
    if not experiments:
        with plain_errors():
            raise ValueError(f"pattern is {pattern!r}; there is no such recipe")
    for about, found in experiments.items():
        table = Table("recipe")
        measures = list(dict.fromkeys(measure for recipe in found for measure in recipe.reported))
        for measure in measures:
            table.add_column(f"{measure} %", justify="right")
        for recipe in found:
            reported = (recipe.reported.get(measure) for measure in measures)
            table.add_row(shown(recipe.name), *("" if value is None else f"{value:.2f}" for value in reported))
        console.print(f"[bold]{shown(about)}[/]", table, sep="\n", highlight=False, soft_wrap=False)
