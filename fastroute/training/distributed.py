"""Several processes, as `torchrun` starts them."""

import contextlib
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import distributed as dist

from fastroute._errors import in_a_line
from fastroute._timeout import patience
from fastroute.training.roll_call import reason

T = TypeVar("T")


class ProcessLost(RuntimeError):
    """Another process of the run does not answer any more."""


def world_size() -> int:
    """The number of processes that `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the process that speaks and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def check_gpus() -> None:
    """Raise where `torchrun` started more processes on this machine than it has GPUs, if it has any.

    Raises:
        ValueError: as said.
    """
    here, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if torch.cuda.is_available() and here > count:
        raise ValueError(
            f"torchrun started {here} processes on a machine with {count} GPU{'s' * (count != 1)}; start one for each, "
            "or set CUDA_VISIBLE_DEVICES to nothing to train on the CPU"
        )


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Processes started by `torchrun` know each other in the block: through NCCL with GPUs, else through Gloo.

    Raises:
        ValueError: there are more of them than GPUs; see `check_gpus`.
        ProcessLost: talking to another process has failed; see `patience`.
    """
    check_gpus()
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=patience())
    try:
        yield
    except RuntimeError as error:
        raise_where_lost(error)
        raise
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def first_on_each_node() -> Iterator[None]:
    """The first process of each machine runs the block before the others, as for a download."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if dist.is_initialized() and not first:
        dist.barrier()
    yield
    if dist.is_initialized() and first:
        dist.barrier()


def agreed(value: T) -> T:
    """The first process's value, in all of them.

    Raises:
        ProcessLost: another process is gone.
    """
    if not dist.is_initialized():
        return value
    values = [value]
    try:
        dist.broadcast_object_list(values)
    except RuntimeError as error:
        raise_where_lost(error)
        raise
    return values[0]


def gathered(value: T) -> list[T]:
    """The values of all processes, in the first one; in the others, nothing. Tensors in them must be on the CPU."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def raise_where_lost(error: BaseException, advice: str = "") -> None:
    """Raise `ProcessLost` in place of an error with which PyTorch reports that another process is gone or silent.

    Args:
        error: what was raised; any other error is left alone.
        advice: added to the sentence, after what has happened.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, ProcessLost) or not dist.is_initialized():
        return
    if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
        rank = dist.get_rank()
        raise ProcessLost(f"{reason(error)}, so process {rank} cannot go on{advice}: {in_a_line(error)}") from error
