"""Checkpoints: written whole or not at all, on time, and read with care."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn

from fastroute._errors import in_a_line
from fastroute._files import DamagedFile, digest_path, read_tensors, replacing, write_digest
from fastroute.models.specification import specification_in
from fastroute.models.weights import differences, network_weights
from fastroute.training.optim import GROUP_OPTIONS
from fastroute.training.saved_fields import check_fields
from fastroute.training.saved_state import check_training_state

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"

# The option that tells which command's run a checkpoint is of.
_OPTION_OF = {"train": "model", "cluster": "architecture"}


def read_checkpoint(path: str | Path, name: str = "resume", command: str | None = None) -> dict:
    """A checkpoint of a training run, on the CPU.

    Args:
        path: the file.
        name: the argument that it was given as, for messages.
        command: whose run it must be of, "train" or "cluster"; None is either.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of a training run, or of another command's.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name} is {path}; there is no such file")
    try:
        checkpoint = read_tensors(path)
        checkpoint["hyper_parameters"], checkpoint["state_dict"], _epochs_done(checkpoint)
    except DamagedFile as error:
        raise DamagedFile(
            f"{name} is {path}; it is no checkpoint of a training run any more: {error}; {_instead_of(path)}"
        ) from error
    except Exception as error:  # whatever a reader does with bytes that are not its own
        raise ValueError(f"{name} is {path}; it is no checkpoint of a training run: {in_a_line(error)}") from error
    if command is not None and isinstance(checkpoint["hyper_parameters"], dict):
        check_command(checkpoint, command, path, name)
    check_fields(checkpoint, path, name)
    return checkpoint


def latest_checkpoint(folder: str | Path, say: Callable[[str], None] = print) -> Path | None:
    """The checkpoint with which the run in a folder goes on: `last.ckpt`, or the one before where that is damaged.

    Args:
        folder: of the run.
        say: gets a sentence where it is the one before.

    Returns:
        its path, or None where the folder has no checkpoint.

    Raises:
        ValueError: there is none that can be read.
    """
    last, previous = Path(folder) / LAST, Path(folder) / PREVIOUS
    try:
        if last.is_file():
            read_checkpoint(last)
            return last
        reason = f"{last} is missing"
    except ValueError as error:
        if not previous.is_file():
            raise
        reason = str(error.__cause__ or error)
        reason = f"{last} cannot be read ({reason})"
    if not previous.is_file():
        return None
    read_checkpoint(previous)
    say(f"{reason}; going on from the checkpoint before it, {previous}")
    return previous


def _instead_of(path: str | Path) -> str:
    """What to do about a damaged file."""
    others = [Path(path).with_name(name) for name in (LAST, PREVIOUS) if name != Path(path).name]
    there = [str(other) for other in others if other.is_file()]
    return f"use {there[0]} instead" if there else "copy it again from where it came, or use another"


def check_command(checkpoint: dict, command: str, path: str | Path, name: str) -> None:
    """Raise unless a checkpoint that was read is of a run of `fastroute {command}`, "train" or "cluster"."""
    if _OPTION_OF[command] not in checkpoint["hyper_parameters"]:
        raise ValueError(f"{name} is {path}; it is no checkpoint of `fastroute {command}`")


def read_resumable(path: str | Path, command: str, options: dict, epochs: int) -> dict:
    """A checkpoint that a run of these options can go on from.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of the command, was saved with other options, or leaves no epoch to train.
    """
    checkpoint = read_checkpoint(path, command=command)
    saved = checkpoint["hyper_parameters"]
    for name, value in options.items():
        if saved.get(name, value) != value:
            raise ValueError(
                f"resume is {path}; it was trained with {name}={saved[name]!r}, but this run has {name}={value!r}"
            )
    done = _epochs_done(checkpoint)
    if done >= epochs:
        raise ValueError(f"resume is {path}; it has {done} epochs behind it, so epochs={epochs} leaves none to train")
    return checkpoint


def check_resume(path: str | Path, module: pl.LightningModule, epochs: int) -> dict:
    """Read a checkpoint; raise unless it is of the same network as the module and has epochs left to train; see `fit`.

    The optimiser comes back with the rates and decays that it was saved with, so that others would be without effect.
    """
    fixed = ("model", "num_classes", "in_chans", "opt", "sched", "momentum", *GROUP_OPTIONS)
    checkpoint = read_resumable(path, "train", {name: module.hparams[name] for name in fixed}, epochs)
    if module.hparams.specification is not None:
        own, other = (
            specification_in(run, f"resume is {path}") for run in (module.hparams, checkpoint["hyper_parameters"])
        )
        if reason := other.differences(own):
            raise ValueError(f"resume is {path}; its network was built with {reason}")
    check_training_state(checkpoint, module, path)
    saved, planned = checkpoint["hyper_parameters"], checkpoint.get("epochs")
    endless = saved["sched"] == "step" or (saved["sched"] == "multistep" and module.hparams.decay_milestones)
    if planned != epochs and not endless:
        raise ValueError(f"resume is {path}; its schedule is of {planned} epochs, but this run has epochs={epochs}")
    return checkpoint


def stopped_early(path: str | Path) -> bool:
    """Whether a checkpoint is of a run that has stopped by its patience; it raises as `read_checkpoint` does."""
    return read_checkpoint(path).get("stopped_early", False)


def epochs_done(path: str | Path) -> int:
    """How many whole epochs a checkpoint has behind it; it raises as `read_checkpoint` does."""
    return _epochs_done(read_checkpoint(path))


def _epochs_done(checkpoint: dict) -> int:
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


def check_not_finished(folder: str | Path, option: str) -> None:
    """Raise where a folder has a run that a new one would overwrite, and whose last checkpoint is of its last epoch.

    A run without epochs, as of k-means, is finished once its summary is there.

    Args:
        folder: of a run.
        option: how to overwrite it nevertheless, for the message.

    Raises:
        FileExistsError: as said.
    """
    last, summary = Path(folder) / LAST, Path(folder) / "summary.csv"
    if last.is_file():
        with contextlib.suppress(ValueError):  # a damaged one is of no run that anyone could go on with
            checkpoint = read_checkpoint(last)
            done, planned = _epochs_done(checkpoint), checkpoint.get("epochs")
            if planned is not None and (done >= planned or checkpoint.get("stopped_early")):
                raise FileExistsError(
                    f"output is {folder}; a finished run of {done} epochs is there: name another folder, go on with "
                    f"--resume and more epochs, or overwrite it with {option}"
                )
    elif summary.is_file() and not summary.read_text(encoding="utf-8", errors="replace").startswith("epoch"):
        raise FileExistsError(
            f"output is {folder}; a finished run is there: name another folder, or overwrite it with {option}"
        )


def load_weights(model: nn.Module, path: str | Path, averaged: bool = True, name: str = "initial_checkpoint") -> None:
    """Load a network's weights from a checkpoint of a training run, or from a file of its `state_dict`.

    Args:
        model: gets them.
        path: a `.ckpt` of a run; any file of a state_dict; a `.safetensors`. A digest beside it, as `save_weights` or
            `sha256sum` writes one to `<name>.sha256`, is checked.
        averaged: whether the moving average is taken where the run kept one; else the weights as trained.
        name: the argument that the file was given as, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no weights, or those of another network, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{name} is {path}; there is no such file")
    try:
        weights = read_tensors(path)
    except DamagedFile as error:
        raise DamagedFile(f"{name} is {path}; it holds no weights any more: {error}; {_instead_of(path)}") from error
    except Exception as error:  # whatever a reader does with bytes that are not its own
        raise ValueError(f"{name} is {path}; it holds no weights: {in_a_line(error)}") from error
    load_network_weights(model, weights, path, averaged, name)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a network's weights whole or not at all, for `load_weights` or any other reader.

    Args:
        model: whose `state_dict` is written.
        path: a `.safetensors`, which has no checksum and gets its SHA-256 beside it, as `<name>.sha256`; any other is
            written by `torch.save`.

    Raises:
        OSError: the file cannot be written; the one before is as it was.
    """
    path, weights = Path(path), {name: value.detach().cpu() for name, value in model.state_dict().items()}
    digest_path(path).unlink(missing_ok=True)  # of what was there before
    with replacing(path, "wb") as file:
        if path.suffix == ".safetensors":
            from safetensors.torch import save

            file.write(
                save({name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()})
            )
        else:
            torch.save(weights, file)
    if path.suffix == ".safetensors":
        write_digest(path)


def load_network_weights(
    model: nn.Module, checkpoint: dict, path: Path, averaged: bool = True, name: str = "checkpoint"
) -> None:
    """As `load_weights`, from what the file at `path` holds."""
    weights = network_weights(checkpoint, averaged) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise ValueError(f"{name} is {path}; it holds a {type(weights).__name__}, and must hold a state_dict")
    if reason := differences(model.state_dict(), weights):
        raise ValueError(f"{name} is {path}; its weights are of another network: {reason}")
    model.load_state_dict(weights)
