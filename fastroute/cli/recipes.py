"""`fastroute recipes`: list the recipes of the thesis's experiments."""

from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Annotated

import typer
import yaml
from rich.table import Table

from fastroute.cli.common import plain_errors
from fastroute.cli.errors import escaped, standard_output


def recipes(
    pattern: Annotated[str, typer.Argument(help="A shell pattern, such as 'ilsvrc*', or the name of a recipe.")] = "*",
) -> None:
    """List the recipes for `fastroute train|cluster -c NAME`, with the percentages that the thesis reports.

    Given the name of a recipe, print its options as YAML for --config.
    """
    with plain_errors():
        from fastroute.training.recipes import VARIANTS, recipes

    console, experiments = standard_output(), {}
    for command in VARIANTS:
        for name, recipe in recipes(command).items():
            if name == pattern:
                reported = "".join(f"; the thesis reports {what} {value} %" for what, value in recipe.reported.items())
                print(f"# {recipe.about}{reported}\n# fastroute {command} --config {name}")
                print(yaml.safe_dump(recipe.options, sort_keys=False, allow_unicode=True), end="")
                return
            if fnmatchcase(name, pattern):
                experiments.setdefault(recipe.about, []).append(recipe)
    if not experiments:
        names = [name for command in VARIANTS for name in recipes(command)]
        near = get_close_matches(pattern, names, n=3)
        hint = f": did you mean {', '.join(near)}?" if near else ""
        with plain_errors():
            raise ValueError(f"pattern is {pattern!r}; there is no such recipe{hint}")
    for about, found in experiments.items():
        table = Table("recipe")
        measures = list(dict.fromkeys(measure for recipe in found for measure in recipe.reported))
        for measure in measures:
            table.add_column(f"{measure} %", justify="right")
        for recipe in found:
            reported = (recipe.reported.get(measure) for measure in measures)
            table.add_row(escaped(recipe.name), *("" if value is None else f"{value:.2f}" for value in reported))
        console.print(f"[bold]{escaped(about)}[/]", table, sep="\n", highlight=False, soft_wrap=False)
