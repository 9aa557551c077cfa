"""The processors that this process may use."""

import os


def processors() -> int:
    """Return their number: those of the machine, or fewer by `taskset`, a batch system or a container's cpuset."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
