"""The optional parts of the package, and the sentence that says how to add a missing one."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Have a missing third-party package, imported inside the block, name the `pip install` that adds it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "fastroute":
            raise
        message = f"{what} needs the package {error.name}, which is not installed: pip install 'fastroute[{name}]'"
        raise ModuleNotFoundError(message, name=error.name) from None
