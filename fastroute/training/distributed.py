"""Training in several processes that `torchrun` starts."""

import contextlib
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import distributed as dist

from fastroute._errors import in_a_line
from fastroute._timeout import timeout
from fastroute.training.roll_call import describe_failure

T = TypeVar("T")


class ProcessLost(RuntimeError):
    """Raised when another process of the run has exited or no longer answers."""


def world_size() -> int:
    """Return the number of processes that `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Return whether this process has rank 0, which alone prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def check_gpus() -> None:
    """Check that `torchrun` started no more processes on this machine than it has GPUs, if it has any.

    Raises:
        ValueError: there are more processes than GPUs.
    """
    here, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if torch.cuda.is_available() and here > count:
        raise ValueError(
            f"torchrun started {here} processes on a machine with {count} GPU{'s' * (count != 1)}; start one for each, "
            "or set CUDA_VISIBLE_DEVICES to nothing to train on the CPU"
        )


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that `torchrun` started in a process group for the block: NCCL with GPUs, else Gloo.

    Raises:
        ValueError: there are more processes than GPUs; see `check_gpus`.
        ProcessLost: communication with another process failed; see `fastroute._timeout.timeout`.
    """
    check_gpus()
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timeout())
    try:
        yield
    except RuntimeError as error:
        raise_if_process_lost(error)
        raise
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Run the block in local rank 0 of each machine before the other processes, as for a download."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if dist.is_initialized() and not first:
        dist.barrier()
    yield
    if dist.is_initialized() and first:
        dist.barrier()


def broadcast_from_rank_zero(value: T) -> T:
    """Return the value of rank 0 in every process.

    Args:
        value: of this process; it must pickle.

    Raises:
        ProcessLost: another process is gone.
    """
    if not dist.is_initialized():
        return value
    values = [value]
    try:
        dist.broadcast_object_list(values)
    except RuntimeError as error:
        raise_if_process_lost(error)
        raise
    return values[0]


def gather_to_rank_zero(value: T) -> list[T]:
    """Gather the values of all processes in rank 0.

    Args:
        value: of this process; it must pickle, with its tensors on the CPU.

    Returns:
        in rank 0, the values in the order of the ranks; in the other processes, an empty list.
    """
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def raise_if_process_lost(error: BaseException, advice: str = "") -> None:
    """Replace PyTorch's error about a process that is gone or silent by `ProcessLost`.

    Args:
        error: any error; the function returns if it has another cause.
        advice: appended to the message.

    Raises:
        ProcessLost: the error says that communication with another process failed.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, ProcessLost) or not dist.is_initialized():
        return
    if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
        rank = dist.get_rank()
        raise ProcessLost(
            f"{describe_failure(error)}, so process {rank} cannot go on{advice}: {in_a_line(error)}"
        ) from error
