"""The `fastroute::` operator namespace, and `fastroute_python::`, where the way through Python can always be called."""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("fastroute", "DEF")
PYTHON = torch.library.Library("fastroute_python", "DEF")

# Operator name -> prepare(*args): checks the arguments and returns them in the form that every backend takes.
OPERATORS: dict[str, Callable] = {}


def define(schema: str, prepare: Callable, fake: Callable):
    """Add an operator with its fake kernel to the namespace; who computes it is the backends' business."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    PYTHON.define(schema)
    torch.library.register_fake(f"fastroute::{name}", lambda *args: fake(*prepare(*args)), lib=LIBRARY)
    OPERATORS[name] = prepare
    return getattr(torch.ops.fastroute, name).default
