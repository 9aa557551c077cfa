"""Plain values in place of NumPy's, which no checkpoint holds."""

import functools
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, TypeVar

from torch import Tensor

Function = TypeVar("Function", bound=Callable)


def plain(value: Any, tensors: bool = True) -> Any:
    """Convert NumPy's numbers and tensors without axes to Python's numbers, arrays to lists, and paths to strings.

    Lists, tuples and dicts are those given unless something in them is replaced. All other values are returned as they
    are.

    Args:
        value: anything.
        tensors: whether to replace tensors without axes.

    Example:
        >>> plain({"lr": np.float32(0.5), "milestones": np.array([1, 2])})
        {'lr': 0.5, 'milestones': [1, 2]}
    """
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if tensors and isinstance(value, Tensor) and value.dim() == 0:
        return value.item()
    if isinstance(value, PurePath):
        return str(value)
    if type(value) in (list, tuple):
        items = [plain(item, tensors) for item in value]
        return value if _same(items, value) else type(value)(items)
    if isinstance(value, dict):
        items = {key: plain(item, tensors) for key, item in value.items()}
        return value if _same(items.values(), value.values()) else items
    return value


def takes_plain_values(function: Function) -> Function:
    """Decorate a function so that it accepts NumPy's numbers in place of Python's."""

    @functools.wraps(function)
    def wrapper(*args, **options):
        return function(*map(plain, args), **{name: plain(value) for name, value in options.items()})

    return wrapper


def _same(new, old) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))
