"""How much memory there is."""

import contextlib
import os
from pathlib import Path


def machine_memory() -> int:
    """Bytes of this machine's memory, or of the share of it that its container has."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is none
            sizes.append(int((Path("/sys/fs/cgroup") / limit).read_text()))
    return min(sizes)


def check_memory(needed: int, what: str, advice: str, there: int | None = None) -> None:
    """Raise where more bytes are needed than there are: `there`, or else those of this machine.

    Raises:
        ValueError: as said.
    """
    there = machine_memory() if there is None else there
    if needed > there:
        raise ValueError(f"{what} at least {_gib(needed)} of memory, and there are {_gib(there)}: {advice}")


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
