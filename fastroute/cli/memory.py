"""Settings of the C library's memory allocator."""

import ctypes


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system after every step.

    Each step allocates the same memory again, and mapping it page by page took about 8 % of a CPU training step of
    resnet20_cc2. Other C libraries have no `mallopt`; the function then does nothing.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 << 20)  # the largest that glibc allows
