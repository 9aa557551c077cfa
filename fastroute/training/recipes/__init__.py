"""The experiments of §3.4 by name: options of `fastroute train`, and what the thesis reports for them."""

from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import yaml


class Recipe(NamedTuple):
    """One network in one experiment.

    name: such as "cifar10_resnet20_cc2".
    about: the experiment, in a line.
    options: of `fastroute train`, the network as `model` among them.
    reported: {measure: value} as the thesis has it, errors in percent; empty for what is not in it.
    """

    name: str
    about: str
    options: dict[str, Any]
    reported: dict[str, float]


@cache
def recipes() -> dict[str, Recipe]:
    """All recipes by name, in the order of the thesis.

    A file holds `name`, a pattern with the network in it; `about`; `options`; and `networks`, {network: what the thesis
    reports}.
    """
    found = {}
    files = (file for file in resources.files(__name__).iterdir() if file.name.endswith(".yaml"))
    for file in sorted(files, key=lambda file: file.name):
        experiment = yaml.safe_load(file.read_text())
        for model, reported in experiment["networks"].items():
            name = experiment["name"].format(model=model)
            options = {"model": model} | experiment["options"]
            found[name] = Recipe(name, experiment["about"], options, reported or {})
    return found


def recipe(name: str) -> Recipe:
    """A recipe by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in recipes():
        near = get_close_matches(name, recipes(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "`fastroute recipes` lists them"
        raise ValueError(f"config is {name!r}; there is no such file and no such recipe: {hint}")
    return recipes()[name]
