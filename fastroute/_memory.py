"""Available memory."""

import contextlib
import os
from pathlib import Path


def machine_memory() -> int:
    """Return the memory of this machine, or the limit of its container, in bytes."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" means no limit
            sizes.append(int((Path("/sys/fs/cgroup") / limit).read_text()))
    return min(sizes)


def check_memory(needed: int, what: str, advice: str, available: int | None = None) -> None:
    """Raise if more memory is needed than is available.

    Args:
        needed: bytes.
        what: subject and verb of the message.
        advice: what to do about it.
        available: bytes; None for the memory of this machine.

    Raises:
        ValueError: `needed` exceeds `available`.
    """
    available = machine_memory() if available is None else available
    if needed > available:
        raise ValueError(f"{what} at least {_gib(needed)} of memory, and {_gib(available)} are available: {advice}")


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
