"""What errors say."""


def in_a_line(error: Exception) -> str:
    """The error's type and the first line of its message: torch's can be pages long."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
