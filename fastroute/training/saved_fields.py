"""What a checkpoint must hold for a run to go on from it, or a command to read it: every field is of its type.

A checkpoint is loaded without running any code of it, but what it holds is as its writer wished: a text for a number
would end in the middle of PyTorch, and a size could take all memory.
"""

import contextlib
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from fastroute.data.transforms import INTERPOLATIONS
from fastroute.models.specification import Specification
from fastroute.nn.router import without_temperatures
from fastroute.training.capturable import CAPTURABLE
from fastroute.training.metrics import Totals
from fastroute.training.optim import GROUP_OPTIONS, OPTIMIZERS, parameter_groups

MOST = 2**31 - 1
LARGEST = torch.finfo(torch.float32).max


class Field(NamedTuple):
    """expected: what it must be, for messages; holds: whether a value is that."""

    expected: str
    holds: Callable[[Any], bool]

    def or_none(self) -> "Field":
        return Field(f"{self.expected} or None", lambda value: value is None or self.holds(value))

    def check(self, value: Any, where: str) -> None:
        """Raise unless a value is that; `where` says which value, such as "hyper_parameters['lr']"."""
        if not self.holds(value):
            raise ValueError(f"its {where} is {_short(value)}, expected {self.expected}")


def _is_int(value: Any, least: int = 0, most: int = MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= LARGEST  # which NaN is not


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_channels(value: Any) -> bool:
    return (
        _is_dense(value)
        and value.is_floating_point()
        and value.dim() == 1
        and 1 <= len(value) <= CHANNELS
        and bool(value.isfinite().all())
    )


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized and not value.is_meta


CHANNELS, PIXELS, CLASSES = 2**12, 2**20, 2**20
FLAG = Field("True or False", lambda value: isinstance(value, bool))
TEXT = Field("a text", lambda value: isinstance(value, str))
NUMBER = Field("a finite number", _is_number)
COUNT = Field("an int above 0", lambda value: _is_int(value, 1))
NATURAL = Field("an int of at least 0", _is_int)
SIZE = Field(f"an int above 0 and at most {PIXELS:,}", lambda value: _is_int(value, 1, PIXELS))
OUTPUTS = Field(f"an int above 0 and at most {CLASSES:,}", lambda value: _is_int(value, 1, CLASSES))
PLANES = Field(f"an int above 0 and at most {CHANNELS:,}", lambda value: _is_int(value, 1, CHANNELS))
HEADS = Field("an int from 1 to 1,000", lambda value: _is_int(value, 1, 1000))
SHARE = Field("a number above 0 and at most 1", lambda value: _is_number(value) and 0 < value <= 1)
PART = Field("a number of at least 0 and below 1", lambda value: _is_number(value) and 0 <= value < 1)
SEED = Field("an int from 0 to 2⁶⁴ − 1", lambda value: _is_int(value, 0, 2**64 - 1))
INTERPOLATION = Field(
    f"one of {', '.join(INTERPOLATIONS)}", lambda value: isinstance(value, str) and value in INTERPOLATIONS
)
MAPPING = Field("a dict", lambda value: isinstance(value, dict))
DICTS = Field("a list of dicts", lambda value: isinstance(value, list) and all(isinstance(v, dict) for v in value))
TEXTS = Field("a list of texts", _is_texts)
TENSOR = Field("a dense tensor", _is_dense)
SCALAR = Field("a tensor of one number", lambda value: _is_dense(value) and value.dim() == 0)
LEVELS = Field("a tensor of a finite number for each channel", _is_channels)
NUMBERS = Field("a list of numbers", lambda value: isinstance(value, list | tuple) and all(map(_is_number, value)))
PATH = Field(
    "a path of this machine", lambda value: isinstance(value, str) and "::" not in value and "://" not in value
)
PAIR = Field(
    "two tensors of one number",
    lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(SCALAR.holds, value)),
)
STEP = Field("a count", lambda value: _is_number(value) or (_is_dense(value) and value.numel() == 1))
CELL = Field("a number or a text", lambda value: value is None or isinstance(value, bool | int | float | str))

TRAIN = {
    "model": TEXT,
    "num_classes": OUTPUTS,
    "in_chans": PLANES,
    "img_size": SIZE,
    "opt": TEXT,
    "lr": NUMBER,
    "momentum": NUMBER,
    "weight_decay": NUMBER,
    "norm_weight_decay": NUMBER.or_none(),
    "gate_lr_mult": NUMBER,
    "gate_wd": NUMBER.or_none(),
    "sched": TEXT,
    "warmup_epochs": NATURAL,
    "decay_epochs": COUNT,
    "decay_milestones": NUMBERS.or_none(),
    "decay_rate": NUMBER,
    "min_lr": NUMBER,
    "warmup_lr": NUMBER,
    "filter_bias_and_bn": FLAG,
    "layer_decay": NUMBER.or_none(),
    "smoothing": NUMBER,
    "channels_last": FLAG,
    "grad_checkpointing": FLAG,
    "compile": FLAG,
    "compile_mode": TEXT.or_none(),
    "cuda_graphs": FLAG,
    "aux_weight": NUMBER,
}
CLUSTER = {
    "architecture": TEXT,
    "dataset": TEXT,
    "img_size": SIZE.or_none(),
    "limit": COUNT.or_none(),
    "method": TEXT,
    "clusters": OUTPUTS,
    "heads": HEADS,
    "n_init": HEADS,
    "batch_norm": FLAG,
    "lr_em": NUMBER,
    "lr_consistency": NUMBER,
}
REQUIRED = {
    "model": ("num_classes", "in_chans", "img_size"),
    "architecture": ("dataset", "img_size", "method", "clusters", "heads", "batch_norm"),
}
"""What a command reads of a run, by the name that tells whose run it is."""

IMAGES = {
    "place": MAPPING.or_none(),
    "dataset": TEXT,
    "classes": TEXTS,
    "first_classes": COUNT.or_none(),
    "img_size": SIZE,
    "in_chans": PLANES,
    "crop_pct": SHARE,
    "mean": LEVELS,
    "std": LEVELS,
    "interpolation": INTERPOLATION,
    "data_dir": TEXT.or_none(),
    "val_split": PART,
    "split_seed": SEED,
    "input_key": TEXT.or_none(),
    "class_map": FLAG,
}
BEST = {
    "monitor": TEXT.or_none(),
    "best_model_score": SCALAR.or_none(),
    "current_score": SCALAR.or_none(),
    "best_model_path": PATH,
    "kth_best_model_path": PATH,
    "last_model_path": PATH,
    "dirpath": PATH.or_none(),
    "kth_value": SCALAR,
    "best_k_models": MAPPING,
}
STATES = {"RMSprop": ("square_avg", "step"), "Adam": ("exp_avg", "exp_avg_sq", "step")}
"""What optimisers cannot go on without, by the name of their class."""


def check_fields(checkpoint: dict, path: str | Path, name: str) -> None:
    """Raise unless all fields of a checkpoint that are read in this package, and are there, are of their types.

    Args:
        checkpoint: what `torch.load` gave.
        path, name: the file, and the argument that it was given as, for messages.

    Raises:
        ValueError: as said.
    """
    with _named(path, name):
        _check_all(checkpoint)


def check_training_state(checkpoint: dict, module: pl.LightningModule, path: str | Path, name: str = "resume") -> None:
    """Raise unless a module and its optimisers can go on with what a checkpoint holds.

    Args:
        checkpoint: whose fields are of their types; see `check_fields`.
        module: what is trained.
        path, name: the file, and the argument that it was given as, for messages.

    Raises:
        ValueError: as said.
    """
    with _named(path, name):
        _check_state(checkpoint, module, _new_optimizers(module))


@contextlib.contextmanager
def _named(path: str | Path, name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name} is {path}; {error}") from None


def _new_optimizers(module: pl.LightningModule) -> list[torch.optim.Optimizer]:
    if "opt" in module.hparams:  # its own `configure_optimizers` asks the trainer for the number of steps
        options = module.hparams
        groups = parameter_groups(module, **{name: options[name] for name in GROUP_OPTIONS})
        return [(CAPTURABLE if options.cuda_graphs else OPTIMIZERS)[options.opt](groups, options.momentum)]
    made = module.configure_optimizers()
    if isinstance(made, tuple):  # of optimisers and their schedules
        made, _ = made
    return made if isinstance(made, list) else [made]


def _check_all(checkpoint: dict) -> None:
    MAPPING.check(checkpoint, "content")
    _check_fields(checkpoint, {"hyper_parameters": MAPPING, "state_dict": MAPPING}, "", required=True)
    run = checkpoint["hyper_parameters"]
    for name, required in REQUIRED.items():
        if name in run:
            fields = TRAIN if name == "model" else CLUSTER
            _check_fields(run, {key: fields[key] for key in required}, "hyper_parameters", required=True)
            _check_fields(run, fields, "hyper_parameters")
    if run.get("specification") is not None:
        Specification.from_dict(run["specification"])
    for name in ("state_dict", "current_model_state", "averaging_state"):
        _check_weights(checkpoint.get(name, {}), name)
    _check_means(checkpoint.get("epoch_means", []))
    counts = {"epochs": NATURAL.or_none(), "epoch": NATURAL, "global_step": NATURAL, "stopped_early": FLAG}
    _check_fields(checkpoint, counts, "")
    check_images(checkpoint.get("ImageDataModule", {}))
    _check_totals(checkpoint.get("train_totals", {}))
    _check_callbacks(checkpoint.get("callbacks", {}))
    _check_progress(checkpoint.get("loops", {}), "loops")
    for name in ("optimizer_states", "lr_schedulers"):
        DICTS.check(checkpoint.get(name, []), name)


def _check_fields(values: Mapping, fields: Mapping[str, Field], where: str, *, required: bool = False) -> None:
    for name, field in fields.items():
        place = f"{where}[{name!r}]" if where else name
        if name in values:
            field.check(values[name], place)
        elif required:
            raise ValueError(f"its {place} is missing, expected {field.expected}")


def _check_weights(weights: Any, where: str) -> None:
    MAPPING.check(weights, where)
    for name, value in weights.items():
        TEXT.check(name, f"name in {where}")
        place = f"{where}[{name!r}]"
        if name.rpartition(".")[2] == "_extra_state":
            if isinstance(value, dict):
                for key, part in value.items():
                    TEXT.check(key, f"name in {place}")
                    TENSOR.check(part, f"{place}[{key!r}]")
            continue
        TENSOR.check(value, place)


def check_images(data: Any) -> None:
    """Raise unless what is said of a run's images is of the types that it must be; see `IMAGES`."""
    MAPPING.check(data, "ImageDataModule")
    _check_fields(data, IMAGES, "ImageDataModule")
    if not data:
        return
    _check_fields(data, {"classes": IMAGES["classes"]}, "ImageDataModule", required=True)
    if not data["classes"]:
        raise ValueError("its ImageDataModule['classes'] is empty, expected a text for each class")
    for name in ("mean", "std"):
        if name in data and len(data[name]) not in (1, data.get("in_chans", len(data[name]))):
            raise ValueError(
                f"its ImageDataModule[{name!r}] has {len(data[name])} numbers for {data['in_chans']} channels"
            )
    if "std" in data and not (data["std"] > 0).all():
        raise ValueError("its ImageDataModule['std'] has numbers of 0 or below, expected numbers above 0")
    place = data.get("place")
    if place is not None:
        _check_fields(place, {"done": NATURAL, "batches": COUNT}, "ImageDataModule['place']", required=True)


def _check_totals(totals: Any) -> None:
    MAPPING.check(totals, "train_totals")
    for name, value in totals.items():
        Field(f"one of {', '.join(Totals.SUMS)}", lambda key: key in Totals.SUMS).check(name, "name in train_totals")
        SCALAR.check(value, f"train_totals[{name!r}]")


def _check_means(processes: Any) -> None:
    """Sums and counts of what was logged in the epoch so far, for each process."""
    DICTS.check(processes, "epoch_means")
    for i, sums in enumerate(processes):
        for name, pair in sums.items():
            TEXT.check(name, f"name in epoch_means[{i}]")
            PAIR.check(pair, f"epoch_means[{i}][{name!r}]")


def _check_callbacks(callbacks: Any) -> None:
    MAPPING.check(callbacks, "callbacks")
    for name, state in callbacks.items():
        TEXT.check(name, "name in callbacks")
        place = f"callbacks[{name.partition('{')[0]!r}]"
        MAPPING.check(state, place)
        kind = name.partition("{")[0]
        if kind in ("EpochSummary", "RouterDiagnostics", "Table"):
            _check_fields(state, {"rows": DICTS}, place, required=True)
            for row in state["rows"]:
                for key, cell in row.items():
                    TEXT.check(key, f"column in {place}['rows']")
                    CELL.check(cell, f"{place}['rows'] in column {key!r}")
        if kind.endswith("Checkpoint"):
            needed = {name: BEST[name] for name in ("best_model_path", "best_model_score", "best_k_models")}
            _check_fields(state, needed, place, required=True)
            _check_fields(state, BEST, place)
            for path, score in state["best_k_models"].items():
                PATH.check(path, f"path in {place}['best_k_models']")
                SCALAR.check(score, f"{place}['best_k_models']['{_short(path)}']")
        if kind == "MovingAverage":
            _check_fields(state, {"latest_update_step": NATURAL}, place)


def _check_progress(values: Any, where: str) -> None:
    """Lightning's counters: dicts of dicts of ints and flags, by their names."""
    MAPPING.check(values, where)
    for name, value in values.items():
        TEXT.check(name, f"name in {where}")
        place = f"{where}[{name!r}]"
        if name == "combined_loader":
            DICTS.check(value, place)
        elif name in _FLAGS:
            FLAG.check(value, place)
        elif name in _COUNTERS:
            NATURAL.check(value, place)
        else:
            _check_progress(value, place)


_FLAGS = ("is_last_batch",)
_COUNTERS = ("ready", "started", "processed", "completed", "_batches_that_stepped", "optimizer_position")


def _check_state(checkpoint: dict, module: pl.LightningModule, optimizers: list[torch.optim.Optimizer]) -> None:
    for name in ("loops", "callbacks", "optimizer_states", "lr_schedulers"):
        if name not in checkpoint:
            raise ValueError(f"its {name} is missing, so a run cannot go on from it; use it as initial_checkpoint")
    for name in ("state_dict", "current_model_state"):
        if name in checkpoint:
            _check_shapes(_own(module.state_dict()), _own(checkpoint[name]), name)
    if "current_model_state" in checkpoint and "averaging_state" not in checkpoint:
        raise ValueError("its averaging_state is missing, expected it beside current_model_state")
    if "sched" in module.hparams:
        _check_fields(checkpoint["hyper_parameters"], {"sched": TEXT}, "hyper_parameters", required=True)
    states = checkpoint["optimizer_states"]
    if len(states) != len(optimizers):
        raise ValueError(f"its optimizer_states has {len(states)} items, expected {len(optimizers)}")
    for i, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        _check_optimizer(optimizer, state, f"optimizer_states[{i}]")
    for i, schedule in enumerate(checkpoint["lr_schedulers"]):
        _check_schedule(schedule, sum(len(optimizer.param_groups) for optimizer in optimizers), f"lr_schedulers[{i}]")


def _own(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those that every run of the network has: an auxiliary loss may come and go."""
    weights = without_temperatures(weights)
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
    _check_fields(state, {"state": MAPPING, "param_groups": DICTS}, where, required=True)
    groups, saved = optimizer.param_groups, state["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(f"its {where}['param_groups'] has {len(saved)} items, expected {len(groups)}")
    parameters = {}
    for i, (group, given) in enumerate(zip(groups, saved, strict=True)):
        place = f"{where}['param_groups'][{i}]"
        numbers = list(range(len(parameters), len(parameters) + len(group["params"])))
        if given.get("params") != numbers:
            raise ValueError(f"its {place}['params'] is {_short(given.get('params'))}, expected {_short(numbers)}")
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
            raise ValueError(f"its {where}['state'] has {_short(number)}, and there is no such parameter")
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
    """A setting of an optimiser or schedule that a new one has, too."""
    if isinstance(wanted, bool) or wanted is None:
        Field("True, False or None", lambda v: v is None or isinstance(v, bool)).check(given, where)
    elif isinstance(wanted, int | float) or (isinstance(wanted, Tensor) and wanted.dim() == 0):
        Field("a finite number", lambda v: _is_number(v) or SCALAR.holds(v)).check(given, where)
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
    _check_fields(schedule, _SCHEDULE, where)
    _check_fields(schedule, {"last_epoch": NATURAL}, where, required=True)
    for name in ("base_lrs", "_last_lr", "lr_lambdas"):
        if name in schedule:
            place, items = f"{where}[{name!r}]", schedule[name]
            Field(f"a list of {groups} items", lambda v: isinstance(v, list) and len(v) == groups).check(items, place)
            for item in items:
                if name == "lr_lambdas":
                    Field("None", lambda v: v is None).check(item, place)
                else:
                    Field("a finite number", lambda v: _is_number(v) or SCALAR.holds(v)).check(item, place)
    known = {*_SCHEDULE, "base_lrs", "_last_lr", "lr_lambdas"}
    for name in schedule.keys() - known:
        raise ValueError(f"its {where} has {_short(name)}, and no schedule here has that")
    phases = schedule.get("_schedule_phases")
    if phases is not None:
        for phase in phases:
            texts = dict.fromkeys(("start_lr", "end_lr", "start_momentum", "end_momentum"), TEXT)
            _check_fields(phase, {"end_step": NUMBER} | texts, f"{where}['_schedule_phases']", required=True)
        if not phases or phases[-1]["end_step"] != schedule.get("total_steps", math.nan) - 1:
            raise ValueError(f"its {where}['total_steps'] is not that of its _schedule_phases")
    if schedule["last_epoch"] > schedule.get("total_steps", MOST):
        raise ValueError(f"its {where}['last_epoch'] is {schedule['last_epoch']}, expected at most total_steps")


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and the shape {(*value.shape,)}"
    return reprlib.repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
