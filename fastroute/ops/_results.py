"""Named tuples as results of programs that `torch.export` saves."""

from typing import TypeVar

from torch.utils import _pytree as pytree

Result = TypeVar("Result", bound=tuple)


def exportable(kind: type[Result]) -> type[Result]:
    """Give a named tuple the name under which `torch.export.save` stores it."""
    pytree._register_namedtuple(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
    return kind
