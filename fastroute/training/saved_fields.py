"""Check the types and ranges of all fields of a checkpoint that this package reads.

A checkpoint is loaded without running code in it, but its values may be anything: a string in the place of a number
would fail deep inside PyTorch, and a size could exhaust the memory.
"""

import contextlib
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastroute.data import decode
from fastroute.data.transforms import INTERPOLATIONS
from fastroute.models.specification import Specification, check_conversion
from fastroute.training.metrics import Totals

MOST = 2**31 - 1
LARGEST = torch.finfo(torch.float32).max


class Field(NamedTuple):
    """The type of a field.

    Attributes:
        expected: a description of valid values, for messages.
        holds: returns whether a value is valid.
    """

    expected: str
    holds: Callable[[Any], bool]

    def or_none(self) -> "Field":
        """Return the field that also allows None."""
        return Field(f"{self.expected} or None", lambda value: value is None or self.holds(value))

    def check(self, value: Any, where: str) -> None:
        """Check a value.

        Args:
            value: any value.
            where: its place in the checkpoint, such as "hyper_parameters['lr']", for the message.

        Raises:
            ValueError: the value is invalid.
        """
        if not self.holds(value):
            raise ValueError(f"its {where} is {short(value)}, expected {self.expected}")


def _is_int(value: Any, least: int = 0, most: int = MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> bool:
    """Return whether a value is a number, no boolean, and finite in float32."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= LARGEST  # False for NaN


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
TEXT = Field("a string", lambda value: isinstance(value, str))
NUMBER = Field("a finite number", is_number)
COUNT = Field("an int above 0", lambda value: _is_int(value, 1))
NATURAL = Field("an int of at least 0", _is_int)
SIZE = Field(f"an int above 0 and at most {PIXELS:,}", lambda value: _is_int(value, 1, PIXELS))
OUTPUTS = Field(f"an int above 0 and at most {CLASSES:,}", lambda value: _is_int(value, 1, CLASSES))
PLANES = Field(f"an int above 0 and at most {CHANNELS:,}", lambda value: _is_int(value, 1, CHANNELS))
HEADS = Field("an int from 1 to 1,000", lambda value: _is_int(value, 1, 1000))
SHARE = Field("a number above 0 and at most 1", lambda value: is_number(value) and 0 < value <= 1)
PART = Field("a number of at least 0 and below 1", lambda value: is_number(value) and 0 <= value < 1)
SEED = Field("an int from 0 to 2⁶⁴ − 1", lambda value: _is_int(value, 0, 2**64 - 1))
INTERPOLATION, ON_BAD_IMAGE = (
    Field(f"one of {', '.join(names)}", lambda value, names=names: isinstance(value, str) and value in names)
    for names in (INTERPOLATIONS, decode.ON_BAD_IMAGE)
)
MAPPING = Field("a dict", lambda value: isinstance(value, dict))
DICTS = Field("a list of dicts", lambda value: isinstance(value, list) and all(isinstance(v, dict) for v in value))
TEXTS = Field("a list of strings", _is_texts)
TENSOR = Field("a dense tensor", _is_dense)
SCALAR = Field("a scalar tensor", lambda value: _is_dense(value) and value.dim() == 0)
LEVELS = Field("a tensor of a finite number for each channel", _is_channels)
NUMBERS = Field("a list of numbers", lambda value: isinstance(value, list | tuple) and all(map(is_number, value)))
PATH = Field("a local path", lambda value: isinstance(value, str) and "::" not in value and "://" not in value)
PAIR = Field(
    "two scalar tensors",
    lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(SCALAR.holds, value)),
)
STEP = Field("a count", lambda value: is_number(value) or (_is_dense(value) and value.numel() == 1))
CELL = Field("a number or a string", lambda value: value is None or isinstance(value, bool | int | float | str))

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
    "self_label": NATURAL,
}
REQUIRED = {
    "model": ("num_classes", "in_chans", "img_size"),
    "architecture": ("dataset", "img_size", "method", "clusters", "heads", "batch_norm"),
}
"""The hyperparameters that must be there, by the one that tells which command wrote the checkpoint."""

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
    "train_count": NATURAL,
    "val_count": NATURAL,
    "input_key": TEXT.or_none(),
    "class_map": FLAG,
    "on_bad_image": ON_BAD_IMAGE,
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


def check_fields(checkpoint: dict, path: str | Path, name: str) -> None:
    """Check the fields of a checkpoint that this package reads.

    Args:
        checkpoint: as `torch.load` returns it.
        path: of the file, for messages.
        name: the argument that the file was given as, for messages.

    Raises:
        ValueError: a field is missing, or of another type or range.
    """
    with named(path, name):
        _check_all(checkpoint)


@contextlib.contextmanager
def named(path: str | Path, name: str) -> Iterator[None]:
    """Prefix the message of a ValueError in the block with the file and the argument that it was given as."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name} is {path}; {error}") from None


def _check_all(checkpoint: dict) -> None:
    MAPPING.check(checkpoint, "content")
    check_each(checkpoint, {"hyper_parameters": MAPPING, "state_dict": MAPPING}, "", required=True)
    run = checkpoint["hyper_parameters"]
    for name, required in REQUIRED.items():
        if name in run:
            fields = TRAIN if name == "model" else CLUSTER
            check_each(run, {key: fields[key] for key in required}, "hyper_parameters", required=True)
            check_each(run, fields, "hyper_parameters")
    if run.get("specification") is not None:
        Specification.from_dict(run["specification"])
    if "conversion" in checkpoint:
        check_conversion(checkpoint["conversion"])
    for name in ("state_dict", "current_model_state", "averaging_state", "kept"):
        _check_weights(checkpoint.get(name, {}), name)
    _check_means(checkpoint.get("epoch_means", []))
    counts = {"epochs": NATURAL.or_none(), "epoch": NATURAL, "global_step": NATURAL, "stopped_early": FLAG}
    counts["steps_in_an_epoch"] = COUNT.or_none()
    counts |= dict.fromkeys(("pretrain_epochs", "schedule_epochs", "warm_up", "self_label_start"), NATURAL)
    check_each(checkpoint, counts, "")
    check_images(checkpoint.get("ImageDataModule", {}))
    _check_totals(checkpoint.get("train_totals", {}))
    _check_callbacks(checkpoint.get("callbacks", {}))
    _check_progress(checkpoint.get("loops", {}), "loops")
    for name in ("optimizer_states", "lr_schedulers"):
        DICTS.check(checkpoint.get(name, []), name)


def check_each(values: Mapping, fields: Mapping[str, Field], where: str, *, required: bool = False) -> None:
    """Check the fields of a mapping.

    Args:
        values: the mapping; other names in it are ignored.
        fields: the types by name.
        where: the place of the mapping in the checkpoint, for the message.
        required: whether all fields must be there.

    Raises:
        ValueError: a field is missing or invalid.
    """
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
    """Check the state of a run's `ImageDataModule`; see `IMAGES`.

    Args:
        data: the state; empty where the run had another data module.

    Raises:
        ValueError: a field is missing, or of another type or range.
    """
    MAPPING.check(data, "ImageDataModule")
    check_each(data, IMAGES, "ImageDataModule")
    if not data:
        return
    check_each(data, {"classes": IMAGES["classes"]}, "ImageDataModule", required=True)
    if not data["classes"]:
        raise ValueError("its ImageDataModule['classes'] is empty, expected a string for each class")
    for name in ("mean", "std"):
        if name in data and len(data[name]) not in (1, data.get("in_chans", len(data[name]))):
            raise ValueError(
                f"its ImageDataModule[{name!r}] has {len(data[name])} numbers for {data['in_chans']} channels"
            )
    if "std" in data and not (data["std"] > 0).all():
        raise ValueError("its ImageDataModule['std'] has numbers of 0 or below, expected numbers above 0")
    place = data.get("place")
    if place is not None:
        check_each(place, {"done": NATURAL, "batches": COUNT}, "ImageDataModule['place']", required=True)
        order = {"epoch": NATURAL, "count": NATURAL, "batch_size": COUNT, "seed": SEED.or_none()}
        check_each(place, order, "ImageDataModule['place']")


def _check_totals(totals: Any) -> None:
    MAPPING.check(totals, "train_totals")
    for name, value in totals.items():
        Field(f"one of {', '.join(Totals.SUMS)}", lambda key: key in Totals.SUMS).check(name, "name in train_totals")
        SCALAR.check(value, f"train_totals[{name!r}]")


def _check_means(processes: Any) -> None:
    """Check the sums and counts that each process has logged in the epoch so far."""
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
            check_each(state, {"rows": DICTS}, place, required=True)
            for row in state["rows"]:
                for key, cell in row.items():
                    TEXT.check(key, f"column in {place}['rows']")
                    CELL.check(cell, f"{place}['rows'] in column {key!r}")
        if kind.endswith("Checkpoint"):
            needed = {name: BEST[name] for name in ("best_model_path", "best_model_score", "best_k_models")}
            check_each(state, needed, place, required=True)
            check_each(state, BEST, place)
            for path, score in state["best_k_models"].items():
                PATH.check(path, f"path in {place}['best_k_models']")
                SCALAR.check(score, f"{place}['best_k_models']['{short(path)}']")
        if kind == "MovingAverage":
            check_each(state, {"latest_update_step": NATURAL}, place)


def _check_progress(values: Any, where: str) -> None:
    """Check Lightning's progress counters: nested dicts of ints and flags."""
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


def short(value: Any) -> str:
    """Return a short description of a value, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and the shape {(*value.shape,)}"
    return reprlib.repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
