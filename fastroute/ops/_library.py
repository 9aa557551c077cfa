"""The operators' namespaces: `fastroute::`, and `fastroute_python::`, which always goes through Python.

The compiled library defines both, checks the arguments and differentiates. Where there is none, Python does.
"""

import contextlib
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


# Operator name -> what computes it in plain PyTorch for arguments as the user gives them: the backends fill this in.
PLAIN: dict[str, Callable] = {}

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


def without_autocast(device_type: str):
    """Switch autocast off: it would cast what is computed in float32 on purpose. Meta tensors have none."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def differentiate(name: str, backward: Callable, setup_context: Callable | None = None) -> None:
    """Give an operator, such as another's backward, a derivative that Python computes, without autocast."""

    def exact(ctx, *grads):
        lists = (grad if isinstance(grad, (list, tuple)) else [grad] for grad in grads)
        given = next(grad for each in lists for grad in each if grad is not None)
        with without_autocast(given.device.type):
            return backward(ctx, *grads)

    for library in (LIBRARY, PYTHON):
        torch.library.register_autograd(f"{library.ns}::{name}", exact, setup_context=setup_context, lib=library)


def transformed() -> bool:
    """Whether a transform of torch.func, such as vmap, or forward-mode differentiation is at work."""
    return torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0


def call(operator, *args):
    """Call an operator; under a transform compute it in plain PyTorch, which transforms see through."""
    if not torch.compiler.is_compiling() and transformed():
        return PLAIN[_name(operator)](*args)
    return operator(*args)


def _name(operator) -> str:
    return operator._schema.name.partition("::")[2]


def below_autograd(operator, x: Tensor, *args):
    """Call an operator below autograd, past the dispatcher where nothing but its kernel would see the call.

    x is one of its tensors. Modes, compilers, subclasses and second derivatives need the dispatcher, which costs 20 µs.
    """
    plain = type(x) is Tensor and not torch.is_grad_enabled() and not torch._C._len_torch_dispatch_stack()
    if plain and not torch.compiler.is_compiling():
        return KERNELS[_name(operator)](*args)
    if torch.is_grad_enabled():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)
