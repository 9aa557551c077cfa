"""Optimisers, groups of parameters, and schedules of the learning rate."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from fastroute.nn import Router, SparseRouter

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups, momentum: torch.optim.SGD(groups, momentum=momentum),
    "nesterov": lambda groups, momentum: torch.optim.SGD(groups, momentum=momentum, nesterov=True),
    "rmsprop": lambda groups, momentum: torch.optim.RMSprop(groups, momentum=momentum),
    "adam": lambda groups, momentum: torch.optim.Adam(groups),
    "adamw": lambda groups, momentum: torch.optim.AdamW(groups),
}
"""By name, called with groups and momentum, which adam and adamw leave aside. "sgd" is the thesis's, without Nesterov's
look-ahead (timm's "momentum"); "nesterov" has it (timm's "sgd")."""

SCHEDULES = ("step", "multistep", "cosine", "onecycle")
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
ROUTERS = (Router, SparseRouter)
GATE_PARAMETERS = ("w1", "b1", "w2", "b2")


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    norm_weight_decay: float | None = None,
    gate_lr_mult: float = 1.0,
    gate_wd: float | None = None,
) -> list[dict[str, Any]]:
    """The parameters in up to three groups: of gates, of normalisation layers, and all others.

    Gates are the parameters `GATE_PARAMETERS` of `ROUTERS`.

    Args:
        lr, weight_decay: of all that is not said otherwise.
        norm_weight_decay: of normalisation layers; None is `weight_decay`.
        gate_lr_mult: the gates' learning rate, as a multiple of `lr`.
        gate_wd: the gates' weight decay; None is `weight_decay`.
    """
    gates, norms, others = [], [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if isinstance(module, ROUTERS) and name in GATE_PARAMETERS:
                gates.append(parameter)
            elif isinstance(module, NORMS):
                norms.append(parameter)
            else:
                others.append(parameter)
    decays = {"norms": norm_weight_decay, "gates": gate_wd}
    groups = [
        {
            "name": name,
            "params": list(dict.fromkeys(parameters)),  # modules may share one
            "lr": lr * (gate_lr_mult if name == "gates" else 1.0),
            "weight_decay": weight_decay if decays.get(name) is None else decays[name],
        }
        for name, parameters in (("others", others), ("norms", norms), ("gates", gates))
    ]
    return [group for group in groups if group["params"]]


def decay(
    epoch: float, sched: str, epochs: float, decay_epochs: int, decay_milestones: Sequence[int], decay_rate: float
) -> float:
    """What the learning rate is multiplied by, at a number of epochs that need not be whole.

    "step": decay_rate for each `decay_epochs` that have passed; "multistep": for each of `decay_milestones`;
    "cosine": (1 + cos(π · epoch / epochs)) / 2.
    """
    if sched == "step":
        return decay_rate ** math.floor(epoch / decay_epochs)
    if sched == "multistep":
        return decay_rate ** sum(epoch >= milestone for milestone in decay_milestones)
    return (1 + math.cos(math.pi * epoch / epochs)) / 2


def check_warmup(sched: str, warmup_epochs: int, epochs: float) -> None:
    """Raise where a cycle would rise to its end."""
    if sched == "onecycle" and warmup_epochs >= epochs:
        raise ValueError(f"warmup_epochs is {warmup_epochs}; with 'onecycle' it must be below epochs, {epochs:g}")


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
) -> LRScheduler:
    """A scheduler to be stepped after every step of the optimiser.

    Args:
        optimizer: its groups' learning rates are those at the start of the decay, or at the top of the cycle.
        sched: "step", "multistep" and "cosine" as in `decay`; "onecycle" raises the rate over `warmup_epochs`, or the
            first 30 % of the steps, and lowers it to nearly zero over the rest, the momentum going the other way.
        epochs: of the whole run.
        steps: of the whole run.
        warmup_epochs: over these the rate rises linearly from nearly zero, and then goes on as without them.
        decay_epochs, decay_milestones, decay_rate: see `decay`. By default the milestones are at 2/5 and 3/4 of the
            epochs, the thesis's 80 and 150 of 200, and may lie within one.

    Raises:
        ValueError: sched is "onecycle", and the rate would rise to the end.
    """
    if sched == "onecycle":
        check_warmup(sched, warmup_epochs, epochs)
        rates = [group["lr"] for group in optimizer.param_groups]
        rising = warmup_epochs / epochs if warmup_epochs else 0.3
        return OneCycleLR(optimizer, rates, total_steps=steps, pct_start=rising)
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
        return (step + 1) / warmup_steps if step + 1 < warmup_steps else factor(step * epochs / steps)

    return LambdaLR(optimizer, multiple)
