"""How long processes wait for each other, and which of them did not answer."""

import datetime

from torch import distributed as dist

from fastroute._timeout import VARIABLE, patience

ANSWER = 10.0
"""Seconds in which a process that lives answers."""


def reason(error: BaseException) -> str:
    """What is known of a failed talk between processes: after a wait, who did not answer a roll call.

    All that wait do so for the same talk, and therefore give up at about the same time.
    """
    if "timed out" not in str(error).lower():
        return "another process of this run is gone"
    silent = _silent()
    if not silent:
        return f"the processes of this run did not come together within {patience().total_seconds():.0f} s"
    names = f"process {silent[0]}" if len(silent) == 1 else f"the processes {', '.join(map(str, silent))}"
    return (
        f"{names} of this run did not answer within {patience().total_seconds():.0f} s, as one that is stopped or "
        f"waits for its data; {VARIABLE} sets how long others wait"
    )


def _silent() -> list[int]:
    """The ranks that do not answer."""
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
