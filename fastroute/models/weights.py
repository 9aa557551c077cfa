"""Read weights from files, and start a network from them; those of a single-path network start every path."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastroute._errors import in_a_line
from fastroute._files import DamagedFile, read_tensors
from fastroute.nn.router import temperatures, without_temperatures

AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
"""Prefixes of the heads that torchvision's Inception and GoogLeNet use only in training."""

SCALE = "path_scale"
"""The buffer of a network made by `multipath(init="copy")` that is the factor of the first router's input."""

SCALED = "its paths were started with init='copy': build the network with init='copy' (--init copy) too"
"""Why weights with such a factor do not fit a network without it."""

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of the names in a network that was saved within a wrapper."""

SHOWN = 3


def read_weights(path: str | Path, name: str = "pretrained_path", averaged: bool = True) -> dict[str, Tensor]:
    """Read the tensors of a network's state_dict from a file.

    Args:
        path: a file of `torch.save`, a `.safetensors` or a checkpoint, of timm, torchvision or this package.
        name: the name of the argument that gave the path, for messages.
        averaged: whether to take the moving average if a checkpoint has one.

    Returns:
        name → tensor.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no weights, or is damaged.
        ModuleNotFoundError: the file is a `.safetensors`, and safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{name} is {path}; there is no such file")
    try:
        content = read_tensors(path)
    except (DamagedFile, ModuleNotFoundError) as error:
        raise type(error)(f"{name} is {path}; {error}") from error
    except Exception as error:  # readers raise errors of many types for bytes of another format
        raise ValueError(f"{name} is {path}; it holds no weights: {in_a_line(error)}") from error
    weights = state_dict_of(content, f"{name} is {path}", averaged)
    return {key: value for key, value in weights.items() if isinstance(value, Tensor)}


def state_dict_of(content: object, where: str, averaged: bool = True) -> dict:
    """Return the network's state_dict out of the content of a file; see `network_weights`.

    Args:
        content: as `read_tensors` returns it.
        where: the argument and its value, such as "pretrained_path is resnet18.pth", for the message.
        averaged: whether to prefer a moving average.

    Raises:
        ValueError: there is no state_dict.
    """
    weights = network_weights(content, averaged) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise ValueError(f"{where}; it holds a {type(weights).__name__}, and must hold a state_dict")
    return weights


def network_weights(checkpoint: dict, averaged: bool = True) -> dict[str, Tensor]:
    """Return the network's state_dict from a checkpoint of this or another trainer; a state_dict is returned as it is.

    A run with a moving average has it under `state_dict`, and the trained weights under `current_model_state`. timm has
    the average under `state_dict_ema`; other trainers have the weights under `model`.

    Args:
        checkpoint: the content of a file.
        averaged: whether to take the moving average if there is one.
    """
    if "state_dict" not in checkpoint:
        return checkpoint["model"] if isinstance(checkpoint.get("model"), dict) else checkpoint
    weights = checkpoint["state_dict"]
    if averaged:
        weights = checkpoint.get("state_dict_ema") or weights
    else:
        weights = checkpoint.get("current_model_state", weights)
    if not isinstance(weights, dict):
        return weights
    if any(name.startswith("model.") for name in weights):  # a training run also keeps its losses' tensors
        return {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    return {name.removeprefix("module."): value for name, value in weights.items()}  # DistributedDataParallel's prefix


def load_state(network: nn.Module, content: object, where: str, averaged: bool = True) -> None:
    """Load a network's weights from the content of a file, in-place.

    Args:
        network: the network.
        content: a state_dict or a checkpoint, as `read_tensors` returns it.
        where: the argument and its value, such as "checkpoint is best.ckpt", for messages.
        averaged: whether to prefer the moving average to the trained weights.

    Raises:
        ValueError: there is no state_dict, or it is of another network; the message summarises the differences.
    """
    weights = without_wrappers(state_dict_of(content, where, averaged), network)
    if reason := misfit(network, weights):
        raise ValueError(f"{where}; {reason}")
    network.load_state_dict(weights)


def without_wrappers(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights by a network's own names, without the prefixes of DistributedDataParallel and `torch.compile`."""
    known = model.state_dict().keys() | {*(path_names(model) or {}).values()}
    while not known & weights.keys():
        prefix = next((p for p in WRAPPERS if all(name.startswith(p) for name in weights)), None)
        if prefix is None or not weights:
            break
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return dict(weights)


def differences(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Summarise missing, unexpected and mismatched tensors in a line; "" if there are none."""
    given = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    shapes = ((name, given[name].shape, value.shape) for name, value in wanted.items() if name in given)
    kinds = {
        "missing": [name for name in wanted if name not in given],
        "unexpected": [name for name in given if name not in wanted],
        "of another shape": [f"{name} {(*a,)} for {(*b,)}" for name, a, b in shapes if a != b],
    }
    shown = ((kind, names, _some(names)) for kind, names in kinds.items() if names)
    return "; ".join(f"{len(names)} {kind} ({some})" for kind, names, some in shown)


def misfit(model: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """Say how weights differ from those of a network, and what to do where that is known; None if they fit."""
    wanted, weights = (without_temperatures(state, model) for state in (model.state_dict(), weights))
    reason = differences(wanted, weights)
    if not reason:
        return None
    extra = weights.keys() - wanted.keys()
    if extra and all(map(is_scale, extra)) and not wanted.keys() - weights.keys():
        return SCALED
    same = {name: value for name, value in weights.items() if name in wanted and isinstance(value, Tensor)}
    others = _other_classes(model, wanted, same) if same else {}
    rest, given = ({k: v for k, v in state.items() if k not in others} for state in (wanted, weights))
    if others and not differences(rest, given):
        classes = next(iter(others.values()))
        return (
            f"its classifier is of {classes:,} classes: to start another one, give the file as pretrained_path "
            "(--pretrained-path)"
        )
    routed = any(name.partition(".")[0].endswith("_router") for name in extra)
    advice = "; they are of a multi-path network: convert yours by multipath, with the arguments of its training"
    return f"its weights are of another network: {reason}{advice if routed else ''}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + ", …" * (len(names) > SHOWN)


def fits(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Return whether weights have all of a network's tensors by name, of any shape."""
    return {*_tensors(model)} - {*_dispensable(model)} <= weights.keys()


@torch.no_grad()
def load_pretrained(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    where: str,
    *,
    noise: float = 0.01,
    say: Callable[[str], None] = print,
) -> None:
    """Start a network from weights of another task, or of its single-path form.

    Tensors are matched by name. A classifier for another number of classes is left out: the network keeps its fresh
    one, or none if it was removed. A first convolution for another number of channels is adapted as in timm: summed to
    one channel, or repeated and scaled. If a network made by `multipath` gets the weights of the network that it was
    made of, every path starts from them, all but the first with noise, and the routers stay fresh.

    Args:
        model: the network, changed in-place.
        weights: from `read_weights`.
        where: the argument and its value, such as "pretrained_path is resnet18.pth", for messages.
        noise: the standard deviation of the noise on each weight of a convolution or dense layer of all paths but the
            first, relative to that of the weights.
        say: called with a sentence about each change beyond copying.

    Raises:
        ValueError: the weights are of another network.
    """
    wanted = _tensors(model)
    given = {_without_dot(name): value for name, value in without_wrappers(weights, model).items()}
    seeded = not fits(model, given) and (names := path_names(model)) is not None
    names = names if seeded else {name: name for name in wanted}
    tempered = temperatures(model)
    if seeded:
        tempered = {_original(model.origins, name) for name in tempered if name.partition(".")[0] in model.origins}
    weights = {name: value for name, value in given.items() if name not in tempered}
    chosen = {name: weights[source] for name, source in names.items() if source in weights}
    if missing := [name for name in names if name not in chosen and name not in _dispensable(model)]:
        own = {name: wanted[name] for name in names}
        sources = set(names.values())
        used = chosen | {name: value for name, value in weights.items() if name not in sources}
        reason = differences(own, used) if len(missing) < len(own) else f"it has none of the {len(own)} tensors"
        raise ValueError(f"{where}; its weights are of another network: {reason}")
    extra = weights.keys() - set(names.values()) - _removed(model, seeded)
    extra = sorted(name for name in extra if not name.startswith(AUXILIARY))
    if extra and all(map(is_scale, extra)):
        raise ValueError(f"{where}; {SCALED}")
    if extra:
        raise ValueError(f"{where}; its weights are of another network: {len(extra)} unexpected ({_some(extra)})")
    chosen, adapted = _adapted_channels(wanted, chosen)
    left_out = _other_classes(model, wanted, chosen)
    chosen = {name: value for name, value in chosen.items() if name not in left_out}
    if reason := differences({name: wanted[name] for name in chosen}, chosen):
        raise ValueError(f"{where}; its weights are of another network: {reason}")
    for name in _scales(model) if not seeded else ():
        wanted[name].fill_(1)  # what a network without this factor computes
    learned = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for name, value in chosen.items():
        wanted[name].copy_(value)
        if seeded and noise and name in learned and _path(name) > 0 and value.dim() > 1 and value.numel() > 1:
            wanted[name].add_(torch.randn_like(wanted[name]) * (noise * wanted[name].std()))
    for name in given.keys() - weights.keys() if not seeded else ():
        model.get_submodule(name.rpartition(".")[0]).temperature = given[name].item()
    if seeded:
        say(f"{where}; it starts all paths, with noise of {noise:.0%} on all but the first; routers start fresh")
    for name in adapted:
        say(f"{where}; {name} is adapted to images of {wanted[name].shape[1]} channels")
    if left_out:
        first = next(iter(left_out))
        say(
            f"{where}; its classifier is of {left_out[first]:,} classes and is left out: "
            f"{', '.join(left_out)} for {wanted[first].shape[0]:,} classes start fresh"
        )


def path_names(model: nn.Module) -> dict[str, str] | None:
    """Map each tensor of a network made by `multipath` to its name in the original network; routers are left out.

    Returns:
        name → original name; None for any other network.
    """
    origins = getattr(model, "origins", None)
    if origins is None:
        return None
    names = []
    for part, layer in model.named_children():
        if part in origins:
            names += [f"{part}.{name}" for name in _tensors(layer)]
    return {name: _original(origins, name) for name in names if not name.endswith(f".{SCALE}")}


def without_decay(model: nn.Module) -> set[str]:
    """Return the names of the parameters that a network or its modules name in `no_weight_decay()`, as timm's do."""
    names = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if callable(own := getattr(module, "no_weight_decay", None))
        for name in own()
    }
    return names & {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _original(origins: Mapping[str, str], name: str) -> str:
    part, _, rest = name.split(".", 2)
    return f"{origins[part]}.{rest}" if origins[part] else rest


def _removed(model: nn.Module, seeded: bool) -> set[str]:
    """Return the names in a file of the tensors of the classifier that `reset_classifier(0)` removed."""
    if getattr(model, "num_classes", None) != 0 or not hasattr(model, "get_classifier"):
        return set()
    layers = set(model.get_classifier().modules())
    modules = [name for name, module in model.named_modules() if module in layers]
    names = {f"{module}.{tensor}" for module in modules for tensor in ("weight", "bias")}
    return {_original(model.origins, name) for name in names} if seeded else names


def _path(name: str) -> int:
    return int(name.split(".")[1])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    state = without_temperatures(model.state_dict(), model)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _dispensable(model: nn.Module) -> list[str]:
    """Return the tensors that a file may lack: batch counters, as of early PyTorch, and the scales of started paths."""
    return [name for name in _tensors(model) if name.endswith("num_batches_tracked")] + _scales(model)


def _scales(model: nn.Module) -> list[str]:
    """Return the names of the factors of the first routers' inputs; see `SCALE`."""
    return [name for name in _tensors(model) if is_scale(name)]


def is_scale(name: str) -> bool:
    """Return whether a tensor is the factor of a first router's input; see `SCALE`."""
    return name.rpartition(".")[2] == SCALE


def _without_dot(name: str) -> str:
    """Return the name of a DenseNet's tensor without the dot that older files of torchvision's have in it."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name)


def _adapted_channels(wanted: dict, given: dict) -> tuple[dict[str, Tensor], list[str]]:
    """Adapt the first convolutions' weights to the channels of the network's images; also return their names."""
    adapted = {}
    for name, value in given.items():
        shape = wanted[name].shape
        image = value.dim() == 4 and value.shape[1] == 3 and len(shape) == 4 and shape[1] != 3
        if image and (shape[0], *shape[2:]) == (value.shape[0], *value.shape[2:]):
            channels = shape[1]
            repeated = value.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)
            adapted[name] = value.sum(1, keepdim=True) if channels == 1 else repeated
    return given | adapted, list(adapted)


def _other_classes(model: nn.Module, wanted: dict, given: dict) -> dict[str, int]:
    """Return the tensors of a classifier for another number of classes, which differ only in their first size.

    If the network's number of classes is not known, they must belong to the last module of each path.
    """
    others = {
        name: value.shape[0]
        for name, value in given.items()
        if value.shape != wanted[name].shape and value.dim() and value.shape[1:] == wanted[name].shape[1:]
    }
    classes = getattr(getattr(model, "specification", None), "num_classes", None)
    if classes is not None:
        last = all(wanted[name].shape[0] == classes for name in others)
    else:
        last = {_module_of(name) for name in others} == {_module_of(list(given)[-1])}
    return others if last and len(set(others.values())) == 1 else {}


def _module_of(name: str) -> str:
    """Return the module of a tensor, without the number of its path."""
    module = name.rpartition(".")[0].split(".")
    return ".".join(part for i, part in enumerate(module) if not (i == 1 and part.isdigit()))
