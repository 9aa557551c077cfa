"""The experiments of §3.4 and §4.5.2 by name: options of a command, and what the thesis reports for them."""

from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from fastroute import _yaml


class Recipe(NamedTuple):
    """One network, or one method of clustering, in one experiment.

    name: such as "cifar10_resnet20_cc2".
    about: the experiment, in a line.
    options: of the command, the network as `model` or the method as `method` among them.
    reported: {measure: value} as the thesis has it, in percent; empty for what is not in it.
    """

    name: str
    about: str
    options: dict[str, Any]
    reported: dict[str, float]


# What varies within a file: its key there, and the option of the command that it is.
VARIANTS = {"train": ("networks", "model"), "cluster": ("methods", "method")}


@cache
def recipes(command: str = "train") -> dict[str, Recipe]:
    """All recipes of `fastroute train` or `fastroute cluster` by name, in the order of the thesis.

    A file holds `name`, a pattern with the network or method in it; `about`; `options`; and `networks` or `methods`,
    {which: what the thesis reports}.
    """
    key, option = VARIANTS[command]
    found = {}
    files = (file for file in resources.files(__name__).iterdir() if file.name.endswith(".yaml"))
    for file in sorted(files, key=lambda file: file.name):
        experiment = _yaml.load(file.read_text(encoding="utf-8"))
        for variant, reported in experiment.get(key, {}).items():
            name = experiment["name"].format(**{option: variant})
            options = {option: variant} | experiment["options"]
            found[name] = Recipe(name, experiment["about"], options, reported or {})
    return found


def recipe(name: str, command: str = "train") -> Recipe:
    """A recipe by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in recipes(command):
        near = get_close_matches(name, recipes(command), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "`fastroute recipes` lists them"
        raise ValueError(f"config is {name!r}; there is no such file and no such recipe: {hint}")
    return recipes(command)[name]
