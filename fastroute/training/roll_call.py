"""A roll call that names the processes which do not answer."""

import datetime

from torch import distributed as dist

from fastroute._timeout import VARIABLE, timeout

ANSWER = 10.0
"""Seconds within which a live process answers."""


def describe_failure(error: BaseException) -> str:
    """Describe why communication between processes failed; after a timeout, name the processes that do not answer.

    All waiting processes wait for the same collective operation, so they time out, and answer, at about the same time.

    Args:
        error: PyTorch's.

    Returns:
        the beginning of a sentence.
    """
    if "timed out" not in str(error).lower():
        return "another process of this run is gone"
    silent = _silent_ranks()
    if not silent:
        return f"the processes of this run did not reach the same operation within {timeout().total_seconds():.0f} s"
    names = f"process {silent[0]}" if len(silent) == 1 else f"the processes {', '.join(map(str, silent))}"
    return (
        f"{names} of this run did not answer within {timeout().total_seconds():.0f} s: it may be stopped or "
        f"waiting for data; {VARIABLE} sets the timeout"
    )


def _silent_ranks() -> list[int]:
    """Return the ranks that do not answer."""
    store, silent = dist.distributed_c10d._get_default_store(), []
    try:
        store.set(f"fastroute/here/{dist.get_rank()}", "")
    except RuntimeError:  # the store is gone with the process that held it
        return silent
    for rank in range(dist.get_world_size()):
        try:
            store.wait([f"fastroute/here/{rank}"], datetime.timedelta(seconds=0.5 if silent else ANSWER))
        except RuntimeError:
            silent.append(rank)
    return silent
