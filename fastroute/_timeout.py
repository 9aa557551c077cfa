"""Timeout of waits between processes."""

import datetime
import os

VARIABLE = "FASTROUTE_TIMEOUT"


def timeout() -> datetime.timedelta:
    """Return how long a process waits for another: the seconds in `FASTROUTE_TIMEOUT`, or half an hour.

    Raises:
        ValueError: the variable is not an integer.
    """
    text = os.environ.get(VARIABLE, "1800")
    try:
        return datetime.timedelta(seconds=max(1, int(text)))
    except (ValueError, OverflowError):
        raise ValueError(f"{VARIABLE} is {text!r}; it must be the seconds to wait for another process") from None
