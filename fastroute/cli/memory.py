"""Memory that a process keeps for its next step."""

import ctypes


def keep_freed_memory() -> None:
    """Have glibc keep what is freed instead of handing it back to the system after every step.

    Each step asks for the same memory again, and mapping it page by page took about 8 % of a CPU training step of
    resnet20_cc2. Other C libraries have no `mallopt`, and are left as they are.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 << 20)  # the most that glibc allows
