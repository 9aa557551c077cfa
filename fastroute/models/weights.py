"""Weights out of files: of a network itself, or of one path, which then starts every path of a multi-path network."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastroute._errors import in_a_line
from fastroute._files import DamagedFile, read_tensors
from fastroute.nn import ParallelPaths, Router
from fastroute.nn.router import without_temperatures

AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
"""Where torchvision's Inception and GoogLeNet have the heads that only their own training uses."""

SHOWN = 3


def read_weights(path: str | Path, name: str = "pretrained_path", averaged: bool = True) -> dict[str, Tensor]:
    """The tensors of a network's state_dict out of a file: of `torch.save`, a `.safetensors`, or a checkpoint.

    Args:
        path: of timm, torchvision or this package.
        name: the argument that it was given as, for messages.
        averaged: whether a moving average is taken where a checkpoint has one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no weights, or is damaged.
        ModuleNotFoundError: it is a `.safetensors`, and safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{name} is {path}; there is no such file")
    try:
        content = read_tensors(path)
    except (DamagedFile, ModuleNotFoundError) as error:
        raise type(error)(f"{name} is {path}; {error}") from error
    except Exception as error:  # whatever a reader does with bytes that are not its own
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
    """The network's state_dict out of a checkpoint, of ours or another trainer's; a state_dict is given back as it is.

    With a moving average, Lightning keeps that as `state_dict` and the weights as trained as `current_model_state`;
    timm keeps it as `state_dict_ema`, and other trainers have the weights as `model`.
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
    if any(name.startswith("model.") for name in weights):  # of a training run, which has more than the network
        return {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    return {name.removeprefix("module."): value for name, value in weights.items()}  # as from DistributedDataParallel


def differences(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What keeps weights from being those wanted, in a line; nothing where they are."""
    wanted, given = without_temperatures(wanted), without_temperatures(given)
    given = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    shapes = ((name, given[name].shape, value.shape) for name, value in wanted.items() if name in given)
    kinds = {
        "missing": [name for name in wanted if name not in given],
        "unexpected": [name for name in given if name not in wanted],
        "of another shape": [f"{name} {(*a,)} for {(*b,)}" for name, a, b in shapes if a != b],
    }
    shown = ((kind, names, _some(names)) for kind, names in kinds.items() if names)
    return "; ".join(f"{len(names)} {kind} ({some})" for kind, names, some in shown)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + ", …" * (len(names) > SHOWN)


def fits(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether a file's tensors have the names of a network's, whatever their shapes."""
    return {*_tensors(model)} - {*_counters(model)} <= weights.keys()


@torch.no_grad()
def load_pretrained(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    where: str,
    *,
    noise: float = 0.01,
    say: Callable[[str], None] = print,
) -> None:
    """Start a network from weights of another task, or of one path.

    Tensors go by their names. A classifier for another number of classes is left out: the network keeps its own fresh
    one. A first convolution for another number of channels is adapted as timm does it: summed to one channel, or
    repeated and scaled. Where a multi-path network made by `multipath` gets the weights of the network that it was made
    of, every path starts with them, all but the first with noise, and its routers stay fresh.

    Args:
        model: gets them.
        weights: of `read_weights`.
        where: the argument and its value, such as "pretrained_path is resnet18.pth", for messages.
        noise: the standard deviation of the noise on each weight of a convolution or dense layer of further paths, as
            a share of that of the weights themselves.
        say: gets a sentence for each thing that was done beyond copying.

    Raises:
        ValueError: they are of another network.
    """
    wanted = _tensors(model)
    weights = {_modern(name): value for name, value in weights.items()}
    seeded = not fits(model, weights) and (names := path_names(model)) is not None
    names = names if seeded else {name: name for name in wanted}
    chosen = {name: weights[source] for name, source in names.items() if source in weights}
    if missing := [name for name in names if name not in chosen and name not in _counters(model)]:
        own = {name: wanted[name] for name in names}
        sources = set(names.values())
        used = chosen | {name: value for name, value in weights.items() if name not in sources}
        reason = differences(own, used) if len(missing) < len(own) else f"it has none of the {len(own)} tensors"
        raise ValueError(f"{where}; its weights are of another network: {reason}")
    extra = weights.keys() - set(names.values())
    if extra := sorted(name for name in extra if not name.startswith(AUXILIARY)):
        raise ValueError(f"{where}; its weights are of another network: {len(extra)} unexpected ({_some(extra)})")
    chosen, adapted = _adapted_channels(wanted, chosen)
    left_out = _other_classes(model, wanted, chosen)
    chosen = {name: value for name, value in chosen.items() if name not in left_out}
    if reason := differences({name: wanted[name] for name in chosen}, chosen):
        raise ValueError(f"{where}; its weights are of another network: {reason}")
    for name, value in chosen.items():
        wanted[name].copy_(value)
        if seeded and noise and _path(name) > 0 and value.dim() > 1 and value.numel() > 1:
            wanted[name].add_(torch.randn_like(wanted[name]) * (noise * wanted[name].std()))
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
    """For each tensor of a network made by `multipath` but its routers', the name in the network it was made of.

    None for any other network.
    """
    origins = getattr(model, "origins", None)
    if origins is None:
        return None
    names = {}
    for part, layer in model.named_children():
        if isinstance(layer, ParallelPaths):
            prefix = f"{origins[part]}." if origins[part] else ""
            for i, path in enumerate(layer):
                names |= {f"{part}.{i}.{name}": prefix + name for name in _tensors(path)}
        elif not isinstance(layer, Router):
            return None
    return names


def _path(name: str) -> int:
    return int(name.split(".")[1])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _counters(model: nn.Module) -> list[str]:
    """What files of early PyTorch lack."""
    return [name for name in _tensors(model) if name.endswith("num_batches_tracked")]


def _modern(name: str) -> str:
    """Return the name of a DenseNet's tensor without the dot that older files of torchvision's have in it."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name)


def _adapted_channels(wanted: dict, given: dict) -> tuple[dict[str, Tensor], list[str]]:
    """With the first convolutions' weights for as many channels as the network's images have."""
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
    """The tensors of a classifier for another number of classes: they differ in their first size alone.

    Of a network whose number of classes is not known, they must be of the last module, in each path.
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
        last = {_within(name) for name in others} == {_within(list(given)[-1])}
    return others if last and len(set(others.values())) == 1 else {}


def _within(name: str) -> str:
    """The module of a tensor, in every path the same."""
    module = name.rpartition(".")[0].split(".")
    return ".".join(part for i, part in enumerate(module) if not (i == 1 and part.isdigit()))
