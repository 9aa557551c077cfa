"""The operators' namespaces: `fastroute::`, and `fastroute_python::`, which is always implemented in Python.

The compiled library defines both, checks the arguments and registers autograd. Without it, Python does.
"""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastroute.ops import _compiled

# The reason why the compiled library is not used, or None.
NOT_COMPILED = _compiled.load_operators()
_compiled.load_cpu()

_KIND = "DEF" if NOT_COMPILED else "FRAGMENT"
LIBRARY = torch.library.Library("fastroute", _KIND)
PYTHON = torch.library.Library("fastroute_python", _KIND)

# Operator name -> prepare(*args): checks the arguments and returns them in the form that every backend takes.
OPERATORS: dict[str, Callable] = {}

# Operator name -> its kernel for the user's arguments; filled in by the backends.
KERNELS: dict[str, Callable] = {}


def schemas() -> list[str]:
    """Return the schema of each operator, from the file that C++ includes."""
    text = Path(__file__).with_name("schemas.inc").read_text()
    entries = re.findall(r'^FASTROUTE_OPERATOR\(((?:\s*"[^"]*")+)\)', text, re.MULTILINE)
    return ["".join(re.findall(r'"([^"]*)"', entry)) for entry in entries]


# Operator name -> its implementation in plain PyTorch for the user's arguments; filled in by the backends.
PLAIN: dict[str, Callable] = {}

if NOT_COMPILED:
    for _schema in schemas():
        LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
        PYTHON.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def define(name: str, prepare: Callable, fake: Callable):
    """Register an operator's checks and fake kernel, and return the operator. The backends add the kernels."""
    for library in (LIBRARY, PYTHON):
        torch.library.register_fake(f"{library.ns}::{name}", lambda *args: fake(*prepare(*args)), lib=library)
    OPERATORS[name] = prepare
    return getattr(torch.ops.fastroute, name).default


def implement(name: str, function: Callable, key: str) -> None:
    """Register a Python implementation for a dispatch key; without the compiled library, for `fastroute::` too."""
    PYTHON.impl(name, function, key)
    if NOT_COMPILED:
        LIBRARY.impl(name, function, key)


def without_autocast(device_type: str):
    """Return a context that disables autocast, which would cast float32 computations. Meta tensors have no autocast."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def differentiate(name: str, backward: Callable, setup_context: Callable | None = None) -> None:
    """Register a derivative in Python, computed without autocast, for an operator such as another's backward."""

    def exact(ctx, *grads):
        lists = (grad if isinstance(grad, (list, tuple)) else [grad] for grad in grads)
        given = next(grad for each in lists for grad in each if grad is not None)
        with without_autocast(given.device.type):
            return backward(ctx, *grads)

    for library in (LIBRARY, PYTHON):
        torch.library.register_autograd(f"{library.ns}::{name}", exact, setup_context=setup_context, lib=library)


def under_transform() -> bool:
    """Return whether a torch.func transform, such as vmap, or forward-mode differentiation is active."""
    return torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0


def call(operator, *args):
    """Call an operator; under a transform, compute it in plain PyTorch, which transforms can trace."""
    if not torch.compiler.is_compiling() and under_transform():
        return PLAIN[_operator_name(operator)](*args)
    return operator(*args)


def _operator_name(operator) -> str:
    return operator._schema.name.partition("::")[2]


def below_autograd(operator, x: Tensor, *args):
    """Call an operator below autograd, and bypass the dispatcher, which costs 20 µs, where possible.

    Dispatch modes, compilers, tensor subclasses and second derivatives need the dispatcher. x is one of the operator's
    tensors.
    """
    plain = type(x) is Tensor and not torch.is_grad_enabled() and not torch._C._len_torch_dispatch_stack()
    if plain and not torch.compiler.is_compiling():
        return KERNELS[_operator_name(operator)](*args)
    if torch.is_grad_enabled():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)
