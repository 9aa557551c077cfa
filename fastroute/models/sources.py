"""Build networks from the registry, timm, torchvision, or a function of the user's."""

import contextlib
import hashlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import UninitializedTensorMixin

from fastroute._errors import in_a_line
from fastroute._extras import extra
from fastroute.models._tracing import where
from fastroute.models.registry import build, list_models
from fastroute.models.weights import load_pretrained
from fastroute.nn.gate_norm import GateNorm
from fastroute.nn.router import without_temperatures

KNOWN = "an own network's name (`fastroute models` lists them), timm:NAME, torchvision:NAME or package.module:function"

TRAINING_OPTIONS = re.compile(r"(?:,\s*|\b)(?:inplace|momentum|p)=[^,]*")
"""Options in PyTorch's description of a layer that do not change what it computes in evaluation."""

PLAIN = bool | int | float | str
IGNORED_ATTRIBUTES = re.compile("_|(training|num_classes|in_chans|fused_attn)$|.*(drop|checkpoint|memory_efficient)")
"""Attributes of modules that the layout shows too, or that do not change what a network computes in evaluation."""


class Request(NamedTuple):
    """A network of a source: its name there, its sizes (None takes the source's defaults), and further arguments."""

    name: str
    num_classes: int | None = None
    in_chans: int = 3
    img_size: int | None = None
    kwargs: Mapping[str, Any] = {}


def check_own(name: str) -> None:
    """Check that a name is that of a registered network.

    Raises:
        ValueError: it is not.
    """
    if name not in list_models():
        near = _near(name, list_models()) or f": it must be {KNOWN}"
        raise ValueError(f"name is {name!r}; there is no such network{near}")


def from_registry(request: Request) -> nn.Module:
    """Build a registered network."""
    check_own(request.name)
    with _arguments(request.name):
        return build(request.name, request.num_classes, request.in_chans, request.img_size, **request.kwargs)


def from_timm(request: Request, pretrained: bool = False) -> nn.Module:
    """Build a network of timm's, with its own weights if `pretrained`."""
    text = f"timm:{request.name}"
    with extra("timm", f"model {text!r}"):
        import timm
    if not timm.is_model(request.name):
        raise ValueError(f"model is {text!r}; timm has no such network{_near(request.name, timm.list_models())}")
    try:
        config = timm.models.get_pretrained_cfg(request.name)
    except RuntimeError as error:
        tagged = timm.list_pretrained(f"{request.name.partition('.')[0]}.*")
        raise ValueError(f"model is {text!r}; {error} There are {', '.join(tagged)}") from None
    sizes = {"in_chans": request.in_chans}
    if request.num_classes is not None:
        sizes["num_classes"] = request.num_classes
    if request.img_size is not None and config is not None and config.fixed_input_size:
        sizes["img_size"] = request.img_size
    with _arguments(text), _downloading(text) if pretrained else contextlib.nullcontext():
        return timm.create_model(request.name, pretrained=pretrained, **(sizes | dict(request.kwargs)))


def from_torchvision(request: Request, pretrained: bool = False) -> nn.Module:
    """Build a network of torchvision's, without auxiliary heads, with its own weights if `pretrained`."""
    text = f"torchvision:{request.name}"
    with extra("train", f"model {text!r}"):
        from torchvision import models
    names = models.list_models(module=models)
    if request.name not in names:
        raise ValueError(f"model is {text!r}; torchvision has no such classifier{_near(request.name, names)}")
    if request.num_classes == 0:
        raise ValueError(f"num_classes is 0; {text!r} would return tensors (N, 0): it must be at least 1")
    module = models.get_model_builder(request.name).__module__.rpartition(".")[2]
    sizes = {} if request.num_classes is None else {"num_classes": request.num_classes}
    if request.img_size is not None and module == "vision_transformer":
        sizes["image_size"] = request.img_size
    if request.img_size is not None and module == "maxvit":
        sizes["input_size"] = (request.img_size, request.img_size)
    if module in ("googlenet", "inception"):  # the default, but torchvision warns unless it is given
        sizes["init_weights"] = True
    with _arguments(text):
        network = models.get_model(request.name, weights=None, **(sizes | dict(request.kwargs)))
    network = without_auxiliary_heads(_with_channels(network, request.in_chans))
    if pretrained:
        with _downloading(text):
            weights = models.get_model_weights(request.name).DEFAULT.get_state_dict(progress=False, check_hash=True)
        load_pretrained(network, weights, f"pretrained is True for {text}", say=lambda sentence: None)
    return network


def from_function(request: Request) -> nn.Module:
    """Call the user's function with those of num_classes, in_chans and img_size that it takes."""
    function = import_function(request.name)
    parameters = inspect.signature(function).parameters.values()
    taken = {parameter.name for parameter in parameters}
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    sizes = {name: getattr(request, name) for name in ("num_classes", "in_chans", "img_size")}
    sizes = {name: size for name, size in sizes.items() if size is not None and (name in taken or takes_all)}
    try:
        with _arguments(request.name), _working_folder():
            network = function(**(sizes | dict(request.kwargs)))
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any type, out of the user's function
        raise ValueError(f"model is {request.name!r}; it raised {in_a_line(error)}{where(error)}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"model is {request.name!r}; it returned a {type(network).__name__}, and must return a module")
    if any(isinstance(tensor, UninitializedTensorMixin) for tensor in (*network.parameters(), *network.buffers())):
        raise ValueError(
            f"model is {request.name!r}; it has lazy layers, whose shapes are not known: give them their sizes, or run "
            "the network once in the function"
        )
    return network


def import_function(name: str) -> Callable[..., nn.Module]:
    """Import a function by "package.module:function", also from the working folder.

    Raises:
        ValueError: there is no such module, or no function in it.
    """
    module, _, path = name.partition(":")
    with _working_folder():
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module exists, but an import of its own fails
            if module.endswith(".py"):
                raise ValueError(f"model is {name!r}; name the module without .py: {module[:-3]}:{path}") from None
            raise ValueError(
                f"model is {name!r}; there is no module {error.name!r} here, and a network must be {KNOWN}"
            ) from None
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"model is {name!r}; {module} has no {path!r}")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        kind = type(found).__name__
        raise ValueError(f"model is {name!r}; {path} is a {kind}, and must be a function that returns a network")
    return found


BUILDERS = {
    "fastroute": from_registry,
    "timm": from_timm,
    "torchvision": from_torchvision,
    "function": from_function,
}


def without_auxiliary_heads(network: nn.Module) -> nn.Module:
    """Remove the auxiliary heads of torchvision's Inception and GoogLeNet, in-place, and return the network."""
    if getattr(network, "aux_logits", False) is True:
        network.aux_logits = False
        for name in ("AuxLogits", "aux1", "aux2"):
            if hasattr(network, name):
                setattr(network, name, None)
    return network


def _with_channels(network: nn.Module, in_chans: int) -> nn.Module:
    """Replace the first convolution if images do not have 3 channels, in-place, and return the network."""
    if in_chans == 3:
        return network
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            options = {key: getattr(module, key) for key in ("stride", "padding", "dilation", "padding_mode")}
            first = nn.Conv2d(
                in_chans, module.out_channels, module.kernel_size, bias=module.bias is not None, **options
            )
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, first)
            break
    return network


@contextlib.contextmanager
def _working_folder() -> Iterator[None]:
    """Let modules be imported from the working folder, which is searched last."""
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@contextlib.contextmanager
def _arguments(text: str) -> Iterator[None]:
    """Turn the TypeError for an unknown argument into a ValueError that names the network."""
    try:
        yield
    except TypeError as error:
        if not re.search(r"argument|multiple values", str(error)):
            raise
        if missing := re.search(r"missing \d+ required \S+ arguments?: (.*)", str(error)):
            raise ValueError(
                f"model is {text!r}; its builder needs {missing[1]}: give it by --model-kwargs NAME=VALUE, or name it "
                "num_classes, in_chans or img_size if it is that"
            ) from error
        raise ValueError(f"model is {text!r}; its builder does not take these arguments: {error}") from error


@contextlib.contextmanager
def _downloading(text: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError):
        raise
    except Exception as error:  # a hub and the network raise errors of many types
        raise ValueError(
            f"pretrained is True; the weights of {text} cannot be downloaded ({in_a_line(error)}): download them "
            "elsewhere, and give the file to --pretrained-path"
        ) from error


def _near(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=3)
    return f": did you mean {', '.join(near)}?" if near else ""


def layout(network: nn.Module) -> str:
    """Return a digest of what a network computes: its modules, their options and hooks, and the shapes of its tensors.

    Temperatures of routers, which a state dict has once they are not 1, do not count, nor do options that only matter
    in training.
    """
    modules = [(name, type(module).__name__, *_computation(module)) for name, module in network.named_modules()]
    state = without_temperatures(network.state_dict(), network)
    tensors = [(name, *value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)]
    return hashlib.sha256(repr((modules, tensors)).encode()).hexdigest()


def _computation(module: nn.Module) -> tuple[str, bool, int]:
    """Return PyTorch's description of a layer, and what changes its forward: one on the instance, and hooks."""
    described = module.extra_repr() if type(module).extra_repr.__module__.startswith("torch.nn.") else ""
    if isinstance(module, GateNorm):
        described = module.kind
    forward = getattr(vars(module).get("forward"), "__func__", vars(module).get("forward"))
    own = forward is not None and not getattr(forward, "same_results", False)
    return TRAINING_OPTIONS.sub("", described), own, len(module._forward_hooks) + len(module._forward_pre_hooks)


def _same_options(network: nn.Module, built: nn.Module) -> bool:
    """Return whether the numbers and texts among the attributes of two networks of one layout are equal.

    Those of dropout and of checkpointing only matter in training, and the layout shows sizes.
    """
    for module, other in zip(network.modules(), built.modules(), strict=True):
        for name, value in vars(other).items():
            if IGNORED_ATTRIBUTES.match(name) or isinstance(module, _DropoutNd):
                continue
            is_plain = not any(map(torch.is_tensor, value)) if isinstance(value, tuple) else isinstance(value, PLAIN)
            if is_plain and getattr(module, name, None) != value:
                return False
    return True


def inferred(network: nn.Module) -> tuple[str, Request] | None:
    """Return the source of a network of timm or torchvision, and a request that builds the same layers; or None."""
    source = type(network).__module__.partition(".")[0]
    candidates = {"timm": _as_timm, "torchvision": _as_torchvision}.get(source)
    if candidates is None:
        return None
    wanted = layout(network), repr(network)
    for request in candidates(network):
        try:
            with torch.device("meta"):
                built = BUILDERS[source](request)
        except Exception:  # an unknown argument, or an operator that the meta device lacks
            continue
        if (layout(built), repr(built)) == wanted and _same_options(network, built):
            return source, request
    return None


def _as_timm(network: nn.Module) -> Iterable[Request]:
    config = getattr(network, "pretrained_cfg", None) or {}
    if architecture := config.get("architecture"):
        name = ".".join(part for part in (architecture, config.get("tag")) if part)
        size = getattr(getattr(network, "patch_embed", None), "img_size", None)
        fixed = size[0] if config.get("fixed_input_size") and size else None
        yield Request(name, getattr(network, "num_classes", None), _channels(network), fixed)


def _as_torchvision(network: nn.Module) -> Iterable[Request]:
    from torchvision import models

    last = next((m for m in reversed(list(network.modules())) if isinstance(m, nn.Linear | nn.Conv2d)), None)
    classes = getattr(last, "out_features", getattr(last, "out_channels", None))
    kwargs = {"transform_input": True} if getattr(network, "transform_input", False) is True else {}
    for name in models.list_models(module=models):
        if models.get_model_builder(name).__module__ == type(network).__module__:
            size = getattr(network, "image_size", None)
            yield Request(name, classes, _channels(network), size if isinstance(size, int) else None, kwargs)


def _channels(network: nn.Module) -> int:
    return next((module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d)), 3)
