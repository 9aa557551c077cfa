"""Read checkpoints and weights, and check them before use."""

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn

from fastroute._errors import in_a_line
from fastroute._files import DamagedFile, digest_path, read_tensors, replacing, write_digest
from fastroute.models.specification import specification_in
from fastroute.models.weights import load_state
from fastroute.training.optim import GROUP_OPTIONS
from fastroute.training.saved_fields import check_fields
from fastroute.training.saved_state import check_training_state

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"

# The hyperparameter by which a checkpoint of each command is recognised.
_OPTION_OF = {"train": "model", "cluster": "architecture"}


def read_checkpoint(
    path: str | Path, name: str = "resume", command: str | None = None, weights_alone: str | None = None
) -> dict:
    """Read a checkpoint of a training run to the CPU, and check it.

    Args:
        path: the file.
        name: the argument that the file was given as, for messages.
        command: the command that must have written it, "train" or "cluster"; None allows both.
        weights_alone: what to do with a file of weights, for the message; None is to name the network.

    Returns:
        the checkpoint as `torch.load` returns it.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        ValueError: the file is damaged, or is no checkpoint of a training run of the command.
    """
    if Path(path).is_dir():
        order = (LAST, PREVIOUS, BEST) if name == "resume" else (BEST, LAST)
        there = [Path(path) / file for file in order if (Path(path) / file).is_file()]
        raise IsADirectoryError(f"{name} is {path}; it is a folder: name {there[0] if there else 'a checkpoint in it'}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name} is {path}; there is no such file")
    try:
        checkpoint = read_tensors(path)
        checkpoint["hyper_parameters"], checkpoint["state_dict"], _epochs_done(checkpoint)
        if checkpoint.get("epochs") == -1:  # Lightning's number for a run that max_steps ends, in older files
            checkpoint["epochs"] = None
    except DamagedFile as error:
        raise DamagedFile(
            f"{name} is {path}; it is no checkpoint of a training run: {error}; {_advice(path)}"
        ) from error
    except KeyError as error:
        use = "name the network as well (model, --model)" if weights_alone is None else weights_alone
        if name == "resume":
            use = "start from them by --initial-checkpoint"
        raise ValueError(
            f"{name} is {path}; it is no checkpoint of a training run: it has no {error}. "
            f"If it has weights alone, {use}"
        ) from error
    except Exception as error:  # any error of the reader on bytes of another format
        raise ValueError(f"{name} is {path}; it is no checkpoint of a training run: {unreadable(error)}") from error
    if command is not None and isinstance(checkpoint["hyper_parameters"], dict):
        check_command(checkpoint, command, path, name)
    check_fields(checkpoint, path, name)
    return checkpoint


def unreadable(error: Exception) -> str:
    """Return why a file cannot be read, without PyTorch's advice to trust it."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it holds a {found[1]}, and only plain values and tensors are read, since others could run code"
    return in_a_line(error)


def latest_checkpoint(folder: str | Path, say: Callable[[str], None] = print) -> Path | None:
    """Find the checkpoint to resume a run from: `last.ckpt`, or `previous.ckpt` if that is damaged or missing.

    Args:
        folder: of the run.
        say: called with a message if it is `previous.ckpt`.

    Returns:
        its path, or None if the folder has no checkpoint.

    Raises:
        ValueError: the folder has checkpoints, but none can be read.
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
    say(f"{reason}; resuming from the previous checkpoint, {previous}")
    return previous


def _advice(path: str | Path) -> str:
    """Say what to do about a damaged file: which file of the same run can be read."""
    for name in (LAST, PREVIOUS, BEST):
        other = Path(path).with_name(name)
        if other.name != Path(path).name and other.is_file():
            with contextlib.suppress(Exception):
                read_tensors(other)
                return f"use {other} instead"
    return "copy it again from its source, or use another file"


def is_of(command: str, checkpoint: dict) -> bool:
    """Return whether `fastroute train` or `fastroute cluster` wrote a checkpoint; see `check_command`."""
    return _OPTION_OF[command] in checkpoint["hyper_parameters"]


def check_command(checkpoint: dict, command: str, path: str | Path, name: str) -> None:
    """Check which command wrote a checkpoint.

    Args:
        checkpoint: as `read_checkpoint` returns it.
        command: "train" or "cluster".
        path: of the file, for the message.
        name: the argument that the file was given as, for the message.

    Raises:
        ValueError: another command wrote it.
    """
    if not is_of(command, checkpoint):
        raise ValueError(f"{name} is {path}; it is no checkpoint of `fastroute {command}`")


def read_resumable(path: str | Path, command: str, options: dict, epochs: int) -> dict:
    """Read a checkpoint, and check that a run with these options can be resumed from it.

    Args:
        path: the file.
        command: "train" or "cluster".
        options: hyperparameters that must be those of the checkpoint, where it has them.
        epochs: of the whole run.

    Returns:
        the checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of the command, has other options, or has completed all epochs.
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
        raise ValueError(f"resume is {path}; it has completed {_epochs(done)}, so epochs={epochs} leaves none to train")
    return checkpoint


def check_resume(path: str | Path, module: pl.LightningModule, epochs: int) -> dict:
    """Read a checkpoint, and check that a run of the module can be resumed from it; see `fit`.

    The learning rate and weight decays must be those of the checkpoint: the optimiser is restored with them, and others
    would have no effect.

    Args:
        path: the file.
        module: of the same network and options as the run.
        epochs: of the whole run.

    Returns:
        the checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another network or other options, or has completed all epochs.
    """
    fixed = ("model", "num_classes", "opt", "sched", "momentum", *GROUP_OPTIONS)
    if module.named:  # else it is taken from the images
        fixed += ("in_chans",)
    checkpoint = read_resumable(path, "train", {name: module.hparams[name] for name in fixed}, epochs)
    if module.hparams.specification is not None:
        own, other = (
            specification_in(run, f"resume is {path}") for run in (module.hparams, checkpoint["hyper_parameters"])
        )
        if reason := other.differences(own):
            raise ValueError(f"resume is {path}; its network was built with {reason}")
    check_training_state(checkpoint, module, path)
    planned = checkpoint.get("epochs")
    endless = _is_endless(module.hparams) and not module.own_loss  # which may have phases that are shares of the run
    if planned != epochs and not endless:
        raise ValueError(
            f"resume is {path}; its schedule is of {_epochs(planned)}, but this run has epochs={epochs}: keep the "
            "number, or start a run from its weights with initial_checkpoint"
        )
    return checkpoint


def summary_rows(path: str | Path) -> list[dict]:
    """Return the rows of the summary in a checkpoint, one for each completed epoch.

    Args:
        path: the file.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`.
    """
    return read_checkpoint(path).get("callbacks", {}).get("EpochSummary", {"rows": []})["rows"]


def epochs_done(path: str | Path) -> int:
    """Return how many epochs a checkpoint has completed.

    Args:
        path: the file.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`.
    """
    return _epochs_done(read_checkpoint(path))


def _epochs(count: int | None) -> str:
    if count is None:
        return "no number of epochs"
    return f"{count} epoch{'s' * (count != 1)}"


def _epochs_done(checkpoint: dict) -> int:
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


def kept_epochs(folder: Path) -> list[Path]:
    """Return the files of a folder that `CheckpointHistory` has written, and no others, such as `epoch=4.ckpt`."""
    return sorted(path for path in folder.glob("epoch*.ckpt") if re.fullmatch(r"epoch\d+\.ckpt", path.name))


def check_unused(folder: str | Path, option: str, resume: Path | None = None, finished: bool = True) -> None:
    """Check that a run would not overwrite another, finished or not.

    A run without epochs, as of k-means, is finished when its summary exists.

    Args:
        folder: of the run.
        option: the option that allows overwriting, for the message.
        resume: the checkpoint that the run is resumed from; a run may go on in its own folder.
        finished: whether a summary without epochs is that of a finished run.

    Raises:
        FileExistsError: another run is in the folder, and could be resumed or is finished; or a checkpoint there is of
            another program.
    """
    folder = Path(folder)
    if is_within(resume, folder):
        return
    choice = f"choose another folder, or overwrite it with {option}"
    for name in (LAST, PREVIOUS, BEST):
        try:
            checkpoint = read_checkpoint(folder / name)
        except (DamagedFile, FileNotFoundError):  # nobody can resume from a damaged one
            continue
        except ValueError as error:
            raise FileExistsError(
                f"output is {folder}; it has a {name} that is no checkpoint of a run, and may be another program's: "
                f"{choice}"
            ) from error
        source = folder / name if name == BEST else "auto"
        raise FileExistsError(f"output is {folder}; it has {_described(checkpoint, source, choice)}")
    if kept := kept_epochs(folder):
        raise FileExistsError(f"output is {folder}; it has {kept[0].name} of another run: {choice}")
    summary = folder / "summary.csv"
    if finished and summary.is_file() and not summary.read_text(encoding="utf-8", errors="replace").startswith("epoch"):
        raise FileExistsError(f"output is {folder}; it has a finished run: {choice}")


def planned_epochs(trainer: pl.Trainer) -> int | None:
    """Return the number of epochs of a run, None for one that `max_steps` ends, whose number is -1 to Lightning."""
    return None if trainer.max_epochs == -1 else trainer.max_epochs


def is_within(resume: str | Path | None, folder: Path) -> bool:
    """Return whether a run goes on in its own folder: the checkpoint that it is resumed from, if any, lies there.

    It may lie in a folder below, as those of Lightning's ModelCheckpoint do, which is none of another run.
    """
    if resume is None:
        return False
    resume, folder = Path(resume), folder.resolve()
    places = resume.parent.resolve(), resume.resolve().parent  # it may be a link, from or to the folder
    return any(
        place == folder or (folder in place.parents and not (place / "summary.csv").is_file()) for place in places
    )


def remove_results(folder: Path, resume: str | Path | None = None) -> None:
    """Remove the results of another run from the folder of a run that starts anew.

    If this run were killed before its first save, they would be taken for its own. `epoch12.ckpt` and the like are left
    to `CheckpointHistory`.

    Args:
        folder: of the run.
        resume: the checkpoint that the run is resumed from; a run that goes on in its own folder keeps all.
    """
    if not is_within(resume, folder):
        for name in (LAST, PREVIOUS, BEST, "assignments.csv", "summary.csv", "routers.csv"):
            (folder / name).unlink(missing_ok=True)


def _described(checkpoint: dict, resume: str | Path, choice: str) -> str:
    """Say whether the run of a checkpoint is finished, and what to do: the choice, or go on with that run."""
    done, planned = _epochs_done(checkpoint), checkpoint.get("epochs")
    if planned is None or (done < planned and not checkpoint.get("stopped_early")):
        part = _epochs(done) if planned is None else f"{done} of {planned} epochs"
        return f"an unfinished run, {part} done: continue it by --resume {resume}, {choice}"
    more = "--resume and more epochs continue it"
    if is_of("train", checkpoint) and not _is_endless(checkpoint["hyper_parameters"]):
        more = "--initial-checkpoint trains on from its weights, in another folder"
    return f"a finished run of {_epochs(done)}: {choice}; {more}"


def _is_endless(options: Mapping) -> bool:
    """Return whether the learning rate of each epoch does not depend on the number of epochs."""
    sched = options.get("sched")
    return sched == "step" or (sched == "multistep" and bool(options.get("decay_milestones")))


def load_weights(model: nn.Module, path: str | Path, averaged: bool = True, name: str = "initial_checkpoint") -> None:
    """Load a network's weights from a checkpoint of a training run, or from a file of its `state_dict`.

    Args:
        model: the network, changed in place.
        path: a `.ckpt` of a run, a file of a state_dict, or a `.safetensors`. A digest beside it is verified, as
            `save_weights` or `sha256sum` writes it to `<name>.sha256`.
        averaged: whether to prefer the moving average, if the run kept one, to the trained weights.
        name: the argument that the file was given as, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, has no weights, or those of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{name} is {path}; there is no such file")
    try:
        weights = read_tensors(path)
    except DamagedFile as error:
        raise DamagedFile(f"{name} is {path}; its weights cannot be read: {error}; {_advice(path)}") from error
    except Exception as error:  # any error of the reader on bytes of another format
        raise ValueError(f"{name} is {path}; it holds no weights: {in_a_line(error)}") from error
    load_state(model, weights, f"{name} is {path}", averaged)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a network's weights atomically, for `load_weights` or any other reader.

    Args:
        model: the network, whose `state_dict` is written.
        path: a `.safetensors`, whose SHA-256 is written beside it to `<name>.sha256`, as the format has no checksums; a
            file of any other name is written by `torch.save`.

    Raises:
        OSError: the file cannot be written; the previous one is intact.
    """
    path, weights = Path(path), {name: value.detach().cpu() for name, value in model.state_dict().items()}
    with replacing(path, "wb") as file:
        if path.suffix == ".safetensors":
            from safetensors.torch import save

            file.write(
                save({name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()})
            )
        else:
            torch.save(weights, file)
        file.flush()
        os.fsync(file.fileno())  # the previous file keeps its digest if the disk is full
        digest_path(path).unlink(missing_ok=True)
    if path.suffix == ".safetensors":
        write_digest(path)
