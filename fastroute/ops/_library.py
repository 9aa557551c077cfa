"""The operators' namespaces.

`fastroute::` is the users'. `fastroute_python::` is always implemented in Python. The compiled library defines both,
checks the arguments and registers autograd; without it, Python does. `fastroute_fused::` has the same operators again,
for graphs in which Inductor is to decompose them and fuse them with their neighbours. It is a namespace of its own
because the caches of compiled graphs on disk know an operator by its name alone.
"""

import contextlib
import re
from collections.abc import Callable
from numbers import Real
from pathlib import Path

import torch
from torch import SymFloat, SymInt, Tensor
from torch.utils import _pytree as pytree

from fastroute.ops import _compile_form, _compiled, _inductor

# The reason why the compiled library is not used, or None.
NOT_COMPILED = _compiled.load_operators()
_compiled.load_cpu()

_KIND = "DEF" if NOT_COMPILED else "FRAGMENT"
LIBRARY = torch.library.Library("fastroute", _KIND)
PYTHON = torch.library.Library("fastroute_python", _KIND)
FUSED = torch.library.Library("fastroute_fused", "DEF")

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

for _library in (LIBRARY, PYTHON, FUSED) if NOT_COMPILED else (FUSED,):
    for _schema in schemas():
        _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


# Operator -> its name, and its twin that Inductor decomposes.
TO_FUSE: dict[Callable, tuple[str, Callable]] = {}

# Operators that are one node in Inductor's graphs.
NODES: list[Callable] = []


def _nodes() -> list[Callable]:
    return NODES


def add_node(name: str, fake: Callable) -> Callable:
    """Register the fake kernel of an operator that has compiled kernels alone, and return the operator."""
    operator = getattr(torch.ops.fastroute_native, name).default
    torch.library.register_fake(f"fastroute_native::{name}", _one_node(fake))
    NODES.append(operator)
    return operator


def _one_node(fake: Callable) -> Callable:
    def traced(*args):
        _inductor.let_maps_be_channels_last(_nodes)
        return fake(*args)

    return traced


def define(name: str, prepare: Callable, fake: Callable):
    """Register an operator's checks and fake kernel, and return the operator. The backends add the kernels."""

    def to_fuse(*args):
        _inductor.add_decompositions(_decompositions)
        return fake(*prepare(*args))

    one_node = _one_node(lambda *args: fake(*prepare(*args)))
    for library in (LIBRARY, PYTHON, FUSED):
        function = to_fuse if library is FUSED else one_node
        torch.library.register_fake(f"{library.ns}::{name}", function, lib=library)
    OPERATORS[name] = prepare
    for namespace in (torch.ops.fastroute_python, torch.ops.fastroute):
        operator = getattr(namespace, name).default
        TO_FUSE[operator] = name, getattr(torch.ops.fastroute_fused, name).default
        NODES.append(operator)
    return operator


def _decompositions() -> dict[Callable, Callable]:
    return {getattr(torch.ops.fastroute_fused, name).default: _decomposed(plain) for name, plain in PLAIN.items()}


def _decomposed(plain: Callable) -> Callable:
    def decompose(*args):
        tensor = next(arg for arg in pytree.tree_leaves(args) if isinstance(arg, Tensor))
        with without_autocast(tensor.device.type):
            return plain(*args)

    return decompose


def implement(name: str, function: Callable, key: str) -> None:
    """Register a Python implementation for a dispatch key; without the compiled library, for `fastroute::` too."""
    for library in (LIBRARY, PYTHON, FUSED) if NOT_COMPILED else (PYTHON, FUSED):
        library.impl(name, function, key)


def implement_autograd(name: str, function: Callable) -> None:
    """Register autograd in Python: function(operators, *args) calls `operators`, the forward and the backward."""
    for library in (LIBRARY, PYTHON, FUSED) if NOT_COMPILED else (PYTHON, FUSED):
        namespace = getattr(torch.ops, library.ns)
        operators = (getattr(namespace, name).default, getattr(namespace, f"{name}_backward").default)
        library.impl(name, lambda *args, operators=operators: function(operators, *args), "Autograd")


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
            results = backward(ctx, *grads)
        return _once_differentiated(name, results) if torch.is_grad_enabled() else results

    for library in (LIBRARY, PYTHON, FUSED):
        torch.library.register_autograd(f"{library.ns}::{name}", exact, setup_context=setup_context, lib=library)


def _once_differentiated(name: str, results):
    """Return results that raise if they are differentiated: a derivative in Python is computed without a graph."""
    leaves, structure = pytree.tree_flatten(results)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    message = f"{name} is differentiated twice; fastroute's operators have first and second derivatives only"
    marked = torch._C._functions.DelayedError(message, len(places))(
        *(leaves[i].detach().requires_grad_() for i in places)
    )
    for i, leaf in zip(places, [marked] if isinstance(marked, Tensor) else marked, strict=True):
        leaves[i] = leaf
    return pytree.tree_unflatten(leaves, structure)


def under_transform() -> bool:
    """Return whether a torch.func transform, such as vmap, or forward-mode differentiation is active."""
    return torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0


def under_vmap() -> bool:
    """Return whether `torch.func.vmap` is active, perhaps around another transform; False in compiled graphs."""
    if torch.compiler.is_compiling():  # which cannot trace the stack of transforms
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def call(operator, *args):
    """Call an operator: in plain PyTorch under a transform, which can trace that; in its form in compiled graphs."""
    if torch.compiler.is_compiling():
        return _traced(operator, *args)
    if under_transform():
        return PLAIN[_operator_name(operator)](*args)
    try:
        return operator(*args)
    except RuntimeError:
        _check_types(operator, args)
        raise


def _check_types(operator, args) -> None:
    """Raise TypeError if an argument has another type than the schema: the dispatcher's error is hard to read."""
    for argument, value in zip(operator._schema.arguments, args, strict=False):
        kind = str(argument.type)
        number = isinstance(value, (Real, SymInt, SymFloat)) or (isinstance(value, Tensor) and value.dim() == 0)
        if kind in ("Tensor", "Optional[Tensor]"):
            fits, expected = isinstance(value, Tensor), "a tensor"
            if kind != "Tensor":
                fits, expected = fits or value is None, "a tensor or None"
        elif kind == "float":
            fits, expected = number, "a number"
        else:
            continue
        if not fits:
            raise TypeError(f"{argument.name} is a {type(value).__name__}; it must be {expected}")


def _traced(operator, *args):
    first = args[0][0] if isinstance(args[0], list) and args[0] else args[0]
    if _compile_form.is_exporting():
        # AOTInductor's runtime passes an empty list, such as the strides of dense layers, as None.
        lacks = any(isinstance(argument, list) and not argument for argument in args)
        return PLAIN[_operator_name(operator)](*args) if lacks else operator(*args)
    if isinstance(first, Tensor):
        name, fused = TO_FUSE[operator]
        if _compile_form.fuses(name, first):
            return fused(*args)
    return operator(*args)


def _operator_name(operator) -> str:
    return operator._schema.name.partition("::")[2]


def _has_tangent(value) -> bool:
    return isinstance(value, Tensor) and torch.autograd.forward_ad.unpack_dual(value).tangent is not None


def below_autograd(operator, x: Tensor, *args):
    """Call an operator below autograd, and bypass the dispatcher, which costs 20 µs, where possible.

    Dispatch modes, compilers, tensor subclasses and second derivatives need the dispatcher. x is one of the operator's
    tensors.
    """
    if torch.autograd.forward_ad._current_level >= 0 and any(map(_has_tangent, pytree.tree_leaves(args))):
        raise RuntimeError(
            "the gradient of an operator's result has a forward-mode tangent, but the operator was called without "
            "forward AD: call it inside of torch.autograd.forward_ad.dual_level() too"
        )
    plain = type(x) is Tensor and not torch.is_grad_enabled() and not torch._C._len_torch_dispatch_stack()
    if plain and not torch.compiler.is_compiling():
        return KERNELS[_operator_name(operator)](*args)
    if torch.is_grad_enabled():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)
