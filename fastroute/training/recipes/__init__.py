"""The experiments of §3.4 and §4.5.2 by name: the options of a command, and the thesis's results."""

from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from fastroute import _yaml


class Recipe(NamedTuple):
    """One network, or one clustering method, in one experiment.

    Attributes:
        name: such as "cifar10_resnet20_cc2".
        about: one line about the experiment.
        options: of the command, with the network as `model` or the method as `method`.
        reported: {measure: value} from the thesis, in percent; empty if it reports none.
    """

    name: str
    about: str
    options: dict[str, Any]
    reported: dict[str, float]


# What varies within a recipe file: its key there, and the command's option.
VARIANTS = {"train": ("networks", "model"), "cluster": ("methods", "method")}


@cache
def recipes(command: str = "train") -> dict[str, Recipe]:
    """Return all recipes of `fastroute train` or `fastroute cluster` by name, in the order of the thesis.

    A file has `name`, a pattern that contains the network or method; `about`; `options`; and `networks` or `methods`,
    {name: the thesis's results}.

    Args:
        command: "train" or "cluster".
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
    """Return a recipe by its name.

    Args:
        name: such as "cifar10_resnet20_cc2".
        command: "train" or "cluster".

    Raises:
        ValueError: there is no recipe of that name.
    """
    if name not in recipes(command):
        near = get_close_matches(name, recipes(command), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "`fastroute recipes` lists them"
        raise ValueError(f"config is {name!r}; there is no such file and no such recipe: {hint}")
    return recipes(command)[name]
