"""Networks by name."""

import re
from collections.abc import Callable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register_model(builder: Callable[..., nn.Module], name: str | None = None) -> Callable[..., nn.Module]:
    """Add a network to the registry, as a decorator or with a name of its own.

    Args:
        builder: called as `builder(num_classes=…, in_chans=…, img_size=…, **options)`.
        name: the name of the network; the builder's own by default.

    Raises:
        ValueError: the name is taken.
    """
    name = name or builder.__name__
    if name in _BUILDERS:
        raise ValueError(f"name is {name!r}; a network of that name is registered already")
    _BUILDERS[name] = builder
    return builder


def list_models(filter: str = "*") -> list[str]:
    """The names of all networks that match a shell pattern such as `"*cc*"`, in natural order."""
    names = (name for name in _BUILDERS if fnmatchcase(name, filter))
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def create_model(name: str, num_classes: int = 10, in_chans: int = 3, img_size: int = 32, **options) -> nn.Module:
    """Build a network by its name, with fresh weights.

    Args:
        name: one of `list_models()`.
        num_classes: the number of logits.
        in_chans: the channels of the images.
        img_size: the height and width of the images. Networks that end in global pooling take any.
        options: for the network itself, such as `routing=None` for the paths of a multi-path network without routers.

    Returns:
        a network with `model(x)` → logits (N, num_classes) for x (N, in_chans, H, W), and
        `model(x, return_routing=True)` → (logits, {router name: Routing}).

    Raises:
        ValueError: there is no network of that name, or a size is less than 1.
    """
    if name not in _BUILDERS:
        near = get_close_matches(name, _BUILDERS, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "list_models() names all there are"
        raise ValueError(f"name is {name!r}; there is no such network: {hint}")
    sizes = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}
    for argument, size in sizes.items():
        if size < 1:
            raise ValueError(f"{argument} is {size}; it must be at least 1")
    return _BUILDERS[name](**sizes, **options)
