"""Optional dependencies, and the error that says how to install a missing one."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Name the `pip install` that adds a third-party package whose import fails inside the block.

    Args:
        name: the extra of fastroute that has the package.
        what: the subject of the message.

    Raises:
        ModuleNotFoundError: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = None if error.name is None else error.name.partition(".")[0]
        if package in (None, "fastroute"):
            raise
        message = f"{what} needs the package {package}, which is not installed: pip install 'fastroute[{name}]'"
        raise ModuleNotFoundError(message, name=error.name) from None
