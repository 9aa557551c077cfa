"""Optimisers, parameter groups and learning-rate schedules."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from fastroute.models.weights import without_decay
from fastroute.nn import Router, SparseRouter

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups, momentum: torch.optim.SGD(groups, momentum=momentum),
    "nesterov": lambda groups, momentum: torch.optim.SGD(groups, momentum=momentum, nesterov=True),
    "rmsprop": lambda groups, momentum: torch.optim.RMSprop(groups, momentum=momentum),
    "adam": lambda groups, momentum: torch.optim.Adam(groups),
    "adamw": lambda groups, momentum: torch.optim.AdamW(groups),
}
"""Optimisers by name, from parameter groups and a momentum, which adam and adamw ignore. "sgd" has plain momentum, as
in the thesis (timm's "momentum"); "nesterov" has Nesterov's (timm's "sgd")."""

SCHEDULES = ("step", "multistep", "cosine", "onecycle")
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
ROUTERS = (Router, SparseRouter)
GATE_PARAMETERS = ("w1", "b1", "w2", "b2")
GROUP_OPTIONS = (
    *("lr", "weight_decay", "norm_weight_decay", "gate_lr_mult", "gate_wd"),
    *("filter_bias_and_bn", "layer_decay"),
)
"""The arguments of `parameter_groups`."""


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    norm_weight_decay: float | None = None,
    gate_lr_mult: float = 1.0,
    gate_wd: float | None = None,
    filter_bias_and_bn: bool = False,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Group parameters into those of gates, of normalisation layers, and all others; with a filter, also biases.

    Gates are the parameters `GATE_PARAMETERS` of `ROUTERS`, even if they are parametrised or pruned.

    Args:
        model: the network. Its frozen parameters are left out.
        lr: the learning rate.
        weight_decay: of all parameters, unless one of the following options applies.
        norm_weight_decay: of normalisation layers; None is `weight_decay`.
        gate_lr_mult: the gates' learning rate, as a multiple of `lr`.
        gate_wd: the gates' weight decay; None is `weight_decay`.
        filter_bias_and_bn: whether biases, other vectors, normalisation layers and what the network names in
            `no_weight_decay()`, such as position embeddings, have no weight decay, as in timm.
        layer_decay: the learning rate of each layer, as a share of that of the layer after it; see `layers`.

    Returns:
        groups for an optimiser, each with "name", "params", "lr" and "weight_decay".
    """
    gates, levels, last = _gate_parameters(model), {}, 0
    if layer_decay is not None:
        for last, layer in enumerate(layers(model)):
            for module in layer:
                levels |= {id(parameter): last for parameter in module.parameters()}
    decays = {"norms": norm_weight_decay, "gates": gate_wd}
    if filter_bias_and_bn:
        decays |= {"biases": 0.0, "gate_biases": 0.0, "norms": norm_weight_decay or 0.0}
    found = {name: {} for name in ("others", "biases", "norms", "gates", "gate_biases")}
    named = without_decay(model) if filter_bias_and_bn else ()
    exempt = {id(model.get_parameter(name)) for name in named}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            bias = filter_bias_and_bn and (parameter.dim() <= 1 or name.startswith(("bias", "b1", "b2")))
            bias |= id(parameter) in exempt
            if id(parameter) in gates:
                kind = "gate_biases" if bias else "gates"
            elif isinstance(module, NORMS):
                kind = "norms"
            else:
                kind = "biases" if bias else "others"
            level = levels.get(id(parameter), 0)
            found[kind].setdefault(level, []).append(parameter)
    return [
        {
            "name": kind if layer_decay is None else f"{kind}.{level}",
            "params": list(dict.fromkeys(parameters)),  # modules may share one
            "lr": lr * (gate_lr_mult if kind.startswith("gate") else 1.0) * (layer_decay or 1.0) ** (last - level),
            "weight_decay": weight_decay if decays.get(kind) is None else decays[kind],
        }
        for kind, by_level in found.items()
        for level, parameters in sorted(by_level.items())
    ]


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the highest learning rate of an optimiser's groups, apart from gates', which have a multiple of it."""
    groups = optimizer.param_groups
    return max(group["lr"] for group in [g for g in groups if "gate" not in g.get("name", "")] or groups)


def _gate_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters of gates, direct or behind a parametrisation."""
    found = set()
    for router in model.modules():
        if not isinstance(router, ROUTERS):
            continue
        for name in GATE_PARAMETERS:
            # Of `torch.nn.utils.prune`, and of the older `weight_norm`.
            found |= {id(router._parameters.get(name + end)) for end in ("", "_orig", "_g", "_v")}
            if is_parametrized(router, name):
                found |= {id(parameter) for parameter in router.parametrizations[name].parameters()}
    return found


def layers(network: nn.Module) -> list[list[nn.Module]]:
    """Return the layers of a network in order: its children, with each `nn.Sequential` replaced by its layers.

    Parallel paths are one layer, and a normalisation layer belongs to the layer before it.

    Args:
        network: any network.

    Returns:
        the modules of each layer.
    """
    found = []
    for module in _in_order(network):
        if isinstance(module, NORMS) and found:
            found[-1].append(module)
        else:
            found.append([module])
    return found


def _in_order(module: nn.Module) -> Iterator[nn.Module]:
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    for child in children:
        if len(children) == 1 or isinstance(child, nn.Sequential):
            yield from _in_order(child) if any(child.children()) else [child]
        else:
            yield child


def decay(
    epoch: float, sched: str, epochs: float, decay_epochs: int, decay_milestones: Sequence[int], decay_rate: float
) -> float:
    """Return the factor of the learning rate at a number of epochs, which need not be whole.

    Args:
        epoch: epochs since the start.
        sched: "step" multiplies by `decay_rate` every `decay_epochs`, "multistep" at each of `decay_milestones`, and
            "cosine" is (1 + cos(π · epoch / epochs)) / 2.
        epochs: of the whole run.
        decay_epochs, decay_milestones, decay_rate: of the schedule.
    """
    if sched == "step":
        return decay_rate ** math.floor(epoch / decay_epochs)
    if sched == "multistep":
        return decay_rate ** sum(epoch >= milestone for milestone in decay_milestones)
    return (1 + math.cos(math.pi * epoch / epochs)) / 2


def check_warmup(sched: str, warmup_epochs: int, epochs: float) -> None:
    """Check that the warm-up fits in the run.

    Args:
        sched: the schedule.
        warmup_epochs: epochs over which the learning rate rises.
        epochs: of the whole run.

    Raises:
        ValueError: the warm-up is longer than the run, or as long with "onecycle", whose rate would never fall.
    """
    if sched == "onecycle" and warmup_epochs >= epochs:
        raise ValueError(f"warmup_epochs is {warmup_epochs}; with 'onecycle' it must be below epochs, {epochs:g}")
    if warmup_epochs > epochs:
        raise ValueError(f"warmup_epochs is {warmup_epochs}; it must be at most epochs, {epochs:g}")


def check_length(batches: float, steps: float) -> None:
    """Check that rates can follow the length of a run.

    Args:
        batches: of an epoch; infinite if the data have no length.
        steps: of the optimiser in the run.

    Raises:
        ValueError: there is no batch, or the data or the run have no length.
    """
    if batches == 0:
        raise ValueError("the data have no batch to train on: give more images, a smaller batch, or drop_last=False")
    if math.isinf(batches):
        raise ValueError(
            "the data have no length, and learning rates follow the steps of an epoch: give a loader that has one "
            "(`__len__`), as WebDataset's has after with_length(n), or a Trainer with limit_train_batches=n"
        )
    if math.isinf(steps):
        raise ValueError("the run has no end, and learning rates follow its length: give max_epochs or max_steps")


def scheduler(
    optimizer: torch.optim.Optimizer,
    sched: str,
    *,
    epochs: float,
    steps: int,
    warmup_epochs: int = 0,
    decay_epochs: int = 30,
    decay_milestones: Sequence[int] | None = None,
    decay_rate: float = 0.1,
    min_lr: float = 0.0,
    warmup_lr: float = 0.0,
) -> LRScheduler:
    """Make a scheduler that must be stepped after every step of the optimiser.

    Args:
        optimizer: the optimiser; its groups have the learning rates at the start of the decay, or at the top of the
            cycle.
        sched: "step", "multistep" and "cosine" as in `decay`; "onecycle" raises the rate over `warmup_epochs`, or the
            first 30 % of the steps, and lowers it to nearly zero over the rest. The momentum cycles from 0.95 to 0.85
            and back; the optimiser's own value is ignored.
        epochs: of the whole run.
        steps: of the whole run.
        warmup_epochs: epochs over which the rate rises linearly from `warmup_lr`, to follow `sched` from then on.
        decay_epochs, decay_milestones, decay_rate: see `decay`. By default the milestones are at 2/5 and 3/4 of the
            epochs, the thesis's 80 and 150 of 200, and may lie within one.
        min_lr: the lowest rate of the group with the highest one, gates aside; other groups keep their ratio to it.
            "cosine" ends there, steps do not go below, and "onecycle" ends near it unless it is 0.
        warmup_lr: the rate of the same group at the start of the warm-up, except with "onecycle".

    Returns:
        the scheduler.

    Raises:
        ValueError: `sched` is "onecycle", and the rate would never fall.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    least, first = (rate / learning_rate(optimizer) for rate in (min_lr, warmup_lr))
    if sched == "onecycle":
        check_warmup(sched, warmup_epochs, epochs)
        rising = warmup_epochs / epochs if warmup_epochs else 0.3
        if math.isclose(rising * steps, 1):  # PyTorch divides by the steps that follow the first one
            rising = (1 + 1e-9) / steps
        falling = {"final_div_factor": 1 / (25 * least)} if least else {}  # the cycle begins at 1/25 of the top
        return OneCycleLR(optimizer, rates, total_steps=steps, pct_start=rising, **falling)
    milestones = decay_milestones or (0.4 * epochs, 0.75 * epochs)
    factor = partial(
        decay,
        sched=sched,
        epochs=epochs,
        decay_epochs=decay_epochs,
        decay_milestones=milestones,
        decay_rate=decay_rate,
    )
    warmup_steps = warmup_epochs * steps / epochs

    def multiple(step: int) -> float:
        if step + 1 < warmup_steps:
            return first + (1 - first) * (step + 1) / warmup_steps
        share = factor(step * epochs / steps)
        return least + (1 - least) * share if sched == "cosine" else max(share, least)

    return LambdaLR(optimizer, multiple)
