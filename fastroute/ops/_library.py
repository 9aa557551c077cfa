"""The operators' namespaces: `fastroute::`, and `fastroute_python::`, which always goes through Python.

The compiled library defines both, checks the arguments and differentiates. Where there is none, Python does.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastroute.ops import _compiled

# Why there is no compiled library, or None.
NOT_COMPILED = _compiled.load_operators()
_compiled.load_cpu()

_KIND = "DEF" if NOT_COMPILED else "FRAGMENT"
LIBRARY = torch.library.Library("fastroute", _KIND)
PYTHON = torch.library.Library("fastroute_python", _KIND)

# Operator name -> prepare(*args): checks the arguments and returns them in the form that every backend takes.
OPERATORS: dict[str, Callable] = {}

# Operator name -> what computes it for arguments as the user gives them: the backends fill this in.
KERNELS: dict[str, Callable] = {}


def schemas() -> list[str]:
    """Return the schema of each operator, as C++ includes them."""
    text = Path(__file__).with_name("schemas.inc").read_text()
    entries = re.findall(r'^FASTROUTE_OPERATOR\(((?:\s*"[^"]*")+)\)', text, re.MULTILINE)
    return ["".join(re.findall(r'"([^"]*)"', entry)) for entry in entries]


if NOT_COMPILED:
    for _schema in schemas():
        LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
        PYTHON.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def define(name: str, prepare: Callable, fake: Callable):
    """Add an operator's checks and fake kernel; return it. Who computes it is the backends' business."""
    for library in (LIBRARY, PYTHON):
        torch.library.register_fake(f"{library.ns}::{name}", lambda *args: fake(*prepare(*args)), lib=library)
    OPERATORS[name] = prepare
    return getattr(torch.ops.fastroute, name).default


def implement(name: str, function: Callable, key: str) -> None:
    """Have Python's way compute an operator for a dispatch key: all of it where there is no compiled library."""
    PYTHON.impl(name, function, key)
    if NOT_COMPILED:
        LIBRARY.impl(name, function, key)


def differentiate(name: str, backward: Callable, setup_context: Callable | None = None) -> None:
    """Give an operator, such as another's backward, a derivative that Python computes."""
    for library in (LIBRARY, PYTHON):
        torch.library.register_autograd(f"{library.ns}::{name}", backward, setup_context=setup_context, lib=library)


def below_autograd(operator, x: Tensor, *args):
    """Call an operator below autograd, past the dispatcher where nothing but its kernel would see the call.

    x is one of its tensors. Modes, compilers, subclasses and second derivatives need the dispatcher, which costs 20 µs.
    """
    plain = type(x) is Tensor and not torch.is_grad_enabled() and not torch._C._len_torch_dispatch_stack()
    if plain and not torch.compiler.is_compiling():
        return KERNELS[operator._schema.name.partition("::")[2]](*args)
    if torch.is_grad_enabled():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)
