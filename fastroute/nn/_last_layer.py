"""Find the dense layer in which a module ends, without computing anything."""

import copy

import torch
from torch import fx, nn
from torch.nn import functional as F

from fastroute.nn.blocks import SEQUENTIAL
from fastroute.nn.router import unwrapped

_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Flatten)
_TRANSPARENT_CALLS = (
    *("flatten", "squeeze", "view", "reshape", "contiguous", "clone"),
    *("float", "double", "half", "bfloat16", "to", "type"),
    *(torch.flatten, torch.squeeze, torch.reshape, F.dropout),
)


def final_linear(module: nn.Module, name: str) -> str | None:
    """Return the name of the dense layer in which the module `name` ends, or None if it ends in another layer."""
    if isinstance(module, nn.Linear):
        return name
    last = _last(module)
    return None if last is None else final_linear(module.get_submodule(last), f"{name}.{last}")


def _last(module: nn.Module) -> str | None:
    """Return the name of the submodule whose output a module returns; None if it computes its output otherwise."""
    children = [child for child, inner in module._modules.items() if not isinstance(inner, _TRANSPARENT)]
    if (inner := unwrapped(module)) is not module:
        return next(name for name, child in module.named_modules() if child is inner)
    if isinstance(module, fx.GraphModule):
        return _last_call(module)
    if children and type(module).forward not in SEQUENTIAL:
        try:
            return _returned(module)
        except Exception:  # a user's forward may raise anything without values
            if sum(isinstance(inner, nn.Linear) for inner in module.modules()) > 1:
                return None  # rather than the wrong one
    return children[-1] if children else None


def _last_call(module: fx.GraphModule) -> str | None:
    node = module.graph.output_node().args[0]
    while isinstance(node, fx.Node) and node.args:
        if node.op == "call_module" and not isinstance(module.get_submodule(node.target), _TRANSPARENT):
            return node.target
        if node.op != "call_module" and node.target not in _TRANSPARENT_CALLS:
            return None
        node = node.args[0]
    return None


def _returned(module: nn.Module) -> str | None:
    """Return the submodule whose output a module's own forward returns, found by a call of it without values.

    The call gets a copy of the module without values, in which submodules only tell their names. torch.fx would not do:
    while it traces, no other thread can call a module.
    """
    stand_in = object.__new__(type(module))
    own = ("_parameters", "_buffers", "_modules")
    stand_in.__dict__ = copy.deepcopy({key: value for key, value in vars(module).items() if key not in own})
    for kind in ("_parameters", "_buffers"):
        tensors = vars(module)[kind].items()
        vars(stand_in)[kind] = {name: None if t is None else t.detach().to("meta") for name, t in tensors}
    stand_in._modules = {name: _Named(name, inner) for name, inner in module._modules.items()}
    result = type(module).forward(stand_in, _Value())
    return result.child if isinstance(result, _Value) else None


class _Value:
    """A tensor without values: it knows the submodule that computed it, if one did."""

    def __init__(self, child: str | None = None):
        self.child = child

    def __getattr__(self, name: str):
        return _Method(self, name)

    def __bool__(self):
        raise TypeError("a forward that depends on values")

    __iter__ = __bool__

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        first = next(iter((*arguments, *(options or {}).values())))
        return _Value(first.child) if function in _TRANSPARENT_CALLS else _Value()


class _Method(_Value):
    """An attribute of a value, which may be called as a method."""

    def __init__(self, value: _Value, name: str):
        super().__init__()
        self.value, self.name = value, name

    def __call__(self, *_, **__) -> _Value:
        if self.name == "size":
            return _Method(self.value, "shape")
        return _Value(self.value.child if self.name in _TRANSPARENT_CALLS else None)

    def __iter__(self):
        if self.name != "shape":
            raise TypeError("a forward that depends on values")
        return iter([_Value() for _ in range(4)])  # of (N, C, H, W)


def _computed(*_) -> _Value:
    return _Value()


def _scaled(value: _Value, other) -> _Value:
    return _Value(None if isinstance(other, _Value) else value.child)


_OPERATORS = "add radd sub rsub rtruediv matmul rmatmul pow neg getitem eq ne lt le gt ge"
for _name in _OPERATORS.split():
    setattr(_Value, f"__{_name}__", _computed)
for _name in ("mul", "rmul", "truediv"):
    setattr(_Value, f"__{_name}__", _scaled)


class _Named(nn.Module):
    """A submodule that tells its name and computes nothing."""

    def __init__(self, name: str, inner: nn.Module | None):
        super().__init__()
        self.name, self.transparent = name, isinstance(inner, _TRANSPARENT)
        self.inner = dict(getattr(inner, "_modules", {}))  # a dict, in which modules are not registered

    def forward(self, *arguments, **options) -> _Value:
        return (*arguments, *options.values())[0] if self.transparent else _Value(self.name)

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self):
        return (self[name] for name in self.inner)

    def __getitem__(self, key: int | str) -> "_Named":
        name = list(self.inner)[key] if isinstance(key, int) else key
        return _Named(f"{self.name}.{name}", self.inner[name])
