"""Register and build networks by name."""

import inspect
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial, wraps
from pathlib import Path
from typing import NamedTuple, TypeVar, overload

import torch
from torch import nn

from fastroute._errors import in_a_line
from fastroute._memory import check_memory
from fastroute.nn import exact_convolutions


class ModelInfo(NamedTuple):
    """Facts about a registered network.

    builder: builds the network as `create_model` does: `builder(num_classes=…, in_chans=…, img_size=…, **options)`.
    num_classes, img_size: the defaults of `create_model`, with which the thesis counts parameters.
    table: the table of the thesis, such as "3.3", or "" for a network that the thesis does not have.
    params: the number of parameters as printed there, in millions, or "".
    """

    builder: Callable[..., nn.Module]
    num_classes: int = 10
    img_size: int = 32
    table: str = ""
    params: str = ""


LARGE = 2**14
"""The size from which the memory is checked before a network is built, for its first or last layer may not fit."""

SIZES = ("num_classes", "in_chans", "img_size")
"""The arguments of every network, in the order of `create_model`."""

_MODELS: dict[str, ModelInfo] = {}
_BUILDERS: dict[str, Callable[..., nn.Module]] = {}
"""The registered functions, which `create_model` calls with all sizes."""

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


@overload
def register_model(
    builder: Builder,
    name: str | None = None,
    *,
    num_classes: int = 10,
    img_size: int = 32,
    table: str = "",
    params: str = "",
) -> Builder: ...


@overload
def register_model(
    builder: None = None,
    name: str | None = None,
    *,
    num_classes: int = 10,
    img_size: int = 32,
    table: str = "",
    params: str = "",
) -> Callable[[Builder], Builder]: ...


def register_model(builder=None, name=None, *, num_classes=10, img_size=32, table="", params=""):
    """Add a network to the registry: a function to call, or a decorator, with or without arguments.

    Args:
        builder: called as `builder(num_classes=…, in_chans=…, img_size=…, **options)`; None for a decorator.
        name: the name of the network; the builder's own by default.
        num_classes, img_size, table, params: see `ModelInfo`.

    Returns:
        `create_model` for this network, as a function with the builder's name, documentation and order of arguments; a
        class is returned as it is.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> @register_model(num_classes=5)
        ... def resnet14_cc2(**options):
        ...     return fastroute.models.cifar_resnet.cifar_resnet(14, 2, **options)
        >>> resnet14_cc2(in_chans=1)(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 5])
    """
    if builder is None:
        return partial(
            register_model, name=name, num_classes=num_classes, img_size=img_size, table=table, params=params
        )
    name = name or builder.__name__
    if name in _MODELS:
        raise ValueError(f"name is {name!r}; a network of that name is registered already")

    parameters = inspect.signature(builder).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD] or SIZES

    @wraps(builder, updated=())
    def create(*arguments, **options) -> nn.Module:
        if len(arguments) > len(names):
            raise TypeError(f"{name} takes at most {len(names)} positional arguments; {len(arguments)} were given")
        return create_model(name, **dict(zip(names, arguments, strict=False)), **options)

    create.__doc__ = f"{inspect.getdoc(builder) or name}\n\nTakes the options of `create_model`."
    _MODELS[name], _BUILDERS[name] = ModelInfo(create, num_classes, img_size, table, params), builder
    return builder if isinstance(builder, type) else create


def list_models(filter: str | Sequence[str] = "*") -> list[str]:
    """Return the names of all networks that match a shell pattern, in natural order.

    Args:
        filter: the pattern, such as `"*cc*"`, or several patterns, of which one must match.

    Example:
        >>> list_models("resnet20_cc*")
        ['resnet20_cc2', 'resnet20_cc3', 'resnet20_cc4']
    """
    patterns = [filter] if isinstance(filter, str) else filter
    names = (name for name in _MODELS if any(fnmatchcase(name, pattern) for pattern in patterns))
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def model_info(name: str) -> ModelInfo:
    """Return the facts about a registered network.

    Args:
        name: one of `list_models()`.

    Raises:
        ValueError: there is no network of that name.

    Example:
        >>> model_info("resnet20_cc2").params
        '0.55'
    """
    if name not in _MODELS:
        near = get_close_matches(name, _MODELS, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "list_models() names all there are"
        raise ValueError(f"name is {name!r}; there is no such network: {hint}")
    return _MODELS[name]


def create_model(
    name: str,
    num_classes: int | None = None,
    in_chans: int = 3,
    img_size: int | None = None,
    *,
    pretrained: bool = False,
    pretrained_path: str | Path | None = None,
    gate_norm: str | None = None,
    prior: str | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **options,
) -> nn.Module:
    """Build a network by its name, with fresh or pretrained weights.

    The attribute `specification` of the network says how it was built; checkpoints keep it.

    Args:
        name: one of `list_models()`; "timm:NAME" or "torchvision:NAME", a network of theirs; or
            "package.module:function", a function of your own. The function is imported, and called with those of
            num_classes, in_chans and img_size that it takes.
        num_classes: the number of logits. The default is the thesis's: 10 for networks for small images, 1000 for
            ImageNet's, and 100 for those trained on 100 of ImageNet's classes. 0 returns the features instead,
            except from torchvision's networks.
        in_chans: the channels of the images.
        img_size: the height and width of the images, in pixels; by default 32, or 224 for ImageNet's networks. Networks
            that end in global pooling take images of any size. timm's and torchvision's networks get it only if they
            are built for one size.
        pretrained: whether timm or torchvision downloads its weights.
        pretrained_path: a file of weights of timm, torchvision or this package, `.safetensors` or from `torch.save`. A
            classifier for another number of classes is left out. Weights of the single-path network start every path
            of a multi-path one; see `fastroute.models.weights.load_pretrained`.
        gate_norm, prior: how the routers normalise their gates; see `nn.CrossConnection`.
        features_only: whether to return the feature maps of a network of `list_models()` in place of logits, with the
            paths averaged; see `fastroute.models.features.FeatureMaps`.
        out_indices: the maps to return with `features_only`, counted from the largest; None returns all.
        options: for the network itself, such as `routing=None` for parallel paths without routers.

    Returns:
        a network: `model(x)` → logits (N, num_classes) for x (N, in_chans, H, W), and
        `model(x, return_routing=True)` → (logits, {router name: Routing}).

    Example:
        >>> model = create_model("resnet20_cc2", num_classes=7)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 7])

    Raises:
        TypeError: the name is no text, or a size is no integer.
        ValueError: there is no network of that name, a size is less than 1, the weights do not fit into memory, the
            pretrained weights are of another network, or the network has no maps of out_indices.
        ModuleNotFoundError: the network is timm's or torchvision's, which is not installed.
    """
    from fastroute.models.features import FeatureMaps
    from fastroute.models.specification import Specification  # imports this module

    if out_indices is not None and not features_only:  # an option of the network itself
        options["out_indices"] = out_indices
    specification = Specification.parse(name, kwargs=options, gate_norm=gate_norm, prior=prior)
    if specification.source != "fastroute" and features_only:
        theirs = "timm.create_model(…, features_only=True)" if specification.source == "timm" else "its own library"
        raise ValueError(f"features_only is True; {name!r} is none of list_models(): use {theirs}")
    sizes = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}
    network = specification.build(**sizes, pretrained=pretrained, pretrained_path=pretrained_path, imports=True)
    if not features_only:
        return network
    size = network.specification.img_size or model_info(name).img_size
    return FeatureMaps(network, (network.specification.in_chans, size, size), out_indices)


def build(
    name: str, num_classes: int | None = None, in_chans: int = 3, img_size: int | None = None, **options
) -> nn.Module:
    """Build a network of `list_models()` with fresh weights; see `create_model`."""
    info = model_info(name)
    sizes = {
        "num_classes": info.num_classes if num_classes is None else num_classes,
        "in_chans": in_chans,
        "img_size": info.img_size if img_size is None else img_size,
    }
    if num_classes == 0:
        network = build(name, None, in_chans, img_size, **options)
        if not hasattr(network, "reset_classifier"):
            raise ValueError(f"num_classes is 0; {name} has no reset_classifier to remove its classifier with")
        network.reset_classifier(0)
        return network
    for argument, size in sizes.items():
        if size < 1:
            raise ValueError(f"{argument} is {size}; it must be at least {0 if argument == 'num_classes' else 1}")
    if max(sizes.values()) > LARGE and torch.get_default_device().type != "meta":
        _check_size(name, sizes, options)
    return exact_convolutions(_BUILDERS[name](**sizes, **options))


def _check_size(name: str, sizes: dict[str, int], options: dict) -> None:
    sizes_text = ", ".join(f"{argument} {size}" for argument, size in sizes.items())
    try:
        with torch.device("meta"):
            parameters = list(_BUILDERS[name](**sizes, **options).parameters())
    except (RuntimeError, TypeError, OverflowError) as error:  # a size that no tensor has
        raise ValueError(f"name is {name!r} with {sizes_text}; a size is too large: {in_a_line(error)}") from None
    needed = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    check_memory(needed, f"name is {name!r} with {sizes_text}; its weights would take", "lower the largest of them")
