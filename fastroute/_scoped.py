"""Settings of the process that hold from a statement on, or inside a `with` block."""

from typing import Any


class Scoped:
    """Base of a setting: `setting(value)` sets it, and a `with` block around it restores the value from before.

    The same object may be entered again, also inside itself: the end of each block restores what was set before it.
    Subclasses implement `_get` and `_set`.

    Args:
        value: the new value, as `_set` takes it.
    """

    def __init__(self, value: Any):
        self._value, self._before, self._stated, self._open = value, self._get(), True, []
        self._set(value)

    def __enter__(self) -> None:
        by_statement = self._stated and self._get() == self._value  # `with setting(value)` has just set it
        self._open.append(self._before if by_statement else self._get())
        self._stated = False
        self._set(self._value)

    def __exit__(self, *_: object) -> None:
        self._set(self._open.pop())

    def _get(self) -> Any:
        """Return the value that holds."""
        raise NotImplementedError

    def _set(self, value: Any) -> None:
        """Set the value for the whole process."""
        raise NotImplementedError
