"""Check that a run can be resumed with what a checkpoint holds: weights, optimisers, schedules."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from fastroute.nn.router import without_temperatures
from fastroute.training.capturable import CAPTURABLE
from fastroute.training.optim import GROUP_OPTIONS, OPTIMIZERS, parameter_groups
from fastroute.training.saved_fields import (
    CELL,
    COUNT,
    DICTS,
    FLAG,
    MAPPING,
    MOST,
    NATURAL,
    NUMBER,
    SCALAR,
    STEP,
    TENSOR,
    TEXT,
    Field,
    check_each,
    is_number,
    named,
    short,
)

STATES = {"RMSprop": ("square_avg", "step"), "Adam": ("exp_avg", "exp_avg_sq", "step")}
"""The state without which an optimiser cannot continue, by the name of its class."""


def check_training_state(checkpoint: dict, module: pl.LightningModule, path: str | Path, name: str = "resume") -> None:
    """Check that a module and its optimisers can be restored from a checkpoint.

    Args:
        checkpoint: as `torch.load` returns it, after `check_fields`.
        module: the module to train.
        path: of the file, for messages.
        name: the argument that the file was given as, for messages.

    Raises:
        ValueError: a field is missing, or of another type, shape or network.
    """
    with named(path, name):
        _check_state(checkpoint, module, _new_optimizers(module))


def _new_optimizers(module: pl.LightningModule) -> list[torch.optim.Optimizer]:
    if "opt" in module.hparams:  # its own `configure_optimizers` asks the trainer for the number of steps
        options = module.hparams
        groups = parameter_groups(module, **{name: options[name] for name in GROUP_OPTIONS})
        return [(CAPTURABLE if options.cuda_graphs else OPTIMIZERS)[options.opt](groups, options.momentum)]
    made = module.configure_optimizers()
    if isinstance(made, tuple):  # optimisers and schedules
        made, _ = made
    return made if isinstance(made, list) else [made]


def _check_state(checkpoint: dict, module: pl.LightningModule, optimizers: list[torch.optim.Optimizer]) -> None:
    for name in ("loops", "callbacks", "optimizer_states", "lr_schedulers"):
        if name not in checkpoint:
            raise ValueError(f"its {name} is missing, so a run cannot be resumed from it; use it as initial_checkpoint")
    for name in ("state_dict", "current_model_state"):
        if name in checkpoint:
            _check_shapes(*(_own(state, module) for state in (module.state_dict(), checkpoint[name])), name)
    if "current_model_state" in checkpoint and "averaging_state" not in checkpoint:
        raise ValueError("its averaging_state is missing, expected it beside current_model_state")
    if "sched" in module.hparams:
        check_each(checkpoint["hyper_parameters"], {"sched": TEXT}, "hyper_parameters", required=True)
    states = checkpoint["optimizer_states"]
    if len(states) != len(optimizers):
        raise ValueError(f"its optimizer_states has {len(states)} items, expected {len(optimizers)}")
    for i, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        _check_optimizer(optimizer, state, f"optimizer_states[{i}]")
    for i, schedule in enumerate(checkpoint["lr_schedulers"]):
        _check_schedule(schedule, sum(len(optimizer.param_groups) for optimizer in optimizers), f"lr_schedulers[{i}]")


def _own(weights: Mapping[str, Any], module: pl.LightningModule) -> dict[str, Tensor]:
    """Return the tensors that every run of the network has, without those of an auxiliary loss."""
    weights = without_temperatures(weights, module)
    return {k: v for k, v in weights.items() if isinstance(v, Tensor) and not k.startswith("aux_loss.")}


def _check_shapes(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str) -> None:
    for kind, names in (("lacks", wanted.keys() - given.keys()), ("also has", given.keys() - wanted.keys())):
        if names:
            raise ValueError(
                f"its {where} {kind} {len(names)} tensors, such as {min(names)!r}: it is of another network"
            )
    for name, value in wanted.items():
        _check_like(value, given[name], f"{where}[{name!r}]")


def _check_like(wanted: Tensor, given: Tensor, where: str) -> None:
    if wanted.shape != given.shape:
        raise ValueError(f"its {where} has the shape {(*given.shape,)}, expected {(*wanted.shape,)}")
    if wanted.is_floating_point() != given.is_floating_point() or given.is_complex():
        raise ValueError(f"its {where} is of the type {given.dtype}, expected {wanted.dtype}")


def _check_optimizer(optimizer: torch.optim.Optimizer, state: dict, where: str) -> None:
    check_each(state, {"state": MAPPING, "param_groups": DICTS}, where, required=True)
    groups, saved = optimizer.param_groups, state["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(f"its {where}['param_groups'] has {len(saved)} items, expected {len(groups)}")
    parameters = {}
    for i, (group, given) in enumerate(zip(groups, saved, strict=True)):
        place = f"{where}['param_groups'][{i}]"
        numbers = list(range(len(parameters), len(parameters) + len(group["params"])))
        if given.get("params") != numbers:
            found = f"{len(given['params'])}" if isinstance(given.get("params"), list) else "no list of"
            raise ValueError(
                f"its {place} has {found} parameters, numbered otherwise than the {len(numbers)} expected: the run was "
                "of another network or other options, or an earlier version divided them otherwise"
            )
        parameters |= dict(zip(numbers, group["params"], strict=True))
        for name, value in group.items():
            if name != "params" and name in given:
                _check_kind(value, given[name], f"{place}[{name!r}]")
        missing = [name for name in ("lr", "momentum", "betas", "weight_decay") if name in group and name not in given]
        if missing:
            raise ValueError(f"its {place}[{missing[0]!r}] is missing")
        for name in given.keys() - group.keys():
            CELL.check(given[name], f"{place}[{name!r}]")
    needed = next((names for kind, names in STATES.items() if _is_kind(optimizer, kind)), ())
    for number, values in state["state"].items():
        if number not in parameters or isinstance(number, bool):
            raise ValueError(f"its {where}['state'] has {short(number)}, but there is no such parameter")
        place = f"{where}['state'][{number}]"
        MAPPING.check(values, place)
        for name in needed:
            if name not in values:
                raise ValueError(f"its {place}[{name!r}] is missing, expected a tensor")
        for name, value in values.items():
            if name == "step":
                STEP.check(value, f"{place}['step']")
            elif value is not None or name in needed:
                TENSOR.check(value, f"{place}[{name!r}]")
                if value.dim() or name in needed:
                    _check_like(parameters[number], value, f"{place}[{name!r}]")


def _is_kind(optimizer: torch.optim.Optimizer, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(optimizer).__mro__)


def _check_kind(wanted: Any, given: Any, where: str) -> None:
    """Check a setting of an optimiser or schedule against that of a new one."""
    if isinstance(wanted, bool) or wanted is None:
        Field("True, False or None", lambda v: v is None or isinstance(v, bool)).check(given, where)
    elif isinstance(wanted, int | float) or (isinstance(wanted, Tensor) and wanted.dim() == 0):
        Field("a finite number", lambda v: is_number(v) or SCALAR.holds(v)).check(given, where)
    elif isinstance(wanted, tuple | list):
        numbers = Field(f"{len(wanted)} numbers", lambda v: isinstance(v, tuple | list) and len(v) == len(wanted))
        numbers.check(given, where)
        for item, value in zip(wanted, given, strict=True):
            _check_kind(item, value, where)
    elif isinstance(wanted, str):
        TEXT.check(given, where)


_SCHEDULE = {
    "last_epoch": NATURAL,
    "_step_count": NATURAL,
    "_is_initial": FLAG,
    "_get_lr_called_within_step": FLAG,
    "verbose": FLAG,
    "total_steps": COUNT,
    "cycle_momentum": FLAG,
    "use_beta1": FLAG,
    "_anneal_func_type": TEXT,
    "_schedule_phases": DICTS,
    "milestones": MAPPING,
    "gamma": NUMBER,
}


def _check_schedule(schedule: dict, groups: int, where: str) -> None:
    check_each(schedule, _SCHEDULE, where)
    check_each(schedule, {"last_epoch": NATURAL}, where, required=True)
    for name in ("base_lrs", "_last_lr", "lr_lambdas"):
        if name in schedule:
            place, items = f"{where}[{name!r}]", schedule[name]
            Field(f"a list of {groups} items", lambda v: isinstance(v, list) and len(v) == groups).check(items, place)
            for item in items:
                if name == "lr_lambdas":
                    Field("None", lambda v: v is None).check(item, place)
                else:
                    Field("a finite number", lambda v: is_number(v) or SCALAR.holds(v)).check(item, place)
    known = {*_SCHEDULE, "base_lrs", "_last_lr", "lr_lambdas"}
    for name in schedule.keys() - known:
        raise ValueError(f"its {where} has {short(name)}, which no schedule of fastroute has")
    phases = schedule.get("_schedule_phases")
    if phases is not None:
        for phase in phases:
            texts = dict.fromkeys(("start_lr", "end_lr", "start_momentum", "end_momentum"), TEXT)
            check_each(phase, {"end_step": NUMBER} | texts, f"{where}['_schedule_phases']", required=True)
        if not phases or phases[-1]["end_step"] != schedule.get("total_steps", math.nan) - 1:
            raise ValueError(f"its {where}['total_steps'] is not that of its _schedule_phases")
    if schedule["last_epoch"] > schedule.get("total_steps", MOST):
        raise ValueError(f"its {where}['last_epoch'] is {schedule['last_epoch']}, expected at most total_steps")
