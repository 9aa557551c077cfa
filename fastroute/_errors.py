"""Formatting of error messages."""

import re
import unicodedata

_COLOUR = re.compile("\x1b\\[[0-9;]*m")


def in_a_line(error: BaseException) -> str:
    """Return the error's type and the first line of its message: torch's messages can be pages long."""
    text = _COLOUR.sub("", str(error)).strip() or "-"
    return f"{type(error).__name__}: {printable(text.splitlines()[0])}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def kind(value: object) -> str:
    """Return what an object is, for messages: "the class Net", or "a DataLoader"."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def printable(text: object) -> str:
    """Return text as one line that every terminal and encoding can show.

    A file name may hold control characters, which a terminal obeys, and bytes that are not text, which cannot be
    encoded. Both are shown as escapes such as `\\x1b`.
    """
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in str(text)
    )
